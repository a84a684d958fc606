"""The pixels of a DICOM file: native or compressed, masked to the bits in use, signed where they are.

Reference: DICOM PS3.5, section 8 and annex A.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.archives import BOMB_RATIO, BOMB_SIZE
from chiasm.volumes.dicom_files import DicomFile, number, taming, text, truncated

if TYPE_CHECKING:
    from pydicom import Dataset

FORMAT_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
PIXEL_TAGS = (*FORMAT_TAGS, "PixelData", "FloatPixelData", "DoubleFloatPixelData", "SmallestImagePixelValue")
FLOATING = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}  # elements of a parametric map, with their bits
WHOLE_BITS = (1, 8, 16, 32)  # from one whole number to the next
PLAIN = {"1.2.840.10008.1.2": 8, "1.2.840.10008.1.2.1": 12}  # little-endian syntaxes, and bytes before their pixels
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "")
CODECS = ("pydicom", "pylibjpeg", "pyjpegls", "pillow", "gdcm")  # the first that is installed is taken
LONGEST_SIDE = 4096  # pixels
PADDING = 2  # bytes that may follow native pixels, beyond less than a row


class Format(NamedTuple):
    """How a file stores its pixels.

    Attributes:
        rows: Of a frame.
        columns: Likewise.
        frames: In the file.
        allocated: Bits from one pixel to the next.
        stored: Bits in use.
        high: The highest of these.
        signed: Whether the highest is the sign.
        darkest_last: Whether the highest value is the darkest, MONOCHROME1.
        syntax: TransferSyntaxUID, "" where the file has no meta group.
        little: Whether the lowest byte comes first.
        floating: Whether pixels are floating-point numbers, of 32 or 64 bits.
    """

    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high: int
    signed: bool
    darkest_last: bool
    syntax: str
    little: bool
    floating: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest value that can be stored."""
        return (-(1 << self.stored - 1), (1 << self.stored - 1) - 1) if self.signed else (0, (1 << self.stored) - 1)


def pixel_format(dataset: Dataset, part: DicomFile) -> Format:
    """Read how pixels are stored.

    Raises:
        VolumeError: If there are none, they have colours, or the header is wrong.
    """
    with taming(part):
        name = element_of(dataset)
        if name is None:
            raise VolumeError("holds no pixels", path=part.place, reason="no-pixels")
        form = _format_of(dataset, part, floating=name in FLOATING)
    if form.floating and (form.allocated != FLOATING[name] or form.syntax not in NATIVE):
        raise VolumeError(
            "holds floating-point pixels in a way that cannot be",
            path=part.place,
            reason="header",
            found=f"{form.allocated} bits",
            expected=f"{FLOATING[name]} bits, not compressed",
        )
    return form


def element_of(dataset: Dataset) -> str | None:
    """Return the name of the element that holds the pixels; None where there are none."""
    return next((name for name in ("PixelData", *FLOATING) if name in dataset), None)


def _format_of(dataset: Dataset, part: DicomFile, *, floating: bool = False) -> Format:
    """Read how pixels are stored, of a header whose pixels need not be there."""
    with taming(part):
        _check_picture(dataset, part)
        allocated = _whole(dataset, "BitsAllocated", part)
        stored = _whole(dataset, "BitsStored", part, allocated)
        high = _whole(dataset, "HighBit", part, stored - 1)
        meta = getattr(dataset, "file_meta", None)
        form = Format(
            _whole(dataset, "Rows", part),
            _whole(dataset, "Columns", part),
            _whole(dataset, "NumberOfFrames", part, 1) or 1,
            allocated,
            stored,
            high,
            _whole(dataset, "PixelRepresentation", part, 0) == 1,
            text(dataset, "PhotometricInterpretation").upper() == "MONOCHROME1",
            "" if meta is None else text(meta, "TransferSyntaxUID"),
            dataset.original_encoding[1] is not False,
            floating,
        )
    _check_bits(form, part)
    _check_sides(form, part)
    return form


def _whole(dataset: Dataset, name: str, part: DicomFile, default: int | None = None) -> int:
    """Return an attribute that is a whole number from 0 on."""
    value = number(dataset, name, part)
    if value is None:
        value = default
    if value is None or value != int(value) or value < 0:
        raise VolumeError(f"has a {name} that is wrong", path=part.place, reason="header", found=value)
    return int(value)


def _check_picture(dataset: Dataset, part: DicomFile) -> None:
    """Refuse a file whose pixels are more than one number each."""
    interpretation = text(dataset, "PhotometricInterpretation").upper()
    one_value = _whole(dataset, "SamplesPerPixel", part, 1) == 1
    if not one_value or interpretation not in ("MONOCHROME1", "MONOCHROME2", ""):
        raise VolumeError(
            "holds a picture in colours",
            path=part.place,
            reason="colour",
            found=interpretation,
            expected="MONOCHROME1 or MONOCHROME2",
        )


