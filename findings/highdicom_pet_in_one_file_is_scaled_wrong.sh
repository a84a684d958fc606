#!/usr/bin/env bash
# A PET series that highdicom 0.28.2 packs into one file is read with one slice's slope for all by SimpleITK 2.5.7, and by
# dcm2niix 1.0.20260724 too, unless Manufacturer names Philips.
#
# Input, made here: a PET series of four slices of 10 x 8 pixels, each with a RescaleSlope of its own (0.8, 2, 4, 0.5 Bq/ml),
# as PET scanners write them to use the whole range of 16 bits. highdicom converts it into one Legacy Converted Enhanced PET
# object: the slopes go to each frame's Pixel Value Transformation Sequence, and the frames run from head to feet.
#
# Expected: the series and the one file are the same image. highdicom reads it back so.
#
# Behaviour:
# - SimpleITK (by GDCM's ImageHelper) takes slope and intercept from the shared groups or, where they are not there, from
#   the first item of the per-frame groups, and rescales the whole volume by it. The geometry is right.
# - dcm2niix scales each frame on its own if Manufacturer begins with Philips, and says so ("slope, intercept ... varies").
#   For SIEMENS, or a word that it does not know, it takes the slope that it met last, that of the last frame, for all.
# Neither prints a warning. Both read the series of single files right.
#
# Output seen, activity found / true, from the feet to the head:
#     SimpleITK, one file                    0.62   0.25   0.12   1.00
#     dcm2niix, one file                     1.00   0.40   0.20   1.60
#     dcm2niix, one file, Philips            1.00   1.00   1.00   1.00
#     highdicom, one file; both, series      1.00   1.00   1.00   1.00
#
# Who is hurt: whoever computes uptake (SUV) from enhanced or converted PET: the values stay plausible, and a lesion that
# spans slices changes from one to the next. In enhanced MR and CT with a slope for each frame, SimpleITK does the same, and
# dcm2niix for SIEMENS; there, it scales an unknown maker's frames on their own.
# dciodvfy finds one error in the file, in the list of references to the series, which no reader of pixels needs.
# dcm2niix#853 asks for such slopes; its author writes that they are handled for Philips and tried for one other maker. That
# GDCM looks at the first frame alone is said in passing in ITK's pull request 2010; we found no report about the values.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    highdicom==0.28.2 pydicom==3.0.2 SimpleITK==2.5.7 dcm2niix==1.0.20260724 nibabel==5.4.2 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedPETImage
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, generate_uid

SLOPES = (0.8, 2.0, 4.0, 0.5)  # from the feet to the head
TRUE = 1000 + 80.0 * np.arange(80).reshape(8, 10)  # Bq/ml, the same in each slice
SEEN = {
    "SimpleITK, series": (1, 1, 1, 1),
    "dcm2niix, series": (1, 1, 1, 1),
    "highdicom, one file": (1, 1, 1, 1),
    "SimpleITK, one file": (0.625, 0.25, 0.125, 1),
    "dcm2niix, one file": (1, 0.4, 0.2, 1.6),
}


