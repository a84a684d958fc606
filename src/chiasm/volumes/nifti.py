"""NIfTI-1 and NIfTI-2: the raw header is checked before any voxel is read.

Reference: nifti1.h and nifti2.h, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.streams import Stream, first_bytes, packing_of
from chiasm.volumes.voxels import Stored, checked_size

Form = Literal["sform", "qform"]
Order = Literal["<", ">"]

#: Datatype code to numpy's name.
REAL = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"
}  # fmt: skip
NOT_REAL = {
    1: "binary",
    32: "complex",
    128: "RGB",
    1536: "128-bit floats",
    1792: "complex",
    2048: "complex",
    2304: "RGBA",
}
MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of the spatial unit
FORMS_APART_MM = 0.01
LARGEST = 1e9  # number of an affine
HALF_TURN = 1e-7  # squared first part of a quaternion that is only the rounding of the others
HEAD = 544  # bytes that hold either header and the extension flag
SMALLEST = {1: 352, 2: 544}  # offset of the voxels in a single file
MOST_EXTENSIONS = 2**26  # bytes between header and voxels
MAGICS = {1: (b"n+1\0", b"ni1\0"), 2: (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n")}  # one file, two files

#: Field to (offset, format) of NIfTI-1 and NIfTI-2; one name, two places.
FIELDS: dict[int, dict[str, tuple[int, str]]] = {
    1: {
        "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"),
        "slope": (112, "f"), "inter": (116, "f"), "units": (123, "B"), "qform_code": (252, "h"),
        "sform_code": (254, "h"), "quaternion": (256, "3f"), "qoffset": (268, "3f"), "sform": (280, "12f"),
        "magic": (344, "4s"),
    },
    2: {
        "magic": (4, "8s"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"), "pixdim": (104, "8d"),
        "vox_offset": (168, "q"), "slope": (176, "d"), "inter": (184, "d"), "qform_code": (344, "i"),
        "sform_code": (348, "i"), "quaternion": (352, "3d"), "qoffset": (376, "3d"), "sform": (400, "12d"),
        "units": (500, "i"),
    },
}  # fmt: skip
SIZE = {1: 348, 2: 540}


@dataclass(frozen=True)
class Header:
    """The checked content of a raw header.

    Attributes:
        raw: Its bytes, 348 or 540.
        order: "<" or ">".
        version: 1 or 2.
        single: Whether the voxels stand in the same file.
        shape: Voxels along the three axes.
        dtype: As stored.
        offset: Of the first voxel.
        slope: Factor on the stored values.
        inter: Summand.
        affine: Voxel to RAS mm.
        keeps_forms: Whether the file's own sform and qform say this affine.
    """

    raw: bytes
    order: Order
    version: int
    single: bool
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]
    keeps_forms: bool

    @property
    def size(self) -> int:
        """Bytes of voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


def looks_like_nifti(head: bytes) -> bool:
    """Recognise it by the size that a NIfTI header begins with."""
    return order_and_version(head) is not None


def open_nifti(path: Path, *, form: Form | None = None, assume_ras: bool = False, max_bytes: int = 2 * 2**30) -> Stored:
    """Check the header of a NIfTI file or pair.

    Args:
        path: The file, or the .hdr of a pair.
        form: Which form to believe where sform and qform disagree.
        assume_ras: Whether to take a file without any form as RAS at the origin.
        max_bytes: Most bytes of voxels.

    Raises:
        VolumeError: If the header breaks a rule.
    """
    header = check_header(first_bytes(path, HEAD), path, form=form, assume_ras=assume_ras, max_bytes=max_bytes)
    data = path if header.single else _partner(path)
    _check_extensions(first_bytes(path, header.offset if header.single else MOST_EXTENSIONS), header, path)
    stream = Stream(data, packing_of(data), 0, header.offset, header.size)
    own = header.keeps_forms
    geometry = Geometry(header.shape, header.affine, header.raw if own else None, "nifti" if own else None)
    return Stored(stream, header.dtype, geometry, header.slope, header.inter)


