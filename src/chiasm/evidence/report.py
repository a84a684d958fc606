"""One self-contained page: what was asked, what was found, and the pictures to judge it by.

The page needs no network, no server and no other file.  It says in words how
the method stands against the best naive baseline, worse as plainly as better,
and names what is missing.  The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple
from warnings import catch_warnings, filterwarnings

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from chiasm.evidence.evaluation import Row, summarise
from chiasm.storage import write_text

FEW_CASES = 10  # up to this many, the page says that they are few
MARGIN = 4  # voxels around the mask in a picture
MOST_PIXELS = 400  # along a picture's longer side; larger slices are thinned
MOST_POINTS = 200  # of a drawn curve; longer ones are averaged in blocks
COVERED = 0.995  # share of the voxels inside the colour range of error and reliability
SOURCE_WINDOW = (0.005, 0.995)  # quantiles inside the mask
BEST_TO_WORST = ("best", "median", "worst")
BINS = 10  # of the reliability curve
SAMPLE = 500_000  # voxels of a case and region that quantiles and bins are taken over
PLACES = {"outside lesions": "Outside lesions", "lesions": "In lesions", "mask": "In the mask"}
HEALTHY_ACCURACY = (0.55, 0.97)  # below, a discriminator knows nothing; above, everything
FLAT_RATIO = 0.05  # a lesion:healthy weight ratio within 1 +- this is no attention
HARD_SPACE = "\u00a0"
LESION = re.compile(r"lesion-\d+")  # regions that are one lesion of one case
SIZES_ML = ((1.0, "below 1 mL"), (10.0, "1 to 10 mL"), (math.inf, "10 mL and more"))
UNKNOWN_SIZE = "of unknown size"

METRICS: dict[str, tuple[str, Literal["lower", "higher", "neither"]]] = {
    "mae": ("MAE", "lower"),
    "rmse": ("RMSE", "lower"),
    "mse": ("MSE", "lower"),
    "nmse": ("NMSE", "lower"),
    "psnr": ("PSNR", "higher"),
    "ssim": ("SSIM", "higher"),
    "ms_ssim": ("MS-SSIM", "higher"),
    "ncc": ("NCC", "higher"),
    "bias": ("Bias", "neither"),
    "volume_ml": ("Volume", "neither"),
}

# Figures are drawn in these colours and shown in the page's own, light or dark.
INK, MUTED, LINE, BAND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))  # colour is never the only sign
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line", BAND: "--band"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}


@dataclass(frozen=True, eq=False)
class GalleryCase:
    """One case to look at: volumes on one grid in RAS order, shape (I, J, K) each.

    Attributes:
        case: Its name.
        source: The image that was given.
        real: The image that was to be made, or None where there is none.
        synthetic: The image that was made.
        reliability: Expected absolute error in `unit`, or None.
        mask: Valid voxels; error and reliability are shown inside only.
        lesion: Labelled voxels, or None.
        spacing_mm: Distance between voxel centres along I, J and K.
        unit: Of `real`, `synthetic` and `reliability`.
        window: Lowest and highest shown value, the same for real and synthetic.
        caption: Why this case is shown, such as "median of 6 cases".

    Raises:
        ValueError: If the volumes' shapes differ, or the window does not rise.
    """

    case: str
    source: NDArray[Any]
    real: NDArray[Any] | None
    synthetic: NDArray[Any]
    reliability: NDArray[Any] | None
    mask: NDArray[np.bool_]
    lesion: NDArray[np.bool_] | None
    spacing_mm: tuple[float, float, float]
    unit: str
    window: tuple[float, float]
    caption: str = ""

    def __post_init__(self) -> None:
        volumes = (self.source, self.real, self.synthetic, self.reliability, self.mask, self.lesion)
        shapes = {volume.shape for volume in volumes if volume is not None}
        if len(shapes) != 1 or len(shapes.pop()) != 3:
            raise ValueError(f"the volumes of case {self.case} must share one shape (I, J, K)")
        if not self.window[0] < self.window[1]:
            raise ValueError(f"the window of case {self.case} must rise, found {self.window}")


def write_report(
    path: Path,
    *,
    title: str,
    rows: Sequence[Row],
    history: Sequence[Mapping[str, Any]] = (),
    gallery: Sequence[GalleryCase] = (),
    facts: Mapping[str, Mapping[str, str]] | None = None,
    warnings: Sequence[str] = (),
    asked: str = "",
    method: str | None = None,
    naive: Collection[str] | None = None,
    headline: str = "mae",
) -> Path:
    """Write the report as one HTML file that needs nothing else.

    What is absent (history, references, reliability, lesions) is said on the
    page, not left out in silence.  No time of day is written: put one among
    the `facts` if it matters.

    Args:
        path: Where the page will stand, such as `RUN/report.html`.
        title: The page's heading.
        rows: From the evaluation; regions called "lesion-1", "lesion-2", ...
            are single lesions and have a table of their own.
        history: The lines of `log.jsonl`, parsed.
        gallery: Cases to show, best with the best, the median and the worst.
        facts: Sections of the data sheet: heading -> name -> value.
        warnings: Sentences that a reader must see before any figure.
        asked: What was asked, as one sentence.
        method: The method under judgement, as it is called in `rows`; by
            default that of the first row.
        naive: The methods in `rows` that anybody could have used instead; by
            default all others.
        headline: The metric that the words are about.

    Returns:
        `path`.

    Raises:
        ValueError: If `rows` hold figures, but none of `method`; or the
            gallery's units differ.
        ChiasmError: If the file cannot be written.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    method = methods[0] if method is None and methods else method or ""
    naive = [name for name in methods if name != method] if naive is None else naive
    if rows and method not in methods:
        raise ValueError(f"no row is of the method {method!r} under judgement; there are {methods}")
    if len({case.unit for case in gallery}) > 1:
        raise ValueError("the gallery's cases must share one unit: they share one colour range")
    whole = [row for row in rows if not LESION.fullmatch(row.region)]
    comparisons = compare(whole, method=method, naive=naive, metric=headline)
    ranking = rank(whole, method=method, metric=headline)
    content = {
        "title": title,
        "asked": asked,
        "method": method,
        "verdict": _verdict(comparisons, _label(headline)),
        "findings": [_sentence(comparison) for comparison in comparisons],
        "caution": _caution(comparisons),
        "warnings": list(dict.fromkeys([*warnings, *_logged_warnings(history)])),
        "cases_figure": _cases_figure(whole, method, naive, headline),
        "summary": _summary_table(whole, method, naive),
        "per_case": _case_table(whole, method, comparisons, headline),
        "per_lesion": _lesion_table([row for row in rows if LESION.fullmatch(row.region)], method),
        "ranking": ranking,
        "curves": _curves(history),
        "health": _health(history),
        "gallery": _gallery(gallery, ranking),
        "reliability": _reliability(gallery),
        "facts": facts or {},
        "conventions": _conventions(rows),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (files("chiasm") / "pages" / "templates" / "report.html").read_text(encoding="utf-8")
    write_text(path, environment.from_string(template).render(content))
    return path


# ------------------------------------------------------------------ what was found, in words


class Comparison(NamedTuple):
    """The method against the best naive baseline, case by case, in one region.

    Attributes:
        region: Where.
        metric: Label of the figure compared, such as "MAE".
        baseline: The naive method with the best mean here.
        ours: Mean of the method over the cases that both have.
        theirs: Mean of the baseline over the same cases.
        unit: Of both.
        cases: How many cases both have.
        wins: In how many of them the method is better.
        better: Whether the method's mean is better.
        pairs: Case -> (the method's figure, the baseline's), means over folds and seeds.
    """

    region: str
    metric: str
    baseline: str
    ours: float
    theirs: float
    unit: str
    cases: int
    wins: int
    better: bool
    pairs: Mapping[str, tuple[float, float]]


def compare(rows: Sequence[Row], *, method: str, naive: Collection[str], metric: str = "mae") -> list[Comparison]:
    """Set a method beside the best naive baseline of each region, over the cases that both have.

    Args:
        rows: Figures of every method.
        method: The method under judgement.
        naive: Names of the naive baselines.
        metric: Which figure is compared; its direction is known, or lower is better.

    Returns:
        One comparison for each region, in the order of `rows`; none for a
        region where the method or every baseline has no finite figure.
    """
    label, direction = METRICS.get(metric, (metric, "lower"))
    sign = -1.0 if direction == "higher" else 1.0
    found = []
    for region in dict.fromkeys(row.region for row in rows):
        here = [row for row in rows if row.region == region and row.metric == metric and math.isfinite(row.value)]
        ours = _by_case(row for row in here if row.method == method)
        candidates = []
        for name in dict.fromkeys(row.method for row in here if row.method in naive):
            theirs = _by_case(row for row in here if row.method == name)
            pairs = {case: (ours[case], theirs[case]) for case in ours if case in theirs}
            if pairs:
                candidates.append((sign * float(np.mean([pair[1] for pair in pairs.values()])), name, pairs))
        if not candidates:
            continue
        _, name, pairs = min(candidates, key=lambda candidate: candidate[0])
        mine, other = (float(mean) for mean in np.mean(list(pairs.values()), axis=0))
        wins = sum(sign * a < sign * b for a, b in pairs.values())
        better = sign * mine < sign * other
        found.append(Comparison(region, label, name, mine, other, here[0].unit, len(pairs), wins, better, pairs))
    return found


def rank(rows: Sequence[Row], *, method: str, metric: str = "mae") -> dict[str, str] | None:
    """Name the best, the median and the worst case of a method in the first region of `rows`.

    Returns:
        "region", "metric", "best", "median", "worst" and the number of cases
        "n", for printing; None when there are no such figures.
    """
    mine = [row for row in rows if row.method == method and row.metric == metric and math.isfinite(row.value)]
    if not mine:
        return None
    figures = _by_case(row for row in mine if row.region == mine[0].region)
    label, direction = METRICS.get(metric, (metric, "lower"))
    ordered = sorted(figures, key=lambda case: (figures[case], case), reverse=direction == "higher")
    chosen = {"best": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[-1]}
    return {"region": mine[0].region, "metric": label, "n": str(len(ordered)), **chosen}


def _by_case(rows: Iterable[Row]) -> dict[str, float]:
    """Average over folds and seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.case, []).append(row.value)
    return {case: float(np.mean(found)) for case, found in values.items()}


def _verdict(comparisons: Sequence[Comparison], metric: str) -> str:
    if not comparisons:
        return "Nothing can be said: there is no figure of the method beside one of a naive baseline."
    ahead = [comparison.region for comparison in comparisons if comparison.better]
    behind = [comparison.region for comparison in comparisons if not comparison.better]
    if not behind:
        return f"Better than every naive baseline on average, by {metric}, in {_listed(ahead)}."
    if not ahead:
        return f"Not better than the best naive baseline, by {metric}, in any region: {_listed(behind)}."
    return f"By {metric}, better than every naive baseline on average in {_listed(ahead)}, not in {_listed(behind)}."


def _sentence(comparison: Comparison) -> dict[str, str]:
    """Put a comparison into words; "tone" says whether they are good, mixed or bad news."""
    c = comparison
    largest = max(abs(c.ours), abs(c.theirs))
    ours, theirs = _figure(c.ours, like=largest), _figure(c.theirs, like=largest)
    unit = f"{HARD_SPACE}{c.unit}" if _unit(c.unit) else ""
    change = c.ours - c.theirs
    size = f"{100 * abs(change / c.theirs):.1f}{HARD_SPACE}%" if c.theirs else f"{_figure(abs(change))}{unit}"
    direction = "the same" if change == 0 else f"{size} {'higher' if change > 0 else 'lower'}"
    word = "better" if c.better else ("no better" if change == 0 else "worse")
    cases = "in the only case" if c.cases == 1 else f"better in {c.wins} of {c.cases} cases"
    majority = c.wins * 2 > c.cases
    tone = "good" if c.better and majority else ("mixed" if c.better or majority else "bad")
    return {
        "region": c.region,
        "tone": tone,
        "word": word,
        "text": f"{c.metric} {ours} against {theirs}{unit} for {c.baseline}, the best naive baseline: "
        f"{direction} on average, {cases}.",
    }


def _caution(comparisons: Sequence[Comparison]) -> str:
    """Say what these figures are not."""
    fewest = min((comparison.cases for comparison in comparisons), default=0)
    few = f" With only {fewest} case{'s' * (fewest != 1)} a chance result is likely." if 0 < fewest <= FEW_CASES else ""
    return f"These are descriptions of the cases at hand, not tests of a hypothesis.{few}" if comparisons else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _logged_warnings(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say each logged warning once, with the last step at which it was given."""
    last = {str(line["message"]): line["step"] for line in history if line["kind"] == "warning"}
    return [f"In training, last at step {step}: {message}." for message, step in last.items()]


# ------------------------------------------------------------------ tables


class Cell(NamedTuple):
    """A figure or a word in a table: as shown, and as sorted."""

    text: str
    value: float | str
    strong: bool = False
    spread: str = ""


class Table(NamedTuple):
    """Column heads (label, note, whether of figures) and rows."""

    columns: list[tuple[str, str, bool]]
    rows: list[list[Cell]]


def _summary_table(rows: Sequence[Row], method: str, naive: Collection[str]) -> Table | None:
    """Metric x region, the method first and the naive baselines last; the best mean of a row is strong."""
    found = {(s.region, s.metric, s.method): s for s in summarise(rows)}
    if not found:
        return None
    methods = sorted(dict.fromkeys(row.method for row in rows), key=lambda name: (name != method, name in naive))
    columns = [("Region", "", False), ("Metric", "", False), ("n", "cases", True)]
    notes = dict.fromkeys(naive, "naive") | {method: "under judgement"}
    columns += [(name, notes.get(name, ""), True) for name in methods]
    table = []
    for region, metric in dict.fromkeys((row.region, row.metric) for row in rows):
        here = {name: found.get((region, metric, name)) for name in methods}
        label, direction = METRICS.get(metric, (metric, "neither"))
        unit = next(row.unit for row in rows if (row.region, row.metric) == (region, metric))
        means = {name: s.mean for name, s in here.items() if s is not None and math.isfinite(s.mean)}
        pick = {"lower": min, "higher": max}.get(direction)
        best = pick(means.values()) if pick and means else math.nan
        arrow = {"lower": " ↓", "higher": " ↑"}.get(direction, "")
        n = max((s.n for s in here.values() if s is not None), default=0)
        cells = [Cell(region, region), Cell(f"{label}{arrow}", label, spread=_unit(unit)), Cell(str(n), n)]
        like = max(map(abs, means.values()), default=1.0)
        for name in methods:
            s = here[name]
            if s is None or not math.isfinite(s.mean):
                cells.append(Cell("–", math.inf))
            else:
                spread = f"±{HARD_SPACE}{_figure(s.sd, like)}" if math.isfinite(s.sd) else ""
                cells.append(Cell(_figure(s.mean, like), s.mean, s.mean == best, spread))
        table.append(cells)
    return Table(columns, table)


def _case_table(rows: Sequence[Row], method: str, comparisons: Sequence[Comparison], headline: str) -> Table | None:
    """Every case of the method, and in the last column the best naive baseline's headline figure."""
    mine = [row for row in rows if row.method == method]
    if not mine:
        return None
    metrics = list(dict.fromkeys(row.metric for row in mine))
    values = {(row.case, row.region, row.fold, row.seed, row.metric): row.value for row in mine}
    likes = {metric: _typical(row.value for row in mine if row.metric == metric) for metric in metrics}
    naive = {c.region: c.pairs for c in comparisons}
    varied = [len({row.fold for row in mine}) > 1, len({row.seed for row in mine}) > 1]
    columns = [("Case", "", False), ("Region", "", False)]
    columns += [(label, "", True) for label, varies in zip(("Fold", "Seed"), varied) if varies]
    columns += _metric_columns(mine, metrics)
    if naive:
        columns.append((f"{_label(headline)}, naive", "best baseline of the region", True))
    table = []
    for case, region, fold, seed in dict.fromkeys((row.case, row.region, row.fold, row.seed) for row in mine):
        cells = [Cell(case, case), Cell(region, region)]
        cells += [Cell(str(number), number) for number, varies in zip((fold, seed), varied) if varies]
        found = {metric: values.get((case, region, fold, seed, metric), math.nan) for metric in metrics}
        cells += [_number(value, likes[metric]) for metric, value in found.items()]
        if naive:
            pair = naive.get(region, {}).get(case, (math.nan, math.nan))
            cells.append(_number(pair[1], likes.get(headline)))
        table.append(cells)
    return Table(columns, table)


def _lesion_table(rows: Sequence[Row], method: str) -> list[tuple[str, Table]]:
    """Single lesions of the method, grouped by size, the smallest first; one group where sizes are unknown."""
    mine = [row for row in rows if row.method == method]
    metrics = [metric for metric in dict.fromkeys(row.metric for row in mine) if metric != "volume_ml"]
    likes = {metric: _typical(row.value for row in mine if row.metric == metric) for metric in metrics}
    lesions: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in mine:
        lesions.setdefault((row.case, row.region), {}).setdefault(row.metric, []).append(row.value)
    groups: dict[str, list[list[Cell]]] = {label: [] for label in (*(label for _, label in SIZES_ML), UNKNOWN_SIZE)}
    for (case, region), found in sorted(lesions.items(), key=lambda item: item[1].get("volume_ml", [math.inf])[0]):
        volume = found.get("volume_ml", [math.nan])[0]
        group = next((label for most, label in SIZES_ML if volume < most), UNKNOWN_SIZE)
        figures = [_number(float(np.mean(found.get(metric, math.nan))), likes[metric]) for metric in metrics]
        groups[group].append([Cell(case, case), Cell(region, region), _number(volume), *figures])
    columns = [("Case", "", False), ("Lesion", "", False), ("Volume", "mL", True), *_metric_columns(mine, metrics)]
    return [(label, Table(columns, cells)) for label, cells in groups.items() if cells]


def _conventions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every convention in use, with the metrics it governs."""
    used: dict[str, dict[str, None]] = {}
    for row in rows:
        used.setdefault(str(row.convention), {})[_label(row.metric)] = None
    return [(convention, ", ".join(metrics)) for convention, metrics in used.items()]


def _metric_columns(rows: Sequence[Row], metrics: Sequence[str]) -> list[tuple[str, str, bool]]:
    units = {row.metric: row.unit for row in rows}
    return [(_label(metric), _unit(units[metric]), True) for metric in metrics]


def _number(value: float, like: float | None = None) -> Cell:
    return Cell(_figure(value, like), value) if math.isfinite(value) else Cell("–", math.inf)


def _typical(values: Iterable[float]) -> float:
    """Find the size of a column's figures, so that all are shown with the same decimals."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    return float(np.median(sizes)) if sizes else 1.0


def _label(metric: str) -> str:
    return METRICS[metric][0] if metric in METRICS else metric


def _figure(value: float, like: float | None = None) -> str:
    """Show about three significant digits, with as many decimals as `like` would have."""
    size = abs(value if like is None else like)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    if 0 < size < 0.1:
        decimals = min(6, 2 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}".replace("-", "−")


def _unit(unit: str) -> str:
    return "" if unit in ("", "1") else unit


# ------------------------------------------------------------------ training


class Panel(NamedTuple):
    """One figure of curves: series are label -> (kind of line, names under which the figure may stand)."""

    title: str
    note: str
    series: Mapping[str, tuple[str, tuple[str, ...]]]
    limits: tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    level: float | None = None


PANELS = (
    Panel(
        "Validation error",
        "Mean absolute error on validation cases in normalised units; the network must come below the look-up.",
        {
            "mask": ("validation", ("mae",)),
            "lesions": ("validation", ("lesion_mae",)),
            "look-up (naive)": ("validation", ("lookup_mae",)),
        },
    ),
    Panel(
        "What the generator is asked for",
        "Its loss on training patches: fidelity to the target, and what the discriminators add.",
        {
            "reconstruction": ("step", ("reconstruction",)),
            "adversarial": ("step", ("adversarial",)),
            "adversarial, global": ("step", ("adversarial_global",)),
            "adversarial, local": ("step", ("adversarial_local",)),
        },
    ),
    Panel(
        "Discriminators: accuracy",
        "Share of real and synthetic told apart: 0.5 is guessing, 1 is knowing all; in the band they teach.",
        {"global": ("step", ("accuracy_global",)), "local": ("step", ("accuracy_local",))},
        limits=(0.4, 1.02),
        band=HEALTHY_ACCURACY,
    ),
    Panel(
        "Discriminators: loss",
        "Of telling real from synthetic; 1.39 is guessing.",
        {
            "global": ("step", ("discriminator_global", "global_judge_loss")),
            "local": ("step", ("discriminator_local", "local_judge_loss")),
        },
        level=2 * math.log(2),
    ),
    Panel(
        "Does the doubt know where the error is?",
        "Rank correlation of the doubt with the true error (0 is no knowledge), and AUROC (0.5 is no knowledge).",
        {
            "correlation": ("validation", ("spearman",)),
            "with smoothed error": ("validation", ("spearman_smoothed",)),
            "AUROC worst tenth": ("validation", ("auroc_worst",)),
            "AUROC lesion": ("validation", ("auroc_lesion",)),
        },
        level=0.0,
    ),
    Panel(
        "What the attention does",
        "How much more lesions weigh than healthy tissue (1 is no attention), and how far it is switched on.",
        {
            "lesion : healthy": ("validation", ("weight_ratio",)),
            "strength": ("step", ("attention_strength",)),
        },
        level=1.0,
    ),
)


def _curves(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Draw each panel that has at least one curve of two points."""
    drawn = []
    for panel in PANELS:
        series = {label: _series(history, kind, names) for label, (kind, names) in panel.series.items()}
        series = {label: points for label, points in series.items() if len(points) > 1}
        if series:
            alt = f"{panel.title} over training steps. " + " ".join(
                f"{label}: from {_figure(points[0, 1])} to {_figure(points[-1, 1])}."
                for label, points in series.items()
            )
            drawn.append({"title": panel.title, "note": panel.note, "svg": _draw_curves(panel, series, alt)})
    return drawn


def _series(history: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Collect (step, value) pairs, averaged in blocks when they are many, shape (points, 2)."""
    found = [
        (float(line["step"]), float(line[name]))
        for line in history
        if line["kind"] == kind
        for name in names
        if line.get(name) is not None and math.isfinite(line[name])
    ]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    blocks = np.array_split(points, MOST_POINTS) if len(points) > MOST_POINTS else points[:, None]
    return np.array([block.mean(axis=0) for block in blocks]).reshape(-1, 2)


def _draw_curves(panel: Panel, series: Mapping[str, NDArray[np.float64]], alt: str) -> str:
    def draw(axes: Any) -> None:
        if panel.band:
            axes.axhspan(*panel.band, color=BAND, linewidth=0)
        if panel.level is not None:
            axes.axhline(panel.level, color=MUTED, linewidth=0.8)
        for (label, points), colour, dash in zip(series.items(), SERIES, DASHES):
            marker = "o" if len(points) <= 20 else None
            axes.plot(
                *points.T, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, label=label
            )
        axes.set_xlabel("step")
        if panel.limits:
            axes.set_ylim(*panel.limits)
        elif min(points[:, 1].min() for points in series.values()) >= 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        if len(series) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, labelcolor=INK, handlelength=2.6)
        else:
            axes.set_title(next(iter(series)), loc="left", color=INK, fontsize=9)

    return _svg(draw, alt, (4.4, 3.0), panel.title)


def _health(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Say how the discriminators and the attention fared, as sentences with a tone."""
    told: list[dict[str, str]] = []

    def say(tone: str, text: str) -> None:
        told.append({"tone": tone, "text": text})

    for name in ("global", "local"):
        accuracy = _last(history, f"accuracy_{name}")
        if accuracy is None:
            continue
        lowest, highest = HEALTHY_ACCURACY
        if accuracy < lowest:
            say("mixed", f"The {name} discriminator ended near guessing (accuracy {accuracy:.2f}): it taught little.")
        elif accuracy > highest:
            say("mixed", f"The {name} discriminator ended saturated (accuracy {accuracy:.2f}): it was never fooled.")
        else:
            say("good", f"The {name} discriminator ended in its working range (accuracy {accuracy:.2f}).")
    rho, ratio = _last(history, "spearman_smoothed", "spearman"), _last(history, "weight_ratio")
    if rho is not None and rho <= 0:
        say("bad", f"The attention is inverted: its doubt does not rise with the error (rank correlation {rho:.2f}).")
    elif rho is not None:
        say(
            "good",
            f"The local discriminator’s doubt rises with the error (rank correlation {rho:.2f}).",
        )
    if ratio is not None and abs(ratio - 1) <= FLAT_RATIO:
        say("bad", f"The attention is inactive on lesions: they weigh {ratio:.2f} times as much as healthy tissue.")
    elif ratio is not None and ratio < 1:
        say("bad", f"The attention is inverted on lesions: they weigh {ratio:.2f} times as much as healthy tissue.")
    elif ratio is not None:
        say("good", f"By the doubt, lesions weigh {ratio:.2f} times as much as healthy tissue.")
    strength = [line["attention_strength"] for line in history if line.get("attention_strength") is not None]
    if strength and not any(strength):
        say("bad", "The attention was never switched on: its health gate stayed closed.")
    elif strength and (closed := strength.count(0) / len(strength)) > 0.1:
        say("mixed", f"The health gate kept the attention off in {100 * closed:.0f} % of its logged steps.")
    return told


def _last(history: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    """Find the last finite figure under any of `names`, in the order of preference."""
    for name in names:
        for line in reversed(history):
            if line.get(name) is not None and math.isfinite(line[name]):
                return float(line[name])
    return None


# ------------------------------------------------------------------ figures


def _svg(draw: Any, alt: str, size: tuple[float, float], name: str) -> str:
    """Draw on axes and return SVG that takes its colours and its font from the page.

    Ids are made unique by `name`, so that several figures can share a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    look = {
        "svg.hashsalt": "chiasm",
        "svg.fonttype": "none",
        "text.parse_math": False,  # names may hold dollars
        "font.size": 9,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    drawn = io.StringIO()
    with matplotlib.rc_context(look), catch_warnings():
        filterwarnings("ignore", message="Glyph .* missing from font")  # the page's font draws them
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    body = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name.lower()).strip("-")

    def fit(tag: re.Match[str]) -> str:
        """Change a tag, never the words between tags, which come from file names."""
        fitted = re.sub(r'\bid="', f'id="{prefix}-', tag[0])
        fitted = fitted.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
        fitted = re.sub(r"font-family: [^;\"]*", "font-family: inherit", fitted)
        return re.sub("#0[0-9a-f]{5}", lambda colour: f"var({PAGE_COLOURS[colour[0]]})", fitted)

    body = re.sub(r"<[^>]+>", fit, body)
    width, height = (72 * side for side in size)
    label = html.escape(alt, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">{body}'


def _cases_figure(rows: Sequence[Row], method: str, naive: Collection[str], metric: str) -> dict[str, str] | None:
    """Draw every case as a dot and every mean as a bar: one line for each region and method."""
    here = [row for row in rows if row.metric == metric and math.isfinite(row.value)]
    methods = sorted(dict.fromkeys(row.method for row in here), key=lambda name: (name != method, name in naive))
    lines: list[tuple[str, str, list[float]]] = []
    for region in dict.fromkeys(row.region for row in here):
        for name in methods:
            figures = _by_case(row for row in here if row.region == region and row.method == name)
            if figures:
                lines.append((region, name, list(figures.values())))
    if not lines:
        return None
    label = _label(metric)
    places, place, last = [], 0.0, lines[0][0]
    for region, _, _ in lines:
        place += 0.7 * (region != last)
        places.append(place)
        place, last = place + 1, region

    def draw(axes: Any) -> None:
        for y, (_, name, values) in zip(places, lines):
            colour = SERIES[0] if name == method else MUTED
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.55, markersize=4.5, markeredgewidth=0)
            axes.plot([np.mean(values)] * 2, [y - 0.34, y + 0.34], color=colour, linewidth=2.2)
        axes.set_yticks(places, [f"{_short(region)} · {_short(name)}" for region, name, _ in lines])
        for tick, (_, name, _) in zip(axes.get_yticklabels(), lines):
            tick.set_color(INK if name == method else MUTED)
        axes.set_ylim(places[-1] + 0.7, -0.7)
        axes.set_xlim(left=0 if min(min(values) for *_, values in lines) >= 0 else None)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{label} ({here[0].unit})" if _unit(here[0].unit) else label)

    alt = f"{label} of every case. " + " ".join(
        f"{region}, {name}: mean {_figure(float(np.mean(values)))}, {_figure(min(values))} to {_figure(max(values))}."
        for region, name, values in lines
    )
    return {"metric": label, "svg": _svg(draw, alt, (9.6, 0.75 + 0.25 * (places[-1] + 1)), "every case")}


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _reliability(gallery: Sequence[GalleryCase]) -> dict[str, Any] | None:
    """Set the reliability map against the true error, by tenths of the map and by region."""
    shown = [case for case in gallery if case.reliability is not None and case.real is not None]
    pooled: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    for case in shown:
        lesion = np.zeros_like(case.mask) if case.lesion is None else case.lesion
        for region, where in (("outside lesions", case.mask & ~lesion), ("lesions", case.mask & lesion)):
            if np.count_nonzero(where) >= BINS:
                expected, real, synthetic = (_sample(v, where) for v in (case.reliability, case.real, case.synthetic))
                pooled.setdefault(region, []).append((expected, np.abs(synthetic - real)))
    if not pooled:
        return None
    if "lesions" not in pooled:
        pooled = {"mask": pooled["outside lesions"]}  # nothing is labelled: "outside lesions" would claim too much
    curves, words = {}, []
    for region, parts in pooled.items():
        expected, error = (np.concatenate(side) for side in zip(*parts))
        tenths = np.array_split(np.argsort(expected, kind="stable"), BINS)
        curves[region] = np.array([(expected[tenth].mean(), error[tenth].mean()) for tenth in tenths])
        ratio = error.mean() / expected.mean() if expected.mean() > 0 else math.inf
        manner = "understates" if ratio > 1.1 else "overstates" if ratio < 0.9 else "meets"
        figures = f"{_figure(expected.mean())} expected, {_figure(error.mean())} found ({ratio:.2f} times)"
        words.append(f"{PLACES[region]} the map {manner} the error: {figures}.")
    unit = f" ({shown[0].unit})" if _unit(shown[0].unit) else ""

    def draw(axes: Any) -> None:
        most = max(curve.max() for curve in curves.values()) * 1.06
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8)
        for (region, curve), colour, dash in zip(curves.items(), SERIES, DASHES):
            axes.plot(*curve.T, color=colour, linestyle=dash, linewidth=1.7, marker="o", markersize=4, label=region)
        axes.set(xlim=(0, most), ylim=(0, most), xlabel=f"expected error{unit}", ylabel=f"true error{unit}")
        axes.grid(axis="x")
        axes.legend(loc="upper left", labelcolor=INK, handlelength=2.6)

    alt = "True error against the error that the reliability map expects, by tenths of the map. " + " ".join(words)
    svg = _svg(draw, alt, (4.8, 4.2), "reliability")
    return {"svg": svg, "words": words, "cases": [case.case for case in shown]}


def _sample(volume: NDArray[Any] | None, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Take evenly spread voxels of a region, at most `SAMPLE` or a few more."""
    places = np.flatnonzero(where)
    places = places[:: max(1, len(places) // SAMPLE)]
    return np.asarray(np.ravel(np.asarray(volume))[places], dtype=np.float64)


# ------------------------------------------------------------------ pictures


class Picture(NamedTuple):
    """One slice as a PNG in the page: label, address, alternative text."""

    label: str
    address: str
    alt: str


def _gallery(gallery: Sequence[GalleryCase], ranking: Mapping[str, str] | None) -> dict[str, Any]:
    """Cut slices and colour them: one range for error and reliability in all cases."""
    most = _error_range(gallery)
    cases: list[dict[str, Any]] = []
    for case in gallery:
        box = _box(case.mask)
        size = [side.stop - side.start for side in box]
        planes = []
        for axis, name in ((2, "axial"), (1, "coronal")):
            index = _most_telling(case, axis)
            across, up = 0, 3 - axis  # I runs across, J (axial) or K (coronal) runs up
            planes.append(
                {
                    "name": name,
                    "place": f"{name}, slice {index + 1} of {case.mask.shape[axis]}",
                    "pictures": _pictures(case, axis, index, box, most),
                    "outline": _outline(case, axis, index, box),
                    "size": (size[across], size[up]),
                    "ratio": f"{size[across] * case.spacing_mm[across]:.4g} / {size[up] * case.spacing_mm[up]:.4g}",
                    "top": "A" if axis == 2 else "S",
                }
            )
        cases.append(
            {
                "case": case.case,
                "places": [place for place in BEST_TO_WORST if ranking and ranking[place] == case.case],
                "caption": case.caption,
                "planes": planes,
                "bars": _bars(case, most),
                "missing": _missing(case),
            }
        )
    return {"cases": cases, "has_outline": any(plane["outline"] for case in cases for plane in case["planes"])}


def _missing(case: GalleryCase) -> list[str]:
    absent = []
    if case.real is None:
        absent.append("There is no real image of this case: neither it nor an error can be shown.")
    if case.reliability is None:
        absent.append("There is no reliability map of this case.")
    if case.lesion is None or not case.lesion.any():
        absent.append("No lesion is labelled in this case.")
    return absent


def _error_range(gallery: Sequence[GalleryCase]) -> float:
    """Find the highest shown error: nearly all voxels of nearly all cases lie below."""
    shown = []
    for case in (case for case in gallery if case.mask.any()):
        if case.real is not None:
            shown.append(np.abs(_sample(case.synthetic, case.mask) - _sample(case.real, case.mask)))
        if case.reliability is not None:
            shown.append(_sample(case.reliability, case.mask))
    most = max((float(np.quantile(values, COVERED)) for values in shown), default=1.0)
    digit = 10.0 ** (math.floor(math.log10(most)) - 1) if most > 0 else 1.0
    return math.ceil(most / digit) * digit if most > 0 else 1.0


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """Find the box around the mask, with a margin; the whole grid for an empty mask."""
    sides = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        first, last = (filled[0], filled[-1]) if len(filled) else (0, mask.shape[axis] - 1)
        sides.append(slice(max(0, int(first) - MARGIN), min(mask.shape[axis], int(last) + 1 + MARGIN)))
    return sides[0], sides[1], sides[2]


def _most_telling(case: GalleryCase, axis: int) -> int:
    """Choose the slice with most of the lesion inside the mask, else the one in the middle of the mask."""
    others = tuple({0, 1, 2} - {axis})
    if case.lesion is not None and (sick := case.lesion & case.mask).any():
        return int(np.argmax(np.count_nonzero(sick, axis=others)))
    below = np.cumsum(np.count_nonzero(case.mask, axis=others))
    return int(np.searchsorted(below, below[-1] / 2)) if below[-1] else int(case.mask.shape[axis]) // 2


def _plane(volume: NDArray[Any], axis: int, index: int, box: tuple[slice, slice, slice]) -> NDArray[Any]:
    """Cut a slice as a picture, rows from the top: front or head up, the patient's right on the left."""
    cut: NDArray[Any] = volume[box].take(index - box[axis].start, axis=axis)
    return cut[::-1, ::-1].T  # (I, J or K) -> (rows, columns)


def _pictures(case: GalleryCase, axis: int, index: int, box: tuple[slice, slice, slice], most: float) -> list[Picture]:
    plane = "axial" if axis == 2 else "coronal"

    def picture(label: str, volume: NDArray[Any], window: tuple[float, float], colours: str, inside: bool) -> Picture:
        values = _plane(volume, axis, index, box)
        shown = _plane(case.mask, axis, index, box) if inside else np.ones(values.shape, bool)
        return Picture(
            label, _png(values, window, colours, shown), f"{label}, {plane} slice {index + 1} of {case.case}"
        )

    pictures = [picture("source", case.source, _source_window(case), "gray", False)]
    if case.real is not None:
        pictures.append(picture("real", case.real, case.window, "gray", False))
    pictures.append(picture("synthetic", case.synthetic, case.window, "gray", False))
    if case.real is not None:
        error = np.abs(np.subtract(case.synthetic, case.real, dtype=np.float32))
        pictures.append(picture("|error|", error, (0, most), "inferno", True))
    if case.reliability is not None:
        pictures.append(picture("reliability", case.reliability, (0, most), "viridis", True))
    return pictures


def _bars(case: GalleryCase, most: float) -> list[dict[str, str]]:
    """Make a colour bar for each column of pictures, in the same order."""
    ramp = np.linspace(0, 1, 256)[None, :]
    kinds = [("gray", _source_window(case), "own units")]
    kinds += [("gray", case.window, _unit(case.unit))] * (1 if case.real is None else 2)
    kinds += [("inferno", (0.0, most), _unit(case.unit))] * (case.real is not None)
    kinds += [("viridis", (0.0, most), _unit(case.unit))] * (case.reliability is not None)
    return [
        {
            "address": _png(ramp, (0, 1), colours, np.ones(ramp.shape, bool)),
            "low": _figure(low, like=max(abs(low), abs(high))),
            "high": _figure(high, like=max(abs(low), abs(high))),
            "unit": unit,
        }
        for colours, (low, high), unit in kinds
    ]


def _source_window(case: GalleryCase) -> tuple[float, float]:
    """Show the source between two quantiles inside the mask; it has its own contrast."""
    inside = _sample(case.source, case.mask if case.mask.any() else np.ones_like(case.mask))
    low, high = (float(value) for value in np.quantile(inside, SOURCE_WINDOW))
    return (low, high) if low < high else (low, low + 1.0)


def _png(values: NDArray[Any], window: tuple[float, float], colours: str, shown: NDArray[np.bool_]) -> str:
    """Colour a slice and return it as an address; what is not `shown` (or not finite) stays transparent."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    step = math.ceil(max(values.shape) / MOST_PIXELS)
    values, shown = values[::step, ::step], shown[::step, ::step] & np.isfinite(values[::step, ::step])
    low, high = window
    scaled = np.clip((np.where(shown, values, low) - low) / (high - low), 0, 1)
    pixels = colormaps[colours](scaled, bytes=True)  # (rows, columns, 4)
    pixels[~shown] = 0
    written = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}  # the same bytes whatever wrote them
    imsave(written, pixels, format="png", metadata=nothing)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def _outline(case: GalleryCase, axis: int, index: int, box: tuple[slice, slice, slice]) -> str:
    """Trace the lesion as an SVG path in voxels of the picture; empty without a lesion in the slice."""
    from matplotlib.figure import Figure

    if case.lesion is None:
        return ""
    inside = np.pad(_plane(case.lesion, axis, index, box), 1).astype(np.float32)
    if not inside.any():
        return ""
    contour = Figure().subplots().contour(inside, levels=[0.5])
    polygons = [np.asarray(polygon) for path in contour.get_paths() for polygon in path.to_polygons(closed_only=False)]
    return "".join("M" + " ".join(f"{x - 0.5:.1f},{y - 0.5:.1f}" for x, y in polygon) for polygon in polygons)
