#!/usr/bin/env bash
# MRtrix3 3.0.3 reads DICOM pixels of 1.5 mm along columns and 0.8 mm along rows as 0.8 by 1.5 mm, and signed voxels as unsigned: -1
# becomes 65535.
#
# Input, made here: an MR series of five slices of 20 x 40 pixels, PixelSpacing 1.5\0.8, with a square of 24 x 24 mm; once unsigned, and
# once signed (PixelRepresentation 1) with negative numbers, as scanners store phase and real parts.
#
# Expected: the square stays one; voxel sizes 0.8 x 1.5 x 3 mm; values as stored. The standard puts the distance between rows first
# in PixelSpacing. dcm2niix and SimpleITK read it so.
#
# Behaviour: core/file/dicom/image.cpp takes the first number for the first axis of the image, which runs along a row. (For Rows and
# Columns, two cases further up, it exchanges the two, as it should.) No code there asks
# for PixelRepresentation: mapper.cpp makes each image of 16 bits UInt16. Slope and intercept are then applied to the wrong numbers.
#
# Output seen:
#                         size of the square in mm   voxel size     stored -1, -1000
#     MRtrix3             45.0 x 12.8                1.5 x 0.8 x 3  65535  64536
#     SimpleITK           24.0 x 24.0                0.8 x 1.5 x 3     -1  -1000
#
# Who is hurt: whoever converts scans with oblong pixels, or the phase and real parts of a scanner that stores signed numbers.
# Square pixels and unsigned magnitudes, the common case of diffusion MRI, are right. There is no message.
# The files on the project's main branch of 2026 still have both. We found no report in its issues.
#
# Needs Debian 12's package mrtrix3, which the script installs where mrconvert is missing (as root).
set -euo pipefail

command -v mrconvert > /dev/null || { apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends mrtrix3; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pydicom==3.0.2 SimpleITK==2.5.7 nibabel==5.4.2 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SLICES, ROWS, COLUMNS = 5, 20, 40
SPACING = [1.5, 0.8]  # from row to row, from column to column


def write_series(folder, voxels, signed):
    folder.mkdir()
    for k in range(SLICES):
        d = Dataset()
        d.SOPClassUID, d.SOPInstanceUID, d.Modality, d.Manufacturer = MRImageStorage, generate_uid(), "MR", "Nobody"
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
        d.PatientName, d.PatientID, d.StudyDate, d.StudyTime, d.StudyID = "Phantom", "1", "20240229", "120000", "1"
        d.ImageType, d.SeriesNumber, d.InstanceNumber = ["ORIGINAL", "PRIMARY", "OTHER"], 1, k + 1
        d.ScanningSequence, d.SequenceVariant, d.EchoTime, d.RepetitionTime = "GR", "NONE", 5, 500
        d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, 3 * k], [1, 0, 0, 0, 1, 0]
        d.PixelSpacing, d.SliceThickness, d.Rows, d.Columns = SPACING, 3, ROWS, COLUMNS
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", int(signed)
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15
        d.PixelData = voxels[k].astype("<i2" if signed else "<u2").tobytes()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def by_mrtrix(folder):
    out = folder.with_suffix(".nii")
    done = subprocess.run(["mrconvert", folder, out], capture_output=True, text=True, check=True)
    assert "WARNING" not in done.stderr and "error" not in done.stderr, done.stderr
    image = nibabel.load(out)
    return image.get_fdata(), np.linalg.norm(image.affine[:3, :3], axis=0)


def by_simpleitk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    return sitk.GetArrayFromImage(image).T, np.array(image.GetSpacing())


work = Path(sys.argv[1])
square = np.zeros((SLICES, ROWS, COLUMNS))
square[:, 2:18, 5:35] = 1000  # 16 rows of 1.5 mm, 30 columns of 0.8 mm
signed = square - 1000
signed[:, 2:18, 5:35] = -1
write_series(work / "square", square, signed=False)
write_series(work / "signed", signed, signed=True)
print(subprocess.run(["mrconvert", "-version"], capture_output=True, text=True).stdout.split("\n")[0].replace("=", "").strip())
changed = []
for name, read, sides, sizes, values in (
    ("MRtrix3", by_mrtrix, (45, 12.8), (1.5, 0.8, 3), [64536, 65535]),
    ("SimpleITK", by_simpleitk, (24, 24), (0.8, 1.5, 3), [-1000, -1]),
):
    voxels, spacing = read(work / "square")
    inside = np.argwhere(voxels > 500)
    found = (np.ptp(inside, axis=0) + 1)[:2] * spacing[:2]
    stored = np.unique(read(work / "signed")[0])
    print(f"{name:10} square of {found.round(2)} mm, voxels of {spacing.round(3)} mm, stored -1000 and -1: {stored}")
    if not (np.allclose(found, sides) and np.allclose(spacing, sizes) and list(stored) == values):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + ", ".join(changed))
print("as described: MRtrix3 exchanges the sides of pixels and reads signed voxels as unsigned")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
