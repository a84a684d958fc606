"""`chiasm study`: methods x folds x seeds worked off by a runner, then judged.

What a study leaves behind is files: `evaluation.csv` with every figure of
every job, `statistics.csv` with every comparison, and the report, which
`chiasm report` makes again from these files alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chiasm import __version__
from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.gathering import tell_notes
from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.evaluation.predictions import open_predictions, open_reference
from chiasm.evaluation.rows import Remarks, Row, read_evaluation, read_remarks, write_evaluation
from chiasm.evaluation.statistics import (
    FEWEST,
    Comparison,
    Declared,
    compare_methods,
    summarise_methods,
    write_table,
)
from chiasm.locks import locked
from chiasm.prediction.model_files import named_classes
from chiasm.recipe import Registration
from chiasm.reports.curves import read_history
from chiasm.reports.evaluation import ASKED, PAGES, REGISTERED, report_evaluation, write_cases
from chiasm.reports.registration import report_registered
from chiasm.reports.study_digest import write_digest
from chiasm.reports.study_page import HEALTHY, Findings, write_findings
from chiasm.runners import Lost, Runner, Slurm, find_runner
from chiasm.storage import UNWRITABLE, read_facts, read_json, read_toml, write_json
from chiasm.studies.jobs import LESS_MEMORY, STAGES, Job, find_cases, list_jobs
from chiasm.studies.study_file import Study, data_folder, read_study, reference_folder
from chiasm.studies.work import Outcome, sealed_folder, simulate, work
from chiasm.volumes.screening import STRICT, Reading

NOTES = "study.json"
RELIABILITY = "reliability"  # folder of its figures
JUDGED = ("mae", "ssim", "psnr")  # metrics that arms are compared by


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


def run_study(
    path: Path,
    out: Path,
    *,
    runner: str = "serial",
    open_sealed: bool = False,
    reading: Reading = STRICT,
    trust: str | Collection[str] = (),
    settings: Sequence[str] = (),
    say: Callable[[str], None] = print,
    progress: Callable[[int, int, str], None] | None = None,
) -> Done:
    """Work a study off, skip what is done, and write its evidence.

    Args:
        path: The study file.
        out: Folder for jobs, cache, `evaluation.csv`, `statistics.csv` and `report.html`.
        runner: A name of `runners.RUNNERS`.
        open_sealed: Score the sealed test set with every model; its evidence goes
            to `out/sealed`, and the day is noted there.
        reading: What to assume of files whose headers leave a question open, beside the study file's settings.
        trust: Classes of others that a model may consist of, beside those of the study file, as
            ``package.module:Class``.
        settings: More settings of every arm, after those of the study file.
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.

    Raises:
        ChiasmError: If the study cannot run at all; a job that fails is named in the result.
    """
    study = _read(path, reading, settings)
    run = find_runner(runner, {"slurm": _for_slurm(study), "ray": study.ray})
    if open_sealed and not study.sealed:
        raise CohortError(
            "the study keeps no cases sealed", path=path, reason="not-sealed", hint="Add a line such as sealed = 0.2."
        )
    with locked(out):
        cohort = find_cases(study, out)
        jobs = list_jobs(study, out, cohort)
        if study.phantom is not None:
            if cohort is None:
                say(f"simulating {study.phantom.subjects} patients")
            simulate(study.phantom, data_folder(study, out))
            if study.reference == "held":
                simulate(study.phantom, out / "unmoved", movement="held")
            cohort = find_cases(study, out)
        assert cohort is not None
        say(f"{len(cohort.cases)} cases ({cohort.layout})")
        for line in [*tell_notes(cohort.notes), *(problem.line for problem in cohort.problems)]:
            say(line)
        say(f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} of them done already")
        failed = _work_off(jobs, study, out, run, say, progress, opened=open_sealed, trust=trust)
        folder = out / "sealed" if open_sealed else out
        rows = collect(jobs, opened=open_sealed)
        if not rows:
            first = f"; the first: {failed[0].error}" if failed else ""
            raise CohortError(f"no job of the study could be finished{first}", path=out, reason="no-jobs")
        write_evaluation(folder, rows)
        maps = [job for job in jobs if job.kind == "reliability" and job.is_done]
        if judged := [row for job in maps for row in read_evaluation(job.folder)]:
            write_evaluation(out / RELIABILITY, judged)
        write_json(folder / NOTES, _notes(study, cohort, jobs, failed, opened=open_sealed))
        return replace(conclude(folder), failed=tuple(failed))


def _work_off(
    jobs: Sequence[Job],
    study: Study,
    out: Path,
    run: Runner,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None] | None,
    *,
    opened: bool,
    trust: str | Collection[str],
) -> list[Outcome]:
    """Do all jobs that are not done, stage by stage; return what failed."""
    data = data_folder(study, out)
    do = partial(
        work,
        data=data,
        out=out,
        threads=study.threads,
        layout=study.layout,
        opened=opened,
        reference=reference_folder(study, out),
        trust=named_classes(trust),
    )
    finished = sum(job.is_done for job in jobs)
    failed: dict[str, Outcome] = {}
    for kind in STAGES:
        due = [job for job in jobs if job.kind == kind and (not job.is_done or (opened and kind == "arm"))]
        lost = [job for job in due if any(needed.name in failed for needed in (job.warm, *job.runs) if needed)]
        failed |= {job.key: Outcome(job.key, job.name, "what it goes on from failed") for job in lost}
        was_done = {job.key for job in due if job.is_done}
        for report in run([job for job in due if job not in lost], do, out):
            if isinstance(report, Lost) and report.again:
                say(f"lost: {report.job.name}: {report}; it is tried once more")
                continue
            outcome = _lost_for_good(report) if isinstance(report, Lost) else report
            finished += outcome.key not in was_done
            if outcome.error is not None and outcome.reason == UNWRITABLE:  # no other job would fare better
                raise ChiasmError(f"{outcome.name}: {outcome.error.rstrip('.')}", reason=UNWRITABLE)
            if outcome.error is not None:
                failed[outcome.key] = outcome
                say(f"failed: {outcome.name}: {outcome.error}")
            if progress is not None:
                progress(finished, len(jobs), outcome.name)
    return list(failed.values())


def _for_slurm(study: Study) -> Slurm:
    """Return what a job asks of SLURM: as many cores as it has threads, where the study does not say."""
    asked = study.slurm or Slurm()
    return (
        asked
        if "cpus_per_task" in asked.model_fields_set
        else asked.model_copy(update={"cpus_per_task": study.threads})
    )


def _lost_for_good(lost: Lost[Job]) -> Outcome:
    hint = f" {LESS_MEMORY}" if lost.may_lack_memory else ""
    return Outcome(lost.job.key, lost.job.name, f"{lost}.{hint}")


def _read(path: Path, reading: Reading, settings: Sequence[str]) -> Study:
    """Read a study file, and note in its settings what else is assumed of the cohort's files, and other settings."""
    study = read_study(path)
    asked = [f"data.{name}={str(value).lower()}" for name, value in asdict(reading).items() if value]
    return study.model_copy(update={"settings": (*study.settings, *asked, *settings)})


