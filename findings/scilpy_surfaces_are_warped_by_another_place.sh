#!/usr/bin/env bash
# scilpy 2.3.0: a surface that is moved by a displacement field takes the displacement of another place, because its vertices
# in mm are taken for voxel indices.
#
# Input, made here: three vertices and displacement fields on grids of 41^3 voxels: of 1 mm that begin at 0, of 2 mm, and of 1 mm
# centred at 0. Each field moves x by a tenth of x in mm, and y by 0.5 mm. The matrix is the identity.
#
# Expected: each vertex moves by a tenth of its x along x and by 0.5 mm along y, on any grid.
#
# Behaviour: apply_transform makes a second surface, brings it into voxel space and then samples the field at the vertices of the
# first one, which are still in mm (surface_operations.py). Both agree only where the voxel size is 1 mm and the grid
# begins at 0. (The second one is also brought to the corner of voxels, half a voxel off the grid of map_coordinates.)
#
# Output seen, movement in mm for x = 10, 12 and 30 mm (x = -10, -8 and 10 mm in the centred grid):
#     grid                expected                                   found
#     1 mm, from 0        (1, 0.5), (1.2, 0.5), (3, 0.5)             the same
#     2 mm, from 0        (1, 0.5), (1.2, 0.5), (3, 0.5)             (2, 0.5), (2.4, 0.5), (6, 0.5)
#     1 mm, centred       (-1, 0.5), (-0.8, 0.5), (1, 0.5)           (0, 0), (0, 0), (-1, 0.5)
# dipy prints "data_per_vertex has been modified." and nothing of this.
#
# Who is hurt: whoever brings cortical surfaces to diffusion space by scil_surface_apply_transform --in_deformation, for tracking from
# the cortex. We found no report. What helps: a field that is resampled to 1 mm and begins at 0.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==1.26.4 scipy==1.15.3 dipy==1.12.1 nibabel==5.3.2 trimesh==5.2.0
# The wheel pins versions of many packages that this part of it does not import.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps scilpy==2.3.0

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import nibabel
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dipy.io.stateful_surface import StatefulSurface
    from dipy.io.stateful_tractogram import Origin, Space
    from scilpy.surfaces.surface_operations import apply_transform

VERTICES = np.array([[10, 4, 6], [12, 8, 20], [30, 10, 15]], np.float32)


def moved(vertices, size, start):
    """How far apply_transform moves the vertices, in mm, through a field on a grid of this voxel size and start."""
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = start
    indices = np.stack(np.meshgrid(*[np.arange(41.0)] * 3, indexing="ij"), -1)
    field = np.zeros((41, 41, 41, 3), np.float32)
    field[..., 0] = 0.1 * (size * indices[..., 0] + start)
    field[..., 1] = 0.5
    grid = nibabel.Nifti1Image(np.zeros((41, 41, 41), np.float32), affine)
    surface = StatefulSurface(vertices.copy(), np.array([[0, 1, 2]]), grid, space=Space.RASMM, origin=Origin.NIFTI)
    after = apply_transform(surface, np.eye(4), grid, nibabel.Nifti1Image(field, affine))
    after.to_rasmm()
    return after.vertices - vertices


print("scilpy", version("scilpy"), "dipy", version("dipy"))
changed = []
for name, size, start, shift, seen in (
    ("1 mm, from 0", 1, 0, 0, [(1, 0.5), (1.2, 0.5), (3, 0.5)]),
    ("2 mm, from 0", 2, 0, 0, [(2, 0.5), (2.4, 0.5), (6, 0.5)]),
    ("1 mm, centred", 1, -20, -20, [(0, 0), (0, 0), (-1, 0.5)]),
):
    vertices = VERTICES + np.array([shift, 0, 0], np.float32)
    found = moved(vertices, size, start)
    expected = [(round(0.1 * float(x), 2), 0.5) for x in vertices[:, 0]]
    print(f"{name}: expected {expected}, found {[tuple(row) for row in found[:, :2].round(2).tolist()]}")
    if not np.allclose(found[:, :2], seen, atol=0.01):
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: mm are taken for voxels")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
