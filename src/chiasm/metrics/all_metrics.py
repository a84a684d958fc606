"""Figures of merit on arrays with a mask, and the named conventions under which they are comparable.

Everything here is a pure function of arrays of shape (I, J, K).  A figure
over no voxels is NaN, never 0.  Where a figure needs a range it is given: no
range is taken from the images that are compared, but by the conventions that
are marked *scale-leaking*, which exist to reproduce the literature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import unknown
from chiasm.volumes.masks import box_of

Image = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Range = tuple[float, float]
Spacing = tuple[float, float, float]
Box = tuple[slice, slice, slice]

GAUSSIAN_RADIUS, GAUSSIAN_SIGMA = 5, 1.5  # the 11-voxel window of Wang et al. 2004
UNIFORM_RADIUS = 3  # the 7-voxel window that scikit-image takes by default
BLOCK = 48  # voxels a side, filtered at once: small enough for the cache, large enough for the matrix product
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, Wang et al. 2003
SMALLEST_MULTISCALE = 97  # voxels a side; smaller volumes are padded with their edges

RING_MM = 5.0  # how far the surroundings of a lesion reach
LEAST_LESION_ML, LEAST_LESION_VOXELS = 0.01, 3  # smaller components count in regions, but are no lesion of their own
LEAST_FALSE_ML = 0.1
FALSE_SIGMA_MM = 1.5
KEPT = 0.5  # share of its contrast that a lesion must keep to count as recalled
LEAST_CONTRAST = 0.5  # in SDs of the ring: below it a lesion is not visible in the target, and there is none to keep

#: Lesions by volume in ml: from, up to but not including.
SIZES_ML: Mapping[str, Range] = {"small": (0.0, 1.0), "medium": (1.0, 10.0), "large": (10.0, inf)}


# Error and likeness of voxels


def mae(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the mean absolute error inside the mask, in the images' unit; NaN for an empty mask."""
    return _mean(np.abs(_error(prediction, target, mask)))


