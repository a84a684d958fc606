from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from chiasm.networks.discriminators import GlobalDiscriminator, LocalDiscriminator
from chiasm.networks.generator import ResidualGenerator
from chiasm.training import losses

NAN = float("nan")


def random_case(dims: int = 2, samples: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and mask; the samples' masks differ in size."""
    generator = torch.Generator().manual_seed(dims)
    shape = (samples, 1, *[8, 7, 6][:dims])
    prediction, target, noise = (torch.rand(shape, generator=generator, dtype=dtype) * 4 - 2 for _ in range(3))
    share = torch.linspace(-1, 1, samples).view(-1, 1, *[1] * dims)
    return prediction, target, noise > share


def by_loop(value: Callable[[tuple[int, ...]], float], mask: Tensor) -> float:
    """<a>_m voxel by voxel."""
    means = []
    for n in range(len(mask)):
        places = [tuple(map(int, place)) for place in mask[n].nonzero()]
        means.append(sum(value((n, *place)) for place in places) / max(len(places), 1))
    return sum(means) / len(means)


def test_the_masked_mean_counts_samples_alike_and_an_empty_one_as_nothing() -> None:
    a = torch.tensor([[1.0, 3.0, 9.0], [8.0, NAN, NAN], [NAN, NAN, NAN]]).view(3, 1, 3, 1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool().view(3, 1, 3, 1)
    assert losses.masked_mean(a, mask) == pytest.approx((2 + 8 + 0) / 3)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_weight_is_scaled_to_mean_one_over_the_batch_not_each_sample(dims: int) -> None:
    prediction, _, mask = random_case(dims)
    weight = prediction.abs()
    scaled = losses.unit_mean(weight, mask)
    assert losses.masked_mean(scaled, mask) == pytest.approx(1, abs=1e-6)
    assert (scaled[~mask] == 1).all()
    ratio = (scaled / weight)[mask]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # one factor for all
    for tiny in (1e-30, 1e-41, 1e30):
        torch.testing.assert_close(losses.unit_mean(weight * tiny, mask)[mask], scaled[mask], rtol=1e-2, atol=1e-2)
    assert (losses.unit_mean(torch.zeros_like(weight), mask) == 1).all()
    assert (losses.unit_mean(weight, torch.zeros_like(mask)) == 1).all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("p", [1, 2])
def test_the_reconstruction_loss_equals_a_loop_over_voxels(dims: int, p: int) -> None:
    prediction, target, mask = random_case(dims)
    weight = torch.rand(mask.shape)
    expected = by_loop(lambda at: float(weight[at] * (prediction[at] - target[at]).abs() ** p), mask)
    assert losses.reconstruction_loss(prediction, target, mask, weight, p) == pytest.approx(expected, rel=1e-5)
    ones = torch.ones_like(weight)  # bit for bit the loss without a weight
    assert torch.equal(
        losses.reconstruction_loss(prediction, target, mask, ones, p),
        losses.reconstruction_loss(prediction, target, mask, None, p),
    )


@pytest.mark.parametrize("p", [1, 2])
def test_the_reconstruction_gradient_is_weight_times_sign_over_the_masks_size(p: int) -> None:
    prediction, target, mask = random_case(2, dtype=torch.float64)
    weight = torch.rand(mask.shape, dtype=torch.float64)
    prediction.requires_grad_()
    losses.reconstruction_loss(prediction, target, mask, weight, p).backward()
    error = (prediction - target).detach()
    count = mask.flatten(1).sum(1).view(-1, 1, 1, 1) * len(mask)
    expected = weight * (error.sign() if p == 1 else 2 * error) * mask / count
    torch.testing.assert_close(prediction.grad, expected)
    step = 1e-6
    for place in [(0, 0, 1, 2), (1, 0, 4, 4), (2, 0, 7, 6)]:  # finite differences agree
        ends = []
        for sign in (1, -1):
            moved = prediction.detach().clone()
            moved[place] += sign * step
            ends.append(float(losses.reconstruction_loss(moved, target, mask, weight, p)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(expected[place]), abs=1e-8)


def test_a_mean_taken_before_the_weight_would_be_another_loss() -> None:
    # attention on an already averaged loss only scales it: weights must meet voxels
    prediction, target = torch.tensor([[[[0.0, 4.0]]]]), torch.zeros(1, 1, 1, 2)
    mask, weight = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([[[[0.5, 1.5]]]])
    assert losses.reconstruction_loss(prediction, target, mask, weight, 1) == 3.0  # the averaged one would be 2.0


def test_the_gradient_difference_equals_numbers_worked_by_hand() -> None:
    target = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 5.0]])[None, None]
    prediction = torch.tensor([[0.0, -1.0, 2.0], [1.0, 1.0, 1.0]])[None, None]
    whole = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    # down: |dy| 1 1 3, |dy^| 1 2 1: squares 0 1 4, mean 5/3; across: 2 0 / 0 4 against 1 3 / 0 0: 1 9 0 16, mean 26/4
    assert losses.gradient_difference_loss(prediction, target, whole, 2) == pytest.approx(5 / 3 + 26 / 4)
    part = whole.clone()
    part[0, 0, 1, 2] = False  # pairs with the lower right voxel leave: down 0 1, across 1 9 0
    assert losses.gradient_difference_loss(prediction, target, part, 2) == pytest.approx(1 / 2 + 10 / 3)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gradient_difference_has_no_padding_and_forgives_offset_and_sign(dims: int) -> None:
    _, target, mask = random_case(dims)
    full = torch.ones_like(mask)
    assert losses.gradient_difference_loss(target + 7, target, full, dims) == pytest.approx(0, abs=1e-10)
    assert losses.gradient_difference_loss(-target, target, full, dims) == 0
    assert losses.gradient_difference_loss(torch.full_like(target, 9), torch.zeros_like(target), full, dims) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("local", [False, True])
