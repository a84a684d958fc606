#!/usr/bin/env bash
# TorchIO 1.2.1: RandomElasticDeformation(locked_borders=2), the default, holds the faces of the first two axes and
# leaves those of the third one free.
#
# Input, made here: a cube of 40^3 voxels of 1 mm and value 1, with one 0 in the middle, and 7 control points along each
# axis with displacements of at most 2.5 mm, ten seeds.
#
# Expected: by the docstring, 1 sets the control points on the border of the coarse grid to 0, which lie outside of the
# image, and 2 those on the border of the image as well. A cubic B-spline then moves the border by at most a sixth of
# a free control point. That is under half a voxel here, so that nothing from outside comes in.
#
# Behaviour: get_params makes a field of nx x ny x nz x 3 and sets its two outer layers to 0 along the first and the
# second axis. The line for the third one is missing (random_elastic_deformation.py).
#
# Output seen, for the faces of axis 0, 1 and 2:
#     largest control point in the two outer layers      0.0  0.0  2.5 mm
#     farthest that a voxel of a face is moved           0.5  0.5  1.8 mm
#     voxels of the faces that are filled (mean)         0.0  0.0  8.4 %
# After the same image with its axes in reverse order, the faces of another anatomical axis are free: what is held
# depends on how the file is stored. With locked_borders=0, all three axes look as axis 2 does here.
#
# Who is hurt: whoever relies on a border that does not move, as for patches that are put back, or heads that reach the
# top and the bottom of the image: with the default of 7.5 mm, the outer slices are filled with the image's minimum in
# places, and label maps with 0. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torchio==1.2.1 SimpleITK==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version
from itertools import product

import numpy as np
import torch
import torchio

warnings.simplefilter("error")  # a warning would be a change
SIZE, LARGEST, SEEDS = 40, 2.5, 10


def cube():
    voxels = torch.ones(1, SIZE, SIZE, SIZE)
    voxels[0, SIZE // 2, SIZE // 2, SIZE // 2] = 0
    return torchio.ScalarImage(tensor=voxels)


def outer(control_points, axis):
    return np.abs(np.take(control_points, [0, 1, -2, -1], axis=axis)).max()


def farthest(transform, axis):
    """How far points of the two faces are moved, at most, in mm; the affine is the identity but for RAS to LPS."""
    lengths = []
    for end, *rest in product((0, SIZE - 1), range(0, SIZE, 3), range(0, SIZE, 3)):
        rest.insert(axis, end)
        point = (-float(rest[0]), -float(rest[1]), float(rest[2]))
        lengths.append(np.linalg.norm(np.subtract(transform.TransformPoint(point), point)))
    return max(lengths)


def filled(voxels, axis):
    return 100 * (np.take(voxels, [0, -1], axis=axis) < 0.5).mean()


def measured(locked):
    rows = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        random = torchio.RandomElasticDeformation(7, LARGEST, locked_borders=locked)
        out = random(torchio.Subject(image=cube()))
        used = out.history[0]
        transform = used.get_bspline_transform(cube().as_sitk())
        voxels = out.image.numpy()[0]
        row = [(outer(used.control_points, a), farthest(transform, a), filled(voxels, a)) for a in range(3)]
        rows.append(np.transpose(row))
    rows = np.array(rows)
    return np.stack([rows[:, 0].max(0), rows[:, 1].max(0), rows[:, 2].mean(0)])


print("torchio", version("torchio"), "torch", torch.__version__)
changed = []
for locked in (0, 2):
    points, moved, share = measured(locked)
    print(f"locked_borders={locked}, faces of axis 0, 1 and 2:")
    print("    largest control point in the two outer layers", *(f"{v:6.2f}" for v in points), "mm")
    print("    farthest that a voxel of a face is moved     ", *(f"{v:6.2f}" for v in moved), "mm")
    print("    voxels of the faces that are filled          ", *(f"{v:6.1f}" for v in share), "%")
    free = points > 0.9 * LARGEST
    if free.tolist() != [locked == 0, locked == 0, True] or (share > 5).tolist() != free.tolist():
        changed.append(str(locked))
    if (moved < LARGEST / 4).tolist() != (~free).tolist():
        changed.append(f"{locked}, distances")
if changed:
    raise SystemExit("the behaviour has changed: locked_borders " + "; ".join(changed))
print("as described: the third axis is not locked")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
