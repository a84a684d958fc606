"""Where independent jobs run: here, on all cores, on a Ray cluster, or by SLURM.

A runner takes independent jobs and a function, and yields one outcome for each job, in any order.  Only this module
knows the runners.  Each job sets its own number of threads, so that every runner gives the same numbers.

If a worker dies (because memory runs out, or a node fails), only its own job is affected.  The job is reported as
`Lost` and tried once more after all others.  If it is lost again, it is not tried any more.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Protocol

from pydantic import Field

from chiasm.attempts import Job, Lost, Outcome, Raised, Reports, attempt, twice, unwrapped
from chiasm.errors import RunError, unknown
from chiasm.recipe import Section
from chiasm.slurm_queue import MEMORY, cancel_left, ended, time_signal
from chiasm.stopping import stoppable

PATIENCE = 20.0  # seconds that a process which must go has for its checkpoint
SERVER = "forkserver"  # of `multiprocessing`: a process that has imported modules, from which others are forked


class Runner(Protocol):
    """Runs jobs; `work` returns the error of a job, and an exception that it raises ends all jobs."""

    def __call__(
        self, jobs: Sequence[Job], work: Callable[[Job], Outcome], folder: Path, /
    ) -> Iterator[Outcome | Lost[Job]]:
        """Yield the outcome of each job as it is done; `folder` is for the runner's own files."""


class Slurm(Section):
    """The resources of a job on SLURM."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_task: Annotated[int, Field(ge=1)] = 1
    timeout_min: Annotated[int, Field(ge=1)] = 24 * 60
    mem_gb: Annotated[float, Field(gt=0)] | None = None  # as the cluster decides
    partition: str | None = None  # the cluster's own
    account: str | None = None  # whose budget pays
    qos: str | None = None  # quality of service
    options: Mapping[str, str | int] = {}  # others of sbatch, such as {constraint = "a100"}


class Ray(Section):
    """The resources of a job on a Ray cluster, which hides all other GPUs from the job."""

    num_gpus: Annotated[float, Field(ge=0)] = 0
    num_cpus: Annotated[float, Field(gt=0)] = 1


def serial(jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path) -> Iterator[Outcome]:
    """One after another, in this process."""
    yield from map(work, jobs)


def cores_allowed() -> int:
    """Count the cores that this process may use, or all cores if the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processes(jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path) -> Iterator[Outcome | Lost[Job]]:
    """One process for each core; a lost job is alone on the machine when it is tried again."""
    yield from in_processes(jobs, work, cores_allowed())


def in_processes(jobs: Sequence[Job], work: Callable[[Job], Outcome], count: int) -> Iterator[Outcome | Lost[Job]]:
    """Run jobs in `count` processes at once, each of which does many; a lost job is alone when it is tried again."""

    def once(some: Sequence[Job], last: bool) -> Reports[Outcome, Job]:
        return _in_processes(some, work, 1 if last else count)

    return twice(jobs, once)


@contextmanager
def imported_ahead(modules: Sequence[str]) -> Iterator[None]:
    """Let a server import modules now, beside this process; processes of the block are forked from it.

    Each of them would import the modules by itself, after this process has prepared the jobs. The server sees the
    environment and the signals of this moment and lives as long as this process, so only commands ask for one. On
    other systems than Linux, whose own libraries may not bear a fork, and where no server can start (temporary files
    in a folder of a long name), nothing changes.

    Args:
        modules: Their names, or none for no server; importing them must use no GPU.
    """
    if modules and sys.platform == "linux":
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload([*modules])
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl+C the server would print where it was
        try:
            with suppress(OSError):  # there is no place for its socket: each process imports by itself
                forkserver.ensure_running()
                _Worker.method = SERVER
        finally:
            signal.signal(signal.SIGINT, before)
    try:
        yield
    finally:
        _Worker.method = "spawn"


