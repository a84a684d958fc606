"""One predicted case with its real images, labels and mask, and the naive baselines made for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.cohorts.dicom_patients import marks_on
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.labels import usable_labels
from chiasm.errors import CohortError
from chiasm.evaluation.kept import KeptImage, KeptPart, box_around, is_constant_beyond, laid_out
from chiasm.evaluation.reference import OwnUnits
from chiasm.evaluation.rows import MaskUse
from chiasm.evaluation.scoring import harmonise
from chiasm.heap import give_back
from chiasm.names import name_first
from chiasm.prediction.baselines import Baselines
from chiasm.prediction.manifest import Entry, Manifest, check_files
from chiasm.preparation.arrays import PreparedSource, prepare_source
from chiasm.preparation.degradation import simulated, thick_mask
from chiasm.preparation.displacement import displacement_mm
from chiasm.preparation.fingerprint import known_of
from chiasm.preparation.intensity import IntensityMap, fit_intensity
from chiasm.preparation.plan import Plan
from chiasm.volumes import Volume, check_pair, crop, read_volume, resample
from chiasm.volumes.geometry import Geometry, find_overlap
from chiasm.volumes.masks import Rule

MOST_NAMED = 5  # cases in a message
#: Where the mask of a prediction comes from, by what its manifest calls it.
RULES: Mapping[str, str] = {
    "given": "the prediction's own mask, from the mask file beside its source",
    "nonzero": "the prediction's own mask, found by the rule nonzero",
    "body": "the prediction's own mask, found by the rule body",
    "": "the prediction's own mask",
}


@dataclass(frozen=True, eq=False)
class EvaluationCase:
    """Everything of one case on the source's grid, in target units.

    Attributes:
        case: The cohort's case.
        entry: What the manifest says of its prediction.
        made: The model's own image.
        guesses: Name of each naive baseline to its values in the mask, shape (n,); outside lies the background.
        real: The real image, harmonised where units are arbitrary.
        expected: The map of expected errors in target units, or None.
        mask: Voxels that are scored.
        labels: Label map, or None.
        source: The first source, for super-resolution as the network saw it.
        grid: Of all images.
        use: Which mask that is, and why.
        problem: What kept the labels from being used, or None.
        lacks: Sources that the cohort's case lacks, so that there are no naive baselines; the first is then all zero.
        deviation: Standard deviation of the images of several models in target units, or None.
        part: Where all this lies on the source's grid, if only a part was kept: beyond the mask, real image and
            prediction are the background.
        own: The way back to the intensities of the real image; None of CT.
        apart_mm: About how far the real image lies from the first source; 0 where both lie on one another.
    """

    case: Case
    entry: Entry
    made: KeptImage
    guesses: Mapping[str, NDArray[np.float32]]
    real: KeptImage
    expected: KeptImage | None
    mask: NDArray[np.bool_]
    labels: NDArray[np.integer] | None
    source: KeptImage
    grid: Geometry
    use: MaskUse
    problem: Problem | None = None
    lacks: tuple[str, ...] = ()
    deviation: KeptImage | None = None
    part: KeptPart | None = None
    own: OwnUnits | None = None
    apart_mm: float = 0.0

    @property
    def prediction(self) -> NDArray[np.float32]:
        """The model's own image, shape (I, J, K)."""
        return self.made.laid_out(self.mask)

    @property
    def target(self) -> NDArray[np.float32]:
        """The real image, shape (I, J, K)."""
        return self.real.laid_out(self.mask)

    @property
    def expected_error(self) -> NDArray[np.float32] | None:
        """The map of expected errors, shape (I, J, K), or None."""
        return None if self.expected is None else self.expected.laid_out(self.mask)

    @property
    def spread(self) -> NDArray[np.float32] | None:
        """The standard deviation of the images of several models, shape (I, J, K), or None."""
        return None if self.deviation is None else self.deviation.laid_out(self.mask)


@dataclass(frozen=True, eq=False)
class PredictionFolder:
    """One folder of predictions with what is needed to assess it.

    Attributes:
        folder: That `chiasm predict` wrote.
        manifest: What it says of itself.
        model: Folder of the model that made it.
        plan: Of that model.
        baselines: Fitted on the same training cases.
    """

    folder: Path
    manifest: Manifest
    model: Path
    plan: Plan
    baselines: Baselines


def check_reference(case: Case, modality: str) -> None:
    """Refuse to compare with an image that was made, also where training on it is allowed.

    Raises:
        CohortError: If the case's image of this modality is marked as synthetic.
    """
    if "synthetic" in marks_on(case, modality):
        raise CohortError(
            f"the {modality} of case {case.id} was made, not acquired: it is no reference",
            path=case.images[modality],
            reason="synthetic",
        )


