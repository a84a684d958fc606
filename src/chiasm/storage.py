"""Files that appear whole or not at all, folders with one owner at a time, and the plain formats beside volumes.

Every file chiasm writes goes through `whole_file`: a temporary name in the
same folder, fsync, rename, fsync of the folder.  A kill at any instant leaves
the old file or the new one, never half of either.  Every folder of results is
held by `locked` while a command writes to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tomli_w

from chiasm.errors import ChiasmError, RunError

LOCK = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` when the block ends well.

    Args:
        path: Where the finished file will stand; its folder is created.

    Yields:
        A path in the same folder with the same suffixes, not yet existing.

    Raises:
        ChiasmError: If the disk is full or the folder cannot be written; what
            stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, and move it to `path` when the block ends well.

    Args:
        path: Where the finished folder will stand; one that stood there before is replaced.

    Yields:
        An empty folder beside it.

    Raises:
        ChiasmError: If the disk is full or the folder cannot be written; what
            stood at `path` before is untouched.
    """
    path = Path(path)
    fresh, before = (path.with_name(f".{os.getpid()}.{age}.{path.name}") for age in ("new", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        for inside in sorted(fresh.rglob("*"), reverse=True):  # what a folder holds before the folder
            _sync(inside)
        _sync(fresh)
        if path.exists():
            path.rename(before)
        try:
            fresh.rename(path)
        except OSError:
            before.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are missing.

    Raises:
        ChiasmError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ChiasmError(
            f"cannot be made: {error.strerror or error}",
            path=path,
            reason="unwritable",
            hint="Give another folder with -o.",
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of results for this process alone; it is made if it is missing.

    The lock ends with the process, however that ends.  A folder that was made
    here and is still empty afterwards is removed again.

    Args:
        folder: Where results go.

    Raises:
        RunError: If another process holds it; names its pid and host.
        ChiasmError: If the folder cannot be made or written.
    """
    is_new = not folder.exists()
    make_folder(folder)
    with _held(folder):
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def refuse_busy(folder: Path) -> None:
    """Refuse a folder that another process holds, before anything slow is loaded or read.

    Raises:
        RunError: As `locked`.
        ChiasmError: If the folder cannot be written.
    """
    if (folder / LOCK).is_file():
        with locked(folder):
            pass


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; its owner removes the file, so one that was opened may be gone when it is locked."""
    path = folder / LOCK
    while True:
        with _lock_file(path) as file:
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            return


@contextmanager
def _lock_file(path: Path) -> Iterator[IO[str]]:
    import fcntl

    try:
        file = path.open("a+")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                "is in use by another chiasm",
                path=path.parent,
                reason="busy",
                found=file.read().strip() or "an unknown process",
                hint="Wait for it, stop it, or give another folder with -o.",
            ) from error
        except OSError as error:  # a network disk without locks
            raise RunError(
                f"cannot be locked: {error.strerror or error}",
                path=path.parent,
                reason="no-lock",
                hint="Give a folder on another disk with -o.",
            ) from error
        yield file


def _unwritable(path: Path, error: OSError) -> ChiasmError:
    free = _free_bytes(path.parent)
    return ChiasmError(
        f"cannot be written: {error.strerror or error}",
        path=path,
        reason="unwritable",
        found=f"{free / 2**20:.0f} MiB free" if free is not None else None,
        hint="Free some space, or give another folder with -o.",
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int | None:
    while not folder.exists():
        if folder == folder.parent:
            return None
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON; NaN and infinity are refused by `ValueError`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_toml(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as TOML; TOML has no null, so leave absent keys out."""
    write_text(path, tomli_w.dumps(content))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: If it is missing or not JSON.
    """
    return _parsed(path, json.loads)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        RunError: If it is missing or not TOML.
    """
    content: dict[str, Any] = _parsed(path, tomllib.loads)
    return content


def _parsed(path: Path, parse: Any) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error) from error
    except (ValueError, RecursionError) as error:  # also a number of endless digits, or brackets without end
        raise RunError("is damaged or not what its name says", path=path, reason="damaged", found=error) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()
