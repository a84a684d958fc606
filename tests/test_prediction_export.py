"""`chiasm export`: what is written predicts as chiasm does, without chiasm."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import chiasm
from chiasm.cli import main
from chiasm.errors import ChiasmError, RecipeError
from chiasm.methods import make_recipe
from chiasm.prediction.export import export
from chiasm.prediction.exported_network import PiecewiseLinear
from chiasm.prediction.model import load_model, save_model
from chiasm.preparation.intensity import IntensityMap
from chiasm.training.players import make_players
from conftest import QUICK, Sibling
from synthetic_cohort import stored_as

FORMS = ("torch", "onnx", "openvino")
CLOSE = 1e-4  # of the range of what is made

#: Runs the script where chiasm cannot be imported.
ALONE = (
    "import runpy, sys; sys.modules['chiasm'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def trained(toy_cohort: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {"A7": finished_run}

    def run(method: str, **changes: object) -> Path:
        key = f"{method} {changes}" if changes else method
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / "run"
            few = {**QUICK, "schedule.steps": 4, "training.validations": 1, **changes}
            chiasm.train(toy_cohort, make_recipe(method, "tiny", few), folder, say=lambda _: None)
            made[key] = folder
        return made[key]

    return run


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default method's files for torch."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert export(finished_run, folder, "torch").deviation <= CLOSE
    return folder


def alone(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, str(folder / "predict.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def here(folder: Path, source: Path) -> None:
    """Run the script in this process, which has imported torch already."""
    for name, image in runpy.run_path(str(folder / "predict.py"), run_name="script")["predict"]([source]).items():
        nib.save(image, folder / f"made_{name}.nii.gz")


def check_alike(run: Path | list[Path], folder: Path, source: Path, average: str = "auto") -> None:
    """Compare the script's files with what chiasm makes by torch in float32."""
    predictor = chiasm.load(run, accelerator="cpu", precision="32-true", engine="torch")
    wanted = predictor.predict(source, average=average)
    pairs = {"t2": wanted.image, "expected-error": wanted.expected_error, "spread": wanted.spread}
    for name, volume in pairs.items():
        path = folder / f"made_{name}.nii.gz"
        assert path.is_file() == (volume is not None)
        if volume is not None:
            found = np.asarray(nib.load(path).dataobj)
            extent = float(np.ptp(volume.array))
            assert found.shape == volume.array.shape and extent > 0
            assert np.abs(found - volume.array).max() <= CLOSE * extent
            assert np.allclose(nib.load(path).affine, nib.load(source).affine)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_predicts_alike_without_chiasm(
    form: str, exported: Path, finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    if form == "torch":
        shutil.copytree(exported, tmp_path / "out")
    else:
        pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[form])
        assert export(finished_run, tmp_path / "out", form).deviation <= CLOSE
    source = next(toy_cohort.glob("*1/*_t1.nii.gz"))
    done = alone(tmp_path / "out", source, "-o", tmp_path / "out" / "made")
    assert done.returncode == 0, done.stderr
    check_alike(finished_run, tmp_path / "out", source)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("A15", {"data.plane": "coronal"}),
        pytest.param("unet", {}, marks=pytest.mark.long),
        pytest.param("A14", {}, marks=pytest.mark.long),
        ("A1", {"data.dims": "3d", "data.patch": 16, "generator.average": "flip"}),
    ],
    ids=["refiner, coronal", "unet", "ranks", "3d, averaged with its mirror image"],
)
def test_the_script_of_other_methods_predicts_alike(
    method: str, changes: dict[str, object], trained: Callable[..., Path], toy_cohort: Path, tmp_path: Path
) -> None:
    run = trained(method, **changes)
    (tmp_path / "out").mkdir()
    for name in ("model.xml", "model.bin", "model.onnx"):  # the card of an earlier export names the first
        (tmp_path / "out" / name).write_text("{}")
    (tmp_path / "out" / "model.json").write_text(json.dumps({"format": 3, "networks": [{"file": "model.xml"}]}))
    export(run, tmp_path / "out", "torch")
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {"model.json", "model.pt2", "model.onnx"}
    source = stored_as("PIL", next(toy_cohort.glob("*2/*_t1.nii.gz")), tmp_path / "t1.nii.gz")
    here(tmp_path / "out", source)
    check_alike(run, tmp_path / "out", source)
    plane, card = changes.get("data.plane", "axial"), json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["networks"][0]["plane"] == (None if "data.dims" in changes else plane)
    assert ("network" in card) == (card["format"] == 2) == (plane == "axial")  # readers of format 2 know no planes


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        "l2-expected-error",
        "A15",
        "srcnn",
        "fcn8",
        "unet",
        "gan",
        "dcgan",
        "context-gan",
        "strainet",
        "li-cnn",
        "han",
        "jcsc",
    ],
)
def test_a_tiny_network_of_each_kind_is_exported(method: str, finished_run: Path, tmp_path: Path) -> None:
    model = load_model(finished_run)
    plan = replace(model.plan, patch=(64, 64))
    recipe = make_recipe(method, "tiny", {**QUICK, "data.patch": 64})
    players = make_players(recipe, plan, 0)
    parts = {"local_discriminator": players.local_discriminator, "refiner": players.refiner}
    networks = {"generator": players.generator, **parts, "calibration": None}
    save_model(tmp_path / "model", replace(model, recipe=recipe, plan=plan, **networks))
    assert export(tmp_path / "model", tmp_path / "out", "torch").deviation <= CLOSE


