"""NRRD (.nrrd, .nhdr): a text header, then voxels in the same file or in a sibling.

Reference: http://teem.sourceforge.net/nrrd/format.html.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.storage import whole_file
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry
from chiasm.volumes.streams import (
    Packing,
    Stream,
    file_size,
    first_bytes,
    numbers_in,
    open_file,
    pack,
    packed_whole,
    packing_of,
    sibling,
)
from chiasm.volumes.voxels import Stored, are_sides, checked_size

_TIME = re.compile(r"-time$|(?<=^...)t$")  # at the end of a space's name
LONGEST_HEADER = 2**18
LONGEST_LINES = 2**20  # bytes of lines before the voxels that are skipped
LARGEST = 1e12  # number of a header
MOST_SKIPPED = 2**31

_TYPES = {
    "i1": "signed char,int8,int8_t",
    "u1": "uchar,unsigned char,uint8,uint8_t",
    "i2": "short,short int,signed short,signed short int,int16,int16_t",
    "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    "i4": "int,signed int,int32,int32_t",
    "u4": "uint,unsigned int,uint32,uint32_t",
    "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
    "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
    "f4": "float",
    "f8": "double",
}
#: Name of a type to numpy's, without the byte order.
REAL: Mapping[str, str] = {name: kind for kind, names in _TYPES.items() for name in names.split(",")}
WRITTEN: Mapping[str, str] = {kind: names.split(",")[0] for kind, names in _TYPES.items()}
ENCODINGS: Mapping[str, Packing] = {
    "raw": "none", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2", "hex": "hex", "text": "text",
    "txt": "text", "ascii": "text",
}  # fmt: skip
#: What fields may be called too.
OTHER_NAMES = {
    "datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip", "axismins": "axis mins",
    "centers": "centerings",
}  # fmt: skip
#: From a named space to RAS: the factors of its three axes.
SPACES: Mapping[str, tuple[int, int, int]] = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
#: What axes of space may be called; others hold colours, vectors or times.
SPATIAL_KINDS = ("domain", "space", "none", "???")
#: Spaces that do not say where the patient's right is.
UNNAMED = ("scanner-xyz", "3d-right-handed", "3d-left-handed")
UNITS = {"": 1.0, "mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "\N{MICRO SIGN}m": 1e-3}


@dataclass(frozen=True)
class _Axes:
    """The axes of a header.

    Attributes:
        sides: Samples along each.
        directions: Of each in the world, or None where it has none.
        spacings: Of each, NaN where it has none.
        units: Of each spacing.
        starts: Place of the first sample along each, in its unit; NaN where it has none.
        kinds: What each holds.
    """

    sides: tuple[int, ...]
    directions: tuple[tuple[float, ...] | None, ...]
    spacings: tuple[float, ...]
    units: tuple[str, ...]
    starts: tuple[float, ...]
    kinds: tuple[str, ...]


def looks_like_nrrd(head: bytes) -> bool:
    """Recognise it by the first line: NRRD and the version of the format."""
    return re.match(rb"NRRD000[1-9]\r?\n", head) is not None


def open_nrrd(path: Path, *, assume_ras: bool = False, max_bytes: int = 2 * 2**30) -> Stored:
    """Check the header of a NRRD file.

    The measurement frame is ignored: it turns the values of vectors and tensors, which are refused.

    Args:
        path: A .nrrd or .nhdr file.
        assume_ras: Whether to take a file that does not name its space as RAS.
        max_bytes: Most bytes of voxels.

    Raises:
        VolumeError: If the header breaks a rule, or its file of voxels is not beside it.
    """
    fields, start = _read_header(path)
    axes = _spatial_axes(_axes(fields, path), path)
    packing = _packing(fields, path)
    dtype = _voxel_type(fields, packing, path)
    i, j, k = axes.sides
    size = checked_size(axes.sides, dtype, path, max_bytes)
    geometry = Geometry((i, j, k), _affine(fields, axes, path, assume_ras))
    number = dtype.str if packing == "text" else ""
    return Stored(replace(_stream(path, fields, start, size), number=number), dtype, geometry)


def data_file_of(path: Path) -> Path:
    """Return the file of a NRRD's voxels: itself, or a plain name beside it.

    Raises:
        VolumeError: If the header is broken, or names a file elsewhere or one that is missing.
    """
    fields, _ = _read_header(path)
    return _data_file(path, fields)


def _read_header(path: Path) -> tuple[dict[str, str], int]:
    """Return the header's fields, names in small letters, and where it ends."""
    head = first_bytes(path, LONGEST_HEADER)
    end = re.search(rb"\r?\n\r?\n", head)
    if end is None and (len(head) >= LONGEST_HEADER or not re.search(rb"^data ?file:", head, re.M | re.I)):
        raise VolumeError("has no whole NRRD header: no empty line ends it", path=path, reason="header")
    stop = len(head) if end is None else end.end()
    text = head[:stop].decode("utf-8", "replace")
    if "\0" in text:
        raise VolumeError("has a NRRD header that is no text", path=path, reason="header")
    return _fields_of(text.splitlines()[1:], path), stop


