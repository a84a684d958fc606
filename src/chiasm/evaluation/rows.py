"""Scores as rows of a table, with remarks on them: written, read, checked."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from sys import intern
from typing import NamedTuple

from chiasm.errors import RunError, shortened
from chiasm.metrics import lesions
from chiasm.names import is_plain
from chiasm.storage import read_json, whole_file

CSV, JSON = "evaluation.csv", "evaluation.json"


LESION = re.compile(r"lesion-\d+")  # regions that are one lesion of one case
EACH_LESION = "each lesion"  # what they are called together in a summary

#: What a connected component of the labels must have to be called a lesion.
LEAST_LESION = f"a lesion has at least {lesions.LEAST_LESION_VOXELS} voxels and {lesions.LEAST_LESION_ML:g} mL"


class Row(NamedTuple):
    """One score.

    Attributes:
        case: Id of the case.
        fold: Of the split.
        seed: Of the training.
        method: Arm or naive baseline.
        region: "mask", a named region, "healthy", "edges" (the target's
            steepest voxels), "lesion-edge" (a band around the labels),
            "lesion-1" and so on (the largest first), "lesions" and
            "lesions-small", "-medium", "-large" (counts; "too_small" counts
            the components that are none), "image" (all
            voxels, the background with them), or "structure NAME" and
            "structures" (of a user's own segmentations), or "dose" (of a
            user's own doses).
        metric: A name of `metric_table.METRICS`.
        value: NaN where it is not defined.
        unit: "1" for pure numbers.
        convention: Name, range and scale under which it was taken.
    """

    case: str
    fold: int
    seed: int
    method: str
    region: str
    metric: str
    value: float
    unit: str
    convention: str

    @property
    def convention_name(self) -> str:
        """Name of the convention, without its range and scale."""
        return self.convention.partition(" (")[0]


class MaskUse(NamedTuple):
    """Which voxels of a case were scored.

    Attributes:
        case: Id of the case.
        method: Whose prediction it is.
        used: "prediction" for the mask that was written beside the image, "cohort" for the cohort's mask file,
            "plan" for one that was found by the plan's rule.
        reason: Where that mask comes from, in words.
        voxels: How many are scored.
        sha256: Of the mask: two methods were scored in the same voxels where it is the same.
    """

    case: str
    method: str
    used: str
    reason: str
    voxels: int
    sha256: str


class Remarks(NamedTuple):
    """What an evaluation says beside its scores.

    Attributes:
        masks: One for each prediction that was scored.
        problems: Labels that were not used, one sentence each.
        notes: Cases without naive baselines, or whose real image lies elsewhere, one sentence each.
    """

    masks: tuple[MaskUse, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


NO_REMARKS = Remarks()


def write_evaluation(folder: Path, rows: Sequence[Row], remarks: Remarks = NO_REMARKS) -> None:
    """Write `evaluation.csv`, one row a score at full precision, and `evaluation.json`, each whole or not at all.

    In JSON, which knows neither, NaN is null and infinity the text "inf"; it
    holds the remarks too.

    Args:
        folder: Where they go.
        rows: From `evaluate_case`.
        remarks: Which masks were used, and which labels were not.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    with whole_file(folder / CSV) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    with whole_file(folder / JSON) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"rows": [')
        for index, row in enumerate(rows):  # one by one: a study of 1,000 cases has half a million
            content = {**row._asdict(), "value": _plain(row.value)}
            file.write(("," if index else "") + "\n" + json.dumps(content, ensure_ascii=False, allow_nan=False))
        masks = [mask._asdict() for mask in remarks.masks]
        beside = {"masks": masks, "problems": list(remarks.problems), "notes": list(remarks.notes)}
        file.write("\n],\n" + json.dumps(beside, ensure_ascii=False, indent=1)[2:] + "\n")


def read_remarks(folder: Path) -> Remarks:
    """Read what an evaluation says beside its scores; evaluations of earlier versions say nothing.

    Raises:
        RunError: If `evaluation.json` is missing or damaged.
    """
    content = read_json(folder / JSON)
    try:
        masks = tuple(MaskUse(**mask) for mask in content.get("masks", []))
        return Remarks(masks, *(tuple(map(str, content.get(name, []))) for name in ("problems", "notes")))
    except (AttributeError, TypeError) as error:
        raise RunError("is damaged", path=folder / JSON, reason="damaged", found=error) from error


def is_evaluation(folder: Path) -> bool:
    """Return whether a folder holds scores that `write_evaluation` wrote."""
    try:
        with (folder / CSV).open(encoding="utf-8", newline="") as content:
            return next(csv.reader(content, strict=True), []) == list(Row._fields)
    except (OSError, ValueError, csv.Error):
        return False


def read_evaluation(path: Path) -> list[Row]:
    """Read the rows of an evaluation folder, or of its CSV file.

    Raises:
        RunError: If it is missing, or not such a file.
    """
    file = path / CSV if path.is_dir() else path
    try:
        with file.open(encoding="utf-8", newline="") as content:
            reader = csv.reader(content, strict=True)
            _check_columns(next(reader, []), file)
            rows = [_parsed(line) for line in reader]
    except OSError as error:
        raise RunError("cannot be read", path=file, reason="unreadable", found=error.strerror) from error
    except (ValueError, csv.Error) as error:
        raise RunError("is damaged", path=file, reason="damaged", found=error) from error
    _check_words(rows, file)
    return rows


def _check_columns(found: Sequence[str], file: Path) -> None:
    names = list(Row._fields)
    if found != names:
        raise RunError(
            "is no evaluation of chiasm",
            path=file,
            reason="columns",
            found=", ".join(found) or "nothing",
            expected=", ".join(names),
        )


def _check_words(rows: Sequence[Row], file: Path) -> None:
    """Refuse words that would do harm on a page or in a table."""
    words = set(chain.from_iterable((row.case, row.method, row.region, row.metric, row.unit) for row in rows))
    for convention in {row.convention for row in rows}:
        words |= set(convention.split("; "))  # sentences, longer than a name may be
    if strange := sorted(word for word in words - {""} if not is_plain(word)):
        raise RunError(
            "holds a word that no table may hold", path=file, reason="unsafe-id", found=shortened(strange[0])
        )


def _parsed(line: Sequence[str]) -> Row:
    case, fold, seed, *words, value, unit, convention = line
    method, region, metric = map(intern, words)  # a few names stand in many rows
    return Row(
        intern(case), int(fold), int(seed), method, region, metric, float(value), intern(unit), intern(convention)
    )


def _plain(value: float) -> float | str | None:
    return value if math.isfinite(value) else None if math.isnan(value) else str(value)
