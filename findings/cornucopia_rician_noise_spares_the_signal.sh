#!/usr/bin/env bash
# cornucopia 0.5.1: ChiNoiseTransform, Rician noise by its docstring, hardly touches voxels that are brighter than the
# noise, and never makes one darker.
#
# Input, made here: volumes of 64^3 equal voxels with values 0, 0.1, 0.5 and 1, and noise of SD 0.1, the default.
#
# Expected: non-central chi noise, Rician for 2 channels (the docstring names both): the length of a vector whose first
# component is the signal plus noise, and the others are noise. The package scales the noise so that its SD in air is
# the one asked for. By scipy's distribution rice, scaled likewise, the SD at a signal of 1 is then 0.15, and 47 % of
# the voxels become darker.
#
# Behaviour: the transform draws the length of pure noise, central chi, and returns sqrt(signal^2 + noise^2)
# (cornucopia/noise.py). The product of signal and noise, which carries the noise at a high signal, is missing.
# In air (signal 0) both are the same.
#
# Output seen, mean and SD over the voxels, and the share that becomes darker:
#     signal 0.0    cornucopia 0.191 0.100    0 %    Rice 0.191 0.100    0 %
#     signal 0.1    cornucopia 0.222 0.087    0 %    Rice 0.211 0.109   16 %
#     signal 0.5    cornucopia 0.543 0.040    0 %    Rice 0.524 0.149   44 %
#     signal 1.0    cornucopia 1.023 0.022    0 %    Rice 1.012 0.152   47 %
# So the noise in tissue falls with the signal, to a seventh at a signal of ten times the SD. Nothing is printed.
#
# Who is hurt: whoever trains on simulated MR images with this noise (RandomChiNoiseTransform, with 8 channels by
# default): networks see noisy air around tissue without noise. GaussianNoiseTransform of the package is right. We found
# no report. What helps: the square root of the sum of squares of x plus Gaussian noise, and of other Gaussian noise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import torch
from scipy.stats import rice

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    import cornucopia

SIGMA, SIGNALS = 0.1, (0.0, 0.1, 0.5, 1.0)
CHANNEL = SIGMA / np.sqrt(2 - np.pi / 2)  # of which a length has the SD SIGMA where there is no signal


def noisy(signal):
    torch.manual_seed(0)
    return cornucopia.ChiNoiseTransform(sigma=SIGMA)(torch.full((1, 64, 64, 64), signal)).numpy()


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
rows = []
for signal in SIGNALS:
    found = noisy(signal)
    expected = rice(signal / CHANNEL, scale=CHANNEL)
    darker = 100 * float((found < signal - 1e-6).mean())
    rows.append((found.mean(), found.std(), darker, expected.mean(), expected.std(), 100 * expected.cdf(signal)))
    print(f"signal {signal:.1f}: cornucopia mean {rows[-1][0]:.3f}, SD {rows[-1][1]:.3f}, darker {darker:2.0f} %; "
          f"Rice {rows[-1][3]:.3f}, {rows[-1][4]:.3f}, {rows[-1][5]:2.0f} %")  # fmt: skip
mean, deviation, darker, true_mean, true_deviation, _ = np.array(rows, float).T
if abs(mean[0] - true_mean[0]) > 0.005 or abs(deviation[0] - true_deviation[0]) > 0.005:
    raise SystemExit("the behaviour has changed: air")
if darker.any() or deviation[3] > 0.3 * true_deviation[3] or deviation[2] > 0.5 * true_deviation[2]:
    raise SystemExit("the behaviour has changed: signal")
print("as described: the noise spares the signal")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
