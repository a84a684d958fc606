from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import correlate

from chiasm.networks.li_cnn import li_cnn
from network_checks import kernels, lively, measured_field, share_left_of_blur, tile_differs_by, weights


def test_it_has_the_37761_weights_of_the_paper() -> None:
    by_hand = (1 * 10 * 7**3 + 10) + (10 * 10 * 7**3 + 10) + (10 * 1 * 1 + 1)
    assert weights(li_cnn, in_channels=1) == by_hand == 37_761
    assert weights(li_cnn, in_channels=1, dims=2) == (490 + 10) + (4900 + 10) + 11 == 5_421
    assert kernels(li_cnn(in_channels=1)) == [(1, 10, 7), (10, 10, 7), (10, 1, 1)]


def test_a_patch_of_15_gives_one_of_3() -> None:
    network = li_cnn(in_channels=1)
    assert network(torch.zeros(2, 1, 15, 15, 15)).shape == (2, 1, 3, 3, 3)
    assert network.margin == network.receptive_field == 6


def test_a_voxel_equals_scipys_correlations() -> None:
    network = lively(li_cnn(in_channels=1, dims=2)).double()
    image = np.random.default_rng(0).normal(size=(15, 15))
    (first, second, last) = ([value.detach().numpy() for value in part.parameters()] for part in network.convolutions)  # type: ignore[union-attr]
    hidden = [np.maximum(correlate(image, w[0], "valid") + b, 0) for w, b in zip(*first)]
    hidden = [np.maximum(sum(correlate(h, v, "valid") for h, v in zip(hidden, w)) + b, 0) for w, b in zip(*second)]
    expected = sum(h * w for h, w in zip(hidden, last[0].ravel())) + last[1]
    made = network(torch.from_numpy(image)[None, None]).detach().numpy()[0, 0]
    np.testing.assert_allclose(made, expected, atol=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_impulse_reaches_as_far_as_the_receptive_field_and_no_farther(dims: int) -> None:
    network = li_cnn(in_channels=2, dims=dims, scale=0.2)  # type: ignore[arg-type]
    assert measured_field(network, 2, dims, others=13) == network.receptive_field


@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_one_patch(dims: int) -> None:
    torch.manual_seed(0)
    network = li_cnn(in_channels=1, dims=dims, scale=1.0)  # type: ignore[arg-type]
    assert share_left_of_blur(network, 15, dims, steps=200, rate=5e-4) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole(dims: int) -> None:
    network = li_cnn(in_channels=1, dims=dims, scale=0.3)  # type: ignore[arg-type]
    assert tile_differs_by(network, 1, dims, 13) < 1e-5


def test_small_images_and_impossible_settings_are_refused() -> None:
    network = li_cnn(in_channels=1)
    assert network(torch.zeros(1, 1, 13, 13, 13)).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 13"):
        network(torch.zeros(1, 1, 13, 13, 12))
    with pytest.raises(ValueError, match="3 spatial axes"):
        network(torch.zeros(1, 1, 16, 16))
    for wrong in ({"dims": 1}, {"in_channels": 0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="dims is 2 or 3"):
            li_cnn(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
