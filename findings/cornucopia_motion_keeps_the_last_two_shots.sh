#!/usr/bin/env bash
# cornucopia 0.5.1: IntraScanMotionTransform puts the image together from the last two shots alone, and along the wrong
# axis.
#
# Input, made here: a volume of 32^3 voxels (an ellipsoid with a block in it), moved in four shots: first by a stand-in
# for motion that multiplies the image by 1, 2, 3 and 4, slice by slice; then by the package's random rigid motion in
# k-space.
#
# Expected: pattern n of shot n "indicating which frequencies/slices are acquired in each shot": the slices 0 to 7 of
# the first axis are 1, 8 to 15 are 2, 16 to 23 are 3, and 24 to 31 are 4.
#
# Behaviour (cornucopia/kspace.py): y = torch.where(pattern[None], y, moved) keeps what is there where the shot was
# acquired, and takes the shot everywhere else: the reverse. After the loop all is of the last shot, apart from the
# place of the last shot itself, which has the one before. And the pattern, of shape (1, X), meets the last axis of the
# array, while the shots and the Fourier transform go along axis 1. So in k-space no lines are mixed, and nothing
# rings: a quarter of the planes along another axis comes from the third shot, the others from the fourth.
#
# Output seen:
#     slices, axis 0: the values along axis 0 are all 4; along axis 2 they are 24 times 4, then 8 times 3
#     slices, axis 2: the values along axis 2 are all 4; along axis 1 they are 24 times 4, then 8 times 3
#     k-space, axis 0, random motion: relative difference to the k-space of four shots 0.592, and to 24 planes of the
#     fourth shot and 8 of the third, without any Fourier transform, 0.000000
# Where the sides differ, it raises an error; with cubes nothing is printed.
#
# Who is hurt: whoever trains on motion that is simulated with it, or with SmallIntraScanMotionTransform, which is this
# with two shots (exchanged, and along the wrong axis). We found no report. What helps: pattern[None, :, None, None],
# and moved before y in torch.where.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cornucopia==0.5.1 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import random
import warnings
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are imported beside it
    from cornucopia.intensity import MulValueTransform
    from cornucopia.kspace import IntraScanMotionFinalTransform, IntraScanMotionTransform

SIZE, SHOTS = 32, 4
patterns = torch.zeros(SHOTS, SIZE, dtype=torch.bool)
patterns[torch.arange(SIZE) * SHOTS // SIZE, torch.arange(SIZE)] = True


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


print("cornucopia", version("cornucopia"), "torch", torch.__version__)
stand_ins = [MulValueTransform(float(shot + 1)) for shot in range(SHOTS)]
for axis, other in ((0, 2), (2, 1)):
    found = IntraScanMotionFinalTransform(stand_ins, patterns, axis=axis - 3)(torch.ones(1, SIZE, SIZE, SIZE))[0]
    along = found.movedim(axis, 0)[:, 0, 0].tolist()
    across = found.movedim(other, 0)[:, 0, 0].tolist()
    print(f"slices, axis {axis}: along it {along[::8]}, along axis {other} {across[::8]}")
    if along != [4.0] * 32 or across != [4.0] * 24 + [3.0] * 8:
        raise SystemExit("the behaviour has changed: slices")

where = torch.stack(torch.meshgrid(*[torch.arange(SIZE) - 15.5] * 3, indexing="ij"))
image = ((where / torch.tensor([13.0, 10.0, 8.0])[:, None, None, None]).norm(dim=0) < 1).float()[None]
image[:, 10:14, 12:18, 14:20] = 2
torch.manual_seed(0)
random.seed(0)
simulated = IntraScanMotionTransform(shots=SHOTS, axis=-3, freq=True).final(image)
found = simulated(image)
moved = [motion(image) for motion in simulated.motion]
spectrum = torch.zeros(image.shape, dtype=torch.complex64)
for shot, pattern in zip(moved, simulated.patterns, strict=True):
    lines = torch.fft.fftshift(torch.fft.fft(shot, dim=1), dim=1)
    spectrum[:, pattern] = lines[:, pattern]
expected = torch.fft.ifft(torch.fft.ifftshift(spectrum, dim=1), dim=1).abs()
planes = torch.cat([moved[3][..., :24], moved[2][..., 24:]], -1)
print(f"k-space, axis 0: {apart(found, expected):.3f} to four shots, {apart(found, planes):.6f} to planes of two, "
      f"four shots to the image at rest {apart(expected, image):.3f}")  # fmt: skip
if apart(found, planes) > 1e-4 or apart(found, expected) < 0.1:
    raise SystemExit("the behaviour has changed: k-space")
print("as described: two shots along the wrong axis")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
