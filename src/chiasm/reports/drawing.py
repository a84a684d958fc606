"""How figures are shown: numbers with as many digits as they deserve, tables that sort, plots in the page's colours."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple
from warnings import catch_warnings, filterwarnings

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

HARD_SPACE = "\u00a0"

METRICS: dict[str, tuple[str, Literal["lower", "higher", "neither"]]] = {
    "mae": ("MAE", "lower"),
    "mae_mu": ("MAE of mu", "lower"),
    "rmse": ("RMSE", "lower"),
    "mse": ("MSE", "lower"),
    "nmse": ("NMSE", "lower"),
    "psnr": ("PSNR", "higher"),
    "ssim": ("SSIM", "higher"),
    "ms_ssim": ("MS-SSIM", "higher"),
    "ncc": ("NCC", "higher"),
    "bias": ("Bias", "neither"),
    "volume_ml": ("Volume", "neither"),
    "lesions": ("Lesions", "neither"),
    "too_small": ("Labelled components too small to be a lesion", "neither"),
}

# Figures are drawn in these colours and shown in the page's own, light or dark.
INK, MUTED, LINE, BAND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))  # colour is never the only sign
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line", BAND: "--band"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template of `reports/templates`; an unknown name in it is an error, and all text is escaped."""
    environment = Environment(
        loader=PackageLoader("chiasm", "reports/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


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


Tone = Literal["good", "mixed", "bad"]


class Remark(NamedTuple):
    """A sentence of a page, whether it is good, mixed or bad news, and what stands out before it."""

    tone: Tone
    text: str
    word: str = ""
    region: str = ""


def number_cell(value: float, like: float | None = None) -> Cell:
    """Show a figure in a table; one that is not finite as a dash that sorts last."""
    return Cell(show_figure(value, like), value) if math.isfinite(value) else Cell("–", math.inf)


def typical(values: Iterable[float]) -> float:
    """Find the size of a column's figures, so that all are shown with the same decimals."""
    sizes = [abs(value) for value in values if math.isfinite(value)]
    return float(np.median(sizes)) if sizes else 1.0


def show_metric(metric: str) -> str:
    """Say a metric's name as people know it."""
    return METRICS[metric][0] if metric in METRICS else metric


def show_figure(value: float, like: float | None = None) -> str:
    """Show about three significant digits, with as many decimals as `like` would have."""
    size = abs(value if like is None else like)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    if 0 < size < 0.1:
        decimals = min(6, 2 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}".replace("-", "−")


def show_unit(unit: str) -> str:
    """Say a unit; nothing for pure numbers."""
    return "" if unit in ("", "1") else unit


def shorten(name: str) -> str:
    """Cut a name that is too long for an axis."""
    return name if len(name) <= 24 else f"{name[:23]}…"


def draw_svg(draw: Any, alt: str, size: tuple[float, float], name: str, columns: int = 1) -> str:
    """Draw on axes and return SVG that takes its colours and its font from the page.

    Ids are made unique by `name`, so that several figures can share a page.
    With several `columns`, `draw` is given as many axes beside each other,
    which share their vertical axis.
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
        draw(figure.subplots(1, columns, sharey=columns > 1))
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
