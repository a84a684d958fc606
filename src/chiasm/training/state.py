"""What a training remembers between its steps, beside weights.

Running values lie on the device as tensors of one number, so that a step never waits for one; what is drawn by, the
pool and the difficulty of lesions, is a matter of the host and is updated every so many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from chiasm.training import ranks

KEPT = 0.98  # of a running value, at each step
KEPT_LESION = 0.9  # of a case's difficulty, which is seen only where a patch meets its lesion
POOL = 256  # patches remembered for sampling by attention
SMALLEST_DIFFICULTY = 1e-6  # so that whatever can be drawn may be
UNSEEN = -1.0  # in the place of a difficulty, where nothing was seen
NUMBERS = ("error_scale", "accuracy", "accuracy_global", "confidence_sd", "closed_steps")


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


class Seen(NamedTuple):
    """How difficult the patches of one step, or the lesions in them, were found: on the device, not read yet.

    Attributes:
        keys: Of each sample of the whole batch: case and middle of a patch, or the name of a lesion's case; ""
            where there is a transplant.
        difficulty: Of the samples of this process, shape (N,); `UNSEEN` where there is none.
    """

    keys: tuple[Any, ...]
    difficulty: Tensor


def exact(number: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a number in 64 bits, or in 32 on a device that knows no more; on another device, if one is given."""
    device = device or number.device
    return number.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _nothing() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float64)


def _half() -> Tensor:
    return torch.tensor(0.5, dtype=torch.float64)


@dataclass(frozen=True)
class TrainingState:
    """What is known after a step; a step returns the next one.

    Attributes:
        error_scale: s of the soft targets: twice the median error, running, normalised units.
        accuracy: Share of voxels that the local discriminator's realness head recognises, running.
        accuracy_global: Share of images that the global one recognises, running.
        confidence_sd: Standard deviation of M inside the mask, running.
        closed_steps: Steps in which the health gate kept the attention off.
        rho: Rank correlation of 1 - M with the smoothed error, of the last validation; -1 before the first.
        attention_steps: Steps in which the schedule had it on.
        is_guiding: Whether the health gate was open when the pool was last updated.
        pool: Patches that may be drawn again, the newest last.
        lesion_difficulty: Running mean of 1 - M in the lesion, by id of the case; unseen ones are absent.
        unread_patches: What is to join the pool.
        unread_lesions: What is to join the difficulty of lesions.
    """

    error_scale: Tensor = field(default_factory=_nothing)
    accuracy: Tensor = field(default_factory=_half)
    accuracy_global: Tensor = field(default_factory=_half)
    confidence_sd: Tensor = field(default_factory=_nothing)
    closed_steps: Tensor = field(default_factory=_nothing)
    rho: float = -1.0
    attention_steps: int = 0
    is_guiding: bool = False
    pool: tuple[Remembered, ...] = ()
    lesion_difficulty: Mapping[str, float] = field(default_factory=dict)
    unread_patches: tuple[Seen, ...] = ()
    unread_lesions: tuple[Seen, ...] = ()

    def to(self, device: torch.device) -> Self:
        """Put the running values on a device."""
        values: dict[str, Any] = {name: exact(getattr(self, name), device) for name in NUMBERS}
        return replace(self, **values)

    @property
    def closed_share(self) -> float:
        """Share of the steps with attention in which the health gate was closed; 0 before there are any."""
        return float(self.closed_steps) / max(1, self.attention_steps)

    def read(self, is_open: Tensor) -> Self:
        """Update pool, difficulty of lesions and gate: the one thing here that waits for the device.

        Args:
            is_open: Whether the health gate is open now, one truth value.
        """
        pool, known = list(self.pool), dict(self.lesion_difficulty)
        for keys, difficulty in _read(self.unread_patches):
            pool += [Remembered(*key, max(SMALLEST_DIFFICULTY, d)) for key, d in zip(keys, difficulty)]  # type: ignore[call-arg]
        for keys, difficulty in _read(self.unread_lesions):
            for name, fresh in zip(keys, difficulty):
                if name and fresh >= 0:
                    known[name] = KEPT_LESION * known.get(name, fresh) + (1 - KEPT_LESION) * fresh
        return replace(
            self,
            is_guiding=bool(is_open),
            pool=tuple(pool[-POOL:]),
            lesion_difficulty=known,
            unread_patches=(),
            unread_lesions=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, in plain numbers and lists; all processes must ask for it."""
        content: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        numbers = torch.stack([content[name] for name in NUMBERS]).tolist()
        content |= dict(zip(NUMBERS, numbers))
        content |= {"pool": [list(entry) for entry in self.pool], "lesion_difficulty": dict(self.lesion_difficulty)}
        for name in ("unread_patches", "unread_lesions"):
            content[name] = [[_plain(keys), difficulty] for keys, difficulty in _read(content[name])]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], device: torch.device | None = None) -> Self:
        """Restore a state from a checkpoint; what an earlier version did not write begins anew."""
        content = {"lesion_difficulty": content.get("lesion_doubt", {}), **content}  # its name in version 0.1
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        known |= {name: torch.tensor(float(known[name]), dtype=torch.float64) for name in NUMBERS if name in known}
        known["pool"] = tuple(Remembered(*entry) for entry in known.get("pool", ()))
        for name in ("unread_patches", "unread_lesions"):
            known[name] = tuple(_unread(keys, difficulty, device) for keys, difficulty in known.get(name, ()))
        return cls(**known).to(device or torch.device("cpu"))


def _read(unread: Sequence[Seen]) -> list[tuple[tuple[Any, ...], list[float]]]:
    """Read all at once what was seen, of the whole batch."""
    if not unread:
        return []
    seen = torch.stack([one.difficulty for one in unread], 1)  # (samples, steps)
    columns = ranks.gather(seen, len(unread[0].keys)).T.tolist()
    return [(one.keys, column) for one, column in zip(unread, columns)]


def _plain(keys: tuple[Any, ...]) -> list[Any]:
    return [key if isinstance(key, str) else list(key) for key in keys]


def _unread(keys: Sequence[Any], difficulty: Sequence[float], device: torch.device | None) -> Seen:
    """Restore what was seen: this process's share of it goes back to the device."""
    own = torch.tensor(ranks.share(difficulty), dtype=torch.float32, device=device)
    return Seen(tuple(key if isinstance(key, str) else tuple(key) for key in keys), own)


def running(last: Tensor, fresh: Tensor) -> Tensor:
    """Follow a value slowly."""
    return KEPT * last + (1 - KEPT) * exact(fresh)
