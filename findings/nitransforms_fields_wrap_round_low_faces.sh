#!/usr/bin/env bash
# nitransforms 25.1.0: resampled through a displacement field that is 0 everywhere, onto a grid that begins 3 voxels before the field, an
# image shows its far end at its near end.
#
# Input, made here: an image of 12 x 11 x 10 voxels of 1 x 2 x 3 mm, a field of zeros on its grid, and a grid of 9 x 11 x 10 voxels that
# begins 3 voxels earlier along x.
#
# Expected: 0 in the first 3 slices, which lie outside of the image, and the image's first 6 slices after them. An affine of the identity
# gives this, and so does the field on a grid that is a tenth of a voxel off.
#
# Behaviour: DenseFieldTransform.map (nonlinear.py) looks whether all points lie on the field's voxels. If not, it interpolates, and
# points outside of the field stay where they are. If so, it takes the field's array at their indices, without asking whether they are
# inside. An index of -1 is the last one for numpy. As the array holds the places that voxels go to, a point 1 mm before the
# field goes to its far end. (Beyond the far end, the same lookup is an IndexError.)
#
# Output seen:
#     the point (-1, 0, 0) goes to (11, 0, 0); (-1.1, 0, 0) stays
#     slices 0 to 2 of the result are slices 9 to 11 of the image
#
# Who is hurt: whoever applies a field onto a larger field of view, or maps landmarks that lie just outside of it. Edges of a head
# that was cut off appear on the other side. We found no report. Padding the field with zeros before helps.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    nitransforms==25.1.0 nibabel==5.4.2 scipy==1.17.1 numpy==2.4.6 h5py==3.16.0

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import nibabel
import numpy as np
from nitransforms.linear import Affine
from nitransforms.nonlinear import DenseFieldTransform
from nitransforms.resampling import apply

warnings.simplefilter("error")  # a warning would be a change
VOXELS = np.random.default_rng(0).uniform(1, 2, (12, 11, 10))
IMAGE = nibabel.Nifti1Image(VOXELS, np.diag([1, 2, 3, 1]))
FIELD = DenseFieldTransform(nibabel.Nifti1Image(np.zeros((*VOXELS.shape, 3)), IMAGE.affine))


def resampled(transform, before):
    """The image through the transform, on a grid of 9 slices that begins so many mm before it along x."""
    affine = IMAGE.affine.copy()
    affine[0, 3] = -before
    grid = nibabel.Nifti1Image(np.zeros((9, 11, 10)), affine)
    return apply(transform, IMAGE, reference=grid, order=1).get_fdata()


def described(slices):
    """Which slices of the image these are."""
    same = [[k for k in range(12) if np.allclose(one, VOXELS[k], atol=1e-4)] for one in slices]
    return ["empty" if not one.any() else f"{k[0]}" if k else "other" for one, k in zip(slices, same)]


print("nitransforms", version("nitransforms"))
changed = []
for point, seen in (((-1, 0, 0), (11, 0, 0)), ((-1.1, 0, 0), (-1.1, 0, 0)), ((5, 2, 3), (5, 2, 3))):
    found = FIELD.map(np.array([point], float))[0]
    print(f"a field of zeros takes {point} to {found.round(3).tolist()}")
    if not np.allclose(found, seen, atol=1e-5):
        changed.append(f"point {point}")
rest = [str(k) for k in range(6)]
for name, transform, before, seen in (
    ("an identity", Affine(np.eye(4)), 3, ["empty"] * 3 + rest),
    ("a field of zeros", FIELD, 3, ["9", "10", "11", *rest]),
    ("a field of zeros, 0.1 mm off", FIELD, 3.1, ["empty"] * 4 + ["other"] * 5),
):
    found = described(resampled(transform, before))
    print(f"slices of the image through {name}:", *found)
    if found != seen:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: points before the field are taken from its far end")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
