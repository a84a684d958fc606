"""How a command is asked to stop: Ctrl-C, a polite kill, or a terminal that was closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import current_thread, main_thread
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


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
def handled(handler: Handler, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Call `handler` where one of the signals comes inside the block; afterwards they mean what they meant before.

    Raises:
        ValueError: If this is not the main thread.
    """
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def handled_here(handler: Handler, numbers: Iterable[signal.Signals]) -> AbstractContextManager[None]:
    """As `handled`; in a thread that is not the main one nothing is done: there the signals are somebody else's."""
    return handled(handler, numbers) if current_thread() is main_thread() else nullcontext()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where SIGTERM or SIGHUP comes inside the block, so that locks and temporaries are removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    with handled_here(stop, [number for number in stopping_signals() if number != signal.SIGINT]):
        yield
