"""From a raw score to an expected error, against scikit-learn and numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import RunError
from chiasm.prediction.calibration import (
    LEAST_VOXELS,
    apply_calibration,
    calibration_table,
    fit_calibration,
    never_falling,
    read_calibration,
    write_calibration,
)

RNG = np.random.default_rng(0)


def test_pooling_equals_scikit_learns_isotonic_regression() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    for n in (1, 2, 40, 300):
        y, w = RNG.normal(size=n) + np.linspace(0, 2, n), RNG.integers(1, 9, n)
        theirs = isotonic.IsotonicRegression().fit_transform(np.arange(n), y, sample_weight=w)
        np.testing.assert_allclose(never_falling(y, w), theirs, atol=1e-12)


def test_a_fit_of_single_voxels_is_scikit_learns() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    score = RNG.permutation(np.linspace(0, 3, 500)).astype(np.float32)
    error = np.abs(score + RNG.normal(size=500)).astype(np.float32)
    fitted = fit_calibration(score, error, fitted_on=("a",), knots=500)
    theirs = isotonic.IsotonicRegression(out_of_bounds="clip").fit(score.astype(float), error.astype(float))
    at = np.linspace(-1, 5, 1001)
    np.testing.assert_allclose(apply_calibration(fitted, at), theirs.predict(at), atol=1e-5)


def test_equal_scores_are_never_parted() -> None:
    score = np.repeat([0.0, 1.0, 2.0], [500, 490, 10])
    fitted = fit_calibration(score, score * 3, fitted_on=(), knots=999)
    assert (fitted.x, fitted.y) == ((0.0, 1.0, 2.0), (0.0, 3.0, 6.0))


def test_the_table_by_region_is_what_one_counts_by_hand() -> None:
    predicted, observed = np.array([1.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 4.0, 8.0])
    lesion = np.array([False, False, True, True])
    rows = calibration_table(predicted, observed, {"lesion": lesion, "none": np.zeros(4, bool)})
    assert [tuple(row) for row in rows] == [
        ("all", 0, 4, 2.0, 4.0, 2.0),
        ("all", 1, 2, 1.0, 2.0, 2.0),  # equal expectations stay together
        ("all", 2, 1, 2.0, 4.0, 2.0),
        ("all", 3, 1, 4.0, 8.0, 2.0),
        ("lesion", 0, 2, 3.0, 6.0, 2.0),
        ("lesion", 1, 1, 2.0, 4.0, 2.0),
        ("lesion", 2, 1, 4.0, 8.0, 2.0),
    ]
    nothing = calibration_table(np.zeros(3), np.ones(3), {})
    assert np.isnan(nothing[0].ratio)
    for regions in ({"all": lesion}, {"x": lesion[:2]}):
        with pytest.raises(ValueError, match="predicted"):
            calibration_table(predicted, observed, regions)


def test_noise_is_not_called_informative() -> None:
    verdicts = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        fitted = fit_calibration(rng.random(2000), rng.random(2000), fitted_on=("a",))
        verdicts.append("not informative" in fitted.verdict and not fitted.informative and not fitted.inverted)
    assert sum(verdicts) >= 34  # 95 % of them, as two standard deviations go


def test_a_fit_finds_the_error_that_goes_with_a_score() -> None:
    score = RNG.gamma(2, 1, 50_000)
    error = np.abs(RNG.normal(size=50_000)) * score
    fitted = fit_calibration(score, error, fitted_on=("a", "b"))
    assert fitted.informative and not fitted.inverted and "follows" in fitted.verdict
    at = np.array([0.5, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(apply_calibration(fitted, at), at * np.sqrt(2 / np.pi), rtol=0.15)
    assert (np.diff(apply_calibration(fitted, np.linspace(0, 20, 100))) >= 0).all()


def test_an_inverted_a_flat_and_a_small_sample_say_so() -> None:
    score = RNG.random(5000)
    assert fit_calibration(score, 1 - score, fitted_on=()).inverted
    assert "inverted" in fit_calibration(score, 1 - score, fitted_on=()).verdict
    assert not fit_calibration(np.ones(5000), score, fitted_on=()).informative
    few, enough = (fit_calibration(score[:n], score[:n], fitted_on=()) for n in (LEAST_VOXELS - 1, LEAST_VOXELS))
    assert not few.informative and "too few" in few.verdict
    assert enough.informative and "follows" in enough.verdict


def test_it_is_written_and_read_and_damage_is_refused(tmp_path: Path) -> None:
    fitted = fit_calibration(RNG.random(2000), RNG.random(2000), fitted_on=("a",))
    path = tmp_path / "calibration.json"
    write_calibration(path, fitted)
    assert read_calibration(path) == fitted
    content = json.loads(path.read_text())
    for change in ({"x": content["x"][::-1]}, {"y": [1.0]}, {"voxels": "many"}, {"spearman": None}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(RunError):
            read_calibration(path)
    for noise in (b"", b"{", b"[]", b"\xff\xfe", path.read_bytes().replace(b"]", b"", 1)):
        path.write_bytes(noise)
        with pytest.raises(RunError):
            read_calibration(path)


@pytest.mark.parametrize(("score", "error"), [([1.0], [-1.0]), ([np.nan], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_what_is_no_sample_is_refused(score: list[float], error: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scores|finite"):
        fit_calibration(score, error, fitted_on=())
