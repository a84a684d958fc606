"""What follows from recipe and data: grid, intensity maps, patches, each with its reason.

A plan is fitted on training cases alone and names them.  It is all that
prediction needs to know of the cohort, so it travels with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.errors import CohortError, RecipeError, RunError, VolumeError
from chiasm.preparation.bias_field import UNSHADED
from chiasm.preparation.degradation import Axis, Degradation
from chiasm.preparation.examination import check_contrast
from chiasm.preparation.fingerprint import MOST_CASES, CaseFacts, Fingerprint, Progress, fingerprint, terms_of
from chiasm.preparation.intensity import (
    FEWEST_CASES,
    IntensityMap,
    Kind,
    Pair,
    choose_intensity,
    fit_intensity,
    fit_lookup,
    reference_map,
)
from chiasm.recipe import LEAST_SPACING, MOST_SPACING, BiasCorrection, Recipe, Registration
from chiasm.registration.cohort import tell_movement
from chiasm.storage import check_seal, is_safe_id, read_toml, sealed, write_toml
from chiasm.volumes.geometry import MOST_VOXELS
from chiasm.volumes.masks import Rule
from chiasm.volumes.screening import STRICT, Reading

Triple = tuple[float, float, float]

#: Fields of a plan that are long tables of numbers.
FITTED = (
    *("target_reference", "lookup", "input_mean", "input_sd"),
    *("source_ranges", "source_histograms", "source_limits", "source_stored"),
)

REMEDY = (
    "In a run folder, delete it: the same command makes it anew from the same cases. "
    "In a model folder, copy the model again."
)
HISTOGRAM_BINS = 32
AIR_HU = -1000.0
ISOTROPIC = 1.5  # largest ratio of spacings that counts as nearly the same
PATCH_2D: Mapping[str, int] = {"tiny": 64, "small": 128, "large": 160, "paper": 160}
PATCH_3D: Mapping[str, int] = {"tiny": 32, "small": 64, "large": 96, "paper": 96}
SMALLEST_PATCH = 64
MOST_PATCH = 2**24  # voxels: 256 along each of three axes
MOST_EMPTY = 1.25  # a patch so many times as long as the body is told of

# An input is unlike the training cases beyond these factors of what was seen there.
SPACING_MARGIN = 1.5
FIELD_MARGIN = 1.3
HISTOGRAM_MARGIN = 1.5
SMALLEST_LIMIT = 0.02  # of a histogram's distance, as a share of the source's range
UNKNOWN_LIMIT = 0.1  # likewise, where too few cases tell what is usual
STORED_BELOW_ZERO = 0.02  # of an image's range: scanners store magnitudes, which are not negative
STORED_MARGIN = 50.0  # between the gains of scanners; [0, 1] is farther from any


class PatchNeeds(NamedTuple):
    """What networks of the literature, and the judges of what they make, ask of a patch.

    Attributes:
        multiple: Every side is `offset` and a multiple of this.
        smallest: No side is shorter.
        offset: What valid convolutions lose, where a judge asks a multiple of the rest.
        own: Whether the generator is this project's own, which the recipe's widths describe.
    """

    multiple: int = 1
    smallest: int = 1
    offset: int = 0
    own: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run will cost on this machine: a forecast, on an idle CPU to within a factor of about 1.3.

    Attributes:
        seconds_per_step: Mean over the schedule.
        minutes: All steps; without preparing and validating.
        memory_mb: Most resident memory of the training process, in float32: less in bfloat16 (on a GPU: of its memory).
    """

    seconds_per_step: float
    minutes: float
    memory_mb: float


