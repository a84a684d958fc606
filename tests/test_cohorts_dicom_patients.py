"""Folders of patients with DICOM: which series belong together, what each is, and what is kept out of training."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from chiasm.cli import make_app
from chiasm.cohorts.dicom_modalities import guess_modality
from chiasm.cohorts.dicom_patients import Selection, parse_rules
from chiasm.cohorts.discovery import find_cohort, select_cases
from chiasm.errors import CohortError, RecipeError
from chiasm.prediction.case_files import warn_of_marks
from chiasm.prediction.folders import predict
from chiasm.preparation.inspection import inspect_folder
from chiasm.registration.cohort import hashes_of
from chiasm.volumes import Reading, check_pair, read_volume
from chiasm.volumes.dicom_scan import find_series
from chiasm.volumes.screening import volume_files
from conftest import QUICK, REAL
from dicom_patients import (
    TELLTALE,
    in_order,
    rewrite,
    scan,
    segmentation,
    write_enhanced_mixed,
    write_mixed,
    write_source,
)
from synthetic_cohort import SHAPE, pair

SMALL = (12, 14, 4)


def series(folder: Path, patient: str, description: str, seed: int = 0, **changes: object) -> Path:
    """Write a small series of a patient, all of whose series lie in one study."""
    study = f"1.2.826.0.1.3680043.10.97.{sum(patient.encode())}"
    values = {"PatientID": patient, "SeriesDescription": description, "StudyInstanceUID": study} | changes
    write_source(folder, scan(SMALL, seed), **values)
    return folder


def patient(folder: Path, name: str, seed: int = 0, **changes: object) -> None:
    """Write a T1 and a T2 of a patient, their files in one folder each."""
    series(folder / "a", name, "ax t1 se", seed, SeriesNumber=2, **changes)
    series(folder / "b", name, "ax t2 tse", seed + 50, SeriesNumber=3, **changes)


def ids(root: Path, **choice: object) -> dict[str, list[str]]:
    return {case.id: sorted(case.images) for case in find_cohort(root, selection=Selection(**choice)).cases}


# --- which folders are patients ----------------------------------------------------------------------------------


def test_each_folder_is_a_patient_with_its_series(tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        patient(tmp_path / name, name, number)
    cohort = find_cohort(tmp_path)
    assert cohort.layout == "dicom"
    assert [(case.id, case.subject) for case in cohort.cases] == [("ana", "ana"), ("bea", "bea")]
    np.testing.assert_array_equal(read_volume(cohort.cases[1].images["t2"]).array, scan(SMALL, 51))
    assert not cohort.problems


def test_folders_named_after_modalities_are_one_patients(tmp_path: Path) -> None:
    for number, name in enumerate(("p1", "p2")):
        series(tmp_path / f"{name}_T1c", name, "", number)
        series(tmp_path / f"{name}_T2", name, "", number + 50)
    assert ids(tmp_path) == {"p1": ["t1ce", "t2"], "p2": ["t1ce", "t2"]}


def test_one_study_in_all_folders_of_the_root_is_one_patients(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    assert ids(tmp_path / "p") == {"p": ["t1", "t2"]}


def test_files_of_all_series_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        patient(tmp_path / name, name, number)
        for folder in ("a", "b"):
            for file in (tmp_path / name / folder).iterdir():
                file.rename(tmp_path / name / f"{folder}{file.name}")
            (tmp_path / name / folder).rmdir()
    cohort = find_cohort(tmp_path)
    assert [case.id for case in cohort.cases] == ["ana", "bea"]
    np.testing.assert_array_equal(read_volume(cohort.cases[0].images["t2"]).array, scan(SMALL, 50))


def test_patients_in_one_folder_are_told_apart_by_a_hash(tmp_path: Path) -> None:
    for number, name in enumerate(("Zwetschge^Ottilie", "Quack^Hilarius")):
        for kind, description in (("a", "t1 se"), ("b", "t2 tse")):
            series(
                tmp_path / f"scratch{number}{kind}", name, description, number + 50 * (kind == "b"), SeriesNumber=number
            )
            (tmp_path / "all").mkdir(exist_ok=True)
            for file in (tmp_path / f"scratch{number}{kind}").iterdir():
                file.rename(tmp_path / "all" / f"{number}{kind}{file.name}")
            (tmp_path / f"scratch{number}{kind}").rmdir()
    found = ids(tmp_path / "all")
    assert list(found.values()) == [["t1", "t2"], ["t1", "t2"]]
    assert all(name.startswith("all-") and len(name) == 12 for name in found)


def test_two_folders_of_one_person_have_one_subject(tmp_path: Path) -> None:
    patient(tmp_path / "visit1", "same", 0)
    patient(tmp_path / "visit2", "same", 1, StudyInstanceUID="1.2.3.4")
    patient(tmp_path / "visit3", "other", 2)
    assert [case.subject for case in find_cohort(tmp_path).cases] == ["visit1", "visit1", "visit3"]


def test_zip_archives_are_patients_too(tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        patient(tmp_path / "in" / name, name, number)
        (tmp_path / "out").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "out" / f"{name}.zip", "w") as archive:
            for file in sorted((tmp_path / "in" / name).rglob("IM*")):
                archive.write(file, file.relative_to(tmp_path / "in"))
    cohort = find_cohort(tmp_path / "out")
    assert {case.id: sorted(case.images) for case in cohort.cases} == {"ana": ["t1", "t2"], "bea": ["t1", "t2"]}
    np.testing.assert_array_equal(read_volume(cohort.cases[1].images["t1"]).array, scan(SMALL, 1))
    assert volume_files(cohort.cases[1].images["t1"]) == [tmp_path / "out" / "bea.zip"]
    assert ids(tmp_path / "out" / "ana.zip") == {"ana": ["t1", "t2"]}


def test_a_series_whose_files_lie_among_others_in_two_folders_is_left_out(tmp_path: Path) -> None:
    patient(tmp_path / "p" / "q", "p")
    next((tmp_path / "p" / "q" / "a").iterdir()).rename(tmp_path / "p" / "q" / "b" / "moved")
    cohort = find_cohort(tmp_path / "p")
    assert [problem.reason for problem in cohort.problems] == ["scattered"]
    assert sorted(cohort.cases[0].images) == ["t2"]


# --- which modality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "modality", "agent", "expected"),
    [
        ("AX T1 SE", "MR", "", "t1"),
        ("ax t1 se post", "MR", "", "t1ce"),
        ("T1_MPRAGE", "MR", "Gadovist", "t1ce"),
        ("T2 FLAIR tra", "MR", "Gadovist", "flair"),
        ("t2_tse_tra", "MR", "", "t2"),
        ("t2* gre", "MR", "", None),
        ("ep2d_diff_ADC", "MR", "", None),
        ("T1 FLAIR", "MR", "", None),
        ("anything", "CT", "", "ct"),
        ("t1", "US", "", None),
    ],
)
def test_a_modality_is_guessed_only_where_words_leave_no_choice(
    tmp_path: Path, description: str, modality: str, agent: str, expected: str | None
) -> None:
    changes = {"Modality": modality, "ContrastBolusAgent": agent} if agent else {"Modality": modality}
    (found,) = find_series(series(tmp_path / "x", "p", description, **changes))
    assert guess_modality(found, [found, found]) == expected


def test_rules_choose_by_number_folder_or_words(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    assert ids(tmp_path / "p", series={"t1": "2", "pd": "t1 se"}) == {"p": ["pd", "t1"]}
    case = find_cohort(tmp_path / "p", selection=Selection(series={"t1": "b"})).cases[0]
    np.testing.assert_array_equal(read_volume(case.images["t1"]).array, scan(SMALL, 50))


def test_a_rule_for_one_modality_leaves_the_others_recognised(tmp_path: Path) -> None:
    series(tmp_path / "p" / "x", "p", "brain", 1, SeriesNumber=1)
    series(tmp_path / "p" / "y", "p", "ax t2 tse", 2, SeriesNumber=2)
    series(tmp_path / "p" / "z", "p", "head", 3, SeriesNumber=3, modality="CT")
    assert ids(tmp_path / "p", series={"mr": "brain"}) == {"p": ["ct", "mr", "t2"]}
    assert ids(tmp_path / "p", series={"t1": "2"}) == {"p": ["ct", "t1"]}  # what a rule takes is nothing else
    assert ids(tmp_path / "p", series={"ct": "nothing"}) == {"p": ["t2"]}


def test_problems_of_modalities_that_nobody_asked_for_are_none(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    series(tmp_path / "p" / "c", "p", "another t2", 3, SeriesNumber=4)
    cohort = find_cohort(tmp_path / "p", selection=Selection(series={"t1": "t1 se", "pd": "1"}))
    assert [(problem.reason, problem.modality) for problem in cohort.problems] == [("several-series", "t2")]
    assert select_cases(cohort, ["t1"], "pd").problems == ()


def test_rules_may_stand_in_the_folder(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    (tmp_path / "p" / "cohort.json").write_text(json.dumps({"series": {"T1c": "t1 se"}}))
    assert ids(tmp_path / "p") == {"p": ["t1ce", "t2"]}
    (tmp_path / "p" / "cohort.json").write_text(json.dumps({"series": ["t1"]}))
    with pytest.raises(CohortError):
        find_cohort(tmp_path / "p")


def test_series_that_a_rule_cannot_tell_apart_are_listed_without_descriptions(tmp_path: Path) -> None:
    series(tmp_path / "p" / "a", "p", "t1 of Ottilie", 1, SeriesNumber=1)
    series(tmp_path / "p" / "b", "p", "t1 of Ottilie", 2, SeriesNumber=2)
    cohort = find_cohort(tmp_path / "p")
    (problem,) = cohort.problems
    assert problem.reason == "several-series"
    assert "1: MR, 4 images" in problem.message
    assert "Ottilie" not in problem.message
    assert any("Ottilie" in line for line in cohort.listing)
    with pytest.raises(CohortError, match="--series"):
        select_cases(cohort, ["t1"], None)


def test_rules_are_read_or_refused() -> None:
    assert parse_rules(["T1c=post contrast", "t2=5"]) == {"t1ce": "post contrast", "t2": "5"}
    assert parse_rules(["SPACE"], ["t2"]) == {"t2": "SPACE"}
    assert parse_rules(["TE=30"], ["t2"]) == {"t2": "TE=30"} == parse_rules(["t2=TE=30"])
    for wrong in (["SPACE"], ["TE=30"], ["t1=3", "b=1000"], ["t1="], ["=x"], ["t1=a", "T1w=b"]):
        with pytest.raises(RecipeError, match="MODALITY=WORDS"):
            parse_rules(wrong)


# --- several kinds of images in one series -----------------------------------------------------------------------

KINDS = [{"ImageType": ["ORIGINAL", "PRIMARY", letter]} for letter in "MP"]
GROUPS = [{"MRImageFrameTypeSequence": {"ComplexImageComponent": word}} for word in ("MAGNITUDE", "PHASE")]


def two_kinds(place: Path, seed: int = 0, *, enhanced: bool = False, **changes: object) -> None:
    """Write magnitude and phase of a patient as one series, of classic files or as one file."""
    arrays = [scan(SMALL, seed), scan(SMALL, seed + 50)]
    if enhanced:
        write_enhanced_mixed(place / "enhanced.dcm", GROUPS, arrays)
    else:
        write_mixed(place / "a", KINDS, arrays, SeriesDescription="ax t1 se", **changes)


@pytest.mark.parametrize("enhanced", [False, True])
def test_kinds_of_images_are_refused_by_name_and_chosen_by_rules(tmp_path: Path, enhanced: bool) -> None:
    two_kinds(tmp_path / "p", enhanced=enhanced)
    role = "mr" if enhanced else "t1"
    (problem,) = find_cohort(tmp_path / "p").problems
    assert problem.reason == "several-series" and f"may be {role}: 1: MR" in problem.message
    assert (
        ", magnitude; 2: MR" in problem.message
        and f"choose with chiasm train --series {role}=NUMBER" in problem.message
    )
    (asked,) = find_cohort(tmp_path / "p", selection=Selection(alone="pd")).problems
    assert "several series that may be pd" in asked.message
    rules = {"t1": "magnitude", "t2": "Phase"}
    (case,) = find_cohort(tmp_path / "p", selection=Selection(series=rules)).cases
    for name, seed in (("t1", 0), ("t2", 50)):
        np.testing.assert_array_equal(read_volume(case.images[name]).array, scan(SMALL, seed))
    hashes = hashes_of(case, ["t1", "t2"])
    assert hashes["t1"] != hashes["t2"]
    listing = find_cohort(tmp_path / "p", selection=Selection(series=rules)).listing
    assert any("axial, phase" in line and line.endswith("-> t2") for line in listing)


SAME = {"PatientID": "x", "StudyInstanceUID": "1.2.3"}
T1 = {"SeriesDescription": "ax t1", "SeriesNumber": 1, **SAME}
M = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"]}
T2 = {"SeriesDescription": "ax t2 tse", "SeriesNumber": 2, **SAME}
PHASE = {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}


def test_a_rule_for_a_kind_chooses_among_series_of_its_modality_and_the_others_keep_theirs(tmp_path: Path) -> None:
    kinds: list[dict[str, object]] = [M, PHASE]
    write_mixed(tmp_path / "p" / "a", kinds, [scan(seed=0), scan(seed=1)], **T1)
    write_source(tmp_path / "p" / "b", scan(seed=2), **T2, **M)
    for word, seed in (("magnitude", 0), ("phase", 1)):
        (case,) = find_cohort(tmp_path, selection=Selection(series={"t1": word})).cases
        np.testing.assert_array_equal(read_volume(case.images["t1"]).array, scan(seed=seed))
        np.testing.assert_array_equal(read_volume(case.images["t2"]).array, scan(seed=2))
    assert "t1" not in find_cohort(tmp_path, selection=Selection(series={"t1": "TE=77"})).cases[0].images


@pytest.mark.parametrize("kind", [["P", "ND"], ["DIFFUSION", "ADC"], ["I_FFE", "I"]], ids="-".join)
def test_a_whole_series_of_phase_or_a_map_is_taken_only_when_it_is_asked_for(tmp_path: Path, kind: list[str]) -> None:
    image_type = ["ORIGINAL", "PRIMARY", *kind]
    place = tmp_path / "P07"
    write_source(place / "a", scan(seed=1), **T1, ImageType=image_type)
    for selection in (Selection(), Selection(alone="t1")):
        cohort = find_cohort(tmp_path, selection=selection)
        assert cohort.cases == ()
        assert "P07: no series of this patient is recognised" in cohort.notes[0].message
        assert "--series t1=1" in cohort.notes[0].message
    (case,) = find_cohort(tmp_path, selection=Selection(series={"t1": "1"})).cases
    np.testing.assert_array_equal(read_volume(case.images["t1"]).array, scan(seed=1))
    write_source(place / "b", scan(seed=2), **(T1 | {"SeriesNumber": 3}), **M)
    (case,) = find_cohort(tmp_path).cases
    np.testing.assert_array_equal(read_volume(case.images["t1"]).array, scan(seed=2))


def test_every_verb_refuses_several_kinds_with_the_same_list(finished_run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        two_kinds(tmp_path / "in" / name, number, PatientID=name)
    listed = "1: MR, 4 images, 12x14x4, 0.9x1.1x2.5 mm, axial, magnitude; 2: MR, 4 images"
    place, out = str(tmp_path / "in"), str(tmp_path / "out")
    pairs = ["--source", "t1", "--target", "t2", "-o", out]
    for words in (
        ["inspect", place],
        ["plan", place, *pairs],
        ["train", place, *pairs],
        ["predict", str(finished_run), place, "-o", out],
        ["predict", str(finished_run), f"{place}/ana/a", "-o", out],
    ):
        done = CliRunner().invoke(make_app(), words)
        assert done.exit_code != 0
        assert listed in str(done.exception) + done.output
        assert "--series" in str(done.exception) + done.output
    made = predict(finished_run, [tmp_path / "in" / "ana"], tmp_path / "made", series=["magnitude"])
    assert len(made.manifest.cases) == 1 and not made.problems


# --- what is left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tag", "mark"), [("BurnedInAnnotation", "burned-in"), ("SyntheticData", "synthetic")])
def test_marked_images_are_kept_out_unless_allowed(tmp_path: Path, tag: str, mark: str) -> None:
    patient(tmp_path / "p", "p")
    for file in (tmp_path / "p" / "a").iterdir():
        rewrite(file, lambda d: d.update({tag: "YES"}))
    cohort = find_cohort(tmp_path / "p")
    assert [problem.reason for problem in cohort.problems] == [mark]
    assert sorted(cohort.cases[0].images) == ["t2"]
    assert ids(tmp_path / "p", allow=(mark,)) == {"p": ["t1", "t2"]}
    (tmp_path / "p" / "manifest.csv").write_text("subject,t1,t2\np,a,b\n")
    by_manifest = find_cohort(tmp_path / "p")
    assert [problem.reason for problem in by_manifest.problems] == [mark]
    assert sorted(by_manifest.cases[0].images) == ["t2"]
    (tmp_path / "p" / "cohort.json").write_text(json.dumps({"allow": [mark]}))
    assert ids(tmp_path / "p") == {"p": ["t1", "t2"]}


def test_a_series_with_a_fault_is_named_and_the_other_stays(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    in_order((tmp_path / "p" / "a").iterdir())[1].unlink()
    cohort = find_cohort(tmp_path / "p")
    assert [problem.reason for problem in cohort.problems] == ["missing-slice"]
    assert sorted(cohort.cases[0].images) == ["t2"]


def test_an_archive_that_cannot_be_trusted_costs_its_own_patient_only(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        patient(tmp_path / name, name)
    (tmp_path / "p3.zip").write_bytes(b"PK\3\4" + bytes(40))
    with zipfile.ZipFile(tmp_path / "p4.zip", "w") as archive:
        archive.writestr("../outside", b"x")
    found = find_cohort(tmp_path)
    assert [case.id for case in found.cases] == ["p1", "p2"]
    assert {(problem.case, problem.reason) for problem in found.problems} == {("p3", "corrupted"), ("p4", "zip-slip")}


def test_where_the_only_scan_is_left_out_the_error_says_why_and_what_to_do(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "p1" / "ct", modality="CT"))
    for k, path in enumerate(files):
        rewrite(path, lambda d, k=k: setattr(d, "ImagePositionPatient", [0, 0.8 * k, 2.5 * k]))
    cohort = find_cohort(tmp_path, selection=Selection(alone="ct"))
    with pytest.raises(CohortError, match=r"no case has the modality 'ct'.*tilted gantry.*--resample-tilt"):
        select_cases(cohort, ["ct"], None)
    assert find_cohort(tmp_path, selection=Selection(alone="ct", reading=Reading(resample_tilt=True))).cases


def with_localizer(folder: Path) -> None:
    """Put a localizer among the images of a series."""
    first = in_order(folder.iterdir())[0]
    shutil.copy(first, folder / "scout")
    values = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SOPInstanceUID": "1.2.3.4.5"}
    rewrite(folder / "scout", lambda d: d.update(values | {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}))


def test_every_verb_explains_a_localizer_among_images_in_the_same_words(finished_run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        series(tmp_path / "in" / name / "ct", name, "head", number, modality="CT")
        series(tmp_path / "in" / name / "mr", name, "ax t1 se", number)
        with_localizer(tmp_path / "in" / name / "ct")
        series(tmp_path / "t1" / name / "mr", name, "ax t1 se", number)
        with_localizer(tmp_path / "t1" / name / "mr")
    told = "holds a localizer among its images (found 1 of 5 images with ImageType LOCALIZER: scout)."
    place, other, out = str(tmp_path / "in"), str(tmp_path / "t1"), str(tmp_path / "out")
    pairs = ["--source", "mr", "--target", "ct", "-o", out]
    for words in (
        ["inspect", place],
        ["inspect", place, "--series", "mr=t1"],
        ["plan", place, *pairs],
        ["train", place, *pairs, "--series", "mr=t1"],
        ["predict", str(finished_run), other, "-o", out],
        ["predict", str(finished_run), f"{other}/ana/mr", "-o", out],
        ["predict", str(finished_run), f"{other}/ana/mr/IM00000", "-o", out],
    ):
        done = CliRunner().invoke(make_app(), words)
        assert done.exit_code != 0
        assert told in str(done.exception) + done.output, words
    assert ids(tmp_path / "in") == {"ana": ["mr"], "bea": ["mr"]}  # the name of its folder says so


def test_a_patient_with_nothing_but_a_localizer_is_named(tmp_path: Path) -> None:
    patient(tmp_path / "ana", "ana")
    series(tmp_path / "bea" / "x", "bea", "scout", 1, modality="CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    cohort = find_cohort(tmp_path)
    assert [(problem.case, problem.reason) for problem in cohort.problems] == [("bea", "localizer")]


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    report = series(tmp_path / "p" / "c", "p", "report", Modality="SR")
    for file in report.iterdir():
        rewrite(file, lambda d: [d.__delitem__(name) for name in ("PixelData", "Rows", "Columns")])
    assert "  and 1 without images, such as reports" in find_cohort(tmp_path / "p").listing
    assert ids(tmp_path / "p") == {"p": ["t1", "t2"]}


def test_a_segmentation_is_the_labels_of_the_scans_in_its_frame(tmp_path: Path) -> None:
    series(tmp_path / "p" / "a", "p", "t1 se")
    labels = np.zeros(SMALL, np.uint8)
    labels[3:7, 4:9, 1:2] = 1
    segmentation(in_order((tmp_path / "p" / "a").iterdir()), labels, tmp_path / "p" / "seg")
    found = inspect_folder(tmp_path / "p")
    assert not found.problems
    rewrite(tmp_path / "p" / "seg", lambda d: setattr(d, "SeriesDescription", "tumour of t1 se"))
    assert ids(tmp_path / "p", series={"mr": "se"}) == {"p": ["mr"]}  # not the segmentation's name
    assert found.summaries[0].regions_ml == {"lesion": pytest.approx(20 * 0.9 * 1.1 * 2.5 / 1000)}
    series(tmp_path / "p" / "b", "p", "t2 tse", FrameOfReferenceUID="1.2.3")
    assert find_cohort(tmp_path / "p").cases[0].labels is None  # of which of the two?
    rules = {"t2": "t2", "labels": "SEG"}
    assert find_cohort(tmp_path / "p", selection=Selection(series=rules)).cases[0].labels == tmp_path / "p" / "seg"


def test_a_segmentation_may_be_the_mask_and_two_in_one_series_are_none(tmp_path: Path) -> None:
    series(tmp_path / "p" / "a", "p", "t1 se")
    files = in_order((tmp_path / "p" / "a").iterdir())
    lesion, head = np.zeros(SMALL, np.uint8), np.zeros(SMALL, np.uint8)
    lesion[3:7, 4:9, 1:2], head[1:-1, 1:-1, 1:-1] = 1, 1
    for folder in ("masks", "seg"):
        (tmp_path / "p" / folder).mkdir()
    mask = segmentation(files, head, tmp_path / "p" / "masks" / "head")
    rewrite(mask, lambda d: setattr(d, "SeriesInstanceUID", "1.2.3.4"))
    rewrite(mask, lambda d: setattr(d, "SeriesDescription", "head"))
    labels = segmentation(files, lesion, tmp_path / "p" / "seg" / "lesion")
    rewrite(labels, lambda d: setattr(d, "SeriesDescription", "lesion"))
    rules = Selection(series={"labels": "lesion", "mask": "head"})
    (case,) = find_cohort(tmp_path / "p", selection=rules).cases
    image = read_volume(case.images["t1"])
    for path, right in ((case.mask, head), (case.labels, lesion)):
        assert path is not None
        found = check_pair(image, read_volume(path, labels=True), labels=True)
        np.testing.assert_array_equal(found.array, right)
    second = segmentation(files, head, tmp_path / "p" / "seg" / "second")
    assert pydicom.dcmread(second).SeriesInstanceUID == pydicom.dcmread(labels).SeriesInstanceUID
    np.testing.assert_array_equal(read_volume(labels, labels=True).array[..., 0], lesion[..., 1])
    found = find_cohort(tmp_path / "p", selection=rules)
    assert [problem.reason for problem in found.problems] == ["several-series"]
    assert found.cases[0].labels is None


# --- verbs -------------------------------------------------------------------------------------------------------


def test_inspect_lists_series_with_numbers_and_names_nobody(tmp_path: Path) -> None:
    for number, name in enumerate(("ana", "bea")):
        patient(tmp_path / name, TELLTALE["PatientID"] + name, number)
    done = CliRunner().invoke(make_app(), ["inspect", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "  2: MR, 4 images, 12x14x4, 0.9x1.1x2.5 mm, axial, 'ax t2 tse' -> t2" in done.output
    assert not [value for value in TELLTALE.values() if value in done.output]
    found = inspect_folder(tmp_path / "bea")
    assert [summary.shape for summary in found.summaries] == [SMALL]
    one = CliRunner().invoke(make_app(), ["inspect", str(tmp_path / "ana" / "a")])
    assert "  1: MR, 4 images" in one.output


def test_mumap_and_register_choose_a_series_where_there_are_several(tmp_path: Path) -> None:
    first, second = (np.rint(array).astype(np.int16) for array in pair(3, 5.0, SHAPE)[:2])
    tissue = np.random.default_rng(5).normal(40, 25, SHAPE)
    hounsfield = np.where(first > first.mean(), tissue, -1000).astype(np.int16)
    for number, (name, array) in enumerate((("t1", first), ("t2", second), ("ct", hounsfield)), start=1):
        kind = "CT" if name == "ct" else "MR"
        write_source(
            tmp_path / "p" / name, array, modality=kind, spacing=(1.0, 1.0, 3.0), SeriesNumber=number,
            SeriesDescription=name,
        )  # fmt: skip
    place, out = str(tmp_path / "p"), str(tmp_path / "mu.nii.gz")
    several = CliRunner().invoke(make_app(), ["mumap", place, "-o", out])
    assert several.exit_code != 0 and "--series" in str(several.exception)
    done = CliRunner().invoke(make_app(), ["mumap", place, "-o", out, "--series", "ct"])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(read_volume(tmp_path / "mu.nii.gz").array.max(), 0.1, atol=0.01)
    words = ["register", place, place, "--kind", "rigid", "-o", str(tmp_path / "moved")]
    several = CliRunner().invoke(make_app(), words)
    assert several.exit_code != 0 and "--series" in str(several.exception)
    wrong = CliRunner().invoke(make_app(), [*words, "--series", "t1=t2"])
    assert wrong.exit_code != 0 and "one of moving, fixed" in str(wrong.exception)
    done = CliRunner().invoke(make_app(), [*words, "--series", "moving=t2", "--series", "fixed=1"])
    assert done.exit_code == 0, done.output
    moved = read_volume(tmp_path / "moved" / "moved.nii.gz")
    assert np.corrcoef(moved.array.ravel(), second.ravel())[0, 1] > 0.9  # they lay in one place


def test_an_archive_of_unknown_series_is_listed_though_it_makes_no_case(tmp_path: Path) -> None:
    series(tmp_path / "p" / "x", "p", "unclear", 1, SeriesNumber=1)
    series(tmp_path / "p" / "y", "p", "unclear too", 2, SeriesNumber=2)
    done = CliRunner().invoke(make_app(), ["inspect", str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
    assert "2: MR, 4 images" in done.output


def test_files_of_a_volume_are_those_of_its_series(tmp_path: Path) -> None:
    patient(tmp_path / "p", "p")
    assert volume_files(tmp_path / "p" / "a") == in_order((tmp_path / "p" / "a").iterdir())


def test_a_changed_slice_changes_what_was_prepared(tmp_path: Path) -> None:
    from chiasm.preparation.arrays import cache_key
    from synthetic_cohort import PLAN

    patient(tmp_path / "p", "p")
    (case,) = find_cohort(tmp_path / "p").cases
    before = cache_key(case, PLAN)
    assert before == cache_key(case, PLAN)
    rewrite(next((tmp_path / "p" / "b").iterdir()), lambda d: d.update({"ImageComments": "x"}))
    assert before != cache_key(case, PLAN)


@pytest.mark.slow
@pytest.mark.realdata
def test_the_real_folder_is_one_patient_with_two_modalities_and_a_tilted_ct(tmp_path: Path) -> None:
    for name in ("remind022_T1c", "remind022_T2", "ge_ct_head_tilted"):
        shutil.copytree(REAL / "dicom" / name, tmp_path / name)
    assert ids(tmp_path) == {"remind022": ["t1ce", "t2"]}
    assert [problem.reason for problem in find_cohort(tmp_path).problems] == ["tilt"]
    assert ids(tmp_path, reading=Reading(resample_tilt=True)) == {
        "ge_ct_head_tilted": ["ct"],
        "remind022": ["t1ce", "t2"],
    }


def dicom_case(folder: Path, seed: int, person: str) -> None:
    """Write a T1 and a T2 of the small cohort as DICOM."""
    for number, (kind, array) in enumerate(zip(("t1", "t2"), pair(seed, 5.0)), start=2):
        changes = {"PatientID": person, "SeriesDescription": f"ax {kind}", "SeriesNumber": number}
        changes |= {"StudyInstanceUID": f"1.2.3.{seed}"}
        write_source(folder / f"s{number}", np.rint(array).astype(np.int16), spacing=(1.0, 1.0, 3.0), **changes)


def test_prediction_reads_a_series_and_warns_of_what_it_says(finished_run: Path, tmp_path: Path) -> None:
    dicom_case(tmp_path / "p", 9, "p")
    for file in (tmp_path / "p" / "s2").iterdir():
        rewrite(file, lambda d: d.update({"BurnedInAnnotation": "YES"}))
    by_folder = predict(finished_run, [tmp_path / "p"], tmp_path / "a", series=["ax t1"])
    (entry,) = by_folder.manifest.cases
    assert entry.case == "p"
    assert "text is drawn into its images" in entry.warnings[0]
    image = read_volume(tmp_path / "a" / entry.image, allow_constant=True)
    source = read_volume(tmp_path / "p" / "s2")
    np.testing.assert_allclose(image.geometry.affine, source.geometry.affine, atol=1e-4)
    alone = predict(finished_run, [tmp_path / "p" / "s2"], tmp_path / "b")
    (same,) = alone.manifest.cases
    assert (tmp_path / "a" / entry.image).read_bytes() == (tmp_path / "b" / same.image).read_bytes()
    written = "".join(path.read_text() for path in tmp_path.glob("[ab]/*.json"))
    assert not [value for value in (*TELLTALE.values(), "ax t1") if value in written]
    with pytest.raises(CohortError, match="--series"):
        predict(finished_run, [tmp_path / "p"], tmp_path / "c", series=["t1=flair"])


@pytest.mark.slow
def test_training_reads_dicom_as_it_reads_nifti(tmp_path: Path) -> None:
    for number in range(6):
        dicom_case(tmp_path / "in" / f"p{number}", number, f"p{number}")
    rules = ["--series", "t1=ax t1", "--series", "t2=ax t2", "--source", "t1", "--target", "t2"]
    quick = [f"--set={key}={json.dumps(value)}" for key, value in QUICK.items() if key.partition(".")[0] != "data"]
    quick = [text for text in quick if "split.folds" not in text] + ["--folds=3", "--set=data.patch=32"]
    words = ["train", str(tmp_path / "in"), "-o", str(tmp_path / "run"), "--size=tiny", *rules, *quick]
    done = CliRunner().invoke(make_app(), words)
    assert done.exit_code == 0, done.output
    assert "6 cases with t1 and t2 (dicom)" in done.output
    made = predict(tmp_path / "run", [tmp_path / "in"], tmp_path / "out", only="test", series=["t1=ax t1"])
    assert len(made.manifest.cases) == 2 and not made.problems


def test_series_have_one_number_whether_a_patient_or_the_folder_of_patients_is_named(tmp_path: Path) -> None:
    for patient in ("Q1", "Q2"):
        for number, folder in ((5, "AX"), (2, "SAG")):
            files = write_source(tmp_path / patient / folder, SeriesNumber=number, SeriesDescription=folder)
            study = f"1.2.826.0.1.3680043.10.99.{patient[1]}"
            for path in files:
                rewrite(path, lambda d, study=study: setattr(d, "StudyInstanceUID", study))
    listed = [
        [line for line in find_cohort(place, selection=Selection(series={"t1": "1"})).listing if "-> t1" in line]
        for place in (tmp_path, tmp_path / "Q1")
    ]
    assert "SAG" in listed[0][0] and listed[1] == listed[0][:1]


def test_a_lone_ct_stands_for_no_t1_unless_a_rule_says_so_which_is_warned_of(tmp_path: Path) -> None:
    write_source(tmp_path / "p1" / "scan", modality="CT", SeriesDescription="head")
    refused = find_cohort(tmp_path, selection=Selection(alone="t1"))
    assert not refused.cases and refused.problems[0].reason == "other-modality"
    assert "series 1 is CT by its header, not t1" in refused.problems[0].message
    (case,) = find_cohort(tmp_path, selection=Selection(series={"t1": "1"}, alone="t1")).cases
    assert warn_of_marks(case, ["t1"]) == ["its header says that the image is CT, and the model takes t1"]
    (case,) = find_cohort(tmp_path, selection=Selection(alone="ct")).cases
    assert warn_of_marks(case, ["ct"]) == []


def test_a_volume_that_hides_dicom_is_named_with_the_way_to_the_series(tmp_path: Path) -> None:
    write_source(tmp_path / "p1")
    (tmp_path / "mu.nii.gz").touch()
    with pytest.raises(CohortError, match=r"such as mu.nii.gz.* --layout dicom"):
        find_cohort(tmp_path)
    assert find_cohort(tmp_path, layout="dicom").cases


def test_a_folder_is_called_no_modality_that_the_header_excludes(tmp_path: Path) -> None:
    for modality in ("CT", "PT", "NM"):
        write_source(tmp_path / modality, modality=modality, SeriesDescription="WB", PatientID="p1", Modality=modality)
    both = tmp_path / "p1" / "PET_CT"
    both.mkdir(parents=True)
    for file in tmp_path.glob("[CPN][TM]/*"):
        file.rename(both / f"{file.parent.name}{file.name}")
    (case,) = find_cohort(tmp_path / "p1").cases
    assert list(case.images) == ["ct"] and case.images["ct"].name.startswith("CT")


def test_a_synthetic_series_beside_an_acquired_one_is_passed_over(tmp_path: Path) -> None:
    for number, folder in ((1, "real"), (2, "made")):
        marks = {"SyntheticData": "YES"} if folder == "made" else {}
        write_source(tmp_path / "p1" / folder, modality="CT", SeriesNumber=number, **marks)
    for allow in ((), ("synthetic",)):
        (case,) = find_cohort(tmp_path, selection=Selection(allow=allow)).cases
        assert case.images["ct"] == tmp_path / "p1" / "real"
