from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from chiasm.networks.pix2pix import PatchDiscriminator, Pix2PixGenerator
from network_checks import (
    count,
    kernels_of,
    lively,
    measured_field,
    positive,
    reached,
    share_left,
    tile_differs_by,
    weights_of,
)

#: Inputs, outputs and kernel, from the appendix: the way down C64 to C512, the way up CD512 to C64 (whose
#: inputs are doubled by what is joined, but for the innermost), and the output.
DOWN = [(1, 64, 4), (64, 128, 4), (128, 256, 4), (256, 512, 4), *[(512, 512, 4)] * 4]
UP = [(512, 512, 4), *[(1024, 512, 4)] * 3, (1024, 256, 4), (512, 128, 4), (256, 64, 4), (128, 1, 4)]
#: The 70 x 70 discriminator: C64-C128-C256-C512 and one channel, with strides.
CRITIC = [(2, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2), (256, 512, 4, 1), (512, 1, 4, 1)]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_generators_layers_and_weights_are_the_papers(dims: int) -> None:
    with torch.device("meta"):
        network = Pix2PixGenerator(in_channels=1, dims=dims)  # type: ignore[arg-type]
    assert [layer[:3] for layer in kernels_of(network)] == [*DOWN, *UP]
    assert {layer[3] for layer in kernels_of(network)} == {2}
    norms = [128, 256, *[512] * 4, *[512] * 4, 256, 128, 64]  # not the first, the innermost and the last
    assert count(network) == weights_of([*DOWN, *UP], dims, norms=norms, biases=[64, 512, 1])


def test_from_three_channels_to_three_it_has_the_weights_of_the_authors_torch_code() -> None:
    with torch.device("meta"):
        network = Pix2PixGenerator(in_channels=3)
    # theirs has three output channels and no bias at the first and the innermost convolution; it prints 54.414 M
    theirs = count(network) + 2 * (128 * 16 + 1) - 64 - 512
    assert f"{theirs / 1e6:.3f}" == "54.414"


def test_a_generator_of_depth_5_leaves_out_three_levels_of_512() -> None:
    with torch.device("meta"):
        network = Pix2PixGenerator(in_channels=1, depth=5)
    assert [layer[:3] for layer in kernels_of(network)] == [*DOWN[:5], (512, 512, 4), *UP[4:]]
    assert network.size_multiple == network.smallest == 32


@pytest.mark.parametrize(("depth", "shares"), [(8, [0.5, 0.5, 0.5, 0, 0, 0, 0]), (5, [0.5, 0.5, 0.5, 0]), (2, [0.5])])
def test_dropout_stands_in_the_three_innermost_levels_of_the_way_up(depth: int, shares: list[float]) -> None:
    network = Pix2PixGenerator(in_channels=1, scale=0.02, depth=depth)
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == shares


def test_the_way_down_is_leaky_and_the_way_up_rectified() -> None:
    network = Pix2PixGenerator(in_channels=1, scale=0.02)
    for part, kind in ((network.downs, nn.LeakyReLU), (network.ups, nn.ReLU)):
        found = [module for module in part.modules() if isinstance(module, nn.LeakyReLU | nn.ReLU)]
        assert len(found) == 7 and all(type(module) is kind for module in found)
    assert {module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)} == {0.2}


def test_one_sample_of_the_papers_size_can_be_trained_on_at_once() -> None:
    network = Pix2PixGenerator(in_channels=1, scale=0.05).train()  # the innermost grid is one voxel
    network(torch.randn(1, 1, 256, 256)).square().mean().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize(("dims", "depth"), [(2, 5), (2, 3), (3, 3)])
def test_the_receptive_field_is_what_gradients_reach_and_no_more(dims: int, depth: int) -> None:
    network = Pix2PixGenerator(in_channels=1, dims=dims, scale=0.02, depth=depth)  # type: ignore[arg-type]
    assert measured_field(network, 1, dims, others=2**depth) == network.receptive_field


def test_at_depth_8_the_places_next_to_a_cells_ends_see_farthest() -> None:
    network = positive(Pix2PixGenerator(in_channels=1, scale=0.02))
    places = [1024 + place for place in (0, 1, 100, 254, 255)]
    spans = reached(network, (1, 2304, 256), places)
    far = [max(place - first, last - place) for place, (first, last) in zip(places, spans)]
    assert far[1] == far[3] == network.receptive_field == 765 and max(far) == 765


@pytest.mark.parametrize(("dims", "depth"), [(2, 5), (3, 3)])
def test_a_tile_with_its_halo_equals_the_whole(dims: int, depth: int) -> None:
    network = Pix2PixGenerator(in_channels=2, dims=dims, scale=0.05, depth=depth)  # type: ignore[arg-type]
    assert tile_differs_by(network, 2, dims, others=2**depth) < 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_the_generator_learns_one_patch_by_heart(dims: int) -> None:
    torch.manual_seed(0)
    network = Pix2PixGenerator(in_channels=1, dims=dims, scale=1 / 4, depth=5 if dims == 2 else 3)  # type: ignore[arg-type]
    source = torch.randn(1, 1, *[64 if dims == 2 else 16] * dims)
    assert share_left(network, source, 0.5 - source, steps=60, rate=5e-3) < 0.1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("norm", "norms"), [("batch", [128, 256, 512]), ("none", [])])
