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
from chiasm.hounsfield import check_hu, with_offset
from chiasm.prediction.manifest import read_manifest
from chiasm.storage import read_toml
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
    "no whole numbers": lambda hu: hu + 0.25,
    "cut out on -2000": lambda hu: np.where(body(), hu, -2000),
    "cut out on 3071": lambda hu: np.where(body(), hu, 3071),
    "with a couch, in two paddings": lambda hu: np.pad(
        np.where(np.indices(SHAPE)[1] == 1, -150, hu), ((3, 3), (3, 3), (0, 0)), constant_values=-3024
    ),
    "its top": lambda hu: hu[:, :, -9:-3],
    "with contrast agent": lambda hu: np.where((hu > 20) & (hu < 30), 300, hu),
    "a brain alone": lambda hu: np.where((hu > 0) & (hu < 80) & body(), hu, 0),
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
    "HU - 1024": lambda hu: hu - 1024,
    "HU - 1000": lambda hu: hu - 1000,
    "a brain's window on -1024": lambda hu: np.where(body(), np.clip(hu, 0, 80), -1024),
    "a brain's window on -1000": lambda hu: np.where(body(), np.clip(hu, 0, 80), -1000),
    "a brain's window": lambda hu: np.clip(hu, 0, 80),
    "HU x 10": lambda hu: hu * 10,
    "HU x 0.5": lambda hu: hu * 0.5,
    "HU x -1": lambda hu: -hu,
}


def thorax(lung: float = -850.0) -> Array:
    """Skin, muscle, a spine and two lungs, in noisy air."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (60, 50, 30)), indexing="ij")
    hu = np.where((x / 0.85) ** 2 + (y / 0.8) ** 2 < 1, -100.0, -1000.0)
    hu[(x / 0.78) ** 2 + (y / 0.72) ** 2 < 1] = 50
    hu[((np.abs(x) - 0.38) / 0.28) ** 2 + (y / 0.55) ** 2 + (z / 0.95) ** 2 < 1] = lung
    hu[(x / 0.1) ** 2 + ((y + 0.5) / 0.12) ** 2 < 1] = 500
    return np.asarray(np.rint(hu + np.random.default_rng(5).normal(0, 15, hu.shape)))


@pytest.mark.parametrize("name", SOUND)
def test_hounsfield_units_are_accepted_whole_or_cut_out(name: str) -> None:
    check_hu(SOUND[name](head()).astype(np.float32))


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_in_hounsfield_units_is_refused_and_a_certain_offset_is_named(name: str) -> None:
    with pytest.raises(VolumeError, match="is not in Hounsfield units") as refusal:
        check_hu(SPOILT[name](head()).astype(np.float32))
    assert refusal.value.reason == "not-hu"
    sign = {"HU + ": "-", "HU - ": ""}.get(name[:5])
    corrected = "It does not look like CT" if sign is None else f"data.ct_offset={sign}{name[5:9]} of plan and train"
    assert corrected in str(refusal.value)


@pytest.mark.parametrize("lung", [-940.0, -850.0, -600.0])
def test_a_thorax_is_accepted_whole_cut_out_and_inside_and_refused_with_the_intercept_taken_off_twice(
    lung: float,
) -> None:
    hu = thorax(lung)
    for sound in (hu, np.where(hu > -980, hu, -2048), np.where(hu < -970, 0, hu), hu[15:-15, 12:-12]):
        check_hu(sound.astype(np.float32))
    lungs = np.where((hu < -500) & (hu > -985) & (ndimage.binary_fill_holes(hu > -300)), hu, -1024)
    if lung > -900:
        check_hu(lungs.astype(np.float32))
    for spoilt in (hu - 1024, np.maximum(hu - 1024, -1024), hu * 0.5, hu * 10, -hu):
        with pytest.raises(VolumeError, match="is not in Hounsfield units"):
            check_hu(spoilt.astype(np.float32))


def test_the_ct_of_simulated_patients_is_accepted_and_their_mr_is_not_and_no_offset_is_named_for_it() -> None:
    from chiasm.simulation.patient import DIFFICULTIES, draw_subject

    subject = draw_subject(2, 1, heads=None, spacing_mm=4.0, difficulty=DIFFICULTIES["standard"])
    ct = subject.images["ct"]
    check_hu(ct)
    for twice in (ct - 1024, np.maximum(ct - 1024, -1024), np.where(ct > -900, ct - 1024, -2048)):
        with pytest.raises(VolumeError, match="is not in Hounsfield units"):
            check_hu(twice.astype(np.float32))
    for name in ("t1", "t2", "flair"):
        mr = subject.images[name]
        for spoilt in (mr, mr * 3, mr * 10, mr * 30, mr - mr.mean(), 3 * (mr - mr.mean())):
            with pytest.raises(VolumeError, match="It does not look like CT"):
                check_hu(spoilt.astype(np.float32))


def test_an_offset_is_added_only_where_it_makes_hounsfield_units() -> None:
    hu = head().astype(np.float32)
    np.testing.assert_array_equal(with_offset(hu, -1024), hu)  # right as it is
    np.testing.assert_array_equal(with_offset(hu + 1024, -1024), hu)
    np.testing.assert_array_equal(with_offset(hu - 1024, 1024), hu)
    np.testing.assert_array_equal(with_offset(hu, 10), hu + 10)  # both are possible: what was asked for is done
    with pytest.raises(VolumeError, match=r"data\.ct_offset=-1024, which was asked for, does not help"):
        with_offset(SPOILT["0 to 1"](hu).astype(np.float32), -1024)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_cohort_of_which_one_case_is_stored_with_an_offset_trains_the_same_model_and_can_be_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true, mixed = write_cohort(tmp_path / "true"), write_cohort(tmp_path / "mixed")
    shifted = write_cohort(tmp_path / "shifted", 1024.0) / "Task1" / "brain" / "1BA001" / "ct.nii.gz"
    shutil.copy(shifted, mixed / "Task1" / "brain" / "1BA001" / "ct.nii.gz")
    assert command(*train_words(true, tmp_path / "a")) == 0
    assert command(*train_words(mixed, tmp_path / "b", "data.ct_offset=-1024")) == 0
    weights = [[path.read_bytes() for path in sorted((tmp_path / run / "model").glob("*.safetensors"))] for run in "ab"]
    assert weights[0] and weights[0] == weights[1]
    assert command("predict", tmp_path / "b", true, "-o", tmp_path / "made", "--only", "test") == 0
    capsys.readouterr()
    scores = []
    for number, reference in enumerate((true, mixed, tmp_path / "shifted")):
        assert command("evaluate", tmp_path / "made", reference, "-o", tmp_path / f"scores {number}") == 0
        scores.append((tmp_path / f"scores {number}" / "evaluation.csv").read_text())
    assert scores[0] == scores[1] == scores[2]


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
