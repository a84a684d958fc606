"""The rules by which the slices of a DICOM series make a grid.

Storage axes are I along columns, J along rows and K along the normal of the
slices, in the direction of the cross product of the image's two axes; DICOM's
LPS millimetres become RAS+.  So voxels lie where other careful readers put them.

Reference: DICOM PS3.3, C.7.6.2 (plane).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile
from chiasm.volumes.dicom_frames import MARKS, Frame
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry

UNIT = 1e-3  # how far the image's axes may be from unit length and from square to one another
SAME_ORIENTATION = 1e-3
SAME_SPACING = 1e-4  # relative
EVEN = 0.01  # of a step, between neighbouring slices
ROUNDING_MM = 0.0101  # positions are often written with two decimals
ROUNDED_MM = 2 * ROUNDING_MM  # by which the last slice may seem to be shifted against the first
TILT_DEGREES = 0.1
GAP = 1.5  # a step this many times as long as most, and as its slice is thick, lacks a slice
RESAMPLE = "Resample it to a straight and even grid with --resample-tilt: Reading(resample_tilt=True) in Python."


class Stack(NamedTuple):
    """Slices that make a stack, in the order of K.

    Attributes:
        frames: The images.
        affine: Voxel to world, RAS+ and mm, shape (4, 4).
        tilted: Error of a stack that is slanted or uneven and needs resampling; None of a regular one.
    """

    frames: tuple[Frame, ...]
    affine: NDArray[np.float64]
    tilted: VolumeError | None = None

    @property
    def geometry(self) -> Geometry:
        """The grid."""
        rows, columns = self.frames[0].size
        return Geometry((columns, rows, len(self.frames)), self.affine, container="dicom")

    @property
    def parts(self) -> tuple[DicomFile, ...]:
        """The files that hold its images, in their order."""
        return tuple(dict.fromkeys(frame.part for frame in self.frames))


def arrange(frames: Sequence[Frame], path: Path) -> Stack:
    """Put the images of a series into the order of K and find their grid.

    Args:
        frames: At least one, in any order.
        path: What to name in messages.

    Raises:
        VolumeError: If they do not make one stack: mixed orientations or sizes, a
            position that occurs twice, a missing slice, more than three dimensions.
    """
    x, y, normal = image_axes(frames, path)
    check_alike(frames, path)
    heights = np.array([np.dot(frame.position, normal) for frame in frames])
    order = np.argsort(heights, kind="stable")
    ordered = tuple(frames[index] for index in order)
    first = ordered[0]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = x * first.spacing[1], y * first.spacing[0], first.position
    if len(ordered) == 1:
        affine[:3, 2] = normal * (first.thickness or 1.0)
        return Stack(ordered, LPS_TO_RAS @ affine)
    affine[:3, 2], tilted = _stacked(ordered, np.diff(heights[order]), normal, path)
    return Stack(ordered, LPS_TO_RAS @ affine, tilted)


def _stacked(
    ordered: Sequence[Frame], gaps: NDArray[np.float64], normal: NDArray[np.float64], path: Path
) -> tuple[NDArray[np.float64], VolumeError | None]:
    """Return the step from one slice to the next, and how the stack departs from a straight and even one."""
    apart = gaps[gaps > ROUNDING_MM]
    usual = _usual(apart) if apart.size else 0.0
    close = max(EVEN * usual, ROUNDING_MM)
    if (gaps <= close).any():
        raise _repeated(ordered, gaps <= close, path)
    positions = np.array([frame.position for frame in ordered])
    tilted = _slant(ordered, positions, normal, usual, close, path)
    return _reach(positions, normal) / (len(ordered) - 1), tilted


def _reach(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the way from the first slice to the last; along the normal where it departs by rounding alone."""
    reach: NDArray[np.float64] = positions[-1] - positions[0]
    straight: NDArray[np.float64] = (reach @ normal) * normal
    return straight if np.linalg.norm(reach - straight) <= ROUNDED_MM else reach


