#!/usr/bin/env bash
# cornucopia 0.5.1: ContrastLookupTransform(keep_background=True), the default, gives the air a random value, often as
# bright as tissue.
#
# Input, made here: a volume of 32^3 voxels, 0 outside, and values from 0.5 to 1.5 in a cube of 16^3.
#
# Expected: "keep_background: Do not change background mean/cov. The background class is the class with minimum mean
# value": the voxels outside stay 0, as they do with ContrastMixtureTransform, which has the same option.
#
# Behaviour: the option is stored and never read (cornucopia/contrast.py): every bin of intensities, the lowest
# too, moves to a value drawn between the lowest and the highest of the image. Besides, bins are half open, so the
# brightest voxel alone is always kept.
#
# Output seen, the value of air over 200 draws, for tissue of mean 1.0:
#     keep_background=True     mean 0.72, from -0.04 to 1.45, above the darkest tissue (0.5) in 68 %
#     keep_background=False    exactly the same, draw by draw
# Nothing is printed.
#
# Who is hurt: whoever augments contrast of MR images with it and relies on dark air (masks by a threshold, losses in
# the mask, normalization by quantiles without 0). We found no report. What helps: put the voxels of the background back
# afterwards.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import random
import warnings
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia.contrast import ContrastLookupTransform, ContrastMixtureTransform

torch.manual_seed(1)
image = torch.zeros(1, 32, 32, 32)
image[:, 8:24, 8:24, 8:24] = torch.rand(16, 16, 16) + 0.5
air = image == 0
same, brightest = True, True
values = []
for seed in range(200):
    found = {}
    for keep in (True, False):
        torch.manual_seed(seed)
        random.seed(seed)
        found[keep] = ContrastLookupTransform(keep_background=keep)(image)
    values.append(float(found[True][air].mean()))
    same &= torch.equal(found[True], found[False])
    brightest &= bool(found[True].flatten()[image.argmax()] == image.max())
values = torch.tensor(values)
share = float((values > 0.5).float().mean())
torch.manual_seed(0)
mixture = float(ContrastMixtureTransform(4)(image + 0.01 * torch.rand(image.shape))[air].mean())
print("cornucopia", version("cornucopia"), "torch", torch.__version__)
print(f"air: mean {float(values.mean()):.2f}, from {float(values.min()):.2f} to {float(values.max()):.2f}")
print(f"above 0.5 in {100 * share:.1f} %; as without the option: {same}; by ContrastMixtureTransform {mixture:.3f}")
if not same or share < 0.5:
    raise SystemExit("the behaviour has changed: background")
if abs(mixture - 0.005) > 0.005:
    raise SystemExit("the behaviour has changed: mixture")
if not brightest:
    raise SystemExit("the behaviour has changed: the brightest voxel")
print("as described: keep_background keeps nothing")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
