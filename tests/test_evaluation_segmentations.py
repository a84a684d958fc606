"""A user's segmentations of both images: found, named, scored, and the cases without them left out by name."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import RunError, VolumeError
from chiasm.evaluation.given_volumes import pair_up
from chiasm.evaluation.segmentations import compare, read_names
from chiasm.prediction.folders import predict
from chiasm.reports.evaluation import evaluate
from chiasm.volumes import Geometry, Volume, write_volume

SHAPE = (16, 18, 12)
AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])


def label_map(*boxes: tuple[int, int, int]) -> Volume:
    """Boxes of value, first and last plane along the first axis."""
    array = np.zeros(SHAPE, np.uint8)
    for value, first, last in boxes:
        array[first:last, 4:12, 2:10] = value
    return Volume(array, Geometry(SHAPE, AFFINE))


def test_only_structures_of_the_real_image_count_and_a_lost_one_has_dice_0() -> None:
    real, synthetic = label_map((1, 2, 6), (5, 8, 12)), label_map((1, 3, 7), (9, 8, 12))
    found = compare(synthetic, real, {})
    assert list(found) == ["structures", "structure 1", "structure 5"]
    assert found["structure 1"] == {"dice": 0.75, "hd95": 2.0}
    assert found["structure 5"]["dice"] == 0 and math.isnan(found["structure 5"]["hd95"])
    assert found["structures"] == {"dice": 0.375, "hd95": 2.0}


def test_values_of_one_name_are_one_structure() -> None:
    real, synthetic = label_map((1, 2, 6), (2, 6, 10)), label_map((2, 2, 10))
    assert compare(synthetic, real, {"lungs": (1, 2), "liver": (7,)})["structure lungs"] == {"dice": 1.0, "hd95": 0.0}
    assert compare(synthetic, label_map(), {}) == {}


def test_maps_on_other_grids_are_refused() -> None:
    other = Volume(np.zeros(SHAPE, np.uint8), Geometry(SHAPE, np.diag([2.0, 1.0, 1.5, 1.0])))
    with pytest.raises(VolumeError, match="segmentation"):
        compare(other, label_map((1, 2, 6)), {})


@pytest.mark.parametrize("content", ["[1]", '{"liver": 0}', '{"liver": "5"}', '{"<b>": 5}', '{"liver": []}', "{}"])
def test_names_that_name_nothing_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(RunError, match="name structures"):
        read_names(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert pair_up(None, "segmentation") is None
    with pytest.raises(RunError, match="no folder of segmentations"):
        pair_up((tmp_path, tmp_path / "elsewhere"), "segmentation")


def test_an_evaluation_scores_segmentations_beside_images(finished_run: Path, toy_cohort: Path, tmp_path: Path) -> None:
    made = predict(finished_run, [toy_cohort], tmp_path / "made", only="test")
    cases = [entry.case for entry in made.manifest.cases]
    folders = [tmp_path / "synthetic", tmp_path / "real"]
    from chiasm.volumes import read_volume

    image = read_volume(made.folder / made.manifest.cases[0].image)
    for folder, value in zip(folders, (30, 40)):
        array = np.zeros(image.array.shape, np.uint8)
        array[8 : value - 10, 8:20, 2:8] = 5
        write_volume(folder / cases[0] / "organs.nii.gz", array, image.geometry, labels=True)
    (folders[1] / "labels.json").write_text(json.dumps({"liver": 5}))
    scored = evaluate(
        made.folder,
        toy_cohort,
        tmp_path / "scores",
        segmentations=(folders[0], folders[1]),
    )
    with (scored.report.parent / "evaluation.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["region"] == "structure liver"]
    expected = 2 * 12 / (12 + 22)
    assert {row["metric"]: float(row["value"]) for row in rows}["dice"] == pytest.approx(expected)
    assert {row["unit"] for row in rows} == {"1", "mm"} and {row["case"] for row in rows} == {cases[0]}
    missing = [problem for problem in scored.problems if problem.reason == "no-segmentation"]
    assert [problem.case for problem in missing] == cases[1:]
    page = scored.report.read_text()
    assert "structure liver" in page and "HD95" in page
