"""Predictions by the several models of a run, which share the subjects of a cohort: `chiasm train --models`.

`models/1`, `models/2`, ... are run folders as any other.  Each model learnt from all but one part of the subjects, so
the image of a new scan is the mean over all of them, and each of these subjects has one model that never saw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chiasm.cohorts.cases import Case
from chiasm.errors import RunError
from chiasm.outputs import refuse_data_folder
from chiasm.prediction.folders import Predicted, predict
from chiasm.prediction.inputs import paths_among
from chiasm.prediction.model_files import list_parts

OUT_OF_FOLD = "out-of-fold"


def predict_by_role(
    runs: Sequence[Path], inputs: Sequence[Path | Case], out: Path, *, only: str = "all", **options: Any
) -> list[Predicted]:
    """Predict as `predict` does; out of fold, give each case the image of the model that did not learn from it.

    Args:
        runs: One run, or several whose images are averaged.
        inputs: As for `predict`.
        out: Where the results go; out of fold, folders `1`, `2`, ... of predictions, one for each model.
        only: As for `predict`.  A run of several models has no test cases, and "test" means "out-of-fold" there.
        **options: As for `predict`.

    Raises:
        ChiasmError: As `predict`, or if cases out of fold are asked of several runs, or of a run of one model.
    """
    parts = list_parts(runs[0]) if len(runs) == 1 else []
    if only != OUT_OF_FOLD and not (parts and only == "test"):
        return [predict(runs, inputs, out, only=only, **options)]
    if not parts:
        raise RunError(
            "is not one run of several models, so that no case is out of a fold",
            path=runs[0],
            reason="one-model",
            hint="Name one run of chiasm train --models 3; of a run of one model, use chiasm predict --only test.",
        )
    refuse_data_folder(out, paths_among(inputs))  # the folders of the models lie in it
    return [
        predict(part, inputs, out / str(number), only=OUT_OF_FOLD, **options) for number, part in enumerate(parts, 1)
    ]
