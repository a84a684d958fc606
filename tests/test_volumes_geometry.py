"""Grids and moving between them, against nibabel, scipy and numbers by hand."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from chiasm.volumes import Geometry, Volume, canonical, crop, grid_with_spacing, resample, same_grid, write_volume
from chiasm.volumes.geometry import find_overlap, laid_on, reordered, voxels_apart


def volume(seed: int = 0, shape: tuple[int, int, int] = (9, 8, 7)) -> Volume:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() * [1.0, 1.5, 2.5]
    affine[:3, 3] = rng.normal(size=3) * 30
    return Volume(rng.normal(size=shape).astype(np.float32), Geometry(shape, affine))


@pytest.mark.parametrize("seed", range(12))
def test_canonical_order_equals_nibabels(seed: int) -> None:
    mine = canonical(volume(seed))
    theirs = nib.as_closest_canonical(nib.Nifti1Image(volume(seed).array, volume(seed).geometry.affine))
    np.testing.assert_array_equal(mine.array, np.asarray(theirs.dataobj))
    np.testing.assert_allclose(mine.geometry.affine, theirs.affine)
    assert canonical(mine) is mine


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_resampling_equals_simpleitks_inside(seed: int, order: int) -> None:
    source = volume(seed, (20, 18, 16))
    affine = source.geometry.affine.copy()
    affine[:3, :3] = affine[:3, :3] @ Rotation.from_euler("xyz", [3, -4, 5], degrees=True).as_matrix()
    grid = Geometry((17, 15, 14), affine)
    mine = resample(source, grid, order=order, fill=-9.0)  # type: ignore[arg-type]
    itk = sitk.GetImageFromArray(source.array.T)
    like = sitk.GetImageFromArray(np.zeros(grid.shape, np.float32).T)
    for image, geometry in ((itk, source.geometry), (like, grid)):
        lps = np.diag([-1, -1, 1, 1]) @ geometry.affine
        image.SetSpacing(geometry.spacing_mm)
        image.SetDirection((lps[:3, :3] / geometry.spacing_mm).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
    how = sitk.sitkNearestNeighbor if order == 0 else sitk.sitkLinear
    theirs = sitk.GetArrayFromImage(sitk.Resample(itk, like, sitk.Transform(), how, -9.0)).T
    agree = np.isclose(mine.array, theirs, atol=1e-4)
    assert agree.mean() > 0.995  # a voxel on the very border, or half-way, may be decided otherwise


def test_resampling_to_the_same_grid_changes_nothing_and_labels_stay_labels() -> None:
    source = volume()
    np.testing.assert_array_equal(resample(source, source.geometry).array, source.array)
    labels = Volume(np.arange(9 * 8 * 7, dtype=np.int16).reshape(9, 8, 7) % 5, source.geometry)
    finer = resample(labels, grid_with_spacing(source.geometry, (0.7, 0.7, 0.7)), order=0)
    assert finer.array.dtype == np.int16 and set(np.unique(finer.array)) <= set(range(5))
    with pytest.raises(ValueError, match="order"):
        resample(source, source.geometry, order=3)  # type: ignore[arg-type]


def test_a_linear_ramp_survives_a_change_of_spacing_exactly() -> None:
    grid = Geometry((12, 10, 8), np.diag([1.0, 2.0, 3.0, 1.0]))
    x, y, z = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    ramp = Volume((1.0 * x + 2 * 2.0 * y - 3.0 * z).astype(np.float32), grid)
    finer = grid_with_spacing(grid, (0.5, 1.0, 1.5))
    moved = resample(ramp, finer).array
    i, j, k = np.meshgrid(*(np.arange(n) for n in finer.shape), indexing="ij")
    world = np.stack([i, j, k], -1) @ finer.affine[:3, :3].T + finer.affine[:3, 3]
    expected = world[..., 0] + 2 * world[..., 1] - world[..., 2]
    np.testing.assert_allclose(moved[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-4)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.5, 0.9, 4.0)])
def test_another_spacing_covers_the_same_box(spacing: tuple[float, float, float]) -> None:
    grid = volume(3).geometry
    other = grid_with_spacing(grid, spacing)
    np.testing.assert_allclose(other.spacing_mm, spacing)
    centre = [g.affine[:3, :3] @ ((np.array(g.shape) - 1) / 2) + g.affine[:3, 3] for g in (grid, other)]
    np.testing.assert_allclose(*centre)
    for a, b, step in zip(grid.shape * np.array(grid.spacing_mm), other.shape * np.array(spacing), spacing):
        assert abs(a - b) <= step / 2 + 1e-9 or b == step
    with pytest.raises(ValueError, match="positive"):
        grid_with_spacing(grid, (0, 1, 1))


def test_a_crop_leaves_voxels_where_they_are() -> None:
    source = volume()
    part = crop(source, (slice(2, 6), slice(None), slice(1, 5)))
    np.testing.assert_allclose(part.geometry.affine @ [0, 0, 0, 1], source.geometry.affine @ [2, 0, 1, 1])
    back = resample(part, source.geometry, fill=0)
    np.testing.assert_allclose(back.array[2:6, :, 1:5], source.array[2:6, :, 1:5], atol=1e-5)
    assert (back.array[0] == 0).all()


def test_grids_are_the_same_within_a_hundredth_of_a_voxel() -> None:
    grid = Geometry((10, 10, 10), np.diag([2.0, 2.0, 2.0, 1.0]))
    for shift, same in ((0.0, True), (0.015, True), (0.03, False)):
        moved = grid.affine.copy()
        moved[0, 3] += shift
        other = Geometry(grid.shape, moved)
        assert same_grid(grid, other) is same
        assert voxels_apart(grid, other) == pytest.approx(shift / 2)
    assert not same_grid(grid, Geometry((10, 10, 11), grid.affine))


def interpolated(source: Volume, grid: Geometry, order: int, fill: float) -> np.ndarray:
    """Resample with scipy alone, whether or not the voxels coincide; `fill` more than half a voxel outside."""
    matrix = np.linalg.inv(source.geometry.affine) @ grid.affine
    made = affine_transform(
        source.array, matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=order, mode="nearest"
    )
    places = np.moveaxis(np.indices(grid.shape), 0, -1) @ matrix[:3, :3].T + matrix[:3, 3]
    made[((places < -0.5 - 1e-6) | (places > np.array(source.array.shape) - 0.5 + 1e-6)).any(-1)] = fill
    return np.asarray(made)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("seed", range(24))
def test_grids_whose_voxels_coincide_are_pasted_as_interpolating_would_have_it_bit_for_bit(
    seed: int, order: int
) -> None:
    rng = np.random.default_rng(seed)
    source = volume(seed)
    turned = reordered(source, rng.permutation(3).tolist(), (rng.random(3) < 0.5).tolist()).geometry
    moved = turned.affine.copy()
    moved[:3, 3] += moved[:3, :3] @ rng.integers(-2, 6, 3)
    grid = Geometry((int(rng.integers(3, 12)), int(rng.integers(3, 12)), int(rng.integers(3, 12))), moved)
    assert find_overlap(source.geometry, grid) is not None
    pasted = resample(source, grid, order=order, fill=-9.0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pasted.array, interpolated(source, grid, order, -9.0))
    assert (pasted.array != -9.0).any()


@pytest.mark.parametrize("seed", range(24))
def test_voxels_of_a_mask_are_scattered_as_their_whole_volume_would_be_pasted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = volume(seed)
    turned = reordered(source, rng.permutation(3).tolist(), (rng.random(3) < 0.5).tolist()).geometry
    moved = turned.affine.copy()
    moved[:3, 3] += moved[:3, :3] @ rng.integers(-2, 6, 3)
    grid = Geometry((int(rng.integers(3, 12)), int(rng.integers(3, 12)), int(rng.integers(3, 12))), moved)
    overlap = find_overlap(source.geometry, grid)
    assert overlap is not None
    mask = rng.random(source.array.shape) < 0.5
    values = np.moveaxis(source.array, -1, 0)[np.moveaxis(mask, -1, 0)]
    scattered, pasted = np.full(grid.shape, -9.0, np.float32), np.full(grid.shape, -9.0, np.float32)
    overlap.scatter(values, mask, scattered)
    overlap.paste(np.where(mask, source.array, np.float32(-9)), pasted)
    np.testing.assert_array_equal(scattered, pasted)
    assert (scattered != -9.0).any()


def test_grids_that_miss_one_another_share_nothing_and_grids_between_voxels_do_not_coincide() -> None:
    source = volume()
    far, between = source.geometry.affine.copy(), source.geometry.affine.copy()
    far[:3, 3] += far[:3, 0] * 40
    between[:3, 3] += between[:3, 1] * 0.001
    assert (resample(source, Geometry((4, 5, 6), far), fill=3.0).array == 3.0).all()
    assert find_overlap(source.geometry, Geometry((4, 5, 6), between)) is None
    assert find_overlap(source.geometry, grid_with_spacing(source.geometry, (1.0, 1.5, 5.0))) is None


def test_labels_are_laid_on_a_larger_grid_only_where_all_of_them_fit() -> None:
    whole = Volume(np.zeros((6, 7, 8), np.int16), Geometry((6, 7, 8), np.diag([1.0, 2.0, 3.0, 1.0])))
    whole.array[2, 3, 4], whole.array[2, 3, 5] = 7, 9
    stored = reordered(crop(whole, (slice(1, 4), slice(2, 6), slice(4, 7))), (2, 0, 1), (True, False, True))
    laid = laid_on(stored, whole.geometry)
    assert laid is not None
    np.testing.assert_array_equal(laid.array, whole.array)
    assert laid_on(stored, crop(whole, (slice(0, 6), slice(0, 7), slice(0, 5))).geometry) is None


def test_an_array_in_another_axis_order_lies_on_no_grid() -> None:
    geometry = Geometry((4, 5, 6), np.eye(4))
    for array in (np.zeros((6, 5, 4)), np.zeros((4, 5)), np.zeros((4, 5, 6, 1))):
        with pytest.raises(ValueError, match=r"does not lie on a grid of \(4, 5, 6\)"):
            Volume(array, geometry)
    for shape, affine in (((4, 5), np.eye(4)), ((4, 5, 6), np.eye(3))):
        with pytest.raises(ValueError, match="three sides and an affine of 4 x 4"):
            Geometry(shape, affine)  # type: ignore[arg-type]


def test_an_affine_of_whole_numbers_becomes_one_of_floats() -> None:
    for affine in (np.diag([1, 1, 2, 1]), np.diag([1, 1, 2, 1]).astype(np.float32)):
        grid = Geometry((4, 5, 6), affine)
        assert grid.affine.dtype == np.float64 and affine.dtype != np.float64
        assert grid_with_spacing(grid, (2, 2, 1)).shape == (2, 2, 12)  # it ended in a UFuncTypeError


def test_what_is_no_array_of_numpy_or_no_grid_is_refused_by_its_kind_and_a_grid_prints_no_bytes(tmp_path: Path) -> None:
    array, geometry = np.zeros((4, 5, 6), np.float32), Geometry((4, 5, 6), np.eye(4), b"x" * 348, "nifti")
    for given, grid in (
        (array.tolist(), geometry),
        (torch.zeros(4, 5, 6), geometry),
        (array, None),
        (array, np.eye(4)),
    ):
        with pytest.raises(TypeError, match=f"not {type(given).__name__} and {type(grid).__name__}"):
            Volume(given, grid)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"not {type(given).__name__} and {type(grid).__name__}"):
            write_volume(tmp_path / "a.nii.gz", given, grid)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not Volume and Geometry; a Volume has them as .array and .geometry"):
        write_volume(tmp_path / "a.nii.gz", Volume(array, geometry), geometry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="complex64"):
        write_volume(tmp_path / "a.nii.gz", array.astype(np.complex64), geometry)
    masked = np.ma.masked_less(array, 1)  # MGZ wrote 1e20 for its voxels, and NIfTI ended in a ValueError of numpy
    with pytest.raises(TypeError, match=r"a masked array has voxels without a value; array.filled"):
        write_volume(tmp_path / "a.mgz", masked, geometry)
    with pytest.raises(TypeError, match="masked"):
        Volume(masked, geometry)
    for shape, affine in (([4, 5, 6], np.eye(4)), ((4, 5, 6), np.eye(4).tolist())):
        with pytest.raises(TypeError, match="a tuple of three sides and an affine as an array of numpy"):
            Geometry(shape, affine)
    assert not [*tmp_path.iterdir()] and "xxx" not in repr(geometry)