def _check_bits(form: Format, part: DicomFile) -> None:
    """Refuse numbers of bits that cannot be."""
    fits = 1 <= form.stored <= form.allocated and form.stored - 1 <= form.high < form.allocated
    if form.allocated not in (*WHOLE_BITS, *([64] if form.floating else [])) or not fits:
        raise VolumeError(
            "has an impossible number of bits",
            path=part.place,
            reason="header",
            found=f"{form.allocated} allocated, {form.stored} stored, high bit {form.high}",
        )


def _check_sides(form: Format, part: DicomFile) -> None:
    """Refuse numbers of rows or columns that cannot be."""
    if not (0 < form.rows <= LONGEST_SIDE and 0 < form.columns <= LONGEST_SIDE):
        raise VolumeError(
            "has an impossible number of rows or columns",
            path=part.place,
            reason="header",
            found=f"{form.rows} and {form.columns}",
            expected=f"1 to {LONGEST_SIDE}",
        )


class StoredPixels(NamedTuple):
    """Native pixels at the end of a file whose header was read and checked, so that it need not be parsed again.

    Attributes:
        form: How they are stored.
        start: First byte.
        length: Bytes, up to the end of the file.
        changed: Time of the last change of the file, ns; a file that changed since then is parsed again.
    """

    form: Format
    start: int
    length: int
    changed: int

    def read(self, file: BinaryIO) -> bytes | None:
        """Return the pixels; None where the file is not as it was."""
        there = os.fstat(file.fileno())
        if (there.st_size, there.st_mtime_ns) != (self.start + self.length, self.changed):
            return None
        file.seek(self.start)
        content = file.read(self.length)
        return content if len(content) == self.length else None


def stored_pixels(dataset: Dataset, part: DicomFile, file: BinaryIO) -> StoredPixels | None:
    """Return where native pixels lie; None where the file must be parsed again to find them or their fault.

    Args:
        dataset: The header, with `FORMAT_TAGS`.
        part: What the file is called.
        file: Open, at the end of its header.
    """
    syntax = text(dataset.file_meta, "TransferSyntaxUID")
    if part.member is not None or syntax not in PLAIN:
        return None
    start, head = file.seek(0, os.SEEK_CUR) + PLAIN[syntax], file.read(PLAIN[syntax])
    is_named = head[4:6] in (b"OW", b"OB") if PLAIN[syntax] == 12 else True
    there, length = os.fstat(file.fileno()), int.from_bytes(head[-4:], "little")
    if head[:4] != b"\xe0\x7f\x10\0" or not is_named or start + length != there.st_size:
        return None
    try:
        return StoredPixels(_format_of(dataset, part), start, length, there.st_mtime_ns)
    except VolumeError:
        return None


