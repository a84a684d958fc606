"""What may be claimed: methods compared in pairs, by subject and seed, with intervals and corrected tests.

The unit of every test is the subject.  Seeds and cases of a subject are
averaged first; the interval resamples subjects and seeds, because seeds
differ by as much as methods do.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chiasm.errors import CohortError
from chiasm.evaluation.claims import WORDS, Claim, Difference, claim
from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.paired_tests import (
    FEWEST,
    Table,
    cluster_interval,
    detectable,
    holm,
    mixed_model,
    permutation_p,
    wilcoxon_p,
)
from chiasm.evaluation.rows import Row
from chiasm.storage import write_text

Pair = tuple[str, str]


class Declared(NamedTuple):
    """A comparison that was declared before the study ran."""

    arm: str
    against: str
    region: str
    metric: str


_Cell = tuple[str, int]  # subject and seed
_Values = dict[_Cell, list[float]]


@dataclass(frozen=True)
class Comparison:
    """One method against another in one region and metric.

    Attributes:
        arm: The method.
        against: What it is compared with.
        region: Where.
        metric: What.
        unit: Of `difference`, `low` and `high`.
        subjects: How many.
        seeds: How many.
        mean: Of the arm, over subjects and seeds.
        mean_against: Of the other.
        difference: Mean over subjects of arm minus against.
        relative: The same in percent of the other's mean.
        low: Lower end of the 95 % interval of `difference`.
        high: Upper end.
        p_permutation: Two-sided, sign flips by subject; NaN below six subjects.
        p_mixed: Two-sided, of a mixed model with subject and seed as random effects; NaN below six.
        error_mixed: Standard error of `difference` in that model.
        p_wilcoxon: Two-sided signed rank; NaN below six subjects.
        p_holm: `p_permutation`, corrected over the declared comparisons, or
            over all exploratory ones of the table.
        effect: Mean difference in SDs of the differences, with Hedges' correction.
        seeds_lower: Seeds in which the arm's mean is lower.
        by_seed: The difference seed by seed, in the order of the seeds.
        primary: Whether it was declared before the study ran.
        detectable: Smallest relative difference, in percent, that as many
            subjects of this spread would show in four of five studies.
        verdict: One sentence.
    """

    arm: str
    against: str
    region: str
    metric: str
    unit: str
    subjects: int
    seeds: int
    mean: float
    mean_against: float
    difference: float
    relative: float
    low: float
    high: float
    p_permutation: float
    p_wilcoxon: float
    p_mixed: float
    error_mixed: float
    p_holm: float
    effect: float
    seeds_lower: int
    by_seed: tuple[float, ...]
    primary: bool
    detectable: float
    verdict: str

    @property
    def percent(self) -> Difference:
        """The difference and its 95 % interval in percent of the other's mean; NaN where that is 0."""
        scale = 100 / abs(self.mean_against) if self.mean_against else math.nan
        return Difference(self.relative, scale * self.low, scale * self.high)

    @property
    def claim(self) -> Claim:
        """What may be said of the difference."""
        return claim(self.percent, self.subjects, more_is_better=find_metric(self.metric).more_is_better, p=self.p_holm)


def compare_methods(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    *,
    metrics: Sequence[str],
    regions: Sequence[str],
    declared: Sequence[Declared] = (),
    subjects: Mapping[str, str] | None = None,
    are_comparable: Callable[[str, str, str], bool] = lambda *_: True,
) -> list[Comparison]:
    """Compare methods in pairs over a study's rows.

    Args:
        rows: Of all jobs.
        pairs: (arm, against).
        metrics: Which.
        regions: Which.
        declared: What the study is about: the primary comparisons.
        subjects: Case id to subject; by default each case is its own.
        are_comparable: Whether an arm, another, and a metric are; only such are compared.

    Returns:
        One for each pair, region and metric that both methods have; the primary one first.

    Raises:
        CohortError: If two methods were not scored on the same cases and seeds.
    """
    wanted = set(chain.from_iterable(pairs))
    cells: dict[tuple[str, str, str], _Values] = defaultdict(lambda: defaultdict(list))
    units: dict[tuple[str, str], str] = {}
    for row, cell in _cells([row for row in rows if row.method in wanted], metrics, regions, subjects):
        cells[row.method, row.region, row.metric][cell].append(row.value)
        units[row.region, row.metric] = row.unit
    found: list[Comparison] = []
    for pair, region, metric in product(pairs, regions, metrics):
        named = Declared(*pair, region, metric)
        ours, theirs = (cells.get((method, region, metric)) for method in pair)
        if ours and theirs and are_comparable(*pair, metric):
            _check_same_cells(named, ours, theirs)
            found.append(_compare(named, units[region, metric], _tables(ours, theirs), named in declared))
    primary, exploratory = (_assessed([one for one in found if one.primary == kind]) for kind in (True, False))
    return [*primary, *exploratory]


