"""Convolutions on grids that are smaller than their kernel, in bfloat16 on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from chiasm.training.small_grids import keep_small_grids_exact

SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two slices": (lambda: nn.Conv3d(32, 32, 3, padding=1), (2, 4, 4)),
    "a column, every other row": (lambda: nn.Conv2d(32, 32, 3, padding=1, stride=2), (8, 1)),
    "a wide kernel": (lambda: nn.Conv3d(32, 32, 5, padding=2), (4, 4, 4)),
    "a dilated kernel": (lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2), (4, 4)),
    "transposed": (lambda: nn.ConvTranspose3d(32, 32, 4, stride=2, padding=1), (1, 4, 4)),
    "spectral norm": (lambda: spectral_norm(nn.Conv3d(32, 32, 3, padding=1)), (2, 4, 4)),
}


def learned(network: nn.Module, features: Tensor, *, lowered: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        made = network(features)
    made.to(torch.bfloat16).float().square().sum().backward()
    return made, [one.grad for one in network.parameters() if one.grad is not None]


def guarded(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    keep_small_grids_exact(network)
    return network


@pytest.mark.parametrize("name", SMALL)
def test_on_a_small_grid_weights_learn_as_in_float32(name: str) -> None:
    make, grid = SMALL[name]
    torch.manual_seed(0)
    network, features = make(), torch.randn(2, 32, *grid)
    made, gradients = learned(guarded(network), features, lowered=True)
    expected, expected_gradients = learned(network, features, lowered=False)
    assert made.dtype == torch.bfloat16 and torch.equal(made, expected.to(torch.bfloat16))
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lowered", [False, True])
def test_on_any_other_grid_nothing_changes(lowered: bool) -> None:
    torch.manual_seed(0)
    network, features = nn.Conv3d(32, 32, 3, padding=1), torch.randn(2, 32, 4, 4, 4)
    made, gradients = learned(guarded(network), features, lowered=lowered)
    expected, expected_gradients = learned(copy.deepcopy(network), features, lowered=lowered)
    assert made.dtype == expected.dtype and torch.equal(made, expected)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected_gradients, strict=True))


def test_a_copy_learns_by_its_own_weights() -> None:
    network = guarded(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)))
    copied = copy.deepcopy(network)
    nn.init.zeros_(copied[0].weight)  # type: ignore[index]
    nn.init.zeros_(copied[0].bias)  # type: ignore[index]
    assert not copied(torch.ones(1, 1, 4, 4)).any() and network(torch.ones(1, 1, 4, 4)).any()
