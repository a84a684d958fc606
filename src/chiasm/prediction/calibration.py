"""From the local discriminator's raw score to an expected absolute error, and how well that holds.

The raw score -s log M orders voxels by their error, but its numbers have no unit.  On validation cases, whose true
error is known, the rising function from score to mean error is fitted (isotonic regression).  Where there is no such
function the record says so in words: a map that does not follow the error must not look like one that does.  A map
calibrated over all voxels may still understate the error in lesions, so the table is by region.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import RunError
from chiasm.names import amount
from chiasm.preparation.intensity import AT_ONCE
from chiasm.storage import read_json, write_json

#: Fewer voxels than this say nothing about a map.
LEAST_VOXELS = 1_000
MOST_ERROR = 1e9  # normalised units, far beyond any
_RANKED = 200_000  # voxels of the rank correlation; beyond, its third digit stands still


@dataclass(frozen=True)
class Calibration:
    """A rising map from raw score to expected absolute error, and how far it can be trusted.

    Attributes:
        x: Raw scores at the knots, strictly rising, normalised units.
        y: Expected absolute error at each, never falling, normalised units.
        fitted_on: Ids of the cases whose voxels were used.
        voxels: Number of these voxels.
        spearman: Rank correlation of score and error over them, 0 if one of the two is constant.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    fitted_on: tuple[str, ...]
    voxels: int
    spearman: float

    @property
    def inverted(self) -> bool:
        """Whether the error falls where the score rises, beyond chance."""
        return self.spearman < -self._chance

    @property
    def informative(self) -> bool:
        """Whether the map predicts errors better than their mean does, as far as the voxels show."""
        return self.voxels >= LEAST_VOXELS and self.spearman > self._chance

    @property
    def _chance(self) -> float:
        """Two standard deviations of the rank correlation of equally many unrelated voxels."""
        return 2 / math.sqrt(max(1, min(self.voxels, _RANKED)))

    @property
    def verdict(self) -> str:
        """One sentence on how far the map can be trusted."""
        where = (
            f"on {self.voxels} voxels of {amount(len(self.fitted_on), 'case')} (rank correlation {self.spearman:.2f})"
        )
        if self.voxels < LEAST_VOXELS:
            return f"too few voxels to show whether the map follows the true error: {where}"
        if self.inverted:
            return f"inverted: the map is low where the error is high, {where}; do not use it"
        if not self.informative:
            return f"not informative: the map does not follow the true error {where}; do not use it"
        return f"the map follows the true error {where}"


class CalibrationRow(NamedTuple):
    """Expected and true error over a group of voxels.

    Attributes:
        region: Name of the region; "all" for every valid voxel.
        decile: 1 to 10, by the expected error within the region; 0 for the whole region.
        voxels: How many there are.
        predicted: Mean expected absolute error.
        observed: Mean true absolute error.
        ratio: Observed by predicted: 2.3 means that the true error is 2.3 times the map's; NaN if no error is expected.
    """

    region: str
    decile: int
    voxels: int
    predicted: float
    observed: float
    ratio: float


def fit_calibration(score: ArrayLike, error: ArrayLike, *, fitted_on: Sequence[str], knots: int = 64) -> Calibration:
    """Fit the rising map from raw score to expected absolute error.

    Voxels are sorted by score into `knots` groups of equal count (equal scores
    stay together), and neighbouring groups whose mean errors fall are pooled.
    A fit on fewer than `LEAST_VOXELS`, or without a rank correlation beyond chance,
    is made as well and says so: see `Calibration.informative` and `verdict`.

    Args:
        score: -s log M at valid voxels, normalised units, any shape.
        error: True absolute error there, same shape.
        fitted_on: Ids of the cases the voxels are from: validation, never training or test.
        knots: Most groups.

    Raises:
        ValueError: If the shapes differ, nothing is given, a number is not
            finite, an error is negative or `knots` is below 2.

    Reference:
        Pool adjacent violators: Barlow et al., Statistical Inference under Order Restrictions, 1972.
    """
    scores, errors = np.ravel(np.asarray(score)), np.ravel(np.asarray(error))
    _check_fit(scores, errors, knots)
    x, y, counts = equal_groups(scores, errors, knots)
    return Calibration(
        x=tuple(x.tolist()),
        y=tuple(never_falling(y, counts).tolist()),
        fitted_on=tuple(fitted_on),
        voxels=scores.size,
        spearman=_rank_correlation(scores, errors),
    )


def _check_fit(scores: NDArray[np.floating], errors: NDArray[np.floating], knots: int) -> None:
    if scores.shape != errors.shape or not scores.size or knots < 2:
        raise ValueError(f"{scores.size} scores, {errors.size} errors, {knots} knots")
    if not np.isfinite(scores).all() or not np.isfinite(errors).all() or errors.min() < 0:
        raise ValueError("scores and errors must be finite, and errors not negative")


