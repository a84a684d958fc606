"""Writing files whole or not at all, and plain formats: text, JSON, TOML, logs.

Every file chiasm writes goes through `whole_file`: a temporary name in the
same folder, fsync, rename, fsync of the folder.  A kill at any instant leaves
the old file or the new one, never half of either.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tomli_w

from chiasm.errors import ChiasmError, RunError

UNWRITABLE = "unwritable"
LONGEST_NAME = 120  # bytes of a file's name that its temporary name repeats, so that long names stay legal

HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:20]
TEMPORARY = re.compile(r"\.chiasm-(\d{1,9})@([A-Za-z0-9-]*)\..+")
REPLACED = ".chiasm-old."

#: What to do, by the error of the system.
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or choose another folder.",
    errno.EDQUOT: "Your quota on this disk is used up: free some space, or choose another folder.",
    errno.EFBIG: "The file would be larger than this disk or this shell allows (ulimit -f): choose another folder.",
    errno.EROFS: "The disk is mounted read-only: choose another folder.",
    errno.EACCES: "You have no permission to write there: choose another folder.",
    errno.EPERM: "You have no permission to write there, or it is marked as immutable: choose another folder.",
    errno.ENOTDIR: "A part of this path is a file: choose another folder.",
    errno.EEXIST: "There is a file of this name: choose another folder.",
    errno.ENAMETOOLONG: "The name is too long for this disk: choose another folder, or shorter names of cases.",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_TEXT = 2**26  # bytes of a TOML or JSON file


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and move it to `path` when the block ends well.

    Args:
        path: Where the finished file will stand; its folder is created.

    Yields:
        A path in the same folder with the same suffixes, not yet existing.

    Raises:
        ChiasmError: If the disk is full or the folder cannot be written; an earlier file or folder at `path` is
        unchanged.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a link of this name would be written through
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all.

    Raises:
        ChiasmError: As `whole_file`.
    """
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill, and move it to `path` when the block ends well.

    Args:
        path: Where the finished folder will stand; one that stood there before is replaced.
        shared: Whether other processes make the same folder: then the first one stays.

    Yields:
        An empty folder beside it.

    Raises:
        ChiasmError: If the disk is full or the folder cannot be written; an earlier file or folder at `path` is
        unchanged.  Also if `path` is a link.
    """
    path = Path(path)
    fresh = temporary_beside(path, "new.")
    if path.is_symlink():
        raise ChiasmError(
            "is a link, and chiasm replaces nothing through a link",
            path=path,
            reason="link",
            hint="Remove the link, or choose another folder with -o.",
        )
    with writing(path):
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            yield fresh
            for inside in sorted(fresh.rglob("*"), reverse=True):  # what a folder holds before the folder
                _sync(inside)
            _sync(fresh)
            if not (shared and path.is_dir()):
                _put_in_place(fresh, path, shared=shared)
            _sync(path.parent)
            shutil.rmtree(replaced(path), ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def replaced(path: Path) -> Path:
    """Return where a folder stands for the moment in which `whole_folder` replaces it."""
    return path.parent / f"{REPLACED}{path.name}"


def _put_in_place(fresh: Path, path: Path, *, shared: bool) -> None:
    before = replaced(path)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)  # after a kill here `prepare_output` restores it
    try:
        fresh.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        elif not (shared and path.is_dir()):  # another process was faster
            raise


@contextmanager
def working_folder(place: Path) -> Iterator[Path]:
    """Give an empty folder for what is needed while a block runs; it is removed when the block ends, however it does.

    Args:
        place: Folder of results that it lies in, which is there.

    Raises:
        ChiasmError: If it cannot be made.
    """
    folder = temporary_beside(place / "work")
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are missing.

    Raises:
        ChiasmError: If it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def temporary_beside(path: Path, age: str = "") -> Path:
    """Return a name in the same folder that contains the process and the machine."""
    name = path.name.encode()[-LONGEST_NAME:].decode(errors="ignore")
    return path.with_name(f".chiasm-{os.getpid()}@{HOST}.{age}{name}")


def open_in_place(path: Path, mode: str) -> IO[Any]:
    """Open a file to write to it where it stands, as a lock or a log; never through a link.

    Args:
        path: The file; it is made if it is missing.
        mode: As for `open`: "a", or "a+b" without a buffer.

    Raises:
        ChiasmError: If it is a link; the target of the link is unchanged.
        OSError: If it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        binary = "b" in mode
        return open(path, mode, 0 if binary else -1, encoding=None if binary else "utf-8", opener=opener)
    except OSError as error:
        if not path.is_symlink():
            raise
        raise ChiasmError(
            "is a link, and chiasm writes to no file through a link",
            path=path,
            reason="link",
            hint="Remove the link, or choose another folder with -o.",
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing into one that names the file or folder, the cause and the remedy.

    Raises:
        ChiasmError: In the place of an `OSError`; its reason is "unwritable".
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ChiasmError:
    """Say why a file or folder could not be written."""
    number = errno.ENOSPC if _wrote_less(error) else error.errno
    free = _free_bytes(path) if number in FULL else None
    cause = error.strerror or (str(error) if number is None else os.strerror(number))
    remedy = _REMEDIES.get(number or 0, "Choose another folder.")
    if (link := broken_link(path)) is not None:
        cause, remedy = f"{link} is a link that leads nowhere", "Remove the link, or choose another folder."
    return ChiasmError(
        f"cannot be written: {cause}",
        path=path,
        reason=UNWRITABLE,
        found=f"{free / 2**20:.0f} MiB free" if free is not None else None,
        hint=remedy,
    )


def broken_link(path: Path) -> Path | None:
    """Return the part of a path that is a link and leads nowhere; None where there is none."""
    return next((part for part in (path, *path.parents) if part.is_symlink() and not part.exists()), None)


def _wrote_less(error: OSError) -> bool:
    """Return whether numpy or nibabel wrote too little; they do not say that the disk is full."""
    return error.errno is None and ("requested and" in str(error) or not error.args)


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
    return shutil.disk_usage(folder).free


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


def read_json(path: Path, hint: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        hint: What to do where it is damaged.

    Raises:
        RunError: If it is missing or not JSON.
    """
    return _parsed(path, json.loads, hint)


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON object that only pages show; return an empty one if it is missing or damaged."""
    try:
        content = read_json(path)
    except RunError:
        return {}
    return content if isinstance(content, dict) else {}


def read_toml(path: Path, hint: str | None = None) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        hint: What to do where it is damaged.

    Raises:
        RunError: If it is missing or not TOML.
    """
    content: dict[str, Any] = _parsed(path, tomllib.loads, hint)
    return content


def _parsed(path: Path, parse: Any, hint: str | None) -> Any:
    try:
        if (size := Path(path).stat().st_size) > MOST_TEXT:
            raise RunError("is too large for a file of settings", path=path, reason="too-large", found=f"{size} bytes")
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error) from error
    except (ValueError, RecursionError) as error:  # also a number of endless digits, or brackets without end
        what = "is damaged or not what its name says"
        raise RunError(what, path=path, reason="damaged", found=error, hint=hint) from error


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a training's log, of which each line is a JSON object with `kind` and `step`; warnings have a `message`.

    Args:
        path: Of `log.jsonl`; may be missing.

    Returns:
        The lines, and how many more are damaged: cut by a kill, or changed on the disk.

    Raises:
        RunError: If the file is there and cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error.strerror) from error
    lines, damaged = [], 0
    for raw in content.splitlines():
        try:
            line = json.loads(raw.decode())
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if _is_logged(line):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def _is_logged(line: object) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return False
    has_step = type(line.get("step")) is int and 0 <= line["step"] < 2**53
    return has_step and (line["kind"] != "warning" or isinstance(line.get("message"), str))