def _fields_of(lines: Sequence[str], path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        own = line.partition(":=")
        if line.startswith("#") or not separator or (own[1] and ": " not in own[0]):  # or a key of somebody's own
            continue
        key = name.strip().lower()
        key = OTHER_NAMES.get(key, key)
        if key in fields:
            raise VolumeError(f"states {key} twice", path=path, reason="header", found=value.strip()[:80])
        fields[key] = value.strip()
    return fields


def _needed(fields: Mapping[str, str], name: str, path: Path) -> str:
    if name not in fields:
        raise VolumeError(f"has no whole NRRD header: {name} is missing", path=path, reason="header")
    return fields[name]


def _wrong(name: str, path: Path, found: object, expected: str | None = None) -> VolumeError:
    return VolumeError(
        f"has a NRRD header whose {name} is wrong", path=path, reason="header", found=str(found)[:80], expected=expected
    )


def _numbers(text: str, name: str, path: Path, count: int, *, nan: bool = False) -> tuple[float, ...]:
    """Read so many numbers; NaN only where it says that an axis has none."""
    values = numbers_in(text)
    if len(values) != count or not all(abs(value) <= LARGEST or (nan and math.isnan(value)) for value in values):
        raise _wrong(name, path, text, f"{count} numbers")
    return values


def _whole(fields: Mapping[str, str], name: str, path: Path) -> int:
    (value,) = _numbers(fields.get(name, "0"), name, path, 1)
    if value != int(value) or not -1 <= value <= MOST_SKIPPED:
        raise _wrong(name, path, fields[name], "a whole number")
    return int(value)


def _voxel_type(fields: Mapping[str, str], packing: Packing, path: Path) -> np.dtype[Any]:
    """Return how a voxel is stored."""
    kind = " ".join(_needed(fields, "type", path).lower().split())
    if kind not in REAL:
        raise VolumeError(
            "holds values of an unknown type",
            path=path,
            reason="datatype",
            found=kind[:80],
            expected="whole numbers of 8 to 64 bits, float or double",
        )
    if "old min" in fields or "old max" in fields:  # no reader that we know heeds them
        raise VolumeError(
            "holds quantised values with an old range, whose meaning is not defined",
            path=path,
            reason="slope",
            found=f"old min {fields.get('old min')}, old max {fields.get('old max')}",
        )
    dtype = np.dtype(REAL[kind])
    has_order = dtype.itemsize > 1 and packing != "text"
    return dtype.newbyteorder(_byte_order(fields, path)) if has_order else dtype


def _byte_order(fields: Mapping[str, str], path: Path) -> Literal["<", ">"]:
    """Return which byte of a number comes first, as a header must say."""
    order = fields.get("endian", "").lower()
    if order not in ("little", "big"):
        raise _wrong("endian", path, order or "nothing", "little or big")
    return "<" if order == "little" else ">"


def _axes(fields: Mapping[str, str], path: Path) -> _Axes:
    """Read what the header says of each axis."""
    axes = _count(fields, path)
    sides = _numbers(_needed(fields, "sizes", path), "sizes", path, axes)
    if not are_sides(sides):
        raise VolumeError("has impossible dimensions", path=path, reason="dimensions", found=fields["sizes"][:80])
    missing = " ".join(["nan"] * axes)
    spacings = _numbers(fields.get("spacings", missing), "spacings", path, axes, nan=True)
    directions = _directions(fields, axes, path)
    units = _units(fields, axes, path)
    if any(d is not None and not math.isnan(step) for d, step in zip(directions, spacings)):
        raise VolumeError(
            "states the spacing of an axis twice", path=path, reason="header", found="space directions too"
        )
    starts = _starts(fields, spacings, path)
    return _Axes(tuple(map(int, sides)), directions, spacings, units, starts, _kinds(fields, axes, path))


def _starts(fields: Mapping[str, str], spacings: Sequence[float], path: Path) -> tuple[float, ...]:
    """Return where the centre of the first sample along each axis lies: on its minimum, or half a step behind it."""
    missing = " ".join(["nan"] * len(spacings))
    least = _numbers(fields.get("axis mins", missing), "axis mins", path, len(spacings), nan=True)
    centerings = fields.get("centerings", "").lower().split() or ["cell"] * len(spacings)
    if len(centerings) != len(spacings):
        raise _wrong("centerings", path, fields["centerings"], f"{len(spacings)} words")
    return tuple(
        start + (0.0 if centering == "node" else step / 2)
        for start, step, centering in zip(least, spacings, centerings)
    )


def _kinds(fields: Mapping[str, str], axes: int, path: Path) -> tuple[str, ...]:
    """Return what each axis holds; space where a header says nothing of it."""
    kinds = tuple(fields.get("kinds", "").lower().split()) or ("space",) * axes
    if len(kinds) != axes:
        raise _wrong("kinds", path, fields["kinds"], f"{axes} words")
    return kinds


def _count(fields: Mapping[str, str], path: Path) -> int:
    """Return how many axes a header describes."""
    (count,) = _numbers(_needed(fields, "dimension", path), "dimension", path, 1)
    if count != int(count) or not 1 <= count <= 16:
        raise VolumeError("has impossible dimensions", path=path, reason="dimensions", found=fields["dimension"])
    return int(count)


def _units(fields: Mapping[str, str], axes: int, path: Path) -> tuple[str, ...]:
    """Return in which unit the spacing of each axis is, "" where a header says nothing of it."""
    units = tuple(re.findall(r'"([^"]*)"', fields.get("units", ""))) or ("",) * axes
    if len(units) != axes:
        raise _wrong("units", path, fields["units"], f"{axes} texts")
    return units


def _directions(fields: Mapping[str, str], axes: int, path: Path) -> tuple[tuple[float, ...] | None, ...]:
    if "space directions" not in fields:
        return (None,) * axes
    text = fields["space directions"]
    words = re.findall(r"none|\([^()]*\)", text)
    if len(words) != axes or re.sub(r"none|\([^()]*\)|\s", "", text):
        raise _wrong("space directions", path, text, f"{axes} vectors or none")
    read = partial(_vector, name="space directions", path=path, timed=_is_timed(fields))
    return tuple(None if word == "none" else read(word) for word in words)


def _is_timed(fields: Mapping[str, str]) -> bool:
    """Return whether time is the fourth axis of the space, so that vectors have four numbers."""
    return _TIME.search(fields.get("space", "").lower()) is not None or fields.get("space dimension") == "4"


def _vector(word: str, name: str, path: Path, *, timed: bool) -> tuple[float, ...] | None:
    """Read a vector of the patient's space; None for one that runs through time alone, or is all NaN."""
    text = word.strip()[1:-1].replace(",", " ")
    if name == "space directions" and set(text.lower().split()) == {"nan"}:
        return None
    if not timed or len(text.split()) == 3:
        return _numbers(text, name, path, 3)
    *place, time = _numbers(text, name, path, 4)
    if time == 0 or name == "space origin":
        return tuple(place)
    if any(place):
        raise _wrong(name, path, word, "axes that run through space or through time")
    return None


def _spatial_axes(axes: _Axes, path: Path) -> _Axes:
    """Leave out axes of one sample, down to three, those without a direction first; refuse what is no volume."""
    spatial = _without_idle(axes)
    shape = "x".join(map(str, axes.sides))
    if len(spatial.sides) > 3:
        raise VolumeError("is 4D: it holds more than one volume", path=path, reason="four-d", found=shape)
    if len(spatial.sides) < 3:
        raise VolumeError(
            "is a single slice, or has too few slices to be a volume", path=path, reason="thin", found=shape
        )
    others = [kind for kind in spatial.kinds if kind not in SPATIAL_KINDS]
    if others or 0 < spatial.directions.count(None) < 3:
        raise VolumeError(
            "has an axis that is none of space: its values are vectors or times",
            path=path,
            reason="four-d",
            found=", ".join([shape, *others]),
        )
    return spatial


def _without_idle(axes: _Axes) -> _Axes:
    """Leave out axes of one sample, down to three, those without a direction first."""
    idle = sorted(np.flatnonzero(np.array(axes.sides) == 1), key=lambda axis: axes.directions[axis] is not None)
    left_out = idle[: max(0, len(axes.sides) - 3)]
    kept = [axis for axis in range(len(axes.sides)) if axis not in left_out]
    return _Axes(
        tuple(axes.sides[axis] for axis in kept),
        tuple(axes.directions[axis] for axis in kept),
        tuple(axes.spacings[axis] for axis in kept),
        tuple(axes.units[axis] for axis in kept),
        tuple(axes.starts[axis] for axis in kept),
        tuple(axes.kinds[axis] for axis in kept),
    )


def _affine(fields: Mapping[str, str], axes: _Axes, path: Path, assume_ras: bool) -> NDArray[np.float64]:
    """Return voxel to RAS mm; of a space without a name only where it may be assumed."""
    space = _space(fields, path)
    has_place = axes.directions[0] is not None and space in SPACES
    if not has_place and not assume_ras:
        raise VolumeError(
            "states no orientation: it names no space with directions",
            path=path,
            reason="no-orientation",
            found=space or "no space",
            hint="If its axes run right, to the front and up, give --assume-ras: Reading(assume_ras=True) in Python.",
        )
    affine = np.eye(4)
    affine[:3, :3] = _columns(axes, path)
    if "space origin" in fields:
        affine[:3, 3] = _vector(fields["space origin"], "space origin", path, timed=_is_timed(fields))
    elif axes.directions[0] is None:
        affine[:3, 3] = np.nan_to_num([UNITS[unit] * start for unit, start in zip(axes.units, axes.starts)])
    turn = np.diag([*(SPACES[space] if has_place else (1, 1, 1)), 1.0])
    return np.diag([*[_unit(fields, path)] * 3, 1.0]) @ turn @ affine


def _space(fields: Mapping[str, str], path: Path) -> str:
    """Return the name of the space in which the axes lie, "" where there is none; time is none of its axes."""
    space = _TIME.sub("", fields.get("space", "").lower())
    if space and space not in (*SPACES, *UNNAMED):
        raise _wrong("space", path, space, ", ".join((*SPACES, *UNNAMED)))
    if "space dimension" in fields and _numbers(fields["space dimension"], "space dimension", path, 1)[0] not in (3, 4):
        raise _wrong("space dimension", path, fields["space dimension"], "3")
    return space


def _columns(axes: _Axes, path: Path) -> NDArray[np.float64]:
    """Return the directions of the axes as columns, in the unit of the file."""
    if axes.directions[0] is None:
        return _straight_columns(axes, path)
    columns = np.array(axes.directions, np.float64).T
    if not np.linalg.norm(columns, axis=0).all():
        raise VolumeError("has a zero or negative spacing", path=path, reason="spacing", found=axes.directions)
    return columns


def _straight_columns(axes: _Axes, path: Path) -> NDArray[np.float64]:
    """Return the axes of a straight grid, of spacings alone."""
    if not all(step > 0 for step in axes.spacings):  # NaN too
        raise VolumeError("has no spacing, or none that is positive", path=path, reason="spacing", found=axes.spacings)
    if unknown := [unit for unit in axes.units if unit not in UNITS]:
        raise _wrong("units", path, unknown[0], ", ".join(filter(None, UNITS)))
    return np.diag([step * UNITS[unit] for step, unit in zip(axes.spacings, axes.units)])


def _unit(fields: Mapping[str, str], path: Path) -> float:
    """Return mm to a unit of the space."""
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))[:3]) or {""}  # the fourth is that of time
    if len(units) > 1 or not units <= UNITS.keys():
        raise _wrong("space units", path, fields["space units"], "one of " + ", ".join(filter(None, UNITS)))
    return UNITS[units.pop()]


