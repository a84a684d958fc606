"""Files of a run that were changed, cut or left behind: refused, made anew or harmless, through the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chiasm.checksums import content_hash, sha256_of
from chiasm.cli import main
from chiasm.methods import make_recipe
from chiasm.reports.curves import describe_health, draw_curves, logged_warnings, read_history
from chiasm.training.run import train
from conftest import QUICK

ASKED = [
    "--method",
    "dual-attention",
    *("--source", "t1", "--target", "t2", "--size", "tiny", "--folds", "3", "--steps", "24", "--accelerator", "cpu"),
    *("--set", "data.patch=32", "generator.widths=[4,8]", "discriminators.global_widths=[4,8]"),
    *("discriminators.local_widths=[4,4,4]", "training.batch=2", "training.validations=3"),
]


def command(verb: str, data: Path, out: Path) -> int:
    """Run the command that made `finished_run`; return its exit code."""
    given = ASKED[: ASKED.index("--accelerator")] + ASKED[ASKED.index("--set") :] if verb == "plan" else ASKED
    own = ["training.accelerator=cpu"] if verb == "plan" else []
    try:
        main([verb, str(data), "-o", str(out), *given, *own])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def model_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "model").iterdir())}


def flip(path: Path, at: int | None = None) -> None:
    """Flip a bit in place and give the file its time of last change back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2 if at is None else at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path / "run")


def unfinished(run: Path) -> Path:
    """Take the model away, as if the run had been killed before its last act."""
    shutil.rmtree(run / "model")
    (run / "finished.json").unlink()
    return run


