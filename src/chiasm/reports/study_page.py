"""A study's page: what was asked, what may be claimed, and everything else that was looked at, marked as such.

It is made from a study's files alone.  Declared comparisons come first and in
words; the rest is called exploratory.  A null result has the same place and
size as a win.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from chiasm.evaluation.claims import RULE
from chiasm.evaluation.expected_error import POOLED
from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.rows import LEAST_LESION, Row
from chiasm.evaluation.statistics import Comparison, MethodSummary, stays_within
from chiasm.methods import METHODS, title_of
from chiasm.reports.curves import describe_health, draw_curves
from chiasm.reports.pages import TONE_OF, PageSection, Remark, render_page
from chiasm.reports.study_cases import CasePanes
from chiasm.reports.study_plots import HEALTHY, draw_forest, draw_maps, draw_trade_off
from chiasm.reports.tables import (
    NO_NUMBER,
    Cell,
    Column,
    MethodMean,
    PageTable,
    cell,
    list_conventions,
    mean_cells,
    mean_table,
    number_cell,
    tabulate_lesions,
    tabulate_means,
)
from chiasm.storage import write_text

MARGIN = 1.0  # percent by which healthy tissue may be worse for a gain in lesions to count
MAP_SCORES = ("spearman", "spearman_smoothed", "auroc_worst", "auroc_lesion", "ause", "calibration")
MAP_COLUMNS = (
    *("spearman", "auroc_worst", "auroc_lesion", "ause", "calibration", "calibration_gap"),
    *("passes", "trainings", "seconds"),
)


@dataclass(frozen=True)
class Findings:
    """What a study found, as its files hold it.

    Attributes:
        title: Of the page.
        rows: Every score.
        comparisons: The declared ones first.
        summaries: Of every method, region and metric.
        regions: Lesion regions in order; may be empty.
        arms: What each arm is, in words, by name; other methods are naive.
        history: `log.jsonl` of one training of the arm under assessment.
        history_name: Which training that is.
        baseline_maps: Scores of the expected-error map beside other maps, or none.
        facts: Data sheet: heading -> name -> value.
        warnings: What must be read first.
        paragraph: Of a paper's methods section, to paste.
        cases: Case id -> its page, relative to the report.
        panes: Pictures of some cases side by side, or None.
        own_units: Metrics whose unit differs between arms, because they learn from different subjects.
    """

    title: str
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    summaries: Sequence[MethodSummary]
    regions: Sequence[str]
    arms: Mapping[str, str]
    history: Sequence[Mapping[str, Any]]
    history_name: str
    baseline_maps: Sequence[Row]
    facts: Mapping[str, Mapping[str, str]]
    warnings: Sequence[str]
    paragraph: str
    cases: Mapping[str, str]
    panes: CasePanes | None = None
    own_units: Collection[str] = ()

    @property
    def declared(self) -> list[Comparison]:
        """The comparisons that were declared before the study ran."""
        return [one for one in self.comparisons if one.primary]

    @property
    def lesion(self) -> str:
        """The region that the study is about: of the first declared comparison, else the first lesion region."""
        return next((one.region for one in self.declared), next(iter(self.regions), "mask"))

    @property
    def assessed(self) -> str:
        """The arm under assessment: of the first declared comparison, else the first arm."""
        return next((one.arm for one in self.declared), next(iter(self.arms), ""))

    @property
    def shown_regions(self) -> list[str]:
        """The regions whose paired differences are drawn."""
        return list(dict.fromkeys([self.lesion, HEALTHY, "mask"]))

    def select(self, wanted: Collection[tuple[str, str, str, str]]) -> list[Comparison]:
        """Return comparisons that are given as (arm, against, region, metric)."""
        return [one for one in self.comparisons if (one.arm, one.against, one.region, one.metric) in wanted]

    @property
    def methods(self) -> list[str]:
        """All methods with scores, arms first and in their order."""
        known = dict.fromkeys(one.method for one in self.summaries)
        return [*(arm for arm in self.arms if arm in known), *(name for name in known if name not in self.arms)]


def write_findings(path: Path, found: Findings) -> Path:
    """Write a study's page as one HTML file that needs nothing else.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    content = {"kind": "study", "title": found.title, "asked": "", "sections": list_sections(found)}
    write_text(path, render_page("study.html", content))
    return path


