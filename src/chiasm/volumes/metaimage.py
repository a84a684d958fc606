"""MetaImage (.mha, .mhd): a text header, then voxels in the same file or in a sibling.

Reference: https://itk.org/Wiki/MetaIO/Documentation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.storage import whole_file
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry
from chiasm.volumes.streams import (
    Stream,
    file_size,
    first_bytes,
    numbers_in,
    pack,
    packed_whole,
    packing_of,
    sibling,
)
from chiasm.volumes.voxels import Stored, are_sides, checked_size

LONGEST_HEADER = 2**16
LARGEST = 1e12  # number of a header
REAL = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip

#: Several names for one thing, the usual one first.
ORDERS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
TURNS = ("TransformMatrix", "Rotation", "Orientation")
PLACES = ("Offset", "Position", "Origin")
STEPS = ("ElementSpacing", "ElementSize")
UNIT = 1e-3  # by how much a direction's length may differ from 1

#: Lines that say how the grid lies: they are copied as they were written.
PLACE = (*TURNS, *PLACES, "CenterOfRotation", "AnatomicalOrientation", *STEPS)


def looks_like_metaimage(head: bytes) -> bool:
    """Recognise it by its first line: one of the names that such a header begins with."""
    return re.match(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=", head) is not None


def open_metaimage(path: Path, *, max_bytes: int = 2 * 2**30) -> Stored:
    """Check the header of a MetaImage.

    Args:
        path: A .mha or .mhd file.
        max_bytes: Most bytes of voxels.

    Raises:
        VolumeError: If the header breaks a rule, or its file of voxels is not beside it.
    """
    fields, start = _read_header(path)
    if fields.get("ObjectType", "Image") != "Image":
        raise VolumeError("is a MetaImage without voxels", path=path, reason="header", found=fields["ObjectType"])
    shape, spacing, direction, offset = _grid(fields, path)
    dtype = _voxel_type(fields, path)
    size = checked_size(shape, dtype, path, max_bytes)
    if not _truth(fields, "BinaryData", path, True):
        raise VolumeError("holds its voxels as text", path=path, reason="text-voxels", expected="BinaryData = True")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, offset
    geometry = _with_lines_of_place(Geometry(shape, LPS_TO_RAS @ affine), fields)
    packed = _truth(fields, "CompressedData", path)
    return Stored(_stream(path, fields, start, size, packed), dtype, geometry)


def _with_lines_of_place(grid: Geometry, fields: Mapping[str, str]) -> Geometry:
    """Return a grid with the lines that say how it lies, as they were written, if they are plain text."""
    place = "".join(f"{name} = {fields[name]}\n" for name in PLACE if name in fields)
    return replace(grid, header=place.encode(), container="metaimage") if place.isascii() else grid


def _voxel_type(fields: dict[str, str], path: Path) -> np.dtype[Any]:
    """Return how a voxel is stored: one real number, as it is meant."""
    kind = fields.get("ElementType", "")
    if kind not in REAL:
        raise VolumeError(
            "holds values of an unknown type", path=path, reason="datatype", found=kind, expected=", ".join(REAL)
        )
    _check_meaning(fields, path)
    return np.dtype(_byte_order(fields, path) + REAL[kind])


def _check_meaning(fields: dict[str, str], path: Path) -> None:
    """Refuse several values a voxel, and stored values that are not meant as they are."""
    if (channels := _numbers(fields, "ElementNumberOfChannels", path, 1, "1")) != [1]:
        raise VolumeError("holds more than one value a voxel", path=path, reason="four-d", found=channels[0])
    slope = _numbers(fields, "ElementToIntensityFunctionSlope", path, 1, "1")
    offset = _numbers(fields, "ElementToIntensityFunctionOffset", path, 1, "0")
    if (scale := [*slope, *offset]) != [1, 0]:  # no reader that we know heeds them, so nobody knows what was meant
        raise VolumeError("has a slope or intercept of its own", path=path, reason="slope", found=scale)


def _byte_order(fields: dict[str, str], path: Path) -> str:
    """Return which byte of a number comes first, by either of two names."""
    orders = {_truth(fields, name, path) for name in ORDERS if name in fields} or {False}
    if len(orders) > 1:
        raise VolumeError("states two byte orders", path=path, reason="header", found=" and ".join(ORDERS))
    return ">" if orders.pop() else "<"


def _stream(path: Path, fields: dict[str, str], start: int, size: int, packed: bool) -> Stream:
    """Say where the voxels lie; MetaImage pads nothing, so not a byte may follow them."""
    data = _data_file(path, fields)
    if data == path and packing_of(path) == "gzip":
        return packed_whole(path, start, size, has_packed_voxels=packed)
    skip = start if data == path else _header_size(data, fields, path, size, packed)
    if packed:
        _check_packed_size(data, skip, fields, path)
    return Stream(data, "zlib" if packed else "none", skip, 0, size, 0)


def _check_packed_size(data: Path, skip: int, fields: dict[str, str], path: Path) -> None:
    """Refuse packed voxels that take another number of bytes than the header says, if it does."""
    (length,) = _numbers(fields, "CompressedDataSize", path, 1, "0")
    there = file_size(data) - skip
    if length not in (0, there):
        raise VolumeError(
            "has packed voxels of another length than its header says",
            path=path,
            reason="truncated" if there < length else "too-long",
            found=f"{there} bytes",
            expected=f"{length:.0f}",
        )


def _header_size(data: Path, fields: dict[str, str], path: Path, size: int, packed: bool) -> int:
    """Return where the voxels begin in their own file."""
    skip = int(_numbers(fields, "HeaderSize", path, 1, "0")[0])
    if skip == -1 and not packed:  # the voxels are the end of the file, whatever stands before them
        skip = max(0, file_size(data) - size)
    if not 0 <= skip <= 2**31:
        raise VolumeError("has an impossible HeaderSize", path=path, reason="vox-offset", found=skip)
    return skip


def _read_header(path: Path) -> tuple[dict[str, str], int]:
    """Return the header's fields and where it ends."""
    head = first_bytes(path, LONGEST_HEADER)
    end = re.search(rb"^[ \t]*ElementDataFile[ \t]*=[^\n]*\n?", head, re.MULTILINE)
    if end is None:
        raise VolumeError("has no whole MetaImage header: ElementDataFile is missing", path=path, reason="header")
    text = head[: end.end()].decode("utf-8", "replace")
    if "\0" in text:
        raise VolumeError("has a MetaImage header that is no text", path=path, reason="header")
    return _fields_of(text, path), end.end()


