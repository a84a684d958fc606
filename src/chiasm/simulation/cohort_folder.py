"""The folder of a simulated cohort: its patients, and the files that another cohort may replace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.errors import RunError
from chiasm.outputs import refuse_foreign, remove_files
from chiasm.storage import read_facts, read_json, write_json

PARAMETERS = "parameters.json"
#: Names of a subject's files, whatever the layout.
OWN = re.compile(
    r"\w+_(t1|t1ce|t2|flair|pd|ct|mask|seg)\.nii\.gz|(mr|ct|mask|seg)\.nii\.gz"
    r"|sub-\d+_(T1w|ce-gadolinium_T1w|T2w|FLAIR|PDw|ct|desc-brain_mask|label-lesion_mask)\.nii\.gz"
    rf"|truth\.npz|{re.escape(PARAMETERS)}"
)
OTHER_FOLDER = "Give another folder with -o."


def make_room(folder: Path, asked: Mapping[str, Any], names: Sequence[str], overwrite: bool) -> None:
    """Refuse to mix two cohorts in a folder, or remove the simulated patients of another cohort.

    Args:
        folder: Of the cohort.
        asked: The settings of the cohort.
        names: Its subjects.
        overwrite: Whether to replace other simulated patients.

    Raises:
        RunError: If the folder holds patients of somebody else under these names, or other simulated ones and
            `overwrite` is False.
    """
    note = folder / "truth" / "asked.json"  # written first, so that patients of a killed command are known too
    made = _made(folder, read_facts(note))
    others = _others(made, asked, names)
    if not made and (folder / "cohort.json").is_file():
        raise RunError("holds a cohort that was not simulated here", path=folder, reason="occupied", hint=OTHER_FOLDER)
    _refuse_strangers(folder, [name for name in names if name not in made])
    if others and not overwrite:
        raise _other_cohort(folder, asked, made, others, len(names))
    for name in others:
        _remove_subject(folder, name)
    write_json(note, {**asked, "names": list(names)})


def _others(
    made: Mapping[str, Mapping[str, Any]], asked: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """Return the simulated subjects of another cohort."""
    return {name: of for name, of in made.items() if of != asked or name not in names}


def _refuse_strangers(folder: Path, names: Sequence[str]) -> None:
    """Refuse files in the places of subjects who were not simulated here.

    Raises:
        RunError: If there are any.
    """
    places = [place for name in names for place in _places(folder, name)]
    refuse_foreign(folder, [place.relative_to(folder).as_posix() for place in places])


def _other_cohort(
    folder: Path,
    asked: Mapping[str, Any],
    made: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    most: int,
) -> RunError:
    """Return the error that a folder holds simulated patients of another cohort."""
    was = next(iter(others.values()))
    changes = [f"{name} was {was.get(name)} and is {value}" for name, value in asked.items() if was.get(name) != value]
    return RunError(
        f"holds {len(made)} simulated patients, of whom {len(others)} do not belong to the cohort asked for",
        path=folder,
        reason="other-cohort",
        found="; ".join(changes) or f"{len(made)} patients",
        expected=None if changes else f"at most {most}",
        hint=f"{OTHER_FOLDER} To replace them: chiasm phantom --overwrite.",
    )


def _remove_subject(folder: Path, name: str) -> None:
    """Remove the files of a simulated subject, its settings last; other files stay."""
    for place in _places(folder, name):
        own = [path.relative_to(folder).as_posix() for path in place.rglob("*") if OWN.fullmatch(path.name)]
        remove_files(folder, sorted(own, key=lambda name: name.endswith(PARAMETERS)))


def _made(folder: Path, note: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Map the simulated subjects of a folder to their settings, also those of a killed command.

    Earlier versions stored no names; there, subjects with a written truth count.
    """
    asked = {name: value for name, value in note.items() if name != "names"}
    made = {name: asked for name in _begun(folder, note) if any(place.exists() for place in _places(folder, name))}
    finished = folder.glob(f"truth/*/{PARAMETERS}")
    return made | {path.parent.name: read_json(path).get("asked", {}) for path in finished}


def _begun(folder: Path, note: Mapping[str, Any]) -> list[str]:
    if not note:
        return []
    names: list[str] = note.get("names", [path.name for path in folder.glob("truth/*/")])
    return names


def _places(folder: Path, name: str) -> list[Path]:
    """List the folders that a subject's files lie in, whatever the layout; the truth goes last."""
    parents = (folder, folder / "derivatives" / "phantom", folder / "Task1" / "brain", folder / "truth")
    return [parent / name for parent in parents]
