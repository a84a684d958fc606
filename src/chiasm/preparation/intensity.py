"""From raw intensities to normalised ones and back: monotone maps, fitted inside the mask.

MR has no unit: gain and offset differ between scans, so every volume is
normalised by a map of its own.  Which kind of map makes a cohort's cases agree
is measured (`choose_intensity`), not assumed.  CT has one: Hounsfield, a fixed
window.

All fitted kinds are scaled alike: a Gaussian would come out with mean 0 and
standard deviation 1 under each of them, so a loss weight means the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import VolumeError

Fitted = Literal["median_iqr", "zscore", "percentile", "mode", "rank"]
MapKind = Literal["median_iqr", "zscore", "percentile", "mode", "rank", "hu"]

#: Kinds that are fitted to each volume; where several agree equally well, the first is taken.
KINDS: tuple[Fitted, ...] = get_args(Fitted)

BINS = 64  # of a look-up table
AT_ONCE = 2**16  # voxels that are mapped at once
QUANTILES = 64  # knots of a rank map
FEWEST_CASES = 3  # to measure agreement by leaving one out
TIE = 0.01  # differences of R2 below this decide nothing

_NORMAL = NormalDist()
_IQR = 2 * _NORMAL.inv_cdf(0.75)  # of a standard normal: 1.349


@dataclass(frozen=True)
class IntensityMap:
    """A strictly rising, piecewise linear map, extended by its first and last slopes.

    Attributes:
        kind: How it was fitted: a name of `KINDS`, or "hu".
        values: Raw intensities, at least two, strictly rising.
        normalised: What each becomes, strictly rising.

    Raises:
        ValueError: If the knots do not pair up, are not finite or do not rise.
    """

    kind: MapKind
    values: tuple[float, ...]
    normalised: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.normalised) or len(self.values) < 2:
            raise ValueError(f"a map needs two knots or more: {len(self.values)} and {len(self.normalised)}")
        if not _rises(self.values) or not _rises(self.normalised):
            raise ValueError(f"the knots of a map must be finite and strictly rising: {self}")

    def apply(self, array: ArrayLike) -> NDArray[np.float32]:
        """Map raw intensities to normalised ones, of the same shape."""
        return _piecewise(array, self.values, self.normalised)

    def invert(self, array: ArrayLike) -> NDArray[np.float32]:
        """Map normalised intensities to raw ones: the exact inverse of `apply`."""
        return _piecewise(array, self.normalised, self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in plain numbers and texts."""
        return {"kind": self.kind, "values": list(self.values), "normalised": list(self.normalised)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> IntensityMap:
        """Build a map from `to_dict`.

        Raises:
            ValueError: If the knots are no map.
            KeyError: If a part is missing.
        """
        return cls(content["kind"], *(tuple(map(float, content[name])) for name in ("values", "normalised")))


class Pair(NamedTuple):
    """Raw intensities of one case at the same voxels inside its mask.

    Attributes:
        source: Shape (n,).
        target: Shape (n,).
    """

    source: NDArray[np.float32]
    target: NDArray[np.float32]


def fit_intensity(
    array: NDArray[Any],
    mask: NDArray[np.bool_] | None,
    kind: MapKind,
    window_hu: tuple[float, float] | None = None,
) -> IntensityMap:
    """Fit a map to one volume.

    Args:
        array: Raw intensities, any shape.
        mask: The voxels that count, of the same shape; None takes all.
        kind: "median_iqr" (median to 0, interquartile range to 1.349),
            "zscore", "percentile" (0.5 and 99.5 % to -2.576 and 2.576), "mode"
            (peak of the histogram to 0, 99 % to 2.326), "rank" (quantiles to
            those of a standard normal), or "hu" (the window to -1 and 1;
            nothing is fitted, and the caller clips).
        window_hu: Lowest and highest Hounsfield unit, for "hu" alone.

    Raises:
        VolumeError: If the mask is empty, or nearly all intensities inside it are the same.
        ValueError: If the kind is unknown, or "hu" comes without a window.
    """
    if kind == "hu":
        if window_hu is None:
            raise ValueError("kind 'hu' needs a window")
        return IntensityMap("hu", (float(window_hu[0]), float(window_hu[1])), (-1.0, 1.0))
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(get_args(MapKind))}")
    values = (np.asarray(array) if mask is None else np.asarray(array)[mask]).ravel().astype(np.float32, copy=False)
    if not values.size:
        raise VolumeError("has no voxel inside the mask", reason="empty-mask")
    knots = _KNOTS[kind](values)
    raw, normalised = (tuple(map(float, side)) for side in knots)
    if len(raw) < 2 or not _rises(raw):
        raise VolumeError(
            f"cannot be scaled by {kind}: nearly all its intensities inside the mask are the same",
            reason="constant",
            found=f"{float(values.min()):g} to {float(values.max()):g}",
            hint="Check that the right file and mask were given.",
        )
    return IntensityMap(kind, raw, normalised)


