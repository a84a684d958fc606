"""One case as one picture: source, real, synthetic, error and expected error of the slice that shows most."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from chiasm.reports.gallery import LESION, MASK, CutCase, CutPlane, PictureColumn, round_up
from chiasm.storage import whole_file

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

WIDTH, HEAD = 264, 26  # pixels of a panel, and of the line of titles above it
LETTERS = 14  # pixels
OUTLINE = (242, 193, 78)  # of lesions
COLOURS = {"viridis": "inferno"}  # error and expected error stand beside each other, in one scale


def write_picture(path: Path, case: CutCase) -> Path:
    """Write a PNG of the axial slice that holds most of the lesion, or of the middle one.

    Real and synthetic share one window, error and expected error another.

    Args:
        path: Ends in .png.
        case: As in the report's gallery.

    Returns:
        `path`.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    from PIL import Image, ImageDraw

    plane = next(plane for plane in case.planes if plane.name == "axial")
    picture = Image.fromarray(np.hstack([_draw_panel(case, look, plane) for look in case.looks]))
    draw = ImageDraw.Draw(picture)
    for number, look in enumerate(case.looks):
        scale = "" if look.window else f", 0 to {round_up(case.error_range or 0):.2g} {case.unit}"
        place = WIDTH * (number + 0.5), HEAD / 2
        draw.text(place, f"{look.label.strip('|')}{scale}", "white", font=_font(), anchor="mm")
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


@cache
def _font() -> FreeTypeFont:
    """Return the font that comes with matplotlib."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), LETTERS)


def _draw_panel(case: CutCase, look: PictureColumn, plane: CutPlane) -> NDArray[np.uint8]:
    """Draw a slice of a column below a black line, with the outline of lesions on it, shape (rows, columns, 3)."""
    from matplotlib import colormaps
    from PIL import Image

    values, lesion = case.slices[f"{plane.name} {look.label}"], case.slices.get(f"{plane.name} {LESION}")
    if look.inside:
        values = np.where(case.slices[f"{plane.name} {MASK}"], values, 0)
    width, height = (side * step for side, step in zip(plane.size, plane.spacing_mm))
    size = WIDTH, max(1, round(WIDTH * height / width))
    low, high = look.window or (0.0, round_up(case.error_range or 0))
    fine = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colours = colormaps[COLOURS.get(look.colours, look.colours)]
    pixels: NDArray[np.uint8] = colours(np.clip((fine - low) / (high - low), 0, 1), bytes=True)[..., :3]
    if lesion is not None and lesion.any():
        pixels[
            _border(np.asarray(Image.fromarray(lesion.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0)
        ] = OUTLINE
    return np.pad(pixels, ((HEAD, 0), (0, 0), (0, 0)))


def _border(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of a region beside one that is not of it."""
    around = np.pad(inside, 1)
    core = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return inside & ~core
