"""Read from headers where the images of a DICOM series lie.

Reference: DICOM PS3.3, C.7.6.2 (plane), C.7.6.16 (functional groups), C.8.8.3 (dose).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile, count_frames, number, numbers, text
from chiasm.volumes.dicom_kinds import KIND_TAGS, ImageKind, kind_of
from chiasm.volumes.dicom_pixels import StoredPixels

if TYPE_CHECKING:
    from pydicom import Dataset


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
    "GridFrameOffsetVector", "DoseGridScaling",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(name for _, name, _ in MARKS), *KIND_TAGS,
)  # fmt: skip


PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"


class Frame(NamedTuple):
    """One image of a series: where it lies in its file and in the patient.

    Attributes:
        part: Its file.
        place: Index in its file, from 0.
        instance_uid: SOPInstanceUID of its file.
        size: Rows and columns.
        position: Centre of its first pixel, LPS and mm.
        orientation: Unit vectors along a row and down a column, LPS, 6 numbers.
        spacing: Between rows and between columns, mm.
        thickness: Slice thickness or spacing between slices, mm, or None.
        slope: Factor from stored to real values.
        intercept: Added after the factor.
        marks: Attributes by which images of one position may differ, such as the echo, and their values.
        kind: What kind of image it is.
        floating: Whether its pixels are floating-point numbers.
        pixels: Where its file holds native pixels, if that is known.
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
    floating: bool = False
    pixels: StoredPixels | None = None

    @property
    def image_types(self) -> list[str]:
        """The words of its ImageType, in capitals."""
        return self.marks.get("image type", "").upper().split("\\")

    @property
    def is_localizer(self) -> bool:
        """Whether its ImageType says so."""
        return "LOCALIZER" in self.image_types


def frames_of(dataset: Dataset, part: DicomFile) -> list[Frame]:
    """Read what a file says of each of its images.

    Args:
        dataset: With the attributes of `PLACE_TAGS`.
        part: What the file is called.

    Raises:
        VolumeError: If it does not state where an image lies, or states something impossible.
    """
    if dataset.get("Rows") is None:
        raise VolumeError("holds no pixels", path=part.place, reason="no-pixels")
    count = count_frames(dataset, part)
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if text(dataset, "SOPClassUID") == DOSE:
        return _planes_of_dose(dataset, part, count)
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


def _planes_of_dose(dataset: Dataset, part: DicomFile, count: int) -> list[Frame]:
    """Read the planes of a dose, which lie at offsets from the first one, or at positions along the patient."""
    first = _frame(part, 0, dataset, lambda _: dataset)._replace(slope=_scale_of_dose(dataset, part))
    if count == 1:
        return [first]
    offsets = np.array(numbers(dataset, "GridFrameOffsetVector", part, count))
    across = np.cross(first.orientation[:3], first.orientation[3:]) if offsets[0] == 0 else (0.0, 0.0, 1.0)
    places = first.position + np.outer(offsets - offsets[0], across)
    return [first._replace(place=index, position=tuple(place)) for index, place in enumerate(places.tolist())]


def _scale_of_dose(dataset: Dataset, part: DicomFile) -> float:
    scale = number(dataset, "DoseGridScaling", part)
    if not scale:
        raise VolumeError("has a DoseGridScaling of 0, or none", path=part.place, reason="header")
    return scale


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
    is_map = text(dataset, "SOPClassUID") == PARAMETRIC_MAP
    if is_map:
        slope, intercept = _scale_of_map(group("RealWorldValueMappingSequence"), part)
    else:
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
        is_map and dataset.get("BitsStored") is None,  # which whole numbers must state
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


def _scale_of_map(mapping: Dataset | None, part: DicomFile) -> tuple[float, float]:
    """Return slope and intercept from the pixels of a parametric map to the quantity that it shows."""
    if mapping is None:
        return 1.0, 0.0
    if mapping.get("RealWorldValueLUTData") is not None:
        raise VolumeError("maps its values by a table", path=part.place, reason="lut", found="RealWorldValueLUTData")
    slope, intercept = (number(mapping, f"RealWorldValue{name}", part) for name in ("Slope", "Intercept"))
    if slope == 0:
        raise VolumeError("has a RealWorldValueSlope of 0", path=part.place, reason="header")
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
