"""The only way to files: every volume is read by `read_volume` and written by `write_volume`.

No common reader is safe by itself: one reads a truncated file as zeros, another
ignores a wrong checksum or an affine that is no number.  What enters here is
read right or refused with file, reason, found, expected and what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_read import read_dicom
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.geometry import Geometry, Volume, check_kinds, straight_grid, straightened
from chiasm.volumes.metaimage import looks_like_metaimage, open_metaimage, write_metaimage
from chiasm.volumes.mgh import looks_like_mgh, open_mgh, write_mgh
from chiasm.volumes.minc import looks_like_minc, read_minc, read_minc_grid
from chiasm.volumes.nifti import HEAD, Form, first_beside, looks_like_nifti, open_nifti, twin_names
from chiasm.volumes.nifti_write import write_nifti
from chiasm.volumes.nrrd import data_file_of, looks_like_nrrd, open_nrrd, write_nrrd
from chiasm.volumes.streams import first_bytes, unreadable
from chiasm.volumes.voxels import Stored, image_of, labels_of, read_image, read_labels

SPACING_MM = (0.01, 50.0)
ROUNDING = 1e-6  # of a spacing that was stored as float32
SKEW_DEGREES = 0.1
FLATTEST = 1e-3  # least volume of a cell with sides of length 1
MOST_STRAIGHTENED = 4  # times as many voxels as before
FEWEST_SLICES = 3
MAX_BYTES = 2 * 2**30
#: What writes a file, by its suffix.
WRITERS: Mapping[str, Callable[[Path, NDArray[Any], Geometry, str], None]] = {
    ".nii.gz": write_nifti,
    ".nii": write_nifti,
    ".mha": write_metaimage,
    ".nrrd": write_nrrd,
    ".mgz": write_mgh,
    ".mgh": write_mgh,
}
#: Suffix of a file to that of one in its format; others become NIfTI.
SAME_FORMAT = {".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mgz": ".mgz", ".mgh": ".mgz"}
SYNTHETIC = '{"SyntheticData": "YES"'  # how the remark of an image begins that was made, not acquired: JSON
REMARKED = 4096  # bytes that hold a header with a remark
#: What volumes are called; of two that fit, the longer one first.
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".mnc")


@dataclass(frozen=True)
class Reading:
    """What to assume of files whose header leaves a question open; by default such files are refused.

    Attributes:
        form: Which NIfTI form to believe where sform and qform disagree.
        assume_ras: Whether to take a NIfTI or NRRD without orientation as RAS.
        resample: Whether to resample skewed axes on a straight grid, which interpolates.
        resample_tilt: Whether to resample DICOM slices that are tilted or uneven.
        ct_offset: Added to the stored values of each CT that it makes right; others stay as they are.
    """

    form: Form | None = None
    assume_ras: bool = False
    resample: bool = False
    resample_tilt: bool = False
    ct_offset: float = 0.0

    def __or__(self, other: Reading) -> Reading:
        """Return what either of the two assumes; of two forms the first.

        >>> Reading(form="sform") | Reading(form="qform", resample=True)
        Reading(form='sform', assume_ras=False, resample=True, resample_tilt=False, ct_offset=0.0)
        """
        return Reading(
            self.form or other.form,
            self.assume_ras or other.assume_ras,
            self.resample or other.resample,
            self.resample_tilt or other.resample_tilt,
            self.ct_offset or other.ct_offset,
        )


STRICT = Reading()  # nothing is assumed


def read_volume(
    path: Path | str,
    labels: bool = False,
    *,
    reading: Reading = STRICT,
    declared: Collection[int] | None = None,
    allow_thin: bool = False,
    allow_constant: bool = False,
    narrow: bool = False,
    series: str | int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read a volume of NIfTI, MetaImage, NRRD, MGH or MINC 2, or a DICOM series, or refuse it.

    The content of a file decides its format, not its name.

    Args:
        path: The file; for DICOM also a folder, a zip archive, or any one file
            of a series, which stands for all of it.
        labels: Whether it is a label map or mask: whole numbers, which stay integers.
        reading: What to assume where the header leaves a question open.
        declared: The only labels that may occur beside 0; all may where None.
        allow_thin: Whether fewer than three slices along an axis are right.
        allow_constant: Whether an image may be constant.
        narrow: Whether an image that is stored as integers of up to 16 bits may stay so.
        series: Which DICOM series, where a place holds several: as for `read_dicom`.
        max_bytes: Most bytes of voxels.

    Returns:
        float32 values for an image (or as `narrow` allows); the smallest integer type that holds them for labels.

    Raises:
        VolumeError: If the file is missing, of another format, damaged, hostile
            or odd; `reason` says which rule it breaks.
    """
    path = _of_a_pair(Path(path))
    file = _is_file(path)
    head = first_bytes(path, HEAD) if file else b""  # refuses what would never end, such as a pipe
    voxels = partial(_voxels, path=path, labels=labels, declared=declared, allow_constant=allow_constant, narrow=narrow)
    if is_dicom(path):
        found = read_dicom(path, series=series, resample_tilt=reading.resample_tilt, max_bytes=max_bytes)
        check_affine(found.geometry, path)
        _check_slices(found.geometry, path, allow_thin or labels)  # a segmentation leaves its empty slices out
        return Volume(voxels(found.array), found.geometry)
    content: NDArray[Any] | Stored
    if looks_like_minc(head):
        content, geometry = read_minc(path, labels=labels, max_bytes=max_bytes)
    else:  # of another format, or it says what is wrong
        content = _open(path, head if file else first_bytes(path, HEAD), reading, max_bytes)
        geometry = content.geometry
    is_skewed = check_skew(geometry, path, reading)
    _check_slices(geometry, path, allow_thin)
    volume = Volume(voxels(content), geometry)
    return straightened(volume, labels=labels) if is_skewed else volume


