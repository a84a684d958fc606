#!/usr/bin/env bash
# sewar 0.4.10: uqi() is not the universal quality index: two images of independent noise have 0.74, and an image and
# its negative +0.48, where the index is near 0 and -1.
#
# Input, made here: 64 x 64 pixels of uint8 noise, its negative (255 - image), other noise, and a smooth image with
# noise added.
#
# Expected: Q of Wang and Bovik (2002) in windows of 8 x 8, the mean over windows of
#     4 cov(x, y) mean(x) mean(y) / ((var(x) + var(y)) (mean(x)^2 + mean(y)^2)),
# between -1 and 1: 1 for equal images only, and the sign of the covariance.
#
# Behaviour: the code has the form for sums over a window: N sum(x y) - sum(x) sum(y) is N^2 times the covariance. But
# its sums come from scipy's uniform_filter, which gives means. With means, N mean(x y) - mean(x) mean(y) is the
# covariance plus (N - 1) mean(x y), that is 63 times a number that is positive for all images, and variances likewise
# (_uqi_single in full_ref.py). What is left is mostly how far both images have the same power, 2 mean(x y) / (mean(x^2)
# + mean(y^2)), and hardly depends on structure.
#
# Output seen, sewar / index by its formula / torchmetrics' (Gaussian windows):
#     noise and other noise          0.74  -0.01  -0.01
#     noise and its negative         0.48  -0.99  -0.98
#     smooth image and with noise    1.00   0.39   0.25
#     the same, flipped              0.96  -0.03  -0.02
# rmse_sw and scc of the same package equal torchmetrics'.
#
# Who is hurt: whoever reports UQI of synthetic CT or MR, or of pansharpened images, by this package: bad results look
# good. Adding a constant to both images moves the score towards 1 as well. Issue 267 of CERN/TIGRE had a wrong UQI of
# its own. We found no report for sewar. torchmetrics' universal_image_quality_index can be used in its place.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    sewar==0.4.10 torchmetrics==1.9.0 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import sewar
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import universal_image_quality_index

warnings.simplefilter("error")  # a warning would be a change
WINDOW = 8


def by_formula(one, other):
    x, y = (
        sliding_window_view(image.astype(float), (WINDOW, WINDOW)).reshape(-1, WINDOW**2) for image in (one, other)
    )
    mean_x, mean_y = x.mean(1), y.mean(1)
    covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).mean(1)
    return (4 * covariance * mean_x * mean_y / ((x.var(1) + y.var(1)) * (mean_x**2 + mean_y**2))).mean()


def by_torchmetrics(one, other):
    x, y = (torch.from_numpy(image.astype(float))[None, None] for image in (one, other))
    return float(universal_image_quality_index(x, y))


def with_sums(one, other):
    """sewar's expression with sums in the place of means."""
    x, y = (
        sliding_window_view(image.astype(float), (WINDOW, WINDOW)).reshape(-1, WINDOW**2) for image in (one, other)
    )
    product, squares = x.sum(1) * y.sum(1), x.sum(1) ** 2 + y.sum(1) ** 2
    below = (WINDOW**2 * ((x**2).sum(1) + (y**2).sum(1)) - squares) * squares
    return (4 * (WINDOW**2 * (x * y).sum(1) - product) * product / below).mean()


random = np.random.default_rng(0)
noise, other = random.integers(0, 256, (2, 64, 64)).astype(np.uint8)
smooth = 130 + 400 * gaussian_filter(random.standard_normal((64, 64)), 6)
noisy = smooth + random.normal(0, 12, smooth.shape)
smooth, noisy = (np.clip(image, 0, 255).astype(np.uint8) for image in (smooth, noisy))
cases = {
    "noise and other noise": (noise, other),
    "noise and its negative": (noise, 255 - noise),
    "smooth image and with noise": (smooth, noisy),
    "the same, flipped": (smooth, noisy[::-1]),
    "equal images": (noise, noise),
}
print(*(f"{name} {version(name)}" for name in ("sewar", "torchmetrics", "scipy")))
found = {}
for name, (one, two) in cases.items():
    found[name] = (float(sewar.uqi(one, two, ws=WINDOW)), float(by_formula(one, two)), by_torchmetrics(one, two))
    assert abs(with_sums(one, two) - by_formula(one, two)) < 1e-9, "the cause is another one"
    print(f"{name:30}", *(f"{value:6.2f}" for value in found[name]))
sewars, formula = ([values[i] for values in found.values()] for i in range(2))
if not (sewars[0] > 0.6 and abs(formula[0]) < 0.05 and sewars[1] > 0.4 and formula[1] < -0.9 and sewars[3] > 0.9):
    raise SystemExit("the behaviour has changed")
if not (sewars[4] > 0.999 and formula[4] > 0.999):
    raise SystemExit("the behaviour has changed: equal images")
print("as described: means in the place of sums")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
