"""A study's findings as Markdown: what is claimed, as on its page, and its tables by region and by tissue."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.evaluation.claims import RULE
from chiasm.evaluation.rows import Row
from chiasm.evaluation.statistics import Declared, MethodSummary, compare_methods
from chiasm.reports.study_digest import write_digest
from chiasm.reports.study_page import Findings, write_findings


def digest(folder: Path, regions: dict[str, float]) -> str:
    summaries = [MethodSummary("A1", name, "mae", "HU", 16, 3, mae, 5.0, 2.1) for name, mae in regions.items()]
    found = Findings("study", (), (), summaries, (), {"A1": "L2"}, (), "", (), {}, (), "", {})
    return write_digest(folder, found).read_text()


def test_errors_of_a_ct_are_told_by_tissue_in_the_order_of_their_density(tmp_path: Path) -> None:
    text = digest(tmp_path, {"mask": 91.8, "bone": 202.6, "air": 529.9, "fat": 107.3})
    table = text[text.index("| method | air") :].splitlines()[:3]
    assert table[0] == "| method | air MAE (n = 16) | fat MAE (n = 16) | bone MAE (n = 16) |"
    assert table[2].split("|")[2:5] == [" 530 ± 2.1 ", " 107 ± 2.1 ", " 203 ± 2.1 "]


def test_where_no_tissue_is_scored_there_is_no_such_table(tmp_path: Path) -> None:
    assert digest(tmp_path, {"mask": 0.5}).count("| method | mask MAE") == 1
    assert "air" not in digest(tmp_path, {"mask": 0.5})


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((-0.05, -0.04), "better"),
        ((0.05, 0.04), "worse"),
        ((-0.009, -0.008), "the difference is at most 1 %"),  # in every subject, and beyond chance
        ((-0.03, 0.0), "no difference above 1 % is shown"),  # -1.5 % in the mean, and not by chance either
    ],
)
def test_page_and_digest_say_better_or_worse_only_if_interval_and_tolerance_agree(
    shares: tuple[float, float], said: str, tmp_path: Path
) -> None:
    truth = {("A1", n): 1 + n / 50 for n in range(12)}
    truth |= {("A7", n): truth["A1", n] * (1 + shares[n % 2]) for n in range(12)}
    rows = [Row(f"c{n}", 0, 0, arm, "mask", "mae", value, "SD", "chiasm") for (arm, n), value in truth.items()]
    declared = [Declared("A7", "A1", "mask", "mae")]
    comparisons = compare_methods(rows, [("A7", "A1")], metrics=["mae"], regions=["mask"], declared=declared)
    assert comparisons[0].p_holm < 0.05  # a test alone would call each of them a difference
    arms = {"A1": "L2", "A7": "attention"}
    found = Findings("study", rows, comparisons, (), (), arms, (), "", (), {}, (), "", {})
    page = write_findings(tmp_path / "report.html", found).read_text().replace("\u00a0", " ")
    claims = page[page.index('<section id="found">') : page.index('<section id="trade-off">')].replace(RULE, "")
    tests = page[page.index('<section id="tests">') :]
    assert "<dt>dual-attention (A7)</dt>" in page and ">dual-attention (A7)</" in tests
    lines = [line for line in write_digest(tmp_path, found).read_text().splitlines() if line.startswith("- ")]
    for words in (claims, "\n".join(lines)):
        assert said in words and {word for word in ("better", "worse") if word in words} == {said} & {"better", "worse"}
