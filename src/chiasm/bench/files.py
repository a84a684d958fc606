"""Rows about files: NIfTI beside nibabel, DICOM beside pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair
from chiasm.bench.subjects import draw_pictures


def _apart(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max()) if a.shape == b.shape else np.inf


def read_nifti(setting: BenchSetting) -> TimedPair:
    """Read a packed NIfTI, checked, beside nibabel, which checks less."""
    import nibabel

    from chiasm.volumes import read_volume

    pictures = draw_pictures(setting.shape)
    path = setting.folder / "read.nii.gz"
    nibabel.save(nibabel.Nifti1Image(pictures.source, pictures.geometry.affine), path)

    def peer() -> NDArray[Any]:
        image: Any = nibabel.load(path)
        return np.asarray(image.get_fdata(dtype=np.float32))

    return TimedPair(lambda: read_volume(path).array, peer, _apart, 0.0)


def write_nifti(setting: BenchSetting) -> TimedPair:
    """Write a prediction as a packed NIfTI beside nibabel at its own settings."""
    import nibabel

    from chiasm.volumes import Volume, write_volume

    pictures = draw_pictures(setting.shape)
    volume = Volume(pictures.source.astype(np.float32) / 7, pictures.geometry)
    ours, theirs = setting.folder / "ours.nii.gz", setting.folder / "theirs.nii.gz"

    def own() -> Path:
        write_volume(ours, volume.array, volume.geometry)
        return ours

    def peer() -> Path:
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.geometry.affine), theirs)
        return theirs

    def difference(a: Path, b: Path) -> float:
        one, other = (np.asarray(nibabel.load(path).dataobj) for path in (a, b))
        return _apart(one, other)

    return TimedPair(own, peer, difference, 0.0)


def read_series(setting: BenchSetting) -> TimedPair:
    """Read a DICOM series, checked, beside the loop that people write: pydicom, sorted, stacked and rescaled."""
    import pydicom

    from chiasm.volumes import read_volume
    from chiasm.volumes.dicom_headers import KEPT

    folder = setting.folder / "series"
    write_series(folder, setting.shape)

    def own() -> NDArray[Any]:
        KEPT.forget()  # a command reads a series once
        return read_volume(folder).array

    def peer() -> NDArray[Any]:
        slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda one: float(one.ImagePositionPatient[2]))
        stack = [one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
        return np.stack(stack).transpose(2, 1, 0).astype(np.float32)

    return TimedPair(own, peer, _apart, 0.0)


def write_series(folder: Path, shape: tuple[int, int, int]) -> None:
    """Write axial slices of a drawn picture as DICOM of native pixels, with what a scanner says of each."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

    array = draw_pictures(shape).source
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (generate_uid(entropy_srcs=["chiasm bench", what]) for what in ("study", "series", "frame"))
    for k in range(shape[2]):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = UID(ExplicitVRLittleEndian)
        one.SOPClassUID, one.SOPInstanceUID = MRImageStorage, generate_uid(entropy_srcs=["chiasm bench", str(k)])
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.Modality, one.PatientID, one.SeriesNumber, one.InstanceNumber = "MR", "nobody", 1, k + 1
        one.ImageType, one.EchoTime, one.AcquisitionNumber = ["ORIGINAL", "PRIMARY", "M"], "10", "1"
        one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, k], [1, 0, 0, 0, 1, 0]
        one.PixelSpacing, one.SliceThickness, one.RescaleSlope, one.RescaleIntercept = [1, 1], "1", "1", "0"
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = shape[1], shape[0], 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.PixelData = np.ascontiguousarray(array[:, :, k].T).astype("<i2").tobytes()
        one["PixelData"].VR = "OW"
        one.save_as(folder / f"{k:04d}.dcm", enforce_file_format=True)


ROWS = (
    BenchRow(
        "read-dicom",
        "read a DICOM series of native pixels, with its checks",
        "pydicom, slice by slice, sorted and stacked",
        0.5,
        0.5,
        read_series,
        equal="stored values",
    ),
    BenchRow(
        "read-nifti",
        "read a .nii.gz of int16, with its checks",
        "nibabel get_fdata",
        1.5,
        1.2,
        read_nifti,
        equal="stored values",
    ),
    BenchRow(
        "write-nifti",
        "write a .nii.gz of float32",
        "nibabel save",
        3.0,
        3.0,
        write_nifti,
        equal="stored values",
    ),
)
