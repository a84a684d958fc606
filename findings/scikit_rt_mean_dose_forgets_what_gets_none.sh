#!/usr/bin/env bash
# scikit-rt 0.8.2: mean dose, dose quantiles and DVH of a structure leave out its voxels of dose 0.
#
# Input, made here: a cuboid in a volume of 40 x 30 x 20 voxels of 1 x 1 x 3 mm, and doses of 10 Gy in the part with
# x < 15, 18 or 21 mm and of 0 Gy in the rest, as a grid holds it beyond a calculated field.
#
# Expected: "Get mean dose inside an ROI", "all of the dose values for the voxels inside an ROI": a structure of
# which a tenth gets 10 Gy has a mean of 1 Gy, and half of it gets no more than 0 Gy.
#
# Behaviour: get_dose_in_roi multiplies the dose by the mask and keeps what is above 0 (dose.py), so that voxels of the
# structure without dose go with those outside of it. get_mean_dose, get_dose_quantile, get_max_dose_in_rois and
# plot_dvh are built on it. Only if no voxel at all gets dose is the mean 0.
#
# Output seen:
#     share of the structure with 10 Gy     mean dose               median           voxels counted, of all
#     8 %                                   10 Gy in place of 0.8   10 Gy (is 0)     119 of 1547
#     31 %                                  10 Gy in place of 3.1   10 Gy (is 0)     476 of 1547
#     54 %                                  10 Gy in place of 5.4   10 Gy            833 of 1547
# So structures at the edge of a field all have the same mean dose. Nothing is printed.
#
# Who is hurt: whoever computes mean doses of long organs (oesophagus, cord, bowel) on doses with zeros. We found no
# report. What helps: dose.get_dose_in_roi_3d(roi) and the mean over roi.get_mask().
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
    from skrt import Dose
    from skrt.simulation import SyntheticImage

simulated = SyntheticImage((40, 30, 20), voxel_size=(1, 1, 3), origin=(0, 0, 0))
simulated.add_cuboid((12, 16, 18), centre=(20, 14, 27), name="cuboid")
roi = simulated.get_structure_set()["cuboid"]

print("scikit-rt", version("scikit-rt"))
for field in (15, 18, 21, 40):
    values = np.zeros((30, 40, 20))
    values[:, :field] = 10
    dose = Dose(values, voxel_size=(1, 1, 3), origin=(0, 0, 0))
    inside = dose.get_data()[roi.get_mask(standardise=True)]
    mean, median, counted = (
        float(dose.get_mean_dose(roi)),
        float(dose.get_dose_quantile(roi, 0.5)),
        dose.get_dose_in_roi(roi).size,
    )
    print(f"{(inside > 0).mean():4.0%} with 10 Gy: mean {mean:.1f} Gy (is {inside.mean():.1f}), median {median:.1f} "
          f"(is {np.median(inside):.1f}), {counted} of {inside.size} voxels counted")  # fmt: skip
    if inside.size != 1547:
        raise SystemExit("the structure has another size")
    if mean != 10 or median != 10 or counted != np.count_nonzero(inside):
        raise SystemExit("the behaviour has changed")
    if (inside.mean() == 10) != (field == 40):
        raise SystemExit("the input is not what it should be")
print("as described: voxels without dose are not counted")
PYTHON
"$work/venv/bin/python" -W ignore "$work/finding.py"
