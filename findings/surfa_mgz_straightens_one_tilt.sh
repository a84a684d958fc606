#!/usr/bin/env bash
# surfa 0.6.3 writes a CT with a gantry tilt of +15 degrees to MGZ as if it were not tilted, up to 16 mm off; -15 degrees is right. And
# cropping (image[2:18, ...]) forgets a tilt of either sign.
#
# Input, made here: a volume of 20 x 22 x 24 voxels of 1 x 1 x 5 mm whose slices are shifted along y by the gantry tilt, as NIfTI has
# it in its sform. (MGZ keeps three direction vectors that need not be at right angles, so it can hold a tilt.)
#
# Expected: each voxel keeps its place: the file read by nibabel, and the geometry of the cropped image, agree with the input.
#
# Behaviour: ImageGeometry.shearless_components (transform/geometry.py) chooses by the shear between two ways. With a shear, it takes
# the columns of the voxel-to-world matrix, which is right. Without, it takes the rotation, which has right angles. The test
# for "with" puts a parenthesis in the wrong place: it takes the absolute value of (shear > 1e-5), not of the shear. So
# a shear that is negative counts as none. The same function serves LTA files and the geometries inside MGZ warps.
# Cropping (image/framed.py) builds a new geometry of rotation, voxel size and centre alone, without the shear.
#
# Output seen, largest distance of a voxel from its place:
#     tilt in degrees             +15      -15
#     MGZ, read by nibabel        15.53 mm  0.00 mm
#     NIfTI, read by nibabel       0.00 mm  0.00 mm
#     cropped by 2 to 4 voxels    11.65 mm 11.65 mm
#
# Who is hurt: users of FreeSurfer's Python tools on CT, and on volumes after an affine registration without resampling. surfa is
# what mri_synthstrip and others of FreeSurfer read and write with.
# For a file, surfa says on reading that the voxel size differs from the scale of the matrix, for both signs alike. It says nothing on
# writing and cropping, nor for a geometry made from a matrix. We found no report.
# Resampling to a grid with right angles before, or writing NIfTI, helps.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check surfa==0.6.3 nibabel==5.4.2 numpy==2.4.6 scipy==1.17.1

cat > "$work/finding.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
import surfa

warnings.simplefilter("ignore", DeprecationWarning)
SHAPE = (20, 22, 24)
VOXELS = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)  # each value once
MGZ, CROPPED = {15: 15.53, -15: 0}, 11.65  # mm
CORNERS = np.array([(i, j, k, 1) for i in (0, 15) for j in (0, 15) for k in (0, 15)]).T


def tilted(degrees):
    """From voxels to RAS millimetres: slices 5 mm apart along the table, in planes that are tilted about x."""
    tilt = np.deg2rad(degrees)
    affine = np.diag([-1.0, -1, 5, 1])
    affine[:3, 2] = 0, 5 * np.sin(tilt), 5 * np.cos(tilt)
    affine[:3, 3] = 10, 11, -12
    return affine


def far(voxels, affine, true):
    """The largest distance in mm between where an image has a value and where the input has it."""
    values = np.asarray(voxels)[tuple(CORNERS[:3])].astype(int)
    places = true @ np.vstack([np.unravel_index(values, SHAPE), np.ones(len(values))])
    return np.linalg.norm((affine @ CORNERS - places)[:3], axis=0).max()


work = Path(sys.argv[1])
print("surfa", version("surfa"))
changed = []
for degrees in (15, -15):
    true = tilted(degrees)
    image = surfa.Volume(VOXELS, geometry=surfa.ImageGeometry(SHAPE, vox2world=true))
    found = {"as given": far(image.data, image.geom.vox2world.matrix, true)}
    for name in ("out.mgz", "out.nii"):
        image.save(work / name)
        read = nibabel.load(work / name)
        found[name] = far(read.get_fdata(), read.affine, true)
    cropped = image[2:18, 2:20, 2:20]
    found["cropped"] = far(cropped.data, cropped.geom.vox2world.matrix, true)
    print(f"tilt of {degrees:+} degrees:", ", ".join(f"{name} {mm:.2f} mm off" for name, mm in found.items()))
    seen = {"as given": 0, "out.mgz": MGZ[degrees], "out.nii": 0, "cropped": CROPPED}
    changed += [f"{name} at {degrees}" for name, mm in found.items() if abs(mm - seen[name]) > 0.02]
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: MGZ loses a positive tilt, and cropping loses both")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
