from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.generator import ResidualGenerator
from chiasm.training import attention, losses


def random_case(dims: int = 2) -> tuple[Tensor, Tensor]:
    """Confidence and mask; the samples' masks differ, the last one is empty."""
    generator = torch.Generator().manual_seed(dims)
    shape = (4, 1, *[9, 8, 7][:dims])
    confidence, noise = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    return confidence, noise < torch.tensor([0.9, 0.5, 0.2, 0.0]).view(-1, 1, *[1] * dims)


def mean_over(mask: Tensor, weight: Tensor) -> float:
    """Masked mean over the samples that have a mask."""
    return float(losses.masked_mean(weight, mask) / losses.masked_mean(torch.ones_like(weight), mask))


def test_difficulty_follows_the_papers_formula() -> None:
    found = attention.difficulty_weight(torch.tensor([0.0, 0.5, 0.9, 1.0]), beta=2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.25, 0.01, 0.0]))


@pytest.mark.parametrize("norm", ["mean", "none"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_weights_fall_as_confidence_rises(norm: str, beta: float) -> None:
    confidence = torch.linspace(0, 1, 50).view(1, 1, 5, 10)
    mask = torch.ones_like(confidence, dtype=torch.bool)
    weight = attention.attention_weight(confidence, mask, beta=beta, norm=norm, strength=0.7)  # type: ignore[arg-type]
    assert (weight.flatten().diff() <= 0).all()
    assert weight[0, 0, 0, 0] > weight[0, 0, 4, 9]


@pytest.mark.parametrize("norm", ["mean", "none"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.77, 1.0])
def test_beta_zero_weighs_exactly_one(norm: str, strength: float) -> None:
    confidence, mask = random_case()
    confidence[0, 0, :2], confidence[1, 0, :2] = 0.0, 1.0
    weight = attention.attention_weight(confidence, mask, beta=0.0, norm=norm, strength=strength)  # type: ignore[arg-type]
    assert (weight == 1).all()


def test_strength_zero_weighs_exactly_one_and_the_loss_is_that_of_the_arm_without_attention() -> None:
    confidence, mask = random_case()
    weight = attention.attention_weight(confidence, mask, beta=2.0, strength=0.0)
    assert (weight == 1).all()
    prediction, target = torch.randn(2, *mask.shape)
    with_attention = losses.reconstruction_loss(prediction, target, mask, weight)
    assert torch.equal(with_attention, losses.reconstruction_loss(prediction, target, mask))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.999, 1 - 1e-7, 1.0])
