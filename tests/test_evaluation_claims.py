"""What may be called better, worse or alike, at the boundaries of the rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chiasm.evaluation.claims import TOLERANCE, Difference, claim, is_ahead, pair_scores
from chiasm.evaluation.paired_tests import FEWEST, cluster_interval

NAN = math.nan


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-8.0, -1.001, "better"),
        (-8.0, -1.0, "open"),  # an end that touches the tolerance
        (-8.0, -0.5, "open"),
        (-1.0, -1.0, "alike"),  # exactly the tolerance
        (100 * (0.99 - 1), 100 * (0.99 - 1), "alike"),  # the same, as numbers come out
        (-1.0, 1.0, "alike"),
        (-1.001, 1.0, "open"),
        (-1.0, 1.001, "open"),
        (0.0, 0.0, "alike"),
        (-9.0, 9.0, "open"),
        (1.0, 8.0, "open"),
        (1.001, 8.0, "worse"),
        (NAN, NAN, "open"),
    ],
)
def test_the_whole_interval_must_lie_beyond_the_tolerance(low: float, high: float, said: str) -> None:
    found = Difference((low + high) / 2, low, high)
    assert TOLERANCE == 1.0 and claim(found, FEWEST, more_is_better=False) == said
    swapped = {"better": "worse", "worse": "better"}.get(said, said)
    assert claim(found, FEWEST, more_is_better=True) == swapped


def test_fewer_than_six_subjects_allow_no_claim_however_large_the_difference_is() -> None:
    large = Difference(-50.0, -51.0, -49.0)
    assert [claim(large, n, more_is_better=False) for n in (1, FEWEST - 1, FEWEST)] == ["few", "few", "better"]
    assert claim(Difference(0.0, 0.0, 0.0), FEWEST - 1, more_is_better=False) == "few"


def test_a_test_that_is_not_significant_forbids_better_but_not_alike() -> None:
    large = Difference(-50.0, -51.0, -49.0)
    assert [claim(large, 9, more_is_better=False, p=p) for p in (0.049, 0.05, NAN)] == ["better", "open", "open"]
    assert claim(Difference(0.1, -0.2, 0.4), 9, more_is_better=False, p=0.8) == "alike"


def test_scans_of_a_subject_count_once() -> None:
    ours = {f"{subject}{scan}": 1.0 + scan for subject in "abc" for scan in (0, 1)}
    theirs = dict.fromkeys(ours, 3.0) | {"only theirs": 0.0}
    found = pair_scores(ours, theirs, {case: case[0] for case in ours})
    assert found is not None and found.subjects == 3 and found.means == (1.5, 3.0)
    assert found.claim == "few" and str(found.difference) == "-50.0 %"
    alone = pair_scores(ours, theirs)
    assert alone is not None and alone.subjects == 6 and alone.claim == "better"
    assert pair_scores({"a": 1.0}, {"b": 1.0}) is None


def test_the_interval_is_that_of_the_studies() -> None:
    draw = np.random.default_rng(3)
    theirs = {f"s{n}": float(value) for n, value in enumerate(draw.normal(2, 0.2, 9))}
    ours = {name: value - float(draw.normal(0.1, 0.05)) for name, value in theirs.items()}
    found = pair_scores(ours, theirs)
    assert found is not None
    apart = np.array([ours[name] - theirs[name] for name in ours])
    scale = 100 / np.mean(list(theirs.values()))
    expected = [scale * apart.mean(), *(scale * end for end in cluster_interval(apart[:, None]))]
    np.testing.assert_allclose(found.difference, expected, rtol=1e-12)


def test_a_baseline_without_error_gives_no_percent() -> None:
    zeros = {f"s{n}": 0.0 for n in range(FEWEST)}
    found = pair_scores(dict.fromkeys(zeros, 1.0), zeros)
    assert found is not None and found.claim == "open" and str(found.difference) == "not defined in percent"
    assert not found.is_ahead and not is_ahead(0.0, 0.0, more_is_better=False)


def test_a_score_is_ahead_only_by_more_than_the_tolerance() -> None:
    assert not is_ahead(0.99, 1.0, more_is_better=False) and is_ahead(0.9899, 1.0, more_is_better=False)
    assert not is_ahead(1.01, 1.0, more_is_better=True) and is_ahead(1.0101, 1.0, more_is_better=True)
    assert not is_ahead(1.1, 1.0, more_is_better=False)
