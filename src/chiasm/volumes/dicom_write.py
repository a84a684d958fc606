"""Synthetic images as the DICOM series a hospital can take, and reliability as a parametric map.

A synthetic series is a classic one, one file a slice, derived from the source
series: it lies in the source's study and frame of reference, on its slices,
says in every file that it is synthetic, and carries patient and study as the
source has them.  Those belong in these files and nowhere else: nothing here
puts them into a file name, an error or a warning.

CT holds Hounsfield units.  Classic MR has no way to say "stored value times
slope": its whole numbers are what a reader shows.  So the image is multiplied
by a power of ten where its units are too coarse to be rounded, and the file
says so (`grey_scale`).

Reference: DICOM PS3.3 A.3, A.4, A.75, C.7.6.1 and C.12.1; PS3.16 CID 7005, CID 7202.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm import __version__
from chiasm.errors import VolumeError
from chiasm.storage import whole_file, whole_folder
from chiasm.volumes.dicom_files import FAULTS, read_dataset, taming, visit
from chiasm.volumes.dicom_frames import LPS_TO_RAS, Frame
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.geometry import Geometry, Volume, same_grid, turned_like

FEWEST_STEPS = 1000  # of grey over the range that matters: rounding then costs at most 0.05 % of it
CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
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
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")


class ModelMark(NamedTuple):
    """Which model made an image.

    Attributes:
        name: What people call it, such as "A7, t1 to t2".
        sha256: Of its weights.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class WrittenSeries:
    """What `write_series` left behind.

    Attributes:
        files: One for each slice, along the slices' normal.
        series_uid: Series Instance UID.
        saturated: Voxels whose value did not fit 16 bits and was cut to their ends.
    """

    files: tuple[Path, ...]
    series_uid: str
    saturated: int


def grey_scale(low: float, high: float) -> float:
    """Choose the power of ten by which an MR image is multiplied before it is rounded to whole numbers.

    1 wherever the range that matters already holds a thousand steps and fits
    16 bits, so most images keep their numbers.  It depends on the model alone:
    all its images are scaled alike, and can be compared.

    Args:
        low: Lowest intensity that matters, such as the plan's `target_range`.
        high: Highest, of which values may well be twice as high.

    Raises:
        ValueError: If the range is empty.

    >>> grey_scale(0, 1500), grey_scale(0, 200), grey_scale(0, 1), grey_scale(0, 100_000)
    (1.0, 10.0, 1000.0, 0.1)
    """
    if not low < high:
        raise ValueError(f"the range {low:g} to {high:g} is empty")
    enough = math.ceil(math.log10(FEWEST_STEPS / (high - low)) - 1e-9)
    most = math.floor(math.log10(np.iinfo(np.int16).max / (2 * max(abs(low), abs(high)))))
    return float(10.0 ** min(max(0, enough), most))


