"""The log of a training, `log.jsonl`: a line for every few steps, for each validation, and for each warning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chiasm.storage import make_folder, open_in_place, read_log, write_text, writing
from chiasm.training.session import Session


@dataclass(frozen=True)
class TrainingLog:
    """The log of a run; only the first process writes lines.

    Attributes:
        path: Of `log.jsonl`.
        session: Whom to report to.
        steps: Of the training.
        work: Share of the training's work that is done after so many steps.
        hu: Hounsfield units of a normalised one, if the target is a CT: errors are reported in them.
    """

    path: Path
    session: Session
    steps: int
    work: Callable[[int], float]
    hu: float | None = None

    def cut(self, done: int) -> None:
        """Remove damaged lines, and lines after the checkpoint, which a resumed run writes again."""
        if not self.session.is_first_process:
            return
        make_folder(self.path.parent)
        lines, damaged = read_log(self.path)
        if damaged:
            self.session.say(f"{self.path}: {damaged} damaged lines are left out")
        if lines or damaged:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= done))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        self._write("step", step, {name: round(value, 6) for name, value in values.items()})

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Report the progress of a step."""
        if self.session.progress is not None:
            self.session.progress(step + 1, self.steps, {**values, "work": self.work(step + 1)})

    def validation(self, step: int, scores: Mapping[str, float], verdict: str | None) -> None:
        """Write and report the scores of a validation, and what is wrong with the attention."""
        self._write("validation", step, scores)
        when = f"step {step + 1}" if step >= 0 else "before training"
        self.session.say(f"{when}: validation error {_errors_in_words(scores, self.hu)}")
        if verdict:
            self._write("warning", step, {"message": verdict})
            self.session.say(f"step {step + 1}: {verdict}")

    def _write(self, kind: str, step: int, content: Mapping[str, object]) -> None:
        if self.session.is_first_process:
            with writing(self.path), open_in_place(self.path, "a") as lines:
                lines.write(json.dumps({"kind": kind, "step": step + 1, **content}) + "\n")


def _errors_in_words(scores: Mapping[str, float], hu: float | None) -> str:
    """Say the error on validation cases beside that of the look-up, in the mask and in lesions where there are any.

    >>> _errors_in_words({"mae": 0.5, "lookup_mae": 0.625, "lesion_mae": 1.25}, None)
    '0.500 (look-up 0.625), in lesions 1.250'
    >>> _errors_in_words({"mae": 0.05, "lookup_mae": 0.0625}, 1000)
    '50.0 HU (look-up 62.5 HU)'
    """

    def shown(name: str) -> str:
        error = scores.get(name, math.nan)  # absent where no case has a number
        return f"{error:.3f}" if hu is None else f"{error * hu:.1f} HU"

    lesions = f", in lesions {shown('lesion_mae')}" if "lesion_mae" in scores else ""
    return f"{shown('mae')} (look-up {shown('lookup_mae')}){lesions}"
