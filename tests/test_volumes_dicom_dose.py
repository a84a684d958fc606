"""Doses (RTDOSE): planes lie at their offsets, values are in the unit of the dose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.config import disable_value_validation
from pydicom.uid import generate_uid

from chiasm.errors import VolumeError
from chiasm.evaluation.doses import read_doses
from chiasm.evaluation.given_volumes import FolderPair, score_given
from chiasm.volumes import read_volume, write_volume
from chiasm.volumes.dicom_frames import DOSE
from dicom_patients import rewrite, write_source

STORED = np.random.default_rng(0).integers(0, 2**31, (6, 5, 4), dtype=np.uint32)  # planes, rows, columns
SCALE = 2.5e-8
UPWARDS = (0.0, 3.0, 6.0, 9.0, 12.0, 15.0)
HEAD_FIRST, FEET_FIRST, PRONE = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, -1, 0)


def write_dose(path: Path, orientation: tuple[int, ...] = HEAD_FIRST, offsets: tuple[float, ...] = UPWARDS) -> Path:
    (slice_,) = write_source(path.parent / f"{path.stem}-slice", np.zeros((4, 5, 1), np.int16))
    dose = pydicom.dcmread(slice_)
    dose.SOPClassUID = dose.file_meta.MediaStorageSOPClassUID = DOSE
    dose.Modality, dose.SeriesInstanceUID, dose.SliceThickness = "RTDOSE", generate_uid(), None
    dose.NumberOfFrames, dose.GridFrameOffsetVector, dose.DoseGridScaling = 6, list(offsets), str(SCALE)
    dose.DoseUnits, dose.DoseType, dose.DoseSummationType = "GY", "PHYSICAL", "PLAN"
    dose.ImagePositionPatient, dose.ImageOrientationPatient = [-10, -20, -30], list(orientation)
    dose.PixelSpacing = [2, 2.5]
    dose.BitsAllocated = dose.BitsStored = 32
    dose.HighBit, dose.PixelRepresentation = 31, 0
    dose.PixelData = STORED.astype("<u4").tobytes()
    dose.save_as(path)
    return path


@pytest.mark.parametrize(
    ("orientation", "offsets", "last"),
    [
        (HEAD_FIRST, UPWARDS, (-10, -20, -15)),
        (HEAD_FIRST, tuple(-30 + offset for offset in UPWARDS), (-10, -20, -15)),  # positions along the patient
        (HEAD_FIRST, tuple(-offset for offset in UPWARDS), (-10, -20, -45)),
        (FEET_FIRST, UPWARDS, (-10, -20, -45)),
        (FEET_FIRST, tuple(-30 + offset for offset in UPWARDS), (-10, -20, -15)),
        (PRONE, UPWARDS, (-10, -20, -15)),
    ],
)
def test_planes_lie_where_the_standard_puts_them(
    orientation: tuple[int, ...], offsets: tuple[float, ...], last: tuple[float, ...], tmp_path: Path
) -> None:
    """Corners of the first and last plane, by hand from PS3.3, C.8.8.3."""
    dose = read_volume(write_dose(tmp_path / "dose.dcm", orientation, offsets))
    for plane, (x, y, z) in ((0, (-10, -20, -30)), (5, last)):
        i, j, k = np.rint(np.linalg.solve(dose.geometry.affine, (-x, -y, z, 1)))[:3].astype(int)
        assert dose.array[i, j, k] == pytest.approx(STORED[plane, 0, 0] * SCALE, rel=1e-6)
    assert dose.geometry.spacing_mm == pytest.approx((2.5, 2, 3))


def test_a_dose_lies_where_simpleitk_puts_it(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = write_dose(tmp_path / "dose.dcm")
    dose, other = read_volume(path), sitk.ReadImage(str(path))
    right, anterior, z = dose.geometry.affine[:3, 3]
    assert other.GetOrigin() == pytest.approx((-right, -anterior, z))
    assert other.GetSpacing() == pytest.approx(dose.geometry.spacing_mm)
    stored = sitk.GetArrayFromImage(other).transpose(2, 1, 0)  # without the scaling
    np.testing.assert_allclose(dose.array, stored * SCALE, rtol=1e-6)


def test_a_dose_without_a_scale_or_with_too_few_offsets_is_refused(tmp_path: Path) -> None:
    path = write_dose(tmp_path / "dose.dcm")
    rewrite(path, lambda dataset: setattr(dataset, "GridFrameOffsetVector", [0, 3]))
    with pytest.raises(VolumeError, match="GridFrameOffsetVector"):
        read_volume(path)
    rewrite(path, lambda dataset: dataset.__delattr__("DoseGridScaling"))
    with pytest.raises(VolumeError, match="DoseGridScaling"):
        read_volume(path)


def test_doses_of_two_plans_are_given_as_files_of_dicom(tmp_path: Path) -> None:
    for folder, name in (("synthetic", "P07.dcm"), ("real", "p07.DCM")):
        (tmp_path / folder).mkdir()
        write_dose(tmp_path / folder / name)
        volume = read_volume(write_dose(tmp_path / folder / "P08.dcm"))
        write_volume(tmp_path / folder / "P08.nii.gz", volume.array, volume.geometry)  # which goes first
    its = SimpleNamespace(manifest=SimpleNamespace(fold=0, seed=0, method="A1"))
    work = [(its, SimpleNamespace(case=case)) for case in ("P07", "P08")]
    rows, problems = score_given(
        FolderPair(tmp_path / "synthetic", tmp_path / "real"),
        work,  # type: ignore[arg-type]
        lambda *files: {"dose": {"gamma_pass": 100.0 * np.array_equal(*(dose.array for dose in read_doses(*files)))}},
        kind="dose",
        convention="",
    )
    assert [row.value for row in rows] == [100.0, 100.0] and not problems


@pytest.mark.parametrize(("name", "other"), [("DoseUnits", "RELATIVE"), ("DoseType", "EFFECTIVE")])
def test_doses_that_say_that_they_mean_something_else_are_refused(name: str, other: str, tmp_path: Path) -> None:
    synthetic, real = (write_dose(tmp_path / f"{one}.dcm") for one in ("synthetic", "real"))
    with disable_value_validation():  # some write "Gy", which DICOM calls GY
        rewrite(synthetic, lambda dataset: setattr(dataset, name, dataset[name].value.capitalize()))
    read_doses(synthetic, real)
    rewrite(synthetic, lambda dataset: setattr(dataset, name, other))
    with pytest.raises(VolumeError, match=rf"another {name} .*{other}"):
        read_doses(synthetic, real)
    rewrite(real, lambda dataset: setattr(dataset, name, ""))  # not said: nothing to compare
    read_doses(synthetic, real)
