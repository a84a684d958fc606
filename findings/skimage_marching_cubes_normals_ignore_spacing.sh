#!/usr/bin/env bash
# scikit-image 0.26.0: marching_cubes(spacing=...) scales the vertices and not the normals, so that on thick slices the
# normals are not perpendicular to the surface that they come with.
#
# Input, made here: a signed distance to a sphere of 15 mm, sampled on voxels of 1 x 1 x 1 mm and of 3 x 1 x 1 mm
# (spacing=(3, 1, 1)), so that the surface is the same sphere; and a smooth solid of another shape.
#
# Expected: normals along the radius. The vertices are, within 0.15 mm.
#
# Behaviour: the normals are gradients of the volume by index, made to length 1, and marching_cubes only multiplies the
# vertices by the spacing (_marching_cubes_lewiner.py). A gradient in mm is the one by index divided by the spacing;
# what is returned is the normal of the sphere squeezed to equal voxels. Nothing is printed, and the docstring
# says only that the normals are calculated from the data.
#
# Output seen, angle between a normal and the true one, mean and largest, in degrees:
#     sphere, 1 mm                               0.7    2.1
#     sphere, 3 mm slices                       22.2   33.5
#     the same, divided by the spacing           1.1    3.9
#     solid, 3 mm slices, against its own faces 22.7   36.8
# The faces are right: normals from their corners are perpendicular.
#
# Who is hurt: whoever shades, offsets (a margin along the normal), aligns (point to plane) or compares surfaces of CT
# and MR with the returned normals. Pull request 1771 weighed the spacing in a former helper for the order of corners.
# We found no report. What helps: normals / spacing, made to length 1 again, or normals from the faces.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check scikit-image==0.26.0 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
from skimage.measure import marching_cubes

warnings.simplefilter("error")  # a warning would be a change


def grid(spacing):
    """Positions in mm, with 0 in the middle."""
    numbers = [2 * round(24 / step) + 1 for step in spacing]
    return np.stack(np.meshgrid(*[(np.arange(n) - n // 2) * s for n, s in zip(numbers, spacing)], indexing="ij"))


def surface(volume, spacing):
    vertices, faces, normals, _ = marching_cubes(volume, 0, spacing=spacing, gradient_direction="descent")
    return vertices - (np.array(volume.shape) // 2) * spacing, faces, normals


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def angles(one, other):
    return np.degrees(np.arccos(np.clip(np.abs((unit(one) * unit(other)).sum(-1)), 0, 1)))


def from_faces(vertices, faces):
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], np.cross(b - a, c - a))  # weighed by area
    return normals


def sphere(spacing):
    vertices, _, normals = surface(15 - np.sqrt((grid(spacing) ** 2).sum(0)), spacing)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 15).max() < 0.15, "the vertices are no longer right"
    return angles(normals, vertices), angles(normals / spacing, vertices)


def solid(spacing):
    x, y, z = grid(spacing)
    volume = 260 - x**2 - 1.5 * y**2 - 0.8 * z**2 - 60 * np.sin(x / 6) * np.cos(y / 7)
    vertices, faces, normals = surface(volume, spacing)
    return angles(normals, from_faces(vertices, faces)), angles(normals / spacing, from_faces(vertices, faces))


print("scikit-image", version("scikit-image"), "numpy", np.__version__)
thick = (3.0, 1.0, 1.0)
found = {
    "sphere, 1 mm": sphere((1.0, 1.0, 1.0))[0],
    "sphere, 3 mm slices": sphere(thick)[0],
    "sphere, divided by the spacing": sphere(thick)[1],
    "solid, 3 mm slices, against its faces": solid(thick)[0],
    "solid, divided by the spacing": solid(thick)[1],
}
for name, values in found.items():
    print(f"{name:40} mean {values.mean():5.1f}, largest {values.max():5.1f} degrees")
means = [float(values.mean()) for values in found.values()]
if not (means[0] < 1 and abs(means[1] - 22.2) < 1 and means[2] < 2 and means[3] > 15 and means[4] < 5):
    raise SystemExit("the behaviour has changed")
print("as described: the normals are those of voxels with equal sides")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
