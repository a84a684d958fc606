"""Kappa, Wilson's interval and resampled subjects are those of other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chiasm.evaluation.agreement import (
    binomial_p,
    count_pairs,
    resampled_interval,
    weighted_kappa,
    wilson_interval,
)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_kappa_is_that_of_scikit_learn(levels: int) -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(levels)
    for count in (7, 40):
        first = rng.integers(0, levels, count)
        second = np.clip(first + rng.integers(-1, 2, count), 0, levels - 1)
        ours = weighted_kappa(count_pairs(first.tolist(), second.tolist(), levels))
        theirs = cohen_kappa_score(first, second, weights="quadratic", labels=range(levels))
        assert float(ours) == pytest.approx(theirs, abs=1e-12)
        if levels == 2:
            assert float(ours) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_kappa_of_many_tables_is_that_of_each() -> None:
    tables = np.random.default_rng(0).integers(0, 9, (6, 4, 4)).astype(float)
    assert weighted_kappa(tables).tolist() == [float(weighted_kappa(table)) for table in tables]


def test_kappa_is_1_for_agreement_0_for_chance_and_not_defined_for_one_level() -> None:
    assert float(weighted_kappa(np.diag([3.0, 4.0, 5.0]))) == 1
    assert float(weighted_kappa(np.outer([2.0, 3.0, 5.0], [1.0, 1.0, 2.0]))) == pytest.approx(0, abs=1e-12)
    assert math.isnan(float(weighted_kappa(np.diag([0.0, 6.0, 0.0]))))


def test_readings_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        count_pairs([0, 1], [0], 2)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 1), (3, 12), (12, 12), (81, 263)])
def test_wilson_interval_is_that_of_statsmodels(successes: int, trials: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    theirs = proportion_confint(successes, trials, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 4)])
def test_a_share_above_1_is_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_five_right_of_five_has_a_p_of_2_in_32() -> None:
    assert binomial_p(5, 5) == binomial_p(0, 5) == pytest.approx(2 / 32)
    assert binomial_p(3, 6) == 1


def test_resampling_subjects_of_one_image_each_gives_quantiles_of_the_binomial() -> None:
    from scipy.stats import binom

    sums = np.array([[1.0, 1.0]] * 8 + [[0.0, 1.0]] * 12)
    found = resampled_interval(sums, lambda drawn: drawn[:, 0] / drawn[:, 1])
    assert found == pytest.approx(binom(20, 0.4).ppf([0.025, 0.975]) / 20, abs=1e-12)


def test_one_subject_has_no_interval_and_draws_without_a_value_do_not_count() -> None:
    table = np.diag([4.0, 4.0])
    assert np.isnan(resampled_interval(table[None], weighted_kappa)).all()
    one_level = np.array([[[5.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])  # the first alone is not defined
    assert resampled_interval(one_level, weighted_kappa) == (1, 1)
    assert np.isnan(resampled_interval(one_level[[0, 0]], weighted_kappa)).all()