@dataclass(frozen=True)
class _Raw:
    """A raw header of the right size: its fields and its file."""

    path: Path
    order: Order
    version: int
    fields: Mapping[str, tuple[Any, ...]]

    @property
    def is_single(self) -> bool:
        """Whether the voxels stand in the same file."""
        return bool(self.one("magic") == MAGICS[self.version][0])

    @property
    def coded(self) -> list[Form]:
        """The forms that say where the volume lies."""
        forms: tuple[Form, Form] = ("sform", "qform")
        return [form for form in forms if self.one(f"{form}_code") > 0]

    @property
    def steps(self) -> tuple[Any, ...]:
        """Spacing along the three axes, in the file's unit."""
        return self.fields["pixdim"][1:4]

    @property
    def sides(self) -> list[int]:
        """Voxels along the axes, without those behind the third that hold one."""
        count, *sides = self.fields["dim"]
        sides = sides[:count]
        while len(sides) > 3 and sides[-1] == 1:
            sides.pop()
        return sides

    def one(self, name: str) -> Any:
        """Return a field that is a single value."""
        return self.fields[name][0]

    def refuse(
        self, what: str, reason: str, found: object = None, expected: object = None, hint: str | None = None
    ) -> VolumeError:
        return VolumeError(what, path=self.path, reason=reason, found=found, expected=expected, hint=hint)


def check_header(
    head: bytes, path: Path, *, form: Form | None = None, assume_ras: bool = False, max_bytes: int = 2 * 2**30
) -> Header:
    """Check a raw header, before its fields are used.

    Raises:
        VolumeError: If it breaks a rule; `reason` says which.
    """
    raw = _read_fields(head, path)
    for rule in (_check_magic, _check_dimensions, _check_type):
        rule(raw)
    i, j, k = (*raw.sides, 1, 1)[:3]
    dtype = np.dtype(raw.order + REAL[raw.one("datatype")])
    checked_size((i, j, k), dtype, path, max_bytes)
    _check_offset(raw)
    slope, inter = _scale(raw)
    affine = _affine(raw, (i, j, k), form, assume_ras)
    keeps_forms = bool(raw.coded) and (form is None or len(raw.coded) == 1)
    content, offset = bytes(head[: SIZE[raw.version]]), int(raw.one("vox_offset"))
    return Header(
        content, raw.order, raw.version, raw.is_single, (i, j, k), dtype, offset, slope, inter, affine, keeps_forms
    )


def _read_fields(head: bytes, path: Path) -> _Raw:
    kind = order_and_version(head)
    if kind is None or len(head) < SIZE[kind[1]]:
        raise VolumeError("has no whole NIfTI header", path=path, reason="header", found=f"{len(head)} bytes")
    order, version = kind
    fields = {name: struct.unpack_from(order + form, head, at) for name, (at, form) in FIELDS[version].items()}
    return _Raw(path, order, version, fields)


def _check_magic(raw: _Raw) -> None:
    magic, known = raw.one("magic"), MAGICS[raw.version]
    if magic not in known:
        is_analyze = raw.version == 1 and not magic.strip(b"\0")
        analyze = " (ANALYZE 7.5 does not say where left is)" if is_analyze else ""
        raise raw.refuse(f"is not NIfTI: its magic is wrong{analyze}", "magic", magic, f"one of {known}")


def _check_dimensions(raw: _Raw) -> None:
    count, *sides = raw.fields["dim"]
    if not 1 <= count <= 7 or min(sides[:count]) < 1:
        found = raw.fields["dim"][: max(2, min(count, 7) + 1)]
        raise raw.refuse("has impossible dimensions", "dimensions", found)
    if len(raw.sides) > 3:
        raise raw.refuse("is 4D: it holds more than one volume", "four-d", "x".join(map(str, raw.sides)), "three axes")


def _check_type(raw: _Raw) -> None:
    code, bits = raw.one("datatype"), raw.one("bitpix")
    if code not in REAL:
        what = f"holds {NOT_REAL.get(code, 'values of an unknown type')}"
        raise raw.refuse(what, "datatype", f"datatype {code}", "real numbers")
    expected = np.dtype(REAL[code]).itemsize * 8
    if bits != expected:
        found = f"bitpix {bits}"
        raise raw.refuse("states two sizes of a voxel", "bitpix", found, f"{expected} for datatype {code}")


