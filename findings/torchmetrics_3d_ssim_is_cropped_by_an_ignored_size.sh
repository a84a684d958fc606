#!/usr/bin/env bash
# torchmetrics 1.9.0: in 3D, Gaussian SSIM changes with kernel_size, which it says it ignores, and leaves the last axis's
# borders out or counts places outside the volume wherever sigma is not near 1.5.
#
# Input, made here: a smooth volume of 40 x 36 x 32 voxels and a noisy copy, both in [0, 1].
#
# Expected: the documentation of structural_similarity_index_measure calls kernel_size "the size of the uniform kernel ...
# ignored if a Gaussian kernel is used": the Gaussian's size follows from sigma (radius 3.5 sigma, rounded). The full image
# of SSIM has the shape of the volume, and volumes whose axes are exchanged have the same score for one sigma.
#
# Behaviour: the volumes are mirrored at their faces by half a kernel and then filtered without padding, so that both must
# be of one size. For the first two axes the padding follows from the Gaussian's size. For the third it is always taken
# from kernel_size (functional/image/ssim.py, pad_d), 5 voxels by default. Where the Gaussian is larger (sigma above 1.57),
# the outermost slices of the last axis are dropped; where it is smaller (sigma below 1.29), windows around mirrored places
# outside the volume count too. The default, sigma=1.5 and kernel_size=11, is the case where both agree.
#
# Output seen:
#     sigma  kernel_size   score    reference    shape of the full image    in 2D (one slice)
#     1.5    11            0.7052   0.7052       40 x 36 x 32               0.6296
#     1.5    7             0.6987   0.7052       40 x 36 x 28               0.6296
#     1.5    21            0.7136   0.7052       40 x 36 x 42               0.6296
#     2.5    11            0.7766   0.7879       40 x 36 x 24
#     1.0    11            0.6146   0.6113       40 x 36 x 34
# The reference filters by scipy in float64. With sigma=2.5 the score is 0.7766, and 0.7870 or 0.7852 with the
# first or the second axis put last.
#
# Who is hurt: whoever compares 3D SSIM for several sigmas, gives one sigma for each axis since voxels are not cubes, or
# adds the map of return_full_image to a picture of the volume. 2D is right throughout, and no test in 2D shows it.
# We searched torchmetrics' issues: 2718 brought the padding of uniform kernels in order, this is not reported.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0 scipy==1.17.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import numpy as np
import torch
import torchmetrics
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import structural_similarity_index_measure

C1, C2 = 0.01**2, 0.03**2


def volumes():
    rng = np.random.default_rng(0)
    real = gaussian_filter(rng.normal(size=(40, 36, 32)), 2)
    real = (real - real.min()) / np.ptp(real)
    made = np.clip(real + 0.05 * rng.normal(size=real.shape), 0, 1)
    return real.astype(np.float32), made.astype(np.float32)


def scored(real, made, sigma, kernel_size=11):
    pair = [torch.from_numpy(np.ascontiguousarray(one))[None, None] for one in (real, made)]
    options = {"sigma": sigma, "kernel_size": kernel_size, "data_range": 1.0, "return_full_image": True}
    score, image = structural_similarity_index_measure(*pair, **options)
    return float(score), tuple(image.shape[2:])


def reference(real, made, sigma):
    """Mean SSIM over the volume, mirrored at its faces."""

    def blurred(volume):
        return gaussian_filter(volume, sigma, mode="mirror", radius=int(3.5 * sigma + 0.5))

    x, y = real.astype(np.float64), made.astype(np.float64)
    mx, my = blurred(x), blurred(y)
    vx, vy, both = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    return float(((2 * mx * my + C1) * (2 * both + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))).mean())


print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
real, made = volumes()
flat = scored(real[20], made[20], 1.5)[0]
changed = []
for sigma, kernel_size, last in ((1.5, 11, 32), (1.5, 7, 28), (1.5, 21, 42), (2.5, 11, 24), (1.0, 11, 34)):
    score, shape = scored(real, made, sigma, kernel_size)
    right = reference(real, made, sigma)
    print(f"sigma {sigma} kernel_size {kernel_size:2}: {score:.4f} for {right:.4f}, full image {shape}", end="")
    print(f", in 2D {scored(real[20], made[20], sigma, kernel_size)[0]:.4f}")
    if shape != (40, 36, last) or (abs(score - right) < 1e-4) != (last == 32):
        changed.append(f"sigma {sigma}, kernel_size {kernel_size}")
    if sigma == 1.5 and abs(scored(real[20], made[20], sigma, kernel_size)[0] - flat) > 1e-6:
        changed.append(f"2D, kernel_size {kernel_size}")
for sigma in (1.5, 2.5):
    ways = {axis: scored(*(np.moveaxis(one, axis, -1) for one in (real, made)), sigma)[0] for axis in (2, 0, 1)}
    print(f"sigma {sigma}, with axis", ", ".join(f"{axis} last: {score:.4f}" for axis, score in ways.items()))
    if (np.ptp(list(ways.values())) > 1e-3) != (sigma == 2.5):
        changed.append(f"axes exchanged, sigma {sigma}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the last axis is padded by a size that the Gaussian kernel does not have")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