def bias(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the mean of prediction minus target inside the mask; NaN for an empty mask."""
    return _mean(_error(prediction, target, mask))


def rmse(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the root of the mean squared error inside the mask; NaN for an empty mask."""
    return float(np.sqrt(_mean(_error(prediction, target, mask) ** 2)))


def nmae(prediction: Image, target: Image, mask: Mask, data_range: float) -> float:
    """Return the mean absolute error as a share of `data_range`, which must not come from these images."""
    return mae(prediction, target, mask) / _positive(data_range)


def psnr(prediction: Image, target: Image, mask: Mask, data_range: float) -> float:
    """Return the peak signal-to-noise ratio inside the mask in dB; infinite where nothing differs.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count.
        data_range: The peak, in the images' unit.  One prediction scores 29 to
            42 dB depending on it alone: figures with different ranges must not be compared.

    Raises:
        ValueError: If `data_range` is not positive.

    >>> psnr(np.ones((1, 1, 2)), np.zeros((1, 1, 2)), np.ones((1, 1, 2), bool), data_range=10.0)
    20.0
    """
    error = rmse(prediction, target, mask)
    with np.errstate(divide="ignore"):
        return float(20 * np.log10(np.float64(_positive(data_range)) / error))


def ncc(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the normalised cross-correlation (Pearson's r) inside the mask; NaN where either is constant."""
    return _pearson(prediction[mask], target[mask])


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
        both = _ends(mask, axis)
        valid = both[0] & both[1]
        steep_x, steep_y = (
            np.where(valid, np.abs(np.subtract(after, before, dtype=np.float32)), 0)
            for before, after in (_ends(prediction, axis), _ends(target, axis))
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


# Structural similarity


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
    voxel of the mask are not computed; each other block is filtered along one
    axis after the other by a product with a small band matrix.

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
    radius = GAUSSIAN_RADIUS if window == "gaussian" else UNIFORM_RADIUS
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / GAUSSIAN_SIGMA) ** 2) if window == "gaussian" else np.ones(len(offsets))
    samples = len(offsets) ** len(axes)
    covariance = 1.0 if window == "gaussian" else samples / (samples - 1)
    scale = 1 / _positive(data_range)
    radii = [radius if axis in axes else 0 for axis in range(3)]
    bands = [_band(weights) if axis in axes else None for axis in range(3)]
    found = np.full(mask.shape, nan, np.float32)
    for block in _blocks(mask):
        around = np.ix_(
            *(_mirrored(np.arange(s.start - r, s.stop + r), n) for s, r, n in zip(block, radii, mask.shape))
        )
        x, y = prediction[around].astype(np.float32), target[around].astype(np.float32)
        centre = float(y.mean(dtype=np.float64))  # variances are differences of squares: exact near 0 only
        x, y = (x - centre) * scale, (y - centre) * scale
        smooth = np.stack([x, y, x * x, y * y, x * y])  # (5, I + 2r, J + 2r, K + 2r)
        for axis, band in enumerate(bands, start=1):
            if band is not None:
                smooth = _filtered(smooth, band, axis)
        ux, uy, xx, yy, xy = smooth  # (I, J, K) each
        vx, vy, vxy = covariance * (xx - ux * ux), covariance * (yy - uy * uy), covariance * (xy - ux * uy)
        ux, uy = ux + centre * scale, uy + centre * scale
        c1, c2 = 0.01**2, 0.03**2
        luminance = (2 * ux * uy + c1) / (ux * ux + uy * uy + c1)
        if exponent is None:
            here = luminance * (2 * vxy + c2) / (vx + vy + c2)
        else:
            sxy = np.sqrt(np.maximum(vx, 0)) * np.sqrt(np.maximum(vy, 0))
            contrast, structure = (2 * sxy + c2) / (vx + vy + c2), (vxy + c2 / 2) / (sxy + c2 / 2)
            here = np.prod([np.maximum(part, 0) ** exponent for part in (luminance, contrast, structure)], axis=0)
        found[block] = np.where(mask[block], here, nan)
    return found


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
    return _mean(ssim_map(prediction, target, mask, data_range, window=window)[mask])


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
    product = 1.0
    for weight in SCALE_WEIGHTS:
        inner = _without_border(mask, UNIFORM_RADIUS)
        here = ssim_map(prediction, target, inner, data_range, window="uniform", exponent=weight)
        product *= float(np.clip(_mean(here[inner]), 0, 1))
        prediction, target, mask = _halved(prediction), _halved(target), mask[::2, ::2, ::2]
    return product


# Edges and lesions


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
        (before, after), (a, b) = _ends(image, axis), _ends(inside, axis)
        _ends(squared, axis)[0][...] += np.where(a & b, (after - before) / step, 0) ** 2
    edges[box] = inside & (squared > 0) & (squared >= np.quantile(squared[inside], 1 - share))
    return edges


@dataclass(frozen=True, eq=False)
class Lesion:
    """One connected component of the labels.

    Attributes:
        box: Where it lies in the volume.
        inside: Its voxels inside `box`.
        volume_ml: Its volume.
        size: A name of `SIZES_ML`.
    """

    box: Box
    inside: Mask
    volume_ml: float
    size: str

    def mask(self, shape: tuple[int, ...]) -> Mask:
        """Return the lesion's voxels in a volume of `shape`."""
        whole = np.zeros(shape, bool)
        whole[self.box] = self.inside
        return whole


class Components(NamedTuple):
    """Connected components of labelled voxels.

    Attributes:
        lesions: The largest first.
        too_small: How many others there are, too small to be called a lesion.
    """

    lesions: tuple[Lesion, ...]
    too_small: int


def lesion_components(labels: NDArray[Any], spacing_mm: Spacing) -> tuple[Lesion, ...]:
    """Return the lesions of `split_components`, the largest first."""
    return split_components(labels, spacing_mm).lesions


def split_components(
    labels: NDArray[Any],
    spacing_mm: Spacing,
    least_ml: float = LEAST_LESION_ML,
    least_voxels: int = LEAST_LESION_VOXELS,
) -> Components:
    """Split labelled voxels into lesions: any label, neighbours also across edges and corners.

    A lesion has a least volume, so that it is the same on a fine grid, and a
    least number of voxels, so that on a coarse one noise of a single voxel is
    none: the contrast of one voxel is no measurement.

    Args:
        labels: 0 is background, shape (I, J, K).
        spacing_mm: Between voxels.
        least_ml: Of a lesion, in mL.
        least_voxels: Of a lesion.

    Returns:
        Lesions, and how many components are smaller.
    """
    from scipy.ndimage import find_objects, label

    voxel_ml = float(np.prod(spacing_mm)) / 1000
    if not (labels != 0).any():
        return Components((), 0)
    around = box_of(labels != 0)
    numbers, count = label(labels[around] != 0, structure=np.ones((3, 3, 3)))
    lesions = []
    for number, box in enumerate(find_objects(numbers), start=1):
        inside = numbers[box] == number
        voxels = int(inside.sum())
        volume_ml = voxels * voxel_ml
        if voxels >= least_voxels and volume_ml >= least_ml:
            i, j, k = (slice(s.start + a.start, s.stop + a.start) for s, a in zip(box, around))
            size = next(name for name, (low, high) in SIZES_ML.items() if low <= volume_ml < high)
            lesions.append(Lesion((i, j, k), inside, volume_ml, size))
    return Components(tuple(sorted(lesions, key=lambda lesion: -lesion.volume_ml)), count - len(lesions))


@dataclass(frozen=True)
class LesionFigures:
    """What became of one lesion.

    Attributes:
        mae: Mean absolute error inside it.
        bias: Mean of prediction minus target inside it.
        contrast_target: Mean of the target inside it minus the mean in its ring.
        contrast_prediction: The same of the prediction.
        contrast_kept: The second over the first; NaN where the lesion is not
            visible in the target (contrast below half an SD of the ring).
    """

    mae: float
    bias: float
    contrast_target: float
    contrast_prediction: float
    contrast_kept: float


def lesion_figures(
    prediction: Image, target: Image, mask: Mask, labels: NDArray[Any], lesion: Lesion, spacing_mm: Spacing
) -> LesionFigures:
    """Measure a lesion against the ring of unlabelled voxels of the mask within `RING_MM` of it.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count, for the lesion as for its ring.
        labels: All labels, so that another lesion is no surroundings.
        lesion: From `lesion_components` on the same grid.
        spacing_mm: Between voxels.
    """
    from scipy.ndimage import distance_transform_edt

    box = grown(lesion.box, RING_MM, spacing_mm, mask.shape)
    inside = np.zeros(mask[box].shape, bool)
    inside[_within(lesion.box, box)] = lesion.inside
    ring = (distance_transform_edt(~inside, sampling=spacing_mm) <= RING_MM) & (labels[box] == 0) & mask[box]
    inside &= mask[box]
    x, y = prediction[box], target[box]
    real, made = _mean(y[inside]) - _mean(y[ring]), _mean(x[inside]) - _mean(x[ring])
    visible = abs(real) >= LEAST_CONTRAST * float(y[ring].std(dtype=np.float64)) > 0 if ring.any() else False
    return LesionFigures(mae(x, y, inside), bias(x, y, inside), real, made, made / real if visible else nan)


def recall(kept: Sequence[float]) -> float:
    """Return the share of visible lesions that keep at least half of their contrast; NaN where none is visible.

    >>> recall([0.9, 0.2, float("nan"), -0.6])
    0.3333333333333333
    """
    visible = [share for share in kept if not np.isnan(share)]
    return sum(share >= KEPT for share in visible) / len(visible) if visible else nan


def false_lesions(
    prediction: Image, target: Image, mask: Mask, labels: NDArray[Any], contrast: float, spacing_mm: Spacing
) -> int:
    """Count places away from the labels that differ from the target as a lesion would.

    Such a place is a connected component, of at least `LEAST_FALSE_ML` and
    inside the mask but more than `RING_MM` from any label, in which the error,
    smoothed by `FALSE_SIGMA_MM`, is at least half of a lesion's contrast, with
    its sign.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count.
        labels: 0 is background.
        contrast: What the case's lesions show in the target, such as the
            median of their `contrast_target`; not 0.
        spacing_mm: Between voxels.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter, label

    if not mask.any():
        return 0
    box = box_of(mask)
    error = np.where(mask[box], (prediction[box] - target[box]) * np.sign(contrast), 0).astype(np.float32)
    smooth = gaussian_filter(error, [FALSE_SIGMA_MM / step for step in spacing_mm], truncate=3)
    places = (smooth >= abs(contrast) * KEPT) & mask[box]
    if (labels != 0).any():
        around = grown(box_of(labels != 0), RING_MM, spacing_mm, mask.shape)
        far = np.ones(mask.shape, bool)
        far[around] = distance_transform_edt(labels[around] == 0, sampling=spacing_mm) > RING_MM
        places &= far[box]
    numbers, _ = label(places, structure=np.ones((3, 3, 3)))
    voxels = np.bincount(numbers.ravel())[1:]
    return int((voxels * np.prod(spacing_mm) / 1000 >= LEAST_FALSE_ML).sum())


# Whether a map knows where the error is


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    flat = values.ravel()
    order = np.argsort(flat)
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(flat)])
    sizes = np.diff(np.r_[starts, len(flat)])
    ranked = np.empty(len(flat))
    ranked[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return ranked


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return Spearman's rank correlation, ties averaged; NaN for fewer than two values or a constant."""
    return _pearson(ranks(a), ranks(b))


def auroc(score: NDArray[Any], positive: Mask) -> float:
    """Return the probability that a positive scores above a negative, ties counting half; NaN without either.

    Args:
        score: Any finite numbers.
        positive: What the score should find, same shape.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    many = int(np.count_nonzero(positive))
    few = positive.size - many
    if many == 0 or few == 0:
        return nan
    return (float(ranks(score)[positive.ravel()].sum()) - many * (many + 1) / 2) / (many * few)


def auroc_worst(reliability: NDArray[Any], error: NDArray[Any], share: float = 0.1) -> float:
    """Return how well the map finds the voxels with the largest errors.

    Args:
        reliability: Expected absolute error: larger is worse.
        error: True absolute error, same shape.
        share: Of the voxels, which count as the worst.
    """
    return auroc(reliability, error >= np.quantile(error, 1 - share)) if error.size else nan


class RiskCoverage(NamedTuple):
    """The error that remains when the voxels trusted least are left out.

    Attributes:
        coverage: Shares of the voxels that are kept, rising to 1.
        risk: Mean error of the voxels kept.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]


def risk_coverage(reliability: NDArray[Any], error: NDArray[Any]) -> RiskCoverage:
    """Keep voxels in the order of their expected error, the most trusted first.

    Voxels of one expected error count as their mean, so that the curve does
    not depend on the order of ties.

    Args:
        reliability: Expected absolute error, any shape, not empty.
        error: True absolute error, same shape.
    """
    order = np.argsort(reliability, axis=None, kind="stable")
    expected, true = reliability.ravel()[order], error.ravel()[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, expected[1:] != expected[:-1]])
    sizes = np.diff(np.r_[starts, len(true)])
    kept = np.arange(1, len(true) + 1)
    levelled = np.repeat(np.add.reduceat(true, starts) / sizes, sizes)
    return RiskCoverage(kept / len(true), np.cumsum(levelled) / kept)