def test_adversarial_losses_equal_torchs_cross_entropy_on_logits(smoothing: float, local: bool) -> None:
    real, fake, mask = random_case(2) if local else (torch.randn(5) * 30, torch.randn(5) * 30, None)
    bce = functional.binary_cross_entropy_with_logits

    def mean(a: Tensor) -> Tensor:
        return a.mean() if mask is None else losses.masked_mean(a, mask)

    ones = torch.full_like(real, 1 - smoothing)
    expected = mean(bce(real, ones, reduction="none")) + mean(bce(fake, torch.zeros_like(fake), reduction="none"))
    found = losses.adversarial_discriminator_loss(real, fake, smoothing, mask)
    torch.testing.assert_close(found, expected)
    expected = mean(bce(fake, torch.ones_like(fake), reduction="none"))
    torch.testing.assert_close(losses.adversarial_generator_loss(fake, mask), expected)


def test_logits_of_any_size_give_finite_losses_and_a_gradient_where_the_generator_fails() -> None:
    logits = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    losses.adversarial_generator_loss(logits).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad * 3, torch.tensor([-1.0, -0.5, 0.0]))
    assert torch.isfinite(losses.adversarial_discriminator_loss(logits, -logits, 0.1))


def test_wasserstein_losses_are_differences_of_means() -> None:
    real, fake = torch.tensor([1.0, 5.0]), torch.tensor([-2.0, 0.0])
    assert losses.wasserstein_discriminator_loss(real, fake) == -1 - 3
    assert losses.wasserstein_generator_loss(fake) == 1


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gradient_penalty_equals_one_autograd_call_for_each_sample(dims: int) -> None:
    torch.manual_seed(0)
    critic = GlobalDiscriminator(in_channels=2, widths=(3, 4), dims=dims).double()  # type: ignore[arg-type]
    real, fake = (torch.randn(3, 2, *[8] * dims, dtype=torch.float64) for _ in range(2))
    factor = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    terms = []
    for n in range(3):
        z = (factor[n] * real[n] + (1 - factor[n]) * fake[n])[None].requires_grad_()
        slope = torch.autograd.functional.jacobian(critic, z)
        terms.append((math.sqrt(float(slope.square().sum())) - 1) ** 2)
    penalty = losses.gradient_penalty(critic, real, fake, factor)
    assert penalty.item() == pytest.approx(sum(terms) / 3, rel=1e-9)
    penalty.backward()  # the penalty can be differentiated again
    found = critic.convolutions[0].weight.grad
    assert isinstance(found, Tensor)
    weight = critic.convolutions[0].weight
    assert isinstance(weight, Tensor)
    at, ends = (0, 0, *[1] * dims), []
    for sign in (1, -1):
        with torch.no_grad():
            weight[at] += sign * 1e-5
        ends.append(float(losses.gradient_penalty(critic, real, fake, factor).detach()))
        with torch.no_grad():
            weight[at] -= sign * 1e-5
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[at]), rel=1e-4, abs=1e-9)


