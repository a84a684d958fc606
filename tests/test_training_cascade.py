"""Auto-context: contexts out of fold, one budget for all stages, a model that chains them, and resuming."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import assign_folds
from chiasm.errors import CohortError, RecipeError
from chiasm.evaluation.uncertainty import augmentation_spread, learned_score
from chiasm.methods import make_recipe
from chiasm.prediction.folders import load, predict
from chiasm.prediction.passes import Networks, predict_stage, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase, prepare_case, read_context, write_context
from chiasm.preparation.plan import read_plan
from chiasm.recipe import Recipe, read_recipe
from chiasm.storage import read_json
from chiasm.studies.jobs import find_cases, list_jobs
from chiasm.studies.study_file import Study
from chiasm.training import cascade
from chiasm.training.batches import Place, take_batch
from chiasm.training.cascade import list_parts, recipe_of
from chiasm.training.loop import Interrupted
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run
from chiasm.training.session import LearningCases
from chiasm.training.trainables import Trainables
from conftest import QUICK
from struck import run_struck
from synthetic_cohort import affine, save, write_brats

#: The whole dual method in two stages: discriminators, attention and the expected-error map in each.
TWO = {**QUICK, "generator.stages": 2, "schedule.steps": 36, "training.precision": "32-true", "attention.gate": False}


def recipe(method: str = "A7", **changes: object) -> Recipe:
    return make_recipe(method, "tiny", {**TWO, **{name.replace("__", "."): v for name, v in changes.items()}})


def silent(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def cascaded(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascaded")
    train(toy_cohort, recipe(), folder, say=silent)
    return folder


def prepared(run: Path, cohort: Path, name: str) -> PreparedCase:
    case = next(case for case in find_cohort(cohort).cases if case.id == name)
    return prepare_case(case, read_plan(run / "plan.toml"), run / "cache")


def with_context(run: Path, cohort: Path, name: str, stage: int = 1) -> PreparedCase:
    plan, bare = read_plan(run / "plan.toml"), prepared(run, cohort, name)
    found = read_context(bare, run / "stages" / str(stage) / "contexts" / f"{name}.npy", plan)
    assert found is not None
    return found


@pytest.mark.parametrize(("stages", "folds", "steps"), [(2, 2, 36), (2, 3, 1000), (3, 2, 401), (4, 10, 44)])
def test_the_trainings_of_a_cascade_add_up_to_the_steps_of_its_recipe(stages: int, folds: int, steps: int) -> None:
    asked = recipe(generator__stages=stages, generator__inner_folds=folds, schedule__steps=steps)
    parts = list_parts(asked)
    assert len(parts) == (stages - 1) * (folds + 1) + 1
    assert sum(part.steps for part in parts) == steps and min(part.steps for part in parts) > 0
    assert [part.first for part in parts] == [sum(p.steps for p in parts[:n]) for n in range(len(parts))]
    assert len({part.steps for part in parts if part.stage < stages}) == 1  # inner networks like the one that ships
    assert steps / stages <= parts[-1].steps < steps / stages + (stages - 1) * (folds + 1) + 1
    assert [recipe_of(asked, part).schedule.steps for part in parts] == [part.steps for part in parts]
    one = make_recipe("A1", "tiny", QUICK)
    assert [part.steps for part in list_parts(one)] == [one.schedule.steps]


def test_every_optimiser_step_is_counted_and_progress_runs_over_all_stages(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descents: Counter[str] = Counter()
    told: list[tuple[int, int]] = []
    descend = Trainables.descend

    def counted(self: Trainables, name: str, loss: object, share: float) -> None:
        descents[name] += 1
        descend(self, name, loss, share)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainables, "descend", counted)
    asked = recipe("A1")
    train(toy_cohort, asked, tmp_path, say=silent, progress=lambda done, total, _: told.append((done, total)))
    assert told == [(step, 36) for step in range(1, 37)]
    schedules = [recipe_of(asked, part).schedule for part in list_parts(asked)]
    pauses = sum(
        schedule.ends["discriminators"] - schedule.ends["generator"] for schedule in schedules
    )  # the discriminators' turns
    assert descents == {"generator": 36 - pauses}


def test_no_context_of_a_training_case_comes_from_a_network_that_saw_its_subject(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each network was trained on, and what it then predicted, as they really happened; three stages."""
    trained: dict[int, set[str]] = {}
    asked_of: list[tuple[int, str]] = []
    shapes: dict[str, set[tuple[int, ...]]] = {}
    learn, predict_it = cascade.learn, cascade.predict_stage

    def watched_learn(recipe: object, plan: object, cases: LearningCases, *rest: object, **more: object) -> object:
        learner = learn(recipe, plan, cases, *rest, **more)  # type: ignore[arg-type]
        trained[id(learner.trainables.average)] = {case.subject for case in cases.training}
        kept.append(learner)
        shapes.setdefault("train", set()).update(case.source.shape[:1] for case in cases.training)
        return learner

    def watched_predict(generator: object, source: object, mask: object, **more: object) -> object:
        current.append((id(generator), np.asarray(source).copy()))
        return predict_it(generator, source, mask, **more)  # type: ignore[arg-type]

    def watched_write(case: PreparedCase, context: object, path: Path, plan: object) -> None:
        asked_of.append((current[-1][0], case.subject))
        write_context(case, context, path, plan)  # type: ignore[arg-type]

    kept: list[object] = []  # so that no id is used twice
    current: list[tuple[int, object]] = []
    monkeypatch.setattr(cascade, "learn", watched_learn)
    monkeypatch.setattr(cascade, "predict_stage", watched_predict)
    monkeypatch.setattr(cascade, "write_context", watched_write)
    train(toy_cohort, recipe("A1", generator__stages=3, schedule__steps=45), tmp_path, say=silent)
    split = read_json(tmp_path / "splits.json")
    assert len(trained) == 6  # of two stages, two inner networks and one that ships; the last stage's is the run's own
    # each case once a stage, no test case at all
    assert Counter(subject for _, subject in asked_of) == dict.fromkeys((*split["train"], *split["validation"]), 2)
    for network, subject in asked_of:
        assert subject not in trained[network]
    for subjects in trained.values():
        assert subjects <= set(split["train"])
    whole = [subjects for subjects in trained.values() if subjects == set(split["train"])]
    assert len(whole) == 2 and shapes["train"] == {(1,), (2,)}