def test_the_discriminators_layers_and_weights_are_the_papers(dims: int, norm: str, norms: list[int]) -> None:
    with torch.device("meta"):
        network = PatchDiscriminator(in_channels=2, dims=dims, norm=norm)  # type: ignore[arg-type]
    assert kernels_of(network) == CRITIC
    biases = [64, 1] if norms else [64, 128, 256, 512, 1]
    assert count(network) == weights_of([layer[:3] for layer in CRITIC], dims, norms=norms, biases=biases)


def test_on_six_channels_the_discriminator_has_the_weights_of_the_authors_torch_code() -> None:
    with torch.device("meta"):
        assert f"{count(PatchDiscriminator(in_channels=6, dims=2)) / 1e6:.3f}" == "2.769"  # as it prints


@pytest.mark.parametrize("dims", [2, 3])
def test_a_logit_of_the_discriminator_sees_70_voxels_a_side_by_gradients(dims: int) -> None:
    discriminator = PatchDiscriminator(in_channels=1, dims=dims, scale=0.02)  # type: ignore[arg-type]
    for place in (7, 8):
        ((first, last),) = reached(positive(discriminator), (1, 160, *[24] * (dims - 1)), [place])
        assert last - first + 1 == discriminator.patch == 70
        # 2 + 1 convolutions padded by 1 at strides 8, 8, 4, 2, 1 begin 8 + 8 + 4 + 2 + 1 voxels before the place's own
        assert first == 8 * place - 23


def test_an_image_of_256_gives_30_by_30_logits_as_in_the_authors_code() -> None:
    discriminator = PatchDiscriminator(in_channels=2, dims=2, scale=0.02)
    assert discriminator(torch.zeros(2, 2, 256, 256)).shape == (2, 1, 30, 30)
    for size in range(discriminator.smallest, 48):
        assert discriminator(torch.zeros(2, 2, 24, size)).shape == (2, 1, 1, size // 8 - 2)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_discriminator_learns_to_tell_rough_patches_from_smooth_ones(norm: str) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(in_channels=1, dims=2, scale=1 / 8, norm=norm)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    rough = torch.randn(4, 1, 40, 40)
    smooth = functional.avg_pool2d(rough, 3, 1, 1)
    is_rough, losses = torch.tensor([1.0] * 4 + [0.0] * 4).view(8, 1, 1, 1).expand(8, 1, 3, 3), []
    for _ in range(60):
        loss = functional.binary_cross_entropy_with_logits(
            discriminator(torch.cat([rough, smooth / smooth.std()])), is_rough
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_the_discriminator_standardises_first() -> None:
    discriminator, plain = (PatchDiscriminator(in_channels=2, dims=2, scale=0.05) for _ in range(2))
    plain.load_state_dict(lively(discriminator).state_dict())
    mean, sd = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    discriminator.standardise.set_input_statistics(mean, sd)
    plain.standardise.set_input_statistics(torch.zeros(2), torch.ones(2))
    images = torch.randn(3, 2, 32, 40)
    logits = discriminator(images)
    assert logits.std() > 0
    torch.testing.assert_close(logits, plain.eval()((images - mean.view(1, 2, 1, 1)) / sd.view(1, 2, 1, 1)))


@pytest.mark.parametrize(("norm", "mixes"), [("batch", True), ("none", False)])
def test_the_discriminators_samples_influence_one_another_in_training_only_with_batch_normalisation(
    norm: str, mixes: bool
) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(in_channels=1, dims=2, scale=0.05, norm=norm)  # type: ignore[arg-type]
    images = torch.randn(4, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images)[0].sum(), images)
    assert bool(gradient[1:].abs().max() > 0) == mixes


def test_a_patch_of_96_is_refused_and_told_what_is_possible() -> None:
    network = Pix2PixGenerator(in_channels=1, scale=0.02)
    with pytest.raises(ValueError, match=r"multiples of 256 at depth 8, not \(96, 96\): .*256 or 512.*depth 5 at most"):
        network(torch.zeros(1, 1, 96, 96))
    shallower = Pix2PixGenerator(in_channels=1, scale=0.02, depth=5)
    assert shallower(torch.zeros(2, 1, 96, 96)).shape == (2, 1, 96, 96)
    with pytest.raises(ValueError, match=r"give 256 or 512 a side$"):  # no depth suits 99
        network(torch.zeros(1, 1, 99, 96))


def test_what_they_cannot_take_is_refused() -> None:
    network = Pix2PixGenerator(in_channels=1, scale=0.02, depth=3)
    for shape, told in (((1, 1, 8, 0), "multiples of 8"), ((1, 1, 8, 8, 8), "spatial axes")):
        with pytest.raises(ValueError, match=told):
            network(torch.zeros(shape))
    discriminator = PatchDiscriminator(in_channels=2, dims=2, scale=0.02)
    for shape in ((2, 2, 23, 32), (2, 2, 32, 32, 32)):
        with pytest.raises(ValueError, match="at least 24"):
            discriminator(torch.zeros(shape))
    for wrong in ({"in_channels": 0}, {"dims": 4}, {"scale": 0.0}, {"depth": 1}, {"depth": 9}, {"dropout": 1.0}):
        with pytest.raises(ValueError):
            Pix2PixGenerator(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
    for wrong in ({"in_channels": 0}, {"dims": 4}, {"scale": 0.0}, {"norm": "instance"}):
        with pytest.raises(ValueError):
            PatchDiscriminator(**{"in_channels": 1, "dims": 2} | wrong)  # type: ignore[arg-type]
