#!/usr/bin/env bash
# MONAI 1.6.1: GibbsNoise(alpha=0), the identity by its documentation, cuts the corners of k-space in 3D; and with
# alpha=1 the image is black if all its sizes are even, and its mean if all are odd.
#
# Input, made here: white noise plus 5 in images of 64 x 64, 32^3, 31^3 and 32 x 32 x 8; and a checkerboard of voxels in
# 32^3, the highest frequency there is.
#
# Expected: the docstring says that alpha = 0 is the identity, and in 2D it is one.
#
# Behaviour: frequencies farther from the middle than r are set to 0, with r = (1 - alpha) * largest size * sqrt(2) / 2
# (_apply_mask). That is the distance of the corners of a square. The corners of a cube are at sqrt(3) / 2, so that
# alpha = 0 keeps a ball in a cube and drops its eight corners. The middle is taken at (size - 1) / 2, and
# for even sizes there is no frequency there: the zero frequency is half a step aside along each axis. With alpha = 1,
# r is 0, and no frequency is left, not even the mean.
#
# Output seen:
#     alpha = 0: part of the image's deviation that is lost: 64 x 64 0 %, 32^3 17 %, 31^3 19 %, 32 x 32 x 8 0 %
#     alpha = 0: a checkerboard of -1 and 1 in 32^3 comes out as 0
#     alpha = 1: mean of the image: 64 x 64 0.0, 32^3 0.0, 31^3 5.0, 32 x 32 x 8 0.0
# One more follows from the largest size: along a short axis nothing is cut until r is smaller than half of it
# (alpha of about 0.82 for 8 slices of 32 x 32).
# Nothing is printed.
#
# Who is hurt: whoever takes alpha=0 as the control of a test of robustness, or lets RandGibbsNoise draw up to 1.
# We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check monai==1.6.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import torch
from monai.transforms import GibbsNoise

warnings.simplefilter("error")  # a warning would be a change
SHAPES = ((64, 64), (32, 32, 32), (31, 31, 31), (32, 32, 8))


def noise(shape):
    torch.manual_seed(0)
    return 5 + torch.randn(1, *shape)


def by_hand(image, factor):
    """k-space within factor * the largest size of its middle."""
    spectrum = np.fft.fftshift(np.fft.fftn(image))
    squares = sum((np.arange(n).reshape([-1] + [1] * (image.ndim - a - 1)) - (n - 1) / 2) ** 2
                  for a, n in enumerate(image.shape))  # fmt: skip
    return np.fft.ifftn(np.fft.ifftshift(spectrum * (squares <= (factor * max(image.shape)) ** 2))).real


print("monai", version("monai"), "torch", torch.__version__)
lost, means = [], []
for shape in SHAPES:
    image = noise(shape)
    zero, one = GibbsNoise(alpha=0.0)(image), GibbsNoise(alpha=1.0)(image)
    lost.append(100 * float((zero - image).std() / image.std()))
    means.append(float(one.mean()))
    assert np.abs(zero.numpy()[0] - by_hand(image.numpy()[0], 2**0.5 / 2)).max() < 1e-4, "another mask"
    whole = by_hand(image.numpy()[0], len(shape) ** 0.5 / 2)
    assert np.abs(whole - image.numpy()[0]).max() < 1e-4, "half the root of the dimensions is no identity"
    print(f"{'x'.join(map(str, shape)):8} alpha 0: lost {lost[-1]:4.1f} %; alpha 1: mean {means[-1]:.2f}")
board = torch.from_numpy(1.0 - 2 * (np.indices((32, 32, 32)).sum(0) % 2))[None]
left = float(GibbsNoise(alpha=0.0)(board).abs().max())
print(f"a checkerboard of -1 and 1, alpha 0: largest value left {left:.1e}")
expected = np.allclose(lost, [0, 17.2, 19.2, 0], atol=0.6) and np.allclose(means, [0, 0, 5, 0], atol=0.05)
if not expected or left > 1e-6:
    raise SystemExit("the behaviour has changed")
print("as described: alpha = 0 changes volumes")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
