"""Scores of a synthetic CT for radiotherapy: tissues, relative electron density, path lengths through the patient.

Reference: S. J. Thomas, "Relative electron density calibration of CT scanners for
radiotherapy treatment planning", British Journal of Radiology 72, 781-786, 1999,
for the two lines of `THOMAS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.boxes import Image, Mask, Spacing
from chiasm.metrics.voxelwise import mean_or_nan

#: Tissues by the target's Hounsfield units, from the first up to the second; what lies between is partial volume.
#: "low density" is lung in a thorax, and partial volume at the edge of air in a head.
TISSUES_HU: Mapping[str, tuple[float, float]] = {
    "air": (-np.inf, -900.0),
    "low density": (-900.0, -500.0),
    "fat": (-150.0, -20.0),
    "soft tissue": (-20.0, 150.0),
    "bone": (150.0, np.inf),
}
#: Hounsfield units and electron density relative to water: linear in between, and beyond the last as before it.
THOMAS = ((-1000.0, 0.0), (0.0, 1.0), (1950.0, 2.0))


def electron_density(hu: ArrayLike, curve: Sequence[tuple[float, float]] = THOMAS) -> NDArray[np.float32]:
    """Turn Hounsfield units into electron density relative to water, never below 0.

    Args:
        hu: Hounsfield units, any shape.
        curve: At least two points of HU and density, HU rising.

    Raises:
        ValueError: If the curve has fewer points, or its HU do not rise.

    >>> electron_density([-1200, -1000, 0, 975, 3900]).tolist()
    [0.0, 0.0, 1.0, 1.5, 3.0]
    """
    knots, densities = np.array(curve, np.float64).reshape(-1, 2).T
    if len(knots) < 2 or (np.diff(knots) <= 0).any():
        raise ValueError("a calibration curve has at least two points, and its Hounsfield units rise")
    values = np.asarray(hu, np.float64)
    slope = (densities[-1] - densities[-2]) / (knots[-1] - knots[-2])
    beyond = slope * np.maximum(values - knots[-1], 0)
    density: NDArray[np.float64] = np.maximum(np.interp(values, knots, densities) + beyond, 0)
    return density.astype(np.float32)


def tissues(target: Image, mask: Mask) -> dict[str, NDArray[np.bool_]]:
    """Return the voxels of the mask that are each tissue in the target, HU."""
    return {name: (target >= low) & (target < high) & mask for name, (low, high) in TISSUES_HU.items()}


def path_errors(difference: Image, mask: Mask, spacing_mm: Spacing, axis: int) -> dict[str, float]:
    """Compare water-equivalent path lengths of parallel rays along an axis.

    Args:
        difference: Electron density of the prediction minus that of the target, shape (I, J, K).
        mask: Voxels that count; rays that meet none of them are left out.
        spacing_mm: Between voxels.
        axis: 0, 1 or 2.

    Returns:
        "path_error", mean absolute difference over the rays in mm, and "path_error_95", its 95th percentile; NaN
        without rays.
    """
    lengths = np.where(mask, difference, 0).sum(axis=axis, dtype=np.float64) * spacing_mm[axis]
    errors = np.abs(lengths[mask.any(axis=axis)])
    worst = float(np.quantile(errors, 0.95)) if errors.size else np.nan
    return {"path_error": mean_or_nan(errors), "path_error_95": worst}
