#!/usr/bin/env bash
# cornucopia 0.5.1: the inverse of Rot90Transform leaves the volume as it is, and that of a cyclic PermuteAxesTransform
# permutes it once more the same way.
#
# Input, made here: a cube of 32^3 voxels with a label off its centre (a block of 10 x 14 x 18 voxels).
#
# Expected: t.inverse(t(x)) gives x back for a flip, a rotation by 90 or 180 degrees, and a permutation of the axes:
# each has an exact inverse, and the method is described as "Apply the inverse transform recursively".
#
# Behaviour: Rot90Transform has no inverse of its own, and the base class then returns IdentityTransform (a comment
# there says: rather than raising an error). PermuteAxesTransform.make_inverse (cornucopia/fov.py) computes
# [i[p] for p in permutation] with i = range(n), which is the permutation itself: right for a swap of two axes, wrong
# for (1, 2, 0) and (2, 0, 1). FlipTransform is right. In a sequence the inverses of the others are applied all the
# same.
#
# Output seen, the Dice of the label and t.inverse(t(label)):
#     flip of an axis               1.000
#     permutation (2, 1, 0)         1.000
#     permutation (1, 2, 0)         0.229
#     permutation (2, 0, 1)         0.229
#     rotation by 90, axis 0        0.667
#     rotation by 180, axis 0       0.508
#     flip, then rotation by 90     0.667
# Where all axes are equally long the shape fits, so nothing is noticed; no error, no warning.
#
# Who is hurt: whoever predicts on turned volumes and maps the predictions back with `inverse` (augmentation at test
# time): they are averaged in the wrong place. We found no report. What helps: torch.rot90 and permute with argsort, or
# a second Rot90Transform with the opposite `negative`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia import FlipTransform, PermuteAxesTransform, Rot90Transform, SequentialTransform

label = torch.zeros(1, 32, 32, 32)
label[:, 4:14, 6:20, 8:26] = 1


def back(transform):
    found = transform.inverse(transform(label))
    return float(2 * (found * label).sum() / (found.sum() + label.sum()))


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
right = {
    "flip of an axis": FlipTransform(0),
    "permutation (2, 1, 0)": PermuteAxesTransform([2, 1, 0]),
    "two rotations by 90, to and fro": SequentialTransform([Rot90Transform(0), Rot90Transform(0, negative=True)]),
}
wrong = {
    "permutation (1, 2, 0)": PermuteAxesTransform([1, 2, 0]),
    "permutation (2, 0, 1)": PermuteAxesTransform([2, 0, 1]),
    "rotation by 90, axis 0": Rot90Transform(0),
    "rotation by 180, axis 0": Rot90Transform(0, double=True),
    "flip, then rotation by 90": SequentialTransform([FlipTransform(0), Rot90Transform(0)]),
}
for name, transform in {**right, **wrong}.items():
    dice = back(transform)
    print(f"{name:32s} {dice:.3f}")
    if (dice == 1) != (name in right):
        raise SystemExit(f"the behaviour has changed: {name}")
uneven = torch.rand(1, 4, 5, 6)
shape = tuple(PermuteAxesTransform([1, 2, 0]).inverse(PermuteAxesTransform([1, 2, 0])(uneven)).shape)
print("shape (1, 4, 5, 6), permuted by (1, 2, 0) and back:", shape)
if shape != (1, 6, 4, 5):
    raise SystemExit("the behaviour has changed: shape")
print("as described: the inverses of rotations and cyclic permutations are wrong")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
