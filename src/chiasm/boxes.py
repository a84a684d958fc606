"""Boxes of voxels, and the types of arrays that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Range = tuple[float, float]
Spacing = tuple[float, float, float]
Box = tuple[slice, slice, slice]


def same_shape(*arrays: NDArray[Any]) -> None:
    """Refuse arrays of different shapes, which numpy might broadcast.

    Raises:
        ValueError: If they differ, or are not three-dimensional.
    """
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or len(arrays[0].shape) != 3:
        raise ValueError(f"arrays must share one shape (I, J, K), not {sorted(shapes)}")


def grown(box: Box, reach: float, spacing: Sequence[float], shape: Sequence[int]) -> Box:
    """Return a box that reaches further by `reach` on every side, within a volume of `shape`."""
    i, j, k = (
        slice(max(s.start - grow, 0), min(s.stop + grow, size))
        for s, grow, size in zip(box, (int(np.ceil(reach / step)) for step in spacing), shape)
    )
    return i, j, k


def within(inner: Box, outer: Box) -> Box:
    """Return an inner box as seen from the corner of an outer one."""
    i, j, k = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer))
    return i, j, k


def box_of(mask: Mask) -> Box:
    """Return the smallest box around a mask.

    Raises:
        ValueError: If the mask is empty.
    """
    found = []
    for axis in range(3):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not inside.size:
            raise ValueError("an empty mask has no box")
        found.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return found[0], found[1], found[2]


def ends(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return views of all voxels but the last, and of all but the first, along an axis."""
    before = tuple(slice(None, -1) if other == axis else slice(None) for other in range(3))
    after = tuple(slice(1, None) if other == axis else slice(None) for other in range(3))
    return array[before], array[after]
