#!/usr/bin/env bash
# SimpleITK 2.5.7: SymmetricForcesDemonsRegistrationFilter finds another deformation where the same images are stored in
# another order of voxels.
#
# Input, made here: two smooth balls of 31 x 31 x 31 voxels of 1 mm, 3 mm apart along the patient's x axis. DICOMOrient
# stores the pair in other orders: the same values at the same places in the patient, with axes reversed or exchanged.
#
# Expected: a displacement field in millimetres of physical space, which does not depend on the order of storage. Demons,
# FastSymmetricForcesDemons and DiffeomorphicDemons keep to that within rounding.
#
# Behaviour: the function behind the filter (itkSymmetricForcesDemonsRegistrationFunction.hxx, ComputeUpdate) adds two
# gradients. That of the fixed image comes from a calculator that honours the direction matrix, so it points along
# physical axes. That of the warped moving image is a difference of neighbours along the array's axes, divided by the
# spacing, and the direction matrix is never applied to it. The sum is right where both frames agree, which is LPS only.
# Where an axis is reversed, the two gradients cancel along it, the better the images match; where axes are exchanged,
# half of the force goes along a wrong axis.
#
# Output seen, 50 iterations, fields smoothed by 1.5 voxels; the mean displacement within 5 mm of the middle of the ball:
#     order                                  share of the difference left    displacement along x, y, z in mm
#     LPS                                     3 %                            2.46  0     0
#     RAS, as most NIfTI files are stored    20 %                            1.97  0     0
#     PLS, x and y exchanged                  7 %                            1.55  1.05  0
# Each of the other three filters finds the same in all orders: 2 to 4 % are left, 2.43 to 2.50 mm along x alone.
#
# Who is hurt: whoever registers NIfTI volumes as they come, or coronal and sagittal scans. There is no message, and the
# result looks like a registration that needs more iterations.
# The function behind the FastSymmetric and Diffeomorphic filters adds both gradients along the array's axes and takes the
# sum to physical space at the end. We searched ITK's and SimpleITK's issues and found no report.
# Storing both images in LPS order before, with DICOMOrient, helps.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import numpy as np
import SimpleITK as sitk

SIDE, APART_MM = 31, 3.0
MIDDLE = [point - 5.0 for point in np.argwhere(np.ones((11, 11, 11))) if np.linalg.norm(point - 5) <= 5]
ORDERS = ("LPS", "RAS", "PLS")
FILTERS = ("Demons", "FastSymmetricForcesDemons", "DiffeomorphicDemons", "SymmetricForcesDemons")
SEEN = {"LPS": (0.03, (2.46, 0, 0)), "RAS": (0.20, (1.97, 0, 0)), "PLS": (0.07, (1.55, 1.05, 0))}


def ball(x_mm):
    """A ball in LPS order, with the middle voxel at the origin of the patient's axes."""
    z, y, x = np.indices((SIDE,) * 3) - SIDE // 2
    image = sitk.GetImageFromArray(1000 * np.exp(-((x - x_mm) ** 2 + y**2 + z**2) / 60).astype(np.float32))
    image.SetOrigin((-(SIDE // 2),) * 3)
    return image


def registered(name, fixed, moving):
    """The share of the difference that is left, and the mean displacement within 5 mm of the middle of the patient."""
    demons = getattr(sitk, name + "RegistrationFilter")()
    demons.SetNumberOfIterations(50)
    demons.SetStandardDeviations(1.5)
    field = sitk.DisplacementFieldTransform(sitk.Cast(demons.Execute(fixed, moving), sitk.sitkVectorFloat64))
    moved = np.mean([np.subtract(field.TransformPoint(point), point) for point in MIDDLE], axis=0)
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, field, sitk.sitkLinear, 0.0))
    fixed, moving = sitk.GetArrayFromImage(fixed), sitk.GetArrayFromImage(moving)
    return np.abs(warped - fixed).mean() / np.abs(moving - fixed).mean(), moved


print("SimpleITK", sitk.Version.VersionString())
pair = ball(0), ball(APART_MM)
changed = []
for name in FILTERS:
    found = {order: registered(name, *(sitk.DICOMOrient(one, order) for one in pair)) for order in ORDERS}
    for order, (left, moved) in found.items():
        print(f"{name:26} {order}: {left:6.1%} left, moved by", *(f"{one:5.2f}" for one in moved + 0.0), "mm")
        wanted = SEEN[order] if name == "SymmetricForcesDemons" else (0.03, (2.46, 0, 0))
        if abs(left - wanted[0]) > 0.015 or np.abs(moved - wanted[1]).max() > 0.1:
            changed.append(f"{name} in {order} order")
if changed:
    raise SystemExit("the behaviour has changed: " + ", ".join(changed))
print("as described: SymmetricForcesDemons alone depends on the order of storage")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
