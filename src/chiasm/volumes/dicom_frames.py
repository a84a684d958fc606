"""Where the images of a DICOM series lie, and every rule that makes a stack of them a grid.

Storage axes are I along columns, J along rows and K along the normal of the
slices, in the direction of the cross product of the image's two axes; DICOM's
LPS millimetres become RAS+.  So voxels lie where other careful readers put them.

Reference: DICOM PS3.3, C.7.6.2 (plane), C.7.6.16 (functional groups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile, count_frames, number, numbers, text
from chiasm.volumes.dicom_kinds import KIND_TAGS, ImageKind, kind_of
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry

if TYPE_CHECKING:
    from pydicom import Dataset

UNIT = 1e-3  # how far the image's axes may be from unit length and from square to one another
SAME_ORIENTATION = 1e-3
SAME_SPACING = 1e-4  # relative
EVEN = 0.01  # of a step, between neighbouring slices
ROUNDING_MM = 0.0101  # positions are often written with two decimals
ROUNDED_MM = 2 * ROUNDING_MM  # by which the last slice may seem to be shifted against the first
TILT_DEGREES = 0.1
GAP = 1.5  # a step this many times as long as most, and as its slice is thick, lacks a slice

#: By what images of one position may differ: the functional group of a multi-frame file, the attribute, its name.
MARKS = (
    ("FrameContentSequence", "StackID", "stack"),
    ("MREchoSequence", "EffectiveEchoTime", "echo time"),
    ("", "EchoTime", "echo time"),
    ("", "EchoNumbers", "echo"),
    ("FrameContentSequence", "TemporalPositionIndex", "temporal position"),
    ("", "TemporalPositionIdentifier", "temporal position"),
    ("MRDiffusionSequence", "DiffusionBValue", "b-value"),
    ("", "InversionTime", "inversion time"),
    ("MRTimingAndRelatedParametersSequence", "FlipAngle", "flip angle"),
    ("MRImageFrameTypeSequence", "FrameType", "image type"),
    ("CTImageFrameTypeSequence", "FrameType", "image type"),
    ("", "ImageType", "image type"),
    ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "trigger time"),
    ("", "TriggerTime", "trigger time"),
    ("", "AcquisitionNumber", "acquisition"),
)
PLACE_TAGS = (
    "SOPInstanceUID", "Rows", "Columns", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(name for _, name, _ in MARKS), *KIND_TAGS,
)  # fmt: skip


class Frame(NamedTuple):
    """One image of a series: where it lies in its file and in the patient.

    Attributes:
        part: Its file.
        place: In its file, from 0.
        instance_uid: SOPInstanceUID of its file.
        size: Rows and columns.
        position: Centre of its first pixel, LPS and mm.
        orientation: Unit vectors along a row and down a column, LPS, 6 numbers.
        spacing: Between rows and between columns, mm.
        thickness: Slice thickness or spacing between slices, mm, or None.
        slope: From stored to real values, with
        intercept: this.
        marks: What distinguishes images of one position.
        kind: What kind of image it is.
    """

    part: DicomFile
    place: int
    instance_uid: str
    size: tuple[int, int]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None
    slope: float
    intercept: float
    marks: Mapping[str, str]
    kind: ImageKind

    @property
    def image_types(self) -> list[str]:
        """The words of its ImageType, in capitals."""
        return self.marks.get("image type", "").upper().split("\\")

    @property
    def is_localizer(self) -> bool:
        """Whether its ImageType says so."""
        return "LOCALIZER" in self.image_types


class Stack(NamedTuple):
    """Images that lie on one another, in the order of K.

    Attributes:
        frames: The images.
        affine: Voxel to world, RAS+ and mm, shape (4, 4).
        tilted: Why it is no grid as it is: its slices are stacked at a slant or unevenly; resampling mends it.
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


# --- frames -----------------------------------------------------------------------------------------------------------


def frames_of(dataset: Dataset, part: DicomFile) -> list[Frame]:
    """Read what a file says of each of its images.

    Args:
        dataset: With the attributes of `PLACE_TAGS`.
        part: What the file is called.

    Raises:
        VolumeError: If it says nothing of where they lie, or what it says is wrong.
    """
    if dataset.get("Rows") is None:
        raise VolumeError("holds no pixels", path=part.place, reason="no-pixels")
    count = count_frames(dataset, part)
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if not groups:
        return [_lone_frame(dataset, part, count)]
    if len(groups) != count:
        raise VolumeError(
            "describes another number of frames than it holds",
            path=part.place,
            reason="header",
            found=len(groups),
            expected=count,
        )
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None)
    return [_frame(part, index, dataset, _groups_of(own, shared)) for index, own in enumerate(groups)]


