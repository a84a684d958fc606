"""Scores of arrays with a mask, and the named conventions under which they are comparable.

Everything here is a pure function of arrays of shape (I, J, K).  A score
over no voxels is NaN, never 0.  Where a score needs a range it is given: no
range is taken from the images that are compared, but by the conventions that
are marked *scale-leaking*, which exist to reproduce the literature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask, Range, Spacing, box_of, same_shape
from chiasm.errors import unknown
from chiasm.metrics.challenges import Challenge
from chiasm.metrics.cut_out import CutOutTarget
from chiasm.metrics.edges import Gradients, gradients
from chiasm.metrics.ssim import UNIFORM_RADIUS, ms_ssim, ssim_map, window_box, without_border
from chiasm.metrics.voxelwise import check_range, error_scores, mean_or_nan, pearson

Places = NDArray[np.int32] | slice  # of a region's voxels among those of the mask


@dataclass(frozen=True)
class Convention:
    """How PSNR, SSIM and NMAE are computed; MAE, RMSE and the others do not depend on it.

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
        challenge: Whose SSIM of tumour and healthy tissue is taken too, see `challenges.challenge_ssim`.
        scale_leaking: Whether a scale is taken from the images compared: never
            to be set beside scores of another convention.
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
    challenge: Challenge | None = None
    scale_leaking: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which images are rescaled and compared at once."""
        return (0, 1) if self.slicewise else (0, 1, 2)


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
    "brasyn2023": Convention(
        "as brats-brain; challenge_ssim: images stretched by their own percentiles 0.5 to 99.5, 0 outside tumour or "
        "healthy tissue, 3D, Gaussian 11",
        clip=True,
        challenge="brasyn",
    ),
    "brats-inpainting": Convention(
        "as brats-brain; challenge_ssim: images stretched by the target's percentiles 0.5 to 99.5, 0 outside tumour "
        "or healthy tissue, 2D across the first axis, Gaussian 11",
        clip=True,
        challenge="inpainting",
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
class ComparedImages:
    """Two images prepared by a convention, for scores in any region.

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


