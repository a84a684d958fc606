"""What was made passes for a scan by no slip: name, sidecar and manifest each say so alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from chiasm.cohorts.cases import Case
from chiasm.cohorts.completed import Origin, copy_case, is_synthetic, mark_synthetic, was_made, write_completed
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError
from chiasm.volumes import read_volume
from dicom_patients import write_source
from synthetic_cohort import affine, pair, save, write_brats

ORIGIN = Origin("a", "t2", {"t1": "0" * 64}, "li-cnn", "1" * 64, "chiasm 0")
SAID = '{"SyntheticData": "YES"}'


def two_scans(root: Path, t2: str = "a_t2.nii.gz", synthetic: str = "") -> Path:
    """A manifest of one case whose T2 has the name and the mark given."""
    source, target, _ = pair(1)
    save(root / "a_t1.nii.gz", source, affine())
    save(root / t2, target, affine())
    (root / "manifest.csv").write_text(f"subject,t1,t2,synthetic\na,a_t1.nii.gz,{t2},{synthetic}\n")
    return root


@pytest.mark.parametrize(
    ("name", "sidecar", "column", "marked"),
    [
        ("a_t2.nii.gz", None, "", False),
        ("a_t2_synthetic.nii.gz", None, "", True),
        ("a_t2.nii.gz", SAID, "", True),
        ("a_t2.nii.gz", None, "t2", True),
        ("a_t2.nii.gz", '{"RepetitionTime": 2.5}', "", False),  # as BIDS has it
        ("a_t2.nii.gz", '{"SyntheticData": "NO"}', "", False),
        ("a_t2.nii.gz", "no JSON at all", "", False),
        ("a_t2.nii.gz", "[1, 2]", "", False),
    ],
)
def test_each_mark_alone_keeps_an_image_out_unless_it_is_allowed(
    tmp_path: Path, name: str, sidecar: str | None, column: str, marked: bool
) -> None:
    two_scans(tmp_path, name, column)
    if sidecar is not None:
        (tmp_path / "a_t2.json").write_text(sidecar)
    cohort = find_cohort(tmp_path)
    assert ("t2" not in cohort.cases[0].images) == marked
    assert [problem.reason for problem in cohort.problems] == ["synthetic"] * marked
    allowed = find_cohort(tmp_path, selection=Selection(allow=("synthetic",))).cases[0]
    assert set(allowed.images) == {"t1", "t2"} and allowed.synthetic == ("t2",) * marked
    (tmp_path / "cohort.json").write_text('{"allow": ["synthetic"]}')
    assert find_cohort(tmp_path).cases[0] == allowed


def test_a_sidecar_keeps_an_image_out_of_a_cohort_without_a_manifest_too(tmp_path: Path) -> None:
    data = write_brats(tmp_path, 2)
    (data / "Toy_0001" / "Toy_0001_t2.json").write_text(SAID)
    assert [sorted(case.images) for case in find_cohort(data).cases] == [["t1"], ["t1", "t2"]]


def test_a_manifest_that_calls_an_absent_image_synthetic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="flair") as refused:
        find_cohort(two_scans(tmp_path, synthetic="flair"))
    assert refused.value.reason == "synthetic"


def test_a_sidecar_tells_the_origin_and_an_image_without_the_name_gets_none(tmp_path: Path) -> None:
    image = save(tmp_path / "a_t2_synthetic.nii.gz", pair(1)[1], affine())
    mark_synthetic(image, ORIGIN, expected_error=tmp_path / "a_expected-error.nii.gz", warnings=["beware"])
    told = json.loads((tmp_path / "a_t2_synthetic.json").read_text())
    assert told["SyntheticData"] == "YES" and told["model"] == "1" * 64 and told["sources"] == {"t1": "0" * 64}
    assert (told["expected_error"], told["warnings"]) == ("a_expected-error.nii.gz", ["beware"])
    assert was_made(image, ORIGIN) and not was_made(image, replace(ORIGIN, model="2" * 64))
    assert is_synthetic(image) and not is_synthetic(tmp_path / "a_t2_synthetic.json")
    with pytest.raises(ValueError, match="_synthetic"):
        mark_synthetic(tmp_path / "a_t2.nii.gz", ORIGIN, expected_error=None, warnings=())


def test_a_copy_has_the_bytes_of_one_file_and_the_values_of_several(tmp_path: Path) -> None:
    source, target, labels = pair(1)
    one = save(tmp_path / "in" / "x.nii.gz", source, affine())
    sitk.WriteImage(sitk.GetImageFromArray(target.T), str(tmp_path / "in" / "y.mhd"))  # and y.raw
    drawn = save(tmp_path / "in" / "z.nii", labels, affine())
    case = Case("a", "a", {"t1": one, "t2": tmp_path / "in" / "y.mhd"}, labels=drawn)
    made = copy_case(case, tmp_path / "out")
    assert made.images["t1"].read_bytes() == one.read_bytes()
    assert made.labels is not None and made.labels.name == "a_labels.nii"
    np.testing.assert_array_equal(nib.load(made.images["t2"]).get_fdata(), target)  # type: ignore[attr-defined]
    assert made.images["t1"].stat().st_ino != one.stat().st_ino  # no link: a viewer that saves in place spoils nothing
    before = made.images["t1"].stat().st_mtime_ns
    assert copy_case(case, tmp_path / "out") == made and made.images["t1"].stat().st_mtime_ns == before


def test_a_dicom_series_becomes_nifti_on_its_own_grid(tmp_path: Path) -> None:
    write_source(tmp_path / "series", plane="sagittal")
    copy = copy_case(Case("a", "a", {"t1": tmp_path / "series"}), tmp_path / "out").images["t1"]
    before, after = read_volume(tmp_path / "series"), read_volume(copy)
    assert copy.name == "a_t1.nii.gz"
    np.testing.assert_array_equal(after.array, before.array)
    np.testing.assert_allclose(after.geometry.affine, before.geometry.affine, atol=1e-4)


def test_a_manifest_written_is_the_cohort_read(tmp_path: Path) -> None:
    found = find_cohort(write_brats(tmp_path / "in", 3))
    first, *others = (copy_case(case, tmp_path / "out") for case in found.cases)
    made = first.images["t2"].rename(first.images["t2"].with_name("x_t2_synthetic.nii.gz"))
    filled = replace(first, images={**first.images, "t2": made}, synthetic=("t2",), site="St. Mary, east")
    tested = replace(others[0], split="test")
    write_completed(tmp_path / "out", [filled, tested, others[1]], found.regions)
    read = find_cohort(tmp_path / "out", selection=Selection(allow=("synthetic",)))
    assert read.cases == (replace(filled, split="train"), tested, others[1])
    assert read.regions == found.regions and not read.problems
