"""Odd and broken volumes, made byte by byte, so that every reader meets the same ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = (5, 6, 7)
AFFINE = np.array([[2.0, 0, 0, -10], [0, 1.5, 0, 20], [0, 0, 3.0, -5], [0, 0, 0, 1]])
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}


def voxels(kind: str = "i2") -> NDArray[Any]:
    return np.random.default_rng(0).integers(1, 100, SHAPE).astype(kind)


def nifti(
    array: NDArray[Any] | None = None, *, order: str = "<", version: int = 1, changes: dict[str, Any] | None = None
) -> bytes:
    """A single-file NIfTI; `changes` set header fields by name, "extension" and "tail" are raw bytes."""
    array = voxels() if array is None else array
    changes = dict(changes or {})
    extension = changes.pop("extension", b"\0\0\0\0")
    tail = changes.pop("tail", b"")
    dims = [array.ndim, *array.shape] + [1] * (7 - array.ndim)
    fields: dict[str, Any] = {
        "dim": dims,
        "datatype": CODES[array.dtype.str[1:]],
        "bitpix": array.dtype.itemsize * 8,
        "pixdim": [1.0, 2.0, 1.5, 3.0, 0, 0, 0, 0],
        "vox_offset": (348 if version == 1 else 540) + len(extension),
        "scl_slope": 0.0,
        "scl_inter": 0.0,
        "xyzt_units": 2,
        "qform_code": 1,
        "sform_code": 1,
        "quatern": [0.0, 0.0, 0.0],
        "qoffset": [-10.0, 20.0, -5.0],
        "srow": AFFINE[:3].ravel().tolist(),
        "magic": b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n",
    } | changes
    places = {
        1: {
            "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
            "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
            "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
            "srow": (280, "12f"), "magic": (344, "4s"),
        },
        2: {
            "dim": (16, "8q"), "datatype": (12, "h"), "bitpix": (14, "h"), "pixdim": (104, "8d"),
            "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"), "xyzt_units": (500, "i"),
            "qform_code": (344, "i"), "sform_code": (348, "i"), "quatern": (352, "3d"), "qoffset": (376, "3d"),
            "srow": (400, "12d"), "magic": (4, "8s"),
        },
    }[version]  # fmt: skip
    size = 348 if version == 1 else 540
    header = bytearray(size)
    struct.pack_into(order + "i", header, 0, changes.get("sizeof_hdr", size))
    fields.pop("sizeof_hdr", None)
    for name, value in fields.items():
        at, form = places[name]
        struct.pack_into(order + form, header, at, *(value if isinstance(value, list) else [value]))
    return bytes(header) + extension + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F") + tail


def put(folder: Path, content: bytes, name: str = "odd.nii", packed: bool = False) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


def metaimage(array: NDArray[Any] | None = None, **changes: str) -> bytes:
    """A .mha with its voxels inside; a field set to "" is left out."""
    array = voxels() if array is None else array
    fields = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "1 2 3",
        "ElementSpacing": "2 1.5 3", "DimSize": "5 6 7", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
    } | changes  # fmt: skip
    fields["ElementDataFile"] = fields.pop("ElementDataFile")  # always the last
    text = "".join(f"{name} = {value}\n" for name, value in fields.items() if value)
    return text.encode() + array.tobytes(order="F")
