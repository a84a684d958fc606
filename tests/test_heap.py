"""Memory that arrays have left goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from chiasm.heap import give_back, give_back_mapped


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be asked")
def test_gaps_between_arrays_go_back_to_the_system() -> None:
    kept = [np.ones(2**14) for _ in range(1600)]  # 128 KiB each, too small to lie outside the heap for good
    kept = kept[::2]
    before = resident()
    assert give_back()
    assert resident() < before - 50 and len(kept) == 800
    assert give_back() and (kept[-1] == 1).all()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not give_back()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts mapped pages so")
def test_pages_of_a_mapped_file_go_back_and_are_read_again(tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.ones(2**23, np.float32))  # 32 MiB
    mapped = np.load(tmp_path / "large.npy", mmap_mode="r")
    assert mapped.sum() == 2**23
    before = resident()
    assert give_back_mapped(mapped)
    assert resident() < before - 25
    assert mapped[-1] == 1 and mapped.sum() == 2**23


def test_an_array_in_memory_is_left_alone() -> None:
    assert not give_back_mapped(np.ones(3))
