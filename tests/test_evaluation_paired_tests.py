"""Tests and intervals of paired differences, against scipy, statsmodels and loops."""

from __future__ import annotations

import math
import warnings
from itertools import product

import numpy as np
import pytest
from scipy import stats

from chiasm.evaluation.paired_tests import cluster_interval, detectable, holm, mixed_model, permutation_p, wilcoxon_p

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_the_permutation_test_equals_scipys_and_a_loop(n: int) -> None:
    x = RNG.normal(0.3, 1, n)
    theirs = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert permutation_p(x) == pytest.approx(theirs.pvalue)
    loop = np.mean([abs(np.dot(s, x)) >= abs(x.sum()) - 1e-12 for s in product((1, -1), repeat=n)])
    assert permutation_p(x) == pytest.approx(loop)
    many = RNG.normal(0.2, 1, 40)
    assert permutation_p(many, draws=20_000) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_wilcoxon_equals_scipys_and_no_difference_at_all_is_none() -> None:
    x = RNG.normal(0.5, 1, 15)
    assert wilcoxon_p(x) == stats.wilcoxon(x).pvalue
    assert wilcoxon_p(np.zeros(8)) == 1.0


def test_holms_correction_equals_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    ps = RNG.random(30) ** 3
    np.testing.assert_allclose(holm(ps.tolist()), multitest.multipletests(ps, method="holm")[1])
    with_nan = holm([0.01, math.nan, 0.02])
    assert with_nan[0] == 0.02 and math.isnan(with_nan[1]) and with_nan[2] == 0.02


def test_with_one_seed_the_interval_is_scipys_bca() -> None:
    for x in (RNG.normal(size=30), RNG.exponential(size=30)):
        mine = cluster_interval(x[:, None], draws=40_000)
        theirs = stats.bootstrap((x,), np.mean, n_resamples=40_000, method="BCa", rng=0).confidence_interval
        np.testing.assert_allclose(mine, theirs, atol=0.03)


def test_seeds_that_differ_widen_the_interval_and_subjects_alone_would_not_see_it() -> None:
    table = RNG.normal(0, 0.05, (30, 1)) + RNG.normal(0, 1.0, (1, 4))
    low, high = cluster_interval(table)
    alone = cluster_interval(table.mean(axis=1, keepdims=True))
    assert high - low > 5 * (alone[1] - alone[0])


@pytest.mark.slow
def test_the_interval_covers_the_truth_nearly_as_often_as_it_says() -> None:
    covered = []
    for number in range(300):
        rng = np.random.default_rng(number)
        table = rng.normal(0, 1, (20, 1)) + rng.normal(0, 0.3, (1, 8)) + rng.normal(0, 0.5, (20, 8))
        low, high = cluster_interval(table, draws=1000)
        covered.append(low <= 0 <= high)
    assert 0.88 < np.mean(covered) < 0.99


def test_what_n_can_detect_has_the_power_it_claims() -> None:
    effect = detectable(10, 2.0)
    draws = np.random.default_rng(0).normal(effect, 2.0, (4000, 10))
    found = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("subject_sd", "seed_sd"), [(1.0, 0.5), (1.0, 0.0), (0.0, 0.0), (0.0, 0.8)])
def test_the_mixed_model_equals_statsmodels_with_crossed_random_effects(subject_sd: float, seed_sd: float) -> None:
    formula = pytest.importorskip("statsmodels.formula.api", reason="statsmodels is not installed")
    pandas = pytest.importorskip("pandas")
    draw = np.random.default_rng(3)
    table = 0.2 + draw.normal(0, subject_sd, (12, 1)) + draw.normal(0, seed_sd, (1, 5)) + draw.normal(0, 0.3, (12, 5))
    frame = pandas.DataFrame([(table[s, k], s, k, 1) for s, k in product(range(12), range(5))], columns=list("dskg"))
    parts = {"s": "0 + C(s)", "k": "0 + C(k)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a variance is 0 it warns, and its other optimisers stop short
        theirs = formula.mixedlm("d ~ 1", frame, groups="g", vc_formula=parts, re_formula="0").fit(method="powell")
    error, p = mixed_model(table)
    assert error == pytest.approx(theirs.bse_fe["Intercept"], rel=0.01)
    assert 0 <= p <= 1


def test_with_one_seed_the_mixed_model_is_the_paired_t_test() -> None:
    x = RNG.normal(0.4, 1, 14)
    assert mixed_model(x[:, None])[1] == pytest.approx(stats.ttest_1samp(x, 0).pvalue)


def test_the_mixed_model_holds_its_level_where_seeds_differ_and_wilcoxon_does_not() -> None:
    false = {"mixed": 0, "wilcoxon": 0}
    for number in range(300):
        draw = np.random.default_rng(number)
        table = draw.normal(0, 0.3, (20, 1)) + draw.normal(0, 0.5, (1, 5)) + draw.normal(0, 0.3, (20, 5))
        false["mixed"] += mixed_model(table)[1] < 0.05
        false["wilcoxon"] += wilcoxon_p(table.mean(axis=1)) < 0.05
    assert false["mixed"] / 300 < 0.09 and false["wilcoxon"] / 300 > 0.3


def test_no_spread_at_all_is_no_crash() -> None:
    assert mixed_model(np.zeros((6, 3))) == (0.0, 1.0)
    assert mixed_model(np.ones((6, 3)))[1] == 0.0
