#!/usr/bin/env bash
# GateTools 0.12.9: with any threshold above 0, the relative uncertainty of a Monte Carlo dose is an absolute one; the
# flag that asks for the absolute one does nothing; and a DVH in cm3 is in mm3.
#
# Input, made here: a dose of 4 x 5 x 6 voxels and its sum of squares over 1000 events; counts; and a region of 120 voxels of 10 mm3.
#
# Expected: at the voxel of the maximum, far above the threshold, the standard error of the mean divided by the mean, whatever the
# threshold is, and the standard error itself with sigma_flag=True; as image_uncertainty_by_slice gives. 1.2 cm3.
#
# Behaviour: relative_uncertainty(x, sq_x, N, sigma_flag, threshold) and relative_uncertainty_Poisson(x, sigma_flag, threshold) are called
# without their flag, so that the threshold takes its place (image_uncertainty.py). A threshold above 0 counts as
# "absolute", and no voxel is left out. createDVH multiplies voxels by mm3 and the percentage by a hundredth (dvh.py).
#
# Output seen, uncertainty at the maximum:
#     sigma_flag   threshold    image_uncertainty   by slice    Poisson
#     False        0            0.0323              0.0323      0.100
#     False        0.01         0.0032              0.0323      9.986
#     True         0            0.0323              0.0032      0.100
#     True         0.01         0.0032              0.0032      9.986
#     createDVH(useCm3=True): 1200 in place of 1.2
# Nothing is printed. image_uncertainty_per_region makes the same call.
#
# Who is hurt: whoever states the uncertainty of a simulated dose above a threshold, the usual way: here it is ten times too small, and
# for small doses per event it is next to 0. We found no report. What helps: image_uncertainty_by_slice.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    gatetools==0.12.9 itk==5.4.7 numpy==2.4.6 scipy==1.17.1 pydicom==3.0.2 matplotlib==3.11.2

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import itk
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import gatetools

EVENTS = 1000
RANDOM = np.random.default_rng(0)
DOSE = RANDOM.uniform(1, 100, (4, 5, 6)).astype(np.float32)
SQUARES = (DOSE**2 / EVENTS * (1 + RANDOM.uniform(1, 2, DOSE.shape))).astype(np.float32)
PEAK = np.unravel_index(np.argmax(DOSE), DOSE.shape)


def image(array):
    return itk.image_from_array(array.copy())


def at_the_peak(result):
    return float(itk.array_from_image(result)[PEAK])


print("gatetools", version("gatetools"))
mean = DOSE[PEAK] / EVENTS
error = np.sqrt((SQUARES[PEAK] / EVENTS - mean**2) / (EVENTS - 1))
counts = float(DOSE[PEAK])
print(f"by hand: {error / mean:.4f} relative, {error:.4f} absolute; Poisson {counts**-0.5:.3f} and {counts**0.5:.3f}")
changed = []
for flag in (False, True):
    for threshold in (0, 0.01):
        whole = at_the_peak(gatetools.image_uncertainty([image(DOSE)], [image(SQUARES)], EVENTS, flag, threshold))
        slices, _, _ = gatetools.image_uncertainty_by_slice([image(DOSE)], [image(SQUARES)], EVENTS, flag, threshold)
        by_slice = at_the_peak(slices)
        poisson = at_the_peak(gatetools.image_uncertainty_Poisson([image(DOSE)], flag, threshold))
        print(f"sigma_flag {flag}, threshold {threshold}: image {whole:.4f}, by slice {by_slice:.4f}, Poisson {poisson:.3f}")
        seen = (
            error if threshold else error / mean,  # the threshold decides
            error if flag else error / mean,
            counts**0.5 if threshold else counts**-0.5,
        )
        if not np.allclose((whole, by_slice, poisson), seen, rtol=0.01):
            changed.append(f"sigma_flag {flag}, threshold {threshold}")
dose, region = image(DOSE), image(np.ones(DOSE.shape, np.uint8))
for made in (dose, region):
    made.SetSpacing((2, 2, 2.5))
_, volumes = gatetools.createDVH(dose, region, useCm3=True)
print(f"createDVH: {max(volumes):.1f} cm3 for 120 voxels of 2 x 2 x 2.5 mm")
if not np.isclose(max(volumes), 1200):
    changed.append("cm3")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the threshold is taken for the flag")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