def _lone_frame(dataset: Dataset, part: DicomFile, count: int) -> Frame:
    """Read the image of a file without functional groups, which must be its only one."""
    if count != 1:
        raise VolumeError(
            "holds several frames and does not say where they lie",
            path=part.place,
            reason="position",
            found=f"{count} frames without functional groups",
        )
    return _frame(part, 0, dataset, lambda _: dataset)


def _groups_of(own: Dataset, shared: Dataset | None) -> Callable[[str], Dataset | None]:
    """Return what finds the functional group of a name: an image's own, else the one that all share."""

    def find(name: str) -> Dataset | None:
        items = own.get(name) or (shared.get(name) if shared is not None else None)
        return items[0] if items else None

    return find


#: What says where an image lies: the functional group of a multi-frame file, and the attribute in it.
PLACED_BY = (
    ("PlanePositionSequence", "ImagePositionPatient"),
    ("PlaneOrientationSequence", "ImageOrientationPatient"),
    ("PixelMeasuresSequence", "PixelSpacing"),
)


def _frame(part: DicomFile, index: int, dataset: Dataset, group: Callable[[str], Dataset | None]) -> Frame:
    """Read one image; `group` finds a functional group, or the data set itself in a file of one image."""
    place, turn, measures = (_holder(group(name), attribute, part) for name, attribute in PLACED_BY)
    if dataset.get("ModalityLUTSequence"):
        raise VolumeError("maps its values by a table", path=part.place, reason="lut", found="ModalityLUTSequence")
    slope, intercept = _scale_of(group("PixelValueTransformationSequence") or dataset, part)
    spacing = _spacing_of(measures, part)
    return Frame(
        part,
        index,
        text(dataset, "SOPInstanceUID"),
        _size_of(dataset, part),
        tuple(numbers(place, "ImagePositionPatient", part, 3)),
        tuple(numbers(turn, "ImageOrientationPatient", part, 6)),
        spacing,
        number(measures, "SliceThickness", part) or number(measures, "SpacingBetweenSlices", part),
        slope,
        intercept,
        _marks_of(dataset, group),
        kind_of(dataset, group),
    )


def _spacing_of(measures: Dataset, part: DicomFile) -> tuple[float, ...]:
    """Return the distances between rows and between columns, mm."""
    spacing = numbers(measures, "PixelSpacing", part, 2)
    if min(spacing) <= 0:
        raise VolumeError("has a zero or negative spacing", path=part.place, reason="spacing", found=spacing)
    return tuple(spacing)


def _size_of(dataset: Dataset, part: DicomFile) -> tuple[int, int]:
    """Return rows and columns; 0 where they are not said."""
    return int(number(dataset, "Rows", part) or 0), int(number(dataset, "Columns", part) or 0)


def _scale_of(holder: Dataset, part: DicomFile) -> tuple[float, float]:
    """Return slope and intercept from stored to real values."""
    slope, intercept = number(holder, "RescaleSlope", part), number(holder, "RescaleIntercept", part)
    if slope == 0:
        raise VolumeError("has a RescaleSlope of 0", path=part.place, reason="header")
    return 1.0 if slope is None else slope, intercept or 0.0


def _holder(holder: Dataset | None, attribute: str, part: DicomFile) -> Dataset:
    """Return the group that must hold an attribute of place."""
    if holder is None or holder.get(attribute) is None:
        raise VolumeError(
            "does not say where its image lies in the patient",
            path=part.place,
            reason="position",
            expected=attribute,
            hint="It may be a screenshot or a report rather than a scan.",
        )
    return holder


def _marks_of(dataset: Dataset, group: Callable[[str], Dataset | None]) -> dict[str, str]:
    """Return what an image says by which images of one position may differ."""
    marks: dict[str, str] = {}
    for name, attribute, word in MARKS:
        holder = group(name) if name else dataset
        if holder is not None and (value := text(holder, attribute)):
            marks.setdefault(word, value)
    return marks


# --- the grid ----------------------------------------------------------------------------------------------------


def arrange(frames: Sequence[Frame], path: Path) -> Stack:
    """Put the images of a series into the order of K and find their grid.

    Args:
        frames: At least one, in any order.
        path: What to name in messages.

    Raises:
        VolumeError: If they make no one stack: mixed orientations or sizes, a
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


RESAMPLE = "Resample it to a straight and even grid with --resample-tilt: Reading(resample_tilt=True) in Python."


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
