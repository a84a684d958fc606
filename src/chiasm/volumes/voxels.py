"""Voxels: checked by their extremes as they stream by, then made into float32 or whole numbers.

What is wrong shows in the least and the greatest value (NaN spreads to both),
and whoever is large is checked before any of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.streams import PIECE, Stream, blocks, read_whole

LARGE = 64 * 2**20  # bytes of voxels that are looked at twice: first checked, then kept
LEVELS = 256  # that float32 must separate between the least and the greatest value
LARGEST_LABEL = 2**31
MOST_SIDE = 2**31  # voxels along an axis
LINES = 16  # lines of memory that are read side by side
NARROW = (np.uint8, np.int8, np.uint16, np.int16)  # in this machine's order of bytes
INTEGERS = (np.uint8, np.int8, np.int16, np.int32, np.int64)


def are_sides(numbers: Sequence[float]) -> bool:
    """Return whether numbers of a header can be counts of voxels along axes."""
    return all(number == int(number) and 1 <= number <= MOST_SIDE for number in numbers)


def checked_size(shape: Sequence[int], dtype: np.dtype[Any], path: Path, max_bytes: int) -> int:
    """Return the bytes of a volume's voxels.

    Raises:
        VolumeError: If they are more than `max_bytes`.
    """
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise VolumeError(
            "is too large",
            path=path,
            reason="too-large",
            found=f"{'x'.join(map(str, shape))} voxels, {size / 2**20:.0f} MiB",
            expected=f"at most {max_bytes / 2**20:.0f} MiB",
        )
    return size


@dataclass(frozen=True)
class Stored:
    """A volume as it lies on disk: its header is checked, its voxels are not read.

    Attributes:
        stream: Where the voxels lie.
        dtype: As stored.
        geometry: Their grid.
        slope: Factor on the stored values.
        inter: Summand.
    """

    stream: Stream
    dtype: np.dtype[Any]
    geometry: Geometry
    slope: float = 1.0
    inter: float = 0.0

    @property
    def path(self) -> Path:
        """The file of the voxels."""
        return self.stream.path

    @property
    def is_scaled(self) -> bool:
        """Whether slope or intercept change anything."""
        return self.slope != 1 or self.inter != 0


def read_image(
    stored: Stored, path: Path, *, allow_constant: bool = False, narrow: bool = False
) -> NDArray[np.float32 | np.integer[Any]]:
    """Read an image's voxels.

    Args:
        stored: From a reader of headers.
        path: What to call it in errors.
        allow_constant: Whether it may be constant.
        narrow: Whether integers of up to 16 bits stay as they are, which takes a half or a quarter of the memory:
            float32 would hold the same values.

    Raises:
        VolumeError: If bytes are missing or damaged, a value is not finite in
            float32, or float32 cannot separate the values.
    """
    raw, _ = _checked(stored, partial(_check_ends, path=path, allow_constant=allow_constant))
    if not stored.is_scaled and narrow and raw.dtype in NARROW:
        return raw
    if not stored.is_scaled:
        return raw.astype(np.float32, copy=False)
    array = np.empty(raw.shape, np.float32, order="F")
    for k in range(raw.shape[2]):
        array[..., k] = raw[..., k].astype(np.float64) * stored.slope + stored.inter
    return array


def _check_ends(low: float, high: float, path: Path, allow_constant: bool) -> None:
    """Refuse an image by its least and greatest value: not finite in float32, constant, or beyond its precision."""
    with np.errstate(over="ignore"):
        ends = np.array([low, high]).astype(np.float32)
    if not np.isfinite(ends).all():
        raise VolumeError(
            "holds NaN or infinite values in float32",
            path=path,
            reason="not-finite",
            found=f"{low:g} to {high:g}",
            hint="Write a number in their place, such as 0 in the air of an MR image and -1000 in that of a CT.",
        )
    if allow_constant:
        return
    if low == high:
        raise VolumeError("is constant", path=path, reason="constant", found=f"{low:g}")
    if high - low < LEVELS * float(np.spacing(np.abs(ends).max())):
        raise VolumeError(
            "holds large values with small differences, which float32 cannot separate",
            path=path,
            reason="precision",
            found=f"{low:.17g} to {high:.17g}",
            hint="Subtract their least value first.",
        )


def read_labels(stored: Stored, path: Path, *, declared: Collection[int] | None = None) -> NDArray[Any]:
    """Read a label map as the smallest integer type that holds it.

    Args:
        stored: From a reader of headers.
        path: What to call it in errors.
        declared: The only labels that may occur beside 0; all may where None.

    Raises:
        VolumeError: If bytes are missing or damaged, or a label is no whole number, out of range or not declared.
    """

    def check(low: float, high: float) -> None:
        if np.isnan(low) or np.isnan(high):
            raise VolumeError(
                "holds NaN among its labels", path=path, reason="labels", expected="whole numbers from 0 on"
            )
        if not (abs(low) <= LARGEST_LABEL and abs(high) <= LARGEST_LABEL):
            raise VolumeError("holds labels out of range", path=path, reason="labels", found=f"{low:g} to {high:g}")

    raw, ends = _checked(stored, check)
    array = np.empty(raw.shape, _smallest_type(*ends), order="F")
    seen: set[int] = set()
    for k in range(raw.shape[2]):
        values = raw[..., k]
        if stored.is_scaled:
            values = values.astype(np.float64) * stored.slope + stored.inter
        array[..., k] = _whole(values, ends, path)
        if declared is not None:
            seen |= set(np.unique(array[..., k]).tolist())
    _check_declared(seen, path, declared)
    return array


def _smallest_type(low: float, high: float) -> type[np.integer[Any]]:
    """Return the first type of whole numbers that holds all from a least to a greatest."""
    return next(kind for kind in INTEGERS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)


def _whole(values: NDArray[Any], ends: tuple[float, float], path: Path) -> NDArray[Any]:
    """Return labels as whole numbers, or refuse one that is none; `ends` are those of the whole map."""
    whole: NDArray[Any] = np.rint(values) if values.dtype.kind == "f" else values
    if not (values == whole).all():
        raise _not_whole(float(values[values != whole].flat[0]), *ends, path)
    return whole


def _not_whole(value: float, low: float, high: float, path: Path) -> VolumeError:
    """Say that a label is no whole number, and whether all may be shares."""
    if low >= 0 and high <= 1:
        return VolumeError(
            "holds soft labels, shares between 0 and 1",
            path=path,
            reason="soft-labels",
            found=value,
            hint="Round them to whole numbers first.",
        )
    return VolumeError(
        "holds labels that are not whole numbers",
        path=path,
        reason="labels",
        found=f"{value:g} among values from {low:g} to {high:g}",
        hint="Labels must be resampled by nearest neighbour. If they are probabilities up to 100 or 255, state "
        "the value from which a voxel counts.",
    )


def image_of(array: NDArray[Any], path: Path, *, allow_constant: bool = False) -> NDArray[np.float32]:
    """Check an image whose voxels are in memory already, and return it as float32.

    Raises:
        VolumeError: If a value is not finite in float32, all are the same, or float32 cannot separate them.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN
        low, high = float(array.min()), float(array.max())
    _check_ends(low, high, path, allow_constant)
    return array.astype(np.float32, copy=False)


