"""Headers of DICOM files that were read already: a command parses each once, however often it scans a place.

A header is kept with the size, time and number of its file, and is parsed again if one of them changed.  The clock of
a file system is coarse, so the header of a file that was written just before is not kept.  Headers of damaged files
are not kept either: each error that is raised is a new one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from threading import Lock
from typing import BinaryIO, NamedTuple

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile
from chiasm.volumes.dicom_series import DicomHeader, read_header

MOST_IMAGES = 100_000  # of all headers that are kept, about 2 KB each
FRESH_SECONDS = 2.0  # a file that is younger may change without a change of its time


class FileState(NamedTuple):
    """Facts on a file of which at least one changes whenever the file changes."""

    device: int
    number: int
    size: int
    time_ns: int

    @property
    def is_fresh(self) -> bool:
        """Whether the file may change again without a change of its time."""
        return time.time_ns() - self.time_ns < FRESH_SECONDS * 1e9


class KeptHeaders:
    """Headers by their file; those that were needed longest ago are dropped.

    Attributes:
        most: Images that all kept headers together may describe.
    """

    def __init__(self, most: int = MOST_IMAGES) -> None:
        """Start without headers."""
        self.most = most
        self._found: OrderedDict[DicomFile, tuple[FileState, DicomHeader]] = OrderedDict()
        self._images = 0
        self._lock = Lock()

    def read(self, part: DicomFile, file: BinaryIO) -> DicomHeader | None:
        """Return the header of a file, as `read_header` does; it is parsed if it is not kept.

        Args:
            part: What it is called.
            file: Open at its start, as from `visit`.

        Raises:
            VolumeError: As `read_header`.
        """
        state = _state_of(part)
        with self._lock:
            before = self._found.get(part)
            if before is not None and before[0] == state:
                self._found.move_to_end(part)
                return before[1]
        header = read_header(part, file)
        is_whole = header is not None and header.fault is None and header.series.fault is None
        if header is not None and is_whole and not state.is_fresh:
            self._keep(part, state, header)
        return header

    def forget(self) -> None:
        """Drop all headers, as if nothing had been read."""
        with self._lock:
            self._found.clear()
            self._images = 0

    def _keep(self, part: DicomFile, state: FileState, header: DicomHeader) -> None:
        with self._lock:
            self._drop(part)
            self._found[part] = state, header
            self._images += _size_of(header)
            while self._images > self.most:
                self._drop(next(iter(self._found)))

    def _drop(self, part: DicomFile) -> None:
        if (before := self._found.pop(part, None)) is not None:
            self._images -= _size_of(before[1])


def _size_of(header: DicomHeader) -> int:
    return 1 + len(header.frames)


def _state_of(part: DicomFile) -> FileState:
    """Return the state of a file.

    Raises:
        VolumeError: If it is gone.
    """
    try:
        found = part.path.stat()
    except OSError as error:
        raise VolumeError("cannot be read", path=part.place, reason="unreadable", found=error.strerror) from error
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


KEPT = KeptHeaders()
