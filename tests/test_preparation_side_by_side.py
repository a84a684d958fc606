"""Cases that are worked on side by side: the same results in the same order as one after another, and no more begun."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

from chiasm import checksums
from chiasm.errors import ChiasmError
from chiasm.preparation import side_by_side
from chiasm.preparation.arrays import prepare_cohort
from chiasm.preparation.examination import examine_cohort
from chiasm.preparation.side_by_side import in_threads, spare_threads
from chiasm.recipe import Data
from synthetic_cohort import PLAN, write_cohort

DATA = Data(sources=("t1",), target="t2")


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "spare_threads", lambda: 3)


def test_threads_find_and_prepare_the_same_to_the_bit_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = write_cohort(tmp_path / "data", 7)
    for number in (0, 4):
        cohort.cases[number].images["t2"].write_bytes(b"no image")
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", 3600.0)  # so that it is examined twice
    found: list[list[bytes]] = []
    for threads in (1, 3):
        monkeypatch.setattr(side_by_side, "spare_threads", lambda threads=threads: threads)
        examined = examine_cohort(cohort, DATA, tmp_path)
        assert list(examined.cases) == [case.id for case in examined.cohort.cases]
        cache = tmp_path / f"cache{threads}"
        prepared, problems = prepare_cohort(cohort.cases, PLAN, cache)
        assert [problem.case for problem in problems] == ["case00", "case04"]
        files = [path.relative_to(cache).as_posix().encode() + path.read_bytes() for path in sorted(cache.rglob("*.*"))]
        rest = [pickle.dumps(one) for one in (*examined.cases.values(), examined.problems, problems)]
        found.append([*rest, *files, *(case.id.encode() for case in prepared)])
    assert len(found[0]) > 7 + 5 * 4 and found[0] == found[1]


@pytest.mark.usefixtures("three_threads")
def test_outcomes_come_in_order_although_later_items_are_done_first() -> None:
    gate, names = threading.Event(), set[str]()

    def work(item: int) -> int:
        names.add(threading.current_thread().name)
        if item == 1:
            assert gate.wait(20)  # until the next item is done, by another thread
        if item == 2:
            gate.set()
        return item * item

    assert list(in_threads(range(40), work)) == [item * item for item in range(40)]
    assert names - {"MainThread"}
    assert list(in_threads([], work)) == []


@pytest.mark.usefixtures("three_threads")
def test_an_error_comes_in_its_turn_and_little_is_begun_ahead() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ChiasmError("the disk is full", reason="unwritable")
        return item

    outcomes = in_threads(range(1000), work)
    assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ChiasmError, match="disk is full"):
        next(outcomes)
    assert 3 in begun and len(begun) <= 3 + 2 * 3 + 1


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
def test_when_it_is_stopped_what_was_begun_is_finished_and_nothing_else_begins(stopped: type[BaseException]) -> None:
    begun, ended = list[int](), list[int]()

    def work(item: int) -> None:
        begun.append(item)
        threading.Event().wait(0.001)
        ended.append(item)

    outcomes = in_threads(range(1000), work)
    next(outcomes), next(outcomes)
    with pytest.raises(stopped):
        outcomes.throw(stopped())
    assert sorted(begun) == sorted(ended) and len(begun) < 20
    assert not [one for one in threading.enumerate() if one.name.startswith("chiasm-case")]


def test_threads_are_as_many_as_products_of_numpy_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "cores_allowed", lambda: 64)
    with threadpool_limits(1):  # as a job of a study works
        assert spare_threads() == 1
    with threadpool_limits(2):
        assert spare_threads() == 2
        monkeypatch.setattr(side_by_side, "cores_allowed", lambda: 1)
        assert spare_threads() == 1


@pytest.mark.parametrize(("available", "at_once"), [(1.9, 1), (2.1, 2), (4.1, 3)])
def test_fewer_threads_work_where_memory_is_short(
    available: float, at_once: int, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "peak_bytes", lambda: 2.0**30)
    monkeypatch.setattr(side_by_side, "available_bytes", lambda: available * 2.0**30)
    threads = set[int]()
    gate = threading.Barrier(at_once)

    def work(item: int) -> None:
        if item:
            threads.add(threading.get_ident())
            gate.wait(20)

    list(in_threads(range(1 + 2 * at_once), work))
    assert len(threads) == at_once
