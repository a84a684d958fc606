"""A sparse coder through the loop: who is a pair, what is never looked at, resuming, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.splits import Split
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.methods import make_recipe
from chiasm.networks.sparse_coding import SparseCoder
from chiasm.prediction.baselines import load_baselines
from chiasm.prediction.folders import load
from chiasm.preparation.arrays import PreparedCase, prepare_case
from chiasm.preparation.examination import examine_case
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import make_plan
from chiasm.preparation.unpaired import find_unpaired
from chiasm.recipe import Data, Recipe
from chiasm.studies.jobs import find_cases, list_jobs, warm_ups
from chiasm.studies.study_file import Study
from chiasm.training.coding import CodingLearner, assign_roles, draw_examples
from chiasm.training.cost import estimate_cost
from chiasm.training.loop import learn, make_fabric
from chiasm.training.players import check_players, patch_needs
from chiasm.training.run import train
from chiasm.training.run_planning import paired_names, plan_run
from chiasm.training.session import LearningCases, Session
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
    roles = assign_roles(prepared[1], prepared[0].trained_on)
    told = [[case.id for case in part] for part in roles]
    assert told == [["case00", "case01"], ["case02", "case04"], ["case03"]]
    shown = draw_examples(roles, prepared[0], count=3, seed=0)
    assert [len(part) for part in shown] == [6, 6, 3, 3]
    few = draw_examples(assign_roles(prepared[1][:2], prepared[0].trained_on), prepared[0], count=3, seed=0)
    assert [len(part) for part in few] == [6, 6, 0, 0]  # nobody is unpaired
    alone = draw_examples(assign_roles(prepared[1][:3], prepared[0].trained_on), prepared[0], count=3, seed=0)
    assert [len(part) for part in alone] == [6, 6, 3, 3]  # the pairs' targets stand in for those that are missing


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
                LearningCases(prepared[1], []),
                tmp_path / name,
                Session(make_fabric(recipe), pytest.fail),
                until=until,
            )
        ends.append(weights(done.model().generator))
    assert ends[0] == ends[1]


def test_rounds_after_the_tolerance_is_reached_change_nothing(prepared: tuple[Plan, list[PreparedCase]]) -> None:
    one = learner(prepared, "optimiser.tolerance=0.9")
    losses = [one.step(step)["loss"] for step in range(5)]
    assert one.state.settled and losses[0] > losses[1] == losses[4]
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
        assign_roles(prepared[1][2:4], ("case00",))
    assert caught.value.reason == "too-few-pairs"


@pytest.mark.parametrize(
    ("method", "setting"),
    [("A1", "optimiser.kind=admm"), ("jcsc", "loss.global_weight=0.1"), ("jcsc", "generator.network=unet")],
)
def test_rounds_of_admm_are_for_a_coder_alone(method: str, setting: str) -> None:
    with pytest.raises(RecipeError, match=r"learns a sparse coder, alone.*--method jcsc"):
        check_players(asked(setting, method=method))


def test_a_coder_has_no_stages() -> None:
    with pytest.raises(RecipeError, match=r"no stages.*generator.stages=1"):
        check_players(asked("generator.stages=2", "schedule.steps=9"))


def test_two_pairs_make_a_model_that_predicts_volumes_and_knows_what_it_was_fitted_on(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 6)
    done = train(data, asked("training.pairs=2", "split.folds=3"), tmp_path / "run", say=lambda _: None)
    assert done.plan.trained_on == done.split.train[:2] and len(done.split.train) > 2
    assert load_baselines(tmp_path / "run" / "model").fitted_on == done.plan.trained_on
    model = load(tmp_path / "run")
    made = [model.predict(next(data.rglob("*_t1.nii.gz"))).image for _ in range(2)]
    assert np.array_equal(made[0].array, made[1].array) and made[0].array.std() > 0
    assert np.isfinite(made[0].array).all()


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """Eight cases, of which two have no T2 and one has no T1."""
    data = write_brats(tmp_path / "data", 8)
    for name in ("Toy_0002/Toy_0002_t2", "Toy_0005/Toy_0005_t2", "Toy_0007/Toy_0007_t1"):
        (data / f"{name}.nii.gz").unlink()
    return data


def test_cases_that_lack_an_image_on_disk_serve_as_unpaired_ones(lacking: Path, tmp_path: Path) -> None:
    said: list[str] = []
    done = train(lacking, asked("split.folds=3"), tmp_path / "run", say=said.append)
    assert done.plan.unpaired == ("Toy_0002", "Toy_0005", "Toy_0007") and not done.problems
    assert "3 images serve without a partner: t1 of Toy_0002, Toy_0005; t2 of Toy_0007" in said
    assert not {*done.plan.unpaired} & {*done.split.train, *done.split.validation, *done.split.test}
    again = train(lacking, asked("split.folds=3"), tmp_path / "run", say=said.append)
    assert again.plan == done.plan

    for name in ("Toy_0002/Toy_0002_t1", "Toy_0007/Toy_0007_t2"):
        (lacking / f"{name}.nii.gz").unlink()
        (lacking / f"{name.rsplit('_', 1)[0]}_seg.nii.gz").unlink()
    with pytest.raises(RunError, match=r"other unpaired images") as caught:
        train(lacking, asked("split.folds=3"), tmp_path / "run", say=said.append)
    assert caught.value.reason == "other-cases"
    fewer = train(lacking, asked("split.folds=3"), tmp_path / "fewer", say=said.append)
    assert fewer.split == done.split and fewer.plan.unpaired == ("Toy_0005",)
    made = [load(tmp_path / name).predict(next(lacking.rglob("*_t1.nii.gz"))).image.array for name in ("run", "fewer")]
    assert not np.array_equal(*made)  # what was alone did teach


def test_no_other_method_looks_at_an_image_without_a_partner(lacking: Path, tmp_path: Path) -> None:
    done = plan_run(lacking, asked(method="A1"), tmp_path / "run", say=lambda _: None)
    assert done.plan.unpaired == () and {problem.case for problem in done.problems} == {
        "Toy_0002",
        "Toy_0005",
        "Toy_0007",
    }


@pytest.mark.parametrize(("kind", "other"), [("t1", "t2"), ("t2", "t1")])
def test_a_lone_copy_of_a_tested_image_is_refused(lacking: Path, tmp_path: Path, kind: str, other: str) -> None:
    tested = plan_run(lacking, asked(), tmp_path / "before", say=lambda _: None).split.test[0]
    alone = "Toy_0002" if kind == "t1" else "Toy_0007"
    copy = lacking / alone / f"{alone}_{kind}.nii.gz"
    shutil.copy(lacking / tested / f"{tested}_{kind}.nii.gz", copy)
    with pytest.raises(CohortError, match=rf"same voxels.*{min(alone, tested)} = {max(alone, tested)}"):
        plan_run(lacking, asked(), tmp_path / "after", say=lambda _: None)


def test_a_side_that_stands_alone_is_prepared_as_its_pair_would_be(tmp_path: Path) -> None:
    whole = write_cohort(tmp_path / "data", 1, masked=True).cases[0]
    plan = replace(plan_of(slices=1), histogram=True)
    pair = prepare_case(whole, plan, tmp_path / "cache")
    for side, name in (("source", "t1"), ("target", "t2")):
        case = replace(whole, images={name: whole.images[name]})
        only = prepare_case(case, plan, tmp_path / "cache")
        assert only.alone == side and pair.alone is None
        assert np.array_equal(getattr(only, side), getattr(pair, side)) and np.array_equal(only.mask, pair.mask)
    assert not np.any(prepare_case(replace(whole, images={"t1": whole.images["t1"]}), plan, tmp_path / "cache").target)


def test_subjects_and_sites_that_are_tested_lend_no_image(tmp_path: Path) -> None:
    cases = [replace(case, site="here") for case in write_cohort(tmp_path, 4).cases]
    first, second, third, tested = cases
    only = {"t1": tested.images["t1"]}
    visit = replace(first, images={"t1": first.images["t1"]}, subject=tested.subject)
    afar = replace(second, images={"t1": second.images["t1"]}, site="there")
    fixed = replace(third, images={"t2": third.images["t2"]}, split="test")
    cohort = Cohort(tmp_path, "synthetic", (visit, afar, fixed, tested))
    data = Data(sources=("t1",), target="t2")
    held_out = {tested.id: examine_case(tested, ["t1", "t2"], {}, data)}
    assert only and find_unpaired(cohort, data, held_out=held_out)[0] == [afar]
    assert find_unpaired(cohort, data, held_out=held_out, elsewhere=["here"])[0] == []
    afar.images["t1"].write_bytes(b"no volume")
    found, problems = find_unpaired(cohort, data, held_out=held_out)
    assert found == [] and [problem.case for problem in problems] == [afar.id]


def test_a_study_recognises_no_job_of_other_unpaired_images(lacking: Path, tmp_path: Path) -> None:
    def keys(arm: str) -> set[str]:
        study = Study(data=lacking, arms=(arm,), source=("t1",), target="t2", steps=2, folds=2, warmup="own")
        return {job.key for job in list_jobs(study, tmp_path, find_cases(study, tmp_path))}

    coder, other = keys("jcsc"), keys("A1")
    (lacking / "Toy_0002" / "Toy_0002_t1.nii.gz").unlink()
    assert not coder & keys("jcsc") and other == keys("A1")


def test_a_study_has_no_warm_up_for_a_coder() -> None:
    assert warm_ups(asked(), asked()) == [] and warm_ups(asked(method="A1"), asked(method="A1"))


def test_time_and_memory_are_forecast_from_the_patches() -> None:
    plan = plan_of(slices=1)
    few, many = (estimate_cost(asked(f"training.batch={batch}"), plan) for batch in (2, 16))
    assert 0 < few.seconds_per_step < many.seconds_per_step and few.memory_mb < many.memory_mb
    assert few.minutes == pytest.approx(few.seconds_per_step * 4 / 60)