@dataclass(frozen=True)
class Plan:
    """How this cohort is prepared, trained on and predicted.

    Axes are in RAS order, for super-resolution as `degradation.arranged` says.
    "Normalised" intensities are those after a volume's
    own map; raw target units are those of `target_reference`.  Where the target is
    one of the sources, both share the source's map.

    Attributes:
        sources: Modalities that go in.
        target: The modality that comes out.
        spacing_mm: Of the prepared grid.
        dims: 2 (axial slices; also 2.5D) or 3.
        slices: Neighbouring slices of a 2.5D source; 1 in 2D and 3D.
        patch: Size in voxels, (I, J) or (I, J, K).
        mask_rule: How a mask is found where no file gives one.
        source_kinds: Kind of intensity map of each source.
        target_kind: That of the target.
        target_reference: The cohort's map of the target: normalised to raw units.
        target_unit: "HU", or "a.u." where the modality has no unit.
        target_range: Lowest and highest raw intensity that matter: 0.5 and
            99.5 % inside the masks, or the window for HU.
        target_background: Raw intensity of air.
        target_sd: SD inside the masks, normalised.
        window_hu: Hounsfield units that are kept.
        lookup: Knots (x, y) of the target expected at each intensity of the
            first source, normalised.
        input_mean: Of each source and the target inside the masks, normalised.
        input_sd: Likewise.
        source_ranges: 0.5 and 99.5 % of each source, normalised.
        source_histograms: Mean share of 32 bins over each source's range.
        source_limits: Largest distance of a histogram from those that is still usual.
        grid_mm: Smallest and largest spacing of the training cases on each axis.
        body_mm: Smallest and largest size of the box around their masks.
        trained_on: Ids of the training cases, which alone were looked at.
        expected: Cost on the machine where the plan was made; no part of what makes plans equal, and None in a model.
        reasons: One sentence for each choice, by field.
        histogram: Whether each source is shown a second time, as its rank in the case's own histogram.
        context: Whether the generator sees, after all these, the target as an earlier stage predicted it.
        degradation: For super-resolution: the thick slices that sources have; None for synthesis.
        registration: How other images of a case are brought to its first source.
        bias_correction: Of MR images inside the mask, the target's too.
        mask_files: Whether a case's own mask is used where it has one; else `mask_rule` is a must.
        reading: What is assumed of files whose headers leave a question open, in training and prediction alike.
        unpaired: Ids of further cases of which one side of a pair is seen, and no figure above is fitted on.
        source_stored: Lowest and highest intensity of each source as stored, inside the masks of all training cases.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    sources: tuple[str, ...]
    target: str
    spacing_mm: Triple
    dims: Literal[2, 3]
    slices: int
    patch: tuple[int, ...]
    mask_rule: Rule
    source_kinds: tuple[Kind, ...]
    target_kind: Kind
    target_reference: IntensityMap
    target_unit: Literal["HU", "a.u."]
    target_range: tuple[float, float]
    target_background: float
    target_sd: float
    window_hu: tuple[float, float]
    lookup: tuple[tuple[float, ...], tuple[float, ...]]
    input_mean: tuple[float, ...]
    input_sd: tuple[float, ...]
    source_ranges: tuple[tuple[float, float], ...]
    source_histograms: tuple[tuple[float, ...], ...]
    source_limits: tuple[float, ...]
    grid_mm: tuple[Triple, Triple]
    body_mm: tuple[Triple, Triple]
    trained_on: tuple[str, ...]
    expected: Estimate | None = field(compare=False)
    reasons: Mapping[str, str] = field(compare=False)
    histogram: bool = False  # plans of before hold none
    context: bool = False  # likewise
    degradation: Degradation | None = None
    registration: Registration = "none"
    bias_correction: BiasCorrection = "none"
    mask_files: bool = True
    unpaired: tuple[str, ...] = ()
    reading: Reading = STRICT
    source_stored: tuple[tuple[float, float], ...] = ()  # plans of before hold none

    @property
    def images(self) -> int:
        """Images that come from files: the sources, and after them their ranks; no context."""
        return len(self.sources) * (2 if self.histogram else 1)

    @property
    def own(self) -> int | None:
        """Which source is the target's own modality: super-resolution alone; None for synthesis."""
        return self.sources.index(self.target) if self.target in self.sources else None

    def __post_init__(self) -> None:
        count = len(self.sources)
        per_source = (self.source_kinds, self.source_ranges, self.source_histograms, self.source_limits)
        wrong = {
            "there must be a source, and one entry for each": not count
            or any(len(entries) != count for entries in per_source)
            or len(self.input_mean) != count + 1
            or len(self.input_sd) != count + 1,
            "numbers must be finite and below 1e9": not (np.abs(self._numbers()) < 1e9).all(),
            "sizes must be positive": min(*self.spacing_mm, *self.patch, *self.input_sd, self.target_sd) <= 0,
            f"voxels must be of {LEAST_SPACING:g} to {MOST_SPACING:g} mm": min(self.spacing_mm) < LEAST_SPACING
            or max(self.spacing_mm) > MOST_SPACING,
            f"a patch has at most {MOST_PATCH:,} voxels": math.prod(self.patch) > MOST_PATCH,
            "a modality must have the name of a file": not all(map(is_safe_id, (*self.sources, self.target))),
            "the patch must have as many axes as dims": len(self.patch) != self.dims,
            "the target may be a source for super-resolution alone": self.own is not None and self.degradation is None,
            "slices must be odd, at most 15, and 1 in 3D": self.slices not in range(1, 16, 2)
            or (self.dims == 3 and self.slices != 1),
            "ranges must rise": self.target_range[0] >= self.target_range[1]
            or any(low >= high for low, high in self.source_ranges),
            "the look-up must rise in x": len(self.lookup[0]) != len(self.lookup[1])
            or len(self.lookup[0]) < 2
            or bool(np.any(np.diff(self.lookup[0]) <= 0)),
            "histograms have 32 bins": any(len(shares) != HISTOGRAM_BINS for shares in self.source_histograms),
        }
        if broken := [sentence for sentence, holds in wrong.items() if holds]:
            raise ValueError("; ".join(broken))

    def _numbers(self) -> NDArray[np.float64]:
        tables = (self.spacing_mm, self.target_range, self.window_hu, *self.lookup, self.input_mean, self.input_sd)
        pairs = (*self.source_ranges, *self.source_histograms, *self.grid_mm, *self.body_mm, self.source_limits)
        return np.array([*chain(*tables, *pairs), self.target_background, self.target_sd], np.float64)


