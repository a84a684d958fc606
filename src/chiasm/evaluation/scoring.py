"""One case scored in every region, as rows that name their convention.

The unit of everything is the training cohort's target unit: HU for CT; for
magnetic resonance, whose gain is arbitrary, the *reference* is scaled to the
training cohort's units with its own intensity map (`harmonise`), never the
prediction, and errors are given in SDs of the training targets.  The mean
absolute error is given a second time in the intensities of the real image
("mae_own"), which are not comparable between scanners.

Errors of CT are given a second time in what PET needs it for: "mae_mu" is the mean
absolute difference of linear attenuation coefficients at 511 keV, in 1/cm, at 120
kVp and CT's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm import boxes
from chiasm.attenuation import attenuation
from chiasm.errors import ChiasmError
from chiasm.evaluation.metric_table import METRICS
from chiasm.evaluation.reference import ComparedPrediction, Reference, ScoredBox, compare_all
from chiasm.evaluation.rows import LEAST_LESION, Row
from chiasm.heap import give_back
from chiasm.metrics import challenges, conventions, edges, lesions, radiotherapy, ranking, voxelwise
from chiasm.names import three_digits
from chiasm.prediction.baselines import NAMES
from chiasm.preparation.intensity import IntensityMap, fit_intensity
from chiasm.smoothing import REACH, smooth

if TYPE_CHECKING:
    from chiasm.preparation.plan import Plan

MOST_SCALES_APART = 20.0  # between prediction and target: more is another unit, not an error
SMOOTH_MM = 2.0  # of the error that an expected-error map can foresee
SAMPLE = 300_000  # voxels that ranks and quantiles are taken over


def harmonise(
    target: NDArray[Any], mask: NDArray[np.bool_], plan: Plan, own: IntensityMap | None = None
) -> NDArray[np.float32]:
    """Convert a real target to the training cohort's target units.

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
    own = own or fit_intensity(target, mask, plan.target_kind)
    seen = mask | (target != 0)
    harmonised = np.full_like(target, plan.target_background, np.float32)
    harmonised[seen] = plan.target_reference.invert(own.apply(target[seen]))
    return harmonised


def reporting_unit(plan: Plan) -> tuple[str, float]:
    """Return what errors are given in, and how many target units one of it is: HU, or SDs of the training targets."""
    if plan.target_unit == "HU":
        return "HU", 1.0
    low, high = plan.target_range
    normalised = plan.target_reference.apply(np.array([low, high]))
    return "SD", plan.target_sd * (high - low) / float(normalised[1] - normalised[0])


def check_units(prediction: NDArray[Any], target: NDArray[Any], case: str) -> None:
    """Refuse a pair whose scales are so far apart that one must be in another unit.

    Args:
        prediction: Values of the mask's voxels, shape (n,).
        target: Likewise.
        case: Named in the error.

    Raises:
        ChiasmError: If the scales (absolute median + interquartile range inside
            the mask) differ more than twentyfold: as a normalised image and a
            raw one do.  A constant image is no unit and is let through.
    """
    if not target.size:
        return
    scales = []
    for image in (prediction, target):
        low, middle, high = np.quantile(_sample(image), (0.25, 0.5, 0.75))
        scales.append(abs(float(middle)) + float(high - low) if high > low else 0.0)
    of_prediction, of_target = scales
    if min(scales) > 0 and max(scales) > MOST_SCALES_APART * min(scales):
        raise ChiasmError(
            f"case {case}: prediction and target are not in one unit",
            reason="other-unit",
            found=f"typical values of {three_digits(of_prediction)} against {three_digits(of_target)}",
            expected=f"less than {MOST_SCALES_APART:g} times apart",
            hint="One looks normalised and the other raw: evaluate the files that chiasm predict wrote.",
        )


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """A prediction and its reference, on one grid.

    Attributes:
        prediction: Target units, shape (I, J, K).
        reference: The real image, with its mask and regions.
        expected_error: Expected absolute error in target units, shape (I, J, K) or of the mask's voxels (n,); or None.
        spread: Standard deviation of the images of several models, likewise, or None.
        compared: From `compare_all`; None to compare this prediction alone.
    """

    prediction: NDArray[Any]
    reference: Reference
    expected_error: NDArray[Any] | None = None
    spread: NDArray[Any] | None = None
    compared: ComparedPrediction | None = None

    @property
    def part(self) -> ScoredImages:
        """The part that lies in the reference's box."""
        return self if self.reference.part is self.reference else self._cut  # itself is not kept: that were a circle

    @cached_property
    def _cut(self) -> ScoredImages:
        box = self.reference.box
        expected, spread = (
            array if array is None or array.ndim == 1 else array[box] for array in (self.expected_error, self.spread)
        )
        part = np.ascontiguousarray(self.prediction[box])
        return ScoredImages(part, self.reference.part, expected, spread, self.compared)

    @cached_property
    def values(self) -> NDArray[Any]:
        """The prediction's values in the mask, shape (n,)."""
        return self.prediction[self.reference.mask]

    @property
    def expected_values(self) -> NDArray[Any] | None:
        """The expected errors of the mask's voxels, shape (n,), or None."""
        return self._inside(self.expected_error)

    @property
    def spread_values(self) -> NDArray[Any] | None:
        """The standard deviations of the mask's voxels, shape (n,), or None."""
        return self._inside(self.spread)

    def _inside(self, array: NDArray[Any] | None) -> NDArray[Any] | None:
        return array if array is None or array.ndim == 1 else array[self.reference.mask]

    @property
    def error_values(self) -> NDArray[np.float32]:
        """Absolute errors of the mask's voxels, shape (n,)."""
        difference: NDArray[np.float32] = np.subtract(self.values, self.reference.values, dtype=np.float32)
        return np.abs(difference, out=difference)

    @cached_property
    def density_error(self) -> NDArray[np.float32]:
        """Electron density of a CT's values in the mask minus that of the target's, shape (n,)."""
        its = self.reference
        return radiotherapy.electron_density(self.values, its.curve) - its.density


