#!/usr/bin/env bash
# nitransforms 25.1.0: one image moved by a list of 2 to 7 affines gives a first volume that is right and other volumes that are
# all 0; with 8 affines or more, all are right.
#
# Input, made here: a smooth volume of 12 x 11 x 10 voxels of 1 x 2 x 3 mm, and affines that shift it by 0, 1 and 2 mm along x.
#
# Expected: volume t of the result is the image moved by affine t, however many affines there are. This is how a mask or a
# field map follows the head through a run of fMRI.
#
# Behaviour: apply (resampling.py) has two ways. From 8 volumes on (serialize_nvols), each volume is resampled by itself. For
# fewer, it makes one 4D grid of coordinates (t, i, j, k) and samples once. A 3D image becomes a 4D one with a single entry
# along t, but the coordinates still run from t = 0 to the number of affines - 1. So all but t = 0 lie outside of the
# image and are filled with cval. With mode="nearest" they are right, since t is clipped to 0. A 4D image is right, as it has an
# entry for each t.
#
# Output seen: largest value in each volume, by the number of affines (it is 0.67 in the image)
#     2 affines:  0.67 0.00
#     3 affines:  0.67 0.00 0.00
#     7 affines:  0.67 0.00 0.00 0.00 0.00 0.00 0.00
#     8 affines:  0.67 0.67 0.67 0.67 0.67 0.67 0.67 0.67
#     3 affines, serialize_nvols=2:  0.67 0.67 0.67
#
# Who is hurt: whoever tries motion parameters on a short run, or splits a long one in pieces of less than 8 volumes. Nothing is
# printed, and the file has the right size.
# Pull request 298 (September 2026, not in a release yet) is about a 4D image with one affine, which fails with an error. We
# found no report of this. serialize_nvols=2 helps.
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
from nitransforms.linear import LinearTransformsMapping
from nitransforms.resampling import apply
from scipy.ndimage import gaussian_filter, shift

warnings.simplefilter("error")  # a warning would be a change
VOXELS = gaussian_filter(np.random.default_rng(0).normal(size=(12, 11, 10)), 1)
IMAGE = nibabel.Nifti1Image(VOXELS, np.diag([1, 2, 3, 1]))


def shifted(count, **options):
    """The volumes of the image moved by affines that pull it by 0, 1, 2, 0, 1, 2... mm along x."""
    affines = np.tile(np.eye(4), (count, 1, 1))
    affines[:, 0, 3] = np.arange(count) % 3
    moved = apply(LinearTransformsMapping(affines, reference=IMAGE), IMAGE, order=1, **options).get_fdata()
    return np.moveaxis(moved.reshape(*IMAGE.shape, count), -1, 0)


print("nitransforms", version("nitransforms"))
changed = []
for label, count, options in (
    ("2 affines", 2, {}),
    ("3 affines", 3, {}),
    ("7 affines", 7, {}),
    ("8 affines", 8, {}),
    ("3 affines, serialize_nvols=2", 3, {"serialize_nvols": 2}),
    ("3 affines, mode='nearest'", 3, {"mode": "nearest"}),
):
    volumes = shifted(count, **options)
    print(f"{label + ':':30}", *(f"{volume.max():.2f}" for volume in volumes))
    for t, volume in enumerate(volumes):
        empty = t > 0 and label in ("2 affines", "3 affines", "7 affines")
        wanted = 0 * VOXELS if empty else shift(VOXELS, (-(t % 3), 0, 0), order=0)
        inside = slice(0, 12 - t % 3)
        if not np.allclose(volume[inside], wanted[inside], atol=1e-5):
            changed.append(f"{label}, volume {t}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: fewer than 8 affines leave all volumes but the first empty")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
