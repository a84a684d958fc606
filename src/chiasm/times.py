"""How long the stages of a command took, kept beside its results: `times.json`.

Times are of a wall clock and add up over the calls that a stopped command
took; what a killed process did not write is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chiasm.errors import ChiasmError
from chiasm.storage import read_facts, write_json

FILE = "times.json"


@contextmanager
def timed(folder: Path, stage: str, mark: str = ".") -> Iterator[None]:
    """Add the time of a block to that of its stage in `times.json`.

    The time also counts if the block is stopped, but not if it is refused by a `ChiasmError`.

    Args:
        folder: Of the results.
        stage: What is done, such as "training".
        mark: File that the block writes to make the folder its own; without it nothing is noted.

    Raises:
        ChiasmError: The error of the block.
    """
    start, is_refused = time.monotonic(), False
    try:
        yield
    except ChiasmError:
        is_refused = True  # which leaves nothing
        raise
    finally:
        if not is_refused and (folder / mark).exists():
            _note(folder, stage, time.monotonic() - start)


def _note(folder: Path, stage: str, seconds: float) -> None:
    before = read_times(folder)
    with suppress(ChiasmError):  # no result depends on it
        write_json(folder / FILE, {**before, stage: round(before.get(stage, 0.0) + seconds, 1)})


def read_times(folder: Path) -> dict[str, float]:
    """Read the seconds of each stage; none where nothing was noted, or the file is damaged."""
    return {name: float(value) for name, value in read_facts(folder / FILE).items() if isinstance(value, int | float)}
