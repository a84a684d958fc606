"""Whether images that should lie on one another do."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from chiasm.preparation.displacement import displacement_mm
from chiasm.preparation.inspection import inspect_folder
from chiasm.volumes import Geometry, Volume
from synthetic_cohort import pair, write_brats

SPACING = (1.5, 2.0, 5.0)
SHAPE = (64, 60, 20)


def volume(array: NDArray[np.floating]) -> Volume:
    return Volume(array, Geometry(array.shape, np.diag([*SPACING, 1.0])))


@pytest.fixture(scope="module")
def images() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return pair(5, shape=SHAPE)[:2]


@pytest.mark.parametrize("moved_mm", [(12, 0, 0), (0, -8, 0), (0, 0, 10), (6, 8, -5)])
def test_a_target_of_another_contrast_that_scipy_moved_is_found_within_a_coarse_voxel(
    images: tuple[NDArray[np.float32], NDArray[np.float32]], moved_mm: tuple[int, int, int]
) -> None:
    source, target = images
    moved = ndimage.shift(target, [mm / size for mm, size in zip(moved_mm, SPACING, strict=True)], order=1)
    found = displacement_mm(volume(source), volume(moved))
    assert found == pytest.approx(np.linalg.norm(moved_mm), abs=4)
    assert displacement_mm(volume(moved), volume(source)) == pytest.approx(found, abs=0.01)
    assert displacement_mm(volume(source), volume(3 * moved - 500)) == found  # units do not matter


def test_images_that_lie_on_one_another_or_show_nothing_are_not_displaced(
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    source, target = images
    near = ndimage.shift(target, (1.0, -0.5, 0.2), order=1)
    noise = np.random.default_rng(0).normal(size=SHAPE)
    for other in (target, near, np.full(SHAPE, 7.0), noise, source):
        assert displacement_mm(volume(source), volume(other)) == 0
    thin = volume(source[:, :, :1])
    assert displacement_mm(thin, thin) == 0


def test_inspection_and_plan_name_the_case_and_the_image_that_lies_elsewhere(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = write_brats(tmp_path_factory.mktemp("moved") / "cohort", 4)
    assert not any("lie on one another" in line for line in inspect_folder(folder, ["t1"], "t2").lines())
    file = sorted(folder.rglob("*_t2.nii.gz"))[1]
    image = nib.load(file)
    nib.save(nib.Nifti1Image(np.roll(image.get_fdata(dtype=np.float32), 10, 1), image.affine), file)
    (line,) = (line for line in inspect_folder(folder, ["t1"], "t2").lines() if "lie on one another" in line)
    case = file.name.removesuffix("_t2.nii.gz")
    assert line.startswith("warning: ") and f"scored: {case} (t2 about " in line and "mm from t1); chiasm run" in line
