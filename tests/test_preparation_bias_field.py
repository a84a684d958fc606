"""N4: against shading that is known, against SimpleITK's own at full resolution, and where it is never done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import RecipeError, VolumeError
from chiasm.methods import make_recipe
from chiasm.preparation.arrays import prepare_case, prepare_source
from chiasm.preparation.bias_field import ITERATIONS, bias_field, corrected, without_shading
from chiasm.preparation.fingerprint import ExaminationSettings, fingerprint
from chiasm.preparation.planning import make_plan
from chiasm.volumes import Geometry, Volume, read_volume
from conftest import QUICK
from synthetic_cohort import save

SIDE = 48


@pytest.fixture(scope="module")
def shaded() -> tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]]:
    """A ball of two tissues, shaded by up to a half; its mask; its white matter; the shading."""
    rng = np.random.default_rng(0)
    i, j, k = np.indices((SIDE,) * 3) - (SIDE - 1) / 2
    ball = i**2 + j**2 + k**2 < 21**2
    texture = gaussian_filter(rng.normal(size=ball.shape), 2.5)
    white = ball & (texture > 0)
    field = np.exp(0.012 * i - 0.008 * j + 0.0006 * (k**2 - i**2))
    tissue = np.where(white, 150.0, 100.0) + rng.normal(0, 3, ball.shape)
    image = np.where(ball, tissue * field, 0).astype(np.float32)
    return Volume(image, Geometry(image.shape, np.diag([2.0, 2, 2, 1]))), ball, white, field.astype(np.float32)


def variation(image: NDArray[np.float32], white: NDArray[np.bool_]) -> float:
    return float(image[white].std() / image[white].mean())


def test_white_matter_becomes_even_and_the_field_that_is_found_is_the_one_that_was_laid(
    shaded: tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]],
) -> None:
    volume, ball, white, field = shaded
    assert variation(volume.array, white) > 0.15
    assert variation(corrected(volume, ball).array, white) < 0.05
    found = np.log(bias_field(volume, ball))
    assert np.corrcoef(found[ball], np.log(field)[ball])[0, 1] > 0.98
    assert abs(found[ball].mean()) < 1e-5


@pytest.mark.slow
def test_it_is_what_simpleitk_makes_at_full_resolution_within_a_few_per_cent(
    shaded: tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]],
) -> None:
    volume, ball, white, _ = shaded
    image, mask = (
        sitk.GetImageFromArray(np.ascontiguousarray(a.transpose())) for a in (volume.array, ball.astype(np.uint8))
    )
    image.SetSpacing((2, 2, 2))
    mask.SetSpacing((2, 2, 2))
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetMaximumNumberOfIterations([number // 3 for number in ITERATIONS])
    whole = sitk.GetArrayFromImage(method.Execute(image, mask)).transpose()
    ours = corrected(volume, ball).array
    ratio = np.log(ours[ball] / whole[ball])
    assert (ratio - ratio.mean()).std() < 0.04  # a fifth of the shading's own spread
    assert variation(ours, white) < variation(whole, white) + 0.01


def test_outside_the_mask_and_in_ct_nothing_changes(
    shaded: tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]],
) -> None:
    volume, ball, white, _ = shaded
    half = ball & (np.indices(ball.shape)[0] < SIDE // 2)
    assert np.array_equal(corrected(volume, half).array[~half], volume.array[~half])
    for modality in ("ct", "cbct", "pet"):
        assert without_shading(volume, ball, modality, "n4") is volume
    assert without_shading(volume, ball, "t1", "none") is volume
    assert variation(without_shading(volume, ball, "t1", "n4").array, white) < 0.05


def test_a_mask_that_is_too_small_is_refused_with_what_to_do(
    shaded: tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]],
) -> None:
    volume, ball, _, _ = shaded
    few = np.zeros_like(ball)
    few[20:28, 20:28, 20:28] = True
    with pytest.raises(VolumeError, match=r"too small .*Train without data\.bias_correction"):
        corrected(volume, few)


@pytest.fixture(scope="module")
def cohort(
    shaded: tuple[Volume, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float32]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two patients: T1 and T2 shaded each by its own field, and a CT that bears a slope of its own."""
    folder = tmp_path_factory.mktemp("shaded")
    volume, ball, white, field = shaded
    t2 = np.where(ball, np.where(white, 80.0, 130.0) * field[::-1, ::-1], 0)
    ct = np.where(ball, 10 + 40 * field, -1000)
    for number in (1, 2):
        name = f"Toy_{number:04d}"
        for modality, image in (("t1", volume.array * number), ("t2", t2), ("ct", ct)):
            save(
                folder / name / f"{name}_{modality}.nii.gz",
                np.roll(image, number, 0).astype(np.float32),
                volume.geometry.affine,
            )
    return folder


