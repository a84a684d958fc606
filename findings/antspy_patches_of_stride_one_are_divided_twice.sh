#!/usr/bin/env bash
# antspyx 0.6.3: an image that is cut into patches and put together again comes back 16 times darker, if patches of 4 x 4 pixels are
# one pixel apart. With steps of 2 or 4 pixels, or with a mask, it comes back as it was.
#
# Input, made here: an image of 20 x 24 pixels with the value 7 and one with noise.
#
# Expected: reconstruct_image_from_patches(extract_image_patches(image)) is the image, as each pixel is the mean of the
# patches that cover it.
#
# Behaviour: for a stride of 1, reconstruct_image_from_patches (deeplearn/reconstruct_image_from_patches.py) counts the patches that
# cover a pixel and divides by the count. After that, where no mask is given, it also divides by the number that a formula gives
# for the same count. So a pixel in the middle is divided by 16 twice; a corner, which one patch covers, is right. (In 3D, the
# loop of the second division runs one step past each side and ends in an IndexError.)
#
# Output seen, smallest and largest value:
#     stride 1             0.44  7.00
#     stride 2, stride 4   7.00  7.00
#     stride 1, a mask     7.00  7.00
#
# Who is hurt: whoever applies a network to patches that overlap as much as they can, for the smoothest result. The corners keep
# their values, so the image has a bright rim. The default stride is 1. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check antspyx==0.6.3 numpy==2.3.5

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import ants
import numpy as np

PATCH, SIDES = (4, 4), (20, 24)


def covering(side, patch):
    """How many patches, one pixel apart, cover each pixel of a side."""
    pixels = np.arange(side)
    return np.minimum.reduce([pixels + 1, np.full(side, patch), side - pixels])


COVERED = np.outer(*(covering(side, patch) for side, patch in zip(SIDES, PATCH)))
print("antspyx", version("antspyx"))
changed = []
for name, pixels in (
    ("constant", np.full(SIDES, 7, np.float32)),
    ("noise", np.random.default_rng(0).uniform(1, 2, SIDES).astype(np.float32)),
):
    image = ants.from_numpy(pixels)
    for stride in (1, 2, 4):
        patches = ants.extract_image_patches(image, PATCH, stride_length=stride)
        again = ants.reconstruct_image_from_patches(patches, image, stride_length=stride).numpy()
        print(f"{name}, stride {stride}: {again.min():.2f} to {again.max():.2f}, given {pixels.min():.2f} to {pixels.max():.2f}")
        if not np.allclose(again, pixels / COVERED if stride == 1 else pixels, atol=1e-4):
            changed.append(f"{name}, stride {stride}")
    whole = ants.from_numpy(np.ones(SIDES, np.float32))
    patches = ants.extract_image_patches(image, PATCH, stride_length=1, mask_image=whole)
    again = ants.reconstruct_image_from_patches(patches, whole, stride_length=1, domain_image_is_mask=True).numpy()
    print(f"{name}, stride 1, a mask of all: {again.min():.2f} to {again.max():.2f}")
    if not np.allclose(again, pixels, atol=1e-4):
        changed.append(f"{name}, mask")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: with a stride of 1, each pixel is divided by the number of its patches twice")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
