#!/usr/bin/env bash
# ome-zarr 0.21.0 (and 0.18.0, the last for Python 3.11): write_image with scale_factors=[4, 16] writes levels of 2 and 4; and the
# method "zoom" gives other pixels if the same image comes in other chunks.
#
# Input, made here: an image of 96 x 96 pixels whose values are the x of each pixel, as one chunk and in chunks of 8 x 8.
#
# Expected: a level for each number, smaller by that number. A pixel of a level of 2 is the mean of a pair of pixels, 0.5 + 2 i, where
# the translation in the metadata puts it.
#
# Behaviour:
# - _build_pyramid (scale.py) turns a list of whole numbers into 2, 4, 8...: it counts the numbers and does not look at them. (z is left as
#   it is.) Sizes and metadata agree with each other, so that readers see a correct file of another pyramid. A list of dicts, such as
#   [{"y": 4, "x": 4}], is obeyed.
# - zoom (dask_utils.py) calls scipy's zoom for each chunk by itself. scipy lays the first and last pixel of the result on the first and
#   last pixel of what it is given, so each chunk is stretched about its own middle: in chunks of 8, by 7 / 3 in place of 2.
#
# Output seen:
#     scale_factors=[4, 16]      96 48 24 pixels; as dicts 96 24 6
#     scale_factors=[3]          96 48 pixels; as dicts 96 32
#     x of the first 8 pixels at level 2, "zoom", true 0.5 2.5 4.5 6.5 8.5 10.5 12.5 14.5:
#         one chunk              0.0 2.0 4.0 6.1 8.1 10.1 12.1 14.1
#         chunks of 8            0.0 2.3 4.7 7.0 8.0 10.3 12.7 15.0
#     "local_mean" is true with any chunks
#
# Who is hurt: whoever wants fewer levels of a large image, and whoever measures or registers on a level made by "zoom".
# ome-zarr-py#617 was that write_labels took no list at all. We found no report of these.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
release=$("$work/venv/bin/python" -c 'import sys; print("0.21.0" if sys.version_info >= (3, 12) else "0.18.0")')
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ome-zarr==$release" scikit-image==0.26.0 scipy==1.17.1

cat > "$work/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version

import dask.array
import numpy as np
import zarr
from ome_zarr.writer import write_image

SIDE = 96
IMAGE = np.tile(np.arange(SIDE, dtype=np.float32), (SIDE, 1))


def levels(image, factors, method="local_mean"):
    """The arrays of all levels that are written."""
    group = zarr.open_group(sys.argv[1] + "/image.zarr", mode="w")
    write_image(image, group, axes="yx", scale_factors=factors, method=method)
    written = dict(group.attrs)
    return [np.asarray(group[one["path"]][:]) for one in written.get("ome", written)["multiscales"][0]["datasets"]]


print("ome-zarr", version("ome-zarr"))
changed = []
for factors, seen in (([4, 16], [96, 48, 24]), ([3], [96, 48])):
    found = [pixels.shape[1] for pixels in levels(IMAGE, list(factors))]
    as_dicts = [pixels.shape[1] for pixels in levels(IMAGE, [{"y": one, "x": one} for one in factors])]
    print(f"scale_factors={factors}: {found} pixels; as dicts {as_dicts}")
    if found != seen or as_dicts != [SIDE, *(SIDE // one for one in factors)]:
        changed.append(f"scale_factors={factors}")
true = 0.5 + 2 * np.arange(SIDE // 2)
for method in ("local_mean", "zoom"):
    for name, image, stretched in (
        ("one chunk", IMAGE, np.linspace(0, SIDE - 1, SIDE // 2)),
        ("chunks of 8", dask.array.from_array(IMAGE, chunks=(8, 8)), np.add.outer(8 * np.arange(12), np.linspace(0, 7, 4)).ravel()),
    ):
        row = levels(image, [{"y": 2, "x": 2}], method)[1][10]
        print(f"{method}, {name}: x of the first pixels", *row[:8].round(1), "true", *true[:8])
        if not np.allclose(row, stretched if method == "zoom" else true, atol=0.01):
            changed.append(f"{method}, {name}")
if changed:
    raise SystemExit("the behaviour has changed: " + "; ".join(changed))
print("as described: whole numbers are only counted, and zoom depends on the chunks")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
