"""A reader study in a real browser: keys answer, a reload keeps the answers, the file gives the known result."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiasm.cli import main
from chiasm.evaluation.reader_files import COLUMNS, StudyItem
from chiasm.reports.rating import ReaderStudy, RealImages, StudyDesign, write_reader_study
from conftest import Opened
from reader_cohort import predict_twice

pytestmark = pytest.mark.slow
KEYS = {"real": "r", "synthetic": "s"}


@pytest.fixture(scope="module")
def study(toy_cohort: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ReaderStudy:
    folder = tmp_path_factory.mktemp("study")
    predictions = predict_twice(finished_run, toy_cohort, folder)
    return write_reader_study(predictions, RealImages(toy_cohort), folder / "study", StudyDesign(plane="coronal"))


@pytest.fixture(scope="module")
def opened(study: ReaderStudy, open_page: Callable[..., Opened]) -> Opened:
    return open_page(study.page)


def opinion(item: StudyItem) -> tuple[str, int]:
    """A rater who takes A7 for real in two subjects of six, and never A1."""
    number = int(item.subject[-1])
    if item.method == "A1":
        return "synthetic", 2
    return ("real" if item.method == "real" or number <= 2 else "synthetic"), 5 if item.method == "real" else 3


def begin(page: Any, name: str) -> None:
    page.fill("#rater", name)
    page.keyboard.press("Enter")


def answer(page: Any, item: StudyItem) -> None:
    word, quality = opinion(item)
    page.keyboard.press(KEYS[word])
    page.keyboard.press(str(quality))


def pressed(page: Any) -> list[str]:
    """The answer and the quality that are chosen."""
    found: list[str] = page.eval_on_selector_all(
        "[aria-pressed=true]", "all => all.map(one => one.dataset.answer ?? one.dataset.quality)"
    )
    return found


def saved(page: Any, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click("#save")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_keys_answer_and_a_reload_keeps_what_was_said_and_where(opened: Opened, study: ReaderStudy) -> None:
    page = opened.page
    assert page.is_visible("#rater") and not page.is_visible("#image")
    begin(page, "anna")
    assert page.inner_text("#progress") == f"Image 1 of {len(study.items)}, 0 answered"
    for item in study.items[:4]:
        answer(page, item)
        page.keyboard.press("ArrowRight")
    page.reload()
    assert page.inner_text("#progress") == f"Image 5 of {len(study.items)}, 4 answered"
    assert pressed(page) == []
    page.keyboard.press("ArrowLeft")
    word, quality = opinion(study.items[3])
    assert pressed(page) == [word, str(quality)]
    assert page.inner_text("#said") == f"Image 4, {word}, quality {quality}."
    page.keyboard.press("ArrowRight")


def test_the_file_of_a_rater_who_answered_gives_the_known_result(
    opened: Opened, study: ReaderStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened.page
    for item in study.items[4:]:
        answer(page, item)
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#progress").endswith(f"{len(study.items)} answered")
    assert "All images are answered" in page.inner_text("#said")
    path = saved(page, tmp_path)
    assert path.name == "ratings-anna.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and [row["token"] for row in rows] == [item.token for item in study.items]
    assert [(row["answer"], int(row["quality"])) for row in rows] == [opinion(item) for item in study.items]
    assert all(0 <= float(row["seconds"] or 0) < 60 for row in rows) and any(row["seconds"] for row in rows)
    capsys.readouterr()
    main_ok(["rate", "--read", str(path), "-o", str(study.page.parent)])
    told = capsys.readouterr().out
    assert "anna took 33 % of 6 images of dual-attention (A7) for real (95 % interval 10 % to 70 %, Wilson)" in told
    assert "anna took 0 % of 6 images of l2 (A1) for real" in told
    assert "anna answered right in 83 % of 12 images, half of them real and half of dual-attention (A7)" in told
    assert "Mean quality of 6 images of l2 (A1) is 2.00 of 5" in told
    # six differences of one sign: 2 in 64; of three tests the first is multiplied by 3
    assert "Quality of l2 (A1) minus dual-attention (A7) is -1.00 over 6 subjects" in told
    assert told.count("Wilcoxon signed rank p = 0.0312; 0.0938 after Holm") == 3
    assert "Kappa of quality, weighted, is 1.00 over 4 images of anna, who saw them twice" in told


def test_another_rater_starts_anew_with_buttons_and_the_first_finds_the_answers_again(
    opened: Opened, study: ReaderStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened.page
    page.click("#change")
    assert not page.is_visible("#image")
    begin(page, "=Ben <Müller>, Dr")
    assert page.inner_text("#progress") == f"Image 1 of {len(study.items)}, 0 answered"
    assert page.is_disabled("#before")
    page.get_by_role("button", name="Synthetic").click()
    page.get_by_role("button", name="excellent").click()
    page.click("#after")
    page.keyboard.press("n")
    page.keyboard.press("n")
    page.keyboard.press("r")
    path = saved(page, tmp_path)
    assert path.name == "ratings-Ben-Müller-Dr.csv"
    assert f"{len(study.items) - 1} images are not answered yet" in page.inner_text("#said")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["rater"] for row in rows} == {"Ben Müller Dr"}
    assert [(row["answer"], row["quality"]) for row in rows[:5]] == [
        ("synthetic", "5"),
        ("", ""),
        ("", ""),
        ("real", ""),
        ("", ""),
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["rate", "--read", str(path), "-o", str(study.page.parent)])
    assert ended.value.code == 3
    assert "left 20 of 22 images without an answer" in capsys.readouterr().err
    page.click("#change")
    begin(page, "anna")
    assert page.inner_text("#progress").endswith(f"{len(study.items)} answered")


def test_a_picture_keeps_its_proportions_in_mm_and_fits_the_screen_with_the_questions(
    opened: Opened, study: ReaderStudy
) -> None:
    page = opened.page
    for breadth, height in ((1280, 720), (1200, 1400), (480, 900)):
        page.set_viewport_size({"width": breadth, "height": height})
        image, screen = (page.locator(place).bounding_box() for place in ("#image", ".screen"))
        tokens: dict[str, Any] = page.evaluate("images[at]")
        assert image["width"] / image["height"] == pytest.approx(tokens["size"][0] / tokens["size"][1], rel=0.01)
        assert image["width"] <= screen["width"] and image["height"] <= screen["height"]
        assert max(image["width"] / screen["width"], image["height"] / screen["height"]) > 0.9
        assert page.evaluate("document.documentElement.scrollWidth") <= breadth
    page.set_viewport_size({"width": 1280, "height": 720})
    page.evaluate("window.scrollTo(0, 0)")
    bottom = page.locator("[data-quality='5']").bounding_box()
    assert bottom["y"] + bottom["height"] <= 720


def test_the_page_asks_for_nothing_and_shows_no_name(opened: Opened, study: ReaderStudy) -> None:
    assert opened.errors == []
    assert [address for address in opened.requests if not address.startswith(("data:", "blob:"))] == [
        study.page.as_uri()
    ] * 2  # it was loaded twice
    seen = opened.page.inner_text("body") + opened.page.evaluate("JSON.stringify(localStorage)")
    for word in ("A7", "A1", "dual", "Toy"):
        assert word not in seen


def main_ok(words: list[str]) -> None:
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code