def write_series(
    folder: Path,
    image: Volume,
    sources: Sequence[Series],
    *,
    modality: Literal["MR", "CT"],
    description: str,
    model: ModelMark,
    scale: float = 1.0,
    window: tuple[float, float] | None = None,
    remarks: Sequence[str] = (),
) -> WrittenSeries:
    """Write a synthetic image as a derived series; the folder appears whole or not at all.

    Args:
        folder: Where `0001.dcm`, `0002.dcm`, ... will lie; a series there before is replaced.
        image: Shape (I, J, K); HU for CT.  Stored in any axis order, as long
            as it lies on the slices of the first source; where those were
            resampled because they are tilted, on its own grid.
        sources: The series that it was made from, classic or multi-frame.
            The first gives patient, study and slices; the others are named.
        modality: Of the target, whatever the source's is.
        description: Follows "SYNTHETIC" in the Series Description.
        model: What made it.
        scale: By which MR values are multiplied before they are rounded; `grey_scale` chooses it.
        window: Lowest and highest value that a viewer shows at first, in the
            image's units; by default soft tissue, or 0.5 to 99.5 % of an MR image.
        remarks: What a reader of the image must know, one sentence each.

    Raises:
        VolumeError: If the image does not lie on the source's slices, the
            source makes no stack, or a value is not finite.
        ValueError: If there is no source, or a CT image is to be scaled.
        ChiasmError: If the folder cannot be written.
    """
    if modality == "CT" and scale != 1:
        raise ValueError("CT holds Hounsfield units: its scale is 1")
    if not sources:
        raise ValueError("a derived series needs its source")
    with quiet():
        planes, grid = _planes_of(sources[0], image.geometry)
        every = [frame for series in sources for frame in _frames(series)]
        frames = _on_planes(image, grid, sources[0])  # (K, rows, columns)
        stored, saturated = _stored(frames, scale)
        if window is None:
            low, high = CT_WINDOW_HU if modality == "CT" else np.percentile(frames, (0.5, 99.5)).tolist()
        else:
            low, high = window
        shown = (low * scale, max(high * scale, low * scale + 1))
        burned_in = any(series.burned_in for series in sources)  # what was drawn in may show in what is made of it
        with taming(sources[0].parts[0]):
            new = _new_series(planes[0], modality, description, model, scale, shown, remarks, burned_in)
        sop_classes = {part: series.sop_class for series in sources for part in series.parts}
        counts = Counter(frame.part for frame in every)
        others = every[len(_frames(sources[0])) :]
        normal = (LPS_TO_RAS @ grid.affine)[:3, 2] / grid.spacing_mm[2]
        reach = grid.spacing_mm[2] / 2 + NEAR_MM
        names = [f"{number:04d}.dcm" for number in range(1, len(planes) + 1)]
        with whole_folder(folder) as fresh:
            for number, (name, plane, frame) in enumerate(zip(names, planes, stored, strict=True), start=1):
                beside = [one for one in others if abs(normal @ (one.position - plane.position)) < reach]
                with taming(plane.frames[0].part):
                    made = _slice(new, plane, frame, number)
                    made.SourceImageSequence = [
                        _source_of(one, sop_classes[one.part], counts[one.part] > 1) for one in (*plane.frames, *beside)
                    ]
                made.save_as(fresh / name, enforce_file_format=True)
    return WrittenSeries(tuple(folder / name for name in names), str(new.SeriesInstanceUID), saturated)


def write_reliability(
    path: Path, reliability: Volume, series: Series, *, unit: Literal["HU", "a.u."], model: ModelMark
) -> None:
    """Write a reliability map as a parametric map of float32, whole or not at all.

    Args:
        path: Ends in .dcm.
        reliability: Expected absolute error, on the slices of the series, shape (I, J, K).
        series: What it is of: the synthetic series that `write_series` wrote.
        unit: Of the map.
        model: What made it.

    Raises:
        VolumeError: If the map does not lie on the series' slices or a value is not finite.
        ChiasmError: If the file cannot be written.
    """
    from highdicom.content import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.sr.coding import Code
    from pydicom.uid import generate_uid

    with quiet():
        planes, grid = _planes_of(series, reliability.geometry)
        frames = _on_planes(reliability, grid, series)
        lowest, highest = min(0.0, float(frames.min())), max(float(frames.max()), 1e-6)
        # without units there is nothing to say of the quantity but its name
        units = Code("[hnsf'U]", "UCUM", "Hounsfield unit") if unit == "HU" else Code("1", "UCUM", "no units")
        mapping = RealWorldValueMapping(
            lut_label="EXPECTED_ERROR",
            lut_explanation="Expected absolute error of the image",
            unit=units,
            value_range=(lowest, highest),
            slope=1.0,
            intercept=0.0,
        )
        header = planes[0].header
        made = ParametricMap(
            [_reference(plane) for plane in planes],
            frames,
            series_instance_uid=generate_uid(prefix=None),
            series_number=_series_number(header, 1000),
            sop_instance_uid=generate_uid(prefix=None),
            instance_number=1,
            manufacturer="chiasm",
            manufacturer_model_name="chiasm",
            software_versions=__version__,
            device_serial_number=model.sha256[:16] or "none",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[VOILUTTransformation(highest / 2, highest, voi_lut_function="LINEAR_EXACT")],
            content_label="RELIABILITY",
            content_description="Expected absolute error of a synthetic image",
            series_description="SYNTHETIC reliability: expected absolute error",
        )
        _copy(made, header, (*PATIENT_AND_STUDY, *SERIES))
        _copy_deidentification(made, header)
        made.SyntheticData = "YES"
        made.DerivationDescription = _told(model)
        made.ContributingEquipmentSequence = [_equipment(model, datetime.now())]
        with whole_file(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from warning: its sentences quote values, and those may be a patient's."""
    from pydicom.config import disable_value_validation

    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, eq=False)
