"""A volume that goes through 3D networks slab by slab comes out as from one pass, and no layer sees a voxel twice."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.catalogue import GENERATORS, SameSize, make_network
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import KNOTS, ResidualGenerator, Skip
from chiasm.prediction import engines, passes, slabs
from chiasm.prediction.compiled import deviation
from chiasm.prediction.engines import Engine, freeze_for_inference
from chiasm.prediction.passes import Chain, Networks
from chiasm.prediction.slabs import NoSlabs, apply_in_slabs
from chiasm.prediction.tiling import padded_to
from network_checks import lively

RNG = np.random.default_rng(0)
ENGINE = Engine(torch.device("cpu"), "32-true")


def volume(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def generator(fold: int = 1, skip: str = "none", channels: int = 1) -> nn.Module:
    torch.manual_seed(3)
    network = ResidualGenerator(in_channels=channels, widths=[4, 8, 8], dims=3, fold=fold, skip=Skip(skip))  # type: ignore[arg-type]
    nn.init.normal_(network.last.weight, 0, 0.5)
    if skip == "lookup":
        network.set_lookup(torch.linspace(-2, 2, KNOTS), torch.randn(KNOTS))
    return lively(network)


def chain(fold: int = 1, skip: str = "none", refined: bool = False) -> tuple[nn.Module, Networks]:
    """Return generator, local discriminator and perhaps refiner, as `predict` runs them."""
    local = lively(LocalDiscriminator(in_channels=2, widths=[4, 4, 8], dims=3, fold=fold))  # type: ignore[arg-type]
    networks = Networks(generator(fold, skip), local, generator(channels=3) if refined else None)
    frozen = networks._replace(
        generator=freeze_for_inference(networks.generator),
        local_discriminator=freeze_for_inference(local),
        refiner=None if networks.refiner is None else freeze_for_inference(networks.refiner),
    )
    return Chain(frozen, channels=1, conditional=True), frozen


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return how far two outputs are apart, as a share of each channel's range."""
    return deviation(one[None], other[None])


