"""Two folders that a user gives beside predictions: volumes made from synthetic images, and from the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import Problem, volume_stem
from chiasm.errors import ChiasmError, RunError
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.metric_table import METRICS
from chiasm.evaluation.rows import Row
from chiasm.prediction.manifest import Entry

Scores = Mapping[str, Mapping[str, float]]  # region to metric to score


class FolderPair(NamedTuple):
    """Two folders with a volume for each case: `CASE.nii.gz`, `CASE.dcm`, or one such file in a folder `CASE`.

    Attributes:
        synthetic: Volumes that were made from synthetic images.
        real: Volumes that were made from real ones, in the same way.
    """

    synthetic: Path
    real: Path


def pair_up(given: tuple[Path, Path] | None, kind: str) -> FolderPair | None:
    """Return the folders of synthetic and of real volumes; None where none are given.

    Args:
        given: Both folders.
        kind: What they hold, such as "segmentation".

    Raises:
        RunError: If one is no folder.
    """
    for folder in given or ():
        if not folder.is_dir():
            raise RunError(f"is no folder of {kind}s", path=folder, reason="no-folder")
    return None if given is None else FolderPair(*given)


def score_given(
    given: FolderPair,
    work: Sequence[tuple[PredictionFolder, Entry]],
    compare: Callable[[Path, Path], Scores],
    *,
    kind: str,
    convention: str,
) -> tuple[list[Row], list[Problem]]:
    """Score the pair of volumes of each predicted case; a case without them is named, and the others are scored.

    Args:
        given: The folders.
        work: Predicted cases, each with the folder that it lies in.
        compare: From the files of the synthetic and the real volume to scores by region.
        kind: What the folders hold, such as "segmentation".
        convention: Of the rows.

    Returns:
        Rows and problems.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for assessed, entry in work:
        try:
            synthetic, real = (_file_of(folder, entry.case, kind) for folder in given)
            scores = compare(synthetic, real)
        except ChiasmError as error:
            path = error.path or given.synthetic
            problems.append(Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
            continue
        its = assessed.manifest
        rows += [
            Row(entry.case, its.fold, its.seed, its.method, region, metric, value, METRICS[metric].unit, convention)
            for region, its_scores in scores.items()
            for metric, value in its_scores.items()
        ]
    return rows, problems


def _file_of(folder: Path, case: str, kind: str) -> Path:
    """Return the file with the volume of a case.

    Raises:
        RunError: If there is none, or several.
    """
    found = _named(folder, case, volume_stem) or _named(folder, case, _dicom_stem)
    if len(found) != 1:
        raise RunError(
            f"holds {'several' if found else 'no'} {kind}{'s' if found else ''} of this case",
            path=folder,
            reason=f"no-{kind}",
            found=", ".join(path.name for path in found) or None,
            expected=f"{case}.nii.gz or {case}.dcm, or one volume in {case}/",
        )
    return found[0]


def _named(folder: Path, case: str, stem_of: Callable[[str], str | None]) -> list[Path]:
    """List the files of a format that are called as a case, or else lie in a folder of this name."""
    stems = {path: stem_of(path.name) or "" for path in _files(folder)}
    named = [path for path, stem in stems.items() if stem == case]
    named = named or [path for path, stem in stems.items() if stem.lower() == case.lower()]  # as some systems rename
    return named or [path for path in _files(folder / case) if stem_of(path.name) is not None]


def _dicom_stem(name: str) -> str | None:
    """Return the name of a DICOM file without its ending; None for other files.

    >>> _dicom_stem("P07.DCM"), _dicom_stem("P07.txt")
    ('P07', None)
    """
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() == "dcm" else None


def _files(folder: Path) -> list[Path]:
    """List the files of a folder, in order; none where there is no such folder."""
    return [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