def _cells(
    rows: Sequence[Row], metrics: Sequence[str], regions: Sequence[str], subjects: Mapping[str, str] | None
) -> Iterator[tuple[Row, _Cell]]:
    """Return the finite rows of these metrics and regions, each with its subject and seed."""
    for row in rows:
        if row.region in regions and row.metric in metrics and math.isfinite(row.value):
            yield row, ((subjects or {}).get(row.case, row.case), row.seed)


def _check_same_cells(named: Declared, ours: _Values, theirs: _Values) -> None:
    if odd := sorted(ours.keys() ^ theirs.keys()):
        subject, its_seed = odd[0]
        raise CohortError(
            f"{named.arm} and {named.against} were not scored on the same cases: "
            f"{subject} with seed {its_seed} has {named.metric} in {named.region} for one of them only",
            reason="unequal-cohorts",
            hint="Run the study again: it finishes what is missing.",
        )


def _assessed(family: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p values of a family of comparisons, and say what each shows."""
    corrected = holm([one.p_permutation for one in family])
    found = [replace(one, p_holm=p) for one, p in zip(family, corrected, strict=True)]
    return [replace(one, verdict=_verdict(one)) for one in found]


def _tables(ours: _Values, theirs: _Values) -> tuple[Table, Table]:
    """Return two tables (subjects, seeds), NaN where a subject has no score with a seed."""
    (people, row), (seeds, column) = (np.unique(names, return_inverse=True) for names in zip(*ours))
    places = dict(zip(ours, zip(row.tolist(), column.tolist(), strict=True), strict=True))
    tables = np.full((2, len(people), len(seeds)), np.nan)
    for table, cells in zip(tables, (ours, theirs)):
        for cell, values in cells.items():
            table[places[cell]] = sum(values) / len(values)
    return tables[0], tables[1]


def _compare(named: Declared, unit: str, tables: tuple[Table, Table], primary: bool) -> Comparison:
    """Compare two methods of which each has a table (subjects, seeds); the correction and the verdict come later."""
    ours, theirs = tables
    table = ours - theirs
    by_subject, by_seed = np.nanmean(table, axis=1), np.nanmean(table, axis=0)
    n, base = len(by_subject), float(np.nanmean(theirs))
    difference = float(by_subject.mean())
    spread = float(by_subject.std(ddof=1)) if n > 1 else math.nan
    low, high = cluster_interval(table) if n > 1 else (math.nan, math.nan)
    tests = _tested(table, by_subject)
    return Comparison(
        **named._asdict(),
        unit=unit,
        subjects=n,
        seeds=table.shape[1],
        mean=float(np.nanmean(ours)),
        mean_against=base,
        difference=difference,
        relative=100 * difference / abs(base) if base else math.nan,
        low=low,
        high=high,
        **tests._asdict(),
        p_holm=math.nan,
        effect=_effect(difference, spread, n),
        seeds_lower=int((by_seed < 0).sum()),
        by_seed=tuple(by_seed.tolist()),
        primary=primary,
        detectable=100 * detectable(n, spread) / abs(base) if n >= FEWEST and base else math.nan,
        verdict="",
    )


class _Tests(NamedTuple):
    """What the tests of a table of differences say; NaN where too few subjects are tested."""

    p_permutation: float = math.nan
    p_wilcoxon: float = math.nan
    p_mixed: float = math.nan
    error_mixed: float = math.nan


def _tested(table: Table, by_subject: Table) -> _Tests:
    if len(by_subject) < FEWEST:
        return _Tests()
    error, p_mixed = mixed_model(table)
    return _Tests(permutation_p(by_subject), wilcoxon_p(by_subject), p_mixed, error)


def _effect(difference: float, spread: float, n: int) -> float:
    """Return a mean difference in SDs, with Hedges' correction; NaN without a spread."""
    if not spread > 0:
        return math.nan
    hedges = 1 - 3 / (4 * (n - 1) - 1)
    return difference / spread * hedges


def stays_within(one: Comparison, margin: float) -> str:
    """State whether an arm is shown to be not worse than another by more than a margin (non-inferiority).

    Args:
        one: Where it must not be worse, such as healthy tissue.
        margin: Percent of the other's mean.
    """
    if one.subjects < FEWEST or math.isnan(one.percent.low):
        return f"{one.metric} in {one.region}, {one.arm} against {one.against}: {WORDS['few']}"
    worst = -one.percent.low if find_metric(one.metric).more_is_better else one.percent.high
    shown = f"{one.metric} in {one.region}, {one.arm} against {one.against}: {one.percent}"
    if worst <= margin:
        return f"{shown}; not worse by more than {margin:g} %"
    return f"{shown}; not shown to stay within {margin:g} %"


class MethodSummary(NamedTuple):
    """What a method reached in a region: means over cases first, then over folds and seeds."""

    method: str
    region: str
    metric: str
    unit: str
    subjects: int
    seeds: int
    mean: float
    sd_subjects: float
    sd_seeds: float


def summarise_methods(
    rows: Sequence[Row], *, metrics: Sequence[str], regions: Sequence[str], subjects: Mapping[str, str] | None = None
) -> list[MethodSummary]:
    """Average each method's scores by subject and seed.

    Args:
        rows: Of all jobs.
        metrics: Which.
        regions: Which.
        subjects: Case id to subject; by default each case is its own.

    Returns:
        One for each method, region and metric with a finite score; SDs are NaN of one subject or seed.
    """
    cells: dict[tuple[str, str, str, str], _Values] = defaultdict(lambda: defaultdict(list))
    for row, cell in _cells(rows, metrics, regions, subjects):
        cells[row.method, row.region, row.metric, row.unit][cell].append(row.value)
    return [_summary(names, values) for names, values in cells.items()]


def _summary(names: tuple[str, str, str, str], values: _Values) -> MethodSummary:
    table, _ = _tables(values, values)
    by_subject, by_seed = np.nanmean(table, axis=1), np.nanmean(table, axis=0)
    spreads = [float(part.std(ddof=1)) if len(part) > 1 else math.nan for part in (by_subject, by_seed)]
    return MethodSummary(*names, len(by_subject), len(by_seed), float(by_subject.mean()), *spreads)


def _verdict(one: Comparison) -> str:
    kind = "primary" if one.primary else "exploratory"
    what = f"{one.metric} in {one.region}, {one.arm} against {one.against} ({kind})"
    alike = max(one.seeds_lower, one.seeds - one.seeds_lower)
    seeds = f"same sign in {alike} of {one.seeds} seeds"
    found = one.claim
    if found == "few":
        return f"{what}: {one.percent}; not tested, {one.subjects} subjects are too few; {seeds}"
    shown = f"{what}: {WORDS[found]}, {one.percent}, p {one.p_holm:.2g}"
    if found == "open":
        return f"{shown}; {one.subjects} subjects would show {one.detectable:.1f} % in four of five studies; {seeds}"
    return f"{shown}; {seeds}"


def write_table(path: Path, records: Sequence[Comparison] | Sequence[MethodSummary]) -> None:
    """Write comparisons or summaries as CSV, one a row, at full precision.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    text = io.StringIO()
    names = list(type(records[0]).__annotations__) if records else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        values = [getattr(record, name) for name in names]
        writer.writerow([" ".join(map(repr, value)) if isinstance(value, tuple) else value for value in values])
    write_text(path, text.getvalue())
