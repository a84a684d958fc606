"""Made-up answers give the numbers that follow from them; a file that does not fit the study is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from chiasm.cli import main
from chiasm.errors import RunError
from chiasm.evaluation.rating import ALL, Finding, ReaderResults, report_ratings
from chiasm.evaluation.reader_files import COLUMNS, StudyItem, read_key, read_ratings, write_key

SUBJECTS = 8
METHODS = ("real", "A1", "A7")
Opinion = Callable[[StudyItem], tuple[str, object]]


def shown(slices: int = 1, repeated: int = 6) -> list[StudyItem]:
    """Each subject's slices, real and by both methods; the first few come again."""
    places = [(f"P{n:02}", index, method) for n in range(SUBJECTS) for index in range(slices) for method in METHODS]
    shown = [(place, 1) for place in places] + [(place, 2) for place in places[:repeated]]
    return [
        StudyItem(
            "studyx",
            f"tok{'abcdefghijklmnopqrstuvwxyz'[n // 26]}{chr(97 + n % 26)}",
            n + 1,
            case,
            case,
            method,
            "axial",
            index,
            showing,
        )
        for n, ((case, index, method), showing) in enumerate(shown)
    ]


def written(path: Path, rater: str, items: Iterable[StudyItem], opinion: Opinion) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for item in items:
            table.writerow([item.study, rater, item.token, *opinion(item), 3.5])
    return path


def number(item: StudyItem) -> int:
    return int(item.subject[1:])


def anna(item: StudyItem) -> tuple[str, int]:
    """Knows what is real; takes A7 of three subjects for real; likes A7 more, the later subjects the more so."""
    quality = {"real": 5, "A1": 2 - (number(item) == 3), "A7": 3 + (number(item) > 4)}[item.method]
    real = item.method == "real" or (item.method == "A7" and number(item) < 3)
    return ("real" if real else "synthetic"), quality - (item.showing == 2 and item.method == "A7")


def ben(item: StudyItem) -> tuple[str, int]:
    """Answers by the number of the subject alone."""
    quality = {"real": 4, "A1": 3, "A7": 3}[item.method] - (number(item) % 3 == 0)
    return ("real" if number(item) % 2 else "synthetic"), quality


def judged(folder: Path, *, slices: int = 1, **opinions: Opinion) -> ReaderResults:
    items = shown(slices)
    write_key(folder, items)
    files = [written(folder / f"{name}.csv", name, items, opinion) for name, opinion in opinions.items()]
    return report_ratings(folder, files)


def one(results: ReaderResults, question: str, **what: str) -> Finding:
    found = [f for f in results.findings if f.question == question and what.items() <= f._asdict().items()]
    assert len(found) == 1, (question, what, found)
    return found[0]


def test_agreement_is_the_kappa_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import cohen_kappa_score

    results, items = judged(tmp_path, anna=anna, ben=ben), shown()
    first = [item for item in items if item.showing == 1]
    again = [item for item in items if item.showing == 2]
    before = [item._replace(showing=1) for item in again]
    for question, part, weights in (("agreement on quality", 1, "quadratic"), ("agreement on real", 0, None)):
        pairs = [
            (("anna", "anna"), [anna(i)[part] for i in before], [anna(i)[part] for i in again]),
            (("ben", "ben"), [ben(i)[part] for i in before], [ben(i)[part] for i in again]),
            (("anna", "ben"), [anna(i)[part] for i in first], [ben(i)[part] for i in first]),
        ]
        for (rater, other), said, said_again in pairs:
            labels = list(range(1, 6)) if part else ["real", "synthetic"]
            found = one(results, question, rater=rater, other_rater=other)
            theirs = cohen_kappa_score(said, said_again, weights=weights, labels=labels)
            assert found.value == pytest.approx(theirs, abs=1e-12)
            assert found.images == len(said)
            assert math.isnan(found.low) or found.low <= found.value <= found.high
    assert one(results, "agreement on quality", rater="ben", other_rater="ben").value == 1
    assert one(results, "agreement on quality", rater="anna", other_rater="anna").value < 1


def test_the_share_taken_for_real_has_the_interval_of_statsmodels(tmp_path: Path) -> None:
    from statsmodels.stats.proportion import proportion_confint

    results = judged(tmp_path, anna=anna, ben=ben)
    for rater, method, count in (("anna", "A7", 3), ("anna", "A1", 0), ("anna", "real", 8), ("ben", "A7", 4)):
        found = one(results, "taken for real", rater=rater, method=method, interval="Wilson")
        assert (found.value, found.images, found.subjects) == (count / 8, 8, 8)
        assert (found.low, found.high) == pytest.approx(proportion_confint(count, 8, method="wilson"), abs=1e-12)
    both = one(results, "taken for real", rater=ALL, method="A7", interval="Wilson")
    assert both.value == 7 / 16 and both.images == 8  # an image counts once, however many see it
    assert (both.low, both.high) == pytest.approx(proportion_confint(3.5, 8, method="wilson"), abs=1e-12)
    assert "anna took 38 % of 8 images of dual-attention (A7) for real" in "\n".join(results.sentences)


