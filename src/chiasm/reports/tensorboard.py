"""Curves and slices of a training for TensorBoard: written beside the log, never read.

A run that is resumed goes on in a new file of events; what an earlier process
wrote after its last checkpoint, TensorBoard hides.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chiasm.errors import RecipeError
from chiasm.prediction.passes import Maps
from chiasm.preparation.arrays import PreparedCase
from chiasm.reports.curves import read_history
from chiasm.reports.progress_page import ProgressPage, draw_panes
from chiasm.storage import writing
from chiasm.training.session import Watcher

FOLDER = "tensorboard"


class TensorBoard:
    """Writes the progress of a training for TensorBoard.

    Args:
        run: The run folder; events go to `tensorboard/` in it.

    Raises:
        RecipeError: If TensorBoard is not installed.
    """

    def __init__(self, run: Path) -> None:
        if find_spec("tensorboard") is None:
            raise RecipeError(
                "TensorBoard is not installed", reason="not-installed", hint="pip install 'chiasm[tensorboard]'."
            )
        self.folder = run / FOLDER
        self.writer: Any = None
        self.written = -1  # lines of the log up to this step are written
        self.pictured = -1

    def picture(self, step: int, case: PreparedCase, maps: Maps) -> None:
        """Write source, real and synthetic target and the error of a slice of a validation's first case.

        Raises:
            ChiasmError: If it cannot be written.
        """
        if step == self.pictured:
            return
        self.pictured = step
        with writing(self.folder):
            self._open(step).add_image("validation/source, real, synthetic, error", _pixels(case, maps), step)

    def update(self, log: Path, step: int, steps: int) -> None:
        """Write the numbers of all lines that were logged since the last call.

        Raises:
            ChiasmError: If they cannot be written.
        """
        del steps
        with writing(self.folder):
            self._write(self._open(step), log)

    def _write(self, writer: Any, log: Path) -> None:
        lines = [line for line in read_history(log) if line["step"] > self.written and line["kind"] != "warning"]
        for line in lines:
            for name, value in line.items():
                if name not in ("kind", "step"):
                    writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self.written = max([self.written, *(line["step"] for line in lines)])
        writer.flush()

    def _open(self, step: int) -> Any:
        """Open a file of events at the first call; where an earlier process wrote some, go on after this step."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            goes_on = any(self.folder.glob("events.*"))
            self.written = step if goes_on else -1
            make: Any = SummaryWriter
            self.writer = make(str(self.folder), purge_step=step + 1 if goes_on else None)
        return self.writer


class Watchers:
    """Several observers of one training, called one after another."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = watchers

    def picture(self, step: int, case: PreparedCase, maps: Maps) -> None:
        """Show what the networks make of a validation case to each."""
        for watcher in self.watchers:
            watcher.picture(step, case, maps)

    def update(self, log: Path, step: int, steps: int) -> None:
        """Let each know how far the training is."""
        for watcher in self.watchers:
            watcher.update(log, step, steps)


def watch_run(run: Path, *, tensorboard: bool) -> Watcher:
    """Return the observers of a training: its page, and TensorBoard if `tensorboard` is set.

    Raises:
        RecipeError: If `tensorboard` is set and TensorBoard is not installed.
    """
    return Watchers([ProgressPage(run), TensorBoard(run)]) if tensorboard else ProgressPage(run)


def _pixels(case: PreparedCase, maps: Maps) -> Any:
    """Return the panes of the progress page in TensorBoard's form, shape (3, height, width) in [0, 1]."""
    from matplotlib.image import imread

    return imread(io.BytesIO(draw_panes(case, maps)), format="png")[..., :3].transpose(2, 0, 1)
