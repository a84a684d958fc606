"""What a training is given beside settings and cases: devices, and whom to report to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from lightning_fabric import Fabric

from chiasm.prediction.engines import Engine, pick_precision
from chiasm.prediction.passes import Maps
from chiasm.preparation.arrays import PreparedCase
from chiasm.progress import StepProgress
from chiasm.recipe import Recipe

Say = Callable[[str], None]


class Watcher(Protocol):
    """Somebody who looks at a training while it learns, such as a page."""

    def picture(self, step: int, case: PreparedCase, maps: Maps) -> None:
        """Take what the networks make of a validation case after so many steps."""

    def update(self, log: Path, step: int, steps: int) -> None:
        """Take note that so many of all steps are done, and logged."""


class LearningCases(NamedTuple):
    """Prepared cases of a training.

    Attributes:
        training: Whose images the networks learn from.
        validation: On which they are assessed meanwhile; possibly none.
    """

    training: Sequence[PreparedCase]
    validation: Sequence[PreparedCase]


@dataclass(frozen=True)
class Session:
    """Devices of a training, and whom it reports to.

    Attributes:
        fabric: From `make_fabric`, launched.
        say: Called with lines for the user.
        progress: Called after each step with steps done, all steps, values; or None.  "work" among the values is the
            share of all work that is done.
        watcher: Who looks at each validation, or None.
    """

    fabric: Fabric
    say: Say
    progress: StepProgress | None = None
    watcher: Watcher | None = None

    @property
    def is_first_process(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return bool(self.fabric.global_rank == 0)

    def engine(self, recipe: Recipe) -> Engine:
        """Return what networks predict with between their steps."""
        return Engine(self.fabric.device, pick_precision(recipe.training.precision, recipe.training.accelerator))

    def counting_from(self, first: int, steps: int) -> Self:
        """Report the progress of one training of several as that of all: steps done before it, and steps of all."""
        shown = self.progress
        if shown is None:
            return self

        def counted(done: int, _: int, values: Mapping[str, float]) -> None:
            shown(first + done, steps, {name: value for name, value in values.items() if name != "work"})

        return replace(self, progress=counted)
