"""Slices and tiles equal the whole volume; windows blend without darkening or overflowing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import ResidualGenerator
from chiasm.prediction.seams import seam_of, tiles_are_exact
from chiasm.prediction.tiling import (
    NetworkFn,
    Tile,
    apply_inside,
    apply_to_volume,
    plan_tiles,
    slice_stack,
    slice_stacks,
)
from chiasm.prediction.windows import blend_windows, window_positions, window_weights

RNG = np.random.default_rng(0)


def volume(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def with_lived_in_norms(network: nn.Module) -> nn.Module:
    """Give batch normalisation the statistics of a trained network, and evaluate."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
            part.running_mean.normal_()  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def generator() -> ResidualGenerator:
    torch.manual_seed(1)
    return with_lived_in_norms(ResidualGenerator(in_channels=2, widths=[4, 8], dims=3))  # type: ignore[return-value]


# ---------------------------------------------------------------- tiles


def test_a_tile_turns_into_slices_worked_by_hand() -> None:
    tiles = plan_tiles([40], tile=8, halo=5, multiple=4)  # reads begin and end at multiples of 4
    assert tiles[0] == Tile(read=((0, 16),), write=((0, 8),))
    assert tiles[2] == Tile(read=((8, 32),), write=((16, 24),))
    assert tiles[2].core == (slice(8, 16),)
    assert tiles[2].size == (24,)
    assert tiles[4] == Tile(read=((24, 40),), write=((32, 40),))


def test_an_axis_that_fits_into_one_tile_with_its_halos_is_not_cut() -> None:
    assert len(plan_tiles([18, 18], tile=8, halo=5, multiple=2)) == 1
    assert len(plan_tiles([21, 18], tile=8, halo=5, multiple=2)) == 2


