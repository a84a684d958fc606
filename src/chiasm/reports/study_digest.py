"""A study's findings for a document: Markdown tables, and its plots as files that stand alone.

The page of `findings` is for looking; this is for quoting.  Both are made from
the same files, so a results page can be checked against the command that made it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import repeat
from pathlib import Path

from chiasm.evaluation.metric_table import find_metric
from chiasm.evaluation.statistics import Comparison, MethodSummary, stays_within
from chiasm.metrics.radiotherapy import TISSUES_HU
from chiasm.outputs import refuse_links
from chiasm.reports.drawing import show_number
from chiasm.reports.study_page import MARGIN, Findings, find_non_inferiority, seeds_sd, tabulate_maps
from chiasm.reports.study_plots import HEALTHY, draw_forest, draw_maps, draw_trade_off
from chiasm.reports.tables import NO_NUMBER, Cell, Column, PageTable, arrange, cell, to_markdown
from chiasm.storage import make_folder, write_text

SHOWN = (("mask", "mae"), ("mask", "ssim"), ("mask", "psnr"), (HEALTHY, "mae"))  # and MAE in every lesion region


def write_digest(folder: Path, found: Findings) -> Path:
    """Write `findings.md` and `plots/*.svg` beside a study's page; return the former.

    Raises:
        ChiasmError: If the folder cannot be written, or `plots` is a link.
    """
    refuse_links(folder, ["plots"])
    make_folder(folder / "plots")
    trade_off, maps = draw_trade_off(found.comparisons, found.lesion) or {}, draw_maps(found.baseline_maps) or {}
    plots = {
        "trade-off": trade_off.get("svg"),
        "forest": draw_forest(found.comparisons, found.shown_regions),
        "calibration": maps.get("curve"),
        "coverage": maps.get("risk"),
    }
    for name, svg in plots.items():
        path = folder / "plots" / f"{name}.svg"
        if svg is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, stand_alone(svg))
    write_text(folder / "findings.md", "\n".join(_lines(found)) + "\n")
    return folder / "findings.md"


def stand_alone(svg: str) -> str:
    """Give a page's plot the page's light colours and a ground, so that it can be shown by itself."""
    style = (files("chiasm") / "reports/templates/base.html").read_text(encoding="utf-8")
    colours = re.search(r":root \{(.*?)\}", style, re.DOTALL)
    assert colours is not None
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    look = f"<style>svg {{{' '.join(colours[1].split())} font-family: sans-serif}}</style>"
    opening, rest = svg.split(">", 1)
    return f"{head}{opening.removeprefix('<svg')}>{look}{ground}{rest}\n"


def _lines(found: Findings) -> Iterator[str]:
    """Write what is claimed, then the tables, an empty line before each."""
    yield from (f"- {one.verdict}" for one in found.declared)
    yield from (f"- {stays_within(one, MARGIN)}" for one in find_non_inferiority(found))
    whole = [*SHOWN, *zip(found.regions, repeat("mae")), ("edges", "mae")]
    tables = (
        _tabulate_methods(found, whole),
        _tabulate_methods(found, [*zip(TISSUES_HU, repeat("mae"))]),  # where the target is a CT
        _tabulate_differences(found),
        tabulate_maps(found.baseline_maps),
    )
    for table in filter(None, tables):
        yield ""
        yield from to_markdown(table)


def _tabulate_methods(found: Findings, shown: Sequence[tuple[str, str]]) -> PageTable | None:
    """Give a line to each method: means over subjects, plus or minus the SD over seeds; None if nothing is known."""
    scores = arrange(((one.region, one.metric), one.method, one) for one in found.summaries)
    columns = {name: scores[name] for name in shown if name in scores}
    if not columns:
        return None
    heads = [_score_column(*name, here.values()) for name, here in columns.items()]
    rows = [_method_line(found, method, columns.values()) for method in found.methods]
    return PageTable("", [Column("method"), *heads], rows)


def _score_column(region: str, metric: str, summaries: Iterable[MethodSummary]) -> Column:
    most = max(one.subjects for one in summaries)
    return Column(f"{region} {find_metric(metric).label}", f"(n = {most})", True)


def _method_line(found: Findings, method: str, columns: Iterable[Mapping[str, MethodSummary]]) -> list[Cell]:
    return [cell(_method_in_words(found, method)), *(_mean_cell(found, here.get(method)) for here in columns)]


def _method_in_words(found: Findings, method: str) -> str:
    return f"{method}: {found.arms[method]}" if method in found.arms else f"{method} (naive)"


def _mean_cell(found: Findings, one: MethodSummary | None) -> Cell:
    if one is None or not math.isfinite(one.mean):
        return NO_NUMBER
    sd = seeds_sd(found, one)
    return Cell(f"{show_number(one.mean)}{f' ± {sd:.2g}' if math.isfinite(sd) else ''}", one.mean)


def _tabulate_differences(found: Findings) -> PageTable:
    """Give a line to each pair: MAE in lesions and in healthy tissue, in percent of the other's."""
    lines = arrange(((one.arm, one.against), one.region, one) for one in found.comparisons if one.metric == "mae")
    columns = [Column("method"), Column("against")]
    for region in (found.lesion, HEALTHY):
        columns += [Column(f"MAE in {region}, % (95 % interval)"), Column("p (Holm)"), Column("seeds lower")]
    rows = [
        [cell(arm), cell(against), *_difference_cells(here.get(found.lesion)), *_difference_cells(here.get(HEALTHY))]
        for (arm, against), here in lines.items()
    ]
    return PageTable("", columns, rows)


def _difference_cells(one: Comparison | None) -> list[Cell]:
    if one is None:
        return [NO_NUMBER] * 3
    _, low, high = one.percent
    primary = " (primary)" if one.primary else ""
    interval = f" ({low:+.1f} to {high:+.1f})" if math.isfinite(low) else ""
    tested = f"{one.p_holm:.2g}" if math.isfinite(one.p_holm) else "not tested"
    return [cell(f"{one.relative:+.1f}{interval}{primary}"), cell(tested), cell(f"{one.seeds_lower} of {one.seeds}")]
