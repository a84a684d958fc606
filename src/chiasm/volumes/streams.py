"""Bytes from a file that may be packed: they are read to the end, checked, and limited to a plausible size."""

from __future__ import annotations

import bz2
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError

SLACK = 2**20  # bytes that may follow the voxels
PIECE = 2**20  # bytes unpacked at a time
PACKED_PIECE = 2**16  # bytes read of a packed file at a time
GZIP = b"\x1f\x8b"
TIGHTEST = 1032  # times that deflate can pack at most
IDLE_MEMBERS = 1000  # members of a gzip that may hold next to nothing

LONGEST_NUMBER = 400  # characters of a number that is written as text
BETWEEN = b" \t\r\n\v\f,"  # numbers of a text

Packing = Literal["none", "gzip", "zlib", "bzip2", "hex", "text"]


@dataclass(frozen=True)
class Stream:
    """The place of bytes in a file.

    Attributes:
        path: The file.
        packing: How they are packed.
        start: Byte of the file at which the stream begins, packed or not.
        offset: Bytes of the unpacked stream before those that count.
        size: Bytes that count.
        slack: Bytes that may follow them.
        number: numpy's name of the numbers that are written as text.
    """

    path: Path
    packing: Packing
    start: int
    offset: int
    size: int
    slack: int = SLACK
    number: str = ""


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; a pipe would wait for ever, and a device never ends.

    Raises:
        VolumeError: If it is missing, may not be read, or is something else.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise VolumeError("is a folder, not a file", path=path, reason="folder")
        if not stat.S_ISREG(kind):
            raise VolumeError("is no regular file but a pipe, socket or device", path=path, reason="special")
        return path.open("rb")
    except ValueError as error:  # a NUL in the name, or half a character
        raise VolumeError("cannot be a file's name", path=repr(path), reason="name", found=error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def file_size(path: Path) -> int:
    """Return the bytes of a regular file.

    Raises:
        VolumeError: If it cannot be read.
    """
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def sibling(path: Path, name: str) -> Path:
    """Return the file of voxels that a header names: a plain name beside the header, never elsewhere.

    Raises:
        VolumeError: If the name is another's place, a list or a pattern, or there is no such file.
    """
    if not _is_plain(name, path) or name.split()[0].upper() == "LIST":
        raise VolumeError(
            "keeps its voxels elsewhere",
            path=path,
            reason="elsewhere",
            found=name[:80],
            expected="in the same file, or in one beside it by its plain name",
        )
    data = path.with_name(name)
    if not _lies_beside(data, path):
        raise VolumeError("lacks its file of voxels", path=path, reason="not-found", expected=name[:80])
    return data


def _is_plain(name: str, path: Path) -> bool:
    """Return whether a name is that of another file in the same folder, and no pattern."""
    return name.strip() not in ("", ".", "..", path.name) and not any(mark in name for mark in "/\\%*")


def _lies_beside(data: Path, path: Path) -> bool:
    """Return whether there is a file, in the same folder as another once links are followed."""
    try:
        return data.is_file() and data.resolve().parent == path.resolve().parent
    except (OSError, RuntimeError):  # a name too long, a loop of links
        return False


def unreadable(path: Path, error: OSError) -> VolumeError:
    """Say why a file cannot be opened."""
    if isinstance(error, FileNotFoundError):
        hint = "It is a link that leads nowhere." if path.is_symlink() else None
        return VolumeError("does not exist", path=path, reason="not-found", hint=hint)
    return VolumeError("cannot be read", path=path, reason="unreadable", found=error.strerror)


def packing_of(path: Path) -> Packing:
    """Return whether a file is gzipped by its first bytes, whatever its name says.

    Raises:
        VolumeError: If it cannot be read.
    """
    with open_file(path) as file:
        return "gzip" if file.read(len(GZIP)) == GZIP else "none"


def packed_whole(path: Path, start: int, size: int, *, has_packed_voxels: bool) -> Stream:
    """Return where voxels lie in a file that is gzipped as a whole, its header too.

    Args:
        path: The file.
        start: Where the voxels begin in what it unpacks to.
        size: Their bytes.
        has_packed_voxels: Whether the header says that they are packed by themselves.

    Raises:
        VolumeError: If they are packed twice.
    """
    if has_packed_voxels:
        raise VolumeError("is packed twice", path=path, reason="format", expected="one packing")
    return Stream(path, "gzip", 0, start, size, 0)


def numbers_in(text: str) -> tuple[float, ...]:
    """Return the numbers between the spaces of a text; none where a word is no number."""
    try:
        return tuple(map(float, text.split()))
    except ValueError:
        return ()


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of what a file holds, unpacked if it is gzipped, whatever its name says.

    Raises:
        VolumeError: If it cannot be read, or is a gzip that is corrupted or truncated before so many.
    """
    head = b""
    with open_file(path) as file:
        packing: Packing = "gzip" if file.read(len(GZIP)) == GZIP else "none"
        file.seek(0)
        pieces = _pieces(file, path, packing)
        while len(head) < count and (piece := next(pieces, b"")):
            head += piece[: count - len(head)]
    return head


def blocks(stream: Stream) -> Iterator[bytes]:
    """Yield the bytes that count, block by block, and check the stream on the way.

    Nothing is kept, so that what is broken costs no memory.  The stream is read
    to its end: only there do a gzip's CRC and length show.

    Raises:
        VolumeError: If the file is truncated, corrupted or too long.
    """
    path, end = stream.path, stream.offset + stream.size
    with open_file(path) as file:
        _check_size(stream, os.fstat(file.fileno()).st_size - stream.start)
        file.seek(stream.start)
        done = 0
        for piece in _pieces(file, path, stream.packing, stream.number):
            before, done = done, done + len(piece)
            if done > end + stream.slack:
                raise _long(path, end, None)
            if part := piece[max(0, stream.offset - before) : max(0, end - before)]:
                yield part
    if done < end:
        raise _short(path, f"{done} bytes", end)


def _check_size(stream: Stream, there: int) -> None:
    """Refuse a file by its size alone: too short even if packed as tightly as can be, or too long if not packed."""
    path, end = stream.path, stream.offset + stream.size
    if stream.packing == "bzip2":  # which packs without a limit
        return
    if stream.packing != "none":
        if max(0, there) * _tightest(stream) < end:
            raise _short(path, f"{there} bytes of a packed file", end)
    elif there < end:
        raise _short(path, f"{there} bytes", end)
    elif there > end + stream.slack:
        raise _long(path, end, there)


def _tightest(stream: Stream) -> float:
    """Return how many bytes a byte of the file can stand for: in a text two make a number, a digit and a space."""
    if stream.packing == "hex":
        return 0.5
    return np.dtype(stream.number).itemsize if stream.packing == "text" else TIGHTEST


def read_whole(stream: Stream) -> NDArray[np.uint8]:
    """Return exactly the bytes that count.

    Room for all is asked for at once, and taken as it is filled: what a header promises takes no memory, and what grows
    piece by piece is often kept by the C library when it is let go.

    Raises:
        VolumeError: If the file is truncated, corrupted or too long.
    """
    room = np.empty(stream.size, np.uint8)
    start = 0
    for block in blocks(stream):
        room[start : start + len(block)] = np.frombuffer(block, np.uint8)
        start += len(block)
    return room


def _short(path: Path, found: str, end: int) -> VolumeError:
    return VolumeError(
        "is truncated",
        path=path,
        reason="truncated",
        found=found,
        expected=f"{end} bytes, as its header says",
        hint="Copy it again.",
    )


def _long(path: Path, end: int, there: int | None) -> VolumeError:
    return VolumeError(
        "has more bytes than the voxels of its header",
        path=path,
        reason="too-long",
        found=None if there is None else f"{there} bytes",
        expected=f"{end} bytes",
    )


def _pieces(file: BinaryIO, path: Path, packing: Packing, number: str = "") -> Iterator[bytes]:
    try:
        if packing == "none":
            yield from iter(lambda: file.read(PIECE), b"")
        elif packing == "bzip2":
            yield from _unpacked_bzip2(file, path)
        elif packing == "hex":
            yield from _from_hex(file, path)
        elif packing == "text":
            yield from _from_text(file, path, number)
        else:
            yield from _unpacked(file, path, packing)
    except OSError as error:
        raise unreadable(path, error) from error


def _unpacked(file: BinaryIO, path: Path, packing: Packing) -> Iterator[bytes]:
    """Unpack members one after the other, in pieces of bounded size; checks each one's checksum and length."""
    packed = file.read(PACKED_PIECE)
    members = done = 0
    while packed.strip(b"\0"):  # zeros may fill up the end
        members += 1
        if members > IDLE_MEMBERS and done < 64 * members:
            raise VolumeError("is a gzip of countless empty parts", path=path, reason="corrupted")
        unpacker = _unpacker(packed, packing)
        for piece in _member(unpacker, packed, file, path):
            done += len(piece)
            yield piece
        packed = unpacker.unused_data or file.read(PACKED_PIECE)
        _check_behind(packed, packing, path)


def _unpacker(packed: bytes, packing: Packing) -> Any:
    """Return what unpacks a member: what MetaImage calls zlib may be a gzip too."""
    is_gzip = packed.startswith(GZIP) or packing == "gzip"
    return _library().decompressobj(31 if is_gzip else 15)


def _unpacked_bzip2(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Unpack one stream of bzip2 in pieces of bounded size; its checksums are checked."""
    unpacker = bz2.BZ2Decompressor()
    try:
        while not unpacker.eof:
            yield unpacker.decompress(_next_packed(unpacker, file, path), PIECE)
    except (OSError, ValueError) as error:
        raise _corrupted(path, error) from error
    if unpacker.unused_data or file.read(1):
        raise VolumeError("goes on beyond its packed voxels", path=path, reason="too-long")


def _next_packed(unpacker: bz2.BZ2Decompressor, file: BinaryIO, path: Path) -> bytes:
    """Return the bytes to go on with; none while the unpacker holds some."""
    if not unpacker.needs_input:
        return b""
    packed = file.read(PACKED_PIECE)
    if not packed:
        raise _truncated(path)
    return packed


def _from_hex(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Read two digits for each byte; white space may stand anywhere."""
    rest = b""
    for piece in iter(lambda: file.read(PIECE), b""):
        digits = rest + b"".join(piece.split())
        whole = len(digits) - len(digits) % 2
        rest = digits[whole:]
        yield _numbers_of(path, bytes.fromhex, digits[:whole].decode("latin-1"))
    if rest:
        raise _corrupted(path, ValueError("half a byte"))


def _from_text(file: BinaryIO, path: Path, number: str) -> Iterator[bytes]:
    """Read numbers with white space or commas between them, as bytes of their type."""
    rest = b""
    for piece in iter(lambda: file.read(PACKED_PIECE), b""):
        text = rest + piece
        whole = max(map(text.rfind, (bytes([mark]) for mark in BETWEEN))) + 1
        rest = text[whole:]
        if len(rest) > LONGEST_NUMBER:
            raise _corrupted(path, ValueError("a number without an end"))
        yield _numbers_of(path, _bytes_of, text[:whole], number)
    yield _numbers_of(path, _bytes_of, rest, number)


def _bytes_of(text: bytes, number: str) -> bytes:
    """Return the numbers of a text as bytes.

    Raises:
        ValueError: If a word is no number of the type.
        OverflowError: If a number is beyond the type.
    """
    if b"_" in text:  # which Python takes between digits
        raise ValueError("_")
    kind = np.dtype(number)
    words = text.replace(b",", b" ").split()
    return np.array([(float if kind.kind == "f" else int)(word) for word in words], kind).tobytes()


def _numbers_of(path: Path, read: Callable[..., bytes], *of: Any) -> bytes:
    """Call what reads numbers of a text, and say of what is none that the file is corrupted."""
    try:
        return read(*of)
    except (ValueError, OverflowError) as error:
        raise VolumeError(
            "holds text that is no voxel of its type", path=path, reason="corrupted", found=str(error)[:80]
        ) from error


def _corrupted(path: Path, error: Exception) -> VolumeError:
    return VolumeError("holds corrupted packed data", path=path, reason="corrupted", found=error, hint="Copy it again.")


def _truncated(path: Path) -> VolumeError:
    return VolumeError("holds packed data that are truncated", path=path, reason="truncated", hint="Copy it again.")


def _member(unpacker: Any, packed: bytes, file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Unpack one member, which begins with `packed` and may go on in the file."""
    while not unpacker.eof:
        piece = _decompressed(unpacker, packed, path)
        if piece:
            yield piece
        if unpacker.eof:
            return
        packed = unpacker.unconsumed_tail or file.read(PACKED_PIECE)
        if not packed and not piece:
            raise _truncated(path)


def _decompressed(unpacker: Any, packed: bytes, path: Path) -> bytes:
    """Unpack the next piece of a member."""
    try:
        piece: bytes = unpacker.decompress(packed, PIECE)
    except _damage() as error:
        raise _corrupted(path, error) from error
    return piece


def _check_behind(packed: bytes, packing: Packing, path: Path) -> None:
    """Refuse what stands behind a member: of gzip, all but another or zeros; of zlib, anything."""
    if packing == "zlib":
        if packed:
            raise VolumeError("goes on beyond its packed voxels", path=path, reason="too-long")
        return
    behind = packed.lstrip(b"\0")
    if not behind.startswith(GZIP[: len(behind)]):
        raise VolumeError("goes on behind its packed data", path=path, reason="corrupted", found=behind[:8])


def _library() -> Any:
    """Return isal's zlib, which is faster by up to ten, or Python's: both have the same functions."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


def _damage() -> tuple[type[Exception], ...]:
    return zlib.error, _library().error


def packed_pieces(pieces: Iterable[bytes | memoryview], form: Literal["gzip", "zlib"]) -> Iterator[bytes]:
    """Compress what comes piece by piece as `pack` does, and hold no more than a piece."""
    packer = _packer(form)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


def pack(content: bytes | bytearray, form: Literal["gzip", "zlib"]) -> bytes:
    """Compress quickly; a gzip carries no name and no time, so equal content gives equal bytes."""
    packer = _packer(form)
    packed: bytes = packer.compress(content) + packer.flush()
    return packed


def _packer(form: Literal["gzip", "zlib"]) -> Any:
    # isal's levels reach from 0 to 3: its 2 packs about as small as zlib's 6
    return _library().compressobj(2, zlib.DEFLATED, 31 if form == "gzip" else 15)
