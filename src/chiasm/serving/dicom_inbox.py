"""Images that arrive by C-STORE, gathered into complete series.

Images are grouped by SeriesInstanceUID and the title of their sender.  Senders may spread a series over several
associations.  So a series is complete when every association that sent a part of it was released, and nothing came for
a while.  If an association broke off, its series waits longer for the sender to try again, and is then removed.

No text of an image becomes a path: files and folders have numbers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from chiasm.errors import ChiasmError, VolumeError
from chiasm.volumes.dicom_files import DicomFile, read_dataset, taming, text

MIB = 2**20


class Limits(NamedTuple):
    """The limits of a node.

    Attributes:
        image_bytes: Of one image.
        series_bytes: Of one series.
        all_bytes: Of all that waits.
        images: In one series.
        series: That wait at a time.
        quiet_s: Seconds without a new image after which a series is whole.
        partial_s: Seconds after which a series is thrown away whose association broke off.
        associations: At a time; where another waits, the one that was silent for longest ends.
        silent_s: Seconds of silence after which an association may be ended for another.
        waiting: Connections at a time that have not asked for an association yet.
        request_s: Seconds within which a connection must have asked for an association.
        idle_s: Seconds that an association may be silent, or take to send one PDU.
    """

    image_bytes: int = 1024 * MIB
    series_bytes: int = 2048 * MIB
    all_bytes: int = 8192 * MIB
    images: int = 5000
    series: int = 64
    quiet_s: float = 5.0
    partial_s: float = 60.0
    associations: int = 64
    silent_s: float = 1.0
    waiting: int = 256
    request_s: float = 5.0
    idle_s: float = 30.0


class InboxError(ChiasmError):
    """An image that is refused because there is no room for it."""


class Arrival(NamedTuple):
    """A series that left the inbox.

    Attributes:
        number: Counted from 1.
        sender: Title of the sender.
        folder: Its images; the caller removes it.
        images: Number of images.
        whole: Whether its associations were released; otherwise the folder is removed already.
    """

    number: int
    sender: str
    folder: Path
    images: int
    whole: bool


@dataclass
class _Pending:
    number: int
    folder: Path
    last: float
    files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    associations: set[Hashable] = field(default_factory=set)
    broken: bool = False

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files.values())


class Inbox:
    """Series that are coming in; associations store from threads of their own, one thread collects.

    Args:
        folder: An empty one of its own.
        limits: What it takes.
        clock: Seconds, rising.
    """

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._limits, self._clock = folder, limits, clock
        self._lock = Lock()
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._pending)

    def store(self, association: Hashable, sender: str, content: bytes) -> None:
        """Store one image; it replaces an image with the same SOPInstanceUID in the same series.

        Args:
            association: What stands for it.
            sender: Its title.
            content: A DICOM file.

        Raises:
            VolumeError: If it is no DICOM, or lacks a UID.
            InboxError: If a limit is reached.
            OSError: If it cannot be stored.
        """
        if len(content) > self._limits.image_bytes:
            raise InboxError("the image is too large", reason="too-large")
        series, image = _read_uids(content)
        with self._lock:
            waiting = self._pending.get((sender, series)) or self._begin(sender, series)
            path, replaced = waiting.files.get(image, (waiting.folder / f"{len(waiting.files) + 1:06d}.dcm", 0))
            self._check_room(waiting, len(content) - replaced)
            path.write_bytes(content)
            waiting.files[image] = path, len(content)
            waiting.associations.add(association)
            waiting.broken, waiting.last = False, self._clock()

    def _begin(self, sender: str, series: str) -> _Pending:
        """Make the place of a series for its first image."""
        if len(self._pending) >= self._limits.series:
            raise InboxError("too many series wait", reason="full", expected=f"at most {self._limits.series}")
        self._count += 1
        waiting = _Pending(self._count, self._folder / f"series-{self._count}", self._clock())
        waiting.folder.mkdir(mode=0o700)
        self._pending[sender, series] = waiting
        return waiting

    def _check_room(self, waiting: _Pending, added: int) -> None:
        """Refuse an image that would make its series, or all waiting series, larger than the limits."""
        limits = self._limits
        if len(waiting.files) >= limits.images or waiting.size + added > limits.series_bytes:
            raise InboxError("the series is too large", reason="too-large")
        if sum(one.size for one in self._pending.values()) + added > limits.all_bytes:
            raise InboxError("there is no room", reason="full")

    def released(self, association: Hashable) -> None:
        """Note that an association ended as it should."""
        self._ended(association, False)

    def _ended(self, association: Hashable, broken: bool) -> None:
        with self._lock:
            for waiting in self._pending.values():
                if association in waiting.associations:
                    waiting.associations.discard(association)
                    waiting.broken |= broken

    def collect(self, alive: Callable[[], Collection[Hashable]]) -> list[Arrival]:
        """Return one complete series, if there is one, and remove series that will never be complete.

        Args:
            alive: Returns the associations that still are; any other that sent images before this call, and was not
                released, broke off.
        """
        sent = self._associations()  # first: what begins from now on is not in it
        for association in sent.difference(alive()):
            self._ended(association, True)
        arrivals: list[Arrival] = []
        with self._lock:
            for key in [key for key, waiting in self._pending.items() if self._is_due(waiting)]:
                arrivals.append(self._take(key))
                if arrivals[-1].whole:
                    break
        return arrivals

    def remaining(self) -> list[Arrival]:
        """Take all series, complete or not, when no more time is left."""
        with self._lock:
            return [self._take(key) for key in list(self._pending)]

    def _associations(self) -> set[Hashable]:
        """Return all associations that sent a part of a waiting series."""
        return {one for waiting in list(self._pending.values()) for one in list(waiting.associations)}

    def _is_due(self, waiting: _Pending) -> bool:
        """Return whether a series need not wait longer: it has no association, and was silent for long enough."""
        wait = self._limits.partial_s if waiting.broken else self._limits.quiet_s
        return not waiting.associations and self._clock() - waiting.last >= wait

    def _take(self, key: tuple[str, str]) -> Arrival:
        """Take a series out of the inbox; remove its images if an association broke off."""
        waiting = self._pending.pop(key)
        if waiting.broken:
            shutil.rmtree(waiting.folder, ignore_errors=True)
        return Arrival(waiting.number, key[0], waiting.folder, len(waiting.files), not waiting.broken)


def _read_uids(content: bytes) -> tuple[str, str]:
    """Read the SeriesInstanceUID and the SOPInstanceUID of an image."""
    part = DicomFile(Path("the image"))
    header = read_dataset(part, BytesIO(content), tags=("SeriesInstanceUID", "SOPInstanceUID"))
    with taming(part):
        series, image = text(header, "SeriesInstanceUID"), text(header, "SOPInstanceUID")
    if not series or not image:
        raise VolumeError("names no series or image", path=part.path, reason="header")
    return series, image
