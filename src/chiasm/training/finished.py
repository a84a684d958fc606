"""What a finished run notes of itself, so that the same command again ends at once.

`finished.json` is written last, after `model/`: it names the cases that were
found then and those that were left out.  While it holds, and the data folder
holds the same cases, no image is read and no cache is opened again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from chiasm.checksums import has_valid_checksum, with_checksum, without_checksum
from chiasm.cohorts.cases import Cohort, Problem
from chiasm.errors import RunError
from chiasm.storage import read_json, write_json

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


def write_finished(folder: Path, found: Cohort, problems: Sequence[Problem]) -> None:
    """Note that a run is finished.

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
    """Return what a finished run left out; None where it is not finished, or other cases are found.

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