def in_one_pass(network: nn.Module, source: np.ndarray, multiple: int) -> np.ndarray:
    padded = [-(-size // multiple) * multiple for size in source.shape[1:]]
    with torch.inference_mode():
        made = network(torch.from_numpy(padded_to(source[None], padded)))[0].numpy()
    return made[(slice(None), *map(slice, source.shape[1:]))]


def in_slabs(network: nn.Module, source: np.ndarray, multiple: int, most: int = 1) -> np.ndarray:
    with ENGINE.inference():
        return apply_in_slabs(network, source, multiple=multiple, most_voxels=most)


@pytest.mark.parametrize("shape", [(61, 20, 14), (17, 50, 23), (12, 20, 43)])  # along each axis
@pytest.mark.parametrize(("fold", "skip"), [(1, "none"), (2, "source"), (2, "lookup")])
def test_slabs_equal_one_pass_through_generator_and_discriminator(shape: tuple[int, ...], fold: int, skip: str) -> None:
    network, networks = chain(fold, skip)
    source = np.concatenate([volume(1, *shape), np.ones((1, *shape), np.float32)])
    whole = in_one_pass(network, source, networks.multiple)
    assert whole.shape == (4, *shape) and whole.std() > 0.01
    for most in (1, 16 * 20 * 24, 10**9):  # the thinnest slabs, thicker ones, one
        assert apart(in_slabs(network, source, networks.multiple, most), whole) < 1e-5


def test_slabs_equal_one_pass_with_a_refiner() -> None:
    network, _ = chain(refined=True)
    source = np.concatenate([volume(1, 44, 12, 16), np.ones((1, 44, 12, 16), np.float32)])
    assert apart(in_slabs(network, source, 4), in_one_pass(network, source, 4)) < 1e-5


def test_networks_that_are_still_in_training_equal_one_pass_too() -> None:
    network, source = generator(), volume(1, 40, 8, 12)
    assert any(isinstance(part, nn.BatchNorm3d) for part in network.modules())
    assert apart(in_slabs(network, source, 4), in_one_pass(network, source, 4)) < 1e-5


def test_in_bfloat16_slabs_are_as_near_to_float32_as_one_pass_is() -> None:
    network, source = generator(), volume(1, 40, 8, 12)
    narrow = Engine(torch.device("cpu"), "bf16-mixed")
    exact = in_one_pass(network, source, 4)
    with narrow.inference():
        slabbed = apply_in_slabs(narrow.wrap(network), source, multiple=4, most_voxels=1)
    whole = narrow.wrap(network)(torch.from_numpy(source[None]))[0].numpy()
    assert slabbed.dtype == np.float32 and np.abs(slabbed - exact).max() > 0
    assert np.abs(slabbed - exact).max() < 2 * np.abs(whole - exact).max()


@pytest.mark.parametrize("name", sorted(name for name, one in GENERATORS.items() if 3 in one.dims and name != "jcsc"))
def test_a_network_of_the_literature_gives_what_one_pass_gives_or_is_refused_before_it_runs(name: str) -> None:
    network = SameSize(lively(make_network(name, in_channels=1, dims=3, scale=0.1)))
    multiple = max(network.size_multiple, 1)
    side = -(-max(network.needs.smallest, 24) // multiple) * multiple
    if side > 64:
        pytest.skip("its least volume takes seconds")
    source = volume(1, side, side, side)
    try:
        made = in_slabs(network, source, multiple)
    except NoSlabs:
        return
    assert apart(made, in_one_pass(network, source, multiple)) < 1e-5


def test_each_voxel_is_read_once_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, source = generator(), volume(1, 96, 8, 8)
    voxels: list[int] = []
    plain = engines.convolve

    def counted(*given: object) -> Tensor:
        made = plain(*given)  # type: ignore[arg-type]
        voxels.append(made[0, 0].numel())
        return made

    monkeypatch.setattr(engines, "convolve", counted)
    in_slabs(network, source, 4, most=8 * 8 * 8)
    thin = sum(voxels)
    voxels.clear()
    in_slabs(network, source, 4, most=10**9)
    assert thin == sum(voxels)
    by_hand = {1: 6, 8: 6, 64: 4}  # voxels to one of each grid, and how many convolutions it has
    assert len(network.downs) == 2 and thin == sum(source.size // share * many for share, many in by_hand.items())


def test_what_waits_between_layers_does_not_grow_with_the_volume() -> None:
    network = generator()
    most: dict[int, int] = {}
    for length in (96, 192):
        alive, peak = [0], [0]

        def watch(slab: Tensor, alive: list[int] = alive, peak: list[int] = peak) -> Tensor:
            class Held:
                def __init__(self, size: int) -> None:
                    self.size = size
                    alive[0] += size

                def __del__(self) -> None:
                    alive[0] -= self.size

            slab.held = Held(slab.numel())  # type: ignore[attr-defined]
            peak[0] = max(peak[0], alive[0])
            return slab

        def watched(planes: slabs.Planes, watch: object = watch) -> object:
            return network(planes.windowed(slabs.Window(), lambda slab: watch(slab.clone()), planes.shape))  # type: ignore[operator]

        with ENGINE.inference():
            apply_in_slabs(watched, volume(1, length, 8, 8), multiple=4, most_voxels=1)
        most[length] = peak[0]
    assert 0 < most[192] <= most[96] < 96 * 8 * 8


def test_predict_takes_slabs_for_the_networks_of_this_package_and_tiles_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from synthetic_cohort import plan_of

    seen: list[str] = []
    for name in ("apply_in_slabs", "apply_to_volume"):
        plain = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *a, plain=plain, name=name, **k: seen.append(name) or plain(*a, **k))
    _, networks = chain()
    mask = np.ones((20, 12, 16), bool)
    do = partial(
        passes.synthesise_prepared,
        plan=plan_of(dims=3, slices=1, patch=(8, 8, 8)),
        conditional=True,
        error_scale=1.0,
        engine=ENGINE,
    )
    source = volume(1, *mask.shape)
    made = do(networks, source, mask)
    assert seen == ["apply_in_slabs"]
    monkeypatch.setattr(passes, "is_of_this_package", lambda _: False)
    tiled = do(networks, source, mask)
    assert seen == ["apply_in_slabs", "apply_to_volume"]
    assert made.raw_error is not None and tiled.raw_error is not None
    for one, other in ((made.prediction, tiled.prediction), (made.raw_error, tiled.raw_error)):
        assert apart(one[None], other[None]) < 1e-5


def test_what_has_no_counterpart_is_refused_before_any_work_is_done() -> None:
    source = volume(1, 24, 8, 8)
    for wrong in (
        nn.InstanceNorm3d(1),
        nn.AdaptiveAvgPool3d(1),
        lambda planes: planes.mean(),
        lambda planes: planes[:, :, 1:],
        lambda planes: planes + planes[:, :, ::2, ::2, ::2],
        lambda planes: torch.cat([planes, planes], 2),
        lambda planes: functional.interpolate(planes, scale_factor=2.0, mode="nearest"),
        lambda planes: functional.interpolate(planes, scale_factor=2.0, mode="trilinear"),  # another size
        nn.BatchNorm3d(1),  # in training
        nn.Conv3d(1, 1, 1, stride=2),
    ):
        with pytest.raises(NoSlabs):
            in_slabs(wrong, source, 2)  # type: ignore[arg-type]


def test_memory_that_runs_out_makes_slabs_thinner() -> None:
    asked: list[int] = []

    def hungry(planes: slabs.Planes) -> slabs.Planes:
        def work(slab: Tensor) -> Tensor:
            asked.append(slab.shape[2])
            if slab.shape[2] > 8:
                torch.empty(2**50)
            return slab * 3

        return planes.windowed(slabs.Window(), work, planes.shape)

    source = volume(1, 32, 8, 8)
    made = apply_in_slabs(hungry, source, multiple=4, most_voxels=math.prod(source.shape))
    np.testing.assert_array_equal(made, source * 3)
    assert asked == [32, 16, 8, 8, 8, 8]
