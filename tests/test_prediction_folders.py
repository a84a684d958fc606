"""Whole folders through a trained model: what comes out, and what never goes in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import chiasm
from chiasm.attempts import Lost
from chiasm.cli import main
from chiasm.cohorts.cases import Case
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError, VolumeError
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import read_manifest
from chiasm.runners import RUNNERS
from chiasm.storage import read_json, write_json
from chiasm.volumes import Geometry, Volume, read_volume, write_volume
from chiasm.volumes.screening import Reading
from synthetic_cohort import affine, pair, save


def test_a_cohort_gives_images_maps_and_a_manifest(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    made = predict(finished_run, [toy_cohort], tmp_path)
    assert len(made.manifest.cases) == 6 and not made.problems
    assert read_manifest(tmp_path) == made.manifest
    split = read_json(finished_run / "splits.json")
    for entry in made.manifest.cases:
        assert entry.case in split[entry.role]
        source = nib.load(tmp_path / entry.sources[0])
        for name in (entry.image, entry.mask, entry.expected_error):
            image = nib.load(tmp_path / str(name))
            assert image.shape == source.shape
            for get in ("get_sform", "get_qform"):  # bit for bit, codes too
                (a, code_a), (b, code_b) = (getattr(i.header, get)(coded=True) for i in (image, source))
                np.testing.assert_array_equal(a, b)
                assert code_a == code_b
        mask = nib.load(tmp_path / entry.mask).get_fdata() > 0
        trust = nib.load(tmp_path / str(entry.expected_error)).get_fdata()
        assert (trust[~mask] == 0).all() and (trust[mask] > 0).all()
        assert 0.5 < mask.mean() / (source.get_fdata() != 0).mean() < 1.5


def test_a_z_scored_image_is_predicted_like_the_raw_one_and_the_reason_is_told(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = nib.load(toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz")
    array = raw.get_fdata()
    inside = array != 0
    scored = np.where(inside, (array - array[inside].mean()) / array[inside].std(), 0).astype(np.float32)
    files = {"raw": save(tmp_path / "raw.nii.gz", array.astype(np.float32), affine())}
    files["scored"] = save(tmp_path / "scored.nii.gz", scored, affine())
    images = {}
    for name, path in files.items():
        with pytest.raises(SystemExit) as done:
            main(["predict", str(finished_run), str(path), "-o", str(tmp_path / name)])
        assert done.value.code == 0
        told = " ".join("".join(capsys.readouterr()).split())
        assert ("seems to be z-scored" in told) == (name == "scored")
        entry = read_manifest(tmp_path / name).cases[0]
        images[name] = nib.load(tmp_path / name / entry.image).get_fdata()
        assert not any("brain or body" in sentence or "cut out" in sentence for sentence in entry.warnings)
    np.testing.assert_allclose(images["scored"], images["raw"], atol=0.01 * np.ptp(images["raw"]))


def test_prediction_never_reads_a_target(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "no targets"
    shutil.copytree(toy_cohort, data)
    for path in data.rglob("*_t2.nii.gz"):
        path.unlink()
    for path in data.rglob("*_seg.nii.gz"):
        path.unlink()
    predict(finished_run, [toy_cohort], tmp_path / "with")
    predict(finished_run, [data], tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with").glob("*.nii.gz"))
    assert len(names) == 18
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_predictions_averaged_over_mirror_images_say_so_and_mix_with_no_others(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    case = toy_cohort / "Toy_0001"
    plain = predict(finished_run, [case], tmp_path / "plain").manifest
    mean = predict(finished_run, [case], tmp_path / "mean", average="flip").manifest
    assert (plain.options["average"], mean.options["average"]) == ("none", "flip")
    images = [read_volume(tmp_path / name / plain.cases[0].image).array for name in ("plain", "mean")]
    assert not np.array_equal(*images)
    np.testing.assert_allclose(*images, atol=0.5 * np.ptp(images[0]))
    written = tmp_path / "plain" / "predictions.json"  # of a version that knew no average
    content = read_json(written)
    del content["options"]["average"]
    write_json(written, content)
    assert predict(finished_run, [case], tmp_path / "plain").kept == ("Toy_0001",)
    with pytest.raises(RunError, match="average was none and is flip"):
        predict(finished_run, [case], tmp_path / "plain", average="flip")
    with pytest.raises(RecipeError, match=r"average.*flop.*auto, none, flip"):
        predict(finished_run, [case], tmp_path / "never", average="flop")


def test_a_model_folder_predicts_without_its_run(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere"
    shutil.copytree(finished_run / "model", alone)
    file = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    a, b = (chiasm.load(folder).predict(file) for folder in (finished_run, alone))
    np.testing.assert_array_equal(a.image.array, b.image.array)
    assert a.expected_error is not None


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.toml", "calibration.json", "baselines.safetensors"])
def test_a_damaged_model_is_refused_and_named(name: str, finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished_run / "model", folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=name) as caught:
        chiasm.load(folder)
    assert caught.value.reason == "damaged"


def test_files_folders_and_roles_are_taken(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in (1, 2):
        shutil.copy(toy_cohort / f"Toy_000{number}" / f"Toy_000{number}_t1.nii.gz", files / f"p{number}.nii.gz")
    assert {e.case for e in predict(finished_run, [files / "p1.nii.gz"], tmp_path / "a").manifest.cases} == {"p1"}
    assert {e.role for e in predict(finished_run, [files], tmp_path / "b").manifest.cases} == {"new"}
    test_only = predict(finished_run, [toy_cohort], tmp_path / "c", only="test").manifest.cases
    assert [entry.case for entry in test_only] == read_json(finished_run / "splits.json")["test"]


def test_one_bad_file_is_named_and_the_others_are_identical(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    bad = data / "Toy_0002" / "Toy_0002_t1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:300])
    whole, broken = predict(finished_run, [toy_cohort], tmp_path / "a"), predict(finished_run, [data], tmp_path / "b")
    assert [problem.case for problem in broken.problems] == ["Toy_0002"]
    assert [failure.case for failure in read_manifest(tmp_path / "b").failed] == ["Toy_0002"]
    for entry in broken.manifest.cases:
        assert (tmp_path / "a" / entry.image).read_bytes() == (tmp_path / "b" / entry.image).read_bytes()
    assert len(whole.manifest.cases) == len(broken.manifest.cases) + 1


def test_an_input_unlike_the_training_cases_is_warned_of(finished_run: Path, tmp_path: Path) -> None:
    odd = save(tmp_path / "odd.nii.gz", pair(1)[0], affine((4.0, 4.0, 9.0)))
    made = chiasm.load(finished_run).predict(odd)
    assert any("out of distribution" in sentence for sentence in made.warnings)


def test_prediction_is_the_same_in_any_storage_order(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    path = toy_cohort / "Toy_0003" / "Toy_0003_t1.nii.gz"
    image = nib.load(path)
    flipped = nib.as_closest_canonical(image).slicer[::-1, :, ::-1]
    turned = nib.Nifti1Image(np.moveaxis(flipped.get_fdata(dtype=np.float32), 2, 0), flipped.affine[:, [2, 0, 1, 3]])
    nib.save(turned, tmp_path / "turned.nii.gz")
    predictor = chiasm.load(finished_run)
    plain, other = predictor.predict(path).image, predictor.predict(tmp_path / "turned.nii.gz").image
    back = nib.as_closest_canonical(nib.Nifti1Image(other.array, other.geometry.affine)).get_fdata()
    np.testing.assert_allclose(back, plain.array, rtol=0, atol=1e-3 * float(np.ptp(plain.array)))


def test_wrong_inputs_are_refused_with_what_to_do(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no model"):
        chiasm.load(tmp_path)
    with pytest.raises(CohortError, match="does not exist"):
        predict(finished_run, [tmp_path / "nowhere"], tmp_path / "out")
    predictor = chiasm.load(finished_run)
    one = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    with pytest.raises(VolumeError, match="number of source volumes"):
        predictor.predict(one, one)
    volume = read_volume(one)
    assert predictor.predict(volume).image.array.shape == volume.array.shape
    with pytest.raises(CohortError, match="is t2 by its name"):
        predictor.predict(toy_cohort / "Toy_0001" / "Toy_0001_t2.nii.gz")
    hollow = volume.array.copy()
    hollow[0, 0, 0] = np.nan
    with pytest.raises(VolumeError, match="t1 is empty, or holds NaN"):
        predictor.predict(Volume(hollow, volume.geometry))
    with pytest.raises(VolumeError, match=r"t1 is no array of real numbers .found complex64"):
        predictor.predict(Volume(volume.array.astype(np.complex64), volume.geometry))
    with pytest.raises(VolumeError, match="t1: has a spacing out of range"):
        predictor.predict(Volume(volume.array, Geometry(volume.array.shape, np.zeros((4, 4)))))
    sheared = Volume(
        volume.array, Geometry(volume.array.shape, volume.geometry.affine @ (np.eye(4) + np.eye(4, k=1) / 9))
    )
    with pytest.raises(VolumeError, match=r"t1: has a sheared affine.*Reading.resample=True"):
        predictor.predict(sheared)
    write_volume(tmp_path / "sheared_t1.nii.gz", sheared.array, sheared.geometry)
    straight = chiasm.load(finished_run, reading=Reading(resample=True))
    made = straight.predict(sheared).image
    np.testing.assert_allclose(made.array, straight.predict(tmp_path / "sheared_t1.nii.gz").image.array, atol=1e-3)
    with pytest.raises(TypeError, match="not ndarray; Volume"):
        predictor.predict(volume.array)
    with pytest.raises(TypeError, match="a mask is a Volume"):
        predictor.predict(volume, mask=volume.array > 0)
    for wrong in ({"container": "nii"}, {"only": "tset"}):
        with pytest.raises(RecipeError, match=r"there is no (format 'nii'|role 'tset')"):
            predict(finished_run, [toy_cohort], tmp_path / "out", **wrong)


def test_cases_spread_over_processes_give_the_same_files(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    alone = predict(finished_run, [toy_cohort], tmp_path / "alone")
    spread = predict(finished_run, [toy_cohort], tmp_path / "spread", runner="processes")
    assert len(alone.manifest.cases) == 6
    for entry, other in zip(alone.manifest.cases, spread.manifest.cases, strict=True):
        assert asdict(entry) == asdict(other)  # names the field that differs
        for name in (entry.image, entry.expected_error, entry.mask):
            assert name and (tmp_path / "alone" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()


def test_a_case_whose_worker_is_lost_twice_is_named_and_the_others_are_written(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(jobs: Sequence[Case], work: Callable[[Case], object], folder: Path) -> Iterator[object]:
        for job in jobs:
            if job.id == "Toy_0002":
                yield Lost(job, "its process was killed by signal 9 (SIGKILL)", again=True)
            yield Lost(job, "its process was killed by signal 9 (SIGKILL)") if job.id == "Toy_0002" else work(job)

    monkeypatch.setitem(RUNNERS, "processes", losing)
    seen: list[tuple[int, int, str]] = []
    made = predict(finished_run, [toy_cohort], tmp_path, runner="processes", progress=lambda *told: seen.append(told))
    (problem,) = made.problems
    assert problem.case == "Toy_0002" and problem.reason == "lost" and "signal 9 (SIGKILL)" in problem.message
    assert [failure.case for failure in read_manifest(tmp_path).failed] == ["Toy_0002"]
    assert len(made.manifest.cases) == 5 and seen[-1][:2] == (6, 6)


def test_inputs_that_are_left_out_are_named_with_exit_3(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = toy_cohort / "Toy_0001" / "Toy_0001_t1.nii.gz"
    data = tmp_path / "data"
    (data / "deeper").mkdir(parents=True)
    shutil.copy(image, data / "P1_T1.nii.gz")
    for number in range(9):
        shutil.copy(image, data / f"scan{number}.nii.gz")
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(finished_run), str(data), "-o", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert ended.value.code == 3
    assert "1 case predicted" in told.out
    assert "left out" in told.err and "9 volumes" in told.err and "scan0.nii.gz" in told.err
    (data / "P1_T1.nii.gz").rename(data / "deeper" / "image9.nii.gz")
    for number in range(1, 9):
        (data / f"scan{number}.nii.gz").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(finished_run), str(data), "-o", str(tmp_path / "out2")])
    assert ended.value.code == 3
    assert "1 volumes in folders below, such as deeper/image9.nii.gz" in capsys.readouterr().err
    damaged = data / "scan0.nii.gz"
    damaged.write_bytes(image.read_bytes()[:500])
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(finished_run), str(damaged), "-o", str(tmp_path / "new" / "out")])
    told = capsys.readouterr()
    assert ended.value.code == 3 and not (tmp_path / "new").exists()
    assert "no case was predicted" in told.out and told.err.count(str(damaged)) == 1


def test_a_folder_of_another_modality_is_never_taken_for_the_source(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(toy_cohort / "Toy_0001" / "Toy_0001_t2.nii.gz", tmp_path / "data" / "P1_T2.nii.gz")
    with pytest.raises(CohortError, match="no case has the modality 't1'"):
        predict(finished_run, [tmp_path / "data"], tmp_path / "out")
    with pytest.raises(CohortError, match="no scans are given"):  # as of a generator that was used before
        predict(finished_run, [], tmp_path / "out")


@pytest.mark.parametrize("name", ["p_flair", "p_t1ce", "sub-1_ce-gadolinium_T1w", "p_ct", "p_seg", "flair"])
def test_a_file_that_is_called_another_modality_is_refused(
    name: str, toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.nii.gz"
    shutil.copy(find_cohort(toy_cohort).cases[0].images["t1"], file)
    with pytest.raises(CohortError, match="by its name, but the model takes t1") as refused:
        predict(finished_run, [file], tmp_path / "out")
    assert refused.value.reason == "other-modality" and not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize("name", ["p_t1", "p_T1w", "p_mr", "p", "patient_7"])
def test_a_file_of_the_source_or_without_a_modality_in_its_name_is_taken(
    name: str, toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"{name}.nii.gz"
    shutil.copy(find_cohort(toy_cohort).cases[0].images["t1"], file)
    assert not predict(finished_run, [file], tmp_path / "out").problems
