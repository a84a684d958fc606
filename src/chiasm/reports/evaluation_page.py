"""The report of an evaluation as one page: settings, results and pictures.

The page needs no network, no server and no other file.  It compares the method with the best naive baseline in words,
with the rule of `chiasm.evaluation.claims`, and names what is missing.  The same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.rows import LEAST_LESION, LESION, Row
from chiasm.evaluation.summary import paired, summarise
from chiasm.methods import title_of
from chiasm.reports.curves import describe_health, draw_curves, logged_warnings
from chiasm.reports.drawing import (
    INK,
    MUTED,
    SERIES,
    draw_svg,
    label_with,
    shorten,
    show_number,
    show_unit,
)
from chiasm.reports.error_plot import draw_expected_error
from chiasm.reports.explanation import Part
from chiasm.reports.gallery import CutCase, show_gallery
from chiasm.reports.naive_comparison import caution, compare_with_baselines, describe_comparison, rank, verdict
from chiasm.reports.pages import PageSection, render_page
from chiasm.reports.tables import (
    Column,
    MethodMean,
    PageTable,
    list_conventions,
    mean_table,
    tabulate_cases,
    tabulate_lesions,
    tabulate_means,
)
from chiasm.storage import write_text


@dataclass(frozen=True, eq=False)
class EvaluationPage:
    """What a page shows.  What is absent (history, references, expected error, lesions) is said there, not left out.

    No time of day is shown: put one among the `facts` if it matters.

    Attributes:
        title: The page's heading.
        rows: From the evaluation; regions called "lesion-1", "lesion-2", ...
            are single lesions and have a table of their own.
        method: The method under assessment, as it is called in `rows`.
        naive: The methods in `rows` that anybody could have used instead.
        history: The lines of `log.jsonl`, parsed.
        gallery: Cases to show, best with the best, the median and the worst.
        facts: Sections of the data sheet: heading -> name -> value.
        warnings: Sentences that a reader must see before any score.
        asked: What was asked, as one sentence.
        headline: The metric that the words are about.
        pages: Case id -> address of its own page, relative to the page's.
        explained: What `chiasm explain` says of the same results; its first part opens the page.
        subjects: Case id -> subject, where it is not the case's id.

    Raises:
        ValueError: If `rows` hold scores, but none of `method`; or the
            gallery's units differ.
    """

    title: str
    rows: Sequence[Row]
    method: str
    naive: Collection[str]
    history: Sequence[Mapping[str, Any]] = ()
    gallery: Sequence[CutCase] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    asked: str = ""
    headline: str = "mae"
    pages: Mapping[str, str] = field(default_factory=dict)
    explained: Sequence[Part] = ()
    subjects: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods = list(dict.fromkeys(row.method for row in self.rows))
        if methods and self.method not in methods:
            raise ValueError(f"no row is of the method {self.method!r} under assessment; there are {methods}")
        if len({case.unit for case in self.gallery}) > 1:
            raise ValueError("the gallery's cases must share one unit: they share one colour range")

    @property
    def whole(self) -> list[Row]:
        """The scores that are not of single lesions."""
        return [row for row in self.rows if not LESION.fullmatch(row.region)]


def write_report(path: Path, page: EvaluationPage) -> Path:
    """Write the report as one HTML file that needs nothing else.

    Args:
        path: Where the page will stand, such as `RUN/report.html`.
        page: What it shows.

    Returns:
        `path`.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    shown = {"title": page.title, "asked": page.asked, "explained": page.explained}
    content = {"kind": "report", **shown, "sections": list_sections(page)}
    write_text(path, render_page("report.html", content))
    return path


def list_sections(page: EvaluationPage) -> list[PageSection]:
    """List what stands on a page, from top to bottom."""
    comparisons = compare_with_baselines(
        page.whole, method=page.method, naive=page.naive, metric=page.headline, subjects=page.subjects
    )
    ranking = rank(page.whole, method=page.method, metric=page.headline)
    found = {
        "verdict": verdict(comparisons, find_metric(page.headline).label),
        "findings": [describe_comparison(comparison) for comparison in comparisons],
        "caution": caution(comparisons),
        "ranking": ranking,
        "warnings": list(dict.fromkeys([*page.warnings, *logged_warnings(page.history)])),
        "cases_plot": _draw_cases(page),
    }
    baselines = {one.region: {case: pair[1] for case, pair in one.pairs.items()} for one in comparisons}
    cases = tabulate_cases(page.whole, page.method, page.headline, baselines)
    lesions = {"least": LEAST_LESION, "tables": tabulate_lesions(page.rows, page.method)}
    training = {"curves": draw_curves(page.history), "health": describe_health(page.history)}
    return [
        PageSection("gallery", "Pictures", "Pictures of cases", show_gallery(page.gallery, ranking)),
        PageSection("found", "Found", "What was found", found),
        PageSection("scores", "Scores", "Scores by region", _tabulate_methods(page), NO_SCORES),
        PageSection("cases", "Cases", "Case by case", cases, "There are no scores of single cases."),
        PageSection("pages", "Pages", "Cases to walk through", page.pages, "No pages of single cases were made."),
        PageSection("lesions", "Lesions", "Lesion by lesion", lesions),
        PageSection(
            "expected_error",
            "Expected error",
            "Does the expected-error map agree with the true error?",
            draw_expected_error(page.gallery),
            "No case has both an expected-error map and a real image, so the map cannot be checked.",
        ),
        PageSection("training", "Training", "How the training went", training),
        PageSection("sheet", "Data sheet", "Data sheet", page.facts, NO_FACTS),
        PageSection(
            "conventions",
            "Conventions",
            "Conventions of the scores",
            list_conventions(page.rows),
            "There are no scores.",
        ),
    ]


