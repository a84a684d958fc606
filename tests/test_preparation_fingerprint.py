from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from chiasm.cohorts.cases import Case
from chiasm.errors import CohortError
from chiasm.preparation.fingerprint import MOST_CASES, VOXELS, CaseFacts, fingerprint, read_images, read_mask
from conftest import REAL
from synthetic_cohort import SHAPE, SPACING, affine, body, save, write_case, write_cohort


def same(a: CaseFacts, b: CaseFacts) -> bool:
    return (a.id, a.spacing_mm, a.body_mm) == (b.id, b.spacing_mm, b.body_mm) and np.array_equal(a.samples, b.samples)


def with_files(case: Case, **images: Path) -> Case:
    return dataclasses.replace(case, images={**case.images, **images})


def test_the_same_cases_give_the_same_fingerprint(tmp_path: Path) -> None:
    cases = write_cohort(tmp_path).cases
    first, second = (fingerprint(cases, ["t1"], "t2") for _ in range(2))
    assert all(map(same, first.cases, second.cases))
    assert first.mask_rule == second.mask_rule == "nonzero"


def test_a_case_is_the_same_whatever_its_neighbours(tmp_path: Path) -> None:
    cases = write_cohort(tmp_path).cases
    alone, among = fingerprint(cases[2:3], ["t1"], "t2"), fingerprint(cases, ["t1"], "t2")
    assert same(alone.cases[0], among.cases[2])


