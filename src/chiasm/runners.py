"""Where independent jobs are done: here, on all cores, on a Ray cluster, or by SLURM.

A runner takes independent jobs and a function, and yields one outcome for
each, in any order.  Only this module knows runners, and each job sets its own
number of threads, so that every runner gives the same numbers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from chiasm.errors import RunError, unknown

PATIENCE = 20.0  # seconds that an orphaned process has for its checkpoint

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class Runner(Protocol):
    """Works jobs off; `work` never raises, it returns what went wrong."""

    def __call__(self, jobs: Sequence[Job], work: Callable[[Job], Outcome], folder: Path, /) -> Iterator[Outcome]:
        """Yield the outcome of each job as it is done; `folder` is for the runner's own files."""


def serial(jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path) -> Iterator[Outcome]:
    """One after another, in this process."""
    yield from map(work, jobs)


def processes(jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path) -> Iterator[Outcome]:
    """One process for each core; processes are started fresh, as on any platform and with CUDA."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    count = min(len(jobs), len(os.sched_getaffinity(0)))
    if not count:
        return
    fresh, parent = get_context("spawn"), os.getpid()
    with ProcessPoolExecutor(count, mp_context=fresh, initializer=_follow, initargs=(parent,)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow(parent: int) -> None:
    """Stop this process soon after its parent is gone: first ask for a checkpoint, then leave."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ray(jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path) -> Iterator[Outcome]:
    """On the Ray cluster that RAY_ADDRESS names, or on one that is started here and stopped again.

    Raises:
        RunError: If Ray is not installed.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise _absent("ray") from error
    started = not cluster.is_initialized()
    if started:
        cluster.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:

        def call(job: Job) -> Outcome:  # Ray takes functions alone
            return work(job)

        remote = cluster.remote(num_cpus=1, max_retries=0)(call)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            ready, waiting = cluster.wait(waiting)
            yield from cluster.get(ready)
    finally:
        if started:
            cluster.shutdown()


def slurm(jobs: Sequence[Job], work: Callable[[Job], Outcome], folder: Path) -> Iterator[Outcome]:
    """As an array job; submitit's local executor where there is no SLURM.

    Raises:
        RunError: If submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise _absent("submitit") from error
    if not jobs:
        return
    executor = submitit.AutoExecutor(folder=folder / "slurm")
    executor.update_parameters(timeout_min=24 * 60, cpus_per_task=1)
    for submitted in submitit.helpers.as_completed(executor.map_array(work, list(jobs))):
        yield submitted.result()


def _absent(package: str) -> RunError:
    return RunError(
        f"the runner needs {package}, which is not installed",
        reason="not-installed",
        hint=f"pip install 'chiasm[{'slurm' if package == 'submitit' else package}]', or use --runner processes.",
    )


RUNNERS: dict[str, Runner] = {"serial": serial, "processes": processes, "ray": ray, "slurm": slurm}


def find_runner(name: str) -> Runner:
    """Return a runner by name.

    Raises:
        RecipeError: If there is none of that name.
    """
    if name not in RUNNERS:
        raise unknown("runner", name, RUNNERS)
    return RUNNERS[name]