def test_the_gradient_penalty_of_a_linear_critic_is_known() -> None:
    slope = torch.zeros(2, 3, 3)
    slope[0, 1, 1], slope[1, 0, 2] = 3.0, 4.0  # norm 5 over all axes; over channels alone it would be less
    factor = torch.rand(4)
    penalty = losses.gradient_penalty(
        lambda z: (z * slope).flatten(1).sum(1), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), factor
    )
    assert penalty == pytest.approx(16)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gaussian_inside_a_whole_mask_equals_scipys(dims: int) -> None:
    sigma = (1.5, 0.7, 0.0)[:dims]
    a = torch.randn(2, 1, *[14, 12, 10][:dims])
    found = losses.masked_gaussian(a, torch.ones_like(a, dtype=torch.bool), sigma)
    ones = gaussian_filter(np.ones(a.shape[2:]), sigma, mode="constant")
    for n in range(2):
        expected = gaussian_filter(a[n, 0].double().numpy(), sigma, mode="constant") / ones
        np.testing.assert_allclose(found[n, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_smoothing_keeps_a_constant_up_to_the_masks_edge_and_ignores_what_lies_beyond(dims: int) -> None:
    _, _, mask = random_case(dims)
    a = torch.where(mask, 3.0, NAN)
    found = losses.masked_gaussian(a, mask, [1.0] * dims)
    torch.testing.assert_close(found, torch.where(mask, 3.0, 0.0))


def test_smoothing_stays_in_full_precision_under_autocast() -> None:
    prediction, _, mask = random_case(2)
    expected = losses.masked_gaussian(prediction, mask, (1.0, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.masked_gaussian(prediction, mask, (1.0, 1.0)), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_soft_targets_equal_a_three_line_loop(dims: int) -> None:
    prediction, target, mask = random_case(dims)
    sigma, scale = (1.0, 0.5, 0.8)[:dims], 0.4
    magnitude = losses.soft_target_magnitude(prediction - target, mask, scale, sigma)
    structured = losses.soft_target_structured(prediction - target, mask, scale, sigma)
    for n in range(len(mask)):
        e, m = (prediction - target)[n, 0].double().numpy(), mask[n, 0].double().numpy()
        cover = gaussian_filter(m, sigma, mode="constant")
        size = gaussian_filter(abs(e) * m, sigma, mode="constant") / cover
        bias = abs(gaussian_filter(e * m, sigma, mode="constant")) / cover
        inside = m > 0
        np.testing.assert_allclose(magnitude[n, 0].numpy()[inside], np.exp(-size / scale)[inside], atol=1e-6)
        np.testing.assert_allclose(structured[n, 0].numpy()[inside], np.exp(-bias / scale)[inside], atol=1e-6)


def test_noise_lowers_the_magnitude_target_and_structure_lowers_both() -> None:
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    noise = torch.where((torch.arange(32)[:, None] + torch.arange(32)) % 2 == 0, 1.0, -1.0)[None, None]
    sigma = (2.0, 2.0)
    assert losses.soft_target_magnitude(noise, mask, 1.0, sigma)[0, 0, 16, 16] == pytest.approx(math.exp(-1), rel=1e-4)
    assert losses.soft_target_structured(noise, mask, 1.0, sigma)[0, 0, 16, 16] == pytest.approx(1, abs=1e-3)
    assert losses.soft_target_structured(noise.abs(), mask, 1.0, sigma).mean() == pytest.approx(math.exp(-1), rel=1e-4)


def test_the_confidence_loss_equals_a_loop_and_is_least_at_its_target() -> None:
    logits, noise, mask = random_case(2)
    truth = torch.sigmoid(noise)

    def entropy(at: tuple[int, ...]) -> float:
        m, t = 1 / (1 + math.exp(-float(logits[at]))), float(truth[at])
        return -t * math.log(m) - (1 - t) * math.log(1 - m)

    assert losses.confidence_loss(logits, truth, mask) == pytest.approx(by_loop(entropy, mask), rel=1e-5)
    best = noise.clone().requires_grad_()
    losses.confidence_loss(best, truth, mask).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-7


def test_the_confidence_losses_never_reach_the_generator() -> None:
    torch.manual_seed(0)
    generator = ResidualGenerator(in_channels=1, widths=(4, 4), dims=2)
    discriminator = LocalDiscriminator(in_channels=2, widths=(4, 4, 4), dims=2)
    source, target = torch.randn(2, 2, 1, 16, 16)
    mask = torch.ones_like(target, dtype=torch.bool)
    prediction = generator(source)
    logits = discriminator(torch.cat([source, prediction.detach()], dim=1))
    error = prediction - target  # not detached by the caller: the soft targets do it
    loss = losses.confidence_loss(
        logits.magnitude, losses.soft_target_magnitude(error, mask, 1.0, (1, 1)), mask
    ) + losses.confidence_loss(logits.structured, losses.soft_target_structured(error, mask, 1.0, (2, 2)), mask)
    loss.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert discriminator.heads.weight.grad is not None
    assert discriminator.heads.weight.grad[1:].abs().sum() > 0


def test_focal_and_top_k_weights_have_mean_one_and_follow_the_error() -> None:
    prediction, target, mask = random_case(2)
    error = (prediction - target).requires_grad_()
    for weight in (
        losses.focal_weight(error, mask, 1.5),
        losses.focal_weight(error, mask, 0.0),
        losses.top_k_weight(error, mask, 0.25),
        losses.top_k_weight(error, mask, 1.0),
    ):
        assert losses.masked_mean(weight, mask) == pytest.approx(1, abs=1e-6)
        assert not weight.requires_grad
    assert (losses.focal_weight(error, mask, 0.0) == 1).all()
    assert (losses.top_k_weight(error, mask, 1.0) == 1).all()
    chosen = (losses.top_k_weight(error, mask, 0.25) > 0) & mask
    assert chosen.sum() == round(0.25 * int(mask.sum()))
    assert error[chosen].abs().min() >= error[mask & ~chosen].abs().max()
    focal = losses.focal_weight(error, mask, 2.0)[mask] / error[mask].square()
    torch.testing.assert_close(focal, focal[:1].expand_as(focal))


def every_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    sigma, error = [1.0] * (mask.ndim - 2), prediction - target
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    return {
        "mean": losses.masked_mean(prediction, mask),
        "l1": losses.reconstruction_loss(prediction, target, mask, weight, 1),
        "l2": losses.reconstruction_loss(prediction, target, mask, weight, 2),
        "gdl": losses.gradient_difference_loss(prediction, target, mask, mask.ndim - 2),
        "discriminator": losses.adversarial_discriminator_loss(prediction, target, 0.1, mask),
        "fool": losses.adversarial_generator_loss(prediction, mask),
        "confidence": losses.confidence_loss(prediction, losses.soft_target_magnitude(error, mask, 1, sigma), mask),
        "structured": losses.masked_mean(losses.soft_target_structured(error, mask, 1, sigma), mask),
        "focal": losses.masked_mean(losses.focal_weight(error, mask, 1) * target, mask),
        "top": losses.masked_mean(losses.top_k_weight(error, mask, 0.3) * target, mask),
    }


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("filling", [1e6, NAN])
def test_masked_voxels_change_no_loss_and_no_gradient(dims: int, filling: float) -> None:
    prediction, target, mask = random_case(dims)
    values, slopes = [], []
    for other in (0.0, filling):
        p, t = torch.where(mask, prediction, other).requires_grad_(), torch.where(mask, target, other)
        found = every_loss(p, t, mask)
        values.append(found)
        sum((found[name] for name in ("mean", "l1", "l2", "gdl", "discriminator", "fool")), torch.zeros(())).backward()
        assert p.grad is not None
        slopes.append(p.grad)
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name]), name
    assert torch.equal(slopes[0][mask], slopes[1][mask])


@pytest.mark.parametrize("dims", [2, 3])
def test_the_order_of_samples_does_not_matter(dims: int) -> None:
    prediction, target, mask = random_case(dims)
    order = torch.tensor([2, 0, 1])
    error = prediction - target
    for weigh in (lambda e, m: losses.focal_weight(e, m, 1.0), lambda e, m: losses.top_k_weight(e, m, 0.3)):
        torch.testing.assert_close(weigh(error[order], mask[order]), weigh(error, mask)[order])
    torch.testing.assert_close(
        losses.reconstruction_loss(prediction[order], target[order], mask[order]),
        losses.reconstruction_loss(prediction, target, mask),
    )


def test_mistakes_of_shape_and_range_are_refused() -> None:
    prediction, target, mask = random_case(2)
    flat = target[:, 0]
    refused: list[Callable[[], object]] = [
        lambda: losses.masked_mean(flat, mask),
        lambda: losses.reconstruction_loss(prediction, flat, mask),
        lambda: losses.reconstruction_loss(prediction, target, mask, p=3),
        lambda: losses.gradient_difference_loss(prediction, target, mask, 3),
        lambda: losses.adversarial_discriminator_loss(prediction, target, 0.5),
        lambda: losses.masked_gaussian(prediction, mask, (1.0,)),
        lambda: losses.masked_gaussian(prediction, mask, (1.0, -1.0)),
        lambda: losses.focal_weight(prediction, mask, -1),
        lambda: losses.top_k_weight(prediction, mask, 0),
        lambda: losses.gradient_penalty(lambda z: z.sum((1, 2, 3)), prediction, target, torch.rand(1)),
        lambda: losses.gradient_penalty(lambda z: z.sum((1, 2, 3)), prediction, target, torch.tensor([0.5, -0.1, 1])),
    ]
    for attempt in refused:
        with pytest.raises(ValueError):
            attempt()
