"""A method compared with the best naive baseline, case by case and in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.rows import Row
from chiasm.reports.drawing import HARD_SPACE, Metric, find_metric, show_number, show_unit
from chiasm.reports.pages import Remark, Tone
from chiasm.reports.tables import mean_by, mean_table

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
    regions = grouped(_finite(rows, metric), lambda row: row.region)
    order = [region for region in dict.fromkeys(row.region for row in rows) if region in regions]
    found = (_against_best(regions[region], method, naive, find_metric(metric)) for region in order)
    return list(filter(None, found))


def _against_best(
    rows: Sequence[Row], method: str, naive: Collection[str], metric: Metric
) -> BaselineComparison | None:
    """Compare in one region, whose finite scores of one metric are given."""
    means = mean_table(rows, lambda row: row.method, lambda row: row.case)
    ours = means.get(method, {})
    pairs = {name: _common_cases(ours, theirs) for name, theirs in means.items() if name in naive}
    known = {name: both for name, both in pairs.items() if both}
    if not known:
        return None
    best = min(known, key=lambda name: metric.sign * _means(known[name])[1])
    return BaselineComparison(rows[0].region, metric, best, rows[0].unit, known[best])


def _common_cases(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Pair the scores of the cases that both have."""
    return {case: (ours[case], theirs[case]) for case in ours if case in theirs}


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
    """Name in one sentence the regions in which the method is better than every naive baseline, and the others."""
    if not comparisons:
        return "Nothing can be said: there is no score of the method beside one of a naive baseline."
    ahead, behind = _regions(comparisons, is_better=True), _regions(comparisons, is_better=False)
    if not behind:
        return f"Better than every naive baseline on average, by {metric}, in {ahead}."
    if not ahead:
        return f"Not better than the best naive baseline, by {metric}, in any region: {behind}."
    return f"By {metric}, better than every naive baseline on average in {ahead}, not in {behind}."


def _regions(comparisons: Sequence[BaselineComparison], *, is_better: bool) -> str:
    """List the regions in which the method is better, or those in which it is not."""
    return _listed([one.region for one in comparisons if one.is_better == is_better])


def describe_comparison(c: BaselineComparison) -> Remark:
    """Describe a comparison: both means, the difference, and the number of cases in which the method is better."""
    largest = max(abs(c.ours), abs(c.theirs))
    unit = f"{HARD_SPACE}{c.unit}" if show_unit(c.unit) else ""
    means = f"{show_number(c.ours, like=largest)} against {show_number(c.theirs, like=largest)}{unit}"
    cases = "in the only case" if c.cases == 1 else f"better in {c.wins} of {c.cases} cases"
    text = f"{c.metric.label} {means} for {c.baseline}, the best naive baseline: {_difference(c, unit)}, {cases}."
    tone = TONES[c.is_better + (c.wins * 2 > c.cases)]
    return Remark(tone, text, _word(c), c.region)


def _difference(c: BaselineComparison, unit: str) -> str:
    """Describe how much higher or lower the method's mean is, in per cent of the baseline's unless that is 0."""
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
    """Warn that these scores are no test of a hypothesis; empty without scores."""
    if not comparisons:
        return ""
    fewest = min(comparison.cases for comparison in comparisons)
    few = f" With only {fewest} case{'s' * (fewest != 1)} a chance result is likely." if fewest <= FEW_CASES else ""
    return f"These are descriptions of the cases at hand, not tests of a hypothesis.{few}"


def _listed(names: Sequence[str]) -> str:
    """List names in words; empty without names."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
