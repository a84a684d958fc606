#!/usr/bin/env bash
# MONAI 1.6.1: sliding_window_inference(mode="gaussian") leaves jumps at the borders of its windows.
#
# Input, made here: a smooth image of 64^3 voxels (eight cosine waves of at least 40 voxels, seeded) and, as network,
# InstanceNorm3d alone. It normalises each window by that window's own mean and SD, so that two windows disagree where
# they overlap, as they do in any network with such layers. Windows of 32^3, everything else at MONAI's defaults.
#
# Behaviour: the docstring says that "gaussian" gives less weight to predictions on edges of windows, with an SD of
# sigma_scale * size, an eighth of the window. compute_importance_map (monai/data/utils.py) then raises every weight to
# at least 0.001, under the comment "handle non-positive weights". For a window of 32^3 that is every voxel further than
# 3.7 SD from the middle: 58 % of the window and its whole outermost layer. Where no window has its middle nearby, all
# windows therefore weigh the same, as in mode="constant", and the output jumps where one of them ends.
# - overlap 0.5: in the 6 voxels next to the faces of the volume, and a little further inside.
# - overlap 0.25, the default: everywhere.
# There is no message. The floor is in no docstring, and no parameter switches it off. A larger sigma_scale lifts the
# Gaussian above it, but then the Gaussian itself is not small at the border: the best that we tried, 0.25, left jumps
# of 0.48 SD at overlap 0.5 and 0.69 SD at 0.25. The parameter roi_weight_map helps: given the default Gaussian without
# the floor, the same function leaves no jumps.
#
# Output seen. A jump is the step from the last voxel before a border to the first one behind it, less the mean of the
# steps before and after it, in SD of the output; the largest one over all borders:
#                                     with the floor   without it
#     overlap 0.5,  next to faces     1.97             0.001
#     overlap 0.5,  middle            0.11             0.001
#     overlap 0.25, next to faces     1.92             0.011
#     overlap 0.25, middle            1.10             0.009
# A few lines of numpy, given the same windows, give MONAI's output with the floor, and the smooth one without it.
#
# Why there is a floor: a weight of 0 at a voxel that a single window reaches would give 0 / 0. In float32 the smallest
# weight of this Gaussian is 1.7e-10 at the corners, so that there is nothing to handle; in float16 it would be 0.
# We searched MONAI's issues and pull requests and found no report. The description of pull request 5302, which brought
# the present formula, does not mention the floor.
#
# Who is hurt: whoever makes images by windows, where a step shows; a segmentation may hide it in its threshold.
# The script needs no GPU. An index that offers torch for the CPU alone saves gigabytes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check monai==1.6.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from functools import reduce
from importlib.metadata import version
from itertools import product

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

SIZE, WINDOW, NEAR = 64, 32, 6
STARTS = {0.5: [0, 16, 32], 0.25: [0, 24, 32]}  # of the windows along each axis, by overlap
LARGE, NONE = 0.5, 0.02  # SD


def smooth_image():
    torch.manual_seed(0)
    voxels = torch.stack(torch.meshgrid(*[torch.arange(float(SIZE))] * 3, indexing="ij"))
    image = torch.zeros([SIZE] * 3)
    for _ in range(8):
        direction = torch.nn.functional.normalize(torch.randn(3), dim=0)
        wavelength = 40 + 120 * torch.rand(())
        image += torch.cos(2 * torch.pi * (torch.tensordot(direction, voxels, 1) / wavelength + torch.rand(())))
    return image


def gaussian():
    """The documented weights: a Gaussian with an SD of an eighth of the window, and no floor."""
    distance = np.arange(WINDOW) - (WINDOW - 1) / 2
    bell = np.exp(-0.5 * (distance / (0.125 * WINDOW)) ** 2)
    return reduce(np.multiply.outer, [bell] * 3)


def by_monai(image, network, overlap, **weights):
    with torch.no_grad():
        output = sliding_window_inference(
            image[None, None], [WINDOW] * 3, 1, network, overlap=overlap, mode="gaussian", **weights
        )
    return output[0, 0].numpy()


def by_hand(image, network, overlap, weights):
    total, weight = np.zeros(image.shape), np.zeros(image.shape)
    for start in product(STARTS[overlap], repeat=3):
        window = tuple(slice(s, s + WINDOW) for s in start)
        total[window] += weights * network(image[window][None, None])[0, 0].numpy()
        weight[window] += weights
    return total / weight


def largest_jumps(output, overlap):
    """The largest jumps, in SD of the output, next to the faces and in the middle of the volume."""
    borders = {s for s in STARTS[overlap] if s} | {s + WINDOW for s in STARTS[overlap] if s + WINDOW < SIZE}
    depth = np.minimum(np.arange(SIZE), SIZE - 1 - np.arange(SIZE))  # voxels to the nearer face
    depth = np.minimum.outer(depth, depth)  # across a border
    faces, middle = 0, 0
    for axis, border in product(range(3), borders):
        before, last, first, after = (output.take(border + k, axis) for k in (-2, -1, 0, 1))
        jump = abs((first - last) - ((last - before) + (after - first)) / 2) / output.std()
        faces = max(faces, jump[depth < NEAR].max())
        middle = max(middle, jump[depth >= WINDOW // 2].max())
    return faces, middle


changed = []


def check(holds, what):
    if not holds:
        changed.append(what)


print("MONAI", version("monai"), "torch", version("torch"))
smooth = gaussian()
weights = compute_importance_map((WINDOW,) * 3, mode="gaussian").numpy()
at_floor = np.isclose(weights, 1e-3, rtol=1e-5, atol=0)
print(f"smallest weight {weights.min():.3g}, of the Gaussian itself {smooth.min():.3g}")
print(f"{at_floor.mean():.0%} of the window has that weight, and {at_floor[0].mean():.0%} of its outermost layer")
check(np.allclose(weights, smooth.clip(min=1e-3), rtol=1e-4, atol=0), "the weights")
check(at_floor[0].all(), "the outermost layer")

image, network = smooth_image(), torch.nn.InstanceNorm3d(1)
for overlap in STARTS:
    floored = by_monai(image, network, overlap)
    unfloored = by_monai(image, network, overlap, roi_weight_map=torch.from_numpy(smooth).float())
    for name, output, own in (("with", floored, smooth.clip(min=1e-3)), ("without", unfloored, smooth)):
        difference = abs(output - by_hand(image, network, overlap, own)).max()
        faces, middle = largest_jumps(output, overlap)
        print(
            f"overlap {overlap}, {name} the floor: jumps of at most {faces:.4f} SD next to the faces and "
            f"{middle:.4f} SD in the middle; by hand, the output differs by at most {difference:.1e}"
        )
        check(difference < 1e-4, f"the output {name} the floor at overlap {overlap}")
        if name == "with":
            check(faces > LARGE, f"jumps next to the faces at overlap {overlap}")
            check(middle > (LARGE if overlap == 0.25 else NONE), f"jumps in the middle at overlap {overlap}")
        else:
            check(max(faces, middle) < NONE, f"no jumps without the floor at overlap {overlap}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the floor under the weights makes the jumps")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
