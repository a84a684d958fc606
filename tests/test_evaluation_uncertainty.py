"""Spreads of several answers, with networks whose spread is known in closed form."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import RecipeError
from chiasm.evaluation import uncertainty as rivals
from chiasm.evaluation.uncertainty import (
    augmentation_spread,
    draw_augmentations,
    dropout_spread,
    ensemble_spread,
    expected_error,
    learned_score,
    spread,
    thinned,
)
from chiasm.methods import make_recipe
from chiasm.networks.generator import ResidualGenerator
from chiasm.prediction import passes
from chiasm.prediction.engines import Engine
from chiasm.prediction.folders import load
from chiasm.prediction.model import Model, load_model, make_generator
from chiasm.prediction.passes import Networks, synthesise_prepared
from chiasm.prediction.synthesis import synthesise
from chiasm.preparation.arrays import prepare_source
from chiasm.volumes import Geometry, Volume
from conftest import QUICK
from synthetic_cohort import affine, pair

ENGINE = Engine(torch.device("cpu"), "32-true")
SHAPE = (8, 6, 3)
MASK = np.ones(SHAPE, bool)
MASK[:, 0] = False
SOURCE = np.where(MASK, np.random.default_rng(0).uniform(0.5, 2, SHAPE), 0).astype(np.float32)[None]


class Answers(nn.Module):
    """A generator that answers with a function of the first source channel."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, source: Tensor) -> Tensor:
        return self.answer(source[:, :1])


class Sum(nn.Module):
    """A generator of one level: `strengths` times the source, then the sum of these channels."""

    def __init__(self, strengths: list[float]) -> None:
        super().__init__()
        self.level = nn.Conv2d(1, len(strengths), 1, bias=False)
        self.level.weight.data = torch.tensor(strengths).reshape(-1, 1, 1, 1)
        self.levels = [self.level]

    def forward(self, source: Tensor) -> Tensor:
        features: Tensor = self.level(source[:, :1])
        return features.sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def trained(finished_run: Path) -> Model:
    return load(finished_run, accelerator="cpu", precision="32-true").model


def with_network(model: Model, generator: nn.Module, *, dropout: float = 0.0) -> Model:
    settings = model.recipe.generator.model_copy(update={"dropout": dropout})
    recipe = model.recipe.model_copy(update={"generator": settings})
    return replace(model, generator=generator, recipe=recipe, plan=replace(model.plan, slices=1, dims=2))


def real_case() -> Volume:
    array = pair(3)[0]
    i, j, k = array.shape
    return Volume(array, Geometry((i, j, k), affine()))


