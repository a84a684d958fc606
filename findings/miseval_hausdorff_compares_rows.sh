#!/usr/bin/env bash
# miseval 1.3.0: the metric "HD" (Hausdorff distance) is no distance in the image: a segmentation that is moved down by
# any number of rows has HD 0. "AHD" (average Hausdorff distance) is the largest distance, not an average.
#
# Input, made here: a square of 8 x 8 pixels in a mask of 40 x 40, moved down by 10 or 20 rows or to the right by 10 or
# 20 columns; a prediction with one stray pixel; and a mask with two classes.
#
# Expected: the Hausdorff distance of the two sets of pixels by scipy: 10 and 20 in both directions. The average
# distance of the borders, which a single pixel hardly changes.
#
# Behaviour: calc_SimpleHausdorffDistance hands the two masks to hausdorff_distance of the package hausdorff, which
# takes two matrices with one point in each row. So each row of 40 pixels is taken for a point in 40 dimensions. A mask
# that is moved down has the same rows. The parameter c, the class, is not used: with several classes, each one gets the
# same number. calc_AverageHausdorffDistance returns the maximum of the distances from border to mask. Its docstring
# speaks of both values, and only the maximum is computed.
#
# Output seen, HD / scipy's Hausdorff distance / AHD / average distance of the borders:
#     10 rows down                 0.00   10.00   10.00    6.50
#     20 rows down                 0.00   20.00   20.00   16.50
#     10 columns to the right      2.83   10.00   10.00    6.50
#     20 columns to the right      2.83   20.00   20.00   16.50
#     one stray pixel              1.00   25.46   25.46    0.45
# With two classes, of which class 1 is right and class 2 is 10 rows away: HD 0 for both.
#
# Who is hurt: whoever reports HD of this package: a segmentation in the wrong place looks perfect. Its Dice is right. A
# 3D mask is refused. We found no report. What helps: scipy's directed_hausdorff on np.argwhere of both masks.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    miseval==1.3.0 hausdorff==0.2.6 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
from miseval import evaluate
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.spatial.distance import directed_hausdorff

SHAPE = (40, 40)


def square(row, column, label=1):
    mask = np.zeros(SHAPE, int)
    mask[row : row + 8, column : column + 8] = label
    return mask


def hausdorff(truth, prediction):
    one, other = np.argwhere(truth), np.argwhere(prediction)
    return max(directed_hausdorff(one, other)[0], directed_hausdorff(other, one)[0])


def average(truth, prediction):
    """Mean distance from each border to the other one, both directions together."""
    one, other = (mask.astype(bool) ^ binary_erosion(mask) for mask in (truth, prediction))
    return np.concatenate([distance_transform_edt(~other)[one], distance_transform_edt(~one)[other]]).mean()


print(*(f"{name} {version(name)}" for name in ("miseval", "hausdorff", "scipy", "numpy")))
truth, stray = square(4, 4), square(4, 4)
stray[29, 29] = 1
cases = {
    "10 rows down": square(14, 4),
    "20 rows down": square(24, 4),
    "10 columns to the right": square(4, 14),
    "20 columns to the right": square(4, 24),
    "one stray pixel": stray,
}
found = {}
for name, prediction in cases.items():
    scores = [float(evaluate(truth, prediction, metric=metric)) for metric in ("HD", "AHD", "DSC")]
    found[name] = (scores[0], float(hausdorff(truth, prediction)), scores[1], float(average(truth, prediction)))
    print(f"{name:26} HD {scores[0]:6.2f}, scipy {found[name][1]:6.2f}, AHD {scores[1]:6.2f}, "
          f"average {found[name][3]:6.2f}, Dice {scores[2]:.2f}")  # fmt: skip
pair = square(4, 4) + square(16, 24, label=2), square(4, 4) + square(26, 24, label=2)
classes = [float(v) for v in evaluate(*pair, metric="HD", multi_class=True, n_classes=3)]
print("background and two classes, the second one 10 rows away: HD", *classes)
down, right = [found[name] for name in list(cases)[:2]], [found[name] for name in list(cases)[2:4]]
changed = []
if any(values[0] != 0 for values in down) or any(abs(values[0] - 8**0.5) > 1e-6 for values in right):
    changed.append("HD")
if [values[1] for values in (*down, *right)] != [10, 20, 10, 20]:
    changed.append("the reference")
if any(abs(values[2] - values[1]) > 1e-6 for values in found.values()) or found["one stray pixel"][3] > 2:
    changed.append("AHD")
if len(set(classes)) != 1:
    changed.append("classes")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: rows are taken for points, and the average is the maximum")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
