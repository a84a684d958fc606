"""A method beside the best naive baseline: case by case, and in words, worse as plainly as better."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chiasm.evaluation.rows import Row
from chiasm.reports.drawing import HARD_SPACE, Metric, find_metric, show_number, show_unit
from chiasm.reports.pages import Remark, Tone
from chiasm.reports.tables import mean_by

FEW_CASES = 10  # up to this many, the page says that they are few
TONES: tuple[Tone, Tone, Tone] = ("bad", "mixed", "good")


@dataclass(frozen=True)
class BaselineComparison:
    """The method against the best naive baseline, case by case, in one region.

    Attributes:
        region: Where.
        metric: What is compared.
        baseline: The naive method with the best mean here.
        unit: Of all scores.
        pairs: Case -> (the method's score, the baseline's), means over folds and seeds.
    """

    region: str
    metric: Metric
    baseline: str
    unit: str
    pairs: Mapping[str, tuple[float, float]]

    @property
    def ours(self) -> float:
        """Mean of the method over the cases that both have."""
        return _means(self.pairs)[0]

    @property
    def theirs(self) -> float:
        """Mean of the baseline over the same cases."""
        return _means(self.pairs)[1]

    @property
    def cases(self) -> int:
        """How many cases both have."""
        return len(self.pairs)

    @property
    def wins(self) -> int:
        """In how many of them the method is better."""
        return sum(self.metric.sign * ours < self.metric.sign * theirs for ours, theirs in self.pairs.values())

    @property
    def is_better(self) -> bool:
        """Whether the method's mean is better."""
        return self.metric.sign * self.ours < self.metric.sign * self.theirs


def _means(pairs: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    ours, theirs = np.mean(list(pairs.values()), axis=0)
    return float(ours), float(theirs)


def compare_with_baselines(
    rows: Sequence[Row], *, method: str, naive: Collection[str], metric: str = "mae"
) -> list[BaselineComparison]:
    """Set a method beside the best naive baseline of each region, over the cases that both have.

    Args:
        rows: Scores of every method.
        method: The method under assessment.
        naive: Names of the naive baselines.
        metric: Which score is compared; its direction is known, or lower is better.

    Returns:
        One comparison for each region, in the order of `rows`; none for a
        region where the method or every baseline has no finite score.
    """
    regions: dict[str, list[Row]] = {row.region: [] for row in rows}
    for row in _finite(rows, metric):
        regions[row.region].append(row)
    found = (_against_best(here, method, naive, find_metric(metric)) for here in regions.values())
    return [comparison for comparison in found if comparison is not None]


def _against_best(
    rows: Sequence[Row], method: str, naive: Collection[str], metric: Metric
) -> BaselineComparison | None:
    """Compare in one region, whose finite scores of one metric are given."""
    ours = _by_case(rows, method)
    pairs = {}
    for name in dict.fromkeys(row.method for row in rows if row.method in naive):
        theirs = _by_case(rows, name)
        if both := {case: (ours[case], theirs[case]) for case in ours if case in theirs}:
            pairs[name] = both
    if not pairs:
        return None
    best = min(pairs, key=lambda name: metric.sign * _means(pairs[name])[1])
    return BaselineComparison(rows[0].region, metric, best, rows[0].unit, pairs[best])


def rank(rows: Sequence[Row], *, method: str, metric: str = "mae") -> dict[str, str] | None:
    """Name the best, the median and the worst case of a method in the first region of `rows`.

    Returns:
        "region", "metric", "best", "median", "worst" and the number of cases
        "n", for printing; None when there are no such scores.
    """
    mine = [row for row in _finite(rows, metric) if row.method == method]
    if not mine:
        return None
    scores = _by_case([row for row in mine if row.region == mine[0].region], method)
    known = find_metric(metric)
    ordered = sorted(scores, key=lambda case: (scores[case], case), reverse=known.better == "higher")
    chosen = {"best": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[-1]}
    return {"region": mine[0].region, "metric": known.label, "n": str(len(ordered)), **chosen}


def _finite(rows: Sequence[Row], metric: str) -> list[Row]:
    return [row for row in rows if row.metric == metric and math.isfinite(row.value)]


def _by_case(rows: Sequence[Row], method: str) -> dict[str, float]:
    """Average a method's scores over folds and seeds."""
    return mean_by((row for row in rows if row.method == method), lambda row: row.case)


# In words


def verdict(comparisons: Sequence[BaselineComparison], metric: str) -> str:
    """Say in one sentence where the method is better than every naive baseline by a metric, and where not."""
    if not comparisons:
        return "Nothing can be said: there is no score of the method beside one of a naive baseline."
    ahead = [comparison.region for comparison in comparisons if comparison.is_better]
    behind = [comparison.region for comparison in comparisons if not comparison.is_better]
    if not behind:
        return f"Better than every naive baseline on average, by {metric}, in {_listed(ahead)}."
    if not ahead:
        return f"Not better than the best naive baseline, by {metric}, in any region: {_listed(behind)}."
    return f"By {metric}, better than every naive baseline on average in {_listed(ahead)}, not in {_listed(behind)}."


def describe_comparison(c: BaselineComparison) -> Remark:
    """Put a comparison into words: both means, the difference, and in how many cases the method is better."""
    largest = max(abs(c.ours), abs(c.theirs))
    unit = f"{HARD_SPACE}{c.unit}" if show_unit(c.unit) else ""
    means = f"{show_number(c.ours, like=largest)} against {show_number(c.theirs, like=largest)}{unit}"
    cases = "in the only case" if c.cases == 1 else f"better in {c.wins} of {c.cases} cases"
    text = f"{c.metric.label} {means} for {c.baseline}, the best naive baseline: {_difference(c, unit)}, {cases}."
    tone = TONES[c.is_better + (c.wins * 2 > c.cases)]
    return Remark(tone, text, _word(c), c.region)


def _difference(c: BaselineComparison, unit: str) -> str:
    """Say how much higher or lower the method's mean is, in per cent of the baseline's unless that is 0."""
    change = c.ours - c.theirs
    if change == 0:
        return "the same on average"
    size = f"{100 * abs(change / c.theirs):.1f}{HARD_SPACE}%" if c.theirs else f"{show_number(abs(change))}{unit}"
    return f"{size} {'higher' if change > 0 else 'lower'} on average"


def _word(c: BaselineComparison) -> str:
    if c.is_better:
        return "better"
    return "no better" if c.ours == c.theirs else "worse"


def caution(comparisons: Sequence[BaselineComparison]) -> str:
    """Say what these scores are not; nothing where there are none."""
    if not comparisons:
        return ""
    fewest = min(comparison.cases for comparison in comparisons)
    few = f" With only {fewest} case{'s' * (fewest != 1)} a chance result is likely." if fewest <= FEW_CASES else ""
    return f"These are descriptions of the cases at hand, not tests of a hypothesis.{few}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
