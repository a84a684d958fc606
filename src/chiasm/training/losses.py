"""The losses: every equation of the method as a pure function.

Symbols: ``y`` target, ``y^`` prediction, ``e = y^ - y`` error, ``m`` mask of
valid voxels, ``sp(t) = log(1 + exp(t))``, and ``<a>_m`` the masked mean:
within the mask of each sample first, then over the batch.  Discriminators give
logits throughout; nothing here applies a sigmoid before a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from chiasm.training import ranks
from chiasm.training.state import exact

SMALLEST_SCALE = 1e-6


def masked_mean(a: Tensor, mask: Tensor) -> Tensor:
    """Average inside the mask of each sample, then over the batch: ``<a>_m``.

    A sample counts once, however large its mask; one without valid voxels
    counts as 0.  Values outside the mask, NaN included, change nothing.

    Args:
        a: Shape (N, 1, *spatial), float.
        mask: Valid voxels, bool, same shape.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ (broadcasting would hide a mistake).
    """
    if a.shape != mask.shape:
        raise ValueError(f"values {tuple(a.shape)} and mask {tuple(mask.shape)} differ in shape")
    inside = torch.where(mask, a, 0).flatten(1).sum(1)
    return (inside / mask.flatten(1).sum(1).clamp(min=1)).mean()


def unit_mean(weight: Tensor, mask: Tensor) -> Tensor:
    """Scale a weight so that its masked mean over the batch is 1: ``w / <w>_m``.

    The loss then keeps its size whatever the weight's own, so that attention
    only moves it about.  The batch is that of all processes.  Samples without valid voxels are left out of account.

    Args:
        weight: Not negative, shape (N, 1, *spatial).
        mask: Valid voxels, bool, same shape.

    Returns:
        Same shape; 1 outside the mask, and everywhere if no voxel weighs anything.

    Raises:
        ValueError: If the shapes differ.
    """
    peak = ranks.largest(torch.where(mask, weight, 0).amax().detach())
    weight = weight / torch.where(peak > 0, peak, 1)  # weights near 1e-40 would overflow below
    share = masked_mean(torch.ones_like(weight), mask)  # of the samples that have valid voxels
    mean = masked_mean(weight, mask)
    share, mean = ranks.mean(torch.stack([share, mean]), len(weight))
    return torch.where(mask & (mean > 0), weight * (share / mean), 1)


def reconstruction_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None, p: int = 2
) -> Tensor:
    """Compare prediction and target voxel by voxel: ``< w |y^ - y|^p >_m``.

    The weight multiplies each voxel before the mean, not the mean itself.

    Args:
        prediction: ``y^``, shape (N, 1, *spatial), normalised units.
        target: ``y``, same shape.
        mask: Valid voxels, bool, same shape.
        weight: ``w``, same shape; None weighs every voxel 1.
        p: 1 or 2.

    Returns:
        A scalar.

    Raises:
        ValueError: If `p` is neither 1 nor 2 or shapes differ.

    Reference:
        Nie et al., arXiv:1907.03297, weighted reconstruction term.
    """
    if p not in (1, 2):
        raise ValueError(f"p is 1 or 2, not {p}")
    _same_shape(prediction, target)
    error = torch.where(mask, prediction - target, 0)
    power = error.abs() if p == 1 else error.square()
    return masked_mean(power if weight is None else weight * power, mask)


def gradient_difference_loss(prediction: Tensor, target: Tensor, mask: Tensor, dims: int) -> Tensor:
    """Compare the sizes of neighbouring voxels' differences: ``< | |grad y| - |grad y^| |^2 >_m``.

    Differences are taken along each axis between pairs that both lie inside
    the mask, without padding, and the axes are added.

    Args:
        prediction: ``y^``, shape (N, 1, *spatial).
        target: ``y``, same shape.
        mask: Valid voxels, bool, same shape.
        dims: Number of spatial axes, 2 or 3.

    Returns:
        A scalar.

    Raises:
        ValueError: If the tensors do not have `dims` spatial axes or shapes differ.

    Reference:
        Mathieu, Couprie, LeCun, arXiv:1511.05440, eq. 6 with alpha = 2.
    """
    if prediction.ndim != dims + 2:
        raise ValueError(f"expected {dims} spatial axes, not shape {tuple(prediction.shape)}")
    _same_shape(prediction, target)
    prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
    loss = prediction.new_zeros(())
    for axis in range(2, dims + 2):
        difference = target.diff(dim=axis).abs() - prediction.diff(dim=axis).abs()
        length = mask.shape[axis] - 1
        both = mask.narrow(axis, 0, length) & mask.narrow(axis, 1, length)
        loss = loss + masked_mean(difference.square(), both)
    return loss


def adversarial_discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, smoothing: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Teach a discriminator that real is 1 and synthetic is 0: ``< (1-eps) sp(-D(y)) + eps sp(D(y)) + sp(D(y^)) >``.

    Binary cross-entropy on logits; only the real side is smoothed, so that the
    generator is never rewarded for staying where it is.

    Args:
        real_logits: Shape (N,), or (N, 1, *spatial) with `mask`.
        fake_logits: Same shape, of predictions detached from the generator.
        smoothing: ``eps`` in [0, 0.5); 0 is the literal loss.
        mask: Valid voxels of local logits, bool, same shape; None: every logit counts.

    Returns:
        A scalar.

    Raises:
        ValueError: If `smoothing` is out of range or shapes differ.

    Reference:
        Nie et al., arXiv:1907.03297; one-sided smoothing: Salimans et al., arXiv:1606.03498, section 3.4.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must lie in [0, 0.5), not {smoothing}")
    _same_shape(real_logits, fake_logits)
    real = functional.softplus(-real_logits)
    if smoothing > 0:
        real = (1 - smoothing) * real + smoothing * functional.softplus(real_logits)
    return _mean(real + functional.softplus(fake_logits), mask)


def adversarial_generator_loss(fake_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the generator's loss, low where a discriminator takes images for real: ``< sp(-D(y^)) >``, non-saturating.

    Args:
        fake_logits: Shape (N,), or (N, 1, *spatial) with `mask`.
        mask: Valid voxels of local logits, bool, same shape; None: every logit counts.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ.

    Reference:
        Goodfellow et al., arXiv:1406.2661, section 3.
    """
    return _mean(functional.softplus(-fake_logits), mask)


