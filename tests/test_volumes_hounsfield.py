"""CT that is in Hounsfield units passes every verb; what lost its unit is refused, and an offset is corrected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from chiasm.cli import main
from chiasm.errors import VolumeError
from chiasm.prediction.manifest import read_manifest
from chiasm.storage import read_toml
from chiasm.volumes.hounsfield import check_hu
from conftest import QUICK
from synthetic_cohort import SHAPE, affine, save

Array = NDArray[np.floating]
SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in {**QUICK, "schedule.steps": 12}.items()
    if not name.startswith("data.") or name == "data.patch"
] + ["data.window_hu=[-1024, 1400]"]


def body(seed: int = 1) -> NDArray[np.bool_]:
    """An ellipsoid, for each seed of other sides, so that no two are taken for one scan."""
    sides = np.random.default_rng((seed, 9)).uniform(0.75, 1.1, 3)
    axes = np.meshgrid(*(np.linspace(-1.2, 1.2, n) / side for n, side in zip(SHAPE, sides)), indexing="ij")
    return np.asarray(sum(axis**2 for axis in axes) < 1)


def head(seed: int = 1) -> Array:
    """A head in whole Hounsfield units: brain and fat in a skull, in noisy air."""
    rng = np.random.default_rng(seed)
    inside = body(seed)
    brain = ndimage.binary_erosion(inside, iterations=2)
    skull = ndimage.binary_erosion(inside, iterations=1) & ~ndimage.binary_erosion(inside, iterations=2)
    skull[:, :28] = False  # of a thickness that a head of so few voxels can have
    texture = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2)
    tissue = 35 + 20 * texture / texture.std()
    hu = np.where(brain, tissue, np.where(skull, 900.0, np.where(inside, -90.0, -1000.0)))
    return np.asarray(np.rint(hu + rng.normal(0, 6, SHAPE)))


SOUND: dict[str, Callable[[Array], Array]] = {
    "as it was reconstructed": lambda hu: hu,
    "noisy": lambda hu: hu + np.random.default_rng(2).normal(0, 60, SHAPE),
    "clipped": lambda hu: np.clip(hu, -1000, 1000),
    "cut out on -3024": lambda hu: np.where(body(), hu, -3024),
    "cut out on -1000": lambda hu: np.where(body(), hu, -1000),
    "cut out on 0": lambda hu: np.where(body(), hu, 0),
    "inside the body": lambda hu: hu[10:-10, 10:-10, 3:-3],
}
SPOILT: dict[str, Callable[[Array], Array]] = {
    "HU + 1024": lambda hu: hu + 1024,
    "HU + 1024, air 0": lambda hu: np.where(body(), hu + 1024, 0),
    "HU + 1024, padded with -2000": lambda hu: np.where(body(), hu + 1024, -2000),
    "HU + 1000": lambda hu: hu + 1000,
    "a window of 8 bits": lambda hu: np.rint((np.clip(hu, -160, 240) + 160) / 400 * 255),
    "all of it in 8 bits": lambda hu: np.rint((np.clip(hu, -1024, 3071) + 1024) / 4095 * 255),
    "a window": lambda hu: np.clip(hu, -150, 250),
    "0 to 1": lambda hu: (np.clip(hu, -1000, 2000) + 1000) / 3000,
    "HU / 1000": lambda hu: hu / 1000,
    "z-scored": lambda hu: (hu - hu.mean()) / hu.std(),
    "16 bits": lambda hu: np.rint((hu + 1024) / 4095 * 65535),
}


@pytest.mark.parametrize("name", SOUND)
def test_hounsfield_units_are_accepted_whole_or_cut_out(name: str) -> None:
    check_hu(SOUND[name](head()).astype(np.float32))


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_in_hounsfield_units_is_refused_and_a_certain_offset_is_named(name: str) -> None:
    with pytest.raises(VolumeError, match="is not in Hounsfield units") as refusal:
        check_hu(SPOILT[name](head()).astype(np.float32))
    assert refusal.value.reason == "not-hu"
    corrected = f"data.ct_offset=-{name[5:9]} of plan and train" if name.startswith("HU + ") else "rescale slope"
    assert corrected in str(refusal.value)


def write_cohort(folder: Path, offset: float = 0.0, spoilt: int = 0, count: int = 5) -> Path:
    """SynthRAD's layout; the first `spoilt` cases are 8-bit windows."""
    for number in range(1, count + 1):
        place, hu = folder / "Task1" / "brain" / f"1BA{number:03d}", head(number)
        mr = np.where(hu > 500, 20, np.clip(hu + 100, 3, None)) + np.random.default_rng(number).normal(0, 1, SHAPE)
        ct = SPOILT["a window of 8 bits"](hu) if number <= spoilt else hu + offset
        save(place / "mr.nii.gz", mr.astype(np.float32), affine())
        save(place / "ct.nii.gz", ct.astype(np.int16), affine())
        save(place / "mask.nii.gz", body(number).astype(np.uint8), affine())
    return folder


