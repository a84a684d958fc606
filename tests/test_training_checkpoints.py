"""Checkpoints: bit for bit, whole or not at all, and never believed when damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from chiasm.errors import ChiasmError, RunError
from chiasm.training.checkpoints import KEEP, load_checkpoint, save_checkpoint


def parts(seed: int = 0, width: int = 3) -> dict[str, nn.Module | torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(3):
        network(torch.randn(4, 2)).square().sum().backward()
        adam.step()
    return {"network": network, "adam": adam}


def same(a: dict[str, nn.Module | torch.optim.Optimizer], b: dict[str, nn.Module | torch.optim.Optimizer]) -> bool:
    networks = [(x, b["network"].state_dict()[name]) for name, x in a["network"].state_dict().items()]
    ours, theirs = (parts["adam"].state_dict()["state"] for parts in (a, b))
    moments = [(x, theirs[index][name]) for index, one in ours.items() for name, x in one.items()]
    return all(torch.equal(x, y) for x, y in [*networks, *moments])


def test_networks_moments_and_state_come_back_to_the_bit(tmp_path: Path) -> None:
    saved, fresh = parts(0), parts(1)
    assert not same(saved, fresh)
    state = {"scale": 0.1 + 0.2, "pool": [[1, 2.5]], "name": "x"}
    save_checkpoint(tmp_path, 7, saved, state)
    step, found, warnings = load_checkpoint(tmp_path, fresh)
    assert (step, found, warnings) == (7, state, [])
    assert same(saved, fresh)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, parts(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"step-{step:08d}.{kind}" for step in range(6 - KEEP, 6) for kind in ("safetensors", "toml")
    )


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no card", "card of noise", "no tensors", "pickle"])
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    older = parts(1)
    save_checkpoint(tmp_path, 1, older, {"a": 1})
    path = save_checkpoint(tmp_path, 2, parts(2), {"a": 2})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "no card":
        path.with_suffix(".toml").unlink()
    elif damage == "card of noise":
        path.with_suffix(".toml").write_bytes(os.urandom(50))
    elif damage == "no tensors":
        path.unlink()
    else:
        bad = {"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "pickle": pickle.dumps(print)}
        path.write_bytes(bad[damage])
    fresh = parts(3)
    step, state, warnings = load_checkpoint(tmp_path, fresh)
    assert (step, state) == (1, {"a": 1}) and same(fresh, older)
    assert damage == "no card" or (len(warnings) == 1 and "step-00000002" in warnings[0])


def test_an_empty_folder_is_a_start(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", parts()) == (0, {}, [])


def test_other_networks_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, parts(), {})
    for other in (parts(width=4), {"network": parts()["network"]}):
        with pytest.raises(RunError, match="other networks"):
            load_checkpoint(tmp_path, other)


def test_a_full_disk_leaves_the_older_one_and_nothing_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = parts(1)
    save_checkpoint(tmp_path, 1, older, {})
    before = sorted(tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ChiasmError, match=r"No space left.*MiB free"):
        save_checkpoint(tmp_path, 2, parts(2), {})
    assert sorted(tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path, parts(3))[0] == 1


def test_a_header_that_promises_terabytes_is_refused_without_allocating(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parts(), {})
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    step, _, warnings = load_checkpoint(tmp_path, parts())
    assert step == 0 and len(warnings) == 1
