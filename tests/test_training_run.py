"""A run from the outside: what it leaves behind, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from chiasm.checksums import sha256_of
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.methods import METHODS, make_recipe
from chiasm.networks.catalogue import GENERATORS
from chiasm.prediction.folders import load, predict
from chiasm.prediction.passes import networks_of, synthesise_prepared
from chiasm.preparation.arrays import prepare_case
from chiasm.preparation.plan import read_plan
from chiasm.recipe import Recipe
from chiasm.storage import read_json, read_toml
from chiasm.training import cost, pretrained
from chiasm.training import run as training_run
from chiasm.training.finished import Run
from chiasm.training.loop import Interrupted
from chiasm.training.run import describe, train
from chiasm.training.run_planning import plan_run
from chiasm.training.trainables import Trainables
from chiasm.volumes import read_volume
from conftest import QUICK
from struck import run_struck
from synthetic_cohort import affine, save, write_brats


def recipe(method: str = "A7", **changes: object) -> Recipe:
    return make_recipe(method, "tiny", {**QUICK, **{name.replace("__", "."): v for name, v in changes.items()}})


def run(data: Path, folder: Path, asked: Recipe | None = None, **options: object) -> Run:
    return train(data, asked or recipe(), folder, **{"say": lambda _: None, **options})  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_folder_explains_itself(finished_run: Path) -> None:
    wanted = {"recipe.toml", "plan.toml", "splits.json", "environment.json", "log.jsonl", "checkpoints", "model"}
    assert wanted <= {path.name for path in finished_run.iterdir()}
    card = read_toml(finished_run / "model" / "model.toml")
    assert {"weights.safetensors", "recipe.toml", "plan.toml", "calibration.json", "baselines.json"} <= set(
        card["sha256"]
    )
    for name, told in card["sha256"].items():
        assert sha256_of(finished_run / "model" / name) == told
    split = read_json(finished_run / "splits.json")
    assert not set(split["train"]) & set(split["test"]) and not set(split["train"]) & set(split["validation"])
    assert read_toml(finished_run / "plan.toml")["trained_on"] == split["train"]


def test_the_log_tells_steps_validations_and_the_health_of_both_discriminators(finished_run: Path) -> None:
    content = lines(finished_run)
    validations = [line for line in content if line["kind"] == "validation"]
    assert validations[-1]["step"] == 24
    wanted = {"mae", "lesion_mae", "spearman", "auroc_worst", "accuracy_local", "accuracy_global", "gate_closed_share"}
    assert wanted <= set(validations[-1])
    steps = [line for line in content if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert (
        "reconstruction" in steps[0] and "local_discriminator_loss" not in steps[0]
    )  # the generator is alone at first
    assert "local_discriminator_loss" in steps[-1] and "adversarial" in steps[-1]


@pytest.mark.parametrize("stop", [5, 13, 22])
def test_a_run_that_was_stopped_ends_identical_to_the_bit(
    stop: int, toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run(toy_cohort, tmp_path, progress=interrupt)
    assert caught.value.exit_code == 143 and not (tmp_path / "model").exists()
    assert "stopped by SIGTERM; a checkpoint was written" in str(caught.value)
    run(toy_cohort, tmp_path)
    for name in ("weights.safetensors", "calibration.json", "plan.toml"):
        assert (tmp_path / "model" / name).read_bytes() == (finished_run / "model" / name).read_bytes()
    assert (tmp_path / "log.jsonl").read_bytes() == (finished_run / "log.jsonl").read_bytes()


def test_the_cost_is_forecast_once_for_a_new_run_and_again_where_it_is_resumed(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def interrupt(done: int, total: int, figures: Mapping[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def counted(*given: object) -> object:
        made.append("forecast")
        return estimate_cost(*given)  # type: ignore[arg-type]

    estimate_cost = cost.estimate_cost
    for module in (cost, training_run):
        monkeypatch.setattr(module, "estimate_cost", counted)
    asked = recipe("A1", training__pretrained="auto")
    said: list[str] = []
    with pytest.raises(Interrupted):
        run(toy_cohort, tmp_path, asked, progress=interrupt, say=said.append)
    assert len(made) == 1 and "start: random weights: those that ship are for another network" in said
    shipped_since = pretrained.Pretrained("new", "new weights")
    monkeypatch.setattr(training_run, "find_pretrained", lambda *_: shipped_since)
    said.clear()
    with pytest.raises(Interrupted):
        run(toy_cohort, tmp_path, asked, progress=interrupt, say=said.append)
    assert len(made) == 2 and any("24 steps" in line and "GB" in line for line in said)
    assert "new weights" not in f"{said} {(tmp_path / 'environment.json').read_text()}"  # it goes on with its own


def test_a_killed_run_goes_on_and_ends_identical_to_the_bit(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom chiasm.recipe import read_recipe\n"
        "from chiasm.training.run import train\ntorch.set_num_threads(1)\n"
        "data, recipe, out = map(Path, sys.argv[1:])\n"
        "train(data, read_recipe(recipe), out, say=lambda _: None)\n"
    )
    words, sign = [toy_cohort, finished_run / "recipe.toml", tmp_path / "run"], tmp_path / "run/checkpoints/*.toml"
    killed = run_struck(program, words, sign, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "model").exists()
    run(toy_cohort, tmp_path / "run")
    weights = "model/weights.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "model")
    newest = sorted((folder / "checkpoints").glob("*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said: list[str] = []
    run(toy_cohort, folder, say=said.append)
    assert any(newest.name in line and "damaged" in line for line in said)
    weights = "model/weights.safetensors"
    assert (folder / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_the_same_command_on_a_finished_run_changes_nothing(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    before = {path: path.read_bytes() for path in sorted((folder / "model").iterdir())}
    run(toy_cohort, folder)
    assert {path: path.read_bytes() for path in sorted((folder / "model").iterdir())} == before


def test_another_recipe_in_the_same_folder_is_refused_by_name(toy_cohort: Path, finished_run: Path) -> None:
    with pytest.raises(RunError, match=r"loss\.norm was 'l2' and is 'l1'") as caught:
        run(toy_cohort, finished_run, recipe(loss__norm="l1"))
    assert caught.value.reason == "other-recipe"


def test_a_bad_case_is_named_and_left_out(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 7)
    bad = data / "Toy_0003" / "Toy_0003_t1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:200])
    said: list[str] = []
    done = run(data, tmp_path / "run", say=said.append)
    assert {problem.case for problem in done.problems} == {"Toy_0003"}
    assert any("Toy_0003" in line for line in said)
    split = read_json(tmp_path / "run" / "splits.json")
    assert "Toy_0003" not in {*split["train"], *split["validation"], *split["test"]}


def test_the_same_voxels_under_two_subjects_are_refused(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 4)
    for kind in ("t1", "t2"):
        shutil.copy(data / f"Toy_0001/Toy_0001_{kind}.nii.gz", data / f"Toy_0002/Toy_0002_{kind}.nii.gz")
    with pytest.raises(CohortError, match="Toy_0001") as caught:
        plan_run(data, recipe(), tmp_path / "run", say=lambda _: None)
    assert caught.value.reason == "duplicate-voxels"


def test_a_target_that_is_not_a_number_in_training_stops_with_step_and_case(toy_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"at step \d+ \(cases Toy_") as caught:
        run(toy_cohort, tmp_path, recipe("A4", loss__penalty=1e6, optimiser__discriminator_rate=1e6))
    assert caught.value.reason == "not-finite"


@pytest.mark.parametrize("times", [1, 2])  # how often it goes wrong
def test_a_weight_that_is_not_a_number_is_found_before_a_checkpoint(
    times: int, toy_cohort: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss says nothing of the last update: one that came once is done again, one that stays is named."""
    plain, left = Trainables.move_average, [times]

    def spoiled(self: Trainables, name: str, age: int) -> None:
        plain(self, name, age)
        if left[0] and age == recipe().schedule.steps - 1:
            left[0] -= 1
            next(iter(self.average.parameters())).fill_(float("nan"))

    monkeypatch.setattr(Trainables, "move_average", spoiled)
    said: list[str] = []
    if times == 1:
        run(toy_cohort, tmp_path, say=said.append)
        weights = "model/weights.safetensors"
        assert (tmp_path / weights).read_bytes() == (finished_run / weights).read_bytes()
    else:
        with pytest.raises(RunError, match=r"a weight of average is not a finite number at step \d+ \(cases Toy_"):
            run(toy_cohort, tmp_path, say=said.append)
    assert any("are done again" in line for line in said)


