"""The shippable part of a run: a folder that predicts on another machine, without the training data.

`model/` holds the weights of the generator (of each stage), the local discriminator and the refiner,
the recipe, the plan (with the intensity maps), the calibration, the naive
baselines' tables where given, and `model.toml` with the sha256 of each and of
itself.  A folder whose files do not match is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from chiasm.cohorts.planning import Plan, read_plan, write_plan
from chiasm.errors import RunError
from chiasm.networks.catalogue import OWN, check_contract, make_network
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import KNOTS, Generator
from chiasm.prediction.calibration import Calibration, read_calibration, write_calibration
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.storage import is_sealed, read_toml, replaced, sealed, sha256_of, whole_file, whole_folder, write_toml

FORMAT = 1
WEIGHTS, CARD = "weights.safetensors", "model.toml"
NEEDED = frozenset({WEIGHTS, "recipe.toml", "plan.toml"})


@dataclass(frozen=True)
class Model:
    """Networks and what they need to be applied to a new volume.

    Attributes:
        recipe: What was asked for.
        plan: Grid, intensity maps and ranges.
        generator: Source to target, normalised units.
        local_judge: The local discriminator behind the reliability map, or None.
        error_scale: s of the soft targets, normalised units.
        calibration: From the map's raw score to the expected absolute error, or None.
        sha256: Of the weights; empty for a model that is not stored yet.
        refiner: The second stage, which corrects the generator where the local
            discriminator doubts it, or None.
        earlier: Generators of the stages before this one, first to last, whose
            prediction the next one sees beside the source; none without stages.
    """

    recipe: Recipe
    plan: Plan
    generator: nn.Module
    local_judge: nn.Module | None
    error_scale: float
    calibration: Calibration | None = None
    sha256: str = ""
    refiner: nn.Module | None = None
    earlier: tuple[nn.Module, ...] = ()


def source_channels(plan: Plan) -> int:
    """Count the generator's input channels: sources, their ranks and a context, times slices in 2D and 2.5D."""
    return (plan.images + plan.context) * (plan.slices if plan.dims == 2 else 1)


