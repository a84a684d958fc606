#!/usr/bin/env bash
# cornucopia 0.5.1: GradientEchoTransform takes the map of B1+ for that of magnetization transfer and the other way
# round, if both are given in the order that its docstring names.
#
# Input, made here: maps of PD 1, T1 1.2 s, T2* 60 ms, B1+ 0.8 and MT saturation 0.02, in this order as five channels,
# for GradientEchoTransform(b1=None, mt=None), TR 25 ms, TE 7 ms, 20 degrees.
#
# Expected: "b1: If None, the fourth input channel is B1+", "mt: If None, the fifth input channel is MTsat". By the
# signal of a spoiled gradient echo, written out below, 0.0640.
#
# Behaviour: get_parameters (cornucopia/qmri.py) takes the channel of MT before that of B1+. So 80 % are saturated,
# and the pulse has 0.02 times its angle. RandomGMMGradientEchoTransform of the package fills the channels in that
# other order and is right; the docstrings of GradientEchoTransform are what misleads.
#
# Output seen:
#     numbers for B1+ and MT                        0.0640
#     B1+ as a map, MT as a number                  0.0640
#     both as maps, B1+ fourth as documented        0.00003
#     both as maps, B1+ fifth                       0.0640
# Nothing is printed. With a B1+ near 1, nothing is left of the signal, as 1 - MT is near 0.
#
# Who is hurt: whoever simulates images from quantitative maps with both. We found no report. What helps: give the map
# of MT before that of B1+.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import math
import warnings
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia.qmri import GradientEchoTransform

PD, T1, T2, B1, MT = 1.0, 1.2, 0.06, 0.8, 0.02
SEQUENCE = {"tr": 0.025, "te": 0.007, "alpha": 20}


def signal(b1, mt):
    angle = math.radians(SEQUENCE["alpha"]) * b1
    e1 = math.exp(-SEQUENCE["tr"] / T1)
    decay = math.exp(-SEQUENCE["te"] / T2)
    return PD * math.sin(angle) * decay * (1 - mt) * (1 - e1) / (1 - (1 - mt) * math.cos(angle) * e1)


def simulated(*channels, **options):
    maps = torch.tensor(channels)[:, None, None, None].expand(-1, 4, 4, 4).clone()
    return float(GradientEchoTransform(**SEQUENCE, **options)(maps)[0, 0, 0, 0])


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
expected = signal(B1, MT)
numbers = simulated(PD, T1, T2, b1=B1, mt=MT)
one_map = simulated(PD, T1, T2, B1, b1=None, mt=MT)
documented = simulated(PD, T1, T2, B1, MT, b1=None, mt=None)
swapped = simulated(PD, T1, T2, MT, B1, b1=None, mt=None)
print(f"expected {expected:.5f}, numbers {numbers:.5f}, B1+ as a map {one_map:.5f}")
print(f"both as maps: B1+ fourth, as documented {documented:.6f}; B1+ fifth {swapped:.5f}")
if max(abs(value - expected) for value in (numbers, one_map, swapped)) > 1e-5:
    raise SystemExit("the behaviour has changed: right values")
if abs(documented - signal(MT, B1)) > 1e-6 or documented > 0.01 * expected:
    raise SystemExit("the behaviour has changed: the order")
print("as described: B1+ and MT are exchanged")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