class Seen(Protocol):
    """What `unlike` looks at: a prepared source."""

    @property
    def array(self) -> NDArray[np.float32]:
        """Normalised sources, shape (C, I, J, K); what follows them is not looked at."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Valid voxels, shape (I, J, K)."""

    @property
    def mask_rule(self) -> Rule:
        """How the mask was found."""

    @property
    def maps(self) -> tuple[IntensityMap, ...]:
        """Of each source: stored to normalised intensities."""

    @property
    def grid_mm(self) -> Triple:
        """Spacing before resampling."""

    @property
    def body_mm(self) -> Triple:
        """Size of the box around the mask."""


def make_plan(
    recipe: Recipe,
    cohort: Cohort,
    train_ids: Sequence[str],
    progress: Progress | None = None,
    *,
    needs: PatchNeeds | None = None,
    moved_mm: Mapping[str, float] | None = None,
    examined: Mapping[str, CaseFacts] | None = None,
) -> Plan:
    """Choose how to prepare and train, from training cases alone.

    Args:
        recipe: What is asked for.
        cohort: Holds the training cases, each with all modalities of the recipe.
        train_ids: Which they are.
        progress: Called with cases read, all cases, the next case's id.
        needs: Of networks that are not this project's own, which the recipe's widths describe.
        moved_mm: Case id to how far its images were moved, where they were registered.
        examined: Case id to what examination noted, of cases that need not be read again.

    Returns:
        The plan; what it will cost is not known yet.

    Raises:
        CohortError: If no training case can be read, or none has intensities that differ.
        RecipeError: If the patch asked for does not fit the networks.
        ValueError: If an id is unknown.
    """
    cases = {case.id: case for case in cohort.cases}
    if missing := [name for name in train_ids if name not in cases]:
        raise ValueError(f"the cohort has no case {', '.join(missing)}")
    data, reasons = recipe.data, dict[str, str]()
    terms = terms_of(data)
    degradation = terms.degradation
    learning = [cases[name] for name in train_ids]
    seen = fingerprint(learning, data.sources, data.target, progress, terms=terms, examined=examined)
    seen = _without_constants(recipe, seen, cases)
    reasons["trained_on"] = f"{len(train_ids)} training cases" + (
        f", of which {MOST_CASES} evenly spread ones were read" if len(train_ids) > MOST_CASES else ""
    )
    if seen.problems:
        reasons["trained_on"] += f"; left out: {'; '.join(problem.message for problem in seen.problems)}"
    reasons["mask_rule"] = {
        "given": "every training case has a mask file",
        "nonzero": "the images are cut out on a constant background (skull-stripped or masked)",
        "body": "the images show air around the body: what differs from it by more than Otsu's threshold counts",
    }[seen.mask_rule]
    if data.mask != "auto":
        reasons["mask_rule"] = "asked for in the recipe, so mask files are not used"
    if data.bias_correction != "none":
        shaded = [name for name in (*data.sources, data.target) if name not in UNSHADED]
        reasons["bias_correction"] = (
            f"asked for in the recipe: of {', '.join(shaded)} inside the mask, so that synthetic images have no shading"
            if shaded
            else "asked for in the recipe, but no modality is shaded by a coil"
        )
    reading = cases[train_ids[0]].reading
    if reading != STRICT:
        reasons["reading"] = "asked for, as the headers of some files leave a question open"
    if data.registration != "none":
        moved = {name: mm for name, mm in (moved_mm or {}).items() if name in train_ids}
        reasons["registration"] = f"asked for in the recipe{f': {tell_movement(moved)}' if moved else ''}"
    spacing = _choose_spacing(recipe, seen, reasons)
    dims, slices = _choose_dims(recipe, seen, spacing, reasons)
    if degradation is not None:
        reasons["degradation"] = _tell(degradation, spacing[across(degradation)], dims)
    patch = _choose_patch(recipe, seen, spacing, dims, reasons, needs)
    source_kinds, target_kind = _choose_kinds(recipe, seen, reasons)
    sources, target, targets = _normalised_samples(recipe, seen, source_kinds, target_kind)
    reference = reference_map(targets)
    pooled = [np.concatenate(channel) for channel in (*sources, target)]
    is_ct = target_kind == "hu"
    low, high = (float(value) for value in reference.invert(np.percentile(pooled[-1], (0.5, 99.5))))
    reasons["target_range"] = (
        "the window of the recipe, in HU"
        if is_ct
        else "0.5 to 99.5 % of the training targets inside the masks, on the scale of the median training case"
    )
    ranges = [_percentiles(values) for values in pooled[:-1]]
    histograms = [[_histogram(v, bounds) for v in channel] for channel, bounds in zip(sources, ranges)]
    if data.histogram:
        reasons["histogram"] = "asked for in the recipe: each source is shown a second time, as ranks within its case"
    tables = fit_tables(pooled)
    lookup = tables["lookup"]
    r2 = float(1 - np.mean((np.interp(pooled[0], *lookup) - pooled[-1]) ** 2) / np.var(pooled[-1]))
    reasons["lookup"] = (
        f"intensity alone explains {100 * r2:.0f} % of the training targets' variance (R2, not held out)"
    )
    return Plan(
        sources=data.sources,
        target=data.target,
        spacing_mm=spacing,
        dims=dims,
        slices=slices,
        patch=patch,
        mask_rule=seen.mask_rule,
        source_kinds=source_kinds,
        target_kind=target_kind,
        target_reference=reference,
        target_unit="HU" if is_ct else "a.u.",
        target_range=data.window_hu if is_ct else (low, high),
        target_background=max(AIR_HU, data.window_hu[0]) if is_ct else 0.0,
        window_hu=data.window_hu,
        **tables,
        source_ranges=tuple(ranges),
        source_histograms=tuple(tuple(np.mean(each, axis=0).tolist()) for each in histograms),
        source_limits=tuple(_usual_distance(each, bounds) for each, bounds in zip(histograms, ranges)),
        source_stored=tuple(_stored(seen, index) for index in range(len(data.sources))),
        grid_mm=_extremes([case.spacing_mm for case in seen.cases]),
        body_mm=_extremes([case.body_mm for case in seen.cases]),
        trained_on=tuple(train_ids),
        expected=Estimate(0.0, 0.0, 0.0),
        reasons=reasons,
        histogram=data.histogram,
        degradation=degradation,
        registration=data.registration,
        bias_correction=data.bias_correction,
        mask_files=data.mask == "auto",
        reading=reading,
    )


