"""Studies that come by STOW-RS: each becomes a job of the queue when nothing more of it comes.

Archives send a study in several requests.  So a study waits until nothing came for a while; one of whose requests
broke off waits longer for the sender to try again, and is then removed, because a part of a scan is none.

Only the event loop of the server calls this module, but for `_work`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from chiasm.cohorts.dicom_patients import parse_rules
from chiasm.errors import VolumeError
from chiasm.serving.dicomweb_receive import NO_ROOM, SUFFIX, Received, read_uids
from chiasm.serving.dicomweb_results import FoundSeries, index_results
from chiasm.serving.jobs import FullError, JobQueue, Outcome, ServedJob
from chiasm.serving.scans import ALL, SOURCES, Handed, Report, Synthesiser, show_scan, synthesise_scan, without_folder

QUIET_S = 5.0  # without a new instance, after which a study is whole
PARTIAL_S = 60.0  # after which a study is thrown away of which a request broke off
MOST_IMAGES = 5000  # of a study
ARRIVING = "arriving"  # folder of a request's instances


@dataclass
class _Coming:
    """A study whose instances are coming in."""

    job: ServedJob
    sender: str
    files: dict[str, Path] = field(default_factory=dict)  # by SOP Instance UID
    changes: int = 0
    is_broken: bool = False


def rules_of(words: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
    """Return the rules that choose series of a study; all words together are one rule for a model of one source.

    Args:
        words: Of the command.
        sources: Of the model.

    Raises:
        RecipeError: If a rule names no source.

    >>> rules_of(["brain", "two"], ["t1"]), rules_of(["t1=one", "t2=two"], ["t1", "t2"])
    (('brain two',), ('t1=one', 't2=two'))
    """
    rules = (" ".join(words),) if words and len(sources) == 1 else tuple(words)
    parse_rules(rules, sources)
    return rules


class Studies:
    """Studies that are coming in, and the results of those that came.

    Args:
        queue: Of jobs.
        using: The model.
        rules: Which series is which source, as those of `chiasm predict --series`.
        say: Called with each line of the log.
        quiet_s: Seconds without a new instance after which a study is whole.
        partial_s: Seconds after which a study is removed of which a request broke off.
    """

    def __init__(
        self,
        queue: JobQueue,
        using: Synthesiser,
        rules: Sequence[str],
        say: Callable[[str], None],
        quiet_s: float = QUIET_S,
        partial_s: float = PARTIAL_S,
    ) -> None:
        self._queue, self._using, self._rules, self._say = queue, using, tuple(rules), say
        self._quiet_s, self._partial_s = quiet_s, partial_s
        self._coming: dict[str, _Coming] = {}
        self._sending: Counter[str] = Counter()  # requests that are being received, by sender
        self._jobs: dict[str, list[str]] = {}  # ids of the jobs of each study
        self._made: dict[str, list[FoundSeries]] = {}  # by job

    @contextmanager
    def sending(self, sender: str) -> Iterator[None]:
        """Let the studies of a sender wait while the block receives another request of it.

        Args:
            sender: Its address.
        """
        self._sending[sender] += 1
        try:
            yield
        finally:
            self._sending[sender] -= 1
            self._sending += Counter()  # without those of none

    def add(self, job: ServedJob, received: Sequence[Received], sender: str) -> list[Received]:
        """Add the instances of a request to their studies.

        Args:
            job: Of the request; it becomes that of a study, or the caller deletes it (see `keeps`).
            received: What arrived.
            sender: Address of who sent it.

        Returns:
            The same instances; of those that found no room, with that failure.
        """
        added = [one if one.failure else self._add(job, one, sender) for one in received]
        for study in {one.study for one in added if not one.failure}:
            coming = self._coming[study]
            coming.changes, coming.is_broken = coming.changes + 1, False
            coming.job.bytes = sum(path.stat().st_size for path in coming.files.values())
            self._look_later(self._quiet_s, study)
        return added

    def _add(self, job: ServedJob, one: Received, sender: str) -> Received:
        coming = self._coming.get(one.study)
        if coming is None:
            try:
                coming = self._begin(job, one.study, sender)
            except FullError:
                return one._replace(failure=NO_ROOM)
        path = coming.files.get(one.instance)
        if path is None and len(coming.files) >= MOST_IMAGES:
            return one._replace(failure=NO_ROOM)
        path = path or coming.job.folder / SOURCES / f"{len(coming.files) + 1:06d}{SUFFIX}"
        one.path.replace(path)
        coming.files[one.instance] = path
        return one

    def _begin(self, job: ServedJob, study: str, sender: str) -> _Coming:
        """Make the place of a study for its first instance."""
        own = self._queue.begin() if self.keeps(job) else job
        (own.folder / SOURCES).mkdir(mode=0o700)
        self._coming[study] = _Coming(own, sender)
        return self._coming[study]

    def keeps(self, job: ServedJob) -> bool:
        """Return whether a job is that of a study that is coming in."""
        return any(one.job is job for one in self._coming.values())

    def broke_off(self, folder: Path) -> None:
        """Note that a request broke off, by the whole instances that it sent before; they are all of one study.

        Args:
            folder: Of the request.
        """
        first = next(iter(sorted((folder / ARRIVING).glob(f"*{SUFFIX}"))), None)
        try:
            study = "" if first is None else read_uids(first)[2]
        except VolumeError:
            return
        if coming := self._coming.get(study):
            coming.changes, coming.is_broken = coming.changes + 1, True
            self._look_later(self._partial_s, study)

    def _look_later(self, seconds: float, study: str) -> None:
        asyncio.get_running_loop().call_later(seconds, self._look, study, self._coming[study].changes)

    def _look(self, study: str, changes: int) -> None:
        """Begin the work on a study if nothing came since."""
        coming = self._coming.get(study)
        if coming is None or coming.changes != changes:
            return
        if self._sending[coming.sender]:
            self._look_later(self._quiet_s, study)
            return
        del self._coming[study]
        job = coming.job
        if coming.is_broken:
            self._say(f"job {job.number}: a request of the study broke off, removed")
            self._queue.delete(job.id)
            return
        self._say(f"job {job.number}: handed in by DICOMweb, images: {len(coming.files)}")
        handed = Handed({ALL: job.folder / SOURCES}, self._rules)
        self._jobs.setdefault(study, []).append(job.id)
        view = partial(show_scan, folder=job.folder, handed=handed, using=self._using)
        self._queue.submit(job, partial(self._work, job=job, handed=handed), view)

    def _work(self, folder: Path, report: Report, *, job: ServedJob, handed: Handed) -> Outcome:
        outcome = synthesise_scan(folder, report, handed=handed, using=self._using)
        with without_folder(folder):
            self._made[job.id] = index_results(job)
        return outcome

    def series(self, study: str | None = None) -> list[FoundSeries]:
        """Return all series that were made and are still kept, or those of a study."""
        self._forget()
        done = [one for made in list(self._made.values()) for one in made if one.job.state == "done"]
        return [one for one in done if study in (None, one.study)]

    def job_of(self, study: str) -> ServedJob | None:
        """Return the last job of a study that came; None if there is none, or it is too old."""
        self._forget()
        if study in self._coming:
            return self._coming[study].job
        names = self._jobs.get(study, [])
        return self._queue.find(names[-1]) if names else None

    def _forget(self) -> None:
        """Forget jobs that are kept no more."""
        kept = {name for names in self._jobs.values() for name in names if self._queue.find(name)}
        self._jobs = {
            study: left for study, names in self._jobs.items() if (left := [one for one in names if one in kept])
        }
        for name in [name for name in list(self._made) if name not in kept]:
            del self._made[name]
