from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.networks.generator import KNOTS, ResidualGenerator, Skip, fold_voxels, reach, unfold_voxels, upsample


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a random value, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if "lookup" in name or not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if "norm" in name else (noise - 0.5) * 0.5)
    return network.eval()


def make(dims: int, widths: tuple[int, ...] = (2, 3, 4), **options: object) -> ResidualGenerator:
    torch.manual_seed(0)
    return ResidualGenerator(in_channels=2, widths=widths, dims=dims, **options)  # type: ignore[arg-type]


def seen_from(network: nn.Module, channels: int, size: int, dims: int, place: int) -> tuple[int, int]:
    """First and last index along the first axis on which the output at `place` depends, by its gradient."""
    # spread along one axis only: the others are just long enough for the coarsest grid
    others = [16] * (dims - 1)
    image = torch.rand(1, channels, size, *others, dtype=torch.float64, requires_grad=True)
    output = network(image)
    output[(0, 0, place, *[8] * (dims - 1))].backward()
    assert image.grad is not None
    touched = image.grad.abs().sum(dim=(0, 1, *range(3, dims + 2))).nonzero().flatten()
    return int(touched[0]), int(touched[-1])


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize(("dims", "widths"), [(2, (2,)), (2, (2, 2)), (2, (2, 2, 2)), (2, (2, 2, 2, 2)), (3, (2, 2))])
def test_the_receptive_field_is_what_gradients_reach_and_no_more(dims: int, widths: tuple[int, ...], fold: int) -> None:
    network = lively(make(dims, widths, fold=fold)).double()
    for module in network.modules():  # a rectifier may hide a path at one random input: let all through
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data.abs_()
            if module.bias is not None:
                module.bias.data.abs_()
    field, multiple = network.receptive_field, network.size_multiple
    size = -(-(2 * field + 4 * multiple) // multiple) * multiple
    middle = size // 2 // multiple * multiple
    farthest = 0
    for place in range(middle, middle + multiple):
        first, last = seen_from(network, 2, size, dims, place)
        farthest = max(farthest, place - first, last - place)
    assert farthest == field


def test_reach_counts_by_hand() -> None:
    assert reach(["convolution"], 1) == 1
    # down 0 <- -1..1, 1 <- 1..3; up: 1 <- 0..1 <- -1..3, two to the left, two to the right
    assert reach(["down", "up"], 2) == 3  # up: 0 <- -1..0 <- -3..1
    assert reach(["convolution", "down", "up"], 2) == 4
    # unfold 0 <- block 0 <- blocks -1..1 <- voxels -2..3; voxel 1 of the block likewise, so 3 to the right or left
    assert reach(["fold", "convolution", "unfold"], 2) == 3


def test_folding_in_two_dimensions_is_torchs_pixel_unshuffle() -> None:
    image = torch.randn(2, 3, 8, 12)
    folded = fold_voxels(image, 2)
    assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(image, 2))
    assert torch.equal(unfold_voxels(folded, 2), torch.nn.functional.pixel_shuffle(folded, 2))


def test_unfolding_in_three_dimensions_undoes_folding_and_keeps_blocks_together() -> None:
    image = torch.randn(2, 3, 4, 8, 6)
    folded = fold_voxels(image, 2)
    assert folded.shape == (2, 24, 2, 4, 3)
    assert torch.equal(folded[1, 8:16, 1, 2, 0].sort().values, image[1, 1, 2:4, 4:6, 0:2].flatten().sort().values)
    assert torch.equal(unfold_voxels(folded, 2), image)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("norm", "fold"), [("batch", 1), ("none", 1), ("batch", 2)])
def test_a_tile_with_its_halo_equals_the_whole(dims: int, norm: str, fold: int) -> None:
    network = lively(make(dims, (4, 6), norm=norm, skip=Skip("source"), fold=fold))
    multiple = network.size_multiple
    halo = -(-network.receptive_field // multiple) * multiple
    size = 2 * halo + 3 * multiple
    size += -size % multiple
    others = [8] * (dims - 1)
    whole_source = torch.randn(1, 2, size, *others)
    with torch.no_grad():
        whole = network(whole_source)
        tile = 2 * multiple
        for start in range(0, size, tile):
            stop = min(start + tile, size)
            low, high = max(0, start - halo), min(size, stop + halo)
            part = network(whole_source[:, :, low:high])[:, :, start - low : stop - low]
            torch.testing.assert_close(part, whole[:, :, start:stop], atol=1e-5, rtol=0)


def test_a_halo_one_block_too_small_shows() -> None:
    network = lively(make(2, (4, 6, 8)))
    halo = network.receptive_field // network.size_multiple * network.size_multiple - 2 * network.size_multiple
    source = torch.randn(1, 2, 128, 16)
    with torch.no_grad():
        whole, part = network(source), network(source[:, :, 64 - halo :])
    assert (part[:, :, halo:] - whole[:, :, 64:]).abs().max() > 1e-5


@pytest.mark.parametrize("dims", [2, 3])
def test_interpolating_after_the_one_convolution_equals_interpolating_before(dims: int) -> None:
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 2, 1)
    coarse = torch.randn(2, 3, *[4] * dims)
    torch.testing.assert_close(upsample(convolution(coarse)), convolution(upsample(coarse)))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_fresh_network_with_a_source_skip_returns_that_channel(dims: int) -> None:
    network = make(dims, skip=Skip("source", 1))
    source = torch.randn(2, 2, *[8] * dims)
    assert torch.equal(network(source), source[:, 1:])


