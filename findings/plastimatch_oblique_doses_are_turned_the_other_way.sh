#!/usr/bin/env bash
# Plastimatch 1.9.4 reads an RTDOSE file that is not axial with its direction matrix transposed, so that the dose is rotated the other way,
# and writes one with its planes too near to each other, or all at one place.
#
# Input, made here: an RTDOSE file of 24 x 20 x 10 voxels of 1 x 2 x 3 mm with 70 Gy in one voxel, axial, prone, rotated by 20 degrees about
# the patient's z axis (yaw) or x axis (pitch), sagittal and coronal; and the same grids as MetaImage files, which are exported.
#
# Expected: the 70 Gy lie where ImageOrientationPatient puts them, as SimpleITK says. Relative offsets of planes are along the cross product
# of row and column (C.8.8.3.2 of the standard's part 3), so 0, 3, 6 mm in each orientation.
#
# Behaviour: the matrix of `plastimatch convert --input` for a dose is the transpose of the right one, which is the right one where it is
# symmetric: axial, supine or prone. The offsets that are written are multiplied by the z component of the normal.
#
# Output seen:
#                   read, off by (x, y, z in mm)    offsets written
#     axial         0, 0, 0                         0, 3, 6
#     prone         0, 0, 0                         0, 3, 6
#     yaw 20        5.47, -12.31, 0                 0, 3, 6
#     pitch 20      0, 12.31, -5.47                 0, 2.82, 5.64
#     sagittal      26, -36, -10                    0, 0, 0
#     coronal       0, -36, 16                      0, 0, 0
# The exit status is 0.
#
# Who is hurt: whoever brings doses on the grid of an oblique MR, such as plans on synthetic CT, through Plastimatch to images or to a DVH.
# Images in such an orientation are read right, so that dose and patient come apart. We found no report. A dose that another tool resamples
# to an axial grid before is safe.
#
# Needs apt-get and the rights to use it, unless plastimatch is installed.
set -euo pipefail

command -v plastimatch > /dev/null || { apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends plastimatch; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pydicom==3.0.2 SimpleITK==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTDoseStorage, generate_uid

SHAPE, SPACING, ORIGIN = (10, 20, 24), (1.0, 2.0, 3.0), (5.0, -7.0, 3.0)  # planes, rows, columns; x, y, z
HOT = (6, 4, 18)  # plane, row, column
COSINE, SINE = np.cos(np.radians(20)), np.sin(np.radians(20))
CASES = {  # columns: directions of row, column and normal; where the dose is read (off by mm); offsets written
    "axial": (np.eye(3), (0, 0, 0), (0, 3, 6)),
    "prone": (np.diag([-1.0, -1.0, 1.0]), (0, 0, 0), (0, 3, 6)),
    "yaw 20": (np.array([[COSINE, -SINE, 0], [SINE, COSINE, 0], [0, 0, 1]]), (5.47, -12.31, 0), (0, 3, 6)),
    "pitch 20": (np.array([[1, 0, 0], [0, COSINE, -SINE], [0, SINE, COSINE]]), (0, 12.31, -5.47), (0, 2.82, 5.64)),
    "sagittal": (np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]]), (26, -36, -10), (0, 0, 0)),
    "coronal": (np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), (0, -36, 16), (0, 0, 0)),
}


def plastimatch(*words):
    subprocess.run(["plastimatch", *map(str, words)], check=True, capture_output=True)


def write_dose(path, direction):
    dose = np.zeros(SHAPE, "<u4")
    dose[HOT] = 70_000
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.Modality, d.PatientID = RTDoseStorage, generate_uid(), "RTDOSE", "1"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    d.DoseUnits, d.DoseType, d.DoseSummationType, d.DoseGridScaling = "GY", "PHYSICAL", "PLAN", 0.001
    d.ImagePositionPatient, d.PixelSpacing = list(ORIGIN), [SPACING[1], SPACING[0]]
    d.ImageOrientationPatient = [round(float(part), 8) for part in direction.T[:2].ravel()]
    d.GridFrameOffsetVector, d.FrameIncrementPointer = [SPACING[2] * k for k in range(SHAPE[0])], 0x3004000C
    d.NumberOfFrames, d.Rows, d.Columns = SHAPE
    d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelData = 32, 32, 31, dose.tobytes()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.save_as(path, enforce_file_format=True)


def hot_spot(path):
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image)
    index = np.unravel_index(voxels.argmax(), voxels.shape)
    return np.array(image.TransformIndexToPhysicalPoint([int(k) for k in index[::-1]]))


def offsets_written(folder, direction):
    dose = np.zeros(SHAPE, np.float32)
    dose[HOT] = 70
    image = sitk.GetImageFromArray(dose)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(direction.ravel())
    sitk.WriteImage(image, str(folder / "dose.mha"))
    plastimatch("convert", "--input-dose-img", folder / "dose.mha", "--output-dicom", folder / "written")
    (path,) = (folder / "written").glob("dose*.dcm")
    return [float(offset) for offset in pydicom.dcmread(path).GridFrameOffsetVector[:3]]


version = subprocess.run(["plastimatch", "--version"], check=True, capture_output=True, text=True).stdout.strip()
print(version)
changed = [] if version == "plastimatch version 1.9.4" else [version]
for name, (direction, read_seen, offsets_seen) in CASES.items():
    folder = Path(sys.argv[1], name.replace(" ", "-"))
    folder.mkdir()
    write_dose(folder / "dose.dcm", direction)
    true = np.array(ORIGIN) + direction @ (np.array(SPACING) * HOT[::-1])
    assert np.allclose(hot_spot(folder / "dose.dcm"), true, atol=1e-4), "SimpleITK reads the file at another place"
    plastimatch("convert", "--input", folder / "dose.dcm", "--output-dose-img", folder / "read.mha")
    off = hot_spot(folder / "read.mha") - true
    offsets = offsets_written(folder, direction)
    print(f"{name}: read {off.round(2) + 0.0} mm off; offsets of planes written: {np.round(offsets, 2)}")
    if not (np.allclose(off, read_seen, atol=0.01) and np.allclose(offsets, offsets_seen, atol=0.01)):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: directions of doses are transposed, and offsets of planes are along z")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
