"""`chiasm finetune`: train a model further, on the cases of another cohort.

The parent's plan holds for everything that its weights depend on: grid,
patches, dimensions, rule for the mask, kinds of intensity maps, and the tables
that its networks start from.  What describes the cohort is fitted anew, on the
new training cases alone: the target's unit and range, and the ranges and
histograms that say which inputs are usual.  Each volume is normalised by a map
fitted to itself, before and after, so the parent's first validation here is the
parent's own score on these cases.

Weights come from the parent; a global discriminator, which no model ships, and
the optimisers begin anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.splits import read_splits
from chiasm.errors import RecipeError, RunError
from chiasm.methods import change_recipe
from chiasm.prediction.model import Model, load_model
from chiasm.prediction.model_files import find_model, list_parts, read_card
from chiasm.progress import StepProgress
from chiasm.recipe import Recipe, SplitSettings, Training
from chiasm.sizes import Changes
from chiasm.training.finished import Run
from chiasm.training.run import train
from chiasm.training.run_planning import PlannedRun
from chiasm.training.session import Say, Watcher

STEPS = 0.25  # of the parent's, unless somebody says how many
RATE = 0.3  # of the parent's learning rates

#: Settings of data that say how files are chosen and read; all others are the parent's.
OF_FILES = ("form", "assume_ras", "resample", "resample_tilt", "ct_offset", "select")
#: Settings of a training that are no part of the method.
OF_RUN = ("parent", "seed", "accelerator", "precision", "devices", "pairs", "pretrained")
SHAPES = ("generator", "discriminators")  # sections that say what the weights belong to


def finetune(
    run: Path,
    data: Path,
    out: Path,
    *,
    changes: Changes | None = None,
    settings: Sequence[str] = (),
    layout: str | None = None,
    selection: Selection | None = None,
    trust: str | Collection[str] = (),
    say: Say = print,
    progress: StepProgress | None = None,
    watcher: Watcher | None = None,
) -> Run:
    """Train a model further on other cases; the same call again resumes.

    Args:
        run: The parent: a run folder or its model folder.
        data: Folder or manifest of paired cases.
        out: The new run folder.
        changes: Dotted names of settings to values, such as ``{"schedule.steps": 500}``.
        settings: Texts such as "loss.norm=l1", as given to `--set`.
        layout: Name of a layout, where the folder fits several.
        selection: Which DICOM series are taken, and which marked images.
        trust: As for `load_model`.
        say: Called with lines for the user.
        progress: Called after each step.
        watcher: Who looks at each validation.

    Returns:
        The new run, as of `train`.

    Raises:
        RunError: If there is no model, or there are several, or `out` holds another run.
        RecipeError: If a setting would change what the weights belong to, or the model has stages or is a coder.
        ChiasmError: As `train`.
    """
    _refuse_several(run, data, out)
    parent = load_model(run, trust=trust)
    recipe = recipe_of_child(parent, run, changes or {}, settings)

    def announce(planned: PlannedRun) -> None:
        for line in describe_parent(parent, run, planned):
            say(line)

    return train(
        data,
        recipe,
        out,
        say=say,
        progress=progress,
        watcher=watcher,
        layout=layout,
        selection=selection,
        start=parent,
        announce=announce,
    )


def recipe_of_child(parent: Model, run: Path, changes: Changes, settings: Sequence[str]) -> Recipe:
    """Return the parent's recipe with fewer steps, lower rates, its own split and seed, and the given settings.

    Args:
        parent: The model.
        run: Its folder, for messages.
        changes: Dotted names of settings to values.
        settings: As given to `--set`.

    Raises:
        RecipeError: If a setting is unknown, or the weights depend on it.
    """
    _check_parent(parent, run)
    before = parent.recipe
    content: dict[str, Any] = before.model_dump()
    own = Training(parent=parent.sha256)
    content["split"] = SplitSettings(folds="auto").model_dump()
    content["training"] |= {name: getattr(own, name) for name in OF_RUN}
    content["schedule"]["steps"] = max(1, round(STEPS * before.schedule.steps))
    for rate in ("generator_rate", "discriminator_rate"):
        content["optimiser"][rate] *= RATE
    recipe = change_recipe(content, changes, settings)
    if changed := _changed(before, recipe):
        raise RecipeError(
            f"{changed[0]} cannot change, because the weights of the model depend on it",
            path=run,
            reason="parent",
            found=_value(recipe, changed[0]),
            expected=_value(before, changed[0]),
            hint="Train a new model: chiasm train.",
        )
    return recipe


def _refuse_several(run: Path, data: Path, out: Path) -> None:
    """Refuse a run of several models, and say how each of them is trained further."""
    if parts := list_parts(run):
        made = " ".join(str(out / part.name) for part in parts)
        raise RunError(
            f"is a run of {len(parts)} models, of which this command takes one",
            path=run,
            reason="several-models",
            hint=f"Train each further: chiasm finetune {parts[0]} {data} -o {out / parts[0].name}, and so on up to "
            f"{parts[-1]}. Then chiasm predict {made} SCANS -o PREDICTIONS averages them.",
        )


def _check_parent(parent: Model, run: Path) -> None:
    """Refuse models of several trainings, and models that are not trained by steps."""
    kinds = {"stages": parent.recipe.generator.stages > 1, "sparse codes": parent.recipe.optimiser.kind == "admm"}
    if kind := next((name for name, is_so in kinds.items() if is_so), None):
        raise RecipeError(f"a model with {kind} cannot be finetuned", path=run, reason="parent")


def _changed(before: Recipe, after: Recipe) -> list[str]:
    """List the settings that differ and that the weights depend on."""
    names = [f"data.{name}" for name in type(before.data).model_fields if name not in OF_FILES]
    names += [f"{section}.{name}" for section in SHAPES for name in type(getattr(before, section)).model_fields]
    return [name for name in names if _value(before, name) != _value(after, name)]


def _value(recipe: Recipe, name: str) -> object:
    section, _, field = name.partition(".")
    return getattr(getattr(recipe, section), field)


def describe_parent(parent: Model, run: Path, planned: PlannedRun) -> list[str]:
    """Describe the parent of a training, the origin of its plan, and held-out cases that the parent has learnt from."""
    count = len(planned.run.plan.trained_on)
    lines = [
        f"goes on from {run} (model.toml has sha256 {parent.sha256})",
        "plan: the parent's grid, plane of slices, patches, rule for the mask, kinds of intensity maps and starting "
        "tables hold, since its weights depend on them; the target's unit and what counts as a usual input are "
        f"fitted on the {count} training cases here",
    ]
    seen = learnt_before(find_model(run), planned.run.folder / "splits.json")
    held_out = [name for name in (*planned.run.split.validation, *planned.run.split.test) if name in seen]
    if held_out:
        lines.append(
            f"warning: the parent has learnt from {len(held_out)} of the validation and test cases here "
            f"({', '.join(held_out[:3])}), so their scores say less than they seem to"
        )
    return lines


def learnt_before(model: Path, splits: Path) -> list[str]:
    """List the cases of a new split whose voxels the model's training or validation cases have too.

    Args:
        model: Folder of the parent.
        splits: `splits.json` of the new run.

    Raises:
        RunError: If one of both is damaged.
    """
    if "splits.json" not in read_card(model).sha256:
        return []
    old, new = read_splits(model / "splits.json"), read_splits(splits)
    hashes: Mapping[str, str] = old.hashes
    known = {hashes[name] for name in (*old.split.train, *old.split.validation) if name in hashes}
    return [name for name, digest in new.hashes.items() if digest in known]
