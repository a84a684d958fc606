"""Several models that share the subjects of a cohort, each subject scored by the model that never saw it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.cohorts.cases import Case
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import Split, choose_models, make_part
from chiasm.commands.options import ReadingOptions, RecipeOptions
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.evaluation.rows import read_evaluation
from chiasm.methods import make_recipe
from chiasm.prediction.calibration import apply_calibration, fit_calibration, mean_calibration, read_calibration
from chiasm.prediction.cross_fitted import predict_by_role
from chiasm.prediction.folders import load
from chiasm.prediction.manifest import read_manifest
from chiasm.prediction.model_files import check_files, find_model
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.recipe import Recipe, read_recipe
from chiasm.reports.evaluation import evaluate
from chiasm.reports.explanation import explain
from chiasm.reports.model_cards import describe_models
from chiasm.training.cross_fitting import plan_first, train
from chiasm.training.finetuning import finetune
from chiasm.training.run_planning import resolve_models
from conftest import QUICK
from synthetic_cohort import write_brats


def recipe(**settings: object) -> Recipe:
    changes = {**QUICK, "split.folds": "auto", "split.models": 2, "training.validations": 1, **settings}
    return make_recipe("l2-expected-error", "tiny", changes)


@pytest.fixture(scope="module")
def trained(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    said: list[str] = []
    train(toy_cohort, recipe(), folder, say=said.append, announce=lambda _: said.append("announced"))
    (folder.parent / "said.txt").write_text("\n".join(said))
    return folder


def split_of(run: Path, number: int) -> Split:
    content = json.loads((run / "models" / str(number) / "splits.json").read_text())
    return Split(*(tuple(content[role]) for role in ("train", "validation", "test")))


def subjects(count: int, role: str | None = None) -> list[Case]:
    return [Case(f"p{n}", f"p{n}", {"t1": Path("x")}, site="ab"[n % 2], split=role) for n in range(count)]


@pytest.mark.parametrize("models", [1, 2])
def test_a_training_that_is_stopped_while_it_plans_leaves_a_folder_that_it_takes_again(
    models: int, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chiasm.training.run.plan_cases", stop)
    for _ in range(2):  # the second call refused the first one's folder
        with pytest.raises(KeyboardInterrupt):
            train(toy_cohort, recipe(**{"split.models": models}), tmp_path / "run", say=lambda _: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("models", [1, 3])
def test_a_training_that_is_refused_leaves_no_folder(models: int, tmp_path: Path) -> None:
    data = write_brats(tmp_path / "cohort", 3)
    for target in data.glob("*/*_t2.nii.gz"):
        target.write_bytes(target.read_bytes()[:500])
    with pytest.raises(CohortError, match="none of its 3 cases can be used"):
        train(data, recipe(**{"split.models": models}), tmp_path / "runs" / "out", say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_each_subject_validates_one_model_and_trains_all_others() -> None:
    parts = [make_part(subjects(7), models=3, part=part, seed=0) for part in range(3)]
    assert sorted(name for part in parts for name in part.validation) == [f"p{n}" for n in range(7)]
    for part in parts:
        assert sorted((*part.train, *part.validation)) == [f"p{n}" for n in range(7)]
        assert part.test == part.locked == ()
    kept = [make_part(subjects(7), models=3, part=part, seed=0, locked=0.15).locked for part in range(3)]
    assert len(kept[0]) == 1 and kept[0] == kept[1] == kept[2]


def test_few_subjects_share_three_models_unless_their_roles_are_fixed() -> None:
    assert [choose_models("auto", subjects(count)) for count in (2, 3, 9, 10)] == [1, 3, 3, 1]
    assert choose_models("auto", subjects(6, "train")) == 1
    assert choose_models(5, subjects(30)) == 5


@pytest.mark.parametrize(
    ("cases", "told"),
    [(subjects(2), "3 models need at least 3 subjects"), (subjects(6, "train"), "roles that are fixed")],
)
def test_a_cohort_that_several_models_cannot_share_is_refused(cases: list[Case], told: str) -> None:
    with pytest.raises(CohortError, match=told):
        make_part(cases, models=3, part=0, seed=0)


def test_several_models_take_no_folds_of_their_own() -> None:
    with pytest.raises(RecipeError, match="several models share the subjects"):
        recipe(**{"split.folds": 3})


def test_the_models_are_three_by_default_where_weights_that_ship_fit(toy_cohort: Path, tmp_path: Path) -> None:
    def number(size: str, *settings: str, **options: Any) -> object:
        asked = RecipeOptions(["t1"], "t2", size=size, settings=list(settings), **options)
        recipe = asked.recipe(ReadingOptions(), Selection())
        return resolve_models(toy_cohort, recipe, tmp_path)[0].split.models

    assert number("small") == 3
    assert number("tiny") == number("small", "generator.widths=[8, 16]") == 1
    assert number("small", folds="3") == number("small", fold=1) == number("small", "split.validation=0") == 1
    assert number("tiny", models="2") == 2


def test_folds_by_site_are_asked_for_as_in_a_study() -> None:
    one = RecipeOptions(["t1"], "t2", folds="site", fold=1).recipe(ReadingOptions(), Selection()).split
    assert (one.by, one.folds, one.fold, one.models) == ("site", "auto", 1, 1)
    with pytest.raises(RecipeError, match="folds"):
        RecipeOptions(["t1"], "t2", folds="sites").recipe(ReadingOptions(), Selection())


def test_a_plan_of_several_models_names_their_planes_and_is_gone_on_with(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiasm.training.cross_fitting.EVEN", 4)  # these voxels are three times as long as wide
    asked = recipe(**{"data.patch": 16})
    said: list[str] = []
    part, run = plan_first(toy_cohort, asked, tmp_path / "run", say=said.append)
    assert (part.schedule.steps, len(run.split.train), len(run.split.validation)) == (12, 3, 3)
    assert any("2 models share the subjects" in line for line in said)
    assert said[-1].startswith("each model sees slices of another plane")
    plan = (tmp_path / "run" / "models" / "1" / "plan.toml").read_bytes()
    train(toy_cohort, asked, tmp_path / "run", say=said.append)
    assert (tmp_path / "run" / "models" / "1" / "plan.toml").read_bytes() == plan


def test_the_mean_of_calibrations_is_their_mean_at_every_score() -> None:
    rng = np.random.default_rng(0)
    fitted = [
        fit_calibration(score := rng.random(4000), factor * score + rng.random(4000), fitted_on=[name])
        for factor, name in ((1, "a"), (3, "b"))
    ]
    mean, scores = mean_calibration(fitted), np.linspace(-1, 2, 301)
    expected = sum(apply_calibration(one, scores).astype(float) for one in fitted) / 2
    np.testing.assert_allclose(apply_calibration(mean, scores), expected, atol=1e-6)
    assert (mean.fitted_on, mean.voxels) == (("a", "b"), 8000)


def test_the_models_share_the_steps_and_no_case_is_scored_with_a_calibration_of_its_own(trained: Path) -> None:
    splits = {number: split_of(trained, number) for number in (1, 2)}
    assert {*splits[1].train} == {*splits[2].validation} and {*splits[2].train} == {*splits[1].validation}
    for number, other in ((1, 2), (2, 1)):
        run = trained / "models" / str(number)
        assert read_recipe(run / "recipe.toml").schedule.steps == 12  # of 24 in all
        calibration = read_calibration(run / "model" / "calibration.json")
        assert {*calibration.fitted_on} == {*splits[other].validation}
        check_files(run / "model")


def test_the_same_command_finds_them_finished_and_another_one_is_refused(trained: Path, toy_cohort: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    said: list[str] = []
    train(toy_cohort, recipe(), trained, say=said.append)
    assert sum(line.startswith("finished already") for line in said) == 2
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(RunError, match=r"split\.models was 2 and is 3"):
        train(toy_cohort, recipe(**{"split.models": 3}), trained, say=said.append)


def test_a_kill_between_two_exchanges_is_made_good(trained: Path, toy_cohort: Path, tmp_path: Path) -> None:
    from chiasm.prediction.model import replace_calibration

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    model = copy / "models" / "1" / "model"
    wanted = read_calibration(model / "calibration.json")
    own = json.loads((copy / "calibrations.json").read_text())["1"]
    replace_calibration(
        model,
        replace(
            wanted,
            **{name: own[name] for name in ("voxels", "spearman")},
            **{name: tuple(own[name]) for name in ("x", "y", "fitted_on")},
        ),
    )
    assert read_calibration(model / "calibration.json") != wanted
    train(toy_cohort, recipe(), copy, say=lambda _: None)
    assert read_calibration(model / "calibration.json") == wanted


def test_the_whole_is_announced_once_before_the_first_model_begins(trained: Path) -> None:
    said = (trained.parent / "said.txt").read_text().splitlines()
    first = said.index("announced")
    assert said[first + 1].startswith("model 1 of 2") and sum(line.startswith("model 1 of 2") for line in said) == 1
    assert any(line.startswith("model 2 of 2") for line in said[first + 2 :])
    assert sum(line.startswith("6 cases with t1 and t2") for line in said) == 1
    assert sum(line.startswith("l2-expected-error (A17)") for line in said) == 2


def test_each_case_gets_the_image_of_the_model_that_did_not_learn_from_it(
    trained: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is the folder of the data"):
        predict_by_role([trained], [toy_cohort], toy_cohort, only="test")
    made = predict_by_role([trained], [toy_cohort], tmp_path / "predictions", only="test")
    for number, one in enumerate(made, 1):
        entries = read_manifest(one.folder).cases
        assert {entry.case for entry in entries} == {*split_of(trained, number).validation}
        assert {entry.role for entry in entries} == {"out-of-fold"}
    scored = evaluate(tmp_path / "predictions", toy_cohort, tmp_path / "evaluation")
    rows = [row for row in read_evaluation(tmp_path / "evaluation") if (row.region, row.metric) == ("mask", "mae")]
    every = sorted(case.id for case in find_cohort(toy_cohort).cases)
    assert sorted(row.case for row in rows if row.method == "A17") == every
    assert sorted(row.case for row in rows if row.method == "lookup") == every
    assert not any("learnt from" in line or "trained on" in line for line in scored.headlines)
    sheet = (tmp_path / "evaluation" / "report.html").read_text()
    assert "<dt>split.fold</dt><dd>0 / 1</dd>" in sheet  # of each model, not of the first alone
    said = words(tmp_path / "evaluation")
    assert "model 1 of 2" in said and "discriminator ended" not in said and "attention" not in said
    assert "Model 1: The error on validation cases" in said and "Model 2: The error on validation cases" in said


def test_a_new_scan_gets_the_mean_of_all_models(trained: Path, toy_cohort: Path, tmp_path: Path) -> None:
    scan = tmp_path / "new.nii.gz"
    scan.write_bytes(find_cohort(toy_cohort).cases[0].images["t1"].read_bytes())
    (made,) = predict_by_role([trained], [scan], tmp_path / "predictions")
    (entry,) = made.manifest.cases
    assert [Path(one.model).parent.name for one in made.manifest.models] == ["1", "2"]
    assert entry.role == "new" and entry.spread is not None and entry.expected_error is not None
    assert len(load(trained).models) == 2


def words(place: Path) -> str:
    return "\n".join(sentence for part in explain(place) for sentence in part.sentences)


def test_explanation_and_card_name_what_each_model_sees(trained: Path, toy_cohort: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    second = run / "models" / "2"
    for plan in (second / "plan.toml", second / "model" / "plan.toml"):
        was = read_plan(plan)
        write_plan(plan, replace(was, plane="coronal", body_mm=((1.0, 1.0, 1.0), was.body_mm[1])))
    said, card = words(run), describe_models([run]).cards[0].facts
    assert "axial and coronal, in the order of the models" in said
    assert "Model 2 (coronal): The error on validation cases" in said and "Model 1 (axial): The reconstruction" in said
    assert card["models"] == "2; slices: axial and coronal, in the order of the models"
    assert card["limits"].startswith("model 1: voxels") and "; model 2: voxels" in card["limits"]
    assert [len(one) for one in card["sha256 of the model"].split(", ")] == [64, 64]
    assert "axial" not in words(run / "models" / "1") and "Model" not in words(run / "models" / "1")
    shutil.rmtree(second / "model")
    assert "Model 2 (coronal): The training stopped after step 12 of 12" in words(run)
    shutil.rmtree(second)
    assert "Model 2 of 2 has not begun" in words(run)


def test_a_command_for_one_model_names_them(trained: Path, toy_cohort: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", "is a run of 2 models, of which this command takes one.*models/1"
    with pytest.raises(RunError, match=told):
        find_model(trained)
    with pytest.raises(RunError, match=rf"{told}.*models/2\. Then chiasm predict {out}/1 {out}/2 SCANS"):
        finetune(trained, toy_cohort, out)
    assert not (tmp_path / "out").exists()


def test_cases_out_of_fold_are_of_one_run_of_several_models(
    finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no case is out of a fold"):
        predict_by_role([finished_run], [toy_cohort], tmp_path, only="out-of-fold")