def ausc(reliability: NDArray[Any], error: NDArray[Any]) -> float:
    """Return the area under the risk-coverage curve over the mean error: 1 for a map that knows nothing, else less."""
    mean = _mean(error)
    return _mean(risk_coverage(reliability, error).risk) / mean if error.size and mean > 0 else nan


def ause(reliability: NDArray[Any], error: NDArray[Any]) -> float:
    """Return how far `ausc` is above that of the true error itself: 0 for a perfect order."""
    return ausc(reliability, error) - ausc(error, error)


# Conventions


@dataclass(frozen=True)
class Convention:
    """How PSNR, SSIM and NMAE are taken; MAE, RMSE and the others do not depend on it.

    Attributes:
        text: One sentence for the foot of a table.
        range: Fixed range; None: the range of the training cohort, as given.
        masked: Whether voxels outside the mask are set to the range's low end in both images.
        clip: Whether both images are cut off at the range.
        rescale: What each image is divided by, or stretched to, on its own.
        peak: What PSNR is relative to; "range" but in scale-leaking conventions.
        slicewise: Whether images are rescaled and compared slice by slice
            along the last axis; slices whose target has no positive voxel are left out.
        window: Of SSIM.
        border: Voxels left out of SSIM along the volume's border.
        multiscale: Whether MS-SSIM is taken too.
        ssim_range: Range of SSIM where it is not the peak.
        scale_leaking: Whether a scale is taken from the images compared: never
            to be set beside figures of another convention.
    """

    text: str
    range: Range | None = None
    masked: bool = True
    clip: bool = False
    rescale: Literal["none", "own-maximum", "min-max"] = "none"
    peak: Literal["range", "either-maximum", "prediction-maximum"] = "range"
    slicewise: bool = False
    window: Literal["gaussian", "uniform"] = "gaussian"
    border: int = 0
    multiscale: bool = False
    ssim_range: float | None = None
    scale_leaking: bool = False


