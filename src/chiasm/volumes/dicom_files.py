"""Open DICOM files one at a time: recognised by content, read within limits, each fault named.

pydicom parses; it may raise almost anything on a damaged file and allocates
what a header promises.  Here a file is never asked for more than it has, a
deflated one or a zip archive never unpacks to more than is plausible, and only
`VolumeError` leaves.  Nothing of the patient module is read, shown or kept.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from chiasm.errors import VolumeError
from chiasm.volumes.archives import (
    BOMB_RATIO,
    BOMB_SIZE,
    HIDDEN,
    check_count,
    list_members,
    looks_like_zip,
    unpack_member,
)
from chiasm.volumes.dicom_silence import silenced
from chiasm.volumes.streams import open_file, unreadable

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

T = TypeVar("T")

DEEPEST = 8  # levels of folders that are looked into
LONGEST_TEXT = 120
MOST_READS = 200_000  # pieces of a header, two to four for each element: 1.5 s; 1,000 frames may have 150,000
SMALL_READ = 2**16  # bytes that may be asked for without looking whether they are there
HEAD = 256  # bytes by which DICOM is known
HEADER = 2**23  # bytes in which items are counted
ITEM = b"\xfe\xff\x00\xe0"
MOST_ITEMS = 30_000  # of sequences: 1,000 frames have 10,000 to 25,000
LONGEST_GROUPS = 3 * 2**20  # bytes of functional groups: 1,000 frames have 1 to 3 MB
UNDEFINED = 0xFFFFFFFF  # length of an element that ends with a mark
DEFLATED = "1.2.840.10008.1.2.1.99"
DIRECTORY = "1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR

#: What pydicom and its decoders raise on damaged input.
FAULTS = (
    ValueError, TypeError, AttributeError, LookupError, OSError, EOFError, ArithmeticError, RuntimeError,
    AssertionError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


class DicomFile(NamedTuple):
    """One DICOM file, on disk or as a member of a zip archive."""

    path: Path
    member: str | None = None

    @property
    def place(self) -> Path:
        """The path that messages show."""
        return self.path if self.member is None else Path(f"{self.path}/{self.member}")


class _Tame(BufferedReader):
    """A file that is never asked for more bytes than it has, which allocates them, nor too often, which takes time."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        _check_reads(self.reads)
        if size is not None and 0 <= size <= SMALL_READ:
            return super().read(size)
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


class _TameBytes(BytesIO):
    """Bytes that are not read too often."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        _check_reads(self.reads)
        return super().read(size)


def _check_reads(count: int) -> None:
    if count > MOST_READS:
        raise VolumeError("has too many elements in its header", reason="too-large", expected=f"{MOST_READS} reads")


def looks_like_dicom(head: bytes) -> bool:
    """Recognise DICOM by the letters DICM after 128 bytes or, without them, by a first element of group 2 or 8."""
    if head[128:132] == b"DICM":
        return True
    first = rb"[\x02\x08]\0.\0(?:[A-Z]{2}|[\0-\xff]\0\0\0)|\0[\x02\x08]\0.[A-Z]{2}"
    return re.match(first, head, re.DOTALL) is not None


def list_parts(path: Path) -> list[DicomFile]:
    """List the files of a folder and the folders below it, or the members of a zip archive, by name.

    Links are followed, and listed where they lead nowhere; hidden files are left out, and nothing is unpacked.

    Raises:
        VolumeError: If there are too many, a folder or archive cannot be read,
            or an archive holds a bomb or names a place outside itself.
    """
    if path.is_dir():
        return [DicomFile(file) for file in _files_below(path)]
    return _members(path) if looks_like_zip(head_of(path)) else [DicomFile(path)]


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file, which show whether it is DICOM or an archive.

    Raises:
        VolumeError: If it cannot be read.
    """
    try:
        with open_file(path) as file:
            return file.read(HEAD)
    except OSError as error:
        raise unreadable(path, error) from error


