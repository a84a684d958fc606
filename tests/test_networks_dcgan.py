from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from chiasm.networks.dcgan import DcganDiscriminator, DcganGenerator
from network_checks import (
    count,
    kernels_of,
    lively,
    measured_field,
    share_left,
    tile_differs_by,
    weights_of,
)

#: Inputs, outputs and kernel: figure 1's way up (1024, 512, 256, 128, image), and its mirror image.
DOWN = [(1, 128, 5), (128, 256, 5), (256, 512, 5), (512, 1024, 5)]
UP = [(1024, 512, 5), (512, 256, 5), (256, 128, 5), (128, 1, 5)]
#: The released discriminator's (ndf = 128).
CRITIC = [(2, 128, 5), (128, 256, 5), (256, 512, 5), (512, 1024, 5)]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_generators_layers_and_weights_are_those_of_figure_1_and_its_mirror_image(dims: int) -> None:
    with torch.device("meta"):
        network = DcganGenerator(in_channels=1, dims=dims)  # type: ignore[arg-type]
    assert [layer[:3] for layer in kernels_of(network)] == [*DOWN, *UP]
    assert {layer[3] for layer in kernels_of(network)} == {2}
    norms = [256, 512, 1024, 512, 256, 128]  # all but the first and the last
    assert count(network) == weights_of([*DOWN, *UP], dims, norms=norms, biases=[128, 1])


@pytest.mark.parametrize(("norm", "norms", "biases"), [("batch", [256, 512, 1024], []), ("none", [], [256, 512, 1024])])
def test_the_discriminators_layers_and_weights_are_the_released_codes(
    norm: str, norms: list[int], biases: list[int]
) -> None:
    with torch.device("meta"):
        network = DcganDiscriminator(in_channels=2, dims=2, norm=norm)  # type: ignore[arg-type]
    assert [layer[:3] for layer in kernels_of(network)] == CRITIC
    assert {layer[3] for layer in kernels_of(network)} == {2}
    assert count(network) == weights_of(CRITIC, 2, norms=norms, biases=[128, *biases]) + 1024 + 1


def test_the_generator_is_rectified_and_the_discriminator_leaky() -> None:
    generator, discriminator = (
        DcganGenerator(in_channels=1, scale=0.02),
        DcganDiscriminator(in_channels=2, dims=2, scale=0.02),
    )
    assert sum(isinstance(module, nn.ReLU) for module in generator.modules()) == 7  # all but the output
    leaks = [module.negative_slope for module in discriminator.modules() if isinstance(module, nn.LeakyReLU)]
    assert leaks == [0.2] * 4


def test_weights_start_with_a_spread_of_one_fiftieth() -> None:
    torch.manual_seed(0)
    for network in (DcganGenerator(in_channels=1, scale=0.25), DcganDiscriminator(in_channels=2, dims=2, scale=0.25)):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.weight.numel() > 10_000:
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_receptive_field_is_what_gradients_reach_and_no_more(dims: int) -> None:
    network = DcganGenerator(in_channels=1, dims=dims, scale=0.02)  # type: ignore[arg-type]
    assert measured_field(network, 1, dims, others=16) == network.receptive_field


@pytest.mark.parametrize("dims", [2, 3])
def test_a_tile_with_its_halo_equals_the_whole(dims: int) -> None:
    network = DcganGenerator(in_channels=2, dims=dims, scale=0.03)  # type: ignore[arg-type]
    assert tile_differs_by(network, 2, dims, others=16) < 1e-5


def test_the_generator_learns_one_smooth_patch_by_heart() -> None:
    torch.manual_seed(0)
    target = functional.interpolate(torch.randn(1, 1, 6, 6), size=(32, 32), mode="bilinear")
    network = DcganGenerator(in_channels=1, scale=1 / 8)
    assert share_left(network, torch.randn(1, 1, 32, 32), target, steps=60, rate=3e-3) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_discriminator_learns_to_tell_rough_images_from_smooth_ones(dims: int, norm: str) -> None:
    torch.manual_seed(0)
    discriminator = DcganDiscriminator(in_channels=1, dims=dims, scale=1 / 16, norm=norm)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    rough = torch.randn(4, 1, *[16] * dims)
    smooth = rough.roll(1, 2) / 2 + rough / 2
    smooth = smooth / smooth.std()
    is_rough, losses = torch.tensor([1.0] * 4 + [0.0] * 4), []
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(discriminator(torch.cat([rough, smooth])), is_rough)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_the_discriminator_gives_one_logit_a_sample_at_any_size_and_standardises_first() -> None:
    discriminator = lively(DcganDiscriminator(in_channels=2, dims=2, scale=0.05))
    images = torch.randn(3, 2, 17, 40)
    plain = DcganDiscriminator(in_channels=2, dims=2, scale=0.05).eval()
    plain.load_state_dict(discriminator.state_dict())
    mean, sd = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    for network, m, s in ((discriminator, mean, sd), (plain, torch.zeros(2), torch.ones(2))):
        network.standardise.set_input_statistics(m, s)
    logits = discriminator(images)
    assert logits.shape == (3,) and logits.std() > 0
    torch.testing.assert_close(logits, plain((images - mean.view(1, 2, 1, 1)) / sd.view(1, 2, 1, 1)))


def test_the_discriminator_takes_the_mean_over_space_before_its_linear_unit() -> None:
    discriminator = DcganDiscriminator(in_channels=2, dims=2, scale=0.05)
    discriminator.layers, discriminator.last = nn.Sequential(), nn.Linear(2, 1)
    images = torch.randn(3, 2, 17, 40)
    torch.testing.assert_close(discriminator(images), discriminator.last(images.mean(dim=(2, 3))).squeeze(1))


@pytest.mark.parametrize(("norm", "mixes"), [("batch", True), ("none", False)])
def test_the_discriminators_samples_influence_one_another_in_training_only_with_batch_normalisation(
    norm: str, mixes: bool
) -> None:
    torch.manual_seed(0)
    discriminator = DcganDiscriminator(in_channels=1, dims=2, scale=0.05, norm=norm)  # type: ignore[arg-type]
    images = torch.randn(4, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images)[0], images)
    assert bool(gradient[1:].abs().max() > 0) == mixes


def test_what_they_cannot_take_is_refused() -> None:
    network = DcganGenerator(in_channels=1, scale=0.02)
    for shape, told in (((1, 1, 24, 32), "multiples of 16"), ((1, 1, 32, 32, 32), "spatial axes")):
        with pytest.raises(ValueError, match=told):
            network(torch.zeros(shape))
    discriminator = DcganDiscriminator(in_channels=2, dims=2, scale=0.02)
    for shape in ((2, 2, 15, 32), (2, 2, 32, 32, 32)):
        with pytest.raises(ValueError, match="at least 16"):
            discriminator(torch.zeros(shape))
    for wrong in ({"in_channels": 0}, {"dims": 4}, {"scale": 0.0}):
        with pytest.raises(ValueError):
            DcganGenerator(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            DcganDiscriminator(**{"in_channels": 1, "dims": 2} | wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch or none"):
        DcganDiscriminator(in_channels=1, dims=2, norm="instance")  # type: ignore[arg-type]
