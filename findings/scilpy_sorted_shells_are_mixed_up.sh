#!/usr/bin/env bash
# scilpy 2.3.0: identify_shells(sort=True) gives volumes the b-value of another shell where three shells or more begin in another order than
# a swap of two.
#
# Input, made here: b-values of six volumes per shell, with the shells of 0, 1000 and 2000 (and 3000) in each possible order.
#
# Expected: centroids[indices] are the b-values, sorted or not, as they are without sort=True.
#
# Behaviour: the new index of a shell is taken from argsort of the centroids (bvec_bval_tools.py), which states where
# each sorted centroid comes from, and not where each centroid goes to. Both are the same if the order is its own inverse.
#
# Output seen, orders in which some volumes get another b-value:
#     3 shells    2 of 6    1000, 2000, 0 becomes 2000, 0, 1000; and 2000, 0, 1000 becomes 1000, 2000, 0
#     4 shells    14 of 24
#     5 shells    94 of 120
#     without sort=True, or with 1 or 2 shells: none
# Nothing is printed. Centroids alone are right.
#
# Who is hurt: whoever takes volumes by the sorted shells, where the file does not begin with b = 0 or mixes shells. In scilpy itself,
# scil_gradients_validate_sampling does, after it left b = 0 out: it compares shells with the samplings of others.
# We found no report. What helps: sort=False, and np.argsort of argsort.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==1.26.4 scipy==1.15.3 dipy==1.12.1 nibabel==5.3.2
# The wheel pins versions of many packages that this part of it does not import.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps scilpy==2.3.0

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version
from itertools import permutations

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from scilpy.gradients.bvec_bval_tools import identify_shells


def wrong(order, sort):
    """Whether some volume is given another b-value than its own, and what the shells become."""
    bvals = np.repeat(np.array(order, float), 6)
    centroids, indices = identify_shells(bvals, sort=sort)
    found = centroids[indices]
    return not np.array_equal(found, bvals), found[::6].astype(int).tolist()


print("scilpy", version("scilpy"))
changed = []
for shells, seen in ((1, 0), (2, 0), (3, 2), (4, 14), (5, 94)):
    orders = list(permutations(range(0, 1000 * shells, 1000)))
    unsorted, mixed = sum(wrong(order, False)[0] for order in orders), [o for o in orders if wrong(o, True)[0]]
    print(f"{shells} shells: {len(mixed)} of {len(orders)} orders are mixed up, {unsorted} without sort")
    if len(mixed) != seen or unsorted:
        changed.append(f"{shells} shells")
for order, seen in (((1000, 2000, 0), [2000, 0, 1000]), ((2000, 0, 1000), [1000, 2000, 0]), ((0, 2000, 1000), [0, 2000, 1000])):
    found = wrong(order, True)[1]
    print(f"b = {order} becomes {tuple(found)}")
    if found != seen:
        changed.append(f"{order}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: where a shell comes from is taken for where it goes")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