@dataclass(frozen=True)
class ScoreTerms:
    """The case of some scores, with their range, unit and convention.

    Attributes:
        case: Id of the case.
        data_range: The training cohort's range (low, high), target units.
        unit: What errors are given in, such as "HU" or "SD".
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
            Row(self.case, self.fold, self.seed, self.method, region, metric, *self._in_unit(metric, value), described)
            for region, its_scores in scores
            for metric, value in its_scores.items()
        ]

    def _in_unit(self, metric: str, value: float) -> tuple[float, str]:
        """Return a score in the unit that it is given in, and that unit."""
        kind = METRICS[metric].unit
        if kind in ("", "/mm"):
            return float(value) / self.unit_scale, self.unit + kind
        return float(value), kind


def evaluate_case(images: ScoredImages, terms: ScoreTerms) -> list[Row]:
    """Score a prediction in the mask, in each region, in each lesion, at edges and in the whole image.

    Args:
        images: Of the case.
        terms: Whose scores these are, and what they are given in.

    Returns:
        Rows, those of the mask first.

    Raises:
        ChiasmError: If prediction and target are not in one unit.
        ValueError: If shapes differ, or a range is not positive.
    """
    reference = images.reference
    maps = [array for array in (images.expected_error, images.spread) if array is not None and array.ndim > 1]
    boxes.same_shape(images.prediction, reference.target, *maps)
    if terms.method not in NAMES:  # a naive baseline may well be far off, and is in the target's unit by construction
        check_units(images.values, reference.values, terms.case)
    part, more = images.part, {}
    compared = images.compared or compare_all(reference, [part.values], terms.convention, terms.data_range)[0]
    likenesses, whole = _score_whole(images, compared, terms)
    regions = _score_regions(part, compared.steps, likenesses, terms)
    give_back()  # what the values of regions took
    if terms.rules.multiscale:
        more["ms_ssim"] = conventions.multiscale_likeness(
            images.prediction, reference.target, reference.mask, terms.rules
        )
    more |= _score_maps(part)
    axes = [] if terms.method in NAMES else _score_axes(part, compared.steps.ratios)
    challenge = _score_challenge(images, terms)
    return terms.rows(
        [*regions.items(), ("mask", more), *challenge.items(), *_score_lesions(part).items(), *axes, ("image", whole)]
    )


Likenesses = Mapping[str, dict[str, float]]  # region to "psnr" and "ssim"


def _score_whole(
    images: ScoredImages, compared: ComparedPrediction, terms: ScoreTerms
) -> tuple[Likenesses, dict[str, float]]:
    """Score all voxels, the background with them; return the likenesses of regions too."""
    prediction, reference = images.prediction, images.reference
    if reference.frame is not None and compared.likeness is not None:
        return compared.likeness.regions, _errors_cut_out(images, reference.frame, terms) | compared.likeness.whole
    whole = np.ones(prediction.shape, bool)
    pair = conventions.pair_up(prediction, reference.target, whole, terms.rules, terms.data_range)
    scores = voxelwise.error_scores(prediction, reference.target, terms.width) | conventions.likeness(pair, whole)
    part = reference.part
    if terms.rules.masked:
        in_box = prediction[reference.box]
        pair = conventions.pair_up(in_box, part.target, part.mask, terms.rules, terms.data_range)
    else:
        pair = conventions.crop(pair, reference.box)
    return conventions.likeness_by_region(pair, part.mask, part.places), scores


def _errors_cut_out(images: ScoredImages, frame: ScoredBox, terms: ScoreTerms) -> dict[str, float]:
    """Return the errors of all voxels from those of the mask: beyond it there are none."""
    errors = voxelwise.error_scores(images.values, images.reference.values, terms.width)
    share = images.reference.values.size / math.prod(frame.shape)
    return {name: value * (math.sqrt(share) if name == "rmse" else share) for name, value in errors.items()}


def _score_challenge(images: ScoredImages, terms: ScoreTerms) -> dict[str, dict[str, float]]:
    """Score tumour and healthy tissue of whole volumes as a challenge does; nothing without one or without labels."""
    its, challenge = images.reference, terms.rules.challenge
    if challenge is None or its.labels is None:
        return {}
    tumour = its.labels != 0
    areas = {"lesion": tumour, "healthy": ~tumour}
    return {
        name: {"challenge_ssim": challenges.challenge_ssim(images.prediction, its.target, area, challenge)}
        for name, area in areas.items()
    }


def _score_regions(
    part: ScoredImages, steps: edges.ComparedSteps, likenesses: Likenesses, terms: ScoreTerms
) -> dict[str, dict[str, float]]:
    """Score each region of a case, only from the values of the mask's voxels."""
    reference = part.reference
    x, y = part.values, reference.values
    expected, error = part.expected_values, part.error_values
    more: dict[str, NDArray[np.float32]] = {}
    if reference.is_ct:
        more["mae_mu"] = np.abs(attenuation(x) - reference.attenuation)
        more["mae_density"] = np.abs(part.density_error)
    own, scores = reference.own_errors(x), {}
    for region, places in reference.places.items():
        here = x[places], y[places]
        first = {"mae": math.nan} | ({} if own is None else {"mae_own": voxelwise.mean_or_nan(own[places])})
        found = first | conventions.value_scores(*here, steps.gradients[region], terms.width) | likenesses[region]
        found |= {name: voxelwise.mean_or_nan(differences[places]) for name, differences in more.items()}
        if region in radiotherapy.TISSUES_HU:
            found["volume_ml"] = len(here[1]) * math.prod(reference.spacing_mm) / 1000
        if expected is not None:
            found |= calibration(expected[places], error[places])
        scores[region] = found
    return scores


