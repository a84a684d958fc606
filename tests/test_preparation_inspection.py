"""What an inspection ends with: usable pairs, the split of a training, and what to do next."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import chiasm
from chiasm.errors import CohortError
from chiasm.methods import make_recipe
from chiasm.preparation.inspection import inspect_folder
from synthetic_cohort import write_brats


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("inspected") / "my cohort", 6)


def test_the_verdict_is_the_split_that_a_training_makes(cohort: Path, tmp_path: Path) -> None:
    found = inspect_folder(cohort, ["t1"], "t2")
    asked = {"data.sources": ("t1",), "data.target": "t2", "data.patch": 32, "split.folds": "auto"}
    recipe = make_recipe("A7", "tiny", asked)
    split = chiasm.plan(cohort, recipe, tmp_path / "run", say=lambda _: None).split
    counts = [len(part) for part in (split.train, split.validation, split.test)]
    assert found.verdict == (
        "usable: 6 of 6 pairs of t1 and t2, of 6 subjects",
        f"chiasm run --models 1 would take {counts[0]} for training, {counts[1]} for validation, "
        f"{counts[2]} for testing (fold 0 of 6, by subject)",
        f"next: chiasm run '{cohort}' --source t1 --target t2 -o OUT --dry-run",
    )
    assert tuple(found.lines()[-3:]) == found.verdict


def test_a_pair_that_cannot_be_used_is_not_counted_and_too_few_subjects_are_told_the_way_out(tmp_path: Path) -> None:
    folder = write_brats(tmp_path / "cohort", 4)
    broken = next(iter(sorted(folder.rglob("*_t2.nii.gz"))))
    broken.write_bytes(broken.read_bytes()[:500])
    verdict = inspect_folder(folder, ["t1"], "t2").verdict
    assert verdict[0] == "usable: 3 of 4 pairs of t1 and t2, of 3 subjects"
    assert "1 for training, 1 for validation, 1 for testing (fold 0 of 3" in verdict[1]
    for path in sorted(folder.rglob("*_t2.nii.gz"))[1:3]:
        path.write_bytes(path.read_bytes()[:500])
    verdict = inspect_folder(folder, ["t1"], "t2").verdict
    assert "2 folds need at least 2 subjects" in verdict[1] and "--folds 1" in verdict[1] and len(verdict) == 2


def test_without_a_pair_there_is_no_verdict(cohort: Path) -> None:
    assert inspect_folder(cohort).verdict == inspect_folder(cohort, ["t1"]).verdict == ()


def test_a_pair_whose_grids_differ_is_named_by_both_files(tmp_path: Path) -> None:
    folder = write_brats(tmp_path / "cohort", 3)
    moved = min(folder.rglob("*_t2.nii.gz"))
    image = nib.load(moved)
    image.affine[0, 3] += 1.5
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine), moved)
    problem = next(one for one in inspect_folder(folder, ["t1"], "t2").problems if one.reason == "grid")
    assert moved.name.replace("_t2", "_t1") in problem.line and moved.name in problem.line


def test_a_scan_under_two_subjects_is_said_in_the_words_of_the_training_that_refuses_it(tmp_path: Path) -> None:
    folder = write_brats(tmp_path / "cohort", 4)
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())[:2]
    for name in ("t1", "t2"):
        shutil.copy(first / f"{first.name}_{name}.nii.gz", second / f"{second.name}_{name}.nii.gz")
    verdict = inspect_folder(folder, ["t1"], "t2").verdict
    assert len(verdict) == 2 and verdict[0].startswith("usable: 4 of 4 pairs")
    recipe = make_recipe("A7", "tiny", {"data.sources": ("t1",), "data.target": "t2"})
    with pytest.raises(CohortError) as refused:
        chiasm.plan(folder, recipe, tmp_path / "run", say=lambda _: None)
    assert refused.value.reason == "duplicate-voxels"
    assert refused.value.what in verdict[1] and str(refused.value.hint) in verdict[1]
