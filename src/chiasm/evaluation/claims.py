"""The one rule by which pages and messages say "better", "worse" or that there is no difference.

A method is called better or worse only if the whole 95 % interval of its difference lies more than `TOLERANCE` percent
from 0, and at least `FEWEST` subjects were compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.paired_tests import ALPHA, FEWEST, cluster_interval

#: Percent of the other's mean: a difference that is not larger does not count.
TOLERANCE = 1.0

Claim = Literal["better", "worse", "alike", "open", "few"]

#: How a claim is said after the name of what was compared.
WORDS: Mapping[Claim, str] = {
    "better": "better",
    "worse": "worse",
    "alike": f"the difference is at most {TOLERANCE:g} %",
    "open": f"no difference above {TOLERANCE:g} % is shown",
    "few": f"fewer than {FEWEST} subjects are too few to compare",
}

#: The same as a mark before a sentence.
MARKS: Mapping[Claim, str] = {
    "better": "better",
    "worse": "worse",
    "alike": f"within {TOLERANCE:g} %",
    "open": "not shown",
    "few": "too few",
}

#: The rule, for pages.
RULE = (
    f"“Better” and “worse” are said only if the whole 95 % interval of the difference lies more than {TOLERANCE:g} % "
    f"from 0, and at least {FEWEST} subjects were compared."
)


class Difference(NamedTuple):
    """A difference of means in percent of the other's mean, with its 95 % interval; NaN where it is not defined."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say the difference, and its interval where there is one.

        >>> str(Difference(-20.0, -24.96, -12.0)), str(Difference(1.0, math.nan, math.nan))
        ('-20.0 % (95 % interval -25.0 to -12.0 %)', '+1.0 %')
        """
        if not math.isfinite(self.mean):
            return "not defined in percent"
        interval = f" (95 % interval {self.low:+.1f} to {self.high:+.1f} %)" if math.isfinite(self.low) else ""
        return f"{self.mean:+.1f} %{interval}"


def claim(difference: Difference, subjects: int, *, more_is_better: bool, p: float = 0.0) -> Claim:
    """Decide what may be said of a difference: the only place that decides it.

    Args:
        difference: The method minus the other, percent of the other's mean.
        subjects: How many people were compared.
        more_is_better: Whether a larger score is a better one.
        p: Corrected p value of a test, where there is one; from 0.05 on nothing is called better or worse.

    Returns:
        "better" or "worse" if the whole interval lies beyond `TOLERANCE` on one side (an end that touches it does not);
        "alike" if the interval lies within `TOLERANCE`, ends included; "few" below `FEWEST` subjects; else "open".

    >>> claim(Difference(-5.0, -8.0, -1.1), 6, more_is_better=False)
    'better'
    >>> claim(Difference(-5.0, -8.0, -1.0), 6, more_is_better=False)
    'open'
    """
    if subjects < FEWEST:
        return "few"
    low, high = (round(end, 9) for end in (difference.low, difference.high))  # 1 - 0.99 is not exactly 0.01
    if low >= -TOLERANCE and high <= TOLERANCE:
        return "alike"
    if p < ALPHA and (low > TOLERANCE or high < -TOLERANCE):
        return "better" if (low > TOLERANCE) == more_is_better else "worse"
    return "open"


def is_ahead(one: float, other: float, *, more_is_better: bool) -> bool:
    """Return whether a score is better than another by more than the tolerance; for orders and advice, no claim.

    >>> is_ahead(0.99, 1.0, more_is_better=False), is_ahead(0.98, 1.0, more_is_better=False)
    (False, True)
    """
    gain = one - other if more_is_better else other - one
    return round(100 * gain, 9) > round(TOLERANCE * abs(other), 9)


@dataclass(frozen=True)
class PairedScores:
    """The scores of a method and of another one, subject by subject.

    Attributes:
        ours: Of the method, by subject.
        theirs: Of the other, of the same subjects; at least one.
        more_is_better: Whether a larger score is a better one.
    """

    ours: Mapping[str, float]
    theirs: Mapping[str, float]
    more_is_better: bool = False

    @property
    def subjects(self) -> int:
        """How many people were compared."""
        return len(self.ours)

    @property
    def means(self) -> tuple[float, float]:
        """Means over subjects, of the method and of the other."""
        ours, theirs = (float(np.mean(list(scores.values()))) for scores in (self.ours, self.theirs))
        return ours, theirs

    @cached_property
    def difference(self) -> Difference:
        """The method minus the other, percent of the other's mean; an interval only of `FEWEST` subjects or more."""
        ours, theirs = self.means
        if not theirs:
            return Difference(math.nan, math.nan, math.nan)
        scale = 100 / abs(theirs)
        low, high = math.nan, math.nan
        if self.subjects >= FEWEST:
            apart = np.array([self.ours[subject] - self.theirs[subject] for subject in self.ours])
            low, high = (scale * end for end in cluster_interval(apart[:, None]))
        return Difference(scale * (ours - theirs), low, high)

    @property
    def claim(self) -> Claim:
        """What may be said of the difference."""
        return claim(self.difference, self.subjects, more_is_better=self.more_is_better)

    @property
    def is_ahead(self) -> bool:
        """Whether the method's mean is ahead by more than the tolerance: a description of these subjects, no claim."""
        return is_ahead(*self.means, more_is_better=self.more_is_better)


def pair_scores(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    subjects: Mapping[str, str] | None = None,
    *,
    more_is_better: bool = False,
) -> PairedScores | None:
    """Pair the scores of two methods by subject, over the cases that both have.

    Args:
        ours: Case to score.
        theirs: Case to score.
        subjects: Case id to subject; a case without one is its own.
        more_is_better: Whether a larger score is a better one.

    Returns:
        None where no case has a score of both.
    """
    people = grouped((case for case in ours if case in theirs), lambda case: (subjects or {}).get(case, case))
    if not people:
        return None
    one, other = (
        {person: float(np.mean([scores[case] for case in cases])) for person, cases in people.items()}
        for scores in (ours, theirs)
    )
    return PairedScores(one, other, more_is_better)
