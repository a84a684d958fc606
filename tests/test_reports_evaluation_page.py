"""The report stands alone, tells the truth in words, and shows the right side up."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import ChiasmError
from chiasm.evaluation.rows import Row
from chiasm.evaluation.scoring import calibration
from chiasm.reports.drawing import png_address
from chiasm.reports.error_plot import draw_expected_error
from chiasm.reports.evaluation_page import EvaluationPage, write_report
from chiasm.reports.gallery import CutCase, GalleryCase, cut_case
from chiasm.reports.naive_comparison import compare_with_baselines, rank

HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>&amp;"
MAE = {  # method -> region -> figures of cases a, b, c
    "model": {"brain": [0.10, 0.12, 0.20], "lesion": [0.30, 0.32, 0.40]},
    "lookup": {"brain": [0.20, 0.21, 0.19], "lesion": [0.25, 0.26, 0.27]},
    "mean": {"brain": [0.50, 0.50, 0.50], "lesion": [0.60, 0.60, 0.60]},
}


def row(method: str, region: str, value: float, *, case: str = "a", metric: str = "mae", unit: str = "SD") -> Row:
    return Row(case, 0, 0, method, region, metric, value, unit, "chiasm")


def evaluated() -> list[Row]:
    return [
        row(method, region, value, case=case)
        for method, regions in MAE.items()
        for region, values in regions.items()
        for case, value in zip("abc", values)
    ]


def trained(**last: float) -> list[dict[str, object]]:
    """Two lines of each kind, the second with the figures given."""
    first = {"loss": 1.0, "reconstruction": 0.9, "accuracy_local": 0.6, "accuracy_global": 0.7}
    first |= {"attention_strength": last.get("attention_strength", 1.0)}
    return [
        {"kind": "step", "step": 1, **first},
        {"kind": "validation", "step": 10, "mae": 0.4, "spearman_smoothed": 0.2, "weight_ratio": 1.4},
        {"kind": "step", "step": 11, **first},
        {"kind": "validation", "step": 20, "mae": 0.3, "spearman_smoothed": 0.3, "weight_ratio": 1.5, **last},
    ]


def pictured(case: str = "a") -> GalleryCase:
    """A block of 12 x 14 x 10 voxels, a lesion on the patient's right in front, an error of 0.5 that the map halves."""
    shape = (20, 22, 16)
    mask, lesion = np.zeros(shape, bool), np.zeros(shape, bool)
    mask[4:16, 4:18, 3:13] = True
    lesion[12:15, 12:16, 7:9] = True
    real = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 7
    return GalleryCase(
        case=case,
        source=real + lesion,
        real=real,
        synthetic=(real + 0.5).astype(np.float32),
        expected_error=np.full(shape, 0.25, np.float32),
        mask=mask,
        lesion=lesion,
        spacing_mm=(1.0, 1.0, 2.0),
        unit="SD",
        window=(0.0, 8.0),
        caption="one of three",
    )


