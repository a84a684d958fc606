#!/usr/bin/env bash
# batchgeneratorsv2 0.3.6: BrightnessAdditiveTransform(mu, sigma), at its default for channels, draws evenly between the
# two numbers in place of a Gaussian with this mean and SD, so that brightness only rises.
#
# Input, made here: images of zeros with two channels, 4,000 draws with mu 0 and sigma 0.5, with
# synchronize_channels=True, the default, and with False; and mu 0.3 with sigma 0.1.
#
# Expected, by the docstring: shifts from a Gaussian with mean mu and SD sigma, one for all channels or one for each.
#
# Behaviour: with one for each channel, normal_(mu, sigma) is called. With one for all, the pair (mu, sigma) goes to the
# package's sample_scalar, which takes a pair as the two ends of a range and calls numpy's uniform (brightness.py,
# scalar_type.py). For mu > sigma it raises an AssertionError about the order of the pair.
#
# Output seen, shifts:
#     mu 0, sigma 0.5, one for each channel     mean -0.00, SD 0.50, smallest -1.96, largest 1.83
#     mu 0, sigma 0.5, one for all              mean  0.25, SD 0.15, smallest  0.00, largest 0.50
#     mu 0.3, sigma 0.1, one for all            AssertionError
#
# Who is hurt: whoever builds augmentation for several MR contrasts, or one, with this transform: no image is ever
# darker, the mean of the training data moves by sigma / 2, and the spread is 0.29 sigma. nnU-Net 2.8.1's DA5 trainer
# sets synchronize_channels=False and is not affected. We found no report. What helps: False, and one channel at a time.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check batchgeneratorsv2==0.3.6 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform

DRAWS = 4000


def shifts(mu, sigma, **options):
    np.random.seed(0)
    torch.manual_seed(0)
    transform = BrightnessAdditiveTransform(mu, sigma, **options)
    images = [transform(image=torch.zeros(2, 2, 2))["image"] for _ in range(DRAWS)]
    return torch.stack(images).mean((2, 3)).numpy()  # (draws, channels)


print("batchgeneratorsv2", version("batchgeneratorsv2"), "torch", torch.__version__)
each, both = shifts(0.0, 0.5, synchronize_channels=False), shifts(0.0, 0.5)
for name, found in {"one for each channel": each, "one for all": both}.items():
    print(f"mu 0, sigma 0.5, {name:20}: mean {found.mean():5.2f}, SD {found.std():.2f}, "
          f"smallest {found.min():5.2f}, largest {found.max():.2f}")  # fmt: skip
try:
    shifts(0.3, 0.1)
    refused = False
except AssertionError as error:
    refused = True
    print("mu 0.3, sigma 0.1, one for all: AssertionError:", str(error)[:80])
if abs(each.mean()) > 0.03 or abs(each.std() - 0.5) > 0.03 or each.min() > -1:
    raise SystemExit("the behaviour has changed: one for each channel")
if both.min() < 0 or both.max() > 0.5 or abs(both.std() - 0.5 / 12**0.5) > 0.01 or (both[:, 0] != both[:, 1]).any():
    raise SystemExit("the behaviour has changed: one for all channels")
if not refused:
    raise SystemExit("the behaviour has changed: mu > sigma")
print("as described: an even draw between mu and sigma")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