def visible_files(root: Path) -> Iterator[Path]:
    """List the files below a folder in the order of their paths, through links, without hidden ones.

    A link that leads back to a folder above it is left out, and so is all that lies deeper than `DEEPEST` levels.

    Raises:
        OSError: If a folder cannot be listed.
    """

    def walk(folder: Path, open_folders: tuple[str, ...]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in open_folders or len(open_folders) > DEEPEST:
            return
        for name in _visible_names(folder):
            path = folder / name
            if path.is_dir():  # entry.is_dir() raises at a link in a circle
                yield from walk(path, (*open_folders, real))
            else:
                yield path

    return walk(root, ())


def _visible_names(folder: Path) -> list[str]:
    """List what lies in a folder, in order, without what is hidden."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(HIDDEN))


def _files_below(root: Path) -> list[Path]:
    found: list[Path] = []
    try:
        for path in visible_files(root):
            if _is_file(path):
                found.append(path)
                check_count(len(found), root)
    except OSError as error:
        raise unreadable(root, error) from error
    return found


def parts_beside(part: DicomFile) -> list[DicomFile]:
    """List the files in one folder with a file, or the members in one folder of an archive.

    Raises:
        VolumeError: If it cannot be listed, or holds too many.
    """
    if part.member is not None:
        return [other for other in list_parts(part.path) if other.place.parent == part.place.parent]
    return parts_in(part.path.parent)


def parts_in(folder: Path) -> list[DicomFile]:
    """List the files in a folder itself by name, without hidden ones.

    Raises:
        VolumeError: If it cannot be listed, or holds too many.
    """
    try:
        files = sorted(file for file in folder.iterdir() if _is_file(file) and not file.name.startswith("."))
    except OSError as error:
        raise VolumeError("cannot be listed", path=folder, reason="unreadable", found=error.strerror) from error
    check_count(len(files), folder)
    return [DicomFile(file) for file in files]


def _is_file(path: Path) -> bool:
    """Return whether a path in a folder is a file, or a link that leads nowhere or in a circle; no pipe or device."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _members(path: Path) -> list[DicomFile]:
    """List the members of an archive by name."""
    try:
        return [DicomFile(path, name) for name in list_members(path)]
    except FAULTS as error:
        raise VolumeError("is a damaged zip archive", path=path, reason="corrupted", hint="Copy it again.") from error


def visit(parts: Iterable[DicomFile], do: Callable[[DicomFile, BinaryIO], T]) -> Iterator[T]:
    """Open each part in turn and yield what `do` returns for it; an archive is opened once.

    Args:
        parts: To visit.
        do: Called with a part and its file, open at the start.

    Raises:
        VolumeError: If a part cannot be opened.
    """
    with ExitStack() as open_archives:
        archive: zipfile.ZipFile | None = None
        for part in parts:
            with silenced():  # once for each file: to change the levels of loggers takes longer than a header's text
                if part.member is None:
                    with _opened(part.path) as file:
                        done = do(part, file)
                else:
                    with taming(part):
                        if archive is None or archive.filename != str(part.path):
                            open_archives.close()
                            archive = open_archives.enter_context(zipfile.ZipFile(part.path))
                        content = unpack_member(archive, part.member)
                    done = do(part, _TameBytes(content))
            yield done


def _opened(path: Path) -> _Tame:
    try:
        return _Tame(path.open("rb", buffering=0))
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def taming(part: DicomFile) -> Iterator[None]:
    """Turn every error that pydicom raises on a damaged file into a `VolumeError`.

    pydicom's messages and warnings are not shown, because they may quote the patient.

    Raises:
        VolumeError: If pydicom fails, or the block refuses the file.
    """
    try:
        with silenced():
            yield
    except VolumeError as error:
        raise _placed(error, part) from error.__cause__
    except _faults() as error:
        if isinstance(error.__context__, VolumeError):  # ours, which pydicom took for its own
            raise _placed(error.__context__, part) from error
        # the text of the error may quote the patient
        raise VolumeError(
            "is DICOM that is damaged",
            path=part.place,
            reason="corrupted",
            found=type(error).__name__,
            hint="Export or copy it again.",
        ) from error


def _placed(error: VolumeError, part: DicomFile) -> VolumeError:
    """Say where, if the error does not."""
    if error.path is not None:
        return error
    return VolumeError(error.what, path=part.place, reason=error.reason, expected=error.expected)


def _faults() -> tuple[type[Exception], ...]:
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (*FAULTS, BytesLengthException, InvalidDicomError)


def read_dataset(
    part: DicomFile, file: BinaryIO, *, tags: Sequence[str] = (), pixels: bool = False, max_bytes: int = 2 * 2**30
) -> Dataset:
    """Parse a DICOM file, with or without the 128 bytes and the meta group in front.

    Args:
        part: What it is called.
        file: Open at its start, as from `visit`.
        tags: Keywords of the attributes that are wanted; all where none is named.
        pixels: Whether the pixel data are wanted.
        max_bytes: Most bytes that a deflated data set may unpack to.

    Raises:
        VolumeError: If it is no DICOM or is damaged.
    """
    from pydicom import dcmread

    with taming(part):
        file = _plain(file, part, max_bytes)
        _check_items(file, part)
        dataset = dcmread(file, stop_before_pixels=not pixels, force=True, specific_tags=_tags_of(tuple(tags)))
        _check_pixels(dataset, part)
        _check_groups(dataset, part)
        return dataset


@lru_cache(maxsize=64)
def _tags_of(names: tuple[str, ...]) -> list[int | str | tuple[int, int]] | None:
    """Return the tags of keywords; None, which stands for all, where there are none."""
    from pydicom.tag import Tag

    return [Tag(name) for name in names] or None


def _plain(file: BinaryIO, part: DicomFile, max_bytes: int) -> BinaryIO:
    """Return a DICOM file at its start, unpacked if it is deflated; refuse what is no DICOM."""
    head = file.read(HEAD)
    if not looks_like_dicom(head):
        raise VolumeError("is no DICOM file", path=part.place, reason="format", found=f"first bytes {head[:8]!r}")
    file.seek(0)
    if head[128:132] == b"DICM" and DEFLATED.encode() in file.read(2**16):
        file = _TameBytes(_inflated(file, part, max_bytes))
    file.seek(0)
    return file


def _check_items(file: BinaryIO, part: DicomFile) -> None:
    """Refuse a header that would take too long to parse."""
    has_room = file.seek(0, os.SEEK_END) > 8 * MOST_ITEMS  # an item takes eight bytes at least
    file.seek(0)
    if has_room and file.read(HEADER).count(ITEM) > MOST_ITEMS:
        raise VolumeError("has too many elements in its header", path=part.place, reason="too-large")
    file.seek(0)


def _check_pixels(dataset: Dataset, part: DicomFile) -> None:
    """Refuse pixels of which the file holds fewer bytes than it says."""
    element = dataset.get_item("PixelData") if "PixelData" in dataset else None
    length, content = getattr(element, "length", 0), getattr(element, "value", None)
    if isinstance(content, bytes) and len(content) < length < UNDEFINED:
        raise truncated(part, f"{len(content)} bytes of pixels", f"{length} bytes")


def truncated(part: DicomFile, found: str, expected: str) -> VolumeError:
    """Return the error of a file that holds fewer bytes than its header declares."""
    return VolumeError(
        "is truncated", path=part.place, reason="truncated", found=found, expected=expected, hint="Copy it again."
    )


def _check_groups(dataset: Dataset, part: DicomFile) -> None:
    """Refuse functional groups that would take too long to parse."""
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        packed = getattr(dataset.get_item(name), "value", None) if name in dataset else None
        if isinstance(packed, bytes) and len(packed) > LONGEST_GROUPS:
            raise VolumeError(
                "has too many elements in its header", path=part.place, reason="too-large", found=f"in {name}"
            )


def _inflated(file: BinaryIO, part: DicomFile, max_bytes: int) -> bytes:
    """Unpack a deflated data set, up to a limit, into an explicit little-endian file."""
    file.seek(0)
    length = struct.unpack("<I", file.read(144)[140:])[0]  # (0002,0000), the first element of the meta group
    start = 144 + length
    file.seek(0)
    meta = file.read(start)
    if b"\x02\0\x10\0UI\x16\0" + DEFLATED.encode() not in meta:  # it stands somewhere else
        file.seek(0)
        return file.read()
    packed = file.read()
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    limit = min(max_bytes, max(BOMB_SIZE, BOMB_RATIO * len(packed)))
    content = unpacker.decompress(packed, limit)
    if not unpacker.eof:
        late = bool(unpacker.unconsumed_tail)
        raise VolumeError(
            "unpacks to too much" if late else "is truncated",
            path=part.place,
            reason="bomb" if late else "truncated",
        )
    # The name of the syntax is as long as another that says the same without the compression, if padded.
    plain = b"1.2.840.10008.1.2.1".ljust(len(DEFLATED), b"\0")
    return meta.replace(DEFLATED.encode(), plain, 1) + content


def text(dataset: Dataset, name: str) -> str:
    """Return an attribute as one printable line, several values joined by backslashes; "" if absent or empty."""
    value = _value_of(dataset, name)
    if value is None:
        return ""
    line = "\\".join(map(str, _listed(value)))
    shown = line if line.isprintable() else "".join(mark if mark.isprintable() else " " for mark in line)
    return shown.strip()[:LONGEST_TEXT]


def _value_of(dataset: Dataset, name: str) -> Any:
    """Return an attribute's value or None, as `dataset.get(name)` does, without looking up the name each time."""
    element = dataset.get(_tag_of(name))
    return None if element is None else element.value


@cache
def _tag_of(name: str) -> BaseTag:
    from pydicom.tag import Tag

    return Tag(name)


def _listed(value: Any) -> list[Any]:
    """Return the values of an attribute, of which there may be none, one or several."""
    return [value] if isinstance(value, (str, int, float)) else list(value)


def numbers(dataset: Dataset, name: str, part: DicomFile, count: int | None = None) -> list[float]:
    """Return an attribute's numbers; an empty list if it is absent or empty.

    Raises:
        VolumeError: If one is no finite number, or there are not `count` of them.
    """
    values = _values(dataset, name)
    is_count = count is None or len(values) == count
    if not is_count or not all(map(math.isfinite, values)):
        raise _wrong_numbers(values, name, part, count)
    return values


def _wrong_numbers(values: Sequence[float], name: str, part: DicomFile, count: int | None) -> VolumeError:
    """Say that an attribute does not hold the numbers that are needed."""
    wrong = "no finite number" if count == len(values) else f"{len(values)} values"
    return VolumeError(
        f"has a {name} that is wrong",
        path=part.place,
        reason="header",
        found=wrong if values else "nothing",
        expected=f"{count or 1} finite numbers",
    )


def _values(dataset: Dataset, name: str) -> list[float]:
    """Return an attribute's numbers; a NaN where they are none."""
    try:
        value = _value_of(dataset, name)
        several = [] if value is None or value == "" else value
        listed: Sequence[Any] = several if hasattr(several, "__iter__") else [several]
        return [float(one) for one in listed]
    except _faults():
        return [math.nan]


def number(dataset: Dataset, name: str, part: DicomFile) -> float | None:
    """Return an attribute's only number, or None where it is absent or empty.

    Raises:
        VolumeError: If it is no finite number, or there are several.
    """
    values = numbers(dataset, name, part)
    if len(values) > 1:
        raise _wrong_numbers(values, name, part, 1)
    return values[0] if values else None


def count_frames(dataset: Dataset, part: DicomFile) -> int:
    """Return the number of images that a file declares; 1 if it declares none.

    Raises:
        VolumeError: If the declaration is no finite number.
    """
    return int(number(dataset, "NumberOfFrames", part) or 1)
