from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.networks.context_gan import ContextDiscriminator, ContextFcn
from network_checks import kernels, lively, measured_field, share_left_of_blur, tile_differs_by, weights

#: Inputs, outputs, kernel: the generator's layer table.
TABLE = [
    (1, 32, 9),
    (32, 32, 3),
    (32, 32, 3),
    (32, 32, 3),
    (32, 64, 9),
    (64, 64, 3),
    (64, 64, 3),
    (64, 32, 3),
    (32, 1, 3),
]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_generators_weights_are_those_of_the_layer_table(dims: int) -> None:
    # a gain and an offset of the normalisation under every convolution but the last, which has a bias
    by_hand = sum(a * b * size**dims for a, b, size in TABLE) + sum(2 * b for _, b, _ in TABLE[:-1]) + 1
    assert weights(ContextFcn, in_channels=1, dims=dims) == by_hand == {2: 289_281, 3: 1_877_313}[dims]
    with torch.device("meta"):
        assert kernels(ContextFcn(in_channels=1, dims=dims)) == TABLE  # type: ignore[arg-type]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_discriminators_weights_are_those_of_the_layer_table(dims: int) -> None:
    table = [(2, 32), (32, 64), (64, 128), (128, 256)]
    linear = (256 * 512 + 512) + (512 * 128 + 128) + (128 + 1)
    by_hand = sum(a * b * 3**dims + 2 * b for a, b in table) + linear
    assert weights(ContextDiscriminator, in_channels=2, dims=dims) == by_hand == {2: 585_985, 3: 1_361_281}[dims]
    with torch.device("meta"):
        assert kernels(ContextDiscriminator(in_channels=2, dims=dims)) == [(a, b, 3) for a, b in table]  # type: ignore[arg-type]


def test_a_patch_of_32_gives_one_of_16() -> None:
    network = ContextFcn(in_channels=2, dims=3, scale=0.05).eval()
    assert network(torch.zeros(1, 2, 32, 32, 32)).shape == (1, 1, 16, 16, 16)
    assert network.margin == 8


@pytest.mark.parametrize("dims", [2, 3])
def test_an_impulse_reaches_as_far_as_the_receptive_field_and_no_farther(dims: int) -> None:
    network = ContextFcn(in_channels=2, dims=dims, scale=0.05)  # type: ignore[arg-type]
    assert measured_field(network, 2, dims, others=17) == network.receptive_field == 4 + 3 + 4 + 4


@pytest.mark.parametrize(("dims", "size"), [(2, 24), (3, 20)])
def test_the_generator_learns_one_patch(dims: int, size: int) -> None:
    torch.manual_seed(0)
    network = ContextFcn(in_channels=1, dims=dims, scale=0.25)  # type: ignore[arg-type]
    assert share_left_of_blur(network, size, dims, steps=60, rate=1e-2) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole_and_with_less_it_does_not(dims: int) -> None:
    network = ContextFcn(in_channels=1, dims=dims, scale=0.15)  # type: ignore[arg-type]
    assert tile_differs_by(network, 1, dims, 18) < 1e-5
    assert tile_differs_by(network, 1, dims, 18, short=3) > 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_the_discriminator_equals_its_parts_applied_one_by_one(dims: int) -> None:
    discriminator = lively(ContextDiscriminator(in_channels=2, dims=dims, scale=0.1)).double()  # type: ignore[arg-type]
    mean, sd = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    discriminator.standardise.set_input_statistics(mean, sd)  # type: ignore[operator,union-attr]
    pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
    images = torch.randn(3, 2, *[17] * dims, dtype=torch.float64)
    by_hand = torch.stack([(images[:, 0] - 1.0) / 0.5, (images[:, 1] + 2.0) / 4.0], dim=1)
    first, second, third, fourth = discriminator.blocks  # type: ignore[misc]
    by_hand = fourth(pool(third(pool(second(pool(first(by_hand)))))))
    by_hand = by_hand.mean(dim=tuple(range(2, dims + 2)))
    for layer in discriminator.hidden:  # type: ignore[union-attr]
        by_hand = layer(by_hand).clamp(min=0)
    expected = discriminator.last(by_hand)[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(discriminator(images), expected)
    assert expected.shape == (3,) and expected.std() > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_the_discriminator_learns_to_tell_smooth_from_rough(dims: int) -> None:
    torch.manual_seed(0)
    discriminator = ContextDiscriminator(in_channels=2, dims=dims, scale=0.1)  # type: ignore[arg-type]
    images = torch.randn(8, 2, *[16] * dims)
    images[4:] = (images[4:] + images[4:].roll(1, dims=2)) / 2**0.5
    real = torch.tensor([0.0] * 4 + [1.0] * 4)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.binary_cross_entropy_with_logits(discriminator(images), real)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_wrong_sizes_are_refused() -> None:
    network, discriminator = (
        made.eval() for made in (ContextFcn(in_channels=1), ContextDiscriminator(in_channels=2, dims=2))
    )
    assert network.smallest == 17 and network(torch.zeros(1, 1, 17, 17)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 17"):
        network(torch.zeros(1, 1, 16, 17))
    with pytest.raises(ValueError, match="2 spatial axes"):
        network(torch.zeros(1, 1, 20, 20, 20))
    assert discriminator.smallest == 8 and discriminator(torch.zeros(2, 2, 8, 9)).shape == (2,)
    for shape in ((2, 2, 7, 8), (2, 2, 8, 8, 8)):
        with pytest.raises(ValueError, match="2 axes of at least 8"):
            discriminator(torch.zeros(shape))


@pytest.mark.parametrize("make", [ContextFcn, ContextDiscriminator])
@pytest.mark.parametrize("wrong", [{"dims": 4}, {"in_channels": 0}, {"scale": 0.0}])
def test_impossible_settings_are_refused(make: type[nn.Module], wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="dims is 2 or 3"):
        make(**{"in_channels": 2, "dims": 2} | wrong)
