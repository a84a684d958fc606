#!/usr/bin/env bash
# DICaugment 1.0.7: SetPixelSpacing scales an image the wrong way, and the header then says what was asked for.
#
# Input, made here: slices of 48 x 48 pixels with a disk of 12 mm, on pixels of 0.5, 2 or 1.5 x 0.75 mm.
#
# Expected: "Harmonizes spatial pixel spacing": for pixels of 1 mm an image of 0.5 mm keeps half as many pixels along
# each side, an image of 2 mm gets twice as many, and the disk is 12 pixels wide in all of them.
#
# Behaviour: the number of pixels is multiplied by new / old in place of old / new (augmentations/dicom/transforms.py).
# The same factor is right for the spacing in the header, which becomes 1 mm. So the image is away from 1 mm by the
# square of the factor that was to be mended, and spacings of a cohort are further apart than before.
#
# Output seen, SetPixelSpacing(1.0, 1.0):
#     pixels before     image before, after      in the header    disk, pixels and so mm    pixels in fact
#     0.5 x 0.5 mm      48 x 48, 96 x 96         1 x 1 mm         48 in place of 12         0.25 x 0.25 mm
#     2 x 2 mm          48 x 48, 24 x 24         1 x 1 mm         2 in place of 12          4 x 4 mm
#     1.5 x 0.75 mm     48 x 48, 32 x 64         1 x 1 mm         6 x 20 in place of 12     2.25 x 0.56 mm
#     1 x 1 mm          48 x 48, 48 x 48         1 x 1 mm         12                        1 x 1 mm
# Nothing is printed. Masks and boxes are scaled in the same way, so that they fit the image.
#
# Who is hurt: whoever harmonises CT of several scanners with it, which is what it is for. We found no report. What
# helps: Resize with numbers of pixels of one's own.
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

SIZE, WIDTH_MM = 48, 12.0


def disk(row_mm, column_mm):
    centre = (SIZE - 1) / 2
    row, column = np.meshgrid(np.arange(SIZE) - centre, np.arange(SIZE) - centre, indexing="ij")
    inside = np.hypot(row * row_mm, column * column_mm) <= WIDTH_MM / 2
    return np.repeat(inside[:, :, None], 3, axis=2).astype(np.float32)


print("DICaugment", version("dicaugment"))
for spacing in ((0.5, 0.5), (2.0, 2.0), (1.5, 0.75), (1.0, 1.0)):
    image = disk(*spacing)
    header = {"PixelSpacing": spacing, "RescaleSlope": 1, "RescaleIntercept": 0}
    found = dicaugment.Compose([dicaugment.SetPixelSpacing(1.0, 1.0, p=1)])(image=image, dicom=header)
    rows, columns = found["image"].shape[:2]
    inside = found["image"][:, :, 1] > 0.5
    seen = int(inside.any(1).sum()), int(inside.any(0).sum())
    said = tuple(float(x) for x in found["dicom"]["PixelSpacing"])
    fact = SIZE * spacing[0] / rows, SIZE * spacing[1] / columns
    print(f"{spacing} mm: {SIZE} x {SIZE} becomes {rows} x {columns}; header {said} mm, in fact ({fact[0]:.2f}, "
          f"{fact[1]:.2f}) mm; the disk of {WIDTH_MM:g} mm is {seen[0]} x {seen[1]} pixels wide")  # fmt: skip
    if said != (1.0, 1.0):
        raise SystemExit("the behaviour has changed: the header")
    if not np.allclose(fact, np.square(spacing), atol=0.02):
        raise SystemExit("the behaviour has changed: the image")
    if not np.allclose(seen, WIDTH_MM / np.square(spacing), atol=1.5):
        raise SystemExit("the behaviour has changed: the disk")
print("as described: the image is scaled by new / old")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
