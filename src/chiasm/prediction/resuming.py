"""Resuming a prediction in a folder: which earlier files are kept, and when the folder is refused.

The same model resumes where it was stopped, with the same cases or more.  Two models, or one model with other options,
never share a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Case, volume_stem
from chiasm.errors import ChiasmError, RunError
from chiasm.outputs import refuse_data_folder, remove_files
from chiasm.prediction.manifest import FILE, Entry, Failure, Manifest, check_files, files_of, read_manifest
from chiasm.volumes.screening import STRICT, volume_files

WAYS_OUT = "Give another folder with -o, or replace what it holds: chiasm predict --overwrite."


@dataclass(frozen=True)
class Earlier:
    """The part of an earlier prediction that is kept.

    Attributes:
        entries: Finished cases by id: cases of this call with unchanged files, and cases that are not of this call.
        failed: Failures of cases that are not of this call.
        damaged: Cases that are predicted again, because their files changed.
    """

    entries: Mapping[str, Entry]
    failed: tuple[Failure, ...] = ()
    damaged: tuple[str, ...] = ()


def take_over(
    folder: Path, fresh: Manifest, cases: Mapping[str, tuple[Case, Sequence[str]]], *, overwrite: bool
) -> Earlier:
    """Decide which files of a folder are kept, before anything is written there.

    Args:
        folder: Where predictions go.
        fresh: What is about to be predicted; its `pending` are the cases.
        cases: Id to the case and to the names that its outputs will have in the folder.
        overwrite: Whether to replace what does not belong to this prediction.

    Raises:
        RunError: If an output would replace an input, or the folder holds predictions of another model, of other
            options or of other files, or something else in the place of an output, and `overwrite` is False.
    """
    _spare_inputs(folder, cases)
    before = _read(folder, overwrite=overwrite)
    if before is not None and overwrite:
        remove_predictions(folder, before.cases)
    if overwrite:
        return Earlier({})
    _refuse_occupied(folder, cases, _known_cases(before))
    if before is None:
        return Earlier({})
    if before.cases and (differences := compare(before, fresh)):
        raise RunError(
            f"holds predictions that were made with other settings: {'; '.join(differences)}",
            path=folder,
            reason="other-prediction",
            hint=WAYS_OUT,
        )
    return _kept(folder, before, fresh, cases)


def _known_cases(before: Manifest | None) -> set[str]:
    return set() if before is None else {*before.pending, *(entry.case for entry in before.cases)}


def _refuse_occupied(folder: Path, cases: Mapping[str, tuple[Case, Sequence[str]]], known: Collection[str]) -> None:
    """Refuse to replace files with the names of new cases, if no prediction here wrote them."""
    for name in chain.from_iterable(names for case, names in cases.values() if case.id not in known):
        if (folder / name).exists():
            raise RunError("was not written by this prediction", path=folder / name, reason="occupied", hint=WAYS_OUT)


def compare(before: Manifest, now: Manifest) -> list[str]:
    """Describe how two predictions differ in model and options; earlier versions stored fewer options."""
    differences = []
    if before.sha256 != now.sha256:
        models = [f"{one.method}, fold {one.fold}, seed {one.seed}, {one.sha256[:12]}" for one in (before, now)]
        differences.append(f"the model was {models[0]} and is {models[1]}")
    old, new = _options_of(before), _options_of(now)
    changed = [name for name, value in new.items() if old.get(name, value) != value]
    return differences + [f"{name} was {old[name]} and is {new[name]}" for name in changed]


def _options_of(manifest: Manifest) -> dict[str, bool | str]:
    return {"format": manifest.container, "degrade": manifest.degraded, "average": "none", **manifest.options}


def hash_inputs(case: Case, sources: Sequence[str]) -> str:
    """Hash the inputs of a prediction: the contents of sources and mask, and how they are read.

    Raises:
        VolumeError: If a file cannot be read.
    """
    digest = hashlib.sha256(b"" if case.reading == STRICT else str(case.reading).encode())
    for name, path in [*((name, case.images[name]) for name in sources), ("mask", case.mask)]:
        parts = [] if path is None else [sha256_of(file) for file in volume_files(path)]
        digest.update("\0".join([name, *parts, ""]).encode())
    return digest.hexdigest()


def _read(folder: Path, *, overwrite: bool) -> Manifest | None:
    if not (folder / FILE).exists():
        return None
    try:
        return read_manifest(folder)
    except RunError:
        if overwrite:  # what it lists cannot be trusted, so nothing is removed
            return None
        raise


def _kept(folder: Path, before: Manifest, fresh: Manifest, cases: Mapping[str, tuple[Case, Sequence[str]]]) -> Earlier:
    """Sort the entries of a folder into unchanged and damaged ones; refuse entries of other input files."""
    sorted_in: dict[str, list[Entry]] = {"kept": [], "damaged": [], "other": []}
    for entry in before.cases:
        case, _ = cases.get(entry.case, (None, ()))
        sorted_in[_state_of(folder, entry, case, fresh.sources)].append(entry)
    if sorted_in["other"]:
        some = ", ".join(entry.case for entry in sorted_in["other"][:3])
        raise RunError(
            f"holds predictions of other files with the same names: case {some}",
            path=folder,
            reason="other-inputs",
            hint=WAYS_OUT,
        )
    entries = {entry.case: entry for entry in sorted_in["kept"]}
    failed = tuple(one for one in before.failed if one.case is not None and one.case not in cases)
    return Earlier(entries, failed, tuple(entry.case for entry in sorted_in["damaged"]))


def _state_of(
    folder: Path, entry: Entry, case: Case | None, sources: Sequence[str]
) -> Literal["kept", "damaged", "other"]:
    """Return whether an entry is kept, must be made again, or is of other files; one of another call is kept."""
    if case is None:
        return "kept"
    if entry.inputs and entry.inputs != _hashed(case, sources):
        return "other"
    return "kept" if entry.sha256 and _is_whole(folder, entry) else "damaged"


def _hashed(case: Case, sources: Sequence[str]) -> str:
    """Hash a case's inputs; unreadable ones have no hash, and so differ from all earlier ones."""
    try:
        return hash_inputs(case, sources)
    except (ChiasmError, OSError):
        return ""


