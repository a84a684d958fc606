from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from chiasm.checksums import sha256_of
from chiasm.errors import ChiasmError, RunError
from chiasm.locks import check_output, locked
from chiasm.storage import read_json, read_toml, whole_file, whole_folder, write_json, write_text, write_toml


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


def test_the_parent_of_a_folder_is_synced_after_its_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda at: (happened.append(str(Path(f"/proc/self/fd/{at}").readlink())), sync(at))
    )
    monkeypatch.setattr(Path, "rename", lambda old, new: (happened.append(f"to {new}"), rename(old, new)))
    for shared in (False, True):
        path = tmp_path / str(shared)
        with whole_folder(path, shared=shared) as fresh:
            (fresh / "a").write_text("x")
        assert happened == [f"{fresh}/a", str(fresh), f"to {path}", str(tmp_path)]
        happened.clear()


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


def test_a_folder_has_one_owner_who_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder):
        with pytest.raises(RunError, match=f"pid {os.getpid()} on ") as caught, locked(folder):
            pass
        assert caught.value.reason == "busy" and caught.value.path == folder
        with pytest.raises(RunError, match="in use"):
            check_output(folder)
    assert not folder.exists()
    with locked(folder):
        (folder / "result").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom chiasm.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert (tmp_path / ".lock").is_file()
    check_output(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_its_owner_removed_while_it_was_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, opened = fcntl.flock, []

    def late(file: IO[str], how: int) -> None:
        if not opened:  # between our opening the file and locking it, its owner ended
            (tmp_path / ".lock").unlink()
        opened.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(RunError, match="in use"), locked(tmp_path):
        pass
    assert len(opened) == 3