def labels_of(array: NDArray[Any], path: Path, *, declared: Collection[int] | None = None) -> NDArray[Any]:
    """Check labels that are in memory already, and return them as the smallest integer type that holds them.

    Raises:
        VolumeError: If a label is no whole number, out of range or not declared.
    """
    whole = np.rint(array)
    if not (np.abs(array) <= LARGEST_LABEL).all() or not (array == whole).all():
        raise VolumeError("holds labels that are not whole numbers in range", path=path, reason="labels")
    kind = _smallest_type(whole.min(), whole.max())
    _check_declared(set(np.unique(whole).astype(int).tolist()), path, declared)
    made: NDArray[Any] = whole.astype(kind)
    return made


def _check_declared(seen: set[int], path: Path, declared: Collection[int] | None) -> None:
    if declared is not None and (others := sorted(seen - {0, *declared})):
        raise VolumeError(
            "holds labels that are not declared",
            path=path,
            reason="labels",
            found=", ".join(map(str, others[:8])),
            expected=", ".join(map(str, sorted(declared))),
        )


def _checked(stored: Stored, check: Any) -> tuple[NDArray[Any], tuple[float, float]]:
    """Return the voxels as stored, shape (I, J, K), and the least and greatest value, scaled and checked."""
    ends: tuple[float, float] | None = None
    if stored.stream.size > LARGE:
        ends = _scaled(stored, _extremes(np.frombuffer(block, stored.dtype) for block in _aligned(stored)))
        check(*ends)
    raw = read_whole(stored.stream).view(stored.dtype)
    if ends is None:
        ends = _scaled(stored, _extremes([raw]))
        check(*ends)
    return raw.reshape(stored.geometry.shape, order="F"), ends


def _aligned(stored: Stored) -> Iterator[bytes]:
    """Yield blocks that end with a whole voxel."""
    rest = b""
    for block in blocks(stored.stream):
        whole = rest + block if rest else block
        cut = len(whole) - len(whole) % stored.dtype.itemsize
        rest = whole[cut:]
        if cut:
            yield whole[:cut]


def _extremes(arrays: Any) -> tuple[Any, Any]:
    low = high = None
    with np.errstate(invalid="ignore"):  # a signalling NaN
        for array in arrays:
            least, most = array.min(), array.max()
            low = least if low is None else np.minimum(low, least)
            high = most if high is None else np.maximum(high, most)
    return low, high


def _scaled(stored: Stored, ends: tuple[Any, Any]) -> tuple[float, float]:
    low, high = (float(end) * stored.slope + stored.inter for end in ends)
    return (high, low) if stored.slope < 0 else (low, high)


def voxels_in_slabs(array: NDArray[Any], dtype: np.dtype[Any]) -> Iterator[memoryview]:
    """Yield the bytes of voxels, the first axis fastest, a few planes at a time: a volume may be large.

    Voxels that lie so already are not copied.
    """
    planes = max(1, PIECE // max(1, math.prod(array.shape[:-1]) * dtype.itemsize))
    for start in range(0, array.shape[-1], planes):
        slab = array[..., start : start + planes].T  # (K, J, I)
        yield (slab if slab.flags.c_contiguous and slab.dtype == dtype else _laid(slab, dtype)).view(np.uint8).data


def _laid(slab: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Copy voxels so that their last axis is the fastest, a few lines at a time: the cache holds what they read."""
    laid = np.empty(slab.shape, dtype)
    for start in range(0, slab.shape[-1], LINES):
        laid[..., start : start + LINES] = slab[..., start : start + LINES]
    return laid
