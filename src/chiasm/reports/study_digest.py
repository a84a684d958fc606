"""A study's findings for a document: Markdown tables, and its figures as files that stand alone.

The page of `findings` is for looking; this is for quoting.  Both are made from
the same files, so a results page can be checked against the command that made it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from chiasm.evaluation.statistics import Comparison, Summary, stays_within
from chiasm.outputs import refuse_links
from chiasm.reports.drawing import show_figure, show_metric
from chiasm.reports.study_page import HEALTHY, MARGIN, Findings, draw_forest, draw_plane, draw_rivals, rival_table
from chiasm.storage import make_folder, write_text

SHOWN = (("mask", "mae"), ("mask", "ssim"), ("mask", "psnr"), (HEALTHY, "mae"))  # and MAE in every lesion region


def write_digest(folder: Path, found: Findings) -> Path:
    """Write `findings.md` and `figures/*.svg` beside a study's page; return the former.

    Raises:
        ChiasmError: If the folder cannot be written, or `figures` is a link.
    """
    refuse_links(folder, ["figures"])
    make_folder(folder / "figures")
    declared = [one for one in found.comparisons if one.primary]
    lesion = declared[0].region if declared else next(iter(found.regions), "mask")
    plane, rivals = draw_plane(found.comparisons, lesion), draw_rivals(found.rivals)
    figures = {
        "plane": plane["svg"] if plane else None,
        "forest": draw_forest(found.comparisons, list(dict.fromkeys([lesion, HEALTHY, "mask"]))),
        "calibration": rivals["curve"] if rivals else None,
        "coverage": rivals["risk"] if rivals else None,
    }
    for name, svg in figures.items():
        path = folder / "figures" / f"{name}.svg"
        if svg is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, stand_alone(svg))
    write_text(folder / "findings.md", "\n".join(_lines(found, declared, lesion)) + "\n")
    return folder / "findings.md"


def stand_alone(svg: str) -> str:
    """Give a page's figure the page's light colours and a ground, so that it can be shown by itself."""
    style = (files("chiasm") / "reports/templates/base.html").read_text(encoding="utf-8")
    colours = re.search(r":root \{(.*?)\}", style, re.DOTALL)
    assert colours is not None
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    look = f"<style>svg {{{' '.join(colours[1].split())} font-family: sans-serif}}</style>"
    opening, rest = svg.split(">", 1)
    return f"{head}{opening.removeprefix('<svg')}>{look}{ground}{rest}\n"


def _lines(found: Findings, declared: Sequence[Comparison], lesion: str) -> Iterator[str]:
    yield from (f"- {one.verdict}" for one in declared)
    guarded = {(one.arm, one.against) for one in declared}
    guards = [one for one in found.comparisons if one.region == HEALTHY and one.metric == "mae"]
    yield from (f"- {stays_within(one, MARGIN)}" for one in guards if (one.arm, one.against) in guarded)
    yield ""
    yield from _summary(found.summaries, found)
    yield ""
    yield from _differences(found.comparisons, lesion)
    if (table := rival_table(found.rivals)) is not None:
        yield ""
        heads = [f"{label} {note}".strip() for label, note, _ in table.columns]
        yield from _table(heads, [[cell.text for cell in row] for row in table.rows])


def _summary(summaries: Sequence[Summary], found: Findings) -> Iterator[str]:
    """A line for each method: means over subjects, plus or minus the SD over seeds."""
    values = {(one.method, one.region, one.metric): one for one in summaries}
    shown = [*SHOWN, *((region, "mae") for region in found.regions), ("edges", "mae")]
    shown = [pair for pair in shown if any((one.region, one.metric) == pair for one in summaries)]
    there = dict.fromkeys(one.method for one in summaries)
    methods = [*(arm for arm in found.arms if arm in there), *(name for name in there if name not in found.arms)]
    heads = ["method"]
    for region, metric in shown:
        subjects = max(one.subjects for one in summaries if (one.region, one.metric) == (region, metric))
        heads.append(f"{region} {show_metric(metric)} (n = {subjects})")
    rows = []
    for method in methods:
        row = [f"{method}: {found.arms[method]}" if method in found.arms else f"{method} (naive)"]
        for pair in shown:
            one = values.get((method, *pair))
            if one is None or not math.isfinite(one.mean):
                row.append("–")
            elif method in found.arms and math.isfinite(one.sd_seeds):
                row.append(f"{show_figure(one.mean)} ± {one.sd_seeds:.2g}")
            else:
                row.append(show_figure(one.mean))
        rows.append(row)
    yield from _table(heads, rows)


def _differences(comparisons: Sequence[Comparison], lesion: str) -> Iterator[str]:
    """A line for each pair: MAE in lesions and in healthy tissue, in percent of the other's."""
    pairs = dict.fromkeys((one.arm, one.against) for one in comparisons if one.metric == "mae")
    values = {(one.arm, one.against, one.region): one for one in comparisons if one.metric == "mae"}
    heads = ["arm", "against"]
    for region in (lesion, HEALTHY):
        heads += [f"MAE in {region}, % (95 % interval)", "p (Holm)", "seeds lower"]
    rows = []
    for arm, against in pairs:
        row = [arm, against]
        for region in (lesion, HEALTHY):
            one = values.get((arm, against, region))
            row += ["–"] * 3 if one is None else _told(one)
        rows.append(row)
    yield from _table(heads, rows)


def _told(one: Comparison) -> list[str]:
    scale = 100 / abs(one.mean_against) if one.mean_against else math.nan
    primary = " (primary)" if one.primary else ""
    interval = f" ({one.low * scale:+.1f} to {one.high * scale:+.1f})" if math.isfinite(one.low * scale) else ""
    tested = f"{one.p_holm:.2g}" if math.isfinite(one.p_holm) else "not tested"
    return [f"{one.relative:+.1f}{interval}{primary}", tested, f"{one.seeds_lower} of {one.seeds}"]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    yield from (f"| {' | '.join(row)} |" for row in rows)
