from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from chiasm.methods import make_recipe
from chiasm.networks.discriminators import GlobalDiscriminator, LocalDiscriminator


def make_local(dims: int = 2, widths: tuple[int, ...] = (4, 6, 8), **options: int) -> LocalDiscriminator:
    torch.manual_seed(0)
    return LocalDiscriminator(in_channels=2, widths=widths, dims=dims, **options)  # type: ignore[arg-type]


def make_global(dims: int = 2, **options: bool) -> GlobalDiscriminator:
    torch.manual_seed(0)
    return GlobalDiscriminator(in_channels=2, widths=(4, 6, 8), dims=dims, **options)  # type: ignore[arg-type]


def convolutions(network: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in network.named_modules() if isinstance(part, nn.Conv2d | nn.Conv3d)}


def largest_singular_value(convolution: nn.Module) -> float:
    weight = convolution.weight
    assert isinstance(weight, Tensor)
    return float(torch.linalg.svdvals(weight.detach().flatten(1))[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spectral_norm", [True, False])
def test_a_trained_trunk_stretches_its_input_only_without_spectral_norm(dims: int, spectral_norm: bool) -> None:
    network = make_local(dims, spectral_norm=spectral_norm).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.5, 0.99))
    images = torch.randn(2, 2, *[16] * dims)
    for step in range(40):
        for group in optimiser.param_groups:  # cosine, as in training
            group["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 40))
        optimiser.zero_grad()
        (-network(images).realness.mean()).backward()  # pushes every weight up
        optimiser.step()
    network(images)
    network.eval()
    values = {name: largest_singular_value(part) for name, part in convolutions(network).items() if name != "heads"}
    assert len(values) == 1 + 2 + 2 + 2 + 2
    # one power iteration a step lags a little behind the weights
    assert (max(values.values()) <= 1.02) == spectral_norm, values


def test_all_but_the_heads_are_spectrally_normalised() -> None:
    for name, part in convolutions(make_local()).items():
        assert parametrize.is_parametrized(part) == (name != "heads")
    assert not any(map(parametrize.is_parametrized, convolutions(make_local(spectral_norm=False)).values()))
    assert all(map(parametrize.is_parametrized, convolutions(make_global(spectral_norm=True)).values()))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_normalised_weight_is_the_raw_one_over_numpys_largest_singular_value(dims: int) -> None:
    torch.manual_seed(0)
    discriminator = make_global(dims, spectral_norm=True).train()
    images = torch.randn(2, 2, *[16] * dims)
    for _ in range(200):  # one power iteration each, from which the singular value settles
        discriminator(images)
    discriminator.eval()
    for part in convolutions(discriminator).values():
        raw = part.parametrizations.weight.original.detach().numpy()  # type: ignore[union-attr,operator]
        largest = np.linalg.svd(raw.reshape(len(raw), -1), compute_uv=False)[0]
        assert isinstance(part.weight, Tensor)
        np.testing.assert_allclose(part.weight.detach().numpy(), raw / largest, rtol=1e-3)
        assert largest != pytest.approx(1, abs=0.05)


def test_the_power_iteration_stands_still_in_evaluation() -> None:
    network, images = make_local(), torch.randn(1, 2, 16, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()(images)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.train()(images)
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items() if "_u" in name)


@pytest.mark.parametrize(
    ("dims", "widths", "fold"), [(2, (2, 2, 2), 1), (2, (2, 2, 2, 2), 1), (3, (2, 2, 2), 1), (2, (2, 2, 2), 2)]
)
def test_every_voxel_is_assessed_by_forty_around_it_and_gradients_agree(
    dims: int, widths: tuple[int, ...], fold: int
) -> None:
    network = make_local(dims, widths, spectral_norm=False, fold=fold).double().eval()
    for part in convolutions(network).values():
        part.weight.data.abs_()  # type: ignore[union-attr,operator]
    field, multiple = network.receptive_field, network.size_multiple
    assert 2 * field + 1 >= 40
    size = 2 * field + 4 * multiple
    size += -size % multiple
    middle, farthest = size // 2 // multiple * multiple, 0
    for place in range(middle, middle + multiple):
        images = torch.rand(1, 2, size, *[8] * (dims - 1), dtype=torch.float64, requires_grad=True)
        network(images).structured[(0, 0, place, *[4] * (dims - 1))].backward()
        assert images.grad is not None
        touched = images.grad.abs().sum(dim=(0, 1, *range(3, dims + 2))).nonzero().flatten()
        farthest = max(farthest, place - int(touched[0]), int(touched[-1]) - place)
    assert farthest == field


@pytest.mark.parametrize("fold", [1, 2])
def test_the_recipe_knows_the_sides_that_a_local_discriminator_takes(fold: int) -> None:
    settings = make_recipe("A7", "tiny", {"discriminators.local_fold": fold}).discriminators
    network = make_local(widths=settings.local_widths, fold=fold)
    assert settings.local_multiple == network.size_multiple == 4 * fold


@pytest.mark.parametrize("dims", [2, 3])
def test_samples_do_not_influence_one_another(dims: int) -> None:
    images = torch.randn(3, 2, *[16] * dims)
    local, discriminator = make_local(dims).eval(), make_global(dims).eval()
    with torch.no_grad():
        for index in range(3):
            for together, alone in zip(local(images), local(images[index : index + 1])):
                assert together.shape == (3, 1, *images.shape[2:])
                torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)
        logits = discriminator(images)
        assert logits.shape == (3,)
        torch.testing.assert_close(
            logits, torch.cat([discriminator(image[None]) for image in images]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("fold", [1, 2])
def test_the_three_heads_learn_three_things_voxel_by_voxel(fold: int) -> None:
    torch.manual_seed(0)
    network = make_local(widths=(4 * fold**2, 6 * fold, 8), fold=fold)
    images = torch.randn(4, 2, 16, 16)
    wanted = [images[:, :1] > 0, images[:, 1:] > 0, images.sum(1, keepdim=True) > 0]
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(120):
        loss = sum(
            nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
            for logits, truth in zip(network(images), wanted)
        )
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for logits, truth in zip(network(images), wanted):
        assert ((logits > 0) == truth).float().mean() > 0.85


@pytest.mark.parametrize("build", [make_local, make_global])
def test_inputs_are_standardised_with_fixed_statistics(build: type) -> None:
    network, images = build().eval(), torch.randn(2, 2, 16, 16)
    expected = network(images)
    mean, sd = torch.tensor([100.0, -3.0]), torch.tensor([20.0, 0.5])
    network.standardise.set_input_statistics(mean, sd)
    found = network(images * sd.view(-1, 1, 1) + mean.view(-1, 1, 1))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert {"standardise.input_mean", "standardise.input_sd"} <= set(network.state_dict())


def test_the_global_logit_is_the_mean_over_space_of_the_last_features() -> None:
    discriminator = make_global().eval()
    features = discriminator.standardise(torch.randn(2, 2, 24, 40))
    images = features.clone()
    for convolution in discriminator.convolutions:
        features = nn.functional.leaky_relu(convolution(features), 0.2)
    assert features.shape[2:] == (3, 5)
    expected = (features.mean(dim=(2, 3)) * discriminator.last.weight).sum(1) + discriminator.last.bias
    torch.testing.assert_close(discriminator(images), expected)


def test_what_cannot_be_assessed_is_refused() -> None:
    with pytest.raises(ValueError, match="three widths"):
        make_local(2, (4, 6))
    with pytest.raises(ValueError, match="multiples of 4"):
        make_local()(torch.zeros(1, 2, 16, 18))
    with pytest.raises(ValueError, match="multiples of 8"):
        make_local(fold=2)(torch.zeros(1, 2, 16, 20))
    with pytest.raises(ValueError, match="a fold of 1 or 2"):
        make_local(fold=3)
    with pytest.raises(ValueError, match="at least 8"):
        make_global()(torch.zeros(1, 2, 16, 7))
    for mean, sd in (([0.0], [1.0]), ([0.0, 0.0], [1.0, 0.0]), ([0.0, float("nan")], [1.0, 1.0])):
        with pytest.raises(ValueError):
            make_local().standardise.set_input_statistics(torch.tensor(mean), torch.tensor(sd))
