"""Errors voxel by voxel inside a mask: MAE, RMSE, PSNR, correlation.

A score over no voxels is NaN, never 0.  Where a score needs a range it is given.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Image, Mask


def mae(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the mean absolute error inside the mask, in the images' unit; NaN for an empty mask."""
    return mean_or_nan(np.abs(_error(prediction, target, mask)))


def bias(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the mean of prediction minus target inside the mask; NaN for an empty mask."""
    return mean_or_nan(_error(prediction, target, mask))


def rmse(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the root of the mean squared error inside the mask; NaN for an empty mask."""
    return float(np.sqrt(mean_or_nan(_error(prediction, target, mask) ** 2)))


def nmae(prediction: Image, target: Image, mask: Mask, data_range: float) -> float:
    """Return the mean absolute error as a share of `data_range`, which must not come from these images."""
    return mae(prediction, target, mask) / check_range(data_range)


def psnr(prediction: Image, target: Image, mask: Mask, data_range: float) -> float:
    """Return the peak signal-to-noise ratio inside the mask in dB; infinite where nothing differs.

    Args:
        prediction: Shape (I, J, K).
        target: Likewise.
        mask: Voxels that count.
        data_range: The peak, in the images' unit.  One prediction scores 29 to
            42 dB depending on it alone: scores with different ranges must not be compared.

    Raises:
        ValueError: If `data_range` is not positive.

    >>> psnr(np.ones((1, 1, 2)), np.zeros((1, 1, 2)), np.ones((1, 1, 2), bool), data_range=10.0)
    20.0
    """
    error = rmse(prediction, target, mask)
    with np.errstate(divide="ignore"):
        return float(20 * np.log10(np.float64(check_range(data_range)) / error))


def ncc(prediction: Image, target: Image, mask: Mask) -> float:
    """Return the normalised cross-correlation (Pearson's r) inside the mask; NaN where either is constant."""
    return pearson(prediction[mask], target[mask])


def error_scores(prediction: Image, target: Image, data_range: float) -> dict[str, float]:
    """Return "mae", "bias", "rmse" and "nmae" of all the values given, of any shape; NaN for none.

    Raises:
        ValueError: If `data_range` is not positive.
    """
    error = _difference(prediction, target)
    absolute = mean_or_nan(np.abs(error))
    return {
        "mae": absolute,
        "bias": mean_or_nan(error),
        "rmse": float(np.sqrt(mean_or_nan(error**2))),
        "nmae": absolute / check_range(data_range),
    }


def _error(prediction: Image, target: Image, mask: Mask) -> Image:
    return _difference(prediction[mask], target[mask])


def _difference(prediction: Image, target: Image) -> Image:
    """Subtract as floating-point numbers, also for integers of any type."""
    return np.subtract(prediction, target, dtype=np.result_type(prediction, target, np.float32))


def mean_or_nan(values: NDArray[Any]) -> float:
    """Return the mean, taken in float64; NaN for no values."""
    return float(values.mean(dtype=np.float64)) if values.size else nan


def check_range(data_range: float) -> float:
    """Return a data range that is positive and finite.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < data_range < inf:
        raise ValueError(f"a data range must be positive and finite, not {data_range}")
    return data_range


def pearson(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the correlation of two sets of values; NaN for fewer than two values, or where one is constant."""
    if a.size < 2:
        return nan
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    a -= a.mean()
    b -= b.mean()
    spread = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / spread if spread > 0 else nan
