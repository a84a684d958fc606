"""DICOM in, DICOM out: on the source's grid, whatever its orientation, and nobody named anywhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest

from chiasm.cli import main
from chiasm.errors import ChiasmError, RunError
from chiasm.evaluation.predictions import open_predictions
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import read_manifest
from chiasm.volumes import read_volume
from chiasm.volumes.dicom_write import grey_scale
from chiasm.volumes.geometry import reordered_like
from conftest import QUICK
from dicom_patients import TELLTALE, faults, write_enhanced, write_source
from synthetic_cohort import SHAPE, pair
from test_studies_study import study_file

SPACING = (1.0, 1.0, 3.0)


def body(seed: int = 1) -> np.ndarray:
    return np.rint(pair(seed, 5.0, SHAPE)[0]).astype(np.int16)


@pytest.mark.parametrize("plane", ["axial", "oblique", "sagittal"])
def test_a_dicom_prediction_is_the_nifti_prediction_within_half_a_grey_step(
    plane: str, finished_run: Path, tmp_path: Path
) -> None:
    write_source(tmp_path / "in" / "p1", body(), plane, spacing=SPACING)
    predict(finished_run, [tmp_path / "in"], tmp_path / "nifti")
    made = predict(finished_run, [tmp_path / "in"], tmp_path / "dicom", container="dicom")
    (entry,) = read_manifest(tmp_path / "dicom").cases
    assert entry == made.manifest.cases[0] and entry.image == "p1/synthetic" and entry.mask is None
    plan = pydicom.dcmread(tmp_path / "dicom" / "p1" / "synthetic" / "0001.dcm")
    slope = float(plan.RealWorldValueMappingSequence[0].RealWorldValueSlope)
    whole = read_volume(tmp_path / "nifti" / "p1_t2.nii.gz")
    back, source = read_volume(tmp_path / "dicom" / entry.image), read_volume(tmp_path / "in" / "p1")
    assert np.abs(back.geometry.corners - source.geometry.corners).max() < 1e-3
    back = reordered_like(back, whole.geometry)
    assert np.abs(back.array * slope - whole.array).max() <= slope * 0.5001
    assert faults(tmp_path / "dicom" / "p1" / "expected-error.dcm") == []
    assert sorted(path.name for path in (tmp_path / "dicom").iterdir()) == ["p1", "predictions.json"]


def test_one_multi_frame_file_is_enough(finished_run: Path, tmp_path: Path) -> None:
    write_enhanced(tmp_path / "p1" / "t1.dcm", body(), spacing=SPACING)
    predict(finished_run, [tmp_path / "p1"], tmp_path / "made", container="dicom")
    made = sorted((tmp_path / "made" / "p1" / "synthetic").iterdir())
    assert len(made) == SHAPE[2] and faults(made[0]) == []


def test_what_cannot_become_dicom_is_refused_and_says_what_can(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(finished_run), str(file), "-o", str(tmp_path / "out"), "--format", "dicom"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "no patient, study and frame of reference" in told and "NIfTI" in told
    assert not (tmp_path / "out").exists()


def test_dicom_predictions_are_not_evaluated(finished_run: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "p1" / "t1", body(), spacing=SPACING)
    predict(finished_run, [tmp_path / "p1"], tmp_path / "made", container="dicom")
    with pytest.raises(RunError, match="without --format dicom"):
        open_predictions(tmp_path / "made", finished_run)


def test_a_source_is_never_replaced_by_its_own_synthesis(finished_run: Path, tmp_path: Path) -> None:
    files = write_source(tmp_path / "p1", body(), spacing=SPACING)
    for out in (tmp_path, tmp_path / "p1"):  # a NIfTI file there would hide the series
        with pytest.raises(RunError, match="is the folder of the data"):
            predict(finished_run, [tmp_path], out)
    write_source(tmp_path / "two" / "p", body(), spacing=SPACING, SeriesDescription="t1", PatientID="p")
    for file in write_source(tmp_path / "t2", body(), spacing=SPACING, SeriesDescription="t2", PatientID="p"):
        file.rename(tmp_path / "two" / "p" / f"t2_{file.name}")
    (tmp_path / "t2").rmdir()
    with pytest.raises(RunError, match="is the folder of the data"):  # files of two series in one folder
        predict(finished_run, [tmp_path / "two"], tmp_path / "two" / "p")
    shutil.rmtree(tmp_path / "two")
    made = predict(finished_run, [tmp_path / "p1"], tmp_path, container="dicom")
    assert [problem.reason for problem in made.problems] == ["occupied"] and all(file.exists() for file in files)
    for _ in range(2):  # what was made before is
        again = predict(finished_run, [tmp_path / "p1"], tmp_path / "made", container="dicom")
        assert not again.problems


@pytest.mark.parametrize(("low", "high", "scale"), [(0, 1, 1000), (0, 4000, 1), (-1, 30000, 0.1)])
def test_the_scale_of_a_model_follows_its_range(low: float, high: float, scale: float) -> None:
    assert grey_scale(low, high) == pytest.approx(scale)


@pytest.mark.slow
def test_nothing_that_names_a_patient_leaves_the_dicom_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from chiasm.methods import make_recipe
    from chiasm.reports.evaluation import evaluate
    from chiasm.training.run import train

    told = {**TELLTALE, "InstitutionName": "Sanatorium Krähwinkel", "OperatorsName": "Blaumilch^Kasimir"}
    told |= {
        "PatientAddress": "Gänsemarkt 17",
        "OtherPatientNames": "Pfeffernuss^Otti",
        "DeviceSerialNumber": "SN-4711-0815",
    }
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    for subject in range(4):
        for name, image in zip(("t1", "t2"), pair(subject, 5.0, SHAPE)[:2], strict=True):
            who = {**told, "PatientID": f"{told['PatientID']}-{subject}"}
            where = data / f"case{subject}" / name
            write_source(where, np.rint(image).astype(np.int16), spacing=SPACING, SeriesDescription=name, **who)
    caplog.set_level("DEBUG")
    recipe = make_recipe("A7", "tiny", {**QUICK, "schedule.steps": 6, "training.validations": 1})
    train(data, recipe, run, say=print)
    main_words = [["inspect", str(data)], ["predict", str(run), str(data), "-o", str(out / "nifti")]]
    main_words += [["register", str(data / "case0" / "t2"), str(data / "case0" / "t1"), "-o", str(out / "registered")]]
    main_words += [["predict", str(run), str(data), "-o", str(out / "dicom"), "--format", "dicom"]]
    (broken,) = [next((data / "case3" / "t1").iterdir())]
    for words in main_words:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    evaluate([out / "nifti"], data, out / "scores")
    assert {"registration.html", "report.html"} <= {path.name for path in out.rglob("*.html")}
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(ChiasmError):
        read_volume(broken.parent)
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(data / "case3"), "-o", str(out / "broken")])
    written = [path for root in (run, out) for path in root.rglob("*")]
    texts = {str(path.relative_to(tmp_path)).encode() for path in written}
    texts |= {path.read_bytes() for path in written if path.is_file() and path.suffix != ".dcm"}
    texts |= {"".join(capfd.readouterr()).encode(), caplog.text.encode()}
    assert len(texts) > 30
    secrets = [part for value in told.values() for part in value.split("^")]
    found = {secret for secret in secrets for text in texts if secret.encode() in text}
    assert not found
    inside = (out / "dicom" / "case0" / "synthetic" / "0001.dcm").read_bytes()
    assert told["PatientID"].encode() in inside and b"Quackenbusch" in inside  # these belong there
    assert not [s for s in ("Blaumilch", "SN-4711", "Sanatorium") if s.encode() in inside]
    model = b"".join(path.read_bytes() for path in (run / "model").iterdir())
    assert str(data).encode() not in model


@pytest.mark.slow
def test_a_study_of_dicom_and_its_pages_name_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for subject in range(4):
        for name, image in zip(("t1", "t2"), pair(subject, 5.0, SHAPE)[:2], strict=True):
            who = {"PatientID": f"{TELLTALE['PatientID']}-{subject}", "SeriesDescription": name}
            write_source(data / f"case{subject}" / name, np.rint(image).astype(np.int16), spacing=SPACING, **who)
    plan = study_file(tmp_path, data, folds=2, seeds=[0], arms=["A1"], steps=4, primary=None)
    for words in (["study", str(plan), "-o", str(out)], ["report", str(out)]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    written = [path for path in out.rglob("*") if path.is_file()]
    texts = [path.read_bytes() + str(path.relative_to(tmp_path)).encode() for path in written]
    texts.append("".join(capfd.readouterr()).encode())
    secrets = [part for value in TELLTALE.values() for part in value.split("^")]
    assert len(texts) > 20 and not {secret for secret in secrets for text in texts if secret.encode() in text}
