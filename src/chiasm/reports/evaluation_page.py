"""One self-contained page: what was asked, what was found, and the pictures to judge it by.

The page needs no network, no server and no other file.  It says in words how
the method stands against the best naive baseline, worse as plainly as better,
and names what is missing.  The same input gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chiasm.evaluation.rows import LEAST_LESION, Row
from chiasm.evaluation.summary import paired, summarise
from chiasm.reports.curves import describe_health, draw_curves, logged_warnings
from chiasm.reports.drawing import (
    HARD_SPACE,
    INK,
    METRICS,
    MUTED,
    SERIES,
    Cell,
    Remark,
    Table,
    Tone,
    draw_svg,
    number_cell,
    render_page,
    shorten,
    show_figure,
    show_metric,
    show_unit,
    typical,
)
from chiasm.reports.gallery import GalleryCase, draw_reliability, show_gallery
from chiasm.storage import write_text

FEW_CASES = 10  # up to this many, the page says that they are few
LESION = re.compile(r"lesion-\d+")  # regions that are one lesion of one case
SIZES_ML = ((1.0, "below 1 mL"), (10.0, "1 to 10 mL"), (math.inf, "10 mL and more"))
UNKNOWN_SIZE = "of unknown size"


def write_report(
    path: Path,
    *,
    title: str,
    rows: Sequence[Row],
    history: Sequence[Mapping[str, Any]] = (),
    gallery: Sequence[GalleryCase] = (),
    facts: Mapping[str, Mapping[str, str]] | None = None,
    warnings: Sequence[str] = (),
    asked: str = "",
    method: str | None = None,
    naive: Collection[str] | None = None,
    headline: str = "mae",
    pages: Mapping[str, str] | None = None,
) -> Path:
    """Write the report as one HTML file that needs nothing else.

    What is absent (history, references, reliability, lesions) is said on the
    page, not left out in silence.  No time of day is written: put one among
    the `facts` if it matters.

    Args:
        path: Where the page will stand, such as `RUN/report.html`.
        title: The page's heading.
        rows: From the evaluation; regions called "lesion-1", "lesion-2", ...
            are single lesions and have a table of their own.
        history: The lines of `log.jsonl`, parsed.
        gallery: Cases to show, best with the best, the median and the worst.
        facts: Sections of the data sheet: heading -> name -> value.
        warnings: Sentences that a reader must see before any figure.
        asked: What was asked, as one sentence.
        method: The method under judgement, as it is called in `rows`; by
            default that of the first row.
        naive: The methods in `rows` that anybody could have used instead; by
            default all others.
        headline: The metric that the words are about.
        pages: Case id -> address of its own page, relative to `path`.

    Returns:
        `path`.

    Raises:
        ValueError: If `rows` hold figures, but none of `method`; or the
            gallery's units differ.
        ChiasmError: If the file cannot be written.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    method = methods[0] if method is None and methods else method or ""
    naive = [name for name in methods if name != method] if naive is None else naive
    if rows and method not in methods:
        raise ValueError(f"no row is of the method {method!r} under judgement; there are {methods}")
    if len({case.unit for case in gallery}) > 1:
        raise ValueError("the gallery's cases must share one unit: they share one colour range")
    whole = [row for row in rows if not LESION.fullmatch(row.region)]
    comparisons = compare(whole, method=method, naive=naive, metric=headline)
    ranking = rank(whole, method=method, metric=headline)
    content = {
        "kind": "report",
        "title": title,
        "asked": asked,
        "method": method,
        "verdict": _verdict(comparisons, show_metric(headline)),
        "findings": [_sentence(comparison) for comparison in comparisons],
        "caution": _caution(comparisons),
        "warnings": list(dict.fromkeys([*warnings, *logged_warnings(history)])),
        "cases_figure": _cases_figure(whole, method, naive, headline),
        "summary": _summary_table(whole, method, naive),
        "per_case": _case_table(whole, method, comparisons, headline),
        "least_lesion": LEAST_LESION,
        "per_lesion": tabulate_lesions([row for row in rows if LESION.fullmatch(row.region)], method),
        "ranking": ranking,
        "curves": draw_curves(history),
        "health": describe_health(history),
        "gallery": show_gallery(gallery, ranking),
        "reliability": draw_reliability(gallery),
        "pages": list((pages or {}).items()),
        "facts": facts or {},
        "conventions": list_conventions(rows),
    }
    write_text(path, render_page("report.html", content))
    return path


