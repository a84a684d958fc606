"""How a server is asked to end: by Ctrl-C, SIGTERM, or a terminal that was closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event

from chiasm.stopping import handled, stopping_signals


class Stop:
    """Whether a server is to end: at once out of the work that it does now, else when its loop looks.

    An exception anywhere else could leave threads behind, for which Python would wait.
    """

    def __init__(self) -> None:
        self.asked = Event()
        self.at_once = False

    def __call__(self, *_: object) -> None:
        """Note that a signal came; it is the signal's handler."""
        self.asked.set()
        if self.at_once:
            raise KeyboardInterrupt


@contextmanager
def until_stopped() -> Iterator[Stop]:
    """Hear the signals that end a server while the block runs."""
    stop = Stop()
    with handled(stop, stopping_signals()), suppress(KeyboardInterrupt):
        yield stop
