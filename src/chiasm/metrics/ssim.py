"""Structural similarity: a map of SSIM, its mean inside a mask, and MS-SSIM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from math import nan
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask, box_of, ends, grown
from chiasm.metrics.voxelwise import check_range, mean_or_nan

GAUSSIAN_RADIUS, GAUSSIAN_SIGMA = 5, 1.5  # the 11-voxel window of Wang et al. 2004
UNIFORM_RADIUS = 3  # the 7-voxel window that scikit-image takes by default
C1, C2 = 0.01**2, 0.03**2  # of the formula, L = 1
BLOCK = 32  # voxels a side, filtered at once: small enough for the cache, large enough for the matrix product
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, Wang et al. 2003
SMALLEST_MULTISCALE = 97  # voxels a side; smaller volumes are padded with their edges


def ssim_map(
    prediction: Image,
    target: Image,
    mask: Mask,
    data_range: float,
    *,
    window: Literal["gaussian", "uniform"] = "gaussian",
    axes: Sequence[int] = (0, 1, 2),
    exponent: float | None = None,
) -> NDArray[np.float32]:
    """Return the structural similarity of the surroundings of each voxel of the mask.

    Windows reach beyond the mask and are mirrored at the volume's border:
    inside the mask the values equal scikit-image's full map.  Blocks without a
    voxel of the mask, or where both images are equal, are not computed; each
    other block is filtered along one axis after the other by a product with a
    small band matrix.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Where the map is wanted.
        data_range: L of the formula, in the images' unit.
        window: "gaussian": 11 voxels, sigma 1.5, population covariance;
            "uniform": 7 voxels, sample covariance.
        axes: Along which the window extends; (0, 1) compares slices.
        exponent: Of luminance, contrast and structure, each cut off at 0, as a
            scale of MS-SSIM needs them; None for the plain product.

    Returns:
        Values of at most 1, float32, NaN outside the mask.

    Raises:
        ValueError: If `data_range` is not positive.

    Reference:
        Wang et al., IEEE Trans. Image Process. 13 (2004), eq. 13, K1 = 0.01, K2 = 0.03.
    """
    weights, covariance = _window(window, len(axes))
    scale = 1 / check_range(data_range)
    radii = [len(weights) // 2 if axis in axes else 0 for axis in range(3)]
    band = _band(weights)
    found = np.full_like(mask, nan, np.float32)  # laid out as the mask: no image is walked through across its lines
    for block in _blocks(mask):
        x, y = (_around(image, block, radii) for image in (prediction, target))
        if np.array_equal(x, y):  # as in an empty background
            np.copyto(found[block], 1, where=mask[block])
            continue
        centre = float(y.mean(dtype=np.float64))  # variances are differences of squares: exact near 0 only
        x, y = ((image - np.float32(centre)) * np.float32(scale) for image in (x, y))
        smooth = np.stack(_products(x, y, exponent))  # (4 or 5, I + 2r, J + 2r, K + 2r)
        for axis in sorted(axes):
            smooth = _filtered(smooth, band, axis + 1)
        similarity = _plain if exponent is None else partial(_by_parts, exponent=exponent)
        np.copyto(found[block], similarity(smooth, centre * scale, covariance), where=mask[block])
    return found


class CutOutMaps(NamedTuple):
    """SSIM of two images that are one constant outside a mask.

    Attributes:
        prediction: One image, with 0 outside the mask.
        target: The other, likewise.
        masked: With 0 outside the mask in both images; NaN outside it.
        whole: Of the images as they are; 1 where every window lies outside the mask.
    """

    prediction: NDArray[np.float32]
    target: NDArray[np.float32]
    masked: NDArray[np.float32]
    whole: NDArray[np.float32]


class _SmoothBlock(NamedTuple):
    """What of the target the windows of a block need.

    Attributes:
        box: Of the block.
        centre: What is taken away from both images before they are scaled.
        target: Means of y and yy over each window, L = 1, shape (2, I, J, K).
        share: Share of each window that lies outside the mask, shape (I, J, K); None where none does.
    """

    box: Box
    centre: float
    target: NDArray[np.float32]
    share: NDArray[np.float32] | None


class CutOutTarget:
    """A target whose background is one constant, filtered once for the SSIM of any number of predictions.

    A constant background adds to the moments of a window in proportion to its share of the window, so the moments
    with 0 there give those with another value too.
    """

    def __init__(
        self,
        target: Image,
        mask: Mask,
        background: float,
        data_range: float,
        *,
        window: Literal["gaussian", "uniform"] = "gaussian",
    ) -> None:
        """Filter a target.

        Args:
            target: Shape (I, J, K).
            mask: Where predictions may differ.
            background: Of target and predictions outside the mask.
            data_range: L of the formula, in the images' unit.
            window: As in `ssim_map`.

        Raises:
            ValueError: If `data_range` is not positive.
        """
        weights, self._covariance = _window(window, 3)
        self._scale = 1 / check_range(data_range)
        self._radii, self._band = [len(weights) // 2] * 3, _band(weights)
        self._target, self._mask, self._background = _blanked(target, mask), mask, background
        self._blocks = [self._smooth_block(block) for block in _blocks(mask, self._radii[0])]

    def compare(self, prediction: Image) -> CutOutMaps:
        """Return both maps of a prediction; each equals `ssim_map`.

        Args:
            prediction: Shape (I, J, K), the background outside the mask.
        """
        mask, scale, prediction = self._mask, self._scale, _blanked(prediction, self._mask)
        maps = np.full(mask.shape, nan, np.float32), np.ones(mask.shape, np.float32)
        found = CutOutMaps(prediction, self._target, *maps)
        for block in self._blocks:
            x, y = (self._scaled(image, block.box, block.centre) for image in (prediction, self._target))
            smooth = self._smoothed([x, x * y, x * x])
            smooth[2] += block.target[1]
            moments = np.stack([smooth[0], block.target[0], smooth[1], smooth[2]])
            centre, inside = block.centre * scale, mask[block.box]
            if block.share is None:
                found.whole[block.box] = found.masked[block.box] = _plain(moments, centre, self._covariance)
                continue
            found.whole[block.box] = _plain(self._as_it_is(moments, block), centre, self._covariance)
            np.copyto(found.masked[block.box], _plain(moments, centre, self._covariance), where=inside)
        return found

    def _smooth_block(self, box: Box) -> _SmoothBlock:
        """Filter the target and the mask around a block."""
        inside = _around(self._mask, box, self._radii)
        # variances are differences of squares: exact near 0 only
        centre = float(_around(self._target, box, self._radii).mean(dtype=np.float64))
        y = self._scaled(self._target, box, centre)
        if inside.all():
            return _SmoothBlock(box, centre, self._smoothed([y, y * y]), None)
        *target, share = self._smoothed([y, y * y, 1 - inside])
        return _SmoothBlock(box, centre, np.stack(target), share.copy())

    def _scaled(self, image: Image, box: Box, centre: float) -> NDArray[np.float32]:
        """Return an image around a block without its centre, L = 1."""
        part = _around(image, box, self._radii) - np.float32(centre)
        part *= np.float32(self._scale)
        return part

    def _smoothed(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Average images (I + 2r, J + 2r, K + 2r) over each window, shape (N, I, J, K)."""
        smooth = np.stack(images)
        for axis in (1, 2, 3):
            smooth = _filtered(smooth, self._band, axis)
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


