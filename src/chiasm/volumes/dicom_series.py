"""A DICOM series: what the headers of its files say, and the grid of its images or why they have none.

Pixels are not touched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import (
    DIRECTORY,
    DicomFile,
    count_frames,
    read_dataset,
    taming,
    text,
)
from chiasm.volumes.dicom_frames import DOSE, PARAMETRIC_MAP, PLACE_TAGS, Frame, frames_of
from chiasm.volumes.dicom_kinds import NO_CONTRAST, UNKNOWN, Group, ImageKind, split_kinds
from chiasm.volumes.dicom_pixels import FORMAT_TAGS, stored_pixels
from chiasm.volumes.dicom_stacks import Stack, arrange

if TYPE_CHECKING:
    from pydicom import Dataset

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
#: Made from scans, or shown with them: never taken for one unless asked for.
NO_SCANS = (
    SEGMENTATION,
    LABEL_MAP,
    PARAMETRIC_MAP,
    DOSE,
)
AXIAL = 0.99  # cosine from which a slice counts as lying in a plane of the body

TAGS = (
    "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "PatientID",
    "SeriesDescription", "ProtocolName", "SeriesNumber", "ContrastBolusAgent", "BurnedInAnnotation",
    "SyntheticData", "ConcatenationUID", "StructureSetROISequence", "ReferencedFrameOfReferenceSequence", *PLACE_TAGS,
    *FORMAT_TAGS,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Series:
    """What the headers say of one SeriesInstanceUID in one place, or of its images of one kind.

    Description, protocol and UIDs may identify the patient: they are for
    choosing, and belong in no error, log or manifest.

    Attributes:
        choice: Its number in the listing of the place, from 1.
        uid: SeriesInstanceUID.
        study_uid: StudyInstanceUID.
        frame_uid: FrameOfReferenceUID, "" where there is none.
        patient: A hash of PatientID, "" where there is none.
        sop_class: SOPClassUID of its first file.
        modality: The DICOM modality, such as "MR", "CT" or "SEG".
        description: SeriesDescription, perhaps "".
        protocol: ProtocolName, perhaps "".
        number: SeriesNumber, or None.
        parts: Its files in spatial order; by name, which means nothing, where they make no stack.
        images: How many images they hold; 0 where it holds none, as a report.
        contrast: Whether a contrast agent is named.
        burned_in: Whether a file says that identifying text is drawn into its image.
        synthetic: Whether a file says that its image was not acquired but made.
        concatenated: Whether a multi-frame image was cut into several files.
        kind: What kind of MR images it holds.
        apart: What distinguishes them in their SeriesInstanceUID, such as "phase"; "" where there are no others.
        localizer: Whether all its images are localizers.
        structures: Names of the structures of a structure set; they may identify the patient too.
        stack: Its images in the order of K and their grid, or None.
        fault: Why there is no stack, or why it cannot be used as it is.
    """

    choice: int
    uid: str
    study_uid: str
    frame_uid: str
    patient: str
    sop_class: str
    modality: str
    description: str
    protocol: str
    number: int | None
    parts: tuple[DicomFile, ...]
    images: int
    contrast: bool
    burned_in: bool
    synthetic: bool
    concatenated: bool
    kind: ImageKind = UNKNOWN
    apart: str = ""
    localizer: bool = False
    structures: tuple[str, ...] = ()
    stack: Stack | None = None
    fault: VolumeError | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files on disk, in the order of `parts`; none where it lies in an archive."""
        return tuple(part.path for part in self.parts if part.member is None)

    @property
    def is_scan(self) -> bool:
        """Whether it may be a volume to read: images that are not all localizers, nor label map, dose or parameters."""
        return self.images > 0 and self.sop_class not in NO_SCANS and not self.localizer

    @property
    def is_label_map(self) -> bool:
        """Whether it says which voxels belong to what, and shows no image."""
        return self.sop_class in (SEGMENTATION, LABEL_MAP)

    @property
    def is_structure_set(self) -> bool:
        """Whether it says by contours what lies where in a scan, and holds no images."""
        return self.sop_class == STRUCTURES

    @property
    def is_drawn(self) -> bool:
        """Whether it says what lies where in a scan, voxel by voxel or by contours."""
        return self.is_label_map or self.is_structure_set

    @property
    def is_readable(self) -> bool:
        """Whether it may be read as a volume: images, or a structure set, which is drawn on those of its scan."""
        return self.images > 0 or self.is_structure_set

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Voxels along I, J and K, or None where it makes no stack."""
        return None if self.stack is None else self.stack.geometry.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Voxel spacing along I, J and K, or None where it makes no stack."""
        return None if self.stack is None else self.stack.geometry.spacing_mm

    @property
    def plane(self) -> str:
        """How its slices lie: axial, coronal, sagittal, oblique, or unknown."""
        if self.stack is None:
            return "unknown"
        across = np.abs(np.cross(*self.stack.affine[:3, :2].T))
        axis = int(across.argmax())
        return ("sagittal", "coronal", "axial")[axis] if across[axis] > AXIAL * np.linalg.norm(across) else "oblique"

    @property
    def shows_no_contrast(self) -> bool:
        """Whether it is a whole series of phase or the like, which is taken for no modality unless it is asked for."""
        return not self.apart and self.kind.component in NO_CONTRAST

    @property
    def kind_words(self) -> str:
        """What distinguishes its images from others of the series, or that all are such as phase; "" for plain ones."""
        return self.kind.component if self.shows_no_contrast else self.apart

    def numbered(self, choice: int) -> Series:
        """Return it with another number in a listing."""
        return replace(self, choice=choice)

    def described(self) -> str:
        """Describe it in a line that names nobody: choice, modality, images, grid."""
        count = f"{self.images} images" if self.images else f"{len(self.structures)} structures"
        words = [self.modality or "no modality", count, *self._grid_in_words(), *filter(None, [self.kind_words])]
        words += ["with contrast agent"] * self.contrast + ["synthetic"] * self.synthetic
        words += ["text burned in"] * self.burned_in + ([self.fault.reason] if self.fault is not None else [])
        return f"{self.choice}: {', '.join(words)}"

    def _grid_in_words(self) -> list[str]:
        """Describe shape, spacing and plane, if it makes a stack."""
        if self.stack is None:
            return []
        grid = self.stack.geometry
        spacing = "x".join(f"{mm:.3g}" for mm in grid.spacing_mm)
        return ["x".join(map(str, grid.shape)), f"{spacing} mm", self.plane]


