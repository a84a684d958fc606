"""A folder of predictions against a cohort, case by case, beside the naive baselines.

Nothing here loads torch: scores need arrays, the plan's fixed numbers and the
baselines' tables only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.attempts import Lost
from chiasm.cohorts.cases import Cohort, Problem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort, selection_of
from chiasm.errors import ChiasmError, RunError
from chiasm.evaluation.kept import KeptImage, laid_out
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder, load_case
from chiasm.evaluation.reference import Beams, Reference, ScoredBox, compare_all
from chiasm.evaluation.rows import MaskUse, Remarks, Row
from chiasm.evaluation.scoring import ScoredImages, ScoreTerms, evaluate_case, reporting_unit
from chiasm.heap import give_back
from chiasm.metrics.conventions import Convention, find_convention
from chiasm.metrics.radiotherapy import THOMAS, Curve
from chiasm.prediction.baselines import load_baselines
from chiasm.prediction.manifest import Entry, Manifest, find_path, read_manifest
from chiasm.preparation.plan import Plan, read_plan
from chiasm.progress import Progress, counted
from chiasm.recipe import Registration, read_recipe
from chiasm.registration.cohort import AlignedCohort, align_cohort
from chiasm.runners import in_processes
from chiasm.volumes.geometry import axis_names


class FolderScores(NamedTuple):
    """What came of scoring a folder of predictions.

    Attributes:
        rows: One for each score.
        problems: Cases that could not be scored.
        remarks: Which masks were used, and which labels were not.
    """

    rows: list[Row]
    problems: list[Problem]
    remarks: Remarks


def open_predictions(folder: Path, model: Path | None = None) -> PredictionFolder:
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
    return PredictionFolder(folder, manifest, place, read_plan(place / "plan.toml"), load_baselines(place))


def open_reference(
    reference: Path,
    assessed: Sequence[PredictionFolder],
    folder: Path,
    *,
    register: Registration | None = None,
    layout: str | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> AlignedCohort:
    """Find the real images of predicted cases, aligned with the sources as those of training were.

    Args:
        reference: The cohort.
        assessed: Folders of predictions, of models with one source and target.
        folder: Where registered images are kept.
        register: How they are aligned; None as the model's plan says, "none" takes them as they lie.
        layout: Name of a layout, where the folder fits several.
        selection: Which files are taken and how they are read; where it says nothing, as in training.
        progress: As in `align_cohort`.

    Raises:
        CohortError: If the folder holds no cases, or none can be registered.
    """
    plan, recipe = assessed[0].plan, read_recipe(assessed[0].model / "recipe.toml")
    cohort = find_cohort(reference, layout=layout, selection=selection_of(recipe, selection, remember=True))
    kind = plan.registration if register is None else register
    if kind == "none":
        return AlignedCohort(cohort, {}, ())
    predicted = {entry.case for one in assessed for entry in one.manifest.cases}
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
    assessed = open_predictions(predictions)
    place = registered or predictions / "registered"
    cohort, _, lost = open_reference(reference, [assessed], place, register=register, layout=layout)
    missing = {problem.case for problem in lost}
    work = [(assessed, entry) for entry in assessed.manifest.cases if entry.case not in missing]
    found = score_cases(work, cohort, Scoring(convention, naive=naive))
    spoiled = tuple(one.message for one in found.spoiled)
    return FolderScores(found.rows, [*lost, *found.problems], Remarks(found.masks, spoiled, found.notes))


class Scoring(NamedTuple):
    """What is scored of each case.

    Attributes:
        convention: A name of `CONVENTIONS`.
        with_labels: Whether label maps are used.
        naive: Whether to score the naive baselines too.
        angles: Gantry angles of beams through a CT, degrees.
        curve: Of a CT, Hounsfield units and electron density relative to water.
    """

    convention: str
    with_labels: bool = True
    naive: bool = True
    angles: tuple[float, ...] = ()
    curve: Curve = THOMAS


After = Callable[[EvaluationCase, PredictionFolder, Sequence[Row]], None]


class CaseScores(NamedTuple):
    """What came of scoring cases.

    Attributes:
        rows: One for each score.
        problems: Cases that could not be scored.
        spoiled: Labels that were not used.
        masks: Which masks were.
        notes: Cases without naive baselines, or whose real image lies elsewhere, one sentence each.
    """

    rows: list[Row]
    problems: list[Problem]
    spoiled: list[Problem]
    masks: tuple[MaskUse, ...]
    notes: tuple[str, ...] = ()


class _ScoredCase(NamedTuple):
    """What came of one case: its scores, or why it could not be scored."""

    rows: list[Row]
    problem: Problem | None
    spoiled: Problem | None = None
    mask: MaskUse | None = None
    notes: tuple[str, ...] = ()


def score_cases(
    work: Sequence[tuple[PredictionFolder, Entry]],
    cohort: Cohort,
    scoring: Scoring,
    *,
    progress: Progress | None = None,
    after: After | None = None,
    processes: int = 1,
) -> CaseScores:
    """Score cases; one that cannot be scored is named, and the others are scored.

    Args:
        work: Predicted cases, each with the folder that it lies in.
        cohort: With the real targets.
        scoring: What is scored.
        progress: Called with cases done, all cases, the next case's id.
        after: Called with each case that was scored, whose prediction it is, and its scores, while its images are
            in memory; in another process where there are several, so `pickle` must hold it.
        processes: How many score cases at once; the scores are the same.
    """
    count = min(processes, len(work))
    if count > 1:
        cases = _score_in_processes(work, _CaseWork(_folders_of(work), cohort, scoring, after), count, progress)
    else:
        cases = [
            _score_one(one, entry, cohort, scoring, after)
            for one, entry in counted(work, lambda pair: pair[1].case, progress)
        ]
    return _gathered(cases)


def _gathered(cases: Sequence[_ScoredCase]) -> CaseScores:
    rows = [row for case in cases for row in case.rows]
    problems, spoiled, masks = (
        [getattr(case, name) for case in cases if getattr(case, name) is not None]
        for name in ("problem", "spoiled", "mask")
    )
    return CaseScores(rows, problems, spoiled, tuple(masks), tuple(note for case in cases for note in case.notes))


def _score_one(
    one: PredictionFolder, entry: Entry, cohort: Cohort, scoring: Scoring, after: After | None
) -> _ScoredCase:
    """Score one case, and let go of it."""
    narrow = _is_of_mask(find_convention(scoring.convention))
    try:
        loaded = load_case(one, entry, cohort, with_labels=scoring.with_labels, naive=scoring.naive, narrow=narrow)
        give_back()
        rows = score_case(loaded, one, cohort, scoring)
    except ChiasmError as error:
        path = error.path or one.folder / entry.image
        return _ScoredCase([], Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
    loaded = replace(loaded, guesses={})
    give_back()
    if after is not None:
        after(loaded, one, rows)
    scored = _ScoredCase(rows, None, loaded.problem, loaded.use, tuple(_notes_on(loaded, one, naive=scoring.naive)))
    del loaded  # before the next case is read
    give_back()
    return scored


def _notes_on(loaded: EvaluationCase, one: PredictionFolder, *, naive: bool) -> Iterator[str]:
    """Say which naive baselines a case lacks, and whether its real image lies elsewhere."""
    case, target = loaded.entry.case, one.plan.target
    if loaded.lacks and naive:
        yield (
            f"case {case}: the reference has no {' and '.join(loaded.lacks)}, so its prediction is scored "
            f"without the naive baselines ({', '.join(one.baselines.names)}), and is not compared with them"
        )
    if loaded.apart_mm:
        yield (
            f"case {case}: the real {target} seems to lie about {loaded.apart_mm:.0f} mm from the source, so scores "
            "measure that too; chiasm evaluate --register rigid aligns it first"
        )


_Job = tuple[int, Path, Entry]  # place among all cases, folder of predictions, what its manifest says of the case


@dataclass(frozen=True)
class _CaseWork:
    """The work of a process that scores cases: what is large is opened there, not sent."""

    models: Mapping[Path, Path]
    cohort: Cohort
    scoring: Scoring
    after: After | None

    def __call__(self, job: _Job) -> tuple[int, _ScoredCase]:
        from threadpoolctl import threadpool_limits

        number, folder, entry = job
        with threadpool_limits(1):
            one = _open_once(folder, self.models[folder])
            return number, _score_one(one, entry, self.cohort, self.scoring, self.after)


_open_once = lru_cache(maxsize=4)(open_predictions)


def _folders_of(work: Sequence[tuple[PredictionFolder, Entry]]) -> Mapping[Path, Path]:
    """Return each folder of predictions with its model."""
    return {one.folder: one.model for one, _ in work}


def _score_in_processes(
    work: Sequence[tuple[PredictionFolder, Entry]], do: _CaseWork, count: int, progress: Progress | None
) -> list[_ScoredCase]:
    """Score cases in several processes, and return what came of them in their order."""
    jobs = [(number, one.folder, entry) for number, (one, entry) in enumerate(work)]
    found: dict[int, _ScoredCase] = {}
    for report in in_processes(jobs, do, count):
        if not isinstance(report, Lost):
            found[report[0]] = report[1]
        elif not report.again:
            number, folder, entry = report.job
            message = f"case {entry.case}: {report}"
            found[number] = _ScoredCase([], Problem(folder / entry.image, "lost", message, entry.case))
        if progress is not None:
            progress(len(found), len(work), "")
    return [found[number] for number in range(len(work))]


def score_case(loaded: EvaluationCase, assessed: PredictionFolder, cohort: Cohort, scoring: Scoring) -> list[Row]:
    """Score the prediction of a case and its naive baselines in every region."""
    plan, manifest = assessed.plan, assessed.manifest
    unit, scale = reporting_unit(plan)
    reference = _reference_of(loaded, cohort, plan, scoring)
    values = [loaded.made.inside(loaded.mask), *loaded.guesses.values()]
    compared = compare_all(reference, values, scoring.convention, plan.target_range)
    del values
    give_back()
    rows: list[Row] = []
    for method, its in zip((manifest.method, *loaded.guesses), compared, strict=True):
        expected, spread = None, None
        if method == manifest.method:
            image = _on_grid(loaded.made, reference, loaded.mask)
            expected, spread = (
                None if one is None else one.inside(loaded.mask) for one in (loaded.expected, loaded.deviation)
            )
        else:
            image = laid_out(loaded.guesses[method], reference.mask, plan.target_background)
        terms = ScoreTerms(
            loaded.case.id, plan.target_range, unit, scale, scoring.convention, manifest.fold, manifest.seed, method
        )
        rows += evaluate_case(ScoredImages(image, reference, expected, spread, its), terms)
        del image
        give_back()
    return rows


def _reference_of(loaded: EvaluationCase, cohort: Cohort, plan: Plan, scoring: Scoring) -> Reference:
    """Return what the predictions of a case are scored against."""
    rules, background, grid = find_convention(scoring.convention), plan.target_background, loaded.grid
    frame = None if loaded.part is None else ScoredBox(loaded.part.box, loaded.part.shape, background)
    reference = Reference(
        loaded.target,
        loaded.mask,
        grid.spacing_mm,
        loaded.labels,
        cohort.regions,
        is_ct=plan.target_unit == "HU",
        axes=axis_names(grid),
        beams=Beams(scoring.angles, grid.affine[:3, :3]) if scoring.angles else None,
        curve=scoring.curve,
        frame=frame,
        own=loaded.own,
    )
    if frame is None and _is_of_mask(rules):
        return reference.cut_out(loaded.prediction, background)
    return reference


def _is_of_mask(rules: Convention) -> bool:
    """Return whether a convention needs no voxel of a constant background."""
    return rules.masked and not rules.multiscale and rules.challenge is None


def _on_grid(made: KeptImage, reference: Reference, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a prediction on the grid of a reference, which may be a part of the mask's."""
    image: NDArray[np.float32] = made.laid_out(mask)
    if reference.frame is None or image.shape == reference.mask.shape:
        return image
    return np.ascontiguousarray(image[reference.frame.box])


def _model_folder(predictions: Path, manifest: Manifest, given: Path | None) -> Path:
    recorded = find_path(predictions, manifest, manifest.model)
    for folder in (recorded,) if given is None else (given, given / "model"):
        if (folder / "plan.toml").is_file() and (folder / "model.toml").is_file():
            return folder
    raise RunError(
        "holds no model",
        path=given or recorded,
        reason="no-model",
        hint="Say where the model is now: chiasm evaluate --model RUN.",
    )
