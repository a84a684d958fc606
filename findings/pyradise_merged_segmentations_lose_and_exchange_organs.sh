#!/usr/bin/env bash
# PyRaDiSe 0.2.3 gives the organs in a merged segmentation each other's labels if a subject lacks one of them, and cuts organs off where
# images are wider than high.
#
# Input, made here: masks of three boxes, brainstem, eye and cord, of 500, 500 and 400 voxels, for four subjects: all organs in 60 x 60
# pixels; without the brainstem; all in 60 x 40 pixels; the first once more, merged in the orientation PSL. MergeSegmentationFilter merges
# them with the labels 1, 2 and 3.
#
# Expected: each organ that is there has its own label and all its voxels. The documentation says that the result contains the indexes
# associated with the organs.
#
# Behaviour (modification.py): organs that are not there are left out of the list of images, but not of the list of labels, and both are
# zipped. The empty image for the result is made as (z, x, y) where numpy's order is (z, y, x), so that columns and rows are exchanged,
# and what lies beyond is not copied.
#
# Output seen, voxels of the labels 1, 2 and 3:
#     all organs, 60 x 60            500  500  400
#     without the brainstem          500  400    0     the eye is called brainstem, the cord eye
#     all organs, 60 x 40            500    0  400     the eye is gone
#     all organs, 60 x 60, PSL       500  500    0     the cord is gone
# Nothing is printed.
#
# Who is hurt: whoever trains on cohorts where an organ is not contoured in each patient, or on MR that is not square in its plane. In
# square images of complete patients nothing of it shows. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pyradise==0.2.3 itk==5.4.7 SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6 scipy==1.17.1 opencv-python==5.0.0.93 vtk==9.7.2

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from pyradise.data import Annotator, Organ, SegmentationImage, Subject
from pyradise.process import MergeSegmentationFilter, MergeSegmentationFilterParams

BOXES = {  # limits in x, y and z
    "Brainstem": ((10, 20), (10, 20), (5, 10)),
    "Eye": ((45, 55), (10, 20), (5, 10)),
    "Cord": ((10, 20), (30, 38), (5, 10)),
}
CASES = {  # organs, size in x, y and z, orientation, voxels of each label that are seen
    "all organs, 60 x 60": (tuple(BOXES), (60, 60, 20), "LPS", (500, 500, 400)),
    "without the brainstem": (("Eye", "Cord"), (60, 60, 20), "LPS", (500, 400, 0)),
    "all organs, 60 x 40": (tuple(BOXES), (60, 40, 20), "LPS", (500, 0, 400)),
    "all organs, 60 x 60, PSL": (tuple(BOXES), (60, 60, 20), "PSL", (500, 500, 0)),
}


def mask_of(organ, size):
    mask = np.zeros(size[::-1], np.uint8)
    mask[tuple(slice(*limits) for limits in BOXES[organ][::-1])] = 1
    return SegmentationImage(sitk.GetImageFromArray(mask), Organ(organ), Annotator("someone"))


print("pyradise", version("pyradise"))
changed = []
for name, (organs, size, orientation, seen) in CASES.items():
    subject = Subject("1", [mask_of(organ, size) for organ in organs])
    true = [int(np.prod([end - start for start, end in BOXES[organ]])) * (organ in organs) for organ in BOXES]
    params = MergeSegmentationFilterParams(tuple(BOXES), (1, 2, 3), "Merged", "filter", output_orientation=orientation)
    merged = MergeSegmentationFilter().execute(subject, params).segmentation_images[-1]
    labels = sitk.GetArrayFromImage(merged.get_image_data())
    found = tuple(int((labels == label).sum()) for label in (1, 2, 3))
    print(f"{name:25} voxels of labels 1, 2, 3: {found}, true {tuple(true)}")
    if merged.get_organ(as_str=True) != "Merged" or found != seen:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: labels move up where an organ is missing, and columns and rows are exchanged")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
