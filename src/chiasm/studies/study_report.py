"""A study's statistics and page, made from its files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm import __version__
from chiasm.errors import RunError
from chiasm.evaluation.predictions import open_predictions, open_reference
from chiasm.evaluation.rows import Row, read_evaluation
from chiasm.evaluation.statistics import (
    FEWEST,
    Comparison,
    Declared,
    compare_methods,
    summarise_methods,
    write_table,
)
from chiasm.locks import locked
from chiasm.recipe import Registration
from chiasm.reports.curves import read_history
from chiasm.reports.evaluation import PAGES, report_evaluation, write_cases
from chiasm.reports.evaluation_folder import ASKED, REGISTERED
from chiasm.reports.registration import report_registered
from chiasm.reports.study_digest import write_digest
from chiasm.reports.study_page import HEALTHY, Findings, write_findings
from chiasm.storage import read_facts, read_toml
from chiasm.studies.notes import AGAIN, NOTES, NotedCase, Notes, read_notes
from chiasm.studies.study_file import Study, data_folder, reference_folder
from chiasm.studies.work import Outcome


@dataclass(frozen=True)
class Done:
    """What a study left behind.

    Attributes:
        rows: Of all jobs.
        comparisons: The primary ones first.
        failed: Jobs that failed.
        report: The page.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    failed: tuple[Outcome, ...]
    report: Path


def write_study_report(folder: Path, *, pages: int = PAGES, whole: bool = False) -> Done:
    """Judge a study from its files and write its statistics and page; nothing is trained or scored again.

    Args:
        folder: Holds `evaluation.csv` and `study.json`: a study's folder, or its `sealed` one.
        pages: At most as many cases get a page, of the arm under judgement with its first seed.
        whole: Keep the volumes of these pages uncut and unthinned.

    Raises:
        RunError: If a file is missing or damaged.
    """
    rows, notes = read_evaluation(folder), read_notes(folder)
    study = notes.study
    if strange := sorted({row.case for row in rows} - set(notes.cases)):
        raise RunError(
            "does not know a case that was scored", path=folder / NOTES, reason="damaged", found=strange[0], hint=AGAIN
        )
    subjects = {name: case.subject for name, case in notes.cases.items()}
    comparisons = compare_arms(study, rows, notes.regions, subjects)
    regions = ["mask", HEALTHY, *notes.regions, "edges", "lesions"]
    metrics = [*JUDGED, "rmse", "gradient_error", "recall", "false_lesions"]
    summaries = summarise_methods(rows, metrics=metrics, regions=regions, subjects=subjects)
    summaries.sort(key=lambda one: (regions.index(one.region), metrics.index(one.metric)))
    write_table(folder / "statistics.csv", comparisons)
    write_table(folder / "summary.csv", summaries)
    root = folder.parent if folder.name == "sealed" else folder
    judged = study.declared[0].arm if study.declared else notes.jobs[0].arm
    shown = next((job for job in notes.jobs if job.arm == judged), notes.jobs[0])
    links = _case_pages(study, notes, rows, judged, root, folder, pages, whole)
    found = Findings(
        title=f"{' + '.join(study.sources)} to {study.target}: {', '.join(study.arms)}",
        rows=rows,
        comparisons=comparisons,
        summaries=summaries,
        regions=notes.regions,
        arms=study.in_words,
        history=read_history(root / shown.folder / "log.jsonl"),
        history_name=shown.name,
        rivals=read_evaluation(root / RELIABILITY) if (root / RELIABILITY).is_dir() else (),
        facts=_facts(notes, root / shown.folder, rows),
        warnings=_warnings(notes, rows, root),
        methods=_methods(study, rows, notes.cases),
        cases=links,
    )
    report = write_findings(folder / "report.html", found)
    write_digest(folder, found)
    return Done(tuple(rows), tuple(comparisons), (), report)


