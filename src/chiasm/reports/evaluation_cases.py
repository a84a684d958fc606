"""The pages and pictures of single cases of an evaluation: which cases, and what each shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path

from chiasm.cohorts.cases import Cohort, Problem
from chiasm.errors import CohortError
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder, load_case
from chiasm.evaluation.rows import Row
from chiasm.evaluation.scoring import reporting_unit
from chiasm.methods import title_of
from chiasm.outputs import refuse_links
from chiasm.prediction.manifest import Entry
from chiasm.reports.case_page import Address, CasePage, PackedPage, finish_page, pack_page
from chiasm.reports.case_scores import against_cohort
from chiasm.reports.gallery import CutCase
from chiasm.reports.naive_comparison import rank
from chiasm.reports.packed_pages import load_page, save_page
from chiasm.reports.pictures import write_picture
from chiasm.reports.tables import cases_of
from chiasm.storage import write_text

GALLERY = 3  # cases with slices at the head of the report
PAGES = 24  # cases with a page of their own, unless more are asked for


@dataclass(frozen=True)
class CasePages:
    """Which pages single cases get.

    Attributes:
        most: At most as many.
        whole: Keep volumes uncut and unthinned.
        with_labels: Whether label maps are shown.

    Raises:
        ValueError: If `most` is negative.
    """

    most: int = PAGES
    whole: bool = False
    with_labels: bool = True

    def __post_init__(self) -> None:
        """Refuse a number of pages below 0."""
        if self.most < 0:
            raise ValueError(f"at least 0 cases get a page, not {self.most}")


def predicted_cases(assessed: Iterable[PredictionFolder]) -> Iterator[tuple[PredictionFolder, Entry]]:
    """List the predicted cases of several folders, each with the folder that it lies in."""
    return chain.from_iterable(zip(repeat(one), one.manifest.cases) for one in assessed)


def no_cases(what: str, problems: Sequence[Problem], path: Path) -> CohortError:
    """Return the error of work that no case came out of; it quotes the first problem."""
    detail = f"; the first: {problems[0].message}" if problems else ""
    return CohortError(f"{what}{detail}", path=path, reason="no-cases")


class PagePacking:
    """Pages of cases that are packed right after a case was scored, while its images are in memory.

    Which cases get a page is known when all are scored.  So the first cases are packed, as many as get a page, and
    later ones that are the worst or the best so far.  The median of later ones is not among them.

    Attributes:
        pages: How many cases get a page, and what these show.
    """

    def __init__(self, folder: Path, pages: CasePages) -> None:
        """Keep packed pages in a folder, which is there."""
        self.pages = pages
        self._folder = folder
        self._first: list[str] = []
        self._ends: dict[str, tuple[float, str]] = {}

    def share(self, processes: int) -> PagePacking:
        """Return what packs pages in each of several processes: its share of the first cases, and its own ends."""
        return PagePacking(self._folder, replace(self.pages, most=-(-self.pages.most // processes)))

    def add(self, loaded: EvaluationCase, assessed: PredictionFolder, rows: Sequence[Row]) -> None:
        """Pack the page of a case, if it may be shown.

        Args:
            loaded: The case's images.
            assessed: Whose prediction it is.
            rows: Of the case.

        Raises:
            ChiasmError: If the page cannot be written.
        """
        case = loaded.case.id
        is_end = self._is_end(case, error_of(rows, assessed.manifest.method))
        if case not in self._first and len(self._first) < self.pages.most:
            self._first.append(case)
        if case in self._first or is_end:
            save_page(self._place(case), pack_page(_page(loaded, assessed, whole=self.pages.whole)))

    def find(self, case: str) -> PackedPage | None:
        """Return the page of a case; None where it was not packed."""
        place = self._place(case)
        return load_page(place) if place.is_file() else None

    def _is_end(self, case: str, error: float) -> bool:
        """Say whether a case is the worst or the best so far, and let go of the one that was."""
        is_new = False
        if math.isnan(error):
            return False
        for end, sign in (("worst", 1.0), ("best", -1.0)):
            before = self._ends.get(end)
            if before is None or sign * error > sign * before[0]:
                self._ends[end], is_new = (error, case), True
                if before is not None and before[1] not in {*self._first, *(name for _, name in self._ends.values())}:
                    self._place(before[1]).unlink(missing_ok=True)
        return is_new

    def _place(self, case: str) -> Path:
        return self._folder / f"{case}.safetensors"


def error_of(rows: Sequence[Row], method: str) -> float:
    """Return the mean absolute error of a method's first region, by which cases are ranked; NaN without one."""
    return next((row.value for row in rows if row.method == method and row.metric == "mae"), math.nan)