def reference_map(maps: Sequence[IntensityMap]) -> IntensityMap:
    """Return the map of a cohort: at each normalised intensity the median of its cases' raw ones.

    It gives synthetic images a scale that is typical of the training cases.

    Args:
        maps: Maps of training cases, all of one kind.

    Raises:
        ValueError: If there are none, or they are of several kinds.
    """
    if len({one.kind for one in maps}) != 1:
        raise ValueError(f"a cohort's map comes from maps of one kind, not of {sorted({one.kind for one in maps})}")
    normalised = max((one.normalised for one in maps), key=len)
    raw = np.median([_linear(normalised, one.normalised, one.values) for one in maps], axis=0)
    return IntensityMap(maps[0].kind, tuple(raw.tolist()), normalised)


def fit_lookup(
    source_values: ArrayLike, target_values: ArrayLike, bins: int = BINS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit the target expected at each source intensity: means of bins of equal count.

    Args:
        source_values: Shape (n,).
        target_values: At the same voxels, shape (n,).
        bins: Bins wished for; fewer come back where intensities are tied.

    Returns:
        Mean source of each bin, strictly rising, and its mean target, each (k,), 2 <= k <= bins.

    Raises:
        ValueError: If the values do not pair up, or the source has fewer than two intensities.
    """
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (source_values, target_values))
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} source values do not pair up with {len(y)} target values")
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    edges = np.linspace(0, len(x), min(bins, len(x)) + 1).astype(int)[:-1]
    starts = np.unique(np.searchsorted(x, x[edges]))  # equal intensities never fall into two bins
    if len(starts) == 1 and len(x) and x[0] < x[-1]:
        starts = np.array([0, np.searchsorted(x, x[0], side="right")])
    if len(starts) < 2:
        raise ValueError("a look-up needs two different source intensities")
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def agreement(pairs: Sequence[Pair], kind_source: MapKind, kind_target: MapKind, bins: int = BINS) -> float:
    """Measure how well cases agree under two kinds of maps: R2 of an unseen case.

    For each case, a look-up fitted on the others predicts its target from its
    source; the error is measured in the case's own raw units, so that kinds
    compare.

    Args:
        pairs: One for each training case, at least two.
        kind_source: Kind of the source's maps; "hu" leaves it as it is.
        kind_target: Kind of the target's maps, likewise.
        bins: Of the look-up.

    Returns:
        Mean over the cases of 1 - squared error / variance; at most 1, and
        below 0 where the look-up is worse than the case's own mean.

    Raises:
        VolumeError: If an image is constant.
        ValueError: If there are fewer than two cases.
    """
    if len(pairs) < 2:
        raise ValueError("agreement between cases needs two of them")
    sources = [_normalised(pair.source, kind_source)[0] for pair in pairs]
    targets, maps = zip(*(_normalised(pair.target, kind_target) for pair in pairs), strict=True)
    lookups = lookups_of_others(sources, targets, bins)
    scores = []
    for pair, source, fitted, lookup in zip(pairs, sources, maps, lookups, strict=True):
        guess = np.interp(source, *lookup)
        raw = guess if fitted is None else fitted.invert(guess)
        truth = pair.target.astype(np.float64)
        scores.append(1 - np.mean((raw - truth) ** 2) / max(float(np.var(truth)), 1e-12))
    return float(np.mean(scores))


Lookup = tuple[NDArray[np.float64], NDArray[np.float64]]


def lookups_of_others(sources: Sequence[ArrayLike], targets: Sequence[ArrayLike], bins: int = BINS) -> Iterator[Lookup]:
    """Yield for each case what `fit_lookup` fits to all others; all of them are sorted and summed once.

    Args:
        sources: Normalised values of each case, shape (n,) each; two cases or more.
        targets: At the same voxels.
        bins: As for `fit_lookup`.

    Raises:
        ValueError: As `fit_lookup`, of the others of a case.
    """
    owner = np.repeat(np.arange(len(sources)), [np.size(values) for values in sources])
    x, y = (np.concatenate([np.ravel(one) for one in each]).astype(np.float64) for each in (sources, targets))
    order = np.argsort(x, kind="stable")
    pooled = _sorted_values(x[order], y[order])
    places = np.split(np.argsort(owner[order], kind="stable"), np.cumsum(np.bincount(owner))[:-1])
    for place in places:
        yield _lookup_without(pooled, place, bins)


class _SortedValues(NamedTuple):
    """Source values in rising order, and the sums of sources and targets before each, shape (n,) and (n + 1,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    sum_x: NDArray[np.float64]
    sum_y: NDArray[np.float64]


def _sorted_values(x: NDArray[np.float64], y: NDArray[np.float64]) -> _SortedValues:
    return _SortedValues(x, y, *(np.concatenate([[0.0], np.cumsum(values)]) for values in (x, y)))


def _lookup_without(pooled: _SortedValues, place: NDArray[np.intp], bins: int) -> Lookup:
    """Fit a look-up to all values but those at some places, in rising order: bins of equal count, ties together."""
    own = _sorted_values(pooled.x[place], pooled.y[place])
    count = len(pooled.x) - len(place)
    edges = np.linspace(0, count, min(bins, count) + 1).astype(int)[:-1]
    # the others' value of a rank stands behind as many own values as have fewer others before them
    values = pooled.x[edges + np.searchsorted(place - np.arange(len(place)), edges, side="right")]
    values = np.unique(values)
    if len(values) < 2:  # nearly all are tied
        others = np.delete(np.arange(len(pooled.x)), place)
        return fit_lookup(pooled.x[others], pooled.y[others], bins)
    first, first_own = np.searchsorted(pooled.x, values), np.searchsorted(own.x, values)
    starts, ends = (np.append(at, len(one.x)) for at, one in ((first, pooled), (first_own, own)))
    counts = np.diff(starts - ends)
    sums = (np.diff(all_of[starts] - own_of[ends]) for all_of, own_of in zip(pooled[2:], own[2:], strict=True))
    mean_x, mean_y = (values / counts for values in sums)
    return mean_x, mean_y


def choose_intensity(
    pairs: Sequence[Pair], *, source_kind: MapKind | None = None, target_kind: MapKind | None = None
) -> tuple[MapKind, dict[str, float]]:
    """Choose the kind of map under which the training cases agree best.

    Args:
        pairs: One for each training case.
        source_kind: Kind of the source's maps where it is settled.
        target_kind: Kind of the target's maps where it is settled; where
            neither is, both take the same.

    Returns:
        The kind of what is not settled, and R2 by kind; an empty table where
        there are too few cases to measure, and then the kind is the first of `KINDS`.

    Raises:
        VolumeError: If an image is constant.
        ValueError: If both are settled.
    """
    if source_kind and target_kind:
        raise ValueError("both kinds are given: there is nothing to choose")
    if len(pairs) < FEWEST_CASES:
        return KINDS[0], {}
    table: dict[str, float] = {kind: agreement(pairs, source_kind or kind, target_kind or kind) for kind in KINDS}
    best = max(table.values())
    return next(kind for kind in KINDS if table[kind] >= best - TIE), table


def _normalised(values: NDArray[np.float32], kind: MapKind) -> tuple[NDArray[np.float32], IntensityMap | None]:
    if kind == "hu":
        return values, None
    fitted = fit_intensity(values, None, kind)
    return fitted.apply(values), fitted


def _rises(knots: Sequence[float]) -> bool:
    return all(math.isfinite(knot) for knot in knots) and all(a < b for a, b in pairwise(knots))


def _piecewise(array: ArrayLike, x: Sequence[float], y: Sequence[float]) -> NDArray[np.float32]:
    given = np.asarray(array)
    order: Literal["C", "F"] = "F" if given.flags.f_contiguous else "C"
    flat = given.ravel(order)
    made = np.empty(flat.size, np.float32)
    for start in range(0, flat.size, AT_ONCE):  # in double precision, of which a volume needs much
        made[start : start + AT_ONCE] = _linear(flat[start : start + AT_ONCE], x, y)
    return made.reshape(given.shape, order=order)


def _linear(at: ArrayLike, x: Sequence[float], y: Sequence[float]) -> NDArray[np.float64]:
    """Interpolate between knots and go on beyond them with the first and last slopes."""
    at, knots_x, knots_y = (np.asarray(values, dtype=np.float64) for values in (at, x, y))
    slopes = np.diff(knots_y) / np.diff(knots_x)
    left: Any = 0  # an affine map needs no search
    if len(slopes) > 1:
        left = np.searchsorted(knots_x[1:-1], at, side="right")
    result: NDArray[np.float64] = (at - knots_x[left]) * slopes[left] + knots_y[left]
    return result


Knots = tuple[Sequence[float], Sequence[float]]


def _median_iqr(values: NDArray[np.float32]) -> Knots:
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return (middle, middle + (high - low) / _IQR), (0.0, 1.0)


def _zscore(values: NDArray[np.float32]) -> Knots:
    mean = float(values.mean(dtype=np.float64))
    return (mean, mean + float(values.std(dtype=np.float64))), (0.0, 1.0)


def _percentile(values: NDArray[np.float32]) -> Knots:
    end = _NORMAL.inv_cdf(0.995)
    return np.percentile(values, (0.5, 99.5)).tolist(), (-end, end)


def _mode(values: NDArray[np.float32]) -> Knots:
    """Take the peak of a smoothed histogram: 128 bins between 0.5 and 99 %, a triangle of 9 bins."""
    low, high = np.percentile(values, (0.5, 99)).tolist()
    if not low < high:
        return (low, low), (0.0, 1.0)
    counts, edges = np.histogram(values, bins=128, range=(low, high))
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1])
    peak = int(np.convolve(counts, triangle, mode="same").argmax())
    return (float(edges[peak : peak + 2].mean()), high), (0.0, _NORMAL.inv_cdf(0.99))


def _rank(values: NDArray[np.float32]) -> Knots:
    """Tie quantiles together where they are the same intensity: the normal quantiles of a tie are averaged."""
    shares = np.linspace(0.005, 0.995, QUANTILES)
    normal = np.array([_NORMAL.inv_cdf(share) for share in shares.tolist()])
    raw, tie = np.unique(np.percentile(values, shares * 100).astype(np.float64), return_inverse=True)
    return raw.tolist(), (np.bincount(tie, weights=normal) / np.bincount(tie)).tolist()


_KNOTS = {"median_iqr": _median_iqr, "zscore": _zscore, "percentile": _percentile, "mode": _mode, "rank": _rank}
