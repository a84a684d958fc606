"""Slices of a volume to be rated: which ones show most, and how each is cut as a picture."""

from __future__ import annotations

from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of, grown
from chiasm.reports.drawing import png_address

Voxel = TypeVar("Voxel", bound=np.generic)

MARGIN = 4  # voxels around the mask in a picture


def choose_slices(mask: NDArray[np.bool_], labels: NDArray[np.bool_] | None, axis: int, count: int) -> list[int]:
    """Choose the slices with the largest labelled area, then some that are spread over the mask.

    Slices keep a distance of half an even spread as long as there are enough.

    Args:
        mask: Voxels that are shown, at least one, shape (I, J, K).
        labels: Labelled voxels, or None.
        axis: That slices are counted along.
        count: How many; fewer where the mask has fewer.

    Returns:
        Their indices, rising.
    """
    others = tuple({0, 1, 2} - {axis})
    area = np.count_nonzero(mask, axis=others)
    filled = np.flatnonzero(area).tolist()
    labelled = np.zeros_like(area) if labels is None else np.count_nonzero(labels & mask, axis=others)
    below = np.cumsum(area)
    spread = np.searchsorted(below, below[-1] * (np.arange(count) + 0.5) / count).tolist()
    ranked = sorted(np.flatnonzero(labelled).tolist(), key=lambda index: -int(labelled[index]))
    chosen: list[int] = []
    for apart, index in product((max(1, len(filled) // (2 * count)), 1), (*ranked, *spread, *filled)):
        if len(chosen) < count and all(abs(index - other) >= apart for other in chosen):
            chosen.append(index)
    return sorted(chosen)


def as_seen(plane: NDArray[Voxel]) -> NDArray[Voxel]:
    """Turn a slice as it is looked at: front or head up, the patient's right (or, sagittal, front) on the left.

    Args:
        plane: Its axes run right or front, and front or up, shape (across, up).

    Returns:
        Shape (rows, columns).
    """
    return plane[::-1, ::-1].T


def cut_slice(
    grey: NDArray[np.floating],
    mask: NDArray[np.bool_],
    axis: int,
    index: int,
    spacing_mm: tuple[float, float, float],
) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Cut a slice as a picture.

    Args:
        grey: 0 to 1, axes running right, front and up, shape (I, J, K).
        mask: Its box, with a margin, is what the picture shows.
        axis: That slices are counted along.
        index: Which one.
        spacing_mm: Of the voxels.

    Returns:
        Pixels, shape (rows, columns), and breadth and height in mm.
    """
    box = grown(box_of(mask), MARGIN, (1, 1, 1), mask.shape)
    plane = grey[box].take(index - box[axis].start, axis=axis)
    across, up = (spacing_mm[side] for side in range(3) if side != axis)
    pixels = np.round(as_seen(plane) * 255).astype(np.uint8)
    return pixels, (pixels.shape[1] * across, pixels.shape[0] * up)


def grey_address(pixels: NDArray[np.uint8]) -> str:
    """Return a picture in shades of grey, shape (rows, columns), as an address for a page."""
    opaque = np.full_like(pixels, 255)
    return png_address(np.stack([pixels, pixels, pixels, opaque], axis=-1))