def _in_processes(jobs: Sequence[Job], work: Callable[[Job], Outcome], count: int) -> Reports[Outcome, Job]:
    """Keep `count` processes busy, and replace a process that died."""
    waiting = deque(jobs)
    idle: list[_Worker[Job, Outcome]] = []
    busy: list[_Worker[Job, Outcome]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                worker = idle.pop() if idle else _Worker(work)
                worker.give(waiting.popleft())
                busy.append(worker)
            for worker in _reporting(busy):
                busy.remove(worker)
                report = worker.take()
                if isinstance(report, Lost):
                    yield report
                else:
                    idle.append(worker)
                    yield unwrapped(report)
    finally:
        for worker in busy:
            worker.process.terminate()  # a training writes its checkpoint
        for worker in (*idle, *busy):
            worker.stop()


class _Worker(Generic[Job, Outcome]):
    """A process that does one job after another; it is not forked from this one, which works with threads and CUDA."""

    method: ClassVar[str] = "spawn"
    job: Job

    def __init__(self, work: Callable[[Job], Outcome]) -> None:
        fresh: Any = get_context(self.method)
        self.line, there = fresh.Pipe()
        self.process = fresh.Process(target=_serve, args=(there, work))
        self.process.start()
        there.close()  # then the line ends when the process does

    def give(self, job: Job) -> None:
        """Hand over a job."""
        self.job = job
        try:
            self.line.send(job)
        except BrokenPipeError:  # it died while it was idle: `take` reports the job as lost
            self.process.join()

    def take(self) -> Outcome | Raised | Lost[Job]:
        """Return the outcome of the job, or that the process died before it reported one."""
        try:
            if self.line.poll():
                outcome: Outcome | Raised = self.line.recv()
                return outcome
        except (EOFError, ConnectionError):
            self.process.join()
        self.stop()
        code = self.process.exitcode or 0
        return Lost(self.job, _ending(code), may_lack_memory=_signal_of(code) is not None)

    def stop(self) -> None:
        """End the process: closing the line ends an idle one."""
        self.line.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _reporting(busy: Sequence[_Worker[Job, Outcome]]) -> list[_Worker[Job, Outcome]]:
    """Wait until a worker reports or is dead (its own child process may keep its connection open)."""
    while True:
        ready = connection.wait([worker.line for worker in busy], timeout=1.0)
        if found := [worker for worker in busy if worker.line in ready or not worker.process.is_alive()]:
            return found


def _serve(line: connection.Connection, work: Callable[[Any], object]) -> None:
    """Do the jobs that arrive over the connection until it closes: the main loop of a worker."""
    _follow_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a server ignores
    try:
        while True:
            line.send(attempt(work, line.recv()))
    except EOFError:
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _ending(code: int) -> str:
    """Describe how a process ended, by its exit code.

    >>> _ending(-9)
    'its process was killed by signal 9 (SIGKILL), as is usual where memory runs out'
    >>> _ending(1)
    'its process ended with exit code 1'
    """
    killer = _signal_of(code)
    if killer is None:
        return f"its process ended with exit code {code}"
    usual = ", as is usual where memory runs out" if killer == signal.SIGKILL else ""
    return f"its process was killed by signal {killer.value} ({killer.name}){usual}"


def _signal_of(code: int) -> signal.Signals | None:
    """Return the signal that an exit code stands for, or None."""
    number = -code if code < 0 else code - 128
    return next((one for one in signal.Signals if one == number), None)


def _follow_parent() -> None:
    """Stop this process when the one that started it ended: first ask for a checkpoint, then exit."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ray(
    jobs: Sequence[Job], work: Callable[[Job], Outcome], _folder: Path, asked: Ray | None = None
) -> Iterator[Outcome | Lost[Job]]:
    """Run jobs on the Ray cluster that RAY_ADDRESS names, or on one that is started here and stopped again.

    Raises:
        RunError: If Ray is not installed, or this machine lacks the resources of a job.
    """
    _check_ray()
    import ray as cluster

    asked = asked or Ray()
    started = not cluster.is_initialized()
    if started:
        cluster.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")

    def call(job: Job) -> Outcome | Raised:  # Ray takes functions alone
        return attempt(work, job)

    remote = cluster.remote(num_cpus=asked.num_cpus, num_gpus=asked.num_gpus, max_retries=0)(call)
    reports: Iterator[Outcome | Lost[Job]] = twice(jobs, lambda some, _last: _on_ray(some, remote))
    try:
        if started and "RAY_ADDRESS" not in os.environ:  # a cluster may grow, this machine does not
            _check_offered(asked, cluster.cluster_resources())
        yield from reports
    finally:
        if started:
            cluster.shutdown()


def _on_ray(jobs: Sequence[Job], remote: Any) -> Reports[Any, Job]:
    """Submit jobs to a Ray cluster and yield the outcome of each."""
    import ray as cluster

    waiting = {remote.remote(job): job for job in jobs}
    while waiting:
        (ready, *_), _ = cluster.wait(list(waiting))
        job = waiting.pop(ready)
        try:
            outcome = cluster.get(ready)
        except cluster.exceptions.RayTaskError as error:
            raise error.cause from error
        except cluster.exceptions.RayError as error:
            yield Lost(job, f"Ray reports: {str(error).strip().split('. ')[0]}")
        else:
            yield unwrapped(outcome)


def _check_offered(asked: Ray, offered: Mapping[str, float]) -> None:
    for kind, wanted in (("GPU", asked.num_gpus), ("CPU", asked.num_cpus)):
        if wanted > offered.get(kind, 0):
            raise RunError(
                f"a job asks for more of kind {kind} than this machine offers to Ray",
                reason="ray",
                found=f"{offered.get(kind, 0):g}",
                expected=f"{wanted:g}",
                hint="Set RAY_ADDRESS to a larger cluster, or change the table [ray] of the study file.",
            )


def slurm(
    jobs: Sequence[Job], work: Callable[[Job], Outcome], folder: Path, asked: Slurm | None = None
) -> Iterator[Outcome | Lost[Job]]:
    """Run jobs as an array job of SLURM.

    Raises:
        RunError: If submitit is not installed, there is no SLURM on this machine, or it refuses the jobs.
    """
    _check_slurm()
    import submitit

    if not jobs:
        return
    asked = asked or Slurm()
    cancel_left(folder / "slurm")
    executor = submitit.AutoExecutor(folder=folder / "slurm", cluster="slurm")
    executor.update_parameters(
        name="chiasm",
        timeout_min=asked.timeout_min,
        cpus_per_task=asked.cpus_per_task,
        gpus_per_node=asked.gpus_per_node or None,  # a cluster without GPUs refuses to be asked for none
        mem_gb=asked.mem_gb,
        slurm_partition=asked.partition,
        slurm_account=asked.account,
        slurm_qos=asked.qos,
        slurm_additional_parameters={"signal": time_signal(asked.timeout_min), **asked.options},
    )

    def once(some: Sequence[Job], _last: bool) -> Reports[Outcome, Job]:
        try:
            submitted = executor.map_array(partial(_attempt_in_time, work), list(some))
        except submitit.core.utils.FailedJobError as error:
            raise RunError(
                "SLURM refused the jobs",
                reason="slurm",
                found=str(error).strip().splitlines()[-1],
                hint="The table [slurm] of a study file says what is asked for.",
            ) from error
        left = dict(zip(submitted, some, strict=True))
        try:
            for one, state in ended(submitted):
                yield unwrapped(_result(one, state, left.pop(one)))
        finally:
            for one in left:
                one.cancel(check=False)

    reports: Iterator[Outcome | Lost[Job]] = twice(jobs, once)
    yield from reports


class _TimeIsUp:
    """The outcome of a job that stopped because its time was nearly over."""


def _attempt_in_time(work: Callable[[Job], Outcome], job: Job) -> Outcome | Raised | _TimeIsUp:
    """Do a job of SLURM; stop it with a checkpoint before its time ends, and also where it is cancelled or requeued.

    submitit handles these signals otherwise: it would ignore SIGTERM.

    Raises:
        SystemExit: If SLURM cancels or requeues the job: then its state says so.
    """
    try:
        with stoppable():
            return attempt(work, job)
    except SystemExit as stopped:
        if stopped.code != 128 + signal.SIGUSR1:
            raise
        return _TimeIsUp()


def _result(submitted: Any, state: str | None, job: Job) -> Any:
    """Return the outcome of a job of SLURM, or `Lost` if it wrote none."""
    if state is not None:
        cause = f"SLURM reports {state} for its job {submitted.job_id}; see {submitted.paths.stderr}"
        return Lost(job, cause, may_lack_memory=state in MEMORY)
    outcome = submitted.result()
    if isinstance(outcome, _TimeIsUp):
        submitted.cancel(check=False)  # SLURM would requeue a job that it preempts by this signal
        cause = f"the time of its job {submitted.job_id} was nearly over"
        return Lost(job, cause, may_lack_memory=False)
    return outcome


def _check_ray() -> None:
    if find_spec("ray") is None:
        raise _absent("ray", "ray")


def _check_slurm() -> None:
    if find_spec("submitit") is None:
        raise _absent("submitit", "slurm")
    if missing := [program for program in ("sbatch", "srun", "squeue", "scancel") if shutil.which(program) is None]:
        raise RunError(
            f"there is no SLURM on this machine: the program {missing[0]} was not found",
            reason="no-slurm",
            hint="Use --runner processes here, or start the same command where jobs are submitted.",
        )


def _absent(package: str, extra: str) -> RunError:
    return RunError(
        f"the runner needs {package}, which is not installed",
        reason="not-installed",
        hint=f"pip install 'chiasm[{extra}]', or use --runner processes.",
    )


RUNNERS: dict[str, Runner] = {"serial": serial, "processes": processes, "ray": ray, "slurm": slurm}
_CHECKS: dict[str, Callable[[], None]] = {"ray": _check_ray, "slurm": _check_slurm}


def find_runner(name: str, asked: Mapping[str, Section | None] | None = None) -> Runner:
    """Return a runner by name, ready to run on this machine.

    Args:
        name: A name of `RUNNERS`.
        asked: The resources of each job on a cluster, by the runner's name.

    Raises:
        RecipeError: If there is no runner of that name.
        RunError: If it cannot run here because a package or SLURM is missing.
    """
    if name not in RUNNERS:
        raise unknown("runner", name, RUNNERS)
    if name in _CHECKS:
        _CHECKS[name]()
    wanted = (asked or {}).get(name)
    return RUNNERS[name] if wanted is None else partial(RUNNERS[name], asked=wanted)  # type: ignore[call-arg]
