"""The volumes of a case's page: cut to the mask's box, rounded, thinned where they must be, and compressed.

Each is a NIfTI file in which all low bytes of the 16-bit values stand before all high bytes: they compress better so,
and the page's script puts them together again.  The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of
from chiasm.volumes import Geometry, Volume, crop
from chiasm.volumes.nifti import FIELDS, MAGICS, REAL, SIZE
from chiasm.volumes.streams import packed_pieces

MARGIN_MM = 6.0  # around the mask's box
LEVELS = (4096, 2048, 1024, 512, 256)  # steps inside the window, the finest that fits is taken
MOST_HALVINGS = 9  # of the number of voxels
HEADER = 352  # bytes before the voxels
SAMPLED = 8  # one slice of so many is compressed to foresee the size of all
REGIONS = "regions"
LARGEST = 32000  # value that is stored, of 16 bits
CODES = {name: code for code, name in REAL.items()}  # of NIfTI's datatypes, by numpy's name

Stride = tuple[int, int, int]


class Packed(NamedTuple):
    """The volumes as they stand in a page: names to gzip files, the grid, and what rounding and thinning did."""

    volumes: dict[str, bytes]
    shape: tuple[int, int, int]
    starts: tuple[int, int, int]
    stride: Stride
    steps: dict[str, float]


class _Rounding(NamedTuple):
    """What the step of an image depends on.

    Attributes:
        width: Of the range that levels are spread over.
        largest: Absolute value.
        is_whole: Whether all values are whole numbers.
    """

    width: float
    largest: float
    is_whole: bool

    def step(self, levels: int) -> float:
        """Choose what values are rounded to: 1, 2 or 5 times a power of ten, or 1 for whole numbers."""
        least = self.largest / LARGEST
        wanted = max(self.width / levels, least, 1e-30)
        if wanted < 1 and least < 1 and self.is_whole:
            return 1.0
        power = 10.0 ** math.floor(math.log10(wanted))
        return float(f"{next(power * digit for digit in (1, 2, 5, 10) if power * digit >= wanted * (1 - 1e-9)):.3g}")


def pack_volumes(volumes: Mapping[str, Volume], widths: Mapping[str, float], room: float) -> Packed:
    """Cut, round and compress: as fine as fits into `room` bytes of text, the coarsest where nothing does.

    Args:
        volumes: On one grid in RAS order; "regions" holds bytes, of which those above 0 are the box that is kept.
        widths: Of each image, the width of the range that its levels are spread over; real and synthetic are rounded
            alike, so that their difference is exact.
        room: Infinite keeps the whole grid, as fine as 16 bits allow.
    """
    spacing_mm = volumes[REGIONS].geometry.spacing_mm
    box = _box(volumes[REGIONS].array, spacing_mm, whole=math.isinf(room))
    inside = {name: crop(volume, box) for name, volume in volumes.items()}
    roundings = {name: _rounding(inside[name].array, width) for name, width in widths.items()}
    tries = list(_fineness(spacing_mm, room))
    rooms = (*repeat(room, len(tries) - 1), math.inf)  # the coarsest is taken however large it is
    for (stride, levels), most in zip(tries, rooms, strict=True):
        steps = _steps(roundings, levels)
        thin = {name: _thinned(volume, stride) for name, volume in inside.items()}
        if _foreseen(thin, steps) > most:
            continue
        files = _encode(thin, steps, most)
        if files:
            break
    i, j, k = (side.start for side in box)
    return Packed(files, thin[REGIONS].geometry.shape, (i, j, k), stride, steps)


def to_text(file: bytes) -> str:
    """Return a file as base64."""
    return base64.b64encode(file).decode("ascii")


def _text_size(size: int) -> int:
    return 4 * -(-size // 3)


def _box(regions: NDArray[Any], spacing_mm: Sequence[float], *, whole: bool) -> Box:
    """Find the box around the mask and the lesions, with a margin; the whole grid where both are empty."""
    inside = regions > 0
    box = box_of(inside) if inside.any() and not whole else (slice(0, None),) * 3
    margins = [round(MARGIN_MM / space) for space in spacing_mm]
    i, j, k = (
        slice(max(0, side.start - margin), last if side.stop is None else min(last, side.stop + margin))
        for side, margin, last in zip(box, margins, regions.shape)
    )
    return i, j, k


def _rounding(array: NDArray[Any], width: float) -> _Rounding:
    largest = max(float(array.max()), -float(array.min()))
    is_whole = all(bool((plane == np.rint(plane)).all()) for plane in array.T)  # most images hold fractions at once
    return _Rounding(width, largest, is_whole)


def _steps(roundings: Mapping[str, _Rounding], levels: int) -> dict[str, float]:
    """Choose what the values of each image are rounded to."""
    steps = {name: its.step(levels) for name, its in roundings.items()}
    if "real" in steps:
        steps["real"] = steps["synthetic"] = max(steps["real"], steps["synthetic"])
    return steps


def _fineness(spacing_mm: Sequence[float], room: float) -> Iterator[tuple[Stride, int]]:
    """Give what is tried, the finest first: rounding, then leaving out every second voxel where they lie closest."""
    if not math.isfinite(room):
        yield (1, 1, 1), LEVELS[0]
        return
    yield from zip(repeat((1, 1, 1)), LEVELS)
    stride = [1, 1, 1]
    for _ in range(MOST_HALVINGS):
        apart = [space * by for space, by in zip(spacing_mm, stride)]
        stride[min(range(3), key=lambda axis: (round(apart[axis], 3), -axis))] *= 2
        yield (stride[0], stride[1], stride[2]), LEVELS[-1]


def _thinned(volume: Volume, stride: Stride) -> Volume:
    """Keep every so many voxels along each axis, the first among them; none is interpolated."""
    if stride == (1, 1, 1):
        return volume
    affine = volume.geometry.affine.copy()
    affine[:3, :3] *= stride
    array = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    return Volume(array, Geometry(array.shape, affine))


def _foreseen(volumes: Mapping[str, Volume], steps: Mapping[str, float]) -> float:
    """Foresee the bytes of text of all volumes from one slice of `SAMPLED`, rather too few than too many."""
    total = 0.0
    for name, volume in volumes.items():
        some = volume.array[:, :, SAMPLED // 2 :: SAMPLED]
        share = some.size / volume.array.size
        total += _text_size(len(_packed(_bytes_of(some, steps.get(name))))) / share if some.size else 0
    return 0.97 * total


def _encode(volumes: Mapping[str, Volume], steps: Mapping[str, float], room: float) -> dict[str, bytes]:
    """Write volumes as gzip files, all of them unless they are larger than `room` bytes of text together."""
    files: dict[str, bytes] = {}
    for name, volume in volumes.items():
        files[name] = _nifti(volume, steps.get(name))
        room -= _text_size(len(files[name]))
        if room < 0:
            return {}
    return files


def _nifti(volume: Volume, step: float | None) -> bytes:
    """Write a NIfTI file, gzipped: 16 bits with a slope for images, bytes as they are without a step."""
    start = nifti_start(
        volume.geometry, np.dtype(np.uint8 if step is None else np.int16), 1.0 if step is None else step
    )
    return _packed(start, _bytes_of(volume.array, step))


def nifti_start(geometry: Geometry, dtype: np.dtype[Any], slope: float = 1.0) -> bytes:
    """Write what a NIfTI file holds before its voxels, `HEADER` bytes.

    Args:
        geometry: Of the volume; an sform alone.
        dtype: That voxels are stored in, little-endian.
        slope: That stored values are multiplied by.
    """
    content = bytearray(HEADER)
    struct.pack_into("<i", content, 0, SIZE[1])
    values: dict[str, tuple[object, ...]] = {
        "dim": (3, *geometry.shape, 1, 1, 1, 1),
        "datatype": (CODES[dtype.str[1:]],),
        "bitpix": (8 * dtype.itemsize,),
        "pixdim": (1.0, *geometry.spacing_mm, 1.0, 1.0, 1.0, 1.0),
        "vox_offset": (HEADER,),
        "slope": (slope,),
        "units": (2,),  # mm
        "sform_code": (1,),
        "sform": tuple(geometry.affine[:3].ravel().tolist()),
        "magic": (MAGICS[1][0],),
    }
    for name, value in values.items():
        at, form = FIELDS[1][name]
        struct.pack_into(f"<{form}", content, at, *value)
    return bytes(content)


def _bytes_of(array: NDArray[Any], step: float | None) -> bytes:
    """Return voxels in the order of NIfTI: rounded, all low bytes before all high ones; bytes as they are."""
    lines = array.T  # (K, J, I), whose C order is NIfTI's
    if step is None:
        return lines.tobytes()
    parts = np.empty((2, *lines.shape), np.uint8)
    for plane, (low, high) in zip(lines, parts.swapaxes(0, 1)):  # plane by plane: a volume may be large
        scaled = plane * np.float32(1 / step)
        values = np.rint(scaled, out=scaled).astype("<i2")
        low[...], high[...] = values & 255, (values >> 8).astype(np.uint8)
    return parts.tobytes()


def _packed(*contents: bytes) -> bytes:
    """Compress quickly: a page is packed for each case, several times until it fits."""
    return b"".join(packed_pieces(contents, "gzip"))
