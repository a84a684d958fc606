"""MINC 2: HDF5 with named axes; its world runs to the right, the front and up.

Reference: https://en.wikibooks.org/wiki/MINC/SoftwareDevelopment/MINC2.0_File_Format_Reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Geometry
from chiasm.volumes.streams import open_file, packing_of

MAGIC = b"\x89HDF\r\n\x1a\n"
ROOT = "minc-2.0"
IMAGE = f"{ROOT}/image/0"
LIMITS = ("image-min", "image-max")
SPATIAL = ("xspace", "yspace", "zspace")
FILTERS = (1, 2, 3)  # of HDF5 itself: deflate, shuffle, checksum; others would load somebody's library
LARGEST = 1e9  # number of an affine
MOST_TEXT = 10_000  # bytes of an attribute
DEFLATE = 1  # the code of that filter
WHOLE = 1e-6  # by how much all values may miss whole numbers and be meant as such
MOST_MISSED = 0.25  # by how much labels may, where the type that stores them has no finer steps
BLOCK = 2**20  # voxels whose meaning is worked out at a time


class _Axis(NamedTuple):
    """An axis of the image: its name, samples, step in mm, first place along its direction, and direction."""

    name: str
    length: int
    step: float
    start: float
    direction: tuple[float, ...]


def looks_like_minc(head: bytes) -> bool:
    """Return whether it is HDF5, as MINC 2 is; what is in it shows when it is opened."""
    return head.startswith(MAGIC)


def read_minc(path: Path, *, labels: bool = False, max_bytes: int = 2 * 2**30) -> tuple[NDArray[Any], Geometry]:
    """Read a MINC 2 volume.

    Args:
        path: A .mnc file.
        labels: Whether its values are whole numbers, which shares of a range can only come near.
        max_bytes: Most bytes of voxels.

    Returns:
        Real values, shape (x, y, z) or as the file orders its axes, the fastest first; and their grid.

    Raises:
        VolumeError: If the file breaks a rule, or h5py is not installed.
    """
    with _opened(path) as file:
        image = _dataset(file, f"{IMAGE}/image", path)
        axes = _axes(file, image, path)
        _check_storage(image, path, max_bytes)
        try:
            values = _real_values(file, image, labels, path)
        except OSError as error:  # what HDF5 says of a damaged chunk
            raise VolumeError(
                "holds corrupted or truncated voxels", path=path, reason="corrupted", found=error, hint="Copy it again."
            ) from error
    spatial = _spatial(axes)
    array = values.reshape([axis.length for axis in spatial]).T
    i, j, k = array.shape
    return array, Geometry((i, j, k), _affine(spatial[::-1], path))


def read_minc_grid(path: Path) -> Geometry:
    """Read the grid of a MINC 2 volume; no voxel is read.

    Raises:
        VolumeError: As `read_minc`.
    """
    with _opened(path) as file:
        axes = _axes(file, _dataset(file, f"{IMAGE}/image", path), path)
    spatial = _spatial(axes)[::-1]
    i, j, k = (axis.length for axis in spatial)
    return Geometry((i, j, k), _affine(spatial, path))


def _spatial(axes: Sequence[_Axis]) -> list[_Axis]:
    """Return the three axes of space, in the order of the file."""
    return [axis for axis in axes if axis.name in SPATIAL]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open as HDF5, without a lock: whoever else reads the file may hold one."""
    try:
        import h5py
    except ImportError as error:
        raise VolumeError(
            "is MINC 2 or HDF5, which needs h5py", path=path, reason="format", hint="pip install 'chiasm[minc]'"
        ) from error
    if packing_of(path) == "gzip":
        raise VolumeError("is a gzipped MINC 2", path=path, reason="format", hint="Unpack it by gunzip first.")
    with open_file(path) as content:
        try:
            file = h5py.File(content, "r")
        except OSError as error:
            raise VolumeError(
                "is HDF5 that cannot be opened",
                path=path,
                reason="corrupted",
                found=str(error)[:120],
                hint="Copy it again.",
            ) from error
        with file:
            yield file


def _member(file: Any, name: str, path: Path) -> Any:
    """Return what a file holds by a name, through hard links alone; None where there is nothing."""
    import h5py

    found = file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise VolumeError("keeps its content elsewhere", path=path, reason="elsewhere", found=name)
        found = found[part]
    return found


def _dataset(file: Any, name: str, path: Path) -> Any:
    import h5py

    found = _member(file, name, path)
    if not isinstance(found, h5py.Dataset):
        raise VolumeError("is HDF5 but not MINC 2", path=path, reason="format", found=f"no {name}")
    if found.dtype.kind not in "iuf" or found.dtype.itemsize > 8:
        raise VolumeError("holds no real numbers", path=path, reason="datatype", found=f"{name}: {found.dtype}")
    if found.external or found.is_virtual:
        raise VolumeError("keeps its voxels elsewhere", path=path, reason="elsewhere", found=name)
    _check_filters(found, path)
    return found


