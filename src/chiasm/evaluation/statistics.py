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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import CohortError
from chiasm.evaluation.rows import Row
from chiasm.storage import write_text

FEWEST = 6  # subjects, below which nothing is tested
ALPHA = 0.05
POWER = 0.8
EXACT = 14  # subjects up to which all sign flips are tried
DRAWS = 5000

#: Metrics of which more is better; of the others less is.
HIGHER = frozenset({"psnr", "ssim", "ms_ssim", "ncc", "recall", "contrast_kept", "spearman", "auroc_worst"})

Pair = tuple[str, str]


class Declared(NamedTuple):
    """A comparison that was declared before the study ran."""

    arm: str
    against: str
    region: str
    metric: str


Cell = NDArray[np.float64]


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


def compare_methods(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    *,
    metrics: Sequence[str],
    regions: Sequence[str],
    declared: Sequence[Declared] = (),
    subjects: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare methods in pairs over a study's rows.

    Args:
        rows: Of all jobs.
        pairs: (arm, against).
        metrics: Which.
        regions: Which.
        declared: What the study is about: the primary comparisons.
        subjects: Case id to subject; by default each case is its own.
        seed: Of the resampling.

    Returns:
        One for each pair, region and metric that both methods have; the primary one first.

    Raises:
        CohortError: If two methods were not scored on the same cases and seeds.
    """
    wanted = {name for pair in pairs for name in pair}
    cells: dict[tuple[str, str, str], dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    units: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.method in wanted and row.region in regions and row.metric in metrics and math.isfinite(row.value):
            subject = (subjects or {}).get(row.case, row.case)
            cells[row.method, row.region, row.metric][subject, row.seed].append(row.value)
            units[row.region, row.metric] = row.unit
    found: list[Comparison] = []
    for (arm, against), region, metric in product(pairs, regions, metrics):
        ours, theirs = cells.get((arm, region, metric)), cells.get((against, region, metric))
        if not ours or not theirs:
            continue
        if odd := sorted(ours.keys() ^ theirs.keys()):
            subject, its_seed = odd[0]
            raise CohortError(
                f"{arm} and {against} were not scored on the same cases: "
                f"{subject} with seed {its_seed} has {metric} in {region} for one of them only",
                reason="unequal-cohorts",
                hint="Run the study again: it finishes what is missing.",
            )
        table, other = _tables(ours, theirs)
        named = Declared(arm, against, region, metric)
        found.append(_compare(named, units[region, metric], table, other, named in declared, seed))
    families = {
        primary: iter(_holm([one.p_permutation for one in found if one.primary == primary]))
        for primary in (True, False)
    }
    found = [replace(one, p_holm=next(families[one.primary])) for one in found]
    found = [replace(one, verdict=_verdict(one)) for one in found]
    return sorted(found, key=lambda one: not one.primary)


def _tables(
    ours: Mapping[tuple[str, int], list[float]], theirs: Mapping[tuple[str, int], list[float]]
) -> tuple[Cell, Cell]:
    """Return two tables (subjects, seeds), NaN where a subject has no figure with a seed."""
    people, seeds = sorted({subject for subject, _ in ours}), sorted({its_seed for _, its_seed in ours})
    rows, columns = ({name: index for index, name in enumerate(names)} for names in (people, seeds))
    tables = np.full((2, len(people), len(seeds)), np.nan)
    for table, cells in zip(tables, (ours, theirs)):
        for (subject, its_seed), values in cells.items():
            table[rows[subject], columns[its_seed]] = sum(values) / len(values)
    return tables[0], tables[1]


def _compare(
    named: Declared,
    unit: str,
    ours: Cell,
    theirs: Cell,
    primary: bool,
    seed: int,
) -> Comparison:
    table = ours - theirs
    by_subject = np.nanmean(table, axis=1)
    n, base = len(by_subject), float(np.nanmean(theirs))
    difference = float(by_subject.mean())
    spread = float(by_subject.std(ddof=1)) if n > 1 else math.nan
    tested = n >= FEWEST
    low, high = cluster_interval(table, seed=seed) if n > 1 else (math.nan, math.nan)
    p = permutation_p(by_subject, seed=seed) if tested else math.nan
    hedges = 1 - 3 / (4 * (n - 1) - 1) if n > 1 else math.nan
    by_seed = np.nanmean(table, axis=0)
    error, p_mixed = mixed_model(table) if tested else (math.nan, math.nan)
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
        p_permutation=p,
        p_wilcoxon=wilcoxon_p(by_subject) if tested else math.nan,
        p_mixed=p_mixed,
        error_mixed=error,
        p_holm=math.nan,
        effect=difference / spread * hedges if spread and spread > 0 else math.nan,
        seeds_lower=int((by_seed < 0).sum()),
        by_seed=tuple(by_seed.tolist()),
        primary=primary,
        detectable=100 * detectable(n, spread) / abs(base) if tested and base else math.nan,
        verdict="",
    )


def permutation_p(differences: Cell, *, seed: int = 0, draws: int = DRAWS) -> float:
    """Test whether paired differences are centred on 0, by flipping signs.

    All flips are tried up to fourteen subjects, `draws` random ones beyond.

    Args:
        differences: One for each subject, shape (n,).
        seed: Of the random flips.
        draws: How many.

    Returns:
        Two-sided p.
    """
    n = len(differences)
    if n <= EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), (draws, n))
    means, seen = np.abs(signs @ differences) / n, abs(float(differences.mean()))
    extreme = int((means >= seen * (1 - 1e-12)).sum())
    return extreme / len(means) if n <= EXACT else (extreme + 1) / (draws + 1)


def wilcoxon_p(differences: Cell) -> float:
    """Return the two-sided p of Wilcoxon's signed rank test; 1 where all differences are 0."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def cluster_interval(table: Cell, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Return a 95 % interval of the mean that resamples subjects and seeds alike.

    Bias-corrected and accelerated (BCa), the acceleration from leaving out one
    subject at a time.

    Args:
        table: Differences, shape (subjects, seeds); NaN where one is missing.
        seed: Of the resampling.
        draws: How many.

    Reference:
        Efron, Better bootstrap confidence intervals, JASA 1987.
    """
    from statistics import NormalDist

    n, m = table.shape
    filled = np.where(np.isnan(table), np.nanmean(table, axis=1, keepdims=True), table)
    people, seeds = _resampled(n, m, draws, seed)
    means = np.einsum("dm,dm->d", people @ filled, seeds)
    centre = float(filled.mean())
    if np.ptp(means) == 0:
        return centre, centre
    normal = NormalDist()
    share = float(np.clip(np.mean(means < centre) + np.mean(means == centre) / 2, 1 / draws, 1 - 1 / draws))
    bias = normal.inv_cdf(share)
    left_out = (filled.sum() - filled.sum(axis=1)) / (m * (n - 1))
    apart = left_out.mean() - left_out
    size = float((apart**2).sum() ** 1.5)
    acceleration = float((apart**3).sum()) / (6 * size) if size else 0.0
    ends = []
    for level in (ALPHA / 2, 1 - ALPHA / 2):
        z = bias + normal.inv_cdf(level)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends).tolist()
    return low, high


@lru_cache(maxsize=4)
def _resampled(n: int, m: int, draws: int, seed: int) -> tuple[Cell, Cell]:
    """Draw how much each subject (draws, n) and each seed (draws, m) weighs; the same for all comparisons of a size."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), draws) / n, rng.multinomial(m, np.full(m, 1 / m), draws) / m


def mixed_model(table: Cell) -> tuple[float, float]:
    """Test the mean of a table whose rows and columns are random: d = mean + subject + seed + rest.

    Restricted maximum likelihood, which for a full table has a closed form:
    mean squares of subjects, seeds and the rest; a variance that comes out
    negative is 0, and its mean square joins the rest.  The p value is of a t
    test with Satterthwaite's degrees of freedom.

    Args:
        table: Differences, shape (subjects, seeds), two subjects or more; NaN
            where one is missing, which counts as its subject's mean.

    Returns:
        Standard error of the mean, and the two-sided p that it is 0.

    Reference:
        Searle, Casella and McCulloch, Variance Components, 1992, chapter 4.
    """
    from scipy.stats import t

    filled = np.where(np.isnan(table), np.nanmean(table, axis=1, keepdims=True), table)
    (n, m), mean = filled.shape, float(filled.mean())
    people, seeds = m * np.sum((filled.mean(axis=1) - mean) ** 2), n * np.sum((filled.mean(axis=0) - mean) ** 2)
    free = {"people": n - 1, "seeds": m - 1, "rest": (n - 1) * (m - 1)}
    squares = {"people": float(people), "seeds": float(seeds)}
    squares["rest"] = max(0.0, float(np.sum((filled - mean) ** 2)) - sum(squares.values()))
    effects = ["people", "seeds"] if m > 1 else ["people"]
    if m > 1:  # the smaller effect leaves first where it is no larger than the rest
        for effect in sorted(effects, key=lambda name: squares[name] / free[name]):
            if squares[effect] / free[effect] <= squares["rest"] / free["rest"]:
                squares["rest"] += squares[effect]
                free["rest"] += free[effect]
                effects.remove(effect)
    kept = {name: (squares[name] / free[name], free[name]) for name in effects}
    parts = list(kept.values()) or [(squares["rest"] / free["rest"], free["rest"])]
    variance = sum(part for part, _ in parts)
    if len(parts) == 2:
        rest = squares["rest"] / free["rest"]
        variance -= rest
        parts.append((rest, free["rest"]))
    if variance <= 0:
        return 0.0, 1.0 if mean == 0 else 0.0
    degrees = variance**2 / sum(part**2 / its for part, its in parts)
    error = math.sqrt(variance / (n * m))
    return error, float(2 * t.sf(abs(mean) / error, degrees))


def stays_within(one: Comparison, margin: float) -> str:
    """Say whether an arm is shown to be not worse than another by more than a margin (non-inferiority).

    Args:
        one: Where it must not be worse, such as healthy tissue.
        margin: Percent of the other's mean.
    """
    if math.isnan(one.low) or not one.mean_against:
        return f"{one.metric} in {one.region}, {one.arm} against {one.against}: cannot be said"
    worst = 100 * (-one.low if one.metric in HIGHER else one.high) / abs(one.mean_against)
    shown = f"{one.metric} in {one.region}, {one.arm} against {one.against}: {_interval(one)}"
    if worst <= margin:
        return f"{shown}; not worse by more than {margin:g} %"
    return f"{shown}; not shown to stay within {margin:g} %"


class Summary(NamedTuple):
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
) -> list[Summary]:
    """Average each method's figures by subject and seed.

    Args:
        rows: Of all jobs.
        metrics: Which.
        regions: Which.
        subjects: Case id to subject; by default each case is its own.

    Returns:
        One for each method, region and metric with a finite figure; SDs are NaN of one subject or seed.
    """
    cells: dict[tuple[str, str, str, str], dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.region in regions and row.metric in metrics and math.isfinite(row.value):
            subject = (subjects or {}).get(row.case, row.case)
            cells[row.method, row.region, row.metric, row.unit][subject, row.seed].append(row.value)
    found = []
    for names, cell in cells.items():
        table, _ = _tables(cell, cell)
        by_subject, by_seed = np.nanmean(table, axis=1), np.nanmean(table, axis=0)
        spreads = [float(part.std(ddof=1)) if len(part) > 1 else math.nan for part in (by_subject, by_seed)]
        found.append(Summary(*names, len(by_subject), len(by_seed), float(by_subject.mean()), *spreads))
    return found


def detectable(n: int, spread: float) -> float:
    """Return the smallest difference that n subjects of this spread show in four of five studies.

    Args:
        n: Subjects, at least `FEWEST`.
        spread: SD of their paired differences.

    Returns:
        In the unit of `spread`; of a two-sided paired t test at 5 %.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    limit = float(t.ppf(1 - ALPHA / 2, n - 1))

    def lack(shift: float) -> float:  # the other tail is negligible here
        return float(nct.sf(limit, n - 1, shift)) - POWER

    return float(brentq(lack, 0.0, 10.0)) / math.sqrt(n) * spread


def _holm(ps: Sequence[float]) -> list[float]:
    """Correct p values over a family (Holm 1979); NaN stays, and does not count."""
    known = [index for index, p in enumerate(ps) if not math.isnan(p)]
    corrected, largest = list(ps), 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(known) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def _interval(one: Comparison) -> str:
    if math.isnan(one.low) or not one.mean_against:
        return f"{one.relative:+.1f} %"
    low, high = (100 * end / abs(one.mean_against) for end in (one.low, one.high))
    return f"{one.relative:+.1f} % (95 % interval {low:+.1f} to {high:+.1f} %)"


def _verdict(one: Comparison) -> str:
    kind = "primary" if one.primary else "exploratory"
    what = f"{one.metric} in {one.region}, {one.arm} against {one.against} ({kind})"
    interval = _interval(one)
    alike = max(one.seeds_lower, one.seeds - one.seeds_lower)
    seeds = f"same sign in {alike} of {one.seeds} seeds"
    if one.subjects < FEWEST:
        return f"{what}: {interval}; not tested, {one.subjects} subjects are too few; {seeds}"
    if one.p_holm >= ALPHA or one.low <= 0 <= one.high:  # subjects alone do not see that seeds disagree
        least = f"{one.subjects} subjects would show {one.detectable:.1f} % in four of five studies"
        return f"{what}: no difference shown, {interval}, p {one.p_holm:.2g}; {least}; {seeds}"
    better = (one.difference > 0) == (one.metric in HIGHER)
    return f"{what}: {'better' if better else 'worse'}, {interval}, p {one.p_holm:.2g}; {seeds}"


def write_table(path: Path, records: Sequence[Comparison] | Sequence[Summary]) -> None:
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
