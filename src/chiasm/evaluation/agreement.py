"""Agreement of readings, and shares of few images: kappa, Wilson's interval, resampled subjects.

All functions here take only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from chiasm.evaluation.paired_tests import ALPHA, DRAWS, Table


def count_pairs(first: Sequence[int], second: Sequence[int], levels: int) -> Table:
    """Count how often a first reading of i stands beside a second one of j.

    Args:
        first: Levels from 0 to `levels` - 1, one for each image.
        second: Of the same images.
        levels: How many there are.

    Returns:
        Shape (levels, levels).

    Raises:
        ValueError: If the two are not of equal length.

    >>> count_pairs([0, 1, 1], [0, 0, 1], 2).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    if len(first) != len(second):
        raise ValueError(f"readings must pair up: {len(first)} and {len(second)}")
    counts = np.zeros((levels, levels))
    np.add.at(counts, (np.asarray(first, int), np.asarray(second, int)), 1)
    return counts


def weighted_kappa(counts: Table) -> Table:
    """Return Cohen's kappa with quadratic weights; of two levels it is the plain kappa.

    Args:
        counts: Of pairs of levels, shape (..., levels, levels).

    Returns:
        Shape (...): 1 for full agreement, 0 for that of chance; NaN where both
        readings know one level only, so that chance alone agrees.

    Reference:
        Cohen, Weighted kappa, Psychological Bulletin 1968.

    >>> float(weighted_kappa(np.array([[20.0, 5.0], [10.0, 15.0]])))
    0.4
    """
    levels = np.arange(counts.shape[-1])
    apart = (levels[:, None] - levels[None, :]) ** 2.0
    rows, columns = counts.sum(-1, keepdims=True), counts.sum(-2, keepdims=True)
    total = counts.sum((-2, -1))
    seen = (apart * counts).sum((-2, -1)) * total
    by_chance = (apart * rows * columns).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(by_chance > 0, 1 - seen / by_chance, np.nan)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share.

    Args:
        successes: From 0 to `trials`; need not be whole, where it is a mean over raters.
        trials: At least 1.

    Raises:
        ValueError: If there are no trials, or more successes than trials.

    Reference:
        Wilson, Probable inference, JASA 1927.
    """
    from statistics import NormalDist

    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"there cannot be {successes} successes in {trials} trials")
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_p(successes: int, trials: int) -> float:
    """Return the exact two-sided p that a coin shows as many heads."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials, 0.5).pvalue)


def resampled_interval(
    sums: Table, statistic: Callable[[Table], Table], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """Return a 95 % percentile interval that resamples subjects.

    Args:
        sums: What each subject adds to the sums that the statistic is made of, shape (subjects, ...).
        statistic: Sums of shape (draws, ...) to values of shape (draws,); NaN where it is not defined.
        seed: Of the resampling.
        draws: How many.

    Returns:
        Its ends; NaN of fewer than two subjects, or where no draw has a value.
    """
    subjects = len(sums)
    if subjects < 2:
        return math.nan, math.nan
    weights = np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), draws)
    values = statistic(np.tensordot(weights.astype(float), sums, 1))
    known = values[~np.isnan(values)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, (ALPHA / 2, 1 - ALPHA / 2)).tolist()
    return low, high