def test_noise_in_the_targets_of_an_inner_fold_changes_the_contexts_of_the_other_folds_alone(
    toy_cohort: Path, cascaded: Path, tmp_path: Path
) -> None:
    split = read_json(cascaded / "splits.json")
    folds = assign_folds(dict.fromkeys(split["train"]), 2, 0)
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    spoilt = folds[0]
    rng = np.random.default_rng(0)
    for name in spoilt:
        save(data / name / f"{name}_t2.nii.gz", rng.normal(50, 9, (36, 40, 12)).astype(np.float32), affine())
    train(data, recipe(data__intensity=read_plan(cascaded / "plan.toml").target_kind), tmp_path / "run", say=silent)
    tables = [read_plan(run / "plan.toml").lookup for run in (cascaded, tmp_path / "run")]
    assert tables[0] != tables[1]  # which inner networks must not start from
    same = {
        name: np.array_equal(
            with_context(cascaded, toy_cohort, name).source[-1], with_context(tmp_path / "run", data, name).source[-1]
        )
        for name in (*split["train"], *split["validation"])
    }
    assert {name for name, equal in same.items() if equal} == set(spoilt)  # theirs come from networks without them


def test_test_cases_never_enter_a_cascade(toy_cohort: Path, cascaded: Path, tmp_path: Path) -> None:
    split = read_json(cascaded / "splits.json")
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    for seed, name in enumerate(split["test"]):
        noise = np.random.default_rng(seed).normal(50, 9, (36, 40, 12)).astype(np.float32)
        save(data / name / f"{name}_t2.nii.gz", noise, affine())
    train(data, recipe(), tmp_path / "run", say=silent)
    for name in ("weights.safetensors", "calibration.json"):
        assert (tmp_path / "run/model" / name).read_bytes() == (cascaded / "model" / name).read_bytes()
    contexts = {path.stem for path in (cascaded / "stages/1/contexts").glob("*.npy")}
    assert contexts == {*split["train"], *split["validation"]}


