"""Checkpoints: bit for bit, whole or not at all, and never believed when damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

from chiasm.checksums import sha256_of, with_checksum
from chiasm.errors import ChiasmError, RunError
from chiasm.storage import write_toml
from chiasm.training.checkpoints import KEEP, load_checkpoint, save_checkpoint
from chiasm.training.state import TrainingState
from full_disk import no_file_above


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
    for left_by_a_kill in (".99.step-00000001.safetensors", "step-00000001.safetensors"):
        (tmp_path / left_by_a_kill).write_bytes(b"half")
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, parts(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"step-{step:08d}.{kind}" for step in range(6 - KEEP, 6) for kind in ("safetensors", "toml")
    )


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "empty", "no card", "card of noise", "cut card", "no tensors", "pickle"]
)
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
    elif damage == "cut card":
        card = path.with_suffix(".toml")
        card.write_bytes(card.read_bytes()[:-9])
    elif damage == "no tensors":
        path.unlink()
    else:
        bad = {"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "pickle": pickle.dumps(print)}
        path.write_bytes(bad[damage])
    fresh = parts(3)
    step, state, warnings = load_checkpoint(tmp_path, fresh)
    assert (step, state) == (1, {"a": 1}) and same(fresh, older)
    assert len(warnings) == 1 and "step-00000002" in warnings[0]


def test_no_flipped_bit_of_a_card_is_believed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 2, parts(), {"scale": 0.25, "pool": [[1, 2.5]], "closed_steps": 7})
    card = path.with_suffix(".toml")
    whole = card.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 7
        card.write_bytes(content)
        step, state, _ = load_checkpoint(tmp_path, parts())
        assert (step, state) in ((0, {}), (2, {"scale": 0.25, "pool": [[1, 2.5]], "closed_steps": 7})), content
    card.write_bytes(whole.replace(b"closed_steps = 7", b"closed_steps = 6"))
    assert load_checkpoint(tmp_path, parts())[0] == 0


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
    with pytest.raises(ChiasmError, match=r"step-00000002.*No space left.*MiB free"):
        save_checkpoint(tmp_path, 2, parts(2), {})
    assert sorted(tmp_path.iterdir()) == before
    assert load_checkpoint(tmp_path, parts(3))[0] == 1


def test_a_disk_that_fills_between_tensors_and_card_leaves_nothing_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, parts(1), {})
    before = sorted(tmp_path.iterdir())
    really, calls = os.fsync, []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the tensors and their folder are through
            raise OSError(errno.ENOSPC, "No space left on device")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(ChiasmError, match="No space left"):
        save_checkpoint(tmp_path, 2, parts(2), {})
    assert sorted(tmp_path.iterdir()) == before


def test_a_real_limit_on_file_size_is_told_as_one(tmp_path: Path) -> None:
    """The kernel refuses the write itself, so whatever library writes must not hide it."""
    with no_file_above(10_000), pytest.raises(ChiasmError, match="cannot be written: File too large"):
        save_checkpoint(tmp_path, 1, {"network": nn.Linear(100, 100)}, {})
    assert not list(tmp_path.iterdir())


def test_a_header_that_promises_terabytes_is_refused_without_allocating(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, parts(), {})
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    card = {"step": 1, "sha256": sha256_of(path), "parts": ["adam", "network"], "state": {}}
    write_toml(path.with_suffix(".toml"), with_checksum(card))  # as if whoever made it had also signed it
    tracemalloc.start()
    step, _, warnings = load_checkpoint(tmp_path, parts())
    assert step == 0 and len(warnings) == 1
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_checkpoint_of_version_0_1_which_called_discriminators_judges_is_restored(tmp_path: Path) -> None:
    saved, fresh = parts(0), parts(1)
    save_checkpoint(tmp_path, 7, {"local_judge": saved["network"], "adam_local_judge": saved["adam"]}, {})
    names = {"local_discriminator": fresh["network"], "adam_local_discriminator": fresh["adam"]}
    assert load_checkpoint(tmp_path, names)[0] == 7 and same(saved, fresh)
    assert TrainingState.from_dict({"lesion_doubt": {"a": 0.5}}).lesion_difficulty == {"a": 0.5}