def test_training_depends_on_training_cases_alone(tmp_path: Path) -> None:
    """Test targets replaced by noise: plan and weights stay the same to the byte."""
    made = []
    for name in ("as they are", "noise"):
        data = write_brats(tmp_path / name, 6)
        out = tmp_path / f"run {name}"
        if name == "noise":
            for seed, case in enumerate(read_json(tmp_path / "run as they are" / "splits.json")["test"]):
                noise = np.random.default_rng(seed).normal(50, 9, (36, 40, 12)).astype(np.float32)
                save(data / case / f"{case}_t2.nii.gz", noise, affine())
        run(data, out)
        made.append([(out / "model" / file).read_bytes() for file in ("weights.safetensors", "calibration.json")])
        made[-1].append(str(read_toml(out / "plan.toml") | {"expected": None}).encode())
    assert made[0] == made[1]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_arm_trains_and_ships_a_model(method: str, toy_cohort: Path, tmp_path: Path) -> None:
    literature = {"data__patch": "auto", "generator__scale": 1 / 16, "discriminators__scale": 1 / 16}
    own = {} if make_recipe(method).generator.network == "chiasm" else literature
    run(toy_cohort, tmp_path, recipe(method, schedule__steps=12, training__validations=1, **own))
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses and np.isfinite(losses).all()  # type: ignore[arg-type]
    assert (tmp_path / "model" / "model.toml").exists()


