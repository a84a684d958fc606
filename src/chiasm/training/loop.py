"""The training loop: resume, step, validate, log, write checkpoints, stop when asked."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import nn

from chiasm.errors import RecipeError, RunError
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.prediction.model import Model
from chiasm.prediction.passes import Maps
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import has_gpu
from chiasm.recipe import Recipe, Training
from chiasm.stopping import handled_here, stopping_signals
from chiasm.training import ranks
from chiasm.training.checkpoints import load_checkpoint, save_checkpoint
from chiasm.training.coding import CodingLearner
from chiasm.training.cost import phase_costs
from chiasm.training.health import gauge, in_words
from chiasm.training.learner import Learner
from chiasm.training.log import TrainingLog
from chiasm.training.players import only_expects_error
from chiasm.training.reading import NotFinite, is_reading_step
from chiasm.training.session import LearningCases, Session
from chiasm.training.state import TrainingState

CHECKPOINT_SECONDS = 60.0
MOST_CLOSED = 0.1  # share of steps with a closed gate that is worth no word
MOST_VALIDATION_CASES = 4  # of a large cohort, during training; calibration uses all

AnyLearner = Learner | CodingLearner
Show = Callable[[PreparedCase, Maps], None]


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint was written."""

    def __init__(self, signal_number: int, *, is_first_process: bool = True) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number if is_first_process else 0  # another code, and the first one were killed

    def __str__(self) -> str:
        """Say what came, and how to go on, for callers in Python."""
        name = signal.Signals(self.signal_number).name
        return f"stopped by {name}; a checkpoint was written, and the same call goes on from it"


def make_fabric(recipe: Recipe) -> Fabric:
    """Choose devices and precision; DDP with more than one device.

    Raises:
        RecipeError: If the machine has fewer devices.
    """
    settings = recipe.training
    _check_devices(settings)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # we say ourselves what was chosen
    strategy = _Processes(timeout=ranks.PATIENCE) if settings.devices > 1 else "auto"
    return Fabric(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=strategy,
        precision=pick_precision(settings.precision, settings.accelerator),
        plugins=LightningEnvironment(),  # in a job of SLURM, Fabric would wait for one task a device
    )


class _Processes(DDPStrategy):  # type: ignore[misc]
    """Processes as Fabric starts them, without its wrapper of networks: `ranks` sums values and gradients."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Leave a network as it is."""
        return module


def _check_devices(settings: Training) -> None:
    gpus = has_gpu(settings.accelerator)
    there = torch.cuda.device_count() if gpus else os.cpu_count() or 1
    if settings.devices > there:
        raise RecipeError(
            "this machine has fewer devices than training.devices asks for",
            reason="devices",
            found=settings.devices,
            expected=f"at most {there} {'GPUs' if gpus else 'processes, one for each core'}",
        )
    if settings.devices > settings.batch:
        raise RecipeError(
            "a batch holds fewer patches than there are devices",
            reason="devices",
            found=f"training.batch {settings.batch}, training.devices {settings.devices}",
            hint="Raise training.batch, or use fewer devices.",
        )


def learn(
    recipe: Recipe,
    plan: Plan,
    cases: LearningCases,
    folder: Path,
    session: Session,
    *,
    start: Path | Model | None = None,
    until: int | None = None,
) -> AnyLearner:
    """Train from the newest checkpoint in `folder`, or from the start, to the last step.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data.
        cases: Prepared training and validation cases.
        folder: The run folder; `checkpoints/` and `log.jsonl` are written there.
        session: Devices, and whom to report to: one sentence for each thing that a user must know.
        start: Run folder of a shared warm-up, or a model, with whose networks this run goes on.
        until: Stop after as many steps, as a warm-up does; all of the recipe's by default.

    Returns:
        The learner after the last step.

    Raises:
        RunError: If the loss is not finite or a checkpoint belongs to another recipe.
        CohortError: If a sparse coder has no pair to learn from.
        Interrupted: If a stopping signal came; a checkpoint was written.
    """
    todo = _Training(recipe, plan, cases, folder, session, start, until)
    try:
        return _learn(todo, careful=False)
    except NotFinite:
        session.say("a value is not a finite number: the steps since the last checkpoint are done again to find where")
        return _learn(todo, careful=True)


class _Training(NamedTuple):
    """The arguments of `learn`."""

    recipe: Recipe
    plan: Plan
    cases: LearningCases
    folder: Path
    session: Session
    start: Path | Model | None
    until: int | None


