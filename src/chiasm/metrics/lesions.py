"""Single lesions: how much of their contrast a prediction keeps, and lesions that it makes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, Image, Mask, Range, Spacing, box_of, grown, within
from chiasm.metrics.voxelwise import bias, mae, mean_or_nan
from chiasm.smoothing import smooth

RING_MM = 5.0  # how far the surroundings of a lesion reach
LEAST_LESION_ML, LEAST_LESION_VOXELS = 0.01, 3  # smaller components count in regions, but are no lesion of their own
LEAST_FALSE_ML = 0.1
FALSE_SIGMA_MM = 1.5
KEPT = 0.5  # share of its contrast that a lesion must keep to count as recalled
LEAST_CONTRAST = 0.5  # in SDs of the ring: below it a lesion is not visible in the target, and there is none to keep


#: Lesions by volume in ml: from, up to but not including.
SIZES_ML: Mapping[str, Range] = {"small": (0.0, 1.0), "medium": (1.0, 10.0), "large": (10.0, inf)}


@dataclass(frozen=True, eq=False)
class Lesion:
    """One connected component of the labels.

    Attributes:
        box: Where it lies in the volume.
        inside: Its voxels inside `box`.
        volume_ml: Its volume.
        size: A name of `SIZES_ML`.
    """

    box: Box
    inside: Mask
    volume_ml: float
    size: str

    def mask(self, shape: tuple[int, ...]) -> Mask:
        """Return the lesion's voxels in a volume of `shape`."""
        whole = np.zeros(shape, bool)
        whole[self.box] = self.inside
        return whole


class Components(NamedTuple):
    """Connected components of labelled voxels.

    Attributes:
        lesions: The largest first.
        too_small: How many others there are, too small to be called a lesion.
    """

    lesions: tuple[Lesion, ...]
    too_small: int


def lesion_components(labels: NDArray[Any], spacing_mm: Spacing) -> tuple[Lesion, ...]:
    """Return the lesions of `split_components`, the largest first."""
    return split_components(labels, spacing_mm).lesions


def split_components(
    labels: NDArray[Any],
    spacing_mm: Spacing,
    least_ml: float = LEAST_LESION_ML,
    least_voxels: int = LEAST_LESION_VOXELS,
) -> Components:
    """Split labelled voxels into lesions: any label, neighbours also across edges and corners.

    A lesion has a least volume, so that it is the same on a fine grid.  It has a least number of voxels, so that a
    single noisy voxel of a coarse grid is not a lesion: the contrast of one voxel cannot be measured.

    Args:
        labels: 0 is background, shape (I, J, K).
        spacing_mm: Between voxels.
        least_ml: Of a lesion, in mL.
        least_voxels: Of a lesion.

    Returns:
        Lesions, and how many components are smaller.
    """
    from scipy.ndimage import find_objects, label

    voxel_ml = float(np.prod(spacing_mm)) / 1000
    if not (labels != 0).any():
        return Components((), 0)
    around = box_of(labels != 0)
    numbers, count = label(labels[around] != 0, structure=np.ones((3, 3, 3)))
    lesions = []
    for number, box in enumerate(find_objects(numbers), start=1):
        inside = numbers[box] == number
        voxels = int(inside.sum())
        volume_ml = voxels * voxel_ml
        if voxels >= least_voxels and volume_ml >= least_ml:
            i, j, k = (slice(s.start + a.start, s.stop + a.start) for s, a in zip(box, around))
            size = next(name for name, (low, high) in SIZES_ML.items() if low <= volume_ml < high)
            lesions.append(Lesion((i, j, k), inside, volume_ml, size))
    return Components(tuple(sorted(lesions, key=lambda lesion: -lesion.volume_ml)), count - len(lesions))


@dataclass(frozen=True)
class LesionScores:
    """The scores of one lesion.

    Attributes:
        mae: Mean absolute error inside it.
        bias: Mean of prediction minus target inside it.
        contrast_target: Mean of the target inside it minus the mean in its ring.
        contrast_prediction: The same of the prediction.
        contrast_kept: The second over the first; NaN where the lesion is not
            visible in the target (contrast below half an SD of the ring).
    """

    mae: float
    bias: float
    contrast_target: float
    contrast_prediction: float
    contrast_kept: float


