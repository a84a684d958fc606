"""A folder of predictions against a cohort, case by case, beside the naive baselines.

Nothing here loads torch: scores need arrays, the plan's fixed figures and the
baselines' tables only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.cohorts.dicom_patients import Selection, marks_on
from chiasm.cohorts.discovery import find_cohort, selection_of
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.labels import usable_labels
from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.evaluation.rows import MaskUse, Remarks, Row
from chiasm.evaluation.scoring import evaluate_case, harmonise, reporting_unit
from chiasm.prediction.baselines import Baselines, load_baselines
from chiasm.prediction.manifest import Entry, Manifest, check_files, find_path, read_manifest
from chiasm.preparation.arrays import prepare_source
from chiasm.preparation.degradation import simulated, thick_mask
from chiasm.preparation.fingerprint import Progress, known_of
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.plan import Plan, read_plan
from chiasm.recipe import Registration, read_recipe
from chiasm.registration.cohort import Together, align_cohort
from chiasm.volumes import Volume, check_pair, read_volume, resample

#: Where the mask of a prediction comes from, by what its manifest calls it.
RULES: Mapping[str, str] = {
    "given": "the prediction's own mask, from the mask file beside its source",
    "nonzero": "the prediction's own mask, found by the rule nonzero",
    "body": "the prediction's own mask, found by the rule body",
    "": "the prediction's own mask",
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """Everything of one case on the source's grid, in target units.

    Attributes:
        case: The cohort's case.
        entry: What the manifest says of its prediction.
        images: Method name to predicted image; the model's own comes first.
        target: The real image, harmonised where units are arbitrary.
        reliability: The map in target units, or None.
        mask: Voxels that are scored.
        labels: Label map, or None.
        source: The first source, for super-resolution as the network saw it.
        use: Which mask that is, and why.
        problem: What kept the labels from being used, or None.
    """

    case: Case
    entry: Entry
    images: Mapping[str, NDArray[np.float32]]
    target: NDArray[np.float32]
    reliability: NDArray[np.float32] | None
    mask: NDArray[np.bool_]
    labels: NDArray[np.integer] | None
    source: Volume
    use: MaskUse
    problem: Problem | None = None


class FolderScores(NamedTuple):
    """What came of scoring a folder of predictions.

    Attributes:
        rows: One for each figure.
        problems: Cases that could not be scored.
        remarks: Which masks were used, and which labels were not.
    """

    rows: list[Row]
    problems: list[Problem]
    remarks: Remarks


@dataclass(frozen=True, eq=False)
class Judged:
    """One folder of predictions with what is needed to judge it.

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


def open_predictions(folder: Path, model: Path | None = None) -> Judged:
    """Open a folder of predictions with the model that made it.

    Args:
        folder: Written by `chiasm predict`.
        model: Run or model folder, where it no longer stands where it stood.

    Raises:
        RunError: If it is no such folder, or the model is not found.
    """
    manifest = read_manifest(folder)
    if manifest.container == "dicom":  # whole numbers, perhaps of a multiple
        raise RunError(
            "holds DICOM series, which are for picture archives",
            path=folder,
            reason="container",
            hint="Run chiasm predict again without --format dicom, and evaluate that.",
        )
    place = _model_folder(folder, manifest, model)
    return Judged(folder, manifest, place, read_plan(place / "plan.toml"), load_baselines(place))


