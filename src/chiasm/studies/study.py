"""`chiasm study`: train every method on every fold with every seed, by a runner, and assess the results.

A study writes `evaluation.csv` with every score of every job, `statistics.csv` with every comparison, and the report.
`chiasm report` makes the report again from these files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from chiasm.attempts import Lost
from chiasm.cohorts.cases import Cohort, grouped
from chiasm.cohorts.gathering import notes_in_lines
from chiasm.errors import ChiasmError, CohortError
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.locks import locked
from chiasm.names import amount
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links
from chiasm.prediction.model_files import named_classes
from chiasm.progress import Progress
from chiasm.reports.evaluation_folder import PAGE_FILES
from chiasm.runners import Runner, Slurm, find_runner
from chiasm.storage import UNWRITABLE, write_json
from chiasm.studies.jobs import LESS_MEMORY, STAGES, Job, JobKind, find_cases, list_jobs
from chiasm.studies.notes import FILES, FOLDERS, NOTES, days_opened, is_study, notes_of, scored_folders
from chiasm.studies.study_file import Phantom, Study, data_folder, read_study, reference_folder
from chiasm.studies.study_report import MAPS, Done, write_study_report
from chiasm.studies.work import LOCKED, JobOutcome, JobTerms, simulate, work
from chiasm.volumes.screening import STRICT, Reading


def run_study(
    path: Path,
    out: Path,
    *,
    runner: str = "serial",
    open_locked: bool = False,
    open_sealed: bool = False,
    reading: Reading = STRICT,
    trust: str | Collection[str] = (),
    settings: Sequence[str] = (),
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Done:
    """Run all jobs of a study that are not done, and write its scores, statistics and report.

    Args:
        path: The study file.
        out: Folder for jobs, cache, `evaluation.csv`, `statistics.csv` and `report.html`.
        runner: A name of `runners.RUNNERS`.
        open_locked: Score the locked test set with every model; its evidence goes
            to `out/locked`, and the day is noted there.
        open_sealed: The same, by its name in version 0.1.
        reading: What to assume of files whose headers leave a question open, beside the study file's settings.
        trust: Classes of others that a model may consist of, beside those of the study file, as
            ``package.module:Class``.
        settings: More settings of every arm, after those of the study file.
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.

    Raises:
        ChiasmError: If the study cannot run at all; a job that fails is named in the result.
    """
    opened = open_locked or open_sealed
    study = _read(path, reading, settings)
    run = find_runner(runner, {"slurm": _for_slurm(study), "ray": study.ray})
    if opened:
        _check_locked(study, path)
    with locked(out):
        _check_folder(out, study)
        jobs, cohort = _prepare(study, out, say)
        say(f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} of them done already")
        if opened and (days := days_opened(out, jobs)):
            say(
                f"the locked test set was scored before, on {' and '.join(days)}: what is chosen since then has seen it"
            )
        todo = _Work(jobs, study, out, say, progress, opened, trust=named_classes(trust))
        failed = todo.do_all(run)
        folder = _write_scores(todo, cohort, failed)
        return replace(write_study_report(folder), failed=tuple(failed))


def _check_locked(study: Study, path: Path) -> None:
    """Refuse to score a locked test set that the study does not have."""
    if not study.locked:
        raise CohortError(
            "the study has no locked test set", path=path, reason="not-locked", hint="Add a line such as locked = 0.2."
        )


def _write_scores(done: _Work, cohort: Cohort, failed: Sequence[JobOutcome]) -> Path:
    """Write the files of the page: notes, scores, and the scores of expected-error maps; return their folder.

    Raises:
        CohortError: If no job has left any score.
    """
    rows = collect(done.jobs, opened=done.opened)
    if not rows:
        first = f"; the first: {failed[0].error}" if failed else ""
        raise CohortError(f"no job of the study could be finished{first}", path=done.out, reason="no-jobs")
    folder = done.out / LOCKED[0] if done.opened else done.out
    days = days_opened(done.out, done.jobs) if done.opened else ()
    notes = notes_of(done.study, cohort, done.jobs, failed, opened=days)
    write_json(folder / NOTES, notes)  # first: it is the mark
    write_evaluation(folder, rows)
    if assessed := collect(done.jobs, kind="expected_error"):
        write_evaluation(done.out / MAPS, assessed)
    return folder


def _prepare(study: Study, out: Path, say: Callable[[str], None]) -> tuple[list[Job], Cohort]:
    """List the jobs, simulate the patients of a simulated cohort, and describe the cohort."""
    cohort = find_cases(study, out)
    jobs = list_jobs(study, out, cohort)
    if study.phantom is not None:
        if cohort is None:
            say(f"simulating {study.phantom.subjects} patients")
        _simulate(study.phantom, study, out)
        cohort = find_cases(study, out)
    assert cohort is not None
    say(f"{amount(len(cohort.cases), 'case')} ({cohort.layout})")
    for line in [*notes_in_lines(cohort.notes), *(problem.line for problem in cohort.problems)]:
        say(line)
    return jobs, cohort


def _simulate(phantom: Phantom, study: Study, out: Path) -> None:
    """Simulate the patients of a study; also the same patients without movement, if they are the reference."""
    simulate(phantom, data_folder(study, out))
    if study.reference == "held":
        simulate(phantom, out / "unmoved", movement="held")


def _check_folder(out: Path, study: Study) -> None:
    """Refuse a folder in which a study would replace other files.

    Raises:
        RunError: If it is or holds the data, or holds other files with the names of the study's own.
    """
    data = [place for place in (study.data, study.reference) if isinstance(place, Path)]
    refuse_data_folder(out, data)
    refuse_inputs(map(out.joinpath, (*FILES, *FOLDERS)), data, what="the study")
    refuse_links(out, FOLDERS)
    for folder in (out, out / LOCKED[0]):
        if not is_study(folder):
            refuse_foreign(folder, (*FILES, *PAGE_FILES))


@dataclass
class _Work:
    """The jobs of a study, which run stage by stage, and the failed ones.

    Attributes:
        jobs: All of the study.
        study: What they are of.
        out: The study's folder.
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.
        opened: Whether the locked test set is scored.
        trust: Classes of others that a model may consist of.
        failed: Outcomes of jobs that failed, by key.
        finished: How many jobs are done.
    """

    jobs: Sequence[Job]
    study: Study
    out: Path
    say: Callable[[str], None]
    progress: Progress | None
    opened: bool
    trust: tuple[str, ...]
    failed: dict[str, JobOutcome] = field(default_factory=dict)
    finished: int = 0

    def do_all(self, run: Runner) -> list[JobOutcome]:
        """Do all jobs that are not done; return the failed ones."""
        terms = JobTerms(
            data=data_folder(self.study, self.out),
            out=self.out,
            threads=self.study.threads,
            layout=self.study.layout,
            opened=self.opened,
            reference=reference_folder(self.study, self.out),
            trust=self.trust,
        )
        self.finished = sum(job.is_done for job in self.jobs)
        stages = grouped(self.jobs, lambda job: job.kind)
        for kind in STAGES:
            self._do_stage(self._due(stages.get(kind, [])), partial(work, terms=terms), run)
        return list(self.failed.values())

    def _do_stage(self, due: Sequence[Job], do: Callable[[Job], JobOutcome], run: Runner) -> None:
        """Do the jobs of a stage, count those that were not done before, and report each."""
        was_done = {job.key for job in due if job.is_done}
        for report in run(due, do, self.out):
            if (outcome := self._outcome(report)) is not None:
                self.finished += outcome.key not in was_done
                self._report(outcome)

    def _report(self, outcome: JobOutcome) -> None:
        """Report how far the study is."""
        if self.progress is not None:
            self.progress(self.finished, len(self.jobs), outcome.name)

    def _due(self, stage: Sequence[Job]) -> list[Job]:
        """List the jobs of a stage that must be done; a job that continues a failed one has failed too."""
        due = list(filter(self._is_due, stage))
        for job in filter(self._goes_on_from_failed, due):
            self.failed[job.key] = JobOutcome(job.key, job.name, "the job that it continues failed")
        return [job for job in due if job.key not in self.failed]

    def _goes_on_from_failed(self, job: Job) -> bool:
        return any(folder.name in self.failed for folder in job.needs)

    def _is_due(self, job: Job) -> bool:
        """Return whether a job must be done; every arm must if the locked test set is scored."""
        return not job.is_done or (self.opened and job.kind == "arm")

    def _outcome(self, report: JobOutcome | Lost[Job]) -> JobOutcome | None:
        """Record the outcome of a job; return None if it was lost and is tried once more.

        Raises:
            ChiasmError: If nothing can be written: no other job would fare better.
        """
        if isinstance(report, Lost) and report.again:
            self.say(f"lost: {report.job.name}: {report}; it is tried once more")
            return None
        outcome = _lost_for_good(report) if isinstance(report, Lost) else report
        if outcome.error is not None:
            self._note_failure(outcome, outcome.error)
        return outcome

    def _note_failure(self, outcome: JobOutcome, error: str) -> None:
        """Record and report a failed job; raise if nothing can be written."""
        if outcome.reason == UNWRITABLE:
            raise ChiasmError(f"{outcome.name}: {error.rstrip('.')}", reason=UNWRITABLE)
        self.failed[outcome.key] = outcome
        self.say(f"failed: {outcome.name}: {error}")


def _for_slurm(study: Study) -> Slurm:
    """Return the resources of a job on SLURM; by default as many cores as it has threads."""
    asked = study.slurm or Slurm()
    return (
        asked
        if "cpus_per_task" in asked.model_fields_set
        else asked.model_copy(update={"cpus_per_task": study.threads})
    )


def _lost_for_good(lost: Lost[Job]) -> JobOutcome:
    hint = f" {LESS_MEMORY}" if lost.may_lack_memory else ""
    return JobOutcome(lost.job.key, lost.job.name, f"{lost}.{hint}")


def _read(path: Path, reading: Reading, settings: Sequence[str]) -> Study:
    """Read a study file, and add options for reading files and other settings to its settings."""
    study = read_study(path)
    asked = [f"data.{name}={str(value).lower()}" for name, value in asdict(reading).items() if value]
    return study.model_copy(update={"settings": (*study.settings, *asked, *settings)})


def describe_jobs(path: Path, out: Path, reading: Reading = STRICT, settings: Sequence[str] = ()) -> list[str]:
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
    parts = grouped(jobs, lambda job: job.is_done)
    done, left = parts.get(True, []), parts.get(False, [])
    minutes = _minutes(left, _seconds_a_step(done))
    lines = [_job_in_words(job, minutes.get(job.key)) for job in jobs]
    return [*lines, _sum_in_words(done, left, sum(minutes.values()))]


def _sum_in_words(done: Sequence[Job], left: Sequence[Job], minutes: float) -> str:
    """State how many jobs there are and how many are left, with an estimate of the time if there is one."""
    steps = sum(job.steps for job in left)
    total = f"{len(done) + len(left)} jobs, {len(done)} done, {steps} steps to do"
    return f"{total}, about {minutes:.0f} min of one process" if done and steps else total


def _minutes(jobs: Sequence[Job], speed: dict[str, float]) -> dict[str, float]:
    """Estimate how long jobs take, by key, from the time of a step of each kind; empty without finished jobs."""
    slowest = max(speed.values(), default=0.0)
    return {job.key: job.steps * speed.get(job.kind, slowest) / 60 for job in jobs} if speed else {}


def _job_in_words(job: Job, minutes: float | None) -> str:
    line = f"{'done' if job.is_done else 'to do':6} {job.key} {job.name}, {job.steps} steps"
    return line if minutes is None else f"{line}, about {minutes:.1f} min"


def _seconds_a_step(jobs: Sequence[Job]) -> dict[str, float]:
    """Return the seconds of a step of each kind of finished job, scoring included."""
    return {kind: _pace(some) for kind, some in grouped(jobs, lambda job: job.kind).items()}


def _pace(jobs: Sequence[Job]) -> float:
    """Return how many seconds a step of some jobs took."""
    return sum(job.seconds for job in jobs) / max(1, sum(job.steps for job in jobs))


def collect(jobs: Sequence[Job], *, kind: JobKind = "arm", opened: bool = False) -> list[Row]:
    """Gather the rows of all finished jobs of a kind, of their folds' test cases or of the locked ones."""
    done = [job for job in jobs if job.kind == kind and job.is_done]
    folders = [folder for folder in scored_folders(done, opened=opened) if (folder / "evaluation.csv").exists()]
    return list(chain.from_iterable(map(read_evaluation, folders)))
