"""Statistics of paired comparisons, against scipy, statsmodels and loops."""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from chiasm.errors import CohortError
from chiasm.evaluation.rows import Row
from chiasm.evaluation.statistics import (
    Declared,
    _holm,
    cluster_interval,
    compare_methods,
    detectable,
    mixed_model,
    permutation_p,
    stays_within,
    summarise_methods,
    wilcoxon_p,
    write_table,
)

RNG = np.random.default_rng(0)


def rows(
    effect: float, n: int = 12, seeds: int = 3, seed_sd: float = 0.0, noise: float = 0.02, rng: int = 0
) -> list[Row]:
    """Arm A7 is `effect` above A6b; subjects differ much, seeds by `seed_sd`."""
    draw = np.random.default_rng(rng)
    subject, shift = draw.normal(1.0, 0.3, n), draw.normal(0, seed_sd, (2, seeds))
    found = []
    for s, k in product(range(n), range(seeds)):
        for index, (arm, extra) in enumerate((("A6b", 0.0), ("A7", effect))):
            value = subject[s] + extra + shift[index, k] + draw.normal(0, noise)
            found.append(Row(f"c{s}", 0, k, arm, "WT", "mae", float(value), "SD", "chiasm"))
    return found


def compared(found: list[Row], **options: object):  # type: ignore[no-untyped-def]
    return compare_methods(found, [("A7", "A6b")], metrics=["mae"], regions=["WT"], **options)  # type: ignore[arg-type]


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
    np.testing.assert_allclose(_holm(ps.tolist()), multitest.multipletests(ps, method="holm")[1])
    with_nan = _holm([0.01, math.nan, 0.02])
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


def test_a_true_difference_is_found_and_told_with_its_interval() -> None:
    (one,) = compared(rows(-0.1), declared=[Declared("A7", "A6b", "WT", "mae")])
    assert one.primary and one.subjects == 12 and one.seeds == 3 and one.seeds_lower == 3
    assert one.low < -0.1 < one.high < 0 and one.p_holm == one.p_permutation < 0.01
    assert one.difference == pytest.approx(-0.1, abs=0.02) and one.effect < -3
    assert "better" in one.verdict and "primary" in one.verdict and "3 of 3 seeds" in one.verdict
    (worse,) = compared(rows(+0.1))
    assert "worse" in worse.verdict and "exploratory" in worse.verdict


def test_no_difference_is_said_plainly_with_what_n_could_have_shown() -> None:
    (one,) = compared(rows(0.0, seed_sd=0.1))
    assert one.p_permutation < 0.01  # over subjects alone the seeds' disagreement looks like a finding
    assert one.low < 0 < one.high and "no difference shown" in one.verdict and "would show" in one.verdict


def test_five_subjects_are_not_tested() -> None:
    (one,) = compared(rows(-0.5, n=5))
    assert math.isnan(one.p_permutation) and math.isnan(one.p_holm) and "too few" in one.verdict


def test_cases_of_one_subject_count_once() -> None:
    found = rows(-0.1, n=12)
    (one,) = compared(found, subjects={f"c{n}": f"s{n // 2}" for n in range(12)})
    assert one.subjects == 6


def test_arms_scored_on_other_cases_are_refused_by_name() -> None:
    with pytest.raises(CohortError, match="c11 with seed 2") as caught:
        compared([row for row in rows(0.0) if (row.method, row.case, row.seed) != ("A7", "c11", 2)])
    assert caught.value.reason == "unequal-cohorts"


def test_a_family_of_exploratory_comparisons_is_corrected_and_the_primary_is_not() -> None:
    found = [
        Row(row.case, row.fold, row.seed, row.method, region, row.metric, row.value, row.unit, row.convention)
        for region in ("WT", "TC", "healthy")
        for row in rows(-0.02, noise=0.03)
    ]
    done = compare_methods(
        found,
        [("A7", "A6b")],
        metrics=["mae"],
        regions=["WT", "TC", "healthy"],
        declared=[Declared("A7", "A6b", "TC", "mae")],
    )
    assert [one.region for one in done] == ["TC", "WT", "healthy"]
    assert done[0].p_holm == done[0].p_permutation
    assert done[1].p_holm == pytest.approx(min(1, 2 * done[1].p_permutation))


def test_statistics_are_written_a_row_each(tmp_path: Path) -> None:
    write_table(tmp_path / "statistics.csv", compared(rows(-0.1)))
    with (tmp_path / "statistics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["arm"] == "A7" and float(row["difference"]) < 0 and "better" in row["verdict"]


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


def test_each_seeds_difference_stands_beside_the_mean(tmp_path: Path) -> None:
    (one,) = compared(rows(-0.1, seed_sd=0.2))
    assert np.mean(one.by_seed) == pytest.approx(one.difference) and len(one.by_seed) == 3
    assert one.mean - one.mean_against == pytest.approx(one.difference)
    write_table(tmp_path / "statistics.csv", [one])
    with (tmp_path / "statistics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert tuple(map(float, row["by_seed"].split())) == one.by_seed


def test_not_worse_is_only_said_where_the_whole_interval_says_so() -> None:
    (same,) = compared(rows(0.0, noise=0.005))
    assert "not worse by more than 2 %" in stays_within(same, 2.0)
    (worse,) = compared(rows(0.05, noise=0.005))
    assert "not shown to stay within 2 %" in stays_within(worse, 2.0)
    better = replace(worse, metric="ssim")  # more is better: the same rise is no harm
    assert "not worse by more than 2 %" in stays_within(better, 2.0)


def test_a_summary_gives_spread_over_subjects_and_over_seeds_apart() -> None:
    found = [Row(f"c{s}", 0, k, "A7", "WT", "mae", s + 10.0 * k, "SD", "chiasm") for s in range(4) for k in range(3)]
    (one,) = summarise_methods(found, metrics=["mae"], regions=["WT"])
    assert (one.subjects, one.seeds, one.mean) == (4, 3, 11.5)
    assert one.sd_subjects == pytest.approx(np.std(range(4), ddof=1)) and one.sd_seeds == pytest.approx(10.0)
    (alone,) = summarise_methods(found[:1], metrics=["mae"], regions=["WT"])
    assert math.isnan(alone.sd_subjects) and math.isnan(alone.sd_seeds)
