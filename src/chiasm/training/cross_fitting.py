"""`chiasm train`: one model, or several that share the subjects of a cohort (cross-fitting).

Of few subjects none should be lost to a test.  So each of several models learns from all but one part of them, in its
share of the steps.  Together they have learnt from all subjects, and each subject has one model that never saw it: by
that model it is scored.  The expected error of a model is calibrated on the errors of the others, so that no case is
scored with a calibration that was fitted to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.splits import read_splits
from chiasm.errors import RecipeError, RunError
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder, refuse_foreign
from chiasm.prediction.calibration import Calibration, mean_calibration, read_calibration
from chiasm.prediction.model import replace_calibration
from chiasm.prediction.model_files import CALIBRATION, PARTS
from chiasm.preparation.plan import AXES, Plan
from chiasm.progress import StepProgress
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.storage import read_json, write_json
from chiasm.training.finished import Run
from chiasm.training.run import train as train_one
from chiasm.training.run_planning import PlannedRun, check_recipe, cohort_of, plan_run, resolve_models, with_split
from chiasm.training.session import Say, Watcher

EVEN = 1.2  # largest ratio of voxel sides that count as alike
OWN = "calibrations.json"  # of each model, on the part that it did not learn from


def train(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    *,
    say: Say = print,
    progress: StepProgress | None = None,
    watcher: Watcher | Callable[[Path], Watcher] | None = None,
    layout: str | None = None,
    selection: Selection | None = None,
    minutes: float | None = None,
    announce: Callable[[PlannedRun], None] | None = None,
    threads: int | None = None,
) -> Run:
    """Train the model of a recipe, or its several models one after another; the same call resumes.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for; several models share its steps.
        folder: The run folder; of several models, each has its own run folder in `models/`.
        say: Called with lines for the user.
        progress: Called after each step of a model.
        watcher: Who looks at each validation, such as a page, or what makes one for each run folder.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        minutes: A time that the steps of all models are to fit into.
        announce: Called with what was planned for a model, before anything is prepared.
        threads: Of the CPU; where nobody says it, OMP_NUM_THREADS does, or a short measurement, which is reported.

    Returns:
        The run; of several models its plan and split are those of the first.

    Raises:
        ChiasmError: If the data, the recipe or the folder cannot be used, or there are fewer subjects than models.
        Interrupted: If the run was asked to stop.
    """
    recipe, data = resolve_models(data, recipe, folder, layout, selection)
    one = partial(train_one, say=say, progress=progress, layout=layout, selection=selection, threads=threads)
    if recipe.split.models == 1:
        return one(data, recipe, folder, watcher=_watcher_in(folder, watcher), minutes=minutes, announce=announce)
    _check(data, recipe, folder)
    with locked(folder):
        check_recipe(folder, recipe)
        one = partial(one, cohort_of(data, recipe, layout, selection), cache=folder / "cache")
        say(_announce(recipe))
        runs = _train_in_turn(one, recipe, folder, say, watcher, minutes, announce)
        _exchange_calibrations(folder, [run.folder for run in runs])
    problems = tuple(dict.fromkeys(problem for run in runs for problem in run.problems))
    return Run(folder, runs[0].plan, runs[0].split, problems)


def _train_in_turn(
    train_model: Callable[..., Run],
    recipe: Recipe,
    folder: Path,
    say: Say,
    watcher: Watcher | Callable[[Path], Watcher] | None,
    minutes: float | None,
    announce: Callable[[PlannedRun], None] | None,
) -> list[Run]:
    """Train each of several models on its part of the cohort; what the first one's plan chooses holds for all."""
    models = int(recipe.split.models)
    time = None if minutes is None else minutes / models
    of_all: set[str] = set()  # lines of the first one's plan, such as those on the cohort, which no other repeats
    is_planned = False

    def begin(planned: PlannedRun) -> None:
        write_recipe(folder / "recipe.toml", recipe)  # now that nothing in it was refused
        if announce is not None:
            announce(planned)

    def begin_first(planned: PlannedRun) -> None:
        nonlocal is_planned
        begin(planned)
        is_planned = True
        say(_heading(recipe, 1))  # after what is announced, which is of the whole

    def say_once(line: str) -> None:
        if is_planned and line in of_all:
            return
        if not is_planned:
            of_all.add(line)
        say(line)

    def train_part(number: int, announced: Callable[[PlannedRun], None], like: Plan | None = None) -> Run:
        place = folder / PARTS / str(number)
        part = part_of(recipe, number, place, fitted=minutes is not None)
        if like is not None:
            part = _in_its_plane(part, number, place, like)
            say(_heading(part, number))
        watching = _watcher_in(place, watcher)
        return train_model(part, place, say=say_once, watcher=watching, minutes=time, announce=announced, like=like)

    first = train_part(1, begin_first)
    return [first, *(train_part(number, begin, first.plan) for number in range(2, models + 1))]


def _heading(part: Recipe, number: int) -> str:
    """Name one of several models, and the plane of its slices."""
    plane = "" if part.data.plane == "auto" else f", of {part.data.plane} slices"
    return f"model {number} of {part.split.models}{plane}"


def _watcher_in(folder: Path, watcher: Watcher | Callable[[Path], Watcher] | None) -> Watcher | None:
    return watcher(folder) if callable(watcher) else watcher


