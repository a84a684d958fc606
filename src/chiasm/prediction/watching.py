"""Who watches a prediction: called as networks pass over a volume, and free to end it by raising.

The watcher belongs to the thread that predicts, so that two predictions do not report to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Watcher = Callable[[int, int], None]  # passes or planes done, and all of this run of a network over the volume

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Report what is predicted in the block, by this thread, to `watcher`; None reports to nobody."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def passes(inputs: Sequence[Item]) -> Iterator[Item]:
    """Give the inputs of a network's passes one by one, and report each that is done.

    Of loops inside loops the outer one reports.

    >>> with watched(lambda done, total: print(done, "of", total)):
    ...     for _ in passes("ab"):
    ...         pass
    1 of 2
    2 of 2
    """
    for done, one in enumerate(inputs, 1):
        with watched(None):
            yield one
        report_pass(done, len(inputs))


def report_pass(done: int, total: int) -> None:
    """Report how much of a network's run over a volume is done."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(done, total)