def load_case(
    assessed: PredictionFolder,
    entry: Entry,
    cohort: Cohort,
    *,
    with_labels: bool,
    naive: bool = True,
    narrow: bool = False,
) -> EvaluationCase:
    """Read one case's prediction, target, mask and labels, and make the naive baselines if asked for.

    Without its sources a case has no baselines, and is compared as the prediction lies.
    The voxels that are scored are those of the mask that the prediction was made with.

    Args:
        assessed: Whose prediction it is.
        entry: What the manifest says of it.
        cohort: With the real images.
        with_labels: Whether labels are read.
        naive: Whether naive baselines are made.
        narrow: Whether only a part may be kept, where prediction and real image are the background beyond the mask.

    Raises:
        CohortError: If the cohort has no such case, it has no target, its target was made, or it lacks a source
            that is needed.
        RunError: If a file of the prediction changed since.
        VolumeError: If a file cannot be read or a grid does not fit.
    """
    plan, folder = assessed.plan, assessed.folder
    check_files(folder, entry)
    case = _case_of(entry, plan, cohort)
    first, sources = _open_sources(assessed, entry, case)
    prediction = _made(case, first, folder / entry.image, "prediction").array
    target = check_pair(first, read_case_image(case, plan.target), b_name=plan.target, labels=not sources)
    mask = _mask_of(assessed, entry, case, first, sources)
    inside = known_of(case, mask.scored, target, plan.degradation)
    labels, problem = usable_labels(case, cohort.regions, first, plan.sources[0]) if with_labels else (None, None)
    made, real = KeptImage(prediction), KeptImage(target.array)
    values = None if labels is None else labels.array
    use, lacks = _use(assessed, entry, mask, inside), _lacking(case, plan)
    source, grid = KeptImage(first.array), first.geometry
    loaded = EvaluationCase(case, entry, made, {}, real, None, inside, values, source, grid, use, problem, lacks)
    loaded = replace(loaded, apart_mm=displacement_mm(first, target))
    del prediction, target, labels, made, real, values, source  # what is not kept is let go
    part = _part_of(loaded, plan) if narrow else None
    if part is not None:
        loaded = _kept_part(loaded, part, plan)
    expected, deviation = (
        None if name is None else _kept_map(_made(case, first, folder / name, what).array, inside, part)
        for name, what in ((entry.expected_error, "expected-error map"), (entry.spread, "spread over models"))
    )
    loaded = replace(loaded, expected=expected, deviation=deviation)
    give_back()  # what reading took
    shown, own, guesses = _as_shown(assessed, sources, first, mask.shown, inside, naive=naive)
    return _in_target_units(loaded, guesses, shown, plan, own)


def _part_of(loaded: EvaluationCase, plan: Plan) -> KeptPart | None:
    """Find the part that holds every difference; None where prediction or target differ from the background beyond."""
    mask, background = loaded.mask, plan.target_background
    if plan.own is not None or mask.all() or not mask.any():
        return None
    blank = background if plan.target_unit == "HU" else 0.0  # `harmonise` makes it the background
    images = ((loaded.made, background), (loaded.real, blank))
    if not all(is_constant_beyond(image.array, mask, value) for image, value in images):
        return None
    return KeptPart(box_around(mask, loaded.labels, loaded.grid.spacing_mm), mask.shape)


def _kept_part(loaded: EvaluationCase, part: KeptPart, plan: Plan) -> EvaluationCase:
    """Keep only values of the mask's voxels, and the mask and the labels of the part around them."""
    mask, labels, background = loaded.mask, loaded.labels, plan.target_background
    return replace(
        loaded,
        made=KeptImage(loaded.made.array[mask], background),
        real=KeptImage(loaded.real.array[mask], background),
        mask=np.ascontiguousarray(mask[part.box]),
        labels=None if labels is None else np.ascontiguousarray(labels[part.box]),
        part=part,
    )


def _kept_map(errors: NDArray[np.float32], inside: NDArray[np.bool_], part: KeptPart | None) -> KeptImage:
    """Keep a map of errors: of a part the values of the mask's voxels, if it is 0 beyond them."""
    if part is None:
        return KeptImage(errors)
    if is_constant_beyond(errors, inside, 0.0):
        return KeptImage(errors[inside], 0.0)
    return KeptImage(np.ascontiguousarray(errors[part.box]))


