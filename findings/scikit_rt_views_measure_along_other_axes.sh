#!/usr/bin/env bash
# scikit-rt 0.8.2: surface distances in sagittal and coronal slices take the slice thickness for the pixel and the pixel
# for the thickness, and ROIs that are flattened for a view are flattened along another axis.
#
# Input, made here: a cuboid in a volume of 40 x 30 x 20 voxels of 1 x 1 x 3 mm, and the same moved by 4 mm along x, 4 mm
# along y or 6 mm along z.
#
# Expected: the Hausdorff distance in a slice or a projection is the shift where it lies in the view, and 0 where
# it does not; the Dice of two projections along the shift is 1.
#
# Behaviour (structures.py): get_np_voxel_size gives (across, up) for a view, while the slice is an array of (up, across).
# get_mask(view, flatten=True) sums over the axis that the view's normal has in (x, y, z), while the array is (y, x, z),
# so "y-z" is summed over y and "x-z" over x.
#
# Output seen:
#     moved       Hausdorff distance in a slice, mm     Hausdorff distance and Dice, flattened
#                 x-y    y-z    x-z                     y-z                       x-z
#     x, 4 mm     4      0      12 in place of 4        4, 0.69 in place of 0, 1  0, 1.00 in place of 4, 0.69
#     y, 4 mm     4      12 in place of 4    0          0, 1.00 in place of 4     4, 0.76 in place of 0, 1
#     z, 6 mm     0      2 in place of 6     2 in place of 6        6             6
# In 3D, and in the view "x-y" on square pixels, all are right. Nothing is printed.
#
# Who is hurt: whoever compares contours by get_comparison or get_surface_distance_metrics in sagittal or coronal
# slices, and whoever reads its columns "..._flat". We found no report. What helps: distances in 3D, or the view "x-y".
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0 pandas==2.3.3 matplotlib==3.10.9 pydicom==2.4.5 shapely==2.1.2 \
    nibabel==5.4.2 simpleitk==2.5.7 ipywidgets==8.1.8 tomli==2.5.0
# The wheel pins versions of 2022, which do not install on a newer Python.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps scikit-rt==0.8.2

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of versions that are newer than the wheel
    from skrt.simulation import SyntheticImage


def cuboid(centre):
    simulated = SyntheticImage((40, 30, 20), voxel_size=(1, 1, 3), origin=(0, 0, 0))
    simulated.add_cuboid((12, 16, 18), centre=centre, name="cuboid")
    return simulated.get_structure_set()["cuboid"]


print("scikit-rt", version("scikit-rt"))
first = cuboid((20, 14, 27))
for name, centre, slices, flat in (
    ("x, 4 mm", (24, 14, 27), (4, 0, 12), ((4, 0.69), (0, 1))),
    ("y, 4 mm", (20, 18, 27), (4, 12, 0), ((0, 1), (4, 0.76))),
    ("z, 6 mm", (20, 14, 33), (0, 2, 2), ((6, 0.71), (6, 0.71))),
):
    other = cuboid(centre)
    views = "x-y", "y-z", "x-z"
    in_slice = [float(first.get_hausdorff_distance(other, single_slice=True, view=view)) for view in views]
    flattened = [
        (
            float(first.get_hausdorff_distance(other, flatten=True, view=view)),
            float(first.get_dice(other, flatten=True, view=view, method="mask")),
        )
        for view in views[1:]
    ]
    whole = float(first.get_hausdorff_distance(other))
    print(f"moved along {name}: 3D {whole:g}; slices", dict(zip(views, in_slice)), "flattened",
          {view: (distance, round(dice, 2)) for view, (distance, dice) in zip(views[1:], flattened)})  # fmt: skip
    if whole != float(name[3]) or in_slice != [float(value) for value in slices]:
        raise SystemExit("the behaviour has changed: slices")
    if not np.allclose(flattened, flat, atol=0.01):
        raise SystemExit("the behaviour has changed: flattened")
print("as described: other axes are measured")
PYTHON
"$work/venv/bin/python" -W ignore "$work/finding.py"
