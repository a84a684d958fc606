"""Pairs that do not lie together: what is moved, what never is, what is made once, and what is refused by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion

from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError
from chiasm.preparation.fingerprint import known_of
from chiasm.registration.cohort import RECORD, AlignedCohort, align_cohort, align_image, align_sources, read_records
from chiasm.volumes import Geometry, Volume, read_volume, same_grid
from synthetic_cohort import HEAD_SHIFT_MM, head, save, unlike, write_moved_heads

NAMES = ("t1", "t2")


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moved_heads(tmp_path_factory.mktemp("heads"), 2, short=8)


@pytest.fixture(scope="module")
def together(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AlignedCohort]:
    folder = tmp_path_factory.mktemp("registered")
    return folder, align_cohort(find_cohort(scanned), NAMES, "rigid", folder)


def overlap_error(case: Case, truth: Path) -> float:
    """Mean absolute difference to the T2 of a head that did not move, off its edge, where all is known."""
    image = read_volume(case.images["t2"])
    real = read_volume(truth / case.id / f"{case.id}_t2.nii.gz").array
    inside = known_of(case, binary_erosion(real > 0, iterations=2), image)
    return float(np.abs(image.array - real)[inside].mean())


def test_pairs_on_other_grids_come_to_lie_where_the_head_had_not_moved(
    scanned: Path, together: tuple[Path, AlignedCohort]
) -> None:
    for before, after in zip(find_cohort(scanned).cases, together[1].cohort.cases):
        source, moved = (read_volume(after.images[name]) for name in NAMES)
        assert same_grid(source.geometry, moved.geometry)
        assert after.images["t1"] == before.images["t1"] and after.labels == before.labels
        assert overlap_error(after, scanned.parent / "truth") < 4
    assert together[1].moved_mm["Toy_0001"] == pytest.approx(float(np.linalg.norm(HEAD_SHIFT_MM)), abs=0.6)


def test_nothing_is_known_where_the_moved_image_was_not_scanned(together: tuple[Path, AlignedCohort]) -> None:
    folder, made = together
    case = made.cohort.cases[0]
    image = read_volume(case.images["t2"])
    known = known_of(case, np.ones(image.array.shape, bool), image)
    assert not known[:, :, :6].any() and known[5:-5, 5:-5, 10:-5].all()
    assert read_records(folder)[case.id]["aligned"]["t2"]["covered"] == pytest.approx(known.mean(), abs=1e-3)


def test_itk_brings_an_image_to_the_same_place_with_the_matrix_that_was_noted(
    scanned: Path, together: tuple[Path, AlignedCohort]
) -> None:
    folder, made = together
    case = made.cohort.cases[0]
    matrix = np.diag([-1, -1, 1, 1]) @ np.array(read_records(folder)[case.id]["aligned"]["t2"]["matrix"])
    matrix = matrix @ np.diag([-1, -1, 1, 1])  # ITK's axes
    place = scanned / case.id / case.id
    fixed, moving = (sitk.ReadImage(f"{place}_{name}.nii.gz", sitk.sitkFloat32) for name in NAMES)
    transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
    there = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear)).transpose()
    ours = read_volume(case.images["t2"])
    inside = known_of(case, np.ones(ours.array.shape, bool), ours)
    inner = np.zeros_like(inside)
    inner[2:-2, 2:-2, 2:-2] = inside[2:-2, 2:-2, 2:-2]
    assert np.abs(there - ours.array)[inner].max() < 0.05


def test_what_was_made_is_found_again_and_made_anew_when_a_file_changed(scanned: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scanned, data)
    made: list[str] = []
    folder = tmp_path / "out"

    def again() -> list[str]:
        made.clear()
        align_cohort(find_cohort(data), NAMES, "rigid", folder, lambda _done, _of, case: made.append(case))
        return list(made)

    assert again() == ["Toy_0001", "Toy_0002"] and again() == []
    files = {path: sha256_of(path) for path in folder.glob("*/*")}
    image, matrix = head(1)
    save(data / "Toy_0001" / "Toy_0001_t2.nii.gz", unlike(image) + 1, matrix)
    assert again() == ["Toy_0001"]
    assert not (folder / "Toy_0001" / "known.nii.gz").exists()  # it reaches everywhere
    assert all(sha256_of(path) == notes for path, notes in files.items() if "Toy_0002" in str(path))
    (folder / "Toy_0002" / "t2.nii.gz").unlink()
    damaged = folder / "Toy_0001" / "t2.nii.gz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    whole, _ = damaged.read_bytes(), damaged.write_bytes(content)
    assert again() == ["Toy_0001", "Toy_0002"] and (folder / "Toy_0002" / "t2.nii.gz").exists()
    assert damaged.read_bytes() == whole and again() == []


def test_labels_of_the_moved_image_are_carried_along_and_keep_their_values(scanned: Path, tmp_path: Path) -> None:
    cohort = find_cohort(scanned)
    moved = read_volume(cohort.cases[0].images["t2"])
    marked = ((moved.array > 120) * 4).astype(np.uint8)
    labels = save(tmp_path / "seg.nii.gz", marked, moved.geometry.affine)
    case = replace(cohort.cases[0], labels=labels)
    made = align_cohort(Cohort(scanned, "toys", (case,)), NAMES, "rigid", tmp_path / "out").cohort.cases[0]
    assert made.labels == tmp_path / "out" / case.id / "labels.nii.gz"
    there = read_volume(made.labels, labels=True)
    assert same_grid(there.geometry, read_volume(case.images["t1"]).geometry)
    assert set(np.unique(there.array)) == {0, 4}
    bright = read_volume(made.images["t2"]).array > 120
    both = np.count_nonzero(bright & (there.array > 0))
    assert 2 * both / (np.count_nonzero(bright) + np.count_nonzero(there.array)) > 0.85


def test_prediction_sees_its_sources_as_training_saw_them(scanned: Path, together: tuple[Path, AlignedCohort]) -> None:
    case = find_cohort(scanned).cases[0]
    volumes = [read_volume(case.images[name]) for name in NAMES]
    (still, moved), notes = align_sources(volumes, NAMES, "rigid")
    assert still is volumes[0]
    trained = read_volume(together[1].cohort.cases[0].images["t2"]).array
    assert np.abs(moved.array - trained).max() < 1e-4  # of 200: ITK rounds as its threads fall
    assert notes == [f"t2 was aligned to t1 (rigid), by {together[1].moved_mm[case.id]:.1f} mm"]
    assert align_sources(volumes, NAMES, "none") == (volumes, [])


def test_air_beyond_a_scan_is_as_dark_as_its_darkest_voxel() -> None:
    image, matrix = head(3)
    fixed = Volume(image, Geometry(image.shape, matrix))
    lower = matrix.copy()
    lower[2, 3] += 24
    cut = (unlike(image) - 1000)[:, :, 12:]
    ct = Volume(cut, Geometry(cut.shape, lower))
    aligned = align_image(fixed, ct, "rigid")
    assert not aligned.covered.all() and (aligned.image.array[~aligned.covered] == ct.array.min()).all()


def test_one_case_that_does_not_come_together_is_named_and_the_others_go_on(scanned: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scanned, data)
    odd = data / "Toy_0002" / "Toy_0002_t2.nii.gz"
    save(odd, np.zeros((20, 20, 20), np.float32), np.diag([2.0, 2, 2, 1]))
    made = align_cohort(find_cohort(data), NAMES, "rigid", tmp_path / "out")
    assert [case.id for case in made.cohort.cases] == ["Toy_0001"]
    (problem,) = made.problems
    assert problem.case == "Toy_0002" and problem.path == odd and problem.message.startswith("case Toy_0002: ")
    assert not (tmp_path / "out" / "Toy_0002").exists()
    shutil.rmtree(data / "Toy_0001")
    with pytest.raises(CohortError, match="none of its 1 cases can be registered; the first: case Toy_0002"):
        align_cohort(find_cohort(data), NAMES, "rigid", tmp_path / "out")


def test_none_changes_nothing_and_writes_nothing(scanned: Path, tmp_path: Path) -> None:
    cohort = find_cohort(scanned)
    assert align_cohort(cohort, NAMES, "none", tmp_path / "out") == AlignedCohort(cohort, {}, ())
    assert not (tmp_path / "out").exists()


def test_demons_keep_the_field_and_nothing_folds(scanned: Path, tmp_path: Path) -> None:
    some = find_cohort(scanned)
    made = align_cohort(replace(some, cases=some.cases[:1]), NAMES, "demons", tmp_path)
    assert {path.name for path in (tmp_path / "Toy_0001").iterdir()} >= {"t2.nii.gz", "t2-field.nii.gz", RECORD}
    assert read_records(tmp_path)["Toy_0001"]["aligned"]["t2"]["least_jacobian"] > 0
    assert overlap_error(made.cohort.cases[0], scanned.parent / "truth") < 12