def _voxels(
    content: NDArray[Any] | Stored,
    path: Path,
    labels: bool,
    declared: Collection[int] | None,
    allow_constant: bool,
    narrow: bool,
) -> NDArray[Any]:
    """Check voxels, which are in memory or still on disk, and return them as labels or as an image."""
    if isinstance(content, Stored):
        if labels:
            return read_labels(content, path, declared=declared)
        return read_image(content, path, allow_constant=allow_constant, narrow=narrow)
    if labels:
        return labels_of(content, path, declared=declared)
    return image_of(content, path, allow_constant=allow_constant)


def _open(path: Path, head: bytes, reading: Reading, max_bytes: int) -> Stored:
    """Check the header of a file whose format its first bytes show."""
    if looks_like_nifti(head):
        return open_nifti(path, form=reading.form, assume_ras=reading.assume_ras, max_bytes=max_bytes)
    if looks_like_metaimage(head):
        return open_metaimage(path, max_bytes=max_bytes)
    if looks_like_nrrd(head):
        return open_nrrd(path, assume_ras=reading.assume_ras, max_bytes=max_bytes)
    if looks_like_mgh(head):
        return open_mgh(path, max_bytes=max_bytes)
    raise VolumeError(
        "is of no format that is read",
        path=path,
        reason="format",
        found="an empty file" if not head else _format_of(head),
        expected=f"{', '.join(VOLUME_SUFFIXES)}, .dcm, or a folder or .zip of DICOM files",
    )


def check_skew(geometry: Geometry, path: Path, reading: Reading) -> bool:
    """Return whether a grid is skewed; refuse one that is not to be made straight, or would grow too large by it.

    Raises:
        VolumeError: If it is refused, also as by `check_affine`.
    """
    if not check_affine(geometry, path, allow_skew=reading.resample):
        return False
    if math.prod(straight_grid(geometry).shape) > MOST_STRAIGHTENED * math.prod(geometry.shape):
        raise VolumeError("is sheared too far to be resampled on a straight grid", path=path, reason="skew")
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise unreadable(path, error) from error


def _check_slices(geometry: Geometry, path: Path, allow_thin: bool) -> None:
    if min(geometry.shape) < FEWEST_SLICES and not allow_thin:
        raise VolumeError(
            "is a single slice, or has too few slices to be a volume",
            path=path,
            reason="thin",
            found="x".join(map(str, geometry.shape)),
            expected=f"at least {FEWEST_SLICES} along each axis",
            hint="Give all slices of the scan: of DICOM, a folder or a zip archive with the whole series.",
        )


def _of_a_pair(path: Path) -> Path:
    """Return the header of a .hdr/.img pair, by which it is known; any other path as it is."""
    names = twin_names(path, "img")
    try:
        header = first_beside(path, names)
        if header is None and names:
            _refuse_voxels_alone(path, names)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise unreadable(path, error) from error
    return header or path


