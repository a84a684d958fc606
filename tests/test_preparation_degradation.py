"""Thick slices and the way back: positions in the world, scipy's kernels, cut-out brains, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d, map_coordinates
from scipy.spatial.transform import Rotation

from chiasm.errors import VolumeError
from chiasm.preparation.degradation import (
    Axis,
    Degradation,
    SliceProfile,
    arranged,
    cut_out,
    degrade,
    interpolated,
    profile_weights,
    simulated,
    thick_mask,
    thin_grid,
)
from chiasm.volumes import Geometry, Volume, canonical, same_grid
from chiasm.volumes.geometry import reordered

PROFILES: tuple[SliceProfile, ...] = ("gaussian", "box")
SIGMA_PER_FWHM = 0.42466090014  # 1 / (2 sqrt(2 ln 2))


def geometry(shape: tuple[int, int, int]) -> Geometry:
    """Oblique, unlike spacings; J runs backwards."""
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


def thick_of(fine: Volume, how: Degradation) -> Volume:
    return degrade([fine], how)[0]


def faces(grid: Geometry) -> np.ndarray:
    """World positions of the eight outer corners of the voxels, not of their centres."""
    ends = np.array(np.meshgrid(*((-0.5, side - 0.5) for side in grid.shape))).reshape(3, 8)
    return (grid.affine[:3, :3] @ ends).T + grid.affine[:3, 3]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("axis", ["I", "J", "K"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_ramp_in_the_world_stays_the_same_ramp_both_ways(profile: SliceProfile, axis: Axis, factor: int) -> None:
    shape = [9, 9, 9]
    shape["IJK".index(axis)] = 119  # no multiple of any
    how = Degradation(factor, axis, profile)
    fine = ramp(geometry((shape[0], shape[1], shape[2])))
    thick = thick_of(fine, how)
    inner = [slice(None)] * 3
    inner["IJK".index(axis)] = slice(8, -8)
    assert thick.array.shape == thick.geometry.shape and thick.array.shape["IJK".index(axis)] == -(-119 // factor)
    np.testing.assert_allclose(thick.array[tuple(inner)], ramp(thick.geometry).array[tuple(inner)], atol=2e-4)
    shown = interpolated([ramp(thick.geometry)], how, fine.geometry)[0]  # no border of the blur in it
    inner["IJK".index(axis)] = slice(40, -40)
    assert shown.geometry is fine.geometry
    np.testing.assert_allclose(shown.array[tuple(inner)], fine.array[tuple(inner)], atol=0.002)


@pytest.mark.parametrize("axis", ["I", "J", "K"])
@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_outer_faces_stay_where_they_are_both_ways(axis: Axis, factor: int) -> None:
    fine = noise((60, 60, 60))
    thick = thick_of(fine, Degradation(factor, axis)).geometry
    np.testing.assert_allclose(faces(thick), faces(fine.geometry), atol=1e-9)
    back = thin_grid(thick, Degradation(factor, axis))
    assert back.shape == fine.geometry.shape
    np.testing.assert_allclose(back.corners, fine.geometry.corners, atol=1e-9)


@pytest.mark.parametrize("axis", ["I", "J", "K"])
def test_slices_that_do_not_divide_are_covered_by_one_more_with_faces_on_faces(axis: Axis) -> None:
    fine = noise((13, 13, 13))
    thin = thin_grid(thick_of(fine, Degradation(4, axis)).geometry, Degradation(4, axis))
    into_fine = np.linalg.inv(fine.geometry.affine) @ thin.affine  # thin voxel -> world -> fine voxel
    np.testing.assert_allclose(into_fine[:3, :3], np.eye(3), atol=1e-9)
    # one slice more at the lower end of the world, two at the upper; J is stored backwards
    expected = np.zeros(3)
    expected["IJK".index(axis)] = -2 if axis == "J" else -1
    np.testing.assert_allclose(into_fine[:3, 3], expected, atol=1e-9)
    assert thin.shape["IJK".index(axis)] == 16


@pytest.mark.parametrize("axis", ["I", "J", "K"])
def test_the_order_of_storage_changes_nothing(axis: Axis) -> None:
    how = Degradation(4, axis, noise=0.0)
    fine = noise((13, 14, 15))
    turned = reordered(fine, (2, 0, 1), (True, False, True))
    plain, other = simulated([fine], how)[0], simulated([turned], how)[0]
    np.testing.assert_allclose(canonical(other).array, canonical(plain).array, atol=1e-6)
    assert other.geometry is turned.geometry


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("factor", [2, 3, 4, 7])
def test_constants_are_preserved_to_the_border(profile: SliceProfile, factor: int) -> None:
    grid = geometry((6, 7, 23))
    how = Degradation(factor, "K", profile)
    flat = Volume(np.full(grid.shape, 7, np.int16), grid)
    np.testing.assert_allclose(profile_weights(23, factor, 0, profile).sum(1), 1, rtol=1e-12)
    weights = profile_weights(23, factor, 0, profile)
    np.testing.assert_allclose(np.tensordot(flat.array, weights, (2, 1)), 7, rtol=1e-12)
    ramped = Volume(flat.array + np.arange(6)[:, None, None], grid)  # in plane nothing is mixed
    np.testing.assert_allclose(simulated([ramped], how)[0].array, ramped.array, rtol=1e-5)


@pytest.mark.parametrize("factor", [3, 5])
def test_a_gaussian_profile_equals_scipys_filter(factor: int) -> None:
    fine = noise((5, 30, 6))
    blurred = gaussian_filter1d(fine.array, factor * SIGMA_PER_FWHM, axis=1, mode="nearest")
    # the middle slice of each thick one
    np.testing.assert_allclose(
        thick_of(fine, Degradation(factor, "J")).array, blurred[:, factor // 2 :: factor], atol=5e-4
    )


def test_an_even_profile_is_centred_between_two_slices_worked_by_hand() -> None:
    # FWHM 2: at half a slice from the centre exp(-4 ln 2 (0.5 / 2)^2) = 0.8409, at 1.5 0.2102, at 2.5 0.01314
    near, far, farther = 0.8409, 0.2102, 0.01314
    row = profile_weights(12, 2, 0, "gaussian")[3]
    expected = np.array([farther, far, near, near, far, farther]) / (2 * (near + far + farther))
    np.testing.assert_allclose(row[4:10], expected, atol=2e-4)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_box_is_the_mean_of_its_slices(factor: int) -> None:
    fine = noise((12, 4, 4))
    thick = thick_of(fine, Degradation(factor, "I", "box"))
    np.testing.assert_allclose(thick.array, fine.array.reshape(12 // factor, factor, 4, 4).mean(1), atol=1e-6)


@pytest.mark.parametrize("factor", [3, 4])
def test_interpolation_goes_through_the_slices_and_equals_scipys_cubic_spline(factor: int) -> None:
    how = Degradation(factor, "K")
    coarse = noise((5, 6, 9))
    shown = interpolated([coarse], how)[0]
    assert shown.array.shape == (5, 6, 9 * factor) and shown.array.dtype == np.float32
    where = np.indices(shown.array.shape).astype(float)
    where[2] = (where[2] - (factor - 1) / 2) / factor
    np.testing.assert_allclose(shown.array, map_coordinates(coarse.array, where, order=3, mode="nearest"), atol=1e-5)
    if factor % 2:
        np.testing.assert_allclose(shown.array[:, :, factor // 2 :: factor], coarse.array, atol=1e-5)


def test_a_wave_is_weakened_as_its_profile_says() -> None:
    grid = Geometry((4, 4, 96), np.eye(4))
    wave = Volume(np.sin(places(grid)[..., 2] * 2 * np.pi / 24).astype(np.float32), grid)
    back = simulated([wave], Degradation(4))[0].array[..., 12:-12]
    # a Gaussian of sigma 4 * 0.4247 weakens a period of 24 to exp(-2 (pi sigma / 24)^2) = 0.906
    np.testing.assert_allclose(back, 0.9058 * wave.array[..., 12:-12], atol=0.01)


def brain() -> Volume:
    """A brain of 100 to 101, cut out on exact zeros."""
    i, j, k = np.mgrid[-12:12, -12:12, -16:16]
    array = np.where(i**2 + j**2 + (k * 0.8) ** 2 < 100, 100 + 0.01 * np.abs(i) + 0.02 * np.abs(j), 0)
    return Volume(array.astype(np.float32), Geometry((24, 24, 32), np.eye(4)))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_brain_that_was_cut_out_is_not_darkened_at_its_rim_and_its_background_stays_exact(
    profile: SliceProfile,
) -> None:
    fine = brain()
    inside = cut_out(fine)
    assert inside is not None
    how = Degradation(4, "K", profile)
    thick, shown = thick_of(fine, how), simulated([fine], how)[0]
    for volume in (thick, shown):
        kept = cut_out(volume)
        assert kept is not None and set(np.unique(volume.array[~kept])) == {0.0}
        assert volume.array[kept].min() > 99.9 and volume.array[kept].max() < 101
    share = fine.array.reshape(24, 24, 8, 4).astype(bool).mean(-1)
    if profile == "box":
        np.testing.assert_array_equal(thick.array > 0, share >= 0.5)
    np.testing.assert_array_equal(shown.array > 0, np.repeat(thick.array > 0, 4, axis=2))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("axis", ["I", "J", "K"])
def test_a_mask_gets_the_steps_that_cutting_out_thick_slices_leaves(profile: SliceProfile, axis: Axis) -> None:
    fine, how = brain(), Degradation(5, axis, profile)  # 24 and 32 slices are no multiples of 5
    mask = Volume((fine.array > 0).astype(np.uint8), fine.geometry)
    np.testing.assert_array_equal(thick_mask(mask, how).array, simulated([fine], how)[0].array > 0)
    assert thick_mask(mask, how).geometry is fine.geometry


def test_two_sources_share_what_was_cut_out() -> None:
    fine = brain()
    second = Volume(np.where(fine.array > 0, 7, -1).astype(np.float32), fine.geometry)
    shown = simulated([fine, second], Degradation(4))
    np.testing.assert_array_equal(shown[1].array == -1, shown[0].array == 0)
    np.testing.assert_allclose(shown[1].array[shown[0].array > 0], 7, rtol=1e-5)


def test_noise_has_its_share_of_the_range_is_the_same_again_and_spares_the_background() -> None:
    fine = noise((40, 40, 40))
    plain, once, again = (thick_of(fine, Degradation(4, noise=share)).array for share in (0.0, 0.05, 0.05))
    np.testing.assert_array_equal(once, again)
    assert (once - plain).std() == pytest.approx(0.05 * np.ptp(np.percentile(plain, (0.5, 99.5))), rel=0.03)
    other = thick_of(Volume(fine.array + 1, fine.geometry), Degradation(4, noise=0.05)).array
    assert np.corrcoef((other - plain - 1).ravel(), (once - plain).ravel())[0, 1] < 0.1
    cut = thick_of(brain(), Degradation(4, noise=0.05)).array
    np.testing.assert_array_equal(cut == 0, thick_of(brain(), Degradation(4)).array == 0)


@pytest.mark.parametrize(("axis", "across"), [("I", 0), ("J", 1), ("K", 1)])
def test_the_first_two_axes_show_thick_slices_edge_on(axis: Axis, across: int) -> None:
    fine = noise((13, 14, 15))
    stored = arranged(fine, Degradation(4, axis))
    assert stored.array.shape[across] == fine.array.shape["IJK".index(axis)]
    assert same_grid(canonical(stored).geometry, canonical(fine).geometry)
    np.testing.assert_array_equal(canonical(stored).array, canonical(fine).array)
    np.testing.assert_array_equal(arranged(fine, None).array, canonical(fine).array)


@pytest.mark.parametrize("factor", [1, 0, -2, 2.5])
def test_a_factor_that_does_not_thicken_or_is_not_whole_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match="from 2 to 32"):
        Degradation(factor)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"axis": "X"}, "I, J or K"), ({"profile": "sinc"}, "gaussian, box"), ({"noise": -1.0}, "0 or more")],
)
def test_other_slices_than_those_known_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Degradation(4, **wrong)  # type: ignore[arg-type]


def test_too_few_slices_are_refused_with_how_many_are_needed() -> None:
    with pytest.raises(VolumeError, match=r"along K for a factor of 4 \(found 8, expected at least 9\)"):
        thick_of(noise((8, 8, 8)), Degradation(4))
    assert thick_of(noise((8, 8, 9)), Degradation(4)).array.shape == (8, 8, 3)
