#!/usr/bin/env bash
# MONAI 1.6.1: compute_froc_curve_data leaves out the operating point that keeps all detections, so that a detector that
# finds every lesion without a false alarm can have a FROC score of 0.
#
# Input, made here: a volume with four lesions and detectors that hit all of them, by voxel coordinates and
# probabilities, through compute_fp_tp_probs_nd, compute_froc_curve_data and compute_froc_score with their defaults.
#
# Expected: the FROC curve has one point for each threshold, and the lowest threshold keeps all detections: sensitivity
# 1 here, at 0 false positives in the image. The score, a mean of sensitivities at 0.25 to 8 false positives, is 1.
#
# Behaviour: the probabilities that occur are sorted, and the loop over thresholds starts at the second one
# (froc.py). That is right only if the lowest value is the 0 that stands for a lesion without a hit. If all
# lesions are hit, the lowest value is the weakest detection, and the point that counts it is left out.
#
# Output seen (four lesions, no false positive unless said):
#     all hit, all with probability 0.9                   score 0.0000
#     all hit, 0.9 0.8 0.7 0.6                            score 0.7500
#     one missed, the others 0.9                          score 0.7500
#     all hit, 0.9, and a lesion that is excluded         score 1.0000
#     all hit, 0.9, and a false positive of 0.1           score 1.0000
# So a detector that misses a lesion scores more than the same one that hits it, a lesion that should not count
# (labels_to_exclude leaves a 0 for it) changes the score from 0 to 1, and a weak false alarm helps.
#
# Who is hurt: whoever compares good detectors, those that find all lesions of a small test set, above all if they give
# no probabilities (1 for each) or rounded ones. LesionFROC of monai.apps.pathology uses the same function. The loop
# comes from the evaluation script of CAMELYON 16, of which this function is a port. Pull request 8951 mended the number
# of targets in this file in 2026 and left the loop. We found no report. What helps: append one false positive of
# probability 0 before compute_froc_curve_data.
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
from monai.metrics import compute_fp_tp_probs_nd, compute_froc_curve_data, compute_froc_score

warnings.simplefilter("error")  # a warning would be a change
LESIONS = np.array([[3, 3, 3], [3, 15, 3], [15, 3, 15], [15, 15, 15]])
BACKGROUND, EXCLUDED = [10, 10, 10], [10, 3, 10]
WANTED = (0.25, 0.5, 1, 2, 4, 8)  # false positives in each image, MONAI's default


def labels():
    mask = np.zeros((20, 20, 20), int)
    for number, (x, y, z) in enumerate([*LESIONS, EXCLUDED], start=1):
        mask[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = number
    return mask


def by_monai(coordinates, probabilities, mask, exclude):
    false, true, targets = compute_fp_tp_probs_nd(np.array(probabilities), np.array(coordinates), mask, exclude)
    return float(compute_froc_score(*compute_froc_curve_data(np.array(false), np.array(true), targets, 1)))


def by_hand(coordinates, probabilities, mask, exclude):
    """The mean of the best sensitivity at no more than so many false positives."""
    hits = [mask[tuple(point)] for point in coordinates]
    lesions = [label for label in np.unique(mask) if label and label not in exclude]
    curve = [(0, 0.0)]
    for threshold in set(probabilities):
        kept = [hit for hit, probability in zip(hits, probabilities) if probability >= threshold]
        curve.append((kept.count(0), sum(label in kept for label in lesions) / len(lesions)))
    return float(np.mean([max(found for number, found in curve if number <= wanted) for wanted in WANTED]))


print("monai", version("monai"), "numpy", np.__version__)
four, plain = labels(), np.where(labels() == 5, 0, labels())
cases = {
    "all hit, all with probability 0.9": (LESIONS, [0.9] * 4, plain, []),
    "all hit, 0.9 0.8 0.7 0.6": (LESIONS, [0.9, 0.8, 0.7, 0.6], plain, []),
    "one missed, the others 0.9": (LESIONS[:3], [0.9] * 3, plain, []),
    "all hit, 0.9, one excluded": (LESIONS, [0.9] * 4, four, [5]),
    "all hit, 0.9, a false one of 0.1": ([*LESIONS, BACKGROUND], [0.9] * 4 + [0.1], plain, []),
}
found = {name: (by_monai(*case), by_hand(*case)) for name, case in cases.items()}
for name, (monai, hand) in found.items():
    print(f"{name:36} MONAI {monai:.4f}, by hand {hand:.4f}")
expected = [(0, 1), (0.75, 1), (0.75, 0.75), (1, 1), (1, 1)]
if not np.allclose(list(found.values()), expected):
    raise SystemExit("the behaviour has changed")
print("as described: the lowest threshold is left out")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
