"""The tables of pages and documents: columns and cells as records, and the tables that several pages share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.rows import LESION, Row
from chiasm.reports.drawing import HARD_SPACE, show_number, show_unit

SIZES_ML = ((1.0, "below 1 mL"), (10.0, "1 to 10 mL"), (math.inf, "10 mL and more"))
UNKNOWN_SIZE = "of unknown size"
SIZES = (*(label for _, label in SIZES_ML), UNKNOWN_SIZE)
NAIVE = "naive"  # the last column of a table of cases

Key = TypeVar("Key", bound=Hashable)
Line = TypeVar("Line", bound=Hashable)
Value = TypeVar("Value")


class Column(NamedTuple):
    """A column's head, the note below it, and whether it holds numbers."""

    label: str
    note: str = ""
    is_numeric: bool = False


class Cell(NamedTuple):
    """A number or a word in a table: as shown, and as sorted."""

    text: str
    value: float | str
    strong: bool = False
    spread: str = ""


class PageTable(NamedTuple):
    """A caption, columns and rows."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


NO_NUMBER = Cell("–", math.inf)


def cell(value: float | str) -> Cell:
    """Show a word, or a whole number, as it is."""
    return Cell(str(value), value)


def number_cell(value: float, like: float | None = None) -> Cell:
    """Show a number in a table; one that is not finite as a dash that sorts last."""
    return Cell(show_number(value, like), value) if math.isfinite(value) else NO_NUMBER


def typical(values: Iterable[float]) -> float:
    """Find the size of a column's scores, so that all are shown with the same decimals."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    return float(np.median(sizes)) if sizes else 1.0


def cases_of(rows: Iterable[Row]) -> set[str]:
    """Return the cases that some scores are of."""
    return {row.case for row in rows}


def mean_by(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, float]:
    """Average the scores of rows that share a key, in the order in which the keys come."""
    return {name: float(np.mean([row.value for row in some])) for name, some in grouped(rows, key).items()}


def arrange(values: Iterable[tuple[Line, Key, Value]]) -> dict[Line, dict[Key, Value]]:
    """Arrange values as a table; each value comes with the names of its line and its column.

    >>> arrange([("lesion", "ours", 3), ("mask", "ours", 1), ("mask", "theirs", 2)])
    {'lesion': {'ours': 3}, 'mask': {'ours': 1, 'theirs': 2}}
    """
    table: dict[Line, dict[Key, Value]] = {}
    for line, column, value in values:
        table.setdefault(line, {})[column] = value
    return table


def mean_table(
    rows: Iterable[Row], line: Callable[[Row], Line], column: Callable[[Row], Key]
) -> dict[Line, dict[Key, float]]:
    """Average the scores of rows that share line and column of a table."""
    means = mean_by(rows, lambda row: (line(row), column(row)))
    return arrange((name, beside, mean) for (name, beside), mean in means.items())


def mean_cells(means: Mapping[Key, float], keys: Iterable[Key], like: float | None = None) -> list[Cell]:
    """Show the means of some keys, a dash for each that has none."""
    return [number_cell(means.get(key, math.nan), like) for key in keys]


def to_markdown(table: PageTable) -> Iterator[str]:
    """Write a table's lines for a document, notes behind the labels."""
    yield f"| {' | '.join(f'{column.label} {column.note}'.strip() for column in table.columns)} |"
    yield "|" + "---|" * len(table.columns)
    yield from (f"| {' | '.join(cell.text for cell in row)} |" for row in table.rows)


# Methods side by side


class MethodMean(NamedTuple):
    """The mean score of a method in one region and metric.

    Attributes:
        region: Where.
        metric: A name such as "mae".
        method: Whose.
        unit: Of mean and spread.
        mean: NaN where there is none.
        spread: SD beside it; NaN where there is none.
        n: How many cases or subjects it is the mean of.
    """

    region: str
    metric: str
    method: str
    unit: str
    mean: float
    spread: float
    n: int


