"""A sparse coder through the loop: who is a pair, what is never looked at, resuming, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chiasm.cohorts.planning import Plan, make_plan
from chiasm.cohorts.preparation import PreparedCase, prepare_case
from chiasm.cohorts.splits import Split
from chiasm.errors import CohortError, RecipeError
from chiasm.evidence.jobs import _warm_ups
from chiasm.networks.sparse_coding import SparseCoder
from chiasm.prediction.baselines import load_baselines
from chiasm.prediction.folders import load
from chiasm.recipe import Recipe, make_recipe
from chiasm.training.coding import CodingLearner, deal_roles, draw_examples
from chiasm.training.cost import estimate_cost
from chiasm.training.loop import learn, make_fabric
from chiasm.training.methods import check_players, patch_needs
from chiasm.training.run import paired_names, train
from synthetic_cohort import plan_of, write_brats, write_cohort


def asked(*settings: str, method: str = "jcsc") -> Recipe:
    changes = {
        "generator.scale": 0.01,
        "data.patch": 24,
        "training.batch": 2,
        "training.accelerator": "cpu",
        "training.precision": "32-true",
        "schedule.steps": 4,
        "optimiser.tolerance": 0.0,
    }
    return make_recipe(method, "tiny", changes, settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[PreparedCase]]:
    folder = tmp_path_factory.mktemp("cohort")
    cohort = write_cohort(folder, 5)
    recipe = asked()
    plan = make_plan(recipe, cohort, ["case00", "case01"], needs=patch_needs(recipe))
    return plan, [prepare_case(case, plan, folder / "cache") for case in cohort.cases]


def learner(prepared: tuple[Plan, list[PreparedCase]], *settings: str) -> CodingLearner:
    recipe = asked(*settings)
    return CodingLearner(recipe, prepared[0], prepared[1], make_fabric(recipe))


def weights(coder: torch.nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in coder.state_dict().values())


def test_the_plans_cases_are_pairs_and_the_others_sources_and_targets_by_turns(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    roles = deal_roles(prepared[1], prepared[0].trained_on)
    told = [[case.id for case in part] for part in roles]
    assert told == [["case00", "case01"], ["case02", "case04"], ["case03"]]
    shown = draw_examples(roles, prepared[0], count=3, seed=0)
    assert [len(part) for part in shown] == [6, 6, 3, 3]
    alone = draw_examples(deal_roles(prepared[1][:3], prepared[0].trained_on), prepared[0], count=3, seed=0)
    assert [len(part) for part in alone] == [6, 6, 0, 0]  # one kind of unpaired image tells nothing of a discrepancy


def test_the_other_image_of_an_unpaired_case_is_never_looked_at(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    plan, cases = prepared
    rng = np.random.default_rng(0)

    def hidden(case: PreparedCase) -> PreparedCase:
        if case.id in plan.trained_on:
            return case
        if case.id == "case03":  # serves as a target
            return replace(case, source=rng.normal(size=case.source.shape).astype(np.float32))
        return replace(case, target=rng.normal(size=case.target.shape).astype(np.float32))

    made = []
    for shown in (cases, [hidden(case) for case in cases]):
        one = learner((plan, shown))
        one.step(0)
        made.append(weights(one.model().generator))
    assert made[0] == made[1]
    seen = learner((plan, [replace(case, source=case.source * 2) if case.id == "case02" else case for case in cases]))
    seen.step(0)
    assert weights(seen.model().generator) != made[0]


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    prepared: tuple[Plan, list[PreparedCase]], tmp_path: Path
) -> None:
    recipe = asked()
    ends = []
    for name, stops in (("at once", [4]), ("stopped", [1, 3, 4])):
        for until in stops:
            (tmp_path / name).mkdir(exist_ok=True)
            done = learn(
                recipe,
                prepared[0],
                prepared[1],
                [],
                tmp_path / name,
                fabric=make_fabric(recipe),
                warn=pytest.fail,
                until=until,
            )
        ends.append(weights(done.model().generator))
    assert ends[0] == ends[1]


def test_rounds_after_the_tolerance_is_reached_change_nothing(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    one = learner(prepared, "optimiser.tolerance=0.9")
    losses = [one.step(step)["loss"] for step in range(5)]
    assert one.state["settled"] and losses[0] > losses[1] == losses[4]
    assert isinstance(one.model().generator, SparseCoder)


def test_more_pairs_than_there_are_training_cases_are_refused_with_what_is_possible() -> None:
    split = Split(train=("a", "b", "c"), validation=("d",), test=("e",))
    assert paired_names(asked("training.pairs=2", method="A1"), split) == ("a", "b")
    assert paired_names(asked(), split) == ("a", "b", "c")
    with pytest.raises(CohortError, match=r"4 pairs were asked for.*3: a, b, c.*training.pairs to 3 or less") as caught:
        paired_names(asked("training.pairs=4"), split)
    assert caught.value.reason == "too-few-pairs"


def test_without_a_pair_nothing_is_learnt_and_the_sentence_says_what_to_do(
    prepared: tuple[Plan, list[PreparedCase]],
) -> None:
    with pytest.raises(CohortError, match=r"at least one pair.*2 cases beside.*larger number") as caught:
        deal_roles(prepared[1][2:4], ("case00",))
    assert caught.value.reason == "too-few-pairs"


@pytest.mark.parametrize(
    ("method", "setting"),
    [("A1", "optimiser.kind=admm"), ("jcsc", "loss.global_weight=0.1"), ("jcsc", "generator.network=unet")],
)
def test_rounds_of_admm_are_for_a_coder_alone(method: str, setting: str) -> None:
    with pytest.raises(RecipeError, match=r"learns a sparse coder, alone.*--method jcsc"):
        check_players(asked(setting, method=method))


def test_two_pairs_make_a_model_that_predicts_volumes_and_knows_what_it_was_fitted_on(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 6)
    done = train(data, asked("training.pairs=2", "split.folds=3"), tmp_path / "run", say=lambda _: None)
    assert done.plan.trained_on == done.split.train[:2] and len(done.split.train) > 2
    assert load_baselines(tmp_path / "run" / "model").fitted_on == done.plan.trained_on
    model = load(tmp_path / "run")
    made = [model.predict(next(data.rglob("*_t1.nii.gz"))).image for _ in range(2)]
    assert np.array_equal(made[0].array, made[1].array) and made[0].array.std() > 0
    assert np.isfinite(made[0].array).all()


def test_a_study_has_no_warm_up_for_a_coder() -> None:
    assert _warm_ups(asked(), asked()) == [] and _warm_ups(asked(method="A1"), asked(method="A1"))


def test_time_and_memory_are_forecast_from_the_patches() -> None:
    plan = plan_of(slices=1)
    few, many = (estimate_cost(asked(f"training.batch={batch}"), plan) for batch in (2, 16))
    assert 0 < few.seconds_per_step < many.seconds_per_step and few.memory_mb < many.memory_mb
    assert few.minutes == pytest.approx(few.seconds_per_step * 4 / 60)
