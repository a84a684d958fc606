"""How well a map of expected error orders voxels by their true error."""

from __future__ import annotations

from math import nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Mask
from chiasm.metrics.voxelwise import mean_or_nan, pearson


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    flat = values.ravel()
    order = np.argsort(flat)
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(flat)])
    sizes = np.diff(np.r_[starts, len(flat)])
    ranked = np.empty(len(flat))
    ranked[order] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return ranked


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return Spearman's rank correlation, ties averaged; NaN for fewer than two values or a constant."""
    return pearson(ranks(a), ranks(b))


def auroc(score: NDArray[Any], positive: Mask) -> float:
    """Return the probability that a positive scores above a negative, ties counting half; NaN without either.

    Args:
        score: Any finite numbers.
        positive: What the score should find, same shape.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    return auroc_of_ranks(ranks(score), positive)


def auroc_of_ranks(ranked: NDArray[np.float64], positive: Mask) -> float:
    """Return `auroc` of scores that were ranked already by `ranks`."""
    many = int(np.count_nonzero(positive))
    few = positive.size - many
    if many == 0 or few == 0:
        return nan
    return (float(ranked[positive.ravel()].sum()) - many * (many + 1) / 2) / (many * few)


def is_worst(error: NDArray[Any], share: float = 0.1) -> Mask:
    """Return the voxels with the largest errors, a `share` of them."""
    worst: Mask = error >= np.quantile(error, 1 - share) if error.size else np.zeros(error.shape, bool)
    return worst


def auroc_worst(expected_error: NDArray[Any], error: NDArray[Any], share: float = 0.1) -> float:
    """Return how well the map finds the voxels with the largest errors.

    Args:
        expected_error: Expected absolute error: larger is worse.
        error: True absolute error, same shape.
        share: Of the voxels, which count as the worst.
    """
    return auroc(expected_error, is_worst(error, share))


class RiskCoverage(NamedTuple):
    """The remaining error when the least trusted voxels are left out.

    Attributes:
        coverage: Shares of the voxels that are kept, rising to 1.
        risk: Mean error of the voxels kept.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]


def risk_coverage(expected_error: NDArray[Any], error: NDArray[Any]) -> RiskCoverage:
    """Keep voxels in the order of their expected error, the most trusted first.

    Voxels of one expected error count as their mean, so that the curve does
    not depend on the order of ties.

    Args:
        expected_error: Expected absolute error, any shape, not empty.
        error: True absolute error, same shape.
    """
    order = np.argsort(expected_error, axis=None)
    expected, true = expected_error.ravel()[order], error.ravel()[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, expected[1:] != expected[:-1]])
    sizes = np.diff(np.r_[starts, len(true)])
    kept = np.arange(1, len(true) + 1)
    levelled = np.repeat(np.add.reduceat(true, starts) / sizes, sizes)
    return RiskCoverage(kept / len(true), np.cumsum(levelled) / kept)


def ausc(expected_error: NDArray[Any], error: NDArray[Any]) -> float:
    """Return the area under the risk-coverage curve by the mean error: 1 for a useless map, less for a better one."""
    mean = mean_or_nan(error)
    return mean_or_nan(risk_coverage(expected_error, error).risk) / mean if error.size and mean > 0 else nan


def ause(expected_error: NDArray[Any], error: NDArray[Any]) -> float:
    """Return `ausc` minus the `ausc` of the true error itself: 0 for a perfect order."""
    return ausc(expected_error, error) - ausc(error, error)
