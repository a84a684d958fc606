#!/usr/bin/env bash
# TorchIO 1.2.1: RandomLabelsToImage(used_labels=...) makes an image from some labels of a label map, and erases all
# other labels in that label map.
#
# Input, made here: a subject with a T1 and a label map of 12^3 voxels: background 0, an organ 1 and a lesion 2; and the
# same as a map with one channel for each label. The transform draws new intensities where label 1 is and leaves the T1
# elsewhere (image_key="t1", used_labels=[1]), the use that the docstring shows at its end.
#
# Expected: a new T1 beside an unchanged label map. The transform is an IntensityTransform, and those change no labels.
#
# Behaviour: LabelsToImage.apply_transform marks the labels that it does not use, with -1 in a map of indices and with 0
# in a map of channels, to know later where the T1 shall stay. It does so in the tensor of the label map itself, not in
# a copy. The subject that comes out has that map. Nothing is printed.
#
# Output seen, voxels of each label in the map:
#     before                          0: 1336   1: 348   2: 44
#     used_labels=[1]                -1: 1380   1: 348
#     used_labels=None                0: 1336   1: 348   2: 44
#     channels, used_labels=[1]       0:    0   1: 348   2: 0
# The image is right. The lesion and the background are lost for every transform, loss and score after it, and with
# copy=False they are lost in the subject that was given, too.
#
# Who is hurt: whoever trains a segmentation with synthetic intensities for some of its classes: the target loses the
# others. Cross entropy refuses -1, but a Dice loss of one label, or masks by > 0, take it without a word.
# What helps: a second copy of the label map under another key. We found no report.
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


def label_map():
    labels = torch.zeros(1, 12, 12, 12)
    labels[:, 2:10, 3:10, 2:9] = 1
    labels[:, 4:8, 5:8, 3:7] = 2
    labels[:, 4, 5, 3:7] = 1
    return labels


def subject(channels):
    torch.manual_seed(0)
    labels = label_map()
    if channels:
        labels = torch.cat([(labels == value).float() for value in range(3)])
    t1 = torchio.ScalarImage(tensor=torch.rand(1, 12, 12, 12))
    return torchio.Subject(t1=t1, label=torchio.LabelMap(tensor=labels))


def counts(one):
    labels = one.label.data
    if len(labels) > 1:
        return {value: int(labels[value].sum()) for value in range(len(labels))}
    return {int(value): int((labels == value).sum()) for value in labels.unique()}


def made(used, channels=False):
    given = subject(channels)
    out = torchio.RandomLabelsToImage(label_key="label", image_key="t1", used_labels=used)(given)
    changed = (out.t1.data != given.t1.data)[0]
    assert torch.equal(changed, label_map()[0] == 1) or used is None, "the image is no longer right"
    assert counts(given) == counts(subject(channels)), "the subject that was given is changed as well"
    return counts(out)


print("torchio", version("torchio"), "torch", torch.__version__)
found = {
    "before": counts(subject(False)),
    "used_labels=[1]": made([1]),
    "used_labels=None": made(None),
    "channels, used_labels=[1]": made([1], channels=True),
}
for name, values in found.items():
    print(f"{name:28}", "  ".join(f"{value:2}: {number}" for value, number in values.items()))
expected = [{0: 1336, 1: 348, 2: 44}, {-1: 1380, 1: 348}, {0: 1336, 1: 348, 2: 44}, {0: 0, 1: 348, 2: 0}]
if list(found.values()) != expected:
    raise SystemExit("the behaviour has changed")
print("as described: labels that are not used are erased")
PYTHON
"$work/venv/bin/python" "$work/finding.py"
