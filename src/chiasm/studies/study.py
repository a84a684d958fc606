"""`chiasm study`: methods x folds x seeds worked off by a runner, then judged.

What a study leaves behind is files: `evaluation.csv` with every figure of
every job, `statistics.csv` with every comparison, and the report, which
`chiasm report` makes again from these files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from chiasm.cohorts.gathering import tell_notes
from chiasm.errors import ChiasmError, CohortError
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links
from chiasm.prediction.model_files import named_classes
from chiasm.reports.evaluation_folder import PAGE_FILES
from chiasm.runners import Lost, Runner, Slurm, find_runner
from chiasm.storage import UNWRITABLE, write_json
from chiasm.studies.jobs import LESS_MEMORY, STAGES, Job, find_cases, list_jobs
from chiasm.studies.notes import FILES, FOLDERS, NOTES, is_study, notes_of
from chiasm.studies.study_file import Study, data_folder, read_study, reference_folder
from chiasm.studies.study_report import RELIABILITY, Done, write_study_report
from chiasm.studies.work import Outcome, sealed_folder, simulate, work
from chiasm.volumes.screening import STRICT, Reading


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
        _check_folder(out, study)
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
        write_json(folder / NOTES, notes_of(study, cohort, jobs, failed, opened=open_sealed))  # first: it is the mark
        write_evaluation(folder, rows)
        maps = [job for job in jobs if job.kind == "reliability" and job.is_done]
        if judged := [row for job in maps for row in read_evaluation(job.folder)]:
            write_evaluation(out / RELIABILITY, judged)
        return replace(write_study_report(folder), failed=tuple(failed))


def _check_folder(out: Path, study: Study) -> None:
    """Refuse a folder where a study would replace what it did not write.

    Raises:
        RunError: If it is or holds the data, or holds files of somebody else in the places of the study's own.
    """
    data = [place for place in (study.data, study.reference) if isinstance(place, Path)]
    refuse_data_folder(out, data)
    refuse_inputs((out / name for name in (*FILES, *FOLDERS)), data, what="the study")
    refuse_links(out, FOLDERS)
    for folder in (out, out / "sealed"):
        if not is_study(folder):
            refuse_foreign(folder, (*FILES, *PAGE_FILES))


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
