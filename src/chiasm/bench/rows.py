"""A row of the table: what is compared, with whom, and by how much chiasm should be ahead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chiasm.bench.measuring import Turns, take_turns
from chiasm.errors import ChiasmError

FULL = (240, 240, 155)
QUICK = (96, 96, 96)


class BenchSetting(NamedTuple):
    """The settings that all rows share.

    Attributes:
        shape: Voxels of a volume.
        folder: Where files may lie.
        precision: Of networks at inference: "32-true" or "bf16-mixed".
        peak: Operations a second of one thread, by precision.
    """

    shape: tuple[int, int, int]
    folder: Path
    precision: str
    peak: Mapping[str, float]


class TimedPair(NamedTuple):
    """One piece of work, done by chiasm and by its peer.

    Attributes:
        ours: Chiasm's way, without arguments.
        peer: The peer's.
        difference: Distance between the results of both, in the unit of `BenchRow.equal`; 0 if they are the same.
        tolerance: Largest distance that counts as equal.
        operations: Multiplications and additions that cannot be avoided; None where that is not the measure.
        precision: Whose peak `operations` are compared with.
        clock: Seconds so far; None for the processor time of this process.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    tolerance: float
    operations: float | None = None
    precision: str = "32-true"
    clock: Callable[[], float] | None = None


@dataclass(frozen=True)
class BenchRow:
    """One line of the table.

    Attributes:
        name: Short name.
        words: What is done.
        peer: Name of the peer.
        goal: Least ratio on a whole volume.
        quick_goal: Least ratio on a volume of 96^3, where what is fixed weighs more.
        make: Prepares both ways.
        needs: Packages that the peer needs.
        equal: What the check of equality compares, and in which unit.
    """

    name: str
    words: str
    peer: str
    goal: float
    quick_goal: float
    make: Callable[[BenchSetting], TimedPair]
    needs: tuple[str, ...] = ()
    equal: str = ""


@dataclass(frozen=True)
class Measured:
    """The outcome of a row.

    Attributes:
        row: The row.
        goal: The one that counts for the size of the volume.
        turns: What both took; None where nothing could be measured.
        difference: Of the results.
        tolerance: Largest that it may be.
        fraction: Of the measured peak that chiasm reaches, or None.
        reason: Why the row was not measured or failed; empty where all is well or the goal alone is missed.
    """

    row: BenchRow
    goal: float
    turns: Turns | None = None
    difference: float | None = None
    tolerance: float | None = None
    fraction: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """The peer's processor time divided by chiasm's: larger is better."""
        return None if self.turns is None else self.turns.ratio

    @property
    def verdict(self) -> str:
        """ "met", "missed", "wrong" where the results differ, or "not measured"."""
        if self.turns is None:
            return "not measured" if self.difference is None else "wrong"
        return "met" if self.turns.ratio >= self.goal else "missed"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        turns = self.turns
        return {
            "name": self.row.name,
            "ratio": self.ratio,
            "goal": self.goal,
            "peer": self.row.peer,
            "verdict": self.verdict,
            "reason": self.reason,
            "what": self.row.words,
            "chiasm_cpu_s": None if turns is None else turns.ours._asdict(),
            "peer_cpu_s": None if turns is None else turns.peer._asdict(),
            "difference": self.difference,
            "tolerance": self.tolerance,
            "fraction_of_peak": self.fraction,
        }


def measure_row(row: BenchRow, setting: BenchSetting, *, rounds: int, seconds: float) -> Measured:
    """Check that both ways of a row give the same result, then time them in turns.

    Args:
        row: What to measure.
        setting: Size of the volume, and where files may lie.
        rounds: Most turns.
        seconds: Processor time after which no further turn begins.
    """
    goal = row.quick_goal if setting.shape == QUICK else row.goal
    if missing := [name for name in row.needs if importlib.util.find_spec(name) is None]:
        reason = f"{', '.join(missing)} not installed: pip install 'chiasm[bench]'"
        return Measured(row, goal, reason=reason)
    pair = row.make(setting)
    difference = float(pair.difference(pair.ours(), pair.peer()))
    if not difference <= pair.tolerance:  # NaN is no agreement
        reason = f"results differ by {difference:.3g}, more than {pair.tolerance:g}"
        return Measured(row, goal, difference=difference, tolerance=pair.tolerance, reason=reason)
    clock = {} if pair.clock is None else {"clock": pair.clock}
    turns = take_turns(pair.ours, pair.peer, rounds=rounds, seconds=seconds, **clock)
    fraction = None
    if pair.operations is not None:
        fraction = pair.operations / turns.ours.median / setting.peak[pair.precision]
    return Measured(row, goal, turns, difference, pair.tolerance, fraction)


def find_rows(rows: tuple[BenchRow, ...], names: list[str]) -> tuple[BenchRow, ...]:
    """Return the rows of some names, all where none is given.

    Raises:
        ChiasmError: If a name is unknown.
    """
    known = {row.name: row for row in rows}
    if strange := [name for name in names if name not in known]:
        raise ChiasmError(
            "no row of the benchmark has this name", reason="unknown", found=strange[0], expected=", ".join(known)
        )
    return tuple(known[name] for name in names) if names else rows
