"""The shippable part of a run: a folder that predicts on another machine, without the training data.

`model/` holds the weights of the generator and of the local discriminator,
the recipe, the plan (with the intensity maps), the calibration, the naive
baselines' tables where given, and `model.toml` with the sha256 of each.  A
folder whose files do not match is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chiasm.cohorts.planning import Plan, read_plan, write_plan
from chiasm.errors import RunError
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import KNOTS, Generator
from chiasm.prediction.calibration import Calibration, read_calibration, write_calibration
from chiasm.recipe import Recipe, read_recipe, write_recipe
from chiasm.storage import read_toml, sha256_of, write_toml

FORMAT = 1


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
    """

    recipe: Recipe
    plan: Plan
    generator: nn.Module
    local_judge: nn.Module | None
    error_scale: float
    calibration: Calibration | None = None
    sha256: str = ""


def source_channels(plan: Plan) -> int:
    """Count the generator's input channels: sources, times slices in 2D and 2.5D."""
    return len(plan.sources) * (plan.slices if plan.dims == 2 else 1)


def input_statistics(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return mean and SD of each channel of concat(source, image), from the plan's per-image figures."""
    repeats = torch.tensor([plan.slices if plan.dims == 2 else 1] * len(plan.sources) + [1])
    mean, sd = torch.tensor(plan.input_mean), torch.tensor(plan.input_sd)
    return mean.repeat_interleave(repeats), sd.repeat_interleave(repeats)


def make_generator(recipe: Recipe, plan: Plan) -> Generator:
    """Build the generator of a recipe; the "lookup" skip gets the plan's table."""
    slices = plan.slices if plan.dims == 2 else 1
    settings = recipe.generator
    generator = Generator(
        in_channels=source_channels(plan),
        widths=settings.widths,
        dims=plan.dims,
        norm=settings.norm,
        skip=settings.skip,
        skip_channel=slices // 2,
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


def save_model(folder: Path, model: Model, extras: Mapping[str, Path] | None = None) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: Where it will stand; an older one there is replaced.
        model: What to write.
        extras: Files to copy in, by the name they get.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    fresh = folder.with_name(f".{os.getpid()}.{folder.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {f"generator.{name}": value for name, value in model.generator.state_dict().items()}
    if model.local_judge is not None:
        weights |= {f"local.{name}": value for name, value in model.local_judge.state_dict().items()}
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in weights.items()}, fresh / "weights.safetensors"
    )
    write_recipe(fresh / "recipe.toml", model.recipe)
    write_plan(fresh / "plan.toml", model.plan)
    if model.calibration is not None:
        write_calibration(fresh / "calibration.json", model.calibration)
    for name, path in (extras or {}).items():
        shutil.copyfile(path, fresh / name)
    sums = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
    write_toml(fresh / "model.toml", {"format": FORMAT, "error_scale": model.error_scale, "sha256": sums})
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def load_model(path: Path) -> Model:
    """Load a model from its folder, or from the run folder that holds it.

    Raises:
        RunError: If there is none, a file is missing or was changed, or it was
            written by a newer chiasm.
    """
    folder = find_model(path)
    card = read_toml(folder / "model.toml")
    if card.get("format") != FORMAT:
        raise RunError(
            "was written in a format this chiasm does not know",
            path=folder / "model.toml",
            reason="format",
            found=card.get("format"),
            expected=FORMAT,
            hint="Use the chiasm that wrote it, or a newer one.",
        )
    for name, wanted in card["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != wanted:
            raise RunError(
                "is missing or was changed since it was written",
                path=folder / name,
                reason="damaged",
                expected=f"sha256 {wanted[:12]}...",
                hint="Copy the model folder again, or run the same train command to write it anew.",
            )
    recipe, plan = read_recipe(folder / "recipe.toml"), read_plan(folder / "plan.toml")
    weights = load_file(folder / "weights.safetensors")
    generator = make_generator(recipe, plan)
    generator.load_state_dict(_part(weights, "generator."))
    judge = None
    if local := _part(weights, "local."):
        judge = make_local_discriminator(recipe, plan)
        judge.load_state_dict(local)
    calibration = folder / "calibration.json"
    return Model(
        recipe,
        plan,
        generator.eval(),
        None if judge is None else judge.eval(),
        float(card["error_scale"]),
        read_calibration(calibration) if calibration.exists() else None,
        card["sha256"]["weights.safetensors"],
    )


def find_model(path: Path) -> Path:
    """Return the model folder at `path` or inside the run folder `path`.

    Raises:
        RunError: If there is none.
    """
    for folder in (path, path / "model"):
        if (folder / "model.toml").is_file():
            return folder
    started = (path / "recipe.toml").exists()
    raise RunError(
        "is a run that has no finished model yet" if started else "holds no model",
        path=path,
        reason="no-model",
        expected="a run folder of chiasm train, or its model/ folder",
        hint="Run the same chiasm train command again to finish it." if started else None,
    )


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
