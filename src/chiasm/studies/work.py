"""The work of one job of a study: a training and its scores, in the job's own folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from chiasm import __version__
from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.evaluation.expected_error import assess_maps
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.rows import write_evaluation
from chiasm.prediction.folders import predict
from chiasm.prediction.tiling import is_out_of_memory
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.records import read_record
from chiasm.simulation.patient import Movement
from chiasm.simulation.phantom import write_cohort
from chiasm.storage import write_json
from chiasm.studies.jobs import LESS_MEMORY, Job
from chiasm.studies.study_file import Phantom, alignment_of
from chiasm.training.run import train
from chiasm.training.run_planning import registered_in

OPENED = "opened.json"  # beside a model's scores on the locked test set: the days on which it was scored
LOCKED = ("locked", "sealed")  # folder of the scores on the locked test set; its name in version 0.1


@dataclass(frozen=True)
class JobOutcome:
    """The outcome of a job: its name, the error or None, and the code of the error if it has one."""

    key: str
    name: str
    error: str | None
    reason: str | None = None


def simulate(phantom: Phantom, folder: Path, *, movement: Movement | None = None) -> None:
    """Write a simulated cohort, or finish one.

    Args:
        phantom: What is asked for.
        folder: Where it goes.
        movement: In place of the phantom's own.

    Raises:
        RecipeError: If a setting is out of range.
    """
    write_cohort(
        folder,
        subjects=phantom.subjects,
        seed=phantom.seed,
        difficulty=phantom.difficulty,
        spacing_mm=phantom.spacing_mm,
        misregistration_mm=phantom.misregistration_mm,
        movement=movement or phantom.movement,
    )


@dataclass(frozen=True)
class JobTerms:
    """The settings that all jobs of a study share.

    Attributes:
        data: Folder of the cases.
        out: The study's folder.
        threads: Of torch and numpy, the same on every machine, so that scores are.
        layout: Name of a layout, where `data` fits several.
        opened: Whether to score the locked test set as well.
        reference: Folder that is scored against as it lies; None for `data`, registered as the job's recipe says.
        trust: Classes of others that a model may consist of, beside a job's own.
    """

    data: Path
    out: Path
    threads: int
    layout: str | None
    opened: bool = False
    reference: Path | None = None
    trust: tuple[str, ...] = ()

    def trusted(self, job: Job) -> tuple[str, ...]:
        """Return the classes that a job's model may consist of."""
        return (*self.trust, job.recipe.generator.network)


def work(job: Job, terms: JobTerms) -> JobOutcome:
    """Do a job, or recognise that it was done; errors are returned, not raised."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(terms.threads)
    try:
        # numpy's products too: two jobs with two threads each are three times slower
        with threadpool_limits(terms.threads):
            if not job.is_done:
                _do(job, terms)
            if terms.opened and job.kind == "arm":
                _score_locked(job, terms)
    except ChiasmError as error:
        return JobOutcome(job.key, job.name, str(error), error.reason)
    except (MemoryError, OSError, RuntimeError) as error:  # a machine that is too small costs the job, not the study
        return JobOutcome(job.key, job.name, _shortage(error))
    finally:
        torch.set_num_threads(before)
    return JobOutcome(job.key, job.name, None)


def _do(job: Job, terms: JobTerms) -> None:
    """Do a job that is not done."""
    if job.kind == "expected_error":
        _assess(job, terms)
    else:
        _train(job, terms)


def _score_locked(job: Job, terms: JobTerms) -> None:
    """Score the locked test set, unless that is done."""
    folder = locked_folder(job)
    if not (folder / "evaluation.csv").exists():
        days = {*days_of(folder), time.strftime("%Y-%m-%d")}
        write_json(folder / OPENED, sorted(days))  # first: who is killed meanwhile may have seen predictions
        _score(job, terms, "locked", folder)


def days_of(folder: Path) -> tuple[str, ...]:
    """Return the days on which a model was scored on the locked test set; none where that is not noted.

    Args:
        folder: As `locked_folder`.
    """
    try:
        return read_record(folder / OPENED, tuple[str, ...], "no list of days")
    except RunError:
        return ()


def _shortage(error: MemoryError | OSError | RuntimeError) -> str:
    """Describe a lack of memory, or a disk that is full or missing; raise any other error again."""
    if is_out_of_memory(error):
        return f"memory ran out. {LESS_MEMORY}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the disk'}: {error.strerror or error}."
    raise error


def locked_folder(job: Job) -> Path:
    """Return the folder of a job's scores on the locked test set."""
    return job.folder / LOCKED[0]


def _train(job: Job, terms: JobTerms) -> None:
    start = time.monotonic()
    if job.warm is not None:
        _share_plan(job.warm, job.folder)
    until = None if job.kind == "arm" else job.recipe.schedule.ends[job.kind]
    train(
        terms.data,
        job.recipe,
        job.folder,
        say=_silence,
        layout=terms.layout,
        cache=terms.out / "cache",
        start=job.warm,
        until=until,
        threads=terms.threads,
    )
    trained = time.monotonic()
    if job.kind == "arm":
        _score(job, terms, "test", job.folder)
    _mark_done(job, trained - start, time.monotonic() - trained)


def _assess(job: Job, terms: JobTerms) -> None:
    start = time.monotonic()
    cache, trust = terms.out / "cache", terms.trusted(job)
    rows = assess_maps(job.runs, terms.data, layout=terms.layout, cache=cache, trust=trust)
    write_evaluation(job.folder, rows)
    _mark_done(job, 0.0, time.monotonic() - start)


def _mark_done(job: Job, training: float, scoring: float) -> None:
    seconds = {"training_seconds": round(training, 1), "scoring_seconds": round(scoring, 1)}
    write_json(job.folder / "done.json", {"name": job.name, "version": __version__, "steps": job.steps, **seconds})


def _score(job: Job, terms: JobTerms, role: str, folder: Path) -> None:
    """Predict the cases of a role and score them.

    Raises:
        ChiasmError: If a case cannot be predicted or scored: arms must be compared on the same ones.
    """
    thick = job.recipe.data.task == "super-resolution"
    predict(
        job.folder,
        [terms.data],
        folder / "predictions",
        only=role,
        layout=terms.layout,
        degrade=thick,
        engine="torch",  # one for all arms, on every machine of a study
        trust=terms.trusted(job),
    )
    rows, problems, remarks = score_folder(
        folder / "predictions",
        terms.reference or terms.data,
        layout=terms.layout,
        naive=job.first,
        register=alignment_of(terms.reference),
        registered=registered_in(job.folder, job.recipe, terms.out / "cache"),
    )
    if problems:
        raise CohortError(problems[0].message, reason=problems[0].reason)
    write_evaluation(folder, rows, remarks)


def _share_plan(warm: Path, folder: Path) -> None:
    """Use the warm-up's plan, which has the same fold and data, so that nothing is measured twice."""
    if (warm / "plan.toml").exists() and not (folder / "plan.toml").exists():
        write_plan(folder / "plan.toml", read_plan(warm / "plan.toml"))


def _silence(line: str) -> None:
    """Say nothing: a study reports its jobs, not of their insides."""
    del line
