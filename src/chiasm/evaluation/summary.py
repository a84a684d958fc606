"""Rows of many cases summed up by method, region and metric."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from chiasm.evaluation.rows import EACH_LESION, LESION, Row

#: What a short table shows, in this order.
HEADLINES = (
    *("mae", "mae_mu", "psnr", "ssim", "ms_ssim", "sharpness"),
    *("contrast_kept", "recall", "false_lesions", "too_small"),
    *("dice", "hd95", "gamma_pass", "dose_difference"),
)


@dataclass(frozen=True)
class ScoreSummary:
    """One score over a cohort.

    Attributes:
        method: Arm or naive baseline.
        region: As in `Row`; "each lesion" for single lesions.
        metric: As in `Row`.
        mean: Over subjects.
        sd: Between subjects, with n - 1; NaN for a single one.
        n: Subjects with a score.
        unit: Of mean and sd.
    """

    method: str
    region: str
    metric: str
    mean: float
    sd: float
    n: int
    unit: str


_Key = tuple[str, str, str]  # method, region, metric
_Values = dict[str, dict[str, list[float]]]  # subject to case to values


def paired(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the cases that every method has a score of, so that means are of the same cases.

    Where there is no such case, all rows come back.

    >>> row = Row("a", 0, 0, "A7", "mask", "mae", 1.0, "SD", "chiasm")
    >>> [one.case for one in paired([row, row._replace(case="b"), row._replace(method="mean")])]
    ['a', 'a']
    """
    cases_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        cases_of[row.method].add(row.case)
    shared = set.intersection(*cases_of.values()) if cases_of else set()
    return [row for row in rows if row.case in shared or not shared]


def summarise(rows: Iterable[Row], subjects: Mapping[str, str] | None = None) -> list[ScoreSummary]:
    """Average every score over subjects.

    Seeds, folds and lesions of a case are averaged first, then the cases of a
    subject: n counts people, never scans or slices.  NaN is left out.

    Args:
        rows: From `evaluate_case`.
        subjects: Case id to subject; by default each case is its own.

    Returns:
        One summary for each method, region and metric, in the order of `rows`.

    Raises:
        ValueError: If one score comes in two units or under two conventions, which cannot be averaged.
    """
    values: dict[_Key, _Values] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    measures: dict[_Key, tuple[str, str]] = {}
    for row in rows:
        key = (row.method, EACH_LESION if LESION.fullmatch(row.region) else row.region, row.metric)
        measure = (row.unit, row.convention_name)  # a fold's range and SD are its own
        if measures.setdefault(key, measure) != measure:
            raise ValueError(f"{row.metric} of {row.method} comes as {measures[key]} and as {measure}")
        of_subject = values[key][(subjects or {}).get(row.case, row.case)]
        if not math.isnan(row.value):
            of_subject[row.case].append(row.value)
    return [_summary(key, by_subject, measures[key][0]) for key, by_subject in values.items()]


def _summary(key: _Key, values: _Values, unit: str) -> ScoreSummary:
    """Average values over cases, then over the subjects that have one."""
    means = [float(np.mean([np.mean(of_case) for of_case in cases.values()])) for cases in values.values() if cases]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 and np.isfinite(means).all() else math.nan
    return ScoreSummary(*key, float(np.mean(means)) if means else math.nan, spread, len(means), unit)


def format_table(
    rows: Iterable[Row], metrics_shown: Sequence[str] = HEADLINES, subjects: Mapping[str, str] | None = None
) -> list[str]:
    """Set methods side by side as lines of a Markdown table: mean ± SD over subjects, the conventions below it.

    Args:
        rows: From `evaluate_case`.
        metrics_shown: Which, in this order.
        subjects: As in `summarise`.

    Raises:
        ValueError: As `summarise`.
    """
    rows = list(rows)
    summaries = {(one.region, one.metric, one.method): one for one in summarise(rows, subjects)}
    regions, _, methods = (list(dict.fromkeys(names)) for names in zip(*summaries)) if summaries else ([], [], [])
    lines = [["region", "score", "n", *methods]]
    for region, metric in product(regions, metrics_shown):
        lines += _lines(region, metric, [summaries.get((region, metric, method)) for method in methods])
    return [*_markdown(lines), "", *_conventions(rows)]


def _lines(region: str, metric: str, summaries: Sequence[ScoreSummary | None]) -> list[list[str]]:
    """Return the table's line of a metric; none where no method has a value."""
    known = [one for one in summaries if one is not None and one.n]
    if not known:
        return []
    unit = f" ({known[0].unit})" if known[0].unit not in ("", "1") else ""
    fewest, most = min(one.n for one in known), max(one.n for one in known)
    n = f"{fewest}" if fewest == most else f"{fewest}-{most}"
    return [[region, metric + unit, n, *map(_cell, summaries)]]


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Set cells as a Markdown table with even columns; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    head, *body = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def _conventions(rows: Sequence[Row]) -> list[str]:
    """Name each convention once, with its range where all rows share it."""
    described: dict[str, str] = {}
    for row in rows:
        name = row.convention_name
        if described.setdefault(name, row.convention) != row.convention:
            described[name] = f"{name}, with the range and the unit of each fold's training cases (evaluation.csv)"
    return [f"Convention: {convention}." for convention in described.values()]


def _cell(summary: ScoreSummary | None) -> str:
    if summary is None or not summary.n:
        return "-"
    spread = f" ± {summary.sd:#.2g}" if math.isfinite(summary.sd) else ""
    return f"{summary.mean:#.4g}{spread}"
