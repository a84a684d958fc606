"""Layouts: what is recognised by its names, what is refused, and what reading the files adds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.discovery import NAMES, find_cohort, select_cases, volumes_below
from chiasm.cohorts.known_layouts import LAYOUTS
from chiasm.cohorts.labels import check_label_values, region_volumes
from chiasm.cohorts.manifests import read_manifest
from chiasm.errors import CohortError, VolumeError
from chiasm.names import is_safe_id
from chiasm.preparation.examination import examine_case
from chiasm.preparation.inspection import inspect_folder
from chiasm.volumes import Volume
from chiasm.volumes.geometry import Geometry
from synthetic_cohort import save

DATA = Path(os.environ.get("CHIASM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def touch(root: Path, *names: str) -> Path:
    """Make empty files: finding a cohort must not open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def each(pattern: str, words: Iterable[str]) -> list[str]:
    return [pattern.replace("*", word) for word in words]


def only(cohort: Cohort) -> Case:
    assert len(cohort.cases) == 1
    return cohort.cases[0]


def refusal(root: Path, layout: str | None = None) -> CohortError:
    with pytest.raises(CohortError) as refused:
        find_cohort(root, layout=layout)
    return refused.value


BRATS_FOUR = ("t1", "t1ce", "t2", "flair", "seg")
BRATS_NEW = ("t1n", "t1c", "t2w", "t2f", "seg")

