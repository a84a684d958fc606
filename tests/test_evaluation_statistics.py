"""Comparisons of methods in pairs: what is found, what is refused, and how it is told."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import CohortError
from chiasm.evaluation.rows import Row
from chiasm.evaluation.statistics import (
    Declared,
    compare_methods,
    stays_within,
    summarise_methods,
    write_table,
)


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
    assert one.low < 0 < one.high and "no difference above 1 % is shown" in one.verdict and "would show" in one.verdict


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
