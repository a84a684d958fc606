"""Two processes learn what one does from the same batches, and stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from chiasm.training import ranks
from chiasm.training.state import TrainingState
from conftest import QUICK
from dicom_patients import reserved_port

#: Attention; weights by rank; difficulty of lesions; batch normalisation in a critic, and dropout; dropout of features.
METHODS = ("A7", "context-gan")  # both discriminators and attention; a network of the literature
SCRIPT = Path(__file__).parent / "rank_steps.py"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """As in a job of SLURM with one task, with a port of nobody else, without what a launcher takes for its own."""
    taken = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
    with reserved_port() as port:
        job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0", "MASTER_PORT": str(port)}
        yield {name: value for name, value in os.environ.items() if name not in taken} | job


@pytest.fixture(scope="module")
def learnt(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for devices in ("1", "2"):
        command = [sys.executable, str(SCRIPT), str(folder), devices, *METHODS]
        run = subprocess.run(command, timeout=240, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return folder


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does_at_the_same_batch(method: str, learnt: Path) -> None:
    """Of five samples, so that one process has three and the other two."""
    alone, first, second = (torch.load(learnt / f"{method}-{of}.pt") for of in ("1-0", "2-0", "2-1"))
    assert farthest(alone["gradients"], first["gradients"]) < 1e-5
    assert farthest(alone["weights"], first["weights"]) < 1e-5  # after 20 steps in 32 bits
    assert farthest(first["weights"], second["weights"]) == 0
    assert first["state"] == second["state"] and first["values"] == second["values"]
    assert first["values"] == pytest.approx(alone["values"], rel=1e-3)
    values = {name: value for name, value in alone["state"].items() if isinstance(value, float)}
    assert {name: first["state"][name] for name in values} == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_gloo_outlives_the_training_and_aborts_its_process(rank: int, learnt: Path) -> None:
    assert "gloo" not in (learnt / f"threads-2-{rank}.txt").read_text()


def test_what_the_first_process_makes_is_given_to_all_and_made_by_nobody_else(learnt: Path) -> None:
    assert [(learnt / f"made-by-{process}.txt").read_text() for process in ("1-0", "2-0", "2-1")] == ["0", "0", "0"]


def test_where_the_first_process_refuses_the_others_hear_of_it_and_mix_nothing_up(learnt: Path) -> None:
    heard = [(learnt / f"refusal-{process}.txt").read_text() for process in ("1-0", "2-0", "2-1")]
    assert heard == ["RecipeError", "RecipeError", "ProcessEnded"]


def test_a_process_whose_partner_ended_says_so_in_a_sentence(learnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (learnt / "went-on.txt").exists()
    with (
        pytest.raises(ranks.ProcessEnded, match="The same command goes on from here") as ended,
        ranks.ending_together(),
    ):
        raise distributed.DistNetworkError("Broken pipe")
    assert ended.value.exit_code is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended.value.exit_code == 0  # the first process says it
    with pytest.raises(RuntimeError, match="a fault of ours"), ranks.ending_together():
        raise RuntimeError("a fault of ours")


def test_a_process_ends_once_the_first_one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit, match="1"):
        ranks.follow(7, poll=0, grace=0)
    assert not list(parents)


def test_one_process_communicates_with_nobody() -> None:
    some = torch.rand(3, 2)
    assert (ranks.rank(), ranks.count()) == (0, 1)
    assert ranks.total(some) is some and ranks.mean(some, 3) is some and ranks.gather(some, 3) is some
    assert list(ranks.share("abc")) == ["a", "b", "c"] == ranks.gather_rows("abc", 3)
    assert ranks.agree(True, [15]) == (True, 15) and ranks.agree(False, []) == (False, 0)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    environment: dict[str, str], toy_cohort: Path, tmp_path: Path
) -> None:
    settings = [f"{name}={value}" for name, value in QUICK.items() if not isinstance(value, tuple | str)]
    command = [sys.executable, "-m", "chiasm.cli", "train", toy_cohort, "--source", "t1", "--target", "t2"]
    command += ["-o", tmp_path, "--size", "tiny", "--devices", "2", "--accelerator", "cpu"]
    command += ["--set", *settings, "schedule.steps=100000"]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment)
    try:
        log = tmp_path / "log.jsonl"  # after the first step, which all have done, each has heard of signals
        wait_for(lambda: log.exists() and '"kind": "step"' in log.read_text(), run)
        os.kill(child_of(run.pid), signal.SIGTERM)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM, said
    assert said.count("the same command goes on from here") == 1
    assert len(list((tmp_path / "checkpoints").glob("*.toml"))) == 1


def wait_for(is_there: object, run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not is_there():  # type: ignore[operator]
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.2)


def child_of(pid: int) -> int:
    """The process that a training has started beside itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [int(child) for child in children if b"train" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(found) == 1
    return found[0]


def test_a_state_of_version_01_is_restored() -> None:
    state = TrainingState.from_dict({"error_scale": 0.5, "closed_steps": 3, "lesion_doubt": {"a": 0.25}, "pool": []})
    assert state.error_scale == 0.5 and state.closed_steps == 3 and state.lesion_difficulty == {"a": 0.25}
    assert not state.is_guiding and not state.unread_patches
