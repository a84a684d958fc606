"""`chiasm study`: methods x folds x seeds worked off by a runner, then judged.

What a study leaves behind is files: `evaluation.csv` with every figure of
every job, `statistics.csv` with every comparison, and the report, which
`chiasm report` makes again from these files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chiasm.cohorts.cases import Cohort
from chiasm.errors import CohortError
from chiasm.evidence.evaluation import Row, read_evaluation, write_evaluation
from chiasm.evidence.jobs import (
    STAGES,
    Job,
    Outcome,
    Study,
    data_folder,
    find_cases,
    list_jobs,
    read_study,
    sealed_folder,
    simulate,
    work,
)
from chiasm.evidence.report import write_report
from chiasm.evidence.runners import find_runner
from chiasm.evidence.statistics import Comparison, Declared, compare_methods, write_statistics
from chiasm.recipe import ARMS, make_recipe
from chiasm.storage import read_json, write_json

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
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.

    Raises:
        ChiasmError: If the study cannot run at all; a job that fails is named in the result.
    """
    study, run = read_study(path), find_runner(runner)
    if open_sealed and not study.sealed:
        raise CohortError(
            "the study keeps no cases sealed", path=path, reason="not-sealed", hint="Add a line such as sealed = 0.2."
        )
    cohort = find_cases(study, out)
    jobs = list_jobs(study, out, cohort)
    if study.phantom is not None:
        if cohort is None:
            say(f"simulating {study.phantom.subjects} patients")
        simulate(study.phantom, data_folder(study, out))
        cohort = find_cases(study, out)
    assert cohort is not None
    say(f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} of them done already")
    failed = _work_off(jobs, study, out, run, say, progress, opened=open_sealed)
    folder = out / "sealed" if open_sealed else out
    rows = collect(jobs, opened=open_sealed)
    if not rows:
        first = f"; the first: {failed[0].error}" if failed else ""
        raise CohortError(f"no job of the study could be finished{first}", path=out, reason="no-jobs")
    write_evaluation(folder, rows)
    write_json(out / "study.json", study.model_dump(mode="json", by_alias=True))
    comparisons = judge(study, rows, cohort)
    write_statistics(folder / "statistics.csv", comparisons)
    declared = study.declared
    report = write_report(
        folder / "report.html",
        title=f"Study: {' + '.join(study.sources)} to {study.target}",
        asked="; ".join(f"{one.metric} in {one.region}: {one.arm} against {one.against}" for one in declared),
        rows=rows,
        facts={
            "Comparisons": {f"{number}": one.verdict for number, one in enumerate(comparisons, start=1)},
            "Study": {name: str(value) for name, value in study.model_dump(mode="json", by_alias=True).items()},
        },
        warnings=[f"failed: {outcome.name}: {outcome.error}" for outcome in failed],
        method=declared[0].arm if declared else make_recipe(study.arms[0]).method,
        naive=[name for name in dict.fromkeys(row.method for row in rows) if name not in ARMS],
    )
    return Done(tuple(rows), tuple(comparisons), tuple(failed), report)


def _work_off(
    jobs: Sequence[Job],
    study: Study,
    out: Path,
    run: Callable[..., object],
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None] | None,
    *,
    opened: bool,
) -> list[Outcome]:
    """Do all jobs that are not done, stage by stage; return what failed."""
    data = data_folder(study, out)
    do = partial(work, data=data, out=out, threads=study.threads, layout=study.layout, opened=opened)
    finished = sum(job.is_done for job in jobs)
    failed: dict[str, Outcome] = {}
    for kind in STAGES:
        due = [job for job in jobs if job.kind == kind and (not job.is_done or (opened and kind == "arm"))]
        lost = [job for job in due if job.warm is not None and job.warm.name in failed]
        failed |= {job.key: Outcome(job.key, job.name, "its warm-up failed") for job in lost}
        was_done = {job.key for job in due if job.is_done}
        for outcome in run([job for job in due if job not in lost], do, out):  # type: ignore[attr-defined]
            finished += outcome.key not in was_done
            if outcome.error is not None:
                failed[outcome.key] = outcome
                say(f"failed: {outcome.name}: {outcome.error}")
            if progress is not None:
                progress(finished, len(jobs), outcome.name)
    return list(failed.values())


def tell_jobs(path: Path, out: Path) -> list[str]:
    """List a study's jobs in words, with what is done and how long the rest may take.

    Raises:
        ChiasmError: If the study cannot run at all.
    """
    study = read_study(path)
    jobs = list_jobs(study, out, find_cases(study, out))
    done = {job.key: read_json(job.folder / "done.json") for job in jobs if job.is_done}
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


def judge(study: Study, rows: Sequence[Row], cohort: Cohort) -> list[Comparison]:
    """Compare the declared pairs and every arm with what the first of them is compared with."""
    arms = [arm for arm in dict.fromkeys(row.method for row in rows) if arm in ARMS]
    declared = [Declared(one.arm, one.against, one.region, one.metric) for one in study.declared]
    anchor = declared[0].against if declared else arms[0]
    pairs = dict.fromkeys([*((one.arm, one.against) for one in declared), *((arm, anchor) for arm in arms)])
    regions = ["mask", "healthy", *cohort.regions, "edges"]
    seen = {(row.region, row.metric) for row in rows}
    return compare_methods(
        rows,
        [pair for pair in pairs if pair[0] != pair[1] and {*pair} <= {*arms}],
        metrics=[m for m in JUDGED if any(metric == m for _, metric in seen)],
        regions=[region for region in regions if (region, "mae") in seen],
        declared=declared,
        subjects={case.id: case.subject for case in cohort.cases},
    )
