"""The tests that pin the method to one step of two players."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chiasm.cohorts.discovery import find_cohort
from chiasm.methods import make_recipe
from chiasm.networks.discriminators import LocalLogits
from chiasm.prediction.engines import Engine
from chiasm.prediction.passes import refine
from chiasm.preparation.arrays import PreparedCase, prepare_case
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training.batches import Place
from chiasm.training.checkpoints import load_checkpoint, save_checkpoint
from chiasm.training.discriminator_step import step_discriminators
from chiasm.training.generator_step import attention_weights, step_generator, step_refiner
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run_planning import plan_run
from chiasm.training.sampler import draw, gate_is_open, note_lesions
from chiasm.training.setting import Draw, beside_source, make_draw, shown_locally
from conftest import QUICK


@pytest.fixture(scope="module")
def prepared(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[PreparedCase]]:
    folder = tmp_path_factory.mktemp("prepared")
    run = plan_run(toy_cohort, make_recipe("A7", "tiny", QUICK), folder, say=lambda _: None)
    cases = {case.id: case for case in find_cohort(toy_cohort).cases}
    return run.plan, [prepare_case(cases[name], run.plan, folder / "cache") for name in run.split.train]


def recipe(method: str = "A7", changes: Mapping[str, object] | None = None) -> Recipe:
    """All players play from the first step, at full strength, gate open."""
    at_once = {"schedule.generator_alone": 0.0, "schedule.discriminators_alone": 0.0, "attention.gate": False}
    return make_recipe(method, "tiny", {**QUICK, **at_once, "training.precision": "32-true", **(changes or {})})


def learner(prepared: tuple[Plan, list[PreparedCase]], asked: Recipe) -> Learner:
    return Learner(asked, *prepared, make_fabric(asked))


def bare(one: Learner, name: str) -> torch.nn.Module:
    """A network without its wrapper."""
    return one.trainables.bare(name)


def patches(one: Learner, step: int, turn: int = 0) -> list[Place]:
    """The patches that a step takes."""
    return draw(one.setting, one.state, step, one.phase(step), turn)


def made(one: Learner, step: int) -> Draw:
    """The patches of a step, and what the generator makes of them."""
    return make_draw(one.setting, step, one.phase(step), patches(one, step))


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


LATE = 20  # a step at which every ramp is over


def test_beta_0_equals_the_arm_without_attention_to_the_bit(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    made = []
    for changes in ({"attention.beta": 0.0}, {"attention.head": "none"}):
        one = learner(prepared, recipe("A7", changes))
        losses = [one.step(step)["loss"] for step in range(LATE, LATE + 3)]
        made.append((losses, weights(bare(one, "generator"))))
    assert made[0][0] == made[1][0]
    assert same(made[0][1], made[1][1])


@pytest.mark.parametrize(
    ("share", "is_painted"),
    [("class_share", False), ("shaded_share", False), ("painted_share", True), ("simulated_share", True)],
)
def test_shifted_classes_shadings_painted_lesions_and_simulated_patients_reach_the_generator_by_the_recipe_alone(
    share: str, is_painted: bool, prepared: tuple[Plan, list[PreparedCase]]
) -> None:
    plain, varied = (learner(prepared, recipe("A1", {f"training.{share}": value})) for value in (0.0, 1.0))
    before, after = made(plain, LATE).batch, made(varied, LATE).batch
    assert not torch.equal(before.source, after.source)
    assert torch.equal(before.target, after.target) != is_painted


def test_the_values_of_a_ct_reach_the_networks_as_they_are(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    """An offset of 0.1 would be some 200 Hounsfield units, in which all soft tissues lie."""
    plan, cases = prepared
    known = np.concatenate([np.unique(np.asarray(case.source)) for case in cases])
    ct = replace(plan, source_kinds=("hu",) * len(plan.sources))
    batches = [made(learner((one, cases), recipe("A1")), LATE).batch.source.numpy() for one in (plan, ct)]
    jittered, plain = (np.isin(batch, known).mean() for batch in batches)
    assert plain == 1.0 and jittered < 0.9


def test_attention_does_change_the_step(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    plain, attentive = (
        learner(prepared, recipe("A7", changes)) for changes in ({"attention.head": "none"}, {"attention.beta": 4.0})
    )
    for one in (plain, attentive):
        one.step(LATE)
    assert not same(weights(bare(plain, "generator")), weights(bare(attentive, "generator")))


def test_the_reconstruction_loss_gives_the_local_discriminator_nothing(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    one = learner(prepared, recipe("A10"))  # attention without adversarial terms
    one.step(LATE)
    before = weights(bare(one, "local_discriminator"))
    step_generator(one.setting, one.state, made(one, LATE))
    assert same(before, weights(bare(one, "local_discriminator")))  # weights and power iterations stand still
    assert all(parameter.requires_grad for parameter in bare(one, "local_discriminator").parameters())


def test_the_confidence_losses_give_the_generator_nothing(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    one = learner(prepared, recipe("A7"))
    step_discriminators(one.setting, replace(one.state, error_scale=1.0), made(one, LATE).detached())
    assert all(parameter.grad is None for parameter in bare(one, "generator").parameters())


def test_a_network_that_only_expects_the_error_changes_nothing_of_the_generator(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    timed = {"schedule.generator_alone": 0.5, "schedule.discriminators_alone": 0.0, "schedule.steps": 8}
    beside, alone = (learner(prepared, recipe(method, timed)) for method in ("l2-expected-error", "l2"))
    local = bare(beside, "local_discriminator")
    before = weights(local)
    for step in range(8):
        log = beside.step(step)
        alone.step(step)
        assert same(before, weights(local)) == (step < 4)  # it learns in the second half
    assert same(weights(bare(beside, "generator")), weights(bare(alone, "generator")))
    assert {"magnitude_loss", "structured_loss"} <= set(log)
    assert "accuracy_local" not in log  # real images are not shown to it, so it recognises none
    rows = (weights(local)["heads.weight"] != before["heads.weight"]).flatten(1).any(1).tolist()
    assert dict(zip(LocalLogits._fields, rows)) == {"realness": False, "magnitude": True, "structured": True}
    maps = beside.maps(prepared[1][0], Engine(torch.device("cpu"), "32-true"))
    assert maps.raw_error is not None and maps.raw_error[np.asarray(prepared[1][0].mask)].std() > 0


@pytest.mark.parametrize(
    ("method", "local", "other"),
    [("l2-expected-error", 3.0, None), ("A7", 1.0, 1.0), ("global-l2", 3.0, 1.0)],
)
def test_a_network_that_only_expects_the_error_learns_at_three_times_the_rate_and_others_do_not(
    method: str, local: float, other: float | None, prepared: tuple[Plan, list[PreparedCase]]
) -> None:
    changes = {"optimiser.discriminator_rate": 1.0, "schedule.steps": 40, "discriminators.confidence": True}
    one = learner(prepared, recipe(method, changes)).trainables
    for step, share in ((0, 1.0), (20, 0.505), (40, 0.01)):
        one.set_rates(step)
        found = {name: optimiser.param_groups[0]["lr"] for name, optimiser in one.optimisers.items()}
        assert found["local_discriminator"] == pytest.approx(local * share)
        assert found.get("global_discriminator") == (other if other is None else pytest.approx(other * share))


@pytest.mark.parametrize("method", ["l1", "unet", "global-l2"])
def test_any_method_can_have_an_expected_error_beside_it(
    method: str, prepared: tuple[Plan, list[PreparedCase]]
) -> None:
    changes = {"generator.scale": 1 / 16}
    asked = [recipe(method, {**changes, "discriminators.confidence": also}) for also in (True, False)]
    beside, alone = (learner(prepared, one) for one in asked)
    for step in (LATE, LATE + 1):
        beside.step(step)
        alone.step(step)
    assert same(weights(bare(beside, "generator")), weights(bare(alone, "generator")))
    engine = Engine(torch.device("cpu"), "32-true")
    assert [one.maps(prepared[1][0], engine).raw_error is None for one in (beside, alone)] == [False, True]


def test_the_undetached_arm_sends_gradients_through_the_weight(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    gradients = []
    for method in ("A8", "A9"):
        one = learner(prepared, recipe(method))
        one.step(LATE)
        gradients.append([p.grad.clone() for p in bare(one, "generator").parameters() if p.grad is not None])
    assert any(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_shuffled_weight_has_the_same_values_in_other_places(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    found: list[Tensor] = []
    for method in ("A7", "C4"):
        one = learner(prepared, recipe(method))
        drawn = made(one, LATE)
        logits = bare(one, "local_discriminator").eval()(shown_locally(one.recipe, drawn.batch, drawn.batch.target))
        found.append(attention_weights(one.setting, one.state, drawn, logits).weight[drawn.batch.mask])
    assert not torch.equal(*found)
    torch.testing.assert_close(*(weight.sort().values for weight in found))


def test_discriminators_are_trained_at_their_own_steps_and_the_generator_stands_still_then(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    asked = make_recipe("A7", "tiny", {**QUICK, "schedule.generator_alone": 0.4, "schedule.discriminators_alone": 0.3})
    one = learner(prepared, asked)
    moved: dict[int, set[str]] = {}
    for step in (0, 12, 23):
        before = {name: weights(bare(one, name)) for name in one.trainables.modules}
        one.step(step)
        moved[step] = {
            name
            for name, module in one.trainables.modules.items()
            if any(not torch.equal(before[name][key], p) for key, p in module.named_parameters() if key in before[name])
            or any(
                p.grad is not None and not torch.equal(before[name][k.removeprefix("_forward_module.")], p)
                for k, p in bare(one, name).named_parameters()
            )
        }
    assert moved[0] == {"generator"}
    assert moved[12] == {"global_discriminator", "local_discriminator"}
    assert moved[23] == {"generator", "global_discriminator", "local_discriminator"}


def test_every_step_draws_the_same_batch_whatever_the_arm(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    drawn = []
    for method in ("A1", "A7", "A8"):
        one = learner(prepared, recipe(method))
        for step in (0, 7):
            one.step(step)
        drawn.append(patches(one, 8))
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_average_follows_the_weights(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    one = learner(prepared, recipe("A1", {"optimiser.average": 0.0}))
    one.step(0)
    current = weights(bare(one, "generator"))
    assert same(weights(one.trainables.average), current)
    slow = learner(prepared, recipe("A1", {"optimiser.average": 0.999}))
    for step in range(3):
        slow.step(step)
    assert not same(weights(slow.trainables.average), weights(bare(slow, "generator")))


def test_validation_and_prediction_are_one_function(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    from chiasm.prediction.passes import Networks, synthesise_prepared

    one = learner(prepared, recipe())
    one.step(0)
    engine = Engine(torch.device("cpu"), "32-true")
    case = prepared[1][0]
    maps = one.maps(case, engine)
    model = one.model()
    again = synthesise_prepared(
        Networks(model.generator, model.local_discriminator.eval() if model.local_discriminator else None),
        np.asarray(case.source),
        np.asarray(case.mask),
        plan=one.plan,
        conditional=True,
        error_scale=model.error_scale,
        engine=engine,
    )
    for a, b in zip(maps, again):
        np.testing.assert_array_equal(a, b)
    assert (maps.prediction[~np.asarray(case.mask)] == 0).all()


def test_the_gate_closes_on_a_discriminator_that_knows_nothing_and_says_why(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    one = learner(prepared, recipe("A7", {"attention.gate": True}))
    one.restore({"confidence_sd": 0.2, "rho": -0.3})
    assert not gate_is_open(one.setting, one.state)
    figures: dict[str, Any] = one.step(LATE)
    assert figures["attention_strength"] == 0 and one.state.closed_steps == 1
    one.note_validation(0.3)
    assert one.step(LATE + 1)["attention_strength"] > 0


FIRST_STAGE = ("generator", "global_discriminator", "local_discriminator")


def test_the_first_stage_of_a_refined_arm_is_the_arm_without_to_the_bit(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    plain, refined = (learner(prepared, recipe(method, {"attention.beta": 2.0})) for method in ("A7", "A15"))
    before = weights(bare(refined, "refiner"))
    for step in range(LATE, LATE + 4):
        told, more = plain.step(step), refined.step(step)
        assert more.pop("refinement") > 0 and told == more
    assert all(same(weights(bare(plain, name)), weights(bare(refined, name))) for name in FIRST_STAGE)
    assert (
        same(weights(plain.trainables.average), weights(refined.trainables.average))
        and plain.state.to_dict() == refined.state.to_dict()
    )
    assert not same(before, weights(bare(refined, "refiner")))


def test_the_refiner_learns_only_once_all_play(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    asked = make_recipe("A15", "tiny", {**QUICK, "schedule.generator_alone": 0.4, "schedule.discriminators_alone": 0.3})
    one = learner(prepared, asked)
    before = weights(bare(one, "refiner"))
    for step in (0, 12):
        assert "refinement" not in one.step(step)
    assert same(before, weights(bare(one, "refiner")))
    assert "refinement" in one.step(18)  # all play from 17 on, the ramp begins at 0
    name = "last.weight"
    followed = torch.lerp(
        before[name], weights(bare(one, "refiner"))[name], 1 - 2 / 11
    )  # its second step, not the 18th
    assert one.trainables.average_refiner is not None
    torch.testing.assert_close(weights(one.trainables.average_refiner)[name], followed)


def test_a_refiner_starts_as_identity_and_its_loss_is_the_plain_error_of_what_it_made(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    """By hand: y2 = y^ + (1 - M) R(x, y^, M), mean of its squared error inside the mask of each sample."""
    one = learner(prepared, recipe("A15", {"generator.norm": "none"}))
    drawn = made(one, LATE).detached()
    batch, masked = drawn.batch, drawn.made
    logits = torch.randn_like(masked)
    start = refine(bare(one, "refiner"), batch.source, masked, logits, batch.mask)
    assert torch.equal(start, masked)
    for parameter in bare(one, "refiner").last.parameters():  # type: ignore[union-attr, operator]
        torch.nn.init.normal_(parameter)
    confidence = torch.sigmoid(logits) * batch.mask
    correction = bare(one, "refiner")(torch.cat([batch.source, masked, confidence], dim=1))
    expected = torch.where(batch.mask, masked + (1 - confidence) * correction, 0).detach()
    refined = refine(bare(one, "refiner"), batch.source, masked, logits, batch.mask)
    torch.testing.assert_close(refined.detach(), expected)
    assert not refined[~batch.mask].any()
    error = (expected - batch.target).square() * batch.mask
    by_hand = np.mean([float(e.sum() / m.sum()) for e, m in zip(error, batch.mask)])
    told = step_refiner(one.setting, drawn, logits)
    assert told["refinement"] == pytest.approx(by_hand, rel=1e-5)


def test_the_refiner_gives_nobody_before_it_a_gradient(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    one = learner(prepared, recipe("A15"))
    one.step(LATE)
    for name in FIRST_STAGE:
        one.trainables.optimisers[name].zero_grad(set_to_none=True)
    drawn = made(one, LATE).detached()
    logits = bare(one, "local_discriminator")(shown_locally(one.recipe, drawn.batch, drawn.made)).structured.detach()
    step_refiner(one.setting, drawn, logits)
    assert all(p.grad is None for name in FIRST_STAGE for p in bare(one, name).parameters())
    assert any(p.grad is not None and p.grad.any() for p in bare(one, "refiner").parameters())


def test_the_gate_and_the_gauge_are_of_the_first_stage_and_the_errors_of_what_is_shipped(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    from chiasm.prediction.engines import Engine
    from chiasm.training.loop import validate

    plain, refined = (learner(prepared, recipe(method)) for method in ("A7", "A15"))
    for step in range(LATE, LATE + 3):
        plain.step(step), refined.step(step)
    torch.nn.init.constant_(refined.trainables.average_refiner.last.bias, 0.5)  # type: ignore[union-attr, arg-type]
    engine = Engine(torch.device("cpu"), "32-true")
    (a, _), (b, _) = (validate(one, prepared[1][:2], engine) for one in (plain, refined))
    assert b.pop("first_mae") == a["mae"] != b["mae"]
    assert {**b, "mae": 0, "lesion_mae": 0} == {**a, "mae": 0, "lesion_mae": 0}


def lesion_cases(cases: list[PreparedCase]) -> list[str]:
    return [case.id for case in cases if case.labels is not None and np.asarray(case.labels).any()]


def test_transplants_by_difficulty_are_random_until_something_is_known(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    changes = {"training.transplant_share": 1.0, "training.lesion_share": 0.5, "training.batch": 8}
    random, difficult = (
        learner(prepared, recipe("A7", {**changes, "training.transplant": kind})) for kind in ("random", "difficulty")
    )
    assert patches(difficult, 3) == patches(random, 3)
    names = lesion_cases(prepared[1])
    difficult.restore({"lesion_difficulty": {names[0]: 1.0, **dict.fromkeys(names[1:], 0.0)}})
    donors = [
        difficult.setting.cases[place.donor[0]].id
        for step in range(20)
        for place in patches(difficult, step)
        if place.donor is not None and difficult.setting.cases[place.case].id != names[0]
    ]
    assert len(donors) > 20 and set(donors) == {names[0]}


@pytest.mark.parametrize(("target", "head"), [("realness", "realness"), ("none", "structured")])
def test_a_cases_doubt_is_that_of_the_attentions_head_in_its_own_lesion(
    target: str, head: str, prepared: tuple[Plan, list[PreparedCase]]
) -> None:
    one = learner(prepared, recipe("A16", {"attention.head": target, "training.lesion_share": 0.5}))
    own, given = (replace(place, donor=donor) for place, donor in zip(patches(one, LATE), (None, (0, (5, 5, 5)))))
    drawn = make_draw(one.setting, LATE, one.phase(LATE), [own, given])
    batch = drawn.batch
    batch = batch._replace(lesion=torch.zeros_like(batch.lesion))
    batch.lesion[:, :, 10:14, 10:14], batch.mask[:, :, 10:14, 10:13] = True, True
    batch.mask[:, :, 10:14, 13:14] = False
    logits = torch.full_like(batch.target, 5.0)
    logits[0, :, 10:14, 10:13] = torch.logit(torch.tensor(0.2))
    said = LocalLogits(**{name: logits if name == head else -9 * logits for name in LocalLogits._fields})
    name = one.setting.cases[own.case].id
    state = note_lesions(one.setting, one.state, drawn._replace(batch=batch), said)
    assert not state.lesion_difficulty  # not read yet
    state = state.read(torch.tensor(True))
    assert state.lesion_difficulty == {name: pytest.approx(0.8)}  # and nothing of the transplant
    alone = drawn._replace(places=[own], batch=batch)
    state = note_lesions(one.setting, state, alone, LocalLogits(*[0 * logits] * 3)).read(torch.tensor(True))
    assert state.lesion_difficulty == {name: pytest.approx(0.9 * 0.8 + 0.1 * 0.5)}


#: What its paper trains each adversarial arm's critic with; the generator's rate too where the network is the paper's.
PUBLISHED: dict[str, dict[str, object]] = {
    "gan": {"loss.adversarial": "bce", "loss.smoothing": 0.0, "loss.discriminator_steps": 1},
    "lsgan": {"loss.adversarial": "lsgan"},
    "hinge": {
        "loss.adversarial": "hinge",
        "discriminators.global_spectral_norm": True,
        "optimiser.discriminator_rate": 2e-4,
        "optimiser.discriminator_betas": (0.5, 0.999),
    },
    "wgan": {
        "loss.adversarial": "wgan",
        "loss.clip": 0.01,
        "loss.discriminator_steps": 5,
        "optimiser.discriminator": "rmsprop",
        "optimiser.discriminator_rate": 5e-5,
    },
    "wgan-gp": {
        "loss.adversarial": "wgan-gp",
        "loss.penalty": 10.0,
        "loss.penalty_every": 1,
        "loss.discriminator_steps": 5,
        "optimiser.discriminator_rate": 1e-4,
        "optimiser.discriminator_betas": (0.0, 0.9),
    },
    "dcgan": {
        "loss.adversarial": "bce",
        "loss.smoothing": 0.0,
        "optimiser.generator_rate": 2e-4,
        "optimiser.discriminator_rate": 2e-4,
        "optimiser.betas": (0.5, 0.999),
    },
    "pix2pix": {
        "loss.adversarial": "bce",
        "loss.norm": "l1",
        "loss.global_weight": 0.01,
        "optimiser.generator_rate": 2e-4,
        "optimiser.discriminator_rate": 2e-4,
        "optimiser.betas": (0.5, 0.999),
    },
}


@pytest.mark.parametrize("method", list(PUBLISHED))
@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_an_adversarial_arm_has_its_papers_settings_at_every_size(method: str, size: str) -> None:
    asked = make_recipe(method, size)
    for name, value in PUBLISHED[method].items():
        section, field = name.split(".")
        assert getattr(getattr(asked, section), field) == value, name


def test_discriminators_have_their_own_optimiser_and_the_generator_keeps_adam(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    clipped = learner(prepared, recipe("wgan"))
    kinds = {name: type(getattr(o, "optimizer", o)).__name__ for name, o in clipped.trainables.optimisers.items()}
    assert "RMSprop" in kinds["global_discriminator"] and "Adam" in kinds["generator"]
    penalised = learner(prepared, recipe("wgan-gp"))
    betas = {name: o.param_groups[0]["betas"] for name, o in penalised.trainables.optimisers.items()}
    assert betas == {"generator": (0.5, 0.99), "global_discriminator": (0.0, 0.9)}
    usual = learner(prepared, recipe("A7", {"optimiser.betas": (0.3, 0.9)}))
    assert {o.param_groups[0]["betas"] for o in usual.trainables.optimisers.values()} == {(0.3, 0.9)}


def test_a_clipped_critic_keeps_every_weight_small_after_each_step_and_no_other_does(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    changes = {"optimiser.discriminator_rate": 0.1, "loss.clip": 0.02}
    largest = {}
    for method in ("wgan", "gan"):
        one = learner(prepared, recipe(method, changes))
        before = {name: value.clone() for name, value in bare(one, "global_discriminator").named_buffers()}
        for step in range(3):
            one.step(step)
            critic = [value.detach().abs().max() for value in bare(one, "global_discriminator").parameters()]
            largest[method] = float(max(critic))
            assert (largest[method] <= np.float32(0.02)) == (method == "wgan")
        assert same(
            before, dict(bare(one, "global_discriminator").named_buffers())
        )  # the statistics of inputs are no weights
        assert max(float(value.detach().abs().max()) for value in bare(one, "generator").parameters()) > 0.02
    assert largest["wgan"] == np.float32(0.02)


def test_a_lazy_penalty_weighs_as_much_in_all_as_one_at_every_step(
    prepared: tuple[Plan, list[PreparedCase]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a penalty of constant size and a critic that stands still, eight steps cost the same."""
    asked: list[int] = []
    now = [0]
    total: dict[tuple[int, int], float] = {}
    for penalty, every in ((0.0, 1), (10.0, 1), (10.0, 4)):
        changes = {
            "loss.penalty": penalty, "loss.penalty_every": every, "loss.discriminator_steps": 1,
            "optimiser.discriminator_rate": 1e-9, "optimiser.generator_rate": 1e-9,
        }  # fmt: skip
        one = learner(prepared, recipe("wgan-gp", changes))

        def half(critic: object, real: Tensor, fake: Tensor, factor: Tensor) -> Tensor:
            assert factor.shape == real.shape[:1] and ((factor >= 0) & (factor <= 1)).all() and factor.std() > 0
            asked.append(now[0])
            return torch.tensor(0.5)

        monkeypatch.setattr("chiasm.training.losses.gradient_penalty", half)
        total[int(penalty), every] = 0.0
        for now[0] in range(8):
            total[int(penalty), every] += float(one.step(now[0])["global_discriminator_loss"])
    assert asked == [*range(8), *range(8), 0, 4]
    assert total[10, 1] - total[0, 1] == pytest.approx(8 * 10 * 0.5, rel=1e-4)
    assert total[10, 4] == pytest.approx(total[10, 1], rel=1e-4)


