#!/usr/bin/env bash
# antspyx 0.6.3: from_numpy makes huge positive numbers of the negative voxels of a CT in int16, in silence; the same voxels
# from a file are right.
#
# Input, made here: a CT of 16 x 16 x 16 voxels in Hounsfield units, air (-1000) around fat (-100) around muscle (50).
#
# Expected: ANTs holds four types of voxels: uint8, uint32, float32 and float64. Other types must be converted, and of the
# four, only the floats hold negative numbers. image_read does so: a file of int16 becomes float.
#
# Behaviour: the package has two tables for this. The one for files sends "short" and "int" to float (ants_image_io.py). The
# one for arrays, in infer_dtype, sends every integer to uint32, signed or not, and from_numpy and new_image_like apply it by
# numpy's astype, which wraps: -1000 becomes 4294966296. Nothing is printed.
#
# Output seen:
#     int8, int16, int32 or int64 -1 -> uint32 4294967295;  from a NIfTI file of int16: float32 -1
#     mask of soft tissue (-300 to 300): 512 voxels by image_read, 64 by from_numpy: the fat is gone
#     mean of the CT in HU: -885 by image_read, 4.2e+09 by from_numpy
#
# Who is hurt: whoever hands arrays from pydicom, SimpleITK or nibabel to ANTs. Muscle and bone keep their values, so that a
# window of the viewer shows them, and masks, means, bias fields and registrations are made of the rest.
# Pull request 665 brought the table, for label images in int16, and weighs a warning; negative voxels are not spoken of.
# We found no report. Converting to float32 before helps.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check antspyx==0.6.3 nibabel==5.4.2 numpy==2.3.5

cat > "$work/finding.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import ants
import nibabel
import numpy as np

warnings.simplefilter("error")  # a warning would be a change


def ct():
    hounsfield = np.full((16, 16, 16), -1000, np.int16)
    hounsfield[4:12, 4:12, 4:12] = -100
    hounsfield[6:10, 6:10, 6:10] = 50
    return hounsfield


print("antspyx", version("antspyx"), "numpy", np.__version__)
changed = []
for kind in ("int8", "int16", "int32", "int64"):
    minus_one = np.full((4, 4, 4), -1, kind)
    made = {
        "from_numpy": ants.from_numpy(minus_one),
        "new_image_like": ants.from_numpy(np.zeros((4, 4, 4), np.float32)).new_image_like(minus_one),
    }
    for way, image in made.items():
        found = image.numpy()
        print(f"{way:14} of {kind:5} -1: {found.dtype} {found.flat[0]}")
        if (found != 2**32 - 1).any():
            changed.append(f"{way}, {kind}")

path = str(Path(sys.argv[1]) / "ct.nii")
nibabel.save(nibabel.Nifti1Image(ct(), np.eye(4)), path)
images = {
    "image_read": ants.image_read(path),
    "image_read, type of the file": ants.image_read(path, pixeltype=None),
    "from_numpy, float32 before": ants.from_numpy(ct().astype(np.float32)),
    "from_numpy": ants.from_numpy(ct()),
}
for way, image in images.items():
    soft = int(ants.threshold_image(image.clone("float"), -300, 300).sum())
    print(f"{way:28} {image.pixeltype:12} mean {image.mean():.5g} HU, soft tissue {soft} voxels")
    wrapped = way == "from_numpy"
    if soft != (64 if wrapped else 512) or (image.mean() > 1e9) != wrapped:
        changed.append(way)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: from_numpy wraps negative integers")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
