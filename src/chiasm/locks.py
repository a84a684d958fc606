"""Folders with one owner at a time.

A command holds its folder of results by `locked` while it writes there.  What a killed process left there under a
temporary name is removed when the next command takes the lock.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from chiasm.errors import RunError
from chiasm.outputs import refuse_model_folder
from chiasm.storage import HOST, REPLACED, TEMPORARY, broken_link, make_folder, open_in_place, temporary_beside, writing

LOCK = ".lock"

DEPTH = 4  # folders below an output folder in which temporaries of killed processes are looked for
FOREIGN_SECONDS = 3600.0  # a temporary of another machine, which cannot be asked, is left over when it is as old


def _remove_leftovers(folder: Path, depth: int = DEPTH) -> None:
    """Remove temporaries of processes that are gone, and restore folders that were being replaced."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name.startswith(".chiasm-"):
                _tidy(Path(place, name))
        deep = len(Path(place).relative_to(folder).parts) >= depth
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".chiasm-")]


def _tidy(path: Path) -> None:
    """Remove a temporary that is left over; give a folder its name back if it was not replaced."""
    whole = path.with_name(path.name.removeprefix(REPLACED))
    is_replaced = path.name.startswith(REPLACED)
    if is_left_over(path) or (is_replaced and whole.exists()):
        _remove(path)
    elif is_replaced:
        path.rename(whole)


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link; the target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_left_over(path: Path) -> bool:
    """Return whether a name is a temporary of a process that ended; this process has none when a command starts."""
    if not (match := TEMPORARY.fullmatch(path.name)):
        return False
    pid, host = int(match[1]), match[2]
    if host != HOST:
        try:
            return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
        except FileNotFoundError:  # it was moved to its place
            return False
    return pid == os.getpid() or not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # another system, or it ends just now: the next start sees it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # killed, and not buried yet
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of results for this process alone; it is made if it is missing.

    The lock ends with the process, even if it is killed.  Folders that were made
    here and are still empty afterwards are removed again.  What a killed process
    left there under a temporary name is removed first.

    Args:
        folder: Where results go.

    Raises:
        RunError: If another process holds it; names its pid and host.  Also if it is a model folder.
        ChiasmError: If the folder cannot be made or written.
    """
    refuse_model_folder(folder)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    with _held(folder):
        try:
            with writing(folder):
                _remove_leftovers(folder)
            yield
        finally:
            with suppress(OSError):
                _remove_leftovers(folder)  # of workers that were killed
            (folder / LOCK).unlink(missing_ok=True)
            for place in new:
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()


def check_output(folder: Path) -> None:
    """Refuse a folder that cannot be written or that another process holds; call it before slow imports and reads.

    Args:
        folder: Where results will go; it may be missing, and is not made.

    Raises:
        RunError: As `locked`.
        ChiasmError: If nothing can be written there; says why.
    """
    refuse_model_folder(folder)
    with writing(folder):
        if (link := broken_link(folder)) is not None:
            raise FileExistsError(errno.EEXIST, "a link that leads nowhere", str(link))
        nearest = Path(folder).absolute()
        while not nearest.exists():
            nearest = nearest.parent
        trial = temporary_beside(nearest / "trial")
        try:
            trial.unlink(missing_ok=True)
            trial.write_bytes(bytes(4096))  # a full disk makes files, and puts nothing in them
        finally:
            if nearest.is_dir():
                trial.unlink(missing_ok=True)
        is_held = (folder / LOCK).is_file()
    if is_held:
        with locked(folder):
            pass


def prepare_file(path: Path) -> None:
    """Prepare the place of a single result, as `check_output` and `locked` do for a folder of results.

    Raises:
        ChiasmError: If it cannot be written; says why.
    """
    check_output(path.parent)
    with writing(path):
        _remove_leftovers(path.parent, depth=0)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; try again if the file was removed between its opening and its locking."""
    path = folder / LOCK
    while True:
        with _lock_file(path) as file:
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            with writing(folder):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
            yield
            return


@contextmanager
def _lock_file(path: Path) -> Iterator[IO[bytes]]:
    from filelock import lock_descriptor

    with writing(path.parent):
        file = open_in_place(path, "a+b")  # without a buffer: closing it has nothing left to write on a full disk
    with file:
        try:
            is_free = lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:  # a network disk without locks
            raise RunError(
                f"cannot be locked: {error.strerror or error}",
                path=path.parent,
                reason="no-lock",
                hint="Give a folder on another disk with -o.",
            ) from error
        if not is_free:
            file.seek(0)
            raise RunError(
                "is in use by another chiasm",
                path=path.parent,
                reason="busy",
                found=file.read().decode(errors="replace").strip() or "an unknown process",
                hint="Wait for it, stop it, or give another folder with -o.",
            )
        yield file