@pytest.mark.long
def test_a_network_that_cannot_be_exported_for_any_size_is_refused(finished_run: Path, tmp_path: Path) -> None:
    model = load_model(finished_run)
    plan, recipe = replace(model.plan, patch=(256, 256)), make_recipe("pix2pix", "tiny", QUICK)
    networks = {"generator": make_players(recipe, plan, 0).generator, "local_discriminator": None, "calibration": None}
    save_model(tmp_path / "model", replace(model, recipe=recipe, plan=plan, **networks))
    with pytest.raises(RecipeError, match="cannot be exported for images of any size"):
        export(tmp_path / "model", tmp_path / "out", "torch")


@pytest.fixture(scope="module")
def several(finished_run: Path, sibling: Sibling) -> list[Path]:
    """Three models; the images of the second have another unit, it is not calibrated, and sees another plane."""
    model = load_model(sibling("other"))
    plan, (low, high) = model.plan, model.plan.target_range
    knots = plan.target_reference
    ten = IntensityMap(knots.kind, tuple(10 * x for x in knots.values), knots.normalised)
    changed = replace(
        model,
        plan=replace(plan, target_reference=ten, target_range=(10 * low, 10 * high), plane="sagittal"),
        calibration=None,
    )
    folder = sibling("bright")
    save_model(folder / "model", changed)
    return [finished_run, folder, sibling("third", shift=0.04)]


@pytest.mark.parametrize(
    "form", ["onnx", pytest.param("openvino", marks=pytest.mark.long)]
)  # as a bundle for MONAI: test_prediction_monai_bundle
def test_several_models_are_exported_as_a_network_of_each_plane_and_make_their_mean(
    form: str, several: list[Path], toy_cohort: Path, tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[form])
    average, out = "flip" if form == "openvino" else "auto", tmp_path / "out"
    said: list[str] = []
    assert export(several, out, form, average=average, say=said.append).deviation <= CLOSE
    begins = ["network 1 of 2: writing model-axial", "network 2 of 2: writing model-sagittal"]
    assert [line.partition(".")[0] for line in said] == begins
    source = stored_as("PIL", next(toy_cohort.glob("*1/*_t1.nii.gz")), tmp_path / "t1.nii.gz")
    here(out, source)
    check_alike(several, out, source, average)
    card = json.loads((out / "model.json").read_text())
    assert card["outputs"] == ["image", "expected-error", "spread"] and card["model"]["count"] == 3
    names = [f"model-{plane}.{'xml' if form == 'openvino' else 'onnx'}" for plane in ("axial", "sagittal")]
    assert card["networks"] == [
        {"file": names[0], "plane": "axial", "axes": [0, 1, 2], "models": [0, 2], "outputs": card["outputs"]},
        {"file": names[1], "plane": "sagittal", "axes": [1, 2, 0], "models": [1], "outputs": card["outputs"][:2]},
    ]
    includes = card["network_includes"]
    assert card["combination"]["N"] and includes["mean_with_mirror_image"] == (average == "flip")
    assert includes["calibration_of_expected_error"] == [True, False, True]
    assert [one["sha256"] for one in card["models"]] == [load_model(run).sha256 for run in several]
    with pytest.raises(ValueError, match="1 functions for 2 networks"):
        runpy.run_path(str(out / "predict.py"), run_name="script")["predict"]([source], network=lambda stack: stack)


