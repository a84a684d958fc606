"""Synthetic images as the DICOM series a hospital can take, and the expected error as a parametric map.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm import __version__
from chiasm.storage import whole_file, whole_folder
from chiasm.volumes.dicom_attributes import (
    NEAR_MM,
    PATIENT_AND_STUDY,
    SERIES,
    Derivation,
    ModelMark,
    Plane,
    copy_deidentification,
    copy_elements,
    description_of,
    equipment_of,
    frames_of_series,
    new_series,
    next_series_number,
    on_planes,
    planes_of,
    quiet,
    reference_to,
    source_of,
)
from chiasm.volumes.dicom_files import DicomFile, taming
from chiasm.volumes.dicom_frames import Frame
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry, Volume

FEWEST_STEPS = 1000  # of grey over the range that matters: rounding then costs at most 0.05 % of it
CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue


@dataclass(frozen=True)
class WrittenSeries:
    """The files that `write_series` wrote.

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


def write_series(folder: Path, image: Volume, sources: Sequence[Series], derivation: Derivation) -> WrittenSeries:
    """Write a synthetic image as a derived series; the folder appears whole or not at all.

    Args:
        folder: Where `0001.dcm`, `0002.dcm`, ... will lie; a series there before is replaced.
        image: Shape (I, J, K); HU for CT.  Stored in any axis order, as long
            as it lies on the slices of the first source; where those were
            resampled because they are tilted, on its own grid.
        sources: The series that it was made from, classic or multi-frame.
            The first gives patient, study and slices; the others are named.
        derivation: How it was made of them.

    Raises:
        VolumeError: If the image does not lie on the source's slices, the
            source makes no stack, or a value is not finite.
        ValueError: If there is no source, or a CT image is to be scaled.
        ChiasmError: If the folder cannot be written.
    """
    _check_request(sources, derivation)
    with quiet():
        planes, grid = planes_of(sources[0], image.geometry)
        references = _references(sources, grid)
        frames = on_planes(image, grid, sources[0])  # (K, rows, columns)
        stored, saturated = _stored(frames, derivation.scale)
        burned_in = any(series.burned_in for series in sources)  # what was drawn in may show in what is made of it
        with taming(sources[0].parts[0]):
            new = new_series(planes[0], derivation, _shown(frames, derivation), burned_in)
        names = [f"{number:04d}.dcm" for number in range(1, len(planes) + 1)]
        with whole_folder(folder) as fresh:
            for number, (name, plane, frame) in enumerate(zip(names, planes, stored, strict=True), start=1):
                with taming(plane.frames[0].part):
                    made = _slice(new, plane, frame, number)
                    made.SourceImageSequence = references.of(plane)
                made.save_as(fresh / name, enforce_file_format=True)
    return WrittenSeries(tuple(folder / name for name in names), str(new.SeriesInstanceUID), saturated)


def _check_request(sources: Sequence[Series], derivation: Derivation) -> None:
    """Refuse a scaled CT, and an image of no source."""
    if derivation.modality == "CT" and derivation.scale != 1:
        raise ValueError("CT holds Hounsfield units: its scale is 1")
    if not sources:
        raise ValueError("a derived series needs its source")


def _shown(frames: NDArray[np.float32], derivation: Derivation) -> tuple[float, float]:
    """Return the lowest and highest stored value that a viewer shows at first."""
    if derivation.window is not None:
        low, high = derivation.window
    elif derivation.modality == "CT":
        low, high = CT_WINDOW_HU
    else:
        low, high = np.percentile(frames, (0.5, 99.5)).tolist()
    scale = derivation.scale
    return low * scale, max(high * scale, low * scale + 1)


class _References(NamedTuple):
    """What names the images that a slice was made from.

    Attributes:
        sop_classes: SOPClassUID of each file.
        counts: Images in each file.
        others: Images of all series but the first, whose images lie on the slices.
        normal: Of the slices, LPS.
        reach: Along it, from the middle of a slice: what lies nearer was used for it, in mm.
    """

    sop_classes: Mapping[DicomFile, str]
    counts: Mapping[DicomFile, int]
    others: Sequence[Frame]
    normal: NDArray[np.float64]
    reach: float

    def of(self, plane: Plane) -> list[Any]:
        """Name the images of a slice, and of the other series those that lie near it."""
        near = [one for one in self.others if abs(self.normal @ (one.position - plane.position)) < self.reach]
        return [source_of(one, self.sop_classes[one.part], self.counts[one.part] > 1) for one in (*plane.frames, *near)]


