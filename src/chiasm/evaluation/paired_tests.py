"""Tests and intervals of paired differences: flipped signs, signed ranks, resampling, a mixed model, power.

All functions here take only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FEWEST = 6  # subjects, below which nothing is tested
ALPHA = 0.05
POWER = 0.8
EXACT = 14  # subjects up to which all sign flips are tried
DRAWS = 5000

Table = NDArray[np.float64]  # of differences, mostly (subjects, seeds)


def permutation_p(differences: Table, *, seed: int = 0, draws: int = DRAWS) -> float:
    """Test whether paired differences are centred on 0, by flipping signs.

    All flips are tried up to fourteen subjects, `draws` random ones beyond.

    Args:
        differences: One for each subject, shape (n,).
        seed: Of the random flips.
        draws: How many.

    Returns:
        Two-sided p.
    """
    n = len(differences)
    if n <= EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (draws, n))
    means, seen = np.abs(signs @ differences) / n, abs(float(differences.mean()))
    extreme = int((means >= seen * (1 - 1e-12)).sum())
    return extreme / len(means) if n <= EXACT else (extreme + 1) / (draws + 1)


def wilcoxon_p(differences: Table) -> float:
    """Return the two-sided p of Wilcoxon's signed rank test; 1 where all differences are 0."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def cluster_interval(table: Table, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Return a 95 % interval of the mean that resamples subjects and seeds alike.

    Bias-corrected and accelerated (BCa), the acceleration from leaving out one
    subject at a time.

    Args:
        table: Differences, shape (subjects, seeds); NaN where one is missing.
        seed: Of the resampling.
        draws: How many.

    Reference:
        Efron, Better bootstrap confidence intervals, JASA 1987.
    """
    from statistics import NormalDist

    n, m = table.shape
    filled = _filled(table)
    people, seeds = _resampled(n, m, draws, seed)
    means = np.einsum("dm,dm->d", people @ filled, seeds)
    centre = float(filled.mean())
    if np.ptp(means) == 0:
        return centre, centre
    normal = NormalDist()
    share = float(np.clip(np.mean(means < centre) + np.mean(means == centre) / 2, 1 / draws, 1 - 1 / draws))
    bias = normal.inv_cdf(share)
    left_out = (filled.sum() - filled.sum(axis=1)) / (m * (n - 1))
    apart = left_out.mean() - left_out
    size = float((apart**2).sum() ** 1.5)
    acceleration = float((apart**3).sum()) / (6 * size) if size else 0.0
    ends = []
    for level in (ALPHA / 2, 1 - ALPHA / 2):
        z = bias + normal.inv_cdf(level)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends).tolist()
    return low, high


@lru_cache(maxsize=4)
def _resampled(n: int, m: int, draws: int, seed: int) -> tuple[Table, Table]:
    """Draw how much each subject (draws, n) and each seed (draws, m) weighs; the same for all comparisons of a size."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), draws) / n, rng.multinomial(m, np.full(m, 1 / m), draws) / m


def mixed_model(table: Table) -> tuple[float, float]:
    """Test the mean of a table whose rows and columns are random: d = mean + subject + seed + rest.

    Restricted maximum likelihood, which for a full table has a closed form:
    mean squares of subjects, seeds and the rest; a variance that comes out
    negative is 0, and its mean square joins the rest.  The p value is of a t
    test with Satterthwaite's degrees of freedom.

    Args:
        table: Differences, shape (subjects, seeds), two subjects or more; NaN
            where one is missing, which counts as its subject's mean.

    Returns:
        Standard error of the mean, and the two-sided p that it is 0.

    Reference:
        Searle, Casella and McCulloch, Variance Components, 1992, chapter 4.
    """
    from scipy.stats import t

    filled = _filled(table)
    (n, m), mean = filled.shape, float(filled.mean())
    effects, rest = _pooled(*_sums_of_squares(filled, mean))
    variances = effects or [rest]
    variance = sum(one.mean for one in variances)
    if len(effects) == 2:
        variance -= rest.mean
        variances = [*effects, rest]
    if variance <= 0:
        return 0.0, 1.0 if mean == 0 else 0.0
    degrees = variance**2 / sum(one.mean**2 / one.free for one in variances)
    error = math.sqrt(variance / (n * m))
    return error, float(2 * t.sf(abs(mean) / error, degrees))


class _Squares(NamedTuple):
    """A sum of squares and its degrees of freedom."""

    total: float
    free: int

    @property
    def mean(self) -> float:
        return self.total / self.free


def _filled(table: Table) -> Table:
    """Put its subject's mean in the place of each missing difference."""
    return np.where(np.isnan(table), np.nanmean(table, axis=1, keepdims=True), table)


def _sums_of_squares(table: Table, mean: float) -> tuple[list[_Squares], _Squares]:
    """Divide the squares of a full table among subjects, seeds (if there are several) and the rest."""
    n, m = table.shape
    people = float(m * np.sum((table.mean(axis=1) - mean) ** 2))
    seeds = float(n * np.sum((table.mean(axis=0) - mean) ** 2))
    rest = max(0.0, float(np.sum((table - mean) ** 2)) - (people + seeds))
    effects = [_Squares(people, n - 1), _Squares(seeds, m - 1)]
    return effects if m > 1 else effects[:1], _Squares(rest, (n - 1) * (m - 1))


def _pooled(effects: list[_Squares], rest: _Squares) -> tuple[list[_Squares], _Squares]:
    """Let an effect that is no larger than the rest join it, the smaller of two first; a single one stays."""
    if len(effects) == 1:
        return effects, rest
    kept = list(effects)
    for effect in sorted(effects, key=lambda one: one.mean):
        if effect.mean <= rest.mean:
            rest = _Squares(rest.total + effect.total, rest.free + effect.free)
            kept.remove(effect)
    return kept, rest


def detectable(n: int, spread: float) -> float:
    """Return the smallest difference that n subjects of this spread show in four of five studies.

    Args:
        n: Subjects, at least `FEWEST`.
        spread: SD of their paired differences.

    Returns:
        In the unit of `spread`; of a two-sided paired t test at 5 %.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    limit = float(t.ppf(1 - ALPHA / 2, n - 1))

    def lack(shift: float) -> float:  # the other tail is negligible here
        return float(nct.sf(limit, n - 1, shift)) - POWER

    return float(brentq(lack, 0.0, 10.0)) / math.sqrt(n) * spread


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p values over a family (Holm 1979); NaN stays, and does not count.

    Args:
        ps: Of the family, in any order.

    Returns:
        The corrected ones, in the same order.

    Reference:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    known = [index for index, p in enumerate(ps) if not math.isnan(p)]
    corrected, largest = list(ps), 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(known) - rank) * ps[index]))
        corrected[index] = largest
    return corrected
