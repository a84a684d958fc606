#!/usr/bin/env bash
# cornucopia 0.5.1: BernoulliTransform(prob=0.1) masks 90 % of the voxels, BernoulliDiskTransform(prob=0.1) 75 % for
# disks of radius 4, and SmoothBernoulliTransform masks evenly.
#
# Input, made here: volumes of 64^3 ones, prob 0.1, the default. In what comes out, masked voxels are 0.
#
# Expected: "prob: Probability of masking out a voxel": 10 % are masked by each. SmoothBernoulliTransform has a smooth
# field of probabilities by 5 control points, so some regions have more holes than others.
#
# Behaviour (cornucopia/labels.py): BernoulliTransform multiplies by rand <= prob, which keeps where it should drop;
# the smooth one has >=, but compares with the number prob and not with the field made before. The centres of disks are
# drawn at prob / n with n = pi^1.5 / gamma(2.5) * radius, where the volume of a ball needs radius cubed.
#
# Output seen, % masked, 3D:
#     BernoulliTransform, prob 0.05, 0.1, 0.5, 0.9              95, 90, 50, 10
#     BernoulliDiskTransform, prob 0.1, radius 1, 2, 4, 8       2, 27, 75, 99 (of 1, centres alone)
#     SmoothBernoulliTransform: SD of the share masked between blocks of 16^3, 20 draws, 0.0047; evenly drawn 0.0047
# Nothing is printed.
#
# Who is hurt: whoever drops voxels as augmentation, or trains inpainting: by default the first takes nearly all of the
# image. We found no report. What helps: 1 - prob for the first; for disks, divide prob by the square of the
# radius; a field of one's own for the smooth one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import math
import random
import warnings
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia.labels import BernoulliDiskTransform, BernoulliTransform, SmoothBernoulliTransform

ones = torch.ones(1, 64, 64, 64)
random.seed(0)
torch.manual_seed(0)


def masked(transform, draws=1):
    return sum(float((transform(ones) == 0).float().mean()) for _ in range(draws)) / draws


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
for prob in (0.05, 0.1, 0.5, 0.9):
    share = masked(BernoulliTransform(prob))
    print(f"BernoulliTransform({prob}): {100 * share:.1f} % masked")
    if abs(share - (1 - prob)) > 0.01:
        raise SystemExit("the behaviour has changed: BernoulliTransform")

shares = {radius: masked(BernoulliDiskTransform(0.1, radius, method="l2"), 5) for radius in (1, 2, 4, 8)}
print("BernoulliDiskTransform(0.1), % masked by radius:", {r: round(100 * s, 1) for r, s in shares.items()})
if shares[8] < 0.5 or shares[4] < 0.2 or shares[1] > 0.05:
    raise SystemExit("the behaviour has changed: disks")

smooth = SmoothBernoulliTransform(0.1)
deviations = []
for _ in range(20):
    holes = (smooth(ones)[0] == 0).float()
    blocks = holes.unfold(0, 16, 16).unfold(1, 16, 16).unfold(2, 16, 16).mean((3, 4, 5))
    deviations.append(float(blocks.std()))
deviation, even = sum(deviations) / 20, math.sqrt(0.1 * 0.9 / 16**3)
print(f"SmoothBernoulliTransform: SD between blocks {deviation:.4f}, evenly drawn {even:.4f}")
if deviation > 1.2 * even:
    raise SystemExit("the behaviour has changed: SmoothBernoulliTransform")
print("as described: the shares are not those asked for")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