def _check_offset(raw: _Raw) -> None:
    offset, least = raw.one("vox_offset"), SMALLEST[raw.version] if raw.is_single else 0
    is_whole = math.isfinite(offset) and offset == int(offset)
    if not is_whole or not least <= offset <= least + MOST_EXTENSIONS:
        expected = f"a whole number, {least} or a little more"
        raise raw.refuse("has an impossible vox_offset", "vox-offset", offset, expected)


def _scale(raw: _Raw) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 says that there is none."""
    slope, inter = raw.one("slope"), raw.one("inter")
    if slope == 0:
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise raw.refuse("has a slope or intercept that is no number", "slope", f"{slope} and {inter}")
    return slope, inter


def order_and_version(head: bytes | bytearray) -> tuple[Order, int] | None:
    """Find byte order and version by the size that a header begins with."""
    orders: tuple[Order, Order] = ("<", ">")
    kinds = {struct.pack(f"{order}i", size): (order, version) for order in orders for version, size in SIZE.items()}
    return kinds.get(bytes(head[:4]))


def _affine(raw: _Raw, shape: tuple[int, int, int], form: Form | None, assume_ras: bool) -> NDArray[np.float64]:
    """Return the affine of the chosen form, in mm."""
    coded = [form] if form in raw.coded else raw.coded  # of what is not believed, nothing is asked
    _check_finite(raw, coded, assume_ras)
    _check_place(raw, coded, assume_ras)
    forms = _matrices(raw, coded)
    if len(forms) == 2:
        _check_forms(raw, *(Geometry(shape, matrix).corners for matrix in forms))
    return forms[0]


def _matrices(raw: _Raw, coded: Sequence[Form]) -> list[NDArray[np.float64]]:
    """Return the affine that each form says, in mm; one of spacings alone where there is none."""
    made = {"sform": _from_sform, "qform": _from_quaternion}
    forms = [made[name](raw) for name in coded] or [np.diag([*raw.steps, 1.0]).astype(np.float64)]
    for matrix in forms:
        matrix[:3] *= MM.get(raw.one("units") & 7, 1.0)
    return forms


def _check_finite(raw: _Raw, coded: Sequence[Form], assume_ras: bool) -> None:
    """Refuse numbers that are not finite in the forms that are used."""
    if not all(abs(value) <= LARGEST for value in _used(raw, coded, assume_ras)):  # NaN is refused here too
        raise raw.refuse("has an affine that is not finite", "affine")


def _check_place(raw: _Raw, coded: Sequence[Form], assume_ras: bool) -> None:
    """Refuse a volume without orientation, or with impossible steps."""
    if not coded and not assume_ras:
        raise raw.refuse(
            "states no orientation: sform_code and qform_code are both 0",
            "no-orientation",
            hint="If its axes run right, to the front and up, give --assume-ras: Reading(assume_ras=True) in Python.",
        )
    if coded != ["sform"] and min(raw.steps) <= 0:
        raise raw.refuse("has a spacing that is not positive", "spacing", list(raw.steps))


def _used(raw: _Raw, coded: Sequence[Form], assume_ras: bool) -> list[float]:
    """Return the numbers of which the affine is made."""
    fields = raw.fields
    used = [*fields["sform"]] if "sform" in coded else []
    if "qform" in coded:
        used += [*fields["quaternion"], *fields["qoffset"], *fields["pixdim"][:4]]
    if assume_ras and not coded:
        used += raw.steps
    return used


def _check_forms(raw: _Raw, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
    """Refuse two forms whose corners lie apart by more than rounding."""
    distances = np.linalg.norm(a - b, axis=1)
    apart = float(distances.max())
    unsure = _rounding(raw) * float(np.linalg.norm(a[0] - a[-1]))
    if distances[0] > FORMS_APART_MM or apart > FORMS_APART_MM + unsure:  # the first corner is where both begin
        raise raw.refuse(
            "states two positions: sform and qform disagree",
            "two-forms",
            f"{apart:.3g} mm apart at a corner",
            f"at most {FORMS_APART_MM} mm",
            "Find out which is right, and give --form sform or --form qform: Reading(form=...) in Python.",
        )


def _from_sform(raw: _Raw) -> NDArray[np.float64]:
    return np.vstack([np.reshape(raw.fields["sform"], (3, 4)), [0, 0, 0, 1]]).astype(np.float64)


def _rounding(raw: _Raw) -> float:
    """Return by how many radians a qform's rotation is unsure: near a half turn float32 hardly holds the angle."""
    rest = 1.0 - sum(float(part) ** 2 for part in raw.fields["quaternion"])
    return 2 * HALF_TURN / math.sqrt(max(rest, HALF_TURN))


