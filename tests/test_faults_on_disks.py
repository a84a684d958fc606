"""Kills, full disks and folders that cannot be written: what is left disappears, and each is named once."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from chiasm.cli import main
from chiasm.errors import ChiasmError, RunError
from chiasm.methods import make_recipe
from chiasm.storage import whole_folder
from chiasm.studies.completion import complete
from chiasm.studies.jobs import find_cases, list_jobs
from chiasm.studies.study import run_study
from chiasm.studies.study_file import read_study
from chiasm.training.run import train
from conftest import QUICK
from full_disk import no_file_above


def exit_code(arguments: list[str | Path]) -> int:
    try:
        main([str(word) for word in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


#: Writes below `sys.argv[1]`, and is then killed in the middle, or waits to be.
WRITER = """
import os, signal, sys
from pathlib import Path
from chiasm.storage import whole_file, whole_folder
root = Path(sys.argv[1])
with whole_file(root / "model" / "weights.safetensors") as a, whole_file(root / "checkpoints" / "step.toml") as b:
    with whole_folder(root / "cache" / "case-1") as c, whole_folder(root / "model") as d, whole_file(root / "x") as e:
        for path in (a, b, c / "source.npy", d / "plan.toml", e):
            path.write_text("half")
        print("ready", flush=True)
        sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def write_half(root: Path, end: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def temporaries(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob(".chiasm-*")}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def again(data: Path, run: Path) -> None:
    train(data, make_recipe("A7", "tiny", QUICK), run, say=lambda _: None)


def test_leftovers_of_a_kill_disappear_at_the_next_start_and_those_of_the_living_stay(
    run: Path, toy_cohort: Path
) -> None:
    write_half(run, "die").communicate()
    left = temporaries(run)
    assert len(left) == 5
    living = write_half(run, "wait")
    again(toy_cohort, run)
    stay = temporaries(run)
    assert len(stay) == 5 and not stay & left
    living.kill()
    living.communicate()
    again(toy_cohort, run)
    assert temporaries(run) == set()


@pytest.mark.parametrize("machine", ["other-host", ""])
def test_leftovers_of_another_machine_disappear_when_they_are_an_hour_old(
    machine: str, run: Path, toy_cohort: Path
) -> None:
    old, new = (run / "cache" / f".chiasm-1@{machine}.new.{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (1, 1))
    again(toy_cohort, run)
    assert not old.exists() and new.exists()


def test_a_model_that_a_kill_left_half_replaced_comes_back(run: Path, toy_cohort: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    with pytest.raises(KeyboardInterrupt), whole_folder(run / "model"):
        raise KeyboardInterrupt
    (run / "model").rename(run / ".chiasm-old.model")
    volume = next(toy_cohort.rglob("*_t1.nii.gz"))
    assert exit_code(["predict", run, volume, "-o", run.parent / "out", "--accelerator", "cpu"]) == 0
    again(toy_cohort, run)
    assert {path.name: path.read_bytes() for path in (run / "model").iterdir()} == before
    assert temporaries(run) == set()


def test_half_written_baselines_never_ship(run: Path, toy_cohort: Path) -> None:
    names = {path.name for path in (run / "model").iterdir()}
    shutil.rmtree(run / "model")
    (run / "finished.json").unlink()
    (run / "baselines").mkdir()
    for left in (".chiasm-1@other.baselines.safetensors", ".4711.baselines.safetensors"):
        (run / "baselines" / left).write_text("half")
    again(toy_cohort, run)
    assert {path.name for path in (run / "model").iterdir()} == names and not (run / "baselines").exists()


def test_a_name_of_240_letters_can_be_written(tmp_path: Path) -> None:
    with whole_folder(tmp_path / ("a" * 240)) as fresh:
        assert fresh.name.endswith("a" * 100)


VERBS: dict[str, list[str]] = {
    "plan": ["DATA", "-o", "OUT", "--source", "t1", "--target", "t2"],
    "train": ["DATA", "-o", "OUT", "--source", "t1", "--target", "t2"],
    "predict": ["DATA", "DATA", "-o", "OUT"],
    "evaluate": ["DATA", "DATA", "-o", "OUT"],
    "study": ["DATA", "-o", "OUT"],
    "complete": ["DATA", "-o", "OUT", "--source", "t1", "--target", "t2"],
    "register": ["DATA", "DATA", "-o", "OUT"],
    "mumap": ["DATA", "-o", "OUT/mu.nii.gz"],
    "phantom": ["-o", "OUT"],
    "demo": ["-o", "OUT"],
    "serve": ["DATA", "--dicom-port", "0", "-o", "OUT"],
}


def refusal(verb: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a verb on data that are not there: whoever names the folder has not looked for them."""
    places = {"DATA": str(out.parent / "no-data"), "OUT": str(out), "OUT/mu.nii.gz": str(out / "mu.nii.gz")}
    assert exit_code([verb, *(places.get(word, word) for word in VERBS[verb])]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "no-data" not in told.err and not told.out
    return told.err


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "A part of this path is a file" in refusal(verb, tmp_path / "file" / "out", capsys)


@contextmanager
def mounted(place: Path, *how: str) -> Iterator[Path]:
    """Mount something for a moment, where that is permitted."""
    place.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *how, str(place)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: that needs root")
    try:
        yield place
    finally:
        gc.collect()  # a file that could not be closed is open as long as its error is known
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("inside", ["", "new"])
def test_a_read_only_disk_is_refused_before_any_work(
    verb: str, inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        assert "mounted read-only: choose another folder" in refusal(verb, disk / inside, capsys)


@pytest.mark.parametrize("verb", ["plan", "train", "predict", "study", "mumap"])
def test_a_disk_that_is_full_already_is_refused_before_any_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16k", "tmpfs") as disk:
        (disk / "file").write_bytes(bytes(16384))
        told = refusal(verb, disk, capsys)
        assert "0 MiB free" in told and "The disk is full: free some space" in told


def test_a_full_disk_stops_a_prediction_once_and_the_same_command_goes_on(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["predict", finished_run, toy_cohort, "-o", tmp_path / "out", "--accelerator", "cpu"]
    with no_file_above(12_000):
        assert exit_code(asked) == 2
    told = capsys.readouterr().err
    assert told.count("cannot be written") == told.count("MiB free") == 1 and "Toy_0001" in told
    assert temporaries(tmp_path) == set()
    assert exit_code(asked) == 0
    assert len(list((tmp_path / "out").glob("*_t2.nii.gz"))) == 6


def test_a_full_disk_stops_a_training_with_its_free_space_and_the_same_command_goes_on(
    finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    for size in (3_000, 30_000, 100_000):  # at the plan, in the cache, at a checkpoint
        with no_file_above(size), pytest.raises(ChiasmError, match=r"cannot be written.*MiB free.*choose another"):
            again(toy_cohort, tmp_path / "run")
        assert temporaries(tmp_path) == set()
    again(toy_cohort, tmp_path / "run")
    for path in (finished_run / "model").iterdir():
        assert (tmp_path / "run" / "model" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["torch", "onnx", "openvino"])
def test_a_full_disk_stops_an_export_once(
    form: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    with no_file_above(10_000):  # at which torch's own writing would end the whole process
        assert exit_code(["export", finished_run, "-o", tmp_path / "out", "--to", form]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "MiB free" in told and f"{tmp_path}/out/model." in told
    assert not (tmp_path / "out").exists()


STUDY = """
source = ["t1"]
target = "t2"
arms = ["A0", "A1"]
folds = 2
steps = 2
size = "tiny"
set = ["data.patch=32", "generator.widths=[4, 8]", "training.batch=2", "training.validations=1",
       "training.accelerator=cpu"]
"""


def test_a_full_disk_stops_a_study_once(toy_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(f'data = "{toy_cohort}"\n{STUDY}')
    study = read_study(tmp_path / "study.toml")
    assert len(list_jobs(study, tmp_path / "out", find_cases(study, tmp_path / "out"))) == 4 * 1 + 2
    said: list[str] = []
    with no_file_above(3_000), pytest.raises(ChiasmError, match=r"cannot be written.*MiB free") as refused:
        run_study(tmp_path / "study.toml", tmp_path / "out", say=said.append)
    assert refused.value.reason == "unwritable" and not any("failed" in line for line in said)


@pytest.mark.slow
def test_damaged_notes_of_a_study_stop_neither_it_nor_its_report(toy_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(f'data = "{toy_cohort}"\n{STUDY}'.replace('"A0", ', ""))
    done = run_study(tmp_path / "study.toml", tmp_path / "out", say=lambda _: None)
    figures = (tmp_path / "out" / "evaluation.csv").read_bytes()
    arms = [folder for folder in sorted((tmp_path / "out" / "jobs").iterdir()) if (folder / "model").exists()]
    (arms[0] / "done.json").write_text("[]")
    (arms[1] / "done.json").write_bytes(b'{"training_seconds": \xff')
    for folder in arms:
        (folder / "environment.json").write_text("[1]")
        (folder / "log.jsonl").write_bytes(b'17\n{"kind": "warning", "step": 1}\n{"kind": \xff')
    again = run_study(tmp_path / "study.toml", tmp_path / "out", say=lambda _: None)
    assert again.rows == done.rows and not again.failed
    assert (tmp_path / "out" / "evaluation.csv").read_bytes() == figures


def test_a_study_and_a_completion_replace_no_file_of_the_user(toy_cohort: Path, tmp_path: Path) -> None:
    data = shutil.copytree(toy_cohort, tmp_path / "data")
    for case in sorted(data.iterdir())[4:]:
        next(case.glob("*_t2.nii.gz")).unlink()
    (tmp_path / "study.toml").write_text(f'data = "{data}"\n{STUDY}')
    for name in ("findings.md", "plots/trade-off.svg", "figures/plane.svg", "evaluation.csv", "study.json"):
        own = tmp_path / name.replace("/", "-") / name
        own.parent.mkdir(parents=True)
        own.write_text('{"title": "of the user"}')
        with pytest.raises(RunError, match=rf"holds {name}, which was not written by chiasm"):
            run_study(tmp_path / "study.toml", tmp_path / name.replace("/", "-"), say=lambda _: None)
        assert own.read_text() == '{"title": "of the user"}'
    for ask in (
        lambda out: run_study(tmp_path / "study.toml", out, say=lambda _: None),
        lambda out: complete(data, make_recipe("A1", "tiny", QUICK), out, say=lambda _: None),
    ):
        with pytest.raises(RunError, match="is the folder of the data"):
            ask(data)
    inside = tmp_path / "out" / "cohort"
    shutil.copytree(data, inside)
    before = {path: path.read_bytes() for path in inside.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="belongs to the data, and the completion would replace it"):
        complete(inside, make_recipe("A1", "tiny", QUICK), tmp_path / "out", say=lambda _: None)
    with pytest.raises(RunError, match="not written by chiasm"):
        complete(data, make_recipe("A1", "tiny", QUICK), tmp_path / "out", say=lambda _: None)
    assert {path: path.read_bytes() for path in tmp_path.joinpath("out").rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:Exception ignored in. <gzip:pytest.PytestUnraisableExceptionWarning")  # nibabel's
def test_numpy_that_says_not_why_it_wrote_less_is_told_as_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        with pytest.raises(ChiasmError, match=r"0 MiB free.*The disk is full"), whole_folder(disk / "case") as fresh:
            np.save(fresh / "a.npy", np.zeros(20_000))
        assert not list(disk.iterdir())
        with pytest.raises(ChiasmError, match=r"0 MiB free.*The disk is full"), whole_folder(disk / "case") as fresh:
            noise = np.random.default_rng(0).normal(size=(30, 30, 30))
            nib.save(nib.Nifti1Image(noise, np.eye(4)), fresh / "a.nii.gz")
