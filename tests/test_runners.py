"""Runners: every job once, a dead worker costs its own job, and nobody works on for a parent that is gone."""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import fake_slurm
from chiasm.attempts import Lost
from chiasm.errors import ChiasmError, CohortError, RunError, VolumeError
from chiasm.runners import RUNNERS, Ray, Runner, Slurm, find_runner, imported_ahead

PACKAGES = {"ray": "ray", "slurm": "submitit"}
TOLD = {
    "processes": r"killed by signal 9 \(SIGKILL\), as is usual where memory runs out",
    "ray": "Ray reports: The worker died unexpectedly",
    "slurm": r"SLURM reports OUT_OF_MEMORY for its job \d+(_\d)?; see .*log\.err",
}


@pytest.fixture(params=["serial", "processes", "ray", "slurm"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A runner's name; its workers find what this file defines."""
    asked: str = request.param
    pytest.importorskip(PACKAGES.get(asked, "os"), reason=f"{asked} is not installed")
    if asked == "slurm":
        fake_slurm.install(tmp_path / "cluster", monkeypatch)
    if asked == "ray":
        request.getfixturevalue("cluster")
    return asked


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    here = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", here)
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        yield
        ray.shutdown()


def work(job: tuple[int, str, Path]) -> int:
    """Return a factorial, or die at once, or the first time, or raise."""
    number, fate, folder = job
    mark = folder / f"tried {number}"
    if fate == "dies" or (fate == "dies once" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "fails":
        raise CohortError("has no fold 7", path=folder, reason="folds", found=RunError("odd"), hint="Give 0 to 4.")
    return math.factorial(number)


def test_every_job_is_done_once_and_a_worker_that_dies_costs_its_own_job_alone(name: str, tmp_path: Path) -> None:
    fates = dict.fromkeys(range(4), "lives")
    if name != "serial":
        fates |= {1: "dies once", 2: "dies"}
    jobs = [(number, fate, tmp_path) for number, fate in fates.items()]
    reports = list(RUNNERS[name](jobs, work, tmp_path))
    lost = [report for report in reports if isinstance(report, Lost)]
    assert sorted(report for report in reports if not isinstance(report, Lost)) == [
        math.factorial(number) for number, fate in fates.items() if fate != "dies"
    ]
    if name != "serial":
        assert sorted((one.job[0], one.again) for one in lost) == [(1, True), (2, False), (2, True)]
        assert reports[-1] in lost or reports[-2] in lost  # what was lost is tried again when all others are done
        for one in lost:
            assert re.search(TOLD[name], str(one)), str(one)
    assert list(RUNNERS[name]([], math.factorial, tmp_path)) == []


def test_an_error_that_crosses_a_process_keeps_its_words(name: str, tmp_path: Path) -> None:
    jobs = [(0, "fails", tmp_path)]
    with pytest.raises(CohortError) as caught:
        list(RUNNERS[name](jobs, work, tmp_path))
    assert str(caught.value) == f"{tmp_path}: has no fold 7 (found odd.). Give 0 to 4."
    assert caught.value.path == tmp_path and caught.value.reason == "folds"


def odd(job: int) -> int:
    """Raise what no pickle carries, or be asked to stop by a signal of its own."""
    kind = type("Strange", (Exception,), {"exit_code": 143} if job else {})  # as a training that stops at a signal
    raise kind("no pickle carries it")


def test_a_strange_error_ends_all_with_its_words_and_a_worker_that_was_told_to_stop_is_lost(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Strange: no pickle carries it") as caught:
        list(RUNNERS["processes"]([0], odd, tmp_path))
    assert "in odd" in str(caught.value.__cause__)  # where it came from
    last = list(RUNNERS["processes"]([1], odd, tmp_path))[-1]
    assert isinstance(last, Lost) and "signal 15 (SIGTERM)" in last.cause


def test_no_process_is_left_when_the_jobs_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.runners.PATIENCE", 200.0)  # for a process that does not go when it is asked
    before = set(psutil.Process().children())
    reports = RUNNERS["processes"]([0.1, 600.0], time.sleep, tmp_path)
    assert next(reports) is None
    start = time.monotonic()
    reports.close()  # type: ignore[attr-defined]
    left = [
        one for one in set(psutil.Process().children()) - before if "resource_tracker" not in " ".join(one.cmdline())
    ]
    assert not left and time.monotonic() - start < 100


def served(job: tuple[int, str, Path]) -> tuple[bool, int]:
    """Say whether this process has a module that nothing here needs, before it works."""
    return "colorsys" in sys.modules, work(job)


def started_server() -> psutil.Process:
    """Wait until a server that was just started has its command line, which no process has while it is replaced."""
    end = time.monotonic() + 60
    while not (found := [one for one in psutil.Process().children() if "forkserver" in " ".join(one.cmdline())]):
        assert time.monotonic() < end
        time.sleep(0.01)
    (server,) = found
    return server


def test_processes_of_a_server_have_what_it_imported_and_die_alone(tmp_path: Path) -> None:
    jobs = [(number, fate, tmp_path) for number, fate in enumerate(("lives", "dies", "dies once", "lives"))]
    with imported_ahead(["colorsys"]):
        server = started_server()
        server.send_signal(signal.SIGINT)  # Ctrl+C reaches every process; this one would print where it was
        reports = list(RUNNERS["processes"](jobs, served, tmp_path))
    assert sorted(one for one in reports if not isinstance(one, Lost)) == [(True, 1), (True, 2), (True, 6)]
    assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    lost = [one for one in reports if isinstance(one, Lost)]
    assert [one.job[0] for one in lost if not one.again] == [1]
    assert all(re.search(TOLD["processes"], str(one)) for one in lost)
    assert list(RUNNERS["processes"](jobs[:1], served, tmp_path)) == [(False, 1)]  # processes of their own again


def test_where_no_server_can_start_processes_import_by_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refuse)
    with imported_ahead(["colorsys"]):
        assert list(RUNNERS["processes"]([(0, "lives", tmp_path)], served, tmp_path)) == [(False, 1)]


@pytest.mark.parametrize("kind", [VolumeError, CohortError, RunError, ChiasmError])
def test_errors_are_the_same_after_a_pickle_and_no_full_stop_is_doubled(kind: type[ChiasmError]) -> None:
    error = kind("is no scan", path="a.nii", reason="odd", found=len, expected=3, hint="Take another.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.hint == "Take another."
    assert str(kind("case x: a.nii: is no scan.")) == "case x: a.nii: is no scan."


def asked_of(runner: Runner, jobs: list[int], folder: Path, submitted: Path) -> str:
    assert sorted(runner(jobs, math.factorial, folder)) == [math.factorial(job) for job in jobs]  # type: ignore[type-var]
    (script,) = submitted.glob("*.sh")
    return script.read_text()


def test_slurm_is_asked_for_what_the_study_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    submitted = fake_slurm.install(tmp_path / "one", monkeypatch)
    asked = Slurm(
        gpus_per_node=1,
        cpus_per_task=4,
        timeout_min=240,
        mem_gb=1.5,
        partition="gpu",
        account="lab",
        options={"nice": 9},
    )
    script = asked_of(find_runner("slurm", {"slurm": asked}), [3, 4], tmp_path, submitted)
    for line in (
        "gpus-per-node=1",
        "cpus-per-task=4",
        "time=240",
        "mem=1536MB",
        "partition=gpu",
        "account=lab",
        "nice=9",
        "array=0-1%2",
    ):
        assert f"#SBATCH --{line}\n" in script
    submitted = fake_slurm.install(tmp_path / "two", monkeypatch)
    script = asked_of(find_runner("slurm"), [3], tmp_path, submitted)
    assert "gpus" not in script and "partition" not in script and "#SBATCH --time=1440\n" in script
    with pytest.raises(RunError, match=r"SLURM refused the jobs .*invalid partition specified: nowhere"):
        list(find_runner("slurm", {"slurm": Slurm(partition="nowhere")})([1], math.factorial, tmp_path))


def warned(job: tuple[int, str, Path]) -> int:
    """Return a factorial; the first time the job is warned by a signal, and leaves a mark on its way out."""
    number, name, folder = job
    mark = folder / f"warned {number}"
    if name != "none" and not mark.exists():
        mark.touch()
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(600)
        finally:
            (folder / f"tidied {number}").touch()
    return math.factorial(number)


def test_jobs_of_slurm_stop_tidily_before_their_time_ends_and_when_they_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    submitted = fake_slurm.install(tmp_path / "cluster", monkeypatch)
    jobs = [(number, name, tmp_path) for number, name in enumerate(("none", "SIGUSR1", "none", "SIGTERM"))]
    reports = list(find_runner("slurm", {"slurm": Slurm(timeout_min=4)})(jobs, warned, tmp_path))
    lost = {one.job[0]: one for one in reports if isinstance(one, Lost)}
    assert sorted(one for one in reports if not isinstance(one, Lost)) == [1, 1, 2, 6]
    assert sorted(lost) == [1, 3] and all(one.again for one in lost.values())
    assert re.search(r"the time of its job \d+_1 was nearly over", str(lost[1])) and not lost[1].may_lack_memory
    assert all((tmp_path / f"tidied {number}").exists() for number in lost)
    assert "#SBATCH --signal=USR1@60\n" in min(submitted.glob("*.sh")).read_text()


def test_ray_is_refused_where_the_machine_lacks_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pytest.importorskip("ray", reason="ray is not installed")
    stopped: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "init", lambda **_: None)
    monkeypatch.setattr(cluster, "shutdown", lambda: stopped.append(True))
    monkeypatch.setattr(cluster, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(RunError, match=r"more of kind GPU than .* \(found 0, expected 1\).*\[ray\] of the study file"):
        list(find_runner("ray", {"ray": Ray(num_gpus=1)})([1], math.factorial, tmp_path))
    assert stopped  # else it would wait for ever


def test_slurm_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for start in (lambda: find_runner("slurm"), lambda: list(RUNNERS["slurm"]([1], math.factorial, tmp_path))):
        with pytest.raises(RunError, match=r"no SLURM on this machine.*--runner processes") as caught:
            start()
        assert caught.value.reason == "no-slurm"
    assert not list(tmp_path.iterdir())
    for name in ("sbatch", "srun", "squeue"):
        (tmp_path / name).touch(0o755)
    with pytest.raises(RunError, match="the program scancel was not found"):
        find_runner("slurm")


SCRIPT = """
import time
from pathlib import Path
from chiasm.runners import imported_ahead, processes

def work(folder):
    import os
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with imported_ahead({ahead}):
        list(processes([{folder!r}] * 2, work, Path()))
"""


@pytest.mark.parametrize("ahead", [[], ["json"]])
def test_workers_stop_when_their_parent_was_killed(ahead: list[str], tmp_path: Path) -> None:
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    marks.mkdir()
    script.write_text(SCRIPT.format(folder=str(marks), ahead=ahead))
    parent = subprocess.Popen([sys.executable, str(script)])
    count = min(2, len(os.sched_getaffinity(0)))
    until = time.monotonic() + 120
    while len(list(marks.iterdir())) < count and time.monotonic() < until:
        time.sleep(0.1)
    workers = [psutil.Process(int(mark.name)) for mark in marks.iterdir()]
    assert len(workers) == count
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
