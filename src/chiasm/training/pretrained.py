"""Weights that ship with chiasm, for the generator of a new training to start from: `training.pretrained`.

Each file of weights has a card beside it: the task and the network that it fits, and who made it, of which data, by
which commands.  `docs/pretrained.md` says what a start is worth.
"""

from __future__ import annotations

import hashlib
import tomllib
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from chiasm.errors import RunError
from chiasm.networks.catalogue import OWN
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe

FOLDER = Path(__file__).with_name("weights")


class WeightsCard(BaseModel):
    """What a file of weights fits, and where it comes from.

    Attributes:
        contrasts: Of the sources, then of the target.
        widths: Of the generator; its other shapes follow.
        fold: Likewise.
        norm: Likewise.
        skip: Likewise.
        slices: That the generator sees.
        spacing_mm: Least and largest voxel size that the weights serve, along each axis.
        about: What they learnt from, in a few words.
        sha256: Of the file of weights.
        sources: Names, licences and references of all data that they were made of.
        commands: That made them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contrasts: tuple[str, ...]
    widths: tuple[int, ...]
    fold: int
    norm: str
    skip: str
    slices: int
    spacing_mm: tuple[float, float]
    about: str
    sha256: str
    sources: tuple[str, ...]
    commands: tuple[str, ...]


class Pretrained(NamedTuple):
    """Which weights a training starts from, and why.

    Attributes:
        name: Of the file in `FOLDER`, without its suffix; None starts from random weights.
        reason: In words; empty where the recipe asks for random weights.
    """

    name: str | None
    reason: str


@cache
def read_cards() -> dict[str, WeightsCard]:
    """Return the card of each file of weights that ships, by name."""
    return {path.stem: WeightsCard(**tomllib.loads(path.read_text())) for path in sorted(FOLDER.glob("*.toml"))}


def find_pretrained(recipe: Recipe, plan: Plan) -> Pretrained:
    """Choose the weights that a generator starts from: those that fit its task, its network and its images."""
    if recipe.training.pretrained == "none":
        return Pretrained(None, "")
    contrasts = tuple(name.lower() for name in (*plan.sources, plan.target))
    fitting = {name: card for name, card in read_cards().items() if card.contrasts == contrasts}
    if not fitting:
        return Pretrained(None, f"random weights: none ship for {' and '.join(plan.sources)} to {plan.target}")
    misfits = {name: _misfit(card, recipe, plan) for name, card in fitting.items()}
    for name, misfit in misfits.items():
        if not misfit:
            return Pretrained(name, f"{name}, {fitting[name].about}")
    return Pretrained(None, f"random weights: those that ship are {next(iter(misfits.values()))}")


def may_start(recipe: Recipe) -> bool:
    """Return whether weights that ship fit a recipe, as far as it decides; the images may still differ from them."""
    contrasts = tuple(name.lower() for name in (*recipe.data.sources, recipe.data.target))
    cards = [card for card in read_cards().values() if card.contrasts == contrasts and _has_shape(card, recipe)]
    return recipe.training.pretrained == "auto" and bool(cards) and recipe.generator.stages == 1


def _has_shape(card: WeightsCard, recipe: Recipe) -> bool:
    settings = recipe.generator
    shape = (settings.network, settings.widths, settings.fold, settings.norm, settings.skip)
    return shape == (OWN, card.widths, card.fold, card.norm, card.skip)


def _misfit(card: WeightsCard, recipe: Recipe, plan: Plan) -> str:
    """Say what a card's weights are for that this training is not; nothing where they fit."""
    seen = (plan.dims, plan.slices, plan.histogram, plan.context)
    if not _has_shape(card, recipe) or seen != (2, card.slices, False, False):
        return "for another network"
    if plan.mask_rule != "nonzero":
        return "for brains that were cut out"
    least, most = card.spacing_mm
    if not all(least <= size <= most for size in plan.spacing_mm):
        return f"for voxels of {least:g} to {most:g} mm"
    return ""


def read_pretrained(name: str) -> dict[str, Tensor]:
    """Read weights that ship, in single precision; the table of a look-up skip is not among them.

    Args:
        name: Of the file, as `find_pretrained` returns it.

    Raises:
        RunError: If the file is damaged.
    """
    stored = _read_stored(FOLDER / f"{name}.safetensors", read_cards()[name].sha256)
    return {
        key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        for key, value in stored.items()
    }


@lru_cache(maxsize=1)
def _read_stored(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read a file of weights as stored, once for all networks that a process builds: 2 MB in half precision.

    Raises:
        RunError: If the file is damaged.
    """
    from safetensors.torch import load

    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(
            "is not the file of weights that ships with chiasm",
            path=path,
            reason="checksum",
            hint="Install chiasm again, or start from random weights: chiasm train --set training.pretrained=none.",
        )
    stored: dict[str, Tensor] = load(content)
    return stored
