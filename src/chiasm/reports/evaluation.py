"""`chiasm evaluate` and its pages: scores of a cohort, the report, and a page for each case.

Pages are made from files: figures from `evaluation.csv`, volumes from where
`asked.json` says that predictions and reference lie.  So they can be made
again without scoring anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from chiasm.cohorts.cases import Cohort, Problem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.gathering import LOST, tell_notes
from chiasm.errors import CohortError, RunError, unknown
from chiasm.evaluation.headlines import headlines
from chiasm.evaluation.loading import RULES, Judged, Loaded, load_case
from chiasm.evaluation.predictions import open_predictions, open_reference, score_cases
from chiasm.evaluation.rows import MaskUse, Remarks, Row, read_evaluation, read_remarks, write_evaluation
from chiasm.evaluation.scoring import reporting_unit
from chiasm.evaluation.summary import format_table, paired
from chiasm.locks import locked
from chiasm.metrics.conventions import CONVENTIONS
from chiasm.outputs import refuse_data_folder, refuse_links
from chiasm.prediction.manifest import Entry, relative
from chiasm.preparation.bias_field import UNSHADED
from chiasm.preparation.plan import Plan
from chiasm.recipe import Registration
from chiasm.registration.cohort import Together, tell_movement
from chiasm.reports.case_page import CasePage, against_cohort, write_case_page
from chiasm.reports.curves import read_history
from chiasm.reports.evaluation_folder import ASKED, REGISTERED, make_room, place_of, read_asked
from chiasm.reports.evaluation_page import EvaluationPage, write_report
from chiasm.reports.gallery import GalleryCase
from chiasm.reports.naive_comparison import rank
from chiasm.reports.pictures import write_picture
from chiasm.reports.registration import report_registered
from chiasm.storage import read_facts, read_toml, write_json
from chiasm.volumes import Reading, Volume, canonical

MASKS_NAMED = 12  # cases that are named beside the mask that they were scored in
GALLERY = 6  # cases with slices in the report
PAGES = 24  # cases with a page of their own, unless more are asked for
FEWEST_TO_TEST = 6

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scored:
    """What an evaluation left behind.

    Attributes:
        rows: One for each figure.
        headlines: What came of it, in at most six lines.
        table: All scores side by side, lines of text.
        report: The page.
        problems: Cases that could not be scored.
        notes: What the reference holds beside its cases, which of several scans were taken, and which cases
            have no naive baselines.
    """

    rows: tuple[Row, ...]
    headlines: tuple[str, ...]
    table: tuple[str, ...]
    report: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def evaluate(
    predictions: Path | Sequence[Path],
    reference: Path,
    out: Path,
    *,
    regions: str = "seg",
    convention: str = "chiasm",
    model: Path | None = None,
    layout: str | None = None,
    register: Registration | None = None,
    selection: Selection | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scored:
    """Score every predicted case that has a real target; write CSV, JSON and a report.

    Args:
        predictions: Folder written by `chiasm predict`; several, one for each fold, are scored together.
        reference: The cohort with the real targets.
        out: Where `evaluation.csv`, `evaluation.json`, `report.html` and `pictures/` go.
        regions: "seg" for the cohort's label maps, "none" to score the mask alone.
        convention: A name of `CONVENTIONS`.
        model: Run or model folder of a single folder of predictions, where it no longer stands where it stood.
        layout: Name of a layout, where the folder fits several.
        register: How real images are brought to the sources, into `out/registered`; None as those of
            training were, "none" takes them as they lie.
        selection: Which DICOM series are taken, and how files are read; where it says nothing, as in training.
        overwrite: Whether to replace another evaluation in `out`.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        ChiasmError: If a folder is not what it should be, the folders are of
            several methods or modalities, no case can be scored, another process
            writes to `out`, a file of it is read here, or it holds another evaluation or files of
            somebody else and `overwrite` is False.
    """
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, list(CONVENTIONS))
    if regions not in ("seg", "none"):
        raise unknown("choice of regions", regions, ["seg", "none"])
    judged = [
        open_predictions(folder, model) for folder in ([predictions] if isinstance(predictions, Path) else predictions)
    ]
    alike = {(one.manifest.method, one.plan.sources, one.plan.target, one.plan.registration) for one in judged}
    if len(alike) != 1:
        raise RunError(
            "folders that are scored together must be of one method, source, target and registration",
            path=judged[1].folder,
            reason="other-method",
            hint="Evaluate them one by one; chiasm study compares methods.",
        )
    chosen = selection or Selection()
    asked = {
        **_asked(judged, reference, out, model, layout, regions, register, convention),
        "series": dict(chosen.series),
        "select": list(chosen.select),
        "subject_pattern": chosen.subject_pattern,
        "reading": asdict(chosen.reading),
    }
    refuse_data_folder(out, [reference])
    with locked(out):
        make_room(
            out,
            asked,
            [reference, *(place for one in judged for place in (one.folder, one.model))],
            overwrite=overwrite,
        )
        together = open_reference(
            reference, judged, out / REGISTERED, register=register, layout=layout, selection=chosen, progress=progress
        )
        missing = {problem.case for problem in together.problems}
        work = [(one, entry) for one in judged for entry in one.manifest.cases if entry.case not in missing]
        found = score_cases(work, together.cohort, convention, with_labels=regions == "seg", progress=progress)
        problems = [*together.problems, *_unfinished(judged), *found.problems]
        if not found.rows:
            detail = f"; the first: {problems[0].message}" if problems else ""
            raise CohortError(f"no predicted case could be scored{detail}", path=judged[0].folder, reason="no-cases")
        spoiled = tuple(problem.message for problem in found.spoiled)
        write_evaluation(out, found.rows, Remarks(found.masks, spoiled, found.notes))
        write_json(out / ASKED, {**asked, "problems": [problem.message for problem in problems]})
        subjects = {case.id: case.subject for case in together.cohort.cases}
        report = report_evaluation(out)
        shared = paired(found.rows)
        told = tuple(headlines(shared, judged[0].manifest.method, judged[0].baselines.names, subjects))
        table = tuple(format_table(shared, subjects=subjects))
        notes = (*tell_notes(together.cohort.notes, ("several", *LOST)), *found.notes)
        return Scored(tuple(found.rows), told, table, report, (*problems, *found.spoiled), notes)


def _asked(
    judged: Sequence[Judged],
    reference: Path,
    out: Path,
    model: Path | None,
    layout: str | None,
    regions: str,
    register: Registration | None,
    convention: str,
) -> dict[str, Any]:
    """Write down what an evaluation is of; paths start at its folder, so that a whole tree can be moved."""
    return {
        "predictions": [relative(one.folder, out) for one in judged],
        "model": None if model is None else relative(model, out),
        "reference": relative(reference, out),
        "written_in": str(out.resolve()),
        "layout": layout,
        "regions": regions,
        "register": judged[0].plan.registration if register is None else register,
        "convention": convention,
    }


def _unfinished(judged: Sequence[Judged]) -> list[Problem]:
    """Name the cases of which a prediction that was stopped, or is at work, has made nothing yet."""
    what = "is not predicted yet: chiasm predict was stopped, or is still at work"
    return [
        Problem(one.folder, "unfinished", f"case {case} {what}", case)
        for one in judged
        for case in one.manifest.pending
    ]


def report_evaluation(out: Path, *, pages: int = PAGES, whole: bool = False) -> Path:
    """Make the report and the pages of single cases from an evaluation's files; nothing is scored.

    Args:
        out: Folder that `evaluate` wrote.
        pages: At most as many cases get a page; the worst, the median and the best come first.
        whole: Keep the volumes of these pages uncut and unthinned.

    Returns:
        The report.

    Raises:
        ChiasmError: If a file is missing or damaged.
    """
    rows, asked, remarks = read_evaluation(out), read_asked(out), read_remarks(out)
    model = None if asked["model"] is None else place_of(out, asked, asked["model"])
    judged = [open_predictions(place_of(out, asked, folder), model) for folder in asked["predictions"]]
    how: Registration = asked.get("register", "none")
    reference = place_of(out, asked, asked["reference"])
    chosen = Selection(
        series=asked.get("series", {}),
        reading=Reading(**asked.get("reading", {})),
        select=asked.get("select", []),
        subject_pattern=asked.get("subject_pattern", ""),
    )
    together = open_reference(
        reference, judged, out / REGISTERED, register=how, layout=asked["layout"], selection=chosen
    )
    cohort = together.cohort
    if together.moved_mm:
        report_registered(out / REGISTERED)
    method, plan = judged[0].manifest.method, judged[0].plan
    work = [(one, entry) for one in judged for entry in one.manifest.cases]
    gallery, links = write_cases(
        work, cohort, rows, method, out, pages=pages, whole=whole, with_labels=asked["regions"] == "seg"
    )
    page = EvaluationPage(
        title=f"{' + '.join(plan.sources)} to {plan.target}",
        rows=rows,
        history=read_history(judged[0].model.parent / "log.jsonl") if len(judged) == 1 else [],
        gallery=gallery,
        facts={**_facts(judged, cohort), "Masks": _mask_facts(remarks.masks)},
        warnings=[
            *_how_they_lie(judged[0], how, together),
            *_how_they_are_shaded(judged[0].plan),
            *_warnings(judged, rows),
            *_mask_warnings(remarks.masks, cohort),
            *remarks.notes,
            *(f"labels not used: {message}" for message in remarks.problems),
            *(f"not scored: {message}" for message in asked.get("problems", [])),
        ],
        method=method,
        naive=judged[0].baselines.names,
        pages=links,
    )
    return write_report(out / "report.html", page)


def _mask_facts(masks: Sequence[MaskUse]) -> dict[str, str]:
    """Say which mask was scored, in how many cases; one by one where they are few."""
    by_reason: dict[str, list[str]] = {}
    for mask in masks:
        by_reason.setdefault(mask.reason, []).append(mask.case)
    return {
        reason: f"{len(cases)} cases: {', '.join(cases[:MASKS_NAMED])}{', ...' if len(cases) > MASKS_NAMED else ''}"
        for reason, cases in by_reason.items()
    }


def _mask_warnings(masks: Sequence[MaskUse], cohort: Cohort) -> list[str]:
    """Say where the cohort has a mask file and another mask was scored."""
    with_file = {case.id for case in cohort.cases if case.mask is not None}
    others: dict[str, list[str]] = {}
    for mask in masks:
        if mask.case in with_file and mask.used != "cohort" and mask.reason != RULES["given"]:
            others.setdefault(mask.reason, []).append(mask.case)
    return [
        f"{len(cases)} cases are scored in {reason}, not in the mask file of the cohort: {', '.join(cases)}"
        for reason, cases in others.items()
    ]


def write_cases(
    work: Iterable[tuple[Judged, Entry]],
    cohort: Cohort,
    rows: Sequence[Row],
    method: str,
    out: Path,
    *,
    pages: int = PAGES,
    whole: bool = False,
    with_labels: bool = True,
) -> tuple[list[GalleryCase], dict[str, str]]:
    """Write a page and a picture for each of the most telling cases.

    Args:
        work: Predicted cases, each with the folder that it lies in.
        cohort: With the real targets.
        rows: Of the evaluation.
        method: Whose predictions they are.
        out: Gets `cases/<case>.html` and, for the first few, `pictures/<case>.png`.
        pages: At most as many.
        whole: Keep volumes uncut and unthinned.
        with_labels: Whether label maps are shown.

    Returns:
        Cases for the report's gallery, and case id to its page's address beside the report.

    Raises:
        ChiasmError: If a case's files have gone or changed, or pages would be written through a link.
    """
    refuse_links(out, ("cases", "pictures"))
    scored = {row.case for row in rows if row.method == method}
    placed = {entry.case: (one, entry) for one, entry in work if entry.case in scored}
    ranking = rank([row for row in rows if not row.region.startswith("lesion-")], method=method) or {}
    telling = [ranking[name] for name in ("worst", "median", "best") if ranking.get(name) in placed]
    chosen = list(islice(dict.fromkeys([*telling, *placed]), pages))
    links = {case: f"cases/{case}.html" for case in chosen}
    gallery: list[GalleryCase] = []
    for number, case in enumerate(chosen):
        one, entry = placed[case]
        loaded = load_case(one, entry, cohort, with_labels=with_labels, naive=False)
        near = {name: _beside(chosen, number + step) for name, step in (("previous", -1), ("following", 1))}
        page = _page(loaded, one, against_cohort(rows, case, method), near, whole=whole)
        write_case_page(out / links[case], page)
        if number < GALLERY:
            gallery.append(_shown(loaded, one))
            write_picture(out / "pictures" / f"{case}.png", gallery[-1])
    return gallery, links


def _beside(cases: Sequence[str], index: int) -> tuple[str, str] | None:
    return (f"{cases[index]}.html", cases[index]) if 0 <= index < len(cases) else None


def _page(
    loaded: Loaded, judged: Judged, figures: tuple[Any, ...], near: dict[str, tuple[str, str] | None], *, whole: bool
) -> CasePage:
    plan = judged.plan
    unit, scale = reporting_unit(plan)
    low, high = plan.target_range
    return CasePage(
        case=loaded.case.id,
        title=f"{loaded.case.id}: {' + '.join(plan.sources)} to {plan.target}",
        source=loaded.source.array,
        real=loaded.target / scale,
        synthetic=next(iter(loaded.images.values())) / scale,
        reliability=None if loaded.reliability is None else loaded.reliability / scale,
        mask=loaded.mask,
        lesion=None if loaded.labels is None else loaded.labels > 0,
        affine=loaded.source.geometry.affine,
        unit=unit,
        window=(low / scale, high / scale),
        source_name=f"{plan.sources[0]}{', not in the reference' if plan.sources[0] in loaded.lacks else ''}",
        target_name=plan.target,
        figures=figures,
        warnings=loaded.entry.warnings,
        report="../report.html",
        previous=near["previous"],
        following=near["following"],
        whole=whole,
    )


def _shown(loaded: Loaded, judged: Judged) -> GalleryCase:
    plan, grid = judged.plan, loaded.source.geometry
    unit, scale = reporting_unit(plan)
    low, high = plan.target_range

    def upright(array: NDArray[Any]) -> NDArray[Any]:
        turned: NDArray[Any] = canonical(Volume(array, grid)).array
        return turned

    return GalleryCase(
        case=loaded.case.id,
        source=upright(loaded.source.array),
        real=upright(loaded.target / scale),
        synthetic=upright(next(iter(loaded.images.values())) / scale),
        reliability=None if loaded.reliability is None else upright(loaded.reliability / scale),
        mask=upright(loaded.mask),
        lesion=None if loaded.labels is None else upright(loaded.labels > 0),
        spacing_mm=canonical(loaded.source).geometry.spacing_mm,
        unit=unit,
        window=(low / scale, high / scale),
        caption=f"{loaded.entry.role} case",
    )


def _how_they_lie(judged: Judged, how: Registration, together: Together) -> list[str]:
    """Say whether the real images were moved before they were compared with."""
    trained = judged.plan.registration
    if together.moved_mm:
        return [
            f"the real {judged.plan.target} was brought to the source before it was compared with ({how}; "
            f"{REGISTERED}/index.html shows each): {tell_movement(together.moved_mm)}; "
            "chiasm evaluate --register none takes it as it lies"
        ]
    if trained != "none":
        return [f"training pairs were registered ({trained}); the real images are compared with as they lie"]
    return []


def _how_they_are_shaded(plan: Plan) -> list[str]:
    """Say that real images are as scanned where synthetic ones have no shading."""
    if plan.bias_correction == "none" or plan.target in UNSHADED:
        return []
    return [
        f"synthetic {plan.target} is free of coil shading, as in training; the real one is as scanned, "
        "and its shading counts as error"
    ]


def _warnings(judged: Sequence[Judged], rows: Sequence[Row]) -> list[str]:
    entries = [entry for one in judged for entry in one.manifest.cases]
    scored = {row.case for row in rows}
    warnings = []
    if seen := [entry.case for entry in entries if entry.role in ("train", "validation")]:
        warnings.append(f"{len(seen)} of {len(entries)} cases were used in training: {', '.join(seen)}")
    if len(scored) < FEWEST_TO_TEST:
        warnings.append(f"only {len(scored)} cases: no difference between methods can be called significant")
    return warnings + [f"case {entry.case}: {sentence}" for entry in entries for sentence in entry.warnings]


def _facts(judged: Sequence[Judged], cohort: Cohort) -> dict[str, dict[str, str]]:
    """Collect the data sheet: what was asked, on what, with what; of several folds, plan and recipe of the first."""
    first = judged[0]
    recipe = read_toml(first.model / "recipe.toml")
    facts = {
        "Cohort": {
            "layout": cohort.layout,
            "cases in the folder": str(len(cohort.cases)),
            "subjects": str(len({case.subject for case in cohort.cases})),
            "cases predicted": str(sum(len(one.manifest.cases) for one in judged)),
            "sites": ", ".join(sorted({case.site for case in cohort.cases if case.site})) or "not known",
        },
        "Plan": {name: str(reason) for name, reason in read_toml(first.model / "plan.toml").get("reasons", {}).items()},
        "Model": {
            "method": first.manifest.method,
            "sha256 of model.toml": ", ".join(one.manifest.sha256 for one in judged),
        },
        "Recipe": {
            f"{section}.{name}": str(value)
            for section, fields in recipe.items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        },
    }
    if environment := read_facts(first.model.parent / "environment.json"):
        facts["Environment"] = {name: str(value) for name, value in environment.items()}
    return facts
