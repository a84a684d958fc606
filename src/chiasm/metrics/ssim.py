"""Structural similarity: a map of SSIM, its mean inside a mask, and MS-SSIM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, product
from math import nan
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask, box_of, ends, grown
from chiasm.metrics.voxelwise import check_range, mean_or_nan

GAUSSIAN_RADIUS, GAUSSIAN_SIGMA = 5, 1.5  # the 11-voxel window of Wang et al. 2004
UNIFORM_RADIUS = 3  # the 7-voxel window that scikit-image takes by default
C1, C2 = 0.01**2, 0.03**2  # of the formula, L = 1
BLOCK = 32  # voxels a side, filtered at once: small enough for the cache, large enough for the matrix product
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, Wang et al. 2003
ONE = (1.0, 1.0, 1.0)  # voxels
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
    weights, covariance = window_weights(window, len(axes))
    scale = 1 / check_range(data_range)
    radii = [len(weights) // 2 if axis in axes else 0 for axis in range(3)]
    band = band_matrix(weights)
    found = np.full_like(mask, nan, np.float32)  # laid out as the mask: no image is walked through across its lines
    for block in blocks(mask):
        x, y = (around_block(image, block, radii) for image in (prediction, target))
        if np.array_equal(x, y):  # as in an empty background
            np.copyto(found[block], 1, where=mask[block])
            continue
        centre = float(y.mean(dtype=np.float64))  # variances are differences of squares: exact near 0 only
        x, y = ((image - np.float32(centre)) * np.float32(scale) for image in (x, y))
        smooth = np.stack(_products(x, y, exponent))  # (4 or 5, I + 2r, J + 2r, K + 2r)
        for axis in sorted(axes):
            smooth = filtered(smooth, band, axis + 1)
        similarity = plain_ssim if exponent is None else partial(_by_parts, exponent=exponent)
        np.copyto(found[block], similarity(smooth, centre * scale, covariance), where=mask[block])
    return found


def window_weights(window: Literal["gaussian", "uniform"], axes: int) -> tuple[NDArray[np.float64], float]:
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


def plain_ssim(moments: NDArray[np.float32], centre: float, covariance: float) -> NDArray[np.float32]:
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


def blocks(mask: Mask, radius: int = 0) -> Iterator[Box]:
    """Cut a volume into blocks, each trimmed to voxels that have one of the mask in reach; leave out those without.

    Args:
        mask: Shape (I, J, K).
        radius: How far a voxel reaches along each axis, in voxels.
    """
    return chain.from_iterable(rows_of_blocks(mask, radius))


def rows_of_blocks(mask: Mask, radius: int = 0) -> Iterator[list[Box]]:
    """Yield the blocks of `blocks` in rows: those that share a stretch of the first axis, one row after the other."""
    if not mask.any():
        return
    along_i, *others = (
        [slice(start, min(start + BLOCK, side.stop)) for start in range(side.start, side.stop, BLOCK)]
        for side in grown(box_of(mask), radius, ONE, mask.shape)
    )
    for i in along_i:
        trimmed = (_trimmed((i, j, k), mask, radius) for j, k in product(*others))
        if row := [block for block in trimmed if block is not None]:
            yield row


def _trimmed(block: Box, mask: Mask, radius: int) -> Box | None:
    """Trim a block to voxels that have one of the mask in reach; None where no voxel has."""
    around = grown(block, radius, ONE, mask.shape)
    part = mask[around]
    if not part.any():
        return None
    i, j, k = (
        slice(max(s.start, a.start + p.start - radius), min(s.stop, a.start + p.stop + radius))
        for s, a, p in zip(block, around, box_of(part))
    )
    return i, j, k


def around_block(image: Image | Mask, block: Box, radii: Sequence[int]) -> NDArray[np.float32]:
    """Return a block with its surroundings; beyond the border 2 1 0 continues as 0 1 2."""
    sides = [slice(max(s.start - r, 0), s.stop + r) for s, r in zip(block, radii)]
    part = image[tuple(sides)].astype(np.float32, copy=False)
    beyond = [(max(r - s.start, 0), max(s.stop + r - n, 0)) for s, r, n in zip(block, radii, image.shape)]
    return np.pad(part, beyond, mode="symmetric") if any(map(any, beyond)) else part


def band_matrix(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix (BLOCK, BLOCK + 2r) whose product with a line is the line filtered."""
    band = np.zeros((BLOCK, BLOCK + len(weights) - 1), np.float32)
    for row in range(BLOCK):
        band[row, row : row + len(weights)] = weights / weights.sum()
    return band


def filtered(stack: NDArray[np.float32], band: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
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