def _refuse_voxels_alone(path: Path, names: Sequence[str]) -> None:
    """Refuse the voxels of a pair without its header."""
    if path.exists() and not looks_like_nifti(first_bytes(path, HEAD)):
        raise VolumeError("lacks its .hdr file", path=path, reason="not-found", expected=names[0])


#: First bytes of formats that are met among volumes, for a clearer word.
_FORMATS = {
    b"CDF": "netCDF or MINC 1 (mincconvert -2 makes MINC 2 of it)", b"NRRD": "another NRRD", b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG", b"PK\3\4": "a zip", b"\x93NUMPY": "a numpy array", b"II*\0": "TIFF", b"MM\0*": "TIFF",
}  # fmt: skip


def _format_of(head: bytes) -> str:
    known = next((name for magic, name in _FORMATS.items() if head.startswith(magic)), None)
    return known or f"first bytes {head[:8]!r}"


def volume_files(path: Path) -> list[Path]:
    """List the files that a volume consists of.

    Itself; that of its voxels where a header keeps them beside it; the slices
    of a DICOM series in spatial order, or the archive that holds them.

    Raises:
        VolumeError: If it cannot be read, or a place of DICOM holds several series.
    """
    if is_dicom(path):
        return list(dict.fromkeys(part.path for part in pick_series(path).parts))
    return _with_twins(path)


def files_at(path: Path) -> list[Path]:
    """List every file that a volume at a place may be read from; of a folder all files, and no header is opened."""
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_file()]
    return _with_twins(path) if path.is_file() else [path]


def _with_twins(path: Path) -> list[Path]:
    """Return a file and what is beside it of its volume: the other of a pair, or the file of its voxels."""
    twins = map(path.with_name, (*twin_names(path, "hdr"), *twin_names(path, "img")))
    beside = {*_named_file(path), *list(filter(Path.is_file, twins))[:1]} - {path}
    return [path, *sorted(filter(Path.is_file, beside))]


def _named_file(path: Path) -> list[Path]:
    """Return the file that the header of a MetaImage or a NRRD names for its voxels, if it names any."""
    head = first_bytes(path, 2**16)
    if looks_like_nrrd(head):
        return [data_file_of(path)]
    pattern = rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*([^\s/]+)"
    named = re.search(pattern, head, re.M) if looks_like_metaimage(head) else None
    return [path.with_name(named[1].decode(errors="replace"))] if named else []


def read_grid(path: Path) -> Geometry:
    """Read the grid of a file from its header; no voxel is read, and no orientation is asked for.

    Raises:
        VolumeError: If the header cannot be read.
    """
    head = first_bytes(path, HEAD)
    if looks_like_minc(head):
        return read_minc_grid(path)
    return _open(path, head, Reading(form="sform", assume_ras=True), MAX_BYTES).geometry


def check_affine(geometry: Geometry, path: Path | None = None, *, allow_skew: bool = False) -> bool:
    """Refuse a grid that no scanner makes, and return whether its axes are skewed.

    Args:
        geometry: The grid.
        path: What to name in errors.
        allow_skew: Whether skewed axes are to be made straight, so that they are no fault.

    Raises:
        VolumeError: If the affine is not finite or singular, a spacing lies
            outside 0.01 to 50 mm, or axes are skewed by more than 0.1 degrees.
    """
    _check_numbers(geometry.affine, path)
    _check_spacing(geometry.spacing_mm, path)
    axes = geometry.affine[:3, :3] / geometry.spacing_mm
    skew = _skew_degrees(axes)
    if abs(np.linalg.det(axes)) < FLATTEST:
        raise VolumeError(
            "has a singular affine: its axes do not span a space",
            path=path,
            reason="singular",
            found=f"{skew:.3g} degrees",
        )
    if skew > SKEW_DEGREES and not allow_skew:
        raise VolumeError(
            "has a sheared affine: its axes are not at right angles",
            path=path,
            reason="skew",
            found=f"{skew:.3g} degrees",
            expected=f"at most {SKEW_DEGREES}",
            hint="Resample it to a straight grid first, or let --resample do it: Reading(resample=True) in Python.",
        )
    return skew > SKEW_DEGREES


def _check_numbers(affine: NDArray[np.float64], path: Path | None) -> None:
    """Refuse an affine that is not finite, or lies too far away."""
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e30:
        raise VolumeError("has an affine with NaN or infinity", path=path, reason="affine")
    if np.abs(affine[:3, 3]).max() > 1e6:
        raise VolumeError("lies more than a kilometre away", path=path, reason="affine", found=affine[:3, 3].tolist())