def wasserstein_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Teach a critic to score real above synthetic: ``< D(y^) > - < D(y) >``.

    Args:
        real_scores: Shape (N,), unbounded.
        fake_scores: Same shape, of detached predictions.

    Returns:
        A scalar; add `gradient_penalty`.

    Reference:
        Gulrajani et al., arXiv:1704.00028, eq. 3.
    """
    return fake_scores.mean() - real_scores.mean()


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """Return the generator's loss, which is low for images that the critic scores high: ``- < D(y^) >``."""
    return -fake_scores.mean()


def least_squares_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Teach a discriminator to score real 1 and synthetic 0: ``< (D(y) - 1)^2 + D(y^)^2 > / 2``.

    Args:
        real_scores: Any shape, unbounded.
        fake_scores: Same shape, of detached predictions.

    Reference:
        Mao et al., arXiv:1611.04076, eq. 9 with a = 0, b = c = 1.
    """
    _same_shape(real_scores, fake_scores)
    return ((real_scores - 1).square() + fake_scores.square()).mean() / 2


def least_squares_generator_loss(fake_scores: Tensor) -> Tensor:
    """Return the generator's loss, which is low for images that score 1: ``< (D(y^) - 1)^2 > / 2``."""
    return (fake_scores - 1).square().mean() / 2