def test_being_right_is_set_against_a_coin_and_an_answer_that_is_always_the_same_is_right_in_half(
    tmp_path: Path,
) -> None:
    from scipy.stats import binomtest

    results = judged(tmp_path, anna=anna, ben=ben, carl=lambda item: ("real", 3))
    found = one(results, "recognised", rater="anna", method="A7")
    assert (found.value, found.images) == (13 / 16, 16)  # 8 real ones, and 5 of 8 of A7
    assert found.p == pytest.approx(binomtest(13, 16, 0.5).pvalue)
    assert one(results, "recognised", rater="anna", method="A1").p == pytest.approx(2 / 2**16)
    for method in ("A1", "A7"):
        always = one(results, "recognised", rater="carl", method=method)
        assert always.value == 0.5 and always.p == 1
    everyone = one(results, "recognised", rater=ALL, method="A7")
    assert everyone.value == pytest.approx((13 / 16 + 0.5 + 0.5) / 3)
    assert everyone.p == pytest.approx(2 * 2**3 / 2**8)  # five subjects with a difference, all the same way


def test_quality_is_compared_by_subject_as_scipy_does_with_the_correction_of_statsmodels(tmp_path: Path) -> None:
    from scipy.stats import wilcoxon
    from statsmodels.stats.multitest import multipletests

    results, ps = judged(tmp_path, slices=2, anna=anna, ben=ben), []
    of = {
        (subject, method): np.mean(
            [rate(StudyItem("", "", 1, subject, subject, method, "axial", 0, 1))[1] for rate in (anna, ben)]
        )
        for subject in (f"P{n:02}" for n in range(SUBJECTS))
        for method in METHODS
    }
    pairs = [("A1", "A7"), ("A1", "real"), ("A7", "real")]
    for method, against in pairs:
        by_hand = [of[f"P{n:02}", method] - of[f"P{n:02}", against] for n in range(SUBJECTS)]
        found = one(results, "quality difference", method=method, against=against)
        assert found.value == pytest.approx(np.mean(by_hand))
        assert found.p == pytest.approx(wilcoxon(by_hand).pvalue)
        assert found.low <= found.value <= found.high and found.subjects == SUBJECTS and found.images == 16
        ps.append(found.p)
    corrected = multipletests(ps, method="holm")[1]
    for (method, against), p in zip(pairs, corrected):
        assert one(results, "quality difference", method=method, against=against).p_holm == pytest.approx(p)
    for method in METHODS:
        by_hand = [of[f"P{n:02}", method] for n in range(SUBJECTS)]
        assert one(results, "quality", method=method).value == pytest.approx(np.mean(by_hand))


def test_the_command_prints_what_several_raters_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = shown()
    write_key(tmp_path, items)
    files = [str(written(tmp_path / f"{name}.csv", name, items, rate)) for name, rate in (("anna", anna), ("ben", ben))]
    with pytest.raises(SystemExit) as ended:
        main(["rate", "--read", *files, "-o", str(tmp_path)])
    told = capsys.readouterr().out
    assert not ended.value.code and "over 24 images of anna and ben" in told
    assert told.splitlines()[:-1] == json.loads((tmp_path / "results.json").read_text())["sentences"]


def test_below_six_subjects_nothing_is_tested_and_that_is_said(tmp_path: Path) -> None:
    items = [item for item in shown() if number(item) < 5]
    write_key(tmp_path, items)
    results = report_ratings(tmp_path, [written(tmp_path / "anna.csv", "anna", items, anna)])
    difference = one(results, "quality difference", method="A1", against="A7")
    assert math.isnan(difference.p) and math.isnan(difference.p_holm) and difference.low < difference.high
    assert "not tested: fewer than 6 subjects" in "\n".join(results.sentences)


def test_repeats_count_for_agreement_alone(tmp_path: Path) -> None:
    def moody(item: StudyItem) -> tuple[str, int]:
        return ("synthetic", 1) if item.showing == 2 else anna(item)

    usual, other = judged(tmp_path, anna=anna), judged(tmp_path, anna=moody)
    differing = {a.question for a, b in zip(usual.findings, other.findings) if str(a) != str(b)}
    assert differing == {"agreement on quality", "agreement on real"}