#: Every network in one of its forms, the U-Net in all three; those that need 256 voxels stay flat.
FORMS = [
    *(
        (name, "2d" if name in ("han", "fcn8") else "3d" if name in ("fcn3d", "li-cnn") else "2.5d")
        for name in GENERATORS
    ),
    *(("unet", "2d"), ("unet", "3d"), ("srcnn", "3d"), ("toy_networks:Plain", "2.5d")),
]


@pytest.mark.parametrize(("network", "dims"), FORMS)
def test_a_network_of_the_literature_or_ones_own_predicts_whole_volumes(
    network: str, dims: str, toy_cohort: Path, tmp_path: Path
) -> None:
    changes = {"generator__network": network, "data__patch": "auto", "generator__scale": 1 / 16}
    asked = recipe("A7", schedule__steps=8, training__validations=1, data__dims=dims, **changes)
    done = run(toy_cohort, tmp_path, asked)
    assert (done.plan.dims, done.plan.slices) == {"2d": (2, 1), "2.5d": (2, 3), "3d": (3, 1)}[dims]
    source = read_volume(next(toy_cohort.rglob("*_t1.nii.gz")))
    made = load(tmp_path, trust=network).predict(next(toy_cohort.rglob("*_t1.nii.gz")))
    assert np.array_equal(made.image.geometry.affine, source.geometry.affine) and np.isfinite(made.image.array).all()
    assert made.expected_error is not None and made.image.array.std() > 0


@pytest.mark.parametrize("dims", ["2d", "2.5d", "3d"])
def test_one_switch_chooses_2d_25d_and_3d(dims: str, tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 4, shape=(36, 40, 32))
    done = run(data, tmp_path / "run", recipe(data__dims=dims, schedule__steps=12, split__folds=4))
    assert (done.plan.dims, done.plan.slices) == {"2d": (2, 1), "2.5d": (2, 3), "3d": (3, 1)}[dims]


