"""From a raw score to an expected error, against scikit-learn and numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import RunError
from chiasm.prediction.calibration import (
    apply_calibration,
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
    few = fit_calibration(score[:100], score[:100], fitted_on=())
    assert not few.informative and "too few" in few.verdict


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


@pytest.mark.parametrize(("score", "error"), [([1.0], [-1.0]), ([np.nan], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_what_is_no_sample_is_refused(score: list[float], error: list[float]) -> None:
    with pytest.raises(ValueError, match=r"scores|finite"):
        fit_calibration(score, error, fitted_on=())
