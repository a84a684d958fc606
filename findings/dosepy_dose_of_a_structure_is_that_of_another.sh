#!/usr/bin/env bash
# Dosepy 0.12.2 gives a structure the dose of another one unless ROI numbers count up from 1 in the order of the contours, and counts what
# lies in a hole twice in place of leaving it out.
#
# Input, made here: an RTDOSE file with a dose of its own in each of four structures, and RTSTRUCT files with these structures, which differ
# in the ROI numbers and in the order of the contours only. One structure is a wall around a hole (CLOSEDPLANAR_XOR).
#
# Expected: the mean dose of a structure does not depend on its number. The standard asks that numbers are unique, no more, and lets
# each item of ROIContourSequence name its structure by ReferencedROINumber. The wall gets 2 Gy.
#
# Behaviour (rtdose.py): get_coordinates takes ROINumber - 1 as index in ROIContourSequence and does not read ReferencedROINumber. Where
# numbers count from 0, the first structure gets the last one's contours, by the index -1. get_dose_in_structure joins the doses
# within each contour, so that the hole's contour adds its pixels a second time.
#
# Output seen, mean dose in Gy (true: 60, 10, 20 and 2):
#                                    Target   Cord   Lung    Wall
#     numbers 1 2 3 4                 60       10     20     18.86
#     numbers 0 1 2 3                 18.86    60     10     20
#     numbers 4 3 2 1                 18.86    20     10     60
#     contours of 2 1 4 3 in a row    10       60     18.86  20
# No message appears.
#
# Who is hurt: whoever reads DVHs with Dosepy from planning systems that count from 0, delete structures or sort contours: the cord gets the
# target's dose. Rectum walls and lungs without the target are holes. We found no report, and its documentation says nothing.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    SimpleITK==2.5.7 scikit-image==0.26.0 pydicom==3.0.2 plotly==7.1.0 numpy==2.4.6 scipy==1.17.1
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps dosepy==0.12.2

cat > "$work/finding.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTDoseStorage, RTStructureSetStorage, generate_uid

warnings.simplefilter("error")  # a warning would be a change
from Dosepy.rtdose import get_dose_in_structure, load_dose, load_structures  # noqa: E402

SHAPE = (9, 40, 40)  # planes, rows, columns of 1 mm
SQUARES = {  # Gy and the squares' outlines in x and y (mm); a second square is a hole
    "Target": (60, [(5.5, 13.5, 5.5, 13.5)]),
    "Cord": (10, [(25.5, 33.5, 5.5, 13.5)]),
    "Lung": (20, [(5.5, 13.5, 25.5, 33.5)]),
    "Wall": (2, [(23.5, 36.5, 23.5, 36.5), (26.5, 32.5, 26.5, 32.5)]),
}
HOLE = 50  # Gy
FILES = {  # ROI numbers, order of the contours, mean doses seen
    "numbers 1 2 3 4": ((1, 2, 3, 4), (0, 1, 2, 3), (60, 10, 20, 18.86)),
    "numbers 0 1 2 3": ((0, 1, 2, 3), (0, 1, 2, 3), (18.86, 60, 10, 20)),
    "numbers 4 3 2 1": ((4, 3, 2, 1), (0, 1, 2, 3), (18.86, 20, 10, 60)),
    "contours of 2 1 4 3 in a row": ((1, 2, 3, 4), (1, 0, 3, 2), (10, 60, 18.86, 20)),
}


def masks_of(square):
    x0, x1, y0, y1 = square
    y, x = np.indices(SHAPE[1:])
    return (x > x0) & (x < x1) & (y > y0) & (y < y1)


def write(path, kind, modality, **elements):
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.Modality, d.PatientID = kind, generate_uid(), modality, "1"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.3", generate_uid(), "1.2.3.5"
    for keyword, value in elements.items():
        setattr(d, keyword, value)
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.save_as(path, enforce_file_format=True)
    return str(path)


def write_dose(path):
    dose = np.zeros(SHAPE)
    for gray, squares in SQUARES.values():
        for value, square in zip((gray, HOLE), squares):
            dose[:, masks_of(square)] = value
    return write(
        path, RTDoseStorage, "RTDOSE", DoseUnits="GY", DoseType="PHYSICAL", DoseSummationType="PLAN", DoseGridScaling=0.001,
        ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1],
        GridFrameOffsetVector=[float(k) for k in range(SHAPE[0])], FrameIncrementPointer=0x3004000C, NumberOfFrames=SHAPE[0],
        Rows=SHAPE[1], Columns=SHAPE[2], SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", PixelRepresentation=0,
        BitsAllocated=32, BitsStored=32, HighBit=31, PixelData=np.round(dose / 0.001).astype("<u4").tobytes(),
    )  # fmt: skip


def contour(square, z):
    x0, x1, y0, y1 = square
    item = Dataset()
    item.ContourGeometricType, item.NumberOfContourPoints = "CLOSEDPLANAR_XOR", 4
    item.ContourData = [x0, y0, z, x1, y0, z, x1, y1, z, x0, y1, z]
    return item


def write_structures(path, numbers, order):
    rois, contours = [], []
    for number, (name, (_, squares)) in zip(numbers, SQUARES.items()):
        roi, outlines = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, "1.2.3.5"
        roi.ROIGenerationAlgorithm = "MANUAL"
        outlines.ReferencedROINumber = number
        outlines.ContourSequence = [contour(square, float(z)) for z in range(2, 7) for square in squares]
        rois.append(roi)
        contours.append(outlines)
    sequences = {"StructureSetROISequence": rois, "ROIContourSequence": [contours[k] for k in order]}
    return write(path, RTStructureSetStorage, "RTSTRUCT", StructureSetLabel="1", **sequences)


print("Dosepy", version("dosepy"))
folder = Path(sys.argv[1])
dose = load_dose(write_dose(folder / "dose.dcm"))
true = [gray for gray, _ in SQUARES.values()]
changed = []
for name, (numbers, order, seen) in FILES.items():
    structures = load_structures(write_structures(folder / "structures.dcm", numbers, order))
    means = [float(np.mean(get_dose_in_structure(dose, structures.get_coordinates(roi)))) for roi in SQUARES]
    print(f"{name:29}" + ", ".join(f"{roi} {mean:.2f}" for roi, mean in zip(SQUARES, means)) + f" Gy; true {true}")
    if not np.allclose(means, seen, atol=0.01):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the ROI number is taken for a position, and holes are added")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
