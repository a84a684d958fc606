"""Label maps: which voxels belong to which region, and what makes a map unusable.

Every verb that reads labels uses this module, so all verbs give the same message for a wrong map.  A case with unusable
labels is still used: only its labels are left out and named.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Problem, Regions
from chiasm.cohorts.folder_notes import SIDECAR
from chiasm.cohorts.images import read_case_labels
from chiasm.errors import VolumeError
from chiasm.volumes import Volume, check_pair, read_volume

MANY_VALUES = 64  # more than a map of labels holds, unless it declares as many
IMAGE_SHARE = 0.1  # of voxels that are no whole number: more than the rims of labels
SOFT = "soft-labels"  # reason of a map of shares or probabilities


def read_label_map(case: Case, regions: Regions) -> Volume:
    """Read the label map of a case; soft labels count from the cohort's threshold on.

    Args:
        case: Has labels; says the threshold.  One above 1 is of probabilities up to 100 or 255, of all maps.
        regions: Region name to label values; empty declares every whole number from 0 on.

    Returns:
        Whole numbers, on the map's own grid.

    Raises:
        VolumeError: If the file cannot be read, or a label is negative, undeclared or no whole number.
        ValueError: If the case has no labels.
    """
    if case.labels is None:
        raise ValueError(f"case {case.id} has no labels")
    if case.label_threshold is not None and case.label_threshold > 1:
        return _above(case.label_threshold, case, case.labels)
    try:
        labels = read_case_labels(case, case.labels)
    except VolumeError as error:
        if error.reason != SOFT:
            raise
        labels = _above(_required_threshold(case, error), case, case.labels)
    check_label_values(labels.array, regions, case.labels)
    return labels


def _required_threshold(case: Case, soft: VolumeError) -> float:
    """Return the value from which a voxel of soft labels counts; refuse soft labels without a threshold."""
    if case.label_threshold is None:
        raise VolumeError(
            soft.what,
            path=soft.path,
            reason=SOFT,
            found=soft.found,
            hint=f'State in {SIDECAR} the value from which a voxel counts: {{"labels": {{"threshold": 0.5}}}}.',
        ) from soft
    return case.label_threshold


def _above(threshold: float, case: Case, path: Path) -> Volume:
    """Return the voxels in which a map of probabilities, up to 1, 100 or 255, reaches a threshold.

    Raises:
        VolumeError: If the map is of another scale: it holds more than 0, and nothing reaches half the threshold.
    """
    soft = read_volume(path, allow_constant=True, reading=case.reading)
    if 0 < (most := float(soft.array.max())) < threshold / 2 and threshold > 1:
        raise VolumeError(
            f"holds no label value near the threshold in {SIDECAR}",
            path=path,
            reason="labels",
            found=f"values up to {most:g}",
            expected=f"values from {threshold:g} on",
            hint="All label maps of a cohort must be of one scale: 0 to 1, to 100 or to 255.",
        )
    return Volume((soft.array >= threshold).astype(np.uint8), soft.geometry)


def usable_labels(case: Case, regions: Regions, first: Volume, name: str) -> tuple[Volume | None, Problem | None]:
    """Return the labels of a case on the grid of its first image, or what keeps them from being used.

    Args:
        case: With or without labels.
        regions: As in `read_label_map`.
        first: The image.
        name: What it is called.
    """
    if case.labels is None:
        return None, None
    try:
        labels = read_label_map(case, regions)
        return check_pair(first, labels, a_name=name, b_name="labels", labels=True), None
    except VolumeError as error:
        path = error.path or case.labels
        return None, Problem(path, error.reason, f"case {case.id}, labels: {error}", case.id)


def holds_image(path: Path, declared: Collection[int]) -> bool:
    """Return whether a file in the place of labels is an image: it has many values that cannot be labels.

    Labels with fractions at their rims (after interpolation), or with few undeclared values, are wrong labels and not
    an image.

    Args:
        path: The file; one that cannot be read is taken for labels, and refused by name where it is read.
        declared: The labels that may occur beside 0.
    """
    try:
        array = read_volume(path, allow_constant=True, allow_thin=True).array
    except VolumeError:
        return False
    values = np.unique(array)
    between = float(np.mean(array != np.rint(array)))
    if between == 0:
        return len(values) > max(MANY_VALUES, 4 * len(declared))
    beyond = float(values[0]) < 0 or float(values[-1]) > max([1, *declared])
    return between >= IMAGE_SHARE or (beyond and len(values) > MANY_VALUES)


def check_label_values(array: NDArray[np.generic], regions: Regions, path: Path) -> None:
    """Refuse labels that are no whole numbers, or that no region declares; all zero is legal.

    Args:
        array: A label map of any shape.
        regions: Region name to label values; empty declares every whole number from 0 on.
        path: Its file, for the message.

    Raises:
        VolumeError: With reason "labels".
    """
    values = np.unique(array)
    _refuse_fractions(values, path)
    if values.size and (least := int(values.min())) < 0:
        raise VolumeError(
            "labels are negative",
            path=path,
            reason="labels",
            found=least,
            expected="0 for the background, larger numbers for regions",
        )
    if regions:
        _refuse_undeclared(values, {0, *chain.from_iterable(regions.values())}, path)


def _refuse_fractions(values: NDArray[np.generic], path: Path) -> None:
    """Refuse labels that are no whole numbers."""
    broken = next((value for value in values.tolist() if value != int(value)), None)
    if broken is not None:
        raise VolumeError("labels are not whole numbers", path=path, reason="labels", found=broken)


def _refuse_undeclared(values: NDArray[np.generic], declared: Collection[int], path: Path) -> None:
    strange = [int(value) for value in values.tolist() if value not in declared]
    if strange:
        raise VolumeError(
            "labels have values that no region declares",
            path=path,
            reason="labels",
            found=", ".join(map(str, strange[:5])),
            expected=", ".join(map(str, sorted(declared))),
            hint=f'Declare them in {SIDECAR}: {{"regions": {{"lesion": [...]}}}}, or choose another layout.',
        )


def region_volumes(labels: Volume, regions: Regions) -> dict[str, float]:
    """Measure each region of a label map, in millilitres; 0.0 where it is absent."""
    voxel_ml = abs(float(np.linalg.det(labels.geometry.affine[:3, :3]))) / 1000
    return {name: float(np.isin(labels.array, values).sum()) * voxel_ml for name, values in regions.items()}