class Page(HTMLParser):
    """What a browser would find: tags with attributes, text by tag, tables as cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.tables = path.read_text(encoding="utf-8"), list[tuple[str, dict[str, str]]](), []
        self._words: list[str] = []
        self._open = ""
        self.feed(self.text)
        self.words = re.sub(r"\s+", " ", " ".join(self._words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag == "td":
            self.tables[-1][-1].append(dict(attrs)["data-value"])

    def handle_data(self, data: str) -> None:
        if self._open not in ("style", "script"):
            self._words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path, **given: object) -> Page:
    usual = {"title": "t1 to t2", "rows": evaluated(), "method": "model", "naive": ["lookup", "mean"]}
    given["gallery"] = [cut_case(case) for case in given.get("gallery", ())]  # type: ignore[attr-defined]
    return Page(write_report(folder / "report.html", EvaluationPage(**(usual | given))))  # type: ignore[arg-type]


def pixels(page: Page, alt: str) -> np.ndarray:
    from PIL import Image

    address = next(image["src"] for image in page.all("img") if image["alt"].startswith(alt))
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = written(tmp_path, history=trained(), gallery=[pictured()])
    addresses = [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href", "xlink:href")]
    assert addresses and all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not re.search(r"https?://|url\((?!#)|@import|fetch\(", page.text)
    assert "default-src 'none'" in page.all("meta")[3]["content"]


def test_links_within_the_page_lead_somewhere_and_no_id_stands_twice(tmp_path: Path) -> None:
    page = written(tmp_path, history=trained(), gallery=[pictured()])
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    links = {tag["href"][1:] for _, tag in page.tags if tag.get("href", "").startswith("#")}
    links |= set(re.findall(r"url\(#([^)]+)\)", page.text))
    assert len(ids) == len(set(ids)) and links <= set(ids)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    given = {"history": trained(), "gallery": [pictured()], "facts": {"Cohort": {"cases": "3"}}}
    assert written(tmp_path / "one", **given).text == written(tmp_path / "two", **given).text


def test_every_number_in_the_table_is_the_mean_over_cases(tmp_path: Path) -> None:
    page = written(tmp_path)
    shown = {(cells[0], cells[1]): [float(cell) for cell in cells[2:]] for cells in page.tables[0] if cells}
    for region in ("brain", "lesion"):
        by_hand = [np.mean(MAE[method][region]) for method in ("model", "lookup", "mean")]
        assert shown[region, "MAE"] == pytest.approx([3, *by_hand], abs=1e-12)
    assert "0.140" in page.words and "± 0.053" in page.words.replace("\u00a0", " ")  # sd of 0.10, 0.12, 0.20: 0.0529


def test_worse_is_said_as_plainly_as_better(tmp_path: Path) -> None:
    words = written(tmp_path).words.replace("\u00a0", " ")
    assert (
        "By MAE, against the best naive baseline of each region: fewer than 6 subjects are too few to compare "
        "in brain and lesion." in words
    )
    # brain: 0.14 against 0.20, two cases won; lesion: 0.34 against 0.26, none
    few = "fewer than 6 subjects are too few to compare"
    assert (
        f"0.140 against 0.200 SD for lookup, the best naive baseline, in 3 subjects: -30.0 %, {few}; lower in 2"
        in words
    )
    assert (
        f"0.340 against 0.260 SD for lookup, the best naive baseline, in 3 subjects: +30.8 %, {few}; lower in 0"
        in words
    )
    assert "best a , median b , worst c" in words
    many = written(tmp_path, rows=[line._replace(case=f"{line.case}{n}") for line in evaluated() for n in range(12)])
    verdict = "of each region: better in brain; worse in lesion."
    assert verdict in many.words and "Better and worse" not in many.words
    assert [tag["class"] for tag in many.all("li") if tag.get("class") in ("good", "mixed", "bad")] == ["good", "bad"]


def test_a_tie_is_no_win(tmp_path: Path) -> None:
    rows = [row("model", "brain", 0.2), row("lookup", "brain", 0.2)]
    (tie,) = compare_with_baselines(rows, method="model", naive=["lookup"])
    assert tie.claim == "few" and not tie.paired.is_ahead and tie.wins == 0
    assert "+0.0 %" in written(tmp_path, rows=rows).words.replace("\u00a0", " ")


def test_a_single_case_is_neither_best_nor_worst(tmp_path: Path) -> None:
    rows = [row("model", "brain", 0.2), row("lookup", "brain", 0.3)]
    page = written(tmp_path, rows=rows, gallery=[pictured()])
    assert "median" not in page.words and not re.search(r"best +[ab]\b", page.words)
    assert [tag for tag in page.all("span") if tag.get("class") == "badge"] == []
    two = written(tmp_path, rows=[*rows, row("model", "brain", 0.4, case="b")], gallery=[pictured()])
    assert len([tag for tag in two.all("span") if tag.get("class") == "badge"]) == 2


def test_higher_is_better_for_psnr() -> None:
    rows = [row(method, "brain", value, metric="psnr") for method, value in (("model", 28.0), ("lookup", 25.0))]
    (found,) = compare_with_baselines(
        [*rows, row("mean", "brain", 20.0, metric="psnr")], method="model", naive=["lookup", "mean"], metric="psnr"
    )
    assert found.paired.is_ahead and found.baseline == "lookup"
    rows += [row("model", "brain", 31.0, case="b", metric="psnr")]
    assert (rank(rows, method="model", metric="psnr") or {})["best"] == "b"


def test_only_cases_that_both_have_are_compared() -> None:
    rows = [row("model", "brain", 0.3), row("lookup", "brain", 0.2), row("model", "brain", 0.0, case="only ours")]
    (found,) = compare_with_baselines(rows, method="model", naive=["lookup"])
    assert (found.paired.subjects, found.ours, found.paired.is_ahead) == (1, 0.3, False)


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    rows = [row(HOSTILE, HOSTILE, 0.1, case=HOSTILE, unit=HOSTILE), row("lookup", HOSTILE, 0.2, case=HOSTILE)]
    rows += [row(HOSTILE, "lesion-1", 0.1, case=HOSTILE, metric=HOSTILE)]
    history = [*trained(), {"kind": "warning", "step": 3, "message": HOSTILE}]
    page = written(
        tmp_path,
        title=HOSTILE,
        asked=HOSTILE,
        rows=rows,
        method=HOSTILE,
        naive=["lookup"],
        history=history,
        gallery=[replace(pictured(HOSTILE), unit=HOSTILE, caption=HOSTILE)],
        facts={HOSTILE: {HOSTILE: HOSTILE}},
        warnings=[HOSTILE],
    )
    assert len(page.all("script")) == 1 and not any("onerror" in tag for _, tag in page.tags)
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert page.words.count(HOSTILE) > 8


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = written(tmp_path, rows=[]).words
    for sentence in (
        "Nothing was evaluated",
        "There is no training history",
        "No case was kept for the gallery",
        "so the map cannot be checked",
        "No single lesions were evaluated",
        "Nothing is known about the cohort",
        "Nothing can be said",
    ):
        assert sentence in bare
    alone = replace(pictured(), real=None, expected_error=None, lesion=None)
    page = written(tmp_path, gallery=[alone], history=[{"kind": "validation", "step": 1, "mae": 0.1}])
    assert "This case has no real image" in page.words
    assert "This case has no expected-error map" in page.words
    assert "No lesion is labelled in this case" in page.words
    assert [image["alt"].partition(",")[0] for image in page.all("img") if image["alt"]] == ["source", "synthetic"] * 2
    assert "not for diagnostic use" in bare and "not for diagnostic use" in page.words


def test_a_picture_of_a_page_is_a_png_that_other_programs_read() -> None:
    from PIL import Image

    drawn = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    content = base64.b64decode(png_address(drawn).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # checks the sums
        np.testing.assert_array_equal(np.asarray(image), drawn)


def test_the_slice_with_most_lesion_is_shown_with_the_patients_right_on_the_left(tmp_path: Path) -> None:
    shown = pictured()
    shown.real[:] = 0
    shown.real[12:15, 12:16, 8] = 8.0  # one slice of the lesion alone, bright
    shown.lesion[12, 12, 7] = False
    page = written(tmp_path, gallery=[shown])
    picture = pixels(page, "real, axial slice 9 of a")
    assert picture.shape[:2] == (22, 20)  # the mask's box with its margin: J down, I across
    bright = np.argwhere(picture[..., 0] == 255)
    # right = large I = left columns; front = large J = upper rows; axes are reversed: 20 - 15 .. 20 - 12
    assert bright.min(axis=0).tolist() == [22 - 16, 20 - 15] and bright.max(axis=0).tolist() == [21 - 12, 19 - 12]
    path = next(tag["d"] for name, tag in page.tags if name == "path" and re.match(r"M[\d.]+,", tag["d"]))
    corners = np.array([[float(number) for number in point.split(",")] for point in re.findall(r"[\d.]+,[\d.]+", path)])
    assert corners.min(axis=0).tolist() == [5, 6] and corners.max(axis=0).tolist() == [8, 10]


def test_a_lesion_outside_the_mask_does_not_choose_the_slice(tmp_path: Path) -> None:
    stray = pictured()
    stray.lesion[:] = False
    stray.lesion[:, :, 0] = True
    assert pixels(written(tmp_path, gallery=[stray]), "source, axial slice 8 of a").any()


def test_real_and_synthetic_share_a_window_and_no_error_is_black(tmp_path: Path) -> None:
    perfect = replace(pictured(), synthetic=pictured().real)
    page = written(tmp_path, gallery=[perfect])
    np.testing.assert_array_equal(pixels(page, "real, axial"), pixels(page, "synthetic, axial"))
    error = pixels(page, "|error|, axial")
    assert error[..., :3].max() <= 4 and set(np.unique(error[..., 3])) == {0, 255}  # inferno begins at (0, 0, 4)
    assert (error[..., 3] > 0).sum() == 12 * 14  # inside the mask only


def test_the_expected_error_map_is_held_against_the_true_error(tmp_path: Path) -> None:
    words = written(tmp_path, gallery=[pictured()]).words
    assert "In lesions the map understates the error: 0.250 expected, 0.500 found" in words
    assert "Outside lesions the map understates the error" in words
    unlabelled = replace(pictured(), lesion=None, expected_error=np.full((20, 22, 16), 0.5, np.float32))
    assert "In the mask the map meets the error" in written(tmp_path, gallery=[unlabelled]).words


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        (
            {"spearman_smoothed": -0.1},
            "The local discriminator does not find the errors, so the attention",
        ),
        ({"spearman_smoothed": 0.1}, "The local discriminator hardly finds the errors"),
        ({"weight_ratio": 1.04}, "The attention does not favour lesions: they weigh 1.04 times healthy tissue."),
        ({"weight_ratio": 0.5}, "The attention neglects lesions: they weigh 0.50 times healthy tissue."),
        ({"accuracy_local": 0.99}, "The local discriminator ended saturated"),
        ({"accuracy_global": 0.51}, "The global discriminator ended near guessing"),
        ({"attention_strength": 0.0}, "The attention was never used: a check found"),
        ({}, "The local discriminator finds the errors: its difficulty map is higher there"),
    ],
)
def test_the_health_of_the_discriminators_is_told_in_words(
    tmp_path: Path, last: dict[str, float], sentence: str
) -> None:
    assert sentence in written(tmp_path, history=trained(**last)).words


def test_nothing_is_said_of_an_attention_that_a_method_has_not(tmp_path: Path) -> None:
    history = [{name: value for name, value in line.items() if name != "attention_strength"} for line in trained()]
    with_attention, without = (written(tmp_path, history=one).words for one in (trained(), history))
    assert "The attention gives lesions 1.50 times" in with_attention and "What the attention does" in with_attention
    assert not re.search("[Tt]he attention", without) and "The local discriminator ended" in without


def test_curves_carry_words_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    gaps = [
        *trained(),
        {"kind": "step", "step": 12, "reconstruction": float("nan")},
        {"kind": "validation", "step": 30},
    ]
    labels = [tag["aria-label"] for tag in written(tmp_path, history=gaps).all("svg") if tag.get("role") == "img"]
    assert any("Validation error over training steps. mask: from 0.400 to 0.300." in label for label in labels)


def test_long_histories_are_thinned(tmp_path: Path) -> None:
    long = [{"kind": "step", "step": step, "reconstruction": 1.0 + step % 2} for step in range(20_000)]
    assert len(written(tmp_path, history=long).text) < 100_000


def test_single_lesions_are_grouped_by_size(tmp_path: Path) -> None:
    rows = evaluated()
    for name, volume in (("lesion-1", 12.0), ("lesion-2", 0.4), ("lesion-3", 0.2)):
        rows += [row("model", name, 0.3), row("model", name, volume, metric="volume_ml", unit="mL")]
    page = written(tmp_path, rows=rows)
    assert "Lesions below 1 mL (2)" in page.words and "Lesions 10 mL and more (1)" in page.words
    assert [cells[1] for cells in page.tables[2] if cells] == ["lesion-3", "lesion-2"]
    assert not any("lesion-1" in cells for cells in page.tables[0])


def test_warnings_come_before_the_figures_and_are_said_once(tmp_path: Path) -> None:
    logged = [{"kind": "warning", "step": step, "message": "the attention is flat"} for step in (10, 20)]
    page = written(tmp_path, warnings=["lesions in 2 of 8 cases only"], history=logged)
    assert page.words.count("the attention is flat") == 1 and "last at step 20: the attention is flat." in page.words
    assert page.text.index("lesions in 2 of 8 cases only") < page.text.index("<table")


def test_a_method_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row is of the method 'dual'"):
        written(tmp_path, method="dual")


def test_volumes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must share one shape"):
        replace(pictured(), mask=np.ones((3, 3, 3), bool))
    with pytest.raises(ValueError, match="must rise"):
        replace(pictured(), window=(1.0, 1.0))
    with pytest.raises(ValueError, match="one unit"):
        written(tmp_path, gallery=[pictured(), replace(pictured(), unit="HU")])


def test_a_place_that_cannot_be_written_is_an_error_for_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ChiasmError):
        written(tmp_path / "file")


def test_names_that_mean_something_to_the_drawing_library_are_plain_names(tmp_path: Path) -> None:
    for name in (r"$\frac$ #010101", 'font-family: serif id="x', "病变 " * 30):
        page = written(tmp_path, rows=[row("model", name, 0.1), row("lookup", name, 0.2)])
        assert f"{name[:20]}" in page.words and page.text.count("</text>") == page.text.count("<text")


@pytest.mark.parametrize(("factor", "manner"), [(0.5, "understates"), (1.0, "meets"), (2.0, "overstates")])
def test_the_expected_error_is_given_as_a_part_of_the_true_one_as_in_the_table_of_scores(
    factor: float, manner: str
) -> None:
    true = np.linspace(1, 3, 200, dtype=np.float32)
    errors = {"outside lesions expected": factor * true, "outside lesions true": true}
    shown = draw_expected_error([CutCase("p1", "a.u.", "", (), (), None, (), errors=errors)])
    assert shown is not None
    ratio = calibration(factor * true, true)["calibration"]
    assert f"the map {manner} the error" in shown["words"][0]
    assert shown["words"][0].endswith(f"it expects {ratio:.2f} times the true error.")
    errors = {"outside lesions expected": (factor - 0.5) * true, "outside lesions true": 0 * true}
    shown = draw_expected_error([CutCase("p1", "a.u.", "", (), (), None, (), errors=errors)])
    assert shown is not None and shown["words"][0].endswith("0.000 found.")  # no ratio, as in the table
