"""A study's page: what was asked, what may be claimed, and everything else that was looked at, marked as such.

It is made from a study's files alone.  Declared comparisons come first and in
words; the rest is called exploratory.  A null result has the same place and
size as a win.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.evaluation.reliability import POOLED
from chiasm.evaluation.rows import LEAST_LESION, Row
from chiasm.evaluation.statistics import HIGHER, Comparison, Summary, stays_within
from chiasm.reports.curves import describe_health, draw_curves
from chiasm.reports.drawing import (
    DASHES,
    HARD_SPACE,
    INK,
    METRICS,
    MUTED,
    SERIES,
    Cell,
    Remark,
    Table,
    draw_svg,
    number_cell,
    render_page,
    show_figure,
    show_metric,
    show_unit,
)
from chiasm.reports.evaluation_page import LESION, list_conventions, tabulate_lesions
from chiasm.storage import write_text

HEALTHY = "healthy"
MARGIN = 1.0  # percent by which healthy tissue may be worse for a gain in lesions to count
RELIABILITY = ("spearman", "spearman_smoothed", "auroc_worst", "auroc_lesion", "ause", "calibration")
RIVALS = (
    "spearman",
    "auroc_worst",
    "auroc_lesion",
    "ause",
    "calibration",
    "calibration_gap",
    "passes",
    "trainings",
    "seconds",
)
CROWDED = 0.04  # share of the plane within which marks cover each other
NO_FIGURE = Cell("–", math.inf)


@dataclass(frozen=True)
class Findings:
    """What a study found, as its files hold it.

    Attributes:
        title: Of the page.
        rows: Every figure.
        comparisons: The declared ones first.
        summaries: Of every method, region and metric.
        regions: Lesion regions in order; may be empty.
        arms: What each arm is, in words, by name; other methods are naive.
        history: `log.jsonl` of one training of the arm under judgement.
        history_name: Which training that is.
        rivals: Figures of the reliability map beside others, or none.
        facts: Data sheet: heading -> name -> value.
        warnings: What must be read first.
        methods: A paragraph to paste.
        cases: Case id -> its page, relative to the report.
    """

    title: str
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    summaries: Sequence[Summary]
    regions: Sequence[str]
    arms: Mapping[str, str]
    history: Sequence[Mapping[str, Any]]
    history_name: str
    rivals: Sequence[Row]
    facts: Mapping[str, Mapping[str, str]]
    warnings: Sequence[str]
    methods: str
    cases: Mapping[str, str]


def write_findings(path: Path, found: Findings) -> Path:
    """Write a study's page as one HTML file that needs nothing else.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    declared = [one for one in found.comparisons if one.primary]
    judged = declared[0].arm if declared else next(iter(found.arms), "")
    lesion = declared[0].region if declared else next(iter(found.regions), "mask")
    content = {
        "kind": "study",
        "title": found.title,
        "asked": "",
        "verdicts": [_told(one) for one in declared],
        "guards": [stays_within(one, MARGIN) for one in _guards(found.comparisons, declared)],
        "margin": f"{MARGIN:g}",
        "warnings": list(found.warnings),
        "arms": list(found.arms.items()),
        "plane": draw_plane(found.comparisons, lesion),
        "forest": draw_forest(found.comparisons, list(dict.fromkeys([lesion, HEALTHY, "mask"]))),
        "summary": _summary_table(found.summaries, found.arms),
        "comparisons": _comparison_table(found.comparisons),
        "least_lesion": LEAST_LESION,
        "lesions": tabulate_lesions([row for row in found.rows if LESION.fullmatch(row.region)], judged),
        "judged": judged,
        "reliability": _reliability_table(found.rows, list(found.arms)),
        "rivals": rival_table(found.rivals),
        "rival_figures": draw_rivals(found.rivals),
        "curves": draw_curves(found.history),
        "health": describe_health(found.history),
        "history_name": found.history_name,
        "cases": list(found.cases.items()),
        "facts": found.facts,
        "methods": found.methods,
        "conventions": list_conventions(found.rows),
    }
    write_text(path, render_page("study.html", content))
    return path


def _guards(comparisons: Sequence[Comparison], declared: Sequence[Comparison]) -> list[Comparison]:
    """Find, for each declared comparison in a lesion, the same one in healthy tissue."""
    wanted = [(one.arm, one.against, HEALTHY, one.metric) for one in declared if one.region != HEALTHY]
    return [one for one in comparisons if (one.arm, one.against, one.region, one.metric) in wanted]