def _data_file(path: Path, fields: Mapping[str, str]) -> Path:
    return sibling(path, fields["data file"]) if "data file" in fields else path


def _stream(path: Path, fields: Mapping[str, str], start: int, size: int) -> Stream:
    """Say where the voxels lie; NRRD pads nothing, so not a byte may follow them."""
    packing = _packing(fields, path)
    data = _data_file(path, fields)
    if data == path and packing_of(path) == "gzip":
        return packed_whole(path, start, size, has_packed_voxels=packing != "none")
    head = start if data == path else 0
    begin = head + _skipped_lines(data, fields, path, head)
    skip = _whole(fields, "byte skip", path)
    if packing == "none":
        return Stream(data, packing, _first_byte(data, begin, skip, size), 0, size, 0)
    if skip == -1:
        raise _wrong("byte skip", path, skip, "0 or more where voxels are packed or text")
    if packing in ("hex", "text"):
        return Stream(data, packing, begin + skip, 0, size, 0)
    return Stream(data, packing, begin, skip, size, 0)


def _first_byte(data: Path, begin: int, skip: int, size: int) -> int:
    """Return where voxels that are not packed begin; of -1 they are the end of the file, whatever stands before."""
    return max(begin, file_size(data) - size) if skip == -1 else begin + skip


