"""What DICOM objects of a synthetic image share: the planes of the source, patient and study, and the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm import __version__
from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import FAULTS, read_dataset, taming, visit
from chiasm.volumes.dicom_frames import Frame
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.dicom_silence import silenced
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry, Volume, reordered_like, same_grid

NOTICE = "Synthetic image for research; not for diagnostic use."
NEAR_MM = 0.01  # by which positions may be rounded
LONGEST_DESCRIPTION = 64  # characters of a Series Description

#: What a derived series says of patient and study: word for word as its source.
PATIENT_AND_STUDY = (
    "SpecificCharacterSet",
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientNames", "OtherPatientIDsSequence",
    "EthnicGroup", "PatientComments", "PatientSpeciesDescription", "PatientSpeciesCodeSequence",
    "PatientBreedDescription", "PatientBreedCodeSequence", "BreedRegistrationSequence", "ResponsiblePerson",
    "ResponsiblePersonRole", "ResponsibleOrganization", "PatientSexNeutered", "QualityControlSubject",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
    "StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "PhysiciansOfRecord", "ReferencedStudySequence",
    "ProcedureCodeSequence", "AdmittingDiagnosesDescription", "PatientAge", "PatientSize", "PatientWeight",
    "MedicalAlerts", "Allergies", "SmokingStatus", "AdditionalPatientHistory", "PregnancyStatus",
    "LongitudinalTemporalInformationModified",
)  # fmt: skip
DEIDENTIFIED = ("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence")
NEVER_ABSENT = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber", "PositionReferenceIndicator", "PatientPosition", "BodyPartExamined",
)  # fmt: skip
SERIES = ("FrameOfReferenceUID", "PositionReferenceIndicator", "PatientPosition", "BodyPartExamined", "Laterality")
LOSSY = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")


class ModelMark(NamedTuple):
    """Which model made an image.

    Attributes:
        name: What people call it, such as "A7, t1 to t2".
        sha256: Of its weights.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class Derivation:
    """How a synthetic image came about, and what its series says of that.

    Attributes:
        modality: Of the target, whatever the source's is.
        description: Follows "SYNTHETIC" in the Series Description.
        model: What made it.
        scale: By which MR values are multiplied before they are rounded; `grey_scale` chooses it.
        window: Lowest and highest value that a viewer shows at first, in the image's units; None: soft
            tissue, or 0.5 to 99.5 % of an MR image.
        remarks: What a reader of the image must know, one sentence each.
    """

    modality: Literal["MR", "CT"]
    description: str
    model: ModelMark
    scale: float = 1.0
    window: tuple[float, float] | None = None
    remarks: Sequence[str] = ()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from warning: its sentences quote values, and those may be a patient's."""
    from pydicom.config import disable_value_validation

    with silenced(), disable_value_validation():
        yield


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice to write: where it lies, and what it is made from.

    Attributes:
        header: Of the file that names patient and study.
        place: Elements of `PLACE`, as the file has them.
        frames: The images that lie there.
    """

    header: Any
    place: Any
    frames: tuple[Frame, ...]

    @property
    def position(self) -> NDArray[np.float64]:
        """Where its first voxel lies, in mm of the patient (LPS)."""
        return np.array(self.place.ImagePositionPatient, np.float64)


def planes_of(series: Series, own: Geometry) -> tuple[list[Plane], Geometry]:
    """List the slices of a series in the order of K, and their grid.

    A series that was resampled has no slices on its new grid, so that grid is cut into slices.

    Args:
        series: The source.
        own: Grid of the image that will be written.

    Returns:
        Planes, one for each slice; and the source's grid, or `own` where the series was resampled.

    Raises:
        VolumeError: If the images make no volume, or a header cannot be read.
    """
    from pydicom.dataset import Dataset

    frames = frames_of_series(series)
    assert series.stack is not None
    headers = dict(zip(series.parts, visit(series.parts, read_dataset)))
    if series.stack.tilted is not None:
        return list(_cut(own, headers[frames[0].part], frames)), own
    planes = []
    for frame in frames:
        header, place = headers[frame.part], Dataset()
        with taming(frame.part):
            for item in _groups_of(header, frame.place):
                copy_elements(place, item, PLACE)
        planes.append(Plane(header, place, (frame,)))
    return planes, series.stack.geometry


def frames_of_series(series: Series) -> tuple[Frame, ...]:
    """Return the images of a series in the order of its stack.

    Raises:
        VolumeError: If they make no volume.
    """
    if series.stack is None:
        raise series.fault or VolumeError("holds no images that make a volume", path=series.parts[0].place)
    return series.stack.frames


def _groups_of(header: Any, index: int) -> list[Any]:
    """Return what says where an image of a file lies: the header itself, or functional groups."""
    own = header.get("PerFrameFunctionalGroupsSequence")
    if not own:
        return [header]
    shared = header.get("SharedFunctionalGroupsSequence") or [{}]
    names = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    return [item for name in names for item in (own[index].get(name) or shared[0].get(name) or ())]


def _cut(grid: Geometry, header: Any, frames: Sequence[Frame]) -> Iterator[Plane]:
    """Cut a grid into slices, each made from the images within a step of it."""
    from pydicom.dataset import Dataset
    from pydicom.valuerep import format_number_as_ds

    def decimal(values: NDArray[np.float64]) -> list[str]:
        return [format_number_as_ds(float(value)) for value in values]

    affine, spacing = LPS_TO_RAS @ grid.affine, np.array(grid.spacing_mm)
    normal = affine[:3, 2] / spacing[2]
    for k in range(grid.shape[2]):
        place, position = Dataset(), affine[:3, 3] + k * affine[:3, 2]
        place.ImagePositionPatient = decimal(position)
        place.ImageOrientationPatient = decimal((affine[:3, :2] / spacing[:2]).T.ravel())
        place.PixelSpacing = decimal(spacing[[1, 0]])  # between rows, between columns
        place.SliceThickness = place.SpacingBetweenSlices = decimal(spacing[2:])[0]
        heights = [abs(float(normal @ (np.array(frame.position) - position))) for frame in frames]
        near = [frame for frame, height in zip(frames, heights, strict=True) if height < spacing[2] + NEAR_MM]
        yield Plane(header, place, tuple(near) or (frames[int(np.argmin(heights))],))


def on_planes(image: Volume, grid: Geometry, series: Series) -> NDArray[np.float32]:
    """Return the image slice by slice, shape (K, rows, columns).

    Raises:
        VolumeError: If the image lies on another grid, or holds values that are not finite.
    """
    fitting = reordered_like(image, grid)
    if not same_grid(grid, fitting.geometry):
        raise VolumeError(
            "the image does not lie on the slices of its source",
            path=series.parts[0].path.parent,
            reason="grid",
            found="x".join(map(str, image.geometry.shape)),
            expected="x".join(map(str, grid.shape)),
        )
    if not np.isfinite(fitting.array).all():
        raise VolumeError("the image holds NaN or infinite values", reason="not-finite")
    return np.ascontiguousarray(fitting.array.transpose(2, 1, 0), np.float32)


def new_series(first: Plane, derivation: Derivation, shown: tuple[float, float], burned_in: bool) -> Any:
    """Return a data set with the elements that all files of a new series have in common.

    Args:
        first: Of the source.
        derivation: How the image came about.
        shown: Lowest and highest stored value that a viewer shows at first.
        burned_in: Whether text may be drawn into the image.
    """
    from pydicom.dataset import Dataset

    new, now = Dataset(), datetime.now()
    _keep_of_source(new, first.header)
    _name_series(new, derivation, now)
    new.SeriesNumber = next_series_number(first.header, 1000)
    _mark_synthetic(new, derivation, now)
    new.BurnedInAnnotation = "YES" if burned_in else "NO"
    _describe_values(new, derivation, shown)
    return new


def _keep_of_source(new: Any, source: Any) -> None:
    """Say patient, study and place as the source does, and whether it was compressed with loss."""
    from pydicom.uid import generate_uid

    copy_elements(new, source, (*PATIENT_AND_STUDY, *SERIES))
    copy_deidentification(new, source)
    for name in NEVER_ABSENT:
        if name not in new:
            setattr(new, name, None)
    if not new.BodyPartExamined and "Laterality" not in new:
        new.Laterality = None  # it may be one of a pair
    if not new.get("FrameOfReferenceUID"):
        new.FrameOfReferenceUID = generate_uid(prefix=None)
    _say_loss(new, source)


def _say_loss(new: Any, source: Any) -> None:
    """Say whether the source was compressed with loss, and how."""
    new.LossyImageCompression = "00"
    if source.get("LossyImageCompression") == "01":  # once lossy, always lossy
        new.LossyImageCompression = "01"
        copy_elements(new, source, LOSSY)


def _name_series(new: Any, derivation: Derivation, now: datetime) -> None:
    from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid

    new.SOPClassUID = MRImageStorage if derivation.modality == "MR" else CTImageStorage
    new.Modality = derivation.modality
    new.SeriesInstanceUID = generate_uid(prefix=None)
    words = derivation.description.encode("ascii", "replace").decode()  # whatever the source's character set is
    new.SeriesDescription = f"SYNTHETIC {words}".strip()[:LONGEST_DESCRIPTION]
    for what in ("InstanceCreation", "Series", "Content"):
        setattr(new, f"{what}Date", now.strftime("%Y%m%d"))
        setattr(new, f"{what}Time", now.strftime("%H%M%S"))


def _mark_synthetic(new: Any, derivation: Derivation, now: datetime) -> None:
    """Say that the image was made, by what, and what a reader must know."""
    new.Manufacturer = new.ManufacturerModelName = "chiasm"
    new.SoftwareVersions = __version__
    new.SyntheticData = "YES"
    new.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if derivation.modality == "CT" else "OTHER"]
    scaled = f" Stored values are the image's times {derivation.scale:g}." if derivation.scale != 1 else ""
    new.DerivationDescription = description_of(derivation.model) + scaled
    remarks = (f"{remark[:1].upper()}{remark[1:]}." for remark in derivation.remarks)
    new.ImageComments = " ".join([NOTICE, *remarks])
    new.ContributingEquipmentSequence = [equipment_of(derivation.model, now)]


def _describe_values(new: Any, derivation: Derivation, shown: tuple[float, float]) -> None:
    """Say what the stored numbers are, and which of them a viewer shows at first."""
    from pydicom.valuerep import format_number_as_ds

    new.SamplesPerPixel, new.PhotometricInterpretation = 1, "MONOCHROME2"
    new.BitsAllocated = new.BitsStored = 16
    new.HighBit, new.PixelRepresentation = 15, 1
    low, high = shown
    new.WindowCenter, new.WindowWidth = (format_number_as_ds(value) for value in ((low + high) / 2, high - low))
    if derivation.modality == "CT":
        new.RescaleIntercept, new.RescaleSlope, new.RescaleType = "0", "1", "HU"
        new.KVP = new.AcquisitionNumber = None
    else:
        new.ScanningSequence, new.SequenceVariant = "RM", "NONE"  # no scanner's sequence made it
        new.ScanOptions = new.MRAcquisitionType = new.RepetitionTime = new.EchoTime = new.EchoTrainLength = None
        new.RealWorldValueMappingSequence = [_unscaled(derivation.scale)]


def source_of(frame: Frame, sop_class: str, one_of_many: bool) -> Any:
    """Return an item that refers to one image that a slice was made from."""
    from pydicom.dataset import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID = sop_class
    reference.ReferencedSOPInstanceUID = frame.instance_uid
    if one_of_many:
        reference.ReferencedFrameNumber = frame.place + 1
    purpose = _code("121322", "DCM", "Source image for image processing operation")
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference


def reference_to(plane: Plane) -> Any:
    """Return those elements of a source slice that a parametric map needs, and none that may be faulty."""
    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage

    bare = Dataset()
    for name in NEVER_ABSENT:
        setattr(bare, name, None)
    header = plane.header
    copy_elements(bare, header, ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"))
    bare.SOPClassUID = header.get("SOPClassUID", MRImageStorage)
    bare.Modality, bare.Rows, bare.Columns = "MR", int(header.Rows), int(header.Columns)
    bare.update(plane.place)
    return bare


def _unscaled(scale: float) -> Any:
    """Say how a stored value becomes the image's own."""
    from pydicom.dataset import Dataset

    mapping, limits = Dataset(), np.iinfo(np.int16)
    mapping.LUTExplanation, mapping.LUTLabel = "Intensity in the unit of the training images", "INTENSITY"
    mapping.add_new("RealWorldValueFirstValueMapped", "SS", int(limits.min))
    mapping.add_new("RealWorldValueLastValueMapped", "SS", int(limits.max))
    mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = 0.0, 1 / scale
    mapping.MeasurementUnitsCodeSequence = [_code("1", "UCUM", "no units")]
    return mapping


