"""Images of a case as they are kept while it is scored: whole, or only the values inside its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Box, box_of, grown

#: What lies around mask and labels in the part that is kept: at least what windows of SSIM and pages of cases reach.
AROUND_MM, AROUND_VOXELS = 6.0, 6


class KeptPart(NamedTuple):
    """Where arrays lie in volumes of which only a box is kept.

    Attributes:
        box: In the volumes.
        shape: Of the volumes.
    """

    box: Box
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KeptImage:
    """An image of which only the mask's voxels are kept where all others are one constant.

    Attributes:
        array: The image, shape (I, J, K), or the values of the mask's voxels, shape (n,).
        background: The value of all other voxels; None where the whole image is kept.
    """

    array: NDArray[Any]
    background: float | None = None

    def laid_out(self, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Return the whole image on the mask's grid."""
        return self.array if self.background is None else laid_out(self.array, mask, self.background)

    def inside(self, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Return the values of the mask's voxels, shape (n,)."""
        return self.array[mask] if self.background is None else self.array


def laid_out(values: NDArray[Any], mask: NDArray[np.bool_], background: float) -> NDArray[Any]:
    """Lay the values of a mask's voxels out on its grid, with one constant in all others.

    Args:
        values: Shape (n,).
        mask: Shape (I, J, K).
        background: That constant.
    """
    image: NDArray[Any] = np.full(mask.shape, background, values.dtype)
    image[mask] = values
    return image


def is_constant_beyond(image: NDArray[Any], mask: NDArray[np.bool_], background: float) -> bool:
    """Return whether all voxels outside a mask have one value, slice by slice: volumes may be large."""
    slices = range(image.shape[-1])
    return all(bool((mask[..., k] | (image[..., k] == background)).all()) for k in slices)


def box_around(
    mask: NDArray[np.bool_], labels: NDArray[Any] | None, spacing_mm: Sequence[float]
) -> tuple[slice, slice, slice]:
    """Return the box around a mask and labels, with all voxels around them that scores and pages look at.

    Args:
        mask: Shape (I, J, K), not empty.
        labels: Likewise, 0 is background; or None.
        spacing_mm: Between voxels.
    """
    boxes = [box_of(mask)]
    if labels is not None and labels.any():
        boxes.append(box_of(labels != 0))
    i, j, k = (slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes))
    return grown((i, j, k), max(AROUND_MM, AROUND_VOXELS * max(spacing_mm)), spacing_mm, mask.shape)
