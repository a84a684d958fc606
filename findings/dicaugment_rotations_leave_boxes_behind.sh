#!/usr/bin/env bash
# DICaugment 1.0.7: rotations in the planes xz and yz rotate image and mask one way, bounding boxes the other way, and
# keypoints about another axis.
#
# Input, made here: a volume of 40 rows, 50 columns and 30 slices with a blob at x = 28, y = 17, z = 11, a keypoint
# there, and a box of 7 voxels around it.
#
# Expected: keypoint and box stay on the blob, as they do with rotations in the plane xy and with flips.
#
# Behaviour (augmentations/geometric/functional.py): bbox_rotate takes the sign -1 in xy and +1 in the other planes,
# while the image is rotated with -1 in all three. keypoint_rotate exchanges the names xz and yz before it asks for the
# matrix, which needs no exchange. And bbox_rot90 in xz with one quarter gives z_min for the box's upper x, where
# its own z_min was a moment before, so that the box has no or a negative depth.
#
# Output seen, (x, y, z), angle 25 degrees:
#     transform                    blob in the image      keypoint               centre of the box
#     Rotate, xy                   26.6  15.8  11.0       26.6  15.8  11.0       26.6  15.8  11.0
#     Rotate, xz                   26.2  17.0   9.8       28.0  15.8  12.4       29.2  17.0  12.8
#     Rotate, yz                   28.0  15.8  12.4       26.2  17.0   9.8       28.0  18.7  10.3
# Twenty voxels from the middle (xz) the keypoint is 8 and the box 17 voxels away from the blob, and bbox_rot90 makes of
# a box of 8 x 8 x 8 voxels one of 8 x 8 x -8.
# Nothing is printed. ShiftScaleRotate does the same. A quarter in RandomRotate90 drops the box or raises an error.
#
# Who is hurt: whoever trains a detector in 3D, for which boxes are there, with rotations out of the slice. We found no
# report. What helps: axes="xy" alone, or boxes that are made anew from a rotated mask.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    dicaugment==1.0.7 pydicom==3.0.2 scipy==1.17.1 numpy==2.4.6 opencv-python-headless==5.0.0.93 setuptools==80.9.0

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    import dicaugment
    from dicaugment.augmentations.geometric.functional import bbox_rot90

ROWS, COLUMNS, SLICES = 40, 50, 30
y, x, z = np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), np.arange(SLICES), indexing="ij")


def moved(plane, place, angle):
    distance = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
    blob = np.exp(-distance / 8).astype(np.float32)
    low, high = np.array(place) - 3, np.array(place) + 4
    compose = dicaugment.Compose(
        [dicaugment.Rotate(limit=(angle, angle), axes=plane, p=1)],
        keypoint_params=dicaugment.KeypointParams(format="xyz", remove_invisible=False),
        bbox_params=dicaugment.BboxParams(format="pascal_voc_3d"),
    )
    found = compose(image=blob, keypoints=[place], bboxes=[(*low, *high, 0)])
    image = found["image"] / found["image"].sum()
    seen = np.array([(image * axis).sum() for axis in (x, y, z)])
    box = np.array(found["bboxes"][0][:6], float)
    return seen, np.array(found["keypoints"][0][:3], float), (box[:3] + box[3:] - 1) / 2


print("DICaugment", version("dicaugment"))
for plane in ("xy", "xz", "yz"):
    seen, keypoint, box = moved(plane, (28, 17, 11), 25)
    print(f"{plane}: blob {np.round(seen, 1)}, keypoint {np.round(keypoint, 1)}, box {np.round(box, 1)}")
    together = np.allclose(seen, keypoint, atol=0.3), np.allclose(seen, box, atol=0.3)
    if together != ((True, True) if plane == "xy" else (False, False)):
        raise SystemExit(f"the behaviour has changed: {plane}")
    other = moved({"xy": "xy", "xz": "yz", "yz": "xz"}[plane], (28, 17, 11), 25)[0]
    back = moved(plane, (28, 17, 11), -25)[0]
    if not np.allclose(keypoint, other, atol=0.3):
        raise SystemExit("the behaviour has changed: the keypoint rotates about another axis still")
    if plane != "xy" and not np.allclose(box, back, atol=0.3):
        raise SystemExit("the behaviour has changed: the box rotates the other way still")
seen, keypoint, box = moved("xz", (44, 20, 14), 25)
off = [float(np.linalg.norm(seen - other)) for other in (keypoint, box)]
print(f"xz at (44, 20, 14): the keypoint is {off[0]:.1f} and the box {off[1]:.1f} voxels away from the blob")
if not min(off) > 8:
    raise SystemExit("the behaviour has changed: far from the middle")
quarter = np.array(bbox_rot90((24 / 32, 12 / 32, 16 / 32, 1.0, 20 / 32, 24 / 32), 1, "xz", 32, 32, 32)) * 32
print("a quarter in xz makes of a box of 8 x 8 x 8 voxels one of", quarter[3:] - quarter[:3])
if not np.allclose(quarter[3:] - quarter[:3], (8, 8, -8)):
    raise SystemExit("the behaviour has changed: bbox_rot90")
print("as described: boxes and points leave the image in xz and yz")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
