"""Files that appear whole or not at all, folders with one owner at a time, and the plain formats beside volumes.

Every file chiasm writes goes through `whole_file`: a temporary name in the
same folder, fsync, rename, fsync of the folder.  A kill at any instant leaves
the old file or the new one, never half of either.  Every folder of results is
held by `locked` while a command writes to it; what a kill left there under a
temporary name is removed when the next command takes the lock.

Cards and settings are `sealed`: their first entry is the sha256 of all others,
so that a changed one is recognised wherever it was copied to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tomli_w

from chiasm.errors import ChiasmError, RunError

LOCK = ".lock"
UNWRITABLE = "unwritable"
DEPTH = 4  # folders below an output folder in which temporaries of killed processes are looked for
FOREIGN_SECONDS = 3600.0  # a temporary of another machine, which cannot be asked, is left over when it is as old
SETTLED_SECONDS = 2.0  # a file that was changed later than this may change again without another time stamp
LONGEST_NAME = 120  # bytes of a file's name that its temporary name repeats, so that long names stay legal

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:20]
_TEMPORARY = re.compile(r"\.chiasm-(\d{1,9})@([A-Za-z0-9-]*)\..+")
_REPLACED = ".chiasm-old."

#: What to do, by what the system says.
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


MOST_NAME = 190  # bytes of a case's name: what is added for a file's stays below the 255 of file systems
MOST_TEXT = 2**26  # bytes of a TOML or JSON file
SAFE_NAME = f"one printable line of at most {MOST_NAME} bytes without / \\ < >, which begins with none of . = + - @"


def is_plain(text: str) -> bool:
    """Say whether `text` is harmless in a table and on a page: one line, no markup, no formula of a spreadsheet.

    >>> [is_plain(text) for text in ("GE 1.5T / site 2", "-", "=cmd", "<b>", "a\\nb")]
    [True, True, False, False, False]
    """
    if not (text.isprintable() and 0 < len(text.encode("utf-8", "replace")) <= MOST_NAME) or set(text) & {"<", ">"}:
        return False
    first = unicodedata.normalize("NFKC", text[0])  # a spreadsheet takes a wide = for =
    return len(text) == 1 or not first.startswith(("=", "+", "-", "@"))


def is_safe_id(text: str) -> bool:
    """Say whether `text` can name a file in any folder, and is harmless in a table and on a page: see `SAFE_NAME`.

    >>> [is_safe_id(text) for text in ("patient 07", "a/b", "..", "", "=cmd", "-x", "<script>")]
    [True, False, False, False, False, False, False]
    """
    return is_plain(text) and not set(text) & {"/", "\\"} and text[0] not in ".=+-@" and text == text.strip()


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
    temporary = _temporary(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill, and move it to `path` when the block ends well.

    Args:
        path: Where the finished folder will stand; one that stood there before is replaced.
        shared: Whether other processes make the same folder: then the first one stays.

    Yields:
        An empty folder beside it.

    Raises:
        ChiasmError: If the disk is full or the folder cannot be written; what
            stood at `path` before is untouched.
    """
    path = Path(path)
    fresh = _temporary(path, "new.")
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
    return path.parent / f"{_REPLACED}{path.name}"


def _put_in_place(fresh: Path, path: Path, *, shared: bool) -> None:
    before = replaced(path)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)  # after a kill here `prepare_output` brings it back
    try:
        fresh.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        elif not (shared and path.is_dir()):  # another process was faster
            raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are missing.

    Raises:
        ChiasmError: If it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def _remove_leftovers(folder: Path, depth: int = DEPTH) -> None:
    """Remove temporaries of processes that are gone, and bring back folders that were being replaced."""
    for place, folders, files in os.walk(folder):
        for name in [name for name in (*folders, *files) if name.startswith(".chiasm-")]:
            path = Path(place, name)
            if _is_left_over(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            elif name.startswith(_REPLACED) and (whole := path.with_name(name.removeprefix(_REPLACED))).exists():
                shutil.rmtree(path)
            elif name.startswith(_REPLACED):
                path.rename(whole)
        deep = len(Path(place).relative_to(folder).parts) >= depth
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".chiasm-")]


def _is_left_over(path: Path) -> bool:
    """Tell whether a name is a temporary of a process that is gone; this one has none when a command starts."""
    if not (match := _TEMPORARY.fullmatch(path.name)):
        return False
    pid, host = int(match[1]), match[2]
    if host != _HOST:
        return path.exists() and time.time() - path.stat().st_mtime > FOREIGN_SECONDS
    return pid == os.getpid() or not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"  # killed, and not buried yet