# What was found, in words


class Comparison(NamedTuple):
    """The method against the best naive baseline, case by case, in one region.

    Attributes:
        region: Where.
        metric: Label of the figure compared, such as "MAE".
        baseline: The naive method with the best mean here.
        ours: Mean of the method over the cases that both have.
        theirs: Mean of the baseline over the same cases.
        unit: Of both.
        cases: How many cases both have.
        wins: In how many of them the method is better.
        better: Whether the method's mean is better.
        pairs: Case -> (the method's figure, the baseline's), means over folds and seeds.
    """

    region: str
    metric: str
    baseline: str
    ours: float
    theirs: float
    unit: str
    cases: int
    wins: int
    better: bool
    pairs: Mapping[str, tuple[float, float]]


def compare(rows: Sequence[Row], *, method: str, naive: Collection[str], metric: str = "mae") -> list[Comparison]:
    """Set a method beside the best naive baseline of each region, over the cases that both have.

    Args:
        rows: Figures of every method.
        method: The method under judgement.
        naive: Names of the naive baselines.
        metric: Which figure is compared; its direction is known, or lower is better.

    Returns:
        One comparison for each region, in the order of `rows`; none for a
        region where the method or every baseline has no finite figure.
    """
    label, direction = METRICS.get(metric, (metric, "lower"))
    sign = -1.0 if direction == "higher" else 1.0
    found = []
    for region in dict.fromkeys(row.region for row in rows):
        here = [row for row in rows if row.region == region and row.metric == metric and math.isfinite(row.value)]
        ours = _by_case(row for row in here if row.method == method)
        candidates = []
        for name in dict.fromkeys(row.method for row in here if row.method in naive):
            theirs = _by_case(row for row in here if row.method == name)
            pairs = {case: (ours[case], theirs[case]) for case in ours if case in theirs}
            if pairs:
                candidates.append((sign * float(np.mean([pair[1] for pair in pairs.values()])), name, pairs))
        if not candidates:
            continue
        _, name, pairs = min(candidates, key=lambda candidate: candidate[0])
        mine, other = (float(mean) for mean in np.mean(list(pairs.values()), axis=0))
        wins = sum(sign * a < sign * b for a, b in pairs.values())
        better = sign * mine < sign * other
        found.append(Comparison(region, label, name, mine, other, here[0].unit, len(pairs), wins, better, pairs))
    return found


def rank(rows: Sequence[Row], *, method: str, metric: str = "mae") -> dict[str, str] | None:
    """Name the best, the median and the worst case of a method in the first region of `rows`.

    Returns:
        "region", "metric", "best", "median", "worst" and the number of cases
        "n", for printing; None when there are no such figures.
    """
    mine = [row for row in rows if row.method == method and row.metric == metric and math.isfinite(row.value)]
    if not mine:
        return None
    figures = _by_case(row for row in mine if row.region == mine[0].region)
    label, direction = METRICS.get(metric, (metric, "lower"))
    ordered = sorted(figures, key=lambda case: (figures[case], case), reverse=direction == "higher")
    chosen = {"best": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[-1]}
    return {"region": mine[0].region, "metric": label, "n": str(len(ordered)), **chosen}