def _learn(todo: _Training, *, careful: bool) -> AnyLearner:
    """Do all steps; check that all values are finite, after each step or only when they are read.

    Raises:
        NotFinite: If they were not; its message is exact if each step was checked.
        Interrupted: If the run was asked to stop; a checkpoint was written.
    """
    recipe, plan, cases, folder, session, start, until = todo
    learner = _make_learner(recipe, plan, cases.training, session.fabric)
    done = _resume(learner, folder, session, start)
    steps = recipe.schedule.steps if until is None else until
    log = TrainingLog(folder / "log.jsonl", session, steps, _work_of(todo, steps), plan.target_hu)
    due, engine = validation_steps(recipe), session.engine(recipe)
    _open_log(log, learner, todo, done)
    saved, read = time.monotonic(), dict[str, float]()
    with collected_signals() as caught:
        for step in range(done, log.steps):
            values = learner.step(step)
            if careful:
                learner.check()
            if is_reading_step(recipe, step):
                read = learner.read(values)
                log.step(step, read)
            if not caught:  # the terminal may be gone
                log.report(step, read)
            is_late, stopped_by = ranks.agree(time.monotonic() - saved > CHECKPOINT_SECONDS, caught)
            if any((is_late, stopped_by, step + 1 in due, step + 1 == log.steps)):
                learner.check()
                if step + 1 in due:
                    _note_validation(learner, cases.validation, step, engine, log)
                if step + 1 in due:
                    _show(log, step + 1)
                _save(learner, folder, step + 1, session)
                saved = time.monotonic()
            if stopped_by:
                session.fabric.barrier()  # nobody leaves before the checkpoint is written
                raise Interrupted(stopped_by, is_first_process=session.is_first_process)
    if (closed := learner.state.closed_share) > MOST_CLOSED:
        session.say(f"the attention was switched off by its health gate in {100 * closed:.0f} % of its steps")
    return learner


def _work_of(todo: _Training, steps: int) -> Callable[[int], float]:
    """Return the share of the work in a number of first steps; steps in which all networks learn take longest."""
    costs = None if todo.session.progress is None else phase_costs(todo.recipe, todo.plan)
    if costs is None:
        return lambda done: done / steps
    every = costs.work(todo.recipe.schedule, steps)
    return lambda done: costs.work(todo.recipe.schedule, done) / every


def _open_log(log: TrainingLog, learner: AnyLearner, todo: _Training, done: int) -> None:
    """Remove lines that a resumed run writes again; before the first step, validate what the training begins with."""
    log.cut(done or -1)
    _show(log, done)
    if not done:
        is_adopted = isinstance(todo.start, Model)  # whose discriminators know something
        engine = todo.session.engine(todo.recipe)
        _note_validation(learner, todo.cases.validation, -1, engine, log, is_heard=is_adopted)
        _show(log, done)


def _make_learner(recipe: Recipe, plan: Plan, cases: Sequence[PreparedCase], fabric: Fabric) -> AnyLearner:
    if recipe.optimiser.kind == "admm":
        return CodingLearner(recipe, plan, cases, fabric)
    return Learner(recipe, plan, cases, fabric)


def _save(learner: AnyLearner, folder: Path, done: int, session: Session) -> None:
    """Write a checkpoint on the first process; the state is of all."""
    state = learner.state.to_dict()
    if session.is_first_process:
        save_checkpoint(folder / "checkpoints", done, learner.parts, state)


def _note_validation(
    learner: AnyLearner,
    cases: Sequence[PreparedCase],
    step: int,
    engine: Engine,
    log: TrainingLog,
    *,
    is_heard: bool = True,
) -> None:
    """Validate after a step; the log learns of it, and the learner's gate if it is to hear of it."""
    if not cases:
        return
    watcher = log.session.watcher
    show = None if watcher is None else partial(watcher.picture, step + 1)
    scores, verdict = validate(learner, cases[:MOST_VALIDATION_CASES], engine, show)
    if is_heard:
        learner.note_validation(scores.get("spearman_smoothed", -1.0))
    log.validation(step, scores, verdict if learner.phase(step).attention > 0 else None)


def _show(log: TrainingLog, done: int) -> None:
    """Report the progress to the observer of the training."""
    if (watcher := log.session.watcher) is not None:
        watcher.update(log.path, done, log.steps)


