"""How a command is asked to stop: by Ctrl-C, by SIGTERM or SIGUSR1, or because its terminal was closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import current_thread, main_thread
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """The command was asked to stop; its locks and temporary files are removed on the way out."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop: SIGHUP and SIGUSR1 only if they are not ignored, as SIGHUP is by ``nohup``.

    SIGUSR1 is what jobs of SLURM ask for before their time ends (``--signal=USR1@120``).
    """
    others = (getattr(signal, name, None) for name in ("SIGHUP", "SIGUSR1"))  # which Windows does not have
    heard = [one for one in others if one is not None and signal.getsignal(one) is not signal.SIG_IGN]
    return (signal.SIGINT, signal.SIGTERM, *heard)


@contextmanager
def handled(handler: Handler, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Call `handler` if one of the signals comes inside the block, and restore the earlier handlers at its end.

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
    """As `handled` in the main thread; another thread must leave the signals alone, so nothing is done there."""
    return handled(handler, numbers) if current_thread() is main_thread() else nullcontext()


@contextmanager
def stoppable() -> Iterator[None]:
    """Stop the block at Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, so that locks and temporary files are removed.

    Ctrl-C stays ignored where it was, as of a command in the background of a script.

    Raises:
        Stopped: If one of the signals comes.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with handled_here(stop, [number for number in stopping_signals() if not (is_deaf and number == signal.SIGINT)]):
        yield
