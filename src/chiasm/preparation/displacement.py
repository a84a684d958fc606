"""How far an image lies from another of its case, where both should lie on one another.

Normalised mutual information of two coarse views is followed uphill from where the images lie: of images that are
aligned it is largest there.  It needs no equal contrast, so T1 and T2, or CT and MR, can be compared.

Reference: C. Studholme et al., An overlap invariant entropy measure of 3D medical image alignment, Pattern
Recognition 32:71-86 (1999).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes import Volume

STEP_MM = 4.0  # about the side of a coarse voxel
FARTHEST = 6  # coarse voxels along an axis
MOST_BINS = 24
VOXELS_FOR_CELL = 10  # of the joint histogram, on average
LEAST_GAIN = 1.15  # in information beyond that of images that share none, for a displacement to be believed
LEAST_INFORMATION = 0.05  # beyond that; images of one head that lie on one another share 0.2 to 0.4

Shift = tuple[int, int, int]


def displacement_mm(fixed: Volume, moving: Volume) -> float:
    """Return about how far an image must be moved to lie on another; 0 where it lies there within two coarse voxels.

    A rotation alone is not found, and nothing beyond `FARTHEST` coarse voxels.

    Args:
        fixed: Any image, shape (I, J, K).
        moving: Another of the same patient, on the same grid.
    """
    spacing = fixed.geometry.spacing_mm
    sides = [min(max(1, round(STEP_MM / mm)), count) for mm, count in zip(spacing, fixed.array.shape, strict=True)]
    views = [_coarse(volume.array, sides) for volume in (fixed, moving)]
    bins = min(MOST_BINS, max(2, math.isqrt(views[0].size // VOXELS_FOR_CELL)))
    a, b = (_levels(view, bins) for view in views)
    shift, at_best, at_start = _maximise(a, b, bins)
    if sum(map(abs, shift)) < 2 or at_best < max(LEAST_INFORMATION, LEAST_GAIN * at_start):
        return 0.0
    return math.hypot(*(count * side * mm for count, side, mm in zip(shift, sides, spacing, strict=True)))


def _coarse(array: NDArray[np.generic], sides: Sequence[int]) -> NDArray[np.float32]:
    """Return means over blocks; voxels of incomplete blocks are left out."""
    kept = array[tuple(slice(count // side * side) for count, side in zip(array.shape, sides, strict=True))]
    for axis, side in enumerate(sides):
        shape = (*kept.shape[:axis], kept.shape[axis] // side, side, *kept.shape[axis + 1 :])
        kept = kept.reshape(shape).mean(axis + 1, dtype=np.float32)
    return np.asarray(kept, np.float32)


def _levels(view: NDArray[np.float32], bins: int) -> NDArray[np.intp]:
    """Return in which of some bins each value lies."""
    low, high = np.percentile(view, (1, 99))
    if low >= high:  # more than 98 % are of one value
        low, high = view.min(), view.max()
    scaled = (view - low) * (bins / (high - low)) if low < high else np.zeros_like(view)
    return np.clip(scaled, 0, bins - 1).astype(np.intp)


def _maximise(a: NDArray[np.intp], b: NDArray[np.intp], bins: int) -> tuple[Shift, float, float]:
    """Return the shift of b at which information is largest around, and the information there and without a shift."""

    @cache
    def information(shift: Shift) -> float:
        ours = tuple(slice(max(0, -by), count - max(0, by)) for by, count in zip(shift, a.shape, strict=True))
        theirs = tuple(slice(max(0, by), count - max(0, -by)) for by, count in zip(shift, a.shape, strict=True))
        return _shared(a[ours], b[theirs], bins)

    start: Shift = (0, 0, 0)
    best = start
    while (farther := max(_beside(best, a.shape), key=information, default=best)) != best:
        if information(farther) <= information(best):
            break
        best = farther
    return best, information(best), information(start)


def _beside(shift: Shift, shape: Sequence[int]) -> list[Shift]:
    """List the shifts by one more voxel along an axis, within reach."""
    reach = [min(FARTHEST, count // 3) for count in shape]
    moved = [
        (shift[0] + i, shift[1] + j, shift[2] + k)
        for i, j, k in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
    ]
    return [one for one in moved if all(abs(by) <= most for by, most in zip(one, reach, strict=True))]


def _shared(a: NDArray[np.intp], b: NDArray[np.intp], bins: int) -> float:
    """Return the normalised mutual information of two images of levels, less the 1 of images that share none."""
    joint = np.bincount((a * bins + b).ravel(), minlength=bins * bins).reshape(bins, bins) / a.size
    both = _entropy(joint.ravel())
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / both - 1 if both > 0 else 0.0


def _entropy(shares: NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return -float((some * np.log(some)).sum())
