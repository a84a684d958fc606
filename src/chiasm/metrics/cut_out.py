"""SSIM of images that are one constant outside a mask, from the values of the mask's voxels alone.

A volume is never laid out whole: its windows are averaged over a few planes of the first axis at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask, box_of, grown
from chiasm.metrics.ssim import C1, C2, ONE, window_weights
from chiasm.metrics.voxelwise import check_range
from chiasm.smoothing import Stretch, stretches

Prepare = Callable[[NDArray[Any]], NDArray[np.float32]]
Plane = NDArray[np.float32]  # (J, K)
SIDE = 16  # voxels of a line that are averaged by one product: fewer operations a voxel than 32, as fast a product
PLANES = 8  # that are averaged at a time: more take more memory, fewer read the planes around them more often


class CutOutScores(NamedTuple):
    """SSIM of a prediction and a target that are one constant outside a mask.

    Attributes:
        similarity: At the voxels of the mask, with 0 outside it in both images, shape (n,), float32.
        total: Sum over the core, of the images as they are.
    """

    similarity: NDArray[np.float32]
    total: float


class CutOutMaps(NamedTuple):
    """SSIM of two images that are one constant outside a mask, shape (I, J, K) each.

    Attributes:
        masked: With 0 outside the mask in both images; NaN outside it.
        whole: Of the images as they are; 1 where every window lies outside the mask.
    """

    masked: NDArray[np.float32]
    whole: NDArray[np.float32]


class _Slab(NamedTuple):
    """Some planes of the first axis, with those that their windows reach, in the box that windows reach.

    Attributes:
        planes: Of the volume.
        around: Planes that windows reach.
        sides: The box along the other axes.
        along_i: The matrix that averages along the first axis, (planes, around).
        along_j: What averages along the second.
        along_k: What averages along the third.
    """

    planes: slice
    around: slice
    sides: tuple[slice, slice]
    along_i: NDArray[np.float32]
    along_j: Sequence[Stretch]
    along_k: Sequence[Stretch]

    @property
    def shape(self) -> tuple[int, int]:
        """Of a plane."""
        j, k = self.sides
        return j.stop - j.start, k.stop - k.start

    def average(self, images: Sequence[Image]) -> Iterator[NDArray[np.float32]]:
        """Yield the means over each window plane by plane, shape (N, J, K).

        Args:
            images: In the planes around, shape (A, J, K) each, C-contiguous.
        """
        some = np.empty((len(self.along_i), len(images), self.shape[0] * self.shape[1]), np.float32)
        for number, image in enumerate(images):
            np.matmul(self.along_i, image.reshape(len(image), -1), out=some[:, number])
        half = np.empty((len(images), *self.shape), np.float32)
        lines = half.reshape(-1, self.shape[1])
        for flat in some:
            plane = flat.reshape(half.shape)
            for there, among, matrix in self.along_j:
                np.matmul(matrix, plane[:, among], out=half[:, there])
            rows = plane.reshape(lines.shape)
            for there, among, matrix in self.along_k:
                np.matmul(lines[:, among], matrix.T, out=rows[:, there])
            yield plane


class _Outside(NamedTuple):
    """What one value outside the mask adds to the windows of a plane, shape (J, K) each; L = 1, without the centre.

    It adds the same to the covariance, doubled, as to the sum of both variances: ``2 b s (b (1 - s) - ux - uy)``, where
    ``b`` is the value, ``s`` the share of the window that lies outside, and ``ux`` and ``uy`` are the means with 0
    there.  So nothing large is subtracted from anything large.

    Attributes:
        factor: 2 b s, times the factor of covariances.
        rest: b (1 - s) - uy.
        level: b s + the centre, which makes a mean one of the image as it is.
        twice: The target's mean, doubled.
        square: The square of its mean, + C1.
    """

    factor: Plane
    rest: Plane
    level: Plane
    twice: Plane
    square: Plane


class _TargetPlane(NamedTuple):
    """What of the target the windows of a plane need, shape (J, K) each; L = 1, without the centre.

    Attributes:
        mean: With 0 outside the mask.
        variance: Likewise, + C2.
        masked: What 0 outside the mask adds.
        whole: What the background outside the mask adds.
    """

    mean: Plane
    variance: Plane
    masked: _Outside
    whole: _Outside


class _Target(NamedTuple):
    """The target in a slab.

    Attributes:
        inside: The mask in the planes around.
        image: The target there without its centre, L = 1; 0 outside the mask.
        centre: What is taken away from both images before they are scaled.
        planes: What its windows need, plane by plane.
    """

    inside: Mask
    image: NDArray[np.float32]
    centre: float
    planes: Sequence[_TargetPlane]


class CutOutTarget:
    """A target whose background is one constant, averaged once for the SSIM of several predictions.

    A constant background adds to the moments of a window in proportion to its share of the window, so the moments
    with 0 there give those with another value too.
    """

    def __init__(
        self,
        target: NDArray[np.float32],
        mask: Mask,
        background: float,
        data_range: float,
        *,
        window: Literal["gaussian", "uniform"] = "gaussian",
    ) -> None:
        """Remember a target.

        Args:
            target: Values of the mask's voxels, shape (n,).
            mask: Where predictions may differ, shape (I, J, K).
            background: Of target and predictions outside the mask.
            data_range: L of the formula, in the images' unit.
            window: As in `ssim_map`.

        Raises:
            ValueError: If `data_range` is not positive.
        """
        weights, self._covariance = window_weights(window, 3)
        self._weights = weights / weights.sum()
        self._scale = 1 / check_range(data_range)
        self._target, self._mask, self._background = target, mask, background
        self._ends = np.concatenate([[0], np.cumsum(np.count_nonzero(mask, axis=(1, 2)))]).tolist()

    def compare(self, predictions: Sequence[NDArray[Any]], core: Box, prepare: Prepare) -> list[CutOutScores]:
        """Compare predictions with the target; each is compared as alone.

        Args:
            predictions: Values of the mask's voxels, shape (n,) each.
            core: Voxels that `total` is taken over.
            prepare: Converts some values of a prediction to what the target was converted to.
        """
        found = [np.empty(len(self._target), np.float32) for _ in predictions]
        beyond = float(np.prod([max(side.stop - side.start, 0) for side in core]))  # windows that are equal: SSIM 1
        totals = [beyond] * len(predictions)
        for number, i, sides, maps in self._maps(predictions, prepare):
            found[number][self._places(i, i + 1)] = maps.masked[self._mask[i][sides]]
            if core[0].start <= i < core[0].stop:
                j, k = (slice(max(c.start - s.start, 0), max(c.stop - s.start, 0)) for c, s in zip(core[1:], sides))
                part = maps.whole[j, k]
                totals[number] += float(part.sum(dtype=np.float64)) - part.size
        return [CutOutScores(values, total) for values, total in zip(found, totals)]

    def lay_out_maps(self, prediction: NDArray[np.float32]) -> CutOutMaps:
        """Return both maps of a prediction; each equals `ssim_map`.

        Args:
            prediction: Values of the mask's voxels, shape (n,).
        """
        shape = self._mask.shape
        found = CutOutMaps(np.full(shape, nan, np.float32), np.ones(shape, np.float32))
        for _, i, sides, maps in self._maps([prediction], _unchanged):
            np.copyto(found.masked[i][sides], maps.masked, where=self._mask[i][sides])
            found.whole[i][sides] = maps.whole
        return found

    def _maps(
        self, predictions: Sequence[NDArray[Any]], prepare: Prepare
    ) -> Iterator[tuple[int, int, tuple[slice, slice], CutOutMaps]]:
        """Yield the number of a prediction, a plane, a box in it, and both maps there, shape (J, K)."""
        for slab in self._slabs():
            target = self._average_target(slab)
            for number, prediction in enumerate(predictions):
                x = self._laid_out(prediction, slab.around, target.inside, target.centre, prepare)
                means = slab.average([x, x * target.image, x * x])
                for i, its, theirs in zip(range(slab.planes.start, slab.planes.stop), means, target.planes):
                    yield number, i, slab.sides, self._compare(its, theirs)

    def _slabs(self) -> Iterator[_Slab]:
        """Cut the box that windows around the mask reach into slabs; leave out those that hold no such window."""
        if not self._mask.any():
            return
        radius = len(self._weights) // 2
        box = grown(box_of(self._mask), radius, ONE, self._mask.shape)
        start = box[0].start
        for there, among, matrix in stretches(box[0].stop - start, self._weights, PLANES):
            around = slice(start + among.start, start + among.stop)
            inside = self._mask[around]
            if inside.any():
                _, j, k = grown(box_of(inside), radius, ONE, inside.shape)
                along_j, along_k = (list(stretches(side.stop - side.start, self._weights, SIDE)) for side in (j, k))
                yield _Slab(slice(start + there.start, start + there.stop), around, (j, k), matrix, along_j, along_k)

    def _average_target(self, slab: _Slab) -> _Target:
        """Average the target and the mask of a slab."""
        around = slab.around
        inside = np.ascontiguousarray(self._mask[around][:, *slab.sides])
        values = self._target[self._places(around.start, around.stop)]
        centre = float(values.mean(dtype=np.float64))  # variances are differences of squares: exact near 0 only
        y = self._laid_out(self._target, around, inside, centre, _unchanged)
        planes = [self._target_plane(its, centre) for its in slab.average([y, y * y, inside.astype(np.float32)])]
        return _Target(inside, y, centre, planes)

    def _target_plane(self, means: NDArray[np.float32], centre: float) -> _TargetPlane:
        """Return what windows need from the means of y, yy and the mask."""
        y, yy, cover = means
        variance = np.float32(self._covariance) * (yy - y * y) + np.float32(C2)
        masked, whole = (self._outside(value - centre, y, cover, centre) for value in (0.0, self._background))
        return _TargetPlane(y, variance, masked, whole)

    def _outside(self, value: float, mean: Plane, cover: Plane, centre: float) -> _Outside:
        """Return what a value outside the mask adds; it and the centre are in the images' unit."""
        scaled = np.float32(value * self._scale)
        added = scaled * (1 - cover)
        level = added + np.float32(centre * self._scale)
        its = mean + level
        return _Outside(
            np.float32(2 * self._covariance) * added, scaled * cover - mean, level, 2 * its, its * its + np.float32(C1)
        )

    def _compare(self, its: NDArray[np.float32], target: _TargetPlane) -> CutOutMaps:
        """Return the maps of a plane from the means of x, xy and xx, which are overwritten."""
        x, both, variances = its  # (J, K) each
        both -= x * target.mean
        both *= np.float32(2 * self._covariance)
        both += np.float32(C2)
        variances -= x * x
        variances *= np.float32(self._covariance)
        variances += target.variance
        return CutOutMaps(*(_similarity(x, both, variances, outside) for outside in (target.masked, target.whole)))

    def _places(self, start: int, stop: int) -> slice:
        """Return the places of the mask's voxels in some planes of the first axis among all of the mask."""
        return slice(self._ends[start], self._ends[stop])

    def _laid_out(
        self, values: NDArray[Any], planes: slice, inside: Mask, centre: float, prepare: Prepare
    ) -> NDArray[np.float32]:
        """Lay the mask's voxels of some planes out, without a centre, L = 1; 0 elsewhere."""
        image = np.zeros(inside.shape, np.float32)
        here = prepare(values[self._places(planes.start, planes.stop)]) - np.float32(centre)
        here *= np.float32(self._scale)
        image[inside] = here
        return image


