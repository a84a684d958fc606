"""`chiasm study`: methods x folds x seeds worked off by a runner, then assessed.

What a study leaves behind is files: `evaluation.csv` with every score of
every job, `statistics.csv` with every comparison, and the report, which
`chiasm report` makes again from these files alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.gathering import notes_in_lines
from chiasm.errors import ChiasmError, CohortError
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links
from chiasm.prediction.model_files import named_classes
from chiasm.progress import Progress
from chiasm.reports.evaluation_folder import PAGE_FILES
from chiasm.runners import Lost, Runner, Slurm, find_runner
from chiasm.storage import UNWRITABLE, write_json
from chiasm.studies.jobs import LESS_MEMORY, STAGES, Job, JobKind, find_cases, list_jobs
from chiasm.studies.notes import FILES, FOLDERS, NOTES, is_study, notes_of, scored_folders
from chiasm.studies.study_file import Study, data_folder, read_study, reference_folder
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
    """Work a study off, skip what is done, and write its evidence.

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
    open_locked = open_locked or open_sealed
    study = _read(path, reading, settings)
    run = find_runner(runner, {"slurm": _for_slurm(study), "ray": study.ray})
    if open_locked and not study.locked:
        raise CohortError(
            "the study has no locked test set", path=path, reason="not-locked", hint="Add a line such as locked = 0.2."
        )
    with locked(out):
        _check_folder(out, study)
        jobs, cohort = _prepare(study, out, say)
        say(f"{len(jobs)} jobs, {sum(job.is_done for job in jobs)} of them done already")
        todo = _Work(jobs, study, out, say, progress, opened=open_locked, trust=named_classes(trust))
        failed = todo.do_all(run)
        folder = out / LOCKED[0] if open_locked else out
        rows = collect(jobs, opened=open_locked)
        if not rows:
            first = f"; the first: {failed[0].error}" if failed else ""
            raise CohortError(f"no job of the study could be finished{first}", path=out, reason="no-jobs")
        write_json(folder / NOTES, notes_of(study, cohort, jobs, failed, opened=open_locked))  # first: it is the mark
        write_evaluation(folder, rows)
        if assessed := collect(jobs, kind="expected_error"):
            write_evaluation(out / MAPS, assessed)
        return replace(write_study_report(folder), failed=tuple(failed))


def _prepare(study: Study, out: Path, say: Callable[[str], None]) -> tuple[list[Job], Cohort]:
    """List the jobs, simulate the patients where the study asks for some, and report what the cohort holds."""
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
    for line in [*notes_in_lines(cohort.notes), *(problem.line for problem in cohort.problems)]:
        say(line)
    return jobs, cohort


def _check_folder(out: Path, study: Study) -> None:
    """Refuse a folder where a study would replace what it did not write.

    Raises:
        RunError: If it is or holds the data, or holds files of somebody else in the places of the study's own.
    """
    data = [place for place in (study.data, study.reference) if isinstance(place, Path)]
    refuse_data_folder(out, data)
    refuse_inputs((out / name for name in (*FILES, *FOLDERS)), data, what="the study")
    refuse_links(out, FOLDERS)
    for folder in (out, out / LOCKED[0]):
        if not is_study(folder):
            refuse_foreign(folder, (*FILES, *PAGE_FILES))


