#!/usr/bin/env bash
# torch 2.13.0, CPU: conv3d computes one volume several times slower than two at once, by a rule that overlooks its width.
#
# Input, made here: volumes of random numbers, float32, and convolutions with kernels of 3 x 3 x 3.
#
# Behaviour: below a certain size torch leaves a convolution to its own loop ("slow_conv3d") instead of oneDNN, because that
# is faster for small images. The size is images x channels x the first two sides of the image, and the limit is 20480. Of a
# 2D image these two sides are all; of a 3D volume the third side does not count. So a volume of 16 channels and 32 x 32 x 256
# voxels is "small", however wide it is, and the same volume in another order of its axes (256 x 32 x 32) is not. Nor is a
# batch of two, so that two volumes are done in a fraction of the time of one. Kernels of more than 3 voxels and convolutions
# in groups are not concerned. The results agree within rounding.
#
# Output seen (Zen 4, one thread, CPU time): 16 to 16 channels, 32 x 32 x 256 voxels: one volume 0.48 s, two at once 0.12 s,
# the one with its axes in another order 0.06 s. MONAI 1.6.1's UNet (16, 32, 64, 128 channels, two residual units) on one
# patch of 64^3: 0.21 s, all 15 convolutions by the slow loop; on two patches at once 0.14 s.
#
# Who is hurt: whoever predicts volumes on a CPU with a batch of 1, the default of MONAI's sliding windows, with 3D networks
# whose deeper layers are small, and whoever feeds thin slabs. A batch of 2, or the longest side first, avoids it.
# We searched torch's issues: that slow_conv3d is slow is reported (193366), the third side that does not count is not.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check monai==1.6.1

cat > "$work/finding.py" <<'PYTHON'
import time
from collections import Counter

import torch
from monai.networks.nets import UNet
from torch.profiler import profile

SLOW, FAST = "aten::slow_conv3d", "aten::mkldnn_convolution"
torch.set_num_threads(1)


def ways(work):
    """Count by which loop convolutions are computed."""
    with profile() as seen:
        work()
    return Counter({event.key: event.count for event in seen.key_averages() if event.key in (SLOW, FAST)})


def seconds(work, turns=3):
    """Return the least CPU time of some turns."""
    spent = []
    for _ in range(turns):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


changed = []


def expect(what, holds):
    print(f"{'as described' if holds else 'CHANGED'}: {what}")
    if not holds:
        changed.append(what)


with torch.inference_mode():
    kernel = torch.randn(16, 16, 3, 3, 3)

    def convolve(volume, kernel=kernel):
        return torch.conv3d(volume, kernel, padding=1)

    for sides, way in (
        ((32, 40, 8), SLOW),  # 16 x 32 x 40 = 20480
        ((32, 40, 512), SLOW),  # 64 times as many voxels
        ((33, 40, 8), FAST),
        ((512, 40, 32), FAST),  # the same voxels in another order
    ):
        found = ways(lambda: convolve(torch.randn(1, 16, *sides)))
        expect(f"1 x 16 x {' x '.join(map(str, sides))} by {way}", found == {way: 1})
    found = ways(lambda: convolve(torch.randn(2, 16, 32, 40, 8)))
    expect(f"2 x 16 x 32 x 40 x 8 by {FAST}", found == {FAST: 1})
    found = ways(lambda: convolve(torch.randn(1, 16, 32, 40, 8), torch.randn(16, 16, 5, 5, 5)))
    expect(f"a kernel of 5 x 5 x 5 by {FAST}", found == {FAST: 1})

    volume = torch.randn(1, 16, 32, 32, 256)
    pair, turned = volume.repeat(2, 1, 1, 1, 1), volume.transpose(2, 4).contiguous()
    one, two, other = (seconds(lambda: convolve(images)) for images in (volume, pair, turned))
    print(f"16 channels, 32 x 32 x 256 voxels: {one:.2f} s; two of them at once {two:.2f} s; as 256 x 32 x 32 {other:.2f} s")
    expect("one volume takes longer than two", one > 1.3 * two)
    apart = (convolve(volume) - convolve(pair)[:1]).abs().max().item()
    expect(f"the results agree within rounding ({apart:.0e} at an SD of {convolve(pair).std():.0f})", apart < 1e-2)

    network = UNet(3, 1, 1, (16, 32, 64, 128), (2, 2, 2), num_res_units=2).eval()
    patch = torch.randn(1, 1, 64, 64, 64)
    patches = patch.repeat(2, 1, 1, 1, 1)
    print(f"MONAI's UNet, a patch of 64^3: {seconds(lambda: network(patch)):.2f} s, {dict(ways(lambda: network(patch)))}")
    print(f"two at once: {seconds(lambda: network(patches)):.2f} s, {dict(ways(lambda: network(patches)))}")
    expect("a UNet on one patch is slow in every layer", ways(lambda: network(patch))[FAST] == 0)

if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
PYTHON
"$work/venv/bin/python" "$work/finding.py" 2> >(grep -v profiler_st >&2)
