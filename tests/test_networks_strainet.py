from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.strainet import (
    StochasticBranch,
    StochasticUnit,
    Strainet,
    StrainetDiscriminator,
    VaryingConvolution,
)
from network_checks import kernels, lively, measured_field, share_left_of_blur, tile_differs_by, weights


def unit(a: int, b: int, dims: int) -> int:
    """Weights of a bottleneck of half the width, each convolution with gain and offset, and of its shortcut."""
    half = b // 2
    branch = (a * half + 2 * half) + (half * half * 3**dims + 2 * half) + (half * b + 2 * b)
    return branch + (a * b + 2 * b if a != b else 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_weights_are_those_of_the_layer_table(dims: int) -> None:
    cube = 3**dims
    stem = 64 * cube + 2 * 64
    down = unit(64, 64, dims) + unit(64, 128, dims) + unit(128, 256, dims) + unit(256, 512, dims)
    narrow = (512 * 256 + 2 * 256) + (256 * 128 + 2 * 128) + (128 * 64 + 2 * 64)
    up = unit(256, 256, dims) + unit(128, 128, dims) + unit(64, 64, dims)
    varying = 4 * (64 * 64 * cube + 64) + 4 * (64 + 1)
    by_hand = stem + down + narrow + up + varying + (64 + 1)
    assert weights(Strainet, in_channels=1, dims=dims) == by_hand == {2: 1_826_181, 3: 4_076_037}[dims]


def test_it_has_31_convolutions_and_one_of_them_is_dilated() -> None:
    with torch.device("meta"):
        network = Strainet(in_channels=1)
    # stem, 7 units of 3, 3 shortcuts, 3 on the way up, basis and mixture, last
    assert len(kernels(network)) == 1 + 7 * 3 + 3 + 3 + 2 + 1 == 31
    dilated = [part for part in network.modules() if isinstance(part, nn.Conv2d) and part.dilation[0] == 2]
    assert [(part.in_channels, part.out_channels) for part in dilated] == [(256, 256)]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_discriminators_weights_are_those_of_the_layer_table(dims: int) -> None:
    table = [(2, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 128)]
    by_hand = sum(a * b * 3**dims + b for a, b in table) + (128 * 1024 + 1024) + (1024 + 1)
    assert weights(StrainetDiscriminator, in_channels=2, dims=dims) == by_hand == {2: 715_009, 3: 1_877_377}[dims]


@pytest.mark.parametrize("dims", [2, 3])
def test_an_impulse_reaches_as_far_as_the_receptive_field_and_no_farther(dims: int) -> None:
    network = Strainet(in_channels=2, dims=dims, scale=1 / 64)  # type: ignore[arg-type]
    assert measured_field(network, 2, dims, others=8) == network.receptive_field


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_it_learns_one_patch(dims: int) -> None:
    torch.manual_seed(0)
    # with all branches: one left out is an error on a single patch, which no training can take away
    network = Strainet(in_channels=1, dims=dims, scale=0.15, drop=0.0)  # type: ignore[arg-type]
    assert share_left_of_blur(network, 8, dims, steps=120, rate=3e-3) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole_and_with_less_it_does_not(dims: int) -> None:
    network = Strainet(in_channels=1, dims=dims, scale=0.07)  # type: ignore[arg-type]
    assert tile_differs_by(network, 1, dims, 16) < 1e-5
    assert tile_differs_by(network, 1, dims, 16, short=network.receptive_field - 24) > 1e-5


def test_a_branch_is_left_out_whole_and_its_mean_over_training_is_what_inference_takes() -> None:
    torch.manual_seed(0)
    branch, stochastic = torch.rand(4000, 2, 3, 3) + 1, StochasticBranch(0.25)
    kept = stochastic.train()(branch) / branch
    assert all(len(sample.unique()) == 1 for sample in kept)  # all of a sample or nothing
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(float(kept[:, 0, 0, 0].mean()) - 0.75) < 0.03  # four standard deviations
    torch.testing.assert_close(stochastic.eval()(branch), 0.75 * branch)


def test_a_unit_without_its_branch_is_its_rectified_shortcut() -> None:
    torch.manual_seed(0)
    residual = StochasticUnit(4, 4, dims=2, drop=0.5).train()
    features = torch.randn(64, 4, 5, 5)
    same = (residual(features) == features.relu()).flatten(1).all(dim=1)
    assert 0.25 < same.float().mean() < 0.75


def test_training_draws_anew_and_inference_does_not() -> None:
    network = Strainet(in_channels=1, scale=0.1, drop=0.5)
    source = torch.randn(4, 1, 16, 16)
    assert not torch.equal(network(source), network(source))
    network.eval()
    assert torch.equal(network(source), network(source))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_varying_convolution_uses_at_each_voxel_the_mixture_of_kernels_predicted_there(dims: int) -> None:
    layer = lively(VaryingConvolution(3, dims=dims, basis=4)).double()  # type: ignore[arg-type]
    features = torch.randn(1, 3, *[6] * dims, dtype=torch.float64)
    with torch.no_grad():
        made = layer(features)
        basis = layer.kernels.weight.unflatten(0, (4, 3))  # type: ignore[union-attr,operator]
        offsets = layer.kernels.bias.unflatten(0, (4, 3))  # type: ignore[union-attr,operator]
        for place in ((2,) * dims, (4,) * dims):
            here = features[(0, slice(None), *place)]
            shares = functional.softmax(layer.mixture.weight.flatten(1) @ here + layer.mixture.bias, dim=0)  # type: ignore[union-attr,operator]
            kernel, offset = (torch.tensordot(shares, part, 1) for part in (basis, offsets))
            around: Tensor = features[(0, slice(None), *(slice(i - 1, i + 2) for i in place))]
            expected = (kernel * around).flatten(1).sum(1) + offset
            torch.testing.assert_close(made[(0, slice(None), *place)], expected)
            assert shares.max() < 0.999  # a true mixture


def test_one_basis_kernel_is_a_plain_convolution() -> None:
    layer = lively(VaryingConvolution(3, dims=2, basis=1)).double()
    features = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(features), layer.kernels(features))  # type: ignore[operator]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_logit_of_the_discriminator_sees_its_place_and_all_sizes_of_16_and_more_are_taken(dims: int) -> None:
    discriminator = lively(StrainetDiscriminator(in_channels=2, dims=dims, scale=0.1)).double()  # type: ignore[arg-type]
    assert discriminator.smallest == 16
    for size, logits in ((16, 1), (17, 2), (32, 2)):
        assert discriminator(torch.zeros(1, 2, size, *[16] * (dims - 1)).double()).shape[2:] == (
            logits,
            *[1] * (dims - 1),
        )
    images = torch.randn(1, 2, 128, *[16] * (dims - 1), dtype=torch.float64)
    changed = images.clone()
    changed[:, :, :8] += 1.0
    moved = (discriminator(changed) - discriminator(images)).abs().flatten(2).sum(dim=(0, 1))
    assert moved[0] > 0 and moved[-1] == 0