def input_statistics(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return mean and SD of each channel of concat(source, image): the plan's for each image, 0 and 1 for ranks.

    A context is an image of the target, and has its figures.
    """
    repeats = torch.tensor([plan.slices if plan.dims == 2 else 1] * (plan.images + plan.context) + [1])
    ranks = plan.images - len(plan.sources)
    mean, sd = (
        torch.tensor([*figures[:-1], *[of_ranks] * ranks, *[figures[-1]] * plan.context, figures[-1]])
        for figures, of_ranks in ((plan.input_mean, 0.0), (plan.input_sd, 1.0))
    )
    return mean.repeat_interleave(repeats), sd.repeat_interleave(repeats)


def make_generator(recipe: Recipe, plan: Plan) -> nn.Module:
    """Build the generator of a recipe; the "lookup" skip of this project's own gets the plan's table.

    Raises:
        RecipeError: As `make_network` and `check_contract`.
    """
    settings, channels = recipe.generator, source_channels(plan)
    if settings.network != OWN:
        network = make_network(
            settings.network, in_channels=channels, dims=plan.dims, scale=settings.scale, options=settings.options
        )
        check_contract(network, settings.network, channels, plan.patch)
        return network
    slices = plan.slices if plan.dims == 2 else 1
    generator = Generator(
        in_channels=channels,
        widths=settings.widths,
        dims=plan.dims,
        norm=settings.norm,
        skip=settings.skip,
        skip_channel=slices // 2,
        dropout=settings.dropout,
    )
    if settings.skip == "lookup":
        x, y = (torch.tensor(knots, dtype=torch.float64) for knots in plan.lookup)
        even = torch.linspace(0, len(x) - 1, KNOTS, dtype=torch.float64)
        left = even.long().clamp(max=len(x) - 2)
        share = even - left
        generator.set_lookup(*(torch.lerp(k[left], k[left + 1], share).float() for k in (x, y)))
    return generator


def make_local_discriminator(recipe: Recipe, plan: Plan) -> LocalDiscriminator:
    """Build the local discriminator of a recipe; unconditional, it sees the image alone."""
    settings = recipe.discriminators
    mean, sd = input_statistics(plan)
    if not settings.conditional:
        mean, sd = mean[-1:], sd[-1:]
    judge = LocalDiscriminator(
        in_channels=len(mean), widths=settings.local_widths, dims=plan.dims, spectral_norm=settings.spectral_norm
    )
    judge.standardise.set_input_statistics(mean, sd)
    return judge


def make_refiner(recipe: Recipe, plan: Plan) -> Generator:
    """Build the second stage of a recipe: it sees source, prediction and confidence, and at first corrects nothing."""
    settings = recipe.generator
    refiner = Generator(
        in_channels=source_channels(plan) + 2, widths=settings.refiner, dims=plan.dims, norm=settings.norm, skip="none"
    )
    for parameter in refiner.last.parameters():
        nn.init.zeros_(parameter)
    return refiner


def save_model(folder: Path, model: Model, extras: Mapping[str, Path] | None = None) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: Where it will stand; an older one there is replaced.
        model: What to write.
        extras: Files to copy in, by the name they get.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    with whole_folder(folder) as fresh:
        _write(fresh, model, extras or {})


def _write(folder: Path, model: Model, extras: Mapping[str, Path]) -> None:
    weights = {f"generator.{name}": value for name, value in model.generator.state_dict().items()}
    if model.local_judge is not None:
        weights |= {f"local.{name}": value for name, value in model.local_judge.state_dict().items()}
    if model.refiner is not None:
        weights |= {f"refiner.{name}": value for name, value in model.refiner.state_dict().items()}
    for stage, generator in enumerate(model.earlier, start=1):
        weights |= {f"stage{stage}.{name}": value for name, value in generator.state_dict().items()}
    with whole_file(folder / WEIGHTS) as temporary:  # safetensors' own writing hides a full disk from `whole_file`
        temporary.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in weights.items()}))
    write_recipe(folder / "recipe.toml", model.recipe)
    write_plan(folder / "plan.toml", replace(model.plan, expected=None))  # what training costs is no part of a model
    if model.calibration is not None:
        write_calibration(folder / "calibration.json", model.calibration)
    for name, path in extras.items():
        with whole_file(folder / name) as temporary:
            shutil.copyfile(path, temporary)
    sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_toml(folder / CARD, sealed({"format": FORMAT, "error_scale": float(model.error_scale), "sha256": sums}))


def load_model(path: Path) -> Model:
    """Load a model from its folder, or from the run folder that holds it.

    Raises:
        RunError: If there is none, a file is missing or was changed, or it was
            written by a newer chiasm.
    """
    folder = find_model(path)
    card = check_files(folder)
    recipe, plan = read_recipe(folder / "recipe.toml"), read_plan(folder / "plan.toml")
    generator, judge, refiner = make_generator(recipe, plan), None, None
    earlier = [make_generator(recipe, replace(plan, context=stage > 0)) for stage in range(recipe.generator.stages - 1)]
    try:
        weights = load_file(folder / WEIGHTS)
        generator.load_state_dict(_part(weights, "generator."))
        if local := _part(weights, "local."):
            judge = make_local_discriminator(recipe, plan).eval()
            judge.load_state_dict(local)
        if recipe.generator.refiner:
            refiner = make_refiner(recipe, plan).eval()
            refiner.load_state_dict(_part(weights, "refiner."))
        for stage, network in enumerate(earlier, start=1):
            network.eval().load_state_dict(_part(weights, f"stage{stage}."))
    except (SafetensorError, RuntimeError) as error:
        raise RunError(
            "holds no weights of this model's networks", path=folder / WEIGHTS, reason="damaged", found=error
        ) from error
    calibrated = "calibration.json" in card["sha256"]
    return Model(
        recipe,
        plan,
        generator.eval(),
        judge,
        float(card["error_scale"]),
        read_calibration(folder / "calibration.json") if calibrated else None,
        card["sha256"][WEIGHTS],
        refiner,
        tuple(earlier),
    )


def check_files(folder: Path) -> dict[str, Any]:
    """Check that a model folder holds what its card says, and return the card.

    Raises:
        RunError: If there is no card, a file is missing or was changed, or it was written by a newer chiasm.
    """
    card = read_toml(folder / CARD)
    if card.get("format") != FORMAT:
        raise RunError(
            "was written in a format this chiasm does not know",
            path=folder / CARD,
            reason="format",
            found=card.get("format"),
            expected=FORMAT,
            hint="Use the chiasm that wrote it, or a newer one.",
        )
    if not is_sealed(card) or not card["sha256"].keys() >= NEEDED:
        raise _changed(folder / CARD)
    for name, wanted in card["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != wanted:
            raise _changed(folder / name)
    return card


def find_model(path: Path) -> Path:
    """Return the model folder at `path` or inside the run folder `path`.

    Raises:
        RunError: If there is none.
    """
    for folder in (path, path / "model"):
        for candidate in (folder, replaced(folder)):  # the older one, where a kill came while it was replaced
            if (candidate / CARD).is_file():
                return candidate
    started = (path / "recipe.toml").exists()
    raise RunError(
        "is a run that has no finished model yet" if started else "holds no model",
        path=path,
        reason="no-model",
        expected="a run folder of chiasm train, or its model/ folder",
        hint="Run the same chiasm train command again to finish it." if started else None,
    )


def _changed(path: Path) -> RunError:
    return RunError(
        "is missing or was changed since it was written",
        path=path,
        reason="damaged",
        hint="Copy the model folder again, or run the same train command to write it anew.",
    )


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