def test_a_plan_is_told_with_its_reasons(toy_cohort: Path, tmp_path: Path) -> None:
    asked = recipe()
    done = plan_run(toy_cohort, asked, tmp_path, say=lambda _: None)
    told = "\n".join(describe(asked, done.plan))
    for word in ("spacing_mm", "patch", "source_kinds", "mask_rule", "GB"):
        assert word in told
    assert (tmp_path / "plan.toml").exists() and not (tmp_path / "checkpoints").exists()


def test_training_learns(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 6)
    asked = recipe("A1", schedule__steps=150, generator__skip="none", optimiser__generator_rate=5e-3)
    run(data, tmp_path / "run", asked)
    losses = [float(str(line["loss"])) for line in lines(tmp_path / "run") if "loss" in line]
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])


def test_an_arm_that_branches_from_a_shared_warm_up_equals_one_of_its_own_to_the_bit(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    alone = round(0.4 * 24)
    run(toy_cohort, tmp_path / "warm", recipe("A1"), until=alone)
    assert not (tmp_path / "warm" / "model").exists()
    run(toy_cohort, tmp_path / "arm", start=tmp_path / "warm")
    weights = "model/weights.safetensors"
    assert (tmp_path / "arm" / weights).read_bytes() == (finished_run / weights).read_bytes()
    assert min(int(str(line["step"])) for line in lines(tmp_path / "arm")) > alone


def test_a_warm_up_that_is_none_is_refused(toy_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no warm-up"):
        run(toy_cohort, tmp_path / "arm", start=tmp_path / "nothing")


#: Arms that change what is shown, what is drawn or what is made; gate open and lesions often, so that they do.
WIDENED = {"attention__gate": False, "training__lesion_share": 0.5, "training__precision": "32-true"}


@pytest.fixture(scope="module")
def widened(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("widened")
    for method in ("A7", "A14", "A15", "A16"):
        run(toy_cohort, folder / method, recipe(method, **WIDENED))
    return {method: folder / method for method in ("A7", "A14", "A15", "A16")}


@pytest.mark.parametrize("method", ["A14", "A15", "A16"])
@pytest.mark.parametrize("stop", [7, 20])
def test_a_widened_arm_that_was_stopped_ends_identical_to_the_bit(
    method: str, stop: int, widened: dict[str, Path], toy_cohort: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, figures: Mapping[str, float]) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(toy_cohort, tmp_path, recipe(method, **WIDENED), progress=interrupt)
    run(toy_cohort, tmp_path, recipe(method, **WIDENED))
    for name in ("model/weights.safetensors", "model/calibration.json", "model/plan.toml", "log.jsonl"):
        assert (tmp_path / name).read_bytes() == (widened[method] / name).read_bytes()
    newest = sorted((tmp_path / "checkpoints").glob("*.toml"))[-1]
    assert read_toml(newest)["state"] == read_toml(widened[method] / "checkpoints" / newest.name)["state"]


def test_each_widened_arm_does_what_it_is_for(widened: dict[str, Path]) -> None:
    plans = {method: read_plan(folder / "plan.toml") for method, folder in widened.items()}
    assert [plan.histogram for plan in plans.values()] == [False, True, False, False]
    validations = [line for line in lines(widened["A15"]) if line["kind"] == "validation"]
    assert validations[0]["first_mae"] == validations[0]["mae"]  # before all play it corrects nothing
    assert validations[-1]["first_mae"] != validations[-1]["mae"]
    cards = sorted((widened["A16"] / "checkpoints").glob("*.toml"))
    difficulties = [read_toml(card)["state"]["lesion_difficulty"] for card in cards]
    assert difficulties[-1] and all(0 < difficulty < 1 for difficulty in difficulties[-1].values())
    assert set(difficulties[-1]) <= set(read_json(widened["A16"] / "splits.json")["train"])


@pytest.mark.parametrize("method", ["A14", "A15", "A16"])
def test_users_predict_with_a_widened_arm_what_its_validation_saw(
    method: str, widened: dict[str, Path], toy_cohort: Path, tmp_path: Path
) -> None:
    """From the file on the one hand, from the training's cache on the other; frozen networks round differently."""
    predictor = load(widened[method], precision="32-true")
    model, plan = predictor.model, predictor.model.plan
    name = read_json(widened[method] / "splits.json")["validation"][0]
    case = next(case for case in find_cohort(toy_cohort).cases if case.id == name)
    kept = prepare_case(case, plan, widened[method] / "cache")
    assert kept.source.shape[0] == (2 if method == "A14" else 1)
    seen = synthesise_prepared(
        networks_of(model), np.asarray(kept.source), np.asarray(kept.mask), plan=plan,
        conditional=True, error_scale=model.error_scale, engine=predictor.engine,
    )  # fmt: skip
    mae = np.abs(seen.prediction - np.asarray(kept.target))[np.asarray(kept.mask)].mean()
    last = [line for line in lines(widened[method]) if line["kind"] == "validation"][-1]
    assert mae == pytest.approx(float(str(last["mae"])), abs=2e-5)  # there is one validation case
    shown = predictor.predict(case.images["t1"])
    box = np.argwhere(shown.mask.array).min(0) - np.argwhere(np.asarray(kept.mask)).min(0)
    i, j, k = (slice(start, start + size) for start, size in zip(box, kept.mask.shape))
    raw = plan.target_reference.invert(seen.prediction)
    inside = np.asarray(kept.mask)
    np.testing.assert_allclose(shown.image.array[i, j, k][inside], raw[inside], rtol=1e-5)


@pytest.mark.parametrize("method", ["A14", "A15"])
def test_a_widened_arm_never_reads_a_target_to_predict(
    method: str, widened: dict[str, Path], toy_cohort: Path, tmp_path: Path
) -> None:
    data = tmp_path / "no targets"
    shutil.copytree(toy_cohort, data)
    for kind in ("t2", "seg"):
        for path in data.rglob(f"*_{kind}.nii.gz"):
            path.unlink()
    predict(widened[method], [toy_cohort], tmp_path / "with")
    predict(widened[method], [data], tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with").glob("*.nii.gz"))
    assert len(names) == 18
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_baselines_of_an_arm_with_ranks_are_those_of_one_without(widened: dict[str, Path]) -> None:
    for name in ("baselines.safetensors", "baselines.json"):
        a, b = ((widened[method] / "model" / name).read_bytes() for method in ("A7", "A14"))
        assert a == b


def test_the_first_stage_of_a_finished_refined_run_is_the_run_without(widened: dict[str, Path]) -> None:
    from safetensors.numpy import load_file

    plain, refined = (load_file(widened[method] / "model" / "weights.safetensors") for method in ("A7", "A15"))
    assert set(refined) > set(plain) and all(name in plain or name.startswith("refiner.") for name in refined)
    for name, weight in plain.items():
        np.testing.assert_array_equal(refined[name], weight, err_msg=name)


@pytest.mark.parametrize("method", ["A15", "A16"])
def test_a_widened_arm_branches_from_a_warm_up_without_its_parts(
    method: str, widened: dict[str, Path], toy_cohort: Path, tmp_path: Path
) -> None:
    """The discriminators' warm-up of A7; without transplants before it, A16 equals its own whole run likewise."""
    asked = recipe(method, **WIDENED)
    warm = recipe("A7", **WIDENED, training__transplant_share=asked.training.transplant_share)
    run(toy_cohort, tmp_path / "warm", warm, until=warm.schedule.ends["discriminators"])
    run(toy_cohort, tmp_path / "arm", asked, start=tmp_path / "warm")
    weights = "model/weights.safetensors"
    assert (tmp_path / "arm" / weights).read_bytes() == (widened[method] / weights).read_bytes()


@pytest.mark.parametrize("changes", [{"generator__refiner": (4, 8)}, {"training__transplant": "difficulty"}])
def test_a_recipe_that_goes_by_missing_confidence_is_refused_before_anything_is_written(
    changes: dict[str, object], toy_cohort: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="local discriminator"):
        run(toy_cohort, tmp_path / "run", recipe("A1", **changes))
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model/thesis.docx",
        "baselines/my_table.csv",
        "checkpoints/step-00000001.safetensors",
        "stages/notes.txt",
        "environment.json",
        "log.jsonl",
        "finished.json",
    ],
)
def test_a_folder_with_files_of_the_user_where_a_run_writes_is_refused(
    name: str, toy_cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of the user")
    with pytest.raises(RunError, match=rf"holds {name}, which was not written by chiasm") as caught:
        run(toy_cohort, tmp_path)
    assert caught.value.reason == "occupied" and (tmp_path / name).read_text() == "of the user"
    with pytest.raises(RunError, match="not written by chiasm"):
        plan_run(toy_cohort, recipe(), tmp_path, say=lambda _: None)


def test_files_of_the_user_in_a_run_are_never_removed(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "finished.json").unlink()
    own = [folder / "checkpoints" / "step-by-step.txt", folder / "baselines" / "table.csv", folder / "notes.txt"]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the user")
    run(toy_cohort, folder)
    (folder / "model" / "thesis.docx").write_text("of the user")
    run(toy_cohort, folder)  # finished: nothing is written
    (folder / "finished.json").unlink()
    with pytest.raises(RunError, match=r"holds model/thesis\.docx"):
        run(toy_cohort, folder)
    assert all(path.read_text() == "of the user" for path in [*own, folder / "model" / "thesis.docx"])


def test_a_run_never_goes_into_the_data_or_into_a_model(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    data = shutil.copytree(toy_cohort, tmp_path / "data")
    before = sorted(data.rglob("*"))
    for given in (data, find_cohort(data)):
        with pytest.raises(RunError, match="is the folder of the data"):
            run(given, data)  # type: ignore[arg-type]
    inside = shutil.copytree(toy_cohort, tmp_path / "run" / "model")
    with pytest.raises(RunError, match="belongs to the data, and the training would replace it"):
        run(inside, tmp_path / "run")
    assert sorted(data.rglob("*")) == before and len(sorted(inside.rglob("*"))) == len(before)
    model = shutil.copytree(finished_run / "model", tmp_path / "model")
    with pytest.raises(RunError, match="is a model folder"):
        run(toy_cohort, model)
    with pytest.raises(RunError, match="is a model folder"):
        predict(model, [toy_cohort], model)
    assert sorted(path.name for path in model.iterdir()) == sorted(
        path.name for path in (finished_run / "model").iterdir()
    )


def test_a_model_that_is_a_link_is_refused_by_name_before_training_and_a_finished_run_keeps_it(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "model").rename(tmp_path / "elsewhere")
    (folder / "model").symlink_to(tmp_path / "elsewhere")
    assert run(toy_cohort, folder).folder == folder
    (folder / "finished.json").unlink()
    with pytest.raises(RunError, match="model: is a link, and chiasm replaces nothing through a link"):
        run(toy_cohort, folder)
    assert (folder / "model").is_symlink() and not list(folder.glob(".chiasm-*"))


@pytest.mark.parametrize("names", [["splits.json"], ["plan.toml"], ["plan.toml", "splits.json"]])
def test_a_plan_or_split_that_was_deleted_from_a_finished_run_is_made_anew_and_equal(
    names: list[str], toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for name in names:
        (folder / name).unlink()
    told: list[str] = []
    run(toy_cohort, folder, say=told.append)
    assert any(f"{' and '.join(names)} is made anew" in line for line in told)
    for name in (*names, "model/weights.safetensors", "model/model.toml", "model/splits.json"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes()
