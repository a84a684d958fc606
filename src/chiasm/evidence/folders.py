"""A folder of predictions against a cohort, case by case, beside the naive baselines.

Nothing here loads torch: scores need arrays, the plan's fixed figures and the
baselines' tables only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.cohorts.degradation import simulated, thick_mask
from chiasm.cohorts.dicom_folders import Selection, marks_on
from chiasm.cohorts.fingerprint import Progress, known_of
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.intensity import IntensityMap
from chiasm.cohorts.layouts import find_cohort
from chiasm.cohorts.pairing import Together, align_cohort
from chiasm.cohorts.planning import Plan, read_plan
from chiasm.cohorts.preparation import prepare_source
from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.evidence.evaluation import Row, evaluate_case, harmonise, reporting_unit
from chiasm.prediction.baselines import Baselines, load_baselines
from chiasm.prediction.manifest import Entry, Manifest, check_files, find_path, read_manifest
from chiasm.recipe import Registration
from chiasm.volumes import Volume, check_pair, read_volume, resample


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
    """

    case: Case
    entry: Entry
    images: Mapping[str, NDArray[np.float32]]
    target: NDArray[np.float32]
    reliability: NDArray[np.float32] | None
    mask: NDArray[np.bool_]
    labels: NDArray[np.integer] | None
    source: Volume


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
            hint="Predict again without --format dicom, and evaluate that.",
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
        selection: Which DICOM series are taken, and how files are read; where it says nothing, as in training.
        progress: As in `align_cohort`.

    Raises:
        CohortError: If the folder holds no cases, or none can be registered.
    """
    plan, chosen = judged[0].plan, selection or Selection()
    chosen = replace(chosen, reading=chosen.reading | plan.reading)
    cohort = find_cohort(reference, layout=layout, selection=chosen)
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
) -> tuple[list[Row], list[Problem]]:
    """Score a folder of predictions: the rows, and the cases that could not be scored; only registered images are kept.

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
    rows: list[Row] = []
    problems = list(lost)
    for entry in judged.manifest.cases:
        if entry.case in {problem.case for problem in lost}:
            continue
        try:
            rows += score_case(
                load_case(judged, entry, cohort, with_labels=True, naive=naive), judged, cohort, convention
            )
        except ChiasmError as error:
            path = error.path or predictions / entry.image
            problems.append(Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
    return rows, problems


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

    Raises:
        CohortError: If the cohort has no such case, it has no target, or its target was made.
        VolumeError: If a file cannot be read or a grid does not fit.
    """
    name, plan, folder = entry.case, judged.plan, judged.folder
    check_files(folder, entry)
    case = next((case for case in cohort.cases if case.id == name), None)
    if case is None or plan.target not in case.images:
        raise CohortError(
            f"case {name} has no {plan.target} to compare with" if case else f"has no case {name}",
            path=cohort.root,
            reason="no-target",
        )
    check_reference(case, plan.target)
    source = read_case_image(case, plan.sources[0])
    others = [
        check_pair(source, read_case_image(case, other), a_name=plan.sources[0], b_name=other)
        for other in plan.sources[1:]
    ]

    def labelled(path: Path, what: str) -> Volume:
        return check_pair(source, read_case_labels(case, path), b_name=what, labels=True)

    def made(name: str, what: str) -> Volume:  # a network may well make the same everywhere
        return check_pair(
            source, read_volume(folder / name, allow_constant=True, reading=case.reading), b_name=what, labels=True
        )

    prediction = made(entry.image, "prediction")
    target = check_pair(source, read_case_image(case, plan.target), b_name=plan.target)
    mask = labelled(case.mask or folder / str(entry.mask), "mask")
    if plan.degradation is not None and case.mask is not None:
        mask = thick_mask(mask, plan.degradation)
    inside = known_of(case, mask.array > 0, target, plan.degradation)
    labels = labelled(case.labels, "labels").array if with_labels and case.labels else None
    reliability = None if entry.reliability is None else made(entry.reliability, "reliability")
    sources = [source, *others]
    if plan.degradation is not None:
        sources = simulated(sources, plan.degradation)
        naive = naive and judged.manifest.degraded  # else the network saw other slices than those made here
    prepared = prepare_source(sources, plan, mask)
    # units of super-resolution are the scan's own: one map brings prediction and target to the cohort's
    own = None if plan.own is None else prepared.maps[plan.own]
    made_image = prediction.array if own is None else harmonise(prediction.array, inside, plan, own)
    images = {judged.manifest.method: made_image}
    for baseline in judged.baselines.names if naive else ():
        guess = judged.baselines.predict(baseline, prepared.array, prepared.mask, prepared.grid)
        raw = plan.target_reference.invert(guess)
        on_grid = resample(Volume(raw.astype(np.float32), prepared.grid), source.geometry, order=1)
        images[baseline] = np.where(inside, on_grid.array, plan.target_background).astype(np.float32)
    real = harmonise(target.array, inside, plan, own)
    trust = None if reliability is None else reliability.array * _scale(own, plan)
    return Loaded(case, entry, images, real, trust, inside, labels, sources[0])


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
        "holds no model", path=given or told, reason="no-model", hint="Say where the model is now with --model RUN."
    )