def _told(one: Comparison) -> Remark:
    better = (one.difference > 0) == (one.metric in HIGHER)
    shown = "no difference" not in one.verdict and "not tested" not in one.verdict
    return Remark(("good" if better else "bad") if shown else "mixed", one.verdict)


def draw_plane(comparisons: Sequence[Comparison], lesion: str) -> dict[str, str] | None:
    """Draw each arm's change in lesions over its change in healthy tissue, one point for each seed.

    An arm moves the front where it lies low without lying right: better in
    lesions at no cost elsewhere.

    Args:
        comparisons: Of which those of MAE with one common partner are drawn.
        lesion: The region on the vertical axis.

    Returns:
        The figure with a title, or None where either region is missing.
    """
    found = {(one.arm, one.against, one.region): one for one in comparisons if one.metric == "mae"}
    partners = [one.against for one in comparisons if one.metric == "mae" and one.region == lesion]
    if not partners:
        return None
    anchor = max(dict.fromkeys(partners), key=partners.count)
    points: dict[str, tuple[Any, Any]] = {}
    for arm, against, region in found:
        there, here = found.get((arm, anchor, HEALTHY)), found[arm, against, region]
        if against == anchor and region == lesion and there is not None:
            healthy, sick = (100 * np.array(one.by_seed) / abs(one.mean_against) for one in (there, here))
            points[arm] = healthy, sick
    if not points:
        return None
    primary = {one.arm for one in comparisons if one.primary}

    def draw(axes: Any) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        together: dict[tuple[int, int], list[str]] = {(0, 0): [anchor]}  # names whose marks cover each other
        reach = [max(np.ptp(np.concatenate([point[axis], [0]])) for point in points.values()) for axis in (0, 1)]
        for arm, (healthy, sick) in points.items():
            colour = SERIES[1] if arm in primary else SERIES[0]
            axes.plot(healthy, sick, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.plot(healthy.mean(), sick.mean(), "D", color=colour, markersize=6)
            place = [round(float(value.mean() / size / CROWDED)) for value, size in zip((healthy, sick), reach)]
            together.setdefault((place[0], place[1]), []).append(arm)
        axes.plot(0, 0, "s", color=INK, markersize=6)
        for names in together.values():
            spots = [
                [float(value.mean()) for value in points[name]] if name in points else [0.0, 0.0] for name in names
            ]
            x, y = max(spot[0] for spot in spots), max(spot[1] for spot in spots)
            axes.annotate(", ".join(names), (x, y), (6, 4), textcoords="offset points", color=INK)
        axes.set(xlabel=f"MAE in healthy tissue against {anchor} (%)", ylabel=f"MAE in {lesion} against {anchor} (%)")
        axes.grid(axis="x")
        axes.margins(0.12)

    alt = f"Change of MAE in {lesion} and in healthy tissue against {anchor}. " + " ".join(
        f"{arm}: {sick.mean():+.1f} % in {lesion}, {healthy.mean():+.1f} % in healthy tissue."
        for arm, (healthy, sick) in points.items()
    )
    return {
        "title": f"Lesion against healthy: every arm beside {anchor}",
        "svg": draw_svg(draw, alt, (7, 4.6), "plane"),
    }


def draw_forest(comparisons: Sequence[Comparison], regions: Sequence[str], metric: str = "mae") -> str | None:
    """Draw paired differences with their intervals, a line for each pair and a column for each region.

    Args:
        comparisons: Of which those of `metric` in `regions` are drawn.
        regions: Columns, left to right.
        metric: Which figure.

    Returns:
        SVG, or None where there is nothing to draw.
    """
    here = [one for one in comparisons if one.metric == metric and one.region in regions]
    pairs = list(dict.fromkeys((one.arm, one.against) for one in here))
    shown = [region for region in regions if any(one.region == region for one in here)]
    if not pairs:
        return None

    def draw(axes: Any) -> None:
        for panel, region in zip(np.atleast_1d(axes), shown):
            panel.axvline(0, color=MUTED, linewidth=0.8)
            for one in (one for one in here if one.region == region):
                y, scale = pairs.index((one.arm, one.against)), 100 / abs(one.mean_against)
                colour = SERIES[1] if one.primary else SERIES[0]
                if math.isfinite(one.low):
                    panel.plot([one.low * scale, one.high * scale], [y, y], color=colour, linewidth=1.8)
                filled = colour if one.p_holm < 0.05 else "none"
                panel.plot(
                    one.relative, y, "D" if one.primary else "o", color=colour, markerfacecolor=filled, markersize=5.5
                )
            panel.set_title(f"{show_metric(metric)} in {region} (%)", loc="left", color=INK, fontsize=9)
            panel.set_yticks(range(len(pairs)), [f"{arm} against {against}" for arm, against in pairs])
            panel.set_ylim(len(pairs) - 0.4, -0.6)
            panel.grid(axis="x")
            panel.grid(visible=False, axis="y")

    alt = f"Paired differences of {show_metric(metric)} with 95 % intervals. " + " ".join(
        one.verdict + "." for one in here if one.primary
    )
    size = (1.6 + 2.7 * len(shown), 0.9 + 0.26 * len(pairs))
    return draw_svg(draw, alt, size, "forest", columns=len(shown))


def _summary_table(summaries: Sequence[Summary], arms: Collection[str]) -> Table | None:
    """Metric x region, a column for each method: mean, and SD over seeds."""
    if not summaries:
        return None
    there = dict.fromkeys(one.method for one in summaries)
    methods = [*(name for name in arms if name in there), *(name for name in there if name not in arms)]
    found = {(one.region, one.metric, one.method): one for one in summaries}
    columns = [("Region", "", False), ("Metric", "", False), ("n", "subjects", True)]
    columns += [(name, "" if name in arms else "naive", True) for name in methods]
    table = []
    for region, metric in dict.fromkeys((one.region, one.metric) for one in summaries):
        here = {name: found[region, metric, name] for name in methods if (region, metric, name) in found}
        means = {name: one.mean for name, one in here.items()}
        direction = METRICS.get(metric, (metric, "neither"))[1]
        pick = {"lower": min, "higher": max}.get(direction)
        best = pick(means.values()) if pick else math.nan
        like = max(map(abs, means.values()))
        arrow = {"lower": " ↓", "higher": " ↑"}.get(direction, "")
        first = next(iter(here.values()))
        cells = [Cell(region, region), Cell(f"{show_metric(metric)}{arrow}", metric, spread=show_unit(first.unit))]
        cells.append(Cell(str(first.subjects), first.subjects))
        for name in methods:
            one = here.get(name)
            if one is None:
                cells.append(NO_FIGURE)
                continue
            known = name in arms and math.isfinite(one.sd_seeds)  # what is naive has no seed
            spread = f"±{HARD_SPACE}{show_figure(one.sd_seeds, like)}" if known else ""
            cells.append(Cell(show_figure(one.mean, like), one.mean, one.mean == best, spread))
        table.append(cells)
    return Table(columns, table)


def _comparison_table(comparisons: Sequence[Comparison]) -> Table | None:
    if not comparisons:
        return None
    heads = ("Difference", "Low", "High", "p", "p, Holm", "p, Wilcoxon", "p, mixed model", "Effect", "n", "Shown by n")
    notes = (
        "%",
        "%, 95 %",
        "%, 95 %",
        "permutation",
        "corrected",
        "signed rank",
        "random seeds",
        "SDs",
        "subjects",
        "%",
    )
    columns = [("Arm", "", False), ("Against", "", False), ("Region", "", False), ("Metric", "", False)]
    columns += [("", "", False), *((head, note, True) for head, note in zip(heads, notes))]
    columns.append(("Seeds lower", "", True))
    table = []
    for one in comparisons:
        scale = 100 / abs(one.mean_against) if one.mean_against else math.nan
        shares = [one.relative, one.low * scale, one.high * scale]
        ps = {"p": one.p_permutation, "corrected": one.p_holm, "wilcoxon": one.p_wilcoxon, "mixed": one.p_mixed}
        table.append(
            [
                *(Cell(name, name) for name in (one.arm, one.against, one.region)),
                Cell(show_metric(one.metric), one.metric),
                Cell("primary" if one.primary else "exploratory", one.primary, one.primary),
                *(number_cell(share, 1.0) if math.isfinite(share) else NO_FIGURE for share in shares),
                *(_p_cell(p, bold=name == "corrected" and p < 0.05) for name, p in ps.items()),
                number_cell(one.effect, 1.0),
                Cell(str(one.subjects), one.subjects),
                number_cell(one.detectable, 1.0),
                Cell(f"{one.seeds_lower} of {one.seeds}", one.seeds_lower),
            ]
        )
    return Table(columns, table)


def _p_cell(p: float, *, bold: bool) -> Cell:
    return Cell(f"{p:.2g}", p, bold) if math.isfinite(p) else NO_FIGURE


def _reliability_table(rows: Sequence[Row], arms: Sequence[str]) -> Table | None:
    """How well each arm's map knows its own error, means over cases, folds and seeds."""
    wanted = [row for row in rows if row.method in arms and row.metric in RELIABILITY and math.isfinite(row.value)]
    if not wanted:
        return None
    names = list(dict.fromkeys((row.region, row.metric) for row in wanted))
    arms = [arm for arm in arms if any(row.method == arm for row in wanted)]
    columns = [("Region", "", False), ("Figure", "", False), *((arm, "", True) for arm in arms)]
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in wanted:
        values.setdefault((row.region, row.metric, row.method), []).append(row.value)
    table = []
    for region, metric in names:
        means = [values.get((region, metric, arm)) for arm in arms]
        cells = [NO_FIGURE if found is None else number_cell(float(np.mean(found)), 1.0) for found in means]
        table.append([Cell(region, region), Cell(metric.replace("_", " "), metric), *cells])
    return Table(columns, table)


def rival_table(rows: Sequence[Row]) -> Table | None:
    """The shipped map beside what else is used as a measure of doubt: a line for each, a column for each figure."""
    cases = [row for row in rows if row.case != POOLED and math.isfinite(row.value)]
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in cases:
        values.setdefault((row.method, row.region, row.metric), []).append(row.value)
    figures = [(region, metric) for region, metric in dict.fromkeys((row.region, row.metric) for row in cases)]
    figures = [(region, metric) for region, metric in figures if metric in RIVALS]
    if not figures:
        return None
    columns = [("Map", "", False)]
    columns += [(metric.replace("_", " "), "" if region == "mask" else region, True) for region, metric in figures]
    table = []
    for name in dict.fromkeys(row.method for row in cases):
        means = [values.get((name, *figure)) for figure in figures]
        cells = [NO_FIGURE if found is None else number_cell(float(np.mean(found))) for found in means]
        table.append([Cell(name, name), *cells])
    return Table(columns, table)


def draw_rivals(rows: Sequence[Row]) -> dict[str, str] | None:
    """Draw observed over expected error by tenths of each map, and the risk left as doubtful voxels are dropped.

    Args:
        rows: Of `judge_maps`.

    Returns:
        SVG of both, by name, or None without such rows.
    """
    pooled: dict[str, dict[str, dict[str, list[float]]]] = {}  # map, decile, figure: one value a fold
    for row in rows:
        if row.case == POOLED and row.region.startswith("mask decile"):
            point = pooled.setdefault(row.method, {}).setdefault(row.region, {})
            point.setdefault(row.metric, []).append(row.value)
    risks: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.case != POOLED and row.metric.startswith("risk_") and row.region == "mask":
            risks.setdefault(row.method, {}).setdefault(int(row.metric.removeprefix("risk_")), []).append(row.value)
    if not pooled or not risks:
        return None

    def curve(axes: Any) -> None:
        for (name, points), colour, dash in zip(pooled.items(), SERIES, DASHES):
            xy = np.array(
                [[np.mean(p[name]) for name in ("expected_error", "observed_error")] for p in points.values()]
            )
            axes.plot(*xy.T, color=colour, linestyle=dash, linewidth=1.4, marker="o", markersize=3.5, label=name)
        most = float(axes.get_xlim()[1])
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8)
        axes.set(xlabel="expected error", ylabel="observed error")
        axes.legend(loc="upper left", labelcolor=INK)

    def left(axes: Any) -> None:
        for (name, points), colour, dash in zip(risks.items(), SERIES, DASHES):
            xs = sorted(points)
            ys = [float(np.mean(points[x])) for x in xs]
            axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=3.5, label=name)
        axes.invert_xaxis()
        axes.set(xlabel="voxels kept (%)", ylabel="mean error of the kept")
        axes.legend(loc="lower left", labelcolor=INK)

    told = " ".join(f"{name}: {np.mean(points[min(points)]):.3g} at {min(points)} %." for name, points in risks.items())
    return {
        "curve": draw_svg(curve, "Observed against expected error by tenths of each map.", (4.6, 3.6), "rival curve"),
        "risk": draw_svg(left, f"Mean error of the voxels kept. {told}", (4.6, 3.6), "rival risk"),
    }
