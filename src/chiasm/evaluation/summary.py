"""Rows of many cases summed up by method, region and metric."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chiasm.evaluation.rows import EACH_LESION, LESION, Row

if TYPE_CHECKING:
    pass


#: What a short table shows, in this order.
HEADLINES = (
    *("mae", "mae_mu", "psnr", "ssim", "ms_ssim", "sharpness"),
    *("contrast_kept", "recall", "false_lesions", "too_small"),
)


@dataclass(frozen=True)
class Summary:
    """One figure over a cohort.

    Attributes:
        method: Arm or naive baseline.
        region: As in `Row`; "each lesion" for single lesions.
        metric: As in `Row`.
        mean: Over subjects.
        sd: Between subjects, with n - 1; NaN for a single one.
        n: Subjects with a figure.
        unit: Of mean and sd.
    """

    method: str
    region: str
    metric: str
    mean: float
    sd: float
    n: int
    unit: str


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


def summarise(rows: Iterable[Row], subjects: Mapping[str, str] | None = None) -> list[Summary]:
    """Average every figure over subjects.

    Seeds, folds and lesions of a case are averaged first, then the cases of a
    subject: n counts people, never scans or slices.  NaN is left out.

    Args:
        rows: From `evaluate_case`.
        subjects: Case id to subject; by default each case is its own.

    Returns:
        One summary for each method, region and metric, in the order of `rows`.

    Raises:
        ValueError: If one figure comes in two units or under two conventions, which cannot be averaged.
    """
    values: dict[tuple[str, str, str], dict[str, dict[str, list[float]]]] = {}
    measures: dict[tuple[str, str, str], tuple[str, str]] = {}
    for row in rows:
        key = (row.method, EACH_LESION if LESION.fullmatch(row.region) else row.region, row.metric)
        measure = (row.unit, row.convention.partition(" (")[0])  # a fold's range and SD are its own
        if measures.setdefault(key, measure) != measure:
            raise ValueError(f"{row.metric} of {row.method} comes as {measures[key]} and as {measure}")
        of_subject = values.setdefault(key, {}).setdefault((subjects or {}).get(row.case, row.case), defaultdict(list))
        if not math.isnan(row.value):
            of_subject[row.case].append(row.value)
    summaries = []
    for key, by_subject in values.items():
        means = [
            float(np.mean([np.mean(figures) for figures in cases.values()])) for cases in by_subject.values() if cases
        ]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 and np.isfinite(means).all() else math.nan
        mean = float(np.mean(means)) if means else math.nan
        summaries.append(Summary(*key, mean, spread, len(means), measures[key][0]))
    return summaries


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
    summaries = {(s.region, s.metric, s.method): s for s in summarise(rows, subjects)}
    methods = list(dict.fromkeys(method for _, _, method in summaries))
    regions = list(dict.fromkeys(region for region, _, _ in summaries))
    lines = [["region", "figure", "n", *methods]]
    for region in regions:
        for metric in metrics_shown:
            here = [summaries.get((region, metric, method)) for method in methods]
            known = [s for s in here if s is not None and s.n]
            if known:
                unit = f" ({known[0].unit})" if known[0].unit not in ("", "1") else ""
                counts = sorted({s.n for s in known})
                n = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
                lines.append([region, metric + unit, n, *(_cell(s) for s in here)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    conventions: dict[str, str] = {}
    for row in rows:
        name, told = row.convention.partition(" (")[0], row.convention
        if conventions.setdefault(name, told) != told:
            conventions[name] = f"{name}, with the range and the unit of each fold's training cases (evaluation.csv)"
    return [*table, "", *(f"Convention: {convention}." for convention in conventions.values())]


def _cell(summary: Summary | None) -> str:
    if summary is None or not summary.n:
        return "-"
    spread = f" ± {summary.sd:#.2g}" if math.isfinite(summary.sd) else ""
    return f"{summary.mean:#.4g}{spread}"
