"""When a job of SLURM has ended: by its file, or by what the queue says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chiasm.slurm_queue import FORGOTTEN, LOOKS, cancel_left, ended, job_states, time_signal


@dataclass(frozen=True)
class Paths:
    """The files of a job, of which only one is looked at."""

    result_pickle: Path


@dataclass(eq=False)
class FakeJob:
    """A job as submitit returns it."""

    job_id: str
    paths: Paths = field(default_factory=lambda: Paths(Path("/nowhere")))


def queue(monkeypatch: pytest.MonkeyPatch, *looks: Mapping[str, str] | None) -> list[object]:
    """Let the queue say one thing after another; return what is left of it."""
    left: list[object] = list(looks)
    monkeypatch.setattr("chiasm.slurm_queue.job_states", lambda: left.pop(0))
    monkeypatch.setattr("chiasm.slurm_queue.POLL", 0.0)
    return left


@pytest.mark.parametrize("state", ["PENDING", "SUSPENDED", "REQUEUE_HOLD", "COMPLETING", "CONFIGURING", None])
def test_a_job_that_is_requeued_or_suspended_has_not_ended(
    state: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = FakeJob("7_0", Paths(tmp_path / "outcome"))
    gone: list[Mapping[str, str] | None] = [{"7_0": "PREEMPTED"}] * (LOOKS - 1)
    later = None if state is None else {"7_0": state}  # None: the controller does not answer for a while
    left = queue(monkeypatch, {"7_0": "RUNNING"}, *[later] * (3 * LOOKS), *gone, {"7_0": "RUNNING"}, *gone)
    waiting = ended([job])
    monkeypatch.setattr("time.sleep", lambda _: None if left else job.paths.result_pickle.touch() or left.append({}))
    assert list(waiting) == [(job, None)]


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "COMPLETED", "FAILED", FORGOTTEN])
def test_a_job_that_ended_without_an_outcome_is_yielded_with_its_state(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {} if state == FORGOTTEN else {"7": state}
    jobs = [FakeJob("7", Paths(tmp_path / "none")), FakeJob("8", Paths(tmp_path / "outcome"))]
    jobs[1].paths.result_pickle.touch()
    left = queue(monkeypatch, *[states] * LOOKS)
    assert list(ended(jobs)) == [(jobs[1], None), (jobs[0], state)] and not left


def test_squeue_is_read_and_its_failure_is_no_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = tmp_path / "squeue"
    monkeypatch.setenv("SQUEUE_PARTITION", "other")  # users set such variables, which would hide the jobs
    lines = (
        '[ -n "$SQUEUE_PARTITION" ] && exit',
        'echo "7_0 RUNNING"',
        'echo "7_[1-4%2] PENDING"',
        'echo "8 COMPLETED"',
    )
    program.write_text("\n".join(["#!/bin/sh", *lines]))
    program.chmod(0o755)
    assert job_states() == {"7_0": "RUNNING", "7_[1-4%2]": "PENDING", "8": "COMPLETED"}
    program.write_text("#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n")
    assert job_states() is None


def test_jobs_of_minutes_are_warned_later() -> None:
    assert [time_signal(minutes) for minutes in (1, 4, 8, 1440)] == ["USR1@15", "USR1@60", "USR1@120", "USR1@120"]


def test_jobs_that_a_killed_command_left_are_cancelled_before_others_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, folder, asked = tmp_path / "bin", tmp_path / "slurm", tmp_path / "asked"
    programs.mkdir()
    folder.mkdir()
    for name in ("7_0", "7_1", "8", "9"):
        (folder / f"{name}_submitted.pkl").touch()
    running, gone = (
        '"7_0 RUNNING" "7_1 COMPLETED" "8 PENDING" "12 RUNNING"',
        '"7_0 COMPLETING" "8 CANCELLED" "12 RUNNING"',
    )
    program = (
        f"#!/bin/sh\n[ -e {asked}0 ] || {{ touch {asked}0; exit 1; }}  # the controller does not answer at first\n"
        f'if [ -e {asked}2 ]; then :\nelif [ -e {asked} ]; then printf "%s\\n" {gone}\n'
        f'else printf "%s\\n" {running}; fi\n'
    )
    (programs / "squeue").write_text(program)
    (programs / "scancel").write_text(f'#!/bin/sh\n[ -e {asked} ] && touch {asked}2\necho "$@" >> {asked}\n')
    for one in programs.iterdir():
        one.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr("chiasm.slurm_queue.POLL", 0.0)
    cancel_left(folder)
    first, second = asked.read_text().splitlines()
    assert sorted(first.split()) == ["7_0", "8"] and second == "7_0"
