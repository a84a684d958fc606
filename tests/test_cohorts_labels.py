"""Labels that cannot be used: every verb says the same of them, and the case itself is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.cli import main
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.labels import read_label_map
from chiasm.evaluation.rows import read_evaluation, read_remarks
from chiasm.prediction.folders import predict
from chiasm.storage import read_json
from synthetic_cohort import affine, save

SPOILED: dict[str, tuple[Callable[[NDArray[np.float32]], NDArray[np.generic]], str]] = {
    "undeclared": (
        lambda labels: np.where(labels > 0, 9, 0).astype(np.uint8),
        "labels have values that no region declares",
    ),
    "negative": (lambda labels: np.where(labels > 0, 4, -1).astype(np.int16), "labels are negative"),
    "soft": (lambda labels: (labels / 4 * 0.7).astype(np.float32), "holds soft labels, shares between 0 and 1"),
    "broken": (lambda labels: (labels * 0.7).astype(np.float32), "holds labels that are not whole numbers"),
}


def spoil(data: Path, case: str, kind: str) -> Path:
    path = data / case / f"{case}_seg.nii.gz"
    labels = nib.load(path).get_fdata(dtype=np.float32)
    return save(path, SPOILED[kind][0](labels), affine())


@pytest.fixture
def data(toy_cohort: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(toy_cohort, tmp_path / "data"))
    (folder / "cohort.json").write_text(json.dumps({"regions": {"lesion": [1, 4]}}))
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(list(map(str, words)))
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out + told.err

    return run


@pytest.mark.parametrize("kind", SPOILED)
def test_every_verb_names_labels_that_it_does_not_use_and_uses_the_case(
    kind: str, data: Path, finished_run: Path, tmp_path: Path, call: Callable[..., tuple[int, str]]
) -> None:
    case = read_json(finished_run / "splits.json")["test"][0]
    path = spoil(data, case, kind)
    code, told = call("inspect", data, "--source", "t1", "--target", "t2")
    (sentence,) = [line.partition("left out: ")[2] for line in told.splitlines() if line.startswith("left out")]
    assert code == 3 and sentence.startswith(f"case {case}, labels: {path}: {SPOILED[kind][1]}")
    words = ["--source", "t1", "--target", "t2", "--folds", "3", "--size", "tiny", "--set", "data.patch=32"]
    code, told = call("plan", data, *words, "-o", tmp_path / "run")
    assert code == 3 and sentence in told and "6 cases with" in told
    split = read_json(tmp_path / "run" / "splits.json")
    assert case in {name for role in ("train", "validation", "test") for name in split[role]}
    predict(finished_run, [data], tmp_path / "made", only="test")
    code, told = call("evaluate", tmp_path / "made", data, "-o", tmp_path / "scored")
    assert code == 3 and sentence in told
    regions = {row.region for row in read_evaluation(tmp_path / "scored") if row.case == case}
    assert {"mask", "edges"} <= regions and not {"lesion", "healthy", "lesions"} & regions
    assert read_remarks(tmp_path / "scored").problems == (sentence,)
    assert "labels not used" in (tmp_path / "scored" / "report.html").read_text()


def test_soft_labels_count_from_the_threshold_that_the_cohort_states(
    data: Path, tmp_path: Path, call: Callable[..., tuple[int, str]]
) -> None:
    path = spoil(data, "Toy_0001", "soft")  # 0.7 where the label was
    inside = nib.load(path).get_fdata() > 0
    assert '"labels": {"threshold": 0.5}' in call("inspect", data)[1]
    for threshold, count in ((0.5, inside.sum()), (0.8, 0)):
        notes = {"regions": {"lesion": [1, 4]}, "labels": {"threshold": threshold}}
        (data / "cohort.json").write_text(json.dumps(notes))
        assert call("inspect", data)[0] == 0
        cohort = find_cohort(data)
        assert np.count_nonzero(read_label_map(cohort.cases[0], cohort.regions).array == 1) == count
        hard = read_label_map(cohort.cases[1], cohort.regions).array
        assert set(np.unique(hard)) == {0, 4}  # whole numbers stay what they are
    (data / "cohort.json").write_text('{"labels": {"threshold": 300}}')
    code, told = call("inspect", data)
    assert code == 2 and "above 0 and at most 255" in told


@pytest.mark.parametrize(("most", "kind"), [(100, np.float32), (255, np.uint8)])
def test_probabilities_up_to_100_or_255_count_from_a_threshold_of_their_scale(
    data: Path, call: Callable[..., tuple[int, str]], most: int, kind: type
) -> None:
    cases = find_cohort(data).cases
    inside = {}
    for case in cases:
        assert case.labels is not None
        image = nib.load(case.labels)
        lesion = np.asarray(image.dataobj) > 0
        shares = np.where(lesion, 0.7 * most + 0.3, 0.0)
        nib.save(nib.Nifti1Image(shares.astype(kind), image.affine), case.labels)
        inside[case.id] = np.count_nonzero(lesion)
    if kind is np.float32:
        told = call("inspect", data)[1]
        assert "among values from 0 to 70.3" in told and "state the value from which a voxel counts" in told
    for threshold, counts in ((most / 2, True), (0.9 * most, False)):
        notes = {"regions": {"lesion": [1]}, "labels": {"threshold": threshold}}
        (data / "cohort.json").write_text(json.dumps(notes))
        assert call("inspect", data)[0] == 0
        cohort = find_cohort(data)
        for case in cohort.cases:
            assert np.count_nonzero(read_label_map(case, cohort.regions).array) == counts * inside[case.id]
    first = cases[0].labels
    assert first is not None
    image = nib.load(first)
    nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.float32), image.affine), first)
    code, told = call("inspect", data)  # one map from 0 to 1 among them
    assert code == 3 and "no label value near the threshold" in told


def test_nan_among_labels_is_called_nan(data: Path, call: Callable[..., tuple[int, str]]) -> None:
    path = find_cohort(data).cases[0].labels
    assert path is not None
    image = nib.load(path)
    labels = np.asarray(image.dataobj).astype(np.float32)
    labels[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(labels, image.affine), path)
    told = call("inspect", data)[1]
    assert "holds NaN among its labels" in told and "out of range" not in told