def test_training_and_prediction_see_the_same_corrected_source_and_the_target_is_even_too(
    cohort: Path, tmp_path: Path
) -> None:
    found = find_cohort(cohort)
    plan = make_plan(
        make_recipe("A1", "tiny", {**QUICK, "data.bias_correction": "n4"}), found, [case.id for case in found.cases]
    )
    assert plan.bias_correction == "n4" and "of t1, t2 inside the mask" in plan.reasons["bias_correction"]
    case = found.cases[0]
    kept = prepare_case(case, plan, tmp_path)
    alone = prepare_source([read_volume(case.images["t1"])], plan)
    assert np.abs(kept.source - alone.array).max() < 1e-3  # N4 rounds as its threads fall
    plain = prepare_case(case, replace(plan, bias_correction="none"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another plan, other arrays
    for name in ("source", "target"):
        even, uneven = (np.squeeze(getattr(one, name)) for one in (kept, plain))
        one_tissue = np.squeeze(kept.source) > np.quantile(kept.source[0][kept.mask], 0.7)
        tissue = np.asarray(kept.mask) & one_tissue
        assert even[tissue].std() < 0.7 * uneven[tissue].std(), name


def test_ct_reaches_the_network_as_scanned(cohort: Path, tmp_path: Path) -> None:
    found = find_cohort(cohort)
    asked = make_recipe("A1", "tiny", {**QUICK, "data.target": "ct", "data.bias_correction": "n4"})
    plan = make_plan(asked, found, [case.id for case in found.cases])
    assert "of t1 inside" in plan.reasons["bias_correction"]
    kept, plain = (prepare_case(found.cases[0], one, tmp_path) for one in (plan, replace(plan, bias_correction="none")))
    assert np.array_equal(kept.target, plain.target) and not np.array_equal(kept.source, plain.source)


def test_what_the_plan_learns_of_intensities_is_of_corrected_images(cohort: Path) -> None:
    cases = find_cohort(cohort).cases[:1]
    even, uneven = (
        fingerprint(cases, ("t1",), "t2", terms=ExaminationSettings(correction=kind)).cases[0].samples
        for kind in ("n4", "none")
    )
    assert even.shape == uneven.shape
    assert np.ptp(np.quantile(even[1], (0.05, 0.95))) < 0.8 * np.ptp(np.quantile(uneven[1], (0.05, 0.95)))


def test_super_resolution_keeps_the_shading_of_its_own_scan() -> None:
    changes = {"data.task": "super-resolution", "data.target": "t1", "data.bias_correction": "n4"}
    with pytest.raises(RecipeError, match="bias_correction is not for super-resolution"):
        make_recipe("A1", "tiny", {**QUICK, **changes})


def test_a_rule_that_was_asked_for_is_followed_and_mask_files_are_not_used(cohort: Path, tmp_path: Path) -> None:
    found = find_cohort(cohort)
    grid = read_volume(found.cases[0].images["t1"])
    small = np.zeros(grid.array.shape, np.uint8)
    small[20:30, 20:30, 20:30] = 1
    file = save(tmp_path / "mask.nii.gz", small, grid.geometry.affine)
    cases = tuple(replace(case, mask=file) for case in found.cases)
    ids = [case.id for case in cases]
    plans = [
        make_plan(make_recipe("A1", "tiny", {**QUICK, "data.mask": rule}), replace(found, cases=cases), ids)
        for rule in ("auto", "body", "nonzero")
    ]
    assert [plan.mask_rule for plan in plans] == ["given", "body", "nonzero"]
    assert [plan.mask_files for plan in plans] == [True, False, False]
    assert "mask files are not used" in plans[1].reasons["mask_rule"]
    mask = Volume(small, grid.geometry)
    sizes = [prepare_source([grid], plan, mask).mask.sum() for plan in plans]
    assert sizes[0] == 1000 and min(sizes[1:]) > 20_000
    for plan in plans:
        trained = prepare_case(cases[0], plan, tmp_path / "cache")
        assert np.array_equal(trained.mask, prepare_source([grid], plan, mask).mask)


def test_a_rule_that_does_not_fit_an_image_is_refused_by_name(cohort: Path) -> None:
    found = find_cohort(cohort)
    noisy = read_volume(found.cases[0].images["t1"])
    image = noisy.array + np.random.default_rng(1).uniform(1, 2, noisy.array.shape).astype(np.float32)
    plan = make_plan(make_recipe("A1", "tiny", {**QUICK, "data.mask": "nonzero"}), found, [c.id for c in found.cases])
    with pytest.raises(VolumeError, match=r"constant background.*data\.mask=body"):
        prepare_source([Volume(image, noisy.geometry)], plan)