def report(folder: Path, *, pages: int = PAGES, whole: bool = False) -> Path:
    """Make the pages of a study or of an evaluation again, from its files alone.

    Args:
        folder: What `chiasm study` or `chiasm evaluate` wrote; of a run whose pairs were registered, their page.
        pages: At most as many cases get a page of their own.
        whole: Keep the volumes of these pages uncut and unthinned.

    Raises:
        RunError: If the folder is none of them, or a file is missing or damaged.
    """
    if (folder / NOTES).is_file():
        with locked(folder):
            return write_study_report(folder, pages=pages, whole=whole).report
    if (folder / ASKED).is_file():
        with locked(folder):
            return report_evaluation(folder, pages=pages, whole=whole)
    if (folder / REGISTERED).is_dir():
        with locked(folder):
            return report_registered(folder / REGISTERED, pages=pages)
    raise RunError(
        "holds no study, no evaluation and no registered pairs",
        path=folder,
        reason="no-report",
        expected=f"{NOTES}, {ASKED} or {REGISTERED}, of chiasm study, chiasm evaluate or chiasm train --register",
    )


def _case_pages(
    study: Study,
    notes: Notes,
    rows: Sequence[Row],
    arm: str,
    root: Path,
    folder: Path,
    pages: int,
    whole: bool,
) -> dict[str, str]:
    """Write the pages of single cases, as far as predictions and data still lie where they lay."""
    sealed = folder != root
    jobs = [job for job in notes.jobs if job.arm == arm and job.seed == study.seeds[0]]
    places = [root / job.folder / ("sealed/predictions" if sealed else "predictions") for job in jobs]
    reference = reference_folder(study, root)
    data = reference or data_folder(study, root)
    judged = [open_predictions(place) for place in places if place.is_dir()]
    if not judged or not data.exists():
        return {}
    work = [(one, entry) for one in judged for entry in one.manifest.cases]
    mine = [row for row in rows if row.method == arm]
    kept = root / "cache" / f"registered-{judged[0].plan.registration}"
    how: Registration | None = None if reference is None else "none"
    cohort = open_reference(data, judged, kept, register=how, layout=study.layout).cohort
    return write_cases(work, cohort, mine, arm, folder, pages=pages, whole=whole)[1]


def _warnings(notes: Notes, rows: Sequence[Row], root: Path) -> list[str]:
    """Say what must be read before any figure: what failed, what is few, which trainings were unwell."""
    told = [*notes.failed, *notes.remarks]
    cases = {row.case for row in rows}
    people = {notes.cases[name].subject for name in cases}
    asked = notes.study
    whole = asked.only_folds is None and not asked.sealed and not notes.failed
    if whole and (left := sorted(set(notes.cases) - cases)):
        told.append(f"left out, as chiasm inspect tells why: {', '.join(left)}")
    if len(people) < FEWEST:
        told.append(f"only {len(people)} subjects: nothing is tested")
    for region in notes.regions:
        some = {notes.cases[row.case].subject for row in rows if row.region == region and row.metric == "mae"}
        if len(some) < len(people):
            told.append(f"{region} lies in {len(some)} of {len(people)} subjects only")
    unwell: dict[str, list[str]] = {}
    for job in notes.jobs:
        history = read_history(root / job.folder / "log.jsonl")
        unwell.setdefault(job.arm, []).extend([line["message"] for line in history if line["kind"] == "warning"][-1:])
    for arm, messages in unwell.items():
        if messages:
            of = sum(job.arm == arm for job in notes.jobs)
            told.append(f"{arm}: in {len(messages)} of {of} trainings, at the end: {messages[-1]}")
    return told


