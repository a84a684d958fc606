"""A bad case among good ones: it is named, it takes no place in the split, and it changes nobody else's result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from chiasm.cli import main
from chiasm.cohorts.discovery import find_cohort
from chiasm.preparation.examination import examine_case
from chiasm.preparation.inspection import inspect_folder
from chiasm.recipe import Data
from conftest import QUICK
from synthetic_cohort import affine, pair, save

SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if not name.startswith("data.") or name == "data.patch"
]


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """A fault that changes the voxels of one file of a case."""

    def spoil(folder: Path) -> None:
        path = next(folder.glob(f"*_{name}.nii.gz"))
        image = nib.load(path)
        array = change(np.asanyarray(image.dataobj).copy())
        nib.save(nib.Nifti1Image(array, image.affine), path)

    return spoil


def two_voxels(array: np.ndarray) -> np.ndarray:
    few = np.zeros_like(array)
    few[10, 10, 5:7] = 50, 60
    return few


def one_value(array: np.ndarray) -> np.ndarray:
    return np.where(array == 0, 0, 7).astype(array.dtype)


def nearly_one_value(array: np.ndarray) -> np.ndarray:
    """All of the body but a corner: there is no interquartile range."""
    flat = one_value(array)
    flat[:9] = array[:9]
    return flat


def cut_short(folder: Path) -> None:
    path = next(folder.glob("*_t2.nii.gz"))
    path.write_bytes(path.read_bytes()[:2000])


FAULTS = {
    "two voxels in the source": changed("t1", two_voxels),
    "two voxels in the target": changed("t2", two_voxels),
    "one value in the source": changed("t1", one_value),
    "nearly one value in the target": changed("t2", nearly_one_value),
    "NaN in the target": changed("t2", lambda array: np.where(array > 100, np.nan, array).astype(np.float32)),
    "a slice less in the target": changed("t2", lambda array: array[..., :-1]),
    "a truncated target": cut_short,
}


def bad_case(folder: Path, fault: str, name: str, seed: int = 99) -> Path:
    """Write one more case into a cohort, of a patient of its own, with a fault."""
    source, target, labels = pair(seed)
    for kind, array in {"t1": source, "t2": target, "seg": labels}.items():
        save(folder / name / f"{name}_{kind}.nii.gz", array, affine())
    FAULTS[fault](folder / name)
    return folder


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_bad_case_is_seen_before_it_is_given_a_role(fault: str, tmp_path: Path) -> None:
    folder = bad_case(tmp_path / "data", fault, "Toy_0099")
    found = find_cohort(folder)
    examined = examine_case(found.cases[0], ["t1", "t2"], found.regions, Data())
    assert not examined.is_usable
    assert [problem.case for problem in examined.problems] == ["Toy_0099"]
    told = inspect_folder(folder, ["t1"], "t2").problems
    assert [problem.message for problem in told] == [problem.message for problem in examined.problems]


def test_a_good_case_is_examined_without_a_word(toy_cohort: Path) -> None:
    found = find_cohort(toy_cohort)
    case = found.cases[0]
    examined = examine_case(case, ["t1", "t2"], found.regions, Data())
    assert examined.is_usable and examined.problems == () and examined.case == case
    assert examined.facts is not None and examined.facts.samples.shape[0] == 2
    assert set(examined.images) == {"t1", "t2"} and examined.regions_ml


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_with_bad_cases_is_the_run_without_them_byte_for_byte(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = shutil.copytree(toy_cohort, tmp_path / "mixed")
    names = {fault: f"{('Before', 'Later')[number % 2]}_{number:04}" for number, fault in enumerate(FAULTS)}
    for seed, (fault, name) in enumerate(names.items(), start=50):
        bad_case(mixed, fault, name, seed)
    made = {}
    for data in (toy_cohort, mixed):
        run = tmp_path / f"run-{data.name}"
        words = ["train", data, "--source", "t1", "--target", "t2", "-o", run, "--size", "tiny", "--set", *SETTINGS]
        with pytest.raises(SystemExit) as done:
            main(list(map(str, words)))
        told = capsys.readouterr()
        assert done.value.code in ((0, None) if data == toy_cohort else (3,)), told.err
        made[data.name] = files_of(run / "model")
    assert [name for name in names.values() if f"case {name}" not in told.out + told.err] == []
    good, beside = made[toy_cohort.name], made["mixed"]
    assert good == beside
    assert set(json.loads(good["splits.json"])["cases"]) == {case.id for case in find_cohort(toy_cohort).cases}
