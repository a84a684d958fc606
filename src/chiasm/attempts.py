"""One try of a job in another process: its outcome, its error, or the news that its worker was lost."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from chiasm.errors import ChiasmError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Lost(Generic[Job]):
    """A job whose worker ended before it reported an outcome.

    Attributes:
        job: Which.
        cause: How the worker ended, as the end of a sentence.
        again: Whether the job is tried once more.
        may_lack_memory: Whether memory may have run out: then the system kills the process.
    """

    job: Job
    cause: str
    again: bool = False
    may_lack_memory: bool = True

    def __str__(self) -> str:
        return f"its worker was lost{'' if self.again else ' twice'}: {self.cause}"


Reports = Generator[Outcome | Lost[Job], None, None]


def twice(
    jobs: Sequence[Job], once: Callable[[Sequence[Job], bool], Reports[Outcome, Job]]
) -> Iterator[Outcome | Lost[Job]]:
    """Run jobs, then run the lost ones once more.

    Args:
        jobs: What to do.
        once: Runs some jobs; its argument says whether it is their last try.
    """
    lost: list[Job] = []
    with closing(once(jobs, False)) as reports:
        for report in reports:
            if isinstance(report, Lost):
                lost.append(report.job)
                yield replace(report, again=True)
            else:
                yield report
    if lost:
        yield from once(lost, True)


@dataclass(frozen=True)
class Raised:
    """The error of a worker, in the form that is sent to the waiting process."""

    error: Exception
    trace: str


class _Elsewhere(Exception):
    """Carries the traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def attempt(work: Callable[[Job], Outcome], job: Job) -> Outcome | Raised:
    """Do a job in a worker; return its error as a value, so that no runner changes the message.

    Raises:
        SystemExit: If the job was asked to stop by a signal.
    """
    try:
        return work(job)
    except Exception as error:  # raised again by `unwrapped`
        if (code := getattr(error, "exit_code", None)) is not None:
            raise SystemExit(code) from error
        crosses = isinstance(error, ChiasmError) or type(error).__module__ == "builtins"
        passed = error if crosses else RuntimeError(f"{type(error).__name__}: {error}")
        return Raised(passed, traceback.format_exc())


def unwrapped(outcome: Outcome | Raised) -> Outcome:
    """Return the outcome that a worker reported, or raise its error.

    Raises:
        Exception: The worker's own, if it failed.
    """
    if isinstance(outcome, Raised):
        raise outcome.error from _Elsewhere(outcome.trace)
    return outcome