class _Plane:
    """One slice to write: where it lies, and what it is made from.

    Attributes:
        header: Of the file that tells patient and study.
        place: Elements of `PLACE`, as the file has them.
        frames: The images that lie there.
    """

    header: Any
    place: Any
    frames: tuple[Frame, ...]

    @property
    def position(self) -> NDArray[np.float64]:
        return np.array(self.place.ImagePositionPatient, np.float64)


def _planes_of(series: Series, own: Geometry) -> tuple[list[_Plane], Geometry]:
    """Return the slices of a series in the order of K and their grid; `own` cut up where the series was resampled."""
    from pydicom.dataset import Dataset

    frames = _frames(series)
    assert series.stack is not None
    headers = dict(zip(series.parts, visit(series.parts, read_dataset)))
    if series.stack.tilted is not None:
        return list(_cut(own, headers[frames[0].part], frames)), own
    planes = []
    for frame in frames:
        header, place = headers[frame.part], Dataset()
        with taming(frame.part):
            for item in _groups_of(header, frame.place):
                _copy(place, item, PLACE)
        planes.append(_Plane(header, place, (frame,)))
    return planes, series.stack.geometry


def _frames(series: Series) -> tuple[Frame, ...]:
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


def _cut(grid: Geometry, header: Any, frames: Sequence[Frame]) -> Iterator[_Plane]:
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
        yield _Plane(header, place, tuple(near) or (frames[int(np.argmin(heights))],))


def _on_planes(image: Volume, grid: Geometry, series: Series) -> NDArray[np.float32]:
    """Return the image slice by slice, shape (K, rows, columns)."""
    turned = turned_like(image, grid)
    if not same_grid(grid, turned.geometry):
        raise VolumeError(
            "the image does not lie on the slices of its source",
            path=series.parts[0].path.parent,
            reason="grid",
            found="x".join(map(str, image.geometry.shape)),
            expected="x".join(map(str, grid.shape)),
        )
    if not np.isfinite(turned.array).all():
        raise VolumeError("the image holds values that are no finite number", reason="not-finite")
    return np.ascontiguousarray(turned.array.transpose(2, 1, 0), np.float32)


def _stored(frames: NDArray[np.float32], scale: float) -> tuple[NDArray[np.int16], int]:
    limits = np.iinfo(np.int16)
    whole = np.rint(frames.astype(np.float64) * scale)
    saturated = int(np.count_nonzero((whole < limits.min) | (whole > limits.max)))
    return np.clip(whole, limits.min, limits.max).astype("<i2"), saturated