def test_the_discriminator_standardises_its_inputs_first() -> None:
    discriminator = lively(StrainetDiscriminator(in_channels=2, dims=2, scale=0.1)).double()
    images = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    plain = discriminator(images)
    discriminator.standardise.set_input_statistics(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))  # type: ignore[operator,union-attr]
    moved = torch.stack([images[:, 0] * 0.5 + 1.0, images[:, 1] * 4.0 - 2.0], dim=1)
    torch.testing.assert_close(discriminator(moved), plain)


def test_wrong_sizes_are_refused() -> None:
    network, discriminator = Strainet(in_channels=1, scale=0.1), StrainetDiscriminator(in_channels=2, dims=2, scale=0.1)
    for shape in ((1, 1, 12, 16), (1, 1, 16, 0), (1, 1, 16, 16, 16)):
        with pytest.raises(ValueError, match=r"multiples of 8|spatial axes"):
            network(torch.zeros(shape))
    for shape in ((1, 2, 15, 16), (1, 2, 16, 16, 16)):
        with pytest.raises(ValueError, match="2 axes of at least 16"):
            discriminator(torch.zeros(shape))


@pytest.mark.parametrize("make", [Strainet, StrainetDiscriminator])
@pytest.mark.parametrize("wrong", [{"dims": 4}, {"in_channels": 0}, {"scale": 0.0}])
def test_impossible_settings_are_refused(make: type[nn.Module], wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="dims is 2 or 3"):
        make(**{"in_channels": 2, "dims": 2} | wrong)


@pytest.mark.parametrize("wrong", [{"drop": 1.0}, {"drop": -0.1}, {"basis": 0}])
def test_impossible_shares_and_bases_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="drop is at least 0"):
        Strainet(in_channels=1, **wrong)  # type: ignore[arg-type]