class Tables(TypedDict):
    """Fields of a plan that a network starts from."""

    lookup: tuple[tuple[float, ...], tuple[float, ...]]
    input_mean: tuple[float, ...]
    input_sd: tuple[float, ...]
    target_sd: float


def fit_tables(pooled: Sequence[NDArray[np.float32]]) -> Tables:
    """Fit what a network starts from to normalised voxels: each source's, and last the target's, shape (n,) each.

    Raises:
        ValueError: As `fit_lookup`.
    """
    x, y = fit_lookup(pooled[0], pooled[-1])
    return {
        "lookup": (tuple(x.tolist()), tuple(y.tolist())),
        "input_mean": tuple(float(values.mean()) for values in pooled),
        "input_sd": tuple(float(values.std()) for values in pooled),
        "target_sd": float(pooled[-1].std()),
    }


def across(degradation: Degradation) -> int:
    """Return which of the arranged axes runs across the thick slices."""
    return 0 if degradation.axis == "I" else 1


def _tell(degradation: Degradation, thin_mm: float, dims: int) -> str:
    names: Mapping[Axis, str] = {"I": "sagittal", "J": "coronal", "K": "axial"}
    thick = f"{names[degradation.axis]} slices of {degradation.factor * thin_mm:.3g} mm"
    told = (
        f"super-resolution was asked for: {thick}, made of the cases' own and interpolated by a cubic spline, "
        f"become slices of {thin_mm:.3g} mm"
    )
    shown = "coronal" if degradation.axis == "K" else "axial"
    return f"{told}; the network sees {shown} slices, which show them edge-on" if dims == 2 else told


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as TOML for people to read: choices, `[expected]` cost, `[reasons]`, and last what is `[fitted]`.

    It is sealed.
    """
    content = TypeAdapter(Plan).dump_python(plan, mode="json", exclude_none=True)  # TOML has no null
    fitted = {name: content.pop(name) for name in FITTED}
    write_toml(path, sealed({**content, "fitted": fitted}))


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        RunError: If the file is missing, no TOML, its values are no plan, or it was changed after `write_plan`.
    """
    content = read_toml(path)
    fitted = content.get("fitted")
    flat = {"expected": None, **content} | (fitted if isinstance(fitted, dict) else {})
    try:
        plan = TypeAdapter(Plan).validate_python(flat)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise RunError(
            f"is no plan of this chiasm: {name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}",
            path=path,
            reason="damaged",
            hint=REMEDY,
        ) from error
    check_seal(content, path, REMEDY)
    return plan