@pytest.mark.parametrize(("discriminator_steps", "every"), [(4, 4), (3, 2), (1, 4)])
def test_a_lazy_penalty_falls_on_every_nth_step_of_the_critic_alone_or_not(
    prepared: tuple[Plan, list[PreparedCase]], monkeypatch: pytest.MonkeyPatch, discriminator_steps: int, every: int
) -> None:
    changes = {"loss.penalty_every": every, "loss.discriminator_steps": discriminator_steps, "schedule.steps": 16}
    phases = {"schedule.generator_alone": 0.0, "schedule.discriminators_alone": 0.5}
    one = learner(prepared, recipe("wgan-gp", {**changes, **phases}))
    penalised, stepped = [0], [0]
    descend = one.trainables.descend

    def counted(*_: object) -> torch.Tensor:
        penalised[0] += 1
        return torch.tensor(0.5)

    def watched(name: str, loss: Tensor, share: float) -> None:
        stepped[0] += name == "global_discriminator"
        descend(name, loss, share)

    monkeypatch.setattr("chiasm.training.losses.gradient_penalty", counted)
    monkeypatch.setattr(one.trainables, "descend", watched)
    for step in range(8):
        one.step(step)
    assert stepped[0] == 8 and penalised[0] == 8 // every
    for step in range(8, 12):
        one.step(step)
    assert stepped[0] == 8 + 4 * discriminator_steps and penalised[0] == stepped[0] // every


