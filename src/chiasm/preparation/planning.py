"""The choices of a plan, which follow from recipe and data: grid, intensity maps, patches, each with its reason.

A plan is fitted on training cases alone and names them.  It is all that
prediction needs to know of the cohort, so it travels with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.errors import CohortError, RecipeError, VolumeError
from chiasm.preparation import patches
from chiasm.preparation.bias_field import UNSHADED
from chiasm.preparation.degradation import describe_degradation
from chiasm.preparation.examination import check_contrast
from chiasm.preparation.fingerprint import MOST_CASES, CaseFacts, Fingerprint, fingerprint, terms_of
from chiasm.preparation.intensity import (
    FEWEST_CASES,
    IntensityMap,
    MapKind,
    Pair,
    choose_intensity,
    fit_intensity,
    fit_lookup,
    reference_map,
)
from chiasm.preparation.memory import check_prepared, prepared_bytes
from chiasm.preparation.out_of_distribution import (
    HISTOGRAM_MARGIN,
    SMALLEST_LIMIT,
    UNKNOWN_LIMIT,
    histogram_distance,
    histogram_of,
)
from chiasm.preparation.plan import AXES, Estimate, Plan, Tables, Triple, across
from chiasm.progress import Progress
from chiasm.recipe import LEAST_SPACING, MOST_SPACING, BiasCorrection, Data, Recipe, Registration
from chiasm.registration.cohort import describe_movement
from chiasm.volumes.geometry import MOST_VOXELS
from chiasm.volumes.masks import Rule
from chiasm.volumes.screening import STRICT, Reading

AIR_HU = -1000.0
NAMED_FROM = 2**30  # bytes of a prepared case from which on a plan names them
ISOTROPIC = 1.5  # largest ratio of spacings that counts as nearly the same


def make_plan(
    recipe: Recipe,
    cohort: Cohort,
    train_ids: Sequence[str],
    progress: Progress | None = None,
    *,
    needs: patches.PatchNeeds | None = None,
    moved_mm: Mapping[str, float] | None = None,
    examined: Mapping[str, CaseFacts] | None = None,
) -> Plan:
    """Choose how to prepare and train, from training cases alone; what it will cost is not known yet.

    Args:
        recipe: What is asked for.
        cohort: Holds the training cases, each with all modalities of the recipe.
        train_ids: Which they are.
        progress: Called with cases read, all cases, the next case's id.
        needs: Of networks that are not this project's own, which the recipe's widths describe.
        moved_mm: Distance that registration moved the images of each case, mm, by case id.
        examined: Case id to what examination noted, of cases that need not be read again.

    Raises:
        CohortError: If no training case can be read, or none has intensities that differ.
        RecipeError: If the patch asked for does not fit the networks.
        ValueError: If an id is unknown.
    """
    data, reasons, terms = recipe.data, dict[str, str](), terms_of(recipe.data)
    learning = _named(cohort, train_ids)
    seen = fingerprint(list(learning.values()), data.sources, data.target, progress, terms=terms, examined=examined)
    seen = _without_constants(recipe, seen, learning)
    reading = learning[train_ids[0]].reading
    reasons |= _reasons_of_data(recipe, seen, train_ids)
    reasons |= _reasons_of_requests(recipe, reading, {k: mm for k, mm in (moved_mm or {}).items() if k in train_ids})
    spacing = _choose_spacing(recipe, seen, reasons)
    _check_memory(recipe, seen, spacing, reasons)
    dims, slices = _choose_dims(recipe, seen, spacing, reasons)
    if terms.degradation is not None:
        reasons["degradation"] = describe_degradation(terms.degradation, spacing[across(terms.degradation)], dims)
    plane = patches.choose_plane(recipe, dims, reasons)
    patch = patches.choose_patch(recipe, seen, spacing, AXES[plane][:dims], reasons, needs)
    source_kinds, target_kind = _choose_kinds(recipe, seen, reasons)
    return Plan(
        **_requests(data),
        spacing_mm=spacing,
        dims=dims,
        slices=slices,
        patch=patch,
        mask_rule=seen.mask_rule,
        source_kinds=source_kinds,
        target_kind=target_kind,
        **_fitted(recipe, seen, source_kinds, target_kind, reasons),
        source_stored=tuple(_stored(seen, index) for index in range(len(data.sources))),
        **_extents(seen),
        trained_on=tuple(train_ids),
        expected=Estimate(0.0, 0.0, 0.0),
        reasons=reasons,
        degradation=terms.degradation,
        reading=reading,
        plane=plane,
    )


#: Fields of a plan that networks start from: with the weights that learnt from them they make a model.
TABLES = ("lookup", "input_mean", "input_sd", "target_sd")
#: Fields of a plan that a network's weights do not depend on: they describe the cohort.
OF_COHORT = (
    *("target_reference", "target_unit", "target_range", "target_background"),
    *("source_ranges", "source_histograms", "source_limits"),
)


def continue_plan(
    parent: Plan,
    recipe: Recipe,
    cohort: Cohort,
    train_ids: Sequence[str],
    *,
    examined: Mapping[str, CaseFacts] | None = None,
) -> Plan:
    """Take over the plan of another model, with what describes the cohort fitted anew.

    Where weights of that model go on learning (`training.parent`), its tables hold too.  Of several models that share a
    cohort, each begins with tables of its own training cases.

    Args:
        parent: Plan of that model.
        recipe: What is asked for.
        cohort: Holds the new training cases.
        train_ids: Which they are.
        examined: As for `make_plan`.

    Raises:
        CohortError: As `make_plan`.
        ValueError: If an id is unknown.
    """
    goes_on = bool(recipe.training.parent)
    why = "as in the parent, because its weights were learnt with it"
    reasons = dict.fromkeys(
        ("spacing_mm", "dims", "patch", "mask_rule", "source_kinds", "target_kind", *(["plane"] if goes_on else [])),
        why if goes_on else "as in the first of the models, so that their images can be averaged",
    )
    sources, learning = recipe.data.sources, _named(cohort, train_ids)
    terms = terms_of(recipe.data)
    seen = fingerprint(list(learning.values()), sources, recipe.data.target, terms=terms, examined=examined)
    seen = _without_constants(recipe, seen, learning)
    fitted: dict[str, Any] = {**_fitted(recipe, seen, parent.source_kinds, parent.target_kind, reasons)}
    if seen.mask_rule != parent.mask_rule:
        reasons["mask_rule"] += f"; for these images alone it would be {seen.mask_rule}: check the predictions"
    plane = parent.plane if goes_on else patches.choose_plane(recipe, parent.dims, reasons)
    if goes_on:  # a further model of a run takes the first one's patch, which was reported there
        reasons["lookup"] = "as in the parent, whose networks started from it"
        reasons["patch"] += patches.describe_empty(parent.patch, seen, parent.spacing_mm, AXES[plane][: parent.dims])
    reasons["trained_on"] = f"{len(train_ids)} training cases; ranges and the target's unit are fitted on them"
    return replace(
        parent,
        **{name: fitted[name] for name in (*OF_COHORT, *(() if goes_on else TABLES))},
        source_stored=tuple(_stored(seen, index) for index in range(len(sources))),
        **_extents(seen),
        trained_on=tuple(train_ids),
        unpaired=(),
        reasons=reasons,
        reading=learning[train_ids[0]].reading,
        plane=plane,
    )


def _named(cohort: Cohort, names: Sequence[str]) -> dict[str, Case]:
    """Return the cases of these names, in their order.

    Raises:
        ValueError: If the cohort lacks one.
    """
    cases = {case.id: case for case in cohort.cases}
    if missing := [name for name in names if name not in cases]:
        raise ValueError(f"the cohort has no case {', '.join(missing)}")
    return {name: cases[name] for name in names}


class _Requests(TypedDict):
    """Fields of a plan that the recipe decides."""

    sources: tuple[str, ...]
    target: str
    window_hu: tuple[float, float]
    histogram: bool
    registration: Registration
    bias_correction: BiasCorrection
    mask_files: bool


def _requests(data: Data) -> _Requests:
    return {
        "sources": data.sources,
        "target": data.target,
        "window_hu": data.window_hu,
        "histogram": data.histogram,
        "registration": data.registration,
        "bias_correction": data.bias_correction,
        "mask_files": data.mask == "auto",
    }


class _Extents(TypedDict):
    """Fields of a plan that say how large voxels and bodies of the training cases are: smallest and largest."""

    grid_mm: tuple[Triple, Triple]
    body_mm: tuple[Triple, Triple]


def _extents(seen: Fingerprint) -> _Extents:
    grids, bodies = ([case.spacing_mm for case in seen.cases], [case.body_mm for case in seen.cases])
    return {"grid_mm": _extremes(grids), "body_mm": _extremes(bodies)}


MASK_RULES: Mapping[Rule, str] = {
    "given": "every training case has a mask file",
    "nonzero": "the images are cut out on a constant background (skull-stripped or masked)",
    "body": "the images show air around the body: what differs from it by more than Otsu's threshold counts",
}


def _reasons_of_data(recipe: Recipe, seen: Fingerprint, train_ids: Sequence[str]) -> dict[str, str]:
    """Give the reasons that come from the data: which cases were read, and how their masks are found."""
    trained_on = f"{len(train_ids)} training cases"
    if len(train_ids) > MOST_CASES:
        trained_on += f", of which {MOST_CASES} evenly spread ones were read"
    if seen.problems:
        trained_on += f"; left out: {'; '.join(problem.message for problem in seen.problems)}"
    asked = "set in the recipe, so mask files are not used"
    return {"trained_on": trained_on, "mask_rule": MASK_RULES[seen.mask_rule] if recipe.data.mask == "auto" else asked}


def _reasons_of_requests(recipe: Recipe, reading: Reading, moved_mm: Mapping[str, float]) -> dict[str, str]:
    """Give the reasons that come from the recipe."""
    data, reasons = recipe.data, dict[str, str]()
    if data.bias_correction != "none":
        shaded = [name for name in (*data.sources, data.target) if name not in UNSHADED]
        reasons["bias_correction"] = (
            f"set in the recipe: of {', '.join(shaded)} inside the mask, so that synthetic images have no shading"
            if shaded
            else "set in the recipe, but no modality is shaded by a coil"
        )
    if reading != STRICT:
        reasons["reading"] = "asked for, as the headers of some files leave a question open"
    if data.registration != "none":
        reasons["registration"] = f"set in the recipe{f': {describe_movement(moved_mm)}' if moved_mm else ''}"
    return reasons


class _Fitted(Tables):
    """Fields of a plan that are fitted to the intensities of the training cases."""

    target_reference: IntensityMap
    target_unit: Literal["HU", "a.u."]
    target_range: tuple[float, float]
    target_background: float
    source_ranges: tuple[tuple[float, float], ...]
    source_histograms: tuple[tuple[float, ...], ...]
    source_limits: tuple[float, ...]


def _fitted(
    recipe: Recipe,
    seen: Fingerprint,
    source_kinds: Sequence[MapKind],
    target_kind: MapKind,
    reasons: dict[str, str],
) -> _Fitted:
    """Fit the maps, ranges and tables that networks start from and inputs are compared with."""
    sources, target, targets = _normalised_samples(recipe, seen, source_kinds, target_kind)
    pooled = [np.concatenate(channel) for channel in (*sources, target)]
    reference, window = reference_map(targets), recipe.data.window_hu
    ranges = [_percentiles(values) for values in pooled[:-1]]
    histograms = [[histogram_of(v, bounds) for v in channel] for channel, bounds in zip(sources, ranges)]
    tables = fit_tables(pooled)
    if target_kind == "hu":
        reasons["target_range"] = "the window of the recipe, in HU"
        bounds, background = window, max(AIR_HU, window[0])
    else:
        reasons["target_range"] = (
            "0.5 to 99.5 % of the training targets inside the masks, on the scale of the median training case"
        )
        low, high = reference.invert(np.percentile(pooled[-1], (0.5, 99.5))).tolist()
        bounds, background = (low, high), 0.0
    if recipe.data.histogram:
        reasons["histogram"] = "set in the recipe: each source is shown a second time, as ranks within its case"
    r2 = float(1 - np.mean((np.interp(pooled[0], *tables["lookup"]) - pooled[-1]) ** 2) / np.var(pooled[-1]))
    reasons["lookup"] = (
        f"intensity alone explains {100 * r2:.0f} % of the training targets' variance (R2, not held out)"
    )
    return {
        **tables,
        "target_reference": reference,
        "target_unit": "HU" if target_kind == "hu" else "a.u.",
        "target_range": bounds,
        "target_background": background,
        "source_ranges": tuple(ranges),
        "source_histograms": tuple(tuple(np.mean(each, axis=0).tolist()) for each in histograms),
        "source_limits": tuple(_usual_distance(each, bounds) for each, bounds in zip(histograms, ranges)),
    }


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


def has_gpu(accelerator: str) -> bool:
    """Return whether training will run on a CUDA device; loads torch unless the CPU is asked for."""
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
        reasons["spacing_mm"] = "set in the recipe"
        voxels = math.prod(patches.body_voxels(seen, (asked, asked, asked)))
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


def _check_memory(recipe: Recipe, seen: Fingerprint, spacing: Triple, reasons: dict[str, str]) -> None:
    """Refuse a grid on which the largest case does not fit into memory; note its memory if that is much."""
    channels = len(recipe.data.sources) * (2 if recipe.data.histogram else 1)
    largest = max(([size / step for size, step in zip(case.body_mm, spacing)] for case in seen.cases), key=math.prod)
    check_prepared(largest, channels)
    if (needed := prepared_bytes(largest, channels)) > NAMED_FROM:
        reasons["spacing_mm"] += f"; the largest case takes about {needed / 2**30:.1f} GB while it is prepared"


def _choose_dims(
    recipe: Recipe, seen: Fingerprint, spacing: Triple, reasons: dict[str, str]
) -> tuple[Literal[2, 3], int]:
    asked, slices = recipe.data.dims, recipe.data.slices
    if asked == "auto":
        against = _why_not_3d(recipe, seen, spacing)
        asked, reasons["dims"] = ("2.5d", against) if against else ("3d", "spacing is nearly even and there is a GPU")
    else:
        reasons["dims"] = f"{asked} was set in the recipe"
    if asked == "3d":
        return 3, 1
    reasons["slices"] = "one slice in, one slice out" if asked == "2d" else f"{slices} neighbouring slices in, one out"
    return 2, 1 if asked == "2d" else slices


def _why_not_3d(recipe: Recipe, seen: Fingerprint, spacing: Triple) -> str:
    """Return the reason against training in 3D; empty without one."""
    if recipe.data.plane != "auto":
        return "slices of a plane were asked for"
    if recipe.size not in ("paper", "large"):
        return f"3D training is too slow for the size {recipe.size}"
    if max(spacing) > ISOTROPIC * min(spacing):
        return "the slices are thick, so neighbours show little: 3D needs even spacing"
    if min(patches.body_voxels(seen, spacing)) < patches.SMALLEST_PATCH:
        return "the volumes are too thin for 3D patches"
    if not has_gpu(recipe.training.accelerator):
        return "there is no GPU, and 3D training is too slow without one"
    return ""


def _choose_kinds(recipe: Recipe, seen: Fingerprint, reasons: dict[str, str]) -> tuple[tuple[MapKind, ...], MapKind]:
    names = (*recipe.data.sources, recipe.data.target)
    target = names[-1]
    kinds: dict[str, MapKind] = {name: "hu" for name in names if name == "ct"}
    because = dict.fromkeys(kinds, "CT has a unit, so a fixed window is kept")
    for name in names[:-1]:
        free = [one for one in dict.fromkeys((name, target)) if one not in kinds]
        if free:
            kind, why = _choose_kind(recipe, seen, name, kinds)
            kinds |= dict.fromkeys(free, kind)
            because |= dict.fromkeys(free, why)
    reasons["source_kinds"] = "; ".join(dict.fromkeys(f"{name}: {because[name]}" for name in names[:-1]))
    reasons["target_kind"] = because[target]
    return tuple(kinds[name] for name in names[:-1]), kinds[target]


def _choose_kind(recipe: Recipe, seen: Fingerprint, name: str, kinds: Mapping[str, MapKind]) -> tuple[MapKind, str]:
    """Choose the kind of map by which the training cases agree best in a source and the target, and say why."""
    asked, target = recipe.data.intensity, recipe.data.target
    if asked != "auto":
        return asked, f"{asked} was set in the recipe"
    channels = [(recipe.data.sources.index(name), name), (len(recipe.data.sources), target)]
    pairs = [Pair(*(_clipped(case.samples[c], each, recipe) for c, each in channels)) for case in seen.cases]
    kind, table = choose_intensity(pairs, source_kind=kinds.get(name), target_kind=kinds.get(target))
    if not table:
        return kind, (
            f"{kind}, since there are too few cases to measure which kind makes them agree "
            f"({len(pairs)} of {FEWEST_CASES})"
        )
    shown = ", ".join(f"{one} {r2:.2f}" for one, r2 in sorted(table.items(), key=lambda row: -row[1]))
    return kind, f"{kind} makes the training cases agree best; R2 of an unseen case by intensity alone: {shown}"


def _normalised_samples(
    recipe: Recipe, seen: Fingerprint, source_kinds: Sequence[MapKind], target_kind: MapKind
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


def _usual_distance(histograms: Sequence[NDArray[np.float64]], bounds: tuple[float, float]) -> float:
    """Largest distance of a training case from the mean of the others, with a margin."""
    extent, total, others = bounds[1] - bounds[0], np.sum(histograms, axis=0), len(histograms) - 1
    if len(histograms) < FEWEST_CASES:
        return UNKNOWN_LIMIT * extent
    farthest = max(histogram_distance(one, (total - one) / others, bounds) for one in histograms)
    return max(HISTOGRAM_MARGIN * farthest, SMALLEST_LIMIT * extent)


def _extremes(rows: Sequence[Triple]) -> tuple[Triple, Triple]:
    (a, b, c), (d, e, f) = np.min(rows, axis=0).tolist(), np.max(rows, axis=0).tolist()
    return (a, b, c), (d, e, f)
