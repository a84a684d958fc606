"""What a training remembers between its steps, beside weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Self

KEPT = 0.98  # of a running mean, at each step


class Remembered(NamedTuple):
    """A patch that was seen, and how much of it was found difficult.

    Attributes:
        case: Index of its case.
        i: Its middle along I; j and k likewise.
        difficulty: Mean of 1 - M inside the mask, above 0.
    """

    case: int
    i: int
    j: int
    k: int
    difficulty: float


@dataclass(frozen=True)
class TrainingState:
    """What is known after a step; a step returns the next one.

    Attributes:
        error_scale: s of the soft targets: twice the median error, running, normalised units.
        accuracy: Share of voxels that the local discriminator's realness head recognises, running.
        accuracy_global: Share of images that the global one recognises, running.
        confidence_sd: Standard deviation of M inside the mask, running.
        rho: Rank correlation of 1 - M with the smoothed error, of the last validation; -1 before the first.
        closed_steps: Steps in which the health gate kept the attention off.
        attention_steps: Steps in which the schedule had it on.
        pool: Patches that may be drawn again, the newest last.
        lesion_difficulty: Running mean of 1 - M in the lesion, by id of the case; unseen ones are absent.
    """

    error_scale: float = 0.0
    accuracy: float = 0.5
    accuracy_global: float = 0.5
    confidence_sd: float = 0.0
    rho: float = -1.0
    closed_steps: int = 0
    attention_steps: int = 0
    pool: tuple[Remembered, ...] = ()
    lesion_difficulty: Mapping[str, float] = field(default_factory=dict)

    @property
    def closed_share(self) -> float:
        """Share of the steps with attention in which the health gate was closed; 0 before there are any."""
        return self.closed_steps / max(1, self.attention_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in plain numbers and lists."""
        return {**asdict(self), "pool": [list(entry) for entry in self.pool]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Restore a state from a checkpoint; what an earlier version did not write begins anew."""
        content = {"lesion_difficulty": content.get("lesion_doubt", {}), **content}  # its name in version 0.1
        known = {name: content[name] for name in (one.name for one in fields(cls)) if name in content}
        pool = tuple(Remembered(case, i, j, k, difficulty) for case, i, j, k, difficulty in known.get("pool", ()))
        return cls(**{**known, "pool": pool})


def running(last: float, fresh: float) -> float:
    """Follow a value slowly."""
    return KEPT * last + (1 - KEPT) * fresh