@pytest.mark.parametrize(
    ("side", "halo", "multiple", "most"), [(300, 96, 8, 1.7), (384, 96, 8, 3.4), (512, 152, 16, 4.3)]
)
def test_of_all_tiles_that_are_no_larger_those_are_taken_that_read_least(
    side: int, halo: int, multiple: int, most: float
) -> None:
    tiles = plan_tiles((side,) * 3, tile=96, halo=halo, multiple=multiple)
    assert sum(math.prod(tile.size) for tile in tiles) <= most * side**3
    assert max(math.prod(tile.size) for tile in tiles) <= (96 + 2 * -(-halo // multiple) * multiple) ** 3


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 70)] * 2),
    tile=st.integers(1, 40),
    halo=st.integers(0, 20),
    multiple=st.sampled_from([1, 2, 4, 8]),
)
def test_cores_partition_the_volume_and_reads_are_aligned_and_reach_the_halo(
    shape: tuple[int, int], tile: int, halo: int, multiple: int
) -> None:
    written = np.zeros(shape, int)
    side = sum(-(-part // multiple) * multiple for part in (tile, halo, halo))
    for place in plan_tiles(shape, tile=tile, halo=halo, multiple=multiple):
        assert math.prod(place.size) <= side**2
        written[place.target] += 1
        for (left, right), (start, stop), length in zip(place.read, place.write, shape):
            end = -(-length // multiple) * multiple
            assert left % multiple == 0 and right % multiple == 0
            assert left <= max(0, start - halo) and min(end, stop + halo) <= right <= end
    assert (written == 1).all()


@pytest.mark.parametrize("tile", [2, 5, 8, 13])
def test_tiles_equal_one_pass_over_the_whole(generator: ResidualGenerator, tile: int) -> None:
    source = volume(2, 35, 14, 19)
    settings = {"halo": generator.receptive_field, "multiple": generator.size_multiple}
    filled = np.pad(source, [(0, 0), (0, 1), (0, 0), (0, 1)])
    by_hand = generator(torch.from_numpy(filled[None]))[0, :, :35, :14, :19].numpy()
    tiled = apply_to_volume(generator, source, tile=tile, **settings)
    assert len(plan_tiles(source.shape[1:], tile=tile, **settings)) > 1
    assert tiled.dtype == np.float32
    np.testing.assert_allclose(tiled, by_hand, atol=1e-5)


def test_tiles_without_the_halo_would_show_seams(generator: ResidualGenerator) -> None:
    source = volume(2, 40, 20, 20)
    whole = apply_to_volume(generator, source, tile=40, halo=9, multiple=2)
    assert np.abs(apply_to_volume(generator, source, tile=8, halo=0, multiple=2) - whole).max() > 0.01


def test_tiles_of_generator_and_discriminator_in_a_chain_equal_the_whole_with_two_outputs(
    generator: ResidualGenerator,
) -> None:
    discriminator = LocalDiscriminator(in_channels=3, widths=[2, 4, 4], dims=3).eval().requires_grad_(False)

    def chain(source: Tensor) -> Tensor:
        prediction = generator(source)
        return torch.cat([prediction, discriminator(torch.cat([source, prediction], 1)).magnitude], 1)

    source = volume(2, 75, 11, 9)
    halo = generator.receptive_field + discriminator.receptive_field
    whole = apply_to_volume(chain, source, tile=80, halo=halo, multiple=4)
    tiled = apply_to_volume(chain, source, tile=12, halo=halo, multiple=4)
    assert whole.shape == (2, 75, 11, 9)
    np.testing.assert_allclose(tiled, whole, atol=1e-5)


# ---------------------------------------------------------------- slices


def test_neighbours_are_channels_and_edge_slices_repeat() -> None:
    array = np.broadcast_to(np.arange(5.0) + np.array([[0.0], [100.0]])[:, None, None], (2, 3, 4, 5))
    assert slice_stack(array, 2, 3)[:, 0, 0].tolist() == [1, 2, 3, 101, 102, 103]
    assert slice_stack(array, 0, 5)[:, 0, 0].tolist() == [0, 0, 0, 1, 2, 100, 100, 100, 101, 102]
    assert slice_stack(array, 4, 3)[:, 0, 0].tolist() == [3, 4, 4, 103, 104, 104]
    assert slice_stacks(array, [4, 1], 1)[:, :, 2, 3].tolist() == [[4, 104], [1, 101]]


def over_slices(
    network_fn: NetworkFn, source: np.ndarray, *, places: Sequence[int] | None = None, **numbers: int
) -> np.ndarray:
    """Run a network over all voxels of some slices, and lay them out as a volume; the other slices are 0."""
    inside = np.zeros(source.shape[1:], bool)
    inside[..., slice(None) if places is None else list(places)] = True
    values = apply_inside(network_fn, [source], inside, **numbers)
    made = np.zeros((len(values), *np.moveaxis(inside, -1, 0).shape), np.float32)
    made[:, np.moveaxis(inside, -1, 0)] = values
    return np.moveaxis(made, 1, -1)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_slices_equal_a_loop_over_single_slices(batch: int) -> None:
    torch.manual_seed(2)
    network = with_lived_in_norms(ResidualGenerator(in_channels=6, widths=[4, 8, 8], dims=2))
    source = volume(2, 18, 21, 11)
    made = over_slices(network, source, slices=3, batch=batch, multiple=4)
    assert made.shape == (1, 18, 21, 11) and made.dtype == np.float32
    padded = np.pad(source, [(0, 0), (0, 2), (0, 3), (1, 1)], mode="edge")
    padded[:, 18:], padded[:, :, 21:] = 0, 0
    for k in range(11):
        channels = torch.from_numpy(np.concatenate([one[..., k : k + 3] for one in padded], axis=-1)).movedim(-1, 0)
        np.testing.assert_allclose(made[0, ..., k], network(channels[None])[0, 0, :18, :21].numpy(), atol=1e-5)


def test_slices_that_are_not_asked_for_stay_empty_and_the_others_equal_a_pass_over_all() -> None:
    network, source = nn.Conv2d(3, 2, 3, padding=1).eval(), volume(1, 9, 8, 11)
    with torch.inference_mode():
        whole = over_slices(network, source, slices=3, batch=4, multiple=4)
        places = [1, 2, 3, 6, 7, 9]
        some = over_slices(network, source, slices=3, batch=4, multiple=4, places=places)
    others = sorted(set(range(11)) - set(places))
    np.testing.assert_allclose(some[..., places], whole[..., places], atol=1e-6)
    assert (some[..., others] == 0).all() and whole[..., others].any()


def test_a_memory_map_gives_what_the_array_gives(tmp_path: Path, generator: ResidualGenerator) -> None:
    source = volume(2, 30, 8, 9)
    np.save(tmp_path / "source.npy", source)
    mapped = np.load(tmp_path / "source.npy", mmap_mode="r")
    for tile in (4, 40):
        of_map = apply_to_volume(generator, mapped, tile=tile, halo=9, multiple=2)
        np.testing.assert_array_equal(of_map, apply_to_volume(generator, source, tile=tile, halo=9, multiple=2))
    twice = lambda images: 2 * images[:, 2:3]  # noqa: E731
    np.testing.assert_array_equal(
        over_slices(twice, mapped, slices=5, batch=4, multiple=4)[0], 2 * source[0]
    )  # the middle of the first channel's five slices


def test_large_slices_go_one_by_one_so_that_memory_stays_flat() -> None:
    seen: list[int] = []

    def network(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images

    over_slices(network, np.zeros((1, 512, 512, 5), np.float32), slices=1, batch=8, multiple=16)
    assert seen == [1] * 5
    seen.clear()
    over_slices(network, np.zeros((1, 140, 170, 20), np.float32), slices=1, batch=8, multiple=8)
    assert seen == [8, 8, 4]


# ---------------------------------------------------------------- memory and mistakes


def hungry(most: int) -> tuple[list[int], object]:
    """Return a network that truly runs out of memory above `most` voxels of a pass, and what it was asked."""
    asked: list[int] = []

    def network(images: Tensor) -> Tensor:
        asked.append(images[:, 0].numel())
        if asked[-1] > most:
            torch.empty(2**50)
        return images * 3

    return asked, network


def test_a_pass_that_does_not_fit_into_memory_is_made_smaller() -> None:
    source = volume(1, 16, 16, 8)
    asked, network = hungry(2 * 16 * 16)
    np.testing.assert_array_equal(over_slices(network, source, slices=1, batch=8, multiple=8), source * 3)  # type: ignore[arg-type]
    assert [count // 256 for count in asked] == [8, 4, 2, 2, 2, 2]
    asked, network = hungry(12 * 12 * 8)
    np.testing.assert_array_equal(apply_to_volume(network, source, tile=16, halo=1, multiple=4), source * 3)  # type: ignore[arg-type]
    assert asked[0] == 16 * 16 * 8 and max(asked[1:]) == 12 * 12 * 8 and len(asked) == 5
    asked, network = hungry(128)
    blended = blend_windows(network, source, window=[8, 8, 2], weighting="constant", batch=4)  # type: ignore[arg-type]
    np.testing.assert_allclose(blended, source * 3, rtol=1e-6)


def test_memory_too_short_for_the_smallest_pass_is_said_in_words() -> None:
    _, network = hungry(0)
    for apply in (
        lambda: over_slices(network, volume(1, 8, 8, 8), slices=1, batch=8, multiple=8),  # type: ignore[arg-type]
        lambda: apply_to_volume(network, volume(1, 8, 8, 8), tile=8, halo=1, multiple=4),  # type: ignore[arg-type]
        lambda: blend_windows(network, volume(1, 8, 8, 8), window=[4, 4, 4]),  # type: ignore[arg-type]
    ):
        with pytest.raises(ChiasmError, match="memory ran out") as caught:
            apply()
        assert caught.value.reason == "out-of-memory"


def test_other_errors_of_a_network_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        over_slices(nn.Conv2d(9, 1, 3), volume(1, 8, 8, 8), slices=1, batch=8, multiple=8)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="only channels may change"):
        over_slices(nn.MaxPool2d(2), volume(1, 8, 8, 8), slices=1, batch=8, multiple=8)
    with pytest.raises(ValueError, match="odd"):
        slice_stack(volume(1, 4, 4, 4), 1, 2)
    with pytest.raises(ValueError, match="of 4"):
        slice_stack(volume(1, 4, 4, 4), -1, 1)
    with pytest.raises(ValueError, match="halo -1"):
        plan_tiles([8], tile=4, halo=-1, multiple=2)
    with pytest.raises(ValueError, match="step"):
        window_positions(10, 4, 0.0)
    with pytest.raises(ValueError, match="window"):
        window_positions(10, 11, 0.5)
    with pytest.raises(ValueError, match="hann"):
        window_weights([4], "hann")  # type: ignore[arg-type]


# ---------------------------------------------------------------- blended windows


def test_windows_spread_evenly_and_cover_the_axis() -> None:
    assert window_positions(110, 64, 0.5) == [0, 23, 46]
    assert window_positions(64, 64, 0.5) == [0]
    assert window_positions(10, 4, 1.0) == [0, 3, 6]
    for length in range(5, 60):
        starts = window_positions(length, 5, 0.5)
        assert starts[0] == 0 and starts[-1] == length - 5 and max(np.diff(starts), default=0) <= 3


@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("shape", "window"), [((30, 25, 19), (16, 12, 8)), ((7, 30, 9), (16, 16, 16)), ((33, 20), (9, 20))]
)
def test_a_volume_of_ones_comes_back_as_ones(weighting: str, shape: tuple[int, ...], window: tuple[int, ...]) -> None:
    blended = blend_windows(lambda images: images, np.ones((1, *shape), np.float32), window=window, weighting=weighting)  # type: ignore[arg-type]
    np.testing.assert_allclose(blended, 1, atol=1e-6)


def test_no_voxel_of_a_window_weighs_nothing() -> None:
    assert window_weights([32, 32, 32], "gaussian").min() > 0


def test_bone_does_not_overflow_where_many_windows_overlap() -> None:
    bone = np.full((1, 24, 24, 24), 3000, np.float32)
    blended = blend_windows(lambda images: images, bone, window=[8, 8, 8], step=0.25, weighting="constant", batch=9)
    np.testing.assert_allclose(blended, 3000, rtol=1e-6)
    covered = np.zeros(24, int)
    for start in window_positions(24, 8, 0.25):
        covered[start : start + 8] += 1
    assert np.float32(3000) * covered.max() ** 3 > np.finfo(np.float16).max  # the sum float16 would have to hold


@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_blending_equals_monai_where_windows_lie_alike(weighting: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sliding = pytest.importorskip("monai.inferers").sliding_window_inference
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.InstanceNorm3d(3)).eval().requires_grad_(False)
        source = volume(2, 32, 24, 16)
        theirs = sliding(
            torch.from_numpy(source[None]), (16, 12, 8), 2, network, overlap=0.5, mode=weighting, sigma_scale=0.125
        )
    ours = blend_windows(network, source, window=[16, 12, 8], step=0.5, weighting=weighting, batch=4)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=2e-5)


# ---------------------------------------------------------------- which of both


class Around(nn.Module):
    """A user's network: two convolutions with something between them, and what it states of itself."""

    def __init__(self, middle: nn.Module, receptive_field: int = 2, smallest: int = 4) -> None:
        super().__init__()
        self.size_multiple, self.smallest, self.margin, self.receptive_field = 2, smallest, 0, receptive_field
        self.body = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), middle, nn.Conv3d(4, 1, 3, padding=1))

    def forward(self, source: Tensor) -> Tensor:
        made: Tensor = self.body(source)
        return made