class DicomHeader(NamedTuple):
    """One file: the series that it would be alone, and its images or why there are none."""

    series: Series
    frames: tuple[Frame, ...]
    fault: VolumeError | None


def join_headers(headers: Sequence[DicomHeader], path: Path) -> list[Series]:
    """Join the files of one SeriesInstanceUID to series, of images of one kind each.

    Args:
        headers: At least one.
        path: The place, for messages.
    """
    frames = list(chain.from_iterable(header.frames for header in headers))
    return [
        _stacked(headers, [frames[place] for place in group.places], group, path) for group in _groups(headers, frames)
    ]


def _groups(headers: Sequence[DicomHeader], frames: Sequence[Frame]) -> list[Group]:
    """Group the images of a series by kind, all in one group where they make no volume anyhow."""
    if _fault_of(headers) is not None or not frames or any(frame.is_localizer for frame in frames):
        return [Group("", UNKNOWN, tuple(range(len(frames))))]
    return split_kinds([frame.kind for frame in frames])


def _fault_of(headers: Sequence[DicomHeader]) -> VolumeError | None:
    """Say why the files of a series make no volume, as far as each says it alone."""
    cut = _cut_header([header.series for header in headers])
    if cut is None:
        return next(filter(None, (header.fault for header in headers)), None)
    return VolumeError(
        "is truncated in its header", path=cut.place, reason="truncated", expected="Rows", hint="Copy it again."
    )


def _cut_header(every: Sequence[Series]) -> DicomFile | None:
    """Return a file that ends before it says how large its image is, as others of its kind do."""
    kinds = {one.sop_class for one in every if one.images}
    return next((one.parts[0] for one in every if not one.images and one.sop_class in kinds), None)


