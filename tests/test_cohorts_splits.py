"""Splits: whole persons, even over sites, the same whatever the order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.cohorts.cases import Case
from chiasm.cohorts.duplicates import find_duplicates, voxel_hash
from chiasm.cohorts.splits import (
    Split,
    check_disjoint,
    check_same_split,
    choose_folds,
    leave_one_site_out,
    make_split,
    read_splits,
    sites_of,
    with_fewer_training,
    write_splits,
)
from chiasm.errors import CohortError, RunError

FILE = {"t1": Path("t1.nii.gz")}


def case(name: str, subject: str | None = None, site: str | None = None, split: str | None = None) -> Case:
    return Case(name, subject or name, FILE, site=site, split=split)


@st.composite
def cohorts(draw: st.DrawFn, least: int = 1) -> list[Case]:
    """Subjects with one to three examinations each, at up to three sites or none."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["A", "B", "C", None])), min_size=least))
    return [
        case(f"p{person}-{visit}", f"p{person}", site)
        for person, (visits, site) in enumerate(sizes)
        for visit in range(visits)
    ]


def subjects(cases: list[Case], ids: tuple[str, ...]) -> set[str]:
    return {c.subject for c in cases if c.id in ids}


@pytest.mark.parametrize(
    ("subjects", "folds", "roles"),
    [
        (2, 2, (1, 0, 1)),
        (3, 3, (1, 1, 1)),
        (6, 6, (4, 1, 1)),
        (9, 9, (6, 2, 1)),
        (10, 5, (6, 2, 2)),
        (30, 5, (19, 5, 6)),
    ],
)
def test_few_subjects_are_tested_one_by_one_so_that_most_of_them_train(
    subjects: int, folds: int, roles: tuple[int, int, int]
) -> None:
    """With five folds of six subjects two would test and three train."""
    cases = [case(f"p{number:02d}") for number in range(subjects)]
    split = make_split(cases, folds="auto", fold=0, validation=0.2, seed=0)
    assert tuple(map(len, (split.train, split.validation, split.test))) == roles
    assert choose_folds("auto", subjects) == folds
    assert split == make_split(cases, folds=folds, fold=0, validation=0.2, seed=0)
    with pytest.raises(CohortError, match=rf"fold {folds} does not exist among {folds} folds"):
        make_split(cases, folds="auto", fold=folds, validation=0.2, seed=0)


def test_a_locked_test_set_is_not_counted_among_the_subjects_of_folds() -> None:
    cases = [case(f"p{number}") for number in range(6)]
    split = make_split(cases, folds="auto", fold=0, validation=0.2, seed=0, locked=0.2)
    assert tuple(map(len, (split.train, split.validation, split.test, split.locked))) == (3, 1, 1, 1)


@settings(deadline=None)
@given(cohorts(least=6), st.integers(2, 6), st.integers(0, 9), st.floats(0, 1))
def test_every_subject_is_tested_in_exactly_one_fold_and_never_has_two_roles(
    cases: list[Case], folds: int, seed: int, share: float
) -> None:
    tested: list[str] = []
    for fold in range(folds):
        split = make_split(cases, folds=folds, fold=fold, validation=share, seed=seed)
        roles = [subjects(cases, ids) for ids in (split.train, split.validation, split.test)]
        assert sorted((*split.train, *split.validation, *split.test)) == sorted(c.id for c in cases)
        assert sum(map(len, roles)) == len(set.union(*roles)) == len({c.subject for c in cases})
        assert roles[0] and roles[2]
        assert bool(roles[1]) == (share > 0) or len(roles[0]) < 2, "one validates where two remain, if any is to"
        tested += roles[2]
    assert sorted(tested) == sorted({c.subject for c in cases})


def test_fewer_subjects_train_on_demand_and_more_of_them_add_to_fewer() -> None:
    cases = [case(f"p{number}-{scan}", f"p{number}") for number in range(10) for scan in range(2)]
    whole = make_split(cases, folds=5, fold=0, validation=0.25, seed=0)
    assert with_fewer_training(whole, cases, 0, 0) == whole
    trained: set[str] = set()
    for count in range(1, 7):
        split = with_fewer_training(whole, cases, count, 0)
        assert (split.validation, split.test) == (whole.validation, whole.test)
        assert len(subjects(cases, split.train)) == count and len(split.train) == 2 * count
        assert trained < set(split.train) <= set(whole.train)
        trained = set(split.train)
    with pytest.raises(CohortError, match=r"training_subjects=7 asks .*found 6.*at most 6 can train"):
        with_fewer_training(whole, cases, 7, 0)


