"""A study's statistics and page, made from its files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from chiasm import __version__
from chiasm.cohorts.cases import Cohort, grouped
from chiasm.cohorts.splits import count_subjects, read_splits
from chiasm.errors import RunError
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.paired_tests import FEWEST
from chiasm.evaluation.predictions import open_predictions, open_reference
from chiasm.evaluation.rows import Row, read_evaluation
from chiasm.evaluation.statistics import (
    Comparison,
    Declared,
    MethodSummary,
    compare_methods,
    summarise_methods,
    write_table,
)
from chiasm.locks import locked
from chiasm.metrics.radiotherapy import TISSUES_HU
from chiasm.names import amount
from chiasm.reports.curves import read_history
from chiasm.reports.evaluation import report_evaluation
from chiasm.reports.evaluation_cases import PAGES, CasePages, predicted_cases, write_cases
from chiasm.reports.evaluation_folder import ASKED, REGISTERED
from chiasm.reports.registration import report_registered
from chiasm.reports.study_cases import CasePanes, ModelInputs, ShownMethod, show_cases
from chiasm.reports.study_digest import write_digest
from chiasm.reports.study_page import Findings, write_findings
from chiasm.reports.study_plots import HEALTHY
from chiasm.reports.tables import as_text, cases_of, recipe_facts
from chiasm.storage import read_facts, read_toml
from chiasm.studies.jobs import find_cases
from chiasm.studies.notes import AGAIN, NOTES, NotedCase, NotedJob, StudyNotes, read_notes
from chiasm.studies.study_file import Study, alignment_of, data_folder, reference_folder
from chiasm.studies.work import LOCKED, JobOutcome


@dataclass(frozen=True)
class Done:
    """The result of a study.

    Attributes:
        rows: Of all jobs.
        comparisons: The primary ones first.
        failed: Jobs that failed.
        report: The page.
        left_out: Cases without any score, if all should have one.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    failed: tuple[JobOutcome, ...]
    report: Path
    left_out: tuple[str, ...] = ()


def write_study_report(folder: Path, *, pages: int = PAGES, whole: bool = False) -> Done:
    """Assess a study from its files and write its statistics and page; nothing is trained or scored again.

    Args:
        folder: Holds `evaluation.csv` and `study.json`: a study's folder, or its `locked` one.
        pages: At most as many cases get a page, of the arm under assessment with its first seed.
        whole: Keep the volumes of these pages uncut and unthinned.

    Raises:
        RunError: If a file is missing or damaged.
    """
    rows, notes = read_evaluation(folder), read_notes(folder)
    _refuse_strange_cases(rows, notes, folder)
    study, root = notes.study, _root_of(folder)
    comparisons = compare_arms(study, rows, notes.regions, notes.subjects)
    summaries = _summaries(notes, rows)
    write_table(folder / "statistics.csv", comparisons)
    write_table(folder / "summary.csv", summaries)
    shown = _shown_training(notes)
    links, panes = _show_cases(notes, rows, folder, CasePages(pages, whole))
    found = Findings(
        title=f"{'Locked test set, ' * (folder.name in LOCKED)}{' + '.join(study.sources)} to {study.target}: "
        f"{', '.join(study.arms)}",
        rows=rows,
        comparisons=comparisons,
        summaries=summaries,
        regions=notes.regions,
        arms=study.in_words,
        history=read_history(root / shown.folder / "log.jsonl"),
        history_name=shown.name,
        baseline_maps=_read_map_scores(root),
        facts=_facts(notes, root, root / shown.folder, rows),
        warnings=_warnings(notes, rows, root),
        paragraph=_methods(
            study, len(notes.people(cases_of(rows))), _fold_facts(notes, root), _locked_people(notes, root)
        ),
        cases=links,
        panes=panes,
        own_units=study.own_units,
    )
    report = write_findings(folder / "report.html", found)
    write_digest(folder, found)
    return Done(tuple(rows), tuple(comparisons), (), report, _left_out(notes, rows))


