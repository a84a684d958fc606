"""`chiasm convert`: what a cohort is stays the same in every layout, and nobody's files are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.cli import main
from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.conversion import NOTE, convert
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.volumes import read_volume

NAMES = ("Brats18_TCIA01_201_1", "Brats18_TCIA02_135_1", "Brats18_TCIA02_135_2", "Brats18_CBICA_AAB_1")
SPLITS = {NAMES[0]: "test", NAMES[3]: "validation"}


def oblique(seed: int) -> NDArray[np.float64]:
    """A head turned by a few degrees, voxels of 1 x 1.1 x 2.5 mm."""
    a, b = 0.1 + 0.02 * seed, 0.07
    around_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    around_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = around_z @ around_x @ np.diag([1, 1.1, 2.5])
    matrix[:3, 3] = (-20.5, 13.25, 7 + seed)
    return matrix


def write_image(path: Path, seed: int, *, labels: bool = False) -> Path:
    rng = np.random.default_rng(seed)
    array = (
        rng.integers(0, 5, (8, 9, 6)).astype(np.uint8) if labels else rng.gamma(2, 100, (8, 9, 6)).astype(np.float32)
    )
    if labels:
        array[array == 3] = 4
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, oblique(seed // 10)), path)
    return path


@pytest.fixture
def brats(tmp_path: Path) -> Path:
    folder = tmp_path / "brats"
    for number, name in enumerate(NAMES):
        for role, kind in enumerate(("t1", "t2", "seg")):
            write_image(folder / name / f"{name}_{kind}.nii.gz", 10 * number + role, labels=kind == "seg")
    notes = {name: {"split": split} for name, split in SPLITS.items()}
    (folder / "cohort.json").write_text(json.dumps({"cases": notes}))
    return folder


def facts(cohort: Cohort) -> dict[str, object]:
    return {case.id: (case.subject, case.site, case.split, sorted(case.images)) for case in cohort.cases}


def check_same_files(before: Case, after: Case) -> None:
    for name, path in before.images.items():
        one, other = read_volume(path), read_volume(after.images[name])
        np.testing.assert_array_equal(one.array, other.array)
        np.testing.assert_allclose(one.geometry.affine, other.geometry.affine, atol=1e-5)
    assert (before.labels is None) == (after.labels is None)
    if before.labels is not None and after.labels is not None:
        one, other = read_volume(before.labels, labels=True), read_volume(after.labels, labels=True)
        np.testing.assert_array_equal(one.array, other.array)


def test_round_the_layouts_a_cohort_stays_what_it_was(brats: Path, tmp_path: Path) -> None:
    wanted = find_cohort(brats)
    assert {case.split for case in wanted.cases} == {"test", "validation", None}
    assert {case.site for case in wanted.cases} == {"TCIA01", "TCIA02", "CBICA"}
    place = brats
    for to, layout in (("bids", "bids"), ("nnunet", "nnunet"), ("konfai", "konfai"), ("brats", "brats-2018")):
        made = convert(place, to, tmp_path / f"as-{to}")
        assert made.problems == () and made.cases == tuple(sorted(NAMES))
        found = find_cohort(made.folder)
        assert found.layout == layout and facts(found) == facts(wanted) and found.regions == wanted.regions
        for before, after in zip(wanted.cases, found.cases, strict=True):
            check_same_files(before, after)
        place = made.folder
    assert (place / NAMES[0] / f"{NAMES[0]}_t1.nii.gz").is_file()


def test_other_tools_find_what_their_layouts_promise(brats: Path, tmp_path: Path) -> None:
    bids = convert(brats, "bids", tmp_path / "bids").folder
    assert "sub-TCIA01201\tTCIA01" in (bids / "participants.tsv").read_text().splitlines()
    session = "sub-TCIA02135/ses-Brats18TCIA021352/anat/sub-TCIA02135_ses-Brats18TCIA021352_T1w.nii.gz"
    assert (bids / session).is_file()
    assert json.loads((bids / "dataset_description.json").read_text())["DatasetType"] == "raw"
    nnunet = convert(brats, "nnunet", tmp_path / "nnunet").folder
    dataset = json.loads((nnunet / "dataset.json").read_text())
    assert dataset["channel_names"] == {"0": "t1", "1": "t2"} and dataset["numTraining"] == 3
    assert dataset["labels"] == {"background": 0, "WT": [1, 2, 4], "TC": [1, 4], "ET": 4}
    assert [path.name for path in sorted((nnunet / "imagesTs").iterdir())] == [
        f"{NAMES[0]}_000{n}.nii.gz" for n in (0, 1)
    ]
    assert (convert(brats, "konfai", tmp_path / "konfai").folder / "Dataset" / NAMES[1] / "T2.mha").is_file()


def test_files_that_stay_are_links_or_copies_as_asked_for(brats: Path, tmp_path: Path) -> None:
    linked, copied = convert(brats, "nnunet", tmp_path / "a"), convert(brats, "nnunet", tmp_path / "b", copy=True)
    source = brats / NAMES[1] / f"{NAMES[1]}_t1.nii.gz"
    name = f"imagesTr/{NAMES[1]}_0000.nii.gz"
    assert (linked.folder / name).samefile(source) and not (copied.folder / name).samefile(source)
    assert (copied.folder / name).read_bytes() == source.read_bytes()
    assert linked.files["linked"] == copied.files["copied"] == 12
    assert convert(brats, "konfai", tmp_path / "c").files["rewritten"] == 12


def test_the_same_call_again_replaces_its_own_files_and_no_others(brats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(brats, "nnunet", out)
    (out / "mine.txt").write_text("mine")
    convert(brats, "konfai", out)
    assert (out / "mine.txt").read_text() == "mine" and not (out / "imagesTr").exists()
    assert find_cohort(out).layout == "konfai"
    other = tmp_path / "other"
    taken = other / NAMES[0] / f"{NAMES[0]}_t1.nii.gz"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    with pytest.raises(RunError, match="not written by chiasm"):
        convert(brats, "brats", other)
    assert taken.read_text() == "mine" and not (other / NOTE).exists()


def test_what_cannot_be_converted_is_named_and_the_rest_goes_on(
    brats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = brats / NAMES[0] / f"{NAMES[0]}_t2.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    (brats / NAMES[3] / f"{NAMES[3]}_t2.nii.gz").unlink()
    with pytest.raises(SystemExit) as done:
        main(["convert", str(brats), "--to", "konfai", "-o", str(tmp_path / "out")])
    told = "".join(capsys.readouterr())
    assert done.value.code == 3 and bad.name in told and "3 cases (8 rewritten files)" in told
    assert not (tmp_path / "out" / "Dataset" / NAMES[0]).exists()
    assert {case.id for case in find_cohort(tmp_path / "out").cases} == {*NAMES[1:]}
    made = convert(brats, "nnunet", tmp_path / "nnunet")
    assert [problem.reason for problem in made.problems] == ["missing-modality"] and NAMES[3] in made.problems[
        0
    ].message


def test_other_ids_masks_and_modalities_find_a_place_or_are_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(("Ann 1", "Ann-1")):
        for role, kind in enumerate(("T1", "CT", "mask")):
            write_image(data / name / f"{kind}.nii", 10 * number + role, labels=kind == "mask")
    rows = [f"{name},{name},{name}/T1.nii,{name}/CT.nii,{name}/mask.nii" for name in ("Ann 1", "Ann-1")]
    (data / "manifest.csv").write_text("\n".join(["subject,site,t1,ct,mask", *rows]))
    wanted = find_cohort(data)
    bids = convert(data, "bids", tmp_path / "bids")
    assert {problem.modality for problem in bids.problems} == {"ct"} and len(bids.cases) == 2
    found = find_cohort(bids.folder)
    assert [(case.id, case.site, case.mask is not None) for case in found.cases] == [
        (case.id, case.site, True) for case in wanted.cases
    ]
    brats = convert(data, "brats", tmp_path / "brats")
    assert brats.files["packed"] == 2 and {problem.modality for problem in brats.problems} == {"ct", "mask"}
    assert [case.id for case in find_cohort(brats.folder).cases] == [case.id for case in wanted.cases]
    konfai = convert(data, "konfai", tmp_path / "konfai")
    assert not konfai.problems and all(case.mask is not None for case in find_cohort(konfai.folder).cases)


def test_wrong_places_and_layouts_are_refused_before_anything_is_written(brats: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean nnunet"):
        convert(brats, "nnunett", tmp_path / "out")
    with pytest.raises(RunError, match="inside the folder of the data"):
        convert(brats, "bids", brats / "bids")
    with pytest.raises(CohortError, match="does not exist"):
        convert(tmp_path / "nowhere", "bids", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (brats / "bids").exists()


def test_a_monai_data_list_is_read(brats: Path) -> None:
    first, second = (f"{name}/{name}" for name in NAMES[:2])
    entries = {
        "modality": {"0": "T1", "1": "T2"},
        "training": [
            {"image": [f"./{first}_t1.nii.gz", f"./{first}_t2.nii.gz"], "label": f"{first}_seg.nii.gz", "fold": 0}
        ],
        "validation": [{"t1": f"{second}_t1.nii.gz", "t2": f"{second}_t2.nii.gz", "id": "p2"}],
        "test": [],
    }
    path = brats / "datalist.json"
    path.write_text(json.dumps(entries))
    found = {case.id: case for case in find_cohort(path).cases}
    assert set(found) == {f"{NAMES[0]}_t1", "p2"}
    one, other = found[f"{NAMES[0]}_t1"], found["p2"]
    assert set(one.images) == set(other.images) == {"t1", "t2"} and one.labels is not None
    assert (one.split, other.split) == ("train", "validation")
    path.write_text(json.dumps({"training": [{"fold": 1}]}))
    with pytest.raises(CohortError, match="an entry without a file"):
        find_cohort(path)
    path.write_text(json.dumps({"training": ["../elsewhere.nii.gz"]}))
    with pytest.raises(CohortError, match=r"holds '\.\.'"):
        find_cohort(path)