def _packing(fields: Mapping[str, str], path: Path) -> Packing:
    """Return how the voxels are packed by themselves."""
    encoding = _needed(fields, "encoding", path).lower()
    if encoding not in ENCODINGS:
        raise _wrong("encoding", path, encoding, ", ".join(ENCODINGS))
    return ENCODINGS[encoding]


def _skipped_lines(data: Path, fields: Mapping[str, str], path: Path, start: int) -> int:
    """Return how many bytes the lines take that stand before the voxels."""
    lines = _whole(fields, "line skip", path)
    if lines <= 0:
        return 0
    with open_file(data) as file:
        file.seek(start)
        ends = [match.end() for match in re.finditer(rb"\n", file.read(LONGEST_LINES))]
    if len(ends) < lines:
        raise _wrong("line skip", path, lines, f"at most {len(ends)} lines")
    return ends[lines - 1]


def write_nrrd(path: Path, array: NDArray[Any], geometry: Geometry, remark: str = "") -> None:
    """Write voxels on a grid as one .nrrd, packed by gzip, in the space left-posterior-superior.

    Args:
        path: Ends in .nrrd.
        array: Of a type in `REAL`, shape of the grid.
        geometry: The grid.
        remark: A line of text for the header.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    dtype = array.dtype.newbyteorder("<")
    affine = LPS_TO_RAS @ geometry.affine
    comment = f"# {remark}\n" if remark else ""
    order = "endian: little\n" if dtype.itemsize > 1 else ""
    head = (
        f"NRRD0004\n{comment}type: {WRITTEN[dtype.str[1:]]}\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {' '.join(map(str, geometry.shape))}\n"
        f"space directions: {' '.join(map(_text, affine[:3, :3].T))}\nkinds: domain domain domain\n"
        f"{order}encoding: gzip\nspace origin: {_text(affine[:3, 3])}\n\n"
    )
    voxels = pack(np.asarray(array, dtype).tobytes(order="F"), "gzip")
    with whole_file(path) as temporary:
        temporary.write_bytes(head.encode("ascii") + voxels)


def _text(vector: NDArray[np.float64]) -> str:
    return f"({','.join(map(repr, (vector + 0.0).tolist()))})"
