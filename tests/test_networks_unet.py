from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.networks.unet import UNet
from network_checks import count, kernels_of, measured_field, share_left, tile_differs_by, weights_of

#: Inputs, outputs and kernel of the 23 convolutions of figure 1, but for the one channel that comes out.
LAYERS = [
    *[(1, 64, 3), (64, 64, 3)],
    *[(64, 128, 3), (128, 128, 3)],
    *[(128, 256, 3), (256, 256, 3)],
    *[(256, 512, 3), (512, 512, 3)],
    *[(512, 1024, 3), (1024, 1024, 3)],
    *[(1024, 512, 2), (1024, 512, 3), (512, 512, 3)],
    *[(512, 256, 2), (512, 256, 3), (256, 256, 3)],
    *[(256, 128, 2), (256, 128, 3), (128, 128, 3)],
    *[(128, 64, 2), (128, 64, 3), (64, 64, 3)],
    (64, 1, 1),
]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_layers_and_weights_are_those_of_figure_1(dims: int) -> None:
    with torch.device("meta"):
        network = UNet(in_channels=1, dims=dims)  # type: ignore[arg-type]
    assert len(LAYERS) == len(kernels_of(network)) == 23
    assert sorted(layer[:3] for layer in kernels_of(network)) == sorted(LAYERS)
    assert count(network) == weights_of(LAYERS, dims, biases=[b for _, b, _ in LAYERS])


def test_with_two_classes_it_would_have_the_31_030_658_weights_of_figure_1() -> None:
    with torch.device("meta"):
        assert count(UNet(in_channels=1)) + 64 + 1 == 31_030_658


@pytest.mark.parametrize("dims", [2, 3])
def test_the_receptive_field_is_what_gradients_reach_and_no_more(dims: int) -> None:
    network = UNet(in_channels=1, dims=dims, scale=0.02)  # type: ignore[arg-type]
    assert measured_field(network, 1, dims, others=16) == network.receptive_field


@pytest.mark.parametrize(("dims", "others"), [(2, 32), (3, 16)])
def test_a_tile_with_its_halo_equals_the_whole(dims: int, others: int) -> None:
    network = UNet(in_channels=2, dims=dims, scale=0.04)  # type: ignore[arg-type]
    assert tile_differs_by(network, 2, dims, others) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "size", "rate"), [(2, 32, 4e-3), (3, 16, 2e-3)])
def test_it_learns_one_patch_by_heart(dims: int, size: int, rate: float) -> None:
    torch.manual_seed(0)
    network = UNet(in_channels=1, dims=dims, scale=1 / 8)  # type: ignore[arg-type]
    source = torch.randn(1, 1, *[size] * dims)
    assert share_left(network, source, -source, steps=80, rate=rate) < 0.1


def test_dropout_thins_out_the_two_deepest_levels_in_training_alone() -> None:
    network = UNet(in_channels=1, scale=0.1)
    assert [layer.p for layer in network.dropouts if isinstance(layer, nn.Dropout)] == [0, 0, 0, 0.5, 0.5]
    source = torch.rand(1, 1, 32, 32)
    network.eval()
    assert torch.equal(network(source), network(source))
    network.train()
    assert not torch.equal(network(source), network(source))


def test_what_it_cannot_take_is_refused() -> None:
    network = UNet(in_channels=1, scale=0.02)
    for shape, told in (((1, 1, 24, 32), "multiples of 16"), ((1, 1, 32, 32, 32), "spatial axes")):
        with pytest.raises(ValueError, match=told):
            network(torch.zeros(shape))
    for wrong in ({"in_channels": 0}, {"dims": 4}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            UNet(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
