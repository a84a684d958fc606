"""What came of an evaluation, in six lines."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.claims import WORDS, PairedScores, pair_scores
from chiasm.evaluation.rows import Row
from chiasm.evaluation.summary import ScoreSummary, summarise
from chiasm.metrics.radiotherapy import TISSUES_HU
from chiasm.names import amount, three_digits
from chiasm.volumes.geometry import AXIS_NAMES

#: Regions that are no lesions.
BASE_REGIONS = (
    *("mask", "image", "healthy", "edges", "lesion-edge", "each lesion", "lesions"),
    *(*TISSUES_HU, "lung"),  # as "low density" was called
    *AXIS_NAMES,
)


@dataclass(frozen=True)
class _Scores:
    """Summaries of a method and of the naive baselines by region, metric and method, and their errors by case."""

    found: Mapping[tuple[str, str, str], ScoreSummary]
    errors: Mapping[tuple[str, str], Mapping[str, float]]
    method: str
    naive: Collection[str]
    subjects: Mapping[str, str]

    def of(self, region: str, metric: str, method: str = "") -> ScoreSummary | None:
        """Return a score; None where no subject has one."""
        one = self.found.get((region, metric, method or self.method))
        return one if one is not None and one.n else None

    def best_naive(self, region: str) -> ScoreSummary | None:
        """Return the baseline with the smallest error in a region."""
        errors = [one for name in self.naive if (one := self.of(region, "mae", name)) is not None]
        return min(errors, key=lambda one: one.mean, default=None)

    def against(self, baseline: str, region: str) -> PairedScores | None:
        """Pair the method's errors with those of a baseline, by subject; None where no case has both."""
        ours, theirs = (self.errors.get((name, region), {}) for name in (self.method, baseline))
        return pair_scores(ours, theirs, self.subjects)

    @property
    def lesion_region(self) -> str | None:
        """The label region that most subjects have, the first named of these."""
        named = dict.fromkeys(region for region, metric, _ in self.found if metric == "mae")
        regions = [name for name in named if name not in BASE_REGIONS and not name.startswith("lesions-")]
        return max(regions, key=self._count, default=None)

    def _count(self, region: str) -> int:
        one = self.of(region, "mae")
        return 0 if one is None else one.n


def headlines(
    rows: Iterable[Row], method: str, naive: Collection[str], subjects: Mapping[str, str] | None = None
) -> list[str]:
    """Say in at most six lines how good a method is: error, likeness, lesions, expected error, convention.

    Args:
        rows: From `evaluate_case`.
        method: Which is described.
        naive: Baselines that it is compared with.
        subjects: Case id to subject; by default each case is its own.

    Raises:
        ValueError: As `summarise`.
    """
    rows = list(rows)
    summaries = {(one.region, one.metric, one.method): one for one in summarise(rows, subjects)}
    scores = _Scores(summaries, _errors_by_case(rows), method, naive, subjects or {})
    lines = [_error(scores, "mask"), _likeness(scores)]
    if (region := scores.lesion_region) is not None:
        lines += [_error(scores, region), _lesions(scores)]
    lines += [_expected_error(scores), _convention(rows)]
    return [line for line in lines if line]


def _errors_by_case(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """Average the mean absolute errors of each method, region and case over folds and seeds."""
    finite = (row for row in rows if row.metric == "mae" and math.isfinite(row.value))
    cells = grouped(finite, lambda row: (row.method, row.region))
    return {
        cell: {case: fmean(row.value for row in same) for case, same in grouped(found, lambda row: row.case).items()}
        for cell, found in cells.items()
    }


def _error(scores: _Scores, region: str) -> str:
    """Compare the mean absolute error of a region with that of the best baseline."""
    own, best = scores.of(region, "mae"), scores.best_naive(region)
    if own is None:
        return ""
    line = f"{region}: mean absolute error {_value(own)} in {amount(own.n, 'subject')}"
    paired = None if best is None else scores.against(best.method, region)
    if best is None or paired is None:
        return line
    against = f"{paired.difference} against the best baseline ({best.method} {_value(best)})"
    return f"{line}, {against}: {WORDS[paired.claim]}"


def _likeness(scores: _Scores) -> str:
    parts = [
        f"{label} {three_digits(one.mean)}{unit}"
        for metric, label, unit in (("psnr", "PSNR", " dB"), ("ssim", "SSIM", ""), ("sharpness", "sharpness", ""))
        if (one := scores.of("mask", metric)) is not None
    ]
    return f"mask: {', '.join(parts)}" if parts else ""


def _lesions(scores: _Scores) -> str:
    """Describe how much of the lesions' contrast is kept, how many are visible, and how many are made up."""
    kept, recall = scores.of("each lesion", "contrast_kept"), scores.of("lesions", "recall")
    made_up = scores.of("lesions", "false_lesions")
    parts = [
        *([f"{round(100 * kept.mean)} % of their contrast is kept"] if kept else []),
        *([f"{100 * recall.mean:.0f} % are visible"] if recall else []),
        *([f"{made_up.mean:.3g} made up per case"] if made_up else []),
    ]
    return f"lesions: {', '.join(parts)}" if parts else ""


def _expected_error(scores: _Scores) -> str:
    ratio, rank = scores.of("mask", "calibration"), scores.of("mask", "spearman")
    if ratio is None:
        return ""
    line = f"expected error: {ratio.mean:.2f} times the true error in the mask"
    return f"{line}; rank correlation of voxels {rank.mean:.2f}" if rank is not None else line


def _convention(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row.convention_name for row in rows)
    return f"convention: {', '.join(names)}; evaluation.csv and report.html hold all scores"


def _value(one: ScoreSummary) -> str:
    return f"{three_digits(one.mean)}{f' {one.unit}' if one.unit not in ('', '1') else ''}"