@settings(deadline=None)
@given(cohorts(least=6), st.integers(2, 6), st.integers(0, 9), st.floats(0.05, 0.9))
def test_each_site_is_spread_over_the_folds_and_the_validation_set_within_one_subject(
    cases: list[Case], folds: int, seed: int, share: float
) -> None:
    persons = {c.subject: c.site for c in cases}
    splits = [make_split(cases, folds=folds, fold=fold, validation=share, seed=seed) for fold in range(folds)]
    for site in set(persons.values()):
        counts = [sum(persons[s] == site for s in subjects(cases, split.test)) for split in splits]
        assert max(counts) - min(counts) <= 1
        for split in splits:
            validating, training = subjects(cases, split.validation), subjects(cases, split.train)
            of_site = sum(persons[s] == site for s in validating | training)
            fair = of_site * len(validating) / len(validating | training)
            assert abs(sum(persons[s] == site for s in validating) - fair) < 1 + 1e-9


@settings(deadline=None)
@given(cohorts(least=3), st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_cases(cases: list[Case], random: object) -> None:
    shuffled = list(cases)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    options = {"folds": 3, "fold": 1, "validation": 0.3, "seed": 4}
    assert make_split(cases, **options) == make_split(iter(shuffled), **options)


def test_a_split_is_the_one_it_was_when_this_was_written() -> None:
    cases = [case(f"c{i}", site="A" if i < 5 else "B") for i in range(10)]
    split = make_split(cases, folds=5, fold=0, validation=0.25, seed=0)
    # The order within a site is that of sha256("seed/subject"), worked out here again by hand.
    order = sorted(range(10), key=lambda i: (i >= 5, hashlib.sha256(f"0/c{i}".encode()).hexdigest()))
    assert split.test == tuple(sorted(f"c{i}" for i in order[::5]))
    rest = [i for i in order if i not in order[::5]]
    # 8 subjects, 2 validate: positions 2 and 6, one of each site
    assert split.validation == tuple(sorted(f"c{rest[place]}" for place in (2, 6)))


def test_another_seed_gives_another_split() -> None:
    cases = [case(f"c{i}") for i in range(12)]
    tested = {make_split(cases, folds=4, fold=0, validation=0.2, seed=seed).test for seed in range(10)}
    assert len(tested) > 5


def test_scikit_learn_finds_our_folds_as_well_stratified_as_its_own() -> None:
    from sklearn.model_selection import StratifiedKFold

    cases = [case(f"c{i}", site="ABC"[i % 7 % 3]) for i in range(31)]
    sites = np.array([c.site for c in cases])

    def spread(tested: list[np.ndarray]) -> int:
        return max(np.ptp([np.sum(sites[t] == site) for t in tested]) for site in "ABC")

    theirs = [test for _, test in StratifiedKFold(4).split(sites, sites)]
    number = {c.id: i for i, c in enumerate(cases)}
    splits = [make_split(cases, folds=4, fold=fold, validation=0.2, seed=0) for fold in range(4)]
    ours = [np.array([number[name] for name in split.test]) for split in splits]
    assert spread(ours) <= spread(theirs) <= 1
    assert sorted(map(len, ours)) == sorted(map(len, theirs))


def test_one_fold_tests_nobody_and_one_subject_only_trains() -> None:
    split = make_split([case("a"), case("b"), case("c")], folds=1, fold=0, validation=0.1, seed=0)
    assert (len(split.train), len(split.validation), len(split.test)) == (2, 1, 0)
    assert make_split([case("a")], folds=1, fold=0, validation=0.5, seed=0) == Split(("a",), (), ())


def test_all_train_where_nobody_is_to_be_tested_or_to_validate() -> None:
    cases = [case(name) for name in "abcdef"]
    assert make_split(cases, folds=1, fold=0, validation=0.0, seed=0) == Split(tuple("abcdef"), (), ())
    tested = make_split(cases, folds=6, fold=2, validation=0.0, seed=0)
    assert (len(tested.train), len(tested.validation), len(tested.test)) == (5, 0, 1)


def test_sessions_of_one_subject_stay_together() -> None:
    cases = [case(f"BraTS-GLI-{p:05}-{t:03}", f"BraTS-GLI-{p:05}") for p in range(6) for t in range(3)]
    for fold in range(3):
        split = make_split(cases, folds=3, fold=fold, validation=0.2, seed=1)
        for ids in (split.train, split.validation, split.test):
            assert set(Counter(name[:-4] for name in ids).values()) <= {3}


def test_a_manifest_split_stands_and_takes_the_subject_s_other_cases_along() -> None:
    fixed = [case("a", split="test"), case("b", split="validation"), case("b2", "b"), case("c", split="train")]
    free = [case(f"f{i}") for i in range(9)]
    for fold in range(3):
        split = make_split([*fixed, *free], folds=3, fold=fold, validation=0.5, seed=0)
        assert split.test == ("a",)
        assert split.validation == ("b", "b2")
        assert "c" in split.train and len(split.train) == 10


def test_cases_fixed_to_train_are_never_tested_nor_validating() -> None:
    cases = [case("fixed", split="train"), *(case(f"f{i}") for i in range(4))]
    splits = [make_split(cases, folds=2, fold=fold, validation=0.9, seed=0) for fold in range(2)]
    assert all("fixed" in split.train for split in splits)
    assert sorted(splits[0].test + splits[1].test) == ["f0", "f1", "f2", "f3"]
    assert all(len(split.validation) == 2 for split in splits), "all free ones may validate: one trains already"


@pytest.mark.parametrize(
    ("cases", "folds", "reason"),
    [
        ([case("a"), case("b")], 3, "too-few-subjects"),
        ([case("a", "p"), case("b", "p"), case("c", "p")], 2, "too-few-subjects"),
        ([case("a", split="test")], 1, "too-few-subjects"),
        ([], 1, "too-few-subjects"),
        ([case("a", "p", split="test"), case("b", "p", split="train")], 1, "split"),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(cases: list[Case], folds: int, reason: str) -> None:
    with pytest.raises(CohortError) as refused:
        make_split(cases, folds=folds, fold=0, validation=0.2, seed=0)
    assert refused.value.reason == reason


def test_too_few_subjects_says_how_many_there_are_and_what_to_do() -> None:
    with pytest.raises(
        CohortError,
        match=r"5 folds need at least 5 subjects \(found 2: a, b\). Use chiasm train or chiasm",
    ):
        make_split([case("b"), case("a")], folds=5, fold=0, validation=0.2, seed=0)


@pytest.mark.parametrize(
    "options", [{"folds": 2, "fold": 2, "validation": 0.2}, {"folds": 1, "fold": 0, "validation": 2}]
)
def test_a_fold_or_share_that_does_not_exist_is_a_programmer_s_mistake(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        make_split([case("a"), case("b")], seed=0, **options)  # type: ignore[arg-type]


def test_leaving_one_site_out_tests_all_of_it_and_trains_on_none_of_it() -> None:
    cases = [case(f"{site}{i}", site=site) for site in "ABC" for i in range(4)] + [case("A-again", "B0", "A")]
    split = leave_one_site_out(cases, "B", validation=0.25)
    assert split.test == ("A-again", "B0", "B1", "B2", "B3"), "a person seen at two sites is tested"
    assert {name[0] for name in split.validation} == {"A", "C"}
    with pytest.raises(CohortError, match=r"no case is of site 'D' \(found A \(5\), B \(4\), C \(4\)\)"):
        leave_one_site_out(cases, "D")
    with pytest.raises(CohortError, match="no subject is left to train on"):
        leave_one_site_out([case("a", site="A")], "A")


def test_a_voxel_hash_tells_values_and_shape_and_not_their_storage() -> None:
    scan = np.random.default_rng(0).integers(-1000, 3000, (4, 5, 6)).astype(np.int16)
    scan[0, 0, :3] = 0
    same = [scan.astype(kind) for kind in ("<f8", ">f4", ">i2", np.int64)]
    same += [np.asfortranarray(scan), np.repeat(scan, 2, axis=0)[::2], np.where(scan == 0, -0.0, scan)]
    assert {voxel_hash(array) for array in same} == {voxel_hash(scan)}
    changed = scan.copy()
    changed[1, 2, 3] += 1
    others = [changed, scan.reshape(5, 4, 6), scan[::-1], scan[:-1]]
    assert voxel_hash(scan) not in {voxel_hash(array) for array in others}


def test_a_voxel_hash_is_sha256_of_shape_and_little_endian_float32() -> None:
    by_hand = hashlib.sha256(b"(2,)" + bytes.fromhex("0000803f00000040"))  # 1.0 and 2.0
    assert voxel_hash(np.array([1, 2], np.uint8)) == by_hand.hexdigest()


def test_the_same_scan_under_another_subject_is_found_and_a_second_visit_is_not() -> None:
    cases = [case("a", "p1"), case("b", "p2"), case("c", "p1"), case("d", "p3"), case("e", "p4")]
    hashes = {"a": "x", "b": "x", "c": "x", "d": "y"}
    assert find_duplicates(hashes, cases) == [("a", "b"), ("b", "c")]


def test_a_split_is_read_as_it_was_written(tmp_path: Path) -> None:
    cases = [case("a", "p1", "Guys"), case("b", "p2"), case("c", "p3"), case("left-out", "p4")]
    split = Split(("a",), ("b",), ("c",))
    write_splits(tmp_path / "splits.json", split, {"a": "1", "b": "2"}, cases)
    content = json.loads((tmp_path / "splits.json").read_text())
    assert content["train"] == ["a"] and "left-out" not in content["cases"]
    record = read_splits(tmp_path / "splits.json")
    assert record.split == split
    assert record.subjects == {"a": "p1", "b": "p2", "c": "p3"}
    assert record.sites == {"a": "Guys", "b": None, "c": None}
    assert record.hashes == {"a": "1", "b": "2"}


def test_a_leaking_split_can_be_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    cases = [case("a", "p1"), case("b", "p2")]
    split = Split(("a",), (), ("b",))
    with pytest.raises(CohortError, match="test case b is of the same subject as train case a"):
        write_splits(path, split, {}, [cases[0], replace(cases[1], subject="p1")])
    with pytest.raises(CohortError, match="test case b has the same voxels as train case a"):
        write_splits(path, split, {"a": "x", "b": "x"}, cases)
    assert not path.exists()
    with pytest.raises(CohortError, match="case a stands twice"):
        check_disjoint(Split(("a",), ("a",), ()), {})
    write_splits(path, split, {}, cases)
    path.write_text(path.read_text().replace('"p2"', '"p1"'))
    with pytest.raises(CohortError, match="same subject"):
        read_splits(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"train": []}', '{"train": [], "validation": [], "test": [], "cases": [1]}']
)
def test_a_damaged_split_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(RunError, match="In a run folder, delete it"):
        read_splits(tmp_path / "splits.json")


@settings(deadline=None)
@given(cohorts(least=8), st.integers(2, 3), st.floats(0.01, 0.5))
def test_sealed_subjects_are_the_same_in_every_fold_and_play_no_other_part(
    cases: list[Case], folds: int, share: float
) -> None:
    splits = [make_split(cases, folds=folds, fold=fold, validation=0.2, seed=0, locked=share) for fold in range(folds)]
    assert len({split.locked for split in splits}) == 1 and splits[0].locked
    kept = subjects(cases, splits[0].locked)
    assert abs(len(kept) - share * len({c.subject for c in cases})) <= 1
    for split in splits:
        others = subjects(cases, (*split.train, *split.validation, *split.test))
        assert kept.isdisjoint(others) and kept | others == {c.subject for c in cases}


def test_sealed_cases_are_written_and_read_back(tmp_path: Path) -> None:
    cases = [case(f"p{n}", site="AB"[n % 2]) for n in range(10)]
    split = make_split(cases, folds=2, fold=0, validation=0.2, seed=0, locked=0.2)
    write_splits(tmp_path / "splits.json", split, {}, cases)
    assert read_splits(tmp_path / "splits.json").split == split and len(split.locked) == 2
    assert {c.site for c in cases if c.id in split.locked} == {"A", "B"}  # every site gives some


def test_nobody_can_be_locked_where_all_roles_are_given() -> None:
    cases = [replace(case(f"p{n}"), split=role) for n, role in enumerate(["train", "train", "validation", "test"])]
    with pytest.raises(CohortError, match="no subject is left for the locked test set"):
        make_split(cases, folds=1, fold=0, validation=0.2, seed=0, locked=0.2)


def test_folds_by_site_need_a_site_for_everyone_and_two_of_them() -> None:
    assert sites_of([case("a", site="Y"), case("b", site="X"), case("c", site="Y")]) == ["X", "Y"]
    with pytest.raises(CohortError, match="1 cases have no site, the first is b"):
        sites_of([case("a", site="X"), case("b")])
    with pytest.raises(CohortError, match="two sites"):
        sites_of([case("a", site="X"), case("b", site="X")])
    cases = [case(f"p{n}", site="AB"[n % 2]) for n in range(10)]
    split = leave_one_site_out(cases, "A", locked=0.2)
    assert split.locked and not subjects(cases, split.locked) & subjects(cases, split.test)


def test_a_split_of_other_cases_is_refused_by_the_names_of_those_that_differ(tmp_path: Path) -> None:
    path, before = tmp_path / "splits.json", Split(("a", "b"), ("c",), ("d",))
    check_same_split(path, before)  # nothing is there
    write_splits(path, before, {}, [case(name) for name in "abcd"])
    check_same_split(path, before)
    with pytest.raises(RunError, match="other cases than the data folder now holds") as refused:
        check_same_split(path, Split(("a", "e"), ("b",), ("d",)))
    assert refused.value.found == "without c, with e in addition"
    with pytest.raises(RunError) as refused:
        check_same_split(path, Split(("b", "c"), ("a",), ("d",)))
    assert refused.value.found == "the same cases in other roles"
