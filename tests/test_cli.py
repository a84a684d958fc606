"""The command as a user meets it: exit codes, one sentence for each mistake, every verb documented."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from chiasm import __version__ as chiasm_version
from chiasm.cli import main, make_app
from chiasm.evaluation.predictions import score_folder
from chiasm.locks import locked
from chiasm.preparation.degradation import Degradation, degrade, simulated, thin_grid
from chiasm.volumes import read_volume, write_volume
from conftest import QUICK
from synthetic_cohort import forget_digests, write_brats

PROJECT = Path(__file__).parents[1]
SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if not name.startswith("data.") or name == "data.patch"
]


def chiasm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "chiasm.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def here(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, where torch is loaded already."""
    given = list(map(str, words))
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as done:
        main(given)
    return subprocess.CompletedProcess(given, int(done.value.code or 0), out.getvalue(), err.getvalue())


def verbs() -> list[str]:
    return [command.name or command.callback.__name__ for command in make_app().registered_commands if command.callback]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "NOWHERE"], "does not exist"),
        (["plan", "DATA", "--source", "t1", "--target", "pet", "-o", "OUT"], "pet"),
        (["train", "DATA", "--source", "t1", "--target", "t1", "-o", "OUT"], "also a source"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--method", "A77"], "A7"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--size", "huge"], "tiny"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--folds", "40"], "folds"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--set", "loss.norm=l3"], "loss.norm"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--set", "los.norm=l1"], "los"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--accelerator", "abacus"], "abacus"),
        (["train", "DATA", "--source", "t1", "t1", "--target", "t2", "-o", "OUT"], "twice"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "/proc/x"], "/proc/x"),
        (["train", "DATA", "--source", "t1", "-o", "OUT"], "--target is missing"),
        (["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT", "--factor", "4"], "super-resolution"),
        (["plan", "DATA", "--source", "t1", "--task", "super-resolution", "-o", "OUT", "--factor", "1"], "data.factor"),
        (["plan", "DATA", "--source", "t1", "--task", "super-resolution", "-o", "OUT", "--axis", "x"], "data.axis"),
        (["plan", "DATA", "--source", "t1", "--task", "sharpening", "-o", "OUT", "--target", "t1"], "data.task"),
        (["plan", "DATA", "--source", "t1", "--task", "super-resolution", "-o", "OUT", "--factor", "9"], "at least 19"),
        (["predict", "DATA", "DATA", "-o", "OUT"], "holds no model"),
        (["evaluate", "DATA", "DATA", "-o", "OUT"], "predictions.json"),
        (["rate", "DATA", "DATA", "-o", "OUT"], "predictions.json"),
        (["rate", "DATA", "--read", "DATA", "-o", "OUT"], "exclude each other"),
        (["rate", "--read", "NOWHERE", "-o", "OUT"], "holds no key.csv"),
        (["demo", "--task", "pet-ct", "-o", "OUT"], "t1-t2"),
        (["phantom", "-o", "OUT", "--subjects", "0"], "subject"),
        (["finetune", "DATA", "DATA", "-o", "OUT"], "holds no model"),
        (["bids", "DATA", "OUT", "participant", "--run", "DATA"], "is not BIDS"),
        (["convert", "DATA", "--to", "dicom", "-o", "OUT"], "konfai"),
        (["export", "DATA", "--to", "onnx", "-o", "OUT"], "holds no model"),
        (["view", "NOWHERE", "-o", "OUT"], "does not exist"),
        (["models", "DATA"], "neither a training nor an evaluation"),
        (["explain", "DATA"], "neither a training nor an evaluation"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_exit_2_with_nothing_half_written(
    words: list[str], told: str, toy_cohort: Path, tmp_path: Path
) -> None:
    places = {"DATA": str(toy_cohort), "NOWHERE": str(tmp_path / "nowhere"), "OUT": str(tmp_path / "out")}
    done = here(*(places.get(word, word) for word in words))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and told in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


BUSY = [
    ["plan", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT"],
    ["train", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT"],
    ["complete", "DATA", "--source", "t1", "--target", "t2", "-o", "OUT"],
    ["predict", "DATA", "DATA", "-o", "OUT"],
    ["serve", "DATA", "--dicom-port", "0", "-o", "OUT"],
    ["evaluate", "DATA", "DATA", "-o", "OUT"],
    ["rate", "DATA", "DATA", "-o", "OUT"],
    ["study", "STUDY", "-o", "OUT"],
    ["report", "OUT"],
    ["register", "DATA", "DATA", "-o", "OUT"],
    ["phantom", "-o", "OUT"],
]


@pytest.mark.parametrize("words", BUSY, ids=[words[0] for words in BUSY])
def test_a_folder_that_another_command_writes_to_is_refused(
    words: list[str], toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DATA": str(toy_cohort), "OUT": str(tmp_path / "out"), "STUDY": str(tmp_path / "study.toml")}
    (tmp_path / "study.toml").write_text(
        f'data = "{toy_cohort}"\nsource = ["t1"]\ntarget = "t2"\narms = ["A1"]\nfolds = 2'
    )
    with locked(tmp_path / "out"), pytest.raises(SystemExit) as done:
        main([places.get(word, word) for word in words])
    told = capsys.readouterr().err
    assert done.value.code == 2 and f"pid {os.getpid()} on {socket.gethostname()}" in told and "-o" in told
    assert not (tmp_path / "out").exists()  # nothing was written, and the empty folder is gone with its lock


def test_a_busy_folder_is_refused_before_torch_is_loaded(toy_cohort: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom chiasm.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    words = ["predict", str(toy_cohort), str(toy_cohort), "-o", str(tmp_path / "out")]
    with locked(tmp_path / "out"):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "is in use by another chiasm" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_thick_slices_of_one_modality_come_back_thin_by_the_same_verbs(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 4)
    for path in data.rglob("*_t2.nii.gz"):
        path.unlink()  # one modality is enough
    run, made = tmp_path / "run", tmp_path / "made"
    task = ["--source", "t1", "--task", "super-resolution", "--factor", "3", "--axis", "j", "--size", "tiny"]
    asked = [*task, "--folds", "3", "-o", run, "--set", *(one for one in SETTINGS if "split.folds" not in one)]
    assert here("train", data, *asked).returncode == 0
    done = here("plan", data, *asked)
    assert done.returncode == 0
    assert "coronal slices of 3 mm" in done.stdout and "become slices of 1 mm" in done.stdout
    done = here("predict", run, data, "-o", made, "--only", "test")
    assert done.returncode == 3 and "--degrade" in done.stdout + done.stderr
    assert here("predict", run, data, "-o", made, "--only", "test", "--degrade").returncode == 0

    for path in made.glob("*_t1.nii.gz"):  # had the network changed nothing, it would score as the spline does
        shown = simulated([read_volume(data / path.name[:8] / path.name)], Degradation(3, "J"))[0]
        write_volume(path, shown.array, shown.geometry)
    forget_digests(made)
    scored, problems, _ = score_folder(made, data)
    rows = {(row.case, row.method, row.metric): row.value for row in scored if row.region == "mask"}
    cases = {case for case, _, _ in rows}
    assert cases and not problems
    for case, metric in product(cases, ("mae", "psnr", "ssim")):
        assert rows[case, "A17", metric] == pytest.approx(rows[case, "bicubic", metric], rel=1e-3)

    fine = read_volume(data / "Toy_0001" / "Toy_0001_t1.nii.gz")
    thick = degrade([fine], Degradation(3, "J"))[0]
    write_volume(tmp_path / "thick.nii.gz", thick.array, thick.geometry)
    assert here("predict", run, tmp_path / "thick.nii.gz", "-o", tmp_path / "thin").returncode == 0
    thin = read_volume(tmp_path / "thin" / "thick_t1.nii.gz")
    assert thin.array.shape == (36, 42, 12)  # 14 slices of 3
    np.testing.assert_allclose(thin.geometry.affine, thin_grid(thick.geometry, Degradation(3, "J")).affine, atol=1e-5)


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in chiasm("inspect", tmp_path / "nowhere", "--debug").stderr


def test_a_bad_case_in_a_cohort_ends_in_exit_3_and_is_named(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 3)
    bad = data / "Toy_0002" / "Toy_0002_t1.nii.gz"
    bad.write_bytes(b"not a scan")
    done = here("inspect", data)
    assert done.returncode == 3 and "Toy_0002_t1.nii.gz" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_writes_a_checkpoint(number: int, toy_cohort: Path, tmp_path: Path) -> None:
    words = ["train", str(toy_cohort), "--source", "t1", "--target", "t2", "-o", str(tmp_path / "run")]
    long = ["--size", "tiny", "--set", *SETTINGS, "schedule.steps=10000", "training.validations=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "chiasm.cli", *words, *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # also where the tests run under nohup
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/*.toml")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "goes on from here" in said and "Traceback" not in said
    assert not (tmp_path / "run" / ".lock").exists()


def test_several_sources_stand_behind_one_option() -> None:
    from chiasm.commands.options import spread

    assert spread(["--source", "t1", "flair", "--target", "t2"]) == [
        "--source", "t1", "--source", "flair", "--target", "t2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("chiasm fine", "finetune"),
        ("chiasm train --meth", "--method"),
        ("chiasm train DATA --method dual-at", "dual-attention"),
        ("chiasm train DATA --size sm", "small"),
    ],
)
def test_a_shell_completes_verbs_options_methods_and_sizes(
    words: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CHIASM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit):
        main([])
    assert offered in capsys.readouterr().out.split()


@pytest.mark.parametrize("verb", verbs())
def test_a_help_fits_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, help_of(verb).splitlines())) <= 80


def test_messages_are_broken_between_words_on_a_terminal_and_are_one_line_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data = write_brats(tmp_path / f"a_long_name_{'x' * 80}", 3)

    def lines(*words: str) -> list[str]:
        with pytest.raises(SystemExit):
            main(list(words))
        return "".join(capsys.readouterr()).splitlines()

    asked = ["inspect", str(data), "--source", "t1", "--target", "t2"]
    whole, refused = lines(*asked), lines(*asked[:-1], "pet")
    assert max(map(len, whole)) > 80 and len(refused) == 1
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for before, broken in ((whole, lines(*asked)), (refused, lines(*asked[:-1], "pet"))):
        assert [line for line in broken if len(line) > 80 and str(data) not in line] == []
        assert " ".join(" ".join(broken).split()) == " ".join(" ".join(before).split())


def commands(page: Path) -> str:
    """What stands in a page's fenced blocks."""
    return "\n".join(re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL))


def test_every_verb_is_documented_and_every_documented_command_exists() -> None:
    readme = (PROJECT / "README.md").read_text()
    for verb in verbs():
        assert f"chiasm {verb}" in readme, f"README does not show chiasm {verb}"
    for path in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("**/*.md"))]:
        for verb in re.findall(r"^chiasm (\w+)", commands(path), re.MULTILINE):
            assert verb in verbs(), f"{path.name} shows chiasm {verb}, which does not exist"


@cache
def help_of(verb: str) -> str:
    return here(verb, "--help").stdout


def test_the_help_of_a_verb_is_the_same_whether_the_other_verbs_are_made_or_not() -> None:
    whole = CliRunner().invoke(make_app(), ["train", "--help"], prog_name="chiasm")
    assert whole.output == here("train", "--help").stdout and "--source" in whole.output


PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "chiasm " in commands(page)], ids=lambda page: page.name)
def test_options_in_the_documents_exist(page: Path) -> None:
    for line in re.findall(r"^chiasm [^\n]+", commands(page), re.MULTILINE):
        verb = line.split()[1]
        for option in re.findall(r"(?<=\s)--[a-z-]+", line.split("#")[0]):
            assert option in help_of(verb), f"{option} is no option of chiasm {verb}"


def test_every_room_is_explained_in_the_architecture() -> None:
    import chiasm as package

    page = (PROJECT / "docs" / "architecture.md").read_text()
    rooms = re.findall(r"^    (\w+) {2,}", package.__doc__ or "", re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == rooms  # in the same order


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for place in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in place or (page.parent / place).exists(), f"{page.name} links to {place}"


def test_the_readme_fits_a_screen_before_the_first_command() -> None:
    assert (PROJECT / "README.md").read_text().partition("```")[0].count("\n") <= 24


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "chiasm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"chiasm {chiasm_version}\n")


def test_the_command_is_installed() -> None:
    assert shutil.which("chiasm", path=str(Path(sys.executable).parent))


@pytest.mark.slow
def test_two_processes_train_one_model(toy_cohort: Path, tmp_path: Path) -> None:
    words = ["train", toy_cohort, "--source", "t1", "--target", "t2", "-o", tmp_path / "run", "--size", "tiny"]
    done = chiasm(*words, "--devices", "2", "--accelerator", "cpu", "--set", *SETTINGS, "schedule.steps=6")
    assert done.returncode == 0, done.stderr
    steps = [line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"step"' in line]
    assert sum('"kind": "step"' in line for line in steps) == 6  # one process writes, not two
    assert (tmp_path / "run" / "model" / "model.toml").exists() and "deprecated" not in done.stderr


def test_the_container_file_copies_what_is_there_and_pins_the_torch_of_the_tests() -> None:
    root = Path(__file__).parents[1]
    lines = (root / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((root / name).exists() for name in copied)
    assert any(line.startswith("torch==2.13.0") for line in (root / "constraints.txt").read_text().splitlines())
    assert any("torch==2.13.0" in line for line in lines) and lines[-1] == 'ENTRYPOINT ["chiasm"]'
