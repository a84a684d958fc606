"""`chiasm export`: what is written predicts as chiasm does, without chiasm."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import chiasm
from chiasm.cli import main
from chiasm.methods import make_recipe
from chiasm.prediction.export import export
from conftest import QUICK

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


def check_alike(run: Path, folder: Path, source: Path) -> None:
    """Compare the script's files with what chiasm makes by torch in float32."""
    predictor = chiasm.load(run, accelerator="cpu", precision="32-true", engine="torch")
    wanted = predictor.predict(source)
    pairs = {"t2": wanted.image, "expected-error": wanted.expected_error}
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
        ("A15", {}),
        ("unet", {}),
        ("A14", {}),
        ("A1", {"data.dims": "3d", "data.patch": 16, "generator.average": "flip"}),
    ],
    ids=["refiner", "unet", "ranks", "3d, averaged with its mirror image"],
)
def test_the_script_of_other_methods_predicts_alike(
    method: str, changes: dict[str, object], trained: Callable[..., Path], toy_cohort: Path, tmp_path: Path
) -> None:
    run = trained(method, **changes)
    export(run, tmp_path / "out", "torch")
    source = next(toy_cohort.glob("*2/*_t1.nii.gz"))
    here(tmp_path / "out", source)
    check_alike(run, tmp_path / "out", source)


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
    assert card["target"]["map"] == model.plan.target_reference.to_dict()
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
