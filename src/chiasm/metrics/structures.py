"""How two segmentations of one structure agree: overlap, and the distance between their surfaces."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Mask, Spacing, box_of, same_shape

PERCENTILE = 95.0  # of the distances; the largest ones are those of single voxels


def dice(made: Mask, real: Mask) -> float:
    """Return twice the common volume over the sum of both volumes.

    Args:
        made: Where the structure is in one segmentation, shape (I, J, K).
        real: Where it is in the other, of the same shape.

    Returns:
        In [0, 1]; NaN where both are empty.

    Raises:
        ValueError: If the shapes differ.

    >>> dice(np.array([[[1, 1, 0]]], bool), np.array([[[0, 1, 1]]], bool))
    0.5
    """
    same_shape(made, real)
    both = int(np.count_nonzero(made)) + int(np.count_nonzero(real))
    return 2 * int(np.count_nonzero(made & real)) / both if both else math.nan


def hausdorff_95(made: Mask, real: Mask, spacing_mm: Spacing) -> float:
    """Return the distance within which 95 % of each surface lies from the other one, in mm.

    The surface of a structure are its voxels that touch another voxel, or the volume's border, by a face. Of both
    directions the larger distance counts.

    Args:
        made: Where the structure is in one segmentation, shape (I, J, K).
        real: Where it is in the other, of the same shape.
        spacing_mm: Distance of neighbouring voxels along each axis.

    Returns:
        Millimetres; NaN where either is empty.

    Raises:
        ValueError: If the shapes differ.
    """
    same_shape(made, real)
    if not made.any() or not real.any():
        return math.nan
    box = box_of(made | real)
    surfaces = [_surface(np.ascontiguousarray(mask[box])) for mask in (made, real)]
    pairs = (surfaces, surfaces[::-1])
    return max(float(np.percentile(_distances_mm(one, other, spacing_mm), PERCENTILE)) for one, other in pairs)


def _surface(mask: Mask) -> Mask:
    from scipy import ndimage

    return np.asarray(mask & ~ndimage.binary_erosion(mask), bool)


def _distances_mm(surface: Mask, other: Mask, spacing_mm: Spacing) -> NDArray[np.float64]:
    """Return the distance of each voxel of a surface from the nearest one of another, shape (n,)."""
    from scipy import ndimage

    away = ndimage.distance_transform_edt(~other, sampling=spacing_mm)
    distances: NDArray[np.float64] = away[surface]
    return distances