def tabulate_means(
    caption: str,
    means: Iterable[MethodMean],
    methods: Sequence[Column],
    counted: str,
    *,
    unmarked: Collection[str] = (),
) -> PageTable | None:
    """Set methods side by side: a line for each region and metric, the best mean of a line strong.

    Args:
        caption: Of the table.
        means: In the order of the lines.
        methods: A column for each method, labelled with its name.
        counted: What a mean's n counts, such as "cases".
        unmarked: Metrics of which each method has a unit of its own, so that no mean is the best.

    Returns:
        The table, or None without means.
    """
    lines = arrange(((one.region, one.metric), one.method, one) for one in means)
    if not lines:
        return None
    columns = [Column("Region"), Column("Metric"), Column("n", counted, True), *methods]
    labels = [column.label for column in methods]
    rows = [_mean_line(line, labels, is_marked=metric not in unmarked) for (_, metric), line in lines.items()]
    return PageTable(caption, columns, rows)


def _mean_line(line: Mapping[str, MethodMean], methods: Sequence[str], *, is_marked: bool) -> list[Cell]:
    first = next(iter(line.values()))
    metric = find_metric(first.metric)
    known = [one.mean for one in line.values() if math.isfinite(one.mean)]
    best, like = metric.best(known) if is_marked else math.nan, max(map(abs, known), default=1.0)
    label = Cell(f"{metric.label}{metric.arrow}", metric.label, spread=show_unit(first.unit))
    count = max(one.n for one in line.values())
    return [cell(first.region), label, cell(count), *(_mean_cell(line.get(name), best, like) for name in methods)]


def _mean_cell(one: MethodMean | None, best: float, like: float) -> Cell:
    if one is None or not math.isfinite(one.mean):
        return NO_NUMBER
    spread = f"±{HARD_SPACE}{show_number(one.spread, like)}" if math.isfinite(one.spread) else ""
    return Cell(show_number(one.mean, like), one.mean, one.mean == best, spread)


# Scores of one method


class ScoreColumns(NamedTuple):
    """Columns of scores, one for each metric: heads, and the typical size of each column's scores."""

    heads: Sequence[Column]
    sizes: Mapping[str, float | None]

    def cells(self, scores: Mapping[str, float]) -> list[Cell]:
        """Show a line's scores, given by metric; a dash for each that is absent."""
        return [number_cell(scores.get(metric, math.nan), like) for metric, like in self.sizes.items()]


def make_columns(rows: Iterable[Row]) -> ScoreColumns:
    """Make a column for each metric of some rows, in their order."""
    metrics = grouped(rows, lambda row: row.metric)
    heads = [Column(find_metric(metric).label, show_unit(some[-1].unit), True) for metric, some in metrics.items()]
    return ScoreColumns(heads, {metric: typical(row.value for row in some) for metric, some in metrics.items()})


class CaseLine(NamedTuple):
    """The case, region, fold and seed of a line in a table of cases."""

    case: str
    region: str
    fold: int
    seed: int


def tabulate_cases(
    rows: Sequence[Row], method: str, headline: str, baselines: Mapping[str, Mapping[str, float]]
) -> PageTable | None:
    """List every case of a method; folds and seeds have a column where there are several.

    Args:
        rows: Of all methods.
        method: Whose cases.
        headline: The metric of the last column.
        baselines: Scores of the last column: those of a region's best naive baseline, region -> case -> score.
            Without any there is no such column.

    Returns:
        The table, or None where the method has no scores.
    """
    mine = [row for row in rows if row.method == method]
    if not mine:
        return None
    lines = arrange((CaseLine(row.case, row.region, row.fold, row.seed), row.metric, row.value) for row in mine)
    scores = make_columns(mine)
    if baselines:
        scores = _beside_naive(scores, headline)
        lines = {place: {**line, NAIVE: _naive_score(place, baselines)} for place, line in lines.items()}
    return _tabulate_lines(f"Every case of {method}", lines, scores)


def _tabulate_lines(caption: str, lines: Mapping[CaseLine, Mapping[str, float]], scores: ScoreColumns) -> PageTable:
    """Make a table of cases: what a line is of, then its scores."""
    shown = ["case", "region", *(name for name in ("fold", "seed") if _varies(lines, name))]
    columns = [Column(name.capitalize(), "", name in ("fold", "seed")) for name in shown]
    values_of = attrgetter(*shown)
    table = [[*map(cell, values_of(place)), *scores.cells(line)] for place, line in lines.items()]
    return PageTable(caption, [*columns, *scores.heads], table)


