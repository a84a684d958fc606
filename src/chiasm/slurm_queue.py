"""What SLURM's queue says about submitted jobs, and when a job has ended.

`squeue` is asked, which works on every cluster: `sacct` needs accounting, which small clusters do not have.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

POLL = 10.0  # seconds between two looks at the queue
LOOKS = 8  # in a row at which a job has ended without an outcome: a network disk may show its file a minute late
PATIENCE = 30  # most looks for jobs that were left, until they are cancelled
SUBMITTED = "_submitted.pkl"  # end of the name of submitit's file of a job
NOTICE = 120  # most seconds between the signal and the end of a job's time
FORGOTTEN = "no job any more"  # SLURM keeps ended jobs for minutes only
FAILURES = frozenset({"BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT"})
MEMORY = frozenset({"OUT_OF_MEMORY", "FAILED", FORGOTTEN})  # ends of which a lack of memory may be the cause
ENDED = FAILURES | MEMORY | {"COMPLETED"}  # final; a job that is suspended, requeued or held goes on later


class Submitted(Protocol):
    """A job as submitit returns it; `paths.result_pickle` is the file of its outcome."""

    job_id: str

    @property
    def paths(self) -> Any:
        """Return the files of the job."""


AnyJob = TypeVar("AnyJob", bound=Submitted)


def time_signal(timeout_min: int) -> str:
    """Return what ``sbatch --signal`` is given, so that a training writes a checkpoint before its time ends.

    SLURM may send the signal a minute too early, so jobs of a few minutes are given less notice.

    >>> time_signal(240), time_signal(2)
    ('USR1@120', 'USR1@30')
    """
    return f"USR1@{min(NOTICE, 15 * timeout_min)}"


def job_states() -> Mapping[str, str] | None:
    """Ask SLURM for the states of this user's jobs, by their numbers; None if it does not answer now."""
    command = ["squeue", "--noheader", "--array", "--states", "all", "--user", str(os.getuid()), "--format", "%i %T"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # they hide jobs
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    if answer.returncode:
        return None
    return dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if " " in line.strip())


def cancel_left(folder: Path) -> None:
    """Cancel jobs that a killed command left in the queue, and wait for their end: they write where others would.

    Args:
        folder: Where submitit keeps its files; their names hold the numbers of the jobs.
    """
    ours = {path.name.removesuffix(SUBMITTED) for path in folder.glob(f"*{SUBMITTED}")}
    for _ in range(PATIENCE if ours else 0):
        if (states := job_states()) is not None:
            left = [number for number in ours & states.keys() if states[number] not in ENDED]
            if not left:
                return
            subprocess.run(["scancel", *left], check=False, capture_output=True)
        time.sleep(POLL)


def ended(jobs: Sequence[AnyJob]) -> Iterator[tuple[AnyJob, str | None]]:
    """Wait for jobs; yield each with None when it has written its outcome, or with its last state if it wrote none.

    A job that SLURM requeues or suspends has not ended.
    """
    looks = dict.fromkeys(jobs, 0)
    while looks:
        states = job_states()
        for job in list(looks):
            if job.paths.result_pickle.exists():
                del looks[job]
                yield job, None
            elif states is not None:
                state = states.get(job.job_id, FORGOTTEN)
                looks[job] = looks[job] + 1 if state in ENDED else 0
                if looks[job] == LOOKS:
                    del looks[job]
                    yield job, state
        if looks:
            time.sleep(POLL)
