"""Device, precision, and networks that are frozen without a change of what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chiasm.errors import RecipeError
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import Generator
from chiasm.prediction import engines
from chiasm.prediction.engines import Engine, freeze_for_inference, pick_precision


@pytest.mark.parametrize(("able", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_is_taken_where_the_processor_multiplies_it(
    able: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_cpu_multiplies_bfloat16", lambda: able)
    assert pick_precision("auto", "cpu") == chosen
    assert pick_precision("32-true", "cpu") == "32-true"


def test_unknown_and_impossible_choices_are_refused() -> None:
    for precision, accelerator, told in (
        ("64", "cpu", "bf16-mixed"),
        ("auto", "abacus", "cuda"),
        ("16-mixed", "cpu", "CUDA"),
    ):
        with pytest.raises(RecipeError, match=told):
            pick_precision(precision, accelerator)
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no CUDA device"):
            Engine.pick("cuda")


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
        Generator(in_channels=3, widths=(4, 8), dims=dims, norm="batch", skip="source", skip_channel=1), *shape
    )  # type: ignore[arg-type]
    judge = trained(LocalDiscriminator(in_channels=3, widths=(4, 4, 4), dims=dims), *shape)  # type: ignore[arg-type]
    image = torch.randn(2, *shape)
    for network in (generator, judge):
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
