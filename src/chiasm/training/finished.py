"""The mark of a finished run, so that the same command ends at once.

`finished.json` is written last, after `model/`: it names the cases that were found and those that were left out.  While
the data folder holds the same cases, the same command reads no image and opens no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from chiasm.checksums import has_valid_checksum, with_checksum, without_checksum
from chiasm.cohorts.cases import Cohort, Problem
from chiasm.cohorts.splits import Split, read_splits
from chiasm.errors import RunError
from chiasm.prediction.model_files import check_files
from chiasm.preparation.arrays import Say
from chiasm.preparation.plan import Plan, read_plan
from chiasm.storage import read_json, write_json
from chiasm.training.run_folder import remove_baselines

FILE = "finished.json"


class _LeftOut(BaseModel):
    model_config = ConfigDict(strict=True)

    path: str
    reason: str
    message: str
    case: str | None


class _Finished(BaseModel):
    model_config = ConfigDict(strict=True)

    cases: list[str]
    left_out: list[_LeftOut]


@dataclass(frozen=True)
class Run:
    """The result of a training.

    Attributes:
        folder: The run folder.
        plan: What followed from the data.
        split: Case ids by role.
        problems: Cases and files that were not used, with reasons.
    """

    folder: Path
    plan: Plan
    split: Split
    problems: tuple[Problem, ...]


def write_finished(folder: Path, found: Cohort, problems: Sequence[Problem]) -> None:
    """Mark a run as finished.

    Args:
        folder: The run folder, with its model.
        found: All cases that were found, the unusable ones too.
        problems: What was left out.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    left_out = [{"path": str(p.path), "reason": p.reason, "message": p.message, "case": p.case} for p in problems]
    write_json(folder / FILE, with_checksum({"cases": _list_ids(found), "left_out": left_out}))


def read_finished(folder: Path, found: Cohort) -> tuple[Problem, ...] | None:
    """Return the cases that a finished run left out; None if it is not finished, or other cases are found.

    Args:
        folder: The run folder.
        found: The cases that are found now.
    """
    try:
        content = read_json(folder / FILE)
        finished = _Finished.model_validate(without_checksum(content))
    except (RunError, ValidationError, AttributeError):
        return None
    if not has_valid_checksum(content) or finished.cases != _list_ids(found):
        return None
    return tuple(Problem(Path(p.path), p.reason, p.message, p.case) for p in finished.left_out)


def _list_ids(cohort: Cohort) -> list[str]:
    return sorted(case.id for case in cohort.cases)


def find_finished(folder: Path, found: Cohort, say: Say) -> Run | None:
    """Return a run that is finished already; None if there is work to do.

    Args:
        folder: The run folder.
        found: The cases that are found now.
        say: Called with what was left out, or with what has to be made anew.

    Raises:
        RunError: If its plan or its split was changed.
    """
    problems = read_finished(folder, found)
    if problems is None:
        return None
    missing = [name for name in ("plan.toml", "splits.json") if not (folder / name).exists()]
    if missing:  # as where a message asked to delete a damaged one
        say(f"warning: {folder}: {' and '.join(missing)} is made anew")
        return None
    try:
        check_files(folder / "model")
    except RunError as error:
        say(f"warning: {error.path}: {error.what}; the model is written anew")
        return None
    run = Run(folder, read_plan(folder / "plan.toml"), read_splits(folder / "splits.json").split, problems)
    remove_baselines(folder)  # of a kill after the model was written
    for problem in problems:
        say(problem.line)
    say(f"finished already: {folder / 'model'}")
    return run


def is_finished(folder: Path) -> bool:
    """Return whether a folder has the mark of a finished run; `find_finished` checks the mark."""
    return (folder / FILE).exists()
