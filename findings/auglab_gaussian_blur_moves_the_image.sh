#!/usr/bin/env bash
# AugLab 20260109: its Gaussian blur moves the image by half a voxel to a voxel along each axis, always the same way,
# and the label stays.
#
# Input, made here: a volume of 21^3 voxels with a cube of 5^3 voxels in the middle.
#
# Expected: RandomConvTransformGPU(kernel_type="GaussianBlur", sigma=1.0) draws a standard deviation for each axis and
# blurs: the cube stays in the middle, and a standard deviation near 0 changes nothing.
#
# Behaviour: the kernel of three voxels is exp(-x^2 / 2 sigma^2) at x = 0, 1, 2 in place of -1, 0, 1
# (get_gaussian_kernel1d in transforms/gpu/contrast.py), so its peak is its first voxel. With a standard deviation of
# 0.1 it is (1, 0, 0): a shift by a voxel, unblurred. At 0.5 it is (0.88, 0.12, 0.00), at 1.0 (0.57, 0.35, 0.08).
#
# Output seen, over 200 draws (seed 0): the cube's centre moves by 0.50 to 1.00 voxels along each axis, by 0.83 on
# average and never back. kernel_type="UnsharpMask" uses the same kernel: it adds the difference to a shifted image,
# so that three faces of the cube are bright and the three others are not (1.8 against 1.0 on average).
# Nothing is printed.
#
# Who is hurt: whoever trains nnU-Net with the trainers of AugLab: contrast augmentation moves images against their
# labels, by as much as the borders are uncertain. We found no report. What helps: the Gaussian blur of another package.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check kornia==0.8.2 numpy==2.4.6 pillow==13.0.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 auglab==20260109

cat > "$work/finding.py" <<'PYTHON'
import importlib.util
import sys
import types
import warnings
from importlib.metadata import version

import torch

# AugLab needs one module of torchvision in Python; its compiled part may not fit a torch for CPUs.
torchvision = types.ModuleType("torchvision")
torchvision.__path__ = importlib.util.find_spec("torchvision").submodule_search_locations
sys.modules["torchvision"] = torchvision
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from auglab.transforms.gpu.contrast import RandomConvTransformGPU, get_gaussian_kernel1d

torch.set_num_threads(1)
volume = torch.zeros(1, 1, 21, 21, 21)
volume[..., 8:13, 8:13, 8:13] = 1
place = torch.arange(21.0)


def centre(image):
    image = image[0, 0]
    sums = (image.sum((1, 2)), image.sum((0, 2)), image.sum((0, 1)))
    return torch.stack([(along * place).sum() / along.sum() for along in sums])


print("auglab", version("auglab"), "torch", torch.__version__)
for sigma in (0.1, 0.5, 1.0):
    kernel = get_gaussian_kernel1d(3, torch.tensor(sigma), torch.float32, torch.device("cpu"))
    print(f"standard deviation {sigma}: kernel", [round(float(k), 2) for k in kernel])
    if not kernel[0] > kernel[1] > kernel[2] - 1e-12:
        raise SystemExit("the behaviour has changed: the kernel")
torch.manual_seed(0)
blur = RandomConvTransformGPU(kernel_type="GaussianBlur", sigma=1.0, p=1.0)
moved = torch.stack([centre(blur(volume.clone())) - 10 for _ in range(200)])
print(f"the centre moves by {moved.min():.2f} to {moved.max():.2f} voxels, {moved.mean():.2f} on average")
if not (moved.min() > 0.45 and moved.max() < 1.01 and moved.mean() > 0.75):
    raise SystemExit("the behaviour has changed: the shift")
sharpen = RandomConvTransformGPU(kernel_type="UnsharpMask", sigma=1.0, unsharp_amount=1.0, p=1.0)
sharp = torch.stack([sharpen(volume.clone())[0, 0] for _ in range(50)]).mean(0)
low = (sharp[8, 10, 10] + sharp[10, 8, 10] + sharp[10, 10, 8]) / 3
high = (sharp[12, 10, 10] + sharp[10, 12, 10] + sharp[10, 10, 12]) / 3
print(f"UnsharpMask: voxels at three faces {low:.2f}, at the three opposite ones {high:.2f}")
if not low > high + 0.3:
    raise SystemExit("the behaviour has changed: UnsharpMask")
print("as described: the kernel is not centred")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