def hinge_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Teach a discriminator a margin: ``< max(0, 1 - D(y)) + max(0, 1 + D(y^)) >``.

    Args:
        real_scores: Any shape, unbounded.
        fake_scores: Same shape, of detached predictions.

    Reference:
        Miyato et al., arXiv:1802.05957, eq. 16; the generator's side is `wasserstein_generator_loss`.
    """
    _same_shape(real_scores, fake_scores)
    return (functional.relu(1 - real_scores) + functional.relu(1 + fake_scores)).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, factor: Tensor) -> Tensor:
    """Hold a critic's slope near 1 between real and synthetic: ``< (||grad D(z)|| - 1)^2 >``, ``z = t y + (1-t) y^``.

    One factor for each sample, uniform in [0, 1]; the norm is taken over all
    axes but the batch's.

    Args:
        critic: Maps what `real` is to one score a sample.
        real: Shape (N, C, *spatial): source and target side by side, or the target
            alone if `critic` holds the source.
        fake: Same shape.
        factor: ``t``, shape (N,), uniform in [0, 1] (not normal); on the host, wherever `real` is.

    Returns:
        A scalar that can be differentiated again.

    Raises:
        ValueError: If a shape is wrong or a factor lies outside [0, 1].

    Reference:
        Gulrajani et al., arXiv:1704.00028, eq. 3 and algorithm 1.
    """
    _same_shape(real, fake)
    if factor.shape != real.shape[:1] or not all(0 <= share <= 1 for share in factor.tolist()):
        raise ValueError(f"one factor in [0, 1] for each of {len(real)} samples is needed, not {tuple(factor.shape)}")
    share = factor.to(real, non_blocking=True).view(-1, *[1] * (real.ndim - 1))
    between = torch.lerp(fake.detach(), real.detach(), share).requires_grad_()
    slope: Tensor = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
    norm: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (norm - 1).square().mean()


def masked_gaussian(a: Tensor, mask: Tensor, sigma_voxels: Sequence[float]) -> Tensor:
    """Smooth inside the mask, and only from inside it: ``(g * m a) / (g * m)``.

    A constant stays constant up to the mask's edge.  The kernel is cut at four
    sigma, as scipy's is.  Each axis is one product with a band matrix, which on
    grids of a patch takes a tenth of the time of a convolution of one channel.

    Args:
        a: Shape (N, 1, *spatial), float.
        mask: Valid voxels, bool, same shape.
        sigma_voxels: Standard deviation along each spatial axis, in voxels
            (millimetres divided by the spacing); 0 leaves an axis as it is.

    Returns:
        Same shape, 0 outside the mask.

    Raises:
        ValueError: If shapes differ or there is not one sigma, at least 0, for each axis.
    """
    _same_shape(a, mask)
    if len(sigma_voxels) != a.ndim - 2 or min(sigma_voxels) < 0:
        raise ValueError(f"expected {a.ndim - 2} sigmas of at least 0, not {tuple(sigma_voxels)}")
    smooth = torch.cat([torch.where(mask, a, 0), mask.to(a.dtype)])  # (2N, 1, *spatial): both in one go
    with torch.autocast(a.device.type, enabled=False):
        for axis, sigma in enumerate(sigma_voxels, start=2):
            if sigma > 0:
                band = _gaussian_band(smooth.shape[axis], sigma, smooth.device, smooth.dtype)
                smooth = (smooth.movedim(axis, -1) @ band).movedim(-1, axis)
    values, cover = smooth.chunk(2)
    return torch.where(mask, values / torch.where(mask, cover, 1), 0)


@lru_cache(maxsize=32)
def _gaussian_band(size: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the symmetric matrix (size, size) that smooths along an axis with zeros beyond its ends; not to change."""
    radius = math.floor(4 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=dtype, device=device) / sigma).square())
    place = torch.arange(size, device=device)
    apart = place[:, None] - place
    return torch.where(apart.abs() <= radius, torch.exp(-0.5 * (apart.to(dtype) / sigma).square()) / kernel.sum(), 0)


def soft_target_magnitude(error: Tensor, mask: Tensor, scale: Tensor | float, sigma_voxels: Sequence[float]) -> Tensor:
    """Return the target of the magnitude head, the expected-error map: ``exp( -(g1 * |e|) / s )``.

    Args:
        error: ``e = y^ - y``, shape (N, 1, *spatial); detached here.
        mask: Valid voxels, bool, same shape.
        scale: ``s``, one number, see `attention.update_error_scale`; same unit as `error`.
        sigma_voxels: Of ``g1`` (2 mm, or what the recipe says), one for each spatial axis, in voxels.

    Returns:
        In (0, 1], 1 where the error is 0; same shape, without gradient.

    Raises:
        ValueError: As `masked_gaussian`.
    """
    return torch.exp(-masked_gaussian(error.detach().abs(), mask, sigma_voxels) / _positive(scale))


