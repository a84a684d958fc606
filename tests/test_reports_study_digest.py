"""A study's findings as Markdown: its tables by region and by tissue."""

from __future__ import annotations

from pathlib import Path

from chiasm.evaluation.statistics import MethodSummary
from chiasm.reports.study_digest import write_digest
from chiasm.reports.study_page import Findings


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
