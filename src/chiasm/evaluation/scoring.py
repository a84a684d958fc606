"""One case scored in every region, rows that carry their convention, and tables of them.

The unit of everything is the training cohort's target unit: HU for CT; for
magnetic resonance, whose gain is arbitrary, the *reference* is brought to the
training cohort's units with its own intensity map (`harmonise`), never the
prediction, and errors are told in SDs of the training targets.

Errors of CT are told a second time in what PET needs it for: "mae_mu" is the mean
absolute difference of linear attenuation coefficients at 511 keV, in 1/cm, at 120
kVp and CT's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm import boxes
from chiasm.attenuation import attenuation
from chiasm.errors import ChiasmError
from chiasm.evaluation.rows import LEAST_LESION, UNITS, Row
from chiasm.metrics import conventions, edges, lesions, ranking, voxelwise
from chiasm.metrics.ssim import window_box
from chiasm.prediction.baselines import NAMES

if TYPE_CHECKING:
    from chiasm.preparation.intensity import IntensityMap
    from chiasm.preparation.plan import Plan

MOST_SCALES_APART = 20.0  # between prediction and target: more is another unit, not an error
SMOOTH_MM = 2.0  # of the error that a reliability map can foresee
SAMPLE = 300_000  # voxels that ranks and quantiles are taken over
EDGE_BAND_MM = 4.0
EDGE_SHARE = 0.1  # of the mask's voxels: the target's steepest


def harmonise(
    target: NDArray[Any], mask: NDArray[np.bool_], plan: Plan, own: IntensityMap | None = None
) -> NDArray[np.float32]:
    """Bring a real target to the training cohort's target units.

    HU stay as they are.  Units of magnetic resonance differ between scans by
    an arbitrary gain: the scan's own intensity map, fitted on the reference
    inside the mask, takes it out, and the cohort's map puts the cohort's in.
    Zeros outside the mask are no intensity but a cut-out background: they
    become the cohort's.

    Args:
        target: As read, shape (I, J, K).
        mask: Valid voxels.
        plan: Says the unit, the kind of map and the cohort's map.
        own: The scan's map; fitted on `target` where None.
    """
    if plan.target_unit == "HU":
        return target.astype(np.float32, copy=False)
    from chiasm.preparation.intensity import fit_intensity

    own = own or fit_intensity(target, mask, plan.target_kind)
    harmonised = plan.target_reference.invert(own.apply(target))
    harmonised[(target == 0) & ~mask] = plan.target_background
    return harmonised


def reporting_unit(plan: Plan) -> tuple[str, float]:
    """Return what errors are told in, and how many target units one of it is: HU, or SDs of the training targets."""
    if plan.target_unit == "HU":
        return "HU", 1.0
    low, high = plan.target_range
    normalised = plan.target_reference.apply(np.array([low, high]))
    return "SD", plan.target_sd * (high - low) / float(normalised[1] - normalised[0])


def check_units(prediction: NDArray[Any], target: NDArray[Any], mask: NDArray[np.bool_], case: str) -> None:
    """Refuse a pair whose scales are so far apart that one must be in another unit.

    Raises:
        ChiasmError: If the scales (absolute median + interquartile range inside
            the mask) differ more than twentyfold: as a normalised image and a
            raw one do.  A constant image is no unit and is let through.
    """
    if not mask.any():
        return
    scales = []
    for image in (prediction, target):
        low, middle, high = np.quantile(_sample(image[mask]), (0.25, 0.5, 0.75))
        scales.append(abs(float(middle)) + float(high - low) if high > low else 0.0)
    of_prediction, of_target = scales
    if min(scales) > 0 and max(scales) > MOST_SCALES_APART * min(scales):
        raise ChiasmError(
            f"case {case}: prediction and target are not in one unit",
            reason="other-unit",
            found=f"typical values of {of_prediction:.3g} against {of_target:.3g}",
            expected=f"less than {MOST_SCALES_APART:g} times apart",
            hint="One looks normalised and the other raw: evaluate the files that chiasm predict wrote.",
        )


def evaluate_case(
    prediction: NDArray[Any],
    target: NDArray[Any],
    mask: NDArray[np.bool_],
    labels: NDArray[Any] | None,
    regions: Mapping[str, Sequence[int]],
    spacing_mm: tuple[float, float, float],
    *,
    data_range: tuple[float, float],
    unit: str,
    unit_scale: float = 1.0,
    convention: str = "chiasm",
    reliability: NDArray[Any] | None = None,
    case: str,
    fold: int = 0,
    seed: int = 0,
    method: str = "model",
) -> list[Row]:
    """Score a prediction in the mask, in each region, in each lesion, at edges and in the whole image.

    Args:
        prediction: Target units, shape (I, J, K).
        target: The real image, harmonised, on the same grid.
        mask: Valid voxels; regions count inside it only.
        labels: Label map, 0 is background, or None.
        regions: Region name to the labels that make it; without names all
            labels together are the region "lesion".
        spacing_mm: Between voxels along I, J and K.
        data_range: The training cohort's range (low, high), target units.
        unit: What errors are told in, such as "HU" or "SD".
        unit_scale: Target units in one `unit`.
        convention: A name of `conventions.CONVENTIONS`.
        reliability: Expected absolute error in target units, or None.
        case: Id of the case.
        fold: Of the split.
        seed: Of the training.
        method: Arm or naive baseline.

    Returns:
        Rows, those of the mask first.

    Raises:
        ChiasmError: If prediction and target are not in one unit, or the convention is unknown.
        ValueError: If shapes differ, or a range or scale is not positive.
    """
    rules = conventions.find_convention(convention)
    boxes.same_shape(prediction, target, mask, *(a for a in (labels, reliability) if a is not None))
    if not unit_scale > 0:
        raise ValueError(f"unit_scale must be positive, not {unit_scale}")
    if method not in NAMES:  # a naive baseline may well be far off, and is in the target's unit by construction
        check_units(prediction, target, mask, case)
    low, high = rules.range or data_range
    told = describe(convention, data_range, unit, unit_scale)
    rows: list[Row] = []

    def note(region: str, figures: Mapping[str, float]) -> None:
        for metric, value in figures.items():
            kind = UNITS[metric]
            scale = unit_scale if kind in ("", "/mm") else 1.0
            its_unit = unit + kind if kind in ("", "/mm") else kind
            rows.append(Row(case, fold, seed, method, region, metric, float(value) / scale, its_unit, told))

    whole = np.ones(mask.shape, bool)
    open_pair = conventions.pair_up(prediction, target, whole, rules, data_range)
    whole_figures = voxelwise.error_figures(prediction, target, high - low) | conventions.likeness(open_pair, whole)
    box = window_box(mask)
    multiscale = conventions.multiscale_likeness(prediction, target, mask, rules) if rules.multiscale else None

    # From here on everything lies on the mask's box.
    prediction, target, mask = prediction[box], target[box], mask[box]
    labels, reliability = (None if array is None else array[box] for array in (labels, reliability))
    if rules.masked:
        pair = conventions.pair_up(prediction, target, mask, rules, data_range)
    else:
        pair = conventions.crop(open_pair, box)
    del open_pair
    lesion_labels = None if labels is None else _lesion_labels(labels, mask, regions)
    places = _places(target, mask, labels, lesion_labels, regions, spacing_mm)
    error = np.where(mask, np.abs(np.subtract(prediction, target, dtype=np.float32)), np.float32(0))
    attenuations = (attenuation(prediction), attenuation(target)) if unit == "HU" else None
    for region, inside in places.items():
        figures = conventions.plain_figures(prediction, target, inside, high - low, spacing_mm)
        figures |= conventions.likeness(pair, inside)
        if attenuations is not None:
            figures["mae_mu"] = voxelwise.mae(*attenuations, inside)
        if region == "mask" and multiscale is not None:
            figures["ms_ssim"] = multiscale
        if reliability is not None:
            figures |= calibration(reliability[inside], error[inside])
        note(region, figures)
    if reliability is not None:
        note("mask", score_reliability(reliability, error, mask, lesion_labels, spacing_mm))
    if lesion_labels is not None:
        for region, figures in _score_lesions(prediction, target, mask, lesion_labels, spacing_mm).items():
            note(region, figures)
    note("image", whole_figures)
    return rows


def describe(convention: str, data_range: tuple[float, float], unit: str, unit_scale: float = 1.0) -> str:
    """Say under which convention, range and scale a figure was taken, in one line.

    >>> describe("nie-v1", (0.0, 1.0), "SD", 2.5).partition("; a lesion")[0]
    'nie-v1 (whole image; peak is the maximum of both images; scale-leaking; 1 SD is 2.5 target units'
    """
    rules = conventions.find_convention(convention)
    parts = [rules.text]
    if rules.peak == "range" and rules.rescale == "none" and rules.range is None:
        parts.append(f"range {data_range[0]:.6g} to {data_range[1]:.6g}")
    if rules.scale_leaking:
        parts.append("scale-leaking")
    if unit_scale != 1:
        parts.append(f"1 {unit} is {unit_scale:.6g} target units")
    parts.append(LEAST_LESION)
    return f"{convention} ({'; '.join(parts)})"


def calibration(expected: NDArray[Any], error: NDArray[Any]) -> dict[str, float]:
    """Compare the mean expected error of a region with its true mean error.

    Returns:
        "expected_error", and "calibration", the expected over the true one:
        below 1 the map is too hopeful.  NaN for an empty region.
    """
    if not error.size:
        return {"expected_error": math.nan, "calibration": math.nan}
    told, true = float(expected.mean(dtype=np.float64)), float(error.mean(dtype=np.float64))
    return {"expected_error": told, "calibration": told / true if true > 0 else math.nan}


def score_reliability(
    reliability: NDArray[Any],
    error: NDArray[Any],
    mask: NDArray[np.bool_],
    lesion: NDArray[np.bool_] | None,
    spacing_mm: tuple[float, float, float],
) -> dict[str, float]:
    """Measure whether a reliability map knows where the error is.

    Args:
        reliability: Expected absolute error, shape (I, J, K).
        error: True absolute error, 0 outside the mask.
        mask: Voxels that count.
        lesion: Labelled voxels, or None.
        spacing_mm: Between voxels.

    Returns:
        Over at most `SAMPLE` voxels, evenly spread: "spearman" with the error,
        "spearman_smoothed" with the error smoothed over 2 mm inside the mask,
        "auroc_worst" for the worst tenth of the voxels, "ausc" and "ause" (see
        `metrics`), and with a lesion "auroc_lesion".
    """
    from scipy.ndimage import gaussian_filter

    sigma = [SMOOTH_MM / step for step in spacing_mm]
    cover = gaussian_filter(mask.astype(np.float32), sigma, truncate=3)[mask]
    smoothed = gaussian_filter(error.astype(np.float32), sigma, truncate=3)[mask] / cover
    told, true, smoothed = _sample(reliability[mask]), _sample(error[mask]), _sample(smoothed)
    ranks = ranking.ranks(told)  # ranked once: a rank statistic of ranks is that of the values
    figures = {
        "spearman": ranking.spearman(ranks, true),
        "spearman_smoothed": ranking.spearman(ranks, smoothed),
        "auroc_worst": ranking.auroc_worst(ranks, true),
        "ausc": ranking.ausc(told, true),
        "ause": ranking.ause(told, true),
    }
    if lesion is not None:
        figures["auroc_lesion"] = ranking.auroc(ranks, _sample(lesion[mask]))
    return figures


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    return values[:: max(1, -(-len(values) // SAMPLE))]


def _lesion_labels(
    labels: NDArray[Any], mask: NDArray[np.bool_], regions: Mapping[str, Sequence[int]]
) -> NDArray[np.bool_]:
    """Return the labelled voxels of the mask that a named region counts; all labels where none is named."""
    named = sorted({value for values in regions.values() for value in values})
    counted: NDArray[np.bool_] = np.isin(labels, named) if named else labels != 0
    return counted & mask


def _places(
    target: NDArray[Any],
    mask: NDArray[np.bool_],
    labels: NDArray[Any] | None,
    lesion: NDArray[np.bool_] | None,
    regions: Mapping[str, Sequence[int]],
    spacing_mm: tuple[float, float, float],
) -> dict[str, NDArray[np.bool_]]:
    """Name the regions to score, the mask first."""
    places = {"mask": mask}
    if labels is not None and lesion is not None:
        named = regions or {"lesion": tuple(int(value) for value in np.unique(labels) if value != 0)}
        places |= {name: np.isin(labels, list(values)) & mask for name, values in named.items()}
        places["healthy"] = mask & (labels == 0)
        places["lesion-edge"] = edges.edge_band(lesion, EDGE_BAND_MM, spacing_mm) & mask
    places["edges"] = edges.edge_voxels(target, mask, spacing_mm, EDGE_SHARE)
    return places


def _score_lesions(
    prediction: NDArray[Any],
    target: NDArray[Any],
    mask: NDArray[np.bool_],
    lesion: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
) -> dict[str, dict[str, float]]:
    """Measure each lesion, then count: how many, how many are kept, how many were made up."""
    found, too_small = lesions.split_components(lesion, spacing_mm)
    figures = [lesions.lesion_figures(prediction, target, mask, lesion, one, spacing_mm) for one in found]
    scored = {
        f"lesion-{number}": {"volume_ml": one.volume_ml, **asdict(its)}
        for number, (one, its) in enumerate(zip(found, figures), start=1)
    }
    contrasts = [its.contrast_target for its in figures if not math.isnan(its.contrast_kept)]
    contrast = float(np.median(contrasts)) if contrasts else 0.0
    scored["lesions"] = {
        "lesions": len(found),
        "too_small": too_small,
        "recall": lesions.recall([its.contrast_kept for its in figures]),
        "false_lesions": lesions.false_lesions(prediction, target, mask, lesion, contrast, spacing_mm)
        if contrast
        else math.nan,
    }
    for size in lesions.SIZES_ML:
        here = [its for one, its in zip(found, figures) if one.size == size]
        if here:
            scored[f"lesions-{size}"] = {
                "lesions": len(here),
                "mae": float(np.mean([its.mae for its in here])),
                "recall": lesions.recall([its.contrast_kept for its in here]),
            }
    return scored


# Files


# Tables
