"""A model that goes on learning elsewhere: what it begins with, what it keeps, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import chiasm
from chiasm.checksums import sha256_of
from chiasm.cli import main
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.prediction.model import load_model
from chiasm.prediction.model_files import read_card
from chiasm.preparation.intensity import fit_intensity
from chiasm.preparation.plan import read_plan
from chiasm.preparation.planning import OF_COHORT
from chiasm.recipe import read_recipe
from chiasm.storage import read_json, read_log
from chiasm.training.finetuning import finetune, recipe_of_child
from chiasm.volumes import read_volume
from synthetic_cohort import affine, pair, save

ALONE = {"split.folds": 3, "training.precision": "32-true"}


def other_cohort(folder: Path, count: int = 4) -> Path:
    """Patients of another scanner: their T2 rises where that of the toy cohort falls, in other units."""
    for seed in range(20, 20 + count):
        source, target, labels = pair(seed)
        other = np.where(target > 0, 40 * (450 - target), 0).astype(np.float32)
        place = folder / f"Other_{seed:04d}"
        for kind, array in {"t1": source, "t2": other, "seg": labels}.items():
            save(place / f"{place.name}_{kind}.nii.gz", array, affine())
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_cohort(tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def child(finished_run: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("child") / "run", list[str]()
    changes = {**ALONE, "schedule.steps": 40, "optimiser.generator_rate": 3e-3, "training.validations": 2}
    finetune(finished_run, others, folder, changes=changes, say=said.append)
    return folder, said


def validations(run: Path) -> list[dict[str, float]]:
    return [line for line in read_log(run / "log.jsonl")[0] if line["kind"] == "validation"]


def parents_error(parent: Path, child: Path, cohort: Path) -> float:
    """Mean absolute error of what the parent predicts of the child's validation cases, normalised case by case."""
    predictor = chiasm.load(parent, accelerator="cpu", precision="32-true", engine="torch")
    plan, errors = predictor.model.plan, []
    cases = {case.id: case for case in find_cohort(cohort).cases}
    for name in read_json(child / "splits.json")["validation"]:
        found = predictor.predict(cases[name].images["t1"])
        inside, real = found.mask.array > 0, read_volume(cases[name].images["t2"]).array
        normalised = fit_intensity(real, inside, plan.target_kind).apply(real[inside])
        errors.append(np.abs(plan.target_reference.apply(found.image.array[inside]) - normalised).mean())
    return float(np.mean(errors))


def test_the_first_validation_is_the_parents_own_score_and_the_last_one_is_better(
    child: tuple[Path, list[str]], finished_run: Path, others: Path
) -> None:
    first, *_, last = validations(child[0])
    assert first["step"] == 0
    assert first["mae"] == pytest.approx(parents_error(finished_run, child[0], others), rel=1e-4)
    assert last["mae"] < 0.95 * first["mae"]


def test_the_card_names_the_parent_and_the_plan_says_what_holds(
    child: tuple[Path, list[str]], finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = child
    digest = sha256_of(finished_run / "model" / "model.toml")
    assert read_card(folder / "model").parent == digest == read_recipe(folder / "recipe.toml").training.parent
    assert any(digest in line for line in said) and any("the target's unit" in line for line in said)
    before, after = (read_plan(run / "plan.toml") for run in (finished_run, folder))
    for name in ("spacing_mm", "patch", "source_kinds", "target_kind", "lookup", "input_mean", "input_sd", "target_sd"):
        assert getattr(after, name) == getattr(before, name)
    assert after.target_reference != before.target_reference and after.target_range[1] > 10 * before.target_range[1]
    assert (
        set(after.trained_on) == set(read_json(folder / "splits.json")["train"]) and "parent" in after.reasons["patch"]
    )
    assert {"target_reference", "source_ranges"} < set(OF_COHORT)
    with pytest.raises(SystemExit):
        main(["models", str(folder)])
    assert digest in "".join(capsys.readouterr())


def test_the_same_command_again_ends_at_once_and_another_parent_is_refused(
    child: tuple[Path, list[str]], finished_run: Path, others: Path
) -> None:
    said: list[str] = []
    changes = {**ALONE, "schedule.steps": 40, "optimiser.generator_rate": 3e-3, "training.validations": 2}
    finetune(finished_run, others, child[0], changes=changes, say=said.append)
    assert any("finished already" in line for line in said)
    with pytest.raises(RunError, match=r"training\.parent was"):
        finetune(child[0], others, child[0], changes={**changes, "optimiser.discriminator_rate": 1e-3})


def test_cases_that_the_parent_learnt_from_are_named(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    said: list[str] = []
    finetune(
        finished_run,
        toy_cohort,
        tmp_path / "run",
        changes={**ALONE, "split.fold": 1, "schedule.steps": 2},
        say=said.append,
    )
    assert any("the parent has learnt from" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["data.target=flair"], r"data\.target cannot change"),
        (["data.dims=3d"], r"data\.dims cannot change"),
        (["generator.widths=[8,16]"], r"generator\.widths cannot change"),
        (["loss.nrm=l1"], "Did you mean norm"),
    ],
)
def test_what_the_weights_do_not_fit_is_refused_before_anything_is_written(
    settings: list[str], told: str, finished_run: Path, others: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        finetune(finished_run, others, tmp_path / "run", settings=settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_folds_of_a_child_suit_its_own_subjects(finished_run: Path) -> None:
    parent = load_model(finished_run)
    child = recipe_of_child(parent, finished_run, {}, [])
    assert child.split.folds == "auto" != parent.recipe.split.folds


def test_a_cohort_without_the_models_modalities_is_refused(finished_run: Path, tmp_path: Path) -> None:
    data = other_cohort(tmp_path / "data", 3)
    for path in data.rglob("*_t2.nii.gz"):
        path.unlink()
    with pytest.raises(CohortError, match="no case has the modality 't2'"):
        finetune(finished_run, data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_training_alone_cannot_claim_a_parent(finished_run: Path, others: Path, tmp_path: Path) -> None:
    recipe = read_recipe(finished_run / "recipe.toml")
    training = recipe.training.model_copy(update={"parent": load_model(finished_run).sha256})
    with pytest.raises(RunError, match="chiasm finetune"):
        chiasm.train(others, recipe.model_copy(update={"training": training}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
