"""DICOM series: which files of a place make one, known from their headers; names of files mean nothing.

One pass over the headers separates series and finds the grid of each, or why
it has none; pixels are not touched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import (
    DIRECTORY,
    HEAD,
    DicomFile,
    count_frames,
    head_of,
    list_parts,
    looks_like_dicom,
    looks_like_zip,
    parts_beside,
    parts_in,
    read_dataset,
    taming,
    text,
    visit,
)
from chiasm.volumes.dicom_frames import PLACE_TAGS, Frame, Stack, arrange, frames_of
from chiasm.volumes.dicom_kinds import NO_CONTRAST, UNKNOWN, Group, ImageKind, split_kinds

if TYPE_CHECKING:
    from pydicom import Dataset

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
#: Made from scans, or shown with them: never taken for one unless asked for.
NO_SCANS = (
    SEGMENTATION,
    LABEL_MAP,
    "1.2.840.10008.5.1.4.1.1.30",  # parametric map
    "1.2.840.10008.5.1.4.1.1.481.2",  # dose
)
AXIAL = 0.99  # cosine from which a slice counts as lying in a plane of the body

TAGS = (
    "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "PatientID",
    "SeriesDescription", "ProtocolName", "SeriesNumber", "ContrastBolusAgent", "BurnedInAnnotation",
    "SyntheticData", "ConcatenationUID", "StructureSetROISequence", "ReferencedFrameOfReferenceSequence", *PLACE_TAGS,
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


class Scan(NamedTuple):
    """What a place holds: its series in the order of their numbers, and the DICOM files that are damaged."""

    series: tuple[Series, ...]
    broken: tuple[VolumeError, ...]


class _Header(NamedTuple):
    """One file: the series that it would be alone, and its images or why there are none."""

    series: Series
    frames: tuple[Frame, ...]
    fault: VolumeError | None


def scan_series(path: Path | str) -> Scan:
    """Find the series of a folder, with the folders below it, of a zip archive, or around a file.

    A file stands for its whole series in its folder, or for the images of its
    kind there; a multi-frame file, for itself.  A path may go on into an
    archive, and from a file with images of several kinds to one of these, as
    `enhanced.dcm/phase`.  What is no DICOM is passed over.

    Raises:
        VolumeError: If the place cannot be listed, or the file is no DICOM or is damaged.
    """
    path = Path(path)
    asked, words = _asked(path)
    if asked is None:
        return _scan(list_parts(path), path)
    scan = _scan_around(asked, path)
    series = _named_inside(scan.series, words)
    if not series and not scan.broken:
        listed = "; ".join(one.described() for one in _numbered(scan.series))
        raise VolumeError(f"holds no images of the kind {words!r}", path=asked.place, reason="no-series", found=listed)
    return scan._replace(series=_numbered(series))


def _named_inside(series: Iterable[Series], words: str) -> list[Series]:
    """Return the series whose images are of a kind; structure sets take the words for names of structures."""
    every = (replace(one, apart=words) if one.is_structure_set else one for one in series)
    return [one for one in every if words in ("", one.apart)]


def _scan_around(part: DicomFile, path: Path) -> Scan:
    """Find the series of one file: of a multi-frame file itself, else with the files beside it."""
    header = _only_header(part, path)
    if header.series.images > 1 and not header.series.concatenated:
        return Scan(tuple(_split([header], path)), ())
    scan = _scan(parts_beside(part), path, header.series.uid)
    return scan._replace(series=tuple(one for one in scan.series if part in one.parts) or scan.series)


def place_inside(path: Path) -> str:
    """Return what a path names inside a file: a member of an archive, images of one kind; "" for what lies on disk.

    >>> place_inside(Path(__file__, "phase")), place_inside(Path(__file__))
    ('phase', '')
    """
    file = _file_above(path)
    return "" if file is None else path.relative_to(file).as_posix()


def _file_above(path: Path) -> Path | None:
    """Return the file into which a path goes on, if it does."""
    return next((parent for parent in path.parents if parent.is_file()), None)


def scan_folder_alone(path: Path) -> Scan:
    """Find the series of the files in a folder itself, without those below it.

    Raises:
        VolumeError: If the folder cannot be listed.
    """
    return _scan(parts_in(path), path)


def find_series(path: Path | str) -> tuple[Series, ...]:
    """List the series of a folder, a zip archive or around a file, in the order of their numbers.

    Objects without images, such as reports, are among them with `images` 0.

    Raises:
        VolumeError: If there is none, or the place cannot be read.
    """
    scan = scan_series(path)
    if scan.series:
        return scan.series
    if scan.broken:
        raise scan.broken[0]
    raise VolumeError("holds no DICOM file", path=path, reason="no-dicom")


def is_dicom(path: Path) -> bool:
    """Return whether `find_series` is the one to read a place: a folder, a DICOM file, an archive, or a path into one.

    Raises:
        VolumeError: If a file cannot be read.
    """
    if path.is_dir():
        return True
    if not path.exists():
        return _file_above(path) is not None
    head = head_of(path)
    return looks_like_zip(head) or looks_like_dicom(head)


def _asked(path: Path) -> tuple[DicomFile | None, str]:
    """Return the one file that a path names, or None for a folder or a whole archive, and what it names inside."""
    if path.is_dir():
        return None, ""
    if path.exists():
        return (None if looks_like_zip(head_of(path)) else DicomFile(path)), ""
    return _asked_inside(path)


def _asked_inside(path: Path) -> tuple[DicomFile, str]:
    """Return the one file that a path into an archive or a file names, and what it names inside that."""
    holder = _file_above(path)
    inside = None if holder is None else _inside(holder, path.relative_to(holder).parts)
    if inside is None:
        raise VolumeError("does not exist", path=path, reason="not-found")
    return inside


def _inside(holder: Path, names: Sequence[str]) -> tuple[DicomFile, str] | None:
    """Return which member of an archive a path goes on to, or the DICOM file itself, and what it names in that."""
    parts = list_parts(holder)
    if parts == [DicomFile(holder)] and is_dicom(holder):
        return parts[0], "/".join(names)
    for count in range(len(names), 0, -1):
        if (part := DicomFile(holder, "/".join(names[:count]))) in parts:
            return part, "/".join(names[count:])
    return None


class _Search:
    """What is found on the way through the files of a place.

    Attributes:
        only: The one SeriesInstanceUID that counts; None for all.
        headers: Of files of DICOM, by SeriesInstanceUID.
        broken: Why files of DICOM cannot be read.
        hollow: Files that end before they say anything, or are filled with zeros.
    """

    def __init__(self, only: str | None) -> None:
        self.only = only
        self.headers: dict[str, list[_Header]] = {}
        self.broken: list[VolumeError] = []
        self.hollow: list[DicomFile] = []

    def look_at(self, parts: Iterable[DicomFile]) -> None:
        """Look at files, one after another."""
        for _ in visit(parts, self._look):
            pass

    def _look(self, part: DicomFile, file: BinaryIO) -> None:
        """Look at a file, open at its start."""
        with taming(part):
            head = file.read(HEAD)
            file.seek(0)
        is_named = part.place.suffix.lower() in (".dcm", ".ima")
        if b"DICM".startswith(head.lstrip(b"\0")):
            self.hollow.append(part)
        elif is_named or looks_like_dicom(head):
            self._read(part, file, is_named or head[128:132] == b"DICM")

    def _read(self, part: DicomFile, file: BinaryIO, is_sure: bool) -> None:
        """Read a header; `is_sure` says that what cannot be read is damaged DICOM, and not something else."""
        try:
            header = _header(part, file)
        except VolumeError as error:
            self.broken += [error] * is_sure
            return
        if header is not None and self.only in (None, header.series.uid):
            self.headers.setdefault(header.series.uid, []).append(header)

    def missing(self, parts: Sequence[DicomFile], what: str, reason: str) -> list[VolumeError]:
        """Say what is wrong with files that seem to be of a series that was found."""
        kin = {_kin(header.series.parts[0]) for headers in self.headers.values() for header in headers}
        return [
            VolumeError(f"{what}, among files of DICOM", path=part.place, reason=reason, hint="Copy it again.")
            for part in parts
            if _kin(part) in kin
        ]


def _scan(parts: Sequence[DicomFile], path: Path, only: str | None = None) -> Scan:
    """Find the series of some files, of one SeriesInstanceUID or all."""
    search = _Search(only)
    lost = [part for part in parts if not part.path.exists()]
    search.look_at(part for part in parts if part not in lost)
    broken = [
        *search.broken,
        *search.missing(search.hollow, "is empty", "truncated"),
        *search.missing(lost, "is a link that leads nowhere", "not-found"),
    ]
    series = chain.from_iterable(_split(headers, path) for headers in search.headers.values())
    return Scan(_numbered(sorted(series, key=_order)), tuple(broken))


def _order(series: Series) -> tuple[bool, int, str]:
    """Return the place of a series in a listing: by its number, those without one last."""
    return series.number is None, series.number or 0, series.uid


def _numbered(series: Iterable[Series]) -> tuple[Series, ...]:
    return tuple(one.numbered(place) for place, one in enumerate(series, start=1))


def _kin(part: DicomFile) -> tuple[Path, str]:
    """Return what files of one series share, as a rule: folder and suffix."""
    suffix = part.place.suffix.lower()
    return part.place.parent, "" if suffix[1:].isdigit() else suffix  # UIDs as names end in anything


def _split(headers: Sequence[_Header], path: Path) -> list[Series]:
    """Join the files of one SeriesInstanceUID, images of one kind each."""
    frames = list(chain.from_iterable(header.frames for header in headers))
    return [
        _stacked(headers, [frames[place] for place in group.places], group, path) for group in _groups(headers, frames)
    ]


def _groups(headers: Sequence[_Header], frames: Sequence[Frame]) -> list[Group]:
    """Group the images of a series by kind, all in one group where they make no volume anyhow."""
    if _fault_of(headers) is not None or not frames or any(frame.is_localizer for frame in frames):
        return [Group("", UNKNOWN, tuple(range(len(frames))))]
    return split_kinds([frame.kind for frame in frames])


def _fault_of(headers: Sequence[_Header]) -> VolumeError | None:
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


def _stacked(headers: Sequence[_Header], frames: Sequence[Frame], group: Group, path: Path) -> Series:
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


def _holding(frames: Sequence[Frame], headers: Sequence[_Header]) -> list[_Header]:
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
    headers: Sequence[_Header], frames: Sequence[Frame], joined: Series, path: Path
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


def _header(part: DicomFile, file: BinaryIO) -> _Header | None:
    """Read the header of one file; None for a DICOMDIR."""
    dataset = read_dataset(part, file, tags=TAGS)
    with taming(part):
        if text(dataset.file_meta, "MediaStorageSOPClassUID") == DIRECTORY:
            return None
        series = _series_alone(dataset, part)
        if not series.images:
            return _Header(series, (), None)
        try:
            return _Header(series, tuple(frames_of(dataset, part)), None)
        except VolumeError as error:
            return _Header(series, (), error)


def _only_header(part: DicomFile, path: Path) -> _Header:
    """Read the header of a file that must not be a DICOMDIR."""
    (header,) = visit([part], _header)
    if header is None:
        raise VolumeError(
            "is the table of contents of a DICOM folder", path=path, reason="format", hint="Name the folder."
        )
    return header


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