def test_one_model_folder_holds_all_stages_and_chains_them_over_a_whole_volume(
    toy_cohort: Path, cascaded: Path
) -> None:
    shipped = tuple(load_file(cascaded / "model" / "weights.safetensors"))
    assert {name.partition(".")[0] for name in shipped} == {"generator", "local", "stage1"}
    predictor = load(cascaded, precision="32-true")
    model, engine = predictor.model, predictor.engine
    assert len(model.earlier) == 1 and model.plan.context and model.recipe == read_recipe(cascaded / "recipe.toml")
    name = read_json(cascaded / "splits.json")["validation"][0]
    bare = prepared(cascaded, toy_cohort, name)
    source, mask = np.asarray(bare.source), np.asarray(bare.mask)
    first = predict_stage(model.earlier[0], source, mask, plan=read_plan(cascaded / "plan.toml"), engine=engine)
    np.testing.assert_allclose(with_context(cascaded, toy_cohort, name).source[-1], first, atol=1e-4)
    assert not first[~mask].any() and first[mask].std() > 0
    wanted = synthesise_prepared(
        Networks(model.generator, model.local_discriminator), np.concatenate([source, first[None]]), mask,
        plan=model.plan, conditional=True, error_scale=model.error_scale, engine=engine,
    )  # fmt: skip
    made = predictor.predict(next(toy_cohort.rglob(f"{name}_t1.nii.gz")))
    box = np.argwhere(made.mask.array).min(0) - np.argwhere(mask).min(0)
    i, j, k = (slice(start, start + size) for start, size in zip(box, mask.shape))
    raw = model.plan.target_reference.invert(wanted.prediction)
    np.testing.assert_allclose(made.image.array[i, j, k][mask], raw[mask], rtol=1e-5)
    blind = synthesise_prepared(
        Networks(model.generator, model.local_discriminator), np.concatenate([source, 0 * source]), mask,
        plan=model.plan, conditional=True, error_scale=model.error_scale, engine=engine,
    )  # fmt: skip
    assert np.abs(blind.prediction - wanted.prediction)[mask].max() > 1e-4  # the second stage does see the first


def test_the_expected_error_map_of_a_cascade_is_calibrated_and_baselines_agree_with_the_image(
    toy_cohort: Path, cascaded: Path
) -> None:
    predictor = load(cascaded, precision="32-true")
    made = predictor.predict(next(toy_cohort.rglob("*_t1.nii.gz")))
    assert made.expected_error is not None and made.expected_error.array[made.mask.array].std() > 0
    assert predictor.model.calibration is not None
    bare = prepared(cascaded, toy_cohort, read_json(cascaded / "splits.json")["validation"][0])
    source, mask = np.asarray(bare.source), np.asarray(bare.mask)
    learned = learned_score(predictor.model, source, mask, engine=predictor.engine)
    assert learned.passes == 3 and learned.score[mask].std() > 0
    assert augmentation_spread(predictor.model, source, mask, engine=predictor.engine).passes == 8 * 2


