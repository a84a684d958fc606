"""Whether two images of one head fit better if one is mirrored, as after a flip that is not in its header."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.smoothing import smooth

VOXELS = 64  # along the longest axis, when two volumes are compared with their mirror images
LOCAL = 6.0  # voxels of the thinned grid, SD: what changes more slowly is coil shading
BINS = 24
GAIN = 1.3  # a mirrored pair shares this many times the information, and
APART = 1.2  # this many times that of a pair mirrored along another axis, and
LEAST = 0.03  # nats more
FEWEST = 20  # voxels for each of the joint bins
FEWEST_BINS = 4


class Mirrored(NamedTuple):
    """A pair that shares more information if one of both is mirrored.

    Attributes:
        axis: Along which.
        information: Of the mirrored pair, in nats.
        as_stored: Of the pair as it is stored, of the same voxels.
    """

    axis: int
    information: float
    as_stored: float


def find_mirrored(a: NDArray[Any], b: NDArray[Any]) -> Mirrored | None:
    """Return the axis along which `b` must be mirrored to share clearly more information with `a`, or None.

    Mutual information, in nats, of a thinned grid; the margin is wide, since
    heads are nearly symmetric and true pairs are not perfectly registered.
    Compared are voxels that hold content of both images whether or not one is
    mirrored: where a mirrored head lies on background, that background's edge would show the other's edge.
    Of each image only local contrast counts: two coils that shade a head from opposite sides make images that
    share more information mirrored.  The images as they are must not say the contrary.
    """
    step = max(1, -(-max(a.shape) // VOXELS))
    thin = (slice(step // 2, None, step),) * 3
    thin_a, thin_b = a[thin], b[thin]
    content_a, content_b = thin_a != np.percentile(thin_a, 1), thin_b != np.percentile(thin_b, 1)
    local_a, local_b = _local_contrast(thin_a, content_a), _local_contrast(thin_b, content_b)
    content = content_a & content_b
    found = [_mirrored(local_a, local_b, content & np.flip(content, axis), axis) for axis in range(3)]
    best = max(found, key=lambda one: one.information - one.as_stored)
    clearly = best.information > max(GAIN * best.as_stored, best.as_stored + LEAST)
    others = max(one.information for one in found if one is not best)
    if not clearly or best.information <= APART * others:
        return None
    whole = _mirrored(thin_a, thin_b, content & np.flip(content, best.axis), best.axis)
    return best if whole.information > whole.as_stored else None


def _local_contrast(array: NDArray[Any], content: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how far each voxel lies above the content around it."""

    def around_each(values: NDArray[Any]) -> NDArray[np.float32]:
        return smooth(values.astype(np.float32, order="C"), (LOCAL,) * 3, reach=2.0)

    around = around_each(np.where(content, array, 0)) / np.maximum(around_each(content), 1e-3)
    return np.asarray(array - around, np.float32)


def _mirrored(a: NDArray[Any], b: NDArray[Any], compared: NDArray[np.bool_], axis: int) -> Mirrored:
    bins = min(BINS, math.isqrt(np.count_nonzero(compared) // FEWEST))
    if bins < FEWEST_BINS:
        return Mirrored(axis, 0.0, 0.0)
    binned_a, binned_b = _binned(a[compared], bins), np.zeros(b.shape, np.intp)
    binned_b[compared] = _binned(b[compared], bins)
    return Mirrored(
        axis,
        _information(binned_a, np.flip(binned_b, axis)[compared], bins),
        _information(binned_a, binned_b[compared], bins),
    )


def _binned(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Sort intensities into bins of equal width between 1 and 99 %."""
    low, high = np.percentile(values, (1, 99)).tolist()
    scaled = (values.ravel() - low) * (count / max(high - low, 1e-12))
    bins: NDArray[np.intp] = np.clip(scaled, 0, count - 1).astype(np.intp)
    return bins


def _information(a: NDArray[np.intp], b: NDArray[np.intp], bins: int) -> float:
    joint = np.bincount(a * bins + b, minlength=bins**2).reshape(bins, bins) / len(a)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())