def _refuse_strange_cases(rows: Sequence[Row], notes: StudyNotes, folder: Path) -> None:
    """Refuse scores of cases that the study does not know."""
    if strange := sorted(cases_of(rows) - set(notes.cases)):
        raise RunError(
            "does not know a case that was scored", path=folder / NOTES, reason="damaged", found=strange[0], hint=AGAIN
        )


def _root_of(folder: Path) -> Path:
    """Return the study's folder, also for its `locked` folder."""
    return folder.parent if folder.name in LOCKED else folder


def _assessed_arm(notes: StudyNotes) -> str:
    """Name the arm under assessment: of the first declared comparison, else the first that was trained."""
    declared = notes.study.declared
    return declared[0].arm if declared else notes.jobs[0].arm


def _shown_training(notes: StudyNotes) -> NotedJob:
    """Choose the training whose curves are shown: the first of the arm under assessment, if there is one."""
    assessed = _assessed_arm(notes)
    return next((job for job in notes.jobs if job.arm == assessed), notes.jobs[0])


def _read_map_scores(root: Path) -> Sequence[Row]:
    """Read the scores of the expected-error maps; none where no map was assessed."""
    return next((read_evaluation(root / name) for name in (MAPS, OLD_MAPS) if (root / name).is_dir()), ())


def _summaries(notes: StudyNotes, rows: Sequence[Row]) -> list[MethodSummary]:
    """Sum the rows up by region and metric, in the order of the tables."""
    regions = ["mask", HEALTHY, *notes.regions, "edges", *TISSUES_HU, "lesions"]
    metrics = ["mae", "mae_own", *COMPARED[1:], "rmse", "gradient_error", "recall", "false_lesions"]
    summaries = summarise_methods(rows, metrics=metrics, regions=regions, subjects=notes.subjects)
    return sorted(summaries, key=lambda one: (regions.index(one.region), metrics.index(one.metric)))


def report(folder: Path, *, pages: int = PAGES, whole: bool = False) -> Path:
    """Make the pages of a study or of an evaluation again, from its files alone.

    Args:
        folder: Folder of `chiasm study` or `chiasm evaluate`; or a run with registered pairs, whose page is made.
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


def _show_cases(
    notes: StudyNotes, rows: Sequence[Row], folder: Path, pages: CasePages
) -> tuple[dict[str, str], CasePanes | None]:
    """Write pages of single cases of the arm under assessment, and show some beside the arms that it is compared with.

    Args:
        notes: Of the study.
        rows: Of all arms.
        folder: Where pages go: the study's, or its `locked` one.
        pages: How many, and what they show.

    Returns:
        Case id to the address of its page, and rows of pictures; nothing if predictions or data are gone.
    """
    study, root, arm = notes.study, _root_of(folder), _assessed_arm(notes)
    mine = [row for row in rows if row.method == arm]
    assessed = _open_first_seed(notes, arm, folder) if mine else []
    reference = reference_folder(study, root)
    data = reference or data_folder(study, root)
    if not assessed or not data.exists():
        return {}, None
    kept = root / "cache" / f"registered-{assessed[0].plan.registration}"
    cohort = open_reference(data, assessed, kept, register=alignment_of(reference), layout=study.layout).cohort
    links = write_cases(predicted_cases(assessed), cohort, mine, arm, folder, pages)[1]
    return links, _show_panes(notes, rows, folder, cohort, list(links)) if links else None


def _show_panes(
    notes: StudyNotes, rows: Sequence[Row], folder: Path, cohort: Cohort, cases: Sequence[str]
) -> CasePanes:
    """Show cases of the arm under assessment beside the arms that it is compared with."""
    study, root, arm = notes.study, _root_of(folder), _assessed_arm(notes)
    named = {name: _open_first_seed(notes, name, folder) for name in (arm, *_other_arms(notes, arm))}
    methods = [ShownMethod(name, folders) for name, folders in named.items() if folders]
    given = None if study.reference is None else find_cases(study, root)
    inputs = ModelInputs(cohort if given is None else given, are_aligned=given is None)
    return show_cases(methods, cases, cohort, rows, inputs)


def _other_arms(notes: StudyNotes, arm: str) -> list[str]:
    """Name the arms that an arm is compared with; the first other one, if any, where nothing was declared of it."""
    declared = dict.fromkeys(one.against for one in notes.study.declared if one.arm == arm)
    return list(declared)[:MOST_OTHERS] or [other for other in notes.study.arms if other != arm][:1]


def _open_first_seed(notes: StudyNotes, arm: str, folder: Path) -> list[PredictionFolder]:
    """Open an arm's predictions with the first seed, fold by fold, if they are still there."""
    root = _root_of(folder)
    inside = "predictions" if root == folder else f"{folder.name}/predictions"
    trained = [job for job in notes.jobs if (job.arm, job.seed) == (arm, notes.study.seeds[0])]
    places = (root / job.folder / inside for job in trained)
    return [open_predictions(place) for place in places if place.is_dir()]