def test_a_finished_run_ends_at_once_and_opens_no_cache(
    run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model_of(run)
    shutil.rmtree(run / "cache")
    assert command("train", toy_cohort, run) == 0
    assert "finished already" in capsys.readouterr().out
    assert model_of(run) == before and not (run / "cache").exists()


def test_a_finished_run_is_found_without_torch_and_only_while_it_would_be_taken(run: Path, toy_cohort: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom chiasm.recipe import read_recipe\n"
        "from chiasm.training.run_planning import find_finished_run\n"
        "data, folder = map(Path, sys.argv[1:])\n"
        "recipe = read_recipe(folder / 'recipe.toml')\n"
        "other = recipe.model_copy(update={'size': 'large'})\n"
        "assert find_finished_run(data, other, folder, None, None, print) is None\n"
        "run = find_finished_run(data, recipe, folder, None, None, print)\n"
        "assert run.folder == folder and run.split.train and 'torch' not in sys.modules\n"
        "next((folder / 'model').glob('*.safetensors')).write_bytes(b'0')\n"
        "assert find_finished_run(data, recipe, folder, None, None, print) is None\n"
    )
    done = subprocess.run([sys.executable, "-c", program, toy_cohort, run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"finished already: {run / 'model'}\n"


def test_a_finished_run_tells_again_what_it_left_out(toy_cohort: Path, tmp_path: Path) -> None:
    data = shutil.copytree(toy_cohort, tmp_path / "data")
    bad = data / "Toy_0003" / "Toy_0003_t1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:200])
    asked = make_recipe("A1", "tiny", {**QUICK, "schedule.steps": 2, "training.validations": 1})
    first, again = (train(data, asked, tmp_path / "run", say=lambda _: None) for _ in range(2))
    assert first.problems and again.problems == first.problems and again.split == first.split


def test_the_model_of_a_finished_run_is_named_and_written_anew_where_it_is_damaged(
    run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model_of(run)
    flip(run / "model" / "weights.safetensors")
    assert command("train", toy_cohort, run) == 0
    assert re.search(r"weights\.safetensors: .*changed.*; the model is written anew", capsys.readouterr().out)
    assert model_of(run) == before


SETTINGS = ("plan.toml", "splits.json", "recipe.toml")


def parsed(content: bytes) -> object:
    """Read TOML; None where it is none any more."""
    try:
        return tomllib.loads(content.decode())
    except tomllib.TOMLDecodeError:
        return None


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_of_a_run_is_refused_with_its_file(
    name: str, verb: str, run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / name).read_text()
    numbers = [match.start() for match in re.finditer(r"[0-9]", text)]
    rng = np.random.default_rng(0)
    for place in rng.choice(numbers, size=6, replace=False):
        before = (run / name).read_bytes()
        flip(run / name, int(place))
        if name.endswith(".toml") and parsed((run / name).read_bytes()) == parsed(before):
            continue  # the 17th digit of a number that needs but 16
        assert command(verb, toy_cohort, run) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, error
        (run / name).write_bytes(before)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"1", b"\xff\xfe", b"checksum = 1\n", b"seal = 1\n", b'{"checksum": 1, "train": 2}']
)
def test_a_setting_that_holds_something_else_is_refused_in_one_sentence(
    name: str, content: bytes, run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_bytes(content)
    assert command("train", toy_cohort, run) == 2
    error = capsys.readouterr().err
    assert name in error or "recipe" in error
    assert error.count("\n") == 1


def test_a_run_of_a_time_without_seals_is_still_read(run: Path, toy_cohort: Path) -> None:
    before = model_of(run)
    for name in ("plan.toml", "recipe.toml"):
        (run / name).write_text(re.sub(r"checksum = .*\n", "", (run / name).read_text()))
    splits = json.loads((run / "splits.json").read_text())
    del splits["checksum"]
    (run / "splits.json").write_text(json.dumps(splits))
    unfinished(run)
    assert command("train", toy_cohort, run) == 0
    assert model_of(run) == before


def _list(folder: Path) -> None:
    (folder / "grid.json").write_text("[1, 2]")


def _no_checksums(folder: Path) -> None:
    grid = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps({"shape": grid["shape"], "affine": grid["affine"]}))


def _other_shape(folder: Path) -> None:
    np.save(folder / "source.npy", np.zeros((1, 3, 4, 5), np.float32))


def _other_type(folder: Path) -> None:
    np.save(folder / "target.npy", np.load(folder / "target.npy").astype(np.float64))


DAMAGES: list[Callable[[Path], None]] = [
    lambda folder: flip(folder / "source.npy"),
    lambda folder: flip(folder / "mask.npy", -1 + (folder / "mask.npy").stat().st_size),
    lambda folder: flip(folder / "grid.json"),
    *(_list, _no_checksums, _other_shape, _other_type),
]


@pytest.mark.parametrize("first", range(0, len(DAMAGES), 3))
def test_damaged_parts_of_the_cache_are_made_anew_and_named(
    first: int, run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model_of(run)
    folders = sorted((run / "cache").iterdir())
    whole = {path: sha256_of(path) for path in (run / "cache").rglob("*") if path.is_file()}
    damages = DAMAGES[first : first + 3]
    for folder, damage in zip(folders, damages):
        damage(folder)
    assert command("train", toy_cohort, unfinished(run)) == 0
    told = capsys.readouterr().out
    assert told.count("made anew") == len(damages)
    for folder, _ in zip(folders, damages):
        assert folder.name.rpartition("-")[0] in told
    assert {path: sha256_of(path) for path in (run / "cache").rglob("*") if path.is_file()} == whole
    assert model_of(run) == before


def test_a_file_is_hashed_again_when_it_changed_even_with_its_old_time(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    path.write_bytes(bytes(1000))
    first = content_hash(path)
    flip(path)
    assert content_hash(path) == sha256_of(path) != first


def test_all_checkpoints_damaged_means_training_anew_with_the_same_result(
    run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model_of(run)
    for path in (run / "checkpoints").iterdir():
        flip(path)
    assert command("train", toy_cohort, unfinished(run)) == 0
    assert capsys.readouterr().out.count("passed over; there is no older one") == 2
    assert model_of(run) == before


LINES = [b'{"kind": "st\xffep", "step": 3}', b"17", b"[]", b'"step"', b'{"kind": "step", "step": "three"}', b"{}"]
LINES += [b'{"kind": "warning", "step": 4}', b'{"step": 4}', b"1" * 5000, b"[" * 100_000, b'{"kind": "step", "st']


def test_a_log_with_damaged_lines_neither_stops_a_run_nor_its_report(
    run: Path, toy_cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "log.jsonl"
    before = log.read_bytes()
    log.write_bytes(before[: len(before) // 3] + b"\n" + b"\n".join(LINES) + b"\n" + before[len(before) // 3 :])
    assert len(draw_curves(read_history(log))) > 2  # as chiasm evaluate does
    assert command("train", toy_cohort, unfinished(run)) == 0
    assert f"{len(LINES) + 2} damaged lines" in capsys.readouterr().out
    kept = log.read_bytes().splitlines()
    assert len(kept) == len(before.splitlines()) - 1 and set(kept) < set(before.splitlines())


def test_figures_of_a_log_that_are_none_are_not_drawn(tmp_path: Path) -> None:
    odd = ['"x"', "null", "true", "NaN", "[1]", "1" * 400, "1e999"]
    shown = enumerate([*odd, "0.5", "0.25"])
    lines = [f'{{"kind": "validation", "step": {n}, "mae": {value}, "spearman": {value}}}' for n, value in shown]
    lines += [f'{{"kind": "step", "step": 1, "attention_strength": {v}, "accuracy_local": {v}}}' for v in (*odd, "0.5")]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path / "log.jsonl")
    (drawn, _) = draw_curves(history)
    assert "from 0.5" in drawn["svg"] and "to 0.25" in drawn["svg"]
    assert describe_health(history) and not logged_warnings(history)


def test_equal_seeds_make_equal_models_to_the_byte_wherever_they_are_trained(
    finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(toy_cohort, tmp_path / "elsewhere" / "cohort")
    assert command("train", data, tmp_path / "run") == 0
    assert model_of(tmp_path / "run") == model_of(finished_run)


def test_another_seed_makes_another_model(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    other = make_recipe("A7", "tiny", {**QUICK, "training.seed": 1, "schedule.steps": 24})
    train(toy_cohort, other, tmp_path / "run", say=lambda _: None)
    a, b = model_of(finished_run), model_of(tmp_path / "run")
    assert a.keys() == b.keys() and {name for name in a if a[name] != b[name]} == {
        *("model.toml", "recipe.toml", "weights.safetensors", "calibration.json")
    }