def test_a_spread_is_the_standard_deviation_of_numpy() -> None:
    images = np.random.default_rng(1).normal(100, 1, size=(5, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(spread(images), images.astype(float).std(axis=0, ddof=1), rtol=1e-5)


def test_equal_images_have_exactly_no_spread() -> None:
    assert not spread([np.full(SHAPE, 0.1, np.float32)] * 7).any()


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_spread(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least two images, not {count}"):
        spread([SOURCE[0]] * count)


def test_augmentations_begin_with_none_and_are_eight_by_seed(trained: Model) -> None:
    drawn = draw_augmentations(trained.plan, 0.1, seed=4)
    assert (drawn[0].flip, drawn[0].gain.tolist(), drawn[0].offset.tolist()) == (False, [1.0], [0.0])
    assert [change.flip for change in drawn] == [False, True] * 4
    assert len({float(change.gain[0]) for change in drawn}) == 4
    for other, same in ((4, True), (5, False)):
        again = draw_augmentations(trained.plan, 0.1, seed=other)
        assert (again[-1].gain.tolist() == drawn[-1].gain.tolist()) == same


def test_ranks_are_not_augmented(trained: Model) -> None:
    drawn = draw_augmentations(replace(trained.plan, histogram=True), 0.5, seed=0)
    assert all(change.gain[1:].tolist() == [1.0] and change.offset[1:].tolist() == [0.0] for change in drawn)


def test_the_first_pass_of_the_augmentations_is_the_prediction(trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.float32]] = []

    def watched(images: object) -> NDArray[np.float32]:
        seen.extend(images)  # type: ignore[arg-type, call-overload]
        return spread(seen)

    monkeypatch.setattr(rivals, "spread", watched)
    prepared = prepare_source([real_case()], trained.plan)
    augmentation_spread(trained, prepared.array, prepared.mask, engine=ENGINE)
    maps = synthesise_prepared(
        Networks(trained.generator), prepared.array, prepared.mask, plan=trained.plan,
        conditional=True, error_scale=trained.error_scale, engine=ENGINE,
    )  # fmt: skip
    assert len(seen) == 8
    np.testing.assert_array_equal(seen[0], maps.prediction)


def test_a_linear_network_spreads_as_its_gains_and_offsets_do(trained: Model) -> None:
    model = with_network(trained, Answers(lambda x: x.sum(dim=3, keepdim=True).expand_as(x)))  # sees beyond the mask
    made = augmentation_spread(model, SOURCE, MASK, engine=ENGINE, seed=2)
    jitter = model.recipe.training.intensity_jitter
    changes = draw_augmentations(model.plan, jitter, seed=2)
    answers = [
        (SOURCE[0] * change.gain[0] + MASK * change.offset[0]).sum(axis=1, keepdims=True) + 0 * SOURCE[0]
        for change in changes
    ]
    np.testing.assert_allclose(made.score, np.std(answers, axis=0, ddof=1) * MASK, rtol=1e-4, atol=1e-7)
    assert (made.name, made.passes) == ("augmentation", 8)


def test_a_source_in_hounsfield_units_is_turned_and_never_scaled(trained: Model) -> None:
    plan = replace(trained.plan, source_kinds=("hu",) * len(trained.plan.sources))
    changes = draw_augmentations(plan, 0.1, seed=2)
    assert {change.flip for change in changes} == {False, True}
    assert all((change.gain == 1).all() and (change.offset == 0).all() for change in changes)


def test_a_network_that_knows_left_from_right_spreads_by_the_difference(trained: Model) -> None:
    ramp = torch.arange(8.0).reshape(1, 1, 8, 1)
    model = with_network(trained, Answers(lambda x: 0 * x + ramp))
    made = augmentation_spread(model, SOURCE, MASK, engine=ENGINE)
    i = np.arange(8)[:, None, None]
    expected = np.std([i + 0 * SOURCE[0], 7 - i + 0 * SOURCE[0]] * 4, axis=0, ddof=1) * MASK
    np.testing.assert_allclose(made.score, expected, rtol=1e-5)


def test_an_ensemble_spreads_as_its_members_differ(trained: Model) -> None:
    factors = (1.0, 2.0, 4.0)
    models = [with_network(trained, Answers(lambda x, factor=factor: factor * x)) for factor in factors]
    made = ensemble_spread(models, SOURCE, MASK, engine=ENGINE)
    np.testing.assert_allclose(made.score, SOURCE[0] * np.std(factors, ddof=1), rtol=1e-5)
    assert (made.name, made.passes) == ("ensemble", 3)


def test_the_same_model_twice_is_no_ensemble(trained: Model) -> None:
    prepared = prepare_source([real_case()], trained.plan)
    assert not ensemble_spread([trained, trained], prepared.array, prepared.mask, engine=ENGINE).score.any()


def test_dropout_spreads_as_bernoulli_channels_do(trained: Model) -> None:
    strengths, share = [1.0, 2.0, 0.5], 0.2
    model = with_network(trained, Sum(strengths), dropout=share)
    made = dropout_spread(model, SOURCE, MASK, engine=ENGINE, draws=1500)
    known = SOURCE[0] * np.sqrt(share / (1 - share) * np.square(strengths).sum())  # Var(m / (1 - p)) = p / (1 - p)
    np.testing.assert_allclose(made.score[MASK], known[MASK], rtol=0.08)
    assert (made.name, made.passes) == ("mc-dropout", 1500)


def test_one_draw_thins_the_whole_volume_alike(trained: Model) -> None:
    even = np.ones((1, 8, 6, 20), np.float32)  # more slices than go in one pass
    score = dropout_spread(with_network(trained, Sum([1.0] * 4)), even, even[0] > 0, engine=ENGINE).score
    assert score.min() == score.max() > 0


def test_tiles_of_a_thinned_network_fit(trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    generator = ResidualGenerator(in_channels=1, widths=(4, 4), dims=3).eval()
    model = with_network(trained, generator, dropout=0.3)
    model = replace(model, plan=replace(model.plan, dims=3, patch=(8, 8, 8)))
    source = np.random.default_rng(0).normal(size=(1, 40, 8, 8)).astype(np.float32)
    scores = []
    for side in (96, 8):
        monkeypatch.setattr(passes, "TILE", side)
        scores.append(dropout_spread(model, source, source[0] < 9, engine=ENGINE).score)
    assert scores[0].mean() > 0
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_a_model_trained_without_dropout_says_that_it_is_injected(trained: Model) -> None:
    prepared = prepare_source([real_case()], trained.plan)
    made = [dropout_spread(trained, prepared.array, prepared.mask, engine=ENGINE, seed=seed) for seed in (0, 0, 1)]
    assert made[0].name == "dropout injected at inference"
    assert made[0].score[prepared.mask].mean() > 0
    assert not made[0].score[~prepared.mask].any()
    np.testing.assert_array_equal(made[0].score, made[1].score)
    assert not np.array_equal(made[0].score, made[2].score)


def test_asking_leaves_the_network_as_it_was(trained: Model) -> None:
    generator = make_generator(trained.recipe, trained.plan).eval()
    images = torch.rand(1, generator.in_channels, 8, 8)
    nn.init.ones_(generator.last.weight)
    before = generator(images)
    with pytest.raises(KeyError), thinned(generator, 0.5, torch.Generator().manual_seed(0)):
        assert not torch.equal(generator(images), before)
        raise KeyError
    assert torch.equal(generator(images), before)


def test_a_constant_network_has_no_spread(trained: Model) -> None:
    constant = Sum([1.0, 2.0])
    constant.forward = lambda source: 0 * constant.level(source[:, :1])[:, :1] + 0.3  # type: ignore[method-assign]
    model = with_network(trained, constant)
    for made in (
        augmentation_spread(model, SOURCE, MASK, engine=ENGINE),
        dropout_spread(model, SOURCE, MASK, engine=ENGINE),
        ensemble_spread([model, model], SOURCE, MASK, engine=ENGINE),
    ):
        assert made.score.shape == SHAPE
        assert made.score.dtype == np.float32
        assert not made.score.any(), made.name


def test_the_learned_map_calibrated_is_the_one_that_ships(trained: Model) -> None:
    assert trained.calibration is not None
    shipped = synthesise(trained, [real_case()], engine=ENGINE)
    prepared = prepare_source([real_case()], trained.plan)
    made = learned_score(trained, prepared.array, prepared.mask, engine=ENGINE)
    on_grid = expected_error(made.score, trained.calibration, prepared, trained.plan, real_case().geometry)
    assert shipped.expected_error is not None
    np.testing.assert_array_equal(np.where(shipped.mask.array, on_grid, 0), shipped.expected_error.array)
    assert (made.name, made.passes) == ("map", 2)


def test_no_rival_can_be_given_a_target() -> None:
    for ask in (learned_score, augmentation_spread, dropout_spread, ensemble_spread):
        assert not any("target" in name for name in inspect.signature(ask).parameters)


def test_what_cannot_be_asked_is_refused(trained: Model) -> None:
    model = with_network(trained, Answers(lambda x: x))
    with pytest.raises(TypeError, match="Answers does not say what its levels are"):
        dropout_spread(model, SOURCE, MASK, engine=ENGINE)
    with pytest.raises(ValueError, match="no local discriminator"):
        learned_score(replace(model, local_discriminator=None), SOURCE, MASK, engine=ENGINE)
    with pytest.raises(ValueError, match="at least two"):
        ensemble_spread([model], SOURCE, MASK, engine=ENGINE)


def test_the_recipes_dropout_reaches_the_generator_and_is_checked(finished_run: Path) -> None:
    plan = load_model(finished_run).plan
    assert make_generator(make_recipe("A7", "tiny", QUICK), plan).dropout.p == 0
    assert make_generator(make_recipe("A7", "tiny", {**QUICK, "generator.dropout": 0.2}), plan).dropout.p == 0.2
    for wrong in (1.0, -0.1):
        with pytest.raises(RecipeError, match=r"generator\.dropout"):
            make_recipe("A7", "tiny", {"generator.dropout": wrong})