def _warnings(notes: StudyNotes, rows: Sequence[Row], root: Path) -> list[str]:
    """Return the warnings of the page: failures, few subjects, and trainings with warnings of the health check."""
    people = notes.people(cases_of(rows))
    warnings = [*notes.failed, *notes.remarks]
    if len(notes.opened) > 1:
        warnings.append(f"the locked test set was scored on {' and '.join(notes.opened)}: only the first was untouched")
    if left := _left_out(notes, rows):
        warnings.append(f"left out, for reasons that chiasm inspect shows: {', '.join(left)}")
    if len(people) < FEWEST:
        warnings.append(f"only {len(people)} subjects: nothing is tested")
    if notes.study.own_units:
        warnings.append(
            "arms learn from different subjects, whose SD is the unit of their errors: compare such arms by the mean "
            "absolute error of the scan"
        )
    warnings += _unscored(notes, rows)
    return [*warnings, *_rare_regions(notes, rows, len(people)), *_unwell_trainings(notes, root)]


def _unscored(notes: StudyNotes, rows: Sequence[Row]) -> Iterator[str]:
    """Name the primary comparisons that cannot be made, or for which there are no scores."""
    scored = {(row.method, row.region, row.metric) for row in rows if math.isfinite(row.value)}
    for one in notes.study.asked:
        is_scored = {(arm, one.region, one.metric) for arm in (one.arm, one.against)} <= scored
        why = notes.study.why_not_compared(one) or ("" if is_scored else "evaluation.csv has no such scores of both")
        if why:
            yield f"declared, and not compared: {one.metric} in {one.region}, {one.arm} against {one.against}: {why}"


def _left_out(notes: StudyNotes, rows: Sequence[Row]) -> tuple[str, ...]:
    """Name the cases without a score, if every case should have one."""
    return tuple(sorted(set(notes.cases) - cases_of(rows))) if notes.is_whole else ()


def _rare_regions(notes: StudyNotes, rows: Sequence[Row], people: int) -> Iterator[str]:
    """Name the label regions that some subjects do not have."""
    for region in notes.regions:
        some = notes.people(row.case for row in rows if (row.region, row.metric) == (region, "mae"))
        if len(some) < people:
            yield f"{region} lies in {len(some)} of {people} subjects only"


def _unwell_trainings(notes: StudyNotes, root: Path) -> Iterator[str]:
    """Quote the last warnings of the health check in the trainings of each arm."""
    for arm, jobs in grouped(notes.jobs, lambda job: job.arm).items():
        messages = list(chain.from_iterable(_last_warning(root / job.folder / "log.jsonl") for job in jobs))
        if messages:
            yield f"{arm}: in {len(messages)} of {len(jobs)} trainings, at the end: {messages[-1]}"


def _last_warning(log: Path) -> list[str]:
    """Return the last warning of a training; empty if there was none."""
    return [line["message"] for line in read_history(log) if line["kind"] == "warning"][-1:]