def _in_target_units(
    loaded: EvaluationCase,
    guesses: Mapping[str, NDArray[np.float32]],
    shown: Volume,
    plan: Plan,
    own: IntensityMap | None,
) -> EvaluationCase:
    """Convert the images of a case to the cohort's target units, and add what a network saw and naive baselines."""
    mask, part = loaded.mask, loaded.part
    made, real = loaded.made, loaded.real
    scan = own
    if plan.target_unit != "HU":
        scan = own or fit_intensity(real.inside(mask), None, plan.target_kind)
    if part is None:
        real = KeptImage(harmonise(real.array, mask, plan, scan))
        made = made if own is None else KeptImage(harmonise(made.array, mask, plan, own))
    else:
        shown = crop(shown, part.box)
        real = replace(real, array=harmonise(real.array, np.ones(real.array.shape, bool), plan, scan))
    expected, deviation = (
        one if one is None or own is None else replace(one, array=one.array * _scale(own, plan))
        for one in (loaded.expected, loaded.deviation)
    )
    units = None if scan is None else OwnUnits(plan.target_reference, scan)
    loaded = replace(loaded, made=made, real=real, expected=expected, deviation=deviation, own=units)
    source = KeptImage(shown.array) if part is None else _kept_source(shown.array, mask)
    return replace(loaded, source=source, grid=shown.geometry, guesses=guesses)


def _kept_source(array: NDArray[np.float32], mask: NDArray[np.bool_]) -> KeptImage:
    """Keep the source of a part: the values of the mask's voxels, if it is one constant beyond them."""
    beyond = float(array[0, 0, 0])
    if not mask[0, 0, 0] and is_constant_beyond(array, mask, beyond):
        return KeptImage(array[mask], beyond)
    return KeptImage(array.copy(order="K"))  # a view would keep the whole image


def _lacking(case: Case, plan: Plan) -> tuple[str, ...]:
    return tuple(name for name in plan.sources if name not in case.images)


def _open_sources(assessed: PredictionFolder, entry: Entry, case: Case) -> tuple[Volume, list[Volume]]:
    """Return what sets a case's grid, and all its sources, or none where the cohort lacks one of them.

    Without its first source the grid is the prediction's, of an image that is 0 everywhere.

    Raises:
        CohortError: If the case cannot be scored without the source that it lacks.
        VolumeError: If a file cannot be read or a grid does not fit.
    """
    names = assessed.plan.sources
    if lacks := _lacking(case, assessed.plan):
        _check_need(assessed, entry, case, lacks)
    if names[0] in case.images:
        first = read_case_image(case, names[0])
    else:
        grid = read_volume(assessed.folder / entry.image, allow_constant=True, reading=case.reading).geometry
        first = Volume(np.zeros(grid.shape, np.float32), grid)
    if lacks:
        return first, []
    others = [check_pair(first, read_case_image(case, name), a_name=names[0], b_name=name) for name in names[1:]]
    return first, [first, *others]


def _check_need(assessed: PredictionFolder, entry: Entry, case: Case, lacks: Sequence[str]) -> None:
    plan = assessed.plan
    needs = {
        "the model's units are those of the source": plan.own is not None,
        "the target is registered to it": plan.registration != "none",
        "the mask is found in it": entry.mask is None and (case.mask is None or not plan.mask_files),
    }
    if why := next((reason for reason, is_true in needs.items() if is_true), None):
        raise CohortError(
            f"case {entry.case} lacks its {' and '.join(lacks)}, without which it cannot be scored: {why}",
            path=case.images[plan.target],
            reason="no-source",
            hint="Add the source to the reference, or evaluate against the folder that the prediction was made from.",
        )


def _as_shown(
    assessed: PredictionFolder,
    sources: Sequence[Volume],
    first: Volume,
    mask: Volume | None,
    inside: NDArray[np.bool_],
    *,
    naive: bool,
) -> tuple[Volume, IntensityMap | None, dict[str, NDArray[np.float32]]]:
    """Return the first source as the network saw it, the map of the scan's own units, and the naive baselines."""
    plan = assessed.plan
    if not sources:
        return first, None, {}
    thick = _as_given(sources, plan)
    if plan.own is None and not naive:
        return thick[0], None, {}
    prepared = prepare_source(thick, plan, mask)
    # units of super-resolution are the scan's own: one map converts prediction and target to the cohort's
    own = None if plan.own is None else prepared.maps[plan.own]
    if plan.degradation is not None and not assessed.manifest.degraded:
        naive = False  # the network saw other slices than those made here
    return thick[0], own, _guesses(assessed, prepared, first, inside) if naive else {}


def _guesses(
    assessed: PredictionFolder, prepared: PreparedSource, first: Volume, inside: NDArray[np.bool_]
) -> dict[str, NDArray[np.float32]]:
    """Make the naive baselines of a case, by name: values at the voxels of the mask on the grid of its first source."""
    mask, back = prepared.mask, assessed.plan.target_reference.invert
    beyond = float(back(0))
    overlap = find_overlap(prepared.grid, first.geometry)
    order: NDArray[np.int32] | None = None
    if overlap is not None and inside[overlap.target].sum() == inside.sum():  # the same voxels, in another order
        place = np.full(mask.shape, -1, np.int32)
        place[mask] = np.arange(np.count_nonzero(mask), dtype=np.int32)
        order = place.transpose(overlap.axes)[overlap.source][inside[overlap.target]]
        del place
    guesses = {}
    for name in assessed.baselines.names:  # one after the other: each has as many values as the mask
        made = assessed.baselines.predict_inside([name], prepared.array, mask, prepared.grid)[name]
        values = back(made.astype(np.float32, copy=False))
        if order is not None:
            guesses[name] = np.append(values, np.float32(beyond))[order]
            continue
        image = laid_out(values, mask, beyond)
        guesses[name] = resample(Volume(image, prepared.grid), first.geometry, order=1).array[inside]
    return guesses


