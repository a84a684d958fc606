#!/usr/bin/env bash
# TorchIO 1.2.1: Affine and RandomAffine take degrees, scales and translation along the patient's axes, where the
# documentation says the image's own; a 2D slice that is not axial is rotated out of its plane and comes out mostly
# empty.
#
# Input, made here: one bright voxel in a volume stored in PIR order; and an axial, a coronal and a sagittal slice of
# 64 x 64 x 1 voxels, 1 x 1 x 4 mm, of positive values.
#
# Expected: the docstring of RandomAffine has this example: a translation by (10, 20, 30) moves a RAS image 10 mm to the
# right, 20 to the front and 30 upwards, and a PIR image 10 mm to the back, 20 downwards and 30 to the right. For 2D
# images the code sets degrees[0] and degrees[1] to 0 and scales[2] to 1, so that a slice should stay in its plane.
#
# Behaviour: Affine.get_affine_transform gives the three numbers to SimpleITK after a change of signs from RAS to LPS,
# and SimpleITK takes them along the patient's axes, whatever the directions of the image are. So
# - the PIR volume moves to the right, to the front and upwards, as a RAS one does;
# - the third axis, the only one that a 2D image is rotated about, is the patient's from feet to head. For sagittal
#   and coronal slices it lies in the plane. Each voxel farther from it than 2 mm / sin(angle), where 2 mm is half the
#   thickness of the slice, is taken from outside of the slice, and filled.
#
# Output seen:
#     PIR volume, translation=(2, 3, 4): right 2, front 3, up 4 mm; documented: back 2, down 3, right 4
#     filled in a slice, degrees=(0, 0, 10): axial 7 %, coronal 62 %, sagittal 62 %
# The voxels of the three slices are the same; only their affines differ.
# Nothing is printed.
#
# Who is hurt: whoever augments sagittal or coronal 2D slices (spine, knee, heart) that have their DICOM or NIfTI
# geometry; and whoever gives different ranges for the three axes of volumes that are not in RAS order. ToCanonical
# before helps volumes. For slices, an affine of their own (np.eye(4)) helps. Issues 812 and 710 discuss signs. We found
# no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torchio==1.2.1 SimpleITK==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import torch
import torchio

warnings.simplefilter("error")  # a warning would be a change
SPACING = (1.0, 1.0, 4.0)
# rows: right, front, up; columns: the axes of the array
PIR = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
PLANES = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
}


def image(voxels, directions, spacing=(1.0, 1.0, 1.0)):
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    return torchio.ScalarImage(tensor=voxels, affine=affine)


def movement():
    voxels = torch.zeros(1, 21, 21, 21)
    voxels[0, 10, 10, 10] = 1
    given = image(voxels, PIR)
    assert given.orientation == ("P", "I", "R")
    out = torchio.Affine(scales=(1, 1, 1), degrees=(0, 0, 0), translation=(2, 3, 4))(given)
    (index,) = np.argwhere(out.numpy()[0] > 0.5)
    return (PIR @ (index - 10)).tolist()


def filled(plane, transform):
    torch.manual_seed(1)
    voxels = 1 + torch.rand(1, 64, 64, 1)
    given = image(voxels, PLANES[plane], SPACING)
    assert given.is_2d()
    return 100 * float((transform(given).data < 0.5).float().mean())


print("torchio", version("torchio"), "torch", torch.__version__)
moved = movement()
print("PIR volume, translation=(2, 3, 4): right, front, up", moved, "mm; documented [4, -2, -3]")
rotation = torchio.Affine(scales=(1, 1, 1), degrees=(0, 0, 10), translation=(0, 0, 0), default_pad_value=0)
shares = {plane: filled(plane, rotation) for plane in PLANES}
for plane, share in shares.items():
    print(f"{plane:9} slice, degrees=(0, 0, 10): {share:5.1f} % are filled")
changed = []
if moved != [2, 3, 4]:
    changed.append("translation")
if not shares["axial"] < 12 or not min(shares["coronal"], shares["sagittal"]) > 55:
    changed.append("rotation of slices")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the axes are the patient's")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