def list_sections(found: Findings) -> list[PageSection]:
    """List what stands on a study's page, from top to bottom."""
    claims = {
        "verdicts": [_remark(one) for one in found.declared],
        "non_inferiority": [stays_within(one, MARGIN) for one in find_non_inferiority(found)],
        "margin": f"{MARGIN:g}",
        "rule": RULE,
        "warnings": found.warnings,
    }
    trade_off = {
        "trade_off": draw_trade_off(found.comparisons, found.lesion),
        "forest": draw_forest(found.comparisons, found.shown_regions),
        "arms": {title_of(arm): words for arm, words in found.arms.items()},
    }
    lesions = {"least": LEAST_LESION, "tables": tabulate_lesions(found.rows, found.assessed, f", {found.assessed}")}
    expected_error = {
        "arms": _tabulate_expected_error(found.rows, list(found.arms)),
        "maps": tabulate_maps(found.baseline_maps),
        "plots": draw_maps(found.baseline_maps),
    }
    training = {
        "name": found.history_name,
        "curves": draw_curves(found.history),
        "health": describe_health(found.history),
    }
    sheet = {"facts": found.facts, "conventions": list_conventions(found.rows)}
    differences = _tabulate_differences(found.comparisons)
    return [
        PageSection("found", "Found", "What was asked, and what was found", claims),
        PageSection(
            "trade-off",
            "Lesion and healthy",
            "Gain in lesions, cost elsewhere",
            trade_off,
        ),
        PageSection("scores", "Scores", "Scores by region", _tabulate_methods(found), "There are no scores."),
        PageSection("tests", "Tests", "Comparisons and tests", differences, "There are no two methods to compare."),
        PageSection("lesions", "Lesions", "Lesion by lesion", lesions),
        PageSection("expected_error", "Expected error", "Does the map show where the error is?", expected_error),
        PageSection("training", "Training", "How the training went", training),
        PageSection("cases", "Cases", "Case by case", _show_cases(found), "No pages of single cases were made."),
        PageSection("methods", "Methods", "A paragraph for your methods section", found.paragraph),
        PageSection("sheet", "Data sheet", "Data sheet", sheet),
    ]


def _show_cases(found: Findings) -> dict[str, Any]:
    """Return pictures of cases and links to their pages; nothing where there are none."""
    return {"panes": found.panes, "pages": found.cases} if found.cases else {}


def find_non_inferiority(found: Findings) -> list[Comparison]:
    """Find, for each declared comparison in a lesion, the same one in healthy tissue."""
    return found.select(
        [(one.arm, one.against, HEALTHY, one.metric) for one in found.declared if one.region != HEALTHY]
    )


def _remark(one: Comparison) -> Remark:
    """Give a verdict its tone."""
    return Remark(TONE_OF.get(one.claim, "mixed"), one.verdict)


# Tables


def _tabulate_methods(found: Findings) -> PageTable | None:
    """Set all methods side by side: means over subjects, and the SD over seeds of those that have seeds."""
    means = (
        MethodMean(s.region, s.metric, s.method, s.unit, s.mean, seeds_sd(found, s), s.subjects)
        for s in found.summaries
    )
    methods = [Column(name, _note_of(name) if name in found.arms else "naive", True) for name in found.methods]
    return tabulate_means("Metrics by region and method", means, methods, "subjects", unmarked=found.own_units)


def _note_of(arm: str) -> str:
    """Return the name of a method, below its short code; "" of variants and of methods without a code."""
    return METHODS[arm].name if arm in METHODS and METHODS[arm].code else ""


def seeds_sd(found: Findings, one: MethodSummary) -> float:
    """Return the SD over seeds; NaN of what is naive, which has no seed."""
    return one.sd_seeds if one.method in found.arms else math.nan