def unlike(plan: Plan, prepared: Seen) -> str | None:
    """Say in one sentence how an input differs from all training cases, or None where it does not.

    Looks at the spacing before resampling, the size of what the mask holds,
    how the mask had to be found, and each source's histogram.  Intensities of
    another scale come first: an image that somebody normalised is often told by the rest too.
    """
    findings = _unlike_scales(plan, prepared)
    for kind, seen, (smallest, largest), margin in (
        ("voxels", prepared.grid_mm, plan.grid_mm, SPACING_MARGIN),
        ("a brain or body", prepared.body_mm, plan.body_mm, FIELD_MARGIN),
    ):
        if any(s < a / margin or s > b * margin for s, a, b in zip(seen, smallest, largest)):
            findings.append(f"{kind} of {_size(seen)} mm ({_size(smallest)} to {_size(largest)} mm in training)")
    if plan.mask_rule == "nonzero" and prepared.mask_rule == "body":
        findings.append("an image that is not cut out on a constant background as the training images were")
    for index, name in enumerate(plan.sources):
        histogram = _histogram(prepared.array[index][prepared.mask], plan.source_ranges[index])
        distance = _distance(histogram, plan.source_histograms[index], plan.source_ranges[index])
        if distance > plan.source_limits[index]:
            findings.append(
                f"a histogram of {name} that is {distance / plan.source_limits[index]:.1f} times as far from the "
                "training images' as is usual"
            )
    return f"the input is unlike the training cases: it has {', and '.join(findings)}" if findings else None


def _unlike_scales(plan: Plan, prepared: Seen) -> list[str]:
    """Say which sources were normalised before they were stored, where the training images were not, or the reverse."""
    findings = []
    for index, (name, trained) in enumerate(zip(plan.sources, plan.source_stored)):
        seen = prepared.maps[index].invert(np.percentile(prepared.array[index][prepared.mask], (0.5, 99.5)))
        stored = float(seen[0]), float(seen[1])
        if plan.source_kinds[index] != "hu" and (how := _rescaled(stored, trained)):
            findings.append(
                f"intensities of {name} from {stored[0]:.3g} to {stored[1]:.3g} ({trained[0]:.3g} to {trained[1]:.3g} "
                f"in training), so {how}"
            )
    return findings


