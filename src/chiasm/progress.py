"""How long work reports how far it is: a bar on a terminal, a line a minute in a log.

Both go to stderr, so that what a command prints can be read by another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

#: Called with how many are done, how many there are, and the name of the next one.
Progress = Callable[[int, int, str], None]
#: Called with how many steps are done, how many there are, and values of the last one, such as its loss; as "work" the
#: share of all work that is done, where steps differ in what they cost.
StepProgress = Callable[[int, int, Mapping[str, float]], None]

SECONDS_A_LINE = 60.0
SPEED_SECONDS = 900.0  # the speed is a mean over as long: jobs of a study take minutes each
WIDE = 100  # columns of a terminal that has room for the time since the start
NOTE_SECONDS = 1.0  # between two times that the speed is taken from


def open_progress() -> Bar:
    """Open a bar; tasks are added when their first step is done, since much may be refused before it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    console = Console(stderr=True)
    elapsed = [TimeElapsedColumn()] if console.width >= WIDE else []
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), *elapsed)
    return Bar(
        *columns, TextColumn("{task.fields[left]}"), console=console, disable=not console.is_terminal, expand=True
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


def in_lines(say: Callable[[str], None], name: str) -> Progress:
    """Report cases as lines, at most one a minute, and none where all is done sooner.

    Args:
        say: Called with each line.
        name: What is done, such as "preparing".
    """
    speed, reported = _Speed(), time.monotonic()

    def update(done: int, total: int, case: str) -> None:
        nonlocal reported
        speed.note(done / max(total, 1))
        if time.monotonic() - reported >= SECONDS_A_LINE and done < total:
            reported = time.monotonic()
            say(f"{name} {case}: {done} of {total} done{speed.left()}")

    return update


def count(bar: Bar, name: str) -> Progress:
    """Show cases or jobs: done, all, and the one that is worked on."""
    update = _updater(bar, name)
    return lambda done, total, case: update(done, total, f" {case}".rstrip(), done / max(total, 1))


def follow(bar: Bar, name: str) -> StepProgress:
    """Show training steps, with the losses beside them."""
    update = _updater(bar, name)

    def say(done: int, total: int, values: Mapping[str, float]) -> None:
        update(done, total, _losses_in_words(values), values.get("work", done / max(total, 1)))

    return say


def _losses_in_words(values: Mapping[str, float]) -> str:
    """Say the generator's loss, and those of the global and the local discriminator; those that were read.

    >>> _losses_in_words({"loss": 0.25, "global_discriminator_loss": 1.386, "local_discriminator_loss": 1.2})
    ' loss 0.2500, discriminators 1.39, 1.20'
    """
    own = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    read = (values[name] for name in ("global_discriminator_loss", "local_discriminator_loss") if name in values)
    losses = ", ".join(f"{loss:.2f}" for loss in read)
    others = [f"discriminators {losses}".rstrip()] if losses or not own else []
    return f" {', '.join([*own, *others])}"


class _Speed:
    """How fast work is done: over the last quarter of an hour, from the first report on, which other work may delay."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, float]] = deque()

    def note(self, work: float) -> None:
        """Note what share of all work is done now."""
        now = time.monotonic()
        if len(self._noted) > 1 and now - self._noted[-2][0] < NOTE_SECONDS:
            self._noted.pop()
        self._noted.append((now, work))
        while len(self._noted) > 2 and self._noted[1][0] <= now - SPEED_SECONDS:
            self._noted.popleft()

    def left(self) -> str:
        """Say how long the rest takes; nothing where that is not known, or nothing is left."""
        (start, before), (now, work) = self._noted[0], self._noted[-1]
        return _left(now - start, work - before, 1 - work)


def _updater(bar: Bar, name: str) -> Callable[[int, int, str, float], None]:
    """Move one task of a bar; without a terminal, print a line where the last was a minute ago, and the last one."""
    task = bar.add_task(name, total=None, visible=False, left="")
    reported, speed = time.monotonic(), _Speed()
    before = -1  # done by an earlier process

    def update(done: int, total: int, words: str, work: float) -> None:
        nonlocal reported, before
        now = time.monotonic()
        speed.note(work)
        left = speed.left()
        bar.update(task, total=total, completed=done, description=name + words, visible=True, left=left.lstrip(", "))
        before = max(0, done - 1) if before < 0 else before
        if bar.disable and (now - reported >= SECONDS_A_LINE or done == total > before):
            reported = now
            bar.console.print(f"{name}{words}: {done} of {total}{left}", highlight=False, soft_wrap=True)

    return update


def _left(seconds: float, done: float, to_do: float) -> str:
    """Say how long the rest takes at the speed so far; nothing where that is not known, or nothing is left.

    >>> _left(600.0, 20, 40), _left(600.0, 0, 40)
    (', about 20 min left', '')
    """
    if done <= 0 or to_do <= 0:
        return ""
    return f", about {max(1, round(seconds / done * to_do / 60))} min left"
