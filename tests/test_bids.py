"""chiasm as a BIDS-App: derivatives under the names of BIDS, judged by BIDS' own validator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import chiasm
from chiasm import bids
from chiasm.bids import derive_group, derive_participants
from chiasm.cli import make_app
from chiasm.cohorts.completed import sidecar_of
from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.prediction.folders import Predicted, predict
from chiasm.volumes import read_volume, write_volume
from chiasm.volumes.masks import Rule
from conftest import Sibling

VALIDATOR = Path(sys.executable).with_name("bids-validator-deno")
IMAGE = "anat/{}_desc-synthetic_T2w.nii.gz"


@pytest.fixture(scope="module")
def raw(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects, one with another id in cohort.json, the last with two sessions, the second without a target."""
    root = tmp_path_factory.mktemp("bids")
    cases = find_cohort(toy_cohort).cases
    for number, (case, session) in enumerate(zip(cases, ("", "", "_ses-1", "_ses-2")), start=1):
        name = f"sub-0{min(number, 3)}{session}"
        place = root.joinpath(*name.split("_"), "anat")
        place.mkdir(parents=True)
        for modality, suffix in (("t1", "acq-mprage_T1w"), ("t2", "T2w"))[: 1 if session == "_ses-2" else 2]:
            shutil.copy(case.images[modality], place / f"{name}_{suffix}.nii.gz")
    description = {"Name": "made", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text("Made by a test.")
    (root / "cohort.json").write_text('{"cases": {"sub-02": {"id": "sub-02-old", "subject": "P2"}}}')
    (root / ".bidsignore").write_text("cohort.json")
    return root


@pytest.fixture(scope="module")
def derived(raw: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derivatives") / "chiasm"
    made = derive_participants(raw, out, finished_run)
    assert not made.problems and [path.relative_to(out).as_posix() for path in made.files] == [
        f"{folder}/{IMAGE.format(name)}"
        for folder, name in (
            ("sub-01", "sub-01_acq-mprage"),
            ("sub-02", "sub-02_acq-mprage"),
            ("sub-03/ses-1", "sub-03_ses-1_acq-mprage"),
            ("sub-03/ses-2", "sub-03_ses-2_acq-mprage"),
        )
    ]
    return out


def test_each_image_names_its_sources_and_its_model(derived: Path, raw: Path) -> None:
    image = derived / "sub-01" / IMAGE.format("sub-01_acq-mprage")
    about = json.loads(image.with_name(image.name.replace(".nii.gz", ".json")).read_text())
    assert about["Sources"] == ["bids:raw:sub-01/anat/sub-01_acq-mprage_T1w.nii.gz"]
    links = json.loads((derived / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"raw": raw.resolve().as_uri()}
    assert about["SyntheticData"] == "YES" and len(about["Model"]["Sha256"]) == 64 and about["SkullStripped"] is True
    predicted = read_volume(derived / "predictions" / "sub-01" / "sub-01_t2.nii.gz")
    np.testing.assert_array_equal(read_volume(image).array, predicted.array)
    assert image.with_name("sub-01_acq-mprage_desc-expectederror_T2w.nii.gz").is_file()
    assert image.with_name("sub-01_acq-mprage_desc-synthetic_mask.nii.gz").is_file()


@pytest.mark.parametrize(("rule", "stripped"), [("given", True), ("body", False)])
def test_a_scan_that_is_empty_outside_a_given_mask_is_stripped(
    rule: Rule, stripped: bool, raw: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_by(*asked: Any, **options: Any) -> Predicted:
        made = predict(*asked, **options)
        entries = tuple(replace(entry, mask_rule=rule) for entry in made.manifest.cases)
        return replace(made, manifest=replace(made.manifest, cases=entries))

    monkeypatch.setattr(bids, "predict", found_by)
    data = tmp_path / "raw"
    shutil.copytree(raw, data)
    scan = read_volume(data / "sub-01" / "anat" / "sub-01_acq-mprage_T1w.nii.gz")
    mask = data / "derivatives" / "masks" / "sub-01" / "anat" / "sub-01_acq-mprage_desc-brain_mask.nii.gz"
    mask.parent.mkdir(parents=True)
    write_volume(mask, (scan.array > 0).astype(np.uint8), scan.geometry, labels=True)
    (image,) = derive_participants(data, tmp_path / "out", finished_run, labels=["01"]).files
    assert json.loads(sidecar_of(image).read_text())["SkullStripped"] is stripped


def test_the_validator_of_bids_finds_no_error(derived: Path) -> None:
    if not VALIDATOR.is_file():
        pytest.skip("bids-validator-deno is not installed")
    told = subprocess.run([VALIDATOR, "--format", "json", derived], capture_output=True, text=True, timeout=120)
    issues = json.loads(told.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_subjects_and_sessions_are_chosen_and_what_is_there_is_kept(
    raw: Path, finished_run: Path, tmp_path: Path
) -> None:
    words = ["bids", str(raw), str(tmp_path / "out"), "participant", "--run", str(finished_run)]
    first = CliRunner().invoke(make_app(), [*words, "--participant-label", "03", "--session-label", "1"])
    assert first.exit_code == 0 and "1 case derived" in first.output
    images = sorted((tmp_path / "out").rglob("*_desc-synthetic_T2w.nii.gz"))
    assert [path.name for path in images] == ["sub-03_ses-1_acq-mprage_desc-synthetic_T2w.nii.gz"]
    manifest = tmp_path / "out" / "predictions" / "sub-03_ses-1" / "predictions.json"
    before = manifest.with_name("sub-03_ses-1_t2.nii.gz").stat().st_mtime_ns
    assert CliRunner().invoke(make_app(), [*words, "--participant_label", "sub-03"]).exit_code == 0
    assert manifest.with_name("sub-03_ses-1_t2.nii.gz").stat().st_mtime_ns == before
    assert len(list((tmp_path / "out").rglob("*_desc-synthetic_T2w.nii.gz"))) == 2


def test_several_models_are_averaged_with_their_spread_beside(
    raw: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    runs, out = [finished_run, sibling("beside")], tmp_path / "out"
    words = ["bids", str(raw), str(out), "participant", "--participant-label", "01"]
    for run in runs:
        words += ["--run", str(run)]
    assert CliRunner().invoke(make_app(), words).exit_code == 0
    image = out / "sub-01" / IMAGE.format("sub-01_acq-mprage")
    source = raw / "sub-01" / "anat" / "sub-01_acq-mprage_T1w.nii.gz"
    mean = chiasm.load(runs).predict(source)
    np.testing.assert_array_equal(read_volume(image).array, mean.image.array)
    spread = image.with_name("sub-01_acq-mprage_desc-spread_T2w.nii.gz")
    assert mean.spread is not None
    np.testing.assert_array_equal(read_volume(spread).array, mean.spread.array)
    about = json.loads(spread.with_name(spread.name.replace(".nii.gz", ".json")).read_text())
    assert about["Model"]["Method"] == "mean-of-2-A7" and "several models" in about["Description"]
    test_the_validator_of_bids_finds_no_error(out)


def test_models_that_do_not_agree_leave_nothing_behind(
    raw: Path, finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    other = sibling("of ranks", mask_rule="body")
    with pytest.raises(RunError, match="they differ in rule for the mask"):
        derive_participants(raw, tmp_path / "out", [finished_run, other])
    assert not (tmp_path / "out").exists()


def test_a_group_is_scored_where_there_is_a_real_target(derived: Path, raw: Path) -> None:
    scored = derive_group(raw, derived)
    assert {row.case for row in scored.rows} == {"sub-01", "sub-02-old", "sub-03_ses-1"}
    assert [problem.case for problem in scored.problems] == ["sub-03_ses-2"]
    assert (derived / "evaluation" / "report.html").is_file()


def test_what_cannot_be_done_is_said_before_anything_is_written(
    raw: Path, toy_cohort: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CohortError, match="is not BIDS"):
        derive_participants(toy_cohort, out, finished_run)
    with pytest.raises(CohortError, match="sub-09"):
        derive_participants(raw, out, finished_run, labels=["09"])
    with pytest.raises(CohortError, match="no such session"):
        derive_participants(raw, out, finished_run, sessions=["7"])
    with pytest.raises(RunError, match="no derivatives"):
        derive_group(raw, out)
    monkeypatch.setattr("chiasm.bids.SUFFIXES", {})
    with pytest.raises(RecipeError, match="BIDS has no name for t2"):
        derive_participants(raw, out, finished_run)
    assert not out.exists()
    missing = CliRunner().invoke(make_app(), ["bids", str(raw), str(out), "participant"])
    assert missing.exit_code != 0