def _rescaled(stored: tuple[float, float], trained: tuple[float, float]) -> str:
    """Tell how stored intensities differ from those of the training images; empty where they are of one kind.

    >>> _rescaled((-2.0, 3.0), (0.0, 900.0)), _rescaled((5.0, 3000.0), (0.0, 900.0))
    ('the image seems to be z-scored or otherwise normalised, and the training images were not', '')
    """
    (low, high), (lowest, highest) = stored, trained
    if _has_negatives(low, high) and not _has_negatives(lowest, highest):
        return "the image seems to be z-scored or otherwise normalised, and the training images were not"
    if _has_negatives(lowest, highest) and not _has_negatives(low, high):
        return "the image does not seem to be normalised as the training images were"
    if high * STORED_MARGIN < highest or highest * STORED_MARGIN < high:
        return "one of both seems to be scaled, the image or the training images"
    return ""


def _has_negatives(low: float, high: float) -> bool:
    return low < -STORED_BELOW_ZERO * (high - low)


def has_gpu(accelerator: str) -> bool:
    """Tell whether training will run on a CUDA device; loads torch unless the CPU is asked for."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _without_constants(recipe: Recipe, seen: Fingerprint, cases: Mapping[str, Case]) -> Fingerprint:
    """Leave out, by name, cases in which an image is nearly constant inside the mask, so that no map fits it."""
    usable, problems = [], [*seen.problems]
    names = (*recipe.data.sources, recipe.data.target)
    for facts in seen.cases:
        try:
            check_contrast(cases[facts.id], dict(zip(names, facts.samples)), recipe.data)
            usable.append(facts)
        except VolumeError as error:
            path = error.path or next(iter(cases[facts.id].images.values()))
            problems.append(Problem(path, error.reason, f"case {facts.id}: {error}", facts.id))
    if not usable:
        raise CohortError(f"no training case can be used; the first: {problems[0].message}", reason="no-usable-case")
    return Fingerprint(tuple(usable), seen.mask_rule, tuple(problems))


def _choose_spacing(recipe: Recipe, seen: Fingerprint, reasons: dict[str, str]) -> Triple:
    asked = recipe.data.spacing_mm
    if asked != "auto":
        reasons["spacing_mm"] = "asked for in the recipe"
        voxels = math.prod(_body_voxels(seen, (asked, asked, asked)))
        if voxels > MOST_VOXELS:
            raise RecipeError(
                "data.spacing_mm is too fine for these images",
                reason="spacing",
                found=f"{asked:g} mm, or {voxels:.2g} voxels a case",
                expected=f"at most {MOST_VOXELS:.2g} voxels",
            )
        return asked, asked, asked
    i, j, k = (round(float(step), 4) for step in np.median([case.spacing_mm for case in seen.cases], axis=0))
    if min(i, j, k) < LEAST_SPACING or max(i, j, k) > MOST_SPACING:
        raise RecipeError(
            "the voxels of the training cases are of no usual size",
            reason="spacing",
            found=f"{i:g} x {j:g} x {k:g} mm",
            expected=f"{LEAST_SPACING:g} to {MOST_SPACING:g} mm",
            hint="Set data.spacing_mm, or check the units of the files.",
        )
    thick = "; thick slices are kept, since interpolation adds no detail" if k > ISOTROPIC * max(i, j) else ""
    reasons["spacing_mm"] = f"the median of the training cases{thick}"
    return i, j, k


def _choose_dims(
    recipe: Recipe, seen: Fingerprint, spacing: Triple, reasons: dict[str, str]
) -> tuple[Literal[2, 3], int]:
    asked, slices = recipe.data.dims, recipe.data.slices
    if asked != "auto":
        reasons["dims"] = f"{asked} was asked for in the recipe"
    elif recipe.size not in ("paper", "large"):
        asked, reasons["dims"] = "2.5d", f"3D training is too slow for the size {recipe.size}"
    elif max(spacing) > ISOTROPIC * min(spacing):
        asked, reasons["dims"] = "2.5d", "the slices are thick, so neighbours tell little: 3D needs even spacing"
    elif min(_body_voxels(seen, spacing)) < SMALLEST_PATCH:
        asked, reasons["dims"] = "2.5d", "the volumes are too thin for 3D patches"
    elif not has_gpu(recipe.training.accelerator):
        asked, reasons["dims"] = "2.5d", "there is no GPU, and 3D training is too slow without one"
    else:
        asked, reasons["dims"] = "3d", "spacing is nearly even and there is a GPU"
    if asked == "3d":
        return 3, 1
    reasons["slices"] = "one slice in, one slice out" if asked == "2d" else f"{slices} neighbouring slices in, one out"
    return 2, 1 if asked == "2d" else slices


def _choose_patch(
    recipe: Recipe,
    seen: Fingerprint,
    spacing: Triple,
    dims: Literal[2, 3],
    reasons: dict[str, str],
    needs: PatchNeeds | None,
) -> tuple[int, ...]:
    judges = recipe.discriminators
    needs = needs or PatchNeeds(own=True)
    shaped = (recipe.generator.widths if needs.own else (1,), recipe.generator.refiner, judges.local_widths)  # like a U
    halvings = max(*(len(widths) - 1 for widths in shaped), len(judges.global_widths))
    multiple = math.lcm(2**halvings, needs.multiple)
    asked = recipe.data.patch
    smaller = "generator.network=pix2pix-32 takes multiples of 32." if recipe.generator.network == "pix2pix" else None
    if asked != "auto":
        if asked**dims > MOST_PATCH:
            raise RecipeError(
                "data.patch is too large", reason="patch", found=asked, expected=f"at most {MOST_PATCH:,} voxels in all"
            )
        step = multiple if needs.own else needs.multiple
        least = _next_fit(needs.smallest, step, needs.offset)
        if asked < least or asked % step != needs.offset % step:
            lower = max(least, _next_fit(asked, step, needs.offset) - step)
            more = f"{needs.offset} more than " if needs.offset else ""
            raise RecipeError(
                "data.patch does not fit the networks",
                reason="patch",
                found=asked,
                expected=f"{more}a multiple of {step}, such as {lower} or {lower + step}"
                if step > 1
                else f"at least {least}",
                hint=smaller,
            )
        reasons["patch"] = "asked for in the recipe"
        return (asked,) * dims
    least = _next_fit(needs.smallest, multiple, needs.offset)
    usual = (PATCH_2D if dims == 2 else PATCH_3D).get(recipe.size, SMALLEST_PATCH)
    most = max(least, _next_fit(usual - multiple + 1, multiple, needs.offset))
    reasons["patch"] = (
        f"{f'{needs.offset} voxels and ' if needs.offset else ''}multiples of {multiple}, which the networks need; "
        f"at most {most} at size {recipe.size}, and no larger than just holds the median brain or body"
    )
    body = [math.ceil(size) for size in _body_voxels(seen, spacing)[:dims]]
    if any(least > MOST_EMPTY * side for side in body):
        reasons["patch"] = (
            f"the networks need {least} voxels, though the median brain or body has but {' x '.join(map(str, body))}: "
            f"the rest of a patch is empty, and a step costs as if it were not{f'; {smaller}' if smaller else ''}"
        ).rstrip(".")
    sides = (_next_fit(size, multiple, needs.offset) for size in body)
    return tuple(min(most, max(least, side)) for side in sides)


def _next_fit(size: int, multiple: int, offset: int) -> int:
    """Return the smallest number that is at least `size`, and `offset` more than a multiple.

    >>> _next_fit(33, 8, 0), _next_fit(33, 8, 12), _next_fit(36, 8, 12)
    (40, 36, 36)
    """
    return size + (offset - size) % multiple


def _choose_kinds(recipe: Recipe, seen: Fingerprint, reasons: dict[str, str]) -> tuple[tuple[Kind, ...], Kind]:
    names = (*recipe.data.sources, recipe.data.target)
    kinds: dict[str, Kind] = {name: "hu" for name in names if name == "ct"}
    because = dict.fromkeys(kinds, "CT has a unit, so a fixed window is kept")
    for name in names[:-1]:
        free = [one for one in dict.fromkeys((name, names[-1])) if one not in kinds]
        if not free:
            continue
        if recipe.data.intensity != "auto":
            kind: Kind = recipe.data.intensity
            why = f"{kind} was asked for in the recipe"
        else:
            channels = [names.index(name), len(names) - 1]
            pairs = [Pair(*(_clipped(case.samples[c], names[c], recipe) for c in channels)) for case in seen.cases]
            kind, table = choose_intensity(pairs, source_kind=kinds.get(name), target_kind=kinds.get(names[-1]))
            shown = ", ".join(f"{one} {r2:.2f}" for one, r2 in sorted(table.items(), key=lambda row: -row[1]))
            why = (
                f"{kind} makes the training cases agree best; R2 of an unseen case by intensity alone: {shown}"
                if table
                else f"{kind}, since {len(pairs)} cases are too few to measure which kind makes cases agree "
                f"({FEWEST_CASES} are needed)"
            )
        kinds |= dict.fromkeys(free, kind)
        because |= dict.fromkeys(free, why)
    reasons["source_kinds"] = "; ".join(dict.fromkeys(f"{name}: {because[name]}" for name in names[:-1]))
    reasons["target_kind"] = because[names[-1]]
    return tuple(kinds[name] for name in names[:-1]), kinds[names[-1]]


def _normalised_samples(
    recipe: Recipe, seen: Fingerprint, source_kinds: Sequence[Kind], target_kind: Kind
) -> tuple[list[list[NDArray[np.float32]]], list[NDArray[np.float32]], list[IntensityMap]]:
    """Return each source's samples by case, the target's, and the target's maps."""
    names, window = (*recipe.data.sources, recipe.data.target), recipe.data.window_hu
    channels: list[list[NDArray[np.float32]]] = []
    maps: list[IntensityMap] = []
    of_sources: list[list[IntensityMap]] = []
    for index, kind in enumerate((*source_kinds, target_kind)):
        raw = [_clipped(case.samples[index], names[index], recipe) for case in seen.cases]
        maps = [fit_intensity(values, None, kind, window) for values in raw]
        if index == len(names) - 1 and names[-1] in names[:-1]:
            maps = of_sources[names.index(names[-1])]
        of_sources.append(maps)
        channels.append([one.apply(values) for one, values in zip(maps, raw)])
    return channels[:-1], channels[-1], maps