def _by_case(rows: Iterable[Row]) -> dict[str, float]:
    """Average over folds and seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.case, []).append(row.value)
    return {case: float(np.mean(found)) for case, found in values.items()}


def _verdict(comparisons: Sequence[Comparison], metric: str) -> str:
    if not comparisons:
        return "Nothing can be said: there is no figure of the method beside one of a naive baseline."
    ahead = [comparison.region for comparison in comparisons if comparison.better]
    behind = [comparison.region for comparison in comparisons if not comparison.better]
    if not behind:
        return f"Better than every naive baseline on average, by {metric}, in {_listed(ahead)}."
    if not ahead:
        return f"Not better than the best naive baseline, by {metric}, in any region: {_listed(behind)}."
    return f"By {metric}, better than every naive baseline on average in {_listed(ahead)}, not in {_listed(behind)}."


def _sentence(comparison: Comparison) -> Remark:
    """Put a comparison into words."""
    c = comparison
    largest = max(abs(c.ours), abs(c.theirs))
    ours, theirs = show_figure(c.ours, like=largest), show_figure(c.theirs, like=largest)
    unit = f"{HARD_SPACE}{c.unit}" if show_unit(c.unit) else ""
    change = c.ours - c.theirs
    size = f"{100 * abs(change / c.theirs):.1f}{HARD_SPACE}%" if c.theirs else f"{show_figure(abs(change))}{unit}"
    direction = "the same" if change == 0 else f"{size} {'higher' if change > 0 else 'lower'}"
    word = "better" if c.better else ("no better" if change == 0 else "worse")
    cases = "in the only case" if c.cases == 1 else f"better in {c.wins} of {c.cases} cases"
    majority = c.wins * 2 > c.cases
    tone: Tone = "good" if c.better and majority else ("mixed" if c.better or majority else "bad")
    against = f"{c.metric} {ours} against {theirs}{unit} for {c.baseline}, the best naive baseline"
    return Remark(tone, f"{against}: {direction} on average, {cases}.", word, c.region)


def _caution(comparisons: Sequence[Comparison]) -> str:
    """Say what these figures are not."""
    fewest = min((comparison.cases for comparison in comparisons), default=0)
    few = f" With only {fewest} case{'s' * (fewest != 1)} a chance result is likely." if 0 < fewest <= FEW_CASES else ""
    return f"These are descriptions of the cases at hand, not tests of a hypothesis.{few}" if comparisons else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Tables


def _summary_table(rows: Sequence[Row], method: str, naive: Collection[str]) -> Table | None:
    """Metric x region, the method first and the naive baselines last; the best mean of a row is strong.

    Means are of the cases that all methods have.
    """
    rows = paired(rows)
    found = {(s.region, s.metric, s.method): s for s in summarise(rows)}
    if not found:
        return None
    methods = sorted(dict.fromkeys(row.method for row in rows), key=lambda name: (name != method, name in naive))
    columns = [("Region", "", False), ("Metric", "", False), ("n", "cases", True)]
    notes = dict.fromkeys(naive, "naive") | {method: "under judgement"}
    columns += [(name, notes.get(name, ""), True) for name in methods]
    table = []
    for region, metric in dict.fromkeys((row.region, row.metric) for row in rows):
        here = {name: found.get((region, metric, name)) for name in methods}
        label, direction = METRICS.get(metric, (metric, "neither"))
        unit = next(row.unit for row in rows if (row.region, row.metric) == (region, metric))
        means = {name: s.mean for name, s in here.items() if s is not None and math.isfinite(s.mean)}
        pick = {"lower": min, "higher": max}.get(direction)
        best = pick(means.values()) if pick and means else math.nan
        arrow = {"lower": " ↓", "higher": " ↑"}.get(direction, "")
        n = max((s.n for s in here.values() if s is not None), default=0)
        cells = [Cell(region, region), Cell(f"{label}{arrow}", label, spread=show_unit(unit)), Cell(str(n), n)]
        like = max(map(abs, means.values()), default=1.0)
        for name in methods:
            s = here[name]
            if s is None or not math.isfinite(s.mean):
                cells.append(Cell("–", math.inf))
            else:
                spread = f"±{HARD_SPACE}{show_figure(s.sd, like)}" if math.isfinite(s.sd) else ""
                cells.append(Cell(show_figure(s.mean, like), s.mean, s.mean == best, spread))
        table.append(cells)
    return Table(columns, table)


def _case_table(rows: Sequence[Row], method: str, comparisons: Sequence[Comparison], headline: str) -> Table | None:
    """Every case of the method, and in the last column the best naive baseline's headline figure."""
    mine = [row for row in rows if row.method == method]
    if not mine:
        return None
    metrics = list(dict.fromkeys(row.metric for row in mine))
    values = {(row.case, row.region, row.fold, row.seed, row.metric): row.value for row in mine}
    likes = {metric: typical(row.value for row in mine if row.metric == metric) for metric in metrics}
    naive = {c.region: c.pairs for c in comparisons}
    varied = [len({row.fold for row in mine}) > 1, len({row.seed for row in mine}) > 1]
    columns = [("Case", "", False), ("Region", "", False)]
    columns += [(label, "", True) for label, varies in zip(("Fold", "Seed"), varied) if varies]
    columns += _metric_columns(mine, metrics)
    if naive:
        columns.append((f"{show_metric(headline)}, naive", "best baseline of the region", True))
    table = []
    for case, region, fold, seed in dict.fromkeys((row.case, row.region, row.fold, row.seed) for row in mine):
        cells = [Cell(case, case), Cell(region, region)]
        cells += [Cell(str(number), number) for number, varies in zip((fold, seed), varied) if varies]
        found = {metric: values.get((case, region, fold, seed, metric), math.nan) for metric in metrics}
        cells += [number_cell(value, likes[metric]) for metric, value in found.items()]
        if naive:
            pair = naive.get(region, {}).get(case, (math.nan, math.nan))
            cells.append(number_cell(pair[1], likes.get(headline)))
        table.append(cells)
    return Table(columns, table)