@dataclass
class _Work:
    """Jobs that are worked off, stage by stage, and what failed of them.

    Attributes:
        jobs: All of the study.
        study: What they are of.
        out: The study's folder.
        say: Called with lines for the user.
        progress: Called with jobs done, all jobs, the last one's name.
        opened: Whether the locked test set is scored.
        trust: Classes of others that a model may consist of.
        failed: Outcomes of jobs that failed, by key.
    """

    jobs: Sequence[Job]
    study: Study
    out: Path
    say: Callable[[str], None]
    progress: Progress | None
    opened: bool
    trust: tuple[str, ...]
    failed: dict[str, JobOutcome] = field(default_factory=dict)

    def do_all(self, run: Runner) -> list[JobOutcome]:
        """Do all jobs that are not done; return what failed."""
        terms = JobTerms(
            data=data_folder(self.study, self.out),
            out=self.out,
            threads=self.study.threads,
            layout=self.study.layout,
            opened=self.opened,
            reference=reference_folder(self.study, self.out),
            trust=self.trust,
        )
        do = partial(work, terms=terms)
        finished = sum(job.is_done for job in self.jobs)
        for kind in STAGES:
            due = self._due(kind)
            was_done = {job.key for job in due if job.is_done}
            for report in run(due, do, self.out):
                outcome = self._outcome(report)
                if outcome is None:
                    continue
                finished += outcome.key not in was_done
                if self.progress is not None:
                    self.progress(finished, len(self.jobs), outcome.name)
        return list(self.failed.values())

    def _due(self, kind: str) -> list[Job]:
        """List the jobs of a stage that are to be done; those that go on from a failed one have failed too."""
        due = [job for job in self.jobs if job.kind == kind and self._is_due(job)]
        for job in due:
            if any(folder.name in self.failed for folder in job.needs):
                self.failed[job.key] = JobOutcome(job.key, job.name, "what it goes on from failed")
        return [job for job in due if job.key not in self.failed]

    def _is_due(self, job: Job) -> bool:
        """Return whether a job is to be done; arms are asked again where the locked test set is scored."""
        return not job.is_done or (self.opened and job.kind == "arm")

    def _outcome(self, report: JobOutcome | Lost[Job]) -> JobOutcome | None:
        """Take note of what came of a job; None where it was lost and is tried once more.

        Raises:
            ChiasmError: If nothing can be written: no other job would fare better.
        """
        if isinstance(report, Lost) and report.again:
            self.say(f"lost: {report.job.name}: {report}; it is tried once more")
            return None
        outcome = _lost_for_good(report) if isinstance(report, Lost) else report
        if outcome.error is not None:
            if outcome.reason == UNWRITABLE:
                raise ChiasmError(f"{outcome.name}: {outcome.error.rstrip('.')}", reason=UNWRITABLE)
            self.failed[outcome.key] = outcome
            self.say(f"failed: {outcome.name}: {outcome.error}")
        return outcome


def _for_slurm(study: Study) -> Slurm:
    """Return what a job asks of SLURM: as many cores as it has threads, where the study does not say."""
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
    """Read a study file, and note in its settings what else is assumed of the cohort's files, and other settings."""
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
    done = {job.key: sum(job.spent.values()) for job in jobs if job.is_done}
    left = [job for job in jobs if job.key not in done]
    minutes = _minutes(left, _seconds_a_step([job for job in jobs if job.key in done], done))
    steps = sum(job.steps for job in left)
    total = f"{len(jobs)} jobs, {len(done)} done, {steps} steps to do"
    if minutes and steps:
        total += f", about {sum(minutes.values()):.0f} min of one process"
    return [*(_job_in_words(job, job.key in done, minutes.get(job.key)) for job in jobs), total]


def _minutes(jobs: Sequence[Job], speed: dict[str, float]) -> dict[str, float]:
    """Estimate how long jobs take, by key, from the seconds of a step of each kind; nothing without any."""
    slowest = max(speed.values(), default=0.0)
    return {job.key: job.steps * speed.get(job.kind, slowest) / 60 for job in jobs} if speed else {}


def _job_in_words(job: Job, is_done: bool, minutes: float | None) -> str:
    line = f"{'done' if is_done else 'to do':6} {job.key} {job.name}, {job.steps} steps"
    return line if minutes is None else f"{line}, about {minutes:.1f} min"


def _seconds_a_step(jobs: Sequence[Job], spent: dict[str, float]) -> dict[str, float]:
    """Return what a step of each kind of finished job took, scoring included; `spent` are seconds by key."""
    seconds: dict[str, float] = defaultdict(float)
    steps: dict[str, int] = defaultdict(int)
    for job in jobs:
        seconds[job.kind] += spent[job.key]
        steps[job.kind] += job.steps
    return {kind: total / max(1, steps[kind]) for kind, total in seconds.items()}


def collect(jobs: Sequence[Job], *, kind: JobKind = "arm", opened: bool = False) -> list[Row]:
    """Gather the rows of all finished jobs of a kind, of their folds' test cases or of the locked ones."""
    done = [job for job in jobs if job.kind == kind and job.is_done]
    folders = [folder for folder in scored_folders(done, opened=opened) if (folder / "evaluation.csv").exists()]
    return list(chain.from_iterable(map(read_evaluation, folders)))
