"""How a server is asked to end: by Ctrl-C, by SIGTERM, or because its terminal was closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event

from chiasm.stopping import handled, stopping_signals


class Stop:
    """Whether a server is asked to end.

    During a prediction it raises at once; otherwise the loop of the server checks it.  An exception in another place
    could leave threads behind, and Python would wait for them.
    """

    def __init__(self) -> None:
        self.asked = Event()
        self.at_once = False

    def __call__(self, *_: object) -> None:
        """Handle a signal: note that it came."""
        self.asked.set()
        if self.at_once:
            raise KeyboardInterrupt


@contextmanager
def until_stopped() -> Iterator[Stop]:
    """Handle the signals that end a server while the block runs."""
    stop = Stop()
    with handled(stop, stopping_signals()), suppress(KeyboardInterrupt):
        yield stop