def _similarity(x: Plane, both: Plane, variances: Plane, outside: _Outside) -> Plane:
    """Return the SSIM of windows from their means, twice their covariance and the sum of their variances, + C2 each."""
    added = outside.rest - x
    added *= outside.factor
    mean = x + outside.level
    likeness = mean * outside.twice
    likeness += np.float32(C1)
    likeness *= both + added
    added += variances
    mean *= mean
    mean += outside.square
    mean *= added
    likeness /= mean
    return likeness


def _unchanged(values: NDArray[Any]) -> NDArray[np.float32]:
    return values


def cut_out_ssim(
    prediction: NDArray[Any],
    target: NDArray[Any],
    mask: Mask,
    background: float,
    data_range: float,
    *,
    window: Literal["gaussian", "uniform"] = "gaussian",
) -> CutOutMaps:
    """Return both maps of a pair whose background is `background` in both images, in one pass.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Where they may differ.
        background: Of both images outside the mask.
        data_range: L of the formula, in the images' unit.
        window: As in `ssim_map`.

    Raises:
        ValueError: If `data_range` is not positive.
    """
    x, y = (image[mask].astype(np.float32, copy=False) for image in (prediction, target))
    return CutOutTarget(y, mask, background, data_range, window=window).lay_out_maps(x)