def open_reference(
    reference: Path,
    judged: Sequence[Judged],
    folder: Path,
    *,
    register: Registration | None = None,
    layout: str | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> Together:
    """Find the real images of predicted cases, brought to the sources' grid as those of training were.

    Args:
        reference: The cohort.
        judged: Folders of predictions, of models with one source and target.
        folder: Where registered images are kept.
        register: How they are brought there; None as the model's plan says, "none" takes them as they lie.
        layout: Name of a layout, where the folder fits several.
        selection: Which files are taken and how they are read; where it says nothing, as in training.
        progress: As in `align_cohort`.

    Raises:
        CohortError: If the folder holds no cases, or none can be registered.
    """
    plan, recipe = judged[0].plan, read_recipe(judged[0].model / "recipe.toml")
    cohort = find_cohort(reference, layout=layout, selection=selection_of(recipe, selection, remember=True))
    kind = plan.registration if register is None else register
    if kind == "none":
        return Together(cohort, {}, ())
    predicted = {entry.case for one in judged for entry in one.manifest.cases}
    some = replace(cohort, cases=tuple(case for case in cohort.cases if case.id in predicted))
    return align_cohort(some, (*plan.sources, plan.target), kind, folder, progress)


def score_folder(
    predictions: Path,
    reference: Path,
    *,
    layout: str | None = None,
    convention: str = "chiasm",
    naive: bool = True,
    register: Registration | None = None,
    registered: Path | None = None,
) -> FolderScores:
    """Score a folder of predictions; of files, only registered images are kept.

    Args:
        predictions: Folder written by `chiasm predict`.
        reference: The cohort with the real targets.
        layout: Name of a layout, where the folder fits several.
        convention: A name of `CONVENTIONS`.
        naive: Whether to score the naive baselines too.
        register: As in `open_reference`.
        registered: Where registered images are kept; `predictions/registered` by default.

    Raises:
        ChiasmError: If a folder is not what it should be.
    """
    judged = open_predictions(predictions)
    place = registered or predictions / "registered"
    cohort, _, lost = open_reference(reference, [judged], place, register=register, layout=layout)
    missing = {problem.case for problem in lost}
    work = [(judged, entry) for entry in judged.manifest.cases if entry.case not in missing]
    rows, problems, spoiled, masks = score_cases(work, cohort, convention, with_labels=True, naive=naive)
    return FolderScores(rows, [*lost, *problems], Remarks(masks, tuple(one.message for one in spoiled)))


class CaseScores(NamedTuple):
    """What came of scoring cases: rows, cases that could not be scored, labels that were not used, masks that were."""

    rows: list[Row]
    problems: list[Problem]
    spoiled: list[Problem]
    masks: tuple[MaskUse, ...]


def score_cases(
    work: Sequence[tuple[Judged, Entry]],
    cohort: Cohort,
    convention: str,
    *,
    with_labels: bool,
    naive: bool = True,
    progress: Progress | None = None,
) -> CaseScores:
    """Score cases one after another; one that cannot be scored is named, and the others are scored.

    Args:
        work: Predicted cases, each with the folder that it lies in.
        cohort: With the real targets.
        convention: A name of `CONVENTIONS`.
        with_labels: Whether label maps are used.
        naive: Whether to score the naive baselines too.
        progress: Called with cases done, all cases, the next case's id.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    spoiled: list[Problem] = []
    masks: list[MaskUse] = []
    for index, (one, entry) in enumerate(work):
        if progress is not None:
            progress(index, len(work), entry.case)
        try:
            loaded = load_case(one, entry, cohort, with_labels=with_labels, naive=naive)
            rows += score_case(loaded, one, cohort, convention)
        except ChiasmError as error:
            path = error.path or one.folder / entry.image
            problems.append(Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
            continue
        spoiled += [] if loaded.problem is None else [loaded.problem]
        masks.append(loaded.use)
    if progress is not None:
        progress(len(work), len(work), "")
    return CaseScores(rows, problems, spoiled, tuple(masks))


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


def load_case(judged: Judged, entry: Entry, cohort: Cohort, *, with_labels: bool, naive: bool = True) -> Loaded:
    """Read one case's prediction, target, mask and labels, and make the naive baselines if asked for.

    The voxels that are scored are those of the mask that the prediction was made with.

    Raises:
        CohortError: If the cohort has no such case, it has no target, or its target was made.
        RunError: If a file of the prediction changed since.
        VolumeError: If a file cannot be read or a grid does not fit.
    """
    plan, folder = judged.plan, judged.folder
    check_files(folder, entry)
    case = _case_of(entry, plan, cohort)
    source = read_case_image(case, plan.sources[0])
    others = [
        check_pair(source, read_case_image(case, other), a_name=plan.sources[0], b_name=other)
        for other in plan.sources[1:]
    ]
    target = check_pair(source, read_case_image(case, plan.target), b_name=plan.target)
    prediction = _made(case, source, folder / entry.image, "prediction")
    mask = _mask_of(judged, entry, case, [source, *others])
    inside = known_of(case, mask.scored, target, plan.degradation)
    labels, problem = usable_labels(case, cohort.regions, source, plan.sources[0]) if with_labels else (None, None)
    reliability = None if entry.reliability is None else _made(case, source, folder / entry.reliability, "reliability")
    sources = [source, *others]
    if plan.degradation is not None:
        sources = simulated(sources, plan.degradation)
        naive = naive and judged.manifest.degraded  # else the network saw other slices than those made here
    prepared = prepare_source(sources, plan, mask.shown)
    # units of super-resolution are the scan's own: one map brings prediction and target to the cohort's
    own = None if plan.own is None else prepared.maps[plan.own]
    made_image = prediction.array if own is None else harmonise(prediction.array, inside, plan, own)
    images = {judged.manifest.method: made_image}
    for baseline in judged.baselines.names if naive else ():
        guess = judged.baselines.predict(baseline, prepared.array, prepared.mask, prepared.grid)
        raw = plan.target_reference.invert(guess)
        on_grid = resample(Volume(raw.astype(np.float32), prepared.grid), source.geometry, order=1)
        images[baseline] = np.where(inside, on_grid.array, plan.target_background).astype(np.float32)
    return Loaded(
        case,
        entry,
        images,
        harmonise(target.array, inside, plan, own),
        None if reliability is None else reliability.array * _scale(own, plan),
        inside,
        None if labels is None else labels.array,
        sources[0],
        _use(judged, entry, mask, inside),
        problem,
    )


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
        )
    check_reference(case, plan.target)
    return case


def _fitting_mask(case: Case, source: Volume, path: Path) -> Volume:
    """Read a mask, which must lie on the source's grid."""
    return check_pair(source, read_case_labels(case, path), b_name="mask", labels=True)


def _made(case: Case, source: Volume, path: Path, name: str) -> Volume:
    """Read what a network made, which may well be the same everywhere."""
    made = read_volume(path, allow_constant=True, reading=case.reading)
    return check_pair(source, made, b_name=name, labels=True)


class _Mask(NamedTuple):
    """The voxels that are scored, what sources are prepared with, and which mask that is, in words."""

    scored: NDArray[np.bool_]
    shown: Volume | None
    used: str
    reason: str


def _mask_of(judged: Judged, entry: Entry, case: Case, sources: Sequence[Volume]) -> _Mask:
    """Take the mask that the prediction was made with; where it was not written, the one that its plan would use."""
    plan, source = judged.plan, sources[0]
    given = None if case.mask is None else _fitting_mask(case, source, case.mask)
    if given is not None and plan.degradation is not None:
        given = thick_mask(given, plan.degradation)
    if entry.mask is not None:
        own = _fitting_mask(case, source, judged.folder / entry.mask)
        shown = own if given is None or entry.mask_rule in ("nonzero", "body") else given
        return _Mask(own.array > 0, shown, "prediction", RULES[entry.mask_rule])
    if given is not None and plan.mask_files:
        return _Mask(given.array > 0, given, "cohort", "no mask was written beside the image: the cohort's mask file")
    thick = sources if plan.degradation is None else simulated(sources, plan.degradation)
    found = prepare_source(thick, plan, None)
    there = resample(Volume(found.mask.astype(np.uint8), found.grid), source.geometry, order=0)
    reason = f"no mask was written beside the image: found by the plan's rule, {found.mask_rule}"
    return _Mask(there.array > 0, None, "plan", reason)


def _use(judged: Judged, entry: Entry, mask: _Mask, inside: NDArray[np.bool_]) -> MaskUse:
    digest = hashlib.sha256(str(inside.shape).encode() + np.packbits(inside).tobytes()).hexdigest()
    count = int(np.count_nonzero(inside))
    return MaskUse(entry.case, judged.manifest.method, mask.used, mask.reason, count, digest)


def _scale(own: IntensityMap | None, plan: Plan) -> np.float32:
    """Return the cohort's target units in one unit of a scan's own map."""
    if own is None:
        return np.float32(1)
    ends = plan.target_reference.apply(np.array(plan.target_range))
    return np.float32(np.ptp(plan.target_range) / np.ptp(own.invert(ends)))


def score_case(loaded: Loaded, judged: Judged, cohort: Cohort, convention: str) -> list[Row]:
    """Score the prediction of a case and its naive baselines in every region."""
    plan, manifest = judged.plan, judged.manifest
    unit, scale = reporting_unit(plan)
    rows: list[Row] = []
    for method, image in loaded.images.items():
        rows += evaluate_case(
            image,
            loaded.target,
            loaded.mask,
            loaded.labels,
            cohort.regions,
            loaded.source.geometry.spacing_mm,
            data_range=plan.target_range,
            unit=unit,
            unit_scale=scale,
            convention=convention,
            reliability=loaded.reliability if method == manifest.method else None,
            case=loaded.case.id,
            fold=manifest.fold,
            seed=manifest.seed,
            method=method,
        )
    return rows


def _model_folder(predictions: Path, manifest: Manifest, given: Path | None) -> Path:
    told = find_path(predictions, manifest, manifest.model)
    for folder in (told,) if given is None else (given, given / "model"):
        if (folder / "plan.toml").is_file() and (folder / "model.toml").is_file():
            return folder
    raise RunError(
        "holds no model",
        path=given or told,
        reason="no-model",
        hint="Say where the model is now: chiasm evaluate --model RUN.",
    )
