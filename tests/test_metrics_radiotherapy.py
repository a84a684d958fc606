"""What a physicist asks of a synthetic CT, on phantoms worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import RecipeError
from chiasm.evaluation.reference import Beams, Reference
from chiasm.evaluation.scoring import ScoredImages, ScoreTerms, evaluate_case
from chiasm.metrics.edges import compare_steps
from chiasm.metrics.radiotherapy import (
    MOST_ANGLES,
    THOMAS,
    beam_errors,
    electron_density,
    path_errors,
    read_angles,
    read_curve,
    tissues,
)
from chiasm.volumes.geometry import Geometry, axis_names

SHAPE, SPACING = (10, 8, 6), (2.0, 1.0, 3.0)


def slab(depth: slice, hu: float) -> np.ndarray:
    """Water with a slab of another tissue across the first axis."""
    image = np.zeros(SHAPE, np.float32)
    image[depth] = hu
    return image


def test_density_follows_the_curve_and_goes_on_beyond_it() -> None:
    given = [-3000, -1000, -500, 0, 975, 1950, 3900]
    np.testing.assert_allclose(electron_density(given), [0, 0, 0.5, 1, 1.5, 2, 3], atol=1e-6)
    np.testing.assert_allclose(electron_density([50], [(0, 1), (100, 3)]), [2])
    for wrong in (THOMAS[:1], [(0, 1), (0, 2)], [(10, 1), (0, 2)]):
        with pytest.raises(ValueError, match="rise"):
            electron_density([0], wrong)


@pytest.mark.parametrize("between", [",", ";", "\t", " ", ", "])
def test_a_curve_is_read_from_lines_of_two_numbers(tmp_path: Path, between: str) -> None:
    rows = ["HU density", "-1000 0", "", "0 1.0", "1.2e3 1.69"]
    (tmp_path / "curve.csv").write_text("\ufeff" + "\r\n".join(row.replace(" ", between) for row in rows))
    assert read_curve(tmp_path / "curve.csv") == ((-1000, 0), (0, 1), (1200, 1.69))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0,1",
        "0,1\n0,2",
        "10,1\n0,2",
        "0,1\n10,0.5",
        "-9,-1\n0,1",
        "0,1\n5,nan",
        "0,1,2\n1,2,3",
        "a,b\nc,d\n0,1\n1,2",
    ],
)
def test_what_is_no_curve_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "curve.csv").write_text(text)
    for path in (tmp_path / "curve.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(RecipeError, match="no calibration curve"):
            read_curve(path)


def test_a_ray_through_a_slab_that_was_missed_is_off_by_its_depth_in_water() -> None:
    mask = np.ones(SHAPE, bool)
    real, made = slab(slice(3, 6), 975.0), slab(slice(3, 5), 975.0)  # one voxel of density 1.5 is water
    difference = electron_density(made) - electron_density(real)
    along = path_errors(difference, mask, SPACING, 0)
    assert along == pytest.approx({"path_error": 0.5 * 2.0, "path_error_95": 0.5 * 2.0})
    across = path_errors(difference, mask, SPACING, 1)  # a tenth of the rays meets 8 mm of it
    assert across["path_error"] == pytest.approx(0.1 * 0.5 * 8)
    assert across["path_error_95"] == pytest.approx(0.5 * 8)
    mask[:, :4] = False
    assert path_errors(difference, mask, SPACING, 1)["path_error_95"] == pytest.approx(0.5 * 4)
    assert np.isnan(path_errors(difference, np.zeros(SHAPE, bool), SPACING, 2)["path_error"])


def test_errors_of_opposite_sign_along_a_ray_cancel() -> None:
    difference = np.zeros(SHAPE, np.float32)
    difference[2], difference[7] = 0.2, -0.2
    mask = np.ones(SHAPE, bool)
    assert path_errors(difference, mask, SPACING, 0)["path_error"] == pytest.approx(0, abs=1e-6)
    assert path_errors(difference, mask, SPACING, 2)["path_error"] == pytest.approx(0.2 * 6 * 3.0 * 2 / 10)


def in_plane(shape: tuple[int, int, int], step_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Places to the right and to the front of the middle, mm, of an axial volume stored in RAS order."""
    right, front, _ = ((np.indices(shape).T - (np.array(shape) - 1) / 2) * step_mm).T
    return right, front


