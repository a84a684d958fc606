"""Attenuation at 511 keV against numbers worked by hand; the PET grid against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from chiasm.cohorts.attenuation import BONE, attenuation, to_pet_grid
from chiasm.errors import RecipeError
from chiasm.volumes import Geometry, Volume, grid_with_spacing

HU = np.arange(-1100, 3100, 0.25)

#: HU + 1000 where the published curves bend, in a table of their own: none of ours.
BREAK_POINTS = {80: 1050, 100: 1052, 110: 1043, 120: 1047, 130: 1037, 140: 1030}


def volume(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -30, 20, 7
    return Volume(array.astype(np.float32), Geometry(array.shape, affine))


def ball() -> Volume:
    """Water with a bony shell, well inside air; 1 x 1 x 2 mm."""
    i, j, k = np.mgrid[-30:30, -32:32, -28:28:2]
    radius = np.sqrt(i**2 + j**2 + k**2)
    return volume(np.where(radius < 14, 0.096, np.where(radius < 18, 0.16, 0.0)), (1, 1, 2))


@pytest.mark.parametrize("kvp", sorted(BREAK_POINTS))
def test_the_curve_never_falls_and_has_no_step(kvp: int) -> None:
    mu = attenuation(HU, kvp)
    steps = np.diff(mu.astype(np.float64))
    assert mu.dtype == np.float32 and mu.min() == 0
    assert steps.min() >= 0
    assert steps.max() < 0.25 * 9.6e-5 + 2e-8  # no more than the steeper line, and float32's rounding


@pytest.mark.parametrize("kvp", sorted(BREAK_POINTS))
def test_air_is_0_water_is_0_096_and_padding_is_air(kvp: int) -> None:
    np.testing.assert_allclose(attenuation([-3000, -1024, -1000, 0, -500], kvp), [0, 0, 0, 0.096, 0.048], atol=1e-8)


@pytest.mark.parametrize(("kvp", "bend"), sorted(BREAK_POINTS.items()))
def test_the_lines_cross_at_the_published_break_point(kvp: int, bend: int) -> None:
    line = BONE[kvp]
    assert round(line.intercept / (9.6e-5 - line.slope)) == bend
    below, above = np.array([bend - 2.0, bend + 2.0]) - 1000
    assert attenuation(below, kvp) == pytest.approx(9.6e-5 * (bend - 2), rel=1e-6)
    assert attenuation(above, kvp) == pytest.approx(line.slope * (bend + 2) + line.intercept, rel=1e-6)


def test_bone_of_1000_hu_is_worked_by_hand() -> None:
    # a * 2000 + b
    by_hand = {80: 0.1354, 100: 0.1430, 110: 0.1472, 120: 0.1491, 130: 0.1526, 140: 0.1536}
    assert {kvp: round(float(attenuation(1000, kvp)), 4) for kvp in by_hand} == by_hand
    assert set(by_hand) == set(BONE)


def test_an_unknown_voltage_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(RecipeError, match=r"tube voltage 90.*80, 100, 110, 120, 130, 140"):
        attenuation(0, 90)


def test_blurring_equals_scipys_where_the_grid_stays() -> None:
    rng = np.random.default_rng(0)
    noise = volume(rng.normal(size=(12, 13, 14)), (2, 2, 2))
    blurred = to_pet_grid(noise, spacing_mm=2.0, fwhm_mm=4.71)
    # FWHM 4.71 mm is a sigma of 2.0002 mm: one voxel
    expected = gaussian_filter(noise.array, 4.71 / 2.354820045 / 2, mode="nearest")
    np.testing.assert_allclose(blurred.array, expected, atol=1e-6)
    np.testing.assert_array_equal(to_pet_grid(noise, spacing_mm=2.0, fwhm_mm=0.0).array, noise.array)


def test_width_is_in_millimetres_whatever_the_spacing() -> None:
    point = np.zeros((41, 41, 21))
    point[20, 20, 10] = 1
    # fine along I, coarse along K: the blur must be equally wide in mm
    blurred = to_pet_grid(volume(point, (1, 1, 2)), spacing_mm=1.0, fwhm_mm=8.0).array.astype(np.float64)
    place = np.indices(blurred.shape) - 20.5 * np.ones((3, 1, 1, 1))
    spread = [
        np.average((p - np.average(p, weights=blurred)) ** 2, weights=np.maximum(blurred, 0)) ** 0.5 for p in place
    ]
    assert spread[0] == pytest.approx(8 / 2.3548, rel=0.02)
    assert spread[2] == pytest.approx(8 / 2.3548, rel=0.05)  # sampled at 2 mm, interpolated


def test_constants_and_means_are_preserved() -> None:
    flat = to_pet_grid(volume(np.full((31, 33, 17), 0.096), (1, 1, 3)), fwhm_mm=6)
    np.testing.assert_allclose(flat.array, 0.096, rtol=1e-6)
    assert flat.geometry.spacing_mm == pytest.approx((4, 4, 4))
    fine = ball()
    pet = to_pet_grid(fine)
    assert pet.array.sum() * 4**3 == pytest.approx(fine.array.sum() * 2, rel=2e-3)
    assert pet.array.max() < 0.16  # the thin shell is blurred


def test_the_grid_covers_the_same_box() -> None:
    fine = ball()
    pet = to_pet_grid(fine, spacing_mm=4.0)
    assert pet.array.shape == pet.geometry.shape == (15, 16, 14)
    np.testing.assert_allclose(pet.geometry.affine, grid_with_spacing(fine.geometry, (4, 4, 4)).affine)
    weights = pet.array.astype(np.float64)
    places = np.stack(np.indices(weights.shape), -1) @ pet.geometry.affine[:3, :3].T + pet.geometry.affine[:3, 3]
    middle = (places * weights[..., None]).sum((0, 1, 2)) / weights.sum()
    np.testing.assert_allclose(middle, [0, 52, 35], atol=0.02)  # the ball's centre: voxel (30, 32, 14)


@pytest.mark.parametrize(("spacing_mm", "fwhm_mm"), [(0.0, 4.0), (-1.0, 4.0), (4.0, -1.0), (4.0, float("nan"))])
def test_impossible_widths_are_refused(spacing_mm: float, fwhm_mm: float) -> None:
    with pytest.raises(ValueError, match=r"spacing must be positive|0 or more"):
        to_pet_grid(ball(), spacing_mm, fwhm_mm)