def test_constant_confidence_weighs_one_at_any_beta(beta: float, level: float) -> None:
    _, mask = random_case()
    weight = attention.attention_weight(torch.full(mask.shape, level), mask, beta=beta)
    torch.testing.assert_close(weight, torch.ones_like(weight), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("cap", [1.2, 5.0])
def test_weights_have_mean_one_and_stay_under_the_cap(dims: int, beta: float, cap: float) -> None:
    confidence, mask = random_case(dims)
    weight = attention.attention_weight(confidence, mask, beta=beta, cap=cap)
    assert mean_over(mask, weight) == pytest.approx(1, abs=1e-6)
    assert weight[mask].max() <= cap * (1 + 1e-6)
    if beta >= 16 or cap < 2:
        assert weight[mask].max() >= 0.99 * cap  # the cap was met, otherwise it was not tested
    assert (weight >= 0).all()


def test_a_cap_that_only_binds_a_few_voxels_leaves_the_others_ratios_alone() -> None:
    weight = torch.cat([torch.full((2,), 40.0), torch.linspace(0.5, 1.5, 98)]).view(1, 1, 10, 10)
    mask = torch.ones_like(weight, dtype=torch.bool)
    found = attention.normalise_weight(weight, mask, cap=5.0).flatten()
    torch.testing.assert_close(found[:2], torch.full((2,), 5.0), rtol=2e-3, atol=0)
    torch.testing.assert_close(found[2:] / found[2], weight.flatten()[2:] / 0.5, rtol=3e-3, atol=0)
    assert float(found.mean()) == pytest.approx(1, abs=1e-6)


def test_too_few_voxels_with_weight_are_drawn_towards_one() -> None:
    weight = torch.zeros(1, 1, 10, 10)
    weight[0, 0, 0] = 1.0  # a tenth of the voxels could have mean 1 only at 10
    found = attention.normalise_weight(weight, torch.ones_like(weight, dtype=torch.bool), cap=5.0)
    torch.testing.assert_close(found[0, 0, 0], torch.full((10,), 5.0))
    torch.testing.assert_close(found[0, 0, 1:], torch.full((9, 10), 5 / 9))  # (100 - 10 * 5) / 90


@pytest.mark.parametrize("norm", ["mean", "none"])
def test_permuting_samples_permutes_weights(norm: str) -> None:
    confidence, mask = random_case()
    order = torch.tensor([2, 3, 0, 1])
    weigh = lambda m, k: attention.attention_weight(m, k, beta=2.0, norm=norm)  # type: ignore[arg-type] # noqa: E731
    torch.testing.assert_close(
        weigh(confidence[order], mask[order])[mask[order]], weigh(confidence, mask)[order][mask[order]]
    )


@pytest.mark.parametrize("filling", [0.0, 1.0, float("nan")])
def test_masked_voxels_change_no_weight(filling: float) -> None:
    confidence, mask = random_case()
    expected = attention.attention_weight(confidence, mask, beta=2.0)
    found = attention.attention_weight(torch.where(mask, confidence, filling), mask, beta=2.0)
    assert torch.equal(found[mask], expected[mask])


def test_literal_weights_are_not_normalised() -> None:
    confidence, mask = random_case()
    weight = attention.attention_weight(confidence, mask, beta=2.0, norm="none", strength=0.5)
    torch.testing.assert_close(weight, 0.5 + 0.5 * (1 - confidence) ** 2)


def test_the_reconstruction_loss_gives_the_local_discriminator_nothing_unless_undetached() -> None:
    torch.manual_seed(0)
    generator = ResidualGenerator(in_channels=1, widths=(4, 4), dims=2)
    discriminator = LocalDiscriminator(in_channels=2, widths=(4, 4, 4), dims=2)
    source, target = torch.randn(2, 2, 1, 16, 16)
    mask = torch.ones_like(target, dtype=torch.bool)
    slopes = {}
    for detach in (True, False):
        prediction = generator(source)
        confidence = torch.sigmoid(discriminator(torch.cat([source, prediction], dim=1)).structured)
        weight = attention.attention_weight(confidence, mask, beta=2.0, detach=detach)
        assert weight.requires_grad != detach
        losses.reconstruction_loss(prediction, target, mask, weight).backward()
        reached = [p.grad is not None and bool(p.grad.any()) for p in discriminator.parameters()]
        assert any(reached) != detach
        slopes[detach] = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
        generator.zero_grad()
    assert any(not torch.allclose(a, b) for a, b in zip(slopes[True], slopes[False]))
    assert all(torch.isfinite(a).all() for a in slopes[False])


def test_the_undetached_normalised_weight_has_the_gradient_of_finite_differences() -> None:
    confidence, mask = random_case()
    confidence, mask = confidence[:3, :, :3, :3].double(), mask[:3, :, :3, :3]

    def weighed(m: Tensor) -> Tensor:
        weight = attention.attention_weight(m, mask, beta=2.0, detach=False)
        return torch.where(mask, weight, 0)

    assert torch.autograd.gradcheck(weighed, confidence.requires_grad_())


def test_shuffling_keeps_each_samples_histogram_and_loses_its_places() -> None:
    confidence, mask = random_case()
    weight = attention.attention_weight(confidence, mask, beta=2.0)
    keys, others = torch.rand(2, *mask.shape, generator=torch.Generator().manual_seed(0))
    shuffled = attention.shuffle_weight(weight, mask, keys)
    for before, after, place in zip(weight, shuffled, mask):
        assert torch.equal(before[place].sort().values, after[place].sort().values)
        assert torch.equal(before[~place], after[~place])
    assert (weight[mask] == shuffled[mask]).float().mean() < 0.2
    again = attention.shuffle_weight(weight, mask, keys)
    assert torch.equal(shuffled, again)
    assert not torch.equal(shuffled, attention.shuffle_weight(weight, mask, others))


def test_the_lesion_oracle_weighs_lesions_by_its_factor() -> None:
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    labels = torch.zeros(1, 1, 4, 5, dtype=torch.int64)
    labels[0, 0, 0] = torch.tensor([1, 2, 4, 1, 1])
    for kind in (labels, labels > 0):
        weight = attention.lesion_weight(kind, 4.0, mask)
        torch.testing.assert_close(weight[0, 0, 0], torch.full((5,), 4 / 1.75))  # mean of 5 x 4 and 15 x 1
        torch.testing.assert_close(weight[0, 0, 1:], torch.full((3, 5), 1 / 1.75))
    assert (attention.lesion_weight(labels * 0, 4.0, mask) == 1).all()


def test_players_enter_one_after_another() -> None:
    settings = {"steps": 1000, "generator_alone": 0.4, "discriminators_alone": 0.15, "ramp": 0.05}
    at = {step: attention.phase(step, **settings) for step in range(1000)}  # type: ignore[arg-type]
    assert at[0] == at[399] == (True, False, 0.0, 0.0)
    assert at[400] == at[549] == (False, True, 0.0, 0.0)
    assert at[550] == (True, True, 0.0, 0.0)
    assert at[575] == (True, True, 0.5, 0.0)
    assert at[600] == (True, True, 1.0, 0.0)
    assert at[625] == (True, True, 1.0, 0.5)
    assert at[650] == at[999] == (True, True, 1.0, 1.0)
    rising = [(p.adversarial, p.attention) for p in at.values()]
    assert rising == sorted(rising)


def test_an_arm_without_discriminators_never_waits() -> None:
    for step in (0, 50, 99):
        now = attention.phase(step, steps=100, generator_alone=1.0, discriminators_alone=0.0, ramp=0.05)
        assert now == (True, False, 0.0, 0.0)


HEALTHY = {"target": "realness", "realness_accuracy": 0.8, "confidence_sd": 0.1, "spearman": 0.2}


def is_open(change: dict[str, object] | None = None) -> bool:
    known = HEALTHY | (change or {})
    known |= {name: torch.tensor(known[name], dtype=torch.float64) for name in ("realness_accuracy", "confidence_sd")}
    return bool(attention.gate_is_open(**known))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"realness_accuracy": 0.98},  # saturated
        {"realness_accuracy": 0.5},  # knows nothing
        {"realness_accuracy": math.nan},
        {"confidence_sd": 0.019},  # flat
        {"confidence_sd": math.nan},
        {"spearman": 0.0},
        {"spearman": -0.1},  # inverted
        {"spearman": math.nan},
    ],
)
def test_the_gate_closes_on_a_saturated_flat_or_inverted_discriminator(change: dict[str, object]) -> None:
    assert not is_open(change)


