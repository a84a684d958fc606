"""The attention: the weight of each voxel in the reconstruction loss, its schedule and its health gate.

``w = (1 - a_t) + a_t F`` with ``F = (1 - M)^beta``: the weight of each voxel
in the reconstruction loss.  ``M`` is the local discriminator's confidence,
``a_t`` a schedule times a health gate: while the discriminator is saturated,
flat or inverted its map says nothing about difficulty and is not used.

Reference: Nie et al., arXiv:1907.03297, for F; normalisation, schedule and gate are this project's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chiasm.training import ranks
from chiasm.training.losses import unit_mean
from chiasm.training.state import exact

Target = Literal["none", "realness", "magnitude", "structured"]

#: Share of voxels whose realness is recognised: below, D_l knows nothing; above, M is 0 or 1 everywhere.
ACCURACY_RANGE = (0.55, 0.97)
#: Standard deviation of M inside the mask below which the map is flat.
FLATTEST = 0.02

_ROUNDS = 16  # of capping and normalising; the excess shrinks with each


def difficulty_weight(confidence: Tensor, beta: float, detach: bool = True) -> Tensor:
    """Weigh each voxel by its lack of confidence: ``F = (1 - M)^beta``.

    Args:
        confidence: ``M`` in [0, 1], shape (N, 1, *spatial).  Probabilities, not logits.
        beta: Focusing exponent, at least 0.  0 weighs every voxel exactly 1.
        detach: Whether to stop gradients.  False lets gradients of the reconstruction loss reach the network that made
            `confidence` (arm A9).

    Returns:
        Weights in [0, 1], same shape.

    Raises:
        ValueError: If `beta` is negative.

    Reference:
        Nie et al., arXiv:1907.03297, difficult-region-aware attention.

    >>> difficulty_weight(torch.tensor([0.0, 0.5, 1.0]), beta=2.0)
    tensor([1.0000, 0.2500, 0.0000])
    """
    if beta < 0:
        raise ValueError(f"beta must be at least 0, not {beta}")
    return (1 - (confidence.detach() if detach else confidence)).pow(beta)


def normalise_weight(weight: Tensor, mask: Tensor, cap: float = 5.0) -> Tensor:
    """Give a weight the masked mean 1 over the batch and no voxel more than `cap`.

    ``F <- F / <F>_m``, ``F <- min(F, cap)``, and again until both hold.  Where
    they cannot by scaling, because too few voxels weigh anything, all weights
    are drawn towards 1 until the largest is `cap`.

    Args:
        weight: Not negative, shape (N, 1, *spatial).
        mask: Valid voxels, bool, same shape.
        cap: Largest weight, above 1.

    Returns:
        Same shape, 1 outside the mask.

    Raises:
        ValueError: If `cap` is not above 1 or shapes differ.
    """
    if cap <= 1:
        raise ValueError(f"cap must be above the mean, 1, not {cap}")
    weight = unit_mean(weight, mask)
    inside, factor, ceiling = torch.where(mask, weight, 0), weight.new_ones(()), weight.new_full((), torch.inf)
    voxels = mask.flatten(1).sum(1)
    share = ranks.mean((voxels > 0).to(weight.dtype).mean(), len(mask))  # of the samples that have valid voxels
    peak = ranks.largest(weight.amax().detach())
    for _ in range(_ROUNDS):  # the weight is min(factor * weight, ceiling); what its peak is decides on the device
        is_over = torch.minimum(factor * peak, ceiling) > 1.001 * cap
        capped = ceiling.clamp(max=cap)
        sums = torch.minimum(factor * inside, capped).flatten(1).sum(1)
        mean = ranks.mean((sums / voxels.clamp(min=1)).mean(), len(mask))
        raised = torch.where(is_over & (mean > 0), share / mean, 1)
        factor, ceiling = factor * raised, torch.where(is_over, capped * raised, ceiling)
    weight = torch.where(mask, torch.minimum(factor * weight, ceiling), 1)
    towards = ((cap - 1) / (torch.minimum(factor * peak, ceiling) - 1)).detach()
    return torch.lerp(torch.ones_like(weight), weight, torch.where(towards > 0, towards, 1).clamp(max=1))


def attention_weight(
    confidence: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    norm: Literal["mean", "none"] = "mean",
    cap: float = 5.0,
    strength: float | Tensor = 1.0,
    detach: bool = True,
) -> Tensor:
    """Turn the local discriminator's confidence into voxel weights: ``w = (1 - a_t) + a_t F``.

    Args:
        confidence: ``M`` in [0, 1] at the prediction that the loss is taken of, shape (N, 1, *spatial).
        mask: Valid voxels, bool, same shape.
        beta: Exponent of ``F``, at least 0.
        norm: "mean" keeps the loss's size (masked mean 1, see `normalise_weight`);
            "none" is the literal paper, which lowers it as M rises.
        cap: Largest weight under "mean".
        strength: ``a_t`` in [0, 1], or a tensor of one such number; 0 gives exactly 1 everywhere.
        detach: See `difficulty_weight`.

    Returns:
        Same shape.

    Raises:
        ValueError: If a number is out of range or shapes differ.

    Reference:
        Nie et al., arXiv:1907.03297; under "mean" the weights are this project's.
    """
    if norm not in ("mean", "none") or not (isinstance(strength, Tensor) or 0 <= strength <= 1):
        raise ValueError(f"norm is mean or none and strength in [0, 1], not {norm!r} and {strength}")
    if confidence.shape != mask.shape:
        raise ValueError(f"confidence {tuple(confidence.shape)} and mask {tuple(mask.shape)} differ in shape")
    weight = difficulty_weight(confidence, beta, detach)
    if norm == "mean":
        weight = normalise_weight(weight, mask, cap)
    share = strength.to(weight.dtype) if isinstance(strength, Tensor) else strength
    return torch.lerp(torch.ones_like(weight), weight, share)


def shuffle_weight(weight: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """Keep the weights but not their places (control C4): permute them inside each sample's mask.

    Args:
        weight: Shape (N, 1, *spatial).
        mask: Valid voxels, bool, same shape.
        keys: Random, in [0, 1), same shape: the voxels of a sample are given its weights in the order of their keys.

    Returns:
        Same shape; each sample keeps its histogram inside the mask, and its values outside.
    """
    inside = mask.flatten(1)
    places = (~inside).int().argsort(dim=1, stable=True)  # valid voxels first, then the others, each as they stand
    order = torch.where(inside, keys.flatten(1), 2).argsort(dim=1, stable=True)
    values = weight.flatten(1)
    return values.scatter(1, places, values.gather(1, order)).view_as(weight)


def lesion_weight(labels: Tensor, factor: float, mask: Tensor) -> Tensor:
    """Weigh labelled voxels `factor` times the others (control C3, an oracle), masked mean 1.

    Args:
        labels: Lesion where above 0 or True, shape (N, 1, *spatial).
        factor: Weight ratio lesion : elsewhere, positive.
        mask: Valid voxels, bool, same shape.

    Returns:
        Same shape, float32.

    Raises:
        ValueError: If `factor` is not positive or shapes differ.
    """
    if factor <= 0:
        raise ValueError(f"factor must be positive, not {factor}")
    return unit_mean(torch.where(labels > 0, float(factor), 1.0), mask)


class Phase(NamedTuple):
    """Which networks learn at a step, and how strong the terms are.

    Attributes:
        generator: Whether the generator learns.
        discriminators: Whether the discriminators learn.
        adversarial: Factor in [0, 1] on the adversarial lambdas.
        attention: ``a_t`` in [0, 1] before the health gate.
    """

    generator: bool
    discriminators: bool
    adversarial: float
    attention: float


def phase(step: int, *, steps: int, generator_alone: float, discriminators_alone: float, ramp: float) -> Phase:
    """Return which networks learn at a step: the generator alone, then the discriminators alone, then all.

    Once all play, the adversarial terms rise over `ramp` of all steps, then the
    attention over another: each meets players that have settled.

    Args:
        step: From 0.
        steps: Of the whole training.
        generator_alone: Share of the steps; 1 for an arm without discriminators.
        discriminators_alone: Share of the steps.
        ramp: Share of the steps.

    >>> phase(50, steps=100, generator_alone=0.4, discriminators_alone=0.15, ramp=0.05)
    Phase(generator=False, discriminators=True, adversarial=0.0, attention=0.0)
    """
    alone, together = round(generator_alone * steps), round((generator_alone + discriminators_alone) * steps)
    return Phase(
        generator=step < alone or step >= together,
        discriminators=step >= alone,
        adversarial=adversarial_ramp(step, start=together, length=ramp * steps),
        attention=attention_ramp(step, start=together, length=ramp * steps),
    )


def adversarial_ramp(step: int, *, start: int, length: float) -> float:
    """Rise from 0 at `start` to 1 at `start + length`, in steps.

    >>> [adversarial_ramp(step, start=10, length=4) for step in (0, 10, 12, 14, 99)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    return min(1.0, max(0.0, (step - start) / length))


def attention_ramp(step: int, *, start: int, length: float) -> float:
    """Rise from 0 to 1 once `adversarial_ramp` with the same arguments has ended.

    >>> [attention_ramp(step, start=10, length=4) for step in (10, 14, 16, 18)]
    [0.0, 0.0, 0.5, 1.0]
    """
    return min(1.0, max(0.0, (step - start - length) / length))


def gate_is_open(
    *, target: Target, realness_accuracy: Tensor | float, confidence_sd: Tensor, spearman: float
) -> Tensor:
    """Return whether the map can be trusted: whether the local discriminator is not saturated, flat or inverted.

    A value that is not a number closes the gate.

    Args:
        target: Head that the attention is taken from.
        realness_accuracy: Share of voxels, real and synthetic, that the realness head recognises
            right; assessed only if it is the target.
        confidence_sd: Standard deviation of M inside the mask.
        spearman: Rank correlation of 1 - M with the smoothed error on validation cases.

    Returns:
        One truth value, on the device of `confidence_sd`.
    """
    low, high = ACCURACY_RANGE
    is_open = confidence_sd >= FLATTEST
    if target == "realness":
        is_open = is_open & (realness_accuracy >= low) & (realness_accuracy <= high)
    return is_open & (spearman > 0)


def update_error_scale(scale: Tensor, error: Tensor, mask: Tensor, momentum: float, whole: int | None = None) -> Tensor:
    """Follow twice the median foreground error, the ``s`` of the soft targets.

    Args:
        scale: The last value, one number; 0 before the first.
        error: ``y^ - y``, shape (N, 1, *spatial), normalised units.
        mask: Valid voxels, bool, same shape.
        momentum: How much of the last value is kept, in [0, 1).
        whole: Samples of all processes; those of this one by default.

    Returns:
        The next value; the last one if nothing is inside the mask.

    Raises:
        ValueError: If `momentum` is out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
    inside = torch.where(mask, error.detach().abs(), torch.nan)
    inside = ranks.gather(inside, len(error) if whole is None else whole)
    fresh = 2 * exact(inside.flatten().nanmedian(dim=0).values)  # without `dim` a GPU would wait for the number
    fresh = torch.where(scale == 0, fresh, momentum * scale + (1 - momentum) * fresh)
    return torch.where(fresh.isnan(), scale, fresh)