def _usual(gaps: NDArray[np.float64]) -> float:
    """Return the distance that slices have: of most, or the least where all others are multiples, as slices lack."""
    least = float(gaps.min())
    if np.abs(gaps / least - np.rint(gaps / least)).max() <= EVEN:
        return least
    return float(np.sort(gaps)[(gaps.size - 1) // 2])  # of two, the smaller


def image_axes(frames: Sequence[Frame], path: Path) -> tuple[NDArray[np.float64], ...]:
    """Return unit vectors along a row, down a column and along the normal, LPS.

    Raises:
        VolumeError: If orientations differ or are wrong, or there is a localizer or mosaic among the images.
    """
    _check_image_types(frames, path)
    turns = np.array([frame.orientation for frame in frames])
    if np.abs(turns - turns[0]).max() > SAME_ORIENTATION:
        count = len(np.unique(np.round(turns, 2), axis=0))
        raise VolumeError(
            "holds images of several orientations", path=path, reason="orientation", found=f"{count} orientations"
        )
    return _square(turns[0], path)


def _check_image_types(frames: Sequence[Frame], path: Path) -> None:
    """Refuse images of several slices, and localizers."""
    if any("MOSAIC" in frame.image_types for frame in frames):
        raise VolumeError(
            "holds slices laid side by side in one image",
            path=path,
            reason="mosaic",
            hint="Convert it first, for example with dcm2niix.",
        )
    if scouts := [frame for frame in frames if frame.is_localizer]:
        raise _holds_localizers(scouts, len(frames), path)


def _square(turn: NDArray[np.float64], path: Path) -> tuple[NDArray[np.float64], ...]:
    """Return unit vectors along a row, down a column and along the normal of one image."""
    x, y = turn[:3], turn[3:]
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if max(abs(length - 1) for length in lengths) > UNIT or abs(x @ y) > UNIT:
        raise VolumeError(
            "has an ImageOrientationPatient that is no pair of unit vectors square to one another",
            path=path,
            reason="orientation",
            found=f"lengths {lengths[0]:.4g} and {lengths[1]:.4g}, cosine {float(x @ y):.4g}",
        )
    x = x / lengths[0]
    y = y - (x @ y) * x
    y = y / np.linalg.norm(y)
    return x, y, np.cross(x, y)


def _holds_localizers(scouts: Sequence[Frame], count: int, path: Path) -> VolumeError:
    found = f"{len(scouts)} of {count} images with ImageType LOCALIZER"
    if len(scouts) == count:
        hint = "Take the scan itself."
        return VolumeError("is a localizer", path=path, reason="localizer", found=found, hint=hint)
    names = list(dict.fromkeys(frame.part.place.name for frame in scouts))
    return VolumeError(
        "holds a localizer among its images",
        path=path,
        reason="localizer",
        found=f"{found}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
        hint="Move the localizer's files to another folder.",
    )


def check_alike(frames: Sequence[Frame], path: Path) -> None:
    """Refuse mixed sizes and spacings, and more than one stack or echo even where positions differ.

    Raises:
        VolumeError: If there are such.
    """
    _check_sizes(frames, path)
    _check_spacings(frames, path)
    for word in ("stack", "echo"):
        if len(values := _values_of(frames, word)) > 1:
            raise _four_d([(word, values)], path)


def _check_sizes(frames: Sequence[Frame], path: Path) -> None:
    """Refuse images of several sizes."""
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        found = ", ".join(f"{columns} x {rows}" for rows, columns in sizes[:4])
        raise VolumeError("holds images of several sizes", path=path, reason="mixed-sizes", found=found)


def _check_spacings(frames: Sequence[Frame], path: Path) -> None:
    """Refuse images of several pixel spacings."""
    spacings = np.array([frame.spacing for frame in frames])
    if (np.abs(spacings / spacings[0] - 1) > SAME_SPACING).any():
        found = ", ".join(f"{row:.4g} x {column:.4g} mm" for row, column in np.unique(spacings, axis=0)[:4])
        raise VolumeError("holds images of several pixel spacings", path=path, reason="mixed-sizes", found=found)


def _values_of(frames: Sequence[Frame], word: str) -> list[str]:
    """Return the values that a mark has, in order."""
    return sorted({frame.marks.get(word, "") for frame in frames})


def _four_d(differing: Sequence[tuple[str, Sequence[str]]], path: Path) -> VolumeError:
    words = "; ".join(f"{word}: {', '.join(value or 'none' for value in values[:6])}" for word, values in differing)
    return VolumeError(
        "is 4D: it holds more than one volume",
        path=path,
        reason="four-d",
        found=words,
        hint="Split it, for example with dcm2niix, and take one.",
    )


def _repeated(ordered: Sequence[Frame], same: NDArray[np.bool_], path: Path) -> VolumeError:
    """Say why positions occur more than once: several volumes in one series, or slices that are there twice."""
    counts = np.bincount(np.concatenate([[0], np.cumsum(~same)]))
    differing = _differing(ordered, int(counts.max()))
    if differing and (counts == counts[0]).all():
        return _four_d(differing, path)
    at = int(np.flatnonzero(same)[0])
    one, other = ordered[at], ordered[at + 1]
    identical = (one.instance_uid, one.place) == (other.instance_uid, other.place)
    return VolumeError(
        "holds one slice twice" if identical else "holds two slices in one place",
        path=path,
        reason="duplicate-slice",
        found=f"{_names(one, other)}, {int(np.sum(counts > 1))} places in all",
        hint="Remove the copies." if identical else "Two scans may share the series; export them apart.",
    )


def _differing(frames: Sequence[Frame], most: int) -> list[tuple[str, list[str]]]:
    """Return the marks that have several values, at most as many as images lie in one place."""
    words = dict.fromkeys(word for _, _, word in MARKS)
    values = [(word, _values_of(frames, word)) for word in words]
    return [(word, found) for word, found in values if 1 < len(found) <= most]


def _names(one: Frame, other: Frame) -> str:
    """Name two images by their files, or by their places where they lie in one file."""
    if one.part == other.part:
        return f"frames {one.place + 1} and {other.place + 1} of {one.part.place.name}"
    return f"{one.part.place.name} and {other.part.place.name}"


def _slant(
    ordered: Sequence[Frame],
    positions: NDArray[np.float64],
    normal: NDArray[np.float64],
    usual: float,
    close: float,
    path: Path,
) -> VolumeError | None:
    """Say how the stack departs from a straight and even one, if resampling can mend it; refuse what it cannot."""
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    total = positions[-1] - positions[0]
    along = total / (total @ normal)  # for each mm along the normal
    wander = np.linalg.norm(steps - gaps[:, None] * along, axis=1)
    if wander.max() > close:
        raise _shifted(wander, path)
    _check_complete(ordered, gaps, usual, path)
    is_uneven = bool(np.abs(gaps - gaps.mean()).max() > close)
    degrees = float(np.degrees(np.arccos(min(1.0, 1 / float(np.linalg.norm(along))))))
    if degrees > TILT_DEGREES and np.linalg.norm(total - (total @ normal) * normal) > ROUNDED_MM:
        return _tilted(degrees, gaps, path, is_uneven=is_uneven)
    return _uneven(gaps, path) if is_uneven else None


def _shifted(wander: NDArray[np.float64], path: Path) -> VolumeError:
    """Say that slices are shifted, and where most: `wander` is how far each step departs from the mean."""
    at = int(wander.argmax())
    return VolumeError(
        "has slices that are shifted against one another",
        path=path,
        reason="orientation",
        found=f"{wander[at]:.3g} mm between slices {at + 1} and {at + 2}",
    )


def _check_complete(ordered: Sequence[Frame], gaps: NDArray[np.float64], usual: float, path: Path) -> None:
    """Refuse a stack that lacks a slice."""
    thick = np.array([frame.thickness or usual for frame in ordered])
    thicker = np.maximum(thick[1:], thick[:-1]) / np.median(thick)
    # a longer step between slices that are thicker themselves lacks nothing
    lacking = (gaps > GAP * usual) & (gaps > GAP * usual * thicker)
    if lacking.any():
        at = int(np.flatnonzero(lacking)[0])
        raise VolumeError(
            "lacks a slice",
            path=path,
            reason="missing-slice",
            found=f"{gaps[at]:.4g} mm between {_names(ordered[at], ordered[at + 1])}"
            f" (slices {at + 1} and {at + 2} of {len(ordered)})"
            + (f", and {int(lacking.sum()) - 1} more gaps" if lacking.sum() > 1 else ""),
            expected=f"{usual:.4g} mm",
            hint="Copy or export the series again.",
        )


def _tilted(degrees: float, gaps: NDArray[np.float64], path: Path, *, is_uneven: bool) -> VolumeError:
    """Say that slices are stacked at a slant."""
    return VolumeError(
        "was scanned with a tilted gantry: its slices are stacked at a slant",
        path=path,
        reason="tilt",
        found=f"{degrees:.1f} degrees" + (f", {_spread(gaps)}" if is_uneven else ""),
        expected=f"at most {TILT_DEGREES}",
        hint=RESAMPLE,
    )


def _uneven(gaps: NDArray[np.float64], path: Path) -> VolumeError:
    """Say that slices lie at uneven distances."""
    return VolumeError(
        "has slices at uneven distances",
        path=path,
        reason="uneven",
        found=_spread(gaps),
        expected="within 1 %",
        hint=RESAMPLE,
    )


def _spread(gaps: NDArray[np.float64]) -> str:
    """Say how far slices lie apart."""
    return f"slices {gaps.min():.4g} to {gaps.max():.4g} mm apart"