def _stacked(headers: Sequence[DicomHeader], frames: Sequence[Frame], group: Group, path: Path) -> Series:
    """Join files of one series and find their grid; of a group that has others beside it, those with its images."""
    is_part = bool(group.words)
    joined = _joined([header.series for header in (_holding(frames, headers) if is_part else headers)])
    stack, fault = _arranged(headers, frames, joined, path)
    return replace(
        joined,
        parts=joined.parts if stack is None else stack.parts,
        images=len(frames) if is_part else joined.images,
        kind=group.kind,
        apart=group.words,
        localizer=bool(frames) and all(frame.is_localizer for frame in frames),
        stack=stack,
        fault=fault,
    )


def _holding(frames: Sequence[Frame], headers: Sequence[DicomHeader]) -> list[DicomHeader]:
    """Return the files that hold some of the images."""
    holders = {frame.part for frame in frames}
    return [header for header in headers if header.series.parts[0] in holders]


def _joined(every: Sequence[Series]) -> Series:
    """Join what the files of one series say."""
    return replace(
        every[0],
        parts=tuple(chain.from_iterable(one.parts for one in every)),
        images=sum(one.images for one in every),
        burned_in=any(one.burned_in for one in every),
        synthetic=any(one.synthetic for one in every),
        contrast=any(one.contrast for one in every),
    )


def _arranged(
    headers: Sequence[DicomHeader], frames: Sequence[Frame], joined: Series, path: Path
) -> tuple[Stack | None, VolumeError | None]:
    """Return the stack that images of a series make, and why there is none or it cannot be used as it is."""
    fault = _fault_of(headers)
    if fault is not None or not frames or joined.is_label_map:
        return None, fault
    try:
        stack = arrange(frames, path)
    except VolumeError as error:
        return None, error
    return stack, stack.tilted


def read_header(part: DicomFile, file: BinaryIO) -> DicomHeader | None:
    """Read the header of one file; None for a DICOMDIR.

    Args:
        part: What it is called.
        file: Open at its start, as from `visit`.

    Raises:
        VolumeError: If it is no DICOM, is damaged, or names no series.
    """
    dataset = read_dataset(part, file, tags=TAGS)
    with taming(part):
        if text(dataset.file_meta, "MediaStorageSOPClassUID") == DIRECTORY:
            return None
        series = _series_alone(dataset, part)
        if not series.images:
            return DicomHeader(series, (), None)
        pixels = stored_pixels(dataset, part, file)
        try:
            frames = tuple(frame._replace(pixels=pixels) for frame in frames_of(dataset, part))
            return DicomHeader(series, frames, None)
        except VolumeError as error:
            return DicomHeader(series, (), error)


def _series_alone(dataset: Dataset, part: DicomFile) -> Series:
    """Return the series that a file would be alone."""
    uid = text(dataset, "SeriesInstanceUID")
    if not uid:
        raise VolumeError("names no series", path=part.place, reason="header", expected="a SeriesInstanceUID")
    count = count_frames(dataset, part)
    return Series(
        choice=1,
        uid=uid,
        study_uid=text(dataset, "StudyInstanceUID"),
        frame_uid=text(dataset, "FrameOfReferenceUID") or _frame_referred_to(dataset),
        patient=_hashed(text(dataset, "PatientID")),
        sop_class=text(dataset, "SOPClassUID"),
        modality=text(dataset, "Modality"),
        description=text(dataset, "SeriesDescription"),
        protocol=text(dataset, "ProtocolName"),
        number=_series_number(dataset),
        parts=(part,),
        images=max(1, count) if "Rows" in dataset else 0,
        contrast=bool(text(dataset, "ContrastBolusAgent")),
        burned_in=text(dataset, "BurnedInAnnotation").upper() == "YES",
        synthetic=text(dataset, "SyntheticData").upper() == "YES",
        concatenated=bool(text(dataset, "ConcatenationUID")),
        structures=tuple(text(one, "ROIName") for one in dataset.get("StructureSetROISequence") or ()),
    )


def _frame_referred_to(dataset: Dataset) -> str:
    """Return the frame of reference of a structure set; "" where there is none, or several."""
    frames = {text(one, "FrameOfReferenceUID") for one in dataset.get("ReferencedFrameOfReferenceSequence") or ()}
    return frames.pop() if len(frames) == 1 else ""


def _hashed(patient: str) -> str:
    return hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""


def _series_number(dataset: Dataset) -> int | None:
    word = text(dataset, "SeriesNumber")
    return int(word) if re.fullmatch(r"-?\d{1,9}", word) else None
