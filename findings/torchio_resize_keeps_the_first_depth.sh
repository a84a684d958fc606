#!/usr/bin/env bash
# TorchIO 1.2.1: Resize((256, 256, -1)) keeps the depth of the first image that it meets, for all images after it.
#
# Input, made here: three volumes of 16 x 16 x 12, 16 x 16 x 20 and 16 x 16 x 30 voxels, each with a label map, and one
# transform, Resize((8, 8, -1)).
#
# Expected: by the docstring, a dimension that is set to -1 keeps its size: depths of 12, 20 and 30.
#
# Behaviour: all three come out with 12 slices, and in the other order all with 30. Nothing is printed. apply_transform
# binds the array target_shape of the transform to a second name and writes the sizes of the image at hand over its -1
# there, so that no -1 is left for the next image (resize.py). A transform that is made for each image is right.
#
# Output seen, depths of the three volumes:
#     one transform for each          12 20 30
#     one transform for all           12 12 12
#     the same in the other order     30 30 30
#     SubjectsDataset, DataLoader     12 12 12 in one process, 12 20 12 with two workers
# So results depend on the order of a shuffled data set and, since each worker has a copy of the transform, on the
# number of workers. Spacing and affine are changed with the voxels, so that the geometry fits, and the slices are
# resampled: 30 slices of 1 mm become 12 of 2.5 mm.
#
# Who is hurt: whoever brings slices to one size in the plane and wants to keep their number, in training or inference.
# We found no report; issue 757 was the same kind of memory in CropOrPad, which is mended. What helps: a transform for
# each image, or Lambda around one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torchio==1.2.1 SimpleITK==2.5.7 numpy==2.4.6

cat > "$work/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
import torchio

warnings.simplefilter("error")  # a warning would be a change
DEPTHS = (12, 20, 30)


def subject(depth):
    torch.manual_seed(depth)
    voxels = torch.rand(1, 16, 16, depth)
    return torchio.Subject(image=torchio.ScalarImage(tensor=voxels), label=torchio.LabelMap(tensor=voxels.round()))


def depths(subjects):
    assert all(one.image.spatial_shape == one.label.spatial_shape for one in subjects)
    assert all(one.image.spatial_shape[:2] == (8, 8) for one in subjects)
    return [one.image.spatial_shape[2] for one in subjects]


def loaded(workers):
    data = torchio.SubjectsDataset([subject(depth) for depth in DEPTHS], transform=torchio.Resize((8, 8, -1)))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda one: one)
    return depths(list(loader))


if __name__ == "__main__":
    print("torchio", version("torchio"), "torch", torch.__version__)
    one = torchio.Resize((8, 8, -1))
    found = {"one transform for each": depths([torchio.Resize((8, 8, -1))(subject(depth)) for depth in DEPTHS])}
    found["one transform for all"] = depths([one(subject(depth)) for depth in DEPTHS])
    other = torchio.Resize((8, 8, -1))
    found["the same in the other order"] = depths([other(subject(depth)) for depth in DEPTHS[::-1]])
    found["DataLoader, one process"] = loaded(0)
    found["DataLoader, two workers"] = loaded(2)
    for name, values in found.items():
        print(f"{name:30}", *values)
    print("what the transform holds now:", one.target_shape.tolist())
    thick = one(subject(30)).image.spacing[2]
    print(f"spacing of the 30 slices of 1 mm, after it: {thick:g} mm")
    expected = [[12, 20, 30], [12, 12, 12], [30, 30, 30], [12, 12, 12], [12, 20, 12]]
    if list(found.values()) != expected or abs(thick - 2.5) > 1e-6:
        raise SystemExit("the behaviour has changed")
    print("as described: the first depth is kept")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