def tabulate_lesions(rows: Sequence[Row], method: str) -> list[tuple[str, Table]]:
    """Single lesions of the method, grouped by size, the smallest first; one group where sizes are unknown."""
    mine = [row for row in rows if row.method == method]
    metrics = [metric for metric in dict.fromkeys(row.metric for row in mine) if metric != "volume_ml"]
    likes = {metric: typical(row.value for row in mine if row.metric == metric) for metric in metrics}
    lesions: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in mine:
        lesions.setdefault((row.case, row.region), {}).setdefault(row.metric, []).append(row.value)
    groups: dict[str, list[list[Cell]]] = {label: [] for label in (*(label for _, label in SIZES_ML), UNKNOWN_SIZE)}
    for (case, region), found in sorted(lesions.items(), key=lambda item: item[1].get("volume_ml", [math.inf])[0]):
        volume = found.get("volume_ml", [math.nan])[0]
        group = next((label for most, label in SIZES_ML if volume < most), UNKNOWN_SIZE)
        figures = [number_cell(float(np.mean(found.get(metric, math.nan))), likes[metric]) for metric in metrics]
        groups[group].append([Cell(case, case), Cell(region, region), number_cell(volume), *figures])
    columns = [("Case", "", False), ("Lesion", "", False), ("Volume", "mL", True), *_metric_columns(mine, metrics)]
    return [(label, Table(columns, cells)) for label, cells in groups.items() if cells]


def list_conventions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every convention in use, with the metrics it governs."""
    used: dict[str, dict[str, None]] = {}
    for row in rows:
        used.setdefault(str(row.convention), {})[show_metric(row.metric)] = None
    return [(convention, ", ".join(metrics)) for convention, metrics in used.items()]


def _metric_columns(rows: Sequence[Row], metrics: Sequence[str]) -> list[tuple[str, str, bool]]:
    units = {row.metric: row.unit for row in rows}
    return [(show_metric(metric), show_unit(units[metric]), True) for metric in metrics]


# The figure of all cases


def _cases_figure(rows: Sequence[Row], method: str, naive: Collection[str], metric: str) -> dict[str, str] | None:
    """Draw every case as a dot and every mean as a bar: one line for each region and method."""
    here = [row for row in rows if row.metric == metric and math.isfinite(row.value)]
    methods = sorted(dict.fromkeys(row.method for row in here), key=lambda name: (name != method, name in naive))
    lines: list[tuple[str, str, list[float]]] = []
    for region in dict.fromkeys(row.region for row in here):
        for name in methods:
            figures = _by_case(row for row in here if row.region == region and row.method == name)
            if figures:
                lines.append((region, name, list(figures.values())))
    if not lines:
        return None
    label = show_metric(metric)
    places, place, last = [], 0.0, lines[0][0]
    for region, _, _ in lines:
        place += 0.7 * (region != last)
        places.append(place)
        place, last = place + 1, region

    def draw(axes: Any) -> None:
        for y, (_, name, values) in zip(places, lines):
            colour = SERIES[0] if name == method else MUTED
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
            axes.plot([np.mean(values)] * 2, [y - 0.34, y + 0.34], color=colour, linewidth=2.2)
        axes.set_yticks(places, [f"{shorten(region)} · {shorten(name)}" for region, name, _ in lines])
        for tick, (_, name, _) in zip(axes.get_yticklabels(), lines):
            tick.set_color(INK if name == method else MUTED)
        axes.set_ylim(places[-1] + 0.7, -0.7)
        axes.set_xlim(left=0 if min(min(values) for *_, values in lines) >= 0 else None)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{label} ({here[0].unit})" if show_unit(here[0].unit) else label)

    alt = f"{label} of every case. " + " ".join(
        f"{region}, {name}: mean {show_figure(float(np.mean(values)))}, "
        f"{show_figure(min(values))} to {show_figure(max(values))}."
        for region, name, values in lines
    )
    return {"metric": label, "svg": draw_svg(draw, alt, (9.6, 0.75 + 0.25 * (places[-1] + 1)), "every case")}
