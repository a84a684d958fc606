"""NIfTI-1 and NIfTI-2: the raw header is judged before any voxel is read.

Reference: nifti1.h and nifti2.h, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.storage import whole_file
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.streams import pack, read_whole

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
V1_LONGEST = 32767

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
#: Texts of a header that might name a patient or a path: (offset, length), blanked in what is written.
TEXTS = {1: ((4, 28), (148, 104), (328, 16)), 2: ((240, 104), (508, 16))}


@dataclass(frozen=True)
class Header:
    """What a raw header says, judged.

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

    @property
    def voxels(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def looks_like_nifti(head: bytes) -> bool:
    """Tell by the size that a NIfTI header begins with."""
    return len(head) >= 4 and _order_and_version(head) is not None


def read_nifti(
    path: Path, *, prefer: Form | None = None, assume_ras: bool = False, max_bytes: int = 2 * 2**30
) -> tuple[NDArray[Any], Geometry]:
    """Read voxels and grid of a NIfTI file or pair.

    Args:
        path: The file, or either one of a .hdr/.img pair.
        prefer: Which form to believe where sform and qform disagree.
        assume_ras: Whether to take a file without any form as RAS at the origin.
        max_bytes: Most bytes of voxels.

    Returns:
        Values, as stored or as float64 where they are scaled, shape (I, J, K), and the grid.

    Raises:
        VolumeError: If header or content break a rule.
    """
    options = {"prefer": prefer, "assume_ras": assume_ras, "max_bytes": max_bytes}
    head_path, data_path = _pair(path)
    header: Header | None = None

    def length(head: bytes) -> int:
        nonlocal header
        header = judge_header(head, path, **options)  # type: ignore[arg-type]
        if header.single:
            return header.offset + header.voxels * header.dtype.itemsize
        return SIZE[header.version]

    content = read_whole(head_path, HEAD, length)
    assert header is not None
    if header.single:
        _judge_extensions(content, header, path)
    else:
        if not data_path.exists():
            raise VolumeError("lacks its .img file", path=path, reason="not-found", expected=data_path.name)
        content = read_whole(data_path, 0, lambda _: header.offset + header.voxels * header.dtype.itemsize)
    stored = np.frombuffer(content, header.dtype, header.voxels, header.offset).reshape(header.shape, order="F")
    odd = prefer is not None or assume_ras  # the file's own forms are then not what was believed
    geometry = Geometry(header.shape, header.affine, None if odd else header.raw, None if odd else "nifti")
    if header.slope == 1 and header.inter == 0:
        return stored, geometry
    return stored.astype(np.float64) * header.slope + header.inter, geometry


def judge_header(
    head: bytes, path: Path, *, prefer: Form | None = None, assume_ras: bool = False, max_bytes: int = 2 * 2**30
) -> Header:
    """Judge a raw header, before anything is believed.

    Raises:
        VolumeError: If it breaks a rule; `reason` says which.
    """

    def refuse(what: str, reason: str, found: object = None, expected: object = None) -> VolumeError:
        return VolumeError(what, path=path, reason=reason, found=found, expected=expected)

    kind = _order_and_version(head)
    if kind is None or len(head) < SIZE[kind[1]]:
        raise refuse("has no whole NIfTI header", "header", f"{len(head)} bytes")
    order, version = kind
    fields = {name: struct.unpack_from(order + form, head, at) for name, (at, form) in FIELDS[version].items()}
    magic = fields["magic"][0][:4]
    if magic not in (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0") or magic[2:3] != str(version).encode():
        raise refuse("is not NIfTI: its magic is wrong", "magic", magic, "n+1, ni1, n+2 or ni2")
    single = magic[1:2] == b"+"
    count, *sides = fields["dim"]
    if not 1 <= count <= 7 or min(sides[:count]) < 1:
        raise refuse("has impossible dimensions", "dimensions", fields["dim"][: max(2, min(count, 7) + 1)])
    sides = sides[:count]
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) > 3:
        raise refuse("holds more than one volume", "four-d", "x".join(map(str, sides)), "three axes")
    i, j, k = (*sides, 1, 1)[:3]
    (code,), (bitpix,) = fields["datatype"], fields["bitpix"]
    if code not in REAL:
        raise refuse(
            f"holds {NOT_REAL.get(code, 'values of an unknown type')}", "datatype", f"datatype {code}", "real numbers"
        )
    dtype = np.dtype(order + REAL[code])
    if bitpix != dtype.itemsize * 8:
        raise refuse(
            "says two sizes of a voxel", "bitpix", f"bitpix {bitpix}", f"{dtype.itemsize * 8} for datatype {code}"
        )
    if i * j * k * dtype.itemsize > max_bytes:
        size = f"{i}x{j}x{k} voxels, {i * j * k * dtype.itemsize / 2**20:.0f} MiB"
        raise refuse("is too large", "too-large", size, f"at most {max_bytes / 2**20:.0f} MiB")
    (offset,) = fields["vox_offset"]
    least = SMALLEST[version] if single else 0
    if not math.isfinite(offset) or offset != int(offset) or not least <= offset <= 2**31:
        raise refuse("has an impossible vox_offset", "vox-offset", offset, f"a whole number, {least} or more")
    (slope,), (inter,) = fields["slope"], fields["inter"]
    if slope == 0:
        slope, inter = 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise refuse("has a slope or intercept that is no number", "slope", f"{slope} and {inter}")
    affine = _affine(fields, (i, j, k), path, prefer, assume_ras)
    raw = bytes(head[: SIZE[version]])
    return Header(raw, order, version, single, (i, j, k), dtype, int(offset), slope, inter, affine)


def _order_and_version(head: bytes | bytearray) -> tuple[Order, int] | None:
    orders: tuple[Order, Order] = ("<", ">")
    for order in orders:
        for version, size in SIZE.items():
            if struct.unpack_from(order + "i", head)[0] == size:
                return order, version
    return None


def _affine(
    fields: dict[str, tuple[Any, ...]], shape: tuple[int, int, int], path: Path, prefer: Form | None, assume_ras: bool
) -> NDArray[np.float64]:
    unit = MM.get(fields["units"][0] & 7, 1.0)
    forms: dict[str, NDArray[np.float64]] = {}
    used = [*fields["sform"]] * (fields["sform_code"][0] > 0)
    used += [*fields["quaternion"], *fields["qoffset"], *fields["pixdim"][:4]] * (fields["qform_code"][0] > 0)
    if not all(abs(value) <= LARGEST for value in used):  # NaN is refused here too
        raise VolumeError("has an affine that is not finite", path=path, reason="affine")
    if fields["sform_code"][0] > 0:
        forms["sform"] = np.vstack([np.reshape(fields["sform"], (3, 4)), [0, 0, 0, 1]]).astype(np.float64)
    if fields["qform_code"][0] > 0:
        forms["qform"] = _from_quaternion(fields, path)
    for matrix in forms.values():
        matrix[:3] *= unit
    if not forms:
        if not assume_ras:
            raise VolumeError(
                "does not say how it lies in space: sform_code and qform_code are both 0",
                path=path,
                reason="no-orientation",
                hint="If it lies in RAS order, read it with assume_ras.",
            )
        steps = (min(abs(step) * unit, LARGEST) for step in fields["pixdim"][1:4])
        return np.diag([*steps, 1.0]).astype(np.float64)
    if len(forms) == 2 and prefer is None:
        a, b = (Geometry(shape, matrix).corners for matrix in forms.values())
        distances = np.linalg.norm(a - b, axis=1)
        apart = float(distances.max())
        unsure = _rounding(fields) * float(np.linalg.norm(a[0] - a[-1]))
        if distances[0] > FORMS_APART_MM or apart > FORMS_APART_MM + unsure:  # the first corner is where both begin
            raise VolumeError(
                "says two places: sform and qform disagree",
                path=path,
                reason="two-forms",
                found=f"{apart:.3g} mm apart at a corner",
                expected=f"at most {FORMS_APART_MM} mm",
                hint="Find out which is right, and read it with prefer='sform' or prefer='qform'.",
            )
    chosen = prefer if prefer in forms else "sform" if "sform" in forms else "qform"
    return forms[chosen]


def _rounding(fields: dict[str, tuple[Any, ...]]) -> float:
    """Return by how many radians a qform's rotation is unsure: near a half turn float32 hardly tells the angle."""
    rest = 1.0 - sum(float(part) ** 2 for part in fields["quaternion"])
    return 2 * HALF_TURN / math.sqrt(max(rest, HALF_TURN))


def _from_quaternion(fields: dict[str, tuple[Any, ...]], path: Path) -> NDArray[np.float64]:
    b, c, d = map(float, fields["quaternion"])
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < -1e-4:  # rounding makes slightly negative ones
        raise VolumeError("has a quaternion that is no rotation", path=path, reason="quaternion", found=(b, c, d))
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
    qfac, *steps = fields["pixdim"][:4]
    scale = np.array(steps, np.float64)
    scale[2] *= -1.0 if qfac < 0 else 1.0  # 0 counts as 1
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * scale
    matrix[:3, 3] = fields["qoffset"]
    return matrix


def _judge_extensions(content: bytearray, header: Header, path: Path) -> None:
    at = SIZE[header.version]
    if at + 4 > header.offset or content[at] == 0:
        return
    at += 4
    while at < header.offset:
        if header.offset - at < 8:
            break
        (size,) = struct.unpack_from(header.order + "i", content, at)
        if size < 16 or size % 16 or at + size > header.offset:
            raise VolumeError(
                "has a header extension of an impossible size", path=path, reason="extension", found=f"{size} bytes"
            )
        at += size


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the files of header and voxels: two of a .hdr/.img pair, else the same twice."""
    name = path.name
    for ending in (".hdr", ".img", ".hdr.gz", ".img.gz"):
        if name.lower().endswith(ending):
            stem, zipped = name[: -len(ending)], ending[4:]
            return path.with_name(f"{stem}.hdr{zipped}"), path.with_name(f"{stem}.img{zipped}")
    return path, path


def write_nifti(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write voxels on a grid; a header that was read as NIfTI keeps its geometry bit for bit.

    Args:
        path: Ends in .nii or .nii.gz.
        array: Of a type in `REAL`, shape of the grid.
        geometry: The grid.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    carried = geometry.header is not None and geometry.container == "nifti"
    raw = bytearray(geometry.header if carried and geometry.header is not None else _fresh_header(geometry))
    kind = _order_and_version(raw)
    assert kind is not None
    order, version = kind
    dtype = array.dtype.newbyteorder(order)
    code = next(code for code, name in REAL.items() if name == dtype.str[1:])

    def put(name: str, *values: object) -> None:
        at, form = FIELDS[version][name]
        struct.pack_into(order + form, raw, at, *values)

    put("magic", b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n")
    put("datatype", code)
    put("bitpix", dtype.itemsize * 8)
    put("vox_offset", SMALLEST[version])
    put("slope", 1.0)
    put("inter", 0.0)
    for at, count in TEXTS[version]:
        raw[at : at + count] = bytes(count)
    content = bytes(raw) + bytes(4) + np.asarray(array, dtype).tobytes(order="F")
    if path.name.lower().endswith(".gz"):
        content = pack(content, "gzip")
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _fresh_header(geometry: Geometry) -> bytes:
    """Build a header for a grid made here: sform, and qform where the axes are square to one another."""
    version = 1 if max(geometry.shape) <= V1_LONGEST else 2
    raw = bytearray(SIZE[version])
    struct.pack_into("<i", raw, 0, SIZE[version])
    quaternion, qfac = _quaternion(geometry.affine)
    values: dict[str, tuple[object, ...]] = {
        "dim": (3, *geometry.shape, 1, 1, 1, 1),
        "pixdim": (qfac, *geometry.spacing_mm, 0.0, 0.0, 0.0, 0.0),
        "units": (2,),
        "sform_code": (1,),
        "sform": tuple(geometry.affine[:3].ravel().tolist()),
        "qform_code": (0 if quaternion is None else 1,),
        "quaternion": quaternion or (0.0, 0.0, 0.0),
        "qoffset": tuple(geometry.affine[:3, 3].tolist()),
    }
    for name, value in values.items():
        at, form = FIELDS[version][name]
        struct.pack_into("<" + form, raw, at, *value)
    return bytes(raw)


def _quaternion(affine: NDArray[np.float64]) -> tuple[tuple[float, float, float] | None, float]:
    """Return (b, c, d) of the rotation and qfac; None where the axes are not square to one another."""
    rotation = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    qfac = 1.0 if np.linalg.det(rotation) > 0 else -1.0
    rotation = rotation * (1.0, 1.0, qfac)
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-6:
        return None, 1.0
    # the eigenvector of Bar-Itzhack's matrix: stable for every rotation
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation.tolist()
    key = np.array(
        [
            [xx - yy - zz, 0, 0, 0],
            [xy + yx, yy - xx - zz, 0, 0],
            [xz + zx, yz + zy, zz - xx - yy, 0],
            [zy - yz, xz - zx, yx - xy, xx + yy + zz],
        ]
    )
    b, c, d, a = np.linalg.eigh(key / 3.0)[1][:, -1].tolist()
    sign = -1.0 if a < 0 else 1.0
    return (b * sign, c * sign, d * sign), qfac
