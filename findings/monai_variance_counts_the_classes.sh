#!/usr/bin/env bash
# MONAI 1.6.1: VarianceMetric, the uncertainty of repeated predictions, adds the difference between the classes to it,
# and changes the predictions that it is given.
#
# Input, made here: ten repeats of a prediction for 8 x 8 pixels. Either all repeats are equal (no uncertainty), or the
# probability of a class is drawn anew for each (uniform between 0.4 and 0.6).
#
# Expected: the docstring speaks of T repeats as input and of an uncertainty for active learning: the variance over
# the repeats, 0 if all are equal, and near 0.2^2 / 12 = 0.0033 for the drawn ones.
#
# Behaviour: compute_variance reshapes (repeats, channels, ...) into (repeats * channels, ...) and takes the variance
# over that (active_learning_metrics.py). With one channel it is right. With more, the spread between the channels of
# one prediction is added: a network that is sure, 1 in one channel and 0 in the other, has the largest "variance",
# 0.25. And values up to 0 are replaced by threshold (0.0005) in the given tensor itself if it is float32: the zeros and
# all negative logits of the caller are gone after the call.
#
# Output seen, mean of the map (scalar_reduction="mean"):
#     ten equal repeats, one channel, probability 1                  0.0000
#     ten equal repeats, two channels, probabilities 1 and 0         0.2498
#     ten equal repeats, two channels, probabilities 0.5 and 0.5     0.0000
#     drawn repeats, one channel                                     0.0031
#     drawn repeats, two channels (p and 1 - p)                      0.0034
#     drawn repeats, three channels (0.8 (1 - p), 0.8 p, 0.2)        0.0104, over the repeats alone 0.0013
#     logits before and after the call: 50 % have changed
# So of two cases the one with the sure prediction ranks higher, and active learning asks for the wrong one.
#
# Who is hurt: whoever ranks cases by it with more than one channel, as its parameter include_background suggests; MONAI
# Label's epistemic_v2 scoring calls it. We found no report. What helps: one channel at a time, and a clone.
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
from monai.metrics import VarianceMetric

warnings.simplefilter("error")  # a warning would be a change
REPEATS = 10


def equal(*probabilities):
    return torch.tensor(probabilities).view(1, -1, 1, 1).expand(REPEATS, -1, 8, 8).clone()


def drawn():
    torch.manual_seed(0)
    return 0.4 + 0.2 * torch.rand(REPEATS, 1, 8, 8)


def by_monai(prediction):
    return float(VarianceMetric(include_background=True, scalar_reduction="mean")(prediction.clone()))


def over_repeats(prediction):
    return float(prediction.var(0, unbiased=False).mean())


print("monai", version("monai"), "torch", torch.__version__)
p = drawn()
cases = {
    "equal, one channel, 1": equal(1.0),
    "equal, two channels, 1 and 0": equal(1.0, 0.0),
    "equal, two channels, 0.5 and 0.5": equal(0.5, 0.5),
    "drawn, one channel": p,
    "drawn, two channels": torch.cat([p, 1 - p], 1),
    "drawn, three channels": torch.cat([0.8 * (1 - p), 0.8 * p, torch.full_like(p, 0.2)], 1),
}
found = {name: (by_monai(case), over_repeats(case)) for name, case in cases.items()}
for name, (monai, repeats) in found.items():
    print(f"{name:34} MONAI {monai:.4f}, over the repeats {repeats:.4f}")
logits = torch.randn(REPEATS, 2, 8, 8)
before = logits.clone()
VarianceMetric(scalar_reduction="mean")(logits)
share = 100 * float((logits != before).float().mean())
print(f"logits that the call has changed: {share:.0f} %")
assert torch.equal(logits != before, before <= 0)
sure, even, one = (found[name][0] for name in list(cases)[1:4])
if not (np.isclose(sure, 0.25, atol=0.001) and even < 1e-6 and np.isclose(one, found["drawn, one channel"][1])):
    raise SystemExit("the behaviour has changed: two channels")
if not found["drawn, three channels"][0] > 5 * found["drawn, three channels"][1]:
    raise SystemExit("the behaviour has changed: three channels")
print("as described: the classes are counted as repeats")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
