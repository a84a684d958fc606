from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from chiasm.networks.srcnn import Variant, srcnn
from network_checks import convolutions_of, count, kernels_of, measured_field, share_left, tile_differs_by

#: Inputs, outputs, kernel and stride, from the paper's filter sizes and widths (64 and 32).
LAYERS: dict[Variant, list[tuple[int, int, int, int]]] = {
    "9-1-5": [(1, 64, 9, 1), (64, 32, 1, 1), (32, 1, 5, 1)],
    "9-5-5": [(1, 64, 9, 1), (64, 32, 5, 1), (32, 1, 5, 1)],
}


@pytest.mark.parametrize(("variant", "published"), [("9-1-5", 8032), ("9-5-5", 57184)])
def test_the_layers_and_weights_are_the_papers(variant: Variant, published: int) -> None:
    network = srcnn(in_channels=1, variant=variant)
    assert kernels_of(network) == LAYERS[variant]
    assert count(network) == published + 64 + 32 + 1  # the paper does not count biases


def test_three_dimensions_have_cubes_for_kernels() -> None:
    assert count(srcnn(in_channels=2, dims=3)) == 2 * 64 * 729 + 64 * 32 + 32 * 125 + 97


def test_a_patch_of_33_gives_one_of_21_as_in_the_paper() -> None:
    assert srcnn(in_channels=1)(torch.zeros(2, 1, 33, 33)).shape == (2, 1, 21, 21)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("variant", "field"), [("9-1-5", 6), ("9-5-5", 8)])
def test_the_receptive_field_is_what_gradients_reach_and_no_more(dims: int, variant: Variant, field: int) -> None:
    network = srcnn(in_channels=2, dims=dims, scale=0.05, variant=variant)  # type: ignore[arg-type]
    assert measured_field(network, 2, dims, others=17) == network.receptive_field == network.margin == field


def test_the_output_equals_three_padded_convolutions_away_from_the_border() -> None:
    torch.manual_seed(0)
    network = srcnn(in_channels=1, variant="9-5-5")
    source = torch.rand(1, 1, 30, 30)
    features = source
    for number, layer in enumerate(convolutions_of(network)):
        features = functional.conv2d(features if number == 0 else features.relu(), layer.weight, layer.bias, padding=4)
    # padded by 4 each: 30 -> 30 -> 34 -> 38, so the centre begins at 8 + 4
    torch.testing.assert_close(network(source), features[..., 12:26, 12:26])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole(dims: int) -> None:
    network = srcnn(in_channels=2, dims=dims, scale=0.1)  # type: ignore[arg-type]
    assert tile_differs_by(network, 2, dims, others=15) < 1e-5


@pytest.mark.parametrize("variant", ["9-1-5", "9-5-5"])
def test_it_learns_one_patch_by_heart(variant: Variant) -> None:
    torch.manual_seed(0)
    network = srcnn(in_channels=1, variant=variant)
    source = torch.rand(1, 1, 24, 24)
    margin = network.margin
    target = 1 - 2 * source[..., margin:-margin, margin:-margin].square()
    assert share_left(network, source, target, steps=200, rate=3e-3) < 0.1


def test_what_it_cannot_take_is_refused() -> None:
    network = srcnn(in_channels=1)
    assert network(torch.zeros(1, 1, 13, 14)).shape == (1, 1, 1, 2)
    for shape, told in (((1, 1, 12, 40), "at least 13"), ((1, 1, 40, 40, 40), "spatial axes")):
        with pytest.raises(ValueError, match=told):
            network(torch.zeros(shape))
    for wrong in ({"in_channels": 0}, {"dims": 4}, {"scale": 0.0}, {"variant": "9-9-9"}):
        with pytest.raises(ValueError):
            srcnn(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
