#!/usr/bin/env bash
# dicom2nifti 2.6.2 writes the stored numbers of an enhanced CT instead of Hounsfield units, if slope and intercept are stated once for
# all frames: air is 24 and water 1024.
#
# Input, made here: one Enhanced CT Image Storage file of six frames of 9 x 8 pixels, with HU = 1 x stored - 1024 (or 0.5 x
# stored - 1024) in the Pixel Value Transformation Sequence. DICOM lets a writer put that sequence in the shared functional groups,
# when it is the same for all frames, or in those of each frame.
#
# Expected: the same Hounsfield units in both cases. SimpleITK, highdicom and dcm2niix read them so.
#
# Behaviour: multiframe_to_block (common.py) looks for the sequence in the group of each frame alone. If it is not there, the frame
# stays as stored, and the NIfTI header states slope 1 and intercept 0. Orientation and pixel size are looked for in both
# places. The same function serves enhanced MR, where the slope is lost.
#
# Output seen, air and water in HU, true -1000 and 0:
#     classic CT, one file for each slice       -1000  0
#     enhanced, in each frame's group           -1000  0
#     enhanced, in the shared groups               24  1024, and with a slope of 0.5:  48  2048
#
# Who is hurt: whoever makes training data or doses from enhanced CT. Contrast and shape look right; thresholds and windows in HU do
# not fit. Nothing is printed.
# pydicom's apply_rescale knows no functional groups either (pydicom#2353), but dicom2nifti does not call it for such files.
# We found no report to dicom2nifti. Whole numbers in each frame's group fail with an OverflowError under numpy 2.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    dicom2nifti==2.6.2 pydicom==3.0.2 SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import dicom2nifti
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

FRAMES, ROWS, COLUMNS = 6, 9, 8
HU = np.full((FRAMES, ROWS, COLUMNS), -1000)
HU[:, 3:6, 2:6] = 0


def item(**values):
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def common(storage, stored):
    d = item(SOPClassUID=storage, SOPInstanceUID=generate_uid(), Modality="CT", Manufacturer="Nobody", PatientID="1")
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    d.PatientName, d.StudyDate, d.ContentDate, d.ContentTime = "Phantom", "20240229", "20240229", "120000"
    d.ImageType, d.SeriesNumber, d.InstanceNumber = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 1, 1
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
    d.PixelData = stored.astype("<u2").tobytes()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return d


def write_classic(folder, stored, slope):
    for k in range(FRAMES):
        d = common(CTImageStorage, stored[k])
        d.InstanceNumber, d.RescaleSlope, d.RescaleIntercept = k + 1, slope, -1024
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, 3 * k], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing, d.SliceThickness = [2, 2], 3
        d.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def write_enhanced(folder, stored, slope, shared):
    d = common(EnhancedCTImageStorage, stored)
    d.NumberOfFrames = FRAMES
    values = [item(RescaleSlope=slope, RescaleIntercept=-1024, RescaleType="HU")]
    group = item(
        PixelMeasuresSequence=[item(PixelSpacing=[2, 2], SliceThickness=3, SpacingBetweenSlices=3)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    frames = [
        item(
            FrameContentSequence=[item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])],
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 3 * k])],
        )
        for k in range(FRAMES)
    ]
    for one in [group] if shared else frames:
        one.PixelValueTransformationSequence = values
    d.SharedFunctionalGroupsSequence, d.PerFrameFunctionalGroupsSequence = [group], frames
    d.save_as(folder / "ct.dcm", enforce_file_format=True)


def air_and_water(voxels):
    assert len(np.unique(voxels)) == 2
    return float(voxels.min()), float(voxels.max())


print("dicom2nifti", version("dicom2nifti"))
changed = []
for number, (kind, slope, wanted) in enumerate(
    (
        ("classic", 1, (-1000, 0)),
        ("classic", 0.5, (-1000, 0)),
        ("in each frame's group", 0.5, (-1000, 0)),
        ("in the shared groups", 1, (24, 1024)),
        ("in the shared groups", 0.5, (48, 2048)),
    )
):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir()
    stored = (HU + 1024) / slope
    if kind == "classic":
        write_classic(folder, stored, slope)
    else:
        write_enhanced(folder, stored, slope, kind == "in the shared groups")
        by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "ct.dcm")))
        assert air_and_water(by_itk) == (-1000, 0), "SimpleITK no longer reads the true values"
    image = dicom2nifti.dicom_series_to_nifti(str(folder), str(folder / "out.nii"))["NII"]
    found = air_and_water(image.get_fdata())
    print(f"slope {slope:3}, {kind:22} air {found[0]:6g}, water {found[1]:6g}")
    if found != wanted:
        changed.append(f"{kind}, slope {slope}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: shared slope and intercept are not applied")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
