"""What a physicist asks of a synthetic CT, on phantoms worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chiasm.evaluation.reference import Reference
from chiasm.evaluation.scoring import ScoredImages, ScoreTerms, evaluate_case
from chiasm.metrics.edges import list_neighbours, step_ratio
from chiasm.metrics.radiotherapy import THOMAS, electron_density, path_errors, tissues
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


def test_tissues_part_the_target_by_its_hounsfield_units() -> None:
    target = np.array([-1000, -900, -600, -500, -300, -100, -20, 0, 149, 150, 2000], np.float32).reshape(-1, 1, 1)
    found = tissues(target, np.ones(target.shape, bool))
    assert {name: int(inside.sum()) for name, inside in found.items()} == {
        "air": 1, "low density": 2, "fat": 1, "soft tissue": 3, "bone": 2
    }  # fmt: skip


def slice_steps(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, axis: int) -> float:
    along = list_neighbours(mask, {"mask": mask})[axis]
    return step_ratio(prediction[mask], along.steps(target[mask]), along)


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
    other = evaluate_case(ScoredImages(made, replace(reference, is_ct=False)), ScoreTerms("a", (-1024.0, 3071.0), "SD"))
    assert {row.region for row in other if row.metric == "slice_steps"} == {"left-right", "front-back", "head-feet"}
    assert not [row for row in other if row.metric in ("path_error", "mae_density") or row.region == "bone"]
