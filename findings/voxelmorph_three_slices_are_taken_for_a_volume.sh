#!/usr/bin/env bash
# VoxelMorph 0.3.4 (the PyTorch version): compose takes a batch of three 2D displacement fields for one 3D field, so
# that each image is warped by the fields of the others; batches of any other size are right.
#
# Input, made here: batches of 1 to 6 pairs of smooth 2D fields, 20 x 24 pixels, and of 3D fields.
#
# Expected: each pair of a batch is composed as it is alone.
#
# Behaviour: whether there is a batch is guessed from the field's shape: none if the first size equals the number of
# dimensions less one (voxelmorph/nn/functional.py). For a field (dimension, y, x) that is right: 2 and 3 - 1. But for a
# batch (3, dimension, y, x), it is 3 and 4 - 1. The batch is then taken for the three components, and the two
# components for the first axis of a volume of 2 x 20 x 24 voxels. All shapes fit, and nothing is printed.
# A batch of four 3D fields is taken for one field in 4D, which is refused with a ValueError about the mode.
#
# Output seen, largest difference between a batch and its pairs alone, in pixels (of displacements up to 4):
#     2D  batch of 1: 0.00, 2: 0.00, 3: 2.90, 4: 0.00, 5: 0.00, 6: 0.00
#     3D  batch of 1: 0.00, 2: 0.00, 3: 0.00, 4: ValueError, 5: 0.00, 6: 0.00
# The last batch of an epoch may have three images, so that the fault comes and goes.
#
# Who is hurt: whoever composes fields of 2D images in batches (an affine or a first network's field with the next one).
# We found no report. The README warns that interfaces may change. What helps: composing one by one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check voxelmorph==0.3.4 neurite==0.3.4 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from torch.nn.functional import avg_pool2d, avg_pool3d
from voxelmorph.functional import compose


def fields(batch, *shape):
    found = torch.randn(batch, len(shape), *shape)
    for _ in range(2):
        found = (avg_pool2d if len(shape) == 2 else avg_pool3d)(found, 5, 1, 2)
    return 6 * found


def difference(batch, *shape):
    """Between a batch and its pairs alone, or the error; with the largest displacement."""
    torch.manual_seed(batch)
    first, second = fields(batch, *shape), fields(batch, *shape)
    alone = torch.stack([compose([one, other]) for one, other in zip(first, second)])
    try:
        together = compose([first, second])
    except ValueError as error:
        return f"ValueError: {str(error)[:60]}", float(alone.abs().max())
    assert together.shape == alone.shape
    return float((together - alone).abs().max()), float(alone.abs().max())


print(*(f"{name} {version(name)}" for name in ("voxelmorph", "neurite", "torch")))
changed = []
for shape, odd in (((20, 24), 3), ((10, 12, 14), 4)):
    for batch in range(1, 7):
        found, largest = difference(batch, *shape)
        print(f"{len(shape)}D, batch of {batch}: {found}, of displacements up to {largest:.2f}")
        if batch != odd and (isinstance(found, str) or found > 1e-5):
            changed.append(f"{len(shape)}D, {batch}")
        if batch == odd and (isinstance(found, str) != (len(shape) == 3) or len(shape) == 2 and found < 1):
            changed.append(f"{len(shape)}D, {batch}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: three 2D fields are taken for one 3D field")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
