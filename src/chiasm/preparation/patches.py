"""The size of training patches: it depends on the sizes that the networks accept, and on the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from chiasm.errors import RecipeError
from chiasm.preparation.fingerprint import Fingerprint
from chiasm.preparation.plan import MOST_PATCH, Triple
from chiasm.recipe import Plane, Recipe

PATCH_2D: Mapping[str, int] = {"tiny": 64, "small": 128, "large": 160, "paper": 160}
PATCH_3D: Mapping[str, int] = {"tiny": 32, "small": 64, "large": 96, "paper": 96}
SMALLEST_PATCH = 64
MOST_EMPTY = 1.25  # a patch so many times as long as the body is reported
EMPTY = "the rest of a patch is empty"


class PatchNeeds(NamedTuple):
    """The sizes of a patch that networks of the literature and their discriminators accept.

    Attributes:
        multiple: Every side is `offset` and a multiple of this.
        smallest: No side is shorter.
        offset: What valid convolutions lose, where a discriminator asks a multiple of the rest.
        own: Whether the generator is this project's own, which the recipe's widths describe.
    """

    multiple: int = 1
    smallest: int = 1
    offset: int = 0
    own: bool = False


def choose_plane(recipe: Recipe, dims: Literal[2, 3], reasons: dict[str, str]) -> Plane:
    """Choose the plane of the slices that networks in 2D see, and say why where they are not axial.

    Args:
        recipe: What is asked for.
        dims: Axes of a patch.
        reasons: Gets the reason, under "plane".
    """
    asked = recipe.data.plane
    if dims == 3 or asked == "auto" or asked == "axial":
        return "axial"
    reasons["plane"] = "set in the recipe, or the turn of one of several models"
    return asked


def choose_patch(
    recipe: Recipe,
    seen: Fingerprint,
    spacing: Triple,
    axes: Sequence[int],
    reasons: dict[str, str],
    needs: PatchNeeds | None,
) -> tuple[int, ...]:
    """Choose the sides of a patch, in voxels, and say why.

    Args:
        recipe: What is asked for.
        seen: Facts on the training cases.
        spacing: Of the grid, mm.
        axes: Which of I, J and K a patch has, in its order.
        reasons: Gets the reason, under "patch".
        needs: Of networks that are not this project's own, or None.

    Raises:
        RecipeError: If the patch asked for does not fit the networks.
    """
    needs, dims = needs or PatchNeeds(own=True), len(axes)
    multiple = math.lcm(_halved_by(recipe, needs), needs.multiple)
    smaller = "generator.network=pix2pix-32 takes multiples of 32." if recipe.generator.network == "pix2pix" else None
    asked = recipe.data.patch
    if asked != "auto":
        step = multiple if needs.own else needs.multiple
        _check_patch(asked, dims, needs._replace(multiple=step), smaller)
        patch = (asked,) * dims
        reasons["patch"] = f"set in the recipe{describe_empty(patch, seen, spacing, axes)}"
        return patch
    least = _next_fit(needs.smallest, multiple, needs.offset)
    usual = (PATCH_2D if dims == 2 else PATCH_3D).get(recipe.size, SMALLEST_PATCH)
    most = max(least, _next_fit(usual - multiple + 1, multiple, needs.offset))
    if empty := describe_empty((least,) * dims, seen, spacing, axes):
        hint = f"; {smaller.rstrip('.')}" if smaller else ""
        reasons["patch"] = f"the networks need {least} voxels{empty}{hint}"
    else:
        offset = f"{needs.offset} voxels and " if needs.offset else ""
        reasons["patch"] = (
            f"{offset}multiples of {multiple}, which the networks need; "
            f"at most {most} at size {recipe.size}, and no larger than the median brain or body needs"
        )
    body = _median_body(seen, spacing, axes)
    return tuple(min(most, max(least, _next_fit(size, multiple, needs.offset))) for size in body)


def describe_empty(patch: Sequence[int], seen: Fingerprint, spacing: Triple, axes: Sequence[int]) -> str:
    """Describe that a patch is much longer than most brains or bodies; nothing if it is not.

    Args:
        patch: In voxels.
        seen: Facts on the training cases.
        spacing: Of the grid, mm.
        axes: Which of I, J and K the patch has, in its order.
    """
    body = _median_body(seen, spacing, axes)
    if all(side <= MOST_EMPTY * there for side, there in zip(patch, body)):
        return ""
    return f", but the median brain or body has only {' x '.join(map(str, body))}: {EMPTY}, and takes as much time"


def _median_body(seen: Fingerprint, spacing: Triple, axes: Sequence[int]) -> list[int]:
    sides = body_voxels(seen, spacing)
    return [math.ceil(sides[axis]) for axis in axes]


def _halved_by(recipe: Recipe, needs: PatchNeeds) -> int:
    """Return the power of 2 by which the recipe's own networks divide a patch."""
    discriminators = recipe.discriminators
    generator = recipe.generator.own_multiple if needs.own else 1
    halvings = max(len(recipe.generator.refiner) - 1, len(discriminators.global_widths))
    return max(generator, discriminators.local_multiple, 1 << halvings)


def _check_patch(asked: int, dims: int, needs: PatchNeeds, hint: str | None) -> None:
    """Refuse a patch that is too large, or that the networks cannot take.

    Raises:
        RecipeError: If it is.
    """
    if asked**dims > MOST_PATCH:
        raise RecipeError(
            "data.patch is too large", reason="patch", found=asked, expected=f"at most {MOST_PATCH:,} voxels in all"
        )
    step, offset = needs.multiple, needs.offset
    least = _next_fit(needs.smallest, step, offset)
    if asked >= least and asked % step == offset % step:
        return
    lower = max(least, _next_fit(asked, step, offset) - step)
    more = f"{offset} more than " if offset else ""
    fitting = f"{more}a multiple of {step}, such as {lower} or {lower + step}" if step > 1 else f"at least {least}"
    raise RecipeError("data.patch does not fit the networks", reason="patch", found=asked, expected=fitting, hint=hint)


def _next_fit(size: int, multiple: int, offset: int) -> int:
    """Return the smallest number that is at least `size`, and `offset` more than a multiple.

    >>> _next_fit(33, 8, 0), _next_fit(33, 8, 12), _next_fit(36, 8, 12)
    (40, 36, 36)
    """
    return size + (offset - size) % multiple


def body_voxels(seen: Fingerprint, spacing: Triple) -> list[float]:
    """Return how many voxels the median brain or body measures along each axis."""
    sizes: list[float] = (np.median([case.body_mm for case in seen.cases], axis=0) / spacing).tolist()
    return sizes
