"""One case scored in every region, as rows that carry their convention.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm import boxes
from chiasm.attenuation import attenuation
from chiasm.errors import ChiasmError
from chiasm.evaluation.rows import LEAST_LESION, UNITS, Row
from chiasm.metrics import conventions, edges, lesions, radiotherapy, ranking, voxelwise
from chiasm.metrics.ssim import window_box
from chiasm.prediction.baselines import NAMES

if TYPE_CHECKING:
    from chiasm.preparation.intensity import IntensityMap
    from chiasm.preparation.plan import Plan

MOST_SCALES_APART = 20.0  # between prediction and target: more is another unit, not an error
SMOOTH_MM = 2.0  # of the error that an expected-error map can foresee
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


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """The images of one case that a prediction is scored with, all on one grid.

    Attributes:
        prediction: Target units, shape (I, J, K).
        target: The real image, harmonised.
        mask: Valid voxels; regions count inside it only.
        spacing_mm: Between voxels along I, J and K.
        labels: Label map, 0 is background, or None.
        regions: Region name to the labels that make it; without names all labels together are the region "lesion".
        expected_error: Expected absolute error in target units, or None.
        axes: What I, J and K run along; see `volumes.geometry.axis_names`.
    """

    prediction: NDArray[Any]
    target: NDArray[Any]
    mask: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]
    labels: NDArray[Any] | None = None
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    expected_error: NDArray[Any] | None = None
    axes: tuple[str, str, str] = ("i", "j", "k")

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are there, by name."""
        named = {name: getattr(self, name) for name in ("prediction", "target", "mask", "labels", "expected_error")}
        return {name: array for name, array in named.items() if array is not None}

    def crop(self, box: boxes.Box) -> ScoredImages:
        """Return the part of all images that lies in a box."""
        return replace(
            self,
            prediction=self.prediction[box],
            target=self.target[box],
            mask=self.mask[box],
            labels=None if self.labels is None else self.labels[box],
            expected_error=None if self.expected_error is None else self.expected_error[box],
        )

    @cached_property
    def error(self) -> NDArray[np.float32]:
        """Absolute error, 0 outside the mask."""
        difference = np.subtract(self.prediction, self.target, dtype=np.float32)
        return np.where(self.mask, np.abs(difference), np.float32(0))

    @cached_property
    def lesion(self) -> NDArray[np.bool_] | None:
        """Labelled voxels of the mask that a named region counts, all labels where none is named; None without any."""
        if self.labels is None:
            return None
        named = sorted(set(chain.from_iterable(self.regions.values())))
        counted: NDArray[np.bool_] = np.isin(self.labels, named) if named else self.labels != 0
        return counted & self.mask


@dataclass(frozen=True)
class ScoreTerms:
    """Whose scores these are, and what they are taken and told in.

    Attributes:
        case: Id of the case.
        data_range: The training cohort's range (low, high), target units.
        unit: What errors are told in, such as "HU" or "SD".
        unit_scale: Target units in one `unit`.
        convention: A name of `conventions.CONVENTIONS`.
        fold: Of the split.
        seed: Of the training.
        method: Arm or naive baseline.

    Raises:
        RecipeError: If the convention is unknown.
        ValueError: If the scale is not positive.
    """

    case: str
    data_range: tuple[float, float]
    unit: str
    unit_scale: float = 1.0
    convention: str = "chiasm"
    fold: int = 0
    seed: int = 0
    method: str = "model"

    def __post_init__(self) -> None:
        conventions.find_convention(self.convention)
        if not self.unit_scale > 0:
            raise ValueError(f"unit_scale must be positive, not {self.unit_scale}")

    @property
    def rules(self) -> conventions.Convention:
        """The convention itself."""
        return conventions.find_convention(self.convention)

    @property
    def width(self) -> float:
        """Width of the range that scores are relative to."""
        low, high = self.rules.range or self.data_range
        return high - low

    def rows(self, scores: Iterable[tuple[str, Mapping[str, float]]]) -> list[Row]:
        """Turn pairs of a region and its scores in target units into rows."""
        described = describe(self.convention, self.data_range, self.unit, self.unit_scale)
        return [
            Row(self.case, self.fold, self.seed, self.method, region, metric, *self._told(metric, value), described)
            for region, its_scores in scores
            for metric, value in its_scores.items()
        ]

    def _told(self, metric: str, value: float) -> tuple[float, str]:
        """Return a score in the unit that it is told in, and that unit."""
        kind = UNITS[metric]
        if kind in ("", "/mm"):
            return float(value) / self.unit_scale, self.unit + kind
        return float(value), kind


def evaluate_case(images: ScoredImages, terms: ScoreTerms) -> list[Row]:
    """Score a prediction in the mask, in each region, in each lesion, at edges and in the whole image.

    Args:
        images: Of the case.
        terms: Whose scores these are, and what they are told in.

    Returns:
        Rows, those of the mask first.

    Raises:
        ChiasmError: If prediction and target are not in one unit.
        ValueError: If shapes differ, or a range is not positive.
    """
    boxes.same_shape(*images.arrays.values())
    if terms.method not in NAMES:  # a naive baseline may well be far off, and is in the target's unit by construction
        check_units(images.prediction, images.target, images.mask, terms.case)
    pair, whole = _score_whole(images, terms)
    multiscale = {}
    if terms.rules.multiscale:
        multiscale["ms_ssim"] = conventions.multiscale_likeness(
            images.prediction, images.target, images.mask, terms.rules
        )
    part = images.crop(window_box(images.mask))
    scores = list(_score_regions(part, pair, terms, multiscale))
    if part.expected_error is not None:
        ranks = score_expected_error(part.expected_error, part.error, part.mask, part.lesion, part.spacing_mm)
        scores.append(("mask", ranks))
    if part.lesion is not None:
        scores += _score_lesions(part, part.lesion).items()
    if terms.method not in NAMES:
        scores += _score_axes(part, is_ct=terms.unit == "HU")
    return terms.rows([*scores, ("image", whole)])