def _clipped(values: NDArray[np.float32], name: str, recipe: Recipe) -> NDArray[np.float32]:
    return np.clip(values, *recipe.data.window_hu) if name == "ct" else values


def _stored(seen: Fingerprint, index: int) -> tuple[float, float]:
    """Return the lowest 0.5 % and the highest 99.5 % of one source among the training cases, as stored."""
    ranges = [_percentiles(case.samples[index]) for case in seen.cases]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _percentiles(values: NDArray[np.float32]) -> tuple[float, float]:
    low, high = np.percentile(values, (0.5, 99.5)).tolist()
    return low, max(high, low + 1e-6)


def _histogram(values: NDArray[np.float32], bounds: tuple[float, float]) -> NDArray[np.float64]:
    """Share of the values in each of 32 bins over `bounds`; what lies beyond falls into the first and the last."""
    counts = np.histogram(np.clip(values, *bounds), bins=HISTOGRAM_BINS, range=bounds)[0]
    shares: NDArray[np.float64] = counts / max(1, counts.sum())
    return shares


def _distance(a: ArrayLike, b: ArrayLike, bounds: tuple[float, float]) -> float:
    """Wasserstein distance of two histograms, in normalised intensities."""
    width = (bounds[1] - bounds[0]) / HISTOGRAM_BINS
    return float(np.abs(np.cumsum(np.subtract(a, b))).sum() * width)


def _usual_distance(histograms: Sequence[NDArray[np.float64]], bounds: tuple[float, float]) -> float:
    """Largest distance of a training case from the mean of the others, with a margin."""
    extent, total, others = bounds[1] - bounds[0], np.sum(histograms, axis=0), len(histograms) - 1
    if len(histograms) < FEWEST_CASES:
        return UNKNOWN_LIMIT * extent
    farthest = max(_distance(one, (total - one) / others, bounds) for one in histograms)
    return max(HISTOGRAM_MARGIN * farthest, SMALLEST_LIMIT * extent)


def _extremes(rows: Sequence[Triple]) -> tuple[Triple, Triple]:
    (a, b, c), (d, e, f) = np.min(rows, axis=0).tolist(), np.max(rows, axis=0).tolist()
    return (a, b, c), (d, e, f)


def _body_voxels(seen: Fingerprint, spacing: Triple) -> list[float]:
    sizes: list[float] = (np.median([case.body_mm for case in seen.cases], axis=0) / spacing).tolist()
    return sizes


def _size(millimetres: Triple) -> str:
    return " x ".join(f"{one:.3g}" for one in millimetres)