def test_size_spacing_and_samples_are_those_of_the_files(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    (facts,) = fingerprint([case], ["t1"], "t2").cases
    inside = body()
    assert facts.spacing_mm == pytest.approx(SPACING)
    extent = [np.ptp(np.flatnonzero(inside.any(axis=(*{0, 1, 2} - {axis},)))) + 1 for axis in range(3)]
    assert facts.body_mm == pytest.approx(np.multiply(extent, SPACING))
    scans = [nib.load(case.images[name]).get_fdata(dtype=np.float32) for name in ("t1", "t2")]
    assert inside.sum() < VOXELS  # then every voxel is taken
    np.testing.assert_array_equal(facts.samples, [scan[inside] for scan in scans])


def test_large_masks_are_sampled_at_the_same_voxels_in_every_modality(tmp_path: Path) -> None:
    shape, rng = (50, 50, 40), np.random.default_rng(0)
    place = rng.permutation(np.arange(1, np.prod(shape) + 1)).reshape(shape).astype(np.float32)
    inside = body(shape)
    images = {"t1": np.where(inside, place, 0), "t2": np.where(inside, 2 * place, 0)}
    case = Case("big", "big", {name: save(tmp_path / f"{name}.nii", a, affine()) for name, a in images.items()})
    (facts,) = fingerprint([case], ["t1"], "t2").cases
    assert facts.samples.shape == (2, VOXELS)
    np.testing.assert_array_equal(2 * facts.samples[0], facts.samples[1])
    assert len(np.unique(facts.samples[0])) == VOXELS
    assert abs(facts.samples[0].mean() / place[inside].mean() - 1) < 0.02


def test_axes_are_told_in_ras_order_however_a_case_is_stored(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    turned = {}
    for name, path in case.images.items():
        image = nib.load(path).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        turned[name] = save(tmp_path / "turned" / f"{name}.nii", image.get_fdata(dtype=np.float32), image.affine)
    plain, other = (fingerprint([one], ["t1"], "t2").cases[0] for one in (case, with_files(case, **turned)))
    assert nib.load(turned["t1"]).shape != SHAPE
    assert same(plain, other)


def test_a_bad_case_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    cases = list(write_cohort(tmp_path).cases)
    cases[1].images["t2"].write_bytes(b"garbage")
    found = fingerprint(cases, ["t1"], "t2")
    assert [facts.id for facts in found.cases] == ["case00", "case02", "case03"]
    (problem,) = found.problems
    assert problem.case == "case01" and "case01" in problem.message
    assert problem.path == cases[1].images["t2"]
    with pytest.raises(CohortError, match=r"no training case can be read.*case01"):
        fingerprint(cases[1:2], ["t1"], "t2")
    with pytest.raises(CohortError, match="no training case can be read"):
        fingerprint([], ["t1"], "t2")


def test_a_case_with_an_empty_mask_is_named(tmp_path: Path) -> None:
    cases = write_cohort(tmp_path, 2, masked=True).cases
    assert cases[0].mask is not None
    save(cases[0].mask, np.zeros(SHAPE, np.uint8), affine())
    (problem,) = fingerprint(cases, ["t1"], "t2").problems
    assert (problem.case, problem.reason, problem.path) == ("case00", "empty-mask", cases[0].mask)


def test_a_pair_on_two_grids_is_named(tmp_path: Path) -> None:
    cases = list(write_cohort(tmp_path, 2).cases)
    other = write_case(tmp_path / "other", 1, spacing=(1.0, 1.0, 3.5))
    cases[1] = with_files(cases[1], t2=other.images["t2"])
    (problem,) = fingerprint(cases, ["t1"], "t2").problems
    assert (problem.case, problem.reason) == ("case01", "grid")


def test_masks_from_files_are_used_and_make_the_rule(tmp_path: Path) -> None:
    cases = write_cohort(tmp_path, 2, masked=True).cases
    small = np.zeros(SHAPE, np.uint8)
    small[10:20, 10:30, 4:8] = 1
    assert cases[0].mask is not None
    save(cases[0].mask, small, affine())
    found = fingerprint(cases, ["t1"], "t2")
    assert found.mask_rule == "given"
    assert found.cases[0].body_mm == pytest.approx((10, 20, 12))
    assert found.cases[0].samples.shape == (2, 800)


def test_where_only_some_cases_have_masks_the_rule_is_that_of_the_others(tmp_path: Path) -> None:
    cases = list(write_cohort(tmp_path, 3, masked=True).cases)
    cases[1] = dataclasses.replace(cases[1], mask=None)
    assert fingerprint(cases, ["t1"], "t2").mask_rule == "nonzero"


def test_where_some_are_stripped_and_some_are_not_the_rule_is_body(tmp_path: Path) -> None:
    cases = write_cohort(tmp_path, 3).cases
    air = np.abs(np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32)
    for path in cases[2].images.values():
        save(path, nib.load(path).get_fdata(dtype=np.float32) + 2 * air, affine())
    assert fingerprint(cases, ["t1"], "t2").mask_rule == "body"


def test_of_many_cases_evenly_spread_ones_are_read(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    many = [dataclasses.replace(case, id=f"{number:03d}") for number in range(3 * MOST_CASES)]
    steps: list[tuple[int, int, str]] = []
    found = fingerprint(many, ["t1"], "t2", lambda *step: steps.append(step))
    numbers = [int(facts.id) for facts in found.cases]
    assert len(numbers) == MOST_CASES and (numbers[0], numbers[-1]) == (0, 3 * MOST_CASES - 1)
    assert set(np.diff(numbers)) <= {3, 4}
    assert steps[0] == (0, MOST_CASES, "000") and steps[-1] == (MOST_CASES, MOST_CASES, "")


def test_images_and_mask_come_in_ras_order_on_the_grid_of_the_first(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1, masked=True)
    flipped = nib.load(case.images["t2"]).as_reoriented(np.array([[2, 1], [0, 1], [1, 1]]))
    array = flipped.get_fdata(dtype=np.float32)
    case = with_files(case, t2=save(tmp_path / "flipped.nii", array, flipped.affine))
    first, second = read_images(case, ["t1", "t2"])
    np.testing.assert_array_equal(first.array > 0, second.array > 0)
    np.testing.assert_allclose(first.geometry.affine, second.geometry.affine)
    mask = read_mask(case, first)
    assert mask is not None
    np.testing.assert_array_equal(mask.array > 0, first.array > 0)
    assert read_mask(dataclasses.replace(case, mask=None), first) is None


@pytest.mark.realdata
def test_a_real_pair_gives_an_adult_brain_or_head() -> None:
    folder = REAL / "ms_lesjak" / "patient07"
    case = Case("p7", "p7", {"t1": folder / "patient07_T1.nii.gz", "t2": folder / "patient07_T2.nii.gz"})
    found = fingerprint([case], ["t1"], "t2")
    assert not found.problems
    assert all(100 < size < 280 for size in found.cases[0].body_mm)