def command(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(str(done.value.code))


def train_words(data: Path, run: Path, *settings: str) -> list[str | Path]:
    asked = [
        "--source",
        "mr",
        "--target",
        "ct",
        "-o",
        run,
        "--size",
        "tiny",
        "--method",
        "l2",
        "--set",
        *SETTINGS,
        *settings,
    ]
    return ["train", data, *asked]


def test_one_case_in_another_unit_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(write_cohort(tmp_path / "data", spoilt=1), tmp_path / "run")
    assert command("plan", *words[1:]) == 3
    told = " ".join("".join(capsys.readouterr()).split())
    assert "1BA001" in told and "is not in Hounsfield units" in told and "1BA002: " not in told
    assert "1BA001" not in read_toml(tmp_path / "run" / "plan.toml")["trained_on"]


def test_a_cohort_that_was_stored_with_an_offset_is_refused_and_with_the_setting_trains_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true, shifted = write_cohort(tmp_path / "true"), write_cohort(tmp_path / "shifted", 1024.0)
    assert command(*train_words(shifted, tmp_path / "refused")) == 2
    assert "data.ct_offset=-1024" in "".join("".join(capsys.readouterr()).split())
    assert command("inspect", shifted) == 3
    assert command(*train_words(true, tmp_path / "a")) == 0
    assert command(*train_words(shifted, tmp_path / "b", "data.ct_offset=-1024")) == 0
    weights = [[path.read_bytes() for path in sorted((tmp_path / run / "model").glob("*.safetensors"))] for run in "ab"]
    assert weights[0] and weights[0] == weights[1]
    for run, data in (("a", true), ("b", shifted)):
        made = tmp_path / f"made {run}"
        assert command("predict", tmp_path / run, data, "-o", made, "--only", "test") == 0
        assert command("evaluate", made, data, "-o", tmp_path / f"scores {run}") == 0
        entry = read_manifest(made).cases[0]
        assert nib.load(made / entry.image).get_fdata().min() >= -1024
    scores = [(tmp_path / f"scores {run}" / "evaluation.csv").read_text() for run in "ab"]
    assert scores[0] == scores[1]
    # a model that learned of true units refuses to be held against stored values
    capsys.readouterr()
    assert command("evaluate", tmp_path / "made a", shifted, "-o", tmp_path / "wrong") in (2, 3)
    assert "is not in Hounsfield units" in " ".join("".join(capsys.readouterr()).split())


def test_a_model_that_reads_ct_refuses_an_input_in_another_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_cohort(tmp_path / "data"), tmp_path / "run"
    words = ["--source", "ct", "--target", "mr", "-o", run, "--size", "tiny", "--method", "l2", "--set", *SETTINGS]
    assert command("train", data, *words) == 0
    other = write_cohort(tmp_path / "other", 1024.0, count=1)
    file = other / "Task1" / "brain" / "1BA001" / "ct.nii.gz"
    shutil.copy(file, tmp_path / "scan.nii.gz")
    assert command("predict", run, tmp_path / "scan.nii.gz", "-o", tmp_path / "out") in (2, 3)
    assert "is not in Hounsfield units" in " ".join("".join(capsys.readouterr()).split())
