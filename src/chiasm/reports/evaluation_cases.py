"""The pages and pictures of single cases of an evaluation: which cases, and what each shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from chiasm.cohorts.cases import Cohort, Problem
from chiasm.errors import CohortError
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder, load_case
from chiasm.evaluation.rows import Row
from chiasm.evaluation.scoring import reporting_unit
from chiasm.outputs import refuse_links
from chiasm.prediction.manifest import Entry
from chiasm.reports.case_page import CasePage, write_case_page
from chiasm.reports.case_scores import against_cohort
from chiasm.reports.gallery import GalleryCase, in_ras
from chiasm.reports.naive_comparison import rank
from chiasm.reports.pictures import write_picture
from chiasm.reports.tables import cases_of
from chiasm.volumes import canonical

GALLERY = 3  # cases with slices at the head of the report
PAGES = 24  # cases with a page of their own, unless more are asked for

Address = tuple[str, str]  # of a case's page, beside the others, and the case's name


@dataclass(frozen=True)
class CasePages:
    """Which pages single cases get.

    Attributes:
        most: At most as many.
        whole: Keep volumes uncut and unthinned.
        with_labels: Whether label maps are shown.
    """

    most: int = PAGES
    whole: bool = False
    with_labels: bool = True


def predicted_cases(assessed: Iterable[PredictionFolder]) -> Iterator[tuple[PredictionFolder, Entry]]:
    """List the predicted cases of several folders, each with the folder that it lies in."""
    return chain.from_iterable(zip(repeat(one), one.manifest.cases) for one in assessed)


def no_cases(what: str, problems: Sequence[Problem], path: Path) -> CohortError:
    """Return the error of work that no case came out of; it quotes the first problem."""
    detail = f"; the first: {problems[0].message}" if problems else ""
    return CohortError(f"{what}{detail}", path=path, reason="no-cases")


def was_seen(entry: Entry) -> bool:
    """Return whether a case was used in training."""
    return entry.role in ("train", "validation")


def warn_of_seen(seen: Sequence[str], count: int) -> Iterator[str]:
    """Say how many of `count` cases were used in training, and which; nothing where none was."""
    if seen:
        yield f"{len(seen)} of {count} cases were used in training: {', '.join(seen)}"


def write_cases(
    work: Iterable[tuple[PredictionFolder, Entry]],
    cohort: Cohort,
    rows: Sequence[Row],
    method: str,
    out: Path,
    pages: CasePages,
) -> tuple[list[GalleryCase], dict[str, str]]:
    """Write a page and a picture for each of the cases that show most.

    Args:
        work: Predicted cases, each with the folder that it lies in.
        cohort: With the real targets.
        rows: Of the evaluation.
        method: Whose predictions they are.
        out: Gets `cases/<case>.html` and, for the first few, `pictures/<case>.png`.
        pages: How many, and what they show.

    Returns:
        Cases for the report's gallery, and case id to its page's address beside the report.

    Raises:
        ChiasmError: If a case's files have gone or changed, or pages would be written through a link.
    """
    refuse_links(out, ("cases", "pictures"))
    mine = [row for row in rows if row.method == method]
    placed = _find_cases(work, cases_of(mine))
    chosen = list(islice(dict.fromkeys([*_most_instructive(mine, method, placed), *placed]), pages.most))
    links = {case: f"cases/{case}.html" for case in chosen}
    gallery: list[GalleryCase] = []
    for number, case in enumerate(chosen):
        one, entry = placed[case]
        loaded = load_case(one, entry, cohort, with_labels=pages.with_labels, naive=False)
        near = _beside(chosen, number - 1), _beside(chosen, number + 1)
        page = _page(loaded, one, against_cohort(mine, case, method), near, whole=pages.whole)
        write_case_page(out / links[case], page)
        if number < GALLERY:
            gallery.append(_shown(loaded, one))
            write_picture(out / "pictures" / f"{case}.png", gallery[-1])
    return gallery, links


def _find_cases(
    work: Iterable[tuple[PredictionFolder, Entry]], scored: Collection[str]
) -> dict[str, tuple[PredictionFolder, Entry]]:
    """Find the predictions of the cases that were scored."""
    return {entry.case: (one, entry) for one, entry in work if entry.case in scored}


def _most_instructive(rows: Sequence[Row], method: str, cases: Collection[str]) -> list[str]:
    """Name the worst, the median and the best case, where they are among `cases`."""
    ranking = rank([row for row in rows if not row.region.startswith("lesion-")], method=method) or {}
    return [ranking[name] for name in ("worst", "median", "best") if ranking.get(name) in cases]


def _beside(cases: Sequence[str], index: int) -> Address | None:
    return (f"{cases[index]}.html", cases[index]) if 0 <= index < len(cases) else None


def _page(
    loaded: EvaluationCase,
    assessed: PredictionFolder,
    scores: tuple[Any, ...],
    near: tuple[Address | None, Address | None],
    *,
    whole: bool,
) -> CasePage:
    """Collect what a case's own page shows."""
    plan = assessed.plan
    return CasePage(
        case=loaded.case.id,
        title=f"{loaded.case.id}: {' + '.join(plan.sources)} to {plan.target}",
        **_volumes(loaded, assessed),
        **_scale(assessed),
        affine=loaded.source.geometry.affine,
        source_name=f"{plan.sources[0]}{', not in the reference' if plan.sources[0] in loaded.lacks else ''}",
        target_name=plan.target,
        scores=scores,
        warnings=loaded.entry.warnings,
        report="../report.html",
        previous=near[0],
        following=near[1],
        whole=whole,
    )


def _shown(loaded: EvaluationCase, assessed: PredictionFolder) -> GalleryCase:
    """Collect what the gallery shows of a case, in RAS order."""
    grid = loaded.source.geometry
    volumes = _volumes(loaded, assessed)
    reordered: dict[str, Any] = {name: None if one is None else in_ras(one, grid) for name, one in volumes.items()}
    return GalleryCase(
        case=loaded.case.id,
        **reordered,
        **_scale(assessed),
        spacing_mm=canonical(loaded.source).geometry.spacing_mm,
        caption=f"{loaded.entry.role} case",
    )


def _volumes(loaded: EvaluationCase, assessed: PredictionFolder) -> dict[str, Any]:
    """Return the volumes of a case by name, those of the target in the unit of reports."""
    _, scale = reporting_unit(assessed.plan)
    return {
        "source": loaded.source.array,
        "real": loaded.target / scale,
        "synthetic": loaded.prediction / scale,
        "expected_error": None if loaded.expected_error is None else loaded.expected_error / scale,
        "mask": loaded.mask,
        "lesion": None if loaded.labels is None else loaded.labels > 0,
    }


def _scale(assessed: PredictionFolder) -> dict[str, Any]:
    """Return unit and window of real and synthetic images."""
    unit, scale = reporting_unit(assessed.plan)
    low, high = assessed.plan.target_range
    return {"unit": unit, "window": (low / scale, high / scale)}
