from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.networks.generator import Layer
from chiasm.networks.generator import reach as own_reach
from chiasm.networks.layers import Step, check_discriminator, check_numbers, draw, draw_he, farthest, seen
from network_checks import reached

STEPS: dict[Layer, Step] = {
    "convolution": Step(3, 1, 1),
    "down": Step(3, 2, 1),
    "up": Step(4, 2, 1, up=True),  # linear interpolation by two
}


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_steps_reach_as_far_as_the_walk_for_our_own_layers_says(depth: int) -> None:
    down: list[Layer] = ["down", "convolution"]
    up: list[Layer] = ["up", "convolution", "convolution"]
    path: list[Layer] = ["convolution", *down * depth, *up * depth]
    assert farthest([STEPS[layer] for layer in path], 2**depth) == own_reach(path, 2**depth)


def test_spans_counted_by_hand() -> None:
    assert seen([Step(9), Step(1), Step(5)], 0, 0) == (0, 12)  # valid: 9 + 1 + 5 - 2 voxels
    assert seen([Step(2, 2)], 3, 4) == (6, 9)  # a pooling
    # a transposed convolution of 2 by 2: 0 and 1 are made of 0, 2 and 3 of 1
    assert [seen([Step(2, 2, up=True)], o, o) for o in range(4)] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    # of 4 by 2, padded by 1: voxel i writes to 2i-1 .. 2i+2
    assert [seen([Step(4, 2, 1, up=True)], o, o) for o in range(4)] == [(-1, 0), (0, 1), (0, 1), (1, 2)]


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (4, 2, 1), (5, 2, 2), (16, 8, 4), (3, 3, 0)])
@pytest.mark.parametrize("up", [False, True])
def test_a_layer_of_torch_sees_the_voxels_of_its_step(size: int, stride: int, padding: int, up: bool) -> None:
    kind = nn.ConvTranspose2d if up else nn.Conv2d
    layer = kind(1, 1, (size, 1), (stride, 1), (padding, 0), bias=False).double()
    nn.init.ones_(layer.weight)
    places = range(8, 8 + stride)
    spans = reached(layer, (1, 24 if up else 24 * stride, 1), places)
    assert spans == [seen([Step(size, stride, padding, up)], place, place) for place in places]


def test_weights_are_drawn_with_the_spread_asked_for() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 64, 5), nn.BatchNorm2d(4096), nn.ConvTranspose2d(64, 64, 4, 2))
    draw(network, 0.02)
    for layer, mean in zip(network, (0.0, 1.0, 0.0)):
        assert layer.weight.mean().item() == pytest.approx(mean, abs=2e-3)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("dims", [2, 3])
def test_he_weights_have_two_over_the_inputs_of_one_output_voxel_as_variance(dims: int) -> None:
    torch.manual_seed(0)
    down, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
    for layer in (down(32, 64, 3), down(32, 64, 4, 2), up(64, 48, 2, 2), up(64, 48, 4, 2)):
        draw_he(layer)
        assert not layer.bias.any()
        sd = layer.weight.std().item()
        nn.init.ones_(layer.weight)  # then an output voxel counts its inputs
        inputs = layer(torch.ones(1, layer.in_channels, *[16] * dims))[(0, 0, *[4] * dims)].item()
        assert sd == pytest.approx((2 / inputs) ** 0.5, rel=0.05)


def test_numbers_out_of_range_are_refused() -> None:
    for wrong in ((0, 2, 1.0), (1, 4, 1.0), (1, 2, 0.0)):
        with pytest.raises(ValueError, match="dims is 2 or 3"):
            check_numbers(*wrong)
    for shape in ((1, 2, 16, 15), (1, 2, 16, 16, 16)):
        with pytest.raises(ValueError, match="2 axes of at least 16"):
            check_discriminator(torch.zeros(shape), 2, 16)