def _naive_score(place: CaseLine, baselines: Mapping[str, Mapping[str, float]]) -> float:
    """Return the score of a case by the best naive baseline of the region; NaN where there is none."""
    return baselines.get(place.region, {}).get(place.case, math.nan)


def _beside_naive(scores: ScoreColumns, headline: str) -> ScoreColumns:
    """Put a column of the best naive baseline's headline score behind the others."""
    head = Column(f"{find_metric(headline).label}, naive", "best baseline of the region", True)
    return ScoreColumns([*scores.heads, head], {**scores.sizes, NAIVE: scores.sizes.get(headline)})


def _varies(places: Iterable[CaseLine], name: str) -> bool:
    return len({getattr(place, name) for place in places}) > 1


def tabulate_lesions(rows: Iterable[Row], method: str, of: str = "") -> list[PageTable]:
    """List single lesions of a method in a table for each size, the smallest first; one table where it is unknown.

    Args:
        rows: Of all methods and regions.
        method: Whose lesions.
        of: What the captions end with.
    """
    mine = _single_lesions(rows, method)
    scores = make_columns(row for row in mine if row.metric != "volume_ml")
    columns = [Column("Case"), Column("Lesion"), Column("Volume", "mL", True), *scores.heads]
    groups = arrange(_lesion_lines(mine, scores))
    found = [(label, list(groups[label].values())) for label in SIZES if label in groups]
    return [PageTable(f"Lesions {label} ({len(lines)}){of}", columns, lines) for label, lines in found]


def _single_lesions(rows: Iterable[Row], method: str) -> list[Row]:
    """Return a method's scores of single lesions."""
    return [row for row in rows if row.method == method and LESION.fullmatch(row.region)]


def _lesion_lines(rows: Sequence[Row], scores: ScoreColumns) -> Iterator[tuple[str, tuple[str, str], list[Cell]]]:
    """Give size, (case, lesion) and cells of each lesion, the smallest first; scores are means over folds and seeds."""
    volumes = {(row.case, row.region): row.value for row in reversed(rows) if row.metric == "volume_ml"}
    means = mean_table(rows, lambda row: (row.case, row.region), lambda row: row.metric)
    for lesion in sorted(means, key=lambda lesion: volumes.get(lesion, math.inf)):
        volume = volumes.get(lesion, math.nan)
        yield _size_of(volume), lesion, [*map(cell, lesion), number_cell(volume), *scores.cells(means[lesion])]


def _size_of(volume_ml: float) -> str:
    """Name the group of sizes that a volume lies in; NaN is of unknown size."""
    return next((label for most, label in SIZES_ML if volume_ml < most), UNKNOWN_SIZE)


# Data sheets


def name_some(names: Sequence[str], most: int) -> str:
    """List names, the first ones of many.

    >>> name_some(["a", "b", "c"], 2)
    'a, b, ...'
    """
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def as_text(facts: Mapping[str, object]) -> dict[str, str]:
    """Show the values of a data sheet as words, those of a section one by one, without what is None.

    >>> as_text({"seeds": [0, 1], "phantom": {"subjects": 8, "seed": None}})
    {'seeds': '0, 1', 'phantom.subjects': '8'}
    """
    words: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            words |= as_text({f"{name}.{inner}": one for inner, one in value.items()})
        elif value is not None:
            words[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return words


def join_facts(facts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join the facts of several models, each value once, in the order of the models.

    >>> join_facts([{"seed": "0", "plane": "axial"}, {"seed": "0", "plane": "coronal"}])
    {'seed': '0', 'plane': 'axial / coronal'}
    """
    models = list(facts)
    names = dict.fromkeys(chain.from_iterable(models))
    return {name: " / ".join(dict.fromkeys(one[name] for one in models if name in one)) for name in names}


def recipe_facts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Name each setting of a recipe's sections."""
    sections = {name: part for name, part in recipe.items() if isinstance(part, dict)}
    return {f"{section}.{name}": str(value) for section, part in sections.items() for name, value in part.items()}


def list_conventions(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """List every convention in use, with the metrics it governs."""
    used = arrange((str(row.convention), find_metric(row.metric).label, None) for row in rows)
    return [(convention, ", ".join(metrics)) for convention, metrics in used.items()]