CONVENTIONS: Mapping[str, Convention] = {
    "chiasm": Convention("inside the mask; range fixed by the training cohort; SSIM 3D, Gaussian 11, sigma 1.5"),
    "synthrad2023": Convention(
        "inside the mask; clipped to -1024 to 3000; SSIM 3D, uniform 7, border of 3 left out",
        range=(-1024.0, 3000.0),
        clip=True,
        window="uniform",
        border=UNIFORM_RADIUS,
    ),
    "synthrad2025": Convention(
        "inside the mask; clipped to -1024 to 3071; masked MS-SSIM, uniform 7",
        range=(-1024.0, 3071.0),
        clip=True,
        window="uniform",
        border=UNIFORM_RADIUS,
        multiscale=True,
    ),
    "brats-brain": Convention(
        "inside the brain; clipped to the training cohort's range, whose width is the peak; SSIM 3D, Gaussian 11",
        clip=True,
    ),
    "nie-v1": Convention(
        "whole image; peak is the maximum of both images", masked=False, peak="either-maximum", scale_leaking=True
    ),
    "resvit": Convention(
        "whole slices, each divided by its own maximum; peak 1; SSIM 2D, uniform 7",
        masked=False,
        rescale="own-maximum",
        slicewise=True,
        window="uniform",
        border=UNIFORM_RADIUS,
        scale_leaking=True,
    ),
    "syndiff": Convention(
        "whole slices; peak is the maximum of the prediction; SSIM 2D, uniform 7",
        masked=False,
        peak="prediction-maximum",
        slicewise=True,
        window="uniform",
        border=UNIFORM_RADIUS,
        scale_leaking=True,
    ),
    "ptnet3d": Convention(
        "whole image, each stretched from its minimum to its maximum; peak 1; SSIM 3D, uniform 7, range 2",
        masked=False,
        rescale="min-max",
        window="uniform",
        border=UNIFORM_RADIUS,
        ssim_range=2.0,
        scale_leaking=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images under a convention, ready to be scored in any region.

    Attributes:
        prediction: Rescaled, clipped and masked as the convention says, from 0.
        target: Likewise.
        peak: Of PSNR; for slices shape (1, 1, K), else (1, 1, 1).
        similarity: SSIM map, NaN outside the mask and along the border left out.
        convention: Under which.
    """

    prediction: Image
    target: Image
    peak: NDArray[np.float64]
    similarity: NDArray[np.float32]
    convention: Convention


def find_convention(name: str) -> Convention:
    """Return the convention called `name`.

    Raises:
        RecipeError: If there is none.
    """
    if name not in CONVENTIONS:
        raise unknown("convention", name, CONVENTIONS)
    return CONVENTIONS[name]


def pair_up(prediction: Image, target: Image, mask: Mask, convention: Convention, data_range: Range) -> Pair:
    """Bring two images under a convention and compare their structure.

    Args:
        prediction: Shape (I, J, K), target units.
        target: Likewise.
        mask: Voxels that count; where the convention is masked, nothing outside changes anything.
        convention: From `find_convention`.
        data_range: The training cohort's range (low, high), target units.

    Raises:
        ValueError: If the range does not rise.
    """
    low, high = convention.range or data_range
    width = _positive(high - low)
    images = [image.astype(np.float32, copy=True) for image in (prediction, target)]
    axes = (0, 1) if convention.slicewise else (0, 1, 2)
    for image in images:
        if convention.rescale == "min-max":
            image -= image.min(axis=axes, keepdims=True)
        if convention.rescale != "none":
            most = image.max(axis=axes, keepdims=True)
            image /= np.where(most > 0, most, 1)
        if convention.clip:
            np.clip(image, low, high, out=image)
        if convention.masked:
            image[~mask] = low
        if convention.peak == "range" and convention.rescale == "none":
            image -= np.float32(low)  # SSIM's luminance is meant for images from 0
    x, y = images
    most_x, most_y = (image.max(axis=axes, keepdims=True) for image in images)
    peak = {
        "range": np.full_like(most_x, 1.0 if convention.rescale != "none" else width),
        "either-maximum": np.maximum(most_x, most_y),
        "prediction-maximum": most_x,
    }[convention.peak].astype(np.float64)
    wanted = _without_border(mask, convention.border, axes) if convention.border else mask
    given, span = (x, y), convention.ssim_range or float(peak.max()) or 1.0
    if convention.slicewise:  # each slice has its own peak, and one without target is none
        peak = np.where(most_y > 0, peak, 0)
        wanted = wanted & (most_y > 0)
        safe = np.where(peak > 0, peak, 1).astype(np.float32)
        given, span = (x / safe, y / safe), 1.0
    similarity = ssim_map(*given, wanted, span, window=convention.window, axes=axes)
    return Pair(
        x, y, np.broadcast_to(peak, (1, 1, mask.shape[2] if convention.slicewise else 1)), similarity, convention
    )


def crop(pair: Pair, box: Box) -> Pair:
    """Return the part of a pair that lies in `box`."""
    peak = pair.peak[:, :, box[2]] if pair.peak.shape[2] > 1 else pair.peak
    return replace(
        pair, prediction=pair.prediction[box], target=pair.target[box], peak=peak, similarity=pair.similarity[box]
    )


def likeness(pair: Pair, region: Mask) -> dict[str, float]:
    """Return "psnr" and "ssim" of a region; slice by slice, then averaged, where the convention says so.

    Raises:
        ValueError: If the region has another shape than the images.
    """
    if region.shape != pair.target.shape:
        raise ValueError(f"region of shape {region.shape} for images of shape {pair.target.shape}")
    if not region.any():
        return {"psnr": nan, "ssim": nan}
    box = box_of(region)
    here, part = region[box], crop(pair, box)
    axes = (0, 1) if pair.convention.slicewise else (0, 1, 2)
    count = here.sum(axis=axes, keepdims=True)
    squared = np.where(here, part.prediction - part.target, 0) ** 2
    scored = (count > 0) & (part.peak > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels = 10 * np.log10(part.peak**2 * count / squared.sum(axis=axes, keepdims=True, dtype=np.float64))
    values = part.similarity[here]
    return {"psnr": _mean(decibels[scored]), "ssim": _mean(values[~np.isnan(values)])}


def score(
    prediction: Image,
    target: Image,
    mask: Mask,
    convention: str,
    data_range: Range,
    spacing_mm: Spacing,
) -> dict[str, float]:
    """Return every figure of merit of a pair under a named convention.

    Args:
        prediction: Shape (I, J, K), target units.
        target: Likewise.
        mask: Voxels that count; conventions of whole images take all voxels for PSNR and SSIM.
        convention: A name of `CONVENTIONS`.
        data_range: The training cohort's range (low, high), target units;
            conventions with a range of their own ignore it.
        spacing_mm: Between voxels.

    Returns:
        "mae", "bias", "rmse" (target units), "nmae", "psnr" (dB), "ssim",
        "ncc", "gradient_error" (target units per mm), "sharpness"; "ms_ssim"
        where the convention has it.  NaN for an empty mask.

    Raises:
        RecipeError: If the convention is unknown.
        ValueError: If shapes differ or the range does not rise.
    """
    rules = find_convention(convention)
    same_shape(prediction, target, mask)
    low, high = rules.range or data_range
    counted = mask if rules.masked else np.ones(mask.shape, bool)
    box = window_box(counted)
    pair = pair_up(prediction[box], target[box], counted[box], rules, data_range)
    figures = plain_figures(prediction, target, mask, high - low, spacing_mm) | likeness(pair, counted[box])
    if rules.multiscale:
        figures["ms_ssim"] = multiscale_likeness(prediction, target, mask, rules)
    return figures


def plain_figures(
    prediction: Image, target: Image, region: Mask, data_range: float, spacing_mm: Spacing
) -> dict[str, float]:
    """Return the figures of merit of a region that need no convention but a range; NaN for an empty region."""
    box = box_of(region) if region.any() else (slice(0, 1),) * 3
    x, y, inside = prediction[box], target[box], region[box]
    error, sharp = gradients(x, y, inside, spacing_mm)
    values = x[inside], y[inside]
    figures = error_figures(*values, data_range)
    return figures | {
        "ncc": _pearson(*values),
        "gradient_error": error,
        "sharpness": sharp,
    }


def error_figures(prediction: Image, target: Image, data_range: float) -> dict[str, float]:
    """Return "mae", "bias", "rmse" and "nmae" of all the values given, of any shape; NaN for none.

    Raises:
        ValueError: If `data_range` is not positive.
    """
    error = _difference(prediction, target)
    absolute = _mean(np.abs(error))
    return {
        "mae": absolute,
        "bias": _mean(error),
        "rmse": float(np.sqrt(_mean(error**2))),
        "nmae": absolute / _positive(data_range),
    }


def multiscale_likeness(prediction: Image, target: Image, mask: Mask, convention: Convention) -> float:
    """Return `ms_ssim` of whole volumes after a convention's clipping and masking; its range is fixed.

    Raises:
        ValueError: If the convention has no range of its own.
    """
    if convention.range is None:
        raise ValueError("MS-SSIM is only defined for conventions with a fixed range")
    low, high = convention.range
    clipped = [np.where(mask, np.clip(image, low, high) - low, 0).astype(np.float32) for image in (prediction, target)]
    return ms_ssim(clipped[0], clipped[1], mask, high - low)


# Boxes, blocks and ranks


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


def window_box(mask: Mask) -> Box:
    """Return the box that holds the mask and every window around its voxels; one voxel for an empty mask."""
    if not mask.any():
        return slice(0, 1), slice(0, 1), slice(0, 1)
    return grown(box_of(mask), GAUSSIAN_RADIUS + 1, (1, 1, 1), mask.shape)


def _within(inner: Box, outer: Box) -> Box:
    i, j, k = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer))
    return i, j, k


def _blocks(mask: Mask) -> Iterator[Box]:
    """Cut the mask's box into blocks, and leave out those without a voxel of the mask."""
    if not mask.any():
        return
    box = box_of(mask)
    starts = [range(side.start, side.stop, BLOCK) for side in box]
    for i in starts[0]:
        for j in starts[1]:
            for k in starts[2]:
                ends = [min(start + BLOCK, side.stop) for start, side in zip((i, j, k), box)]
                block = slice(i, ends[0]), slice(j, ends[1]), slice(k, ends[2])
                if mask[block].any():
                    yield block


def _mirrored(indices: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Fold indices beyond the border back: 0 1 2 continues 2 1 0 to the right, and likewise to the left."""
    folded = indices % (2 * size)
    return np.where(folded >= size, 2 * size - 1 - folded, folded)


def _band(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix (BLOCK, BLOCK + 2r) whose product with a line is the line filtered."""
    band = np.zeros((BLOCK, BLOCK + len(weights) - 1), np.float32)
    for row in range(BLOCK):
        band[row, row : row + len(weights)] = weights / weights.sum()
    return band


def _filtered(stack: NDArray[np.float32], band: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Multiply a stack (5, I, J, K) with the band matrix along one of its last three axes."""
    length = stack.shape[axis]
    band = band[: length - (band.shape[1] - BLOCK), :length]
    shape = (*stack.shape[:axis], len(band), *stack.shape[axis + 1 :])
    if axis == stack.ndim - 1:
        return (stack.reshape(-1, length) @ band.T).reshape(shape)
    return (band @ stack.reshape(int(np.prod(stack.shape[:axis])), length, -1)).reshape(shape)


def _without_border(mask: Mask, width: int, axes: Sequence[int] = (0, 1, 2)) -> Mask:
    inner = np.zeros(mask.shape, bool)
    core = tuple(slice(width, size - width) if axis in axes else slice(None) for axis, size in enumerate(mask.shape))
    inner[core] = mask[core]
    return inner


def _halved(image: Image) -> Image:
    """Average each voxel with its seven neighbours at lower indices (0 beyond the border), then take every other."""
    for axis in range(3):
        before = np.zeros_like(image)
        _ends(before, axis)[1][...] = _ends(image, axis)[0]
        image = (image + before) / 2
        image = image[tuple(slice(None, None, 2) if other == axis else slice(None) for other in range(3))]
    return image


def _ends(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return views of all voxels but the last, and of all but the first, along an axis."""
    before = tuple(slice(None, -1) if other == axis else slice(None) for other in range(3))
    after = tuple(slice(1, None) if other == axis else slice(None) for other in range(3))
    return array[before], array[after]


def _error(prediction: Image, target: Image, mask: Mask) -> Image:
    return _difference(prediction[mask], target[mask])


def _difference(prediction: Image, target: Image) -> Image:
    """Subtract as floating-point numbers, whatever integers are given."""
    return np.subtract(prediction, target, dtype=np.result_type(prediction, target, np.float32))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else nan


def _positive(data_range: float) -> float:
    if not 0 < data_range < inf:
        raise ValueError(f"a data range must be positive and finite, not {data_range}")
    return data_range


def _pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.size < 2:
        return nan
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    a -= a.mean()
    b -= b.mean()
    spread = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / spread if spread > 0 else nan