def _is_whole(folder: Path, entry: Entry) -> bool:
    try:
        check_files(folder, entry)
    except RunError:
        return False
    return True


def _spare_inputs(folder: Path, cases: Mapping[str, tuple[Case, Sequence[str]]]) -> None:
    """Refuse to replace a file of any case, real targets included, or to write among the slices of a series."""
    images = chain.from_iterable(case.images.values() for case, _ in cases.values())
    refuse_data_folder(folder, (folder if _is_slice_in(folder, path) else path for path in images))
    files = chain.from_iterable((*case.images.values(), case.mask, case.labels) for case, _ in cases.values())
    inputs = {file.resolve() for file in files if file is not None}
    for name in chain.from_iterable(names for _, names in cases.values()):
        if (folder / name).resolve() in inputs and (folder / name).is_file():
            raise RunError(
                "belongs to the data, and the prediction would replace it",
                path=folder / name,
                reason="input",
                hint="Give another folder with -o.",
            )


def _is_slice_in(folder: Path, path: Path) -> bool:
    """Return whether a path is a file that stands for a DICOM series of several files in a folder."""
    if not path.is_file() or volume_stem(path.name) is not None or path.parent.resolve() != folder.resolve():
        return False
    try:
        return len(volume_files(path)) > 1
    except (ChiasmError, OSError):
        return False  # the case is refused by itself


def remove_predictions(folder: Path, entries: Iterable[Entry]) -> None:
    """Remove the files that a prediction wrote for its cases; of a DICOM series, the slices that it wrote.

    Args:
        folder: Of the predictions.
        entries: Of its manifest.

    Raises:
        ChiasmError: If a file cannot be removed.
    """
    for entry in entries:
        own = (name for name in files_of(folder, entry) if not entry.sha256 or name in entry.sha256)
        remove_files(folder, own)