def _facts(notes: Notes, run: Path, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Collect the data sheet: cohort, folds, what was asked, recipe and machine of one training."""
    cases = {row.case: row.fold for row in rows}
    sites = Counter(notes.cases[name].site or "not known" for name in cases)
    plan = read_toml(run / "plan.toml") if (run / "plan.toml").exists() else {}
    recipe = read_toml(run / "recipe.toml") if (run / "recipe.toml").exists() else {}
    machine = read_facts(run / "environment.json")
    return {
        "Cohort": {
            "subjects": str(len({notes.cases[name].subject for name in cases})),
            "cases": str(len(cases)),
            "sites": ", ".join(f"{site} ({count})" for site, count in sorted(sites.items())),
            "spacing": " x ".join(f"{step:g}" for step in plan.get("spacing_mm", [])) + " mm",
        },
        "Folds": {
            f"fold {fold}": f"{sum(its == fold for its in cases.values())} test cases"
            for fold in sorted(set(cases.values()))
        },
        "Study": {
            name: str(value)
            for name, value in notes.study.model_dump(mode="json", by_alias=True).items()
            if value not in (None, [], ())
        },
        "Cost": {"computing": f"{notes.hours} h in {len(notes.jobs)} trainings and their warm-ups"},
        "Recipe": {
            f"{section}.{name}": str(value)
            for section, fields in recipe.items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        },
        "Machine and versions": {name: str(value) for name, value in machine.items()},
    }


def _methods(study: Study, rows: Sequence[Row], cases: Mapping[str, NotedCase]) -> str:
    """Write a paragraph that a paper can take over."""
    scored = {row.case for row in rows}
    people = len({cases[name].subject for name in scored})
    arms = "; ".join(f"{arm}: {told}" for arm, told in study.in_words.items())
    by = "leaving one site out" if study.folds == "site" else f"{study.folds}-fold cross-validation by subject"
    data = f"{study.phantom.subjects} simulated patients" if study.phantom else "paired scans"
    asked = "; ".join(f"{one.metric} in {one.region}, {one.arm} against {one.against}" for one in study.declared)
    recipe = study.build(study.arms[0], {})
    steps = study.steps or recipe.schedule.steps
    shared = ", all arms of a fold and seed branching from one shared warm-up" if study.warmup == "shared" else ""
    sealed = f" {100 * study.sealed:.0f} % of the subjects were kept apart from all folds." if study.sealed else ""
    against = ""
    if study.reference is not None:
        real = "of the same patients as if they had not moved" if study.reference == "held" else "of another folder"
        against = f"Images were held against those {real}, which were never registered. "
    return (
        f"{study.target} was synthesised from {' and '.join(study.sources)} with chiasm {__version__} in {data}. "
        f"Methods were compared in {by} ({people} subjects scored) with {len(study.seeds)} seeds{shared} "
        f"({study.size} networks, {steps} steps).{sealed} Arms: {arms}. "
        f"Splits, intensity statistics and calibrations used training and validation cases only. "
        f"{against}"
        f"Errors were averaged by subject and compared in pairs: mean differences with 95 % intervals by a bootstrap "
        f"that resamples subjects and seeds (BCa), permutation tests by subject, Holm's correction. "
        f"Declared before: {asked or 'none'}; all other comparisons are exploratory. The adversarial attention "
        f"follows Nie, Xiang, Wang and Shen, arXiv:1907.03297."
    )


def compare_arms(
    study: Study, rows: Sequence[Row], lesions: Sequence[str], subjects: Mapping[str, str]
) -> list[Comparison]:
    """Compare the declared pairs and every arm with what the first of them is compared with."""
    arms = [arm for arm in dict.fromkeys(row.method for row in rows) if arm in study.arms]
    declared = [Declared(one.arm, one.against, one.region, one.metric) for one in study.declared]
    anchor = declared[0].against if declared else arms[0]
    pairs = dict.fromkeys([*((one.arm, one.against) for one in declared), *((arm, anchor) for arm in arms)])
    regions = ["mask", HEALTHY, *lesions, "edges"]
    seen = {(row.region, row.metric) for row in rows}
    return compare_methods(
        rows,
        [pair for pair in pairs if pair[0] != pair[1] and {*pair} <= {*arms}],
        metrics=[m for m in JUDGED if any(metric == m for _, metric in seen)],
        regions=[region for region in regions if (region, "mae") in seen],
        declared=declared,
        subjects=subjects,
    )


RELIABILITY = "reliability"  # folder of its figures
JUDGED = ("mae", "ssim", "psnr")  # metrics that arms are compared by
