#!/usr/bin/env bash
# hf-deepali 0.6.5: mi_loss and nmi_loss with a mask count all voxels outside of it, as if both images were 0 there,
# unless voxels are sampled.
#
# Input, made here: a region of 8^3 voxels of two images, as of a CT in Hounsfield units (a smooth texture between -150
# and 150) and of another modality (minus a half of it, with noise). The region stands in the corner of volumes of 8^3
# to 24^3 voxels, with anything around it, and the mask is the region.
#
# Expected: the docstring calls it a mask of the region of interest. Then the loss is that of the region cut out,
# whatever lies around it, as it is for deepali's mse_loss and l1_loss with a mask.
#
# Behaviour: without sampling, both images are multiplied by the mask, and the joint histogram is made of all voxels
# (deepali/losses/functional.py). Each voxel outside adds to the bin of 0 and 0. With num_samples or sample_ratio,
# voxels are drawn inside the mask only, and the loss is right. Other losses of the package weigh by the mask.
#
# Output seen (MI loss, NMI loss; 64 bins over -200 to 200; of the region cut out -1.55 and 0.68):
#     mask is the whole image, 8^3      -1.55  0.68
#     12^3                              -0.91  0.70
#     16^3                              -0.50  0.78
#     24^3                              -0.19  0.89
#     24^3, 4,096 samples in the mask   -1.56  0.68
# So the loss and its gradient shrink with the share of the mask, 8 times for the last volume, against the
# regularisation beside it, and the same mask in a cropped image gives another result.
#
# Who is hurt: whoever registers by MI within a mask of the body or an organ (the review of pull request 1, which
# brought the function, asked how a mask should be handled). We found no report. What helps: num_samples.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hf-deepali==0.6.5 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from deepali.losses.functional import mi_loss, mse_loss, nmi_loss

REGION, SIZES = 8, (8, 12, 16, 24)
RANGE = {"vmin": -200.0, "vmax": 200.0}


def region():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 4, 4, 4, generator=generator)
    ct = torch.nn.functional.interpolate(coarse, size=(REGION,) * 3, mode="trilinear", align_corners=True) * 300 - 150
    return ct, -0.5 * ct + 5 * torch.randn(ct.shape, generator=generator)


def inside(values, size, around):
    volume = around * torch.ones(1, 1, size, size, size)
    volume[..., :REGION, :REGION, :REGION] = values
    return volume


def losses(size, around=120.0, **options):
    torch.manual_seed(0)
    ct, other = (inside(values, size, around) for values in region())
    mask = inside(torch.ones(1), size, 0.0)
    return [float(function(ct, other, mask=mask, **RANGE, **options)) for function in (mi_loss, nmi_loss)]


print("hf-deepali", version("hf-deepali"), "torch", torch.__version__)
true = [float(function(*region(), **RANGE)) for function in (mi_loss, nmi_loss)]
print(f"the region cut out:                MI {true[0]:.3f}, NMI {true[1]:.3f}")
found = {size: losses(size) for size in SIZES}
for size, values in found.items():
    print(f"mask in a volume of {size:2}^3:          MI {values[0]:.3f}, NMI {values[1]:.3f}")
sampled = losses(24, num_samples=4096)
print(f"the same, 4,096 samples in the mask: MI {sampled[0]:.3f}, NMI {sampled[1]:.3f}")
squares = [float(mse_loss(*(inside(v, size, 120.0) for v in region()), mask=inside(torch.ones(1), size, 0.0)))
           for size in SIZES]  # fmt: skip
print("mse_loss with the mask:", *(f"{value:.2f}" for value in squares))
if max(squares) - min(squares) > 1e-3 * squares[0] or losses(24) != losses(24, around=-30.0):
    raise SystemExit("the behaviour has changed: other losses, or what is around the mask")
if abs(found[8][0] - true[0]) > 1e-4 or abs(sampled[0] - true[0]) > 0.1:
    raise SystemExit("the behaviour has changed: the region alone, or samples")
if not (found[12][0] > 0.7 * true[0] and found[24][0] > 0.2 * true[0] and found[24][1] > true[1] + 0.1):
    raise SystemExit("the behaviour has changed: masks")
print("as described: voxels outside of the mask count as 0")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