def plan_first(
    data: Path | Cohort,
    recipe: Recipe,
    folder: Path,
    *,
    say: Say = print,
    layout: str | None = None,
    selection: Selection | None = None,
) -> tuple[Recipe, Run]:
    """Plan as `plan_run` does; of several models the first, whose choices hold for all.

    Args:
        data: Folder or manifest of paired cases, or cases that were found already.
        recipe: What is asked for.
        folder: The run folder.
        say: Called with lines for the user.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.

    Returns:
        The recipe of the model, and its run.

    Raises:
        ChiasmError: As `plan_run`, or if there are fewer subjects than models.
    """
    recipe, data = resolve_models(data, recipe, folder, layout, selection)
    if recipe.split.models == 1:
        return recipe, plan_run(data, recipe, folder, say=say, layout=layout, selection=selection)
    _check(data, recipe, folder)
    with locked(folder):
        check_recipe(folder, recipe)
        say(_announce(recipe))
        place = folder / PARTS / "1"
        part = part_of(recipe, 1, place, fitted=False)
        run = plan_run(data, part, place, say=say, layout=layout, selection=selection, cache=folder / "cache")
        write_recipe(folder / "recipe.toml", recipe)
    if part.data.plane == "auto" and _suits_any_plane(run.plan):
        say("each model sees slices of another plane: axial, coronal, sagittal in turn")
    return part, run


def _announce(recipe: Recipe) -> str:
    return (
        f"{recipe.split.models} models share the subjects and the steps: each learns from all but one part, a new scan "
        "gets the mean of all, and each subject can be scored by the model that never saw it "
        "(chiasm train --models 1 trains one)"
    )


def part_of(recipe: Recipe, number: int, place: Path, *, fitted: bool) -> Recipe:
    """Return the recipe of one of several models.

    Args:
        recipe: Of all.
        number: From 1.
        place: Its run folder.
        fitted: Whether its steps are fitted into a time: then those of an earlier call stay.
    """
    models, steps = int(recipe.split.models), recipe.schedule.steps
    steps = max(1, steps // models)
    if fitted and (place / "recipe.toml").is_file():
        steps = read_recipe(place / "recipe.toml").schedule.steps
    part = with_split(recipe, fold=number - 1)
    return part.model_copy(update={"schedule": recipe.schedule.model_copy(update={"steps": steps})})


def _in_its_plane(part: Recipe, number: int, place: Path, first: Plan) -> Recipe:
    """Let each model see slices of the next plane, if the recipe leaves it open and they suit the first one's plan.

    Models that see different planes err less alike, so their mean errs less.  What an earlier call chose holds.
    """
    if part.data.plane != "auto":
        return part
    if (place / "recipe.toml").is_file():
        plane = read_recipe(place / "recipe.toml").data.plane
    else:
        plane = [*AXES][(number - 1) % len(AXES)] if _suits_any_plane(first) else "auto"
    return part.model_copy(update={"data": part.data.model_copy(update={"plane": plane})})


def _suits_any_plane(plan: Plan) -> bool:
    """Return whether slices of all planes show as much: voxels are as long as wide, and bodies high enough."""
    if plan.dims == 3 or plan.degradation is not None:
        return False
    least = min(size / step for size, step in zip(plan.body_mm[0], plan.spacing_mm))
    is_even = all(max(grid) <= EVEN * min(grid) for grid in (plan.spacing_mm, *plan.grid_mm))
    return is_even and least >= min(plan.patch) / 2


def _check(data: Path | Cohort, recipe: Recipe, folder: Path) -> None:
    """Refuse what several models cannot do, and a folder with files of somebody else."""
    if recipe.training.devices > 1:
        raise RecipeError(
            "several models are trained in one process",
            reason="devices",
            hint="Use chiasm train --models 1 with --devices.",
        )
    refuse_data_folder(folder, [data.root if isinstance(data, Cohort) else data])
    if not any((place / "recipe.toml").exists() for place in (folder, folder / PARTS / "1")):
        refuse_foreign(folder, (OWN, f"{PARTS}/*", "cache/*"))


def _exchange_calibrations(folder: Path, runs: list[Path]) -> None:
    """Give each model the mean of the other models' calibrations; their own ones stay in the run folder."""
    if not all((run / "model" / CALIBRATION).is_file() for run in runs):
        return  # a method without an expected error
    noted = _noted_calibrations(folder)
    own = _own_calibrations(folder, runs, noted)
    if own != noted:
        write_json(folder / OWN, {run.name: vars(own[run.name]) for run in runs})
    for run in runs:
        wanted = mean_calibration([one for name, one in own.items() if name != run.name])
        if read_calibration(run / "model" / CALIBRATION) != wanted:
            replace_calibration(run / "model", wanted)


def _noted_calibrations(folder: Path) -> Mapping[str, Calibration]:
    """Return the models' own calibrations as noted before an exchange; none before the first.

    Raises:
        RunError: If the note is damaged.
    """
    if not (folder / OWN).is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Calibration]).validate_python(read_json(folder / OWN))
    except ValidationError as error:
        raise _damaged(folder) from error


def _own_calibrations(folder: Path, runs: list[Path], noted: Mapping[str, Calibration]) -> Mapping[str, Calibration]:
    """Return the calibration of each model on its own part: from its model, or as noted before the exchange.

    Raises:
        RunError: If neither is there.
    """
    found = {}
    for run in runs:
        there = read_calibration(run / "model" / CALIBRATION)
        is_own = set(there.fitted_on) <= {*read_splits(run / "splits.json").split.validation}
        if not is_own and run.name not in noted:
            raise _damaged(folder)
        found[run.name] = there if is_own else noted[run.name]
    return found


def _damaged(folder: Path) -> RunError:
    return RunError(
        "lacks the calibration of a model",
        path=folder / OWN,
        reason="damaged",
        hint=f"Delete the folders {folder / PARTS}/*/model, and the same command makes them anew from checkpoints.",
    )