def _resume(learner: AnyLearner, folder: Path, session: Session, start: Path | Model | None) -> int:
    """Restore the newest checkpoint of a run, or else its warm-up or its parent model; return the steps done.

    Raises:
        RunError: If there is a warm-up without a checkpoint.
    """
    done, state, damaged = load_checkpoint(folder / "checkpoints", learner.parts)
    if not done and isinstance(start, Model):
        learner.adopt(start)
        return 0
    if not done and isinstance(start, Path):
        done, state, damaged = load_checkpoint(start / "checkpoints", learner.parts, some=True)
        if not done:
            raise RunError(
                "holds no warm-up to go on from",
                path=start,
                reason="no-warm-up",
                found="; ".join(damaged) or None,
                hint="Delete this folder, and the same command makes it anew.",
            )
    learner.restore(state)
    for sentence in damaged:
        session.say(sentence)
    return done


def validate(
    learner: AnyLearner, cases: Sequence[PreparedCase], engine: Engine, show: Show | None = None
) -> tuple[dict[str, float], str | None]:
    """Predict validation cases and gauge the health of the local discriminator.

    The errors are those of the image that would be shipped, in one pass: the mean over mirror images would take
    twice the time.  The health is that of the first stage, on which the attention acts; with a refiner its error is
    reported too ("first_mae").

    Args:
        learner: Between two steps.
        cases: Of validation; several processes share them.
        engine: What predicts.
        show: Called with each case and what the networks make of it, in the process that predicts it.

    Returns:
        Means over the cases, NaN-free, and a sentence when the attention is inactive or inverted.
    """
    rows = [_validate_case(learner, case, engine, show) for case in ranks.share(cases)]
    scores = _finite_means(ranks.gather_rows(rows, len(cases)))
    head = learner.recipe.attention.head
    scores |= _scores_of_players(learner)
    return scores, in_words(scores, head) if head != "none" else None


def _scores_of_players(learner: AnyLearner) -> dict[str, float]:
    """Return the share that each discriminator recognises, and of steps with a closed gate, where there are such."""
    recipe, state = learner.recipe, learner.state
    if not isinstance(state, TrainingState):
        return {}
    found = {}
    if "global_discriminator" in learner.parts:
        found["accuracy_global"] = float(state.accuracy_global)
    if "local_discriminator" in learner.parts and not only_expects_error(recipe):
        found["accuracy_local"] = float(state.accuracy)
    if recipe.attention.head != "none":
        found["gate_closed_share"] = state.closed_share
    return found


def _validate_case(
    learner: AnyLearner, case: PreparedCase, engine: Engine, show: Show | None = None
) -> dict[str, float]:
    """Score the present model on one case, and the relation of its confidence and the error."""
    settings = learner.recipe.attention
    head = "structured" if settings.head == "none" else settings.head
    sigma_mm = settings.magnitude_mm if head == "magnitude" else settings.structured_mm
    i, j, k = (sigma_mm / spacing for spacing in learner.plan.spacing_mm)
    target, mask = np.asarray(case.target), np.asarray(case.mask)
    lesion = None if case.labels is None else np.asarray(case.labels) > 0
    first = maps = learner.maps(case, engine, mirrored=False)
    if show is not None:
        show(case, maps)
    error = np.abs(maps.prediction - target)
    guess = np.interp(np.asarray(case.source[0])[mask], *learner.plan.lookup)
    scores = {"mae": float(error[mask].mean()), "lookup_mae": float(np.abs(guess - target[mask]).mean())}
    if lesion is not None and (inside := lesion & mask).any():
        scores["lesion_mae"] = float(error[inside].mean())
    if learner.has_refiner:
        first = learner.first_maps(case, engine)
        scores["first_mae"] = float(np.abs(first.prediction - target)[mask].mean())
    return scores | gauge(first, target, mask, lesion, head=head, beta=settings.beta, sigma_voxels=(i, j, k))


def _finite_means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each score over the cases where it is a number; drop those that never are."""
    values: dict[str, list[float]] = {}
    for name, value in (item for row in rows for item in row.items()):
        values.setdefault(name, [])
        if math.isfinite(value):
            values[name].append(value)
    return {name: round(float(np.mean(some)), 6) for name, some in values.items() if some}


def validation_steps(recipe: Recipe) -> list[int]:
    """Return evenly spread steps, and the step before the attention begins, for its health gate."""
    schedule = recipe.schedule
    even = {round(schedule.steps * (n + 1) / recipe.training.validations) for n in range(recipe.training.validations)}
    before = int(schedule.steps * (schedule.generator_alone + schedule.discriminators_alone + schedule.ramp))
    return sorted(even | ({before} if recipe.attention.head != "none" and before > 0 else set()))


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the signals of `stopping_signals`, so that the loop can stop between two steps.

    In a thread other than the main one nothing is collected, because only the main thread may handle signals.
    """
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    with handled_here(note, stopping_signals()):
        yield caught
