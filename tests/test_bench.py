"""The benchmark: turns, equality before speed, peers that are missing, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from chiasm.bench import files, scores
from chiasm.bench.measuring import measure_peak, take_turns
from chiasm.bench.rows import QUICK, BenchRow, BenchSetting, TimedPair, find_rows, measure_row
from chiasm.bench.subjects import BRAIN_SHARE, draw_pictures
from chiasm.bench.table import ROWS, describe_row, to_markdown
from chiasm.cli import main
from chiasm.errors import ChiasmError

SMALL = (40, 44, 36)


@pytest.fixture
def setting(tmp_path: Path) -> BenchSetting:
    return BenchSetting(SMALL, tmp_path, "32-true", {"32-true": 1e9, "bf16-mixed": 1e9})


class Worker:
    """Work that takes the seconds of a list, one after the other, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def work(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()
            self.order += name

        return run


def test_two_ways_are_timed_in_turns_and_compared_by_the_median_of_their_ratios() -> None:
    worker, ours, peers = Worker(), iter([9, 1, 2, 1]), iter([9, 4, 6, 9])
    turns = take_turns(
        worker.work("o", lambda: next(ours)),
        worker.work("p", lambda: next(peers)),
        rounds=3,
        seconds=100,
        clock=lambda: worker.now,
    )
    assert worker.order == "op" * 4  # once each without a clock
    assert turns.ratio == 4  # of 4, 3 and 9
    assert turns.ours == (1, 1, 2) and turns.peer == (4, 6, 9)


def test_short_work_is_repeated_until_the_clock_can_see_it() -> None:
    worker = Worker()
    turns = take_turns(
        worker.work("o", lambda: 0.0015), worker.work("p", lambda: 0.015), rounds=3, seconds=1, clock=lambda: worker.now
    )
    assert worker.order.count("o") == 1 + 3 * 14 and worker.order.count("p") == 1 + 3 * 2
    assert turns.ratio == pytest.approx(10)


def test_no_further_turn_begins_after_the_time_is_up() -> None:
    worker = Worker()
    take_turns(worker.work("o", lambda: 1), worker.work("p", lambda: 1), rounds=50, seconds=8, clock=lambda: worker.now)
    assert worker.order.count("o") == 1 + 5


def test_a_median_of_two_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        take_turns(int, int, rounds=2, seconds=1)


def row_of(ours: float, peer: float, needs: tuple[str, ...] = ()) -> BenchRow:
    def make(_: BenchSetting) -> TimedPair:
        return TimedPair(lambda: ours, lambda: peer, lambda a, b: abs(a - b), 0.1, operations=1e3)

    return BenchRow("toy", "a number", "another", 0.0, 1.0, make, needs)


def test_a_row_whose_results_differ_is_wrong_and_has_no_ratio(setting: BenchSetting) -> None:
    for peer in (2.0, np.nan):
        measured = measure_row(row_of(1.0, peer), setting, rounds=3, seconds=1)
        assert measured.verdict == "wrong" and measured.ratio is None and "differ by" in measured.reason


def test_a_row_whose_results_agree_is_timed_and_told_as_a_fraction_of_the_peak(setting: BenchSetting) -> None:
    measured = measure_row(row_of(1.0, 1.05), setting, rounds=3, seconds=0.1)
    assert measured.ratio and measured.verdict == "met" and measured.fraction
    assert measured.fraction == pytest.approx(1e3 / 1e9 / measured.to_dict()["chiasm_cpu_s"]["median"])
    assert measure_row(row_of(1, 1), setting._replace(shape=QUICK), rounds=3, seconds=0.1).goal == 1.0


def test_a_row_without_its_peer_says_which_package_is_missing(setting: BenchSetting) -> None:
    measured = measure_row(row_of(1, 1, ("numpy", "no_such_package")), setting, rounds=3, seconds=1)
    assert measured.verdict == "not measured" and "no_such_package not installed" in measured.reason
    assert "no_such_package" in describe_row(measured) and measured.to_dict()["ratio"] is None


COMPILED = "predict-3d-best"  # `test_prediction_compiled.py` compares a compiled network with torch
AGREEING = [pytest.param(row, id=row.name, marks=[pytest.mark.long] * (row.name == COMPILED)) for row in ROWS]


@pytest.mark.parametrize("row", AGREEING)
def test_chiasm_and_each_peer_agree(row: BenchRow, setting: BenchSetting) -> None:
    for name in row.needs:
        pytest.importorskip(name)
    pair = row.make(setting)
    assert pair.difference(pair.ours(), pair.peer()) <= pair.tolerance


def test_a_wrong_result_would_be_found(setting: BenchSetting) -> None:
    for row in (*files.ROWS[:1], *scores.ROWS[:1]):
        pair = row.make(setting)
        assert pair.difference(pair.ours(), pair.peer() * 1.01) > pair.tolerance


def test_the_drawn_pair_fills_as_much_as_a_brain_and_has_two_contrasts() -> None:
    pictures = draw_pictures((60, 50, 40))
    assert pictures.mask.mean() == pytest.approx(BRAIN_SHARE, rel=0.1)
    assert ((pictures.source > 0) == pictures.mask).all() and ((pictures.target > 0) == pictures.mask).all()
    inside = np.stack([pictures.source[pictures.mask], pictures.target[pictures.mask]])
    assert np.corrcoef(inside)[0, 1] < -0.5


def test_the_peak_is_that_of_many_operations_a_second() -> None:
    assert 1e9 < measure_peak("32-true") < 1e13


def test_the_command_writes_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, page = tmp_path / "rows.json", tmp_path / "speed.md"
    page.write_text("a table of before\n\n## Whole commands\nwritten by hand\n")
    with pytest.raises(SystemExit) as end:
        main(["bench", "--quick", "--row", "read-nifti", "--json", str(found), "--markdown", str(page)])
    assert end.value.code in (0, None)
    (row,) = json.loads(found.read_text())
    assert {"name", "ratio", "goal", "peer"} <= row.keys() and row["name"] == "read-nifti" and row["ratio"] > 0
    assert "read-nifti" in page.read_text() and "--quick" in page.read_text()
    assert page.read_text().endswith("\n\n## Whole commands\nwritten by hand\n") and "of before" not in page.read_text()
    assert "read-nifti" in capsys.readouterr().out


def test_the_command_ends_with_1_after_a_wrong_result_and_its_help_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chiasm.bench.table.ROWS", (row_of(1, 2),))
    for words, code in (["bench", "--quick"], 1), (["bench", "--help"], 0):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == code
    assert "Exit code 1 means that a result differs" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ChiasmError, match=r"found walking.*read-nifti"):
        find_rows(ROWS, ["walking"])


def test_a_page_shows_a_row_that_was_not_measured(setting: BenchSetting) -> None:
    names = count()
    rows = [replace(row_of(1, 1), name=f"row{next(names)}"), replace(row_of(1, 1, ("nothing_here",)), name="missing")]
    page = to_markdown([measure_row(row, setting, rounds=3, seconds=0.1) for row in rows], ["chiasm", "bench"], SMALL)
    assert "| row0 |" in page and "nothing_here not installed" in page and "40x44x36" in page
