#!/usr/bin/env bash
# PyMedPhys 0.41.0: gamma() takes the first step of each evaluation axis for all of its steps, so that a water tank's depth dose fails
# against itself and an electron beam that is 4 mm too deep passes; a descending axis gives no gamma at all.
#
# Input, made here: depth doses of photons and electrons in steps of 2 mm as reference; as evaluation the same formula at the depths of a
# water tank (1 mm down to 20 mm, 5 mm beyond), unchanged or with an error; and a profile with coarse steps before fine ones.
#
# Expected: what interp_algo="scipy" gives on the same input: 100 % for equal curves.
#
# Behaviour: pymedphys.interpolate.interp, the default since 0.41, divides by axis[1] - axis[0] in every cell (interp.py). It is meant for
# even axes, and refuses others, but gamma() calls it with skip_checks=True (shell.py). With finer steps first, it extrapolates by
# up to five times the cell; with coarser steps first, it stays near the earlier sample. A point is inside an axis if it is
# between its first and its last value, which for a descending axis no point is.
#
# Output seen, points that pass at 2 % and 2 mm, by default and with scipy:
#     photons, equal                          93.4 %    100 %
#     photons, measured dose 4 % too high     96.0 %     45.7 %
#     electrons, equal                        70.4 %    100 %
#     electrons, 4 mm too deep               100 %       63.0 %
#     profile, coarse steps first, equal      85.7 %    100 %
#     photons, descending axis               no point has a gamma    100 %
# Nothing is printed. On even, ascending axes both agree.
#
# Who is hurt: whoever compares a plan with a scanned depth dose or profile, or with a dose grid of uneven slices or of a patient
# whose axes descend. The documentation of gamma() names no such limit. We found no report. interp_algo="scipy" helps.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pymedphys==0.41.0 numpy==2.4.6 scipy==1.17.1 numba==0.68.1

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import pymedphys

warnings.simplefilter("error")  # a warning would be a change


def photons(depth):
    return 100 * (1.09 * np.exp(-0.0045 * depth) - 0.6 * np.exp(-0.17 * depth))


def electrons(depth):
    return 100 / (1 + np.exp((depth - 45) / 4))


def profile(x):
    return 100 / (1 + np.exp((np.abs(x) - 50) / 2.5))


def passed(reference, evaluation, algorithm):
    """Percentage of points with a gamma of at most 1, or nothing if none has a gamma."""
    (at, dose), (measured_at, measured) = reference, evaluation
    gamma = pymedphys.gamma(
        (at,), dose, (measured_at,), measured, 2, 2, lower_percent_dose_cutoff=10, max_gamma=2, interp_algo=algorithm
    )
    valid = gamma[np.isfinite(gamma)]
    return round(100 * float(np.mean(valid <= 1)), 1) if len(valid) else None


print("pymedphys", version("pymedphys"))
plan = np.arange(0, 301, 2.0)
tank = np.concatenate([np.arange(0, 20, 1.0), np.arange(20, 301, 5.0)])
even = np.arange(0, 301, 1.0)
across = np.arange(-80, 81, 2.0) + 0.7
fine_edge = [np.arange(-100, -60, 10.0), np.arange(-60, -40, 2.0), np.arange(-40, 40, 10.0), np.arange(40, 60, 2.0)]
scan = np.concatenate([*fine_edge, np.arange(60, 101, 10.0)])
changed = []
for name, reference, evaluation, seen in (
    ("photons, even steps", (plan, photons(plan)), (even, photons(even)), (100, 100)),
    ("photons, equal", (plan, photons(plan)), (tank, photons(tank)), (93.4, 100)),
    ("photons, 4 % too high", (plan, photons(plan)), (tank, 1.04 * photons(tank)), (96, 45.7)),
    ("electrons, equal", (plan, electrons(plan)), (tank, electrons(tank)), (70.4, 100)),
    ("electrons, 4 mm too deep", (plan, electrons(plan)), (tank, electrons(tank - 4)), (100, 63)),
    ("profile, equal", (across, profile(across)), (scan, profile(scan)), (85.7, 100)),
    ("photons, descending axis", (plan, photons(plan)), (even[::-1], photons(even)[::-1]), (None, 100)),
):
    found = passed(reference, evaluation, "pymedphys"), passed(reference, evaluation, "scipy")
    print(f"{name}: {found[0]} % pass by default, {found[1]} % with scipy")
    if found != seen:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: the first step of an axis is taken for all of them")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