def _check_spacing(spacing: Sequence[float], path: Path | None) -> None:
    least, most = SPACING_MM[0] * (1 - ROUNDING), SPACING_MM[1] * (1 + ROUNDING)
    if not all(least <= step <= most for step in spacing):
        raise VolumeError(
            "has a spacing out of range",
            path=path,
            reason="spacing",
            found=" x ".join(f"{step:.4g}" for step in spacing) + " mm",
            expected=f"{SPACING_MM[0]} to {SPACING_MM[1]} mm",
            hint="Is its unit right?",
        )


def _skew_degrees(axes: NDArray[np.float64]) -> float:
    """Return by how many degrees two axes, unit vectors in columns, are off a right angle at most."""
    lean = max(abs(float(axes[:, a] @ axes[:, b])) for a, b in combinations(range(3), 2))
    return float(np.degrees(np.arcsin(min(1.0, lean))))


def write_volume(
    path: Path | str, array: NDArray[Any], geometry: Geometry, labels: bool = False, *, remark: str = ""
) -> int:
    """Write a volume, whole or not at all, on the geometry of its source bit for bit.

    Args:
        path: Ends in a key of `WRITERS`.
        array: Shape of the grid; images become float32, labels int16, or int32 where they need it.
        geometry: The grid.
        labels: Whether it is a label map or mask.
        remark: A line of text for the header, such as `SYNTHETIC`.

    Returns:
        How many values were too large for the type and were cut to its ends.

    Raises:
        TypeError: If it is no array of numpy and its `Geometry`.
        VolumeError: If the name ends in something else.
        ValueError: If shapes differ, values are complex, or labels are not whole numbers.
        ChiasmError: If the file cannot be written.
    """
    path = Path(path)
    check_kinds(array, geometry)
    if array.shape != geometry.shape or array.dtype.kind == "c":
        raise ValueError(f"an array of {array.shape} {array.dtype} does not fit a grid of {geometry.shape}")
    name = path.name.lower()
    writer = next((write for suffix, write in WRITERS.items() if name.endswith(suffix)), None)
    if writer is None:
        raise VolumeError("cannot be written", path=path, reason="format", expected=", ".join(WRITERS))
    values, cut = _storable(array, labels)
    writer(path, values, geometry, remark)
    return cut


def written_suffix(path: Path | str) -> str:
    """Return the suffix of a file that is written in the format of another, or as NIfTI where that is only read.

    >>> written_suffix("a.mhd"), written_suffix("a.nii"), written_suffix("a.mnc")
    ('.mha', '.nii.gz', '.nii.gz')
    """
    name = Path(path).name.lower()
    return next((made for suffix, made in SAME_FORMAT.items() if name.endswith(suffix)), ".nii.gz")


def says_synthetic(path: Path) -> bool:
    """Return whether a file's header holds the remark `SYNTHETIC`; one that cannot be read says nothing."""
    try:
        return path.is_file() and SYNTHETIC.encode() in first_bytes(path, REMARKED)
    except VolumeError:
        return False


def _storable(array: NDArray[Any], labels: bool) -> tuple[NDArray[Any], int]:
    """Return values in the type that is written, and how many were cut to its ends."""
    if labels:
        return _storable_labels(array)
    limits = np.finfo(np.float32)
    cut = int(np.count_nonzero(np.abs(array) > limits.max)) if array.dtype == np.float64 else 0
    return np.clip(array, limits.min, limits.max).astype(np.float32) if cut else array.astype(
        np.float32, copy=False
    ), cut


def _storable_labels(array: NDArray[Any]) -> tuple[NDArray[Any], int]:
    if array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise ValueError("labels must be whole numbers")
    if array.dtype.kind == "b":
        return array.view(np.uint8), 0
    if array.dtype in (np.uint8, np.int16):
        return array, 0
    cut = _outside(array, np.int32)
    fitting = np.clip(array, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    return fitting.astype(np.int32 if _outside(array, np.int16) else np.int16), cut


def _outside(array: NDArray[Any], kind: type[np.signedinteger[Any]]) -> int:
    """Count the values that a type of whole numbers cannot hold."""
    limits = np.iinfo(kind)
    return int(np.count_nonzero((array < limits.min) | (array > limits.max)))
