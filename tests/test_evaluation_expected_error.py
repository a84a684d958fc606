"""The map and its rivals against the true error, at their cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from chiasm.errors import ChiasmError, CohortError, RunError
from chiasm.evaluation.expected_error import (
    POOLED,
    assess_maps,
    calibration_curve,
    score_map,
)
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.rows import Row
from chiasm.prediction.folders import predict
from chiasm.prediction.model import Model, load_model, save_model
from chiasm.storage import read_json, write_json
from chiasm.volumes import read_volume, write_volume

Change = Callable[[Model], Model]
METHODS = ["A7 map", "A7 augmentation", "A7 dropout injected at inference", "A7 ensemble"]


def recipe_with(model: Model, section: str, **fields: object) -> Model:
    settings = getattr(model.recipe, section).model_copy(update=fields)
    return replace(model, recipe=model.recipe.model_copy(update={section: settings}))


def stored(folder: Path, model: Model, splits: Path) -> Path:
    save_model(folder / "model", model, {"splits.json": splits})
    return folder


@pytest.fixture(scope="module")
def second(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that differs in its seed, and in its weights by a little."""
    model = recipe_with(load_model(finished_run), "training", seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("runs") / "second"
    return stored(folder, model, finished_run / "model" / "splits.json")


@pytest.fixture(scope="module")
def rows(finished_run: Path, second: Path, toy_cohort: Path) -> list[Row]:
    return assess_maps([finished_run, second], toy_cohort)


def told(rows: list[Row], method: str, region: str, metric: str) -> dict[str, float]:
    return {r.case: r.value for r in rows if (r.method, r.region, r.metric) == (method, region, metric)}


def test_the_maps_rows_are_those_of_an_evaluation(
    rows: list[Row], finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    predict(finished_run, [toy_cohort], tmp_path, only="test")
    evaluated, problems, _ = score_folder(tmp_path, toy_cohort, naive=False)
    assert not problems
    for metric in ("spearman", "spearman_smoothed", "auroc_worst", "auroc_lesion", "ausc", "ause"):
        assert told(rows, "A7 map", "mask", metric) == pytest.approx(told(evaluated, "A7", "mask", metric), abs=1e-5)
    regions = {r.region for r in rows if r.case != POOLED}
    assert {"mask", "healthy"} < regions
    for region in regions:
        for metric in ("calibration", "expected_error"):
            known = told(evaluated, "A7", region, metric)
            assert told(rows, "A7 map", region, metric) == pytest.approx(known, rel=1e-4, nan_ok=True)
        errors = told(evaluated, "A7", region, "mae")
        for method in METHODS:
            assert told(rows, method, region, "observed_error") == pytest.approx(errors, rel=1e-4, nan_ok=True)


def test_every_method_has_every_figure_of_every_test_case_and_its_cost(rows: list[Row], finished_run: Path) -> None:
    test = read_json(finished_run / "splits.json")["test"]
    assert list(dict.fromkeys(r.method for r in rows)) == METHODS
    for metric in (
        *("spearman", "spearman_smoothed", "auroc_worst", "auroc_lesion", "ause"),
        *("observed_error", "calibration", "calibration_gap", "risk_90", "risk_50"),
        *("passes", "trainings", "seconds", "risk_100", "risk_80", "ausc"),
    ):
        for method in METHODS:
            assert list(told(rows, method, "mask", metric)) == test
    costs = [
        [next(iter(told(rows, method, "mask", cost).values())) for cost in ("passes", "trainings")]
        for method in METHODS
    ]
    assert costs == [[2, 1], [8, 1], [8, 1], [2, 2]]
    assert min(told(rows, "A7 map", "mask", "seconds").values()) > 0
    for method in METHODS:  # no map changes what is wrong, only in which order it is left out
        assert told(rows, method, "mask", "risk_100") == pytest.approx(told(rows, method, "mask", "observed_error"))
    assert {(r.fold, r.seed) for r in rows} == {(0, 0)}
    assert {r.convention.partition(" (")[0] for r in rows} == {"chiasm"}


def test_a_single_run_is_no_ensemble(rows: list[Row], finished_run: Path, toy_cohort: Path) -> None:
    alone = assess_maps([finished_run], toy_cohort)
    assert [r for r in alone if r.metric != "seconds"] == [
        r for r in rows if r.metric != "seconds" and r.method != "A7 ensemble"
    ]


def test_what_is_expected_does_not_depend_on_the_target(
    rows: list[Row], finished_run: Path, second: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cohort"
    shutil.copytree(toy_cohort, folder)
    for case in read_json(finished_run / "splits.json")["test"]:
        target = read_volume(path := folder / case / f"{case}_t2.nii.gz")
        path.unlink()
        write_volume(path, np.sqrt(target.array), target.geometry)
    others = assess_maps([finished_run, second], folder)
    for method in METHODS:
        for metric, same in (("expected_error", True), ("observed_error", False)):
            before, after = (told(some, method, "mask", metric) for some in (rows, others))
            assert (before == after) == same


def test_a_perfect_map_scores_perfectly() -> None:
    rng = np.random.default_rng(0)
    error = rng.exponential(size=(12, 12, 12)).astype(np.float32)
    mask, worst = np.ones(error.shape, bool), error > 2
    figures = score_map(error, error, {"mask": mask, "worst": worst}, worst, (1.0, 1.0, 1.0))
    ranked = [figures["mask"][name] for name in ("spearman", "auroc_lesion", "auroc_worst")]
    assert ranked == pytest.approx([1, 1, 1])
    assert figures["mask"]["ause"] == figures["mask"]["calibration_gap"] == figures["worst"]["calibration_gap"] == 0
    assert figures["worst"]["calibration"] == 1
    assert figures["mask"]["risk_50"] == pytest.approx(np.sort(error.ravel())[: error.size // 2].mean(), rel=1e-5)


def test_figures_are_those_of_scipy_and_of_a_hand() -> None:
    rng = np.random.default_rng(1)
    expected = rng.uniform(1, 2, size=(10, 10, 10)).astype(np.float32)
    error = rng.uniform(0, 3, size=expected.shape).astype(np.float32)  # too hopeful here, too gloomy there
    mask = np.ones(expected.shape, bool)
    figures = score_map(expected, error, {"mask": mask}, None, (1.0, 1.0, 1.0))["mask"]
    assert figures["spearman"] == pytest.approx(spearmanr(expected.ravel(), error.ravel()).statistic)
    order = np.argsort(expected.ravel())
    told_, true = expected.ravel()[order].reshape(10, 100).mean(1), error.ravel()[order].reshape(10, 100).mean(1)
    assert figures["calibration_gap"] == pytest.approx(np.abs(told_ - true).mean(), rel=1e-5)
    assert figures["risk_90"] == pytest.approx(true[:9].mean(), rel=1e-5)
    assert figures["calibration"] == pytest.approx(expected.mean() / error.mean(), rel=1e-5)
    curve = calibration_curve(expected.ravel(), error.ravel(), np.zeros(1000, bool))
    assert list(curve) == [f"mask decile {n}" for n in range(1, 11)]
    np.testing.assert_allclose([point["expected_error"] for point in curve.values()], told_, rtol=1e-5)
    np.testing.assert_allclose([point["observed_error"] for point in curve.values()], true, rtol=1e-5)


def test_an_empty_region_has_no_figures() -> None:
    error, none = np.ones((4, 4, 4), np.float32), np.zeros((4, 4, 4), bool)
    figures = score_map(error, error, {"mask": ~none, "ET": none}, none, (1.0, 1.0, 1.0))
    assert all(math.isnan(value) for value in figures["ET"].values())
    assert math.isnan(figures["mask"]["auroc_lesion"])


def test_the_pooled_curve_rises_along_the_expected_error_in_mask_and_lesion(rows: list[Row]) -> None:
    for method in METHODS:
        for place in ("mask", "lesion"):
            points = [
                r.value
                for r in rows
                if r.case == POOLED
                and r.method == method
                and r.region.startswith(f"{place} decile")
                and r.metric == "expected_error"
            ]
            assert points
            assert points == sorted(points)


def refused(first: Path, other: Path, data: Path) -> ChiasmError:
    with pytest.raises(ChiasmError) as caught:
        assess_maps([first, other], data)
    return caught.value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: recipe_with(m, "split", fold=1), "other-fold"),
        (lambda m: replace(m, recipe=m.recipe.model_copy(update={"method": "A12"})), "other-arm"),
        (lambda m: recipe_with(m, "loss", global_weight=0.5), "other-recipe"),
        (lambda m: recipe_with(m, "training", seed=0), "same-seed"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(
    change: Change, reason: str, finished_run: Path, second: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    other = stored(tmp_path / "other", change(load_model(second)), finished_run / "model" / "splits.json")
    error = refused(finished_run, other, toy_cohort)
    assert (type(error), error.reason, error.path) == (RunError, reason, other)


def test_runs_of_another_split_are_refused(finished_run: Path, second: Path, toy_cohort: Path, tmp_path: Path) -> None:
    content = read_json(finished_run / "splits.json")
    content["train"], content["validation"] = (
        [*content["train"][1:], *content["validation"]],
        content["train"][:1],
    )
    del content["checksum"]
    write_json(tmp_path / "splits.json", content)
    other = stored(tmp_path / "other", load_model(second), tmp_path / "splits.json")
    assert refused(finished_run, other, toy_cohort).reason == "other-split"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: replace(m, calibration=None), "no-validation"),
        (lambda m: replace(m, local_discriminator=None, calibration=None), "no-map"),
    ],
)
def test_a_first_run_without_a_calibrated_map_is_refused(
    change: Change, reason: str, finished_run: Path, second: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    first = stored(tmp_path / "first", change(load_model(finished_run)), finished_run / "model" / "splits.json")
    assert refused(first, second, toy_cohort).reason == reason


def test_cases_that_are_not_there_are_named(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    gone = read_json(finished_run / "splits.json")["test"][0]
    folder = tmp_path / "cohort"
    shutil.copytree(toy_cohort, folder)
    shutil.rmtree(folder / gone)
    with pytest.raises(CohortError, match=gone):
        assess_maps([finished_run], folder)
    with pytest.raises(CohortError, match="no locked case"):
        assess_maps([finished_run], toy_cohort, role="locked")