def soft_target_structured(error: Tensor, mask: Tensor, scale: Tensor | float, sigma_voxels: Sequence[float]) -> Tensor:
    """Return the target of the structured head, the attention map: ``exp( -|g2 * e| / s )``.

    The signed error is smoothed first, so that noise of zero mean cancels and
    only error that shares a sign with its surroundings remains.

    Args:
        error: ``e = y^ - y``, shape (N, 1, *spatial); detached here.
        mask: Valid voxels, bool, same shape.
        scale: ``s``, one number, see `attention.update_error_scale`; same unit as `error`.
        sigma_voxels: Of ``g2`` (4 mm), one for each spatial axis, in voxels.

    Returns:
        In (0, 1], 1 where the error averages to 0; same shape, without gradient.

    Raises:
        ValueError: As `masked_gaussian`.
    """
    return torch.exp(-masked_gaussian(error.detach(), mask, sigma_voxels).abs() / _positive(scale))


def _positive(scale: Tensor | float) -> Tensor:
    return torch.as_tensor(scale).clamp(min=SMALLEST_SCALE)


def confidence_loss(logits: Tensor, soft_target: Tensor, mask: Tensor) -> Tensor:
    """Teach a confidence head its soft target, on synthetic images only: ``< BCE(sigmoid(r), t) >_m``.

    Args:
        logits: ``r``, shape (N, 1, *spatial), for a prediction detached from the generator.
        soft_target: ``t`` in [0, 1], same shape.
        mask: Valid voxels, bool, same shape.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes differ.
    """
    _same_shape(logits, soft_target)
    entropy = functional.binary_cross_entropy_with_logits(logits, soft_target, reduction="none")
    return masked_mean(entropy, mask)


def focal_weight(error: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Weigh voxels by their own error (control C1): ``w ~ |e|^gamma``, mean 1.

    Args:
        error: ``e = y^ - y``, shape (N, 1, *spatial); detached here.
        mask: Valid voxels, bool, same shape.
        gamma: At least 0; 0 weighs every voxel 1.

    Returns:
        Same shape, without gradient, masked mean 1 over the batch.

    Raises:
        ValueError: If `gamma` is negative or shapes differ.

    Reference:
        After Lin et al., arXiv:1708.02002, applied to regression.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, not {gamma}")
    return unit_mean(error.detach().abs().pow(gamma), mask)


def top_k_weight(error: Tensor, mask: Tensor, fraction: float, samples: int | None = None) -> Tensor:
    """Weigh only the worst voxels of the batch (control C2), mean 1.

    Args:
        error: ``e = y^ - y``, shape (N, 1, *spatial); detached here.
        mask: Valid voxels, bool, same shape.
        fraction: Share of the batch's valid voxels that count, in (0, 1]; at least one voxel does, and those whose
            errors equal the least that counts.
        samples: Of all processes; those of this one by default.

    Returns:
        Same shape, without gradient: 0 or one value inside the mask, masked mean 1 over the batch.

    Raises:
        ValueError: If `fraction` is out of range or shapes differ.

    Reference:
        Shrivastava, Gupta, Girshick, arXiv:1604.03540 (online hard example mining), voxel by voxel.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    _same_shape(error, mask)
    size = torch.where(mask, error.detach().abs(), -1)
    whole = ranks.gather(size, len(size) if samples is None else samples).flatten()
    valid = (whole >= 0).sum()
    count = (fraction * exact(valid)).round().clamp(min=1)
    largest = whole.topk(max(1, round(fraction * whole.numel()))).values
    last = largest.gather(0, (count.long() - 1).view(1).clamp(max=len(largest) - 1))
    return unit_mean((size >= last).to(size.dtype), mask)


def _mean(a: Tensor, mask: Tensor | None) -> Tensor:
    return a.mean() if mask is None else masked_mean(a, mask)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
