from __future__ import annotations

import pytest
import torch

from chiasm.networks.fcn3d import fcn3d
from network_checks import kernels, measured_field, share_left_of_blur, tile_differs_by, weights

#: Inputs, outputs, kernel: the layer table of the authors' configuration.
TABLE = [
    (1, 32, 5),
    (32, 32, 3),
    (32, 32, 3),
    (32, 32, 3),
    (32, 32, 3),
    (32, 64, 5),
    (64, 64, 3),
    (64, 32, 3),
    (32, 32, 3),
    (32, 32, 3),
    (32, 1, 1),
]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_weights_are_those_of_the_layer_table(dims: int) -> None:
    by_hand = sum(inputs * outputs * size**dims + outputs for inputs, outputs, size in TABLE)
    assert weights(fcn3d, in_channels=1, dims=dims) == by_hand == {2: 163_009, 3: 592_193}[dims]
    with torch.device("meta"):
        assert kernels(fcn3d(in_channels=1, dims=dims)) == TABLE  # type: ignore[arg-type]


def test_it_is_3d_unless_told_otherwise_and_a_patch_of_32_gives_one_of_24() -> None:
    network = fcn3d(in_channels=1, scale=0.05)
    assert network.dims == 3 and network.margin == 4
    assert network(torch.zeros(2, 1, 32, 32, 32)).shape == (2, 1, 24, 24, 24)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_impulse_reaches_as_far_as_the_receptive_field_and_no_farther(dims: int) -> None:
    network = fcn3d(in_channels=2, dims=dims, scale=0.05)  # type: ignore[arg-type]
    assert measured_field(network, 2, dims, others=9) == network.receptive_field == 2 + 4 + 2 + 4


@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_one_patch(dims: int) -> None:
    torch.manual_seed(0)
    network = fcn3d(in_channels=1, dims=dims, scale=0.25)  # type: ignore[arg-type]
    assert share_left_of_blur(network, 12, dims, steps=120, rate=2e-3) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole_and_with_less_it_does_not(dims: int) -> None:
    network = fcn3d(in_channels=1, dims=dims, scale=0.1)  # type: ignore[arg-type]
    assert tile_differs_by(network, 1, dims, 11) < 1e-5
    assert tile_differs_by(network, 1, dims, 11, short=3) > 1e-5


def test_the_smallest_image_gives_one_voxel_and_smaller_ones_are_refused() -> None:
    network = fcn3d(in_channels=1, scale=0.05)
    assert network(torch.zeros(1, 1, 9, 9, 9)).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 9"):
        network(torch.zeros(1, 1, 9, 8, 9))
    with pytest.raises(ValueError, match="3 spatial axes"):
        network(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("wrong", [{"dims": 4}, {"in_channels": 0}, {"scale": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="dims is 2 or 3"):
        fcn3d(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
