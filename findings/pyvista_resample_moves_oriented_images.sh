#!/usr/bin/env bash
# PyVista 0.49.1: ImageData.resample(), with its default border, moves an image that has a direction matrix, by half a voxel to several
# voxels, and a cropped one by centimetres.
#
# Input, made here: an image of 40 x 36 x 28 voxels of 1 x 2 x 3 mm whose values are the x, y or z of each voxel, along the axes (identity),
# in the order of a NIfTI file (x and y descend), rotated by 90 degrees and tilted; and the same cropped to a part of itself.
#
# Expected: away from the border, linear interpolation of a coordinate is that coordinate where the new voxel is, as it is
# without a direction matrix, and with extend_border=False where the image is not cropped.
#
# Behaviour: the new first voxel lies (new - old spacing) / 2 from the old one, and in a cropped image also the offset
# times the change of spacing. resample leaves both to a filter of VTK that adds them to the origin along x, y and z as if the direction
# matrix were the identity, and then keeps that matrix (image_data.py). In points_to_cells() and extract_subset() the
# same step is rotated.
#
# Output seen, how far the content is moved (x, y, z in mm):
#                            identity   x and y descend       90 degrees          tilted by 17 degrees
#     twice the voxels       0          -0.5, -1.0, 0         -0.75, -0.25, 0     -0.16, 0.05, 0
#     half the voxels        0          1.0, 2.0, 0           1.5, 0.5, 0         0.31, -0.10, 0
#     a quarter of them      0          3.0, 6.0, 0           4.5, 1.5, 0         0.94, -0.31, 0
#     cropped, half          0          -11.0, -14.0, 0       -12.5, -1.5, 0      -2.29, 1.30, 0
# Nothing is printed. Voxel sizes and the direction matrix are right.
#
# Who is hurt: whoever resamples an image and a mask apart, measures in mm, or lays the result over a mesh. Issue 8659 reported this for
# extract_subset, where it is mended. We found no report of this one. What helps: extend_border=False and extract_subset.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyvista==0.49.1 vtk==9.7.2 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import pyvista

warnings.simplefilter("error")  # a warning would be a change
INSIDE = (slice(2, -2),) * 3
TURN = np.radians(17)
DIRECTIONS = {
    "identity": np.eye(3),
    "x and y descend": np.diag([-1.0, -1.0, 1.0]),
    "90 degrees": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "tilted": np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]]),
}


def image(direction, axis):
    made = pyvista.ImageData(dimensions=(40, 36, 28), spacing=(1, 2, 3), origin=(5, -3, 2))
    made.direction_matrix = direction
    made["coordinate"] = made.points[:, axis].copy()
    return made


def moved(direction, change):
    """How far each coordinate of the content is from where its voxel is, in mm; the same for all voxels inside."""
    found = []
    for axis in range(3):
        after = change(image(direction, axis))
        difference = (after.points[:, axis] - after["coordinate"]).reshape(after.dimensions, order="F")[INSIDE]
        assert np.ptp(difference) < 0.01, "the content is not only moved"
        found.append(float(difference.mean()))
    return np.array(found)


def cropped(rate, **options):
    return lambda made: made.crop(extent=(6, 33, 4, 31, 4, 23)).resample(rate, "linear", **options)


def whole(rate, **options):
    return lambda made: made.resample(rate, "linear", **options)


print("pyvista", version("pyvista"), "vtk", version("vtk"))
nothing = dict.fromkeys(DIRECTIONS, (0, 0, 0))
changed = []
for name, change, seen in (
    ("twice the voxels", whole(2), dict(zip(DIRECTIONS, ((0, 0, 0), (-0.5, -1, 0), (-0.75, -0.25, 0), (-0.16, 0.05, 0))))),
    ("half the voxels", whole(0.5), dict(zip(DIRECTIONS, ((0, 0, 0), (1, 2, 0), (1.5, 0.5, 0), (0.31, -0.1, 0))))),
    ("a quarter of the voxels", whole(0.25), dict(zip(DIRECTIONS, ((0, 0, 0), (3, 6, 0), (4.5, 1.5, 0), (0.94, -0.31, 0))))),
    ("a quarter, extend_border=False", whole(0.25, extend_border=False), nothing),
    ("cropped", lambda made: made.crop(extent=(6, 33, 4, 31, 4, 23)), nothing),
    ("cropped, half the voxels", cropped(0.5), dict(zip(DIRECTIONS, ((0, 0, 0), (-11, -14, 0), (-12.5, -1.5, 0), (-2.29, 1.3, 0))))),
    ("points to cells and back", lambda made: made.points_to_cells().cells_to_points(), nothing),
):
    for orientation, direction in DIRECTIONS.items():
        found = moved(direction, change)
        print(f"{name}, {orientation}: moved by", *(f"{mm + 0:.2f}" for mm in found.round(2) + 0.0), "mm")
        if not np.allclose(found, seen[orientation], atol=0.02):
            changed.append(f"{name}, {orientation}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the step to the new origin is not rotated")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
