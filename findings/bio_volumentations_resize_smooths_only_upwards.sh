#!/usr/bin/env bash
# Bio-Volumentations 1.4.0: Resize and Rescale smooth before they enlarge and not before they make an image smaller, and
# PoissonNoise makes the image twice as bright.
#
# Input, made here: volumes of 64^3 voxels of noise (even between 0 and 1), and one of 100 counts everywhere.
#
# Expected: anti_aliasing_downsample is True by default, "Apply the Gaussian filter before down-sampling.
# Recommended": a volume of a quarter of the size is that of scikit-image with anti_aliasing=True, where noise is
# averaged. "Add Poisson noise" keeps the mean: 100 counts become 100 +- 10.
#
# Behaviour: the filter is asked for where any old side is *shorter* than the new one (resize in
# augmentations/functional.py), so never where all sides shrink. PoissonNoise adds the draw of a Poisson distribution
# whose mean is the image to the image itself (poisson_noise), in place of the draw alone, or of its difference.
#
# Output seen, standard deviation of the noise after Resize (0.289 before it):
#     to 16^3             0.102 with the filter, 0.102 without it; scikit-image with it 0.023
#     to 16 x 16 x 128    0.042 with the filter, 0.115 without it; scikit-image with it 0.042
# So a fine pattern, bright and dark slices in turn, becomes a uniform volume or keeps its full contrast by chance.
#     PoissonNoise of 100 counts: mean 200.0, standard deviation 10.0
# Nothing is printed. A later Normalize hides the brightness, and the noise is half of what it should be beside it.
#
# Who is hurt: whoever makes microscopy or CT smaller for a network, or simulates counts. We found no report. What
# helps: GaussianBlur before Resize, and PoissonNoise with half of the image taken off again.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    bio-volumentations==1.4.0 scikit-image==0.26.0 scipy==1.17.1 simpleitk==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import bio_volumentations
import numpy as np
from skimage.transform import resize

noise = np.random.default_rng(0).random((1, 64, 64, 64), dtype=np.float32)
stripes = np.zeros((1, 64, 64, 64), np.float32)
stripes[:, ::4] = 1  # every fourth slice is bright


def resized(image, shape, **options):
    return bio_volumentations.Compose([bio_volumentations.Resize(shape=shape, **options)])(image=image.copy())["image"]


def reference(image, shape):
    return resize(image[0], shape, order=1, mode="reflect", anti_aliasing=True)


print("bio-volumentations", version("bio-volumentations"))
for shape, filtered in (((16, 16, 16), False), ((16, 16, 128), True)):
    by_default, without = resized(noise, shape), resized(noise, shape, anti_aliasing_downsample=False)
    right = reference(noise, shape)
    print(f"to {shape}: noise of {by_default.std():.3f}, without the filter {without.std():.3f}, "
          f"scikit-image {right.std():.3f}")  # fmt: skip
    if np.allclose(by_default[0], right, atol=1e-5) != filtered or np.array_equal(by_default, without) == filtered:
        raise SystemExit("the behaviour has changed: the filter")
lost, kept = float(resized(stripes, (16, 64, 64)).max()), float(reference(stripes, (16, 64, 64))[4:12].mean())
print(f"one bright slice of four, 16 slices are left: {lost:.2f} everywhere; scikit-image {kept:.2f}")
if lost > 0.01 or abs(kept - 0.25) > 0.03:
    raise SystemExit("the behaviour has changed: stripes")
np.random.seed(0)
counts = bio_volumentations.Compose([bio_volumentations.PoissonNoise(p=1)])(image=np.full((1, 32, 32, 32), 100.0))["image"]
print(f"PoissonNoise of 100 counts: mean {counts.mean():.1f}, standard deviation {counts.std():.1f}")
if abs(counts.mean() - 200) > 1 or abs(counts.std() - 10) > 0.5:
    raise SystemExit("the behaviour has changed: PoissonNoise")
print("as described: smoothed only upwards, and twice as bright")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
