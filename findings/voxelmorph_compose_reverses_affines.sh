#!/usr/bin/env bash
# VoxelMorph 0.3.4 (the PyTorch version): an affine matrix moves an image one way, and the same matrix composed with a
# displacement field of zeros moves it the other way. Rotations about two of three axes have the opposite sign.
#
# Input, made here: an image with one bright voxel in the middle of 21^3, a translation by 3 voxels along the first
# axis, a rotation by 20 degrees, a scaling, and a field of zeros.
#
# Expected: composing with the identity changes nothing: spatial_transform(image, compose([A, zeros])) is
# spatial_transform(image, A). And a positive angle has one sense, counter-clockwise about each axis, in 2D and 3D.
#
# Behaviour: spatial_transform inverts a matrix before it makes a field of it, so that the image moves as the matrix
# says. compose makes a field of it by the same helper without the inversion, as affine_to_disp does, whose docstring
# asks for a matrix from target to source (voxelmorph/nn/functional.py). No function says which of the two it takes. Two
# matrices are composed to one of 3 x 4, which spatial_transform lists as allowed and cannot invert: RuntimeError. In
# the rotation matrices of 3D, the sines about the first and the third axis have the other sign than about the second
# one and in 2D.
#
# Output seen, voxels that the bright voxel moves along the first axis:
#     spatial_transform(image, A)                         3
#     spatial_transform(image, compose([A]))              3
#     spatial_transform(image, compose([A, zeros]))      -3
#     spatial_transform(image, compose([zeros, A]))      -3
#     spatial_transform(image, affine_to_disp(A))        -3
# A ball of 12 voxels that A magnifies by 1.25 has 1.95 times as many voxels by A and 0.51 times by compose([A, zeros]).
# Angles that scipy reads from the matrices for +20 degrees: 3D -20, 20, -20, and 2D 20.
#
# Who is hurt: whoever joins an affine registration with a deformable one: with compose, the
# affine part goes the wrong way. Symmetric random augmentation does not show it. We found no report. The README warns
# that interfaces may change. What helps: torch.linalg.inv(A) in compose and affine_to_disp.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    voxelmorph==0.3.4 neurite==0.3.4 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from voxelmorph.functional import affine_to_disp, compose, params_to_affine, spatial_transform

SHAPE, MIDDLE = (21, 21, 21), 10


def moved(transform):
    image = torch.zeros(SHAPE)
    image[MIDDLE, MIDDLE, MIDDLE] = 1
    (place,) = np.argwhere(spatial_transform(image, transform).numpy() > 0.5)
    return (place - MIDDLE).tolist()


def magnified(transform):
    squares = ((torch.stack(torch.meshgrid(*[torch.arange(41.0)] * 3, indexing="ij")) - 20) ** 2).sum(0)
    ball = (squares < 12**2).float()
    return float(spatial_transform(ball, transform).sum() / ball.sum())


print(*(f"{name} {version(name)}" for name in ("voxelmorph", "neurite", "torch")))
shift, zeros = params_to_affine(3, translation=torch.tensor([3.0, 0.0, 0.0])), torch.zeros(3, *SHAPE)
assert torch.equal(shift[:3, 3], torch.tensor([3.0, 0.0, 0.0]))
found = {
    "A": moved(shift),
    "compose([A])": moved(compose([shift])),
    "compose([A, zeros])": moved(compose([shift, zeros])),
    "compose([zeros, A])": moved(compose([zeros, shift])),
    "affine_to_disp(A)": moved(affine_to_disp(shift, shape=SHAPE)),
}
for name, voxels in found.items():
    print(f"spatial_transform(image, {name:20}) moves the voxel by", voxels)
scale = params_to_affine(3, scale=torch.tensor([1.25, 1.25, 1.25]))
volumes = magnified(scale), magnified(compose([scale, torch.zeros(3, 41, 41, 41)]))
print(f"volume of a ball, magnified by 1.25: {volumes[0]:.2f} by A, {volumes[1]:.2f} by compose([A, zeros])")
angles = []
for axis in range(3):
    degrees = torch.zeros(3)
    degrees[axis] = 20.0
    matrix = params_to_affine(3, rotation=degrees)[:3, :3].double().numpy()
    angles.append(round(float(np.degrees(Rotation.from_matrix(matrix).as_rotvec()[axis])), 3))
plane = params_to_affine(2, rotation=torch.tensor([20.0])).double().numpy()
angles.append(round(float(np.degrees(np.arctan2(plane[1, 0], plane[0, 0]))), 3))
print("angles of the matrices for +20 degrees, about axis 0, 1, 2, and in 2D:", *angles)
try:
    spatial_transform(torch.zeros(SHAPE), compose([shift, torch.eye(4)]))
    refused = False
except RuntimeError as error:
    refused = True
    print("compose of two matrices:", str(error)[:90])
if list(found.values()) != [[3, 0, 0]] * 2 + [[-3, 0, 0]] * 3 or not refused:
    raise SystemExit("the behaviour has changed: translations")
if abs(volumes[0] - 1.25**3) > 0.05 or abs(volumes[1] - 1.25**-3) > 0.05:
    raise SystemExit("the behaviour has changed: scaling")
if angles != [-20.0, 20.0, -20.0, 20.0]:
    raise SystemExit("the behaviour has changed: rotations")
print("as described: compose takes the inverse of what spatial_transform takes")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