def tell_jobs(path: Path, out: Path, reading: Reading = STRICT, settings: Sequence[str] = ()) -> list[str]:
    """List a study's jobs in words, with what is done and how long the rest may take.

    Args:
        path: The study file.
        out: The study's folder.
        reading: As for `run_study`.
        settings: As for `run_study`.

    Raises:
        ChiasmError: If the study cannot run at all.
    """
    study = _read(path, reading, settings)
    jobs = list_jobs(study, out, find_cases(study, out))
    done = {job.key: job.spent for job in jobs if job.is_done}
    speed = _seconds_a_step(jobs, done)
    lines, minutes = [], 0.0
    for job in jobs:
        line = f"{'done' if job.key in done else 'to do':6} {job.key} {job.name}, {job.steps} steps"
        if job.key not in done and speed:
            needed = job.steps * speed.get(job.kind, max(speed.values())) / 60
            minutes += needed
            line += f", about {needed:.1f} min"
        lines.append(line)
    left = sum(job.steps for job in jobs if job.key not in done)
    told = f"{len(jobs)} jobs, {len(done)} done, {left} steps to do"
    return [*lines, f"{told}, about {minutes:.0f} min of one process" if speed and left else told]


def _seconds_a_step(jobs: Sequence[Job], done: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what a step of each kind of job took, scoring included, where any is done."""
    spent: dict[str, tuple[float, int]] = {}
    for job in jobs:
        if job.key in done:
            seconds, steps = spent.get(job.kind, (0.0, 0))
            more = done[job.key]["training_seconds"] + done[job.key]["scoring_seconds"]
            spent[job.kind] = seconds + more, steps + job.steps
    return {kind: seconds / max(1, steps) for kind, (seconds, steps) in spent.items()}


def collect(jobs: Sequence[Job], *, opened: bool = False) -> list[Row]:
    """Gather the rows of all finished arms, of their folds' test cases or of the sealed ones."""
    folders = [sealed_folder(job) if opened else job.folder for job in jobs if job.kind == "arm" and job.is_done]
    return [row for folder in folders if (folder / "evaluation.csv").exists() for row in read_evaluation(folder)]


def _notes(
    study: Study, cohort: Cohort, jobs: Sequence[Job], failed: Sequence[Outcome], *, opened: bool
) -> dict[str, Any]:
    """Collect what a study's page needs beside its figures."""
    arms = [job for job in jobs if job.kind == "arm" and job.is_done]
    told = {job.key: job.spent for job in jobs if job.is_done}
    scored = [sealed_folder(job) if opened else job.folder for job in arms]
    facts = [
        {"name": job.name, "arm": job.arm, "fold": job.fold, "seed": job.seed, "folder": str(Path("jobs", job.key))}
        for job in arms
    ]
    return {
        "study": study.model_dump(mode="json", by_alias=True),
        "cases": {case.id: {"subject": case.subject, "site": case.site} for case in cohort.cases},
        "regions": list(cohort.regions),
        "jobs": facts,
        "hours": round(sum(one["training_seconds"] + one["scoring_seconds"] for one in told.values()) / 3600, 2),
        "failed": [f"failed: {outcome.name}: {outcome.error}" for outcome in failed],
        "remarks": _remarks([read_remarks(folder) for folder in scored if (folder / "evaluation.json").is_file()]),
    }


def _remarks(found: Sequence[Remarks]) -> list[str]:
    """Say which labels were not used, and whether arms were scored in different voxels of a case."""
    told = [f"labels not used: {message}" for remarks in found for message in remarks.problems]
    masks: dict[str, dict[str, set[str]]] = {}
    for use in (mask for remarks in found for mask in remarks.masks):
        masks.setdefault(use.case, {}).setdefault(use.sha256, set()).add(use.method)
    differing = {case: sorted(set().union(*by.values())) for case, by in masks.items() if len(by) > 1}
    if differing:
        arms = sorted(set().union(*differing.values()))
        told.append(
            f"{', '.join(arms)} were not scored in the same voxels of {len(differing)} of {len(masks)} cases "
            f"({', '.join(list(differing)[:3])}), since their masks are found differently: "
            "their figures do not compare the methods alone"
        )
    return list(dict.fromkeys(told))


def conclude(folder: Path, *, pages: int = PAGES, whole: bool = False) -> Done:
    """Judge a study from its files and write its statistics and page; nothing is trained or scored again.

    Args:
        folder: Holds `evaluation.csv` and `study.json`: a study's folder, or its `sealed` one.
        pages: At most as many cases get a page, of the arm under judgement with its first seed.
        whole: Keep the volumes of these pages uncut and unthinned.

    Raises:
        RunError: If a file is missing or damaged.
    """
    rows, notes = read_evaluation(folder), read_json(folder / NOTES)
    study = Study.model_validate(notes["study"])
    subjects = {name: case["subject"] for name, case in notes["cases"].items()}
    comparisons = judge(study, rows, notes["regions"], subjects)
    regions = ["mask", HEALTHY, *notes["regions"], "edges", "lesions"]
    metrics = [*JUDGED, "rmse", "gradient_error", "recall", "false_lesions"]
    summaries = summarise_methods(rows, metrics=metrics, regions=regions, subjects=subjects)
    summaries.sort(key=lambda one: (regions.index(one.region), metrics.index(one.metric)))
    write_table(folder / "statistics.csv", comparisons)
    write_table(folder / "summary.csv", summaries)
    root = folder.parent if folder.name == "sealed" else folder
    judged = study.declared[0].arm if study.declared else notes["jobs"][0]["arm"]
    shown = next((job for job in notes["jobs"] if job["arm"] == judged), notes["jobs"][0])
    links = _case_pages(study, notes, rows, judged, root, folder, pages, whole)
    found = Findings(
        title=f"{' + '.join(study.sources)} to {study.target}: {', '.join(study.arms)}",
        rows=rows,
        comparisons=comparisons,
        summaries=summaries,
        regions=notes["regions"],
        arms=study.in_words,
        history=read_history(root / shown["folder"] / "log.jsonl"),
        history_name=shown["name"],
        rivals=read_evaluation(root / RELIABILITY) if (root / RELIABILITY).is_dir() else (),
        facts=_facts(notes, root / shown["folder"], rows),
        warnings=_warnings(notes, rows, root),
        methods=_methods(study, rows, notes["cases"]),
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
            return conclude(folder, pages=pages, whole=whole).report
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
    notes: Mapping[str, Any],
    rows: Sequence[Row],
    arm: str,
    root: Path,
    folder: Path,
    pages: int,
    whole: bool,
) -> dict[str, str]:
    """Write the pages of single cases, as far as predictions and data still lie where they lay."""
    sealed = folder != root
    jobs = [job for job in notes["jobs"] if job["arm"] == arm and job["seed"] == study.seeds[0]]
    places = [root / job["folder"] / ("sealed/predictions" if sealed else "predictions") for job in jobs]
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


def _warnings(notes: Mapping[str, Any], rows: Sequence[Row], root: Path) -> list[str]:
    """Say what must be read before any figure: what failed, what is few, which trainings were unwell."""
    told = [*notes["failed"], *notes.get("remarks", [])]
    cases = {row.case for row in rows}
    people = {notes["cases"][name]["subject"] for name in cases}
    asked = Study.model_validate(notes["study"])
    whole = asked.only_folds is None and not asked.sealed and not notes["failed"]
    if whole and (left := sorted(set(notes["cases"]) - cases)):
        told.append(f"left out, as chiasm inspect tells why: {', '.join(left)}")
    if len(people) < FEWEST:
        told.append(f"only {len(people)} subjects: nothing is tested")
    for region in notes["regions"]:
        some = {notes["cases"][row.case]["subject"] for row in rows if row.region == region and row.metric == "mae"}
        if len(some) < len(people):
            told.append(f"{region} lies in {len(some)} of {len(people)} subjects only")
    unwell: dict[str, list[str]] = {}
    for job in notes["jobs"]:
        history = read_history(root / job["folder"] / "log.jsonl")
        unwell.setdefault(job["arm"], []).extend(
            [line["message"] for line in history if line["kind"] == "warning"][-1:]
        )
    for arm, messages in unwell.items():
        if messages:
            of = sum(job["arm"] == arm for job in notes["jobs"])
            told.append(f"{arm}: in {len(messages)} of {of} trainings, at the end: {messages[-1]}")
    return told


def _facts(notes: Mapping[str, Any], run: Path, rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Collect the data sheet: cohort, folds, what was asked, recipe and machine of one training."""
    cases = {row.case: row.fold for row in rows}
    sites = Counter(notes["cases"][name]["site"] or "not known" for name in cases)
    plan = read_toml(run / "plan.toml") if (run / "plan.toml").exists() else {}
    recipe = read_toml(run / "recipe.toml") if (run / "recipe.toml").exists() else {}
    machine = read_facts(run / "environment.json")
    return {
        "Cohort": {
            "subjects": str(len({notes["cases"][name]["subject"] for name in cases})),
            "cases": str(len(cases)),
            "sites": ", ".join(f"{site} ({count})" for site, count in sorted(sites.items())),
            "spacing": " x ".join(f"{step:g}" for step in plan.get("spacing_mm", [])) + " mm",
        },
        "Folds": {
            f"fold {fold}": f"{sum(its == fold for its in cases.values())} test cases"
            for fold in sorted(set(cases.values()))
        },
        "Study": {name: str(value) for name, value in notes["study"].items() if value not in (None, [], ())},
        "Cost": {"computing": f"{notes['hours']} h in {len(notes['jobs'])} trainings and their warm-ups"},
        "Recipe": {
            f"{section}.{name}": str(value)
            for section, fields in recipe.items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        },
        "Machine and versions": {name: str(value) for name, value in machine.items()},
    }


def _methods(study: Study, rows: Sequence[Row], cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a paragraph that a paper can take over."""
    scored = {row.case for row in rows}
    people = len({cases[name]["subject"] for name in scored})
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


def judge(study: Study, rows: Sequence[Row], lesions: Sequence[str], subjects: Mapping[str, str]) -> list[Comparison]:
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
