#!/usr/bin/env bash
# GateTools 0.12.9: where a structure skips slices, the mask of what comes after the gap is moved over it; and where contours are not
# stored by position, the mask has other slices, up to twice the volume.
#
# Input, made here: a structure of ten squares, one per slice of 3 mm from z = 9 mm to 36 mm, each larger than the one before; the same
# without three slices in its middle; and all ten stored in another order.
#
# Expected: each square on the slice that it was drawn on, and its area, in whatever order they are stored.
#
# Behaviour (roi_utils.py): region_of_interest keeps contours as they are stored, though a comment says that they are sorted.
# Its step is the smallest difference between neighbours in that list, by absolute value, and a slice of the image takes the contour number
# (z - z of the first) / step, without a look at where that contour lies. get_volume() multiplies the area with that step, which is
# negative if the order is from the head to the feet.
#
# Output seen, z of the mask in mm and its voxels in place of 2050 (1487 with a gap); volume in ml in place of 6.0 (4.4):
#     from low to high                        9 to 36                     2050      6.0
#     from high to low                        9 to 36                     2050     -6.0
#     18, 21 and 24 mm left out               9 to 27, without a gap      1487      4.4
#     upper half stored before the lower      24 to 51                    2050      6.0
#     each second one first                   6 to 57, out of order       3394     12.1
# "not one single z step" is logged for the last three, and a mask is returned. get_dvh() uses it.
#
# Who is hurt: whoever takes dose from a structure of two parts (nodes on several levels, both parotids as one), or from a
# system that stores contours as they were drawn. We found no report. What helps: a comparison of the mask with the contours' z.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    gatetools==0.12.9 itk==5.4.7 numpy==2.4.6 scipy==1.17.1 pydicom==3.0.2 matplotlib==3.11.2

cat > "$work/finding.py" <<'PYTHON'
import logging
from importlib.metadata import version

import itk
import numpy as np
from gatetools.roi_utils import region_of_interest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

logging.disable(logging.CRITICAL)
SQUARES = [(float(z), 4.7 + 0.5 * k) for k, z in enumerate(range(9, 37, 3))]  # z and half a side, mm
IMAGE = itk.image_from_array(np.zeros((20, 41, 41), np.float32))
IMAGE.SetSpacing((1, 1, 3))


def structure(squares):
    name, contours, dataset = Dataset(), Dataset(), Dataset()
    name.ROINumber, name.ROIName = 1, "target"
    contours.ReferencedROINumber, contours.ContourSequence = 1, Sequence()
    for z, half in squares:
        contour, reference = Dataset(), Dataset()
        reference.ReferencedSOPInstanceUID = f"1.2.3.{int(z)}"
        contour.ContourImageSequence = Sequence([reference])
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        corners = ((-half, -half), (half, -half), (half, half), (-half, half))
        contour.ContourData = [value for x, y in corners for value in (20 + x, 20 + y, z)]
        contours.ContourSequence.append(contour)
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Sequence([name]), Sequence([contours])
    return dataset


def masked(squares):
    """The voxels of each slice of the mask, by z, and the volume in ml."""
    region = region_of_interest(structure(squares), 1)
    voxels = itk.array_from_image(region.get_mask(IMAGE, corrected=False)).sum((1, 2))
    return {3 * k: int(count) for k, count in enumerate(voxels) if count}, float(region.get_volume()) / 1000


print("gatetools", version("gatetools"))
drawn, _ = masked(SQUARES)
gap = [square for square in SQUARES if square[0] not in (18, 21, 24)]
names, counts = list(drawn), list(drawn.values())
after_gap = dict(zip(range(9, 28, 3), [drawn[int(z)] for z, _ in gap]))
upper_first = dict(zip(range(24, 52, 3), counts[5:] + counts[:5]))
changed = []
if names != [int(z) for z, _ in SQUARES] or not np.allclose(counts, [(2 * half) ** 2 for _, half in SQUARES], rtol=0.15):
    changed.append("in order")
for name, squares, seen, volume in (
    ("from low to high", SQUARES, drawn, 6.0),
    ("from high to low", SQUARES[::-1], drawn, -6.0),
    ("three slices left out", gap, after_gap, 4.4),
    ("upper half first", SQUARES[5:] + SQUARES[:5], upper_first, 6.0),
    ("each second one first", SQUARES[::2] + SQUARES[1::2], None, 12.1),
):
    voxels, ml = masked(squares)
    print(f"{name}: {len(voxels)} slices from {min(voxels)} to {max(voxels)} mm, {sum(voxels.values())} voxels, {ml:.1f} ml")
    right = voxels == seen if seen else (len(voxels), min(voxels), max(voxels)) == (18, 6, 57)
    if not right or not np.isclose(ml, volume, atol=0.06):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: contours are counted, and their positions are not looked at")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
