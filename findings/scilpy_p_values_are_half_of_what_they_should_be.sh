#!/usr/bin/env bash
# scilpy 2.3.0: the p-values of a comparison of connectivity matrices are half of what a t-test gives, so that at 0.05 one edge in ten is
# found without any difference.
#
# Input, made here: matrices of 40 x 40 edges of two groups of 10 and 12 subjects, all from one distribution.
#
# Expected: the p-values of scipy's ttest_ind and ttest_rel, two-sided or one-sided, and about 5 % of them below 0.05.
#
# Behaviour: ttest_two_matrices takes the tail of the distribution beyond |t| for tail="both", which is one of two tails and is not
# doubled, and half of the tail beyond t for "left" and "right" (matrix_stats.py). The corrections by --fdr and --bonferroni begin
# with these values.
#
# Output seen, scilpy's p-value divided by scipy's for all 1600 edges, and edges below 0.05:
#     tail              ratio     scilpy    scipy
#     both              0.5       161        87
#     left              0.5       151        79
#     right             0.5       171        82
#     both, paired      0.5       144        65
# Nothing is printed. The t-statistics themselves are right.
#
# Who is hurt: whoever compares connectomes by scil_connectivity_compare_populations, which calls this function and names its
# output p-values. We found no report. What helps: twice the values, which is exact for all tails.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==1.26.4 scipy==1.15.3 dipy==1.12.1 nibabel==5.3.2 bctpy==0.6.1 pandas==2.2.3 statsmodels==0.14.4 \
    scikit-image==0.25.2 scikit-learn==1.9.1
# The wheel pins versions of many packages that this part of it does not import.
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps scilpy==2.3.0

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
from scipy.stats import ttest_ind, ttest_rel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from scilpy.stats.matrix_stats import ttest_two_matrices

random = np.random.default_rng(0)
FIRST, SECOND = random.normal(5, 1, (40, 40, 10)), random.normal(5, 1, (40, 40, 12))
ALTERNATIVES = {"both": "two-sided", "left": "less", "right": "greater"}

print("scilpy", version("scilpy"))
changed = []
for tail, paired, seen in (
    ("both", False, (161, 87)),
    ("left", False, (151, 79)),
    ("right", False, (171, 82)),
    ("both", True, (144, 65)),
):
    second = SECOND[..., :10] if paired else SECOND
    found = ttest_two_matrices(FIRST, second, paired, tail, fdr=False, bonferroni=False)
    test = ttest_rel if paired else ttest_ind
    right = test(FIRST, second, axis=2, alternative=ALTERNATIVES[tail]).pvalue
    ratio, below = found / right, (int((found < 0.05).sum()), int((right < 0.05).sum()))
    name = tail + (", paired" if paired else "")
    print(f"{name}: scilpy / scipy {ratio.min():.4f} to {ratio.max():.4f}; below 0.05: {below[0]} and {below[1]} of 1600")
    if not np.allclose(ratio, 0.5) or below != seen:
        changed.append(name)
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: one tail of two, or half of one")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
