"""`benchmarks/donated_discriminators.py`: nobody is tested from whom a donor or a receiver learnt."""

import sys
from itertools import chain, combinations
from pathlib import Path

import pytest

from chiasm.cohorts.cases import Case, Cohort

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from donated_discriminators import DONORS, divide, receivers_of

SITES = ("east", "west", "north", "south")


def _cohort(count: int) -> Cohort:
    cases = tuple(Case(f"P{n:03}", f"P{n:03}", {}, site=SITES[n % 4]) for n in range(count))
    return Cohort(Path("patients"), "phantom", cases)


def test_patients_who_teach_are_never_tested_and_each_seed_has_others():
    giving, others = divide(_cohort(200))
    assert {case.site for case in giving.cases} == set(DONORS)
    received = [receivers_of(others, seed).cases for seed in range(5)]
    assert {case.site for case in chain(*received)}.isdisjoint(DONORS)
    taught = [{case.id for case in cases if case.split != "test"} for cases in received]
    tested = [{case.id for case in cases if case.split == "test"} for cases in received]
    assert all(one == tested[0] and len(one) == 28 for one in tested)
    assert all(len(one) == 10 and one.isdisjoint(tested[0]) for one in taught)
    assert all(one.isdisjoint(other) for one, other in combinations(taught, 2))


def test_a_seed_for_which_there_are_too_few_patients_is_refused():
    _, others = divide(_cohort(160))  # 28 are tested, 52 are left
    with pytest.raises(SystemExit, match="too few patients of other hospitals than east and west"):
        receivers_of(others, 5)