def test_the_gate_is_open_while_all_is_well_and_discriminators_realness_only_where_it_is_used() -> None:
    assert is_open()
    for edge in attention.ACCURACY_RANGE:
        assert is_open({"realness_accuracy": edge})
    for target in ("structured", "magnitude"):
        assert is_open({"target": target, "realness_accuracy": 1.0})


def test_the_error_scale_is_twice_the_running_median_inside_the_mask() -> None:
    error = torch.tensor([-1.0, 2.0, -3.0, 1e6]).view(1, 1, 2, 2)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)
    scale = attention.update_error_scale(torch.tensor(0.0, dtype=torch.float64), error, mask, 0.9)
    assert scale == 4.0
    assert float(attention.update_error_scale(scale, error * 2, mask, 0.9)) == pytest.approx(0.9 * 4 + 0.1 * 8)
    assert attention.update_error_scale(scale, error, mask & False, 0.9) == scale


def test_a_scale_of_zero_does_not_divide_by_it() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for error in (torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)):
        for soft_target in (losses.soft_target_magnitude, losses.soft_target_structured):
            assert torch.isfinite(soft_target(error, mask, 0.0, (1.0, 1.0))).all()


def test_values_out_of_range_are_refused() -> None:
    confidence, mask = random_case()
    for attempt in (
        lambda: attention.difficulty_weight(confidence, -1.0),
        lambda: attention.normalise_weight(confidence, mask, cap=1.0),
        lambda: attention.attention_weight(confidence, mask, norm="max"),  # type: ignore[arg-type]
        lambda: attention.attention_weight(confidence, mask, strength=1.5),
        lambda: attention.attention_weight(confidence[:, 0], mask),
        lambda: attention.lesion_weight(mask, 0.0, mask),
        lambda: attention.update_error_scale(torch.tensor(1.0), confidence, mask, 1.0),
    ):
        with pytest.raises(ValueError):
            attempt()