def test_models_whose_networks_take_other_inputs_are_refused_together(
    finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    for changes, told in (
        ({"spacing_mm": (2.0, 2.0, 3.0), "plane": "coronal"}, "voxel size"),
        ({"target": "flair"}, "the target"),
    ):
        with pytest.raises(ChiasmError, match=f"differ in .*{told.rpartition(' ')[2]}"):
            export([finished_run, sibling("else", **changes)], tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_export_left_goes_with_the_next(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, sys; from pathlib import Path; from chiasm.prediction import export;"
        "export._write_one = lambda form, network, path: path.write_bytes(b'network') * 0.0;"
        "export.copy_file = lambda *_: os._exit(9); export.export(Path(sys.argv[1]), Path(sys.argv[2]), 'torch')"
    )
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    assert subprocess.run([sys.executable, "-c", script, str(finished_run), str(out)], timeout=120).returncode == 9
    assert [path for path in out.iterdir() if path.name.startswith(".chiasm-")]
    assert not [path for path in temporary.iterdir() if "chiasm" in path.name]
    with pytest.raises(ChiasmError, match="holds no model"):
        export(tmp_path / "nowhere", out, "torch")  # the next one, whatever becomes of it
    assert not out.exists() or not [path for path in out.iterdir() if path.name.startswith(".chiasm-")]


@pytest.mark.parametrize(
    ("constant", "expected"), [(False, [-20.0, 0.0, 5.0, 10.0, 10.5, 14.0]), (True, [0.0, 0.0, 5.0, 10.0, 10.5, 12.0])]
)
def test_a_map_of_the_network_goes_through_its_knots_and_beyond_as_it_should(
    constant: bool, expected: list[float]
) -> None:
    made = PiecewiseLinear((1.0, 2.0, 4.0), (0.0, 10.0, 12.0), constant=constant)
    assert made(torch.tensor([[[-1.0, 1.0, 1.5, 2.0, 2.5, 6.0]]])).flatten().tolist() == pytest.approx(expected)
    x, y = (np.cumsum(np.random.default_rng(seed).random(70)) for seed in (0, 1))
    at = np.linspace(x[0] - 1, x[-1] + 1, 500, dtype=np.float32)
    found = PiecewiseLinear(x.tolist(), y.tolist(), constant=True)(torch.from_numpy(at)[None, None])[0, 0]
    assert np.allclose(found, np.interp(at, x, y), rtol=1e-5)
    assert PiecewiseLinear((3.0,), (7.0,), constant=True)(torch.tensor([[[-1.0, 9.0]]])).flatten().tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["median_iqr", "zscore", "percentile", "mode", "rank"])
def test_the_script_normalises_as_chiasm_does(kind: str, exported: Path) -> None:
    from chiasm.preparation.intensity import fit_intensity

    script = runpy.run_path(str(exported / "predict.py"), run_name="script")
    values = np.round(np.random.default_rng(0).gamma(3, 40, 5000)).astype(np.float32)
    fitted = fit_intensity(values, None, kind)  # type: ignore[arg-type]
    x, y = script["fit_map"](values, kind)
    assert np.allclose(x, fitted.values) and np.allclose(y, fitted.normalised)
    assert np.allclose(script["piecewise"](values, x, y), fitted.apply(values), atol=1e-5)


def test_the_card_says_whose_model_it_is_and_what_surrounds_it(exported: Path, finished_run: Path) -> None:
    card = json.loads((exported / "model.json").read_text())
    model = chiasm.load(finished_run).model
    assert card["model"]["sha256"] == model.sha256 and "not for diagnostic use" in card["notice"]
    assert card["models"][0]["target_map"] == model.plan.target_reference.to_dict() and card["model"]["count"] == 1
    assert card["outputs"] == ["image", "expected-error"] and card["network_includes"]["target_unit"]
    assert card["spacing_mm"] == list(model.plan.spacing_mm) and card["slices"] == model.plan.slices


def test_the_command_names_what_it_wrote_and_writes_it_again(
    exported: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit) as done:
        main(["export", str(finished_run), "-o", str(tmp_path / "out"), "--to", "torch"])
    told = capsys.readouterr().out
    assert done.value.code == 0 and "model.pt2" in told and "predict.py" in told
    assert all(path.stat().st_ino != number for path, number in before.items())  # written anew
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "model.json", "predict.py"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "--to", "tensorflow"], "onnx, openvino, torch, monai-bundle"),
        (["NOWHERE", "--to", "torch"], "holds no model"),
        (["CASCADE", "--to", "torch"], "stages"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    words: list[str], told: str, trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": trained("A7"), "NOWHERE": tmp_path / "nowhere"}
    if "CASCADE" in words:
        steps = {"schedule.steps": 8, "generator.stages": 2}
        places["CASCADE"] = trained("A1", **steps)
    with pytest.raises(SystemExit) as done:
        main(["export", *(str(places.get(word, word)) for word in words), "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert done.value.code == 2 and told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_of_somebody_else_stay(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "predict.py").write_text("mine")
    with pytest.raises(chiasm.errors.RunError, match=r"predict.py, which was not written by chiasm"):
        export(finished_run, tmp_path, "torch")
    assert (tmp_path / "predict.py").read_text() == "mine"
