"""Draw the method as `docs/pictures/method.svg`: who sees what, and how confidence becomes a weight and a map.

python docs/method_picture.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "pictures" / "method.svg"
WIDTH, HEIGHT = 920, 440
IMAGE, NETWORK, FORMULA = "#e8eef5", "#dbe7f3", "#fdf3dc"
TITLE = "The method: a generator, a global and a local discriminator, and what the local one's confidence is used for"


class Box(NamedTuple):
    """A box of the picture: where it stands and what it says, its first line in bold."""

    left: int
    top: int
    width: int
    height: int
    fill: str
    lines: tuple[str, ...]

    def at(self, side: str) -> tuple[float, float]:
        """Return the middle of a side: left, right, top or bottom."""
        across, down = self.left + self.width / 2, self.top + self.height / 2
        return {
            "left": (self.left, down),
            "right": (self.left + self.width, down),
            "top": (across, self.top),
            "bottom": (across, self.top + self.height),
        }[side]


BOXES = {
    "x": Box(10, 150, 130, 60, IMAGE, ("source x", "the scan you have")),
    "G": Box(180, 150, 130, 60, NETWORK, ("generator G", "residual U-Net")),
    "ŷ": Box(350, 150, 160, 60, IMAGE, ("prediction ŷ = G(x)", "the synthetic image")),
    "y": Box(360, 290, 140, 60, IMAGE, ("target y", "the real image")),
    "D_g": Box(580, 40, 150, 60, NETWORK, ("global D_g", "is the whole real?")),
    "D_l": Box(580, 150, 150, 60, NETWORK, ("local D_l", "is each voxel right?")),
    "M": Box(770, 150, 140, 60, FORMULA, ("confidence M", "in [0, 1], a voxel")),
    "E": Box(770, 40, 140, 60, IMAGE, ("expected error", "1 − M, calibrated")),
    "F": Box(770, 270, 140, 60, FORMULA, ("weight F", "(1 − M)^β")),
    "L": Box(580, 350, 180, 60, FORMULA, ("reconstruction loss", "mean of w |y − ŷ|^p")),
}

#: From a side of a box to a side of another, and the corners between.
ARROWS: tuple[tuple[str, str, tuple[tuple[int, int], ...]], ...] = (
    ("x right", "G left", ()),
    ("G right", "ŷ left", ()),
    ("ŷ right", "D_l left", ()),
    ("ŷ top", "D_g left", ((430, 70),)),
    ("y right", "D_l bottom", ((655, 320),)),
    ("D_l right", "M left", ()),
    ("M top", "E bottom", ()),
    ("M bottom", "F top", ()),
    ("F bottom", "L right", ((840, 380),)),
    ("y bottom", "L left", ((430, 380),)),
    ("L bottom", "G bottom", ((670, 428), (245, 428))),
    ("D_g top", "G top", ((655, 18), (245, 18))),
)
NOTES = (
    (265, 420, "G lowers the loss, most where w = (1 − a) + a F is large"),
    (265, 34, "G lowers −log D_g and −log D_l"),
    (508, 312, "both see y too"),
)


def draw() -> str:
    """Return the picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{TITLE}" '
        'font-family="system-ui, sans-serif" font-size="13" text-anchor="middle">',
        f"<title>{TITLE}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#33526e"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *(_arrow(*arrow) for arrow in ARROWS),
        *(_box(box) for box in BOXES.values()),
        *(
            f'<text x="{x}" y="{y}" text-anchor="start" fill="#555" font-size="12">{escape(text)}</text>'
            for x, y, text in NOTES
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrow(start: str, end: str, corners: tuple[tuple[int, int], ...]) -> str:
    places = [BOXES[box].at(side) for box, side in (start.split(), end.split())]
    points = " ".join(f"{x:g},{y:g}" for x, y in (places[0], *corners, places[1]))
    return f'<polyline points="{points}" fill="none" stroke="#33526e" stroke-width="1.5" marker-end="url(#tip)"/>'


def _box(box: Box) -> str:
    middle = box.left + box.width / 2
    weights = (' font-weight="bold"', "")
    texts = [
        f'<text x="{middle:g}" y="{box.top + 25 + 19 * line}"{weights[line]}>{escape(words)}</text>'
        for line, words in enumerate(box.lines)
    ]
    return (
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="6" '
        f'fill="{box.fill}" stroke="#33526e"/>' + "".join(texts)
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
