"""How long work reports how far it is: a bar on a terminal, a line a minute in a log.

Both go to stderr, so that what a command prints can be read by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

#: Called with how many are done, how many there are, and the name of the next one.
Progress = Callable[[int, int, str], None]
#: Called with how many steps are done, how many there are, and values of the last one, such as its loss.
StepProgress = Callable[[int, int, Mapping[str, float]], None]

SECONDS_A_LINE = 60.0
SPEED_SECONDS = 900.0  # the speed is a mean over as long: jobs of a study take minutes each


def open_progress() -> Bar:
    """Open a bar; tasks are added when their first step is done, since much may be refused before it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Bar(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=SPEED_SECONDS,
        disable=not console.is_terminal,
    )


Item = TypeVar("Item")


def counted(items: Sequence[Item], name: Callable[[Item], str], progress: Progress | None) -> Iterator[Item]:
    """Go through items, and report before each of them, and once after the last.

    Args:
        items: Cases or jobs.
        name: What an item is called.
        progress: Called with items done, all items, and the next one's name; None reports nothing.

    >>> list(counted(["a"], str.upper, lambda *step: print(step)))
    (0, 1, 'A')
    (1, 1, '')
    ['a']
    """
    report = progress or _silence
    for index, item in enumerate(items):
        report(index, len(items), name(item))
        yield item
    report(len(items), len(items), "")


def _silence(done: int, total: int, name: str) -> None:
    """Report nothing."""


def count(bar: Bar, name: str) -> Progress:
    """Show cases or jobs: done, all, and the one that is worked on."""
    update = _updater(bar, name)
    return lambda done, total, case: update(done, total, f" {case}".rstrip())


def follow(bar: Bar, name: str) -> StepProgress:
    """Show training steps, with the loss beside them."""
    update = _updater(bar, name)

    def say(done: int, total: int, values: Mapping[str, float]) -> None:
        update(done, total, f" loss {values['loss']:.4f}" if "loss" in values else " discriminators")

    return say


def _updater(bar: Bar, name: str) -> Progress:
    """Move one task of a bar; without a terminal, print a line where the last was a minute ago, and the last one."""
    task = bar.add_task(name, total=None, visible=False)
    start = reported = time.monotonic()
    before = timed = 0  # done by an earlier process; done before the first report, which other work may have delayed
    is_first = True

    def update(done: int, total: int, words: str) -> None:
        nonlocal start, reported, before, timed, is_first
        bar.update(task, total=total, completed=done, description=name + words, visible=True)
        now = time.monotonic()
        if is_first:
            start, before, timed, is_first = now, max(0, done - 1), done, False
        if bar.disable and (now - reported >= SECONDS_A_LINE or done == total > before):
            reported = now
            left = _left(now - start, done - timed, total - done)
            bar.console.print(f"{name}{words}: {done} of {total}{left}", highlight=False, soft_wrap=True)

    return update


def _left(seconds: float, done: int, to_do: int) -> str:
    """Say how long the rest takes at the speed so far; nothing where that is not known, or nothing is left.

    >>> _left(600.0, 20, 40), _left(600.0, 0, 40)
    (', about 20 min left', '')
    """
    if done <= 0 or to_do <= 0:
        return ""
    return f", about {max(1, round(seconds / done * to_do / 60))} min left"