def describe(convention: str, data_range: tuple[float, float], unit: str, unit_scale: float = 1.0) -> str:
    """Describe the convention, the range and the scale of a score in one line.

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
    predicted, true = float(expected.mean(dtype=np.float64)), float(error.mean(dtype=np.float64))
    return {"expected_error": predicted, "calibration": predicted / true if true > 0 else math.nan}


def _score_maps(part: ScoredImages) -> dict[str, float]:
    """Measure whether the expected error and the spread over models know where the error is, those that there are."""
    its, scores = part.reference, dict[str, float]()
    if (expected := part.expected_values) is not None:
        scores |= score_expected_values(expected, part.error_values, its.mask, its.lesion, its.spacing_mm)
    if (spread := part.spread_values) is not None:
        scores["spread_spearman"] = ranking.spearman(*map(_sample, (spread, part.error_values)))
    return scores


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
    return score_expected_values(expected_error[mask], error[mask], mask, lesion, spacing_mm)


def score_expected_values(
    expected_error: NDArray[Any],
    error: NDArray[Any],
    mask: NDArray[np.bool_],
    lesion: NDArray[np.bool_] | None,
    spacing_mm: tuple[float, float, float],
) -> dict[str, float]:
    """Do what `score_expected_error` does from the values of the mask's voxels, shape (n,) each."""
    sigma = [SMOOTH_MM / step for step in spacing_mm]
    box = (
        boxes.grown(boxes.box_of(mask), REACH * SMOOTH_MM, spacing_mm, mask.shape) if mask.any() else (slice(0, 1),) * 3
    )
    inside = mask[box]
    image = inside.astype(np.float32, order="C")
    cover = _sample(smooth(image, sigma)[inside])
    image[...] = 0
    image[inside] = error
    smoothed = _sample(smooth(image, sigma)[inside]) / cover
    del image
    predicted, true = _sample(expected_error), _sample(error)
    ranks = ranking.ranks(predicted)  # sorted once for every statistic of ranks
    share = ranking.ausc(predicted, true)
    scores = {
        "spearman": voxelwise.pearson(ranks, ranking.ranks(true)),
        "spearman_smoothed": voxelwise.pearson(ranks, ranking.ranks(smoothed)),
        "auroc_worst": ranking.auroc_of_ranks(ranks, ranking.is_worst(true)),
        "ausc": share,
        "ause": share - ranking.ausc(true, true),
    }
    if lesion is not None:
        scores["auroc_lesion"] = ranking.auroc_of_ranks(ranks, _sample(lesion[mask]))
    return scores


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    return values[:: max(1, -(-len(values) // SAMPLE))]


def _score_axes(part: ScoredImages, ratios: Sequence[float]) -> list[tuple[str, dict[str, float]]]:
    """Compare steps from slice to slice along each axis, and of CT the path lengths of rays and beams."""
    its = part.reference
    scores = [{"slice_steps": ratio} for ratio in ratios]
    if its.is_ct:
        difference = np.zeros(its.mask.shape, np.float32)
        difference[its.mask] = part.density_error
        for axis, found in enumerate(scores):
            found |= radiotherapy.path_errors(difference, its.mask, its.spacing_mm, axis)
        if its.beams is not None:
            names = [*its.axes, *(f"gantry {angle:g}" for angle in its.beams.degrees)]
            beams = [
                radiotherapy.beam_errors(difference, its.mask, its.beams.matrix, angle) for angle in its.beams.degrees
            ]
            return list(zip(names, [*scores, *beams], strict=True))
    return list(zip(its.axes, scores, strict=True))


def _score_lesions(part: ScoredImages) -> dict[str, dict[str, float]]:
    """Measure each lesion, then count: how many, how many are kept, how many were made up; nothing without labels."""
    reference = part.reference
    if reference.lesion is None:
        return {}
    images, rings = (part.prediction, reference.target), reference.rings
    scores = [lesions.lesion_scores(*images, ring) for ring in rings]
    scored = {
        f"lesion-{number}": {"volume_ml": ring.lesion.volume_ml, **asdict(its)}
        for number, (ring, its) in enumerate(zip(rings, scores), start=1)
    }
    contrast = _typical_contrast(scores)
    scored["lesions"] = {
        "lesions": len(rings),
        "too_small": reference.components.too_small,
        "recall": lesions.recall([its.contrast_kept for its in scores]),
        "false_lesions": _count_false(part, contrast) if contrast else math.nan,
    }
    by_size = {size: [its for ring, its in zip(rings, scores) if ring.lesion.size == size] for size in lesions.SIZES_ML}
    return scored | {f"lesions-{size}": _score_size(here) for size, here in by_size.items() if here}


def _count_false(part: ScoredImages, contrast: float) -> int:
    its = part.reference
    return lesions.false_lesions(part.prediction, its.target, its.mask, its.far, contrast, its.spacing_mm)


def _typical_contrast(scores: Sequence[lesions.LesionScores]) -> float:
    """Return the median contrast that lesions have in the target; 0 where no lesion has one."""
    contrasts = [its.contrast_target for its in scores if not math.isnan(its.contrast_kept)]
    return float(np.median(contrasts)) if contrasts else 0.0


def _score_size(scores: Sequence[lesions.LesionScores]) -> dict[str, float]:
    """Count the lesions of one size, and average their errors."""
    return {
        "lesions": len(scores),
        "mae": float(np.mean([its.mae for its in scores])),
        "recall": lesions.recall([its.contrast_kept for its in scores]),
    }
