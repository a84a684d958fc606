#!/usr/bin/env bash
# cornucopia 0.5.1: DilateLabelTransform with a radius of n dilates by n - 1 voxels, and with a radius of 1 not at all.
#
# Input, made here: a label map of 32^3 voxels with a cube of 10^3 voxels.
#
# Expected: "Dilation radius (per label)": a cube dilated with a radius of 1 becomes 12 voxels wide, as with
# scipy's binary_dilation. ErodeLabelTransform of the package takes off n voxels on each side with a radius of n.
#
# Behaviour: the signed distance of the nearest voxel outside is 1 in each of the three methods (conv, l1, l2), and
# voxels are labelled where it is < radius (cornucopia/labels.py), which the nearest are not for a radius of 1.
# For the erosion, -1 is the voxel at the border, and < -radius takes it off.
#
# Output seen, width in voxels of the cube of 10 after a dilation or erosion, the same with each method:
#     radius    scipy dilates    cornucopia dilates    scipy erodes    cornucopia erodes
#     1         12               10                    8               8
#     2         14               12                    6               6
#     3         16               14                    4               4
#     4         18               16                    2               2
# Nothing is printed. By the default radius, 3, two voxels are added.
#
# Who is hurt: whoever makes training labels with it, or opens and closes labels by the pair: an erosion and then a
# dilation with the same radius leaves a cube two voxels smaller. We found no report. What helps: a radius larger by 1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
from scipy import ndimage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia.labels import DilateLabelTransform, ErodeLabelTransform

cube = torch.zeros(1, 32, 32, 32, dtype=torch.long)
cube[:, 10:20, 10:20, 10:20] = 1
plain = cube[0].numpy() == 1


def width(found):
    return int(found[15, 15].sum())


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
for method in ("conv", "l1", "l2"):
    for radius in (1, 2, 3, 4):
        dilated = width(DilateLabelTransform(1, radius, method)(cube)[0] == 1)
        eroded = width(ErodeLabelTransform(1, radius, method)(cube)[0] == 1)
        true_dilated = width(ndimage.binary_dilation(plain, iterations=radius))
        true_eroded = width(ndimage.binary_erosion(plain, iterations=radius))
        print(f"{method:4s} radius {radius}: dilation {true_dilated} by scipy, {dilated} by cornucopia; "
              f"erosion {true_eroded}, {eroded}")  # fmt: skip
        if eroded != true_eroded:
            raise SystemExit("the behaviour has changed: erosion")
        if dilated != true_dilated - 2:
            raise SystemExit("the behaviour has changed: dilation")
if not torch.equal(DilateLabelTransform(1, 1)(cube), cube):
    raise SystemExit("the behaviour has changed: a radius of 1")
opened = width(DilateLabelTransform(1, 3)(ErodeLabelTransform(1, 3)(cube))[0] == 1)
print("eroded and dilated with a radius of 3:", opened, "voxels wide")
if opened != 8:
    raise SystemExit("the behaviour has changed: opening")
print("as described: the dilation is a voxel short")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
