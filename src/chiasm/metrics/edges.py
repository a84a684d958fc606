"""Edges: gradients of both images, sharpness, and the voxels near an edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Image, Mask, Spacing, box_of, ends, grown
from chiasm.metrics.voxelwise import total

BITS = 16  # regions that are separated in one pass


class Gradients(NamedTuple):
    """The comparison of edges, by differences between neighbours that both lie inside the mask.

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
    return _gradients(count, of_error, of_prediction, of_target)


class Neighbours(NamedTuple):
    """Pairs of neighbours along one axis that both lie inside a mask, sorted by the regions that hold both.

    Attributes:
        axis: Along which they are neighbours.
        before: Of each pair the first, as its place among the mask's voxels.
        after: The second.
        parts: Where the pairs of each region lie in `before` and `after`.
    """

    axis: int
    before: NDArray[np.int32]
    after: NDArray[np.int32]
    parts: Mapping[str, tuple[slice, ...]]

    def steps(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Return the absolute difference of each pair, from the values of the mask's voxels."""
        found = values.take(self.after, mode="clip").astype(np.float32, copy=False)  # clipping is faster than checking
        found -= values.take(self.before, mode="clip")
        return np.abs(found, out=found)


def _neighbours_along(
    axis: int, mask: Mask, places: NDArray[np.int32], members: NDArray[np.uint16], names: Sequence[str]
) -> Neighbours:
    """List pairs of neighbours along an axis; a pair is a region's where both its voxels are."""
    inside = ends(mask, axis)
    both = inside[0] & inside[1]
    before, after = (end[both] for end in ends(places, axis))
    shared = members[before] & members[after]
    order = np.argsort(shared, kind="stable")
    shared = shared[order]
    starts = np.flatnonzero(np.r_[True, shared[1:] != shared[:-1]][: len(shared)]).tolist()
    groups = [slice(*ends_of) for ends_of in zip(starts, [*starts[1:], len(shared)])]
    parts = {name: tuple(g for g in groups if int(shared[g.start]) >> bit & 1) for bit, name in enumerate(names)}
    return Neighbours(axis, before[order], after[order], parts)


class ComparedSteps(NamedTuple):
    """Steps between neighbours of a prediction beside those of the target.

    Attributes:
        gradients: Of every region; each equals `gradients` of that region alone.
        ratios: Along each axis, the mean absolute step as a share of the target's; NaN without steps.  1 is as in the
            real image; more than 1 shows jumps between slices, less than 1 an image that is too smooth.
    """

    gradients: dict[str, Gradients]
    ratios: tuple[float, float, float]


def compare_steps(
    predictions: Sequence[NDArray[Any]],
    target: NDArray[Any],
    mask: Mask,
    regions: Mapping[str, NDArray[np.int32] | slice],
    spacing_mm: Spacing,
) -> list[ComparedSteps]:
    """Compare absolute differences between neighbours in every region, for all predictions of a target at once.

    Args:
        predictions: Values of the mask's voxels, shape (n,) each.
        target: Likewise.
        mask: Shape (I, J, K); no voxel outside it is read.
        regions: Of each region, the places of its voxels among those of the mask.
        spacing_mm: Between voxels.
    """
    names = list(regions)
    sums = [{name: np.zeros(4) for name in names} for _ in predictions]  # pairs, error, prediction, target
    ratios: list[list[float]] = [[] for _ in predictions]
    places = np.zeros(mask.shape, np.int32)
    places[mask] = np.arange(len(target))
    for some in (names[start : start + BITS] for start in range(0, len(names), BITS)):
        members = np.zeros(len(target), np.uint16)  # a bit for each region
        for bit, name in enumerate(some):
            members[regions[name]] |= np.uint16(1 << bit)
        for axis in range(3):
            along = _neighbours_along(axis, mask, places, members, some)
            steep_y = along.steps(target)
            for prediction, its, ratio in zip(predictions, sums, ratios):
                steep_x = along.steps(prediction)
                ratio.append(_ratio(steep_x, steep_y))
                _add_steps(its, steep_x, steep_y, along, spacing_mm[axis])
            del along, steep_x, steep_y  # before the pairs of the next axis are listed
    return [
        ComparedSteps({name: _gradients(*sum_.tolist()) for name, sum_ in its.items()}, (i, j, k))
        for its, (i, j, k, *_) in zip(sums, ratios)
    ]


def _add_steps(
    sums: Mapping[str, NDArray[np.float64]],
    steep_x: NDArray[np.float32],
    steep_y: NDArray[np.float32],
    along: Neighbours,
    step_mm: float,
) -> None:
    """Add the pairs of an axis to the sums of the regions that hold them."""
    error = np.subtract(steep_x, steep_y)
    np.abs(error, out=error)
    totals: dict[int, list[float]] = {}  # of each part, which several regions may share
    for name, part in ((name, part) for name, parts in along.parts.items() for part in parts):
        if part.start not in totals:
            each = (total(steep[part]) / step_mm for steep in (error, steep_x, steep_y))
            totals[part.start] = [part.stop - part.start, *each]
        sums[name][...] += totals[part.start]


def _ratio(steep_x: NDArray[np.float32], steep_y: NDArray[np.float32]) -> float:
    made, real = total(steep_x), total(steep_y)
    return made / real if real > 0 else nan


def _gradients(pairs: float, error: float, prediction: float, target: float) -> Gradients:
    """Turn sums over pairs of neighbours into means."""
    return Gradients(error / pairs if pairs else nan, prediction / target if target > 0 else nan)


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
        onto = ends(squared, axis)[0]
        for plane in range(len(onto)):  # plane by plane: an image may be large
            onto[plane] += np.where(a[plane] & b[plane], (after[plane] - before[plane]) / step, 0) ** 2
    edges[box] = inside & (squared > 0) & (squared >= np.quantile(squared[inside], 1 - share))
    return edges
