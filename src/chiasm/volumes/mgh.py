"""MGH and MGZ, FreeSurfer's volumes: a header of 284 bytes, big-endian, then voxels, then what is not needed.

Reference: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.storage import whole_file
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.streams import Stream, first_bytes, pack, packing_of
from chiasm.volumes.voxels import Stored, checked_size

HEADER = 284  # bytes before the voxels
PLACE = slice(30, 90)  # the bytes of the 15 numbers
FIELDS = ">7ih15f"  # version, width, height, depth, frames, type, degrees of freedom, whether oriented, 15 numbers
REAL = {0: "u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}  # by the code of the type
NOT_REAL = {2: "64-bit whole numbers", 5: "bits", 6: "tensors", 7: "colours"}
MOST_SIDE = 2**15
LARGEST = 1e9  # number of an affine


def looks_like_mgh(head: bytes) -> bool:
    """Recognise it by version, sides and type, since the format has no magic number."""
    if len(head) < struct.calcsize(FIELDS):
        return False
    version, i, j, k, frames, kind, *_ = struct.unpack_from(FIELDS, head)
    sides = all(1 <= side <= MOST_SIDE for side in (i, j, k, frames))
    return version & 0xFFFF00FF == 1 and sides and kind in (*REAL, *NOT_REAL)


def open_mgh(path: Path, *, max_bytes: int = 2 * 2**30) -> Stored:
    """Check the header of a .mgh or .mgz file.

    Args:
        path: The file, packed or not.
        max_bytes: Most bytes of voxels.

    Raises:
        VolumeError: If the header breaks a rule.
    """
    head = first_bytes(path, HEADER)
    version, i, j, k, frames, kind, _, is_oriented, *numbers = struct.unpack_from(FIELDS, head)
    if version != 1:  # newer ones keep there what the values mean
        raise VolumeError(
            "is no image but a warp or surface of FreeSurfer", path=path, reason="datatype", found=version
        )
    if frames > 1:
        raise VolumeError(
            "is 4D: it holds more than one volume", path=path, reason="four-d", found=f"{i}x{j}x{k}x{frames}"
        )
    if kind not in REAL:
        raise VolumeError(f"holds {NOT_REAL[kind]}", path=path, reason="datatype", expected="real numbers")
    dtype = np.dtype(REAL[kind])
    size = checked_size((i, j, k), dtype, path, max_bytes)
    if is_oriented <= 0:  # FreeSurfer takes it as coronal, nibabel 5.4 as the same rotated by half a turn
        raise VolumeError(
            "states no orientation: its goodRASFlag is 0",
            path=path,
            reason="no-orientation",
            hint="Give it one by FreeSurfer's mri_convert, in_orientation.",
        )
    geometry = Geometry((i, j, k), _affine(numbers, (i, j, k), path), header=head[PLACE], container="mgh")
    return Stored(Stream(path, packing_of(path), 0, HEADER, size), dtype, geometry)


def _affine(numbers: list[float], shape: tuple[int, int, int], path: Path) -> NDArray[np.float64]:
    """Return voxel to RAS mm: steps, directions, and the place of the voxel in the middle, shape / 2."""
    values = np.array(numbers, np.float64)
    if not (np.abs(values) <= LARGEST).all():  # NaN is refused here too
        raise VolumeError("has an affine with NaN or infinity", path=path, reason="affine")
    steps, directions, centre = values[:3], values[3:12].reshape(3, 3).T, values[12:]
    if steps.min() <= 0:
        raise VolumeError("has a zero or negative spacing", path=path, reason="spacing", found=steps.tolist())
    affine = np.eye(4)
    affine[:3, :3] = directions * steps
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) / 2)
    return affine


def write_mgh(path: Path, array: NDArray[Any], geometry: Geometry, remark: str = "") -> None:
    """Write voxels on a grid as .mgh, or packed as .mgz; a header that was read as MGH keeps its numbers of place.

    Args:
        path: Ends in .mgh or .mgz.
        array: Of a type in `REAL`, shape of the grid.
        geometry: The grid; its places are rounded to float32.
        remark: Text for the header's unused bytes, which hold 194 of it.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    kind, name = next(one for one in REAL.items() if np.dtype(one[1]) == array.dtype.newbyteorder(">"))
    place = geometry.header_as("mgh") or _place(geometry)
    head = struct.pack(FIELDS.removesuffix("15f"), 1, *geometry.shape, 1, kind, 0, 1) + place + remark.encode("utf-8")
    voxels = head[:HEADER].ljust(HEADER, b"\0") + array.astype(name).tobytes(order="F")
    with whole_file(path) as temporary:
        temporary.write_bytes(pack(voxels, "gzip") if path.name.lower().endswith(".mgz") else voxels)


def _place(geometry: Geometry) -> bytes:
    """Return steps, directions and the place of the middle as the header keeps them."""
    steps = np.array(geometry.spacing_mm)
    directions = (geometry.affine[:3, :3] / steps).T
    centre = geometry.affine[:3] @ [*np.array(geometry.shape) / 2, 1]
    return np.concatenate([steps, directions.ravel(), centre]).astype(">f4").tobytes()