def test_a_cascade_never_reads_a_target_to_predict(toy_cohort: Path, cascaded: Path, tmp_path: Path) -> None:
    data = tmp_path / "no targets"
    shutil.copytree(toy_cohort, data)
    for kind in ("t2", "seg"):
        for path in data.rglob(f"*_{kind}.nii.gz"):
            path.unlink()
    predict(cascaded, [toy_cohort], tmp_path / "with")
    predict(cascaded, [data], tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with").glob("*.nii.gz"))
    assert names
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.parametrize("stop", [6, 14, 25])
def test_a_cascade_that_was_stopped_in_any_stage_ends_identical_to_the_bit(
    stop: int, toy_cohort: Path, cascaded: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(toy_cohort, recipe(), tmp_path, say=silent, progress=interrupt)
    assert not (tmp_path / "model").exists()
    train(toy_cohort, recipe(), tmp_path, say=silent)
    for name in ("model/weights.safetensors", "model/calibration.json", "model/plan.toml", "log.jsonl"):
        assert (tmp_path / name).read_bytes() == (cascaded / name).read_bytes()


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param("stages/1/without-0/checkpoints/*.toml", marks=pytest.mark.slow),
        "stages/1/contexts/*.npy",
        pytest.param("checkpoints/*.toml", marks=pytest.mark.slow),
    ],
)
def test_a_cascade_that_was_killed_goes_on_and_ends_identical_to_the_bit(
    sign: str, toy_cohort: Path, cascaded: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom chiasm.recipe import read_recipe\n"
        "from chiasm.training.run import train\ntorch.set_num_threads(1)\n"
        "data, recipe, out = map(Path, sys.argv[1:])\n"
        "train(data, read_recipe(recipe), out, say=lambda _: None)\n"
    )
    out = tmp_path / "run"
    killed = run_struck(program, [toy_cohort, cascaded / "recipe.toml", out], out / sign, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(out.glob(sign)) and not (out / "model").exists()
    train(toy_cohort, recipe(), out, say=silent)
    weights = "model/weights.safetensors"
    assert (out / weights).read_bytes() == (cascaded / weights).read_bytes()


def test_a_damaged_context_is_made_again(toy_cohort: Path, cascaded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(cascaded, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints")
    cut = sorted((out / "stages/1/contexts").glob("*.npy"))[0]
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    train(toy_cohort, recipe(), out, say=silent)
    assert cut.read_bytes() == whole
    weights = "model/weights.safetensors"
    assert (out / weights).read_bytes() == (cascaded / weights).read_bytes()


def test_a_context_lies_behind_sources_and_ranks_and_is_read_back_as_it_was(toy_cohort: Path, tmp_path: Path) -> None:
    asked = recipe("A14", generator__stages=2)
    done = plan_run(toy_cohort, asked, tmp_path / "run", say=silent)
    case = prepare_case(find_cohort(toy_cohort).cases[0], done.plan, tmp_path / "cache")
    context = np.random.default_rng(0).normal(size=case.mask.shape).astype(np.float32)
    assert read_context(case, tmp_path / "there.npy", done.plan) is None
    write_context(case, context, tmp_path / "there.npy", done.plan)
    found = read_context(case, tmp_path / "there.npy", done.plan)
    assert found is not None and found.source.shape[0] == 3 and found.intensities == case.intensities == 1
    np.testing.assert_array_equal(found.source[:2], case.source)
    np.testing.assert_array_equal(found.source[2], context)
    assert isinstance(found.source, np.memmap) or isinstance(found.source.base, np.memmap)
    other = np.zeros((3, 4, 4, 4), np.float32)
    np.save(tmp_path / "other.npy", other)
    assert read_context(case, tmp_path / "other.npy", done.plan) is None


def test_the_context_is_neither_jittered_nor_left_behind_when_a_patch_is_mirrored(
    toy_cohort: Path, cascaded: Path
) -> None:
    name = read_json(cascaded / "splits.json")["train"][0]
    case = with_context(cascaded, toy_cohort, name)
    centre = tuple(size // 2 for size in case.mask.shape)
    plain = Place(0, centre, False, (1.0,), (0.0,))  # type: ignore[arg-type]
    changed = Place(0, centre, True, (3.0,), (0.5,))  # type: ignore[arg-type]
    first, second = (take_batch([case], [place], patch=(32, 32), slices=3) for place in (plain, changed))
    assert first.source.shape[1] == 6
    np.testing.assert_array_equal(second.source[:, 3:].flip(2), first.source[:, 3:])
    assert not np.array_equal(second.source[:, :3].flip(2), first.source[:, :3])


def test_folds_of_subjects_are_disjoint_complete_and_spread_over_sites() -> None:
    sites = {f"s{n}": "ab"[n % 2] for n in range(12)}
    folds = assign_folds(sites, 3, 7)
    assert sorted(subject for fold in folds for subject in fold) == sorted(sites)
    assert [Counter(sites[subject] for subject in fold) for fold in folds] == [Counter(a=2, b=2)] * 3
    assert folds == assign_folds(dict(reversed(sites.items())), 3, 7) != assign_folds(sites, 3, 8)


def test_too_few_subjects_for_the_inner_folds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 4)
    with pytest.raises(CohortError, match=r"3 inner folds need at least 3 training subjects.*found 2") as caught:
        plan_run(data, recipe(generator__inner_folds=3, split__folds=4), tmp_path / "run", say=silent)
    assert caught.value.reason == "too-few-subjects" and "generator.stages=1" in str(caught.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_too_few_steps_for_the_trainings_are_refused() -> None:
    with pytest.raises(RecipeError, match="4 trainings and need at least 6 steps, not 5"):
        recipe(schedule__steps=5)
    assert recipe(schedule__steps=6).schedule.steps == 6


def test_a_cascade_in_a_study_shares_no_warm_up_and_one_by_name_has_two_stages(
    toy_cohort: Path, tmp_path: Path
) -> None:
    assert make_recipe("context-gan-2").generator.stages == 2
    one, two = (make_recipe(name).model_dump() for name in ("context-gan", "context-gan-2"))
    two["generator"]["stages"], two["method"] = 1, "context-gan"
    assert one == two
    study = Study(data=toy_cohort, source=("t1",), target="t2", arms=("context-gan", "context-gan-2"), folds=2)
    branches = {job.recipe.method: job.warm for job in list_jobs(study, tmp_path, find_cases(study, tmp_path))}
    assert branches["context-gan"] is not None and branches["context-gan-2"] is None
    with pytest.raises(ValueError, match="no warm-up"):
        train(toy_cohort, recipe(), tmp_path / "run", say=silent, until=3)


@pytest.mark.parametrize("network", ["unet", "context-fcn", "toy_networks:Plain"])
def test_stages_work_with_any_generator(network: str, toy_cohort: Path, tmp_path: Path) -> None:
    literature = {"generator__network": network, "data__patch": "auto", "generator__scale": 1 / 16}
    train(toy_cohort, recipe("A1", schedule__steps=12, training__validations=1, **literature), tmp_path, say=silent)
    made = load(tmp_path, trust=network).predict(next(toy_cohort.rglob("*_t1.nii.gz")))
    assert np.isfinite(made.image.array).all() and made.image.array.std() > 0
