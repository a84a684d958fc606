"""What an evaluation says in six lines."""

from __future__ import annotations

import math

from chiasm.evaluation.headlines import headlines
from chiasm.evaluation.rows import Row

CONVENTION = "chiasm (inside the mask)"


def row(method: str, region: str, metric: str, value: float, case: str = "a", unit: str = "SD") -> Row:
    return Row(case, 0, 0, method, region, metric, value, unit, CONVENTION)


ROWS = [
    *(row("A7", "mask", "mae", value, case) for case, value in (("a", 0.4), ("b", 0.6))),
    *(row("lookup", "mask", "mae", value, case) for case, value in (("a", 0.5), ("b", 0.75))),
    *(row("identity", "mask", "mae", 2.0, case) for case in "ab"),
    row("A7", "mask", "psnr", 21.25, unit="dB"),
    row("A7", "mask", "ssim", 0.75, unit="1"),
    row("A7", "mask", "calibration", 0.8, unit="1"),
    row("A7", "mask", "spearman", 0.31, unit="1"),
    *(row(method, "WT", "mae", value) for method, value in (("A7", 1.2), ("lookup", 1.0))),
    row("A7", "each lesion", "contrast_kept", 0.25, unit="1"),
    row("A7", "lesions", "recall", 0.5, unit="1"),
    row("A7", "lesions", "false_lesions", 3.0, unit="1"),
]


def test_six_lines_say_error_likeness_lesions_expected_error_and_convention() -> None:
    assert headlines(ROWS, "A7", ("identity", "lookup")) == [
        "mask: mean absolute error 0.5 SD in 2 subjects, -20.0 % against the best baseline (lookup 0.625 SD): "
        "fewer than 6 subjects are too few to compare",
        "mask: PSNR 21.2 dB, SSIM 0.75",
        "WT: mean absolute error 1.2 SD in 1 subject, +20.0 % against the best baseline (lookup 1 SD): "
        "fewer than 6 subjects are too few to compare",
        "lesions: 25 % of their contrast is kept, 50 % are visible, 3 made up per case",
        "expected error: 0.80 times the true error in the mask; rank correlation of voxels 0.31",
        "convention: chiasm; evaluation.csv and report.html hold all scores",
    ]


def test_a_share_a_little_below_zero_has_no_sign() -> None:
    rows = [one._replace(value=-0.002) if one.metric == "contrast_kept" else one for one in ROWS]
    assert any(line.startswith("lesions: 0 % of their contrast") for line in headlines(rows, "A7", ()))


def test_what_nobody_measured_is_left_out() -> None:
    lines = headlines([row("A7", "mask", "mae", 1471.6), row("A7", "WT", "mae", math.nan)], "A7", ())
    assert lines[:-1] == ["mask: mean absolute error 1472 SD in 1 subject"] and lines[-1].startswith("convention")


def test_cases_of_one_subject_count_once() -> None:
    rows = [row("A7", "mask", "mae", value, case) for case, value in (("a1", 0.2), ("a2", 0.4), ("b", 0.6))]
    assert headlines(rows, "A7", (), {"a1": "a", "a2": "a", "b": "b"})[0] == (
        "mask: mean absolute error 0.45 SD in 2 subjects"
    )


def test_better_is_said_of_subjects_and_not_of_their_scans() -> None:
    cases = [f"{subject}{scan}" for subject in "abcdef" for scan in "12"]
    rows = [row(name, "mask", "mae", error, case) for name, error in (("A7", 0.5), ("lookup", 1.0)) for case in cases]
    said = "mask: mean absolute error 0.5 SD in {}, -50.0 % {}against the best baseline (lookup 1 SD): {}"
    interval = "(95 % interval -50.0 to -50.0 %) "
    subjects = {case: case[0] for case in cases}
    assert headlines(rows, "A7", ("lookup",), subjects)[0] == said.format("6 subjects", interval, "better")
    one = dict.fromkeys(cases, "a")
    few = said.format("1 subject", "", "fewer than 6 subjects are too few to compare")
    assert headlines(rows, "A7", ("lookup",), one)[0] == few
