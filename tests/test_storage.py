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
from chiasm.locks import check_output, is_left_over, locked
from chiasm.storage import (
    HOST,
    open_in_place,
    read_json,
    read_toml,
    temporary_beside,
    whole_file,
    whole_folder,
    write_json,
    write_text,
    write_toml,
    writing,
)


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


def test_nothing_is_written_through_a_lock_or_a_log_that_is_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of the user")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to(victim)
    for hold in (lambda: locked(out).__enter__(), lambda: check_output(out)):
        with pytest.raises(ChiasmError, match=r"\.lock: is a link, and chiasm writes to no file through a link"):
            hold()
    with pytest.raises(ChiasmError, match="is a link"):
        open_in_place(out / ".lock", "a")
    assert victim.read_text() == "of the user" and (out / ".lock").is_symlink()


def test_a_file_is_not_written_through_a_link_of_its_temporary_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of the user")
    temporary_beside(tmp_path / "plan.toml").symlink_to(victim)
    write_toml(tmp_path / "plan.toml", {"dims": 3})
    assert victim.read_text() == "of the user" and not (tmp_path / "plan.toml").is_symlink()


def test_a_folder_that_is_a_link_is_not_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.docx").write_text("of the user")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ChiasmError, match="model: is a link") as caught, whole_folder(tmp_path / "model") as fresh:
        (fresh / "plan.toml").write_text("")
    assert caught.value.reason == "link" and "full" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]
    (tmp_path / ".chiasm-old.model").symlink_to(tmp_path / "elsewhere")  # as an earlier version left it
    with locked(tmp_path):
        pass
    assert not (tmp_path / ".chiasm-old.model").is_symlink() and (tmp_path / "elsewhere" / "thesis.docx").exists()


def test_a_cause_without_a_number_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ChiasmError, match="Cannot call rmtree on a symbolic link") as caught, writing(tmp_path / "a"):
        raise OSError("Cannot call rmtree on a symbolic link")
    assert "full" not in str(caught.value) and "free" not in str(caught.value)


def test_a_folder_that_is_a_link_to_nowhere_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        for ask in (check_output, lambda place: locked(place).__enter__()):
            with pytest.raises(ChiasmError, match=r"out is a link that leads nowhere\. Remove the link"):
                ask(folder)


def test_what_a_killed_worker_left_is_removed_at_the_end(tmp_path: Path) -> None:
    with locked(tmp_path):
        killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        left = tmp_path / "cache" / f".chiasm-{killed.stdout.strip()}@{HOST}.new.case-1"
        left.mkdir(parents=True)
        (left / "source.npy").write_text("half")
    assert not left.exists()


def test_a_process_that_ends_while_it_is_looked_at_and_a_file_that_is_moved_are_left_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".chiasm-{ended.pid}@{HOST}.a", f".chiasm-{ended.pid}@elsewhere.a"]
    assert [is_left_over(tmp_path / name) for name in names] == [True, False]
    monkeypatch.setattr("chiasm.locks.os.kill", lambda *_: None)  # it was there a moment ago
    monkeypatch.setattr(Path, "exists", lambda _: True)
    assert [is_left_over(tmp_path / name) for name in names] == [False, False]


def test_a_model_folder_takes_no_results(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text("")
    for ask in (check_output, lambda place: locked(place).__enter__()):
        with pytest.raises(RunError, match="is a model folder"):
            ask(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.toml"]
