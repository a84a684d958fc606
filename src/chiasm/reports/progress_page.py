"""`RUN/progress.html`: the progress of a training, as a page that opens by double click and refreshes itself.

It is written after each validation, whole or not at all.  It shows the curves of the log so far, and one slice of a
validation case after each validation.  The pictures stay in `RUN/progress/`, so a resumed run shows the earlier ones.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chiasm.prediction.passes import Maps
from chiasm.preparation.arrays import PreparedCase
from chiasm.reports.curves import describe_health, draw_curves, read_history
from chiasm.reports.pages import render_page
from chiasm.storage import whole_file, write_text

PAGE, PICTURES = "progress.html", "progress"
REFRESH_SECONDS: Final = 15
MOST_SHOWN = 12  # pictures of a page; more are thinned evenly
PANES = ("source", "real", "synthetic", "|error|")


class ProgressPage:
    """The page of one run, with its state between two validations.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.began: tuple[float, int] | None = None  # when this process began, and after which step
        self.pictured = -1

    def picture(self, step: int, case: PreparedCase, maps: Maps) -> None:
        """Keep a slice of the first case of a validation.

        Raises:
            ChiasmError: If it cannot be written.
        """
        if step == self.pictured:
            return
        self.pictured = step
        with whole_file(self.run / PICTURES / f"step-{step:08d}.png") as path:
            path.write_bytes(draw_panes(case, maps))

    def update(self, log: Path, step: int, steps: int) -> None:
        """Write the page.

        Args:
            log: Of the training that is at work.
            step: Steps done.
            steps: Of that training.

        Raises:
            ChiasmError: If it cannot be written.
        """
        self.began = self.began or (time.monotonic(), step)
        history = read_history(log)
        content = {
            "kind": "progress",
            "title": f"{self.run.resolve().name}: step {step} of {steps}",
            "asked": self._describe(step, steps),
            "refresh": None if step >= steps else REFRESH_SECONDS,
            "panes": PANES,
            "pictures": [
                {"step": int(path.stem.removeprefix("step-")), "address": _address(path)} for path in self._chosen()
            ],
            "curves": draw_curves(history),
            "health": describe_health(history),
        }
        write_text(self.run / PAGE, render_page("progress.html", content))

    def _describe(self, step: int, steps: int) -> str:
        """Describe the progress of the training, and the time left at the speed so far."""
        if step >= steps:
            return "The training is done."
        assert self.began is not None
        seconds, done = time.monotonic() - self.began[0], step - self.began[1]
        if done <= 0:
            return "The training has begun; this page refreshes itself."
        left = seconds / done * (steps - step) / 60
        return f"About {max(1, round(left))} min left at {time.strftime('%H:%M')}; this page refreshes itself."

    def _chosen(self) -> Sequence[Path]:
        """List the pictures that are shown, the newest first."""
        there = sorted((self.run / PICTURES).glob("step-*.png"), reverse=True)
        if len(there) <= MOST_SHOWN:
            return there
        return [there[round(place)] for place in np.linspace(0, len(there) - 1, MOST_SHOWN)]


def draw_panes(case: PreparedCase, maps: Maps) -> bytes:
    """Draw source, real and synthetic target and the error of a slice side by side, as a PNG.

    The slice has most of the labels, or most of the mask.  Real and synthetic
    share one window, and the error is drawn on half of its width.
    """
    from matplotlib.image import imsave

    mask, target = np.asarray(case.mask), np.asarray(case.target)
    labels = mask if case.labels is None or not np.any(case.labels) else np.asarray(case.labels) > 0
    k = int(np.argmax(labels.sum(axis=(0, 1))))
    source, real, made = (np.asarray(one)[..., k] for one in (case.source[0], target, maps.prediction))
    inside = mask[..., k]
    low, high = _window(real, inside)
    panes = [
        _grey(source, *_window(source, inside)),
        _grey(real, low, high),
        _grey(made, low, high),
        _grey(np.abs(made - real) * inside, 0.0, (high - low) / 2),
    ]
    drawn = io.BytesIO()
    nothing: dict[str, Any] = {"Software": None}  # the same bytes whatever wrote them
    imsave(drawn, np.concatenate(panes, axis=1), format="png", cmap="gray", vmin=0, vmax=1, metadata=nothing)
    return drawn.getvalue()


def _window(image: NDArray[np.float32], inside: NDArray[np.bool_]) -> tuple[float, float]:
    values = image[inside]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 1.0)
    return float(low), max(float(high), float(low) + 1e-6)


def _grey(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Scale a slice (I, J) to [0, 1], the front of the patient upwards."""
    return np.rot90(((image - low) / (high - low)).clip(0, 1)).astype(np.float32)


def _address(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