def _fields_of(text: str, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, separator, value = map(str.strip, line.partition("="))
        if not separator:
            continue
        if fields.get(name, value) != value and name != "Comment":
            found = f"{fields[name][:80]} and {value[:80]}"
            raise VolumeError(f"states {name} twice", path=path, reason="header", found=found)
        fields[name] = value
    return fields


def _grid(
    fields: dict[str, str], path: Path
) -> tuple[tuple[int, int, int], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return shape, spacing, direction (columns are axes) and offset, LPS and mm."""
    shape, n = _shape(fields, path)
    turn, place, step = (_first_of(names, fields) for names in (TURNS, PLACES, STEPS))
    matrix = np.array(_numbers(fields, turn, path, n * n, _line(np.eye(n, dtype=int)))).reshape(n, n)
    direction, spacing, offset = np.eye(3), np.ones(3), np.zeros(3)
    m = min(n, 3)
    direction[:m, :m] = matrix[:m, :m].T  # each line of the file is one axis
    spacing[:m] = _numbers(fields, step, path, n, _line(np.ones(n)))[:m]
    offset[:m] = _numbers(fields, place, path, n, _line(np.zeros(n)))[:m]
    if spacing.min() <= 0:
        raise VolumeError("has a zero or negative spacing", path=path, reason="spacing", found=fields[step])
    lengths = np.linalg.norm(direction, axis=0)
    if lengths.min() > 0 and np.abs(lengths - 1).max() > UNIT:  # nobody knows whether they change the spacing
        raise VolumeError("has directions that are not of length 1", path=path, reason="affine", found=fields[turn])
    return shape, spacing, direction, offset


def _shape(fields: dict[str, str], path: Path) -> tuple[tuple[int, int, int], int]:
    """Return voxels along the three axes, and how many axes the header describes."""
    (axes,) = _numbers(fields, "NDims", path, 1, None)
    if axes not in (2, 3, 4):
        raise VolumeError("has impossible dimensions", path=path, reason="dimensions", found=f"NDims = {axes:g}")
    sides = _numbers(fields, "DimSize", path, int(axes), None)
    if not are_sides(sides):
        raise VolumeError("has impossible dimensions", path=path, reason="dimensions", found=fields["DimSize"])
    if sides[3:] not in ([], [1]):
        raise VolumeError("is 4D: it holds more than one volume", path=path, reason="four-d", found=fields["DimSize"])
    i, j, k = (*map(int, sides[:3]), 1)[:3]
    return (i, j, k), int(axes)


def _first_of(names: Sequence[str], fields: Collection[str]) -> str:
    """Return by which of several names a header calls one thing; the first where it does not say it."""
    return next((name for name in names if name in fields), names[0])


def _numbers(fields: dict[str, str], name: str, path: Path, count: int, default: str | None) -> list[float]:
    """Read so many numbers of a field, which must be there where it has no default."""
    text = fields.get(name, default)
    if text is None:
        raise VolumeError(f"has no whole MetaImage header: {name} is missing", path=path, reason="header")
    values = list(numbers_in(text))
    if len(values) != count or not all(abs(value) <= LARGEST for value in values):
        raise VolumeError(
            f"has a MetaImage header whose {name} is wrong",
            path=path,
            reason="header",
            found=text[:80],
            expected=f"{count} numbers",
        )
    return values


def _truth(fields: dict[str, str], name: str, path: Path, default: bool = False) -> bool:
    text = fields.get(name, str(default)).lower()
    if text not in ("true", "t", "1", "false", "f", "0"):
        raise VolumeError(
            f"has a MetaImage header whose {name} is wrong", path=path, reason="header", found=text[:80],
            expected="True or False",
        )  # fmt: skip
    return text in ("true", "t", "1")


def _data_file(path: Path, fields: dict[str, str]) -> Path:
    """Return the file of the voxels: this one, or a plain name beside it, never elsewhere."""
    name = fields["ElementDataFile"]
    if name.upper() == "LOCAL":
        return path
    return sibling(path, name)


def write_metaimage(path: Path, array: NDArray[Any], geometry: Geometry, remark: str = "") -> None:
    """Write voxels on a grid as one compressed .mha; a header that was read as MetaImage keeps its lines of place.

    Args:
        path: Ends in .mha.
        array: Of a type in `REAL`, shape of the grid.
        geometry: The grid.
        remark: A line of text for the header.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    dtype = array.dtype.newbyteorder("<")
    kind = next(kind for kind, name in REAL.items() if name == dtype.str[1:])
    place = _place(geometry)
    comment = f"Comment = {remark}\n" if remark else ""
    voxels = pack(np.asarray(array, dtype).tobytes(order="F"), "zlib")
    head = (
        f"ObjectType = Image\n{comment}NDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        "CompressedData = True\n"
        f"CompressedDataSize = {len(voxels)}\n{place}DimSize = {_line(np.array(geometry.shape))}\n"
        f"ElementType = {kind}\nElementDataFile = LOCAL\n"
    )
    with whole_file(path) as temporary:
        temporary.write_bytes(head.encode("ascii") + voxels)


def _place(geometry: Geometry) -> str:
    """Return the lines that say how a grid lies, as they were read where they were."""
    kept = geometry.header_as("metaimage")
    if kept is not None:
        return kept.decode("ascii")
    affine = LPS_TO_RAS @ geometry.affine
    direction = affine[:3, :3] / geometry.spacing_mm
    return (
        f"TransformMatrix = {_line(direction.T)}\nOffset = {_line(affine[:3, 3])}\n"
        f"CenterOfRotation = 0 0 0\nElementSpacing = {_line(np.array(geometry.spacing_mm))}\n"
    )


def _line(values: NDArray[Any]) -> str:
    return " ".join(map(repr, values.ravel().tolist()))