def _references(sources: Sequence[Series], grid: Geometry) -> _References:
    frames = [frames_of_series(series) for series in sources]
    return _References(
        {part: series.sop_class for series in sources for part in series.parts},
        Counter(frame.part for frame in chain.from_iterable(frames)),
        list(chain.from_iterable(frames[1:])),
        (LPS_TO_RAS @ grid.affine)[:3, 2] / grid.spacing_mm[2],
        grid.spacing_mm[2] / 2 + NEAR_MM,
    )


class MapMeaning(NamedTuple):
    """The meaning of a map's numbers, in the words of DICOM.

    Attributes:
        label: Content Label, in capitals.
        explanation: LUT Explanation of the numbers, at most 64 characters.
        content: Content Description of the object.
        series: Series Description.
        offset: Added to the source's series number.
    """

    label: str
    explanation: str
    content: str
    series: str
    offset: int


def write_map(
    path: Path, values: Volume, series: Series, *, kind: MapMeaning, unit: Literal["HU", "a.u."], model: ModelMark
) -> None:
    """Write a map of an image, in its unit, as a parametric map of float32, whole or not at all.

    Args:
        path: Ends in .dcm.
        values: On the slices of the series, shape (I, J, K).
        series: The synthetic series that the map describes, as `write_series` wrote it.
        kind: What the numbers mean.
        unit: Of the map.
        model: What made it.

    Raises:
        VolumeError: If the map does not lie on the series' slices or a value is not finite.
        ChiasmError: If the file cannot be written.
    """
    from highdicom.content import VOILUTTransformation
    from highdicom.pm import ParametricMap
    from pydicom.uid import generate_uid

    with quiet():
        planes, grid = planes_of(series, values.geometry)
        frames = on_planes(values, grid, series)
        lowest, highest = min(0.0, float(frames.min())), max(float(frames.max()), 1e-6)
        header = planes[0].header
        made = ParametricMap(
            [reference_to(plane) for plane in planes],
            frames,
            series_instance_uid=generate_uid(prefix=None),
            series_number=next_series_number(header, kind.offset),
            sop_instance_uid=generate_uid(prefix=None),
            instance_number=1,
            manufacturer="chiasm",
            manufacturer_model_name="chiasm",
            software_versions=__version__,
            device_serial_number=model.sha256[:16] or "none",
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[_meaning(kind, unit, lowest, highest)],
            voi_lut_transformations=[VOILUTTransformation(highest / 2, highest, voi_lut_function="LINEAR_EXACT")],
            content_label=kind.label,
            content_description=kind.content,
            series_description=kind.series,
        )
        copy_elements(made, header, (*PATIENT_AND_STUDY, *SERIES))
        copy_deidentification(made, header)
        made.SyntheticData = "YES"
        made.DerivationDescription = description_of(model)
        made.ContributingEquipmentSequence = [equipment_of(model, datetime.now())]
        with whole_file(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)


def _meaning(kind: MapMeaning, unit: Literal["HU", "a.u."], lowest: float, highest: float) -> Any:
    """Say what the numbers of a map, from lowest to highest, are."""
    from highdicom.pm import RealWorldValueMapping
    from pydicom.sr.coding import Code

    # without units there is nothing to say of the quantity but its name
    units = Code("[hnsf'U]", "UCUM", "Hounsfield unit") if unit == "HU" else Code("1", "UCUM", "no units")
    return RealWorldValueMapping(
        lut_label=kind.label,
        lut_explanation=kind.explanation,
        unit=units,
        value_range=(lowest, highest),
        slope=1.0,
        intercept=0.0,
    )


def _stored(frames: NDArray[np.float32], scale: float) -> tuple[NDArray[np.int16], int]:
    limits = np.iinfo(np.int16)
    whole = np.rint(frames.astype(np.float64) * scale)
    saturated = int(np.count_nonzero((whole < limits.min) | (whole > limits.max)))
    return np.clip(whole, limits.min, limits.max).astype("<i2"), saturated


def _slice(new: Any, plane: Plane, frame: NDArray[np.int16], number: int) -> Any:
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
