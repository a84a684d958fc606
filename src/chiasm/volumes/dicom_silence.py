"""What pydicom and its decoders log and warn of is kept back: it may quote the patient.

Levels of loggers and filters of warnings belong to the whole process, and several threads read at once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock

TALKERS = ("pydicom", "openjpeg", "pylibjpeg", "jpeg_ls")  # what logs while pixels are decoded

_IS_SILENT: ContextVar[bool] = ContextVar("is_silent", default=False)  # of this thread


@contextmanager
def silenced() -> Iterator[None]:
    """Keep back what pydicom and its decoders log, and every warning; within a block that does so there is no more."""
    if _IS_SILENT.get():
        yield
        return
    before = _IS_SILENT.set(True)
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()
        _IS_SILENT.reset(before)


class _Silence:
    """Logs and warnings of the whole process, kept back from when the first thread begins until the last one ends."""

    def __init__(self) -> None:
        self._turn, self._threads, self._kept_back = Lock(), 0, ExitStack()

    def begin(self) -> None:
        with self._turn:
            if not self._threads:
                self._kept_back.enter_context(_without_logs())
            self._threads += 1

    def end(self) -> None:
        with self._turn:
            self._threads -= 1
            if not self._threads:
                self._kept_back.close()


_SILENCE = _Silence()


@contextmanager
def _without_logs() -> Iterator[None]:
    levels = {logger: logger.level for logger in map(logging.getLogger, TALKERS)}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
