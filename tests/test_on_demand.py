"""What is found of many cases lies on the disk until it is asked for."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import ChiasmError
from chiasm.on_demand import OnDemand, PartOf, Scratch


def test_what_is_kept_comes_back_as_it_was_under_its_name(tmp_path: Path) -> None:
    values = {f"case{n}": np.random.default_rng(n).normal(size=(3, n + 1)) for n in range(5)}
    scratch = Scratch[np.ndarray](tmp_path)
    for name, value in values.items():
        scratch.keep(name, value)
    assert list(scratch) == list(values)
    assert len(scratch) == 5
    for name in reversed(values):
        np.testing.assert_array_equal(scratch[name], values[name])
    first = PartOf(scratch, lambda value: float(value[0, 0]))
    assert dict(first) == {name: value[0, 0] for name, value in values.items()}
    assert len(first) == 5
    with pytest.raises(KeyError):
        scratch["nobody"]


def test_memory_does_not_grow_with_what_is_kept(tmp_path: Path) -> None:
    scratch = Scratch[np.ndarray](tmp_path)
    tracemalloc.start()
    try:
        for number in range(200):
            scratch.keep(str(number), np.full(100_000, number, np.uint8))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000  # 20 MB are kept
    assert scratch["199"][0] == 199


def test_no_file_is_seen_and_none_is_left_open(tmp_path: Path) -> None:
    def opened() -> list[str]:
        targets = list[str]()
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # what others close meanwhile, and the listing itself
                targets.append(str(link.readlink()))
        return [target for target in targets if target.startswith(str(tmp_path))]

    scratch = Scratch[int](tmp_path)
    scratch.keep("a", 1)
    assert not list(tmp_path.iterdir()) and len(opened()) == 1
    del scratch
    assert not opened()


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ChiasmError, match="cannot be written") as refused:
        Scratch[int](tmp_path / "none")
    assert refused.value.path == tmp_path / "none"


def test_items_are_opened_where_they_are_looked_at_and_the_latest_stay_open() -> None:
    opened: list[str] = []

    def opener(name: str) -> Callable[[], str]:
        def open_it() -> str:
            opened.append(name)
            return name.upper()

        return open_it

    items = OnDemand({name: opener(name) for name in "abcd"}, most=2)
    assert len(items) == 4 and not opened
    assert [items[0], items[0], items[1], items[-1], items[1]] == ["A", "A", "B", "D", "B"]
    assert opened == ["a", "b", "d"]
    assert items[0] == "A" and opened[-1] == "a"  # had been closed
    assert list(items[1:3]) == ["B", "C"]
    assert list(items.only(["d", "x", "a"])) == ["D", "A"]
    with pytest.raises(IndexError):
        items[4]


def test_another_process_is_given_what_opens_the_items_and_not_what_is_open() -> None:
    items = OnDemand({"zeros": partial(np.zeros, 100_000), "ones": partial(np.ones, 3)}, most=2)
    assert items[0].size == 100_000
    content = pickle.dumps(items)
    assert len(content) < 1000
    assert pickle.loads(content)[1].tolist() == [1, 1, 1]


def test_what_is_open_closes_with_the_sequence_not_at_the_next_garbage_collection(tmp_path: Path) -> None:
    np.save(tmp_path / "voxels.npy", np.zeros(5))
    gc.disable()
    try:
        items = OnDemand({"a": partial(np.load, tmp_path / "voxels.npy", mmap_mode="r")}, most=2)
        opened = weakref.ref(items[0])
        assert opened() is items[0]
        del items
        assert opened() is None
    finally:
        gc.enable()
