"""Every tensor of a training lies on the engine's device: shown on a card that is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from learning import make_learner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from device_check import CARD, PretendCard, check_method


def test_the_pretended_card_notes_what_a_card_refuses_and_waits_for() -> None:
    with PretendCard() as card:
        a = torch.zeros(3, device=CARD)
        assert a.device == CARD and torch.ones(3).device.type == "cpu" and (a + 1).device == CARD
        a * torch.tensor(2.0)  # a number of the host is no mixture
        assert not card.faults and not card.reads
        torch.ones(3) + a
        assert sum(card.faults.values()) == 1
        float(a.sum()), a[a > 0], a.cpu(), bool(a.any()), a.sum().item(), a.to("cpu")
    assert sum(card.reads.values()) == 6


#: Attention; permuted weights; difficulty of lesions; gradient penalty; batch normalisation and dropout; volumes.
@pytest.mark.parametrize("method", ["A7", "C4", "A16", "A4", "context-gan", "fcn3d"])
def test_every_tensor_lies_on_the_card(method: str, toy_cohort: Path, tmp_path: Path) -> None:
    found = check_method(method, toy_cohort, tmp_path, make_learner)
    assert not found.faults and not found.reads
    assert found.later  # a prediction comes back to the host
