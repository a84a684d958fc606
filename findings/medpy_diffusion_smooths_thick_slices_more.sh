#!/usr/bin/env bash
# medpy 0.5.2: anisotropic_diffusion with voxelspacing smooths by 4 mm across slices of 4 mm and by 2 mm within them, where it should be
# 2 mm in all directions; and minowski of -2 is not minowski of -2.0.
#
# Input, made here: a single bright voxel in 61 x 61 x 61, on voxels of several sizes, 20 steps of gamma 0.1 with a kappa so large that no
# edge stops the diffusion. And two histograms of three bins.
#
# Expected: linear diffusion for a time of 20 x 0.1 makes a Gaussian with a standard deviation of sqrt(2 x 20 x 0.1) = 2 mm along each
# axis, whatever the voxels' size. That is what voxelspacing is for.
#
# Behaviour:
# - filter/smoothing.py divides once by the spacing: the flow between two voxels is their difference / spacing, but the change of
#   a voxel is then the difference of the flows, without a division. So the second derivative is divided by h where it
#   should be by h squared, and the smoothing in mm grows with the root of h. Thick slices are smoothed most, thin pixels least.
#   The differences that are compared with kappa, to find edges, are those between voxels and not per mm.
# - metric/histogram.py has a fast way for negative whole p, which multiplies two factors too many: it sums the
#   differences to the power of p - 2 and takes the root by p. A float p goes the general way and is right.
#
# Output seen, standard deviation in mm along z, y and x:
#     voxels of 1 x 1 x 1 mm      2.00  2.00  2.00
#     voxels of 4 x 1 x 1 mm      4.00  2.00  2.00
#     voxels of 5 x 0.5 x 0.5 mm  4.47  1.41  1.41
#     minowski of (0.2, 0.3, 0.5) and (0.4, 0.4, 0.2): 0.0096 with p = -2, 0.0857 with p = -2.0
#
# Who is hurt: whoever smooths scans with thick slices, where neighbours in other slices already differ most. Without voxelspacing,
# the filter is right for voxels of equal sides. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check medpy==0.5.2 numpy==2.4.6 scipy==1.17.1

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
from medpy.filter.smoothing import anisotropic_diffusion
from medpy.metric.histogram import minowski

STEPS, GAMMA, SIDE = 20, 0.1, 61


def deviations(spacing):
    """The standard deviation in mm, along each axis, of what becomes of one bright voxel."""
    image = np.zeros((SIDE,) * 3)
    image[(SIDE // 2,) * 3] = 1
    share = anisotropic_diffusion(image, niter=STEPS, kappa=1e9, gamma=GAMMA, voxelspacing=spacing)
    assert abs(share.sum() - 1) < 1e-3
    found = []
    for axis, size in enumerate(spacing):
        places = size * (np.arange(SIDE) - SIDE // 2)
        along = share.sum(axis=tuple(other for other in range(3) if other != axis))
        found.append(float(np.sqrt((along * places**2).sum())))
    return np.array(found)


print("medpy", version("medpy"))
true = np.sqrt(2 * STEPS * GAMMA)
changed = []
for spacing in ((1, 1, 1), (4, 1, 1), (5, 0.5, 0.5)):
    found = deviations(spacing)
    print(f"voxels of {spacing} mm: standard deviation {found.round(2)} mm, expected {true:.2f} mm")
    if not np.allclose(found, true * np.sqrt(spacing), atol=0.01):
        changed.append(f"voxels of {spacing} mm")
one, other = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.4, 0.2])
whole, real = minowski(one, other, -2), minowski(one, other, -2.0)
expected = (np.abs(one - other) ** -2.0).sum() ** (1 / -2)
print(f"minowski with p = -2: {whole:.4f}; with p = -2.0: {real:.4f}, expected {expected:.4f}")
if abs(real - expected) > 1e-9 or abs(whole - 0.00965) > 1e-4:
    changed.append("minowski")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: thick slices are smoothed more, and a whole negative p counts two factors too many")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
