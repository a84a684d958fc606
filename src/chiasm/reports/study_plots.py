"""A study's plots, for its page and for documents: lesions against healthy tissue, paired differences, error maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.expected_error import POOLED
from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.rows import Row
from chiasm.evaluation.statistics import Comparison
from chiasm.reports.drawing import DASHES, INK, MUTED, SERIES, Points, draw_svg
from chiasm.reports.tables import mean_table

HEALTHY = "healthy"
RISK = "risk_"  # and the percent of the voxels that are kept: the metrics of coverage
CROWDED = 0.04  # share of the plot within which marks cover each other


# Lesions against healthy tissue


class Change(NamedTuple):
    """Change of an arm's MAE in healthy tissue and in lesions, percent, one score for each seed, shape (seeds,)."""

    healthy: NDArray[np.float64]
    lesion: NDArray[np.float64]

    @property
    def mean(self) -> tuple[float, float]:
        """Means over seeds, as they lie on the plot."""
        return float(self.healthy.mean()), float(self.lesion.mean())

    def in_words(self, lesion: str) -> str:
        """Say both means; `lesion` is the region's name."""
        healthy, ill = self.mean
        return f"{ill:+.1f} % in {lesion}, {healthy:+.1f} % in healthy tissue"


def draw_trade_off(comparisons: Sequence[Comparison], lesion: str) -> dict[str, str] | None:
    """Draw each arm's change in lesions over its change in healthy tissue, one point for each seed.

    A method in the lower left is better in lesions without a cost elsewhere.

    Args:
        comparisons: Of which those of MAE with one common partner are drawn.
        lesion: The region on the vertical axis.

    Returns:
        The plot with a title, or None where either region is missing.
    """
    anchor = _common_partner(comparisons, lesion)
    changes = _changes(comparisons, lesion, anchor)
    if not changes:
        return None
    primary = {one.arm for one in comparisons if one.primary}

    def draw(axes: Any) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for arm, change in changes.items():
            colour = SERIES[1] if arm in primary else SERIES[0]
            axes.plot(*change, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.plot(*change.mean, "D", color=colour, markersize=6)
        axes.plot(0, 0, "s", color=INK, markersize=6)
        for names, corner in _labels(changes, anchor):
            axes.annotate(names, corner, (6, 4), textcoords="offset points", color=INK)
        axes.set(xlabel=f"MAE in healthy tissue against {anchor} (%)", ylabel=f"MAE in {lesion} against {anchor} (%)")
        axes.grid(axis="x")
        axes.margins(0.12)

    words = " ".join(f"{arm}: {change.in_words(lesion)}." for arm, change in changes.items())
    alt = f"Change of MAE in {lesion} and in healthy tissue against {anchor}. {words}"
    title = f"Lesion against healthy: every method beside {anchor}"
    return {"title": title, "svg": draw_svg(draw, alt, (7, 4.6), "trade-off")}


def _common_partner(comparisons: Sequence[Comparison], lesion: str) -> str:
    """Name the method that most others are compared with in a region; nothing where there are none."""
    partners = [one.against for one in comparisons if (one.region, one.metric) == (lesion, "mae")]
    return max(dict.fromkeys(partners), key=partners.count, default="")


def _changes(comparisons: Sequence[Comparison], lesion: str, anchor: str) -> dict[str, Change]:
    """Collect the arms that were compared with the anchor in both regions."""
    against = [one for one in comparisons if (one.against, one.metric) == (anchor, "mae")]
    healthy, ill = _percent_by_arm(against, HEALTHY), _percent_by_arm(against, lesion)
    return {arm: Change(healthy[arm], ill[arm]) for arm in ill if arm in healthy}


def _percent_by_arm(comparisons: Sequence[Comparison], region: str) -> dict[str, NDArray[np.float64]]:
    """Return the change of each arm in a region, percent, one for each seed."""
    here = [one for one in comparisons if one.region == region]
    return {one.arm: 100 * np.array(one.by_seed) / abs(one.mean_against) for one in here}


def _labels(changes: Mapping[str, Change], anchor: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Give labels and where they stand: names whose marks cover each other share one."""
    reach = _reach(changes.values(), 0), _reach(changes.values(), 1)
    spots = {anchor: (0.0, 0.0)} | {arm: change.mean for arm, change in changes.items()}
    together = grouped(spots, lambda name: tuple(map(_square, spots[name], reach)))
    for names in together.values():
        x, y = np.max([spots[name] for name in names], axis=0).tolist()
        yield ", ".join(names), (x, y)


def _reach(changes: Iterable[Change], axis: int) -> float:
    """Return how far the marks of one arm reach along an axis at most, 0 among them."""
    return max(float(np.ptp([*change[axis], 0])) for change in changes)


def _square(at: float, reach: float) -> int:
    """Number the squares of an axis, of which marks in one cover each other."""
    return round(at / reach / CROWDED) if at else 0


# Paired differences


def draw_forest(comparisons: Sequence[Comparison], regions: Sequence[str], metric: str = "mae") -> str | None:
    """Draw paired differences with their intervals, a line for each pair and a column for each region.

    Args:
        comparisons: Of which those of `metric` in `regions` are drawn.
        regions: Columns, left to right.
        metric: Which score.

    Returns:
        SVG, or None where there is nothing to draw.
    """
    here = [one for one in comparisons if one.metric == metric and one.region in regions]
    if not here:
        return None
    pairs = list(dict.fromkeys((one.arm, one.against) for one in here))
    columns = grouped(sorted(here, key=lambda one: regions.index(one.region)), lambda one: one.region)

    def draw(axes: Any) -> None:
        for panel, (region, some) in zip(np.atleast_1d(axes), columns.items()):
            panel.axvline(0, color=MUTED, linewidth=0.8)
            for one in some:
                _draw_difference(panel, one, pairs.index((one.arm, one.against)))
            panel.set_title(f"{find_metric(metric).label} in {region} (%)", loc="left", color=INK, fontsize=9)
            panel.set_yticks(range(len(pairs)), [" against ".join(pair) for pair in pairs])
            panel.set_ylim(len(pairs) - 0.4, -0.6)
            panel.grid(axis="x")
            panel.grid(visible=False, axis="y")

    alt = f"Paired differences of {find_metric(metric).label} with 95 % intervals. {_verdicts(here)}"
    size = (1.6 + 2.7 * len(columns), 0.9 + 0.26 * len(pairs))
    return draw_svg(draw, alt, size, "forest", columns=len(columns))


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    """Describe the results of the declared comparisons."""
    return " ".join(f"{one.verdict}." for one in comparisons if one.primary)


def _draw_difference(axes: Any, one: Comparison, y: float) -> None:
    """Draw a difference in percent with its interval; filled where it is below 0.05, a diamond where declared."""
    scale = 100 / abs(one.mean_against)
    colour, mark = (SERIES[1], "D") if one.primary else (SERIES[0], "o")
    if math.isfinite(one.low):
        axes.plot([one.low * scale, one.high * scale], [y, y], color=colour, linewidth=1.8)
    filled = colour if one.p_holm < 0.05 else "none"
    axes.plot(one.relative, y, mark, color=colour, markerfacecolor=filled, markersize=5.5)


# Maps of the expected error


def draw_maps(rows: Sequence[Row]) -> dict[str, str] | None:
    """Draw observed over expected error by tenths of each map, and the error left as voxels are dropped by it.

    Args:
        rows: Of `assess_maps`.

    Returns:
        SVG of both, by name, or None without such rows.
    """
    tenths, risks = _errors_by_tenth(rows), _risks_by_coverage(rows)
    if not tenths or not risks:
        return None

    def curve(axes: Any) -> None:
        _plot_maps(axes, tenths, linewidth=1.4)
        most = float(axes.get_xlim()[1])
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8)
        axes.set(xlabel="expected error", ylabel="observed error")
        axes.legend(loc="upper left", labelcolor=INK)

    def left(axes: Any) -> None:
        _plot_maps(axes, risks, linewidth=1.7)
        axes.invert_xaxis()
        axes.set(xlabel="voxels kept (%)", ylabel="mean error of the kept")
        axes.legend(loc="lower left", labelcolor=INK)

    words = " ".join(f"{name}: {points[0, 1]:.3g} at {points[0, 0]:g} %." for name, points in risks.items())
    return {
        "curve": draw_svg(curve, "Observed against expected error by tenths of each map.", (4.6, 3.6), "map curve"),
        "risk": draw_svg(left, f"Mean error of the voxels kept. {words}", (4.6, 3.6), "map risk"),
    }


def _errors_by_tenth(rows: Sequence[Row]) -> dict[str, Points]:
    """Collect (expected, observed) error of each map's tenths, means over folds, shape (tenths, 2)."""
    pooled = [row for row in rows if row.case == POOLED and row.region.startswith("mask decile")]
    tenths = mean_table(pooled, lambda row: (row.method, row.region), lambda row: row.metric)
    maps = grouped(tenths, lambda tenth: tenth[0])
    return {name: np.array([_point(tenths[tenth]) for tenth in some]) for name, some in maps.items()}


def _point(errors: Mapping[str, float]) -> tuple[float, float]:
    """Return the errors of a tenth of a map as they lie on the plot."""
    return errors["expected_error"], errors["observed_error"]


def _risks_by_coverage(rows: Sequence[Row]) -> dict[str, Points]:
    """Collect (percent of the voxels kept, mean error) of each map, fewest first, shape (points, 2)."""
    mask = [row for row in rows if row.case != POOLED and row.region == "mask"]
    kept = [row for row in mask if row.metric.startswith(RISK)]
    risks = mean_table(kept, lambda row: row.method, lambda row: int(row.metric.removeprefix(RISK)))
    return {name: np.array(sorted(points.items()), float) for name, points in risks.items()}


def _plot_maps(axes: Any, points: Mapping[str, Points], linewidth: float) -> None:
    for (name, some), colour, dash in zip(points.items(), SERIES, DASHES):
        axes.plot(*some.T, color=colour, linestyle=dash, linewidth=linewidth, marker="o", markersize=3.5, label=name)
