"""Bytes from a file that may be gzipped: read to the end, checked, and never more than is plausible."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from chiasm.errors import VolumeError

SLACK = 2**20  # bytes that may follow the voxels
PIECE = 2**20  # bytes read or unpacked at a time
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
        with path.open("rb") as file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            pieces = _unpacked(file, path) if packed else iter(lambda: file.read(PIECE), b"")
            return _gathered(pieces, path, head, length)
    except OSError as error:
        raise unreadable(path, error) from error


def _gathered(pieces: Iterator[bytes], path: Path, head: int, length: Callable[[bytes], int]) -> bytearray:
    start = b""
    while len(start) < head and (piece := next(pieces, b"")):
        start += piece
    expected = length(start[:head])
    content = bytearray(start[:expected])  # grows with what is there, not with what a header promises
    done = len(start)
    for piece in pieces:
        content += piece[: max(0, expected - done)]
        done += len(piece)
        if done > expected + SLACK:
            raise VolumeError(
                "goes on far beyond the voxels that its header promises",
                path=path,
                reason="too-long",
                expected=f"{expected} bytes",
            )
    if done < expected:
        raise VolumeError(
            "is cut short",
            path=path,
            reason="truncated",
            found=f"{done} bytes",
            expected=f"{expected} bytes, as its header says",
            hint="Copy it again.",
        )
    return content


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Unpack a gzip of one member or several, in pieces of bounded size; checks each member's CRC and length."""
    packed = file.read(PIECE)
    while packed.strip(b"\0"):  # zeros may fill up the end
        unpacker = _library().decompressobj(31)
        while not unpacker.eof:
            try:
                piece = unpacker.decompress(packed, PIECE)
            except _damage() as error:
                raise _corrupted(path, error) from error
            if piece:
                yield piece
            packed = unpacker.unconsumed_tail or (b"" if unpacker.eof else file.read(PIECE))
            if not packed and not piece and not unpacker.eof:
                raise VolumeError("is a gzip that was cut short", path=path, reason="truncated", hint="Copy it again.")
        packed = unpacker.unused_data or file.read(PIECE)


def _corrupted(path: Path, error: Exception) -> VolumeError:
    return VolumeError("is a corrupted gzip", path=path, reason="corrupted", found=error, hint="Copy it again.")


def _library() -> Any:
    """Return isal's zlib, which is faster by up to ten, or Python's: both have the same functions."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


def _damage() -> tuple[type[Exception], ...]:
    return zlib.error, _library().error


def pack(content: bytes, form: Literal["gzip", "zlib"]) -> bytes:
    """Compress quickly; a gzip carries no name and no time, so equal content gives equal bytes."""
    # isal's levels reach from 0 to 3: its 2 packs about as small as zlib's 6
    packer = _library().compressobj(2, zlib.DEFLATED, 31 if form == "gzip" else 15)
    packed: bytes = packer.compress(content) + packer.flush()
    return packed
