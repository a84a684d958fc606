"""Tables that several pages share: which mean is the best, what n counts, where a figure is absent."""

from __future__ import annotations

import math

from chiasm.evaluation.rows import Row
from chiasm.reports.tables import (
    Column,
    MethodMean,
    mean_by,
    mean_table,
    tabulate_cases,
    tabulate_lesions,
    tabulate_means,
    to_markdown,
)

METHODS = [Column("model", "", True), Column("lookup", "naive", True)]


def mean(method: str, value: float, *, metric: str = "mae", n: int = 3, spread: float = math.nan) -> MethodMean:
    return MethodMean("mask", metric, method, "SD", value, spread, n)


def test_the_best_mean_of_a_line_is_strong_whether_lower_or_higher_is_better() -> None:
    means = [mean("model", 0.2, spread=0.05), mean("lookup", 0.3)]
    means += [mean("model", 20.0, metric="psnr"), mean("lookup", 25.0, metric="psnr")]
    means += [mean("model", 1.0, metric="bias"), mean("lookup", 0.0, metric="bias")]
    table = tabulate_means("", means, METHODS, "cases")
    assert table is not None
    assert [[cell.strong for cell in line[3:]] for line in table.rows] == [[True, False], [False, True], [False, False]]
    unmarked = tabulate_means("", means, METHODS, "cases", unmarked={"mae"})
    assert unmarked is not None and [line[3].strong or line[4].strong for line in unmarked.rows] == [False, True, False]
    assert [line[1].text for line in table.rows] == ["MAE ↓", "PSNR ↑", "Bias"]
    assert (table.rows[0][3].text, table.rows[0][3].spread) == ("0.200", "±\u00a00.050")


def test_a_line_counts_as_many_as_its_fullest_mean_and_shows_a_dash_for_none() -> None:
    table = tabulate_means("", [mean("model", math.nan, n=0), mean("lookup", 0.3, n=4)], METHODS, "cases")
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["mask", "MAE ↓", "4", "–", "0.300"]
    assert tabulate_means("", [], METHODS, "cases") is None


def test_folds_and_seeds_have_a_column_where_there_are_several() -> None:
    rows = [Row("a", 0, seed, "model", "mask", "mae", 0.25 + seed, "SD", "") for seed in (0, 1)]
    table = tabulate_cases(rows, "model", "mae", {"mask": {"a": 0.5}})
    assert table is not None
    assert [column.label for column in table.columns] == ["Case", "Region", "Seed", "MAE", "MAE, naive"]
    assert [[cell.text for cell in line] for line in table.rows] == [
        ["a", "mask", "0", "0.250", "0.500"],
        ["a", "mask", "1", "1.250", "0.500"],
    ]
    assert tabulate_cases(rows, "lookup", "mae", {}) is None
    assert mean_by(rows, lambda row: row.case) == {"a": 0.75}
    assert mean_table(rows, lambda row: row.region, lambda row: row.seed) == {"mask": {0: 0.25, 1: 1.25}}


def test_lesions_stand_in_a_table_of_their_size_the_smallest_first() -> None:
    volumes = {"lesion-1": 12.0, "lesion-2": 5.0, "lesion-3": 2.0, "lesion-4": math.nan}
    rows = [Row("a", 0, 0, "model", name, "volume_ml", volume, "mL", "") for name, volume in volumes.items()]
    rows += [Row("a", 0, seed, "model", name, "mae", 0.25 + seed, "SD", "") for name in volumes for seed in (0, 1)]
    rows.append(Row("a", 0, 0, "model", "mask", "mae", 9.0, "SD", ""))
    middle, large, unknown = tabulate_lesions(rows, "model", ", model")
    assert middle.caption == "Lesions 1 to 10 mL (2), model"
    assert [[cell.text for cell in line] for line in middle.rows] == [
        ["a", "lesion-3", "2.00", "0.750"],
        ["a", "lesion-2", "5.00", "0.750"],
    ]
    assert [len(table.rows) for table in (large, unknown)] == [1, 1]
    assert unknown.caption == "Lesions of unknown size (1), model"


def test_a_table_of_a_page_can_be_written_into_a_document() -> None:
    table = tabulate_means("", [mean("model", 0.2), mean("lookup", 0.3)], METHODS, "cases")
    assert table is not None
    assert list(to_markdown(table)) == [
        "| Region | Metric | n cases | model | lookup naive |",
        "|---|---|---|---|---|",
        "| mask | MAE ↓ | 3 | 0.200 | 0.300 |",
    ]
