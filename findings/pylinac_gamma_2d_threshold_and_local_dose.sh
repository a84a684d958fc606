#!/usr/bin/env bash
# pylinac 3.49.0: gamma_2d with a threshold of 5 % leaves out what is below 0.15 %, and with local dose it fails a plan that is moved by a
# third of the allowed distance; gamma_geometric gives another answer in cm than in mm.
#
# Input, made here: 1. a field of 20 x 20 pixels with dose 100, a quarter of which is measured 10 % too high, in 60 x 60 pixels of
# scatter with dose 1. 2. A dose that rises by 10 % from pixel to pixel, measured 1 pixel aside. 3. A profile with steps, moved by 2.6 mm,
# on points 1 mm apart.
#
# Expected, by the definition of gamma and by pylinac's own gamma_1d: 1. scatter of 1 % of the maximum is not evaluated, so 87.8 % of the
# evaluated pixels pass at 3 % and 3 pixels. 2. gamma is 1/3 at 3 % local dose and 3 pixels. 3. The unit of length does not matter.
#
# Behaviour (core/gamma.py):
# 1. gamma_2d divides the doses by the allowed difference (here 3 % of the maximum), but not the threshold, which it compares with
#    them. The threshold works as one of 5 % x 3 %. gamma_1d and gamma_geometric do it right.
# 2. For local dose, it divides each measured pixel by the reference at the measured pixel, where the definition has the
#    reference at the point that is assessed. The reference becomes the same number everywhere, so looking around finds nothing.
# 3. gamma_geometric divides lengths by the allowed distance and then searches within plus and minus that distance, where it should
#    be plus and minus 1: at 0.3 cm, it searches 0.09 cm and two points more.
#
# Output seen:
#     1. pixels evaluated 3600 (400 are above 5 %), pass rate 98.6 % (87.8 % of the 400)
#     2. largest gamma inside: 2.00, the cap (gamma_1d 0.33), pass rate 0 % (100 %)
#     3. points that fail: 0 in mm, 2 in cm
#
# Who is hurt: whoever accepts a plan or a film by the pass rate. The first fault flatters it, the second and third spoil it.
# An issue of pylinac about gamma (565) is about another function, gamma() of images. We found no report of these.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pylinac==3.49.0 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
from pylinac.core.gamma import gamma_1d, gamma_2d, gamma_geometric

print("pylinac", version("pylinac"))
FAILS = [0, 2]  # points that fail, in mm and in cm
changed = []


def passed(gamma):
    return 100 * np.mean(gamma[np.isfinite(gamma)] <= 1)


plan = np.ones((60, 60))
plan[20:40, 20:40] = 100
measured = plan.copy()
measured[20:30, 20:30] = 110
gamma = gamma_2d(plan, measured, dose_to_agreement=3, distance_to_agreement=3, dose_threshold=5)
in_a_line = gamma_1d(plan.ravel(), measured.ravel(), dose_to_agreement=3, distance_to_agreement=3, dose_threshold=5)[0]
evaluated, above = int(np.isfinite(gamma).sum()), int(np.isfinite(in_a_line).sum())
field = gamma[20:40, 20:40]
print(f"threshold: {evaluated} pixels evaluated, {above} by gamma_1d; {passed(gamma):.1f} % pass, {passed(field):.1f} % of the field")
if (evaluated, above) != (3600, 400) or abs(passed(gamma) - 98.6) > 0.1 or abs(passed(field) - 87.8) > 0.1:
    changed.append("threshold")

plan = np.tile(1.1 ** np.arange(40), (40, 1))
measured = np.roll(plan, 1, axis=1)
options = {"dose_to_agreement": 3, "distance_to_agreement": 3, "global_dose": False, "dose_threshold": 0}
gamma = gamma_2d(plan, measured, **options)[5:-5, 5:-5]
in_row = gamma_1d(plan[20], measured[20], **options)[0][5:-5]
print(f"local dose: largest gamma {gamma.max():.2f}, {in_row.max():.2f} by gamma_1d; {passed(gamma):.0f} % pass, {passed(in_row):.0f} %")
if abs(gamma.max() - 2) > 0.01 or abs(in_row.max() - 1 / 3) > 0.01 or (passed(gamma), passed(in_row)) != (0, 100):
    changed.append("local dose")

x = np.arange(60.0)
plan, measured = (np.interp(x - move, [0, 20, 21, 40, 41, 60], [20, 20, 100, 100, 20, 20]) for move in (0, 2.6))
fails = []
for name, scale in (("mm", 1), ("cm", 0.1)):
    options = {"dose_to_agreement": 3, "distance_to_agreement": 3 * scale}
    gamma = gamma_geometric(plan, measured, x * scale, x * scale, **options)
    fails.append(int((gamma > 1).sum()))
    print(f"gamma_geometric in {name}: {fails[-1]} points fail, largest gamma {np.nanmax(gamma):.2f}")
if fails != FAILS:
    changed.append("gamma_geometric")
if changed:
    raise SystemExit("the behaviour has changed: " + ", ".join(changed))
print("as described")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