def equal_groups(
    score: NDArray[np.floating], error: NDArray[np.floating], groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Sort by score into groups of about equal count; equal scores stay in one group.

    Args:
        score: Shape (n,).
        error: Shape (n,).
        groups: Most groups.

    Returns:
        Mean score (strictly rising), mean error and count of each group.
    """
    order = np.argsort(score, kind="stable")
    sorted_score = score[order].astype(np.float64)
    cuts = np.linspace(0, len(score), min(groups, len(score)) + 1).round().astype(np.int64)[:-1]
    starts = np.unique(np.searchsorted(sorted_score, sorted_score[cuts]))
    counts = np.diff([*starts, len(score)])
    means = (np.add.reduceat(values, starts) / counts for values in (sorted_score, error[order].astype(np.float64)))
    return next(means), next(means), counts


def never_falling(values: NDArray[np.float64], weights: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the nearest never-falling sequence in weighted least squares, by pooling neighbours that fall.

    Args:
        values: Shape (n,).
        weights: Positive, shape (n,).

    >>> never_falling(np.array([1.0, 3.0, 2.0, 4.0]), np.array([1, 1, 1, 1]))
    array([1. , 2.5, 2.5, 4. ])
    """
    pools: list[tuple[float, int, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, length = value, weight, 1
        while pools and pools[-1][0] >= mean:
            before, its_weight, its_length = pools.pop()
            mean = (before * its_weight + mean * total) / (its_weight + total)
            total, length = total + its_weight, length + its_length
        pools.append((mean, total, length))
    return np.repeat([mean for mean, _, _ in pools], [length for _, _, length in pools])


def mean_calibration(calibrations: Sequence[Calibration]) -> Calibration:
    """Return the mean of several calibrations, as a function of the raw score.

    Args:
        calibrations: At least one.  Each is a rising map, and so is their mean.
    """
    x = np.unique(np.concatenate([one.x for one in calibrations]))
    return Calibration(
        x=tuple(x.tolist()),
        y=tuple(np.mean([np.interp(x, one.x, one.y) for one in calibrations], axis=0).tolist()),
        fitted_on=tuple(chain.from_iterable(one.fitted_on for one in calibrations)),
        voxels=sum(one.voxels for one in calibrations),
        spearman=float(np.mean([one.spearman for one in calibrations])),
    )


def apply_calibration(calibration: Calibration, score: ArrayLike) -> NDArray[np.float32]:
    """Turn raw scores into expected absolute errors; linear between knots, constant beyond them.

    Args:
        calibration: From `fit_calibration`.
        score: -s log M, normalised units, any shape.

    Returns:
        Same shape, normalised units.
    """
    scores = np.asarray(score)
    expected = np.empty(scores.shape, np.float32)
    flat, made = scores.reshape(-1), expected.reshape(-1)
    for start in range(0, flat.size, AT_ONCE):  # in double precision, of which a volume needs much
        made[start : start + AT_ONCE] = np.interp(flat[start : start + AT_ONCE], calibration.x, calibration.y)
    return expected


def calibration_table(
    predicted: NDArray[np.floating],
    observed: NDArray[np.floating],
    regions: Mapping[str, NDArray[np.bool_]],
) -> list[CalibrationRow]:
    """Compare expected and true error over everything and in each region, as a whole and by decile.

    Args:
        predicted: Expected absolute error at valid voxels, any shape, any unit.
        observed: True absolute error there, same shape and unit.
        regions: Which of these voxels belong to a region, by name, same shape.

    Returns:
        For "all" and each region that is not empty, the whole (decile 0) and up to
        ten deciles by the expected error (fewer where many are equal).

    Raises:
        ValueError: If the shapes differ or a region is called "all".
    """
    _check_table(predicted, observed, regions)
    parts = {"all": np.ones(predicted.shape, bool), **regions}
    return [
        row
        for name, inside in parts.items()
        if inside.any()
        for row in _rows_of(name, predicted[inside], observed[inside])
    ]


def _check_table(
    predicted: NDArray[np.floating], observed: NDArray[np.floating], regions: Mapping[str, NDArray[np.bool_]]
) -> None:
    wrong = [name for name, inside in regions.items() if inside.shape != predicted.shape]
    if predicted.shape != observed.shape or wrong or "all" in regions:
        raise ValueError(f"predicted {predicted.shape}, observed {observed.shape}; regions of other shapes: {wrong}")


def _rows_of(region: str, expected: NDArray[np.floating], true: NDArray[np.floating]) -> Iterator[CalibrationRow]:
    """Compare expected and true error of one region: as a whole, then by decile."""
    whole = (float(expected.mean(dtype=float)), float(true.mean(dtype=float)), expected.size)
    deciles = zip(*(column.tolist() for column in equal_groups(expected, true, 10)))
    for decile, (x, y, count) in enumerate([whole, *deciles]):
        yield CalibrationRow(region, decile, count, x, y, y / x if x else math.nan)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON, with its verdict in words for readers."""
    write_json(path, {**vars(calibration), "informative": calibration.informative, "verdict": calibration.verdict})


def read_calibration(path: Path) -> Calibration:
    """Read what `write_calibration` wrote.

    Raises:
        RunError: If the file is missing, damaged, or holds no rising map.
    """
    content = read_json(path)
    try:
        x, y = (tuple(float(knot) for knot in content[name]) for name in ("x", "y"))
        calibration = Calibration(x, y, tuple(content["fitted_on"]), int(content["voxels"]), float(content["spearman"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError("is no calibration", path=path, reason="damaged", found=repr(error)) from error
    bounded = (np.abs([*x, *y, calibration.spearman]) < MOST_ERROR).all()
    if not (bounded and _is_rising(x, y)):
        raise RunError(
            "holds no calibration: its knots must rise, be errors of at least 0, and be finite",
            path=path,
            reason="damaged",
        )
    return calibration


def _is_rising(x: Sequence[float], y: Sequence[float]) -> bool:
    """Return whether knots rise and map to errors of at least 0 that never fall."""
    if not x or len(x) != len(y):
        return False
    return bool((np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and min(y) >= 0)


def _rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    from scipy.stats import rankdata

    step = math.ceil(len(a) / _RANKED)
    ranks = [rankdata(values[::step]) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    size = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(centred[0] @ centred[1]) / size if size else 0.0
