"""Tables of `peers.py`: all cases, each case and each site, and the differences of chiasm from the other tools.

    python benchmarks/peers_tables.py OUT/peers.csv

A case's score is its mean over seeds.  Differences are taken by case and seed, where both tools have the seed, and
their 95 % intervals resample both; p is of flipped signs of the cases, not corrected: six cases give 0.031 at least.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

from chiasm.evaluation import rows as evaluation
from chiasm.evaluation.statistics import Comparison, compare_methods

FIELDS = ("tool", "fold", "seed", "cohort", "case", "site", "steps", "seconds", "brain", "WT", "kept")
REGIONS = ("brain", "WT")
Row = Mapping[str, object]


def pick(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values_of(rows: Sequence[Row], column: str) -> list[object]:
    """Return the values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """Return the numbers of a column."""
    return [float(str(row[column])) for row in rows]


def by_seed(rows: Sequence[Row], column: str) -> list[float]:
    """Return the mean over cases for each seed; the median of the contrast that is kept."""
    middle = median if column == "kept" else mean
    return [middle(numbers(pick(rows, seed=seed), column)) for seed in values_of(rows, "seed")]


def print_summary(rows: Sequence[Row]) -> None:
    """Print a row for each tool: means over seeds, with their SD."""
    print("| tool | seeds | steps | seconds | brain | WT | kept, median | n |\n|---|---|---|---|---|---|---|---|")
    for tool in values_of(rows, "tool"):
        own = pick(rows, tool=tool)
        seeds = values_of(own, "seed")
        cells = []
        for column in ("brain", "WT", "kept"):
            found = by_seed(own, column)
            form = "{:.0%}" if column == "kept" else "{:.3f}"
            spread = f" ± {form.format(stdev(found))}" if len(found) > 1 and stdev(found) > 0 else ""
            cells.append((form.format(mean(found)) + spread).replace("%", " %"))
        steps, seconds = mean(numbers(own, "steps")), mean(numbers(own, "seconds"))
        n = len(values_of(own, "case"))
        print(f"| {tool} | {len(seeds)} | {steps:.0f} | {seconds:.0f} | {' | '.join(cells)} | {n} |")


def print_groups(rows: Sequence[Row], column: str) -> None:
    """Print a row for each case or site, and a column for each tool: brain / WT / kept, means over seeds."""
    tools = values_of(rows, "tool")
    print(f"| {column} | {' | '.join(map(str, tools))} |\n{'|---' * (len(tools) + 1)}|")
    for value in values_of(rows, column):
        print(f"| {value} | {' | '.join(cell(pick(rows, tool=tool, **{column: value})) for tool in tools)} |")


def cell(rows: Sequence[Row]) -> str:
    """Return "brain / WT / kept", or the brain alone where no lesion is labelled."""
    brain, lesion, kept = (mean(numbers(rows, name)) for name in ("brain", "WT", "kept"))
    return f"{brain:.3f}" if math.isnan(lesion) else f"{brain:.3f} / {lesion:.3f} / {100 * kept:.0f} %"


def in_shared_seeds(rows: Sequence[Row], *tools: object) -> list[Row]:
    """Return the rows of some tools, in the seeds that all of them have."""
    seeds = set.intersection(*({row["seed"] for row in pick(rows, tool=tool)} for tool in tools))
    return [row for row in rows if row["tool"] in tools and row["seed"] in seeds]


def compare(rows: Sequence[Row], ours: object, theirs: object) -> list[Comparison]:
    """Compare two tools in the brain and in whole tumours."""
    scored = [
        evaluation.Row(str(row["case"]), 0, int(str(row["seed"])), str(row["tool"]), region, "mae", value, "", "")
        for row in rows
        for region, value in zip(REGIONS, numbers([row], "brain") + numbers([row], "WT"), strict=True)
    ]
    return compare_methods(scored, [(str(ours), str(theirs))], metrics=["mae"], regions=REGIONS)


def ahead(rows: Sequence[Row], one: Comparison, column: str) -> str:
    """Return in how many cases or sites the first tool's mean error is the lower one."""
    groups = [pick(rows, **{column: value}) for value in values_of(rows, column)]
    lower = [
        mean(numbers(pick(group, tool=one.arm), one.region)) < mean(numbers(pick(group, tool=one.against), one.region))
        for group in groups
    ]
    return f"{sum(lower)} of {len(lower)}"


def print_differences(rows: Sequence[Row]) -> None:
    """Print how chiasm differs from each other tool, in percent of the other's error."""
    tools = list(map(str, values_of(rows, "tool")))
    ours = [tool for tool in tools if tool.startswith("chiasm")]
    print("| tool | against | region | difference, % (95 % interval) | p | seeds | cases ahead | sites ahead |")
    print("|---" * 8 + "|")
    for own, other in product(ours, [tool for tool in tools if tool not in ours]):
        shared = in_shared_seeds(rows, own, other)
        for one in compare(shared, own, other):
            much = "{:+.1f} ({:+.1f} to {:+.1f})".format(*one.percent)
            counts = " | ".join(ahead(shared, one, column) for column in ("case", "site"))
            named = f"| {own} | {other} | {one.region} |"
            print(f"{named} {much} | {one.p_permutation:.2g} | {one.seeds} | {counts} |")


def print_tables(rows: Sequence[Row], absent: Mapping[str, str]) -> None:
    """Print all tables.

    Args:
        rows: Judged cases, with the fields of `FIELDS`.
        absent: Tools that could not run, and why.
    """
    tested, unseen = (pick(rows, cohort=cohort) for cohort in ("tested", "unseen"))
    print_summary(tested)
    for tool, why in absent.items():
        print(f"| {tool} | {why} | | | | | | |")
    for column in ("case", "site"):
        print()
        print_groups(tested, column)
    print()
    print_differences(tested)
    if unseen:
        print()
        print_groups(unseen, "case")


def main() -> None:
    """Print the tables of a file."""
    with Path(sys.argv[1]).open(newline="") as file:
        print_tables([*csv.DictReader(file)], {})


if __name__ == "__main__":
    main()
