"""Where a volume is valid: the brain or body, found from the source alone.

Three rules: "given" (a file beside the images), "nonzero" (the volume was cut
out on a constant background, as in skull-stripped data) and "body" (brighter
than air).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Volume

Rule = Literal["given", "nonzero", "body"]

SMOOTHING_MM = 2.0  # Gaussian before the body's threshold
OTSU_BINS = 256


def constant_background(array: NDArray[Any]) -> float | None:
    """Return the value that at least half of the voxels on the six faces share, or None."""
    faces = np.concatenate([np.take(array, (0, -1), axis=axis).ravel() for axis in range(3)])
    values, counts = np.unique(faces, return_counts=True)
    return float(values[counts.argmax()]) if 2 * counts.max() >= faces.size else None


def suggest_rule(volume: Volume) -> Rule:
    """Tell how the mask of this volume is best found: "nonzero" or "body".

    A constant background alone does not make a cut-out brain: scans are also
    padded.  What differs from the background must be about as large as what is
    brighter than air.
    """
    background = constant_background(volume.array)
    if background is None:
        return "body"
    cut_out = np.count_nonzero(_nonzero(volume.array, background))
    return "nonzero" if cut_out <= 1.5 * np.count_nonzero(_body(volume)) else "body"


def find_mask(volume: Volume, rule: Rule, *, strictly: bool = False) -> tuple[NDArray[np.bool_], Rule]:
    """Find the valid voxels of a source volume.

    Args:
        volume: In RAS order (axial slices along K).
        rule: "nonzero": the largest connected part that differs from the
            background, holes filled.  "body": the largest connected part above
            Otsu's threshold of the smoothed volume, holes filled in each axial,
            coronal and sagittal slice.  "given": whichever of the two `suggest_rule` says.
        strictly: Whether to follow the rule whatever `suggest_rule` says.

    Returns:
        The mask, shape (I, J, K), and the rule that was used: "body" also
        where "nonzero" was asked for and `suggest_rule` finds nothing cut out,
        as in a padded scan of a whole head.

    Raises:
        VolumeError: If nothing is left, or "nonzero" is a must and the background is not constant.
    """
    used: Rule = rule if rule == "body" or (strictly and rule == "nonzero") else suggest_rule(volume)
    background = constant_background(volume.array) if used == "nonzero" else None
    if strictly and used == "nonzero" and background is None:
        raise VolumeError(
            "is not cut out on a constant background, as the mask rule nonzero needs",
            reason="mask-rule",
            hint="Choose data.mask=body, or leave the choice to the plan (data.mask=auto).",
        )
    mask = _body(volume) if background is None else _nonzero(volume.array, background)
    if not mask.any():
        raise VolumeError(
            "has no brain or body that could be told from the background",
            reason="empty-mask",
            hint="Give a mask beside the image.",
        )
    return mask, used


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
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


def otsu_threshold(values: NDArray[Any]) -> float:
    """Return the threshold that separates two classes best (Otsu 1979), of 256 bins between minimum and maximum.

    Where all values are the same, it is that value.
    """
    if values.min() == values.max():
        return float(values.min())
    counts, edges = np.histogram(values, bins=OTSU_BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    below, weighted = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    return float(centres[np.nanargmax(between[:-1])])


def _nonzero(array: NDArray[Any], background: float) -> NDArray[np.bool_]:
    from scipy import ndimage

    mask: NDArray[np.bool_] = array != background
    if not mask.any():
        return mask
    box = box_of(mask)
    mask[box] = ndimage.binary_fill_holes(_largest(mask[box]))
    return mask


def _body(volume: Volume) -> NDArray[np.bool_]:
    from scipy import ndimage

    array = volume.array.astype(np.float32)
    thin = array[tuple(slice(None, None, max(1, size // 64)) for size in array.shape)]
    np.clip(array, None, np.percentile(thin, 99.5), out=array)  # bright vessels and implants decide nothing
    if array.min() == array.max():
        return np.zeros(array.shape, bool)
    sigma = [SMOOTHING_MM / spacing for spacing in volume.geometry.spacing_mm]
    smooth = ndimage.gaussian_filter(array, sigma, truncate=2.0)
    mask: NDArray[np.bool_] = smooth > otsu_threshold(smooth)
    if not mask.any():
        return mask
    box = box_of(mask)
    inside = _largest(mask[box])
    for axis in (2, 1, 0, 2):  # a sinus that is open in one plane is closed in another
        for plane in np.moveaxis(inside, axis, 0):
            plane[...] = ndimage.binary_fill_holes(plane)
    mask[box] = inside
    return mask


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = parts == sizes.argmax()
    return largest
