"""The expected-error map assessed against the usual baselines, each calibrated alike and at its cost.

A map that knows where the error is may be worth nothing if the spread of eight
augmented passes knows it as well.  So the map, the spread over augmentations,
over dropout and over seeds all become expected absolute errors by the same
isotonic fit on the same validation cases, and are held against the true error
of one and the same image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.labels import usable_labels
from chiasm.cohorts.splits import Split, read_splits
from chiasm.errors import CohortError, RunError
from chiasm.evaluation.loading import check_reference
from chiasm.evaluation.metric_table import COVERAGES, METRICS
from chiasm.evaluation.rows import Row
from chiasm.evaluation.scoring import calibration, describe, harmonise, reporting_unit, score_expected_error
from chiasm.evaluation.uncertainty import (
    ENSEMBLE,
    MAP,
    Score,
    augmentation_spread,
    dropout_spread,
    ensemble_spread,
    expected_error,
    learned_score,
)
from chiasm.methods import title_of
from chiasm.metrics import ranking
from chiasm.prediction.calibration import Calibration, CalibrationRow, calibration_table, equal_groups, fit_calibration
from chiasm.prediction.engines import ANY_HARDWARE, Engine, Hardware
from chiasm.prediction.folders import Predictor, load
from chiasm.prediction.model import Model
from chiasm.prediction.model_files import find_model
from chiasm.prediction.passes import networks_of, synthesise_prepared
from chiasm.prediction.synthesis import synthesise
from chiasm.preparation.arrays import prepare_case, prepare_source
from chiasm.preparation.fingerprint import known_of
from chiasm.registration.cohort import align_cohort
from chiasm.training.run_planning import registered_in
from chiasm.volumes import Volume, check_pair

POOLED = "all cases"  # in the place of a case's id: voxels of all of them together
POOLED_SAMPLE = 100_000  # voxels of a case that the pooled curve is drawn from
DECILES = 10

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Ask = Callable[[Array, Mask], Score]


@dataclass(frozen=True, eq=False)
class CaseMaps:
    """The expected errors of one case by the map and its baselines, and the true error, on the source's grid.

    Attributes:
        expected: Expected absolute error by what made it, target units, zero outside the mask.
        costs: Passes and seconds of each.
        error: True absolute error, zero outside the mask.
        places: Voxels of the mask, of healthy tissue, and of each region.
        lesion: Voxels of any region, or None without labels.
        spacing_mm: Between voxels.
    """

    expected: Mapping[str, Array]
    costs: Mapping[str, Mapping[str, float]]
    error: Array
    places: Mapping[str, Mask]
    lesion: Mask | None
    spacing_mm: tuple[float, float, float]

    @property
    def labelled(self) -> Mask:
        """Voxels of any region; none without labels."""
        return np.zeros_like(self.places["mask"]) if self.lesion is None else self.lesion

    def sampled(self, image: NDArray[Any]) -> NDArray[Any]:
        """Return at most `POOLED_SAMPLE` of an image's voxels in the mask, evenly spread."""
        inside = image[self.places["mask"]]
        return inside[:: max(1, -(-len(inside) // POOLED_SAMPLE))]


def assess_maps(
    runs: Sequence[Path],
    data: Path,
    *,
    layout: str | None = None,
    role: Literal["test", "locked"] = "test",
    hardware: Hardware = ANY_HARDWARE,
    cache: Path | None = None,
    trust: Collection[str] = (),
) -> list[Row]:
    """Assess the first run's expected-error map and its baselines by the true error of the first run's images.

    Args:
        runs: Finished run folders, or their model folders, of one recipe but
            for the seed; with a single one there is no ensemble.
        data: The cohort, with the real targets.
        layout: Name of a layout, where the folder fits several.
        role: Whose cases of the split are assessed.
        hardware: Where networks run.
        cache: Where prepared validation cases are kept; a temporary folder by default.
        trust: Classes of others that a model may consist of, as ``package.module:Class``.

    Returns:
        Rows of methods such as "A7 map" and "A7 ensemble".  For each case:
        `score_expected_error`'s scores, the risk at each coverage and the cost in
        the mask; and in the mask, healthy tissue and each region the expected
        and the observed error, their ratio, and their mean gap over deciles.
        Under the case `POOLED`: see `calibration_curve`.

    Raises:
        RunError: If a run is unfinished, the runs differ in more than the seed,
            or the first has no map or no validation case.
        CohortError: If the folder lacks a case of the split, or the split has none of this role.
        VolumeError: If a file cannot be read or a grid does not fit.
        ValueError: If there are no runs.
    """
    if not runs:
        raise ValueError("there is no run to assess")
    predictors = [_load(run, hardware, trust) for run in runs]
    models = [predictor.model for predictor in predictors]
    split = _common_split(runs, models)
    engine = replace(predictors[0].engine, threads=hardware.threads)
    first, chosen = models[0], getattr(split, role)
    names = {*split.validation, *chosen}
    found = find_cohort(data, layout=layout, selection=selection_of(first.recipe, remember=True))
    found = select_cases(found, first.plan.sources, first.plan.target)
    some = replace(found, cases=tuple(case for case in found.cases if case.id in names))
    with TemporaryDirectory() if cache is None else nullcontext(cache) as kept:
        place = registered_in(Path(kept), first.recipe, Path(kept))
        cohort, *_ = align_cohort(some, (*first.plan.sources, first.plan.target), first.plan.registration, place)
        validation = _cases_of(cohort, split.validation, "validation", runs[0])
        assessed = _cases_of(cohort, chosen, role, runs[0])
        asks = _asks(models, engine)
        calibrations = _calibrate(asks, first, validation, engine, Path(kept))
        answers = {case.id: _ask_all(asks, calibrations, first, case, cohort.regions, engine) for case in assessed}
    trainings = {name: float(len(models) if name == ENSEMBLE else 1) for name in calibrations}
    rows = [row for case, asked in answers.items() for row in _case_rows(first, case, asked, trainings)]
    return [*rows, *_pooled_rows(first, list(answers.values()))]


def _case_rows(model: Model, case: str, asked: CaseMaps, trainings: Mapping[str, float]) -> Iterator[Row]:
    """Score what each way of asking says of a case, and what it cost."""
    for name, expected in asked.expected.items():
        scores = score_map(expected, asked.error, asked.places, asked.lesion, asked.spacing_mm)
        scores["mask"] |= {**asked.costs[name], "trainings": trainings[name]}
        for region, its_scores in scores.items():
            yield from _rows(model, case, name, region, its_scores)


def _pooled_rows(model: Model, answers: Sequence[CaseMaps]) -> Iterator[Row]:
    """Draw the calibration curve of each way of asking over voxels of all cases."""
    lesion = np.concatenate([asked.sampled(asked.labelled) for asked in answers])
    error = np.concatenate([asked.sampled(asked.error) for asked in answers])
    for name in answers[0].expected:
        expected = np.concatenate([asked.sampled(asked.expected[name]) for asked in answers])
        for region, points in calibration_curve(expected, error, lesion).items():
            yield from _rows(model, POOLED, name, region, points)


def score_map(
    expected: Array,
    error: Array,
    places: Mapping[str, Mask],
    lesion: Mask | None,
    spacing_mm: tuple[float, float, float],
) -> dict[str, dict[str, float]]:
    """Hold expected errors against true ones.

    Args:
        expected: Expected absolute error, shape (I, J, K).
        error: True absolute error in the same unit, 0 outside the mask.
        places: Voxels of each region; "mask" holds all others.
        lesion: Voxels that the map is to find, or None.
        spacing_mm: Between voxels.

    Returns:
        By region: "expected_error", "observed_error", "calibration" (their
        ratio: below 1 the map is too hopeful) and "calibration_gap" (mean
        absolute difference of the two over deciles of the expected error in the
        region); for the mask also `score_expected_error`'s scores and "risk_100"
        to "risk_50", the mean error of the share of voxels that is trusted most.
    """
    mask = places["mask"]
    inside = {name: place[mask] for name, place in places.items() if name != "mask"}
    table = calibration_table(expected[mask], error[mask], inside)
    scores: dict[str, dict[str, float]] = {}
    for region, place in places.items():
        deciles = [row for row in table if row.decile and row.region == ("all" if region == "mask" else region)]
        observed = float(error[place].mean(dtype=float)) if deciles else math.nan
        own = calibration(expected[place], error[place])
        scores[region] = {"observed_error": observed, **own, "calibration_gap": _calibration_gap(deciles)}
    scores["mask"] |= score_expected_error(expected, error, mask, lesion, spacing_mm)
    risk = ranking.risk_coverage(expected[mask], error[mask]).risk
    scores["mask"] |= {f"risk_{share}": float(risk[math.ceil(len(risk) * share / 100) - 1]) for share in COVERAGES}
    return scores


def _calibration_gap(deciles: Sequence[CalibrationRow]) -> float:
    """Return the mean absolute difference of predicted and observed errors over voxels; NaN without any."""
    voxels = sum(row.voxels for row in deciles)
    gaps = sum(row.voxels * abs(row.predicted - row.observed) for row in deciles)
    return gaps / voxels if voxels else math.nan


def calibration_curve(expected: Array, error: Array, lesion: Mask) -> dict[str, dict[str, float]]:
    """Bin voxels of all cases by their expected error: the points of a calibration curve.

    Args:
        expected: Expected absolute error of each voxel, shape (n,).
        error: True absolute error, same shape and unit.
        lesion: Which of them are labelled.

    Returns:
        A decile of the expected error is a set of voxels, so it is named as a
        region: "mask decile 1" (the most trusted) to "mask decile 10", and
        "lesion decile 1" to 10 among lesion voxels alone, each with its
        "expected_error" (to plot from left to right) and "observed_error"
        (upwards).  Fewer where many expected errors are equal.
    """
    points: dict[str, dict[str, float]] = {}
    for name, place in {"mask": np.ones(lesion.shape, bool), "lesion": lesion}.items():
        if not place.any():
            continue
        predicted, true, _ = equal_groups(expected[place], error[place], DECILES)
        for decile, (x, y) in enumerate(zip(predicted.tolist(), true.tolist(), strict=True), start=1):
            points[f"{name} decile {decile}"] = {"expected_error": x, "observed_error": y}
    return points


def _load(run: Path, hardware: Hardware, trust: Collection[str]) -> Predictor:
    """Load a run on torch, which the map's baselines need: one engine for all."""
    return load(run, accelerator=hardware.accelerator, precision=hardware.precision, engine="torch", trust=trust)


def _common_split(runs: Sequence[Path], models: Sequence[Model]) -> Split:
    """Check that the runs differ only in their seeds, and return the split that they share."""
    splits: list[Split] = []
    for run, model in zip(runs, models, strict=True):
        splits.append(_split_of(run))
        _check_alike(run, _Compared.of(model, splits[-1]), runs[0], _Compared.of(models[0], splits[0]))
    seeds = [model.recipe.training.seed for model in models]
    if len(set(seeds)) != len(seeds):
        raise RunError("stands twice among the runs", path=runs[-1], reason="same-seed", found=f"seeds {seeds}")
    _check_map(runs[0], models[0], splits[0])
    return splits[0]


def _split_of(run: Path) -> Split:
    path = find_model(run) / "splits.json"
    if not path.exists():
        raise RunError("does not say who was trained on", path=run, reason="no-split")
    return read_splits(path).split


class _Compared(NamedTuple):
    """What runs of one ensemble share."""

    arm: str
    fold: int
    split: Split
    recipe: dict[str, Any]

    @classmethod
    def of(cls, model: Model, split: Split) -> _Compared:
        """Collect it from a run."""
        content = model.recipe.model_dump()
        del content["training"]["seed"]
        return cls(model.recipe.method, model.recipe.split.fold, split, content)


def _check_alike(run: Path, its: _Compared, first_run: Path, first: _Compared) -> None:
    for what, own, expected in zip(_Compared._fields, its, first, strict=True):
        if own != expected:
            plain = what in ("arm", "fold")
            raise RunError(
                f"is of another {what} than {first_run}",
                path=run,
                reason=f"other-{what}",
                found=own if plain else None,
                expected=expected if plain else None,
                hint="An ensemble is of runs that differ in their seed alone.",
            )


def _check_map(run: Path, model: Model, split: Split) -> None:
    """Refuse a run that has no expected-error map, or none that can be calibrated."""
    if model.local_discriminator is None:
        raise RunError(
            f"is of method {title_of(model.recipe.method)}, which has no local discriminator and so no map",
            path=run,
            reason="no-map",
        )
    if model.calibration is None or not split.validation:
        raise RunError(
            "has no validation case, on which maps are calibrated",
            path=run,
            reason="no-validation",
            hint="Train with split.validation above 0.",
        )


def _cases_of(cohort: Cohort, names: Sequence[str], role: str, run: Path) -> list[Case]:
    by_id = {case.id: case for case in cohort.cases}
    if not names:
        raise CohortError(f"the split has no {role} case", path=run, reason="no-cases")
    if missing := [name for name in names if name not in by_id]:
        raise CohortError(
            f"lacks {role} cases of the run", path=cohort.root, reason="other-cases", found=", ".join(missing)
        )
    return [by_id[name] for name in names]


def _asks(models: Sequence[Model], engine: Engine) -> list[Ask]:
    """List what makes a score; the shipped map first."""
    first = models[0]
    asks: list[Ask] = [
        partial(ask, first, engine=engine) for ask in (learned_score, augmentation_spread, dropout_spread)
    ]
    return [*asks, partial(ensemble_spread, models, engine=engine)] if len(models) > 1 else asks


def _calibrate(
    asks: Sequence[Ask], model: Model, cases: Sequence[Case], engine: Engine, cache: Path
) -> dict[str, Calibration]:
    """Fit each baseline's calibration as training fits the map's, which is taken as it ships."""
    assert model.calibration is not None
    scores: dict[str, list[Array]] = {}
    errors: list[Array] = []
    for case in cases:
        prepared = prepare_case(case, model.plan, cache)
        source, mask = np.asarray(prepared.source), np.asarray(prepared.mask)
        maps = synthesise_prepared(
            networks_of(model),
            source,
            mask,
            plan=model.plan,
            conditional=model.recipe.discriminators.conditional,
            error_scale=model.error_scale,
            engine=engine,
        )
        errors.append(np.abs(maps.prediction - np.asarray(prepared.target))[mask])
        for ask in asks[1:]:
            made = ask(source, mask)
            scores.setdefault(made.name, []).append(made.score[mask])
    ids, error = tuple(case.id for case in cases), np.concatenate(errors)
    fitted = {name: fit_calibration(np.concatenate(parts), error, fitted_on=ids) for name, parts in scores.items()}
    return {MAP: model.calibration, **fitted}


def _ask_all(
    asks: Sequence[Ask],
    calibrations: Mapping[str, Calibration],
    model: Model,
    case: Case,
    regions: Mapping[str, Sequence[int]],
    engine: Engine,
) -> CaseMaps:
    plan = model.plan
    check_reference(case, plan.target)
    images = _images_of(case, [*plan.sources, plan.target])
    *volumes, target = images
    source = volumes[0]
    given = None
    if case.mask is not None:
        given = check_pair(source, read_case_labels(case, case.mask), b_name="mask", labels=True)
    declared = {name: tuple(values) for name, values in regions.items()}
    labels, _ = usable_labels(case, declared, source, plan.sources[0])
    aligned = replace(model, plan=replace(plan, registration="none"))  # they were aligned already
    shipped = synthesise(aligned, volumes, mask=given, engine=engine)
    prepared = prepare_source(volumes, plan, given)
    expected: dict[str, Array] = {}
    costs: dict[str, dict[str, float]] = {}
    for ask in asks:
        start = time.perf_counter()
        made = ask(prepared.array, prepared.mask)
        costs[made.name] = {"passes": float(made.passes), "seconds": time.perf_counter() - start}
        on_grid = expected_error(made.score, calibrations[made.name], prepared, plan, source.geometry)
        expected[made.name] = np.where(shipped.mask.array, on_grid, 0).astype(np.float32)
    mask = known_of(case, shipped.mask.array, target)
    error = np.abs(shipped.image.array - harmonise(target.array, mask, plan))
    error = np.where(mask, error, 0).astype(np.float32)
    places, lesion = _places(mask, None if labels is None else labels.array, regions)
    return CaseMaps(expected, costs, error, places, lesion, source.geometry.spacing_mm)


def _images_of(case: Case, names: Sequence[str]) -> list[Volume]:
    """Read images of a case, which must lie on the grid of the first."""
    first = read_case_image(case, names[0])
    return [first, *(check_pair(first, read_case_image(case, name), b_name=name) for name in names[1:])]


def _places(
    mask: Mask, labels: NDArray[Any] | None, regions: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Mask], Mask | None]:
    """Return the voxels of the mask, of healthy tissue and of each region; and those of any region."""
    if labels is None:
        return {"mask": mask}, None
    named = {name: np.isin(labels, list(values)) & mask for name, values in regions.items()}
    named = named or {"lesion": (labels != 0) & mask}
    places = {"mask": mask, "healthy": mask & (labels == 0), **named}
    return places, np.logical_or.reduce([*named.values()])


def _rows(model: Model, case: str, name: str, region: str, scores: Mapping[str, float]) -> list[Row]:
    unit, scale = reporting_unit(model.plan)
    convention = describe("chiasm", model.plan.target_range, unit, scale)
    recipe = model.recipe
    method = f"{recipe.method} {name}"
    return [
        Row(
            case,
            recipe.split.fold,
            recipe.training.seed,
            method,
            region,
            metric,
            value if METRICS[metric].unit else value / scale,
            METRICS[metric].unit or unit,
            convention,
        )
        for metric, value in scores.items()
    ]
