"""How many threads a training uses: what a measurement says, unless somebody has said it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.methods import make_recipe
from chiasm.storage import read_json, write_json
from chiasm.training import cost, threads
from chiasm.training.run import train
from chiasm.training.threads import choose_threads, threads_for
from conftest import QUICK
from synthetic_cohort import plan_of, write_brats

IDLE = {1: 1.0, 2: 0.55, 4: 0.3}  # seconds of a pass
BUSY = {1: 1.17, 2: 13.0, 4: 20.0}


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in threads.SAID_BY:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def machine(seconds: dict[int, float]) -> tuple[Callable[[], None], Callable[[], float]]:
    """Work, and a clock that goes on by what it takes on the threads that torch has."""
    now = [0.0]

    def work() -> None:
        now[0] += seconds[torch.get_num_threads()]

    return work, lambda: now[0]


@pytest.mark.parametrize(
    ("seconds", "chosen"), [(IDLE, 4), (BUSY, 1), ({1: 1.0, 2: 0.6, 4: 0.59}, 2), ({1: 1.0, 2: 1.2, 4: 0.5}, 4)]
)
def test_more_threads_are_taken_where_they_are_worth_it(
    seconds: dict[int, float], chosen: int, four_threads: None
) -> None:
    work, clock = machine(seconds)
    found = choose_threads(work, [1, 2, 4], clock)
    assert found.threads == chosen
    assert found.seconds == pytest.approx(seconds)
    assert torch.get_num_threads() == 4  # as before
    assert f"threads: {chosen}, as a pass takes " in found.line and "OMP_NUM_THREADS" in found.line


def test_what_is_asked_for_or_noted_or_said_is_not_measured(
    tmp_path: Path, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = make_recipe("A1", "tiny", QUICK), list[str]()

    def refuse(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(threads, "choose_threads", refuse)
    assert threads_for(recipe, plan_of(), tmp_path, said.append, 3) == 3
    write_json(tmp_path / threads.NOTED, {"threads": 2})
    assert threads_for(recipe, plan_of(), tmp_path, said.append) == 2  # else a resumed run would end otherwise
    write_json(tmp_path / "models" / "1" / threads.NOTED, {"threads": 2})
    with pytest.raises(AssertionError, match="measured"):  # runs of their own in a folder of this name
        threads_for(recipe, plan_of(), tmp_path / "models" / "2", said.append)
    (tmp_path / "recipe.toml").touch()
    assert threads_for(recipe, plan_of(), tmp_path / "models" / "2", said.append) == 2  # measured once for all models
    write_json(tmp_path / threads.NOTED, {"threads": 99})  # of another machine
    with pytest.raises(AssertionError, match="measured"):
        threads_for(recipe, plan_of(), tmp_path, said.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads_for(recipe, plan_of(), tmp_path, said.append) == 4
    assert not said


def test_a_training_says_its_threads_in_one_line_notes_them_and_is_forecast_on_them(
    tmp_path: Path, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, forecast_on = list[str](), set[int]()

    def timed(*given: Any) -> float:
        forecast_on.add(given[-1].threads)
        return 1e-6

    monkeypatch.setattr(cost, "time_convolution", timed)
    monkeypatch.setattr(threads, "choose_threads", lambda *given: choose_threads(*given)._replace(threads=2))
    data = write_brats(tmp_path / "data", 4)
    train(data, make_recipe("A1", "tiny", {**QUICK, "schedule.steps": 2}), tmp_path / "run", say=said.append)
    told = [line for line in said if line.startswith("threads: ")]
    assert len(told) == 1
    assert read_json(tmp_path / "run" / threads.NOTED)["threads"] == 2 and forecast_on == {2}
    assert told[0].startswith("threads: 2, as a pass takes ")
    assert torch.get_num_threads() == 4


def test_measuring_draws_no_random_number(tmp_path: Path, four_threads: None) -> None:
    recipe = make_recipe("A7", "tiny", {**QUICK, "generator.dropout": 0.5})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    threads_for(recipe, plan_of(), tmp_path, lambda _: None)
    assert torch.equal(before, torch.get_rng_state())
