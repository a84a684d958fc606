from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from chiasm.networks.fcn8 import Fcn8
from chiasm.networks.layers import Step, seen
from network_checks import count, kernels_of, lively, measured_field, share_left, tile_differs_by, weights_of

#: Inputs, outputs and kernel: VGG16's 13 convolutions (configuration D), its two linear layers, three scores.
TRUNK = [
    *[(1, 64, 3), (64, 64, 3)],
    *[(64, 128, 3), (128, 128, 3)],
    *[(128, 256, 3), (256, 256, 3), (256, 256, 3)],
    *[(256, 512, 3), (512, 512, 3), (512, 512, 3)],
    *[(512, 512, 3), (512, 512, 3), (512, 512, 3)],
    *[(512, 4096, 7), (4096, 4096, 1)],
]
SCORES = [(4096, 1, 1), (512, 1, 1), (256, 1, 1)]
DOUBLES = [(1, 1, 4), (1, 1, 4)]  # without bias

#: VGG16's weights as torchvision and Keras count them, of which the last linear layer is not used.
VGG16, LAST_LINEAR = 138_357_544, 4096 * 1000 + 1000


def test_the_layers_and_weights_are_the_papers() -> None:
    with torch.device("meta"):
        network = Fcn8(in_channels=1)
    assert [layer[:3] for layer in kernels_of(network)] == [*TRUNK, *SCORES, *DOUBLES]
    assert [layer[3] for layer in kernels_of(network)] == [1] * 18 + [2, 2]
    layers = [*TRUNK, *SCORES]
    assert count(network) == weights_of([*layers, *DOUBLES], 2, biases=[b for _, b, _ in layers])


def test_the_trunk_has_as_many_weights_as_vgg16() -> None:
    with torch.device("meta"):
        network = Fcn8(in_channels=3)
    assert count(network.levels) + count(network.hidden) == VGG16 - LAST_LINEAR


def test_the_receptive_field_is_what_gradients_reach_and_no_more() -> None:
    network = Fcn8(in_channels=1, scale=0.001)
    assert measured_field(network, 1, 2, others=32) == network.receptive_field


def test_a_voxel_of_the_deepest_grid_sees_404_as_the_paper_says_of_vgg16() -> None:
    # table 1 of the paper: receptive field 404, maximum stride 32
    chain = [Step(3), Step(3), Step(2, 2)] * 2 + [Step(3), Step(3), Step(3), Step(2, 2)] * 3 + [Step(7), Step(1)]
    assert seen(chain, 0, 0) == (0, 403)


def test_a_tile_with_its_halo_equals_the_whole() -> None:
    assert tile_differs_by(Fcn8(in_channels=2, scale=0.02), 2, 2, others=32) < 1e-5


def test_a_fresh_network_says_zero_and_its_ups_interpolate_linearly() -> None:
    network = Fcn8(in_channels=1, scale=0.01)
    assert not network(torch.rand(1, 1, 32, 64)).any()
    coarse = torch.rand(1, 1, 6, 6)
    expected = functional.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    for double in network.doubles:
        torch.testing.assert_close(double(coarse)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def test_the_scores_of_the_three_depths_add_up() -> None:
    network = lively(Fcn8(in_channels=1, scale=0.02))
    source = torch.rand(1, 1, 64, 64)
    drawn = [score.weight.detach().clone() for score in network.scores]
    alone = []
    for chosen in range(3):
        for level, (score, weight) in enumerate(zip(network.scores, drawn)):
            score.weight.data.copy_(weight if level == chosen else 0 * weight)
            score.bias.data.zero_()
        alone.append(network(source).detach())
        assert alone[-1].std() > 0
    for score, weight in zip(network.scores, drawn):
        score.weight.data.copy_(weight)
    torch.testing.assert_close(network(source), alone[0] + alone[1] + alone[2])


def test_the_prediction_is_linear_between_points_eight_voxels_apart() -> None:
    made = lively(Fcn8(in_channels=1, scale=0.02))(torch.rand(1, 1, 64, 64))
    bends = made.diff(n=2, dim=2).abs().amax(dim=(0, 1, 3)) / made.std()
    # the points lie at 3.5, 11.5, ...: nothing bends among 4 .. 11, 12 .. 19, ...
    assert [place for place, bend in enumerate(bends) if bend > 1e-4] == [
        first for point in range(3, 60, 8) for first in (point - 1, point)
    ]


def test_it_learns_one_smooth_patch_by_heart() -> None:
    torch.manual_seed(0)
    # points eight voxels apart, linear between: the finest that the network can say
    target = functional.interpolate(torch.randn(1, 1, 8, 8), scale_factor=8.0, mode="bilinear")
    network = Fcn8(in_channels=1, scale=1 / 16, dropout=0.0)
    source = target + 0.1 * torch.randn_like(target)
    assert share_left(network, source, target, steps=80, rate=3e-3) < 0.1


def test_what_it_cannot_take_is_refused() -> None:
    network = Fcn8(in_channels=1, scale=0.001)
    for shape, told in (((1, 1, 48, 64), "multiples of 32"), ((1, 1, 32, 32, 32), "spatial axes")):
        with pytest.raises(ValueError, match=told):
            network(torch.zeros(shape))
    for wrong in ({"in_channels": 0}, {"dims": 3}, {"dims": 4}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            Fcn8(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
