"""What every step of a training is given, and what one draw of patches holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chiasm.networks.catalogue import OWN
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training import ranks
from chiasm.training.attention import Phase
from chiasm.training.batches import NO_VARIATION, Batch, Place, Variation, crop_batch, take_batch
from chiasm.training.state import TrainingState
from chiasm.training.trainables import Trainables


@dataclass(frozen=True)
class Setting:
    """What stays the same from step to step.

    Attributes:
        recipe: Resolved settings.
        plan: What follows from the data.
        cases: Prepared training cases.
        lesions: Labelled voxels of each case, shape (n, 3).
        trainables: The networks.
        variation: How patches vary images of the cases.
    """

    recipe: Recipe
    plan: Plan
    cases: Sequence[PreparedCase]
    lesions: Sequence[NDArray[np.int32]]
    trainables: Trainables
    variation: Variation = NO_VARIATION

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Ids of the cases; those are opened for it once."""
        return tuple(case.id for case in self.cases)

    def sigma(self, millimetres: float) -> tuple[float, ...]:
        """Return a width in voxels, along each axis of a patch."""
        return tuple(millimetres / spacing for spacing in self.plan.seen_mm[: self.plan.dims])

    def seed(self, step: int, purpose: int, turn: int) -> int:
        """Number the draws of a run: above the 55 bits that seed, step and purpose can fill stands the turn."""
        return (self.recipe.training.seed * 1_000_003 + step) * 4 + purpose + (turn << 56)

    def numbers(self, step: int, purpose: int, turn: int = 0) -> torch.Generator:
        """Return random numbers for one purpose of a step, the same in a run that was resumed."""
        return torch.Generator().manual_seed(self.seed(step, purpose, turn))


class Draw(NamedTuple):
    """Patches of one step, and what the generator makes of them.

    Attributes:
        step: From 0.
        turn: 0 for the step's own patches; from 1 on those of a critic that learns more often.
        phase: Who plays, how strongly.
        places: Where the patches of the whole batch lie, of all processes.
        batch: This process's share of them, on the device.
        made: The prediction, zero outside the mask, shape (N, 1, *spatial); with gradient where the generator plays.
    """

    step: int
    turn: int
    phase: Phase
    places: Sequence[Place]
    batch: Batch
    made: Tensor

    @property
    def share(self) -> float:
        """Share of the whole batch's samples that this process has."""
        return len(self.made) / len(self.places)

    def detached(self) -> Draw:
        """Return the same without gradient."""
        return self._replace(made=self.made.detach())


class StepOutcome(NamedTuple):
    """What a part of a step leaves: the next state, and values for the log, one number each, on the device."""

    state: TrainingState
    values: Mapping[str, Tensor]


def make_draw(setting: Setting, step: int, phase: Phase, places: Sequence[Place], turn: int = 0) -> Draw:
    """Take this process's patches and make their images.

    With gradient where the generator plays and the turn is the step's own.
    """
    recipe, plan = setting.recipe, setting.plan
    own = ranks.share(places)
    batch = take_batch(setting.cases, own, patch=plan.patch, slices=plan.slices, variation=setting.variation)
    batch = to_device(batch, setting.trainables.fabric.device)
    generator = setting.trainables.modules["generator"].train()
    if recipe.generator.dropout or recipe.generator.network != OWN:
        # its draws are the step's, so that a resumed run draws the same, and those of the whole batch in each process
        torch.manual_seed(setting.seed(step, 3, turn))
    with torch.set_grad_enabled(phase.generator and turn == 0):
        prediction = generator(batch.source).float()  # shared by generator and discriminators
    batch = crop_batch(batch, prediction.shape[2:])
    return Draw(step, turn, phase, places, batch, prediction * batch.mask)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Send a batch to the device without waiting for it; the source lies channels last."""
    memory = torch.channels_last if batch.source.ndim == 4 else torch.channels_last_3d
    source, *others = (send(part, device) for part in batch)
    return Batch(source.contiguous(memory_format=memory), *others)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the host to the device without waiting for it."""
    if device.type == "cuda":  # torch keeps page-locked memory until the copy is done, and uses it again
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def beside_source(batch: Batch, image: Tensor) -> Tensor:
    """Show a discriminator an image beside the source it is of, shape (N, C + 1, *spatial), channels last."""
    pair = torch.cat([batch.source, image], dim=1)
    return pair.contiguous(memory_format=torch.channels_last if pair.ndim == 4 else torch.channels_last_3d)


def shown_locally(recipe: Recipe, batch: Batch, image: Tensor) -> Tensor:
    """Show the local discriminator an image, beside its source unless it is unconditional."""
    return beside_source(batch, image) if recipe.discriminators.conditional else image
