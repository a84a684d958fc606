"""Device, precision, and networks that are frozen without a change of what they say."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from chiasm.errors import RecipeError
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import ResidualGenerator, Skip
from chiasm.prediction import engines
from chiasm.prediction.engines import Engine, Hardware, freeze_for_inference, pick_precision


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "avx2": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_bfloat16_is_taken_where_the_processor_multiplies_it(
    capabilities: dict[str, bool], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precision("auto", "cpu") == chosen
    for asked in ("32-true", "bf16-mixed"):
        assert pick_precision(asked, "cpu") == asked


def test_a_torch_that_cannot_be_asked_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", "cpu") == "32-true"


def test_unknown_and_impossible_choices_are_refused() -> None:
    for precision, accelerator, told in (
        ("64", "cpu", "bf16-mixed"),
        ("64", "cpu", "auto, 32-true, bf16-mixed, 16-mixed"),
        ("auto", "abacus", "auto, cpu, cuda"),
        ("16-mixed", "cpu", "CUDA"),
    ):
        with pytest.raises(RecipeError, match=told):
            pick_precision(precision, accelerator)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="no CUDA device") as caught:
        Engine.pick(Hardware("cuda"))
    assert caught.value.reason == "no-cuda"
    assert Engine.pick(Hardware("auto")).device.type == "cpu"


def trained(module: nn.Module, *shape: int) -> nn.Module:
    """Give running statistics and power iterations something to hold."""
    torch.manual_seed(0)
    for _ in range(5):
        module.train()(torch.randn(2, *shape) * 2 + 1)
    return module.eval()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_frozen_network_says_the_same_and_leaves_the_original_alone(dims: int) -> None:
    shape = (3, *[16] * dims)
    generator = trained(
        ResidualGenerator(in_channels=3, widths=(4, 8), dims=dims, norm="batch", skip=Skip("source", 1)), *shape
    )  # type: ignore[arg-type]
    discriminator = trained(LocalDiscriminator(in_channels=3, widths=(4, 4, 4), dims=dims), *shape)  # type: ignore[arg-type]
    image = torch.randn(2, *shape)
    for network in (generator, discriminator):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        frozen = freeze_for_inference(network)
        a, b = network(image), frozen(image)
        for x, y in zip(*((out if isinstance(out, tuple) else (out,)) for out in (a, b))):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not [m for m in freeze_for_inference(generator).modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]


def test_results_are_float32_without_gradients_whatever_the_precision() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1)
    for precision in ("32-true", "bf16-mixed"):
        engine = Engine(torch.device("cpu"), precision)  # type: ignore[arg-type]
        made = engine.wrap(engine.place(network))(torch.randn(1, 1, 8, 8))
        assert made.dtype == torch.float32 and not made.requires_grad


def test_a_batch_norm_is_folded_only_where_the_result_stays_the_same() -> None:
    class Odd(nn.Module):
        """Norms after a convolution called twice, one whose result is used twice, and a ReLU; one can be folded."""

        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
            self.last_norm = nn.BatchNorm2d(3, affine=False)
            self.twice, self.twice_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norms[0](self.shared(x)) + self.shared(x)
            twice = self.twice(x)
            x = self.twice_norm(twice) + twice
            made: torch.Tensor = self.last_norm(self.own(self.norms[1](torch.relu(x))))
            return made

    network = trained(Odd(), 3, 8, 8)
    frozen, image = freeze_for_inference(network), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(image), frozen(image), atol=1e-5, rtol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == 3


def test_spectral_norm_is_baked_in_and_the_original_goes_on_training() -> None:
    discriminator = trained(LocalDiscriminator(in_channels=2, widths=(4, 4, 4), dims=2), 2, 16, 16)
    frozen = freeze_for_inference(discriminator)
    assert any("parametrizations" in name for name in discriminator.state_dict())
    assert not any("parametrizations" in name for name in frozen.state_dict())
    discriminator.train()(torch.randn(1, 2, 16, 16)).realness.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_number_of_threads_is_put_back() -> None:
    before, seen = torch.get_num_threads(), []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return images

    Engine(torch.device("cpu"), "32-true", threads=before + 1).wrap(network)(torch.zeros(1, 1, 4, 4))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_by_onednn_equal_those_of_torch(dims: Literal[2, 3]) -> None:
    torch.manual_seed(0)
    make = nn.Conv2d if dims == 2 else nn.Conv3d
    network = nn.Sequential(
        make(3, 8, 3, 2, padding=1), make(8, 8, 1, bias=False), make(8, 4, 3, padding=2, dilation=2)
    )
    network.append(make(4, 4, 3, padding="same", groups=2)).eval().requires_grad_(False)
    images = torch.randn(2, 3, *[16] * dims)
    exact = network(images)
    engine = Engine(torch.device("cpu"), "32-true")
    torch.testing.assert_close(engine.wrap(network)(images), exact, atol=1e-5, rtol=1e-5)
    narrow = Engine(torch.device("cpu"), "bf16-mixed").wrap(network)(images)
    with torch.autocast("cpu", torch.bfloat16):
        as_torch_does = network(images).float()
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - exact).abs().max() < 2 * (as_torch_does - exact).abs().max()


def test_convolutions_of_kernels_of_one_voxel_reach_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = engines.convolve
    monkeypatch.setattr(engines, "convolve", lambda *given: seen.append(given[1].shape[-1]) or plain(*given))
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 1, 1)).eval()
    Engine(torch.device("cpu"), "32-true").wrap(network)(torch.zeros(1, 1, 4, 4, 4))
    assert seen == [3, 1]