NO_SCORES = "Nothing was evaluated: there are no scores."
NO_FACTS = "Nothing is known about the cohort, the recipe or the machine."


def _order_methods(page: EvaluationPage, rows: Sequence[Row]) -> list[str]:
    """Put the method under assessment first and the naive baselines last."""
    return sorted(dict.fromkeys(row.method for row in rows), key=lambda name: (name != page.method, name in page.naive))


def _tabulate_methods(page: EvaluationPage) -> PageTable | None:
    """Set the method beside the naive baselines: means over cases that all methods have, and their SD."""
    rows = paired(page.whole)
    means = [MethodMean(s.region, s.metric, s.method, s.unit, s.mean, s.sd, s.n) for s in summarise(rows)]
    notes = dict.fromkeys(page.naive, "naive") | {page.method: "under assessment"}
    methods = [Column(name, notes.get(name, ""), True) for name in _order_methods(page, rows)]
    caption = f"Metrics by region, {title_of(page.method)} beside the naive baselines"
    return tabulate_means(caption, means, methods, "cases")


# The plot of all cases


class Line(NamedTuple):
    """A line of the plot: the scores of all cases of a method in a region."""

    region: str
    method: str
    scores: list[float]

    @property
    def words(self) -> str:
        """The line's content as text, for screen readers."""
        ends = f"{show_number(min(self.scores))} to {show_number(max(self.scores))}"
        return f"{self.region}, {self.method}: mean {show_number(float(np.mean(self.scores)))}, {ends}."


def _draw_cases(page: EvaluationPage) -> dict[str, str] | None:
    """Draw every case as a dot and every mean as a bar: one line for each region and method."""
    here = [row for row in page.whole if row.metric == page.headline and math.isfinite(row.value)]
    lines = _lines(here, _order_methods(page, here))
    if not lines:
        return None
    label, unit = find_metric(page.headline).label, show_unit(here[0].unit)
    heights = _heights(lines)

    def draw(axes: Any) -> None:
        for y, line in zip(heights, lines):
            _draw_line(axes, y, line, SERIES[0] if line.method == page.method else MUTED)
        _name_lines(axes, heights, lines, page.method)
        axes.set_ylim(heights[-1] + 0.7, -0.7)
        axes.set_xlim(left=0 if min(min(line.scores) for line in lines) >= 0 else None)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label_with(label, unit))

    alt = f"{label} of every case. {' '.join(line.words for line in lines)}"
    return {"metric": label, "svg": draw_svg(draw, alt, (9.6, 0.75 + 0.25 * (heights[-1] + 1)), "every case")}


def _draw_line(axes: Any, y: float, line: Line, colour: str) -> None:
    """Draw the cases of a line as dots, and their mean as a bar."""
    heights = [y] * len(line.scores)
    axes.plot(line.scores, heights, "o", color=colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
    axes.plot([np.mean(line.scores)] * 2, [y - 0.34, y + 0.34], color=colour, linewidth=2.2)


def _name_lines(axes: Any, heights: Sequence[float], lines: Sequence[Line], method: str) -> None:
    """Name the lines on the vertical axis, those of the method under assessment in ink."""
    axes.set_yticks(heights, [f"{shorten(line.region)} · {shorten(line.method)}" for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines):
        tick.set_color(INK if line.method == method else MUTED)


def _heights(lines: Sequence[Line]) -> list[float]:
    """Return where lines stand, from above: those of a region together."""
    gaps = (0.7 if one.region != other.region else 0.0 for one, other in pairwise(lines))
    return list(accumulate(gaps, lambda y, gap: y + 1 + gap, initial=0.0))


def _lines(rows: Sequence[Row], methods: Sequence[str]) -> list[Line]:
    """Collect the lines of the plot, region by region; scores are means over folds and seeds."""
    means = mean_table(rows, lambda row: (row.region, row.method), lambda row: row.case)
    pairs = product(dict.fromkeys(region for region, _ in means), methods)
    return [Line(*pair, list(means[pair].values())) for pair in pairs if pair in means]
