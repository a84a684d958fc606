"""Files whose headers leave a question open: every verb refuses them, and takes them where an option answers it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from chiasm.cli import main
from chiasm.preparation.plan import read_plan
from chiasm.volumes import Reading, read_volume
from conftest import QUICK
from synthetic_cohort import write_brats

SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if not name.startswith("data.") or name == "data.patch"
]
Change = Callable[[nib.Nifti1Image], None]


def here(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Run the command in this process, and return its exit code and all that it printed."""
    with pytest.raises(SystemExit) as done:
        main(list(map(str, words)))
    told = capsys.readouterr()
    return int(done.value.code or 0), told.out + told.err


def two_forms(image: nib.Nifti1Image) -> None:
    """The qform lies 5 mm from the sform: in ACDC, and after tools that change one of both."""
    moved = image.affine.copy()
    moved[:3, 3] += 5
    image.set_sform(image.affine, code=1)
    image.set_qform(moved, code=1)


def no_form(image: nib.Nifti1Image) -> None:
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)


def sheared(image: nib.Nifti1Image) -> None:
    """Axes that lean by 3 degrees, as those of some images of TotalSegmentator."""
    leaning = image.affine.copy()
    leaning[:3, 2] += np.tan(np.radians(3)) * np.linalg.norm(leaning[:3, 2]) * leaning[:3, 0]
    image.set_sform(leaning, code=1)
    image.set_qform(None, code=0)


OPEN = {
    "two-forms": (two_forms, ["--form", "sform"], Reading(form="sform")),
    "no-orientation": (no_form, ["--assume-ras"], Reading(assume_ras=True)),
    "skew": (sheared, ["--resample"], Reading(resample=True)),
}


def write_open(folder: Path, change: Change, cases: int = 4) -> Path:
    """A cohort all of whose files, labels too, leave the same question open."""
    write_brats(folder, cases)
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
        change(image)
        nib.save(image, path)
    return folder


@pytest.mark.parametrize("reason", list(OPEN))
def test_a_cohort_with_an_open_question_is_refused_with_the_option_that_answers_it(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, option, reading = OPEN[reason]
    data = write_open(tmp_path / "data", change)
    pair = ("--source", "t1", "--target", "t2")
    code, told = here(capsys, "inspect", data, *pair)
    assert code == 3 and option[0] in told
    code, told = here(capsys, "plan", data, *pair, "-o", tmp_path / "refused")
    assert code == 2 and option[0] in told
    assert here(capsys, "inspect", data, *pair, *option)[0] == 0
    answered = ["plan", data, *pair, "--size", "tiny", "--set", *SETTINGS, "-o", tmp_path / "run"]
    assert here(capsys, *answered, *option)[0] == 0
    assert read_plan(tmp_path / "run" / "plan.toml").reading == reading
    code, told = here(capsys, *answered)  # the folder is one of another recipe
    assert code == 2 and "data." in told


def test_cohort_json_answers_for_all_verbs_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_open(tmp_path / "data", no_form)
    (data / "cohort.json").write_text(json.dumps({"reading": {"assume_ras": True}}))
    assert here(capsys, "inspect", data)[0] == 0
    (data / "cohort.json").write_text(json.dumps({"reading": {"assume_lps": True}}))
    code, told = here(capsys, "inspect", data)
    assert code == 2 and "assume_ras" in told


def test_what_was_assumed_in_training_is_assumed_in_prediction_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, made = write_open(tmp_path / "data", two_forms), tmp_path / "run", tmp_path / "made"
    asked = ["--source", "t1", "--target", "t2", "--size", "tiny", "--set", *SETTINGS, "-o", run, "--form", "qform"]
    assert here(capsys, "train", data, *asked)[0] == 0
    code, told = here(capsys, "predict", run, data, "-o", made, "--only", "test")
    assert code == 0, told
    name = json.loads((made / "predictions.json").read_text())["cases"][0]["case"]
    source = next(data.rglob(f"{name}_t1.nii.gz"))
    believed = read_volume(source, reading=Reading(form="qform")).geometry
    image = read_volume(made / f"{name}_t2.nii.gz")  # what was believed is written, and leaves no question open
    np.testing.assert_allclose(image.geometry.affine, believed.affine, atol=1e-5)
    code, told = here(capsys, "evaluate", made, data, "-o", tmp_path / "scored")
    assert code == 0, told
    assert here(capsys, "report", tmp_path / "scored")[0] == 0


@pytest.mark.parametrize("verb", ["mumap", "register"])
def test_single_files_are_read_by_the_same_options(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        body = np.full((24, 24, 24), -1000.0, np.float32)
        body[6:18, 6:18, 6:18] = rng.normal(40, 20, (12, 12, 12))
        image = nib.Nifti1Image(body, np.eye(4) * [2, 2, 2, 1])
        sheared(image)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    first, second = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    words = {
        "mumap": ["mumap", first, "-o", tmp_path / "mu.nii.gz"],
        "register": ["register", first, second, "--kind", "rigid", "-o", tmp_path / "out"],
    }[verb]
    code, told = here(capsys, *words)
    assert code == 2 and "--resample" in told
    code, told = here(capsys, *words, "--resample")
    assert code == 0, told


def test_an_unknown_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = here(capsys, "inspect", tmp_path, "--form", "tform")
    assert code == 2 and re.search("sform.*qform", told)
