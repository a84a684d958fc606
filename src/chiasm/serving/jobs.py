"""Jobs of the page and the API: each has a folder, waits for its turn, runs, and is removed after some time.

One job runs at a time.  Everybody who has a job's id can see the job.  Ids cannot be guessed, and there is no list of
them.  The folder of a job is removed when the job is deleted or its time is over.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Literal, NamedTuple

from chiasm.errors import ChiasmError
from chiasm.serving.web_limits import WebLimits

State = Literal["receiving", "waiting", "running", "done", "failed"]

RECENT = 8  # finished jobs whose times say how long the next takes
GUESS_S = 5.0  # of a job, while none is finished
SWEEP_S = 1.0


class Cancelled(Exception):
    """The running job was deleted, or the server ends."""


class Outcome(NamedTuple):
    """The result of a job.

    Attributes:
        files: Names of files in the job's folder, each with a name for people.
        warnings: Warnings for readers of the images, one sentence each.
    """

    files: Mapping[str, str]
    warnings: tuple[str, ...]


#: Works on a job in its folder; reports what it does and how far it is, in [0, 1]; may raise whatever it likes.
Work = Callable[[Path, Callable[[str, float], None]], Outcome]
#: Draws what a job made as a page, beside a source, with its warnings.
View = Callable[[str, Sequence[str]], str]


@dataclass
class ServedJob:
    """A job, its state and its result.

    Attributes:
        id: Cannot be guessed.
        number: Counted from 1, for the log.
        folder: Its files.
        since: When it came into its state, seconds of the queue's clock.
        state: Where it is.
        stage: What is done with it, in words.
        progress: Share of the work that is done, in [0, 1].
        seconds: That the work took.
        outcome: What it made, where it is done.
        error: Why it failed.
        bytes: Of its folder, when last looked at.
        is_deleted: Whether it is wanted no more.
        view: Draws its result as a page.
    """

    id: str
    number: int
    folder: Path
    since: float
    state: State = "receiving"
    stage: str = ""
    progress: float = 0.0
    seconds: float = 0.0
    outcome: Outcome = field(default_factory=lambda: Outcome({}, ()))
    error: ChiasmError | None = None
    bytes: int = 0
    is_deleted: bool = False
    view: View | None = None


class FullError(ChiasmError):
    """No job can be accepted now.

    Args:
        what: Why.
        retry_s: Seconds after which there may be room.
    """

    def __init__(self, what: str, retry_s: float) -> None:
        super().__init__(what, reason="full", hint=f"Try again in {max(1, round(retry_s))} s.")
        self.retry_s = max(1, round(retry_s))


class JobQueue:
    """Waiting jobs, one running job, and finished jobs; safe to call from any thread.

    Args:
        folder: An empty one of its own.
        limits: How many are taken and how long they are kept.
        say: Called with each line of the log; it names no file.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        folder: Path,
        limits: WebLimits,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._limits, self._say, self._clock = folder, limits, say, clock
        self._count = 0
        self._lock = RLock()
        self._jobs: dict[str, ServedJob] = {}
        self._took: deque[float] = deque([GUESS_S], maxlen=RECENT)
        self._closing = Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="chiasm-job")
        self._sweeper = Thread(target=self._sweep_on, daemon=True, name="chiasm-sweeper")
        self._sweeper.start()

    def begin(self) -> ServedJob:
        """Reserve a place for a job whose files are arriving; `submit` or `delete` it later.

        Raises:
            FullError: If there is no place.
        """
        with self._lock:
            self.sweep()
            self._check_room()
            self._count += 1
            job = ServedJob(secrets.token_urlsafe(16), self._count, self._folder / secrets.token_hex(8), self._clock())
            job.folder.mkdir(mode=0o700)
            self._jobs[job.id] = job
        return job

    def submit(self, job: ServedJob, work: Work, view: View | None = None) -> None:
        """Let a job wait for its turn, now that its files are there.

        Args:
            job: From `begin`.
            work: What is done with it.
            view: Draws its result.
        """
        with self._lock:
            job.view = view
            job.state, job.since, job.bytes = "waiting", self._clock(), _size(job.folder)
            self._worker.submit(self._run, job, work).add_done_callback(lambda future: self._note(job, future))

    def find(self, name: str) -> ServedJob | None:
        """Return a job by its id; None if there is none, or it is too old."""
        with self._lock:
            self.sweep()
            return self._jobs.get(name)

    def delete(self, name: str) -> bool:
        """Delete a job and its files; a running job ends after its current pass.

        Returns:
            Whether there was one.
        """
        with self._lock:
            job = self._jobs.pop(name, None)
            if job is None:
                return False
            job.is_deleted = True
            if job.state != "running":  # its folder goes when the work has ended
                shutil.rmtree(job.folder, ignore_errors=True)
            return True

    def place(self, job: ServedJob) -> int:
        """Return how many jobs come before a waiting job; 0 for other jobs."""
        with self._lock:
            if job.state != "waiting":
                return 0
            before = [one for one in self._jobs.values() if one.state == "waiting" and one.since < job.since]
            return len(before) + sum(one.state == "running" for one in self._jobs.values())

    def expected_s(self, jobs: int = 1) -> float:
        """Return about how many seconds a number of jobs takes."""
        with self._lock:
            return jobs * sum(self._took) / len(self._took)

    def expires_s(self, job: ServedJob) -> float | None:
        """Return the seconds until a finished job is removed; None for other jobs."""
        if job.state not in ("done", "failed"):
            return None
        return max(0.0, job.since + self._limits.keep_s - self._clock())

    def sweep(self) -> None:
        """Remove jobs whose time is over."""
        with self._lock:
            for job in list(self._jobs.values()):
                if self.expires_s(job) == 0:
                    self.delete(job.id)

    def close(self) -> None:
        """End the work, remove all jobs, and return when no thread is left."""
        self._closing.set()
        with self._lock:
            for job in self._jobs.values():
                if job.state not in ("done", "failed"):
                    self._say(f"job {job.number}: the server ended before it was done, removed")
            for name in list(self._jobs):
                self.delete(name)
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._sweeper.join()

    # what the worker does

    def _run(self, job: ServedJob, work: Work) -> Outcome:
        with self._lock:
            if job.is_deleted:
                raise Cancelled
            job.state, job.since = "running", self._clock()

        def report(stage: str, progress: float) -> None:
            """Note how far the work is.

            Raises:
                Cancelled: If it is wanted no more.
            """
            if job.is_deleted or self._closing.is_set():
                raise Cancelled
            job.stage, job.progress = stage, max(job.progress, min(progress, 1.0))

        return work(job.folder, report)

    def _note(self, job: ServedJob, future: Future[Outcome]) -> None:
        """Store the result of a job; remove its folder if it was deleted meanwhile."""
        error = Cancelled() if future.cancelled() else future.exception()
        with self._lock:
            job.seconds, job.since = self._clock() - job.since, self._clock()
            job.stage = ""
            if job.is_deleted or isinstance(error, Cancelled):
                shutil.rmtree(job.folder, ignore_errors=True)
            elif error is None:
                job.outcome, job.state, job.progress = future.result(), "done", 1.0
                job.bytes = _size(job.folder)
                self._took.append(job.seconds)
                self._say(f"job {job.number}: done in {job.seconds:.1f} s")
            else:
                job.error, job.state = described(error), "failed"
                self._say(f"job {job.number}: refused ({job.error.reason})")
                shutil.rmtree(job.folder, ignore_errors=True)
                job.bytes = 0

    def _check_room(self) -> None:
        jobs = list(self._jobs.values())
        busy = sum(one.state in ("receiving", "waiting") for one in jobs)
        finished = [one for one in jobs if one.state in ("done", "failed")]
        if busy >= self._limits.waiting:
            raise FullError("too many jobs wait", self.expected_s())
        if len(finished) >= self._limits.finished or sum(one.bytes for one in jobs) > self._limits.stored_bytes:
            soonest = min((self.expires_s(one) or 0.0 for one in finished), default=self.expected_s())
            raise FullError("too many results are kept; delete those that you have fetched", soonest)

    def _sweep_on(self) -> None:
        while not self._closing.wait(SWEEP_S):
            self.sweep()


def described(error: BaseException) -> ChiasmError:
    """Return an error that a user can act on; of other errors only the type, as the text may come from an image."""
    if isinstance(error, ChiasmError):
        return error
    if isinstance(error, MemoryError):
        return ChiasmError("memory ran out", reason="out-of-memory", hint="Try a smaller volume, or a larger machine.")
    return ChiasmError(
        f"the work failed ({type(error).__name__})", reason="failed", hint="This is a mistake of chiasm: report it."
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