def rotated_slab(degrees: float, depth_mm: float, width_mm: float, step_mm: float = 1.0) -> np.ndarray:
    """A slab whose face looks at a gantry of this angle, with edges that are averaged over a voxel."""
    right, front = in_plane((121, 121, 3), step_mm)
    to_left, to_front = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    deep = np.abs(-right * to_left + front * to_front)
    wide = np.abs(right * to_front + front * to_left)
    sides = [np.clip((size / 2 - away) / step_mm + 0.5, 0, 1) for size, away in ((depth_mm, deep), (width_mm, wide))]
    return np.asarray(sides[0] * sides[1], np.float32)


@pytest.mark.parametrize("degrees", [0.0, 20.0, 37.5, 75.0, 110.0, 200.0, 305.0])
def test_a_beam_onto_the_face_of_a_rotated_slab_meets_its_depth(degrees: float) -> None:
    missed = rotated_slab(degrees, depth_mm=12, width_mm=70)
    mask = missed > 0
    facing = beam_errors(0.5 * missed, mask, np.eye(3), degrees)
    assert facing["path_error_95"] == pytest.approx(0.5 * 12, rel=0.02)
    assert facing["path_error"] == pytest.approx(0.5 * 12, rel=0.05)  # rays at the rim meet half of it
    aslant = beam_errors(0.5 * missed, mask, np.eye(3), (degrees + 30) % 360)
    assert aslant["path_error_95"] == pytest.approx(0.5 * 12 / np.cos(np.deg2rad(30)), rel=0.02)
    opposed = beam_errors(0.5 * missed, mask, np.eye(3), (degrees + 180) % 360)
    assert opposed == pytest.approx(facing, rel=0.01)


@pytest.mark.parametrize("degrees", [0.0, 33.0, 90.0, 254.5])
def test_a_beam_through_a_cylinder_meets_its_chords(degrees: float) -> None:
    right, front = in_plane((121, 121, 4), 0.8)
    inside = np.hypot(right, front) < 40
    found = beam_errors(np.where(inside, 0.1, 0).astype(np.float32), inside, np.diag([0.8, 0.8, 3.0]), degrees)
    assert found["path_error"] == pytest.approx(0.1 * np.pi * 40 / 2, rel=0.02)  # the mean chord of a circle
    assert found["path_error_95"] == pytest.approx(0.1 * 80 * np.sqrt(1 - 0.05**2), rel=0.01)


def test_a_beam_from_the_front_or_the_left_equals_the_axis_in_any_storage() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(9, 11, 5)).astype(np.float32)
    mask = np.ones(difference.shape, bool)
    mask[:2, 4:] = False
    spacing = (1.5, 1.5, 4.0)
    wanted = {0.0: path_errors(difference, mask, spacing, 1), 90.0: path_errors(difference, mask, spacing, 0)}
    for order, signs in (((0, 1, 2), (1, 1, 1)), ((0, 1, 2), (-1, -1, 1)), ((2, 0, 1), (1, -1, -1))):
        matrix = (np.diag(spacing) * signs)[:, list(order)]
        flip = tuple(slice(None, None, sign) for sign in signs)
        stored = [np.transpose(array[flip], order) for array in (difference, mask)]
        for degrees, one in wanted.items():
            assert beam_errors(stored[0], stored[1], matrix, degrees) == pytest.approx(one, abs=1e-4)
    assert np.isnan(beam_errors(difference, np.zeros(mask.shape, bool), np.diag(spacing), 30)["path_error"])


def test_gantry_angles_that_make_no_sense_are_refused() -> None:
    assert read_angles("0,72.5,359") == (0.0, 72.5, 359.0)
    for wrong in ("", "30;60", "30,30", "360", "-10", "nan", ",".join(map(str, range(MOST_ANGLES + 1)))):
        with pytest.raises(RecipeError, match="from 0 up to 360"):
            read_angles(wrong)


