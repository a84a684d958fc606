"""Attenuation at 511 keV against numbers worked by hand; the PET grid against scipy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from chiasm.attenuation import BONE, attenuation, mumap, to_pet_grid
from chiasm.cli import main
from chiasm.errors import RecipeError, RunError, VolumeError
from chiasm.hounsfield import check_hu
from chiasm.volumes import Geometry, Volume, grid_with_spacing, read_volume, write_volume

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
    blurred = to_pet_grid(noise, noise.geometry, 4.71)
    # FWHM 4.71 mm is a sigma of 2.0002 mm: one voxel
    expected = gaussian_filter(noise.array, 4.71 / 2.354820045 / 2, mode="nearest")
    np.testing.assert_allclose(blurred.array, expected, atol=1e-6)
    np.testing.assert_array_equal(to_pet_grid(noise, noise.geometry, 0.0).array, noise.array)


def test_width_is_in_millimetres_whatever_the_spacing() -> None:
    point = np.zeros((41, 41, 21))
    point[20, 20, 10] = 1
    # fine along I, coarse along K: the blur must be equally wide in mm
    fine = volume(point, (1, 1, 2))
    blurred = to_pet_grid(fine, grid_with_spacing(fine.geometry, (1, 1, 1)), 8.0).array.astype(np.float64)
    place = np.indices(blurred.shape) - 20.5 * np.ones((3, 1, 1, 1))
    spread = [
        np.average((p - np.average(p, weights=blurred)) ** 2, weights=np.maximum(blurred, 0)) ** 0.5 for p in place
    ]
    assert spread[0] == pytest.approx(8 / 2.3548, rel=0.02)
    assert spread[2] == pytest.approx(8 / 2.3548, rel=0.05)  # sampled at 2 mm, interpolated


def test_constants_and_means_are_preserved() -> None:
    water = volume(np.full((31, 33, 17), 0.096), (1, 1, 3))
    flat = to_pet_grid(water, grid_with_spacing(water.geometry, (4, 4, 4)), 6)
    np.testing.assert_allclose(flat.array, 0.096, rtol=1e-6)
    assert flat.geometry.spacing_mm == pytest.approx((4, 4, 4))
    fine = ball()
    pet = to_pet_grid(fine, grid_with_spacing(fine.geometry, (4, 4, 4)))
    assert pet.array.sum() * 4**3 == pytest.approx(fine.array.sum() * 2, rel=2e-3)
    assert pet.array.max() < 0.16  # the thin shell is blurred


def test_the_grid_covers_the_same_box(tmp_path: Path) -> None:
    write_volume(tmp_path / "ct.nii.gz", head(), GRID)
    pet = mumap(tmp_path / "ct.nii.gz", spacing_mm=4.0).volume
    assert pet.array.shape == pet.geometry.shape == (15, 16, 14)
    np.testing.assert_allclose(pet.geometry.affine, grid_with_spacing(GRID, (4, 4, 4)).affine)
    weights = pet.array.astype(np.float64)
    places = np.stack(np.indices(weights.shape), -1) @ pet.geometry.affine[:3, :3].T + pet.geometry.affine[:3, 3]
    middle = (places * weights[..., None]).sum((0, 1, 2)) / weights.sum()
    np.testing.assert_allclose(middle, [0, 52, 35], atol=0.02)  # the ball's centre: voxel (30, 32, 14)


GRID = ball().geometry


def head() -> np.ndarray:
    """The ball in Hounsfield units: water, a band of its shell as bone of 1000 HU, air."""
    mu = ball().array
    bone = (mu > 0.1) & (np.abs(np.indices(mu.shape)[1] - 32) < 9)
    return np.where(bone, 1000, np.where(mu > 0, 0, -1000)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha"])
def test_a_file_becomes_a_file_on_its_own_grid_worked_by_hand(tmp_path: Path, suffix: str) -> None:
    ct, out = tmp_path / f"ct{suffix}", tmp_path / f"mu{suffix}"
    write_volume(ct, head(), GRID)
    made = mumap(ct, out, fwhm_mm=0)
    back = read_volume(out)
    # air; water; bone at 120 kVp: 2000 * 5.1e-5 + 4.71e-2
    np.testing.assert_allclose(np.unique(back.array), [0, 0.096, 0.1491], atol=1e-6)
    np.testing.assert_array_equal(back.array, made.volume.array)
    np.testing.assert_array_equal(back.geometry.affine, read_volume(ct).geometry.affine)
    assert nib.load(out).get_data_dtype() == np.float32 if suffix != ".mha" else True
    assert made.warnings == ()


@pytest.mark.parametrize("spelled", ["ct.nii.gz", "soft.nii.gz", "hard.nii.gz", "here/../ct.nii.gz", "pet.nii.gz"])
def test_a_map_replaces_no_file_that_it_is_made_of(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "here").mkdir()
    for name in ("ct.nii.gz", "pet.nii.gz"):
        write_volume(tmp_path / name, head(), GRID)
    (tmp_path / "soft.nii.gz").symlink_to(tmp_path / "ct.nii.gz")
    (tmp_path / "hard.nii.gz").hardlink_to(tmp_path / "ct.nii.gz")
    before = [(tmp_path / name).read_bytes() for name in ("ct.nii.gz", "pet.nii.gz")]
    with pytest.raises(RunError, match="belongs to the data, and the map would replace it"):
        mumap(tmp_path / "ct.nii.gz", tmp_path / spelled, like=tmp_path / "pet.nii.gz")
    assert [(tmp_path / name).read_bytes() for name in ("ct.nii.gz", "pet.nii.gz")] == before


def test_a_pet_volume_gives_its_grid_and_what_ct_does_not_reach_is_air_and_told(tmp_path: Path) -> None:
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])  # the patient's left first, as PET is often stored; wider than the CT
    affine[:3, 3] = 60, 0, 0
    pet = Geometry((31, 24, 18), affine)
    write_volume(tmp_path / "ct.nii.gz", head(), GRID)
    write_volume(tmp_path / "pet.nii.gz", np.zeros(pet.shape, np.float32), pet)  # an empty scan has a grid too
    made = mumap(tmp_path / "ct.nii.gz", tmp_path / "mu.nii.gz", like=tmp_path / "pet.nii.gz")
    back = read_volume(tmp_path / "mu.nii.gz")
    np.testing.assert_array_equal(back.geometry.affine, pet.affine)
    assert back.array.shape == pet.shape and back.array[0].max() == 0
    # the CT's box is 60 x 64 x 56 mm of the grid's 124 x 96 x 72
    assert made.beyond == pytest.approx(1 - 60 * 64 * 56 / (124 * 96 * 72), abs=0.03)
    assert len(made.warnings) == 1 and "beyond the CT" in made.warnings[0]

    image = sitk.ReadImage(tmp_path / "ct.nii.gz", sitk.sitkFloat64)
    air = sitk.Maximum(image + 1000, 0.0)
    mu = sitk.Minimum(9.6e-5 * air, 5.10e-5 * air + 4.71e-2)
    smooth = sitk.SmoothingRecursiveGaussian(mu, 5 / 2.354820045)
    reference = sitk.Resample(smooth, sitk.ReadImage(tmp_path / "pet.nii.gz"), sitk.Transform(), sitk.sitkLinear, 0.0)
    np.testing.assert_allclose(back.array, sitk.GetArrayFromImage(reference).T, atol=1.5e-3)


def test_padding_and_metal_are_counted_and_a_grid_too_coarse_is_told(tmp_path: Path) -> None:
    array = head()
    array[0, 0, :5], array[30, 32, 14] = -3024, 8000
    write_volume(tmp_path / "ct.nii.gz", array, GRID)
    made = mumap(tmp_path / "ct.nii.gz", spacing_mm=4.0, fwhm_mm=0)
    assert (made.below, made.above) == (5, 1) and made.volume.array.min() == 0
    told = ("5 of 107520 voxels lie below -1024", "1 of 107520 voxels lie above 3071", "finer than the grid of 4 mm")
    assert [words in sentence for words, sentence in zip(told, made.warnings, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda hu: hu / 1000,  # normalised by hand
        lambda hu: (hu - hu.mean()) / hu.std(),
        lambda hu: (hu + 1000) / 2000,
        lambda hu: hu + 1024,  # the offset left in
        lambda hu: np.where(hu <= -1000, -3024, hu + 1024),  # likewise, padded as one maker does
        lambda hu: np.clip(hu, -150, 250),  # a window
        lambda hu: np.where(hu <= -1000, 0, hu),  # cut out on zeros, which would be water
    ],
)
def test_what_is_not_in_hounsfield_units_is_refused_by_file(tmp_path: Path, spoilt: Callable) -> None:  # type: ignore[type-arg]
    check_hu(head())
    check_hu(head() + np.random.default_rng(0).normal(0, 60, head().shape))  # noise is no offence
    write_volume(tmp_path / "ct.nii.gz", spoilt(head()), GRID)
    with pytest.raises(VolumeError, match=r"ct\.nii\.gz: is not in Hounsfield units"):
        mumap(tmp_path / "ct.nii.gz", tmp_path / "mu.nii.gz")
    assert not (tmp_path / "mu.nii.gz").exists()


def test_a_pet_volume_elsewhere_is_refused(tmp_path: Path) -> None:
    affine = GRID.affine.copy()
    affine[:3, 3] += 500
    write_volume(tmp_path / "ct.nii.gz", head(), GRID)
    write_volume(tmp_path / "pet.nii.gz", head(), Geometry(GRID.shape, affine))
    with pytest.raises(VolumeError, match="does not overlap"):
        mumap(tmp_path / "ct.nii.gz", like=tmp_path / "pet.nii.gz")


@pytest.mark.parametrize(
    "asked",
    [
        {"spacing_mm": 0.0},
        {"spacing_mm": -1.0},
        {"fwhm_mm": -1.0},
        {"fwhm_mm": float("nan")},
        {"kvp": 90},
        {"spacing_mm": 4.0, "like": "pet.nii.gz"},
    ],
)
def test_impossible_wishes_are_refused(tmp_path: Path, asked: dict) -> None:  # type: ignore[type-arg]
    write_volume(tmp_path / "ct.nii.gz", head(), GRID)
    with pytest.raises(RecipeError, match=r"size in mm is impossible|tube voltage|both a PET"):
        mumap(tmp_path / "ct.nii.gz", **asked)


def test_the_command_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ct, out = tmp_path / "ct.nii.gz", tmp_path / "mu.nii.gz"
    write_volume(ct, head(), GRID)
    with pytest.raises(SystemExit) as done:
        main(["mumap", str(ct), "-o", str(out), "--kvp", "80", "--spacing", "4", "--fwhm", "6"])
    assert done.value.code == 0 and "80 kVp" in capsys.readouterr().out
    np.testing.assert_array_equal(read_volume(out).array, mumap(ct, kvp=80, spacing_mm=4, fwhm_mm=6).volume.array)
