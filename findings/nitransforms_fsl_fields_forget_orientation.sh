#!/usr/bin/env bash
# nitransforms 25.1.0 reads and writes FSL's displacement fields wrong unless the image is stored along R or L, A and S: for a sagittal or
# an LPS image, the error is larger than the displacements.
#
# Input, made here: a smooth field of displacements of 2.6 mm (root mean square), in millimetres of RAS, on grids of 14 x 15 x 16 voxels
# in five orientations. fslpy, FSL's own package, writes it as a field of FNIRT, with the same grid for both images.
#
# Expected: nitransforms reads the field that fslpy wrote. FSL's coordinates are the voxel's indices times the voxel's size, with the first
# axis reversed if the affine's determinant is positive. So displacements have to be taken to RAS by the directions of the grid.
#
# Behaviour: FSLDisplacementsField (io/fsl.py) changes the sign of the first component and nothing else, in both directions. This is right
# if each axis of the grid runs along the patient's x, y and z in that order, and y and z are not reversed. (The first may be: FSL
# reverses it itself.) The class for affine matrices does take both images' orientations into account. The same holds for writing:
# reading its own file gives the first field back, so a round trip does not show it.
#
# Output seen, error of the displacements (root mean square):
#     RAS, LAS                    0.00 mm
#     LPS                         4.38 mm
#     PSR, as sagittal scans are  3.76 mm
#     LAS, rotated by 17 degrees  0.65 mm
#
# Who is hurt: whoever converts fields between FSL and ANTs, or applies FSL's fields with nitransforms, on scans that were not brought
# to standard orientation first (fslreorient2std helps, but for oblique scans).
# Issue 157 says this about AFNI's fields. We found no report about FSL's.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    nitransforms==25.1.0 fslpy==3.29.1 nibabel==5.4.2 scipy==1.17.1 numpy==2.4.6 h5py==3.16.0

cat > "$work/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
from fsl.data.image import Image
from fsl.transform.fnirt import fromFnirt, readFnirt, toFnirt
from fsl.transform.nonlinear import DeformationField
from nitransforms.nonlinear import DenseFieldTransform
from nitransforms.nonlinear import load as load_field
from scipy.ndimage import gaussian_filter

SHAPE = (14, 15, 16)
LPS, PSR, ROTATED = 4.38, 3.76, 0.65  # mm
FIELD = 20 * gaussian_filter(np.random.default_rng(0).normal(size=(*SHAPE, 3)), (2, 2, 2, 0))
COS, SIN = np.cos(0.3), np.sin(0.3)
GRIDS = {  # the columns are the steps along i, j and k in mm of RAS; and the error that is seen
    "RAS": (np.diag([1, 1.5, 2]), 0),
    "LAS": (np.diag([-1, 1.5, 2]), 0),
    "LPS": (np.diag([-1, -1.5, 2]), LPS),
    "PSR": (np.array([[0, 0, 2], [-1, 0, 0], [0, 1.5, 0]]), PSR),
    "LAS, rotated": (np.array([[1, 0, 0], [0, COS, -SIN], [0, SIN, COS]]) @ np.diag([-1, 1.5, 2]), ROTATED),
}


def rms(vectors):
    return np.sqrt((vectors**2).sum(-1).mean())


work = Path(sys.argv[1])
print("nitransforms", version("nitransforms"), "fslpy", version("fslpy"), f"displacements of {rms(FIELD):.2f} mm")
places = np.moveaxis(np.indices(SHAPE), 0, -1)
changed = []
for name, (steps, seen) in GRIDS.items():
    affine = nibabel.affines.from_matvec(steps, (3, 4, 5))
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), affine), work / "grid.nii")
    grid = Image(str(work / "grid.nii"))
    header = nibabel.Nifti1Image(FIELD, affine).header
    given = {"src": grid, "ref": grid, "defType": "relative"}
    field = DeformationField(FIELD, srcSpace="world", refSpace="world", header=header, xform=affine, **given)
    toFnirt(field).save(str(work / "warp.nii"))

    again = fromFnirt(readFnirt(str(work / "warp.nii"), grid, grid, "relative"), "world", "world").data
    assert np.allclose(again, FIELD, atol=1e-6), "fslpy no longer reads what it wrote"
    ras = nibabel.affines.apply_affine(affine, places).reshape(-1, 3)
    read = (load_field(work / "warp.nii", fmt="fsl").map(ras) - ras).reshape(FIELD.shape)

    ours = DenseFieldTransform(nibabel.Nifti1Image(FIELD, affine))
    ours.to_filename(work / "written.nii", fmt="fsl")
    written = nibabel.load(work / "written.nii")
    written.header["intent_code"] = 2006  # FSL's mark for a displacement field, which nitransforms leaves out
    nibabel.save(written, work / "marked.nii")
    by_fsl = fromFnirt(readFnirt(str(work / "marked.nii"), grid, grid, "relative"), "world", "world").data
    errors = rms(read - FIELD), rms(by_fsl - FIELD)
    print(f"{name:14} read from fslpy: {errors[0]:.2f} mm off; written for fslpy: {errors[1]:.2f} mm off")
    if max(abs(error - seen) for error in errors) > 0.01:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: only the sign of the first component is changed, whatever the orientation")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