def pair_up(prediction: Image, target: Image, mask: Mask, convention: Convention, data_range: Range) -> ComparedImages:
    """Prepare two images by a convention and compare their structure.

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
    width = check_range(high - low)
    x, y = (_under_convention(image, mask, convention, (low, high)) for image in (prediction, target))
    peak, has_target = _peaks(x, y, convention, width)
    wanted = without_border(mask, convention.border, convention.axes) if convention.border else mask
    if convention.slicewise:  # each slice has its own peak, and one without target is none
        peak = np.where(has_target, peak, 0)
        safe = np.where(peak > 0, peak, 1).astype(np.float32)
        given, wanted, span = (x / safe, y / safe), wanted & has_target, 1.0
    else:
        given, span = (x, y), convention.ssim_range or float(peak.max()) or 1.0
    similarity = ssim_map(*given, wanted, span, window=convention.window, axes=convention.axes)
    slices = mask.shape[2] if convention.slicewise else 1
    return ComparedImages(x, y, np.broadcast_to(peak, (1, 1, slices)), similarity, convention)


class PairLikeness(NamedTuple):
    """The likeness of a prediction and a target that are one constant outside a mask.

    Attributes:
        regions: Region to "psnr" and "ssim".
        whole: The same of all voxels of the volume.
    """

    regions: dict[str, dict[str, float]]
    whole: dict[str, float]


class CutOutPairing:
    """A target under a convention that is one constant outside a mask; only values inside it are kept."""

    def __init__(
        self, target: NDArray[Any], mask: Mask, background: float, convention: Convention, data_range: Range
    ) -> None:
        """Prepare a target as `pair_up` does.

        Args:
            target: Values of the mask's voxels, shape (n,), target units.
            mask: Where predictions may differ, shape (I, J, K).
            background: Of target and predictions outside the mask.
            convention: A masked one from `find_convention`, whose peak is its range.
            data_range: The training cohort's range (low, high), target units.

        Raises:
            ValueError: If the range does not rise, or the convention is another.
        """
        if not convention.masked or convention.peak != "range" or convention.rescale != "none":
            raise ValueError("only a masked convention with a fixed peak leaves out the background")
        self._range = convention.range or data_range
        low, high = self._range
        self._peak = np.full(1, check_range(high - low))
        self._convention, self._mask = convention, mask
        self._target = self._prepared(target)
        outside = float(self._prepared(np.full(1, background, np.float32))[0])
        span = convention.ssim_range or float(self._peak.max())
        self._smoothed = CutOutTarget(self._target, mask, outside, span, window=convention.window)
        border = convention.border
        self._known = without_border(mask, border)[mask] if border else None

    def compare(
        self,
        predictions: Sequence[NDArray[Any]],
        places: Mapping[str, Places],
        box: Box,
        shape: Sequence[int],
    ) -> list[PairLikeness]:
        """Compare predictions with the target in every region, and with their background in the whole volume.

        Args:
            predictions: Values of the mask's voxels, shape (n,) each, target units.
            places: Of each region, the places of its voxels among those of the mask.
            box: Where the mask's grid lies in the volume, which is the background beyond it.
            shape: Of the volume.
        """
        border = self._convention.border
        ends = [(max(side.start, border), min(side.stop, n - border)) for side, n in zip(box, shape)]
        i, j, k = (slice(a - side.start, max(a, b) - side.start) for (a, b), side in zip(ends, box))
        scores = self._smoothed.compare(predictions, (i, j, k), self._prepared)
        voxels = math.prod(max(n - 2 * border, 0) for n in shape)
        beyond = voxels - math.prod(side.stop - side.start for side in (i, j, k))  # equal, so of SSIM 1
        found = []
        for values, its in zip(predictions, scores):
            squared, similarity = (self._prepared(values) - self._target) ** 2, its.similarity
            if self._known is not None:
                similarity = np.where(self._known, similarity, np.float32(math.nan))
            total, count = squared.sum(dtype=np.float64, keepdims=True), np.array([math.prod(shape)])
            whole = {
                "psnr": mean_or_nan(_decibels(total, count, self._peak)),
                "ssim": (its.total + beyond) / voxels if voxels else math.nan,
            }
            regions = {
                name: _likeness(squared[here], similarity[here], self._peak, has_border=self._known is not None)
                for name, here in places.items()
            }
            found.append(PairLikeness(regions, whole))
        return found

    def _prepared(self, values: NDArray[Any]) -> NDArray[np.float32]:
        return _under_convention(values, None, self._convention, self._range)


def _likeness(
    squared: NDArray[Any], similarity: NDArray[np.float32], peak: NDArray[np.float64], *, has_border: bool
) -> dict[str, float]:
    """Return "psnr" and "ssim" of a region from the squared errors and SSIM of its voxels, NaN along a border."""
    if has_border:
        similarity = similarity[~np.isnan(similarity)]
    total, count = squared.sum(dtype=np.float64, keepdims=True), np.array([squared.size])
    return {"psnr": mean_or_nan(_decibels(total, count, peak)), "ssim": mean_or_nan(similarity)}


def _under_convention(
    image: Image, mask: Mask | None, convention: Convention, data_range: Range
) -> NDArray[np.float32]:
    """Rescale, clip and mask an image as a convention says."""
    low, high = data_range
    image = image.astype(np.float32, copy=True)
    if convention.rescale == "min-max":
        image -= image.min(axis=convention.axes, keepdims=True)
    if convention.rescale != "none":
        most = image.max(axis=convention.axes, keepdims=True)
        image /= np.where(most > 0, most, 1)
    if convention.clip:
        np.clip(image, low, high, out=image)
    if convention.masked and mask is not None:
        image[~mask] = low
    if convention.peak == "range" and convention.rescale == "none":
        image -= np.float32(low)  # SSIM's luminance is meant for images from 0
    return image


def _peaks(
    x: NDArray[np.float32], y: NDArray[np.float32], convention: Convention, width: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return PSNR's peak, and whether the target has one; shape (1, 1, K) each for slices, else (1, 1, 1)."""
    most_x, most_y = (image.max(axis=convention.axes, keepdims=True) for image in (x, y))
    peaks = {
        "range": np.full_like(most_x, 1.0 if convention.rescale != "none" else width),
        "either-maximum": np.maximum(most_x, most_y),
        "prediction-maximum": most_x,
    }
    return peaks[convention.peak].astype(np.float64), most_y > 0


