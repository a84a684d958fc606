"""The inputs of a prediction: files, folders and cohorts as cases of a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chiasm.cohorts.cases import MAPS, MODALITIES, Case, Cohort, Problem, role_of, unsafe_name, volume_stem
from chiasm.cohorts.dicom_modalities import last_word
from chiasm.cohorts.dicom_patients import Selection, modality_at
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of, volumes_below
from chiasm.cohorts.folder_notes import MARKS
from chiasm.cohorts.gathering import LOST, with_account
from chiasm.cohorts.images import read_image
from chiasm.cohorts.known_layouts import Find, Finds
from chiasm.cohorts.splits import ROLES as SPLIT_ROLES
from chiasm.cohorts.splits import read_splits
from chiasm.errors import CohortError, RunError, VolumeError, unknown
from chiasm.prediction.manifest import Role
from chiasm.prediction.model import Model
from chiasm.prediction.model_files import CARD, find_model, read_card
from chiasm.recipe import read_recipe
from chiasm.volumes import Volume
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.geometry import straightened
from chiasm.volumes.screening import VOLUME_SUFFIXES, Reading, check_skew

RUN_MARKS = ("recipe.toml", f"model/{CARD}")  # files that make a folder a run or a model


class Inputs(NamedTuple):
    """The content of inputs: cases, problems of others, and notes."""

    cases: list[Case]
    problems: list[Problem]
    notes: list[Problem]


def find_cases(inputs: Sequence[Path | Case], model: Model, layout: str | None, chosen: Selection) -> Inputs:
    """Find the cases of a prediction, and read them as the model says.

    Args:
        inputs: Files, folders and cohorts; single cases.
        model: Says which sources a case has.
        layout: Name of a layout, where a folder fits several.
        chosen: Which series and files are taken, and how they are read.

    Raises:
        CohortError: If there is no input, or as `find_inputs`.
    """
    if not inputs:
        raise CohortError(
            "no scans are given",
            reason="no-input",
            hint="Give files, folders or cases. A generator gives its cases only once.",
        )
    sources = model.plan.sources
    selection = replace(
        selection_of(model.recipe, chosen, remember=True),
        alone=sources[0] if len(sources) == 1 else None,
        allow=MARKS,  # who predicts is warned of them
        reading=chosen.reading | model.plan.reading,
        subject_pattern="",  # whose a case is does not matter
    )
    places = [one.absolute() for one in inputs if isinstance(one, Path)]
    found = find_inputs(places, sources, layout=layout, selection=selection)
    cases = found.cases + [one for one in inputs if isinstance(one, Case)]
    return found._replace(cases=[replace(case, reading=selection.reading | case.reading) for case in cases])


class NamedPlaces(NamedTuple):
    """The places of a command line: runs, then data."""

    runs: list[Path]
    inputs: list[Path]


def part_runs(places: Sequence[Path]) -> NamedPlaces:
    """Separate the runs of a command line from the inputs after them: the first place is a run, the last an input.

    Raises:
        CohortError: If the last place is a run, so that no input is named.
    """
    following = list(takewhile(_is_run, places[1:]))
    if len(following) == len(places) - 1 and any((places[-1] / name).is_file() for name in RUN_MARKS):
        raise CohortError(
            "is a run, but no scans are named after it",
            path=places[-1],
            reason="no-input",
            hint="Name the runs first, then the scans: chiasm predict RUN OTHER_RUN SCANS -o OUT.",
        )
    runs = [*places[:1], *following][: len(places) - 1]
    return NamedPlaces(runs, list(places[len(runs) :]))


def _is_run(place: Path) -> bool:
    """Return whether a place is a run or model folder, finished or not."""
    return any((place / name).is_file() for name in (*RUN_MARKS, f"run/{RUN_MARKS[0]}"))


def find_inputs(
    inputs: Sequence[Path],
    sources: Sequence[str],
    *,
    layout: str | None = None,
    selection: Selection | None = None,
) -> Inputs:
    """Turn files, folders of files and cohorts into cases with unique ids.

    In a folder that fits no layout, each file is a case of a model with one source.

    Raises:
        CohortError: If an input is missing, holds no case, or files do not come in groups of as many as sources.
    """
    files = [path for path in inputs if path.is_file() and path.name.lower().endswith(VOLUME_SUFFIXES)]
    cases = _group_files(files, sources)
    problems: list[Problem] = []
    notes: list[Problem] = []
    for path in inputs:
        if path not in files:
            cohort = _find_cohort(path, sources, layout, selection)
            cases += cohort.cases
            problems += cohort.problems
            notes += cohort.notes
    problems += [problem for problem in map(unsafe_name, cases) if problem is not None]
    return Inputs(_with_unique_ids(case for case in cases if unsafe_name(case) is None), problems, notes)


def _group_files(files: Sequence[Path], sources: Sequence[str]) -> list[Case]:
    """Make a case of each group of files; a group has one file for each source."""
    size = len(sources)
    if len(files) % size:
        raise CohortError(
            "the number of files is not a multiple of the number of sources",
            reason="sources",
            found=f"{len(files)} files",
            expected=f"{', '.join(sources)} for each case",
        )
    groups = [files[start : start + size] for start in range(0, len(files), size)]
    for group in groups:
        for path, source in zip(group, sources, strict=True):
            _check_name(path, source)
    return [Case(_stem(group[0]), _stem(group[0]), dict(zip(sources, group, strict=True))) for group in groups]


def _check_name(path: Path, source: str) -> None:
    """Refuse a file whose name says that it is another modality.

    Raises:
        CohortError: If it does.
    """
    said = _modality_by_name(volume_stem(path.name) or "")
    of_mr = {*MODALITIES} - {"ct", "cbct"}
    fits = {source} | (of_mr if source == "mr" else {"mr"} if source in of_mr else set())
    if source in MODALITIES and said in MODALITIES + MAPS and said not in fits:
        raise CohortError(
            f"is {said} by its name, but the model takes {source}",
            path=path,
            reason="other-modality",
            hint=f"If it is {source}, give it a name with another ending.",
        )


def _modality_by_name(stem: str) -> str:
    """Return the role that the last word of a name stands for; BIDS names a contrast agent before it (`ce-`)."""
    said = role_of(last_word(stem))
    return "t1ce" if said == "t1" and any(word.startswith("ce-") for word in stem.split("_")) else said


def as_volume(given: Volume | Path | str, source: str, reading: Reading) -> Volume:
    """Return a source as a volume: read from a file, or as it was given, if networks can take it.

    Args:
        given: The volume, or its file.
        source: Which source it is.
        reading: What to assume of a file, and whether skewed axes are made straight.

    Raises:
        CohortError: If the name or the header of a file says that it is another modality.
        VolumeError: If a file cannot be read, a volume is empty or holds values that are complex or not finite, or
            its affine is none of a scan.
        TypeError: If it is neither.
    """
    if isinstance(given, str | os.PathLike):
        _check_name(Path(given), source)
        if other := modality_at(Path(given), source):
            raise CohortError(
                f"is {other} by its header, but the model takes {source}", path=Path(given), reason="other-modality"
            )
        return read_image(Path(given), source, reading)
    if not isinstance(given, Volume):
        raise TypeError(
            f"{source} is a file or a Volume, not {type(given).__name__}; "
            "Volume(array, Geometry(array.shape, affine)) of chiasm.volumes makes one"
        )
    if given.array.dtype.kind not in "buif":
        raise VolumeError(
            f"{source} is no array of real numbers",
            reason="datatype",
            found=given.array.dtype,
            hint="Take the magnitude of complex values: np.abs.",
        )
    if not given.array.size or not np.isfinite(given.array).all():
        raise VolumeError(f"{source} is empty, or holds NaN or infinite values", reason="not-finite")
    return straightened(given) if check_skew(given.geometry, Path(source), reading) else given


def _find_cohort(path: Path, sources: Sequence[str], layout: str | None, selection: Selection | None) -> Cohort:
    """Find the cases of a folder, an archive or a manifest; in a folder of no layout each file is one."""
    if not path.exists():
        raise CohortError("does not exist", path=path, reason="not-found")
    try:
        return select_cases(find_cohort(path, layout=layout, selection=selection), sources, None)
    except CohortError as error:
        if error.reason != "unknown-layout" or len(sources) > 1:
            raise
        cohort = _each_a_case(path, sources[0])
        if not cohort.cases:
            raise
        return cohort


def _with_unique_ids(cases: Iterable[Case]) -> list[Case]:
    """Number the second and every further case of an id: `p1`, `p1-2`, `p1-3`."""
    seen = Counter[str]()
    unique = []
    for case in cases:
        seen[case.id] += 1
        unique.append(case if seen[case.id] == 1 else replace(case, id=f"{case.id}-{seen[case.id]}"))
    return unique


def _each_a_case(folder: Path, source: str) -> Cohort:
    """Make a case of each volume in a folder, and note those in deeper folders or of another format."""
    files = volumes_below(folder)
    here = [file for file in files if "/" not in file.stem]
    cases = tuple(Case(_stem(file.path), _stem(file.path), {source: file.path}) for file in here)
    finds = [Find(case.id, case.id, case.id, source, case.images[source]) for case in cases]
    return with_account(Cohort(folder, "", cases), Finds(finds), files)


def choose_role(
    found: Inputs, only: str, roles: Mapping[str, Role], run: Path, inputs: Sequence[Path | Case]
) -> Inputs:
    """Keep the cases of a role; for all cases, report lost cases as problems.

    Raises:
        RecipeError: If there is no such role.
        RunError: If the split is unknown and the role is not "all".
        CohortError: If no case has the role.
    """
    if only == "all":
        return _with_losses(found)
    if not roles:
        raise RunError("does not say who was trained on", path=run, reason="no-split", hint="Predict all cases.")
    role = "locked" if only == "sealed" else only  # its name in version 0.1
    known = (*SPLIT_ROLES, "out-of-fold")
    if role not in known:
        raise unknown("role", only, ("all", *known))
    chosen = [case for case in found.cases if roles.get(case.id) == role]
    if not chosen:
        place = next(iter(paths_among(inputs)), run)
        raise CohortError(f"holds no {role} case of this run", path=place, reason="no-cases")
    return found._replace(cases=chosen)


def paths_among(inputs: Sequence[Path | Case]) -> list[Path]:
    """Return the inputs that are places, without cases."""
    return [one for one in inputs if isinstance(one, Path)]


def _with_losses(found: Inputs) -> Inputs:
    """Add the lost cases to the problems."""
    lost = [note for note in found.notes if note.reason in LOST]
    others = [note for note in found.notes if note.reason not in LOST]
    return Inputs(found.cases, [*found.problems, *lost], others)


def read_roles(run: Path) -> dict[str, Role]:
    """Map case id to its role, from the split in the model folder; empty where there is none.

    What validates one of several models of a cohort is out of its fold: nothing of the model was fitted to it.

    Raises:
        RunError: If there is no model, or its split is damaged.
    """
    folder = find_model(run)
    if "splits.json" not in read_card(folder).sha256:
        return {}
    split = read_splits(folder / "splits.json").split
    is_part = read_recipe(folder / "recipe.toml").split.models != 1
    roles: dict[str, Role] = {
        "train": "train",
        "validation": "out-of-fold" if is_part else "validation",
        "test": "test",
        "locked": "locked",
    }
    return {name: role for field, role in roles.items() for name in getattr(split, field)}


def check_dicom(cases: Sequence[Case]) -> None:
    """Refuse sources that are not DICOM, if the result must be DICOM.

    Raises:
        VolumeError: If a source is not DICOM.
    """
    for path in (path for case in cases for path in case.images.values() if not is_dicom(path)):
        raise VolumeError(
            "is not DICOM, so a DICOM result would have no patient, study and frame of reference",
            path=path,
            reason="no-dicom",
            hint="Predict from the series, or run chiasm predict without --format dicom to get NIfTI or MetaImage.",
        )


def _stem(path: Path) -> str:
    return volume_stem(path.name) or path.stem