def write_cases(
    work: Iterable[tuple[PredictionFolder, Entry]],
    cohort: Cohort,
    rows: Sequence[Row],
    method: str,
    out: Path,
    pages: CasePages | PagePacking,
) -> tuple[list[CutCase], dict[str, str]]:
    """Write a page and a picture for each of the cases that show most.

    Args:
        work: Predicted cases, each with the folder that it lies in.
        cohort: With the real targets.
        rows: Of the evaluation.
        method: Whose predictions they are.
        out: Gets `cases/<case>.html` and, for the first few, `pictures/<case>.png`.
        pages: How many, and what they show; those that were packed are not made from files again.

    Returns:
        Cases for the report's gallery, and case id to its page's address beside the report.

    Raises:
        ChiasmError: If a case's files have gone or changed, or pages would be written through a link.
    """
    refuse_links(out, ("cases", "pictures"))
    packing = pages if isinstance(pages, PagePacking) else None
    asked = pages.pages if isinstance(pages, PagePacking) else pages
    mine = [row for row in rows if row.method == method]
    placed = _find_cases(work, cases_of(mine))
    chosen = list(islice(dict.fromkeys([*_most_instructive(mine, method, placed), *placed]), asked.most))
    links = {case: f"cases/{case}.html" for case in chosen}
    gallery: list[CutCase] = []
    for number, case in enumerate(chosen):
        one, entry = placed[case]
        packed = (packing and packing.find(case)) or _pack(one, entry, cohort, asked)
        near = _beside(chosen, number - 1), _beside(chosen, number + 1)
        write_text(out / links[case], finish_page(packed, against_cohort(mine, case, method), *near))
        if number < GALLERY:
            gallery.append(replace(packed.cut, caption=f"{entry.role} case"))
            write_picture(out / "pictures" / f"{case}.png", gallery[-1])
    return gallery, links


def _pack(assessed: PredictionFolder, entry: Entry, cohort: Cohort, asked: CasePages) -> PackedPage:
    """Make the page of a case from its files."""
    loaded = load_case(assessed, entry, cohort, with_labels=asked.with_labels, naive=False)
    return pack_page(_page(loaded, assessed, whole=asked.whole))


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


def _name_source(sources: Sequence[str], lacking: Collection[str]) -> str:
    """Name the source that a page shows, the first, and say which others there are, and whether it is real."""
    others = f"; {' and '.join(sources[1:])} not shown" if len(sources) > 1 else ""
    return f"{sources[0]}{others}{', not in the reference' if sources[0] in lacking else ''}"


def _page(loaded: EvaluationCase, assessed: PredictionFolder, *, whole: bool) -> CasePage:
    """Collect what a case's own page shows."""
    plan = assessed.plan
    unit, scale = reporting_unit(plan)
    low, high = plan.target_range
    its = assessed.manifest
    which = "" if its.models else f", fold {its.fold}, seed {its.seed}"
    return CasePage(
        case=loaded.case.id,
        title=f"{loaded.case.id}: {' + '.join(plan.sources)} to {plan.target}",
        source=loaded.source,
        real=loaded.real,
        synthetic=loaded.made,
        expected_error=loaded.expected,
        mask=loaded.mask,
        lesion=None if loaded.labels is None else loaded.labels > 0,
        affine=loaded.grid.affine,
        unit=unit,
        window=(low / scale, high / scale),
        scale=scale,
        source_name=_name_source(plan.sources, loaded.lacks),
        target_name=plan.target,
        made_by=f"Synthetic image by {title_of(its.method)}{which}",
        warnings=loaded.entry.warnings,
        report="../report.html",
        whole=whole,
        spread=loaded.deviation,
        part=None if loaded.part is None else (loaded.part.box, loaded.part.shape),
    )