def test_tissues_part_the_target_by_its_hounsfield_units() -> None:
    target = np.array([-1000, -900, -600, -500, -300, -100, -20, 0, 149, 150, 2000], np.float32).reshape(-1, 1, 1)
    found = tissues(target, np.ones(target.shape, bool))
    assert {name: int(inside.sum()) for name, inside in found.items()} == {
        "air": 1, "low density": 2, "fat": 1, "soft tissue": 3, "bone": 2
    }  # fmt: skip


def slice_steps(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, axis: int) -> float:
    (found,) = compare_steps([prediction[mask]], target[mask], mask, {"mask": slice(None)}, SPACING)
    return found.ratios[axis]


def test_steps_between_slices_are_compared_with_the_real_ones() -> None:
    rng = np.random.default_rng(0)
    real, mask = rng.normal(size=SHAPE).astype(np.float32), np.ones(SHAPE, bool)
    assert slice_steps(real, real, mask, 2) == pytest.approx(1)
    assert slice_steps(0.25 * real, real, mask, 0) == pytest.approx(0.25)
    shifted = real + np.array([0, 100] * 3, np.float32)  # every other slice is brighter
    assert slice_steps(shifted, real, mask, 2) > 50 and slice_steps(shifted, real, mask, 1) == pytest.approx(1)
    ramp = np.broadcast_to(np.arange(6.0) * 2, SHAPE)
    assert slice_steps(np.broadcast_to(np.arange(6.0) * 3, SHAPE), ramp, mask, 2) == pytest.approx(1.5)
    assert np.isnan(slice_steps(real, ramp, mask, 0))


def test_a_ct_is_scored_by_tissue_and_along_each_axis() -> None:
    real, mask = slab(slice(3, 6), 975.0), np.ones(SHAPE, bool)
    made = slab(slice(3, 6), 780.0)
    grid = Geometry(SHAPE, np.diag([2.0, 1, 3, 1])[[2, 1, 0, 3]])  # the first axis runs to the head
    reference = Reference(real, mask, SPACING, is_ct=True, axes=axis_names(grid))
    rows = evaluate_case(ScoredImages(made, reference), ScoreTerms("a", (-1024.0, 3071.0), "HU"))
    found = {(row.region, row.metric): row.value for row in rows}
    units = {row.metric: row.unit for row in rows}
    assert found["bone", "mae"] == pytest.approx(195) and found["soft tissue", "mae"] == 0
    assert found["bone", "volume_ml"] == pytest.approx(3 * 8 * 6 * 6.0 / 1000)
    assert found["bone", "mae_density"] == pytest.approx(0.1, abs=1e-6)
    assert found["mask", "mae_density"] == pytest.approx(0.03, abs=1e-6)
    assert found["head-feet", "path_error"] == pytest.approx(3 * 2.0 * 0.1, abs=1e-5)
    assert found["left-right", "path_error_95"] == pytest.approx(6 * 3.0 * 0.1, abs=1e-5)
    assert found["head-feet", "slice_steps"] == pytest.approx(0.8)
    assert (units["path_error"], units["mae_density"], units["slice_steps"]) == ("mm", "1", "1")
    matrix = grid.affine[:3, :3]
    aimed = replace(reference, beams=Beams((0.0, 45.0), matrix))
    rows = evaluate_case(ScoredImages(made, aimed), ScoreTerms("a", (-1024.0, 3071.0), "HU"))
    beams = {(row.region, row.metric): row.value for row in rows if row.region.startswith("gantry")}
    difference = electron_density(made) - electron_density(real)
    for name, degrees in (("gantry 0", 0.0), ("gantry 45", 45.0)):
        wanted = beam_errors(difference, mask, matrix, degrees)
        assert {metric: beams[name, metric] for metric in wanted} == pytest.approx(wanted)
    other = evaluate_case(ScoredImages(made, replace(reference, is_ct=False)), ScoreTerms("a", (-1024.0, 3071.0), "SD"))
    assert {row.region for row in other if row.metric == "slice_steps"} == {"left-right", "front-back", "head-feet"}
    assert not [row for row in other if row.metric in ("path_error", "mae_density") or row.region == "bone"]
