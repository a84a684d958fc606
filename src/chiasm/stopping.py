"""How a command is asked to stop: Ctrl-C, a polite kill, or a terminal that was closed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """The command was asked to stop; all that it held is let go on the way out."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop; without SIGHUP where that is ignored, as under ``nohup``."""
    closing: signal.Signals | None = getattr(signal, "SIGHUP", None)  # which Windows does not have
    hears_closing = closing is not None and signal.getsignal(closing) is not signal.SIG_IGN
    asked = (signal.SIGINT, signal.SIGTERM)
    return (*asked, closing) if closing is not None and hears_closing else asked


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where SIGTERM or SIGHUP comes inside the block, so that locks and temporaries are removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    try:
        before = {number: signal.signal(number, stop) for number in stopping_signals() if number != signal.SIGINT}
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