def write_series(folder, manufacturer):
    folder.mkdir()
    study, series, frame = (generate_uid() for _ in range(3))
    for z, slope in enumerate(SLOPES):
        d = Dataset()
        d.SOPClassUID, d.SOPInstanceUID = PositronEmissionTomographyImageStorage, generate_uid()
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.StudyDate = d.SeriesDate = d.AcquisitionDate = d.ContentDate = "20240229"
        d.StudyTime = d.SeriesTime = d.AcquisitionTime = d.ContentTime = "120000"
        d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "Phantom^One", "1", "", "O"
        d.StudyID, d.AccessionNumber, d.ReferringPhysicianName, d.PositionReferenceIndicator = "1", "", "", ""
        d.Modality, d.SeriesNumber, d.InstanceNumber, d.Manufacturer = "PT", 1, z + 1, manufacturer
        d.ImageType, d.PatientPosition, d.BodyPartExamined = ["ORIGINAL", "PRIMARY"], "HFS", "CHEST"
        d.SeriesType, d.Units, d.CountsSource, d.NumberOfSlices = ["STATIC", "IMAGE"], "BQML", "EMISSION", len(SLOPES)
        d.CorrectedImage, d.DecayCorrection, d.CollimatorType = ["ATTN"], "START", "NONE"
        d.FrameReferenceTime, d.ActualFrameDuration, d.ImageIndex = 0, 60000, z + 1
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, 3 * z], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing, d.SliceThickness, d.Rows, d.Columns = [2, 2], 3, *TRUE.shape
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 1
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15
        d.RescaleIntercept, d.RescaleSlope = 0, slope
        d.PixelData = np.round(TRUE / slope).astype("<i2").tobytes()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.save_as(folder / f"{z}.dcm", enforce_file_format=True)


def pack(series, folder):
    folder.mkdir()
    given = [pydicom.dcmread(path) for path in sorted(series.iterdir())]
    made = LegacyConvertedEnhancedPETImage(given, generate_uid(), 2, generate_uid(), 1)
    made.save_as(folder / "pet.dcm", enforce_file_format=True)
    return folder / "pet.dcm"


def shares(slices):
    """Found / true of each slice, given from the feet to the head; mirrored rows and columns do not matter."""
    return [round(float(np.mean(one) / TRUE.mean()), 3) for one in slices]


def by_simpleitk(place):
    if place.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(place)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(place))
    heights = [image.TransformIndexToPhysicalPoint((0, 0, k))[2] for k in range(image.GetSize()[2])]
    assert sorted(heights) == [0, 3, 6, 9], "the geometry is no longer right"
    return shares(sitk.GetArrayFromImage(image)[np.argsort(heights)])


def by_dcm2niix(place, out):
    out.mkdir()
    program = Path(sys.executable).with_name("dcm2niix")
    given = place if place.is_dir() else place.parent
    said = subprocess.run([program, "-f", "a", "-o", out, given], capture_output=True, text=True, check=True).stdout
    image = nibabel.as_closest_canonical(nibabel.load(out / "a.nii"))
    return shares(np.moveaxis(image.get_fdata(), 2, 0)), "varies" in said


def by_highdicom(place):
    volume = highdicom.imread(str(place)).get_volume()
    heights = [(volume.affine @ [k, 0, 0, 1])[2] for k in range(len(volume.array))]
    return shares(volume.array[np.argsort(heights)])


work = Path(sys.argv[1])
print(*(f"{name} {version(name)}" for name in ("highdicom", "SimpleITK", "dcm2niix")))
changed = []
for number, manufacturer in enumerate(("SIEMENS", "Nobody", "Philips Medical Systems")):
    series, out = work / f"series{number}", work / f"out{number}"
    write_series(series, manufacturer)
    one = pack(series, work / f"one{number}")
    from_series, _ = by_dcm2niix(series, work / f"a{number}")
    from_one, warned = by_dcm2niix(one, work / f"b{number}")
    found = {
        "SimpleITK, series": by_simpleitk(series),
        "dcm2niix, series": from_series,
        "highdicom, one file": by_highdicom(one),
        "SimpleITK, one file": by_simpleitk(one),
        "dcm2niix, one file": from_one,
    }
    print(f"Manufacturer {manufacturer}: found / true, from the feet to the head")
    for name, values in found.items():
        print(f"    {name:20}", *(f"{value:6.3f}" for value in values))
        right = manufacturer.startswith("Philips") and name.startswith("dcm2niix")
        if not np.allclose(values, 1 if right else SEEN[name], atol=0.005):
            changed.append(f"{name}, {manufacturer}")
    if warned != manufacturer.startswith("Philips"):
        changed.append(f"dcm2niix's message, {manufacturer}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: one slope for all frames")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
