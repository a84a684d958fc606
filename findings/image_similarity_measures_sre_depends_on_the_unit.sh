#!/usr/bin/env bash
# image-similarity-measures 0.3.6: the signal to reconstruction error (SRE) changes with the unit and with the size of
# the image, and FSIM does not see edges that fall.
#
# Input, made here: even noise between 50 and 200 and the same with Gaussian noise; for FSIM bars that rise slowly and
# fall at once, and the same with 40 % of the contrast.
#
# Expected: the SRE is 10 log10 of the squared mean over the mean squared error (Lanaras et al. 2018). Multiplying both
# images by 10 changes nothing, a larger cut of the same images nothing either, and ten times the noise takes 20 dB off.
# FSIM of two images is that of their mirror images.
#
# Behaviour (quality_metrics.py): sre() divides the root of the summed squared error by the number of pixels, in place of
# the sum itself, so the ratio has the unit of the image and falls by 10 dB for ten times the noise. fsim() takes
# Scharr's gradients in unsigned integers, in which the negative half of each is 0: from left to right and from top to
# bottom only rising edges count.
#
# Output seen, SRE in dB:
#     noise                     64 x 64    both times 10    256 x 256    by the formula
#     1                         59.9       69.9             66.0         41.9
#     10                        49.9       59.9             56.0         21.9
#     100                       39.9       49.9             46.0          1.9
#     FSIM of bars that fall at once 0.82, of their mirror images 0.87
# Nothing is printed.
#
# Who is hurt: whoever compares these numbers between units (0 to 1, HU, 12 bits), sizes or papers. We found no
# report. What helps: the formula above, in one line; FSIM of piq.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    image-similarity-measures==0.3.6 numpy==1.26.4 scipy==1.12.0 scikit-image==0.20.0 opencv-python-headless==4.10.0.84

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from image_similarity_measures.quality_metrics import fsim, sre


def noisy(size, noise):
    rng = np.random.default_rng(0)
    image = rng.uniform(50, 200, (size, size, 1)).astype(np.float32)
    return image, image + noise * rng.normal(size=image.shape).astype(np.float32)


def decibels(image, other):
    return float(10 * np.log10(image.mean() ** 2 / np.mean((image - other) ** 2)))


print("image-similarity-measures", version("image-similarity-measures"))
for noise in (1, 10, 100):
    image, other = noisy(64, noise)
    small, times_10, large = float(sre(image, other)), float(sre(10 * image, 10 * other)), float(sre(*noisy(256, noise)))
    right = decibels(image, other)
    print(f"noise of {noise}: SRE {small:.1f} dB, both images times 10 {times_10:.1f}, 256 x 256 {large:.1f}; "
          f"by the formula {right:.1f}, {decibels(10 * image, 10 * other):.1f} and {decibels(*noisy(256, noise)):.1f}")  # fmt: skip
    if abs(times_10 - small - 10) > 0.1:
        raise SystemExit("the behaviour has changed: the unit")
    if abs(large - small - 6) > 0.3:
        raise SystemExit("the behaviour has changed: the size")
    if abs(small - (60 - 10 * np.log10(noise))) > 0.3 or abs(right - (42 - 20 * np.log10(noise))) > 0.3:
        raise SystemExit("the behaviour has changed: the noise")
bars = np.tile(np.arange(96) % 24 / 24 * 180 + 20, (96, 1)) + np.random.default_rng(0).normal(0, 3, (96, 96))
bars = bars.clip(0, 255).astype(np.uint8)[:, :, None]
less = ((bars.astype(float) - 100) * 0.4 + 100).astype(np.uint8)
found = [float(fsim(np.ascontiguousarray(a), np.ascontiguousarray(b)))
         for a, b in ((bars, less), (bars[:, ::-1], less[:, ::-1]))]  # fmt: skip
print(f"FSIM of bars that fall at once {found[0]:.3f}, of their mirror images {found[1]:.3f}")
if not 0.03 < found[1] - found[0] < 0.08:
    raise SystemExit("the behaviour has changed: FSIM")
print("as described: SRE has a unit, and FSIM a direction")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