def _case_of(entry: Entry, plan: Plan, cohort: Cohort) -> Case:
    """Find the real images of a predicted case.

    Raises:
        CohortError: If the cohort has no such case, it has no target, or its target was made.
    """
    case = next((case for case in cohort.cases if case.id == entry.case), None)
    if case is None or plan.target not in case.images:
        raise CohortError(
            f"case {entry.case} has no {plan.target} to compare with" if case else f"has no case {entry.case}",
            path=cohort.root,
            reason="no-target",
            found=None if case else name_first([one.id for one in cohort.cases], MOST_NAMED),
            hint=None if case else "A real image belongs to the prediction whose case has its name.",
        )
    check_reference(case, plan.target)
    return case


def _fitting_mask(case: Case, source: Volume, path: Path) -> Volume:
    """Read a mask, which must lie on the source's grid."""
    return check_pair(source, read_case_labels(case, path), b_name="mask", labels=True)


def _made(case: Case, source: Volume, path: Path, name: str) -> Volume:
    """Read what a network made, which may well be constant."""
    made = read_volume(path, allow_constant=True, reading=case.reading)
    return check_pair(source, made, b_name=name, labels=True)


class _Mask(NamedTuple):
    """The voxels that are scored, what sources are prepared with, and which mask that is, in words."""

    scored: NDArray[np.bool_]
    shown: Volume | None
    used: str
    reason: str


def _mask_of(assessed: PredictionFolder, entry: Entry, case: Case, source: Volume, sources: Sequence[Volume]) -> _Mask:
    """Take the mask that the prediction was made with; where it was not written, the one that its plan would use."""
    plan = assessed.plan
    given = None if case.mask is None else _fitting_mask(case, source, case.mask)
    if given is not None and plan.degradation is not None:
        given = thick_mask(given, plan.degradation)
    if entry.mask is not None:
        own = _fitting_mask(case, source, assessed.folder / entry.mask)
        shown = given if entry.mask_rule in ("given", "") and _made_from(own, given, sources, plan) else own
        return _Mask(own.array > 0, shown, "prediction", RULES[entry.mask_rule])
    if given is not None and plan.mask_files:
        return _Mask(given.array > 0, given, "cohort", "no mask was written beside the image: the cohort's mask file")
    scored, rule = _mask_by_plan(sources, plan, None, source)
    return _Mask(scored, None, "plan", f"no mask was written beside the image: found by the plan's rule, {rule}")


def _as_given(sources: Sequence[Volume], plan: Plan) -> Sequence[Volume]:
    """Return sources as a network is given them: for super-resolution thick slices, interpolated."""
    return sources if plan.degradation is None else simulated(sources, plan.degradation)


def _mask_by_plan(
    sources: Sequence[Volume], plan: Plan, given: Volume | None, grid: Volume
) -> tuple[NDArray[np.bool_], Rule]:
    """Return the mask that sources are prepared with, by way of the plan's grid, and how it was found."""
    found = prepare_source(_as_given(sources, plan), plan, given)
    there = resample(Volume(found.mask.astype(np.uint8), found.grid), grid.geometry, order=0)
    return there.array > 0, found.mask_rule


def _made_from(own: Volume, given: Volume | None, sources: Sequence[Volume], plan: Plan) -> bool:
    """Say whether a prediction's mask came of a mask file, by way of the plan's grid."""
    if given is None or not sources:
        return False
    if np.array_equal(own.array > 0, given.array > 0):
        return True
    return np.array_equal(own.array > 0, _mask_by_plan(sources, plan, given, own)[0])


def _use(assessed: PredictionFolder, entry: Entry, mask: _Mask, inside: NDArray[np.bool_]) -> MaskUse:
    digest = hashlib.sha256(str(inside.shape).encode() + np.packbits(inside).tobytes()).hexdigest()
    count = int(np.count_nonzero(inside))
    return MaskUse(entry.case, assessed.manifest.method, mask.used, mask.reason, count, digest)


def _scale(own: IntensityMap, plan: Plan) -> np.float32:
    """Return the cohort's target units in one unit of a scan's own map."""
    ends = plan.target_reference.apply(np.array(plan.target_range))
    return np.float32(np.ptp(plan.target_range) / np.ptp(own.invert(ends)))