def _facts(notes: StudyNotes, root: Path, run: Path, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Collect the data sheet: cohort, folds, study file, recipe and machine of one training."""
    cases = dict.fromkeys(row.case for row in rows)
    counts = Counter(fold for _, fold in {(row.case, row.fold) for row in rows})
    kind = f"locked cases, on {' and '.join(notes.opened)}" if notes.opened else "test cases"
    scored = {f"fold {fold}, scored": f"{count} {kind}" for fold, count in sorted(counts.items())}
    return {
        "Cohort": _cohort_facts([notes.cases[name] for name in cases], _toml(run / "plan.toml")),
        "Folds": {"assignment": _folds_in_words(notes.study), **_fold_facts(notes, root), **scored},
        "Study": _study_facts(notes.study),
        "Cost": {"computing": f"{notes.hours} h in {len(notes.jobs)} trainings and their warm-ups"},
        "Recipe": recipe_facts(_toml(run / "recipe.toml")),
        "Machine and versions": as_text(read_facts(run / "environment.json")),
    }


def _fold_facts(notes: StudyNotes, root: Path) -> dict[str, str]:
    """Count the subjects for training, validation and test of each fold, as its first training has them."""
    runs = {job.fold: root / job.folder for job in reversed(notes.jobs)}
    splits = {fold: run / "splits.json" for fold, run in sorted(runs.items())}
    return {f"fold {fold}": count_subjects(read_splits(path)) for fold, path in splits.items() if path.is_file()}


def _study_facts(study: Study) -> dict[str, str]:
    """List the settings that the study file states."""
    asked = study.model_dump(mode="json", by_alias=True)
    return as_text({name: value for name, value in asked.items() if value not in (None, [], ())})


def _cohort_facts(cases: Sequence[NotedCase], plan: Mapping[str, Any]) -> dict[str, str]:
    """Count the cases that were scored, and give the spacing of a plan."""
    sites = Counter(case.site or "not known" for case in cases)
    return {
        "subjects": str(len({case.subject for case in cases})),
        "cases": str(len(cases)),
        "sites": ", ".join(f"{site} ({count})" for site, count in sorted(sites.items())),
        "spacing": " x ".join(f"{step:g}" for step in plan.get("spacing_mm", [])) + " mm",
    }


def _toml(path: Path) -> dict[str, Any]:
    """Read a file of a run; empty where it is gone."""
    return read_toml(path) if path.exists() else {}


SHARED_WARM_UP = ", all arms of a fold and seed branching from one shared warm-up"
HELD_AGAINST = {"held": "of the same patients as if they had not moved", "folder": "of another folder"}


def _methods(study: Study, people: int, folds: Mapping[str, str], locked_people: int) -> str:
    """Write a paragraph for the methods section of a paper.

    Args:
        study: What was asked for.
        people: Number of scored subjects.
        folds: Each fold and its subjects, in words.
        locked_people: Number of subjects in the locked test set.
    """
    counted = f" ({'; '.join(f'{fold}: {subjects}' for fold, subjects in folds.items())})" if folds else ""
    arms = "; ".join(f"{arm}: {described}" for arm, described in study.in_words.items())
    data = f"{study.phantom.subjects} simulated patients" if study.phantom else "paired scans"
    steps = study.steps or study.build(study.arms[0], {}).schedule.steps
    shared = SHARED_WARM_UP if study.warmup == "shared" else ""
    return (
        f"{study.target} was synthesised from {' and '.join(study.sources)} with chiasm {__version__} in {data}. "
        f"Methods were compared {'by' if study.folds == 'site' else 'in'} {_folds_in_words(study)}{counted} "
        f"({amount(people, 'subject')} scored) with {amount(len(study.seeds), 'seed')}{shared} "
        f"({study.size} networks, {steps} steps).{_locked_in_words(locked_people)} "
        f"Arms: {arms}. "
        f"Splits, intensity statistics and calibrations used training and validation cases only. "
        f"{_reference_in_words(study)}"
        f"Errors were averaged by subject and compared in pairs: mean differences with 95 % intervals by a bootstrap "
        f"that resamples subjects and seeds (BCa), permutation tests by subject, Holm's correction. "
        f"Declared before: {_declared_in_words(study)}; all other comparisons are exploratory. "
        f"The adversarial attention follows Nie, Xiang, Wang and Shen, arXiv:1907.03297."
    )


def _folds_in_words(study: Study) -> str:
    """Describe how cases were assigned to folds."""
    return "leaving one site out" if study.folds == "site" else f"{study.folds}-fold cross-validation by subject"


def _locked_people(notes: StudyNotes, root: Path) -> int:
    """Count the subjects of the locked test set, as the first training that is still there has them."""
    paths = (root / job.folder / "splits.json" for job in notes.jobs)
    locked_cases = next((read_splits(path).split.locked for path in paths if path.is_file()), ())
    return len(notes.people(name for name in locked_cases if name in notes.cases))


def _locked_in_words(people: int) -> str:
    """State how many subjects were locked, if any."""
    return (
        f" {amount(people, 'subject')} {'was' if people == 1 else 'were'} kept apart from all folds." if people else ""
    )


def _declared_in_words(study: Study) -> str:
    """List the comparisons that were declared before."""
    declared = (f"{one.metric} in {one.region}, {one.arm} against {one.against}" for one in study.declared)
    return "; ".join(declared) or "none"


def _reference_in_words(study: Study) -> str:
    """Describe the reference images, if they are not the cohort's own."""
    if study.reference is None:
        return ""
    real = HELD_AGAINST["held" if study.reference == "held" else "folder"]
    return f"Predictions were compared with the real images {real}, which were never registered. "


def compare_arms(
    study: Study, rows: Sequence[Row], lesions: Sequence[str], subjects: Mapping[str, str]
) -> list[Comparison]:
    """Compare the declared pairs, and every arm with the second one of the first pair that learns from its subjects."""
    arms = _kept(dict.fromkeys(row.method for row in rows), study.arms)
    declared = [Declared(one.arm, one.against, one.region, one.metric) for one in study.declared]
    scored = {row.region for row in rows if row.metric == "mae"}
    return compare_methods(
        rows,
        _pairs(arms, declared, study.own_split),
        metrics=_with(_kept(COMPARED, {row.metric for row in rows}), (one.metric for one in declared)),
        regions=_with(_kept(("mask", HEALTHY, *lesions, "edges"), scored), (one.region for one in declared)),
        declared=declared,
        subjects=subjects,
        are_comparable=study.are_comparable,
    )


def _kept(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Keep the names that are wanted, in their order."""
    return [name for name in names if name in wanted]


def _with(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Add others, each once."""
    return list(dict.fromkeys((*names, *others)))


def _pairs(
    arms: Sequence[str], declared: Sequence[Declared], learnt_from: Callable[[str], Hashable]
) -> list[tuple[str, str]]:
    """List the declared pairs, then every arm with the second arm of the first pair that learns from its subjects.

    Scores of arms that learn from different subjects may differ in scale, so only declared pairs are listed.
    """
    asked = [(one.arm, one.against) for one in declared]
    anchors = [*(against for _, against in asked), *arms[:1]]
    others = ((arm, next((one for one in anchors if learnt_from(one) == learnt_from(arm)), arm)) for arm in arms)
    pairs = dict.fromkeys([*asked, *others])
    return [(arm, other) for arm, other in pairs if arm != other and {arm, other} <= {*arms}]


MAPS, OLD_MAPS = "expected-error", "reliability"  # folder of the scores of the maps; its name in version 0.1
MOST_OTHERS = 2  # arms whose images are shown beside those of the assessed one
COMPARED = ("mae", "ssim", "psnr")  # metrics that arms are compared by
