"""One case as one picture: source, real, synthetic, error and expected error of the slice that shows most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.reports.gallery import COVERED, SOURCE_WINDOW, GalleryCase
from chiasm.storage import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = 2.4  # width of a panel


def write_picture(path: Path, case: GalleryCase) -> Path:
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

    panels = _panels(case)
    height, width = case.mask.shape[1] * case.spacing_mm[1], case.mask.shape[0] * case.spacing_mm[0]
    canvas = Figure(figsize=(INCHES * len(panels), INCHES * height / width + 0.3), facecolor="black")
    FigureCanvasAgg(canvas)
    for number, panel in enumerate(panels):
        axes = canvas.add_axes((number / len(panels), 0, 1 / len(panels), 0.92))
        _draw_panel(axes, panel, case, _slice(case))
    with whole_file(path) as temporary:
        canvas.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    return path


class _PicturePanel(NamedTuple):
    """One panel of a picture: what stands above it, which volume, in which colours and window."""

    name: str
    volume: NDArray[Any]
    colours: str
    window: tuple[float, float]


def _panels(case: GalleryCase) -> list[_PicturePanel]:
    """List the panels of a case, from left to right."""
    low, high = np.quantile(case.source[case.mask], SOURCE_WINDOW).tolist()
    source = _PicturePanel("source", case.source, "gray", (low, high))
    synthetic = _PicturePanel("synthetic", case.synthetic, "gray", case.window)
    if case.real is None:
        return [source, synthetic]
    error = np.where(case.mask, np.abs(case.synthetic - case.real), 0)
    scale = (0.0, float(np.quantile(error[case.mask], COVERED)))
    panels = [
        source,
        _PicturePanel("real", case.real, "gray", case.window),
        synthetic,
        _PicturePanel(f"error, 0 to {scale[1]:.2g} {case.unit}", error, "inferno", scale),
    ]
    if case.expected_error is not None:
        panels.append(_PicturePanel("expected error (same scale)", case.expected_error, "inferno", scale))
    return panels


def _draw_panel(axes: Axes, panel: _PicturePanel, case: GalleryCase, place: int) -> None:
    """Draw an axial slice of a panel, and the outline of lesions on it."""
    plane = panel.volume[::-1, :, place].T  # radiological view: the patient's right is on the left
    aspect, (least, largest) = case.spacing_mm[1] / case.spacing_mm[0], panel.window
    axes.imshow(plane, cmap=panel.colours, vmin=least, vmax=largest, origin="lower", aspect=aspect)
    if case.lesion is not None and case.lesion[:, :, place].any():
        outline = case.lesion[::-1, :, place].T.astype(float)
        axes.contour(outline, levels=[0.5], colors="#f2c14e", linewidths=0.8)
    axes.set_title(panel.name, color="white", fontsize=9)
    axes.set_axis_off()


def _slice(case: GalleryCase) -> int:
    content: NDArray[np.bool_] = case.mask if case.lesion is None or not case.lesion.any() else case.lesion
    return int(content.sum(axis=(0, 1)).argmax())
