"""NIfTI as it is written: on the header that was read, or on one made for a grid.

Reference: nifti1.h and nifti2.h, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.storage import whole_file
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.nifti import FIELDS, MAGICS, REAL, SIZE, SMALLEST, Order, order_and_version
from chiasm.volumes.streams import packed_pieces
from chiasm.volumes.voxels import voxels_in_slabs

CODES = {name: code for code, name in REAL.items()}
COMMENT = 6  # code of a header extension that is plain text
V1_LONGEST = 32767
#: Texts of a header that might name a patient or a path: (offset, length), blanked in what is written.
TEXTS = {1: ((4, 28), (148, 104), (328, 16)), 2: ((240, 104), (508, 16))}


def write_nifti(path: Path, array: NDArray[Any], geometry: Geometry, remark: str = "") -> None:
    """Write voxels on a grid; a header that was read as NIfTI keeps its geometry bit for bit.

    Args:
        path: Ends in .nii or .nii.gz.
        array: Of a type in `REAL`, shape of the grid.
        geometry: The grid.
        remark: Text for a header extension; none without it.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    raw = bytearray(geometry.header_as("nifti") or _fresh_header(geometry))
    kind = order_and_version(raw)
    assert kind is not None
    order, version = kind
    dtype = array.dtype.newbyteorder(order)
    extension = _extension(order, remark)
    values: dict[str, tuple[object, ...]] = {
        "magic": (MAGICS[version][0],),
        "datatype": (CODES[dtype.str[1:]],),
        "bitpix": (dtype.itemsize * 8,),
        "vox_offset": (SMALLEST[version] + len(extension) - 4,),
        "slope": (1.0,),
        "inter": (0.0,),
    }
    _put(raw, order, version, values)
    for at, count in TEXTS[version]:
        raw[at : at + count] = bytes(count)
    head = bytes(raw) + extension
    pieces: Iterable[bytes | memoryview] = chain([head], voxels_in_slabs(array, dtype))
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.writelines(packed_pieces(pieces, "gzip") if path.name.lower().endswith(".gz") else pieces)


def _extension(order: str, remark: str) -> bytes:
    """Return the bytes between header and voxels: the flag, and a text as a comment, filled up to a multiple of 16."""
    text = remark.encode("utf-8")
    if not text:
        return bytes(4)
    size = -(-(8 + len(text)) // 16) * 16
    return b"\1\0\0\0" + struct.pack(order + "2i", size, COMMENT) + text.ljust(size - 8, b"\0")


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
    _put(raw, "<", version, values)
    return bytes(raw)


def _put(raw: bytearray, order: Order, version: int, values: Mapping[str, tuple[object, ...]]) -> None:
    """Write fields of a raw header, in place."""
    for name, value in values.items():
        at, form = FIELDS[version][name]
        struct.pack_into(order + form, raw, at, *value)


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
