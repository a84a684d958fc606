"""The scores of one case beside those of the cohort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.claims import is_ahead
from chiasm.evaluation.metric_table import Metric, find_metric
from chiasm.evaluation.rows import LESION, Row
from chiasm.evaluation.summary import HEADLINES
from chiasm.reports.drawing import show_number, show_unit
from chiasm.reports.tables import mean_by, number_cell


class CaseScore(NamedTuple):
    """One score of the case beside those of the cohort.

    Attributes:
        region: Where.
        metric: A name such as "mae".
        value: Of this case.
        unit: "1" for pure numbers.
        cohort: The same score of every case, this one among them; empty where there is nothing to compare with.
    """

    region: str
    metric: str
    value: float
    unit: str
    cohort: tuple[float, ...] = ()


def against_cohort(
    rows: Sequence[Row], case: str, method: str, metrics: Sequence[str] = HEADLINES
) -> tuple[CaseScore, ...]:
    """Set a case's scores beside those of all cases; folds and seeds of a case are averaged.

    Single lesions (regions "lesion-1" and so on) have no counterpart in other cases and are left out.

    Args:
        rows: Scores of all cases.
        case: Whose page it is.
        method: The method under assessment.
        metrics: Which scores, in this order inside each region.
    """
    mine = [row for row in rows if row.method == method and _is_shown(row, metrics)]
    scores = grouped(mine, lambda row: (row.region, row.metric))
    order = product(dict.fromkeys(region for region, _ in scores), metrics)
    compared = (_against(scores[score], case) for score in order if score in scores)
    return tuple(filter(None, compared))


def _against(rows: Sequence[Row], case: str) -> CaseScore | None:
    """Set a case's score beside the cohort's; None where the case has none."""
    means = mean_by(rows, lambda row: row.case)
    if case not in means:
        return None
    return CaseScore(rows[0].region, rows[0].metric, means[case], rows[-1].unit, tuple(means.values()))


def _is_shown(row: Row, metrics: Sequence[str]) -> bool:
    return row.metric in metrics and math.isfinite(row.value) and not LESION.fullmatch(row.region)


def show_score(score: CaseScore) -> dict[str, Any]:
    """Put a score beside the cohort's: words, and positions in per cent of the range for the drawing."""
    metric = find_metric(score.metric)
    finite = sorted(value for value in score.cohort if math.isfinite(value))
    shown = {
        "region": score.region,
        "metric": metric.label,
        "value": number_cell(score.value).text,
        "unit": show_unit(score.unit),
    }
    if not finite or not math.isfinite(score.value):
        return shown | {"n": 0}
    return shown | _spread(score.value, finite) | {"n": len(finite), "rank": _rank(metric, score.value, finite)}


def _spread(value: float, cohort: Sequence[float]) -> dict[str, Any]:
    """Show the sorted scores of a cohort, and where a value lies between them."""
    low, median, high = cohort[0], float(np.median(cohort)), cohort[-1]
    start = min(low, value)
    width = (max(high, value) - start) or 1.0
    like = max(abs(low), abs(high))
    return {
        "median": show_number(median, like),
        "low": show_number(low, like),
        "high": show_number(high, like),
        "at": [round(100 * (one - start) / width, 1) for one in (low, median, high, value)],
    }


def _rank(metric: Metric, value: float, cohort: Sequence[float]) -> str:
    """Return the case's rank in the cohort, 1 for the best; cases within the tolerance share a rank.

    Empty for a single case, and for a metric without a better direction.
    """
    if metric.better == "neither" or len(cohort) < 2:
        return ""
    better = sum(is_ahead(other, value, more_is_better=metric.more_is_better) for other in cohort)
    return f"rank {better + 1} of {len(cohort)}"
