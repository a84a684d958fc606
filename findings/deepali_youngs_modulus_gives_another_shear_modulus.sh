#!/usr/bin/env bash
# hf-deepali 0.6.5: lame_parameters(first_parameter, youngs_modulus) returns a wrong shear modulus, for the elastic
# regularisation of registrations; of Young's modulus with Poisson's ratio, the usual pair, it makes nothing at all.
#
# Input, made here: four materials (Lame's lambda and mu known), each described by pairs of two moduli.
#
# Expected: with R = sqrt(E^2 + 9 lambda^2 + 2 E lambda), mu = (E - 3 lambda + R) / 4; for lambda = 1 and E = 2.5, mu =
# 1.
#
# Behaviour: the code (deepali/losses/functional.py) divides R alone by 4: E - 3 lambda + R / 4. For lambda = 1 and E =
# 2.5 that is 0.625; where the sum is negative, the function refuses the pair ("is negative"). For Poisson's ratio with
# Young's modulus, two factors of the denominator stand side by side without a multiplication sign, so that Python calls
# a number: TypeError. The other four pairs are right.
#
# Output seen, (lambda, mu) from (lambda, E):
#     (1, 1)      -> (1, 0.625)
#     (1, 10)     -> (1, 23.43)
#     (0.5, 2)    -> (0.5, 4.175)
#     (4, 0.5)    -> refused
#     (1, 1) from Poisson's ratio and E -> TypeError
# elasticity_loss and the module Elasticity with these two arguments take the wrong mu: for a shear by 0.1 in the
# first material, the loss is 0.0031 in place of 0.0050.
#
# Who is hurt: whoever sets the stiffness of a registration by lambda and Young's modulus: the balance of shear and
# compression is another one than asked for. We found no report.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hf-deepali==0.6.5 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from deepali.losses.functional import elasticity_loss, lame_parameters

MATERIALS = ((1.0, 1.0), (1.0, 10.0), (0.5, 2.0), (4.0, 0.5))


def young(first, shear):
    return shear * (3 * first + 2 * shear) / (first + shear)


def poisson(first, shear):
    return first / (2 * (first + shear))


def given(**pair):
    try:
        return tuple(round(value, 4) for value in lame_parameters(**pair))
    except (TypeError, ValueError) as error:
        return type(error).__name__


def shear_loss(**pair):
    """The elastic energy of a displacement u = 0.1 y in the middle of an image: mu / 2 * 0.1^2."""
    field = torch.zeros(1, 3, 9, 9, 9)
    field[0, 0] = 0.1 * torch.linspace(-1, 1, 9).view(1, 9, 1)
    return float(elasticity_loss(field, reduction="none", **pair)[0, 0, 4, 4, 4])


print("hf-deepali", version("hf-deepali"), "torch", torch.__version__)
found = []
for first, shear in MATERIALS:
    modulus, ratio = young(first, shear), poisson(first, shear)
    pairs = {
        "lambda, E": dict(first_parameter=first, youngs_modulus=modulus),
        "nu, E": dict(poissons_ratio=ratio, youngs_modulus=modulus),
        "mu, E": dict(shear_modulus=shear, youngs_modulus=modulus),
        "lambda, nu": dict(first_parameter=first, poissons_ratio=ratio),
        "mu, nu": dict(shear_modulus=shear, poissons_ratio=ratio),
        "lambda, mu": dict(first_parameter=first, second_parameter=shear),
    }
    results = {name: given(**pair) for name, pair in pairs.items()}
    print(f"true ({first:g}, {shear:g}), E {modulus:.4g}, nu {ratio:.4g}:", results)
    if any(results[name] != (first, shear) for name in ("mu, E", "lambda, nu", "mu, nu", "lambda, mu")):
        raise SystemExit("the behaviour has changed: other pairs")
    found.append((results["lambda, E"], results["nu, E"]))
right = shear_loss(first_parameter=1.0, second_parameter=1.0)
wrong = shear_loss(first_parameter=1.0, youngs_modulus=2.5)
print(f"loss of a shear of 0.1 by (lambda, mu) {right:.6f}, by (lambda, E) {wrong:.6f}")
if [pair[0] for pair in found] != [(1.0, 0.625), (1.0, 23.4318), (0.5, 4.175), "ValueError"]:
    raise SystemExit(f"the behaviour has changed: {found}")
if any(pair[1] != "TypeError" for pair in found):
    raise SystemExit("the behaviour has changed: Poisson's ratio")
if abs(right - 0.005) > 1e-6 or abs(wrong - 0.625 * 0.005) > 1e-6:
    raise SystemExit("the behaviour has changed: the loss")
print("as described: R alone is divided by 4")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