@pytest.mark.parametrize(("dims", "fold"), [(2, 1), (3, 1), (2, 2)])
def test_a_fresh_network_with_a_lookup_skip_equals_numpy_interp(dims: int, fold: int) -> None:
    network = make(dims, skip=Skip("lookup", 1), fold=fold)
    source = 3 * torch.randn(2, 2, *[8] * dims)
    assert not network(source).any()  # not set yet: zero
    x = torch.sort(torch.randn(KNOTS)).values
    y = torch.randn(KNOTS)
    network.set_lookup(x, y)
    source[0, 1].flatten()[: len(x)] = x[: source[0, 1].numel()]  # on the knots themselves too
    expected = np.interp(source[:, 1:].numpy(), x.numpy(), y.numpy())
    np.testing.assert_allclose(network(source).detach().numpy(), expected, atol=1e-5)


def test_the_lookup_travels_with_the_weights() -> None:
    first, second = make(2, skip=Skip("lookup")), make(2, skip=Skip("lookup"))
    first.set_lookup(torch.linspace(-1, 1, KNOTS), torch.linspace(3, 5, KNOTS))
    second.load_state_dict(first.state_dict())
    source = torch.randn(1, 2, 8, 8)
    assert torch.equal(first.eval()(source), second.eval()(source))


def test_samples_do_not_influence_one_another_at_inference() -> None:
    network = lively(make(2))
    source = torch.randn(4, 2, 16, 24)
    with torch.no_grad():
        alone = torch.cat([network(sample[None]) for sample in source])
        torch.testing.assert_close(network(source), alone, atol=1e-5, rtol=0)


def test_a_small_network_learns_to_edge_detect() -> None:
    torch.manual_seed(1)
    network = ResidualGenerator(in_channels=1, widths=(8, 8), dims=2, skip=Skip("source"))
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    image = torch.randn(8, 1, 16, 16)

    def wanted(source: Tensor) -> Tensor:
        return source - source.roll(1, dims=2)

    losses = []
    for _ in range(150):
        loss = (network(image) - wanted(image)).square()[:, :, 1:].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_dropout_leaves_out_whole_channels_of_every_level_in_training_alone(dims: int) -> None:
    network, plain = (lively(make(dims, (40, 40), dropout=share)) for share in (0.25, 0.0))
    image = torch.rand(4, 2, *[8] * dims)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(network(image), plain(image))
    seen: list[tuple[Tensor, Tensor]] = []
    network.dropout.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    network.train()(image)
    assert len(seen) == len(network.levels) == 3
    for given, made in seen:
        left_out = (made == 0).flatten(2).all(dim=2)
        assert 0.1 < left_out.float().mean() < 0.4  # 160 channels: 0.25 give or take four standard deviations
        torch.testing.assert_close(made[~left_out], given[~left_out] / 0.75)


@pytest.mark.parametrize("shape", [(1, 2, 12, 16), (1, 2, 16, 0), (1, 2, 16, 16, 16)])
def test_sizes_that_the_levels_cannot_halve_are_refused(shape: tuple[int, ...]) -> None:
    network = make(2, (2, 2, 2, 2))
    assert network.size_multiple == 8
    with pytest.raises(ValueError, match=r"multiples of 8|spatial axes"):
        network(torch.zeros(shape))


def test_impossible_settings_are_refused() -> None:
    for wrong in (
        {"dims": 4},
        {"widths": ()},
        {"norm": "instance"},
        {"skip": Skip("both")},
        {"skip": Skip("source", 2)},
        {"dropout": 1.0},
    ):
        with pytest.raises(ValueError):
            ResidualGenerator(**{"in_channels": 2, "widths": (2, 2), "dims": 2} | wrong)  # type: ignore[arg-type]
    rising, table = torch.linspace(0, 1, KNOTS), make(2, skip=Skip("lookup"))
    for x, y in ((rising[1:], rising[1:]), (rising.flip(0), rising), (rising, rising / 0)):
        with pytest.raises(ValueError, match="look-up"):
            table.set_lookup(x, y)
    with pytest.raises(ValueError, match="skip"):
        make(2).set_lookup(rising, rising)
