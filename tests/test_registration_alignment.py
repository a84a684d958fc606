"""Registration: against movements that are known, against ITK's own reading of the field, and refusals."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from chiasm.errors import RecipeError, RunError, VolumeError
from chiasm.registration.alignment import Alignment, align, mutual_information
from chiasm.registration.demons import Level, demons, descriptors, jacobian, linear, unfolded, warped
from chiasm.reports.registration import register
from chiasm.volumes import Geometry, Volume, read_volume, write_volume

SIDE = 40
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = (-35, -50, 20)


def head(seed: int = 0) -> np.ndarray:
    """A smooth pattern inside a ball: enough for eyes and for registration."""
    rng = np.random.default_rng(seed)
    i, j, k = np.indices((SIDE,) * 3) - (SIDE - 1) / 2
    ball = (i / 15) ** 2 + (j / 17) ** 2 + (k / 14) ** 2 < 1
    pattern = gaussian_filter(rng.normal(size=(SIDE,) * 3), 2.0)
    return (ball * (1.5 + pattern / pattern.std() * 0.35).clip(0.3)).astype(np.float32) * 100


def unlike(image: np.ndarray) -> np.ndarray:
    """The same anatomy in another contrast: bright where the first is middling, dark where it is bright."""
    return np.where(image > 0, 260 - image + 0.006 * (image - 150) ** 2, 0).astype(np.float32)


def rigid(degrees: float, shift_mm: tuple[float, float, float]) -> np.ndarray:
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    centre = AFFINE[:3, :3] @ np.full(3, (SIDE - 1) / 2) + AFFINE[:3, 3]
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + shift_mm
    return matrix


def volume(array: np.ndarray, affine: np.ndarray = AFFINE) -> Volume:
    return Volume(array, Geometry(array.shape, affine))


def apart_mm(made: Alignment, truth: np.ndarray, inside: np.ndarray) -> float:
    points = np.argwhere(inside) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    return float(np.linalg.norm(made.places(points) - (points @ truth[:3, :3].T + truth[:3, 3]), axis=1).mean())


def moved_head(truth: np.ndarray) -> np.ndarray:
    """What stands at x in the fixed head stands at `truth` x in this one."""
    image = head()
    index = np.indices(image.shape).reshape(3, -1)
    world = AFFINE[:3, :3] @ index + AFFINE[:3, 3:]
    inverse = np.linalg.inv(truth)
    back = np.linalg.inv(AFFINE) @ np.vstack([inverse[:3, :3] @ world + inverse[:3, 3:], np.ones(index.shape[1])])
    return unlike(map_coordinates(image, back[:3], order=1).reshape(image.shape))


def test_a_rigid_movement_between_unlike_contrasts_is_found_within_three_tenths_of_a_millimetre() -> None:
    truth = rigid(5.0, (4.0, -3.0, 2.0))
    made = align(volume(head()), volume(moved_head(truth)), "rigid")
    assert apart_mm(made, np.eye(4), head() > 0) > 3
    assert apart_mm(made, truth, head() > 0) < 0.3
    assert made.information[1] > made.information[0]
    assert made.least_jacobian == 1


def test_storage_order_of_either_volume_makes_no_difference() -> None:
    truth = rigid(4.0, (3.0, 0.0, 1.0))
    fixed, moving = head(), moved_head(truth)
    flipped = np.diag([-2.0, 2.0, 2.0, 1.0])
    flipped[:3, 3] = AFFINE[:3, 3] + (2 * (SIDE - 1), 0, 0)
    plain = align(volume(fixed), volume(moving), "rigid")
    turned = align(volume(fixed), volume(np.ascontiguousarray(moving[::-1]), flipped), "rigid")
    assert np.allclose(plain.matrix, turned.matrix, atol=1e-4)


def test_the_same_pair_gives_the_same_result_within_a_nanometre() -> None:
    pair = volume(head()), volume(moved_head(rigid(3.0, (2.0, 1.0, 0.0))))
    assert np.allclose(
        align(*pair, "affine").matrix, align(*pair, "affine").matrix, atol=1e-6, rtol=0
    )  # ITK sums in threads


def test_demons_bring_a_deformed_unlike_image_nearer_and_fold_nothing() -> None:
    rng = np.random.default_rng(5)
    truth = np.stack([gaussian_filter(rng.normal(size=(SIDE,) * 3), 6.0) for _ in range(3)])
    truth *= 2.0 / np.linalg.norm(truth, axis=0).max()  # voxels: 4 mm at most
    image = head()
    deformed = map_coordinates(image, np.indices(image.shape) + truth, order=1)
    made = align(volume(deformed.astype(np.float32)), volume(unlike(image)), "demons")
    points = np.argwhere(deformed > 0)
    there = made.places(points @ AFFINE[:3, :3].T + AFFINE[:3, 3])
    wanted = (points + truth[:, *points.T].T) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    before = 2 * np.linalg.norm(truth[:, *points.T], axis=0).mean()
    after = np.linalg.norm(there - wanted, axis=1).mean()
    assert after < 0.6 * before
    assert made.least_jacobian > 0


@pytest.mark.parametrize("freedoms", [6, 12])
def test_descriptors_settle_a_movement_within_a_tenth_of_a_voxel(freedoms: Literal[6, 12]) -> None:
    truth = rigid(2.0, (1.5, -1.0, 0.5))
    if freedoms == 12:
        truth[2, 2] *= 1.03
        truth[2, 3] -= 0.03 * (20 + 2 * (SIDE - 1) / 2)  # about the middle
    inside = head() > 0
    images = [torch.from_numpy(array)[None, None] for array in (head(), moved_head(truth))]
    found = linear(*images, freedoms=freedoms, shrink=1, weight=torch.from_numpy(inside.astype(np.float32))[None, None])
    matrix = AFFINE @ found.numpy() @ np.linalg.inv(AFFINE)
    made = Alignment("affine", matrix, None, Geometry((SIDE,) * 3, AFFINE), (), 1, 1, 0, 0)
    assert apart_mm(made, np.eye(4), inside) > 1.5
    assert apart_mm(made, truth, inside) < 0.2
    if freedoms == 6:
        assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)


def test_descriptors_settle_where_they_are_believed() -> None:
    """Half of the image went elsewhere: the half that is believed decides."""
    image = head()
    parted = np.concatenate([np.roll(image, 1, 1)[: SIDE // 2], np.roll(image, -1, 1)[SIDE // 2 :]])
    weight = np.zeros(image.shape, np.float32)
    weight[: SIDE // 2 - 3] = image[: SIDE // 2 - 3] > 0
    fixed, moving, believed = (torch.from_numpy(array)[None, None] for array in (image, parted, weight))
    found = linear(fixed, moving, freedoms=6, shrink=1, weight=believed).numpy()
    points = np.c_[np.argwhere(weight > 0), np.ones(np.count_nonzero(weight))]
    assert np.allclose((points @ found.T)[:, :3] - points[:, :3], (0, 1, 0), atol=0.1)


def test_descriptors_do_not_change_with_gain_offset_or_inversion() -> None:
    image = torch.from_numpy(head())[None, None]
    wanted = descriptors(image)
    assert wanted.shape[1] == 12
    assert torch.allclose(descriptors(-3 * image + 70), wanted, atol=1e-3)
    assert not torch.allclose(descriptors(image.flip(2)), wanted, atol=1e-1)


def test_a_shift_of_one_voxel_is_found_as_one_voxel() -> None:
    image = torch.from_numpy(head())[None, None]
    field = demons(image, image.roll(1, 2), levels=[Level(1, 40)])  # what is at x lies at x + 1
    inside = torch.from_numpy(head() > 0)
    assert float(field[0, 0][inside].mean()) == pytest.approx(1, abs=0.1)
    assert float(field[0, 1:][:, inside].abs().mean()) < 0.1


def test_the_jacobian_is_that_of_a_known_stretch() -> None:
    i = torch.arange(8.0).view(8, 1, 1).expand(8, 8, 8)
    field = torch.stack([0.5 * i, torch.zeros_like(i), torch.zeros_like(i)])[None]
    assert torch.allclose(jacobian(field), torch.full((8, 8, 8), 1.5))


def test_a_folded_field_is_smoothed_until_it_is_one_to_one() -> None:
    field = torch.zeros((1, 3, 12, 12, 12))
    field[0, 0, 6] = -3.0
    assert float(jacobian(field).min()) < 0
    assert float(jacobian(unfolded(field)).min()) > 0


def test_warping_reads_at_the_place_that_the_field_names() -> None:
    image = torch.arange(10.0).view(1, 1, 10, 1, 1).expand(1, 1, 10, 4, 4).contiguous()
    field = torch.zeros((1, 3, 10, 4, 4))
    field[0, 0] = 0.25
    assert torch.allclose(warped(image, field)[0, 0, :9, 1, 1], torch.arange(9.0) + 0.25, atol=1e-5)


def test_mutual_information_of_an_image_with_itself_is_its_entropy_and_with_noise_little() -> None:
    values = np.tile(np.arange(32.0), 1000)
    assert mutual_information(values, values) == pytest.approx(np.log(32), rel=0.02)
    assert mutual_information(values, np.random.default_rng(0).permutation(values)) < 0.05


def test_itk_reads_the_field_as_we_wrote_it_and_moves_the_image_as_we_did(tmp_path: Path) -> None:
    truth = rigid(4.0, (3.0, -2.0, 1.0))
    fixed, moving = volume(head()), volume(moved_head(truth))
    write_volume(tmp_path / "fixed.nii.gz", fixed.array, fixed.geometry)
    write_volume(tmp_path / "moving.nii.gz", moving.array, moving.geometry)
    labels = (moving.array > 120).astype(np.uint8)
    write_volume(tmp_path / "labels.nii.gz", labels, moving.geometry, labels=True)
    made = register(
        tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", tmp_path / "out", labels=[tmp_path / "labels.nii.gz"]
    )
    field = sitk.ReadImage(str(tmp_path / "out" / "field.nii.gz"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    reference = sitk.ReadImage(str(tmp_path / "fixed.nii.gz"))
    theirs = sitk.Resample(sitk.ReadImage(str(tmp_path / "moving.nii.gz")), reference, transform, sitk.sitkLinear, 0.0)
    ours = read_volume(tmp_path / "out" / "moved.nii.gz")
    inside = (slice(4, -4),) * 3
    assert np.allclose(sitk.GetArrayFromImage(theirs).T[inside], ours.array[inside], atol=0.05)
    carried = read_volume(tmp_path / "out" / "labels-1.nii.gz", labels=True)
    assert set(np.unique(carried.array)) == {0, 1}
    page = made.report.read_text(encoding="utf-8")
    assert page.count("data:image/png") == 24
    assert str(tmp_path) not in page


def test_another_registration_is_not_mixed_in(tmp_path: Path) -> None:
    fixed, moving = volume(head()), volume(moved_head(rigid(4.0, (3.0, -2.0, 1.0))) - np.float32(1000))
    write_volume(tmp_path / "fixed.nii.gz", fixed.array, fixed.geometry)
    write_volume(tmp_path / "moving.nii.gz", moving.array, moving.geometry)
    pair, out = (tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz"), tmp_path / "out"
    made, known = register(*pair, out, kind="rigid"), read_volume(out / "known.nii.gz", labels=True).array
    assert made.covered == pytest.approx(known.mean()) and 0.5 < made.covered < 1
    assert (read_volume(out / "moved.nii.gz").array[known == 0] == moving.array.min()).all()
    sagittal = re.findall(r"base64,([^\"]+)", made.report.read_text())[0]
    shown = np.asarray(Image.open(BytesIO(base64.b64decode(sagittal))).convert("L"))
    likeness = [np.corrcoef(shown.ravel(), plane[::-1, ::-1].T.ravel())[0, 1] for plane in fixed.array[10:-10]]
    assert max(likeness) > 0.95  # its front is on the left, as on the other pages
    before = (out / "matrix.txt").read_text()
    (out / "field.nii.gz").write_text("of a registration by Demons")
    (out / "labels-mine.nii.gz").write_text("of the user")
    with pytest.raises(RunError, match="differs in the seed") as caught:
        register(*pair, out, kind="rigid", seed=1)
    assert caught.value.reason == "other-registration" and (out / "matrix.txt").read_text() == before
    with pytest.raises(RunError, match="differs in what was registered"):
        register(*reversed(pair), out, kind="rigid")
    with pytest.raises(RecipeError, match="kind of registration 'elastic'"):
        register(*pair, out, kind="elastic", overwrite=True)  # type: ignore[arg-type]
    assert (out / "matrix.txt").read_text() == before
    register(*reversed(pair), out, kind="rigid", overwrite=True)
    assert (out / "matrix.txt").read_text() != before and not (out / "field.nii.gz").exists()
    assert (out / "labels-mine.nii.gz").read_text() == "of the user"


def test_a_registration_replaces_no_file_that_it_reads_and_none_of_the_user(tmp_path: Path) -> None:
    fixed, moving = volume(head()), volume(moved_head(rigid(4.0, (3.0, -2.0, 1.0))))
    for name, one in (("fixed", fixed), ("moved", moving), ("labels-1", moving)):
        write_volume(tmp_path / f"{name}.nii.gz", one.array, one.geometry)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scans = tmp_path / "moved.nii.gz", tmp_path / "fixed.nii.gz"
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "moved.nii.gz").symlink_to(scans[0])
    labels = tmp_path / "labels-1.nii.gz"
    for out, given in ((tmp_path, []), (tmp_path / "link", []), (tmp_path, [labels])):
        for overwrite in (False, True):
            with pytest.raises(RunError, match="belongs to the data, and the registration would replace it"):
                register(*(scans if not given else scans[::-1]), out, kind="rigid", labels=given, overwrite=overwrite)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "matrix.txt").write_text("of the user")
    with pytest.raises(RunError, match=r"holds matrix\.txt, which was not written by chiasm"):
        register(*scans, tmp_path / "out", kind="rigid")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (tmp_path / "out" / "matrix.txt").read_text() == "of the user"


def test_volumes_that_share_nothing_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(RecipeError, match="rigid, affine, demons"):
        align(volume(head()), volume(head()), "elastic")  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match="is constant") as raised:
        align(volume(head()), volume(np.ones((SIDE,) * 3, np.float32)), "rigid")
    assert raised.value.reason == "constant"


def test_labels_keep_their_type_and_values_beyond_the_volume_are_nothing() -> None:
    shift = np.eye(4)
    shift[0, 3] = 1000.0
    far = Alignment("rigid", shift, None, Geometry((SIDE,) * 3, AFFINE), (), 1, 1, 0, 0)
    labels = volume(np.full((SIDE,) * 3, 3, np.uint8))
    resampled = far.resample_moving(labels, labels.geometry, order=0)
    assert resampled.array.dtype == np.uint8
    assert not resampled.array.any()
