#!/usr/bin/env bash
# MONAI 1.6.1: in 2D, RandBiasField has no term in the second axis alone, so that the mean of the field over the first
# axis is flat. In 3D the axes are alike.
#
# Input, made here: images of ones with 65 x 65 pixels and 33 x 33 x 33 voxels, degree 3 (the default), coefficients
# from -0.3 to 0.3, 200 seeds. The logarithm of the result is the field.
#
# Expected: the field is a sum of Legendre polynomials in all axes up to the degree, as in the papers that the docstring
# names and as MONAI makes it in 3D: P_i(x) P_j(y) with i + j <= 3, ten of them, three in x alone and
# three in y alone.
#
# Behaviour: in 2D the ten coefficients are put into the lower triangle of the matrix of (i, j), where j <= i
# (_generate_random_field). That is another set of ten: it has x y, x^2 y^2 and x^3 y^3, of degree 6, and has none
# of y, y^2 and y^3, because those stand in the first row. (i + j <= 3 is the upper left triangle.) Since P_i with i > 0
# has the mean 0, the mean over x of such a field is the same for each y.
#
# Output seen, SD of the mean profile along each axis, mean of 200 seeds:
#     2D  0.132 along the first axis, 0.002 along the second
#     3D  0.144 0.144 0.139
# Shading from left to right, from a surface coil at one side, never occurs along the second axis in 2D; only products
# with x do. It makes a difference, then, whether an array is stored as rows and columns or as columns and rows.
#
# Who is hurt: whoever trains on 2D slices with this augmentation, or measures robustness to shading with it.
# We found no report; issue 2644 was about a missing exponential in the same function.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check monai==1.6.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from monai.transforms import RandBiasField
from numpy.polynomial import legendre

DEGREE, RANGE, SEEDS = 3, (-0.3, 0.3), 200


def field(shape, seed):
    random = RandBiasField(degree=DEGREE, coeff_range=RANGE, prob=1.0)
    random.set_random_state(seed)
    return np.log(random(torch.ones(1, *shape)).numpy()[0])


def profiles(shape):
    """SD of the mean profile along each axis, mean over the seeds."""
    deviations = []
    for seed in range(SEEDS):
        made = field(shape, seed)
        others = [tuple(b for b in range(made.ndim) if b != a) for a in range(made.ndim)]
        deviations.append([made.mean(axes).std() for axes in others])
    return np.mean(deviations, axis=0)


def terms(made):
    """Which P_i(x) P_j(y) are in a field, by least squares."""
    axis = np.linspace(-1, 1, made.shape[0])
    basis = legendre.legvander2d(*np.meshgrid(axis, axis, indexing="ij"), [2 * DEGREE] * 2)
    found = np.linalg.lstsq(basis.reshape(made.size, -1), made.ravel(), rcond=None)[0]
    return np.abs(found.reshape(2 * DEGREE + 1, -1)) > 1e-4


print("monai", version("monai"), "numpy", np.__version__)
flat, solid = profiles((65, 65)), profiles((33, 33, 33))
print("2D: SD of the mean profile along the axes", *(f"{v:.3f}" for v in flat))
print("3D:", *(f"{v:.3f}" for v in solid))
present = terms(field((65, 65), 0))
pairs = [(int(i), int(j)) for i, j in np.argwhere(present)]
print("terms P_i(x) P_j(y) of a 2D field, (i, j):", *pairs)
if pairs != [(i, j) for i in range(DEGREE + 1) for j in range(i + 1)]:
    raise SystemExit("the behaviour has changed: other terms")
if not (flat[1] < 0.1 * flat[0] and solid.min() > 0.7 * solid.max()):
    raise SystemExit("the behaviour has changed: other profiles")
print("as described: in 2D, no term varies along the second axis alone")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