def cut_out_ssim(
    prediction: Image,
    target: Image,
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
    return CutOutTarget(target, mask, background, data_range, window=window).compare(prediction)


def _blanked(image: Image, mask: Mask) -> NDArray[np.float32]:
    """Return an image with 0 outside a mask."""
    return np.where(mask, image, np.float32(0)).astype(np.float32, copy=False)


def _window(window: Literal["gaussian", "uniform"], axes: int) -> tuple[NDArray[np.float64], float]:
    """Return a window's weights along one axis, and the factor of its covariances for a number of axes."""
    if window == "gaussian":
        offsets = np.arange(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1)
        return np.exp(-0.5 * (offsets / GAUSSIAN_SIGMA) ** 2), 1.0
    weights = np.ones(2 * UNIFORM_RADIUS + 1)
    samples = len(weights) ** axes
    return weights, samples / (samples - 1)


def _products(x: Image, y: Image, exponent: float | None) -> list[Image]:
    """Return the products that windows average: x, y, xy and xx + yy; for MS-SSIM, xx and yy separately."""
    return [x, y, x * y, x * x + y * y] if exponent is None else [x, y, x * y, x * x, y * y]


def _plain(moments: NDArray[np.float32], centre: float, covariance: float) -> NDArray[np.float32]:
    """Return the SSIM of each window from its moments.

    Args:
        moments: Means of x, y, xy and xx + yy over each window, L = 1, shape (4, I, J, K); overwritten.
        centre: The value that was subtracted from x and y.
        covariance: Factor of variances and covariance.
    """
    vxy: NDArray[np.float32]
    ux, uy, vxy, variances = moments  # (I, J, K) each
    vxy -= ux * uy
    vxy *= 2 * covariance
    vxy += C2
    variances -= ux * ux
    variances -= uy * uy
    variances *= covariance
    variances += C2
    ux += centre
    uy += centre
    vxy *= 2 * (ux * uy) + C1
    variances *= ux * ux + uy * uy + C1
    likeness: NDArray[np.float32] = np.divide(vxy, variances, out=vxy)
    return likeness


def _by_parts(
    moments: NDArray[np.float32], centre: float, covariance: float, *, exponent: float
) -> NDArray[np.float32]:
    """Return the product of luminance, contrast and structure, each cut off at 0 and raised to a power.

    Args:
        moments: Means of x, y, xy, xx and yy over each window, L = 1, shape (5, I, J, K).
        centre: The value that was subtracted from x and y.
        covariance: Factor of variances and covariance.
        exponent: As in `ssim_map`.
    """
    ux, uy, xy, xx, yy = moments  # (I, J, K) each
    vx, vy, vxy = covariance * (xx - ux * ux), covariance * (yy - uy * uy), covariance * (xy - ux * uy)
    ux, uy = ux + centre, uy + centre
    sxy = np.sqrt(np.maximum(vx, 0)) * np.sqrt(np.maximum(vy, 0))
    luminance = (2 * ux * uy + C1) / (ux * ux + uy * uy + C1)
    contrast, structure = (2 * sxy + C2) / (vx + vy + C2), (vxy + C2 / 2) / (sxy + C2 / 2)
    parts = [np.maximum(part, 0) ** exponent for part in (luminance, contrast, structure)]
    combined: NDArray[np.float32] = np.prod(parts, axis=0)
    return combined


def ssim(
    prediction: Image,
    target: Image,
    mask: Mask,
    data_range: float,
    *,
    window: Literal["gaussian", "uniform"] = "gaussian",
) -> float:
    """Return the structural similarity averaged inside the mask; NaN for an empty mask.

    Equals scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, full=True)` averaged inside the mask.

    Raises:
        ValueError: If `data_range` is not positive.
    """
    return mean_or_nan(ssim_map(prediction, target, mask, data_range, window=window)[mask])


def ms_ssim(prediction: Image, target: Image, mask: Mask, data_range: float) -> float:
    """Return the masked multi-scale structural similarity of SynthRAD2025; NaN for an empty mask.

    Five scales, each half as fine; at each the product of luminance, contrast
    and structure raised to the scale's weight is averaged inside the mask.
    The window is uniform; luminance counts at every scale, as it does in the
    challenge's code; images must not be negative.

    Raises:
        ValueError: If `data_range` is not positive.

    Reference:
        Wang et al., Asilomar 2003, eq. 7; SynthRAD2025/evaluation, image_metrics.py.
    """
    if not mask.any():
        return nan
    short = [max(SMALLEST_MULTISCALE - side, 0) for side in mask.shape]
    padding = [(side // 2, side - side // 2) for side in short]
    prediction, target = np.pad(prediction, padding, mode="edge"), np.pad(target, padding, mode="edge")
    mask = np.pad(mask, padding, mode="edge")
    similarity = 1.0
    for weight in SCALE_WEIGHTS:
        inner = without_border(mask, UNIFORM_RADIUS)
        here = ssim_map(prediction, target, inner, data_range, window="uniform", exponent=weight)
        similarity *= float(np.clip(mean_or_nan(here[inner]), 0, 1))
        prediction, target, mask = _halved(prediction), _halved(target), mask[::2, ::2, ::2]
    return similarity


def window_box(mask: Mask) -> Box:
    """Return the box that holds the mask and every window around its voxels; one voxel for an empty mask."""
    if not mask.any():
        return slice(0, 1), slice(0, 1), slice(0, 1)
    return grown(box_of(mask), GAUSSIAN_RADIUS + 1, (1, 1, 1), mask.shape)


def _blocks(mask: Mask, radius: int = 0) -> Iterator[Box]:
    """Cut a volume into blocks, each trimmed to voxels that have one of the mask in reach; leave out those without.

    Args:
        mask: Shape (I, J, K).
        radius: How far a voxel reaches along each axis, in voxels.
    """
    if not mask.any():
        return
    one = (1.0, 1.0, 1.0)
    sides = [
        [slice(start, min(start + BLOCK, side.stop)) for start in range(side.start, side.stop, BLOCK)]
        for side in grown(box_of(mask), radius, one, mask.shape)
    ]
    for i, j, k in product(*sides):
        around = grown((i, j, k), radius, one, mask.shape)
        if (part := mask[around]).any():
            reached = [
                slice(max(s.start, a.start + p.start - radius), min(s.stop, a.start + p.stop + radius))
                for s, a, p in zip((i, j, k), around, box_of(part))
            ]
            yield reached[0], reached[1], reached[2]


def _around(image: Image | Mask, block: Box, radii: Sequence[int]) -> NDArray[np.float32]:
    """Return a block with its surroundings; beyond the border 2 1 0 continues as 0 1 2."""
    sides = [slice(max(s.start - r, 0), s.stop + r) for s, r in zip(block, radii)]
    part = image[tuple(sides)].astype(np.float32, copy=False)
    beyond = [(max(r - s.start, 0), max(s.stop + r - n, 0)) for s, r, n in zip(block, radii, image.shape)]
    return np.pad(part, beyond, mode="symmetric") if any(map(any, beyond)) else part


def _band(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix (BLOCK, BLOCK + 2r) whose product with a line is the line filtered."""
    band = np.zeros((BLOCK, BLOCK + len(weights) - 1), np.float32)
    for row in range(BLOCK):
        band[row, row : row + len(weights)] = weights / weights.sum()
    return band


def _filtered(stack: NDArray[np.float32], band: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Multiply a stack (N, I, J, K) with the band matrix along one of its last three axes."""
    length = stack.shape[axis]
    band = band[: length - (band.shape[1] - BLOCK), :length]
    shape = (*stack.shape[:axis], len(band), *stack.shape[axis + 1 :])
    if axis == stack.ndim - 1:
        return (stack.reshape(-1, length) @ band.T).reshape(shape)
    return (band @ stack.reshape(int(np.prod(stack.shape[:axis])), length, -1)).reshape(shape)


def without_border(mask: Mask, width: int, axes: Sequence[int] = (0, 1, 2)) -> Mask:
    """Return the mask without voxels that lie less than `width` from the volume's border along `axes`."""
    inner = np.zeros(mask.shape, bool)
    core = tuple(slice(width, size - width) if axis in axes else slice(None) for axis, size in enumerate(mask.shape))
    inner[core] = mask[core]
    return inner


def _halved(image: Image) -> Image:
    """Average each voxel with its seven neighbours at lower indices (0 beyond the border), then take every other."""
    for axis in range(3):
        before = np.zeros_like(image)
        ends(before, axis)[1][...] = ends(image, axis)[0]
        image = (image + before) / 2
        image = image[tuple(slice(None, None, 2) if other == axis else slice(None) for other in range(3))]
    return image