def test_a_critic_takes_its_steps_on_batches_of_their_own_once_both_play(
    prepared: tuple[Plan, list[PreparedCase]], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = {"schedule.generator_alone": 0.25, "schedule.discriminators_alone": 0.25}
    one = learner(prepared, recipe("wgan-gp", {**phases, "loss.discriminator_steps": 3}))
    turns: list[tuple[str, Tensor]] = []
    descend = one.trainables.descend

    def watched(name: str, loss: Tensor, share: float) -> None:
        turns.append((name, seen[-1]))
        descend(name, loss, share)

    def watched_see(batch: Any, image: Tensor) -> Tensor:
        seen.append(batch.target.clone())
        return beside_source(batch, image)

    seen: list[Tensor] = [torch.zeros(())]
    monkeypatch.setattr(one.trainables, "descend", watched)
    monkeypatch.setattr("chiasm.training.discriminator_step.beside_source", watched_see)
    played = {}
    for step in (0, 7, 20):
        turns.clear()
        one.step(step)
        played[step] = [name for name, _ in turns]
    assert played == {
        0: ["generator"],
        7: ["global_discriminator"],
        20: ["global_discriminator", "global_discriminator", "global_discriminator", "generator"],
    }
    batches = [batch for _, batch in turns[:3]]
    assert not any(torch.equal(a, b) for a, b in pairwise(batches))
    once = learner(prepared, recipe("wgan-gp", {**phases, "loss.discriminator_steps": 1}))
    usual = patches(once, 20)
    assert patches(one, 20) == usual != patches(one, 20, 1)  # arms see the same batches still


def test_a_discriminator_with_batch_normalisation_discriminators_the_generator_by_the_batchs_own_statistics(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    plan, cases = prepared
    asked = recipe("dcgan", {"generator.scale": 1 / 16, "discriminators.scale": 1 / 16})
    one = learner((plan, cases), asked)
    one.step(0)
    pair = torch.randn(2, plan.slices + 2, 32, 32)[:, : plan.slices + 1]
    discriminator = bare(one, "global_discriminator")
    with torch.no_grad():
        wanted, by_running = discriminator.train()(pair), discriminator.eval()(pair)
        with one.trainables.frozen_discriminators():
            found = discriminator(pair)
            assert not any(p.requires_grad for p in discriminator.parameters())
    torch.testing.assert_close(found, wanted)
    assert (found - by_running).abs().max() > 1e-3
    assert all(part.training for part in discriminator.modules())


@pytest.mark.parametrize("critic", ["dcgan", "patch", "context", "strainet"])
def test_under_a_gradient_penalty_no_critic_mixes_samples(
    critic: str, prepared: tuple[Plan, list[PreparedCase]]
) -> None:
    small = {"discriminators.global_network": critic, "discriminators.scale": 1 / 16}
    norms = torch.nn.BatchNorm2d | torch.nn.BatchNorm3d
    found = {}
    for objective in ("wgan-gp", "bce"):
        discriminator = (
            learner(prepared, recipe("A4", {**small, "loss.adversarial": objective}))
            .trainables.bare("global_discriminator")
            .train()
        )
        found[objective] = any(isinstance(part, norms) for part in discriminator.modules())
        if objective == "wgan-gp":
            pair = torch.randn(3, prepared[0].slices + 1, 32, 32)
            torch.testing.assert_close(discriminator(pair)[:1], discriminator(pair[:1]), atol=1e-5, rtol=1e-4)
    assert found == {"wgan-gp": False, "bce": critic != "strainet"}


@pytest.mark.parametrize("method", ["wgan", "wgan-gp", "hinge"])
def test_what_a_checkpoint_restores_goes_on_with_the_same_turns_to_the_bit(
    method: str, prepared: tuple[Plan, list[PreparedCase]], tmp_path: Path
) -> None:
    whole, first, second = (learner(prepared, recipe(method)) for _ in range(3))
    for step in range(4):
        whole.step(step)
    for step in range(2):
        first.step(step)
    save_checkpoint(tmp_path, 2, first.parts, first.state.to_dict())
    _, state, _ = load_checkpoint(tmp_path, second.parts)
    second.restore(state)
    for step in (2, 3):
        second.step(step)
    for name in whole.trainables.modules:
        assert same(weights(bare(whole, name)), weights(bare(second, name))), name
