"""Where voxels lie: grids, affines, and moving an array from one grid to another.

Words used everywhere: an array's axes are (I, J, K) in storage order; its
*affine* maps voxel indices to world millimetres, RAS+ (x to the right, y to
the front, z up); two grids are *the same* when shape and affine agree at the
eight corners within a hundredth of a voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume, and the header it came with.

    Attributes:
        shape: Voxels along the three storage axes (I, J, K).
        affine: Voxel index to world mm, RAS+, shape (4, 4), float64.
        header: The raw header as it was read, so that a file written on this
            grid carries the source's geometry bit for bit; None when made here.
        container: The format of `header`.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    header: bytes | None = None
    container: str | None = None  # "nifti" | "metaimage"

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along I, J and K, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)


@dataclass(frozen=True, eq=False)
class Volume:
    """An array and the grid on which it lies.

    Attributes:
        array: Voxel values after any slope and intercept, shape (I, J, K);
            float32 for images, an integer type for labels.
        geometry: The grid.
    """

    array: NDArray[Any]
    geometry: Geometry
