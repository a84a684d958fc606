"""One case as one picture: source, real, synthetic, error and expected error of the slice that shows most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.reports.gallery import GalleryCase
from chiasm.storage import whole_file

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

    place = _slice(case)
    low, high = np.quantile(case.source[case.mask], (0.005, 0.995)).tolist()
    panels = [("source", case.source, "gray", (low, high)), ("synthetic", case.synthetic, "gray", case.window)]
    if case.real is not None:
        error = np.where(case.mask, np.abs(case.synthetic - case.real), 0)
        most = float(np.quantile(error[case.mask], 0.995))
        panels.insert(1, ("real", case.real, "gray", case.window))
        panels.append((f"error, 0 to {most:.2g} {case.unit}", error, "inferno", (0.0, most)))
        if case.expected_error is not None:
            panels.append(("expected error (same scale)", case.expected_error, "inferno", (0.0, most)))
    height, width = case.mask.shape[1] * case.spacing_mm[1], case.mask.shape[0] * case.spacing_mm[0]
    canvas = Figure(figsize=(INCHES * len(panels), INCHES * height / width + 0.3), facecolor="black")
    FigureCanvasAgg(canvas)
    for number, (name, volume, colours, (least, largest)) in enumerate(panels):
        axes = canvas.add_axes((number / len(panels), 0, 1 / len(panels), 0.92))
        plane = volume[::-1, :, place].T  # radiological view: the patient's right is on the left
        aspect = case.spacing_mm[1] / case.spacing_mm[0]
        axes.imshow(plane, cmap=colours, vmin=least, vmax=largest, origin="lower", aspect=aspect)
        if case.lesion is not None and case.lesion[:, :, place].any():
            outline = case.lesion[::-1, :, place].T.astype(float)
            axes.contour(outline, levels=[0.5], colors="#f2c14e", linewidths=0.8)
        axes.set_title(name, color="white", fontsize=9)
        axes.set_axis_off()
    with whole_file(path) as temporary:
        canvas.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    return path


def _slice(case: GalleryCase) -> int:
    content: NDArray[np.bool_] = case.mask if case.lesion is None or not case.lesion.any() else case.lesion
    return int(content.sum(axis=(0, 1)).argmax())
