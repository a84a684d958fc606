"""The weight F of each voxel of a case, as the attention of a training gives it to the image of the finished model.

The weight is made by the function that trains: `training.attention.attention_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from chiasm.errors import RunError
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.prediction.passes import networks_of, synthesise_prepared
from chiasm.prediction.synthesis import on_thin_slices, values_on_grid
from chiasm.preparation.arrays import prepare_source
from chiasm.recipe import Attention
from chiasm.registration.cohort import align_sources
from chiasm.training.attention import attention_weight
from chiasm.volumes import Volume


def why_no_weight(settings: Attention) -> str:
    """Say why a training weighs no voxel by its attention, as the end of a sentence; empty if it does."""
    reasons = {
        "has no attention": settings.head == "none",
        "chooses patches by its attention and weighs no voxels": settings.use == "sample",
        "shuffles its weights over the mask in each step": settings.shuffle,
    }
    return next((reason for reason, is_true in reasons.items() if is_true), "")


def describe_weight(settings: Attention) -> str:
    """Give the formula of F with the numbers of a training, and say how `weight_map` scales it."""
    power = "1 − M" if settings.beta == 1 else f"(1 − M)^{settings.beta:g}"
    formula = f"F = {power}, with M from the {settings.head} head of the local discriminator"
    if settings.norm == "none":
        return f"{formula}, not scaled"
    return f"{formula}, scaled to a mean of 1 over the mask of each case and at most {settings.cap:g}"


def weight_map(
    model: Model, volumes: Sequence[Volume], mask: Volume | None = None, *, engine: Engine, degrade: bool = False
) -> NDArray[np.float32]:
    """Return F at the image that the generator makes of a case, as the attention sees it: in one pass, unrefined.

    Training scales the weights of a batch of patches to a mean of 1; here they are those of the whole case.

    Args:
        model: Its networks are in evaluation mode on the engine's device.
        volumes: One for each source of the model, on one grid unless the model registers them.
        mask: Valid voxels on the first one's grid; by default found as the plan says.
        engine: Device and precision.
        degrade: For super-resolution: whether slices are thin and must be made thick first.

    Returns:
        On the first source's grid, shape (I, J, K); undefined outside the mask.

    Raises:
        RunError: If the model weighs no voxels.
        VolumeError: If the number of volumes or a grid is wrong.
    """
    recipe, settings = model.recipe, model.recipe.attention
    if (reason := why_no_weight(settings)) or model.local_discriminator is None:
        raise RunError(f"a model of {recipe.method} {reason or 'keeps no local discriminator'}", reason="no-weight")
    aligned, _ = align_sources([*volumes], model.plan.sources, model.plan.registration)
    shown, given = on_thin_slices(aligned, mask, model.plan, degrade=degrade)
    prepared = prepare_source(shown, model.plan, given)
    maps = synthesise_prepared(
        networks_of(model)._replace(refiner=None, average="none"),
        prepared.array,
        prepared.mask,
        plan=model.plan,
        conditional=recipe.discriminators.conditional,
        error_scale=model.error_scale,
        engine=engine,
    )
    difficulty = getattr(maps, settings.head)
    inside = torch.from_numpy(np.ascontiguousarray(prepared.mask))[None, None]
    confidence = torch.where(inside, 1 - torch.from_numpy(np.ascontiguousarray(difficulty))[None, None], 1)
    weight = attention_weight(confidence, inside, beta=settings.beta, norm=settings.norm, cap=settings.cap)
    return values_on_grid(weight[0, 0].numpy(), prepared, shown[0].geometry)
