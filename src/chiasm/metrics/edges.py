"""Edges: gradients of both images, sharpness, and the voxels near an edge."""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import numpy as np

from chiasm.boxes import Image, Mask, Spacing, box_of, ends, grown


class Gradients(NamedTuple):
    """How edges compare, from differences of neighbours that both lie inside the mask.

    Attributes:
        error: Mean of ||d prediction| - |d target||, per mm.
        sharpness: Mean |d prediction| over mean |d target|: below 1 is blurred.
    """

    error: float
    sharpness: float


def gradients(prediction: Image, target: Image, mask: Mask, spacing_mm: Spacing) -> Gradients:
    """Compare absolute differences between neighbours along the three axes; no voxel outside the mask is read.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count; a difference counts where both its ends do.
        spacing_mm: Between voxels along I, J and K.
    """
    count, of_error, of_prediction, of_target = 0, 0.0, 0.0, 0.0
    for axis, step in enumerate(spacing_mm):
        both = ends(mask, axis)
        valid = both[0] & both[1]
        steep_x, steep_y = (
            np.where(valid, np.abs(np.subtract(after, before, dtype=np.float32)), 0)
            for before, after in (ends(prediction, axis), ends(target, axis))
        )
        count += int(np.count_nonzero(valid))
        of_prediction += float(steep_x.sum(dtype=np.float64)) / step
        of_target += float(steep_y.sum(dtype=np.float64)) / step
        of_error += float(np.abs(steep_x - steep_y).sum(dtype=np.float64)) / step
    return Gradients(of_error / count if count else nan, of_prediction / of_target if of_target > 0 else nan)


def gradient_error(prediction: Image, target: Image, mask: Mask, spacing_mm: Spacing) -> float:
    """Return the mean difference between the images' absolute gradients, per mm; see `gradients`."""
    return gradients(prediction, target, mask, spacing_mm).error


def sharpness(prediction: Image, target: Image, mask: Mask, spacing_mm: Spacing) -> float:
    """Return the mean absolute gradient of the prediction over the target's; see `gradients`."""
    return gradients(prediction, target, mask, spacing_mm).sharpness


def edge_band(region: Mask, width_mm: float, spacing_mm: Spacing) -> Mask:
    """Return the voxels on either side of a region's surface.

    Args:
        region: Shape (I, J, K).
        width_mm: Of the whole band: voxels within half of it of a voxel of the other side.
        spacing_mm: Between voxels.
    """
    from scipy.ndimage import distance_transform_edt

    band = np.zeros(region.shape, bool)
    if not region.any():
        return band
    box = grown(box_of(region), width_mm / 2 + max(spacing_mm), spacing_mm, region.shape)
    here = region[box]
    near = np.zeros(here.shape, bool)
    for side in (here, ~here):
        if not side.all():
            near |= side & (distance_transform_edt(side, sampling=spacing_mm) <= width_mm / 2)
    band[box] = near
    return band


def edge_voxels(target: Image, mask: Mask, spacing_mm: Spacing, share: float = 0.1) -> Mask:
    """Return the `share` of the mask's voxels where the target is steepest; no voxel outside the mask is read."""
    edges = np.zeros(mask.shape, bool)
    if not mask.any():
        return edges
    box = box_of(mask)
    image, inside = target[box], mask[box]
    squared = np.zeros(image.shape, np.float32)
    for axis, step in enumerate(spacing_mm):
        (before, after), (a, b) = ends(image, axis), ends(inside, axis)
        ends(squared, axis)[0][...] += np.where(a & b, (after - before) / step, 0) ** 2
    edges[box] = inside & (squared > 0) & (squared >= np.quantile(squared[inside], 1 - share))
    return edges
