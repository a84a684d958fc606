from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.errors import ChiasmError, RunError
from chiasm.storage import read_json, read_toml, sha256_of, whole_file, write_json, write_text, write_toml


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    program = (
        "import os, signal, sys; from pathlib import Path; from chiasm.storage import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as t:\n    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ChiasmError, match="another folder"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_toml_and_json_come_back_as_they_went(tmp_path: Path) -> None:
    content = {"a": 1, "b": [1.5, 2.0], "c": {"d": "é"}}
    write_toml(tmp_path / "a.toml", content)
    write_json(tmp_path / "a.json", content)
    assert read_toml(tmp_path / "a.toml") == read_json(tmp_path / "a.json") == content


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_missing_and_damaged_files_are_named(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RunError, match="absent"):
        read(tmp_path / "absent")
    (tmp_path / "bad").write_bytes(b"{\xff")
    with pytest.raises(RunError, match="bad"):
        read(tmp_path / "bad")


def test_sha256_equals_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
