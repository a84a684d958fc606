"""The visible loop: resume, step, validate, log, checkpoint, stop when asked."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from chiasm.errors import RecipeError, RunError
from chiasm.prediction.engines import Engine, pick_precision
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import has_gpu
from chiasm.recipe import Recipe, Training
from chiasm.stopping import stopping_signals
from chiasm.storage import make_folder, open_in_place, read_log, write_text, writing
from chiasm.training.checkpoints import load_checkpoint, save_checkpoint
from chiasm.training.coding import CodingLearner
from chiasm.training.health import gauge, in_words
from chiasm.training.learner import Learner

CHECKPOINT_SECONDS = 60.0
MOST_VALIDATION_CASES = 4  # of a large cohort, during training; calibration uses all

Progress = Callable[[int, int, Mapping[str, float]], None]
AnyLearner = Learner | CodingLearner


class Interrupted(Exception):
    """The run was asked to stop; a checkpoint was written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def make_fabric(recipe: Recipe) -> Fabric:
    """Choose devices and precision; DDP with more than one device.

    Raises:
        RecipeError: If the machine has fewer devices.
    """
    settings = recipe.training
    _check_devices(settings)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # we say ourselves what was chosen
    # Buffers stay each process's own: syncing them before every pass would change what a backward pass still needs.
    strategy = DDPStrategy(broadcast_buffers=False) if settings.devices > 1 else "auto"
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its heir came with torch 2.13
    return Fabric(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=strategy,
        precision=pick_precision(settings.precision, settings.accelerator),
    )


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


def learn(
    recipe: Recipe,
    plan: Plan,
    training: Sequence[PreparedCase],
    validation: Sequence[PreparedCase],
    folder: Path,
    *,
    fabric: Fabric,
    progress: Progress | None = None,
    warn: Callable[[str], None],
    start: Path | None = None,
    until: int | None = None,
) -> AnyLearner:
    """Train from the newest checkpoint in `folder`, or from the start, to the last step.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data.
        training: Prepared training cases.
        validation: Prepared validation cases, possibly none.
        folder: The run folder; `checkpoints/` and `log.jsonl` are written there.
        fabric: From `make_fabric`, launched.
        progress: Called after each step with steps done, all steps, figures.
        warn: Called with one sentence for each thing that a user must know.
        start: Run folder of a shared warm-up, with whose networks this run goes on.
        until: Stop after as many steps, as a warm-up does; all of the recipe's by default.

    Returns:
        The learner after the last step.

    Raises:
        RunError: If the loss is not finite or a checkpoint belongs to another recipe.
        CohortError: If a sparse coder has no pair to learn from.
        Interrupted: If SIGINT, SIGTERM or SIGHUP came; a checkpoint was written.
    """
    coded = recipe.optimiser.kind == "admm"
    learner: AnyLearner = (CodingLearner if coded else Learner)(recipe, plan, training, fabric)
    checkpoints, log = folder / "checkpoints", folder / "log.jsonl"
    done, state, damaged = load_checkpoint(checkpoints, learner.parts)
    if not done and start is not None:
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
        warn(sentence)
    engine = Engine(fabric.device, pick_precision(recipe.training.precision, recipe.training.accelerator))
    lead = fabric.global_rank == 0
    if lead:
        _cut_log(log, done, warn)
    steps = recipe.schedule.steps if until is None else until
    due = _validation_steps(recipe)
    saved = time.monotonic()
    with _signals() as caught:

        def write(kind: str, step: int, figures: Mapping[str, object]) -> None:
            if lead:
                with writing(log), open_in_place(log, "a") as lines:
                    lines.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

        for step in range(done, steps):
            figures = learner.step(step)
            if step % max(1, steps // 500) == 0:
                write("step", step + 1, {name: round(value, 6) for name, value in figures.items()})
            if progress is not None and not caught:  # the terminal may be gone
                progress(step + 1, steps, figures)
            if step + 1 in due and validation:
                found, verdict = validate(learner, validation[:MOST_VALIDATION_CASES], engine)
                learner.note_validation(found.get("spearman_smoothed", -1.0))
                write("validation", step + 1, found)
                if verdict and learner.phase(step).attention > 0:
                    write("warning", step + 1, {"message": verdict})
                    warn(f"step {step + 1}: {verdict}")
            late = time.monotonic() - saved > CHECKPOINT_SECONDS
            if lead and (late or caught or step + 1 == steps or step + 1 in due):
                save_checkpoint(checkpoints, step + 1, learner.parts, learner.state.to_dict())
                saved = time.monotonic()
            if caught:
                raise Interrupted(caught[0])
    if (closed := learner.state.closed_share) > 0.1:
        warn(f"the attention was switched off by its health gate in {100 * closed:.0f} % of its steps")
    return learner


def validate(learner: AnyLearner, cases: Sequence[PreparedCase], engine: Engine) -> tuple[dict[str, float], str | None]:
    """Predict validation cases and gauge the health of the local discriminator.

    The errors are those of the image that would be shipped.  The health is that
    of the first stage, on which the attention acts; with a refiner its error is
    told too ("first_mae").

    Returns:
        Means over the cases, NaN-free, and a sentence when the attention is inactive or inverted.
    """
    settings, plan = learner.recipe.attention, learner.plan
    head = "structured" if settings.target == "none" else settings.target
    sigma_mm = settings.magnitude_mm if head == "magnitude" else settings.structured_mm
    sigma = tuple(sigma_mm / s for s in plan.spacing_mm)
    rows: list[dict[str, float]] = []
    for case in cases:
        maps = learner.maps(case, engine)
        target, mask = np.asarray(case.target), np.asarray(case.mask)
        lesion = None if case.labels is None else np.asarray(case.labels) > 0
        error = np.abs(maps.prediction - target)
        row = {"mae": float(error[mask].mean())}
        if lesion is not None and (sick := lesion & mask).any():
            row["lesion_mae"] = float(error[sick].mean())
        first = maps
        if learner.has_refiner:
            first = learner.first_maps(case, engine)
            row["first_mae"] = float(np.abs(first.prediction - target)[mask].mean())
        row |= gauge(first, target, mask, lesion, head=head, beta=settings.beta, sigma_voxels=sigma)  # type: ignore[arg-type]
        rows.append(row)
    names = {name: None for row in rows for name in row}
    means = {name: [row[name] for row in rows if math.isfinite(row.get(name, math.nan))] for name in names}
    figures = {name: round(float(np.mean(values)), 6) for name, values in means.items() if values}
    figures |= {"accuracy_local": learner.state.accuracy, "accuracy_global": learner.state.accuracy_global}
    figures["gate_closed_share"] = learner.state.closed_share
    sentence = in_words(figures, settings.target) if settings.target != "none" else None
    return figures, sentence


def _validation_steps(recipe: Recipe) -> list[int]:
    """Evenly spread steps, and the one before the attention begins, so that its gate knows."""
    schedule = recipe.schedule
    even = {round(schedule.steps * (n + 1) / recipe.training.validations) for n in range(recipe.training.validations)}
    before = int(schedule.steps * (schedule.generator_alone + schedule.critics_alone + schedule.ramp))
    return sorted(even | ({before} if recipe.attention.target != "none" and before > 0 else set()))


def _cut_log(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """Drop lines past the checkpoint, which a resumed run writes again, and damaged ones."""
    make_folder(path.parent)
    lines, damaged = read_log(path)
    if damaged:
        warn(f"{path}: {damaged} damaged lines are left out")
    if lines or damaged:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, so that the loop can stop between two steps."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in stopping_signals()}
    except ValueError:  # not the main thread: signals are somebody else's
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
