#!/usr/bin/env bash
# antspyx 0.6.3: label_image_centroids exchanges x and z, gives points outside of the label if the sides differ, and ignores
# physical=True; and mni2tal moves some points twice.
#
# Input, made here: label images of 10 x 10 x 10 and 8 x 10 x 12 voxels of 2 x 1 x 1 mm with two boxes. And two points of MNI space.
#
# Expected: the centre of gravity of each label, as scipy's center_of_mass has it and ANTsPy's own label_stats, in voxels, or in
# mm with physical=True. mni2tal uses Brett's formula, one for z >= 0 and one for z < 0.
#
# Behaviour:
# - label_image_centroids (label/label_image_centroids.py) makes lists of x, y and z in which x runs fastest. It masks them by the voxels
#   flattened by numpy, in which z runs fastest. So x and z are exchanged in a cube, and where the sides
#   differ, the lists do not fit the voxels at all (z even counts to the length of y). The lines that would use physical are a comment.
# - mni2tal (utils/mni2tal.py) writes the new x, y and z over the old ones: the new z is made of the new y. And if the new z
#   is below 0, the second formula is applied to the result of the first.
#
# Output seen, centres of label 1 and of label 2:
#     10 x 10 x 10   found (7, 4.5, 1.5), (2, 2, 5)             true (1.5, 4.5, 7), (5, 2, 2)
#     8 x 10 x 12    found (3.67, 4.67, 2), (2, 8, 6)           true (1.5, 4.5, 7), (5, 2, 2)
# mni2tal of (10, -60, 2): found (-9.80, 56.36, -3.56), by the formula (-9.90, 58.22, -1.07); of (10, -60, 40) the same to 0.01 mm
#
# Who is hurt: whoever crops around labels, seeds a search or reports peaks by these functions. The numbers look like places in the
# image. Pull request 714 mended the function for labels that are not 1 to N, and left this. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check antspyx==0.6.3 numpy==2.3.5

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import ants
import numpy as np
from scipy.ndimage import center_of_mass

ORIGIN, SPACING = (100, 0, 0), (2, 1, 1)
SEEN = {(10, 10, 10): [(7, 4.5, 1.5), (2, 2, 5)], (8, 10, 12): [(3.667, 4.667, 2), (2, 8, 6)]}


def brett(point):
    """Brett's formula for a point in LPS, as ANTs has it, which gives one in RAS."""
    x, y, z = -point[0], -point[1], point[2]
    forward, up = (0.046, 0.9189) if z >= 0 else (0.042, 0.839)
    return 0.99 * x, 0.9688 * y + forward * z, -0.0485 * y + up * z


print("antspyx", version("antspyx"))
changed = []
for shape, seen in SEEN.items():
    labels = np.zeros(shape, np.float32)
    labels[1:3, 4:6, 6:9] = 1
    labels[5, 2, 1:4] = 2
    image = ants.from_numpy(labels, origin=ORIGIN, spacing=SPACING)
    true = np.array(center_of_mass(labels > 0, labels, [1, 2]))
    stats = ants.label_stats(image, image)
    own = stats[stats.LabelValue > 0].sort_values("LabelValue")[["x", "y", "z"]].to_numpy()
    assert np.allclose(own, true * SPACING + ORIGIN), "label_stats is no longer right"
    for physical in (False, True):
        found = ants.label_image_centroids(image, physical=physical)["vertices"]
        print(f"{shape}, physical={physical}: found {found.round(2).tolist()}, true {(own if physical else true).tolist()}")
        if not np.allclose(found, seen, atol=0.01):
            changed.append(f"{shape}, physical={physical}")
for point, far in (((10, -60, 2), 3.1), ((10, -60, 40), 0)):
    found, formula = np.array(ants.mni2tal(point)), np.array(brett(point))
    distance = np.linalg.norm(found - formula)
    print(f"mni2tal of {point}: {found.round(2)}, by the formula {formula.round(2)}, {distance:.2f} mm apart")
    if abs(distance - far) > 0.05:
        changed.append(f"mni2tal of {point}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