class By(nn.Module):
    """A function as a module, which no list of layers names."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def attended(features: Tensor) -> Tensor:
    tokens = features.flatten(2).transpose(1, 2)
    seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return seen.transpose(1, 2).reshape(features.shape)


def in_windows_of_three(features: Tensor) -> Tensor:
    """Average along the first axis within windows that do not begin where a tile does."""
    length = features.shape[2]
    filled = nn.functional.pad(features, [0, 0, 0, 0, 0, -length % 3])
    mean = filled.unflatten(2, (-1, 3)).mean(3, keepdim=True).expand(-1, -1, -1, 3, -1, -1)
    return mean.flatten(2, 3)[:, :, :length]


def at_places(features: Tensor) -> Tensor:
    return features + torch.zeros(8, 8, 8)  # an embedding of places: no other size is taken


@pytest.mark.parametrize(
    ("network", "exact"),
    [
        (Around(nn.ReLU()), True),
        (Around(nn.BatchNorm3d(4)), True),
        (Around(By(lambda x: nn.functional.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1))), True),  # each voxel's
        (Around(nn.Conv3d(4, 4, 3, padding=1), 3), True),
        (Around(nn.Conv3d(4, 4, 7, padding=3), 1), False),  # it sees farther than it states
        (Around(nn.InstanceNorm3d(4)), False),
        (Around(nn.GroupNorm(2, 4)), False),
        (Around(nn.BatchNorm3d(4, track_running_stats=False)), False),
        (Around(By(nn.functional.instance_norm)), False),
        (Around(By(lambda x: x * x.mean((2, 3, 4), keepdim=True).sigmoid())), False),  # squeeze and excite
        (Around(By(lambda x: x.softmax(3))), False),
        (Around(By(attended)), False),
        (Around(By(in_windows_of_three), 5), False),
        (Around(By(at_places), smallest=8), False),
    ],
)  # fmt: skip
def test_networks_whose_tiles_are_exact_are_told_from_others_by_what_they_do(network: Around, exact: bool) -> None:
    torch.manual_seed(0)
    assert tiles_are_exact(network.eval(), 2) == exact


def test_own_networks_need_no_measurement_and_others_are_measured_once(generator: ResidualGenerator) -> None:
    assert tiles_are_exact(generator, 2)
    network = Around(nn.ReLU()).eval()
    assert tiles_are_exact(network, 2)
    network.forward = None  # type: ignore[assignment,method-assign]  # it is not asked again
    assert tiles_are_exact(network, 2)


def test_a_seam_is_measured_across_the_borders_of_windows() -> None:
    line = np.cumsum(np.tile([1.0, 3.0], 12)).astype(np.float32)  # steps of 1 and 3: every jump is 2
    image = np.broadcast_to(line[:, None, None], (24, 8, 8)).copy()
    mask = np.ones(image.shape, bool)
    assert seam_of(image, mask, (16, 8, 8)) == pytest.approx(1.0)  # windows at 0 and 8: borders at 8 and at 16
    image[8:] += 8  # the step to voxel 8 becomes 9 between two of 3: a jump of 6, and 2 as before beside it
    assert seam_of(image, mask, (16, 8, 8)) == pytest.approx((6 + 2) / 2 / 2)
    mask[:10] = False
    assert seam_of(image, mask, (16, 8, 8)) == pytest.approx(1.0)  # the odd step lies outside
    assert seam_of(image, mask, (24, 8, 8)) is None


def test_a_2d_network_with_instance_norm_sees_each_slice_whole() -> None:
    torch.manual_seed(4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
    network.requires_grad_(False)
    source = volume(1, 260, 300, 5)
    made = over_slices(network, source, slices=1, batch=3, multiple=1)
    for k in range(5):
        alone = network(torch.from_numpy(source[None, ..., k].copy()))[0]
        np.testing.assert_allclose(made[..., k], alone.numpy(), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_voxels_of_a_mask_alone_equal_those_of_a_pass_over_all_slices(batch: int) -> None:
    torch.manual_seed(2)
    network = with_lived_in_norms(ResidualGenerator(in_channels=9, widths=[4, 8, 8], dims=2))
    source, inside = volume(2, 18, 21, 11), RNG.random((18, 21, 11)) < 0.3
    inside[..., [0, 1, 6]] = False
    stack = np.concatenate([source, inside[None]], dtype=np.float32)
    places = np.flatnonzero(inside.any((0, 1))).tolist()
    whole = over_slices(network, stack, slices=3, batch=batch, multiple=4, places=places)
    parts = [source, inside[None]]
    alone = apply_inside(network, parts, inside, slices=3, batch=batch, multiple=4)
    wanted = np.moveaxis(whole[0], -1, 0)[np.moveaxis(inside, -1, 0)]
    np.testing.assert_array_equal(alone, wanted[None])