def _temporary(path: Path, age: str = "") -> Path:
    name = path.name.encode()[-LONGEST_NAME:].decode(errors="ignore")
    return path.with_name(f".chiasm-{os.getpid()}@{_HOST}.{age}{name}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder, the cause and the remedy where the system refuses to write.

    Raises:
        ChiasmError: In the place of an `OSError`; its reason is "unwritable".
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of results for this process alone; it is made if it is missing.

    The lock ends with the process, however that ends.  A folder that was made
    here and is still empty afterwards is removed again.  What a killed process
    left there under a temporary name is removed first.

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
            with writing(folder):
                _remove_leftovers(folder)
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def refuse_busy(folder: Path) -> None:
    """Refuse a folder that cannot be written or that another process holds, before anything slow is loaded or read.

    Args:
        folder: Where results will go; it may be missing, and is not made.

    Raises:
        RunError: As `locked`.
        ChiasmError: If nothing can be written there; says why.
    """
    with writing(folder):
        nearest = Path(folder).absolute()
        while not nearest.exists():
            nearest = nearest.parent
        trial = _temporary(nearest / "trial")
        try:
            trial.write_bytes(bytes(4096))  # a full disk makes files, and puts nothing in them
        finally:
            if nearest.is_dir():
                trial.unlink(missing_ok=True)
        is_held = (folder / LOCK).is_file()
    if is_held:
        with locked(folder):
            pass


def prepare_file(path: Path) -> None:
    """Do for a single result what `refuse_busy` and `locked` do for a folder of them.

    Raises:
        ChiasmError: If it cannot be written; says why.
    """
    refuse_busy(path.parent)
    with writing(path):
        _remove_leftovers(path.parent, depth=0)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; its owner removes the file, so one that was opened may be gone when it is locked."""
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
    import fcntl

    with writing(path.parent):
        file = path.open("a+b", buffering=0)  # closing it has nothing left to write on a full disk
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RunError(
                "is in use by another chiasm",
                path=path.parent,
                reason="busy",
                found=file.read().decode(errors="replace").strip() or "an unknown process",
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


def unwritable(path: Path, error: OSError) -> ChiasmError:
    """Say that and why something could not be written."""
    free = _free_bytes(path) if error.errno in (*FULL, None) else None  # numpy does not say why
    return ChiasmError(
        f"cannot be written: {error.strerror or os.strerror(error.errno or errno.ENOSPC)}",
        path=path,
        reason=UNWRITABLE,
        found=f"{free / 2**20:.0f} MiB free" if free is not None else None,
        hint=_REMEDIES.get(error.errno or errno.ENOSPC, "Choose another folder."),
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


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON object that pages quote and no result depends on; empty where it is missing or damaged."""
    try:
        content = read_json(path)
    except RunError:
        return {}
    return content if isinstance(content, dict) else {}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        RunError: If it is missing or not TOML.
    """
    content: dict[str, Any] = _parsed(path, tomllib.loads)
    return content


def _parsed(path: Path, parse: Any) -> Any:
    try:
        if (size := Path(path).stat().st_size) > MOST_TEXT:
            raise RunError("is too large for a file of settings", path=path, reason="too-large", found=f"{size} bytes")
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error) from error
    except (ValueError, RecursionError) as error:  # also a number of endless digits, or brackets without end
        raise RunError("is damaged or not what its name says", path=path, reason="damaged", found=error) from error


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


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


_HASHED: dict[tuple[int, ...], str] = {}


def content_hash(path: Path) -> str:
    """Return the sha256 of a file that may have been hashed before; only a changed one is read again.

    A file counts as changed when its place on the disk, its size or one of its times is
    another than when this process hashed it; no program can set the time of its last change back.

    Raises:
        OSError: If the file cannot be read.
    """
    there = path.stat()
    key = there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns
    if key not in _HASHED:
        digest = sha256_of(path)
        if time.time() - there.st_ctime < SETTLED_SECONDS:
            return digest
        _HASHED[key] = digest
    return _HASHED[key]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Put the sha256 of a card's content in front of it."""
    return {"seal": _seal(content), **content}


def is_sealed(content: object) -> bool:
    """Tell whether a card holds what it held when it was `sealed`."""
    return isinstance(content, Mapping) and content.get("seal") == _seal(content)


def check_seal(content: Mapping[str, Any], path: Path, hint: str) -> None:
    """Refuse a file whose content is not what was sealed; one without a seal, which a user wrote, is accepted.

    Args:
        content: Read from the file.
        path: The file.
        hint: What to do.

    Raises:
        RunError: If the content was changed.
    """
    if "seal" in content and not is_sealed(content):
        raise RunError("was changed since it was written", path=path, reason="damaged", hint=hint)


def _seal(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
