"""Thick slices and the way back: positions in the world, scipy's kernels, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d, map_coordinates
from scipy.spatial.transform import Rotation

from chiasm.cohorts.degradation import SliceProfile, bicubic, degrade
from chiasm.errors import VolumeError
from chiasm.volumes import Geometry, Volume

PROFILES: tuple[SliceProfile, ...] = ("gaussian", "box")
SIGMA_PER_FWHM = 0.42466090014  # 1 / (2 sqrt(2 ln 2))


def geometry(shape: tuple[int, int, int]) -> Geometry:
    """Oblique, unlike spacings, a mirrored axis."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix() * [0.8, -1.1, 1.3]
    affine[:3, 3] = 12, -34, 56
    return Geometry(shape, affine)


def places(grid: Geometry) -> np.ndarray:
    return np.stack(np.indices(grid.shape), -1) @ grid.affine[:3, :3].T + grid.affine[:3, 3]


def ramp(grid: Geometry) -> Volume:
    """Rises by (0.3, -0.2, 0.5) a millimetre of the world."""
    return Volume((places(grid) @ [0.3, -0.2, 0.5]).astype(np.float32), grid)


def noise(shape: tuple[int, int, int]) -> Volume:
    return Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), geometry(shape))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.25, 2, 2.5, 3, 4])
def test_a_ramp_in_the_world_stays_the_same_ramp(profile: SliceProfile, axis: int, factor: float) -> None:
    shape = [9, 9, 9]
    shape[axis] = 120
    fine = ramp(geometry((shape[0], shape[1], shape[2])))
    thick = degrade(fine, axis, factor, slice_profile=profile)
    assert thick.array.shape == thick.geometry.shape and thick.array.shape[axis] == int(120 / factor)
    assert thick.geometry.spacing_mm[axis] == pytest.approx(fine.geometry.spacing_mm[axis] * factor)
    inner = [slice(None)] * 3
    inner[axis] = slice(8, -8)
    np.testing.assert_allclose(thick.array[tuple(inner)], ramp(thick.geometry).array[tuple(inner)], atol=2e-4)

    back = bicubic(ramp(thick.geometry), fine.geometry)  # no border of the blur in it
    assert back.geometry is fine.geometry and back.array.shape == fine.array.shape
    inner = [slice(4, -4)] * 3
    inner[axis] = slice(45, -45)
    np.testing.assert_allclose(back.array[tuple(inner)], fine.array[tuple(inner)], atol=0.02)


def test_far_from_the_border_a_spline_repeats_a_ramp_to_rounding() -> None:
    coarse = ramp(Geometry((41, 41, 41), np.diag([2.0, 3.0, 4.0, 1.0])))
    fine = Geometry((11, 11, 11), np.diag([0.7, 0.9, 1.1, 1.0]))
    fine.affine[:3, 3] = 36, 55, 75  # around the middle
    np.testing.assert_allclose(bicubic(coarse, fine).array, ramp(fine).array, atol=1e-4)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("factor", [1.5, 2, 3, 4.75])
def test_constants_are_preserved_to_the_border_both_ways(profile: SliceProfile, factor: float) -> None:
    grid = geometry((6, 7, 23))
    thick = degrade(Volume(np.full(grid.shape, 7, np.int16), grid), 2, factor, slice_profile=profile)
    np.testing.assert_allclose(thick.array, 7, rtol=1e-6)
    np.testing.assert_allclose(bicubic(thick, grid).array, 7, rtol=1e-6)


@pytest.mark.parametrize(("factor", "first"), [(3, 1), (2, 0), (4, 1), (5, 4)])
def test_a_gaussian_profile_equals_scipys_filter(factor: int, first: int) -> None:
    fine = noise((5, 24, 6))
    count = 24 // factor
    thick = degrade(fine, 1, factor)
    blurred = gaussian_filter1d(fine.array, factor * SIGMA_PER_FWHM, axis=1, mode="nearest")
    np.testing.assert_allclose(thick.array, blurred[:, first::factor][:, :count], atol=1e-6)
    np.testing.assert_allclose(places(thick.geometry), places(fine.geometry)[:, first::factor][:, :count], atol=1e-9)


def test_a_box_of_three_is_the_mean_of_three_slices() -> None:
    fine = noise((12, 4, 4))
    thick = degrade(fine, 0, 3, slice_profile="box")
    np.testing.assert_allclose(thick.array, fine.array.reshape(4, 3, 4, 4).mean(1), atol=1e-6)
    # even: half of each neighbour's; 2.5 wide: three quarters of each, by 2.5
    even, broken = (degrade(fine, 0, factor, slice_profile="box").array for factor in (2, 2.5))
    np.testing.assert_allclose(even[3], _mix(fine, 6, 0.25, 0.5), atol=1e-6)
    np.testing.assert_allclose(broken[0], _mix(fine, 1, 0.3, 0.4), atol=1e-6)


def _mix(fine: Volume, middle: int, side: float, centre: float) -> np.ndarray:
    before, after = fine.array[middle - 1], fine.array[middle + 1]
    return centre * fine.array[middle] + side * (before + after)


def test_bicubic_goes_through_its_samples_and_equals_scipys_spline_between_them() -> None:
    coarse = noise((8, 9, 10))
    np.testing.assert_allclose(bicubic(coarse, coarse.geometry).array, coarse.array, atol=1e-5)
    half = coarse.geometry.affine.copy()
    half[:3, 3] += half[:3, :3] @ [2.5, 3.25, 4.0]
    got = bicubic(coarse, Geometry((3, 3, 3), half)).array
    where = np.indices((3, 3, 3)) + np.array([2.5, 3.25, 4.0])[:, None, None, None]
    np.testing.assert_allclose(got, map_coordinates(coarse.array, where, order=3, mode="nearest"), atol=1e-5)
    assert bicubic(coarse, coarse.geometry).array.dtype == np.float32


def test_the_baseline_brings_back_most_of_a_smooth_volume() -> None:
    grid = Geometry((4, 4, 96), np.eye(4))
    wave = Volume(np.sin(places(grid)[..., 2] * 2 * np.pi / 24).astype(np.float32), grid)
    back = bicubic(degrade(wave, 2, 4), grid).array[..., 12:-12]
    # a Gaussian of sigma 4 * 0.4247 weakens a period of 24 to exp(-2 (pi sigma / 24)^2) = 0.906
    np.testing.assert_allclose(back, 0.9058 * wave.array[..., 12:-12], atol=0.01)


@pytest.mark.parametrize("factor", [1, 0.5, 0, -2, float("nan"), float("inf")])
def test_a_factor_that_does_not_thicken_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="above 1"):
        degrade(noise((8, 8, 8)), 2, factor)


@pytest.mark.parametrize("axis", [-1, 3])
def test_an_axis_that_is_not_there_is_refused(axis: int) -> None:
    with pytest.raises(ValueError, match="axis is 0, 1 or 2"):
        degrade(noise((8, 8, 8)), axis, 2)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="gaussian, box"):
        degrade(noise((8, 8, 8)), 2, 2, slice_profile="sinc")  # type: ignore[arg-type]


def test_too_few_slices_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(VolumeError, match=r"along axis K for a factor of 4.5 \(found 8, expected at least 9\)"):
        degrade(noise((8, 8, 8)), 2, 4.5)
    assert degrade(noise((8, 8, 9)), 2, 4.5).array.shape == (8, 8, 2)
