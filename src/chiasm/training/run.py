"""`chiasm train`: from a folder of pairs to a run folder that explains itself.

A run folder holds `recipe.toml`, `plan.toml`, `splits.json`, `environment.json`,
`log.jsonl`, `checkpoints/`, and `model/`, the shippable part; `finished.json` is
written last.  The same command again resumes; another recipe in the same folder
is refused.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chiasm.cohorts.cases import Cohort, Problem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.errors import CohortError, RunError
from chiasm.locks import locked
from chiasm.methods import title_of
from chiasm.prediction.baselines import CARD, TENSORS, fit_baselines, save_baselines
from chiasm.prediction.calibration import Calibration, fit_calibration
from chiasm.prediction.engines import Engine, on_threads, pick_precision
from chiasm.prediction.model import Model, save_model
from chiasm.preparation.arrays import PreparedCase, prepare_cohort
from chiasm.preparation.plan import FITTED, Plan
from chiasm.progress import StepProgress, in_lines
from chiasm.recipe import Recipe
from chiasm.storage import read_facts, write_json
from chiasm.times import timed
from chiasm.training import ranks
from chiasm.training.cascade import Cascade, list_parts, recipe_of, train_cascade
from chiasm.training.cost import estimate_cost
from chiasm.training.finished import Run, find_finished, write_finished
from chiasm.training.loop import AnyLearner, learn, make_fabric
from chiasm.training.players import varied_shares
from chiasm.training.pretrained import find_pretrained
from chiasm.training.run_folder import check_model_place, remove_baselines
from chiasm.training.run_planning import PlannedRun, Wishes, find_cases, plan_cases
from chiasm.training.session import LearningCases, Say, Session, Watcher
from chiasm.training.threads import NOTED

MOST_CALIBRATING = 2**24  # voxels of all validation cases together that the expected error is fitted to


@ranks.ending_together()
def train(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    *,
    say: Say = print,
    progress: StepProgress | None = None,
    watcher: Watcher | None = None,
    layout: str | None = None,
    selection: Selection | None = None,
    cache: Path | None = None,
    start: Path | Model | None = None,
    like: Plan | None = None,
    until: int | None = None,
    minutes: float | None = None,
    announce: Callable[[PlannedRun], None] | None = None,
    threads: int | None = None,
) -> Run:
    """Plan, prepare and train; the same call again resumes where it stopped, and ends at once when all is done.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder.
        say: Called with lines for the user.
        progress: Called after each step.
        watcher: Who looks at each validation, such as a page.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        cache: Where prepared and registered volumes are kept; `folder/cache` and `folder/registered` by default.
        start: Run folder of a warm-up to go on from, or a model, whose plan and weights are taken over.
        like: Plan of another model, whose choices hold for a new run, so that images of both can be averaged.
        until: Stop after as many steps and write no model: a warm-up.
        minutes: A time that a new run's steps are to fit into, in one process; by default the recipe's steps are done.
        announce: Called with what was planned, before anything is prepared; not where the run is finished already.
        threads: Of the CPU; where nobody says it, OMP_NUM_THREADS does, or a short measurement, which is reported.

    Returns:
        The run; its `problems` name every case that was left out.

    Raises:
        ChiasmError: If the data, the recipe or the folder cannot be used.
        Interrupted: If the run was asked to stop.
        ProcessEnded: If another process of the training ended.
        ValueError: If a recipe with stages is to share a warm-up.
    """
    if recipe.generator.stages > 1 and (start, until) != (None, None):
        raise ValueError("a cascade of stages has no warm-up to share")
    parent = _parent_of(start, recipe) or like
    session = _open_session(recipe, say, progress, watcher)
    with locked(folder) if session.is_first_process else nullcontext():

        def prepare() -> Run | _Ready:
            found = find_cases(data, recipe, folder, layout, selection)
            if until is None and (done := find_finished(folder, found, session.say)):
                return done
            check_model_place(folder)
            with _clock(session, folder, "planning"):
                planned = plan_cases(found, recipe, folder, session.say, cache, Wishes(minutes, parent, threads))
            if announce is not None:
                announce(planned)
            with _clock(session, folder, "preparation"):
                cases, problems = _prepare(planned, cache, session.say)
            _check_prepared(cases, problems, planned.cohort.root, session.say)
            _note_setting(planned, folder, session.say)
            return _Ready(found, planned, cases, problems)

        ready = ranks.from_first(prepare)
        if isinstance(ready, Run):
            return ready
        found, planned, cases, problems = ready
        recipe, run = planned.recipe, replace(planned.run, problems=(*planned.run.problems, *problems))
        with on_threads(planned.threads):
            with _clock(session, folder, "training"):
                learner, cascade = _learn_stages(recipe, run.plan, cases, folder, session, _WarmUp(start, until))
            if session.is_first_process:
                _make_baselines(cases.training, planned, folder, start)
                if until is None:
                    _ship(learner, recipe, cascade, folder, session.say)
                    write_finished(folder, found, run.problems)
        session.fabric.barrier()
    return run


class _Ready(NamedTuple):
    """What the first process of a training hands to all: found, planned and prepared cases, and the bad ones."""

    found: Cohort
    planned: PlannedRun
    cases: LearningCases
    problems: Sequence[Problem]


class _WarmUp(NamedTuple):
    """The warm-up or model with which a training starts, and the step after which a warm-up stops."""

    start: Path | Model | None
    until: int | None


def _parent_of(start: Path | Model | None, recipe: Recipe) -> Plan | None:
    """Return the plan of the parent model of a training; refuse a recipe that names another parent."""
    parent = start if isinstance(start, Model) else None
    if recipe.training.parent != ("" if parent is None else parent.sha256):
        raise RunError(
            "training.parent is the model that chiasm finetune goes on from, and this training has another or none",
            reason="parent",
            found=recipe.training.parent or "none",
            hint="Use chiasm finetune.",
        )
    return None if parent is None else parent.plan


def _open_session(recipe: Recipe, say: Say, progress: StepProgress | None, watcher: Watcher | None) -> Session:
    """Start the processes of a training; only the first one reports."""
    fabric = make_fabric(recipe)
    ranks.launch(fabric)
    return Session(fabric, say, progress, watcher) if fabric.global_rank == 0 else Session(fabric, _silence)


def _clock(session: Session, folder: Path, stage: str) -> AbstractContextManager[None]:
    """Time a stage; the first process alone writes it down, beside a recipe: another folder's files are not a run's."""
    return timed(folder, stage, "recipe.toml") if session.is_first_process else nullcontext()


def _prepare(planned: PlannedRun, cache: Path | None, say: Say) -> tuple[LearningCases, Sequence[Problem]]:
    """Prepare the training and validation cases; return the prepared ones, and the problems of the others."""
    run = planned.run
    cases = {case.id: case for case in planned.cohort.cases}
    learning = [cases[name] for name in (*planned.names, *run.split.validation)]
    prepared, problems = prepare_cohort(
        learning, run.plan, cache or run.folder / "cache", in_lines(say, "preparing"), say
    )
    return LearningCases(prepared.only(planned.names), prepared.only(run.split.validation)), problems


def _check_prepared(cases: LearningCases, problems: Sequence[Problem], root: Path, say: Say) -> None:
    """Report cases that could not be prepared; refuse to train without a prepared case."""
    for problem in problems:
        say(problem.line)
    if not cases.training:
        detail = f"; the first: {problems[0].message}" if problems else ""
        raise CohortError(f"no training case could be prepared{detail}", path=root, reason="no-cases")


def _learn_stages(
    recipe: Recipe, plan: Plan, cases: LearningCases, folder: Path, session: Session, warm_up: _WarmUp
) -> tuple[AnyLearner, Cascade]:
    """Train all stages; return the learner of the last one, with its cases and the earlier generators."""
    if recipe.generator.stages == 1:
        learner = learn(
            recipe, replace(plan, context=False), cases, folder, session, start=warm_up.start, until=warm_up.until
        )
        return learner, Cascade(cases)
    cascade, last = train_cascade(recipe, plan, cases, folder, session), list_parts(recipe)[-1]
    session.say(f"stage {last.stage} of {last.stage}: {last.steps} steps on {len(cases.training)} cases")
    session = session.counting_from(last.first, recipe.schedule.steps)
    learner = learn(recipe_of(recipe, last), replace(plan, context=True), cascade.cases, folder, session)
    return learner, cascade


def _describe_cost(recipe: Recipe, plan: Plan, is_new: bool) -> str:
    """Describe the cost of a run on this machine: the forecast of a new plan, or another one for a resumed run."""
    cost = plan.expected if is_new and plan.expected else estimate_cost(recipe, plan)
    return (
        f"{title_of(recipe.method)}, {recipe.size}: {recipe.schedule.steps} steps, {in_minutes(cost.minutes)} "
        f"and {cost.memory_mb / 1024:.1f} GB"
    )


def _make_baselines(
    training: Sequence[PreparedCase], planned: PlannedRun, folder: Path, start: Path | Model | None
) -> None:
    """Fit the naive baselines to the pairs, or copy those of the warm-up, which has the same pairs."""
    pairs = [case for case in training if case.id in planned.paired] if planned.run.plan.unpaired else training
    ready = start / "baselines" if isinstance(start, Path) else None
    if ready is not None and ready.is_dir():
        shutil.copytree(ready, folder / "baselines", dirs_exist_ok=True)
    else:
        save_baselines(folder / "baselines", fit_baselines(pairs))


def _ship(learner: AnyLearner, recipe: Recipe, cascade: Cascade, folder: Path, say: Say) -> None:
    """Calibrate the expected-error map on validation cases and write `model/`.

    Without a validation case the map is left uncalibrated, and says so when it is used.
    """
    model = replace(learner.model(), recipe=recipe, earlier=cascade.earlier)
    validation = cascade.cases.validation
    settings = learner.recipe.training
    engine = Engine(learner.fabric.device, pick_precision(settings.precision, settings.accelerator))
    if model.local_discriminator is not None and validation:
        calibration = _calibrate(learner, validation, engine)
        model = replace(model, calibration=calibration)
        if not calibration.informative:
            say("warning: on validation cases the expected-error map does not follow the true error")
    extras = [folder / "splits.json", folder / "baselines" / TENSORS, folder / "baselines" / CARD]
    save_model(folder / "model", model, {path.name: path for path in extras})
    remove_baselines(folder)
    say(f"model: {folder / 'model'}")


def _calibrate(learner: AnyLearner, validation: Sequence[PreparedCase], engine: Engine) -> Calibration:
    """Fit the expected-error map to the true error inside the masks of validation cases, or in evenly spread voxels."""
    scores, errors = [], []
    for case in validation:
        maps, mask = learner.maps(case, engine), np.asarray(case.mask)
        assert maps.raw_error is not None
        some = slice(None, None, -(-int(mask.sum()) * len(validation) // MOST_CALIBRATING) or 1)
        scores.append(maps.raw_error[mask][some])
        errors.append(np.abs(maps.prediction - np.asarray(case.target))[mask][some])
    names = tuple(case.id for case in validation)
    return fit_calibration(np.concatenate(scores), np.concatenate(errors), fitted_on=names)


def _note_setting(planned: PlannedRun, folder: Path, say: Say) -> None:
    """Write what a training depends on beside its recipe, and report its start and its cost."""
    recipe, plan = planned.recipe, planned.run.plan
    start_noted = _note_start(recipe, plan, folder, say)
    write_json(folder / NOTED, {**environment(), **start_noted, "threads": planned.threads})
    with on_threads(planned.threads):
        say(_describe_cost(recipe, plan, planned.is_new))


def _note_start(recipe: Recipe, plan: Plan, folder: Path, say: Say) -> dict[str, object]:
    """Say from which weights a run starts, and return it where they ship; what goes on keeps what is noted of it."""
    if any((folder / "checkpoints").glob("step-*.toml")):  # perhaps of a version that shipped other weights
        return {name: fact for name, fact in read_facts(folder / NOTED).items() if name == "start"}
    pretrained = find_pretrained(recipe, plan)
    if pretrained.reason:
        say(f"start: {pretrained.reason}")
    return {"start": pretrained.reason} if pretrained.name else {}


def environment() -> dict[str, object]:
    """Return the versions and the machine that a run depends on."""
    names = ("chiasm", "torch", "lightning-fabric", "numpy", "scipy", "nibabel", "SimpleITK", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def describe(recipe: Recipe, plan: Plan) -> list[str]:
    """Describe a plan in lines: each choice with its reason, then time and memory."""
    lines = []
    for name, reason in plan.reasons.items():
        value = getattr(plan, name)
        short = name in FITTED or name == "trained_on"
        lines.append(f"{name}: {reason}" if short else f"{name} = {_plain(value)}: {reason}")
    if (start := find_pretrained(recipe, plan)).reason:
        lines.append(f"start: {start.reason}")
    if (shares := varied_shares(recipe, plan)).reason:
        lines.append(
            f"training: {100 * shares.simulated:.0f} % of the patches of simulated patients; of the others "
            f"{100 * shares.classes:.0f} % with shifted classes of tissue, {100 * shares.painted:.0f} % with a painted "
            f"lesion; of all {100 * shares.shaded:.0f} % shaded: {shares.reason}"
        )
    cost = plan.expected or estimate_cost(recipe, plan)
    each = "" if recipe.split.models == 1 else f" for each of {recipe.split.models} models"
    lines.append(
        f"{title_of(recipe.method)}, {recipe.size}, {recipe.schedule.steps} steps: {in_minutes(cost.minutes)} "
        f"and {cost.memory_mb / 1024:.1f} GB{each}"
    )
    return lines


def in_minutes(minutes: float) -> str:
    """Say a duration in words.

    >>> in_minutes(0.2), in_minutes(7.2), in_minutes(200)
    ('less than a minute', 'about 7 min', 'about 3.3 h')
    """
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} min" if minutes < 100 else f"about {minutes / 60:.1f} h"


def _plain(value: object) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _silence(line: str) -> None:
    """Print nothing: only the first process reports."""
    del line
