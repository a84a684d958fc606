from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks import han
from chiasm.networks.han import Han, pool, unpool
from network_checks import kernels, measured_field, share_left_of_blur, tile_differs_by, weights

#: Inputs and outputs of the 27 convolutions: VGG16's, from one channel, and the mirror with its skips.
ENCODER = [
    (1, 64), (64, 64),
    (64, 128), (128, 128),
    (128, 256), (256, 256), (256, 256),
    (256, 512), (512, 512), (512, 512),
    (512, 512), (512, 512), (512, 512),
]  # fmt: skip
DECODER = [
    (512 + 512, 512), (512, 512), (512, 512),
    (512 + 512, 512), (512, 512), (512, 256),
    (256 + 256, 256), (256, 256), (256, 128),
    (128 + 128, 128), (128, 64),
    (64 + 64, 64), (64, 64),
]  # fmt: skip


def test_it_has_27_convolutions_and_the_papers_35_million_weights() -> None:
    table = ENCODER + DECODER
    by_hand = sum(9 * a * b + 2 * b for a, b in table) + (64 + 1)
    assert weights(Han, in_channels=1) == by_hand == 34_963_713
    assert round(by_hand / 1e6) == 35
    with torch.device("meta"):
        found = kernels(Han(in_channels=1))
    assert len(found) == 27 and found[-1] == (64, 1, 1)
    assert found[:13] == [(a, b, 3) for a, b in ENCODER]
    assert sorted(found[13:-1]) == sorted((a, b, 3) for a, b in DECODER)


def test_the_encoder_is_vgg16s() -> None:
    # 14,714,688 weights and biases of VGG16's convolutions, with three input channels
    with torch.device("meta"):
        found = kernels(Han(in_channels=3))[:13]
    assert sum(9 * a * b + b for a, b, _ in found) == 14_714_688


def test_unpooling_puts_each_maximum_back_where_it_was() -> None:
    image = torch.tensor([[1.0, 5.0, 0.0, 0.0], [2.0, 3.0, 0.0, 7.0]])[None, None]
    pooled, places = pool(image)
    assert pooled.tolist() == [[[[5.0, 7.0]]]]
    assert unpool(10 * pooled, places)[0, 0].tolist() == [[0.0, 50.0, 0.0, 0.0], [0.0, 0.0, 0.0, 70.0]]


def test_the_places_of_the_encoder_serve_the_decoder_of_the_same_level(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    used: list[Tensor] = []

    def noting_pool(features: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = pool(features)
        made.append(places)
        return pooled, places

    def noting_unpool(pooled: Tensor, places: Tensor) -> Tensor:
        used.append(places)
        return unpool(pooled, places)

    monkeypatch.setattr(han, "pool", noting_pool)
    monkeypatch.setattr(han, "unpool", noting_unpool)
    Han(in_channels=1, scale=0.05).eval()(torch.randn(1, 1, 64, 32))
    assert [tuple(places.shape[2:]) for places in made] == [(32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    assert all(torch.equal(there, back) for there, back in zip(made, reversed(used), strict=True))


def test_an_impulse_reaches_as_far_as_the_receptive_field_and_no_farther(monkeypatch: pytest.MonkeyPatch) -> None:
    # a maximum may lie anywhere in its window: let it count from and go back to all places
    monkeypatch.setattr(han, "pool", lambda features: (functional.avg_pool2d(features, 2), features))
    monkeypatch.setattr(han, "unpool", lambda pooled, _: functional.interpolate(pooled, scale_factor=2.0))
    network = Han(in_channels=2, scale=1 / 512)
    # 2, 2, 3, 3, 3 convolutions either way on grids of 1, 2, 4, 8, 16, and the window of 32 itself
    assert measured_field(network, 2, 2, others=32) == network.receptive_field == 2 * (2 + 4 + 12 + 24 + 48) + 31


def test_it_learns_one_slice() -> None:
    torch.manual_seed(0)
    assert share_left_of_blur(Han(in_channels=1, scale=0.06), 32, 2, steps=100, rate=1e-2) < 0.1


def test_a_tile_with_its_halo_equals_the_whole_and_with_less_it_does_not() -> None:
    network = Han(in_channels=1, scale=0.02)
    assert tile_differs_by(network, 1, 2, 32) < 1e-5
    assert tile_differs_by(network, 1, 2, 32, short=network.receptive_field - 32) > 1e-5


def test_three_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="works on slices: dims is 2, not 3"):
        Han(in_channels=1, dims=3)


@pytest.mark.parametrize("shape", [(1, 1, 48, 32), (1, 1, 32, 0), (1, 1, 32, 32, 32)])
def test_sizes_that_five_poolings_cannot_halve_are_refused(shape: tuple[int, ...]) -> None:
    network: nn.Module = Han(in_channels=1, scale=0.02)
    with pytest.raises(ValueError, match=r"multiples of 32|spatial axes"):
        network(torch.zeros(shape))


@pytest.mark.parametrize("wrong", [{"in_channels": 0}, {"scale": 0.0}, {"dims": 4}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Han(**{"in_channels": 1} | wrong)  # type: ignore[arg-type]
