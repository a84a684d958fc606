"""One case as one picture: source, real, synthetic, error and expected error of the slice that shows most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chiasm.reports.gallery import LESION, MASK, CutCase, CutPlane, PictureColumn, round_up
from chiasm.storage import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = 2.4  # width of a panel
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plane = next(plane for plane in case.planes if plane.name == "axial")
    width, height = (side * step for side, step in zip(plane.size, plane.spacing_mm))
    canvas = Figure(figsize=(INCHES * len(case.looks), INCHES * height / width + 0.3), facecolor="black")
    FigureCanvasAgg(canvas)
    for number, look in enumerate(case.looks):
        axes = canvas.add_axes((number / len(case.looks), 0, 1 / len(case.looks), 0.92))
        _draw_panel(axes, case, look, plane)
    with whole_file(path) as temporary:
        canvas.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    return path


def _draw_panel(axes: Axes, case: CutCase, look: PictureColumn, plane: CutPlane) -> None:
    """Draw a slice of a column, and the outline of lesions on it."""
    values, lesion = case.slices[f"{plane.name} {look.label}"], case.slices.get(f"{plane.name} {LESION}")
    if look.inside:
        values = np.where(case.slices[f"{plane.name} {MASK}"], values, 0)
    most = round_up(case.error_range or 0)
    least, largest = look.window or (0.0, most)
    aspect = plane.spacing_mm[1] / plane.spacing_mm[0]
    colours = COLOURS.get(look.colours, look.colours)
    axes.imshow(values, cmap=colours, vmin=least, vmax=largest, aspect=aspect)
    if lesion is not None and lesion.any():
        axes.contour(lesion.astype(float), levels=[0.5], colors="#f2c14e", linewidths=0.8)
    scale = "" if look.window else f", 0 to {most:.2g} {case.unit}"
    axes.set_title(f"{look.label.strip('|')}{scale}", color="white", fontsize=9)
    axes.set_axis_off()