#: Layout, files of one case, id, subject, site, modalities, has a mask, has labels.
ONE_OF_EACH = [
    (
        "brats-2015",
        [
            *each(
                "HGG/brats_2013_pat0001_1/VSD.Brain.XX.O.MR_*.545/VSD.Brain.XX.O.MR_*.545.mha", ["T1", "T1c", "Flair"]
            ),
            "HGG/brats_2013_pat0001_1/VSD.Brain_3more.XX.O.OT.546/VSD.Brain_3more.XX.O.OT.546.mha",
        ],
        ("brats_2013_pat0001_1", "brats_2013_pat0001", None, "flair t1 t1ce", False, True),
    ),
    (
        "brats-2018",
        each("HGG/Brats18_TCIA01_201_1/Brats18_TCIA01_201_1_*.nii.gz", BRATS_FOUR),
        ("Brats18_TCIA01_201_1", "TCIA01_201", "TCIA01", "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-2018",
        each("Brats17_CBICA_AAB_1/Brats17_CBICA_AAB_1_*.nii.gz", BRATS_FOUR),
        ("Brats17_CBICA_AAB_1", "CBICA_AAB", "CBICA", "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-2018",
        [
            *each("MICCAI/BraTS20_Training_355/BraTS20_Training_355_*.nii", BRATS_FOUR[:4]),
            "MICCAI/BraTS20_Training_355/W39_1998.09.19_Segm.nii",
        ],
        ("BraTS20_Training_355", "BraTS20_Training_355", None, "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-2021",
        each("BraTS2021_00000/BraTS2021_00000_*.nii.gz", BRATS_FOUR),
        ("BraTS2021_00000", "BraTS2021_00000", None, "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-2023",
        each("BraTS-GLI-00003-001/BraTS-GLI-00003-001-*.nii.gz", BRATS_NEW),
        ("BraTS-GLI-00003-001", "BraTS-GLI-00003", None, "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-2024",
        each("BraTS-GLI-02063-101/BraTS-GLI-02063-101-*.nii.gz", BRATS_NEW),
        ("BraTS-GLI-02063-101", "BraTS-GLI-02063", None, "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-peds",
        each("BraTS-PED-00001-000/BraTS-PED-00001-000-*.nii.gz", BRATS_NEW),
        ("BraTS-PED-00001-000", "BraTS-PED-00001", None, "flair t1 t1ce t2", False, True),
    ),
    (
        "brats-inpainting",
        each(
            "BraTS-GLI-00000-000/BraTS-GLI-00000-000-*.nii.gz",
            ["t1n", "t1n-voided", "mask", "mask-healthy", "mask-unhealthy"],
        ),
        ("BraTS-GLI-00000-000", "BraTS-GLI-00000", None, "t1 t1-voided", False, True),
    ),
    (
        "synthrad-2023",
        each("Task1/brain/1BA001/*.nii.gz", ["mr", "ct", "mask"]),
        ("1BA001", "1BA001", "A", "ct mr", True, False),
    ),
    (
        "synthrad-2023",
        each("Task2/pelvis/2PC017/*.nii.gz", ["cbct", "ct", "mask"]),
        ("2PC017", "2PC017", "C", "cbct ct", True, False),
    ),
    ("synthrad-2025", each("1HNA001/*.mha", ["mr", "ct", "mask"]), ("1HNA001", "1HNA001", "A", "ct mr", True, False)),
    (
        "ixi",
        each("IXI-*/IXI002-Guys-0828-*.nii.gz", ["T1", "T2", "PD"]),
        ("IXI002-Guys-0828", "IXI002", "Guys", "pd t1 t2", False, False),
    ),
    (
        "phantom",
        each("PHANTOM_0001/PHANTOM_0001_*.nii.gz", [*BRATS_FOUR, "pd", "ct", "mask"]),
        ("PHANTOM_0001", "PHANTOM_0001", None, "ct flair pd t1 t1ce t2", True, True),
    ),
    (
        "bids",
        [
            *each("sub-01/ses-02/anat/sub-01_ses-02_*.nii.gz", ["T1w", "T2w", "FLAIR", "ce-gadolinium_T1w"]),
            "derivatives/manual/sub-01/ses-02/anat/sub-01_ses-02_label-lesion_mask.nii.gz",
            "derivatives/bet/sub-01/ses-02/anat/sub-01_ses-02_desc-brain_mask.nii.gz",
            "derivatives/prep/sub-01/ses-02/anat/sub-01_ses-02_desc-preproc_T1w.nii.gz",
            "derivatives/prep/sub-01/ses-02/anat/sub-01_ses-02_space-MNI152_desc-brain_mask.nii.gz",
        ],
        ("sub-01_ses-02", "sub-01", None, "flair t1 t1ce t2", True, True),
    ),
    ("konfai", each("Dataset/P07/*.mha", ["MR", "CT", "MASK"]), ("P07", "P07", None, "ct mr", True, False)),
    ("case-folders", each("P07/*.nii.gz", ["mri", "ct"]), ("P07", "P07", None, "ct mr", False, False)),
    (
        "case-files",
        each("patient07/patient07_*.nii.gz", ["T1", "T2", "FLAIR", "lesions"]),
        ("patient07", "patient07", None, "flair t1 t2", False, True),
    ),
    ("flat", each("stroke_*.nii.gz", ["T1", "T2", "FLAIR"]), ("stroke", "stroke", None, "flair t1 t2", False, False)),
    ("two-folders", ["A/x.nii.gz", "T2w/x.nii.gz", "masks/x.nii.gz"], ("x", "x", None, "a t2", True, False)),
]


@pytest.mark.parametrize(("layout", "files", "expected"), ONE_OF_EACH, ids=lambda v: v if isinstance(v, str) else "")
def test_a_layout_is_recognised_and_every_file_finds_its_place(
    tmp_path: Path, layout: str, files: list[str], expected: tuple[object, ...]
) -> None:
    cohort = find_cohort(touch(tmp_path, *files))
    case = only(cohort)
    modalities = " ".join(sorted(case.images))
    found = (case.id, case.subject, case.site, modalities, case.mask is not None, case.labels is not None)
    assert (cohort.layout, found) == (layout, expected)
    assert not cohort.problems
    assert bool(cohort.regions) == (case.labels is not None)
    assert find_cohort(tmp_path, layout=layout) == cohort


def test_every_layout_of_the_table_is_proved_above_or_below() -> None:
    assert {layout.name for layout in LAYOUTS} - {row[0] for row in ONE_OF_EACH} == {"nnunet"}
    assert set(NAMES) - {layout.name for layout in LAYOUTS} == {"manifest", "dicom"}


def test_t1_and_t1c_of_2013_are_not_confused(tmp_path: Path) -> None:
    folder = "LGG/brats_tcia_pat105_0090"
    touch(tmp_path, *each(f"{folder}/VSD.Brain.XX.O.MR_*/VSD.Brain.XX.O.MR_*.mha", ["T1.54513", "T1c.54514"]))
    images = only(find_cohort(tmp_path)).images
    assert images["t1"].name == "VSD.Brain.XX.O.MR_T1.54513.mha"
    assert images["t1ce"].name == "VSD.Brain.XX.O.MR_T1c.54514.mha"


def test_two_patients_of_one_name_in_high_and_low_grade_stay_two(tmp_path: Path) -> None:
    for grade, visit in (("HGG", 1), ("HGG", 2), ("LGG", 1)):
        folder = f"{grade}/brats_2013_pat0001_{visit}"
        touch(tmp_path, *each(f"{folder}/VSD.Brain.XX.O.MR_*/VSD.Brain.XX.O.MR_*.mha", ["T1.1", "T2.2"]))
    cases = find_cohort(tmp_path).cases
    assert [(case.id, case.subject) for case in cases] == [
        ("HGG_brats_2013_pat0001_1", "HGG_brats_2013_pat0001"),
        ("HGG_brats_2013_pat0001_2", "HGG_brats_2013_pat0001"),
        ("LGG_brats_2013_pat0001_1", "LGG_brats_2013_pat0001"),
    ]
    assert all(case.subject[:3] in str(path) for case in cases for path in case.images.values())


@pytest.mark.parametrize(
    ("name", "enhancing", "cavity"),
    [("BraTS2021_00001_*", (4,), None), ("BraTS-GLI-00001-000-*", (3,), None), ("BraTS-GLI-00001-100-*", (3,), (4,))],
)
def test_label_4_is_enhancing_until_2021_and_the_cavity_after_an_operation(
    tmp_path: Path, name: str, enhancing: tuple[int, ...], cavity: tuple[int, ...] | None
) -> None:
    regions = find_cohort(touch(tmp_path, *each(f"{name}.nii.gz", [*BRATS_NEW, *BRATS_FOUR]))).regions
    assert regions["ET"] == enhancing
    assert regions.get("RC") == cavity
    assert (4 in regions["WT"]) == (cavity is None and enhancing == (4,))


def test_one_time_point_after_an_operation_makes_a_folder_2024_and_the_option_overrules(tmp_path: Path) -> None:
    touch(tmp_path, *each("BraTS-GLI-00001-000-*.nii.gz", BRATS_NEW), *each("BraTS-GLI-00002-100-*.nii.gz", BRATS_NEW))
    assert find_cohort(tmp_path).layout == "brats-2024"
    assert len(find_cohort(tmp_path).cases) == 2
    assert "RC" not in find_cohort(tmp_path, layout="brats-2023").regions


def test_time_points_of_one_patient_share_the_subject(tmp_path: Path) -> None:
    touch(tmp_path, *(f"BraTS-GLI-00005-{t}/BraTS-GLI-00005-{t}-t1n.nii.gz" for t in ("000", "001", "100")))
    assert {case.subject for case in find_cohort(tmp_path).cases} == {"BraTS-GLI-00005"}


def test_the_hole_of_inpainting_is_a_region_and_no_brain_mask(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *each("BraTS-GLI-00000-000-*.nii.gz", ["t1n", "t1n-voided", "mask"])))
    assert only(cohort).mask is None
    assert (only(cohort).labels or Path()).name == "BraTS-GLI-00000-000-mask.nii.gz"
    assert cohort.regions == {"void": (1,)}


def test_an_ixi_subject_without_t2_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "IXI-T1/IXI012-HH-1211-T1.nii.gz", "IXI-T1/IXI580-IOP-1157-T1.nii.gz")
    touch(tmp_path, "IXI-T2/IXI012-HH-1211-T2.nii.gz")
    cohort = select_cases(find_cohort(tmp_path), ["t1"], "t2")
    assert [(case.id, case.site) for case in cohort.cases] == [("IXI012-HH-1211", "HH")]
    assert [(p.case, p.reason, p.message) for p in cohort.problems] == [
        ("IXI580-IOP-1157", "missing-modality", "case IXI580-IOP-1157 has no t2")
    ]


def test_sessions_of_a_bids_subject_are_cases_of_one_subject_and_sites_come_from_the_table(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-01/ses-{s}/anat/sub-01_ses-{s}_T1w.nii.gz" for s in ("a", "b")))
    touch(tmp_path, "sub-02/anat/sub-02_run-1_T1w.nii.gz", "sub-02/anat/sub-02_run-2_T1w.nii.gz")
    touch(tmp_path, "sub-02/func/sub-02_task-rest_bold.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tsite\nsub-01\tUtrecht\nsub-02\tn/a\n")
    cohort = find_cohort(tmp_path)
    assert [(c.id, c.subject, c.site) for c in cohort.cases] == [
        ("sub-01_ses-a", "sub-01", "Utrecht"),
        ("sub-01_ses-b", "sub-01", "Utrecht"),
        ("sub-02", "sub-02", None),
    ]
    assert cohort.cases[2].images["t1"].name == "sub-02_run-1_T1w.nii.gz"
    assert cohort.problems == ()
    assert [(p.path.name, p.reason) for p in cohort.notes] == [
        ("sub-02_run-2_T1w.nii.gz", "several"),
        (tmp_path.name, "beside"),
    ]


@pytest.mark.parametrize(
    "description",
    [
        {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}},
        {"modality": {"0": "T1w", "1": "CT"}, "labels": {"0": "background", "1": "whole", "2": "core"}},
    ],
)
def test_nnunet_channels_and_labels_have_the_names_of_dataset_json(
    tmp_path: Path, description: Mapping[str, object]
) -> None:
    touch(tmp_path, *each("imagesTr/case_7_000*.nii.gz", "019"), "labelsTr/case_7.nii.gz", "imagesTs/t_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    cohort = find_cohort(tmp_path)
    trained, tested = cohort.cases
    assert (trained.id, sorted(trained.images), trained.split) == ("case_7", ["ct", "t1"], None)
    assert trained.labels == tmp_path / "labelsTr/case_7.nii.gz"
    assert (tested.id, tested.split) == ("t", "test")
    whole = (1, 2) if "channel_names" in description else (1,)
    assert cohort.regions == {"whole": whole, "core": (2,)}
    assert [(p.reason, p.path.name) for p in cohort.problems] == [("channel", "case_7_0009.nii.gz")]


def nnunet(folder: Path, maps: Sequence[NDArray[np.generic]], **more: object) -> Path:
    """Write an nnU-Net folder with one channel, and these volumes in labelsTr."""
    rng = np.random.default_rng(0)
    for number, array in enumerate(maps):
        save(
            folder / "imagesTr" / f"c{number}_0000.nii.gz",
            rng.normal(100, 9, array.shape).astype(np.float32),
            np.eye(4),
        )
        save(folder / "labelsTr" / f"c{number}.nii.gz", array, np.eye(4))
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "tumour": 1}, **more}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def blob(value: float = 1.0) -> NDArray[np.float32]:
    array = np.zeros((24, 24, 24), np.float32)
    array[8:16, 8:16, 8:16] = value
    return array


IMAGES: Mapping[str, NDArray[np.generic]] = {
    "float": np.random.default_rng(1).normal(0, 1, (24, 24, 24)).astype(np.float32),
    "hounsfield": np.random.default_rng(1).integers(-1000, 1000, (24, 24, 24)).astype(np.int16),
    "8-bit": np.random.default_rng(1).integers(0, 255, (24, 24, 24)).astype(np.uint8),
    "0 to 1": np.random.default_rng(1).uniform(0, 1, (24, 24, 24)).astype(np.float32),
}
LABELS: Mapping[str, NDArray[np.generic]] = {
    "whole": blob().astype(np.uint8),
    "float": blob(),
    "undeclared": blob(9),
    "soft": ndimage.gaussian_filter(blob(), 1.0) * blob(),
    "interpolated": np.clip(ndimage.gaussian_filter(blob(), 1.0, radius=1), 0, 1).astype(np.float32),
    "negative": blob(-1).astype(np.int16),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_in_nnunets_folder_of_labels_are_a_modality(kind: str, tmp_path: Path) -> None:
    cohort = find_cohort(nnunet(tmp_path, [IMAGES[kind]] * 2))
    assert [(sorted(case.images), case.labels) for case in cohort.cases] == [(["mr", "target"], None)] * 2
    assert cohort.regions == {} and not inspect_folder(tmp_path).problems
    with pytest.raises(CohortError, match=r"'ct'.*--target target, or name them in dataset\.json"):
        select_cases(cohort, ["mr"], "ct")
    assert len(select_cases(cohort, ["mr"], "target").cases) == 2
    (named,) = find_cohort(nnunet(tmp_path / "named", [IMAGES[kind]], target="CT")).cases
    assert named.images["ct"].parent.name == "labelsTr"


@pytest.mark.parametrize("kind", LABELS)
def test_labels_in_nnunets_folder_of_labels_stay_labels_right_or_wrong(kind: str, tmp_path: Path) -> None:
    (case,) = find_cohort(nnunet(tmp_path, [LABELS[kind]])).cases
    assert sorted(case.images) == ["mr"] and case.labels == tmp_path / "labelsTr" / "c0.nii.gz"


def test_a_map_of_as_many_organs_as_it_declares_holds_labels(tmp_path: Path) -> None:
    organs = np.arange(24**3, dtype=np.uint8).reshape(24, 24, 24) % 118
    declared = {"background": 0, **{f"organ {number}": number for number in range(1, 118)}}
    (case,) = find_cohort(nnunet(tmp_path, [organs], labels=declared)).cases
    assert case.labels is not None and not inspect_folder(tmp_path).problems


def test_an_empty_folder_and_a_table_of_another_name_are_told_apart(tmp_path: Path) -> None:
    assert "is an empty folder" in str(refusal(tmp_path))
    (tmp_path / "pairs.csv").write_text("id,t1,t2\n")
    told = str(refusal(tmp_path))
    assert "pairs.csv does not have the name of a manifest" in told and "manifest.csv" in told


def test_nnunet_without_channels_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    assert refusal(tmp_path).reason == "unknown-layout"
    (tmp_path / "dataset.json").write_text('{"labels": {}}')
    assert refusal(tmp_path).reason == "channels"
    (tmp_path / "dataset.json").write_text("{")
    assert refusal(tmp_path).reason == "damaged"


def test_two_folders_pair_by_name_and_name_those_without_a_partner(tmp_path: Path) -> None:
    touch(tmp_path, "A/x.nii.gz", "A/y.nii.gz", "B/x.mha", "B/z.nii.gz", "labels/x.nii.gz")
    cohort = find_cohort(tmp_path)
    assert only(cohort).images == {"a": tmp_path / "A/x.nii.gz", "b": tmp_path / "B/x.mha"}
    assert only(cohort).labels == tmp_path / "labels/x.nii.gz"
    assert [(p.reason, p.message) for p in cohort.problems] == [
        ("no-pair", "A/y has no partner in B"),
        ("no-pair", "B/z has no partner in A"),
    ]


def test_folders_named_after_cases_are_not_taken_for_modalities(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, *(f"{case}/{name}.nii.gz" for case in ("1", "2") for name in ("mr", "ct"))))
    assert (cohort.layout, [case.id for case in cohort.cases]) == ("case-folders", ["1", "2"])
    with pytest.raises(CohortError, match=r"does not fit layout flat \(found 4 volumes such as 1/ct.nii.gz"):
        find_cohort(tmp_path, layout="flat")
    assert refusal(tmp_path, "flat").expected == "CASE_{T1,T2,mask,seg}.nii.gz"
    assert set(find_cohort(tmp_path, layout="two-folders").cases[0].images) == {"1", "2"}


def test_cases_of_one_name_in_two_folders_are_never_merged(tmp_path: Path) -> None:
    touch(tmp_path, "north/P1/T1.nii.gz", "south/P1/T2.nii.gz", "south/P2/T1.nii.gz")
    cases = find_cohort(tmp_path).cases
    assert [(case.id, case.subject, list(case.images)) for case in cases] == [
        ("north_P1", "north_P1", ["t1"]),
        ("south_P1", "south_P1", ["t2"]),
        ("south_P2", "south_P2", ["t1"]),
    ]


def test_the_more_specific_layout_wins(tmp_path: Path) -> None:
    touch(tmp_path, *each("PHANTOM_0001/PHANTOM_0001_*.nii.gz", BRATS_FOUR))
    touch(tmp_path, *each("P2/P2_*.nii.gz", ["t1", "t2"]))
    assert find_cohort(tmp_path).layout == "phantom"
    assert len(find_cohort(tmp_path, layout="case-files").cases) == 2


def test_hidden_files_links_in_a_circle_and_a_linked_data_folder_do_no_harm(tmp_path: Path) -> None:
    elsewhere = touch(
        tmp_path / "disk", *each("P1/P1_*.nii.gz", ["T1", "T2"]), "P1/._P1_T1.nii.gz", "__MACOSX/P2_T1.nii"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scans").symlink_to(elsewhere)
    (elsewhere / "P1" / "up").symlink_to(elsewhere)
    cohort = find_cohort(tmp_path / "data")
    assert only(cohort).images["t1"] == tmp_path / "data/scans/P1/P1_T1.nii.gz"
    assert not cohort.problems
    assert len(volumes_below(tmp_path / "data")) == 2


def test_of_two_files_for_one_image_the_second_is_named(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, "a_T1.nii", "a_T1.nii.gz", "a_T2.nii.gz"))
    assert only(cohort).images["t1"].name == "a_T1.nii"
    assert cohort.problems == ()
    assert [(p.case, p.reason, p.message) for p in cohort.notes] == [
        ("a", "several", "case a has a second t1; a_T1.nii is used")
    ]


def test_the_phantom_s_notes_give_sites_heads_and_regions(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        touch(tmp_path, *each(f"PHANTOM_000{number}/PHANTOM_000{number}_*.nii.gz", BRATS_FOUR))
    notes = {f"PHANTOM_000{n}": {"site": f"S{n}", "head": f"head0{min(n, 2)}", "seed": n} for n in (1, 2, 3)}
    (tmp_path / "cohort.json").write_text(json.dumps({"cases": notes, "regions": {"lesion": [1, 2, 4], "core": 4}}))
    cohort = find_cohort(tmp_path)
    assert [(c.subject, c.site) for c in cohort.cases] == [("head01", "S1"), ("head02", "S2"), ("head02", "S3")]
    assert cohort.regions == {"lesion": (1, 2, 4), "core": (4,)}
    for note in notes.values():
        note["head"] = "template"
    (tmp_path / "cohort.json").write_text(json.dumps({"cases": notes}))
    assert [c.subject for c in find_cohort(tmp_path).cases] == ["PHANTOM_0001", "PHANTOM_0002", "PHANTOM_0003"]


def test_notes_that_give_two_cases_one_id_are_refused_as_a_manifest_is(tmp_path: Path) -> None:
    for number in (1, 2):
        touch(tmp_path, *each(f"PHANTOM_000{number}/PHANTOM_000{number}_*.nii.gz", BRATS_FOUR))
    notes = {"PHANTOM_0002": {"id": "PHANTOM_0001"}}
    (tmp_path / "cohort.json").write_text(json.dumps({"cases": notes}))
    error = refusal(tmp_path)
    assert (error.reason, error.path) == ("duplicate-id", tmp_path / "cohort.json")
    assert "two cases have the same id" in str(error) and "own id" in str(error)


@pytest.mark.parametrize("text", ["[]", "{", '{"cases": [1]}', '{"cases": {"a": 1}}', '{"regions": {"x": ["1"]}}'])
def test_notes_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "PHANTOM_0001_t1.nii.gz")
    (tmp_path / "cohort.json").write_text(text)
    assert refusal(tmp_path).path == tmp_path / "cohort.json"


def test_a_link_in_a_circle_costs_its_own_case_only_and_a_name_too_long_is_refused(tmp_path: Path) -> None:
    for name in ("BraTS2021_00001", "BraTS2021_00002"):
        a_case(tmp_path, name)
    link = tmp_path / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz"
    link.unlink()
    link.symlink_to(link)
    found = inspect_folder(tmp_path)
    assert [(problem.case, problem.reason) for problem in found.problems] == [("BraTS2021_00001", "unreadable")]
    assert [row.shape for row in found.summaries] == [(16, 17, 18)] * 2
    with pytest.raises(CohortError, match="too long"):
        find_cohort(tmp_path / ("x" * 300))


def test_dicom_that_is_damaged_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "P1/T1/1-001.dcm")
    (tmp_path / "P1/T2").mkdir()
    (tmp_path / "P1/T2/IM0002").write_bytes(bytes(128) + b"DICM" + bytes(4))
    for layout in (None, "dicom"):
        assert refusal(tmp_path, layout).reason == "header"


def test_an_unknown_folder_says_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    touch(tmp_path, "one.nii.gz", "notes.txt")
    error = refusal(tmp_path)
    assert error.reason == "unknown-layout"
    assert error.found == "1 volume such as one.nii.gz"
    assert all(name in str(error) for name in NAMES)
    assert "manifest.csv" in (error.hint or "")
    assert refusal(tmp_path / "nothing").reason == "not-found"
    assert refusal(tmp_path / "notes.txt").reason == "no-folder"
    assert "nnunet" in str(refusal(tmp_path, "nn-unet").expected)
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in str(refusal(tmp_path / "empty"))
    touch(tmp_path / "empty", "notes.txt")
    assert "no file that ends in .nii.gz" in str(refusal(tmp_path / "empty").found)


def test_a_case_of_labels_alone_is_a_problem(tmp_path: Path) -> None:
    cohort = find_cohort(touch(tmp_path, "BraTS2021_00000_t1.nii.gz", "BraTS2021_00001_seg.nii.gz"))
    assert only(cohort).id == "BraTS2021_00000"
    assert [(p.case, p.reason) for p in cohort.problems] == [("BraTS2021_00001", "no-image")]


# --- manifests ---------------------------------------------------------------------------------------------------


def manifest(root: Path, text: str, name: str = "manifest.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_a_manifest_gives_every_column_its_meaning(tmp_path: Path) -> None:
    touch(tmp_path, "a/t1.nii.gz", "a/fl.nii.gz", "a/t2.mha", "a/m.nii.gz", "a/seg.nii.gz", "b/t1.nii.gz")
    header = "Subject,id,source_T1w,source_flair,target_t2,mask,regions,site,split,age\n"
    row = "p1,p1-a,a/t1.nii.gz,a/fl.nii.gz,a/t2.mha,a/m.nii.gz,a/seg.nii.gz,Guys,train,61\n"
    path = manifest(tmp_path, "\ufeff" + header + row + "p1,p1-b,b/t1.nii.gz,,,,,,,62\n\n")
    first, second = find_cohort(path).cases
    assert first == Case(
        "p1-a",
        "p1",
        {"t1": tmp_path / "a/t1.nii.gz", "flair": tmp_path / "a/fl.nii.gz", "t2": tmp_path / "a/t2.mha"},
        tmp_path / "a/m.nii.gz",
        tmp_path / "a/seg.nii.gz",
        "Guys",
        "train",
    )
    assert second == Case("p1-b", "p1", {"t1": tmp_path / "b/t1.nii.gz"})
    assert find_cohort(path).regions == {"lesion": (1, 2, 3, 4)}
    assert find_cohort(tmp_path) == find_cohort(path) == find_cohort(tmp_path, layout="manifest")


def test_csv_with_semicolons_tsv_and_json_say_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "s.nii.gz", "t.nii.gz")
    absolute = tmp_path / "t.nii.gz"
    texts = {
        "a.csv": f"subject;source;target\n7;s.nii.gz;{absolute}\n",
        "a.tsv": f"subject\tsource\ttarget\n7\ts.nii.gz\t{absolute}\n",
        "a.json": json.dumps([{"subject": 7, "source": "s.nii.gz", "target": str(absolute)}]),
        "b.json": json.dumps({"cases": [{"subject": 7, "source": "s.nii.gz", "target": str(absolute), "site": None}]}),
    }
    cohorts = [read_manifest(manifest(tmp_path, text, name)) for name, text in texts.items()]
    assert only(cohorts[0]) == Case("7", "7", {"source": tmp_path / "s.nii.gz", "target": absolute})
    assert all(cohort == cohorts[0] for cohort in cohorts)


def test_a_json_manifest_declares_regions(tmp_path: Path) -> None:
    touch(tmp_path, "s.nii.gz", "seg.nii.gz")
    row = {"subject": "a", "source": "s.nii.gz", "regions": "seg.nii.gz"}
    manifest(tmp_path, json.dumps({"cases": [row], "regions": {"WT": [1, 2, 4]}}), "manifest.json")
    assert find_cohort(tmp_path).regions == {"WT": (1, 2, 4)}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("subject,source\na,../s.nii.gz\n", "outside"),
        ("subject,source\na,sub/../s.nii.gz\n", "outside"),
        ("subject,source\na,..\\s.nii.gz\n", "outside"),
        ("subject,source\na,/etc/s.nii.gz\n", "outside"),
        ("subject,source\na,out.nii.gz\n", "outside"),
        ("subject,source\na,loop/s.nii.gz\n", "outside"),
        ("subject,source\na,linked/s.nii.gz\n", "outside"),
        ("subject,source\na,s.nii.gz\0\n", "nul"),
        ("subject,source\na/b,s.nii.gz\n", "unsafe-id"),
        ("subject,source\na\\b,s.nii.gz\n", "unsafe-id"),
        ("subject,source\n..,s.nii.gz\n", "unsafe-id"),
        ("subject,source\n,s.nii.gz\n", "unsafe-id"),
        ("subject,id,source\na,x/y,s.nii.gz\n", "unsafe-id"),
        ("subject,source\na,s.nii.gz\na,s.nii.gz\n", "duplicate-id"),
        ("subject,source\na,s.nii.gz\na,gone.nii.gz\n", "duplicate-id"),
        ("subject,source,split\na,s.nii.gz,holdout\n", "split"),
        ("subject,source\na,s.nii.gz,more\n", "ragged"),
        ("subject,mask,site\na,s.nii.gz,b\n", "columns"),
        ("subject,t1,T1w\na,s.nii.gz,s.nii.gz\n", "columns"),
        ("subject,mask,brain_mask,t1\na,s.nii.gz,s.nii.gz,s.nii.gz\n", "columns"),
        ("person,source\na,s.nii.gz\n", "columns"),
        ("subject,source\n", "columns"),
        ("", "columns"),
        ("subject,source\na,gone.nii.gz\n", "no-cases"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    root = touch(tmp_path / "root", "s.nii.gz")
    outside = touch(tmp_path / "outside", "s.nii.gz")
    (root / "out.nii.gz").symlink_to(outside / "s.nii.gz")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    error = refusal(manifest(root, text))
    assert (error.reason, error.path) == (reason, root / "manifest.csv")


def test_a_manifest_in_a_linked_folder_is_fine_and_links_inside_it_too(tmp_path: Path) -> None:
    root = touch(tmp_path / "disk", "s.nii.gz")
    (root / "link.nii.gz").symlink_to("s.nii.gz")
    manifest(root, "subject,source\na,link.nii.gz\n")
    (tmp_path / "data").symlink_to(root)
    assert only(find_cohort(tmp_path / "data")).images["source"] == tmp_path / "data" / "link.nii.gz"


@pytest.mark.parametrize("text", ["{", "7", '{"rows": []}', "[1]", '{"cases": [], "regions": {"x": "y"}}'])
def test_a_json_manifest_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(manifest(tmp_path, text, "m.json")).path == tmp_path / "m.json"


def test_a_missing_file_costs_its_case_only(tmp_path: Path) -> None:
    touch(tmp_path, "s.nii.gz")
    cohort = find_cohort(manifest(tmp_path, "subject,source\na,s.nii.gz\nb,gone.nii.gz\nc,\n"))
    assert only(cohort).id == "a"
    assert [(p.case, p.reason) for p in cohort.problems] == [("b", "missing-file"), ("c", "no-image")]
    assert "row 2: the source of case b does not exist" in cohort.problems[0].message


def test_somebody_else_s_manifest_is_left_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a_T1.nii.gz", "a_T2.nii.gz")
    manifest(tmp_path, "path,licence\n" + "a_T1.nii.gz,CC,BY\n")
    manifest(tmp_path, '{"name": "my page"}', "manifest.json")
    assert find_cohort(tmp_path).layout == "flat"
    assert refusal(tmp_path, "manifest").reason == "ragged"


@given(st.text(max_size=30))
def test_an_id_that_is_safe_names_a_file_in_its_folder(text: str) -> None:
    if is_safe_id(text):
        assert Path("/root", text).parent == Path("/root")
        assert os.path.normpath(f"/root/{text}") == f"/root/{text}"


# --- choosing and inspecting -------------------------------------------------------------------------------------


def test_a_modality_that_nobody_has_lists_those_that_there_are_with_counts(tmp_path: Path) -> None:
    touch(tmp_path, "a/a_T1.nii.gz", "a/a_T2.nii.gz", "b/b_T1.nii.gz", "c/c_FLAIR.nii.gz")
    cohort = find_cohort(tmp_path)
    with pytest.raises(CohortError, match=r"'ct' \(found layout case-files with flair \(1\), t1 \(2\), t2 \(1\)\)"):
        select_cases(cohort, ["t1"], "ct")
    with pytest.raises(CohortError, match="It is called t1 here"):
        select_cases(cohort, ["T1w"], None)
    with pytest.raises(CohortError, match="no case has flair and t2 together"):
        select_cases(cohort, ["flair"], "t2")
    assert [case.id for case in select_cases(cohort, ["t1"], None).cases] == ["a", "b"]


AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def a_case(root: Path, name: str, seed: int = 0, labels: np.ndarray | None = None) -> Path:
    rng = np.random.default_rng(seed)
    t1 = rng.normal(100, 20, (16, 17, 18))
    for modality, image in (("t1", t1), ("t2", 300 - t1 + rng.normal(0, 5, t1.shape))):
        write(root / name / f"{name}_{modality}.nii.gz", image.astype(np.float32))
    if labels is None:
        labels = np.zeros((16, 17, 18), np.uint8)
        labels[4:8, 4:8, 4:8] = 2
        labels[5:7, 5:7, 5:7] = 4
    write(root / name / f"{name}_seg.nii.gz", labels)
    return root


def test_inspection_measures_a_sound_case_and_finds_nothing_wrong(tmp_path: Path) -> None:
    a_case(tmp_path, "BraTS2021_00001")
    write(tmp_path / "stray.nii.gz", np.zeros((16, 17, 18), np.uint8))
    found = inspect_folder(tmp_path)
    assert found.problems == ()
    (row,) = found.summaries
    assert (row.shape, row.modalities) == ((16, 17, 18), ("t1", "t2"))
    assert row.spacing_mm == pytest.approx((2, 2, 2.5))
    # 64 marked voxels, 8 of them enhancing, of 2 x 2 x 2.5 mm = 0.01 ml each
    assert row.regions_ml == pytest.approx({"WT": 0.64, "TC": 0.08, "ET": 0.08})
    assert found.unused == (tmp_path / "stray.nii.gz",)
    text = "\n".join(found.lines())
    for words in (
        "layout brats-2021",
        "1 case of 1 subject",
        "t1 (1), t2 (1)",
        "16x17x18",
        "WT 0.6 ml",
        "stray.nii.gz",
    ):
        assert words in text


def test_inspection_names_every_file_that_is_wrong_and_why(tmp_path: Path) -> None:
    for number in range(5):
        a_case(tmp_path, f"BraTS2021_0000{number}", number)
    t2, seg = (lambda n: tmp_path / n / f"{n}_t2.nii.gz"), (lambda n: tmp_path / n / f"{n}_seg.nii.gz")
    truncated, moved, strange, broken = (f"BraTS2021_0000{n}" for n in (1, 2, 3, 4))
    t2(truncated).write_bytes(t2(truncated).read_bytes()[:-2000])
    image = np.random.default_rng(9).normal(100, 20, (16, 17, 18)).astype(np.float32)
    shifted = AFFINE.copy()
    shifted[0, 3] = 3
    write(t2(moved), image, shifted)
    labels = np.zeros((16, 17, 18), np.uint8)
    labels[3:5] = 3
    write(seg(strange), labels)
    write(seg(broken), labels.astype(np.float32) / 2)
    seen: list[tuple[int, int]] = []
    problems = inspect_folder(tmp_path, ["t1"], "t2", progress=lambda done, of, _: seen.append((done, of))).problems
    assert {problem.case for problem in problems} == {truncated, moved, strange, broken}
    by_case = {problem.case: problem for problem in problems}
    assert len(problems) == 4
    assert by_case[truncated].path == t2(truncated)
    assert "t2" in by_case[moved].message
    assert by_case[strange].path == seg(strange) and "no region declares (found 3" in by_case[strange].message
    assert by_case[broken].path == seg(broken)
    assert seen == [(n, 5) for n in range(6)]


def test_inspection_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    a_case(tmp_path, "BraTS2021_00001")
    (tmp_path / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz").write_bytes(b"broken")
    assert inspect_folder(tmp_path, ["t1"]).problems == ()
    assert [problem.path.name for problem in inspect_folder(tmp_path).problems] == ["BraTS2021_00001_t2.nii.gz"]
    with pytest.raises(CohortError):
        inspect_folder(tmp_path, ["pd"])


def test_a_case_of_which_nothing_can_be_read_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "a_T1.nii.gz").write_bytes(b"broken")
    found = inspect_folder(tmp_path)
    assert found.summaries[0].shape is None
    assert "unreadable" in found.lines()[-1]
    examined = examine_case(found.cohort.cases[0], ["t1"], {})
    assert examined.problems == found.problems and not examined.is_usable


def test_labels_are_whole_numbers_and_declared_and_may_be_empty() -> None:
    regions = {"WT": (1, 2, 4)}
    check_label_values(np.zeros((2, 2)), regions, Path("x"))
    check_label_values(np.array([0, 1, 4]), regions, Path("x"))
    check_label_values(np.array([0, 77]), {}, Path("x"))
    with pytest.raises(VolumeError, match="3"):
        check_label_values(np.array([0, 3]), regions, Path("x"))
    with pytest.raises(VolumeError, match=r"0\.5"):
        check_label_values(np.array([0, 0.5]), regions, Path("x"))
    for declared in (regions, {}):
        with pytest.raises(VolumeError, match="negative"):
            check_label_values(np.array([-1, 0, 1]), declared, Path("x"))


def test_region_volumes_follow_an_oblique_affine() -> None:
    turned = np.array([[0, -2.0, 0, 0], [1.5, 0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1]])
    labels = Volume(np.arange(8, dtype=np.int16).reshape(2, 2, 2), Geometry((2, 2, 2), turned))
    # voxels of 12 mm3
    assert region_volumes(labels, {"a": (1, 2), "none": (9,)}) == pytest.approx({"a": 0.024, "none": 0.0})


# --- the scans beside the project --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "layout", "cases", "sites"),
    [
        ("tumour_tcga", "brats-2018", 6, {"TCIA01", "TCIA02", "TCIA10", "TCIA13"}),
        ("ms_lesjak", "case-files", 2, {None}),
        ("stroke_cstar", "flat", 1, {None}),
    ],
)
def test_the_real_folders_are_recognised_and_sound(
    folder: str, layout: str, cases: int, sites: set[str | None]
) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"no scans in {DATA / folder}; set CHIASM_DATA")
    found = inspect_folder(DATA / folder, ["t1"], "t2")
    assert (found.cohort.layout, len(found.summaries)) == (layout, cases)
    assert {case.site for case in found.cohort.cases} == sites
    assert found.problems == ()
    if found.cohort.regions:
        assert all(next(iter(row.regions_ml.values())) > 1 for row in found.summaries)


@pytest.mark.realdata
def test_real_dicom_is_recognised_in_a_folder_with_a_file_of_its_own() -> None:
    if not (DATA / "dicom").is_dir():
        pytest.skip(f"no scans in {DATA / 'dicom'}; set CHIASM_DATA")
    cohort = find_cohort(DATA / "dicom")
    assert cohort.layout == "dicom"
    assert [sorted(case.images) for case in cohort.cases] == [["t1ce", "t2"]]
    assert [problem.reason for problem in cohort.problems] == ["tilt"]


def test_a_map_in_lower_case_beside_images_in_capitals_is_used(tmp_path: Path) -> None:
    """KonfAI's names are all in capitals; `T1` beside `seg` was read as KonfAI's, without `seg`."""
    for case in ("P01", "P02"):
        touch(tmp_path, *each(f"{case}/*.nii.gz", ("T1", "T2", "seg")))
    cohort = find_cohort(tmp_path)
    assert (cohort.layout, cohort.unused) == ("case-folders", ())
    assert all(case.labels is not None for case in cohort.cases)
    assert find_cohort(tmp_path, layout="konfai").layout == "konfai"
