#!/usr/bin/env bash
# nibabel 5.4.2 reads a FreeSurfer volume (.mgh, .mgz) that states no orientation half a turn away from FreeSurfer's own.
#
# Input, made here: a .mgh of 5 x 6 x 7 voxels of 1 mm whose goodRASFlag is 0, as FreeSurfer's description of the format
# allows: the reader then takes a coronal default, with a first axis to the left, a second to the feet and a third to the
# front (x_ras -1 0 0, y_ras 0 0 -1, z_ras 0 1 0, c_ras 0 0 0, sizes 1 mm).
#
# Behaviour: MGHHeader holds the directions as "Mdc", which its own comment calls the transpose of the matrix of direction
# cosines: a row for each axis of the file. The header's default, [[-1, 0, 0], [0, 0, 1], [0, -1, 0]], is the matrix itself
# instead. Read by rows, the second axis runs to the head and the third to the back: both are reversed, half a turn about
# the first. There is no message. surfa 0.6.3, written by one of FreeSurfer's developers, reads the same bytes by
# FreeSurfer's default, and a file that spells the default out is the same volume in both.
#
# Output seen, voxel to RAS mm, the first three rows:
#     nibabel  [-1 0 0 2.5]  [0  0 -1  3.5]  [0 1 0 -3]
#     surfa    [-1 0 0 2.5]  [0  0  1 -3.5]  [0 -1 0 3]
# The same default stands in every fresh header: MGHHeader() without a file has it too.
#
# Who is hurt: whoever reads old FreeSurfer volumes, or those that a program wrote without setting the flag. Head and feet,
# front and back trade places, and left and right stay, so that a symmetric picture looks only upside down.
# The pull request that renamed these fields (nibabel 569) speaks of the transposition and not of the default.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check nibabel==5.4.2 surfa==0.6.3 numpy==2.2.6

cat > "$work/finding.py" <<'PYTHON'
import struct
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
import surfa

SIDES = (5, 6, 7)
DEFAULT = ((-1, 0, 0), (0, 0, -1), (0, 1, 0))  # x_ras, y_ras, z_ras by FreeSurfer's description of the format
TURNED = np.array([[-1, 0, 0, 2.5], [0, 0, -1, 3.5], [0, 1, 0, -3]])
RIGHT = np.array([[-1, 0, 0, 2.5], [0, 0, 1, -3.5], [0, -1, 0, 3]])


def write(path, stated):
    """Write an MGH of float32 voxels (type 3), with or without its orientation."""
    head = struct.pack(">7i", 1, *SIDES, 1, 3, 0) + struct.pack(">h", stated)
    if stated:
        head += struct.pack(">3f", 1, 1, 1) + struct.pack(">9f", *sum(DEFAULT, ())) + struct.pack(">3f", 0, 0, 0)
    voxels = np.arange(np.prod(SIDES), dtype=">f4")
    path.write_bytes(head.ljust(284, b"\0") + voxels.tobytes())
    return path


def affines(path):
    by_nibabel = nibabel.load(path).affine[:3]
    geometry = surfa.load_volume(str(path)).geom
    return by_nibabel, np.asarray(geometry.vox2world.matrix)[:3]


folder = Path(sys.argv[1])
print("nibabel", version("nibabel"), "surfa", version("surfa"))
changed = []
for stated in (1, 0):
    by_nibabel, by_surfa = affines(write(folder / f"stated_{stated}.mgh", stated))
    print("orientation", "stated" if stated else "not stated")
    print("  nibabel", *[row.tolist() for row in by_nibabel + 0.0])
    print("  surfa  ", *[row.tolist() for row in by_surfa + 0.0])
    if not np.allclose(by_surfa, RIGHT, atol=1e-5):
        changed.append("surfa, " + ("stated" if stated else "not stated"))
    if not np.allclose(by_nibabel, RIGHT if stated else TURNED, atol=1e-5):
        changed.append("nibabel, " + ("stated" if stated else "not stated"))
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: without a stated orientation, nibabel turns the volume by half a turn")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
