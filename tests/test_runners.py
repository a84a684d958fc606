"""Runners: every job once, what fails is told, and nobody works on for a parent that is gone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from chiasm.runners import RUNNERS


@pytest.mark.parametrize("name", ["serial", "processes", "ray", "slurm"])
def test_every_job_is_done_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}.get(name, "os"), reason=f"{name} is not installed")
    assert sorted(RUNNERS[name](range(7), math.factorial, tmp_path)) == [math.factorial(n) for n in range(7)]
    assert list(RUNNERS[name]([], math.factorial, tmp_path)) == []


SCRIPT = """
import time
from pathlib import Path
from chiasm.runners import processes

def work(folder):
    import os
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(processes([{folder!r}] * 2, work, Path()))
"""


def test_workers_stop_when_their_parent_was_killed(tmp_path: Path) -> None:
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    marks.mkdir()
    script.write_text(SCRIPT.format(folder=str(marks)))
    parent = subprocess.Popen([sys.executable, str(script)])
    count = min(2, len(os.sched_getaffinity(0)))
    until = time.monotonic() + 60
    while len(list(marks.iterdir())) < count and time.monotonic() < until:
        time.sleep(0.1)
    workers = [int(mark.name) for mark in marks.iterdir()]
    assert len(workers) == count
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=30)
    for process in alive:
        process.kill()
    assert not alive
