#!/usr/bin/env bash
# dicompyler-core 0.5.6 adds two dose grids 16 mm aside if the patient lies prone or feet first and the grids start 8 mm apart, and adds
# them wrong if the pixels are oblong.
#
# Input, made here: two RTDOSE files that sample smooth doses of 2 Gy around points 8 mm apart, each on a grid around its own point, for
# five positions of the patient (ImageOrientationPatient), the last with PixelSpacing 3\2.
#
# Expected: DoseGrid + DoseGrid is the sum of both doses at the voxels of the first. It is, within 0.01 Gy, for a supine patient, head
# first, with square pixels.
#
# Behaviour (dose.py): the axes of a grid are ImagePositionPatient plus the index times the pixel's size, all upwards.
# ImageOrientationPatient is compared between both files, which is why equal ones pass, but not used. Where x runs down, the grids' distance
# gets the wrong sign, so the second dose lands at twice the distance on the wrong side. For a patient on the side, rows and columns are
# exchanged too. PixelSpacing's first number, from row to row, is taken for x.
# Grids that coincide are added voxel by voxel, which is right in each position.
#
# Output seen, largest error of the sum in Gy (the largest sum is 3.76):
#     head first, supine          0.00
#     head first, prone           1.40
#     feet first, supine          1.40
#     head first, on the side     1.06
#     head first, supine, 3\2 mm  0.27
# The largest dose is right in the first four, so that a look at it shows nothing.
#
# Who is hurt: whoever sums plans or fractions for breast in prone position, or legs feet first. There is no message.
# dicompyler-core#29 and #274 led to handling such positions for the DVH and for single planes (dicomparser.py). We found no report
# about sums.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    dicompyler-core==0.5.6 pydicom==2.4.5 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from dicompylercore.dose import DoseGrid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTDoseStorage, generate_uid

warnings.simplefilter("error", UserWarning)  # a warning would be a change
SHAPE = (21, 40, 44)  # frames, rows, columns
POINTS = (0, 0, 0), (8, 0, 0)
POSITIONS = {
    "head first, supine": ([1, 0, 0, 0, 1, 0], [2, 2], 0),
    "head first, prone": ([-1, 0, 0, 0, -1, 0], [2, 2], 1.40),
    "feet first, supine": ([-1, 0, 0, 0, 1, 0], [2, 2], 1.40),
    "head first, on the side": ([0, -1, 0, 1, 0, 0], [2, 2], 1.06),
    "head first, supine, oblong": ([1, 0, 0, 0, 1, 0], [3, 2], 0.27),
}


def dose(places, point):
    return 2 * np.exp(-((places - point) ** 2).sum(-1) / (2 * 12**2))


def places_of(point, orientation, spacing):
    """The places of all voxels in mm: frames 3 mm apart, rows and columns by PixelSpacing, the grid centred on the point."""
    rows, columns = np.array(orientation[3:], float), np.array(orientation[:3], float)
    steps = np.stack([3 * np.cross(columns, rows), spacing[0] * rows, spacing[1] * columns])
    return point + (np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2) @ steps


def write(path, point, orientation, spacing):
    places = places_of(point, orientation, spacing)
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.Modality, d.PatientID = RTDoseStorage, generate_uid(), "RTDOSE", "1"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    d.DoseUnits, d.DoseType, d.DoseSummationType, d.DoseGridScaling = "GY", "PHYSICAL", "PLAN", 1e-8
    d.ImagePositionPatient, d.ImageOrientationPatient = list(places[0, 0, 0]), orientation
    d.PixelSpacing, d.GridFrameOffsetVector, d.FrameIncrementPointer = spacing, [3.0 * k for k in range(SHAPE[0])], 0x3004000C
    d.NumberOfFrames, d.Rows, d.Columns = SHAPE
    d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
    d.BitsAllocated, d.BitsStored, d.HighBit = 32, 32, 31
    d.PixelData = np.round(dose(places, point) / 1e-8).astype("<u4").tobytes()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.save_as(path, write_like_original=False)


print("dicompyler-core", version("dicompyler-core"))
changed = []
for name, (orientation, spacing, seen) in POSITIONS.items():
    files = [str(Path(sys.argv[1]) / f"{number}.dcm") for number in (0, 1)]
    for path, point in zip(files, POINTS):
        write(path, point, orientation, spacing)
    total = np.swapaxes((DoseGrid(files[0]) + DoseGrid(files[1])).dose_grid, 0, 2)
    places = places_of(POINTS[0], orientation, spacing)
    true = sum(dose(places, point) for point in POINTS)
    inside = (slice(3, -3), slice(5, -5), slice(8, -8))  # away from the end of the second grid
    error = np.abs(total - true)[inside].max()
    print(f"{name:27} largest sum {total.max():.2f} Gy, true {true.max():.2f} Gy; largest error {error:.2f} Gy")
    if abs(error - seen) > 0.02:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the orientation is not used, and the pixel's sides are exchanged")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