def crop(pair: ComparedImages, box: Box) -> ComparedImages:
    """Return the part of a pair that lies in `box`."""
    peak = pair.peak[:, :, box[2]] if pair.peak.shape[2] > 1 else pair.peak
    return replace(
        pair, prediction=pair.prediction[box], target=pair.target[box], peak=peak, similarity=pair.similarity[box]
    )


def likeness(pair: ComparedImages, region: Mask) -> dict[str, float]:
    """Return "psnr" and "ssim" of a region; slice by slice, then averaged, where the convention says so.

    Raises:
        ValueError: If the region has another shape than the images.
    """
    return likeness_by_region(pair, region, {"region": slice(None)})["region"]


def likeness_by_region(pair: ComparedImages, mask: Mask, places: Mapping[str, Places]) -> dict[str, dict[str, float]]:
    """Return "psnr" and "ssim" of every region; slice by slice, then averaged, where the convention says so.

    Args:
        pair: On the grid of the mask.
        mask: Shape (I, J, K).
        places: Of each region, the places of its voxels among those of the mask.

    Raises:
        ValueError: If the mask has another shape than the images.
    """
    if mask.shape != pair.target.shape:
        raise ValueError(f"region of shape {mask.shape} for images of shape {pair.target.shape}")
    squared, similarity = (pair.prediction[mask] - pair.target[mask]) ** 2, pair.similarity[mask]
    peak, has_border = pair.peak[0, 0], bool(pair.convention.border)
    if not pair.convention.slicewise:
        return {
            name: _likeness(squared[its], similarity[its], peak, has_border=has_border) for name, its in places.items()
        }
    found = {}
    for name, its in places.items():
        slices, depth = np.nonzero(mask)[2][its], len(peak)
        count, total = np.bincount(slices, minlength=depth), np.bincount(slices, squared[its], depth)
        values = similarity[its]
        decibels = _decibels(total, count, peak)
        found[name] = {"psnr": mean_or_nan(decibels), "ssim": mean_or_nan(values[~np.isnan(values)])}
    return found


def _decibels(squared: NDArray[Any], count: NDArray[np.intp], peak: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the PSNR of each slice that has voxels and a peak, from the sums of its squared errors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels: NDArray[np.float64] = 10 * np.log10(peak**2 * count / squared)
    return decibels[(count > 0) & (peak > 0)]


def score(
    prediction: Image,
    target: Image,
    mask: Mask,
    convention: str,
    data_range: Range,
    spacing_mm: Spacing,
) -> dict[str, float]:
    """Return every score of a pair under a named convention.

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
    scores = plain_scores(prediction, target, mask, high - low, spacing_mm) | likeness(pair, counted[box])
    if rules.multiscale:
        scores["ms_ssim"] = multiscale_likeness(prediction, target, mask, rules)
    return scores


def plain_scores(
    prediction: Image, target: Image, region: Mask, data_range: float, spacing_mm: Spacing
) -> dict[str, float]:
    """Return the scores of a region that need only a range and no convention; NaN for an empty region."""
    box = box_of(region) if region.any() else (slice(0, 1),) * 3
    x, y, inside = prediction[box], target[box], region[box]
    return value_scores(x[inside], y[inside], gradients(x, y, inside, spacing_mm), data_range)


def value_scores(
    prediction: NDArray[Any], target: NDArray[Any], gradients: Gradients, data_range: float
) -> dict[str, float]:
    """Return the scores of a region from the values of its voxels, shape (n,), and its gradients."""
    return error_scores(prediction, target, data_range) | {
        "ncc": pearson(prediction, target),
        "gradient_error": gradients.error,
        "sharpness": gradients.sharpness,
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