def _from_quaternion(raw: _Raw) -> NDArray[np.float64]:
    b, c, d = map(float, raw.fields["quaternion"])
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < -1e-4:  # rounding makes slightly negative ones
        raise raw.refuse("has a quaternion that is no rotation", "quaternion", (b, c, d))
    if rest < HALF_TURN:
        a, norm = 0.0, math.sqrt(b * b + c * c + d * d)
        b, c, d = b / norm, c / norm, d / norm
    else:
        a = math.sqrt(rest)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
            [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
            [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - c * c - b * b],
        ]
    )
    scale = np.array(raw.steps, np.float64)
    scale[2] *= -1.0 if raw.one("pixdim") < 0 else 1.0  # 0 counts as 1
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * scale
    matrix[:3, 3] = raw.fields["qoffset"]
    return matrix


def _check_extensions(content: bytes, header: Header, path: Path) -> None:
    """Walk from extension to extension: each begins with its size, and the last ends where voxels or file do."""
    at = SIZE[header.version]
    if len(content) < at + 4 or content[at] == 0:
        return
    end = header.offset if header.single else len(content)
    at += 4
    while end - at >= 8 and at + 8 <= len(content):
        (size,) = struct.unpack_from(header.order + "i", content, at)
        _check_extension(size, end - at, path)
        at += size


def _check_extension(size: int, left: int, path: Path) -> None:
    """Refuse an extension that is no multiple of 16 bytes, or longer than what is left."""
    if size < 16 or size % 16 or size > left:
        raise VolumeError(
            "has a header extension of an impossible size", path=path, reason="extension", found=f"{size} bytes"
        )


def twin_names(path: Path, ending: Literal["hdr", "img"]) -> list[str]:
    """List what the other file of a .hdr/.img pair may be called, the likeliest first.

    Args:
        path: A file.
        ending: What it must end in, but for .gz; for another, nothing is listed.

    >>> twin_names(Path("a.HDR"), "hdr"), twin_names(Path("a.nii"), "hdr")
    (['a.IMG', 'a.IMG', 'a.IMG.gz'], [])
    """
    match = re.fullmatch(rf"(?is)(.*\.)({ending})((?:\.gz)?)", path.name)
    if match is None:
        return []
    stem, own, zipped = match.groups()
    other = "img" if ending == "hdr" else "hdr"
    other = other.upper() if own.isupper() else other
    return [f"{stem}{other}{zipped}", f"{stem}{other}", f"{stem}{other}.gz"]


def first_beside(path: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some names that there is in the folder of a file, if any.

    Raises:
        OSError: If the folder may not be entered, or a name is too long.
    """
    return next(filter(Path.exists, map(path.with_name, names)), None)


def _partner(path: Path) -> Path:
    """Return the file of the voxels of a .hdr/.img pair."""
    names = twin_names(path, "hdr")
    if not names:
        raise VolumeError(
            "says that its voxels are in another file, but is not called .hdr",
            path=path,
            reason="magic",
            hint="Give the .hdr file of the pair.",
        )
    partner = first_beside(path, names)
    if partner is None:
        raise VolumeError("lacks its .img file", path=path, reason="not-found", expected=names[0])
    return partner