def test_findings_are_written_as_a_table_and_as_json(tmp_path: Path) -> None:
    results = judged(tmp_path, anna=anna, ben=ben)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["question"] for row in rows] == [row["question"] for row in content["findings"]]
    assert [float(row["value"]) for row in rows] == [found.value for found in results.findings]
    assert content["sentences"] == list(results.sentences) and len(set(results.sentences)) == len(results.sentences)
    assert judged(tmp_path, anna=anna).findings != results.findings  # results of our own are replaced


def test_results_do_not_replace_a_file_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine\n")
    with pytest.raises(RunError, match=r"holds results\.csv, which was not written by chiasm"):
        judged(tmp_path, anna=anna)
    assert (tmp_path / "results.csv").read_text() == "mine\n"


def test_missing_answers_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    def tired(item: StudyItem) -> tuple[str, object]:
        answer, quality = anna(item)
        return ("" if item.position in (1, 2) else answer), ("" if item.position == 1 else quality)

    results = judged(tmp_path, anna=tired)
    assert results.notes == (
        "anna left 2 of 30 images without an answer",
        "anna left 1 of 30 images without a quality",
    )
    assert one(results, "taken for real", method="real", interval="Wilson").images == 7
    assert one(results, "recognised", method="A7").images == 14  # without its real image a slice does not count
    assert one(results, "quality", method="A1").images == 8


def test_a_table_that_a_spreadsheet_wrote_again_is_read(tmp_path: Path) -> None:
    items = shown()
    path = written(tmp_path / "anna.csv", "änna", items, anna)
    again = path.read_text().replace(",", ";").replace("3.5", "3,5")
    (tmp_path / "again.csv").write_text("\ufeff" + again + ";;;;;\r\n", encoding="utf-8")
    assert read_ratings([tmp_path / "again.csv"], items) == read_ratings([path], items)


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


BAD: dict[str, tuple[Callable[[str], str], str]] = {
    "another study": (lambda text: text.replace("studyx", "studyy"), "belongs to another study"),
    "an unknown token": (lambda text: changed(text, "tokab", "tokzz"), "names 1 images that the study does not have"),
    "a token twice": (lambda text: text + text.splitlines()[1] + "\n", "rates 1 images twice"),
    "another table": (lambda text: "name,age\nanna,3\n", "is no file of ratings"),
    "nothing": (lambda text: "", "is no file of ratings"),
    "a header alone": (lambda text: text.splitlines()[0] + "\n", "holds no answer"),
    "no answers": (lambda text: text.splitlines()[0] + "\nstudyx,anna,tokaa,,,\n", "holds no answer"),
    "a strange answer": (lambda text: changed(text, ",real,", ",maybe,"), "has a strange answer"),
    "a quality of 6": (lambda text: changed(text, ",real,5,", ",real,6,"), "has a strange quality"),
    "endless seconds": (lambda text: changed(text, "3.5", "inf"), "has a strange time"),
    "seconds in words": (lambda text: changed(text, "3.5", "three"), "has a strange time"),
    "two raters": (lambda text: changed(text, "anna", "ben"), "must be of one rater"),
    "a formula for a name": (lambda text: text.replace("anna", "=cmd"), "no table may hold"),
    "a line cut short": (lambda text: text[: text.rindex(",")] + "\n", "line 31 does not have 6 entries"),
    "an open quote": (lambda text: changed(text, "anna", '"anna'), "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    change, told = BAD[name]
    items = shown()
    path = written(tmp_path / "anna.csv", "anna", items, anna)
    path.write_text(change(path.read_text()))
    write_key(tmp_path, items)
    with pytest.raises(RunError, match=told):
        report_ratings(tmp_path, [path])
    assert not list(tmp_path.glob("results.*"))


def test_two_files_of_one_rater_are_refused(tmp_path: Path) -> None:
    items = shown()
    files = [written(tmp_path / name, "anna", items, anna) for name in ("a.csv", "b.csv")]
    with pytest.raises(RunError, match="give one file for each rater"):
        read_ratings(files, items)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_ratings([tmp_path / "none.csv"], shown())
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00study")
    with pytest.raises(RunError, match="is damaged"):
        read_ratings([tmp_path / "binary.csv"], shown())


def test_the_key_comes_back_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = write_key(tmp_path, shown())
    assert read_key(tmp_path) == shown()
    good = path.read_text()
    for text in (good.replace("tokab", "tokaa"), good.replace(",axial,0,", ",axial,zero,", 1), good.splitlines()[0]):
        path.write_text(text)
        with pytest.raises(RunError, match="damaged"):
            read_key(tmp_path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="is no key"):
        read_key(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"holds no key\.csv"):
        read_key(tmp_path)
