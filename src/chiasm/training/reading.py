"""Reading values from the device, and what happens if one is not a finite number.

A step leaves its values on the device.  They are read every few steps, for the log, and before each checkpoint.  If a
value is not finite then, the steps since the last checkpoint are done again, with a check after each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chiasm.errors import RunError
from chiasm.recipe import Recipe
from chiasm.training import ranks
from chiasm.training.setting import Draw
from chiasm.training.state import exact

MOST_LINES = 500  # of steps, in the log
MAY_BE_UNDEFINED = ("weight_ratio",)  # in a batch without lesions, or without healthy tissue


class NotFinite(RunError):
    """A value was not finite since the last check; the message names value, step and cases of the last step."""


@dataclass(frozen=True)
class PendingValues:
    """The steps since the values were last checked.

    Attributes:
        is_finite: Whether all values were finite numbers, one truth value on the device.
        values: Of the last step.
        drawn: In the last step.
    """

    is_finite: Tensor
    values: Mapping[str, Tensor]
    drawn: Draw


def is_reading_step(recipe: Recipe, step: int) -> bool:
    """Return whether values are read after a step (from 0): after the first one, and then about 500 times."""
    return step % max(1, recipe.schedule.steps // MOST_LINES) == 0


def watch(before: PendingValues | None, values: Mapping[str, Tensor], drawn: Draw) -> PendingValues:
    """Note on the device whether the values of a step are finite."""
    is_finite = _all_finite({name: value for name, value in values.items() if name not in MAY_BE_UNDEFINED})
    if before is not None:
        is_finite = is_finite & before.is_finite
    return PendingValues(is_finite, values, drawn.detached())


def with_values(watched: PendingValues, values: Mapping[str, Tensor]) -> PendingValues:
    """Add values that the last step left, such as the sizes of weights, which a finite loss says nothing of."""
    return replace(watched, is_finite=watched.is_finite & _all_finite(values), values={**watched.values, **values})


def _all_finite(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([exact(value) for value in values.values()]).isfinite().all()


def check(watched: PendingValues, names: Sequence[str]) -> None:
    """Wait for the device, and stop if a value was not finite; all processes must ask.

    Args:
        watched: Since the last check.
        names: Of all cases.

    Raises:
        NotFinite: Then; it may have been in an earlier step than the message says, if there were several.
    """
    if not bool(ranks.largest((~watched.is_finite).float())):
        return
    drawn = watched.drawn
    values = read_values(watched.values, len(drawn.made)).items()
    bad = next((name for name, value in values if not math.isfinite(value)), "a loss")
    raise NotFinite(
        f"{bad} is not a finite number at step {drawn.step} (cases {', '.join(_suspects(drawn, names))})",
        reason="not-finite",
        hint="Checkpoints are good. Lower the rate: chiasm train --set optimiser.generator_rate=1e-4.",
    )


def _suspects(drawn: Draw, names: Sequence[str]) -> list[str]:
    """Name the cases with patches that are not finite themselves, or else all of the batch."""
    images = torch.cat([drawn.batch.source, drawn.batch.target], 1)
    is_bad = ranks.gather((~images.isfinite().flatten(1).all(1)).float(), len(drawn.places)).tolist()
    bad = [place for place, is_one in zip(drawn.places, is_bad) if is_one]
    return sorted({names[place.case] for place in bad or drawn.places})


def read_values(values: Mapping[str, Tensor], samples: int) -> dict[str, float]:
    """Read all values at once, and drop those that are undefined; all processes must ask.

    Args:
        values: One number each, a mean over the samples of this process.
        samples: How many those are.
    """
    if not values:
        return {}
    numbers = ranks.mean(torch.stack([exact(value) for value in values.values()]), samples).tolist()
    read = dict(zip(values, numbers))
    return {name: value for name, value in read.items() if name not in MAY_BE_UNDEFINED or not math.isnan(value)}
