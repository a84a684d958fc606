#!/usr/bin/env bash
# MONAI 1.6.1: LocalNormalizedCrossCorrelationLoss(kernel_type="triangular") with kernel_size=3, the default size, is 0
# with gradient 0 for any two images, equal ones, too.
#
# Input, made here: two volumes of 16^3 voxels of noise, equal and different, for all kernels and sizes 3 to 11; and a
# registration by gradient descent of a blob that is 2 voxels aside.
#
# Expected: the loss is -1 for equal images, and a larger kernel looks at more voxels.
#
# Behaviour: make_triangular_kernel convolves a box of (kernel_size + 1) // 2 voxels with itself, after one voxel is
# taken off if that number is even, and pads the rest with zeros (image_dissimilarity.py). For size 3 the box has one
# voxel and the kernel is 0 1 0: windows of a single voxel, where each variance and covariance is 0 and 0 / smooth_dr
# follows. Sizes 7 and 11 have the triangle of sizes 5 and 9 with zeros around it. Nothing is printed.
#
# Output seen:
#     kernel_size        3                 5                 7                     9                 11
#     triangular kernel  0 1 0             1 2 3 2 1         0 1 2 3 2 1 0         1 2 3 4 5 4 ...   0 1 2 3 4 5 4 ...
#     loss, equal       -0.00             -1.00             -1.00                 -1.00             -1.00
#     rectangular and gaussian kernels: -1.00 for equal images at all sizes
#     registration, 60 steps: rectangular 0.1 voxels are left, triangular 2.0 of 2.0 voxels
#
# Who is hurt: whoever changes the window of a registration loss and leaves its size: nothing moves, and the loss looks
# like a correlation of 0.
# Issue 8780 was about the Gaussian kernel in this file, which is mended. We found no report of this one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check monai==1.6.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss

warnings.simplefilter("error")  # a warning would be a change
SIZES = (3, 5, 7, 9, 11)


def loss(kind, size):
    return LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=size, kernel_type=kind)


def blob(position):
    grid = torch.stack(torch.meshgrid(*[torch.arange(20.0)] * 3, indexing="ij"))
    squares = ((grid - position.view(3, 1, 1, 1)) ** 2).sum(0)
    return torch.exp(-squares / 30)[None, None]


def left_after_registration(kind):
    """Voxels along one axis between two blobs after 60 steps that move one of them."""
    target, shift = torch.tensor([10.0, 10.0, 10.0]), torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
    optimizer, function = torch.optim.Adam([shift], lr=0.1), loss(kind, 3)
    for _ in range(60):
        optimizer.zero_grad()
        function(blob(target + shift), blob(target)).backward()
        optimizer.step()
    return float(shift.detach().norm())


print("monai", version("monai"), "torch", torch.__version__)
torch.manual_seed(0)
image, other = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)
kinds = ("triangular", "rectangular", "gaussian")
equal = {kind: [float(loss(kind, size)(image, image)) for size in SIZES] for kind in kinds}
for kind, values in equal.items():
    print(f"{kind:12} loss of equal images, sizes {SIZES}:", *(f"{value:.2f}" for value in values))
for size in (3, 7, 11):
    kernel = loss("triangular", size).kernel
    print(f"triangular kernel of size {size}:", *(round(float(k / kernel[kernel > 0].min())) for k in kernel))
moving = image.clone().requires_grad_()
value = loss("triangular", 3)(moving, other)
value.backward()
print(f"different images: loss {float(value.detach()):.2f}, largest gradient {float(moving.grad.abs().max()):.1e}")
left = {kind: left_after_registration(kind) for kind in ("rectangular", "triangular")}
print("voxels left after a registration:", {kind: round(value, 2) for kind, value in left.items()})
changed = []
others = equal["triangular"][1:] + equal["rectangular"] + equal["gaussian"]
if equal["triangular"][0] != 0 or max(others) > -0.99:
    changed.append("equal images")
if float(value.detach()) != 0 or float(moving.grad.abs().max()) != 0:
    changed.append("gradient")
if left["triangular"] != 2 or left["rectangular"] > 0.3:
    changed.append("registration")
if not torch.equal(loss("triangular", 7).kernel[1:-1], loss("triangular", 5).kernel):
    changed.append("size 7")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the triangular kernel of size 3 is a single voxel")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
