"""Folders that fix roles, visits of one person, one of several scans, and an account of what is not used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from chiasm.cli import main
from chiasm.cohorts.cases import Cohort
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import make_split, read_splits
from chiasm.errors import CohortError, RecipeError
from chiasm.preparation.inspection import inspect_folder
from chiasm.recipe import read_recipe
from dicom_patients import write_source
from synthetic_cohort import affine, pair, save, write_brats


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def both(*places: str) -> list[str]:
    """T1 and T2 of patients, each place a folder of its own."""
    return [f"{place}/{name}.nii.gz" for place in places for name in ("t1", "t2")]


def roles(cohort: Cohort) -> dict[str, str | None]:
    return {case.id: case.split for case in cohort.cases}


def notes(cohort: Cohort) -> dict[str, str]:
    return {note.reason: note.message for note in cohort.notes}


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    code = stopped.value.code
    assert isinstance(code, int)
    return code


# --- roles -----------------------------------------------------------------------------------------------------------

THREE = {"a": None, "b": None, "x": "test"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (both("train/a", "train/b", "test/x"), THREE),
        (both("data/Training/a", "data/Training/b", "data/Testing/x"), THREE),
        (both("a", "b", "test/x"), THREE),
        (both("train/a", "val/b", "test/x"), {"a": "train", "b": "validation", "x": "test"}),
        (both("site1/train/a", "site1/valid/b", "site2/TEST/x"), {"a": "train", "b": "validation", "x": "test"}),
        ([f"{s}{m}/{n}.nii.gz" for s, n in (("train", "a"), ("train", "b"), ("test", "x")) for m in "AB"], THREE),
        ([f"{m}/{s}/{n}.nii.gz" for s, n in (("train", "a"), ("train", "b"), ("test", "x")) for m in "AB"], THREE),
        (
            [f"{s}/{m}/{n}.nii.gz" for s, n in (("train", "a"), ("train", "b"), ("test", "x")) for m in ("T1", "T2")],
            THREE,
        ),
        (
            [f"{m}_{s}/{n}.nii.gz" for s, n in (("train", "a"), ("train", "b"), ("test", "x")) for m in ("CT", "MR")],
            THREE,
        ),
        ([f"images{s}/{n}_000{c}.nii.gz" for s, n in (("Tr", "a"), ("Tr", "b"), ("Ts", "x")) for c in (0, 1)], THREE),
        (
            [
                f"MICCAI_2020_{s}Data/B{n}/B{n}_{m}.nii.gz"
                for s, n in (("Training", 1), ("Validation", 2))
                for m in ("t1", "t2")
            ],
            {"B1": "train", "B2": "validation"},
        ),
        (both("train/a", "train/b"), {"a": None, "b": None}),
        (
            both("MICCAI_BraTS_2018_Data_Training/HGG/a", "MICCAI_BraTS_2018_Data_Training/LGG/b"),
            {"a": None, "b": None},
        ),
        (both("test", "train", "a"), {"a": None, "test": None, "train": None}),
        (both("test01", "test02", "retest"), {"retest": None, "test01": None, "test02": None}),
        (both("attest/a", "testing-site/b"), {"a": None, "b": None}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_folders_called_train_val_and_test_fix_the_split(
    tmp_path: Path, files: list[str], expected: dict[str, str | None]
) -> None:
    cohort = find_cohort(touch(tmp_path / "test", *files))  # the root's own name says nothing
    assert roles(cohort) == expected
    assert not cohort.problems
    assert all(len(case.images) == 2 for case in cohort.cases)
    assert ("folder-role" in notes(cohort)) == any(expected.values())


FOLDERS_OF_ROLES = [
    {"1_train": None, "2_val": "validation", "3_test": "test"},
    {"train": None, "external_test": "test"},
    {"train": None, "val": "validation", "test1": "test", "test2": "test"},
    {"train": None, "holdout": "test"},
    {"train": None, "held_out": "test"},
    {"train": None, "Hold-Out": "test"},
    {"train": None, "eval": "test"},
    {"train": None, "dev": "validation", "test": "test"},
    {"Tr": None, "Ts": "test"},
    {"ds-train-v1": None, "ds-test-v2": "test"},
    {"Training": None, "Validierung": "validation"},
    {"train_set": None, "testset": "test"},
    {"train": None, "test": "test", "extra": None},
]


@pytest.mark.parametrize("folders", FOLDERS_OF_ROLES, ids=lambda folders: " ".join(folders))
def test_a_clear_word_for_a_role_among_others_fixes_the_split(folders: dict[str, str | None], tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both(*(f"{name}/p{n}" for n, name in enumerate(folders)))))
    has_validation = "validation" in folders.values()
    expected = ["train" if not role and has_validation else role for role in folders.values()]
    assert list(roles(cohort).values()) == expected
    assert "folder-role" in notes(cohort)
    assert ("1 in folders that name no role are split as usual" in notes(cohort)["folder-role"]) == ("extra" in folders)


def test_a_role_that_is_read_from_a_longer_name_is_named(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("train/a", "external_test/b")))
    assert notes(cohort)["role-read"] == "names of folders are read as roles in the split: external_test as test"


@pytest.mark.parametrize("folders", [("siteA", "external_test"), ("HGG", "Data_Validation"), ("train", "external")])
def test_a_role_word_beside_folders_without_one_fixes_nothing_and_the_way_out_is_named(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    cohort = find_cohort(touch(tmp_path, *both(f"{folders[0]}/a", f"{folders[1]}/b")))
    assert set(roles(cohort).values()) == {None}
    message = notes(cohort)["role-word"]
    assert all(name in message for name in (*folders, "manifest with a column split"))


@pytest.mark.parametrize(
    "places",
    [
        ("test_retest_01", "test_retest_02", "trainor", "evan"),
        ("Hospital_A/a", "test_retest/b"),
        ("siteA/val01", "siteA/val02", "siteB/tess01"),
        ("test01", "test02", "P3"),
        ("train/a", "train/b"),
    ],
    ids=" ".join,
)
def test_names_that_are_no_roles_raise_no_alarm(places: tuple[str, ...], tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both(*places)))
    assert set(roles(cohort).values()) == {None}
    assert not {"role-word", "role-read", "folder-role"} & set(notes(cohort))


def test_roles_in_the_names_of_all_cases_are_noted(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("train_001", "train_002", "test_003")))
    assert set(roles(cohort).values()) == {None}
    assert "such as test_003 and train_001" in notes(cohort)["role-word"]


def test_a_person_of_one_name_in_train_and_in_a_numbered_test_folder_is_refused(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("1_train/P1", "1_train/P2", "2_test/P1")))
    assert "two-roles" in notes(cohort)


def test_a_fixed_test_set_is_the_test_set_and_validation_is_drawn_from_the_rest(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("train/a", "train/b", "train/c", "test/x", "test/y")))
    assert notes(cohort)["folder-role"] == "2 cases are fixed to test by their folder"
    split = make_split(cohort.cases, folds=5, fold=0, validation=0.2, seed=0)
    assert (split.test, len(split.validation), len(split.train)) == (("x", "y"), 1, 2)


def test_train_and_validation_folders_alone_leave_the_test_set_empty(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("train/a", "train/b", "val/c")))
    split = make_split(cohort.cases, folds=5, fold=0, validation=0.2, seed=0)
    assert (split.train, split.validation, split.test) == (("a", "b"), ("c",), ())


@pytest.mark.parametrize(
    "files",
    [
        both("train/s1", "train/s2", "test/s1"),
        [
            f"{part}/sub-{n}/anat/sub-{n}_{m}w.nii.gz"
            for part, n in (("train", 1), ("train", 2), ("test", 1))
            for m in ("T1", "T2")
        ],
        [f"{part}{m}/{n}.nii.gz" for part, n in (("train", "1"), ("train", "2"), ("test", "1")) for m in "AB"],
        both("train/pat04_visit0", "train/pat05_visit0", "test/pat04_visit1"),
    ],
    ids=["folders", "bids", "two-folders", "visits"],
)
def test_a_subject_in_train_and_test_is_refused_with_the_way_out(tmp_path: Path, files: list[str]) -> None:
    cohort = find_cohort(touch(tmp_path, *files))
    assert len(cohort.cases) == 3, "nothing is merged"
    assert "two-roles" in notes(cohort)
    with pytest.raises(CohortError, match=r"has two roles: (train and test|test and train)") as refused:
        make_split(cohort.cases, folds=1, fold=0, validation=0.2, seed=0)
    assert "manifest" in str(refused.value)


def test_folds_by_site_do_not_pass_over_roles_that_are_fixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/IXI001-Guys-1", "train/IXI002-HH-1", "test/IXI003-HH-1"):
        for kind in ("T1", "T2"):
            save(tmp_path / "data" / f"{name}-{kind}.nii.gz", rng.random((12, 12, 12), np.float32), np.eye(4))
    place = ["plan", str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--source", "t1", "--target", "t2"]
    assert ended(*place, "--folds", "2", "--set", "split.by=site") == 2
    assert "roles that are fixed" in capsys.readouterr().err


def test_dicom_in_folders_of_roles_is_split_by_them_and_a_patient_without_a_known_series_is_noted(
    tmp_path: Path,
) -> None:
    for name in ("train/P1", "train/P2", "test/P3"):
        write_source(tmp_path / name / "ser1", PatientID=name)
    write_source(tmp_path / "train/P4" / "ser1", PatientID="P4", SeriesDescription="foo", Modality="NM")
    cohort = find_cohort(tmp_path)
    assert roles(cohort) == {"P1": None, "P2": None, "P3": "test"}
    assert "P4: no series of this patient is recognised" in notes(cohort)["no-series"]
    numbered = tmp_path / "numbered"
    for name in ("1_train/P1", "2_val/P2", "3_test/P3"):
        write_source(numbered / name / "ser1", PatientID=name)
    assert roles(find_cohort(numbered)) == {"P1": "train", "P2": "validation", "P3": "test"}
    patients = tmp_path / "patients"
    for name in ("train_001", "train_002", "test_003"):
        write_source(patients / name / "ser1", PatientID=name)
    assert roles(find_cohort(patients)) == dict.fromkeys(("test_003", "train_001", "train_002"))
    alone = tmp_path / "alone"
    write_source(alone / "test" / "ser1", PatientID="a")
    write_source(alone / "P2" / "ser1", PatientID="b")
    assert roles(find_cohort(alone)) == {"P2": None, "test": None}


# --- relatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        ("pat04_visit0", "pat04_visit1"),
        ("sub01_ses1", "sub01_ses2"),
        ("001_tp1", "001_tp2"),
        ("X_pre", "X_post"),
        ("P7_baseline", "P7_followup"),
        ("P7", "P7_followup"),
        ("P7_t0", "P7_t3"),
        ("P7_20190301", "P7_20200405"),
        ("P7_2019", "P7_2021"),
        ("P7V01", "P7V02"),
        ("P7_D0", "P7_D30"),
        ("P7_rescan", "P7"),
        ("P7_test", "P7_retest"),
        ("P7_Visit1", "p7_visit2"),
        ("visit1_P7", "visit2_P7"),
        ("baseline_P7", "followup_P7"),
        ("OAS1_0061_MR1", "OAS1_0061_MR2"),
        ("OAS30001_MR_d0129", "OAS30001_MR_d0757"),
        ("002_S_0295_m00", "002_S_0295_m12"),
        ("002_S_0295_bl", "002_S_0295_m12"),
        ("Patient-001_week-000-1", "Patient-001_week-044"),
        ("UCSF-PDGM-0429", "UCSF-PDGM-0429_FU001d"),
        ("sub-01_ses-M00", "sub-01_ses-M12"),
        ("P7/2019-03-04", "P7/2020-03-04"),
        ("baseline/P7", "followup/P7"),
        ("TP1/P7", "TP2/P7"),
    ],
    ids=" ".join,
)
def test_visits_of_one_person_are_one_subject(tmp_path: Path, pair: tuple[str, str]) -> None:
    cohort = find_cohort(touch(tmp_path, *both(*pair, "other1", "other2")))
    subjects = {case.id: case.subject for case in cohort.cases}
    assert subjects[pair[0].replace("/", "_")] == subjects[pair[1].replace("/", "_")]
    assert len(set(subjects.values())) == 3
    assert "2 names contain words for visits and are grouped as 1 person" in notes(cohort)["visits"]


def test_a_number_at_the_end_is_asked_about_and_a_pattern_answers(tmp_path: Path) -> None:
    root = touch(tmp_path, *both("P01-0", "P01-1", "P02-0"))
    cohort = find_cohort(root)
    assert len({case.subject for case in cohort.cases}) == 3
    assert "P01-0 and P01-1" in notes(cohort)["relatives"]
    told = find_cohort(root, selection=Selection(subject_pattern=r"(P\d+)-"))
    assert [case.subject for case in told.cases] == ["P01", "P01", "P02"]
    assert "relatives" not in notes(told)


@pytest.mark.parametrize(
    "names",
    [
        [f"case_{number}" for number in range(6)],
        [f"BraTS20_Training_{number:03d}" for number in range(6)],
        [f"KiTS19_{number:03d}" for number in range(30)],
        ["scan_1", "scan_2"],
        ["test01", "test02"],
    ],
    ids=lambda names: names[0],
)
def test_numbered_patients_are_different_people(tmp_path: Path, names: list[str]) -> None:
    cohort = find_cohort(touch(tmp_path, *both(*names)))
    assert [case.subject for case in cohort.cases] == sorted(names)
    assert not cohort.notes


@pytest.mark.parametrize(
    "names",
    [
        ["center1_fu1", "center1_fu2", "center2_fu1", "center2_fu2"],
        ["siteA_visit1", "siteA_visit2", "siteB_visit1"],
        ["H1_20200101", "H1_20200102", "H1_20200103", "H2_20200101", "H2_20200105"],
        [f"ABIDE2_v{number}" for number in range(1, 5)],
        [f"cohort3_week{number}" for number in range(1, 4)],
        ["ms2_tp1", "ms2_tp2", "ms2_tp3", "ms2_tp4", "ms3_tp1"],
        ["hcp1200_t1", "hcp1200_t2", "hcp1200_t3"],
        ["HC_pre", "HC_post", "PD_pre", "PD_post"],
        ["P01a", "P01b", "P02a", "P02b"],
        ["P01_L", "P01_R", "P02_L"],
        ["sub-01", "sub-01_2", "sub-02", "sub-02_2", "sub-03", "sub-04"],
        ["P01_run-1", "P01_run-2", "P02_run-1", "P02_run-2"],
        ["UPENN-GBM-00001_11", "UPENN-GBM-00001_21", "UPENN-GBM-00002_11"],
    ],
    ids=lambda names: names[0],
)
def test_names_that_leave_a_doubt_are_asked_about_and_the_hint_answers_when_it_is_followed(
    tmp_path: Path, names: list[str]
) -> None:
    root = touch(tmp_path, *both(*names))
    cohort = find_cohort(root)
    assert len({case.subject for case in cohort.cases}) == len(names), "nobody is grouped"
    pattern = notes(cohort)["relatives"].partition("--subject-pattern '")[2].removesuffix("'")
    told = {case.id: case.subject for case in find_cohort(root, selection=Selection(subject_pattern=pattern)).cases}
    person = {name: re.split(r"[_.](?!000)|(?<=\d)[ab]$", name)[0] for name in names}
    assert told == person


def test_where_no_pattern_says_it_the_hint_is_a_manifest(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("P01-0", "P01-1", "P01-12345")))
    assert "manifest with a column subject" in notes(cohort)["relatives"]


def test_the_hint_of_visits_takes_each_case_for_a_person(tmp_path: Path) -> None:
    root = touch(tmp_path, *both("P1_visit1", "P1_visit2", "P2", "P3"))
    pattern = notes(find_cohort(root))["visits"].partition("--subject-pattern changes this: with '")[2].partition("'")
    told = find_cohort(root, selection=Selection(subject_pattern=pattern[0]))
    assert [case.subject for case in told.cases] == ["P1_visit1", "P1_visit2", "P2", "P3"]


@pytest.mark.parametrize(
    "names", [["P01a", "P02a", "P03b"], ["siteA_1", "siteA_2", "siteB_1", "siteB_2"]], ids=" ".join
)
def test_names_of_different_people_raise_no_question(tmp_path: Path, names: list[str]) -> None:
    assert not find_cohort(touch(tmp_path, *both(*names))).notes


def test_a_visit_of_train_and_one_of_test_are_refused_where_folders_are_time_points(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *both("train/baseline/P1", "train/baseline/P2", "test/followup/P1")))
    assert "two-roles" in notes(cohort)


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("(", RecipeError, "cannot be read"),
        ("P", RecipeError, "with 0 groups"),
        ("(.)(.)", RecipeError, "with 2 groups"),
        ("(Q+)", CohortError, "matches no case"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(
    tmp_path: Path, pattern: str, error: type[Exception], words: str
) -> None:
    root = touch(tmp_path, *both("P01-0", "P01-1"))
    with pytest.raises(error, match=words):
        find_cohort(root, selection=Selection(subject_pattern=pattern))


# --- several scans ---------------------------------------------------------------------------------------------------


def bids_with_two(root: Path, *, mprage_mm: float = 1.0, se_mm: float = 4.0) -> Path:
    image = np.random.default_rng(0).random((12, 12, 12), np.float32)
    place = root / "sub-01" / "anat"
    save(place / "sub-01_acq-mprage_T1w.nii.gz", image, np.diag([1, 1, mprage_mm, 1]))
    save(place / "sub-01_acq-se_T1w.nii.gz", image, np.diag([0.5, 0.5, se_mm, 1]))
    save(place / "sub-01_T2w.nii.gz", 1 - image, np.diag([1, 1, 1, 1.0]))
    return root


def test_of_two_scans_the_finer_is_taken_with_a_note_and_exit_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bids_with_two(tmp_path)
    assert find_cohort(root).cases[0].images["t1"].name == "sub-01_acq-mprage_T1w.nii.gz"
    assert (
        find_cohort(bids_with_two(tmp_path / "b", mprage_mm=5)).cases[0].images["t1"].name.startswith("sub-01_acq-se")
    )
    assert ended("inspect", str(root / "sub-01" / "..")) == 0
    assert "case sub-01 has a second t1; sub-01_acq-mprage_T1w.nii.gz is used" in capsys.readouterr().out


def test_select_chooses_by_a_word_of_the_name_and_refuses_one_that_nothing_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = bids_with_two(tmp_path)
    for words in (["acq-se"], ["se", "T2w"]):
        chosen = find_cohort(root, selection=Selection(select=words)).cases[0].images
        assert (chosen["t1"].name, chosen["t2"].name) == ("sub-01_acq-se_T1w.nii.gz", "sub-01_T2w.nii.gz")
    assert ended("inspect", str(root), "--select", "acq-flash") == 2
    assert "no file has the word 'acq-flash' in its name" in capsys.readouterr().err
    remembered = find_cohort(root, selection=Selection(remembered=["acq-flash", "acq-se"]))
    assert remembered.cases[0].images["t1"].name == "sub-01_acq-se_T1w.nii.gz"
    (root / "cohort.json").write_text('{"select": ["acq-se"]}')
    assert find_cohort(root).cases[0].images["t1"].name == "sub-01_acq-se_T1w.nii.gz"


# --- what is not used ------------------------------------------------------------------------------------------------


def test_one_file_that_fits_beside_nine_that_do_not_is_a_case_with_a_report_of_the_nine(tmp_path: Path) -> None:
    root = touch(tmp_path, "P1_T1.nii.gz", *(f"scan{number}.nii.gz" for number in range(9)))
    cohort = find_cohort(root)
    assert [case.id for case in cohort.cases] == ["P1"]
    assert len(cohort.unused) == 9
    message = notes(cohort)["not-of-layout"]
    assert message == (
        "not used: 9 volumes whose names do not fit layout flat, such as scan0.nii.gz, scan1.nii.gz, scan2.nii.gz"
    )
    text = "\n".join(inspect_folder(root).lines())
    assert all(f"scan{number}.nii.gz" in text for number in range(9))


def test_files_that_fit_another_layout_say_so(tmp_path: Path) -> None:
    root = touch(tmp_path, *both("P1", "P2"), *(f"BraTS2021_00001/BraTS2021_00001_{m}.nii.gz" for m in ("t1", "t2")))
    assert notes(find_cohort(root))["not-of-layout"].endswith("; 4 fit layout case-folders")


def test_what_belongs_to_a_case_and_other_formats_are_accounted_for(tmp_path: Path) -> None:
    root = touch(
        tmp_path, *both("P1", "P2"), "P1/adc.nii.gz", "P3/t1.nrrd", "P4/t1.mgz", "P5/IM001.dcm", "P5/IM002.dcm"
    )
    found = notes(find_cohort(root))
    assert found["beside"] == "not used: 1 images of cases that were found, such as P1/adc.nii.gz"
    assert found["other-format"].startswith("not used: 2 images of another format, such as P5/IM001.dcm, P5/IM002.dcm")
    assert "P5/ (2 files)" in "\n".join(inspect_folder(root).lines())


@pytest.mark.parametrize("end", ["zip", "zst", "bz2", "xz", "lz4", "gz.part", "7z"])
def test_a_case_that_is_packed_in_a_way_that_is_not_read_is_listed(end: str, tmp_path: Path) -> None:
    root = touch(tmp_path, *both("P1", "P2"), f"P3/t1.nii.{end}", f"P3/t2.nii.{end}", "P4/t1.nii.gz.md5")
    found = find_cohort(root)
    assert notes(found)["other-format"].startswith("not used: 2 images of another format, such as P3/t1.nii")
    assert [path.name for path in found.unused] == [f"t1.nii.{end}", f"t2.nii.{end}"]


def test_volumes_that_no_row_of_a_manifest_names_are_noted(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    (root / "manifest.csv").write_text("subject,t1,t2\np,a.nii.gz,b.nii.gz\n")
    assert notes(find_cohort(root))["in-no-row"].endswith("such as c.nii.gz")


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_planning_names_each_case_that_is_left_out_and_files_that_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_brats(tmp_path / "data", 8)
    (root / "Toy_0002" / "Toy_0002_t2.nii.gz").unlink()
    damaged = root / "Toy_0004" / "Toy_0004_t1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:300])
    touch(root, "atlas.nii.gz", "template.nii.gz")
    assert ended("plan", str(root), "-o", str(tmp_path / "run"), "--source", "t1", "--target", "t2") == 3
    said = capsys.readouterr().out
    assert "7 cases with t1 and t2" in said
    assert f"left out: {root / 'Toy_0002'}: case Toy_0002 has no t2" in said
    assert "left out: case Toy_0004, t1: " in said and said.count(str(damaged)) == 1
    assert "not used: 2 volumes whose names do not fit layout case-files, such as atlas.nii.gz, template.nii.gz" in said


def test_words_and_patterns_are_kept_in_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    for number in range(3):
        for visit in range(2):
            name = f"sub-P{number}v{visit}"
            source, target, _ = pair(10 * number + visit)
            for kind, array in (("acq-a_T1w", source), ("acq-b_T1w", source), ("T2w", target)):
                save(root / name / "anat" / f"{name}_{kind}.nii.gz", array, affine())
    place = [str(root), "-o", str(tmp_path / "run"), "--source", "t1", "--target", "t2", "--folds", "3"]
    assert ended("plan", *place, "--select", "acq-b", "--subject-pattern", "sub-(P[0-9])") == 0
    said = capsys.readouterr().out
    assert "6 cases are of 3 subjects by the pattern" in said
    assert "sub-P0v0_acq-b_T1w.nii.gz is used" in said
    recipe = read_recipe(tmp_path / "run" / "recipe.toml")
    assert (recipe.data.select, recipe.split.subject_pattern) == (("acq-b",), "sub-(P[0-9])")
    assert set(read_splits(tmp_path / "run" / "splits.json").subjects.values()) == {"P0", "P1", "P2"}


def test_a_test_folder_is_the_test_set_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_brats(tmp_path / "data", 5)
    for number, part in enumerate(("train", "train", "train", "train", "test"), start=1):
        (root / part).mkdir(exist_ok=True)
        (root / f"Toy_000{number}").rename(root / part / f"Toy_000{number}")
    assert ended("plan", str(root), "-o", str(tmp_path / "run"), "--source", "t1", "--target", "t2") == 0
    assert "1 case is fixed to test by their folder" in capsys.readouterr().out
    assert read_splits(tmp_path / "run" / "splits.json").split.test == ("Toy_0005",)