def _score_whole(images: ScoredImages, terms: ScoreTerms) -> tuple[conventions.ComparedImages, dict[str, float]]:
    """Score all voxels, the background with them; return the pair on the mask's box too, for regions."""
    whole = np.ones(images.mask.shape, bool)
    pair = conventions.pair_up(images.prediction, images.target, whole, terms.rules, terms.data_range)
    scores = voxelwise.error_figures(images.prediction, images.target, terms.width) | conventions.likeness(pair, whole)
    box = window_box(images.mask)
    if not terms.rules.masked:
        return conventions.crop(pair, box), scores
    part = images.crop(box)
    return conventions.pair_up(part.prediction, part.target, part.mask, terms.rules, terms.data_range), scores


def _score_regions(
    part: ScoredImages, pair: conventions.ComparedImages, terms: ScoreTerms, of_mask: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Score each region of a case; `of_mask` are scores that the mask has besides."""
    as_ct: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    if terms.unit == "HU":
        for name, convert in (("mae_mu", attenuation), ("mae_density", radiotherapy.electron_density)):
            as_ct[name] = convert(part.prediction), convert(part.target)
    for region, inside in _regions(part, is_ct=terms.unit == "HU").items():
        scores = conventions.plain_figures(part.prediction, part.target, inside, terms.width, part.spacing_mm)
        scores |= conventions.likeness(pair, inside)
        scores |= {name: voxelwise.mae(made, real, inside) for name, (made, real) in as_ct.items()}
        if region in radiotherapy.TISSUES_HU:
            scores["volume_ml"] = float(inside.sum()) * math.prod(part.spacing_mm) / 1000
        if region == "mask":
            scores |= of_mask
        if part.expected_error is not None:
            scores |= calibration(part.expected_error[inside], part.error[inside])
        yield region, scores


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


def score_expected_error(
    expected_error: NDArray[Any],
    error: NDArray[Any],
    mask: NDArray[np.bool_],
    lesion: NDArray[np.bool_] | None,
    spacing_mm: tuple[float, float, float],
) -> dict[str, float]:
    """Measure whether an expected-error map knows where the error is.

    Args:
        expected_error: Expected absolute error, shape (I, J, K).
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
    told, true, smoothed = _sample(expected_error[mask]), _sample(error[mask]), _sample(smoothed)
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


def _regions(part: ScoredImages, is_ct: bool) -> dict[str, NDArray[np.bool_]]:
    """Return the voxels of each region to score, the mask first."""
    mask, labels = part.mask, part.labels
    found = {"mask": mask}
    if labels is not None and part.lesion is not None:
        named = part.regions or {"lesion": np.setdiff1d(labels, [0]).tolist()}
        found |= {name: np.isin(labels, list(values)) & mask for name, values in named.items()}
        found["healthy"] = mask & (labels == 0)
        found["lesion-edge"] = edges.edge_band(part.lesion, EDGE_BAND_MM, part.spacing_mm) & mask
    found["edges"] = edges.edge_voxels(part.target, mask, part.spacing_mm, EDGE_SHARE)
    return found | (radiotherapy.tissues(part.target, mask) if is_ct else {})


def _score_axes(part: ScoredImages, is_ct: bool) -> list[tuple[str, dict[str, float]]]:
    """Compare steps from slice to slice along each axis, and of CT the path lengths of rays."""
    scores = [
        {"slice_steps": radiotherapy.slice_steps(part.prediction, part.target, part.mask, axis)} for axis in range(3)
    ]
    if is_ct:
        difference = radiotherapy.electron_density(part.prediction) - radiotherapy.electron_density(part.target)
        for axis, its in enumerate(scores):
            its |= radiotherapy.path_errors(difference, part.mask, part.spacing_mm, axis)
    return list(zip(part.axes, scores, strict=True))


def _score_lesions(part: ScoredImages, lesion: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Measure each lesion, then count: how many, how many are kept, how many were made up."""
    images = (part.prediction, part.target, part.mask, lesion)
    found, too_small = lesions.split_components(lesion, part.spacing_mm)
    figures = [lesions.lesion_figures(*images, one, part.spacing_mm) for one in found]
    scored = {
        f"lesion-{number}": {"volume_ml": one.volume_ml, **asdict(its)}
        for number, (one, its) in enumerate(zip(found, figures), start=1)
    }
    contrast = _typical_contrast(figures)
    scored["lesions"] = {
        "lesions": len(found),
        "too_small": too_small,
        "recall": lesions.recall([its.contrast_kept for its in figures]),
        "false_lesions": lesions.false_lesions(*images, contrast, part.spacing_mm) if contrast else math.nan,
    }
    by_size = {size: [its for one, its in zip(found, figures) if one.size == size] for size in lesions.SIZES_ML}
    return scored | {f"lesions-{size}": _score_size(here) for size, here in by_size.items() if here}


def _typical_contrast(figures: Sequence[lesions.LesionFigures]) -> float:
    """Return the median contrast that lesions have in the target; 0 where no lesion has one."""
    contrasts = [its.contrast_target for its in figures if not math.isnan(its.contrast_kept)]
    return float(np.median(contrasts)) if contrasts else 0.0


def _score_size(figures: Sequence[lesions.LesionFigures]) -> dict[str, float]:
    """Count the lesions of one size, and average their errors."""
    return {
        "lesions": len(figures),
        "mae": float(np.mean([its.mae for its in figures])),
        "recall": lesions.recall([its.contrast_kept for its in figures]),
    }
