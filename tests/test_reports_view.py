"""`chiasm view`: every voxel of the page is that of the file at that place, and what no page can show is refused."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import generate_uid

from chiasm.cli import main
from chiasm.errors import RunError, VolumeError
from chiasm.prediction.folders import predict
from chiasm.reports import case_page
from chiasm.reports import view as views
from chiasm.reports.view import view
from chiasm.volumes import Geometry, write_volume
from dicom_patients import scan, write_source
from synthetic_cohort import pair
from test_volumes_other_formats import write_minc

SHAPE = (14, 17, 9)
LPS = np.diag((-1.0, -1.0, 1.0, 1.0))

needs_viewer = pytest.mark.skipif(not case_page.viewer_script()[0], reason="NiiVue's script was not fetched at install")


def oblique() -> NDArray[np.float64]:
    """Axes that run to the left, up and back, tilted."""
    turn = np.deg2rad(17)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ np.array([[-1, 0, 0], [0, 0, -1], [0, 1, 0]]) * (1.5, 0.75, 3.0)
    affine[:3, 3] = (31, -12, 44)
    return affine


def volumes_in(text: str) -> list[Any]:
    found = re.findall(r'<script type="text/plain" id="volume-\d+">([^<]+)<', text)
    return [nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content))) for content in found]


def settings_in(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="settings">(.*?)</script>', text)
    assert found
    settings: dict[str, Any] = json.loads(found[1])
    return settings


def by_nibabel(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def by_simpleitk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


def write_each(folder: Path) -> Iterator[tuple[Path, Any]]:
    """A file of each format on a grid of its own, and another library that reads it."""
    rng = np.random.default_rng(5)
    scaled = nib.Nifti1Image(rng.integers(-900, 1200, SHAPE).astype(np.int16), oblique())
    scaled.header.set_slope_inter(0.37, -12.0)
    nib.save(scaled, folder / "scaled.nii.gz")
    yield folder / "scaled.nii.gz", by_nibabel
    for name, reader in (
        ("a.mha", by_simpleitk),
        ("a.nrrd", by_simpleitk),
        ("a.mgz", by_nibabel),
        ("a.nii", by_nibabel),
    ):
        array = rng.normal(100, 30, SHAPE).astype(np.float32)
        write_volume(folder / name, array, Geometry(SHAPE, oblique()))
        yield folder / name, reader
    nib.save(nib.Nifti1Image(rng.integers(0, 60000, SHAPE).astype(np.uint16), oblique()), folder / "unsigned.nii")
    yield folder / "unsigned.nii", by_nibabel
    write_minc(folder / "a.mnc", oblique(), rng.normal(100, 30, SHAPE).astype(np.float32), (0.0, 1.0))
    yield folder / "a.mnc", by_nibabel
    write_source(folder / "series", scan(SHAPE), "coronal")
    yield folder / "series", by_simpleitk


@needs_viewer
def test_every_voxel_of_the_page_is_that_of_the_file_at_that_place_whatever_its_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    given = list(write_each(tmp_path / "in"))
    seen = view([path for path, _ in given], tmp_path / "view.html")
    text = seen.page.read_text()
    shown, settings = volumes_in(text), settings_in(text)["panes"]
    assert seen.titles == tuple(path.name for path, _ in given) and len(shown) == len(settings) == len(given)
    for image, pane, (path, reader) in zip(shown, settings, given, strict=True):
        array, affine = reader(path)
        assert list(image.shape) == pane["dims"] and np.prod(image.shape) == array.size
        assert np.allclose(image.affine, pane["affine"], atol=1e-4), path.name
        assert (np.diag(image.affine)[:3] > 0).all()  # right, front, up
        indices = np.indices(image.shape).reshape(3, -1)
        places = nib.affines.apply_affine(np.linalg.inv(affine) @ np.array(pane["affine"]), indices.T)
        assert np.abs(places - np.rint(places)).max() < 0.01, path.name
        there = array[tuple(np.rint(places).astype(int).T)]
        assert np.array_equal(np.asarray(image.dataobj)[tuple(indices)].astype(np.float32), there.astype(np.float32))
        assert np.allclose(np.array(pane["inverse"]) @ np.array(pane["affine"]), np.eye(4), atol=1e-9)


@needs_viewer
def test_whole_numbers_are_stored_in_16_bits_and_labels_are_shown_from_least_to_most(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[3:6, 3:6, 3:6] = 2
    labels[7, 7, 7] = 4
    write_volume(tmp_path / "seg.nii.gz", labels, Geometry(SHAPE, np.eye(4)))
    text = view([tmp_path / "seg.nii.gz"], tmp_path / "view.html").page.read_text()
    assert volumes_in(text)[0].get_data_dtype() == np.int16
    assert settings_in(text)["panes"][0]["window"] == [0, 4]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, where pages without a place of their own are written."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def one_volume(folder: Path, name: str = "a.nii.gz", seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).normal(50, 9, SHAPE).astype(np.float32)
    write_volume(folder / name, array, Geometry(SHAPE, np.eye(4)))
    return folder / name


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    places = [one_volume(tmp_path / one / "scans") for one in ("anna", "ben")]
    assert view(places).titles == ("anna/scans/a.nii.gz", "ben/scans/a.nii.gz")


def test_without_a_place_the_page_lies_in_a_new_temporary_folder(temporary: Path, tmp_path: Path) -> None:
    pages = {view([one_volume(tmp_path / "in")]).page for _ in range(2)}
    assert len(pages) == 2 and all(page.is_relative_to(temporary) and page.name == "view.html" for page in pages)


def make_older(folder: Path, hours: float = 25) -> None:
    then = time.time() - hours * 3600
    os.utime(folder, (then, then))


def test_a_page_of_yesterday_is_removed_and_nothing_else_is(temporary: Path, tmp_path: Path) -> None:
    scan_file = one_volume(tmp_path / "in")
    yesterday, today, noted, foreign = (view([scan_file]).page.parent for _ in range(4))
    (noted / "notes.txt").write_text("mine")
    (foreign / "view.html").write_text("<html>mine</html>")
    (temporary / "chiasm-view-empty").mkdir()
    (temporary / "chiasm-view-link").symlink_to(tmp_path / "in")
    (temporary / "another-folder").mkdir()
    for folder in temporary.iterdir():
        if not folder.is_symlink():
            make_older(folder)
    make_older(today, 23)
    before = set(temporary.iterdir())
    made = view([scan_file]).page.parent
    assert before - set(temporary.iterdir()) == {yesterday, temporary / "chiasm-view-empty"}
    assert (noted / "view.html").is_file() and (today / "view.html").is_file() and (made / "view.html").is_file()
    assert scan_file.is_file() and (foreign / "view.html").read_text() == "<html>mine</html>"


def test_a_page_of_another_user_stays(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = view([one_volume(tmp_path / "in")]).page.parent
    make_older(folder)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1, raising=False)
    view([tmp_path / "in" / "a.nii.gz"])
    assert (folder / "view.html").is_file()


def test_a_page_that_is_refused_leaves_no_folder(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MOST_BYTES", 2_000)
    for scan_file in (one_volume(tmp_path / "in"), tmp_path / "absent.nii"):
        with pytest.raises(VolumeError):
            view([scan_file])
    assert not list(temporary.iterdir())


def test_a_page_of_its_own_is_replaced_and_a_file_of_somebody_else_is_not(tmp_path: Path) -> None:
    scan_file, page = one_volume(tmp_path), tmp_path / "view.html"
    view([scan_file], page)
    view([scan_file, scan_file], page)
    assert page.read_text().count('<canvas id="pane-') in (0, 2)
    page.write_text("<html>mine</html>")
    with pytest.raises(RunError, match="did not write it"):
        view([scan_file], page)
    assert page.read_text() == "<html>mine</html>"
    with pytest.raises(RunError, match="belongs to the data"):
        view([scan_file], scan_file)


def test_what_is_no_volume_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("no volume")
    (tmp_path / "folder").mkdir()
    for place, told in (
        ("absent.nii.gz", "absent.nii.gz: does not exist"),
        ("words.txt", "is of no format that is read"),
        ("folder", "without DICOM files and without predictions"),
    ):
        with pytest.raises(VolumeError, match=told):
            view([tmp_path / place], tmp_path / "view.html")
    predicted = tmp_path / "study" / "jobs" / "a" / "predictions"
    predicted.mkdir(parents=True)
    for file in (
        predicted / "predictions.json",
        *(tmp_path / "study" / one for one in ("evaluation.csv", "report.html")),
    ):
        file.touch()
    with zipfile.ZipFile(tmp_path / "study" / "arrays.npz", "w"):  # an archive may hold DICOM
        pass
    with pytest.raises(VolumeError, match=rf"folder of results.*study/report.html.* chiasm view {predicted}\."):
        view([tmp_path / "study"])
    scan_file = one_volume(tmp_path)
    with pytest.raises(VolumeError, match="found 13, expected 1 to 12"):
        view([scan_file] * 13, tmp_path / "view.html")
    with pytest.raises(RunError, match="--case is for one folder of predictions"):
        view([scan_file], case="a")
    assert not (tmp_path / "view.html").exists()


def test_a_page_too_large_for_a_browser_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "MOST_BYTES", 2_000)
    with pytest.raises(VolumeError, match=r"found \d+ MB: a.nii.gz \d+ MB, expected at most 0 MB\). Name fewer"):
        view([one_volume(tmp_path)], tmp_path / "view.html")
    assert not (tmp_path / "view.html").exists()


def test_a_series_is_chosen_for_all_places_or_for_each(tmp_path: Path) -> None:
    for number, words in ((1, "t1 mprage"), (2, "t2 space")):
        write_source(
            tmp_path / "P1" / str(number),
            scan((16, 14, 5), number),
            SeriesDescription=words,
            StudyInstanceUID="1.2.826.0.1.3680043.10.99.7",
        )
    with pytest.raises(VolumeError, match="--series"):
        view([tmp_path / "P1"])
    assert view([tmp_path / "P1"], series=["mprage"]).titles == ("P1: mprage",)
    both = view([tmp_path / "P1", one_volume(tmp_path), tmp_path / "P1"], series=["mprage", "space"])
    assert both.titles == ("P1: mprage", "a.nii.gz", "P1: space")
    if case_page.viewer_script()[0]:
        first, _, second = volumes_in(both.page.read_text())
        assert not np.array_equal(first.dataobj, second.dataobj)
    with pytest.raises(VolumeError, match="found 2, expected 1"):
        view([tmp_path / "P1"], series=["mprage", "space"])


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    nasty = one_volume(tmp_path, "<b onmouseover=x>'\".nii.gz")
    text = view([nasty, nasty], tmp_path / "view.html").page.read_text()
    assert "<b onmouseover" not in text and text.count("<script") == text.count("</script>")


def test_without_the_viewers_script_still_slices_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_page, "SCRIPT", "reports/static/not-fetched.js")
    text = view([one_volume(tmp_path)], tmp_path / "view.html").page.read_text()
    assert "3D panes are missing" in text and text.count("data:image/png") == 3
    assert "<canvas" not in text and "volume-0" not in text


def test_a_still_sagittal_slice_has_the_front_on_the_left_as_panes_have(tmp_path: Path) -> None:
    head = np.zeros((6, 8, 5), np.float32)
    head[:, 6:] = 1  # the front, in RAS order
    nib.save(nib.Nifti1Image(head, np.eye(4)), tmp_path / "head.nii.gz")
    text = view([tmp_path / "head.nii.gz"], tmp_path / "view.html").page.read_text()
    (address,) = re.findall(r'base64,([^"]+)" alt="[^"]*sagittal slice', text)
    picture = np.asarray(Image.open(BytesIO(base64.b64decode(address))).convert("L"))
    assert picture[:, 0].min() > picture[:, -1].max()


@pytest.fixture(scope="module")
def predictions(finished_run: Path, toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "predictions"
    predict([finished_run], [toy_cohort], out)
    return out


@needs_viewer
def test_a_case_that_was_predicted_as_dicom_is_shown_with_its_parametric_map(
    finished_run: Path, tmp_path: Path
) -> None:
    write_source(tmp_path / "in" / "p1", np.rint(pair(1, 5.0)[0]).astype(np.int16), spacing=(1.0, 1.0, 3.0))
    for name, container in (("dicom", "dicom"), ("nifti", "nifti")):
        predict(finished_run, [tmp_path / "in"], tmp_path / name, container=container)  # type: ignore[arg-type]
    page = tmp_path / "view.html"
    seen = view([tmp_path / "dicom"], page)
    assert seen.titles == ("Source (t1)", "Synthetic (t2)", "Expected error") and seen.notes == ()
    _, synthetic, error = volumes_in(seen.page.read_text())
    expected = nib.as_closest_canonical(nib.load(tmp_path / "nifti" / "p1_expected-error.nii.gz"))
    assert np.allclose(error.affine, expected.affine, atol=1e-4) and synthetic.shape == error.shape
    np.testing.assert_allclose(np.asarray(error.dataobj), np.asarray(expected.dataobj), rtol=1e-6)
    file = tmp_path / "dicom" / "p1" / "expected-error.dcm"
    assert view([file], page).titles == ("expected-error.dcm (synthetic)",)
    seen = view([tmp_path / "dicom" / "p1", tmp_path / "in" / "p1"], page)  # the former has a map beside its series
    assert seen.titles == ("dicom/p1 (synthetic)", "in/p1")
    made = [tmp_path / "nifti" / f"p1_{name}.nii.gz" for name in ("t2", "mask")]
    assert view(made, page).titles == ("p1_t2.nii.gz (synthetic)", "p1_mask.nii.gz")
    report = pydicom.dcmread(file)
    report.SeriesInstanceUID, report.SOPInstanceUID = generate_uid(), generate_uid()
    del report.FloatPixelData, report.SyntheticData
    report.Modality = "SR"
    report.save_as(tmp_path / "dicom" / "p1" / "report.dcm")
    assert view([tmp_path / "dicom" / "p1"], page).titles == ("p1 (synthetic)",)  # of what is shown, it is said
    (tmp_path / "dicom" / "p1" / "report.dcm").unlink()
    cut = pydicom.dcmread(file)
    cut.FloatPixelData = cut.FloatPixelData[:-400]
    cut.save_as(file)
    with pytest.raises(VolumeError, match="bytes of pixels"):
        view([file], page)


@needs_viewer
def test_a_case_of_a_prediction_shows_source_synthesis_and_expected_error(predictions: Path, tmp_path: Path) -> None:
    content = json.loads((predictions / "predictions.json").read_text())
    entry = content["cases"][1]
    several = tmp_path / "out"
    shutil.copytree(predictions, several / "predictions" / "1")
    for place in (predictions, predictions.parent, several):  # the folder of chiasm run holds predictions/
        seen = view([place], tmp_path / "view.html", case=entry["case"])
        assert seen.titles == ("Source (t1)", "Synthetic (t2)", "Expected error") and seen.notes == ()
    text = seen.page.read_text()
    for image, name in zip(
        volumes_in(text), (entry["sources"][0], entry["image"], entry["expected_error"]), strict=True
    ):
        expected = nib.as_closest_canonical(nib.load(predictions / name))
        assert np.allclose(image.affine, expected.affine, atol=1e-4)
        assert np.array_equal(np.asarray(image.dataobj, np.float32), np.asarray(expected.dataobj, np.float32))
    assert [pane["colours"] for pane in settings_in(text)["panes"]] == ["gray", "gray", "expected"]
    first = view([predictions], tmp_path / "view.html")
    assert f"<h1>{content['cases'][0]['case']}</h1>" in first.page.read_text()


def test_a_case_that_is_not_there_or_was_changed_is_refused(predictions: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no case 'cas'"):
        view([predictions], case="cas")
    copy = shutil.copytree(predictions, tmp_path / "copy")
    entry = json.loads((copy / "predictions.json").read_text())["cases"][0]
    shutil.copy(copy / entry["mask"], copy / entry["image"])
    with pytest.raises(RunError, match="was changed after chiasm predict wrote it"):
        view([copy])


def test_a_source_that_is_gone_is_named_and_the_others_are_shown(predictions: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(predictions, tmp_path / "copy")
    file = copy / "predictions.json"
    content = json.loads(file.read_text())
    for entry in content["cases"]:
        entry["sources"] = ["../gone/t1.nii.gz"]
    file.write_text(json.dumps(content | {"written_in": str(tmp_path / "elsewhere")}))
    seen = view([copy])
    assert seen.titles == ("Synthetic (t2)", "Expected error")
    assert len(seen.notes) == 1 and "gone/t1.nii.gz is not there any more" in seen.notes[0]
    assert "is not there any more" in seen.page.read_text()


def test_the_command_prints_the_page_and_opens_it_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    scan_file, page = one_volume(tmp_path), tmp_path / "view.html"
    for words in ([], ["--open"]):
        with pytest.raises(SystemExit) as ended:
            main(["view", str(scan_file), "-o", str(page), *words])
        assert not ended.value.code
        assert re.search(rf"a\.nii\.gz \([\d.]+ MB\): {re.escape(str(page))}", capsys.readouterr().out)
    assert opened == [page.as_uri()]
    with pytest.raises(SystemExit) as ended:
        main(["view", str(tmp_path / "absent.nii")])
    assert ended.value.code == 2 and "does not exist" in capsys.readouterr().err
