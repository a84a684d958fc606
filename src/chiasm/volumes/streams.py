"""Bytes from a file that may be gzipped: read to the end, checked, and never more than is plausible."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from chiasm.errors import VolumeError

SLACK = 2**20  # bytes that may follow the voxels
GZIP = b"\x1f\x8b"


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of what a file holds, unpacked if it is gzipped, whatever its name says.

    Raises:
        VolumeError: If it cannot be read, or is a gzip that is corrupted from its start.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise unreadable(path, error) from error
    if not start.startswith(GZIP):
        return start[:count]
    try:
        return zlib.decompressobj(31).decompress(start, count)
    except zlib.error as error:
        raise _corrupted(path, error) from error


def unreadable(path: Path, error: OSError) -> VolumeError:
    """Say why a file cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return VolumeError("does not exist", path=path, reason="not-found")
    return VolumeError("cannot be read", path=path, reason="unreadable", found=error.strerror)


def read_whole(path: Path, head: int, length: Callable[[bytes], int]) -> bytearray:
    """Read a file to its end, unpacked if it is gzipped.

    A gzip's CRC and length are checked by reading it to its end; one that
    unpacks to far more than its header says is given up early.

    Args:
        path: The file.
        head: Bytes that `length` needs to see; fewer where the file is shorter.
        length: Says from the head how many bytes the file must hold, or raises.

    Returns:
        Exactly as many bytes.

    Raises:
        VolumeError: If the file is missing, cut short, corrupted or too long.
    """
    try:
        with _open(path) as file:
            start = file.read(head)
            expected = length(start)
            content = bytearray(expected)
            content[: len(start)] = start[:expected]
            view, done = memoryview(content), min(len(start), expected)
            while done < expected and (count := file.readinto(view[done:])):
                done += count
            if done < expected:
                raise VolumeError(
                    "is cut short",
                    path=path,
                    reason="truncated",
                    found=f"{done} bytes",
                    expected=f"{expected} bytes, as its header says",
                    hint="Copy it again.",
                )
            extra = len(file.read(SLACK + 1))
            if extra > SLACK:
                raise VolumeError(
                    "goes on far beyond the voxels that its header promises",
                    path=path,
                    reason="too-long",
                    expected=f"{expected} bytes",
                )
            return content
    except EOFError as error:
        raise VolumeError(
            "is a gzip that was cut short", path=path, reason="truncated", hint="Copy it again."
        ) from error
    except OSError as error:
        if not isinstance(error, gzip.BadGzipFile):
            raise unreadable(path, error) from error
        raise _corrupted(path, error) from error
    except _damage() as error:
        raise _corrupted(path, error) from error


def _corrupted(path: Path, error: Exception) -> VolumeError:
    return VolumeError("is a corrupted gzip", path=path, reason="corrupted", found=error, hint="Copy it again.")


def _open(path: Path) -> Any:
    file = path.open("rb")
    packed = file.read(len(GZIP)) == GZIP
    if not packed:
        file.seek(0)
        return file
    file.close()
    try:
        from isal import igzip
    except ImportError:  # slower by ten, but the same
        return gzip.open(path, "rb")
    return igzip.open(path, "rb")


def _damage() -> tuple[type[Exception], ...]:
    try:
        from isal import isal_zlib
    except ImportError:
        return (zlib.error,)
    return zlib.error, isal_zlib.error  # type: ignore[return-value]


def pack(content: bytes, form: Literal["gzip", "zlib"]) -> bytes:
    """Compress quickly; a gzip carries no name and no time, so equal content gives equal bytes."""
    try:
        from isal import isal_zlib
    except ImportError:
        return gzip.compress(content, 1, mtime=0) if form == "gzip" else zlib.compress(content, 1)
    # isal's levels reach from 0 to 3; 2 packs about as small as gzip's 6 at a tenth of its time
    packer = isal_zlib.compressobj(2, isal_zlib.DEFLATED, 31 if form == "gzip" else 15)
    packed: bytes = packer.compress(content) + packer.flush()
    return packed
