"""The page of a reader study says nothing of what it shows; the key says all; the slices are those of the files."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiasm.cli import main
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError
from chiasm.evaluation.reader_files import StudyItem, read_key
from chiasm.preparation.plan import read_plan, write_plan
from chiasm.reports.evaluation import evaluate
from chiasm.reports.rating import (
    ReaderStudy,
    RealImages,
    StudyDesign,
    write_reader_study,
)
from chiasm.reports.slices import choose_slices, cut_slice
from chiasm.storage import read_json, write_json
from chiasm.volumes import read_volume
from reader_cohort import predict_twice, renamed
from synthetic_cohort import save

CASES = [f"Toy_{number:04}" for number in range(1, 7)]


@pytest.fixture(scope="module")
def predictions(toy_cohort: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return predict_twice(finished_run, toy_cohort, tmp_path_factory.mktemp("predictions"))


@pytest.fixture(scope="module")
def study(predictions: list[Path], toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> ReaderStudy:
    return write_reader_study(
        predictions, RealImages(toy_cohort), tmp_path_factory.mktemp("study"), StudyDesign(slices=2)
    )


def on_page(made: ReaderStudy) -> dict[str, Any]:
    """What the page's script is given."""
    found = re.search(r'id="study">(.*?)</script>', made.page.read_text(), re.DOTALL)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def pixels(made: ReaderStudy, item: StudyItem) -> np.ndarray:
    from PIL import Image

    address = on_page(made)["images"][item.position - 1]["image"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    assert (image[..., 0] == image[..., 1]).all() and (image[..., 3] == 255).all()
    return image[..., 0]


def test_every_slice_is_shown_as_scanned_and_as_each_method_made_it_and_a_share_of_them_twice(
    study: ReaderStudy,
) -> None:
    items = read_key(study.page.parent)
    assert tuple(items) == study.items and [item.position for item in items] == list(range(1, len(items) + 1))
    first = Counter(item.place for item in items if item.showing == 1)
    again = [item for item in items if item.showing == 2]
    assert set(first.values()) == {1} and len(first) == 6 * 2 * 3 and len(again) == round(0.2 * 36)
    slices = {(case, index) for case, index, _ in first}
    assert {case for case, _ in slices} == set(CASES)
    assert set(first) == {(case, index, method) for case, index in slices for method in ("real", "A1", "A7")}
    before = {item.place: item.position for item in items if item.showing == 1}
    assert min(item.position - before[item.place] for item in again) > 36 // 4
    for item in again:
        assert np.array_equal(pixels(study, item), pixels(study, items[before[item.place] - 1]))


def test_the_page_names_no_method_no_case_and_no_answer(study: ReaderStudy) -> None:
    content = on_page(study)
    assert content["study"] == study.items[0].study
    for shown, item in zip(content["images"], study.items, strict=True):
        assert set(shown) == {"token", "image", "size"} and shown["token"] == item.token
        assert re.fullmatch(r"[b-t]{10}", item.token)
    bare = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", study.page.read_text())
    for word in ("A7", "A1", "dual", "Nie", "l2", "Toy", *CASES, str(study.page.parent)):
        assert word not in bare, word
    assert len(bare) < 40_000 and not re.search(r"https?://|url\(|@import|fetch\(", bare)


def test_pictures_of_a_slice_differ_inside_only_and_share_box_and_window(study: ReaderStudy) -> None:
    by_slice: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for item in study.items:
        by_slice.setdefault((item.case, item.slice), {})[item.method] = pixels(study, item)
    for images in by_slice.values():
        assert len({image.shape for image in images.values()}) == 1
        assert len({image.tobytes() for image in images.values()}) == 3
        for image in images.values():  # the margin of the box is black in all
            assert image[:2].max() == image[-2:].max() == image[:, :2].max() == image[:, -2:].max() == 0


def test_a_picture_is_the_files_slice_in_the_models_window(
    study: ReaderStudy, predictions: list[Path], finished_run: Path
) -> None:
    plan = read_plan(finished_run / "model" / "plan.toml")
    low, high = plan.target_range
    item = next(item for item in study.items if item.method == "A7" and item.showing == 1)
    image = read_volume(predictions[0] / f"{item.case}_t2.nii.gz").array[:, :, item.slice]  # axes run right, front, up
    mask = read_volume(predictions[0] / f"{item.case}_mask.nii.gz", labels=True).array > 0
    grey = np.where(mask[:, :, item.slice], np.clip((image - low) / (high - low), 0, 1), 0)
    across, up = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    box = tuple(slice(max(side[0] - 4, 0), side[-1] + 5) for side in (across, up))
    expected = grey[box][::-1, ::-1].T * 255
    assert np.abs(pixels(study, item) - expected).max() <= 1


def test_the_same_seed_gives_the_same_page_and_another_another_order(
    study: ReaderStudy, predictions: list[Path], toy_cohort: Path, tmp_path: Path
) -> None:
    def again(name: str, seed: int) -> ReaderStudy:
        design = StudyDesign(slices=2, seed=seed)
        return write_reader_study(predictions, RealImages(toy_cohort), tmp_path / name, design)

    same, other = again("same", 0), again("other", 1)
    for name in ("rate.html", "key.csv"):
        assert (tmp_path / "same" / name).read_bytes() == (study.page.parent / name).read_bytes()
    assert same.items == study.items
    assert not {item.token for item in other.items} & {item.token for item in study.items}
    order = [item.place for item in study.items if item.showing == 1]
    assert [item.place for item in other.items if item.showing == 1] != order and order != sorted(order)


def test_tokens_change_with_what_is_shown_so_that_a_seed_does_not_give_the_order_away(
    study: ReaderStudy, predictions: list[Path], toy_cohort: Path, tmp_path: Path
) -> None:
    design = StudyDesign(slices=2, window=(150.0, 200.0))
    other = write_reader_study(predictions, RealImages(toy_cohort), tmp_path, design)
    assert [item.place for item in other.items] != [item.place for item in study.items]
    assert other.items[0].study != study.items[0].study


def test_slices_hold_most_of_the_labels_or_are_spread_over_the_mask() -> None:
    mask, labels = np.zeros((8, 9, 30), bool), np.zeros((8, 9, 30), bool)
    mask[2:7, 2:8, 4:28] = True
    labels[3:5, 3:5, 9] = labels[3:4, 3:5, 10] = labels[3:4, 3:4, 24] = True
    labels[:, :, 2] = True  # outside the mask
    assert choose_slices(mask, labels, 2, 1) == [9]
    assert choose_slices(mask, labels, 2, 2) == [9, 24]  # 10 lies too near
    assert choose_slices(mask, None, 2, 1) == [15]  # half of 24 slices lie below or in it
    assert choose_slices(mask, None, 2, 3) == [7, 15, 23]
    assert choose_slices(mask, labels, 2, 99) == list(range(4, 28))
    assert choose_slices(mask, labels, 0, 1) == [3]


def test_a_sagittal_slice_has_the_front_on_the_left_and_the_head_up() -> None:
    volume, mask = np.zeros((9, 20, 30)), np.ones((9, 20, 30), bool)
    volume[4, 15:, 25:] = 1  # front and up
    pictured, size_mm = cut_slice(volume, mask, 0, 4, (1.0, 2.0, 3.0))
    assert pictured.shape == (30, 20) and size_mm == (40.0, 90.0)
    assert (pictured[:5, :5] == 255).all() and pictured.sum() == 25 * 255
    assert cut_slice(volume, mask, 2, 29, (1.0, 2.0, 3.0))[1] == (9.0, 40.0)


def test_a_case_that_one_method_lacks_is_named_and_the_others_are_shown(
    predictions: list[Path], toy_cohort: Path, tmp_path: Path
) -> None:
    short = renamed(predictions[0], tmp_path / "short", "A6b")
    content = read_json(short / "predictions.json")
    content["cases"] = [entry for entry in content["cases"] if entry["case"] != CASES[2]]
    write_json(short / "predictions.json", content)
    several = tmp_path / "predictions"  # of several models, of which each predicted its own cases
    shutil.copytree(predictions[0], several / "1")
    made = write_reader_study([several, short], RealImages(toy_cohort), tmp_path / "study", StudyDesign())
    assert [problem.case for problem in made.problems] == [CASES[2]]
    assert "was not predicted by A6b" in made.problems[0].message
    assert {item.case for item in made.items} == set(CASES) - {CASES[2]}
    notes = "\n".join(made.notes)
    assert "cases were used in training" in notes and "only 5 subjects: no difference" in notes


def test_folders_that_cannot_stand_beside_each_other_are_refused(
    predictions: list[Path], finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    def tried(*folders: Path) -> None:
        write_reader_study(folders, RealImages(toy_cohort), tmp_path / "study", StudyDesign())

    with pytest.raises(RunError, match=r"holds case Toy_0001 of method A7, as .*one does"):
        tried(predictions[0], predictions[0])
    with pytest.raises(RunError, match="is of a method with the name real"):
        tried(renamed(predictions[0], tmp_path / "real", "real"))
    with pytest.raises(CohortError, match=r"no case can be shown; the first: .*grid differs"):
        odd = renamed(predictions[0], tmp_path / "odd", "A1")
        for path in odd.glob("*_t2.nii.gz"):
            save(path, read_volume(path).array, np.diag([1.0, 1, 2, 1]))
        tried(odd)
    with pytest.raises(RunError, match=r"holds no predictions\.json"):
        tried(toy_cohort)
    assert not (tmp_path / "study").exists()


def test_models_of_another_target_or_unit_are_refused(
    predictions: list[Path], finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished_run / "model", model)
    plan = read_plan(model / "plan.toml")
    other = renamed(predictions[0], tmp_path / "other", "A1")
    write_json(other / "predictions.json", {**read_json(other / "predictions.json"), "model": "../model"})
    for changes, told in (
        ({"target_kind": "zscore"}, "the target's unit"),
        ({"registration": "rigid"}, "registration"),
    ):
        write_plan(model / "plan.toml", replace(plan, **changes))  # type: ignore[arg-type]
        with pytest.raises(RunError, match=rf"differs from the first folder in .*{told}"):
            write_reader_study([predictions[0], other], RealImages(toy_cohort), tmp_path / "study", StudyDesign())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"slices": 0}, "--slices must be at least 1"),
        ({"repeat": 0.6}, "--repeat must be from 0 to 0.5"),
        ({"repeat": float("nan")}, "--repeat must be"),
        ({"plane": "oblique"}, "there is no plane 'oblique'"),
        ({"window": (40.0, 0.0)}, "a width above 0"),
    ],
)
def test_a_design_that_is_out_of_range_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        write_reader_study([tmp_path], RealImages(tmp_path), tmp_path / "study", StudyDesign(**changes))
    assert not (tmp_path / "study").exists()


