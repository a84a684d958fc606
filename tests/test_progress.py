"""How far long work is: in lines where nobody watches, and how long is left."""

from __future__ import annotations

import re
import sys

import pytest

import chiasm.progress
from chiasm.commands.common import say_above
from chiasm.progress import count, follow, in_lines, open_progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(chiasm.progress, "time", made)
    return made


def test_without_a_terminal_a_line_a_minute_tells_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress() as bar:
        tell = count(bar, "jobs")
        for done in range(5, 9):  # four were done by an earlier call
            clock.now += 40
            tell(done, 8, f"A7 fold {done}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "jobs A7 fold 6: 6 of 8, about 1 min left",
        "jobs A7 fold 8: 8 of 8",
    ]


def test_what_is_left_follows_the_speed_of_this_call(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress() as bar:
        tell = follow(bar, "training")
        clock.now += 61
        tell(101, 1101, {"loss": 0.25})
        clock.now += 61
        tell(102, 1101, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training loss 0.2500: 101 of 1101"  # one step is no speed: preparation came before it
    assert lines[1] == "training discriminators: 102 of 1101, about 1016 min left"


def test_from_the_tenth_step_on_the_forecast_knows_nothing_of_what_came_before_the_first(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress() as bar:
        tell = follow(bar, "training")
        clock.now += 3600  # preparation
        for step in range(1, 12):
            tell(step, 1001, {})
            clock.now += 6
    assert capsys.readouterr().err.splitlines()[-1] == "training discriminators: 11 of 1001, about 99 min left"


def test_steps_that_cost_more_later_are_forecast_as_such(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    cheap, dear, steps = 1.0, 3.0, 1000  # seconds of a step in the first 400, and in the others
    every = 400 * cheap + 600 * dear
    with open_progress() as bar:
        tell = follow(bar, "training")
        clock.now += 100
        for step in range(1, 12):
            clock.now += 10 * cheap  # this machine is ten times slower than was forecast
            tell(step, steps, {"work": step * cheap / every})
    left = re.findall(r"about (\d+) min left", capsys.readouterr().err)
    true = (every - 11) * 10 / 60
    assert true / 2 < float(left[-1]) < 2 * true


def test_preparing_many_cases_says_in_a_line_a_minute_how_long_it_takes(clock: Clock) -> None:
    said: list[str] = []
    tell = in_lines(said.append, "preparing")
    for done in range(11):
        tell(done, 10, f"case{done}")
        clock.now += 25
    assert said == [
        "preparing case3: 3 of 10 done, about 3 min left",
        "preparing case6: 6 of 10 done, about 2 min left",
        "preparing case9: 9 of 10 done, about 1 min left",
    ]


def test_the_speed_is_that_of_the_last_quarter_of_an_hour(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress() as bar:
        tell = count(bar, "jobs")
        for done in range(101):  # on a busy machine, then on an idle one
            tell(done, 200, "")
            clock.now += 60 if done < 50 else 30
    assert "100 of 200, about 50 min left" in capsys.readouterr().err.splitlines()[-1]


def test_work_that_was_done_before_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress() as bar:
        count(bar, "predicting")(0, 0, "")
    assert capsys.readouterr().err == ""


def test_a_line_is_said_above_the_bar_of_a_terminal_and_as_ever_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress() as bar:
        say_above(bar)("step 3: [validation] error 0.5")
    assert capsys.readouterr() == ("step 3: [validation] error 0.5\n", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with open_progress() as bar:
        follow(bar, "training")(1, 2, {"loss": 0.25, "global_discriminator_loss": 1.4, "local_discriminator_loss": 1.2})
        say_above(bar)(f"step 3: [validation] error 0.5 {'long/' * 30} and the end")
    out, err = capsys.readouterr()
    assert out == "" and "step 3: [validation] error 0.5\n" in err and f"{'long/' * 30}\n    and the end" in err
    assert "loss 0.2500, discriminators 1.40, 1.20" in err


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    with open_progress() as bar:
        tell = count(bar, "jobs")
        tell(1, 2, "A1")
        tell(2, 2, "A1")
    err = capsys.readouterr().err
    assert "\x1b[" in err and re.search(r"jobs A1.*2/2", err) and "of 2" not in err
