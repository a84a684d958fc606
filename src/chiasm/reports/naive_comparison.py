"""A method compared with the best naive baseline, case by case and in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.claims import MARKS, RULE, WORDS, Claim, Difference, PairedScores, pair_scores
from chiasm.evaluation.metric_table import Metric, find_metric
from chiasm.evaluation.rows import Row
from chiasm.names import amount
from chiasm.reports.drawing import HARD_SPACE, show_number, show_unit
from chiasm.reports.pages import TONE_OF, Remark
from chiasm.reports.tables import mean_by, mean_table


@dataclass(frozen=True)
class BaselineComparison:
    """The method against the best naive baseline in one region.

    Attributes:
        region: Where.
        metric: What is compared.
        baseline: The naive method with the lowest mean error here (the highest mean, if more is better).
        unit: Of all scores.
        pairs: Case -> (the method's score, the baseline's), means over folds and seeds.
        paired: The same scores by subject.
    """

    region: str
    metric: Metric
    baseline: str
    unit: str
    pairs: Mapping[str, tuple[float, float]]
    paired: PairedScores

    @property
    def ours(self) -> float:
        """Mean of the method over the subjects that both have."""
        return self.paired.means[0]

    @property
    def theirs(self) -> float:
        """Mean of the baseline over the same subjects."""
        return self.paired.means[1]

    @property
    def difference(self) -> Difference:
        """The method minus the baseline, percent of the baseline's mean."""
        return self.paired.difference

    @property
    def claim(self) -> Claim:
        """What may be said of the difference."""
        return self.paired.claim

    @property
    def wins(self) -> int:
        """In how many cases the method's score is better."""
        return sum(self.metric.sign * ours < self.metric.sign * theirs for ours, theirs in self.pairs.values())


def compare_with_baselines(
    rows: Sequence[Row],
    *,
    method: str,
    naive: Collection[str],
    metric: str = "mae",
    subjects: Mapping[str, str] | None = None,
) -> list[BaselineComparison]:
    """Set a method beside the best naive baseline of each region, over the cases that both have.

    Args:
        rows: Scores of every method.
        method: The method under assessment.
        naive: Names of the naive baselines.
        metric: Which score is compared; its direction is known, or lower is better.
        subjects: Case id to subject; by default each case is its own.

    Returns:
        One comparison for each region, in the order of `rows`; none for a
        region where the method or every baseline has no finite score.
    """
    regions = grouped(_finite(rows, metric), lambda row: row.region)
    order = [region for region in dict.fromkeys(row.region for row in rows) if region in regions]
    found = (_against_best(regions[region], method, naive, find_metric(metric), subjects or {}) for region in order)
    return list(filter(None, found))


def _against_best(
    rows: Sequence[Row], method: str, naive: Collection[str], metric: Metric, subjects: Mapping[str, str]
) -> BaselineComparison | None:
    """Compare in one region, whose finite scores of one metric are given."""
    means = mean_table(rows, lambda row: row.method, lambda row: row.case)
    ours = means.get(method, {})
    found = {
        name: pair_scores(ours, theirs, subjects, more_is_better=metric.more_is_better)
        for name, theirs in means.items()
        if name in naive
    }
    known = {name: paired for name, paired in found.items() if paired is not None}
    if not known:
        return None
    best = min(known, key=lambda name: metric.sign * known[name].means[1])
    pairs = {case: (ours[case], means[best][case]) for case in ours if case in means[best]}
    return BaselineComparison(rows[0].region, metric, best, rows[0].unit, pairs, known[best])


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
    ordered = sorted(scores, key=lambda case: (scores[case], case), reverse=known.more_is_better)
    chosen = {"best": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[-1]}
    return {"region": mine[0].region, "metric": known.label, "n": str(len(ordered)), **chosen}


def _finite(rows: Sequence[Row], metric: str) -> list[Row]:
    return [row for row in rows if row.metric == metric and math.isfinite(row.value)]


def _by_case(rows: Sequence[Row], method: str) -> dict[str, float]:
    """Average a method's scores over folds and seeds."""
    return mean_by((row for row in rows if row.method == method), lambda row: row.case)


# In words


def verdict(comparisons: Sequence[BaselineComparison], metric: str) -> str:
    """Name in one sentence the regions of each claim about the method and the best baseline."""
    if not comparisons:
        return "Nothing can be said: there is no score of the method beside one of a naive baseline."
    by_claim = grouped(comparisons, lambda one: one.claim)
    parts = [
        f"{said} in {_listed([one.region for one in by_claim[found]])}"
        for found, said in WORDS.items()
        if found in by_claim
    ]
    return f"By {metric}, against the best naive baseline of each region: {'; '.join(parts)}."


def describe_comparison(c: BaselineComparison) -> Remark:
    """Describe a comparison: both means, the difference with its interval, and the claim that it allows."""
    largest = max(abs(c.ours), abs(c.theirs))
    unit = f"{HARD_SPACE}{c.unit}" if show_unit(c.unit) else ""
    means = f"{show_number(c.ours, like=largest)} against {show_number(c.theirs, like=largest)}{unit}"
    people = amount(c.paired.subjects, "subject")
    side = "higher" if c.metric.more_is_better else "lower"
    text = (
        f"{c.metric.label} {means} for {c.baseline}, the best naive baseline, in {people}: {c.difference}, "
        f"{WORDS[c.claim]}; {side} in {c.wins} of {amount(len(c.pairs), 'case')}."
    )
    return Remark(TONE_OF.get(c.claim, "mixed"), text, MARKS[c.claim], c.region)


def caution(comparisons: Sequence[BaselineComparison]) -> str:
    """State the rule of what is called better, and what it does not do; empty without scores."""
    return f"{RULE} Regions are not corrected for one another." if comparisons else ""


def _listed(names: Sequence[str]) -> str:
    """List names in words; empty without names."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
