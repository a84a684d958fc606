"""The folder of an evaluation: what was asked for, which files are its own, and what another one may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from chiasm.errors import RunError
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.predictions import open_predictions
from chiasm.evaluation.rows import is_evaluation, read_evaluation
from chiasm.outputs import refuse_foreign, refuse_inputs, refuse_links, remove_files
from chiasm.recipe import Registration
from chiasm.records import parse_record
from chiasm.registration.cohort import remove_registered
from chiasm.storage import read_json
from chiasm.volumes import Reading
from chiasm.volumes.screening import STRICT

ASKED = "asked.json"
CHOSEN = ("series", "select", "subject_pattern", "reading")  # of `ASKED`: which files are taken, and how they are read
REGISTERED = "registered"  # folder of the real images, aligned with the sources
FILES = ("evaluation.csv", "evaluation.json", ASKED, "report.html")  # that stand in an evaluation's folder
PAGE_FILES = ("cases/*.html", "pictures/*.png")  # of single cases; the star stands for the case
FOLDERS = ("cases", "pictures", REGISTERED)
OWNED = {"study.json": "a study", "completion.json": "a completion"}  # which have evaluations of their own


class EvaluationSettings(BaseModel):
    """What `asked.json` says of an evaluation; earlier versions wrote fewer entries."""

    predictions: list[str]
    model: str | None
    reference: str
    layout: str | None
    regions: Literal["seg", "none"]
    written_in: str = ""
    convention: str = ""
    register_: Annotated[Registration, Field(alias="register")] = "none"
    series: dict[str, str] = {}
    select: list[str] = []
    subject_pattern: str = ""
    reading: Reading = STRICT
    problems: list[str] = []
    subjects: dict[str, str] = {}


def make_room(out: Path, asked: Mapping[str, Any], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse to mix two evaluations in a folder, and remove the pages of one that is made again.

    Args:
        out: The folder; it may be missing.
        asked: What is asked for now, as `asked.json` will say it.
        inputs: Folders that the evaluation reads.
        overwrite: Whether to replace another evaluation.

    Raises:
        RunError: If the folder holds a study or a completion, an input that would be replaced, or another evaluation
            or files of somebody else and `overwrite` is False.
    """
    _refuse_owned(out)
    refuse_inputs(map(out.joinpath, (*FILES, *FOLDERS)), inputs, what="the evaluation")
    refuse_links(out, FOLDERS[:2])
    if (out / ASKED).is_file():
        _replace(out, asked, overwrite=overwrite)
    elif not overwrite and not is_evaluation(out):  # a killed command may have written scores alone
        refuse_foreign(out, (*FILES, *PAGE_FILES), way_out="To replace them: chiasm evaluate --overwrite.")


def _replace(out: Path, asked: Mapping[str, Any], *, overwrite: bool) -> None:
    """Remove what an evaluation wrote that another one will not replace; refuse where that is not wanted."""
    differences = _differences(out, read_asked(out), asked)
    if differences and not overwrite:
        raise RunError(
            f"holds another evaluation: {'; '.join(differences)}",
            path=out,
            reason="other-evaluation",
            hint="Give another folder with -o, or replace what it holds: chiasm evaluate --overwrite.",
        )
    _remove_pages(out)
    if differences:
        remove_registered(out / REGISTERED)


def _remove_pages(out: Path) -> None:
    """Remove the pages of the single cases of an evaluation."""
    if is_evaluation(out):
        cases = {row.case for row in read_evaluation(out)}
        remove_files(out, (page.replace("*", case) for case, page in product(cases, PAGE_FILES)))


def _refuse_owned(out: Path) -> None:
    """Refuse the folder of a study or of a completion.

    Raises:
        RunError: If it is one.
    """
    for mark, what in OWNED.items():
        if (out / mark).is_file():
            raise RunError(f"holds {what}", path=out, reason="occupied", hint="Give another folder with -o.")


def _differences(out: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Say in words how two evaluations differ in what was asked for."""
    return [
        f"{name} was {before[name]} and is {asked[name]}"
        for name in ("predictions", "reference", "layout", "regions", "register", "convention", *CHOSEN)
        if before.get(name, asked[name]) != asked[name] and not _same_places(out, before, asked, name)
    ]


def _same_places(out: Path, before: Mapping[str, Any], asked: Mapping[str, Any], name: str) -> bool:
    """Say whether two evaluations name the same places, however they are written down."""
    if name not in ("predictions", "reference"):
        return False
    return _resolved(out, before[name]) == _resolved(out, asked[name])


def _resolved(out: Path, places: str | Sequence[str]) -> list[Path]:
    """Return one place or several as they are whatever folder they were written from."""
    return [(out / place).resolve() for place in ([places] if isinstance(places, str) else places)]


def read_asked(out: Path) -> dict[str, Any]:
    """Read what an evaluation was asked for.

    Raises:
        RunError: If the file is missing or damaged.
    """
    content = read_json(out / ASKED)
    hint = "Give another folder with -o, or remove this one and run chiasm evaluate again."
    parse_record(content, out / ASKED, EvaluationSettings, "not what chiasm evaluate writes", hint)
    asked: dict[str, Any] = content
    return asked


def open_assessed(out: Path, asked: Mapping[str, Any]) -> list[PredictionFolder]:
    """Open the predictions that an evaluation scored.

    Raises:
        RunError: If a folder, or the model that made it, has gone or is damaged.
    """
    model = None if asked["model"] is None else place_of(out, asked, asked["model"])
    return [open_predictions(place_of(out, asked, folder), model) for folder in asked["predictions"]]


def place_of(out: Path, asked: Mapping[str, Any], name: str) -> Path:
    """Return a place that an evaluation names, from its folder or from where it was written."""
    here = out / name  # evaluations of earlier versions name absolute paths
    return here if here.exists() or "written_in" not in asked else Path(asked["written_in"]) / name
