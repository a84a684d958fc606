"""How scores are shown: numbers with suitable digits, plots in the page's colours."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import struct
import zlib
from typing import Any
from warnings import catch_warnings, filterwarnings

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes.streams import pack

HARD_SPACE = "\u00a0"

Points = NDArray[np.float64]  # of a curve, shape (points, 2)


# Plots are drawn in these colours and shown in the page's own, light or dark.
INK, MUTED, LINE, BAND = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))  # colour is never the only sign
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", LINE: "--line", BAND: "--band"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)
}


def show_number(value: float, like: float | None = None) -> str:
    """Show about three significant digits, with as many decimals as `like` would have."""
    size = abs(value if like is None else like)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    if 0 < size < 0.1:
        decimals = min(6, 2 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}".replace("-", "−")


def show_unit(unit: str) -> str:
    """Return a unit as text; empty for pure numbers."""
    return "" if unit in ("", "1") else unit


def with_unit(value: str, unit: str) -> str:
    """Append a unit to a shown number; pure numbers have none.

    >>> with_unit("3.1", "HU"), with_unit("0.9", "1")
    ('3.1 HU', '0.9')
    """
    return f"{value} {show_unit(unit)}".rstrip()


def label_with(label: str, detail: str) -> str:
    """Append a detail such as a unit to a label, in brackets; an empty detail adds nothing."""
    return f"{label} ({detail})" if detail else label


def shorten(name: str) -> str:
    """Cut a name that is too long for an axis."""
    return name if len(name) <= 24 else f"{name[:23]}…"


def png_address(pixels: NDArray[np.uint8]) -> str:
    """Return a picture, shape (rows, columns, 4), as an address for a page: a PNG in base64."""
    rows, columns = pixels.shape[:2]
    lines = np.zeros((rows, 1 + 4 * columns), np.uint8)  # each line begins with 0: no filter
    lines[:, 1:] = pixels.reshape(rows, -1)
    parts = (
        (b"IHDR", struct.pack(">2I5B", columns, rows, 8, 6, 0, 0, 0)),
        (b"IDAT", pack(lines.tobytes(), "zlib")),
        (b"IEND", b""),
    )
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")


def draw_svg(draw: Any, alt: str, size: tuple[float, float], name: str, columns: int = 1) -> str:
    """Draw on axes and return SVG that takes its colours and its font from the page.

    Ids are made unique by `name`, so that several plots can share a page.
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
        canvas = Figure(figsize=size, layout="constrained")
        draw(canvas.subplots(1, columns, sharey=columns > 1))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    body = re.sub(r"\s*<defs>\s*<style.*?</defs>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name.lower()).strip("-")

    def fit(tag: re.Match[str]) -> str:
        """Change only tags, not the text between them, which comes from file names."""
        fitted = re.sub(r'\bid="', f'id="{prefix}-', tag[0])
        fitted = fitted.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
        fitted = re.sub(r"font-family: [^;\"]*", "font-family: inherit", fitted)
        return re.sub("#0[0-9a-f]{5}", lambda colour: f"var({PAGE_COLOURS[colour[0]]})", fitted)

    body = re.sub(r"<[^>]+>", fit, body)
    width, height = (72 * side for side in size)
    label = html.escape(alt, quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">{body}'