DIFFERENCE_COLUMNS = (
    *(Column("Method"), Column("Against"), Column("Region"), Column("Metric"), Column("")),
    *(Column("Difference", "%", True), Column("Low", "%, 95 %", True), Column("High", "%, 95 %", True)),
    *(Column("p", "permutation", True), Column("p, Holm", "corrected", True)),
    *(Column("p, Wilcoxon", "signed rank", True), Column("p, mixed model", "random seeds", True)),
    *(Column("Effect", "SDs", True), Column("n", "subjects", True), Column("Shown by n", "%", True)),
    Column("Seeds lower", "", True),
)


def _tabulate_differences(comparisons: Sequence[Comparison]) -> PageTable | None:
    if not comparisons:
        return None
    caption = "Every comparison; all but the declared ones are exploratory"
    return PageTable(caption, DIFFERENCE_COLUMNS, [_difference_cells(one) for one in comparisons])


def _difference_cells(one: Comparison) -> list[Cell]:
    return [
        *(Cell(title_of(name), name) for name in (one.arm, one.against)),
        cell(one.region),
        Cell(find_metric(one.metric).label, one.metric),
        Cell("primary" if one.primary else "exploratory", one.primary, one.primary),
        *(number_cell(share, 1.0) for share in one.percent),
        _p_cell(one.p_permutation),
        _p_cell(one.p_holm)._replace(strong=one.p_holm < 0.05),
        _p_cell(one.p_wilcoxon),
        _p_cell(one.p_mixed),
        number_cell(one.effect, 1.0),
        cell(one.subjects),
        number_cell(one.detectable, 1.0),
        Cell(f"{one.seeds_lower} of {one.seeds}", one.seeds_lower),
    ]


def _p_cell(p: float) -> Cell:
    return Cell(f"{p:.2g}", p) if math.isfinite(p) else NO_NUMBER


def _finite(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if math.isfinite(row.value))


def _tabulate_expected_error(rows: Iterable[Row], arms: Sequence[str]) -> PageTable | None:
    """List how well each arm's map knows its own error, means over cases, folds and seeds."""
    wanted = _map_scores(rows, arms)
    if not wanted:
        return None
    shown = sorted({row.method for row in wanted}, key=arms.index)
    means = mean_table(wanted, lambda row: (row.region, row.metric), lambda row: row.method)
    lines = [_map_line(*score, mean_cells(line, shown, 1.0)) for score, line in means.items()]
    columns = [Column("Region"), Column("Score"), *(Column(arm, _note_of(arm), True) for arm in shown)]
    return PageTable("Each method’s map, means over cases, folds and seeds", columns, lines)


def _map_scores(rows: Iterable[Row], arms: Sequence[str]) -> list[Row]:
    """Return what is known of how well the arms' own maps know their errors."""
    return [row for row in _finite(rows) if row.method in arms and row.metric in MAP_SCORES]


def _map_line(region: str, metric: str, cells: Iterable[Cell]) -> list[Cell]:
    return [cell(region), Cell(find_metric(metric).label, metric), *cells]


def tabulate_maps(rows: Iterable[Row]) -> PageTable | None:
    """Set the shipped map beside other maps of the expected error: a line for each map, a column for each score."""
    cases = [row for row in _finite(rows) if row.case != POOLED]
    scores = list(dict.fromkeys((row.region, row.metric) for row in cases if row.metric in MAP_COLUMNS))
    if not scores:
        return None
    means = mean_table(cases, lambda row: row.method, lambda row: (row.region, row.metric))
    lines = [[cell(name), *mean_cells(line, scores)] for name, line in means.items()]
    caption = "The map beside test-time augmentation, dropout and an ensemble of seeds, with their cost"
    return PageTable(caption, [Column("Map"), *starmap(_map_column, scores)], lines)


def _map_column(region: str, metric: str) -> Column:
    return Column(find_metric(metric).label, "" if region == "mask" else region, True)
