"""Gamma of two doses: worked by hand, refused where it makes no sense, and a row of an evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import RecipeError, VolumeError
from chiasm.evaluation import doses
from chiasm.evaluation.doses import GammaCriteria, compare_doses, read_criteria
from chiasm.prediction.folders import predict
from chiasm.reports.evaluation import evaluate
from chiasm.volumes import Geometry, Volume, check_pair, read_volume, write_volume

SHAPE = (24, 10, 8)
SPACING = (1.0, 2.0, 3.0)
needs_pymedphys = pytest.mark.skipif(
    doses.importlib.util.find_spec("pymedphys") is None, reason="PyMedPhys is not installed: pip install 'chiasm[dose]'"
)


def dose(array: np.ndarray) -> Volume:
    return Volume(np.asarray(array, np.float32), Geometry(array.shape, np.diag([*SPACING, 1.0])))


def passing(synthetic: np.ndarray, real: np.ndarray, percent: float = 2, distance_mm: float = 2) -> float:
    return compare_doses(dose(synthetic), dose(real), GammaCriteria(percent, distance_mm))["dose"]["gamma_pass"]


@needs_pymedphys
def test_an_even_dose_passes_as_far_as_its_difference_allows() -> None:
    """Where dose is even no distance helps: 1.9 % more passes everywhere, 2.1 % more nowhere."""
    even = np.full(SHAPE, 50.0)
    assert passing(even, even) == 100
    assert passing(1.019 * even, even) == 100 and passing(1.021 * even, even) == 0
    assert passing(1.021 * even, even, percent=3) == 100
    found = compare_doses(dose(1.021 * even), dose(even), GammaCriteria())["dose"]
    assert found["dose_difference"] == pytest.approx(2.1, rel=1e-4)


@needs_pymedphys
def test_a_ramp_that_is_moved_passes_as_far_as_its_distance_allows() -> None:
    """10 % of the largest dose to the mm: moved by 1 mm it passes 2 mm, moved by 3 mm it does not."""
    ramp = np.clip(10.0 * (np.arange(24) - 6), 0, 100)[:, None, None] * np.ones(SHAPE)
    assert passing(np.roll(ramp, 1, axis=0), ramp) == 100
    inner = passing(np.roll(ramp, 3, axis=0), ramp)
    steep = (ramp > 10) & (ramp < 100)
    assert inner < 100 - 100 * steep.sum() / (ramp >= 10).sum() + 15


@needs_pymedphys
def test_voxels_of_little_dose_do_not_count() -> None:
    real = np.full(SHAPE, 100.0)
    real[:6] = 9.0
    wrong = real.copy()
    wrong[:3] = 0.0  # far from the dose that counts
    assert passing(wrong, real) == 100


@needs_pymedphys
def test_a_dose_of_nothing_and_other_grids_are_refused() -> None:
    with pytest.raises(VolumeError, match="nowhere above 0"):
        passing(np.ones(SHAPE), np.zeros(SHAPE))
    with pytest.raises(VolumeError, match="dose"):
        compare_doses(dose(np.ones((24, 10, 9))), dose(np.ones(SHAPE)), GammaCriteria())


@needs_pymedphys
def test_doses_that_fit_better_when_one_is_mirrored_are_compared_as_they_lie() -> None:
    """A plan from the other side is another dose, and no mistake of a header."""
    shape = (24, 22, 20)
    places = np.indices(shape) - np.array((7, 9, 8)).reshape(3, 1, 1, 1)
    real = dose(100 * np.exp(-np.sum((places / np.array((5, 6, 4)).reshape(3, 1, 1, 1)) ** 2, axis=0)))
    other = dose(real.array[::-1])
    with pytest.raises(VolumeError, match="better when it is mirrored"):
        check_pair(real, other)
    assert compare_doses(other, real, GammaCriteria())["dose"]["gamma_pass"] < 50


@pytest.mark.parametrize("text", ["2", "2,2,2", "0,2", "2,-1", "nan,2", "two,2", "2,21", ""])
def test_criteria_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="gamma"):
        read_criteria(text)


def test_without_pymedphys_an_evaluation_does_not_begin(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"chiasm\[dose\]"):
        evaluate(tmp_path, toy_cohort, tmp_path / "scores", doses=(tmp_path, tmp_path))
    assert not (tmp_path / "scores").exists()


@needs_pymedphys
def test_an_evaluation_scores_doses_beside_images(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doses, "STEPS", 5)  # where dose is even, a finer search finds no more
    made = predict(finished_run, [toy_cohort], tmp_path / "made", only="test")
    first = made.manifest.cases[0]
    image = read_volume(made.folder / first.image)
    even = np.full(image.array.shape, 60.0, np.float32)
    even[..., 0] = 59.9  # a constant volume is refused
    half = even.copy()
    half[: even.shape[0] // 2] *= np.float32(1.5)
    for folder, array in (("synthetic", half), ("real", even)):
        write_volume(tmp_path / folder / f"{first.case}.nii.gz", array, image.geometry)
    pair = (tmp_path / "synthetic", tmp_path / "real")
    scored = evaluate(made.folder, toy_cohort, tmp_path / "scores", doses=pair, gamma="3,1")
    assert [problem for problem in scored.problems if problem.case == first.case] == []
    with (scored.report.parent / "evaluation.csv").open(newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file) if row["region"] == "dose"}
    assert 49 < float(rows["gamma_pass"]["value"]) < 60 and rows["gamma_pass"]["unit"] == "%"
    assert float(rows["dose_difference"]["value"]) == pytest.approx(25, abs=1)
    assert "3 %/1 mm" in rows["gamma_pass"]["convention"]
    assert "Gamma pass rate" in scored.report.read_text()