def _new_series(
    first: _Plane,
    modality: Literal["MR", "CT"],
    description: str,
    model: ModelMark,
    scale: float,
    shown: tuple[float, float],
    remarks: Sequence[str],
    burned_in: bool,
) -> Any:
    """Make what all files of a new series have in common."""
    from pydicom.dataset import Dataset
    from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
    from pydicom.valuerep import format_number_as_ds

    source, now = first.header, datetime.now()
    new = Dataset()
    _copy(new, source, (*PATIENT_AND_STUDY, *SERIES))
    _copy_deidentification(new, source)
    for name in NEVER_ABSENT:
        if name not in new:
            setattr(new, name, None)
    if not new.BodyPartExamined and "Laterality" not in new:
        new.Laterality = None  # it may be one of a pair
    if not new.get("FrameOfReferenceUID"):
        new.FrameOfReferenceUID = generate_uid(prefix=None)
    new.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    new.Modality = modality
    new.SeriesInstanceUID = generate_uid(prefix=None)
    new.SeriesNumber = _series_number(source, 1000)
    told = description.encode("ascii", "replace").decode()  # whatever the source's character set is
    new.SeriesDescription = f"SYNTHETIC {told}".strip()[:LONGEST_DESCRIPTION]
    for what in ("InstanceCreation", "Series", "Content"):
        setattr(new, f"{what}Date", now.strftime("%Y%m%d"))
        setattr(new, f"{what}Time", now.strftime("%H%M%S"))
    new.Manufacturer = new.ManufacturerModelName = "chiasm"
    new.SoftwareVersions = __version__
    new.SyntheticData = "YES"
    new.ImageType = ["DERIVED", "SECONDARY", "AXIAL" if modality == "CT" else "OTHER"]
    scaled = f" Stored values are the image's times {scale:g}." if scale != 1 else ""
    new.DerivationDescription = _told(model) + scaled
    new.ImageComments = " ".join([NOTICE, *(f"{remark[:1].upper()}{remark[1:]}." for remark in remarks)])
    new.ContributingEquipmentSequence = [_equipment(model, now)]
    new.BurnedInAnnotation = "YES" if burned_in else "NO"
    new.LossyImageCompression = "00"
    if source.get("LossyImageCompression") == "01":  # once lossy, always lossy
        new.LossyImageCompression = "01"
        _copy(new, source, LOSSY)
    new.SamplesPerPixel, new.PhotometricInterpretation = 1, "MONOCHROME2"
    new.BitsAllocated = new.BitsStored = 16
    new.HighBit, new.PixelRepresentation = 15, 1
    low, high = shown
    new.WindowCenter, new.WindowWidth = (format_number_as_ds(value) for value in ((low + high) / 2, high - low))
    if modality == "CT":
        new.RescaleIntercept, new.RescaleSlope, new.RescaleType = "0", "1", "HU"
        new.KVP = new.AcquisitionNumber = None
    else:
        new.ScanningSequence, new.SequenceVariant = "RM", "NONE"  # no scanner's sequence made it
        new.ScanOptions = new.MRAcquisitionType = new.RepetitionTime = new.EchoTime = new.EchoTrainLength = None
        new.RealWorldValueMappingSequence = [_unscaled(scale)]
    return new


def _slice(new: Any, plane: _Plane, frame: NDArray[np.int16], number: int) -> Any:
    """Make one file of a new series."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    made = Dataset()
    made.update(new)
    made.SOPInstanceUID = generate_uid(prefix=None)
    made.InstanceNumber = number
    made.Rows, made.Columns = frame.shape
    made.update(plane.place)
    if "SliceThickness" not in made:
        made.SliceThickness = None
    made.PixelData = frame.tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return made


def _source_of(frame: Frame, sop_class: str, one_of_many: bool) -> Any:
    """Name one image that a slice was made from."""
    from pydicom.dataset import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID = sop_class
    reference.ReferencedSOPInstanceUID = frame.instance_uid
    if one_of_many:
        reference.ReferencedFrameNumber = frame.place + 1
    purpose = _code("121322", "DCM", "Source image for image processing operation")
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference


def _reference(plane: _Plane) -> Any:
    """Return as much of a source slice as a parametric map must know, and nothing that could be odd."""
    from pydicom.dataset import Dataset
    from pydicom.uid import MRImageStorage

    bare = Dataset()
    for name in NEVER_ABSENT:
        setattr(bare, name, None)
    header = plane.header
    _copy(bare, header, ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"))
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


def _equipment(model: ModelMark, now: datetime) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.Manufacturer = item.ManufacturerModelName = "chiasm"
    item.SoftwareVersions = __version__
    item.ContributionDateTime = now.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = _told(model)
    item.PurposeOfReferenceCodeSequence = [_code("109102", "DCM", "Processing Equipment")]
    return item


def _told(model: ModelMark) -> str:
    return f"Synthesised by chiasm {__version__}, model {model.name}, sha256 {model.sha256}. Not for diagnostic use."


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _copy(into: Any, source: Any, names: Sequence[str]) -> None:
    """Copy elements as they are, digits of decimal strings included; those that `source` lacks stay absent."""
    for name in names:
        if name in source:
            with suppress(*FAULTS):  # a value that cannot be read is not worth the series
                into[name] = source[name]


def _copy_deidentification(into: Any, source: Any) -> None:
    if source.get("PatientIdentityRemoved") == "YES":
        _copy(into, source, DEIDENTIFIED)


def _series_number(header: Any, offset: int) -> int:
    number = header.get("SeriesNumber")
    return offset + (int(number) if number and 0 < int(number) < 10**6 else 0)
