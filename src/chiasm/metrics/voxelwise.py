"""Errors voxel by voxel inside a mask: MAE, RMSE, PSNR, correlation.

A score over no voxels is NaN, never 0.  Where a score needs a range it is given.
"""

from __future__ import annotations

import math
from math import inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Image, Mask

ROW = 256  # values of single precision that are added before their sum is one of double precision


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
    error = _difference(prediction, target)  # and in its place what is made of it: there may be many values
    offset = mean_or_nan(error)
    absolute = mean_or_nan(np.abs(error, out=error))
    squared = mean_or_nan(np.square(error, out=error))
    return {
        "mae": absolute,
        "bias": offset,
        "rmse": float(np.sqrt(squared)),
        "nmae": absolute / check_range(data_range),
    }


def _error(prediction: Image, target: Image, mask: Mask) -> Image:
    return _difference(prediction[mask], target[mask])


def _difference(prediction: Image, target: Image) -> Image:
    """Subtract as floating-point numbers, also for integers of any type."""
    return np.subtract(prediction, target, dtype=np.result_type(prediction, target, np.float32))


def mean_or_nan(values: NDArray[Any]) -> float:
    """Return the mean, taken in float64; NaN for no values."""
    return total(values) / values.size if values.size else nan


def total(values: NDArray[Any]) -> float:
    """Return the sum of values, at most 1e-8 of the sum of their absolute values away from that in double precision.

    Values of single precision are added in rows of `ROW`, whose sums are added in double precision: a quarter of the
    time of turning each into double precision.
    """
    if values.dtype != np.float32 or values.size < 2 * ROW or not values.flags.c_contiguous:
        return float(values.sum(dtype=np.float64))
    rows, rest = _rows(values)
    return float(rows.sum(axis=1).sum(dtype=np.float64) + rest.sum(dtype=np.float64))


def _rows(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return values in rows of `ROW`, and those that fill no row."""
    flat = values.reshape(-1)
    cut = len(flat) - len(flat) % ROW
    return flat[:cut].reshape(-1, ROW), flat[cut:]


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
    a, b = _centred(a), _centred(b)
    spread = math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))
    return _dot(a, b) / spread if spread > 0 else nan


def _centred(values: NDArray[Any]) -> NDArray[Any]:
    """Return values without their mean, of single precision where they are."""
    flat = values.ravel()
    kind = np.float32 if values.dtype == np.float32 else np.float64
    centred: NDArray[Any] = flat.astype(kind) - flat[:1].astype(kind)  # a constant becomes exactly 0
    centred -= kind(mean_or_nan(centred))
    return centred


def _dot(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the sum of products; of single precision by rows, as in `total`."""
    if a.dtype != np.float32 or b.dtype != np.float32:
        return float(a.astype(np.float64, copy=False) @ b.astype(np.float64, copy=False))
    (rows_a, rest_a), (rows_b, rest_b) = _rows(a), _rows(b)
    of_rows = np.einsum("ij,ij->i", rows_a, rows_b).sum(dtype=np.float64)
    return float(of_rows) + float(rest_a.astype(np.float64) @ rest_b.astype(np.float64))