@dataclass(frozen=True, eq=False)
class Ring:
    """A lesion, and the unlabelled voxels of the mask around it, with which its contrast is measured.

    Attributes:
        lesion: From `split_components`.
        box: Holds the lesion and its surroundings.
        inside: The lesion's voxels of the mask inside `box`.
        around: Voxels of its surroundings there.
    """

    lesion: Lesion
    box: Box
    inside: Mask
    around: Mask


def ring_of(lesion: Lesion, mask: Mask, labels: NDArray[Any], spacing_mm: Spacing) -> Ring:
    """Find the unlabelled voxels of the mask within `RING_MM` of a lesion.

    Args:
        lesion: From `split_components` on the same grid.
        mask: Voxels that count, for the lesion as for its ring; shape (I, J, K).
        labels: All labels, so that another lesion is no surroundings.
        spacing_mm: Between voxels.
    """
    from scipy.ndimage import distance_transform_edt

    box = grown(lesion.box, RING_MM, spacing_mm, mask.shape)
    inside = np.zeros(mask[box].shape, bool)
    inside[within(lesion.box, box)] = lesion.inside
    around = (distance_transform_edt(~inside, sampling=spacing_mm) <= RING_MM) & (labels[box] == 0) & mask[box]
    return Ring(lesion, box, inside & mask[box], around)


def lesion_scores(prediction: Image, target: Image, ring: Ring) -> LesionScores:
    """Measure a lesion against its ring.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        ring: From `ring_of` on the same grid.
    """
    inside, around = ring.inside, ring.around
    x, y = prediction[ring.box], target[ring.box]
    real, made = (mean_or_nan(image[inside]) - mean_or_nan(image[around]) for image in (y, x))
    visible = abs(real) >= LEAST_CONTRAST * float(y[around].std(dtype=np.float64)) > 0 if around.any() else False
    return LesionScores(mae(x, y, inside), bias(x, y, inside), real, made, made / real if visible else nan)


def recall(kept: Sequence[float]) -> float:
    """Return the share of visible lesions that keep at least half of their contrast; NaN where none is visible.

    >>> recall([0.9, 0.2, float("nan"), -0.6])
    0.3333333333333333
    """
    visible = [share for share in kept if not np.isnan(share)]
    return sum(share >= KEPT for share in visible) / len(visible) if visible else nan


def far_from_labels(mask: Mask, labels: NDArray[Any], spacing_mm: Spacing) -> Mask:
    """Return the voxels of the mask that lie more than `RING_MM` from any label, which is not 0."""
    from scipy.ndimage import distance_transform_edt

    far = mask.copy()
    if (labels != 0).any():
        around = grown(box_of(labels != 0), RING_MM, spacing_mm, mask.shape)
        far[around] &= distance_transform_edt(labels[around] == 0, sampling=spacing_mm) > RING_MM
    return far


def false_lesions(prediction: Image, target: Image, mask: Mask, far: Mask, contrast: float, spacing_mm: Spacing) -> int:
    """Count places far from the labels that differ from the target as much as a lesion.

    Such a place is a connected component of `far`, of at least `LEAST_FALSE_ML`,
    in which the error, smoothed by `FALSE_SIGMA_MM`, is at least half of a
    lesion's contrast, with its sign.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count.
        far: From `far_from_labels`.
        contrast: What the case's lesions show in the target, such as the
            median of their `contrast_target`; not 0.
        spacing_mm: Between voxels.
    """
    from scipy.ndimage import label

    if not mask.any():
        return 0
    high = _differing(prediction, target, mask, far, contrast, spacing_mm)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    if np.count_nonzero(high) * voxel_ml < LEAST_FALSE_ML:
        return 0
    high = high[box_of(high)]
    numbers, _ = label(high, structure=np.ones((3, 3, 3)))
    voxels = np.bincount(numbers[high])
    return int((voxels * voxel_ml >= LEAST_FALSE_ML).sum())


def _differing(prediction: Image, target: Image, mask: Mask, far: Mask, contrast: float, spacing_mm: Spacing) -> Mask:
    """Return the voxels of `far`, in the box of the mask, whose smoothed error is that of a lesion."""
    box = box_of(mask)
    error = np.subtract(prediction[box], target[box], dtype=np.float32, order="C")
    if contrast < 0:
        np.negative(error, out=error)
    error *= mask[box]
    error = smooth(error, [FALSE_SIGMA_MM / step for step in spacing_mm])
    return (error >= abs(contrast) * KEPT) & far[box]
