"""SSIM of images that are one constant outside a mask, from the values of the mask's voxels alone.

A volume is never laid out whole: blocks are filtered row by row along the first axis, all images of a row together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask
from chiasm.metrics.ssim import around_block, band_matrix, filtered, plain_ssim, rows_of_blocks, window_weights
from chiasm.metrics.voxelwise import check_range

Prepare = Callable[[NDArray[Any]], NDArray[np.float32]]


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


class _SmoothBlock(NamedTuple):
    """What of the target the windows of a block need.

    Attributes:
        box: Of the block, in its row.
        y: The target around it without its centre, L = 1.
        centre: What is taken away from both images before they are scaled.
        target: Means of y and yy over each window, L = 1, shape (2, I, J, K).
        inside: The mask's voxels.
        share: Share of each window that lies outside the mask, shape (I, J, K); None where none does.
    """

    box: Box
    y: NDArray[np.float32]
    centre: float
    target: NDArray[np.float32]
    inside: Mask
    share: NDArray[np.float32] | None


class _RowOfBlocks(NamedTuple):
    """A stretch of the first axis that holds a row of blocks: of blocks, and with the windows around them."""

    blocks: slice
    around: slice


class CutOutTarget:
    """A target whose background is one constant, filtered once for the SSIM of several predictions.

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
        self._scale = 1 / check_range(data_range)
        self._radii, self._band = [len(weights) // 2] * 3, band_matrix(weights)
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
        totals = np.zeros(len(predictions))
        counted = 0
        for row, number, maps in self._maps(predictions, prepare):
            found[number][self._places(row.blocks)] = maps.masked[self._mask[row.blocks]]
            start, stop = max(row.blocks.start, core[0].start), min(row.blocks.stop, core[0].stop)
            part = maps.whole[start - row.blocks.start : max(start, stop) - row.blocks.start, core[1], core[2]]
            totals[number] += part.sum(dtype=np.float64)
            counted += part.size if number == 0 else 0
        rest = int(np.prod([max(side.stop - side.start, 0) for side in core])) - counted
        return [CutOutScores(values, float(total) + rest) for values, total in zip(found, totals)]

    def lay_out_maps(self, prediction: NDArray[np.float32]) -> CutOutMaps:
        """Return both maps of a prediction; each equals `ssim_map`.

        Args:
            prediction: Values of the mask's voxels, shape (n,).
        """
        shape = self._mask.shape
        found = CutOutMaps(np.full(shape, nan, np.float32), np.ones(shape, np.float32))
        for row, _, maps in self._maps([prediction], _unchanged):
            found.masked[row.blocks], found.whole[row.blocks] = maps
        return found

    def _maps(
        self, predictions: Sequence[NDArray[Any]], prepare: Prepare
    ) -> Iterator[tuple[_RowOfBlocks, int, CutOutMaps]]:
        """Yield the maps of each row of blocks and of each prediction, by its number."""
        radius = self._radii[0]
        for blocks in rows_of_blocks(self._mask, radius):
            own = slice(min(i.start for i, _, _ in blocks), max(i.stop for i, _, _ in blocks))
            row = _RowOfBlocks(own, slice(max(own.start - radius, 0), min(own.stop + radius, len(self._mask))))
            target = self._laid_out(self._target, row.around, _unchanged)
            smooth = [self._smooth_block(_moved(block, row.around.start), row, target) for block in blocks]
            for number, prediction in enumerate(predictions):
                image = self._laid_out(prediction, row.around, prepare)
                yield row, number, self._compare_row(image, row, smooth)

    def _compare_row(self, prediction: Image, row: _RowOfBlocks, smooth: Sequence[_SmoothBlock]) -> CutOutMaps:
        """Return the maps of a row of blocks."""
        shape = (row.blocks.stop - row.blocks.start, *self._mask.shape[1:])
        found = CutOutMaps(np.full(shape, nan, np.float32), np.ones(shape, np.float32))
        for block in smooth:
            place = _moved(block.box, row.blocks.start - row.around.start)
            x = self._scaled(prediction, block.box, block.centre)
            here = self._smoothed([x, x * block.y, x * x])
            here[2] += block.target[1]
            moments = np.stack([here[0], block.target[0], here[1], here[2]])
            centre = block.centre * self._scale
            if block.share is None:
                found.whole[place] = found.masked[place] = plain_ssim(moments, centre, self._covariance)
                continue
            found.whole[place] = plain_ssim(self._as_it_is(moments, block), centre, self._covariance)
            np.copyto(found.masked[place], plain_ssim(moments, centre, self._covariance), where=block.inside)
        return found

    def _places(self, planes: slice) -> slice:
        """Return the places of the mask's voxels in some planes of the first axis among all of the mask."""
        return slice(self._ends[planes.start], self._ends[planes.stop])

    def _laid_out(self, values: NDArray[Any], planes: slice, prepare: Prepare) -> NDArray[np.float32]:
        """Lay the values of the mask's voxels out in some planes of the first axis, 0 elsewhere."""
        inside = self._mask[planes]
        image = np.zeros(inside.shape, np.float32)
        image[inside] = prepare(values[self._places(planes)])
        return image

    def _smooth_block(self, box: Box, row: _RowOfBlocks, target: Image) -> _SmoothBlock:
        """Filter the target and the mask around a block of a row."""
        mask = self._mask[row.around]
        inside = around_block(mask, box, self._radii)
        # variances are differences of squares: exact near 0 only
        centre = float(around_block(target, box, self._radii).mean(dtype=np.float64))
        y = self._scaled(target, box, centre)
        if inside.all():
            return _SmoothBlock(box, y, centre, self._smoothed([y, y * y]), mask[box], None)
        *its, share = self._smoothed([y, y * y, 1 - inside])
        return _SmoothBlock(box, y, centre, np.stack(its), mask[box], share.copy())

    def _scaled(self, image: Image, box: Box, centre: float) -> NDArray[np.float32]:
        """Return an image around a block without its centre, L = 1."""
        part = around_block(image, box, self._radii) - np.float32(centre)
        part *= np.float32(self._scale)
        return part

    def _smoothed(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Average images (I + 2r, J + 2r, K + 2r) over each window, shape (N, I, J, K)."""
        smooth = np.stack(images)
        for axis in (1, 2, 3):
            smooth = filtered(smooth, self._band, axis)
        return smooth

    def _as_it_is(self, moments: NDArray[np.float32], block: _SmoothBlock) -> NDArray[np.float32]:
        """Return the moments with the background in the place of 0 outside the mask."""
        assert block.share is not None
        background, scale = self._background, self._scale
        whole = moments.copy()
        whole[:2] += np.float32(background * scale) * block.share
        square = np.float32((background**2 - 2 * background * block.centre) * scale**2) * block.share
        whole[2] += square
        whole[3] += 2 * square
        return whole


def _unchanged(values: NDArray[Any]) -> NDArray[np.float32]:
    return values


def _moved(box: Box, start: int) -> Box:
    """Return a box as seen from a plane of the first axis."""
    return slice(box[0].start - start, box[0].stop - start), box[1], box[2]


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
