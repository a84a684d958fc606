"""Checkpoints: everything that a run needs to resume with the same result as without a stop.

Objects are passed by name once; saving and loading use the same names, so none can be forgotten.  A checkpoint is a
`.safetensors` file and a `.toml` beside it that is written last and holds the sha256 of both: without a matching pair
it does not count, and the one before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from chiasm.checksums import has_valid_checksum, sha256_of, with_checksum
from chiasm.errors import ChiasmError, RunError
from chiasm.storage import read_toml, whole_file, write_toml

KEEP = 2
OWN = re.compile(r"(\.\S+\.)?step-\d{8,}\.(safetensors|toml)")  # files of checkpoints, and their temporaries


def save_checkpoint(
    folder: Path, step: int, parts: Mapping[str, nn.Module | Optimizer], state: Mapping[str, Any]
) -> Path:
    """Write the state after `step` steps, and drop all but the last checkpoints.

    Args:
        folder: Where checkpoints lie.
        step: Steps done.
        parts: Networks and optimisers by name.
        state: Plain numbers and texts that belong to the run.

    Raises:
        ChiasmError: If the disk is full; older checkpoints are untouched.
    """
    tensors = {f"{name}/{key}": value for name, part in parts.items() for key, value in _tensors(part).items()}
    path = folder / f"step-{step:08d}.safetensors"
    card = path.with_suffix(".toml")
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(save(tensors))  # safetensors' own writing hides a full disk from `whole_file`
        write_toml(
            card, with_checksum({"step": step, "sha256": sha256_of(path), "parts": sorted(parts), "state": dict(state)})
        )
    except ChiasmError:
        if not card.exists():
            path.unlink(missing_ok=True)
        raise
    _drop_old(folder)
    return path


def _drop_old(folder: Path) -> None:
    """Remove all except the last checkpoints, and unfinished files of killed processes."""
    own = [path for path in folder.iterdir() if OWN.fullmatch(path.name)]
    cards = sorted(path for path in own if path.name.startswith("step-") and path.suffix == ".toml")
    kept = {card.stem for card in cards[-KEEP:]}
    for old in own:
        if old.stem not in kept:
            old.unlink()


def load_checkpoint(
    folder: Path, parts: Mapping[str, nn.Module | Optimizer], *, some: bool = False
) -> tuple[int, dict[str, Any], list[str]]:
    """Restore the newest checkpoint that is whole.

    Args:
        folder: Where checkpoints lie; may be missing.
        parts: The same networks and optimisers that were saved; changed in place.
        some: Whether `parts` may hold more than was saved, as in an arm after a warm-up; the rest is not changed.

    Returns:
        Steps done (0 without a checkpoint), the state, and a sentence for each
        damaged checkpoint that was passed over.

    Raises:
        RunError: If a whole checkpoint holds other networks than `parts`.
    """
    names = {found.stem for found in folder.glob("step-*") if OWN.fullmatch(found.name)}
    warnings: list[str] = []
    for path in (folder / f"{name}.safetensors" for name in sorted(names, reverse=True)):
        found = _whole(path)
        if found is None:
            warnings.append(f"{path}: the checkpoint is damaged and is passed over")
            continue
        card, tensors = found
        _restore_parts(parts, card["parts"], tensors, path, some=some)
        step = int(card["step"])
        return step, dict(card["state"]), [f"{sentence}; step {step} is used" for sentence in warnings]
    return 0, {}, [f"{sentence}; there is no older one" for sentence in warnings]


def _restore_parts(
    parts: Mapping[str, nn.Module | Optimizer],
    saved: Sequence[str],
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    some: bool,
) -> None:
    """Restore every part that was saved; without `some`, these must be all parts."""
    unknown, absent = set(saved) - parts.keys(), parts.keys() - set(saved)
    if unknown or (absent and not some):
        raise _other_networks(path)
    for name in saved:
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        _restore(parts[name], own, path)


def _whole(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read a card and its tensors; None if one of both changed since it was written."""
    try:
        card = read_toml(path.with_suffix(".toml"))
        if not has_valid_checksum(card) or not path.is_file() or sha256_of(path) != card["sha256"]:
            return None
        tensors = {_renamed(name): value for name, value in load(path.read_bytes()).items()}
        return {**card, "parts": [_renamed(name) for name in card["parts"]]}, tensors
    except (RunError, SafetensorError):
        return None


def _renamed(name: str) -> str:
    """Return the present name of a part: version 0.1 called discriminators judges."""
    return re.sub(r"\b(adam_)?(global|second|local)_judge\b", r"\1\2_discriminator", name)


def _tensors(part: nn.Module | Optimizer) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return {key: value.detach().cpu().contiguous().clone() for key, value in part.state_dict().items()}
    moments = part.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for index, entry in moments.items()
        for key, value in entry.items()
    }


def _restore(part: nn.Module | Optimizer, tensors: Mapping[str, Tensor], path: Path) -> None:
    if isinstance(part, nn.Module):
        try:
            part.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise _other_networks(path) from error
        return
    weights = [weight for group in part.param_groups for weight in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = _laid_like(weights[int(index)], value)
    part.load_state_dict({"state": moments, "param_groups": part.state_dict()["param_groups"]})


def _laid_like(weight: Tensor, moment: Tensor) -> Tensor:
    """Give a moment the memory layout of its weight; a fused optimiser pairs them by memory order, not by index."""
    if moment.shape != weight.shape:
        return moment
    return torch.empty_like(weight, dtype=moment.dtype).copy_(moment).detach()


def _other_networks(path: Path) -> RunError:
    return RunError(
        "holds other networks than this recipe makes",
        path=path,
        reason="other-networks",
        hint="Give another run folder with -o, or the recipe that started this one.",
    )
