"""Rows carry what they mean, regions keep to themselves, and units are never mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.evaluation.metric_table import METRICS
from chiasm.evaluation.reference import OwnUnits, Reference, compare_all
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.evaluation.scoring import (
    ScoredImages,
    ScoreTerms,
    calibration,
    describe,
    evaluate_case,
    harmonise,
    reporting_unit,
    score_expected_error,
)
from chiasm.evaluation.summary import format_table, summarise
from chiasm.metrics import conventions, voxelwise
from chiasm.preparation.intensity import IntensityMap, fit_intensity

SPACING = (1.0, 1.0, 2.0)
RANGE = (0.0, 1000.0)


def patient(seed: int = 0):
    """Tissue of 400, an oedema of 500 with a core of 600, a small lesion of 500; the prediction errs more in them."""
    rng = np.random.default_rng(seed)
    shape = (48, 50, 30)
    mask, labels = np.zeros(shape, bool), np.zeros(shape, np.uint8)
    mask[6:42, 6:44, 4:26] = True
    labels[12:24, 12:24, 8:16], labels[15:20, 15:20, 10:14] = 2, 1
    labels[34:37, 34:37, 18:20] = 2
    target = (400 + 20 * rng.standard_normal(shape)).astype(np.float32)
    target[labels == 2], target[labels == 1] = target[labels == 2] + 100, target[labels == 1] + 200
    prediction = (target + 20 * rng.standard_normal(shape)).astype(np.float32)
    prediction[labels > 0] -= 60
    return prediction, target, mask, labels


def evaluated(**changed: Any) -> list[Row]:
    prediction, target, mask, labels = patient()
    given = {"prediction": prediction, "target": target, "mask": mask, "labels": labels} | {
        name: changed.pop(name) for name in ("prediction", "target", "mask", "labels") if name in changed
    }
    regions = changed.pop("regions", {"WT": (1, 2), "TC": (1,)})
    maps = changed.pop("expected_error", None), changed.pop("spread", None)
    settings = {"data_range": RANGE, "unit": "SD", "case": "a"} | changed
    made, is_ct = given.pop("prediction"), settings["unit"] == "HU"
    reference = Reference(**given, regions=regions, spacing_mm=SPACING, is_ct=is_ct)
    return evaluate_case(ScoredImages(made, reference, *maps), ScoreTerms(**settings))


def test_errors_in_own_units_are_those_of_the_scan_by_hand_and_a_ct_has_none() -> None:
    real = np.full((9, 9, 9), 100, np.float32)  # in the cohort's units, of which 100 is one of the scan's 10
    cohort = IntensityMap("rank", (0.0, 100.0, 200.0), (0.0, 1.0, 2.0))
    own = OwnUnits(cohort, IntensityMap("rank", (0.0, 10.0, 40.0), (0.0, 1.0, 2.0)))
    made = real.copy()
    made[:3] += 50  # half-way from 10 to 40: 15 too much
    made[3:6] -= 50  # half-way from 0 to 10: 5 too little
    found = {}
    for units in (own, None):
        reference = Reference(real, np.ones(real.shape, bool), SPACING, own=units)
        found[units] = values(evaluate_case(ScoredImages(made, reference), ScoreTerms("a", RANGE, "SD")))
    assert found[own]["mask", "mae"] == found[None]["mask", "mae"] == pytest.approx(100 / 3)
    assert found[own]["mask", "mae_own"] == pytest.approx(20 / 3)
    assert ("mask", "mae_own") not in found[None]
    thrice = OwnUnits(cohort, IntensityMap("rank", (0.0, 30.0, 120.0), (0.0, 1.0, 2.0)))  # another gain of the scanner
    assert Reference(real, real > 0, SPACING, own=thrice).own_errors(made.ravel()).mean() == pytest.approx(20)


def values(rows: list[Row]) -> dict[tuple[str, str], float]:
    found = {(row.region, row.metric): row.value for row in rows}
    assert len(found) == len(rows), "one figure, one row"
    return found


def row(value: float, **changed: Any) -> Row:
    return Row("a", 0, 0, "model", "mask", "mae", value, "SD", "chiasm")._replace(**changed)


# One case


def test_each_region_is_scored_over_its_own_voxels() -> None:
    prediction, target, mask, labels = patient()
    found = values(evaluated())
    for region, inside in {
        "mask": mask,
        "WT": labels > 0,
        "TC": labels == 1,
        "healthy": mask & (labels == 0),
        "image": np.ones_like(mask),
    }.items():
        error = (prediction - target)[inside].astype(np.float64)
        assert found[region, "mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert found[region, "rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
        assert found[region, "psnr"] == pytest.approx(10 * np.log10(1e6 / (error**2).mean()), abs=1e-3)
    assert found["mask", "ssim"] == pytest.approx(
        conventions.score(prediction, target, mask, "chiasm", RANGE, SPACING)["ssim"], abs=1e-6
    )
    assert found["lesion-edge", "mae"] > found["healthy", "mae"]


@pytest.mark.parametrize("convention", ["chiasm", "synthrad2023", "resvit"])
def test_scores_of_all_regions_at_once_equal_those_of_each_region_alone(convention: str) -> None:
    prediction, target, mask, _ = patient()
    labels = np.random.default_rng(3).integers(0, 20, mask.shape).astype(np.uint8)
    regions = {f"part-{label}": [label, label + 1] for label in range(1, 19)}  # more than fit into one pass
    reference = Reference(target, mask, SPACING, labels, regions)
    found = values(evaluated(labels=labels, regions=regions, convention=convention))
    rules = conventions.find_convention(convention)
    counted = mask if rules.masked else np.ones_like(mask)
    pair = conventions.pair_up(prediction, target, counted, rules, RANGE)
    low, high = rules.range or RANGE
    for region, inside in reference.list_regions():
        alone = conventions.plain_scores(prediction, target, inside, high - low, SPACING)
        for metric, value in (alone | conventions.likeness(pair, inside)).items():
            tolerance = 1e-6 if metric == "ssim" else 1e-8  # sums of single precision
            assert found[region, metric] == pytest.approx(value, rel=tolerance, nan_ok=True), (region, metric)


@pytest.mark.parametrize("convention", ["chiasm", "synthrad2023", "brats-brain"])
def test_the_whole_image_is_scored_from_the_box_of_a_cut_out_head_as_from_all_voxels(convention: str) -> None:
    prediction, target, mask, labels = (np.pad(array, ((0, 7), (30, 0), (0, 0))) for array in patient())
    for image in (prediction, target):
        image[~mask] = 30
    terms = ScoreTerms("a", RANGE, "SD", convention=convention)
    reference = Reference(target, mask, SPACING, labels).cut_out(prediction, 30.0)
    assert reference.frame is not None
    images = ScoredImages(prediction[reference.frame.box], reference)
    found = values(evaluate_case(images, terms))
    rules, whole = terms.rules, np.ones_like(mask)
    plain = voxelwise.error_scores(prediction, target, terms.width)
    plain |= conventions.likeness(conventions.pair_up(prediction, target, whole, rules, RANGE), whole)
    for metric, value in plain.items():
        assert found["image", metric] == pytest.approx(value, rel=1e-7 if metric == "ssim" else 1e-8), metric
    uncut = values(evaluate_case(ScoredImages(prediction, Reference(target, mask, SPACING, labels)), terms))
    assert found == pytest.approx(uncut, rel=1e-6, nan_ok=True)
    target[0, 0, 0] += 300  # no cut-out any more
    whole_reference = Reference(target, mask, SPACING, labels)
    assert whole_reference.cut_out(prediction, 30.0) is whole_reference


def test_a_target_is_filtered_once_for_all_predictions_and_each_scores_as_alone(monkeypatch) -> None:
    prediction, target, mask, labels = (np.pad(array, ((0, 7), (30, 0), (0, 0))) for array in patient())
    noise = np.random.default_rng(5).normal(0, 40, mask.shape)
    others = [prediction, np.where(mask, prediction + noise, 0), np.where(mask, 420 + noise, 0)]
    predictions = [image.astype(np.float32) for image in others]
    for image in (target, *predictions):
        image[~mask] = 30
    filtered: list[int] = []
    smooth = conventions.CutOutTarget
    monkeypatch.setattr(conventions, "CutOutTarget", lambda *a, **k: filtered.append(1) or smooth(*a, **k))
    reference = Reference(target, mask, SPACING, labels).cut_out(predictions[0], 30.0)
    assert reference.frame is not None and reference.part is reference
    box, terms = reference.frame.box, ScoreTerms("a", RANGE, "SD")
    inside = [image[box][reference.mask] for image in predictions]
    compared = compare_all(reference, inside, terms.convention, RANGE)
    together = [
        values(evaluate_case(ScoredImages(image[box], reference, compared=its), terms))
        for image, its in zip(predictions, compared)
    ]
    assert len(filtered) == 1
    for image, found in zip(predictions, together):
        alone = values(evaluate_case(ScoredImages(image, Reference(target, mask, SPACING, labels)), terms))
        assert found == pytest.approx(alone, rel=1e-6, abs=1e-6, nan_ok=True)  # SSIM in single precision, of about 1


def test_the_mask_comes_first_and_every_figure_has_a_unit_and_a_convention() -> None:
    rows = evaluated(expected_error=np.full((48, 50, 30), 20, np.float32))
    assert rows[0].region == "mask"
    assert {row.metric for row in rows} <= METRICS.keys()
    assert {row.unit for row in rows} == {"SD", "SD/mm", "dB", "mL", "1"}
    assert {row.convention for row in rows} == {describe("chiasm", RANGE, "SD")}
    assert "a lesion has at least 3 voxels and 0.01 mL" in rows[0].convention


def test_errors_of_ct_are_told_in_attenuation_too_and_those_of_mr_are_not() -> None:
    _, _, mask, labels = patient()
    target = np.where(mask, 0, -1000).astype(np.float32)
    prediction = target + np.where(labels == 1, 1000, np.where(labels == 2, -100, 0)).astype(np.float32)
    rows = evaluated(prediction=prediction, target=target, unit="HU", data_range=(-1024, 3071))
    found = values(rows)
    # water taken for bone of 1000 HU: 2000 * 5.1e-5 + 4.71e-2 - 0.096; for fat of -100 HU: 100 * 9.6e-5
    assert found["TC", "mae_mu"] == pytest.approx(0.0531, abs=1e-6)
    core, rest = (labels == 1).sum(), (labels == 2).sum()
    assert found["WT", "mae_mu"] == pytest.approx((0.0531 * core + 0.0096 * rest) / (core + rest), abs=1e-6)
    assert found["mask", "mae_mu"] == pytest.approx((0.0531 * core + 0.0096 * rest) / mask.sum(), rel=1e-4)
    assert {row.unit for row in rows if row.metric == "mae_mu"} == {"1/cm"}
    assert "mae_mu (1/cm)" in " ".join(format_table(rows))
    assert not [row for row in evaluated() if row.metric == "mae_mu"]


@pytest.mark.parametrize("convention", ["chiasm", "synthrad2025"])
def test_what_lies_outside_the_mask_changes_nothing_but_the_whole_image(convention: str) -> None:
    prediction, target, mask, _ = patient()
    expected_error = np.abs(prediction - target)
    before = evaluated(expected_error=expected_error, convention=convention)
    for array in (prediction, target, expected_error):
        array[~mask] = np.random.default_rng(1).uniform(0, 900, (~mask).sum())
    after = evaluated(prediction=prediction, target=target, expected_error=expected_error, convention=convention)
    keep = [[row for row in rows if row.region != "image"] for rows in (before, after)]
    assert str(keep[0]) == str(keep[1])  # NaN equals NaN as text
    assert values(before)["image", "mae"] != values(after)["image", "mae"]


def test_a_unit_scale_divides_errors_and_nothing_else() -> None:
    plain, scaled = values(evaluated()), values(evaluated(unit_scale=50.0))
    for (region, metric), value in plain.items():
        factor = 50 if METRICS[metric].unit in ("", "/mm") else 1
        assert scaled[region, metric] * factor == pytest.approx(value, rel=1e-9, nan_ok=True), metric


def test_lesions_are_measured_one_by_one_and_counted() -> None:
    found = values(evaluated())
    assert found["lesion-1", "volume_ml"] == pytest.approx(12 * 12 * 8 * 2 / 1000)
    assert found["lesion-2", "volume_ml"] == pytest.approx(3 * 3 * 2 * 2 / 1000)
    assert found["lesion-2", "contrast_target"] == pytest.approx(100, abs=15)
    assert found["lesion-2", "contrast_kept"] == pytest.approx(0.4, abs=0.15)
    assert (found["lesions", "lesions"], found["lesions", "recall"]) == (2, 0)
    assert (found["lesions-medium", "lesions"], found["lesions-small", "lesions"]) == (1, 1)
    assert found["lesions", "false_lesions"] == 0


def test_components_that_are_too_small_are_counted_and_change_no_recall() -> None:
    _, _, mask, labels = patient()
    before = values(evaluated())
    from scipy import ndimage

    free = np.argwhere(mask & (ndimage.binary_dilation(labels > 0, iterations=3) == 0))
    for i, j, k in free[:: len(free) // 5][:5]:
        labels[i, j, k] = 1
    found = values(evaluated(labels=labels))
    assert (before["lesions", "too_small"], found["lesions", "too_small"]) == (0, 5)
    assert found["lesions", "lesions"] == 2 and found["lesions", "recall"] == before["lesions", "recall"]
    assert "lesion-3" not in {region for region, _ in found}


def test_a_removed_lesion_shows_in_recall_though_hardly_in_psnr() -> None:
    _, target, _, _ = patient()
    removed = target.copy()
    removed[34:37, 34:37, 18:20] -= 100
    whole = values(evaluated(prediction=target + 10))
    without = values(evaluated(prediction=removed + 10))
    assert whole["mask", "psnr"] - without["mask", "psnr"] < 0.3
    assert (whole["lesions", "recall"], without["lesions", "recall"]) == (1, 0.5)
    assert without["lesions-small", "recall"] == 0


def test_without_labels_there_are_no_lesions_and_an_empty_map_gives_nan() -> None:
    bare = values(evaluated(labels=None))
    assert {region for region, _ in bare} == {"mask", "edges", "image", *"ijk"}
    empty = values(evaluated(labels=np.zeros((48, 50, 30), np.uint8)))
    assert np.isnan(empty["WT", "mae"]) and np.isnan(empty["lesions", "recall"])
    assert empty["lesions", "lesions"] == 0
    assert empty["healthy", "mae"] == empty["mask", "mae"]


def test_labels_outside_the_mask_are_no_part_of_a_region() -> None:
    _, _, mask, labels = patient()
    labels[:4] = 1
    assert not mask[:4].any()
    assert str(evaluated(labels=labels)) == str(evaluated())


def test_labels_without_names_are_one_region() -> None:
    assert values(evaluated(regions={}))["lesion", "mae"] == values(evaluated())["WT", "mae"]


@pytest.mark.filterwarnings("error")
def test_an_empty_mask_gives_nan_in_every_region_of_it() -> None:
    found = values(evaluated(mask=np.zeros((48, 50, 30), bool), expected_error=np.ones((48, 50, 30), np.float32)))
    counts = ("lesions", "false_lesions", "too_small")
    assert all(np.isnan(v) for (region, metric), v in found.items() if region != "image" and metric not in counts)


def test_a_leaking_convention_says_so_and_scores_the_whole_image_as_metrics_do() -> None:
    prediction, target, mask, _ = patient()
    rows = evaluated(convention="nie-v1")
    assert "scale-leaking" in rows[0].convention
    wanted = conventions.score(prediction, target, mask, "nie-v1", RANGE, SPACING)
    assert values(rows)["image", "psnr"] == pytest.approx(wanted["psnr"], abs=1e-4)
    assert values(rows)["image", "ssim"] == pytest.approx(wanted["ssim"], abs=1e-5)


def test_shapes_units_and_conventions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="share one shape"):
        evaluated(labels=np.zeros((48, 50, 1), np.uint8))
    with pytest.raises(ValueError, match="unit_scale"):
        evaluated(unit_scale=0.0)
    with pytest.raises(RecipeError, match="brats-brain"):
        evaluated(convention="bratz")


@pytest.mark.parametrize("which", ["prediction", "target"])
def test_a_normalised_image_against_a_raw_one_is_refused(which: str) -> None:
    _, target, mask, _ = patient()
    normalised = fit_intensity(target, mask, "zscore").apply(target)
    with pytest.raises(ChiasmError, match="not in one unit") as caught:
        evaluated(**{which: normalised})
    assert caught.value.reason == "other-unit" and caught.value.hint


def test_a_naive_baseline_that_is_far_off_is_scored_and_costs_no_case() -> None:
    _, target, mask, _ = patient()
    far = fit_intensity(target, mask, "zscore").apply(target)
    assert values(evaluated(prediction=far, method="identity"))["mask", "mae"] > 0


def test_a_poor_or_constant_prediction_is_scored_and_not_refused() -> None:
    _, target, _, _ = patient()
    assert values(evaluated(prediction=np.zeros_like(target)))["mask", "mae"] > 300
    assert np.isnan(values(evaluated(prediction=np.full_like(target, 400)))["mask", "ncc"])
    assert values(evaluated(prediction=5 * target))["mask", "mae"] > 1000


# Units


def plan(kind: str = "median_iqr") -> Any:
    """What of a plan counts here: a cohort whose targets are 300 to 500, SD 50."""
    rng = np.random.default_rng(5)
    cohort = fit_intensity(rng.normal(400, 50, 100_000), None, kind)  # type: ignore[arg-type]
    return SimpleNamespace(
        target_unit="a.u.",
        target_kind=kind,
        target_reference=cohort,
        target_range=(271.0, 529.0),
        target_background=-3.0,
        target_sd=1.0,
    )


@pytest.mark.parametrize("kind", ["median_iqr", "zscore", "percentile", "rank"])
def test_the_gain_and_offset_of_a_scanner_do_not_change_the_reference(kind: str) -> None:
    _, target, mask, _ = patient()
    one = harmonise(target, mask, plan(kind))
    other = harmonise(7.5 * target + 120, mask, plan(kind))
    assert np.abs(one - other)[mask].max() < 0.05
    own = fit_intensity(target, mask, kind).apply(target)  # type: ignore[arg-type]
    assert np.abs(plan(kind).target_reference.apply(one) - own)[mask].max() < 1e-3


def test_a_cut_out_background_becomes_the_cohorts_and_zeros_inside_stay_intensities() -> None:
    _, target, mask, _ = patient()
    target[~mask] = target[10, 10, 6] = 0
    target[0, 0, 0] = 350  # outside, but tissue
    found = harmonise(target, mask, plan())
    assert set(np.unique(found[(target == 0) & ~mask])) == {-3}
    assert found[0, 0, 0] > 200 and found[10, 10, 6] < -100


def test_hounsfield_units_are_compared_as_they_are() -> None:
    _, target, mask, _ = patient()
    assert np.array_equal(harmonise(target, mask, SimpleNamespace(target_unit="HU")), target)  # type: ignore[arg-type]
    assert reporting_unit(SimpleNamespace(target_unit="HU")) == ("HU", 1.0)  # type: ignore[arg-type]


def test_the_prediction_is_never_harmonised() -> None:
    _, target, mask, _ = patient()
    reference = harmonise(target, mask, plan())
    found = values(evaluated(prediction=1.5 * reference, target=reference))
    assert found["mask", "mae"] == pytest.approx(0.5 * reference[mask].mean(), rel=0.01), "a wrong gain is an error"


def test_one_sd_is_that_of_the_training_targets() -> None:
    unit, scale = reporting_unit(plan())
    assert unit == "SD" and scale == pytest.approx(50, rel=0.02)


# Expected error


def test_a_perfect_map_and_an_inverted_one_are_told_apart() -> None:
    prediction, target, mask, labels = patient()
    error = np.where(mask, np.abs(prediction - target), 0)
    good = score_expected_error(error, error, mask, labels > 0, SPACING)
    bad = score_expected_error(100 - error, error, mask, labels > 0, SPACING)
    assert (good["spearman"], good["auroc_worst"], good["ause"]) == pytest.approx((1, 1, 0))
    assert bad["spearman"] == pytest.approx(-1) and bad["ausc"] > 1 > good["ausc"]
    assert good["auroc_lesion"] == pytest.approx(1 - bad["auroc_lesion"])
    assert good["auroc_lesion"] > 0.8


def test_the_smoothed_error_is_smoothed_inside_the_mask_alone() -> None:
    prediction, target, mask, _ = patient()
    error = np.where(mask, np.abs(prediction - target), 0).astype(np.float32)
    sigma = [2 / step for step in SPACING]
    wanted = gaussian_filter(error, sigma, truncate=3) / np.maximum(
        gaussian_filter(mask * 1.0, sigma, truncate=3), 1e-9
    )
    smooth = gaussian_filter(error, 1.0)
    found = score_expected_error(smooth, error, mask, None, SPACING)
    assert found["spearman_smoothed"] == pytest.approx(spearmanr(smooth[mask], wanted[mask]).statistic, abs=1e-4)


def test_calibration_is_told_for_each_region() -> None:
    found = values(evaluated(expected_error=np.full((48, 50, 30), 30, np.float32)))
    assert found["healthy", "expected_error"] == 30
    assert found["healthy", "calibration"] == pytest.approx(30 / found["healthy", "mae"])
    assert found["WT", "calibration"] < 0.6 < 1.5 < found["healthy", "calibration"], "lesion errors are understated"
    assert calibration(np.ones(4), np.full(4, 2.0)) == {"expected_error": 1, "calibration": 0.5}


# Files and tables


def test_an_evaluation_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [*evaluated(case='odd, "name"'), row(np.inf, metric="psnr"), row(np.nan)]
    write_evaluation(tmp_path, rows)
    assert str(read_evaluation(tmp_path)) == str(rows)
    assert read_evaluation(tmp_path / "evaluation.csv")[0] == rows[0]
    stored = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [entry["value"] for entry in stored[-2:]] == ["inf", None]
    assert stored[0]["value"] == rows[0].value and stored[0]["region"] == "mask"
    told = row(1.0)._replace(convention="; ".join(["range -1 to 2.5"] * 20))  # longer than a name may be
    write_evaluation(tmp_path, [told])
    assert read_evaluation(tmp_path) == [told]


def test_a_file_that_is_no_evaluation_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="no evaluation"):
        read_evaluation(tmp_path)
    write_evaluation(tmp_path, [row(1.0)])
    for damage in ("a,0,0,model,mask\n", "a,0,zero,model,mask,mae,1.0,SD,chiasm\n"):
        file = tmp_path / "evaluation.csv"
        file.write_text(file.read_text().splitlines()[0] + "\n" + damage)
        with pytest.raises(RunError, match="damaged"):
            read_evaluation(tmp_path)


def test_a_summary_counts_people_and_averages_inside_them_first() -> None:
    rows = [
        row(1.0, case="a", seed=0),
        row(3.0, case="a", seed=1),
        row(6.0, case="a2"),
        row(10.0, case="b"),
        row(np.nan, case="c"),
    ]
    (by_case,) = summarise(rows)
    assert (by_case.n, by_case.mean, by_case.sd) == (3, 6.0, 4.0)  # 2, 6, 10
    (by_person,) = summarise(rows, {"a": "anna", "a2": "anna", "b": "ben"})
    assert (by_person.n, by_person.mean) == (2, 7.0)  # 4, 10
    assert by_person.sd == pytest.approx(np.sqrt(18))


def test_lesions_are_averaged_inside_a_case_first() -> None:
    lesions = [("a", 1, 0.0), ("a", 2, 4.0), ("b", 1, 8.0)]
    (summary,) = summarise([row(value, case=case, region=f"lesion-{number}") for case, number, value in lesions])
    assert (summary.region, summary.n, summary.mean) == ("each lesion", 2, 5.0)


def test_a_figure_of_one_subject_has_no_sd_and_one_of_none_is_nan() -> None:
    (one,) = summarise([row(2.0)])
    (none,) = summarise([row(np.nan)])
    assert np.isnan(one.sd) and one.n == 1
    assert np.isnan(none.mean) and none.n == 0


def test_figures_of_two_units_or_conventions_are_never_averaged() -> None:
    for changed in ({"unit": "HU"}, {"convention": "nie-v1"}):
        with pytest.raises(ValueError, match="comes as"):
            summarise([row(1.0), row(2.0, case="b", **changed)])


def test_a_table_sets_methods_side_by_side_and_names_its_convention() -> None:
    rows = [row(value, case=case) for case, value in (("a", 0.1), ("b", 0.3))]
    rows += [row(0.5, case=case, method="lookup") for case in "ab"]
    assert format_table(rows) == [
        "| region | score    | n | model         | lookup       |",
        "|--------|----------|---|---------------|--------------|",
        "| mask   | mae (SD) | 2 | 0.2000 ± 0.14 | 0.5000 ± 0.0 |",
        "",
        "Convention: chiasm.",
    ]


def test_evaluating_never_loads_torch() -> None:
    program = (
        "import sys\nfrom chiasm.evaluation import scoring as evaluation\n"
        "assert not {'torch', 'pandas', 'scipy.stats', 'matplotlib', 'monai'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_spread_of_models_is_ranked_with_the_error_as_scipy_does() -> None:
    from scipy.stats import spearmanr

    prediction, target, mask, _ = patient()
    spread = np.abs(prediction - target) + np.random.default_rng(5).normal(30, 20, mask.shape).astype(np.float32)
    error = np.abs(prediction - target)
    found = values(evaluated(spread=spread, labels=None))
    assert found["mask", "spread_spearman"] == pytest.approx(spearmanr(spread[mask], error[mask]).statistic, abs=1e-6)
    assert ("mask", "spread_spearman") not in values(evaluated(labels=None))