def equipment_of(model: ModelMark, now: datetime) -> Any:
    """Return the item that names this program as the equipment that contributed."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.Manufacturer = item.ManufacturerModelName = "chiasm"
    item.SoftwareVersions = __version__
    item.ContributionDateTime = now.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = description_of(model)
    item.PurposeOfReferenceCodeSequence = [_code("109102", "DCM", "Processing Equipment")]
    return item


def description_of(model: ModelMark) -> str:
    """Say which model of which version synthesised an object."""
    return f"Synthesised by chiasm {__version__}, model {model.name}, sha256 {model.sha256}. Not for diagnostic use."


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def copy_elements(into: Any, source: Any, names: Sequence[str]) -> None:
    """Copy elements as they are, digits of decimal strings included; those that `source` lacks stay absent."""
    for name in names:
        if name in source:
            with suppress(*FAULTS):  # a value that cannot be read is not worth the series
                into[name] = source[name]


def copy_deidentification(into: Any, source: Any) -> None:
    """Copy how the source was de-identified, if it was."""
    if source.get("PatientIdentityRemoved") == "YES":
        copy_elements(into, source, DEIDENTIFIED)


def next_series_number(header: Any, offset: int) -> int:
    """Return the source's series number plus an offset; the offset where it has none."""
    number = header.get("SeriesNumber")
    return offset + (int(number) if number and 0 < int(number) < 10**6 else 0)


PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")