def _check_filters(dataset: Any, path: Path) -> None:
    """Refuse what is packed by a filter that somebody's library would have to undo."""
    if unknown := sorted(set(_filters(dataset)) - set(FILTERS)):
        raise VolumeError(
            "is packed by a filter that HDF5 has not itself", path=path, reason="format", found=f"filter {unknown[0]}"
        )


def _filters(dataset: Any) -> list[int]:
    """Return the codes of the filters by which a dataset is packed."""
    filters = dataset.id.get_create_plist()
    return [filters.get_filter(index)[0] for index in range(filters.get_nfilters())]


def _check_storage(image: Any, path: Path, max_bytes: int) -> None:
    """Refuse what is too large, was not written whole, or is packed twice, before memory is taken.

    What is left is at most as large as its file packed once by deflate, which packs no tighter than 1 to 1032.
    """
    size = math.prod(image.shape) * image.dtype.itemsize
    chunk = math.prod(image.chunks or (1,)) * image.dtype.itemsize
    if max(size, chunk) > max_bytes:
        raise VolumeError(
            "is too large",
            path=path,
            reason="too-large",
            found=f"{max(size, chunk) / 2**20:.0f} MiB",
            expected=f"at most {max_bytes / 2**20:.0f} MiB",
        )
    if _filters(image).count(DEFLATE) > 1:
        raise VolumeError("is packed twice", path=path, reason="format", expected="one packing")
    if image.chunks is None:
        written, needed = image.id.get_storage_size(), size
    else:
        written = image.id.get_num_chunks()
        needed = math.prod(-(-side // step) for side, step in zip(image.shape, image.chunks, strict=True))
    if written < needed:
        raise VolumeError(
            "is truncated: some of its voxels were never written",
            path=path,
            reason="truncated",
            found=f"{written} {'bytes' if image.chunks is None else 'chunks'}",
            expected=needed,
        )


def _attribute(thing: Any, name: str, path: Path) -> Any:
    """Return an attribute, None where there is none; refuse one that is far too large."""
    if name not in thing.attrs:
        return None
    if thing.attrs.get_id(name).get_storage_size() > MOST_TEXT:
        raise VolumeError(f"has a MINC header whose {name} is wrong", path=path, reason="header", found="a long one")
    return thing.attrs[name]


def _text(thing: Any, name: str, path: Path) -> str:
    value = _attribute(thing, name, path)
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    return value[:MOST_TEXT].strip("\0")


def _numbers(thing: Any, name: str, default: Sequence[float], path: Path) -> tuple[float, ...]:
    """Read as many numbers of an attribute as the default has."""
    stored = _attribute(thing, name, path)
    value = np.asarray(default if stored is None else stored)
    is_number = value.dtype.kind in "iuf" and value.size == len(default)
    if not is_number or not (np.abs(value.astype(np.float64)) <= LARGEST).all():
        raise VolumeError(f"has a MINC header whose {name} is wrong", path=path, reason="header", found=str(value)[:80])
    return tuple(value.astype(np.float64).ravel().tolist())


def _axes(file: Any, image: Any, path: Path) -> list[_Axis]:
    """Describe the image's axes in the order of the file, slowest first: three of space, others of one sample."""
    names = _text(image, "dimorder", path).split(",")
    _check_names(names, image, path)
    return [_axis(file, name, side, path) for name, side in zip(names, image.shape)]


def _check_names(names: Sequence[str], image: Any, path: Path) -> None:
    """Refuse axes that make no volume: three of space each once, and others of one sample."""
    if len(names) != len(image.shape):
        raise VolumeError("has impossible dimensions", path=path, reason="dimensions", found=f"{names}, {image.shape}")
    if {side for name, side in zip(names, image.shape) if name not in SPATIAL} - {1}:
        raise VolumeError(
            "is 4D: it holds more than one volume", path=path, reason="four-d", found="x".join(map(str, image.shape))
        )
    if {names.count(name) for name in SPATIAL} != {1}:
        raise VolumeError(
            "is a single slice, or has too few slices to be a volume", path=path, reason="thin", found=",".join(names)
        )


def _axis(file: Any, name: str, side: int, path: Path) -> _Axis:
    if name not in SPATIAL:
        return _Axis(name, side, 1.0, 0.0, ())
    described = _described(file, name, path)
    straight = tuple(float(name == other) for other in SPATIAL)
    (step,) = _numbers(described, "step", (1.0,), path)
    (start,) = _numbers(described, "start", (0.0,), path)
    direction = _numbers(described, "direction_cosines", straight, path)
    if step == 0 or not np.linalg.norm(direction):
        raise VolumeError("has a zero spacing", path=path, reason="spacing", found=name)
    return _Axis(name, side, step, start, tuple((np.array(direction) / np.linalg.norm(direction)).tolist()))


def _described(file: Any, name: str, path: Path) -> Any:
    """Return what a file says of an axis, which must be even and in mm."""
    described = _member(file, f"{ROOT}/dimensions/{name}", path)
    if described is None:
        raise VolumeError(f"has no whole MINC header: {name} is missing", path=path, reason="header")
    if _text(described, "spacing", path).startswith("irregular"):
        raise VolumeError("has uneven slices", path=path, reason="spacing", found=name)
    if (unit := _text(described, "units", path)) not in ("", "mm"):
        raise VolumeError("measures in another unit than mm", path=path, reason="spacing", found=unit[:80])
    return described


def _affine(spatial: Sequence[_Axis], path: Path) -> NDArray[np.float64]:
    """Return voxel to world mm: steps may be negative, and starts are measured along the axes' directions."""
    directions = np.array([axis.direction for axis in spatial]).T
    affine = np.eye(4)
    affine[:3, :3] = directions * [axis.step for axis in spatial]
    affine[:3, 3] = directions @ [axis.start for axis in spatial]
    if abs(np.linalg.det(directions)) < 1e-6:
        raise VolumeError("has a singular affine: its axes lie in one plane", path=path, reason="affine")
    return affine


def _real_values(file: Any, image: Any, labels: bool, path: Path) -> NDArray[Any]:
    """Return what the stored values mean: whole numbers are shares of the range between image-min and image-max."""
    limits = [_member(file, f"{IMAGE}/{name}", path) for name in LIMITS]
    if image.dtype.kind == "f" or None in limits:
        return image[()]  # type: ignore[no-any-return]
    low, high = sorted(_numbers_of_range(image, path))
    if not high > low:
        raise VolumeError("has an empty valid_range", path=path, reason="slope", found=f"{low:g} to {high:g}")
    least, most = (_limits(_dataset(file, f"{IMAGE}/{name}", path), image.shape, path) for name in LIMITS)
    stored: NDArray[Any] = image[()].reshape(-1, *image.shape[-2:])
    values = np.empty(stored.shape, np.float64 if labels else np.float32)
    missed = 0.0
    for part in _blocks(stored):
        share = (np.clip(stored[part].astype(np.float64), low, high) - low) / (high - low)
        values[part] = meant = share * (most[part] - least[part]) + least[part]
        missed = max(missed, float(np.abs(meant - np.rint(meant)).max()))
    step = float((most - least).max()) / (high - low)
    return np.rint(values, out=values) if missed < _allowed(step, labels) else values


def _blocks(planes: NDArray[Any]) -> Iterator[slice]:
    """Yield parts along the first axis that hold about `BLOCK` voxels."""
    count = max(1, BLOCK // planes[0].size)
    return (slice(start, start + count) for start in range(0, len(planes), count))


def _allowed(step: float, labels: bool) -> float:
    """Return by how much all values may miss whole numbers: by rounding, and labels by half a step of their type."""
    half = 0.51 * abs(step)
    return half if labels and WHOLE < half <= MOST_MISSED else WHOLE


def _numbers_of_range(image: Any, path: Path) -> tuple[float, float]:
    """Return the stored values that stand for the ends of the range; those of the type if the file names none."""
    info = np.iinfo(image.dtype)
    value = np.asarray((info.min, info.max) if (stored := _attribute(image, "valid_range", path)) is None else stored)
    if value.dtype.kind not in "iuf" or value.size != 2 or not np.isfinite(value.astype(np.float64)).all():
        raise VolumeError("has a valid_range that is wrong", path=path, reason="slope", found=str(value)[:80])
    low, high = value.astype(np.float64).tolist()
    return low, high


def _limits(dataset: Any, shape: Sequence[int], path: Path) -> NDArray[np.float64]:
    """Return an end of the range for each plane of the image's last two axes: it varies along the first axes."""
    if dataset.shape != tuple(shape[: dataset.ndim]):
        raise VolumeError("has a range that fits no slice", path=path, reason="slope", found=str(dataset.shape))
    values = np.asarray(dataset[()], np.float64)
    if not np.isfinite(values).all():
        raise VolumeError("has a range that is not finite", path=path, reason="slope")
    values = values.reshape(*values.shape, *[1] * (len(shape) - values.ndim))
    rest = values.shape[-2:]
    return np.broadcast_to(values, (*shape[:-2], *rest)).reshape(-1, *rest)