def decode_native(content: bytes, part: DicomFile, form: Format, indices: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield frames of native pixels, as `decode` does.

    Raises:
        VolumeError: If pixels are missing, or there are too many.
    """
    with taming(part):
        for frame in _native(content, part, form, indices):
            yield _in_use(frame, form)


def decode(dataset: Dataset, part: DicomFile, form: Format, indices: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield frames as they are stored, in the order asked for, each (rows, columns).

    Bits beyond those in use are masked away; they may hold overlays.

    Raises:
        VolumeError: If pixels are missing or damaged, or no codec for them is installed.
    """
    with taming(part):
        content: bytes = dataset[element_of(dataset) or "PixelData"].value
        if not isinstance(content, bytes):
            raise VolumeError("holds no pixels", path=part.place, reason="no-pixels")
        native = form.syntax in NATIVE
        frames = _native(content, part, form, indices) if native else _compressed(dataset, part, form, indices)
        done = 0
        for frame in frames:
            yield _in_use(frame, form)
            done += 1
        if done < len(indices):
            raise truncated(part, f"{done} frames", f"{len(indices)} frames")


def _native(content: bytes, part: DicomFile, form: Format, indices: Sequence[int]) -> Iterator[NDArray[Any]]:
    pixels = form.rows * form.columns
    expected = -(-pixels * form.frames * form.allocated // 8)
    if len(content) < expected:
        raise truncated(part, f"{len(content)} bytes of pixels", f"{expected} bytes")
    if len(content) - expected >= max(PADDING, form.columns * form.allocated // 8):
        raise VolumeError(
            "goes on beyond its pixels",
            path=part.place,
            reason="too-long",
            found=f"{len(content)} bytes of pixels",
            expected=f"{expected} bytes",
        )
    every = _unpacked(content, form)
    for index in indices:
        yield every[index * pixels : (index + 1) * pixels].reshape(form.rows, form.columns)


def _unpacked(content: bytes, form: Format) -> NDArray[Any]:
    """Return native pixels of all frames in a row."""
    count = form.rows * form.columns * form.frames
    if form.allocated == 1:
        return np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")[:count]
    if form.allocated == 8 and not form.little and len(content) % 2 == 0:
        return np.frombuffer(content, np.uint16).byteswap().view(np.uint8)[:count]  # words, swapped
    kind = np.dtype(f"{'<' if form.little else '>'}{'f' if form.floating else 'u'}{form.allocated // 8}")
    return np.frombuffer(content, kind, count).astype(kind.newbyteorder("="), copy=False)


def _compressed(dataset: Dataset, part: DicomFile, form: Format, indices: Sequence[int]) -> Iterator[NDArray[Any]]:
    from pydicom.uid import UID

    decoder, plugin = _codec(form, part)
    _check_coded(dataset.PixelData, part, form)
    try:
        for frame, _ in decoder.iter_array(dataset, indices=indices, raw=True, decoding_plugin=plugin):
            yield np.asarray(frame)
    except NotImplementedError as error:
        raise VolumeError(
            "is compressed in a way that the codec at hand does not know",
            path=part.place,
            reason="codec",
            found=f"{UID(form.syntax).name}, {plugin}",
            hint="Export it uncompressed.",
        ) from error


def _codec(form: Format, part: DicomFile) -> tuple[Any, str]:
    """Return pydicom's decoder for a transfer syntax, and the library that is installed for it."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    name = UID(form.syntax).name
    try:
        decoder = get_decoder(form.syntax)
    except NotImplementedError as error:
        raise VolumeError(
            "is compressed in a way that chiasm does not know",
            path=part.place,
            reason="codec",
            found=name,
            hint="Export it uncompressed.",
        ) from error
    plugin = next((one for one in CODECS if one in decoder.available_plugins), None)
    if plugin is None:
        raise _not_installed(decoder, name, part)
    return decoder, plugin


def _not_installed(decoder: Any, name: str, part: DicomFile) -> VolumeError:
    """Say which libraries decode a transfer syntax, since none of them is installed."""
    missing = ", ".join(line.split(" - ")[-1].removeprefix("requires ") for line in decoder.missing_dependencies)
    return VolumeError(
        "is compressed, and its codec is not installed",
        path=part.place,
        reason="codec",
        found=name,
        hint=f"Install one of: {missing}.",
    )


def _check_coded(content: bytes, part: DicomFile, form: Format) -> None:
    """Refuse compressed pixels that unpack to too much, or to another size than the header says."""
    from pydicom.encaps import generate_frames

    unpacked = form.rows * form.columns * form.frames * form.allocated // 8
    if unpacked > max(BOMB_SIZE, BOMB_RATIO * len(content)):
        raise VolumeError(
            "unpacks to too much", path=part.place, reason="bomb", found=f"{len(content)} to {unpacked} bytes"
        )
    for coded in generate_frames(content, number_of_frames=form.frames):
        size = coded_size(coded)
        if size is not None and size != (form.rows, form.columns):
            raise VolumeError(
                "holds compressed pixels of another size than its header says",
                path=part.place,
                reason="corrupted",
                found=f"{size[0]} rows, {size[1]} columns",
                expected=f"{form.rows} rows, {form.columns} columns",
            )


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """Return rows and columns as a JPEG, JPEG-LS or JPEG 2000 stream declares them; None where it does not.

    A decoder allocates what the stream says, whatever the DICOM header does.
    """
    if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: SOC, SIZ
        x, y, x0, y0 = (int.from_bytes(frame[at : at + 4]) for at in (8, 12, 16, 20))
        return y - y0, x - x0
    return _size_in_segments(frame) if frame[:2] == b"\xff\xd8" else None


#: A segment of a JPEG: its kind, and the length of what follows, these two bytes included.
SEGMENT = re.compile(rb"\xff+([^\xff\0])(..)", re.DOTALL)
#: Kinds of segments that begin with the size of the image.
WITH_SIZE = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _size_in_segments(frame: bytes) -> tuple[int, int] | None:
    """Return rows and columns as the segments of a JPEG or JPEG-LS declare them; None where none does."""
    at = 2
    while match := SEGMENT.match(frame, at):
        if match[1][0] in WITH_SIZE:
            rows, columns = (int.from_bytes(frame[start : start + 2]) for start in (match.end() + 1, match.end() + 3))
            return rows, columns
        at = match.end() - 2 + max(2, int.from_bytes(match[2]))
    return None


def _in_use(raw: NDArray[Any], form: Format) -> NDArray[Any]:
    """Keep the bits in use and extend their sign; of whole numbers."""
    if form.floating:
        return raw
    shift = form.high + 1 - form.stored if form.syntax in NATIVE else 0
    wide: NDArray[Any] = raw.astype(np.int32 if form.allocated <= 16 else np.int64)
    if form.allocated > 1:
        wide = (wide >> shift) & ((1 << form.stored) - 1)
    if form.signed:
        sign = 1 << form.stored - 1
        wide = (wide ^ sign) - sign
    return wide
