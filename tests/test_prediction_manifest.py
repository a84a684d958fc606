"""`predictions.json`: written, read, and refused where it is odd."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.errors import RunError
from chiasm.prediction.manifest import (
    Entry,
    Failure,
    Manifest,
    check_files,
    find_path,
    read_manifest,
    relative,
    write_manifest,
)

MANIFEST = Manifest(
    "/runs/a/model", "0" * 64, "A7", 0, 1, ("t1",), "t2", "a.u.",
    (Entry("p1", "test", ("/data/p1.nii.gz",), "p1_t2.nii.gz", "p1_mask.nii.gz", None, ("odd",)),),
    (Failure("p2", "/data/p2.nii.gz", "truncated", "is truncated"),),
)  # fmt: skip


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert "not for diagnostic use" in (tmp_path / "predictions.json").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["cases"][0].update(image="../elsewhere.nii"), "outside"),
        (lambda c: c["cases"][0].update(mask="/etc/passwd"), "outside"),
        (lambda c: c["cases"][0].update(expected_error="deeper/map.nii"), "outside"),
        (lambda c: c["cases"][0].update(image=".."), "outside"),
        (lambda c: c["cases"][0].update(image=""), "outside"),
        (lambda c: c["cases"][0].update(image="p1\0.nii"), "outside"),
        (lambda c: c["cases"][0].update(image="."), "outside"),
        (lambda c: c["cases"][0].update(mask="C:\\p1.nii"), "outside"),
        (lambda c: c["cases"][0].update(case="a/b"), "a name that a file cannot have"),
        (lambda c: c["cases"][0].update(case=".."), "a name that a file cannot have"),
        (lambda c: c["cases"].append(c["cases"][0]), "twice"),
        (lambda c: c["cases"][0].update(role="discriminator"), "role"),
        (lambda c: c.pop("model"), "model"),
        (lambda c: c.update(seed="x"), "seed"),
    ],
)
def test_a_changed_one_is_refused(change, told: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_manifest(tmp_path, MANIFEST)
    content = json.loads((tmp_path / "predictions.json").read_text())
    change(content)
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=told):
        read_manifest(tmp_path)


def test_a_link_that_leads_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_manifest(folder, MANIFEST)
    (folder / "p1_t2.nii.gz").symlink_to(folder / "p1_mask.nii.gz")
    assert read_manifest(folder) == MANIFEST
    (tmp_path / "elsewhere.nii.gz").touch()
    (folder / "p1_mask.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(RunError, match="outside"):
        read_manifest(folder)


def test_one_of_an_earlier_version_is_read_and_its_absolute_paths_are_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    content = json.loads((tmp_path / "predictions.json").read_text())
    for name in ("options", "pending", "written_in"):
        del content[name]
    for name in ("sha256", "inputs", "mask_rule"):
        del content["cases"][0][name]
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    found = read_manifest(tmp_path)
    assert found == MANIFEST
    assert find_path(tmp_path, found, found.model) == Path("/runs/a/model")
    check_files(tmp_path, found.cases[0])  # no digests, so nothing to compare: no file is there at all


def test_paths_hold_where_the_tree_is_moved_and_where_the_folder_is_copied_alone(tmp_path: Path) -> None:
    made, run = tmp_path / "tree" / "made", tmp_path / "tree" / "run"
    for folder in (made, run):
        folder.mkdir(parents=True)
    manifest = replace(MANIFEST, model=relative(run, made), written_in=str(made))
    assert manifest.model == "../run"
    shutil.copytree(tmp_path / "tree", tmp_path / "moved")
    shutil.copytree(made, tmp_path / "far" / "away" / "alone")
    assert find_path(tmp_path / "moved" / "made", manifest, manifest.model).resolve() == tmp_path / "moved" / "run"
    assert find_path(tmp_path / "far" / "away" / "alone", manifest, manifest.model).resolve() == run


@pytest.mark.parametrize("noise", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 10_000])
def test_a_damaged_one_is_refused_and_named(noise: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_bytes(noise)
    with pytest.raises(RunError, match=r"predictions\.json"):
        read_manifest(tmp_path)


def test_a_folder_without_one_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="chiasm predict") as caught:
        read_manifest(tmp_path)
    assert caught.value.reason == "no-predictions"


def test_reading_it_never_loads_torch() -> None:
    program = "import sys, chiasm.prediction.manifest; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