def test_a_study_that_is_there_is_not_replaced_unless_that_is_asked_for(
    predictions: list[Path], toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rate", *map(str, predictions), str(toy_cohort), "-o", str(tmp_path / "study"), "--plane", "coronal"]
    main_until_exit(words)
    told = capsys.readouterr().out
    assert "18 images (6 of A1, 6 of A7, 6 of real), 4 of them twice" in told and "rate.html" in told
    before = (tmp_path / "study" / "key.csv").read_bytes()
    assert before.count(b",coronal,") == 22
    (tmp_path / "study" / "results.csv").write_text("mine")
    assert main_until_exit([*words, "--seed", "5"]) == 2
    assert "holds a reader study" in capsys.readouterr().err
    assert (tmp_path / "study" / "key.csv").read_bytes() == before
    assert main_until_exit([*words, "--seed", "5", "--overwrite"]) == 0
    assert (tmp_path / "study" / "key.csv").read_bytes() != before
    assert not (tmp_path / "study" / "results.csv").exists()


def test_a_page_of_somebody_else_and_the_data_themselves_are_not_replaced(
    predictions: list[Path], toy_cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "rate.html").write_text("mine")
    for out, told in ((tmp_path, r"holds rate\.html"), (toy_cohort, "is the folder of the data")):
        with pytest.raises(ChiasmError, match=told):
            write_reader_study(predictions, RealImages(toy_cohort), out, StudyDesign())
    assert [path.name for path in tmp_path.iterdir()] == ["rate.html"]


def test_the_folder_of_an_evaluation_says_where_predictions_and_real_images_lie(
    predictions: list[Path], toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(predictions[1], toy_cohort, tmp_path / "run" / "evaluation", register="none")
    capsys.readouterr()
    assert main_until_exit(["rate", str(tmp_path / "run"), "-o", str(tmp_path / "rating"), "--repeat", "0"]) == 0
    assert "12 images (6 of A1, 6 of real), 0 of them twice" in capsys.readouterr().out
    assert main_until_exit(["rate", str(tmp_path), "-o", str(tmp_path / "other")]) == 2
    assert "is no folder of chiasm study, run or evaluate" in capsys.readouterr().err


def test_a_study_says_where_the_predictions_of_its_methods_lie(
    predictions: list[Path], toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chiasm.studies.study_file import Study

    out, jobs = tmp_path / "study", []
    for name, folder in (("a", predictions[0]), ("b", predictions[1])):
        shutil.copytree(folder, out / "jobs" / name / "predictions")
        content = read_json(folder / "predictions.json")
        model = str((folder / content["model"]).resolve())
        write_json(out / "jobs" / name / "predictions" / "predictions.json", {**content, "model": model})
        jobs.append({"name": name, "arm": content["method"], "fold": 0, "seed": 0, "folder": f"jobs/{name}"})
    jobs.append({**jobs[0], "seed": 1, "folder": "jobs/gone"})  # of another seed: not looked at
    study = Study(data=str(toy_cohort), source=["t1"], target="t2", arms=["A7", "A1"], seeds=[0, 1])
    notes = {
        "study": study.model_dump(mode="json", by_alias=True),
        "cases": {case: {"subject": case} for case in CASES},
        "regions": [],
        "jobs": jobs,
        "hours": 0.1,
    }
    write_json(out / "study.json", notes)
    words = ["rate", str(out), "-o"]
    assert main_until_exit([*words, str(tmp_path / "all"), "--repeat", "0"]) == 0
    assert "18 images (6 of A1, 6 of A7, 6 of real)" in capsys.readouterr().out
    assert main_until_exit([*words, str(tmp_path / "one"), "--repeat", "0", "--methods", "dual-attention"]) == 0
    assert "12 images (6 of A7, 6 of real)" in capsys.readouterr().out
    assert main_until_exit([*words, str(tmp_path / "none"), "--methods", "A7", "srcnn"]) == 2
    assert "there is no prediction of the method 'srcnn' (expected one of A1, A7)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def main_until_exit(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
