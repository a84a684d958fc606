"""A folder of patients with DICOM series: which series belong together, and which modality each is.

Rules assign modalities to series (`t2=SPACE`, from `--series` or `cohort.json`).  A modality without a rule is
recognised by the end of a folder's name, the DICOM modality or the words of a description, if only one series fits.
Names of patients are never read.  Their ids are used only as a hash, to find folders of one person.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import (
    MAPS,
    Case,
    Problem,
    grouped,
    only,
    role_of,
    volume_stem,
    with_files,
    without_problems_by_role,
)
from chiasm.cohorts.completed import is_synthetic
from chiasm.cohorts.dicom_modalities import guess_modality, modality_of, other_modality
from chiasm.cohorts.dicom_places import Patient, find_patients, role_of_patient
from chiasm.cohorts.folder_notes import MARKS
from chiasm.errors import RecipeError
from chiasm.volumes.dicom_choice import fitting, pick_series
from chiasm.volumes.dicom_files import DicomFile
from chiasm.volumes.dicom_kinds import is_kind_word, parse_kind
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.dicom_structures import has_usual_labels
from chiasm.volumes.screening import STRICT, Reading

#: What slices lack that `--resample-tilt` mends.
MENDABLE = ("tilt", "uneven")


@dataclass(frozen=True)
class Selection:
    """The DICOM series and files to use, and their modalities.

    Attributes:
        series: Modality, "mask" or "labels", to number, folder or words of a series.
        alone: The modality that a patient's only scan stands for.
        allow: Marks of `manifests.MARKS` that do not exclude a series.
        reading: What to assume of files whose header leaves a question open, such as tilted slices.
        select: Words in the names of preferred files, if a case has several files for one image.
        remembered: As `select`, from a training: used if `select` is empty; they need not occur.
        subject_pattern: Takes a case's subject from its id, as `relatives.with_subjects`.
        lenient: Whether that pattern may match no case.
        structures: Region name, or "mask", to the names of structures in a structure set.
    """

    series: Mapping[str, str] = field(default_factory=dict)
    alone: str | None = None
    allow: Sequence[str] = ()
    reading: Reading = STRICT
    select: Sequence[str] = ()
    remembered: Sequence[str] = ()
    subject_pattern: str = ""
    lenient: bool = False
    structures: Mapping[str, Sequence[str]] = field(default_factory=dict)


class DicomFolder(NamedTuple):
    """What a folder of DICOM series holds.

    Attributes:
        cases: With the path of each modality's series, which `read_volume` reads.
        problems: Series that cannot be used, and files that are damaged.
        listing: Lines that name every series, for choosing; they may hold descriptions.
        notes: Patients without a series that is recognised as a modality.
    """

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    listing: tuple[str, ...]
    notes: tuple[Problem, ...] = ()


def parse_rules(texts: Iterable[str], sources: Sequence[str] = ()) -> dict[str, str]:
    """Read rules such as ``t2=SPACE``; a rule without a modality is for the only source.

    >>> parse_rules(["T1c=post contrast", "t2=5"])
    {'t1ce': 'post contrast', 't2': '5'}
    >>> parse_rules(["TE=30"], ["t2"])
    {'t2': 'TE=30'}

    Raises:
        RecipeError: If a rule without a modality is ambiguous, or a modality comes twice.
    """
    rules: dict[str, str] = {}
    for text in texts:
        role, words = _parse_rule(text, sources)
        if not words or not role or role in rules:
            raise RecipeError(
                "a rule for series must name a modality, once, and words of its series",
                reason="series",
                found=repr(text),
                expected="MODALITY=WORDS, such as t2=SPACE",
            )
        rules[role] = words
    return rules


def _parse_rule(text: str, sources: Sequence[str]) -> tuple[str, str]:
    """Separate a rule into the modality ("" if that is not clear) and the words for its series."""
    name, equals, words = text.partition("=")
    if is_kind_word(name) or not equals:
        name, words = only(sources) or "", text
    return role_of(name.strip()), words.strip()


def holds_dicom(path: Path) -> bool:
    """Return whether a file is DICOM or a zip archive, or a folder contains one; names of files do not matter."""
    seen: set[str] = set()

    def below(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen or not os.access(folder, os.R_OK | os.X_OK):
            return
        seen.add(real)
        for inside in sorted(folder.iterdir()):
            if inside.is_dir():
                yield from below(inside)
            elif not inside.name.startswith("."):
                yield inside

    files = below(path) if path.is_dir() else [path]
    return any(is_dicom(file) for file in files if file.is_file() and os.access(file, os.R_OK))


def read_dicom_folder(root: Path, selection: Selection) -> DicomFolder:
    """Find the patients of a folder, an archive or around a file, and assign a modality to their series.

    Args:
        root: The folder, archive or file with the series.
        selection: The series to use.

    Raises:
        VolumeError: If the place cannot be read.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    listing: list[str] = []
    notes: list[Problem] = []
    for patient in find_patients(root):
        taken, found = assign(patient, selection)
        listing += _listed(patient, taken)
        files, scattered = _files_of(patient, taken)
        files = _naming_structures(files, taken, selection)
        problems += [*found, *scattered]
        case = with_files(Case(patient.id, patient.subject, {}), dict(sorted(files.items())))
        if case.images:
            cases.append(replace(case, split=role_of_patient(patient, root)))
        elif not found:
            notes.append(_nothing_known(patient, selection.alone or "t1"))
    return DicomFolder(tuple(sorted(cases, key=lambda case: case.id)), tuple(problems), tuple(listing), tuple(notes))


def _files_of(patient: Patient, taken: Mapping[str, Series]) -> tuple[dict[str, Path], list[Problem]]:
    """Return the path of each used series, by role, and the problems of series without a path."""
    return without_problems_by_role({role: _one_path(series, role, patient) for role, series in taken.items()})


def _one_path(series: Series, role: str, patient: Patient) -> Path | Problem:
    """Return the path of a series, or say why none stands for it."""
    if series.is_drawn and len(series.parts) > 1:
        message = f"case {patient.id}, {role}: series {series.choice} holds {len(series.parts)} maps; keep one of them"
        return Problem(series.parts[0].place, "several-series", message, patient.id, role)
    return path_of(series, patient) or _scattered(series, role, patient)


def _scattered(series: Series, role: str, patient: Patient) -> Problem:
    """Say that no path stands for a series."""
    message = f"case {patient.id}, {role}: the files of series {series.choice} lie among files of other series"
    return Problem(series.parts[0].place, "scattered", message, patient.id, role)


def _naming_structures(files: dict[str, Path], taken: Mapping[str, Series], selection: Selection) -> dict[str, Path]:
    """Extend the path of a structure set by the names of the structures for labels and mask."""
    series = taken.get("labels")
    if series is None or not series.is_structure_set or "labels" not in files:
        return files
    path = files["labels"]
    others = {role: file for role, file in files.items() if role != "labels"}
    return {**_mask_inside(path, selection), **others, **_labels_inside(path, series, selection)}


def _mask_inside(path: Path, selection: Selection) -> dict[str, Path]:
    """Return the path of the structures that make the mask; None if there are none."""
    names = structures_of(selection.structures, "mask")
    return {"mask": path / names} if names else {}


def _labels_inside(path: Path, series: Series, selection: Selection) -> dict[str, Path]:
    """Return the path of the structures that make the labels: the named ones, or else the usual ones."""
    names = structures_of(selection.structures, "labels")
    if names:
        return {"labels": path / names}
    is_clear = "labels" in selection.series or has_usual_labels(series.structures)
    return {"labels": path} if is_clear else {}


def structures_of(structures: Mapping[str, Sequence[str]], role: str) -> str:
    """Name the structures of "labels" or "mask" as `dicom_structures.labels_in` takes them."""
    return "|".join(",".join(names) for name, names in structures.items() if (name == "mask") == (role == "mask"))


def _nothing_known(patient: Patient, role: str) -> Problem:
    message = f"not used: {patient.id}: no series of this patient is recognised as a modality; a rule may choose one"
    asked = next((f", such as --series {role}={s.choice} ({s.kind_words})" for s in patient.series if s.kind_words), "")
    return Problem(patient.place, "no-series", message + asked, patient.id)


# --- modalities --------------------------------------------------------------------------------------------------


def assign(patient: Patient, selection: Selection) -> tuple[dict[str, Series], list[Problem]]:
    """Return the series of each modality of a patient, and the problems of others."""
    images = patient.readable
    candidates = {role: found for role, found in _candidates(images, selection).items() if found}
    taken, problems = without_problems_by_role(
        {role: _only_one(found, role, patient, selection) for role, found in candidates.items()}
    )
    if "labels" not in selection.series:
        taken |= _drawn_on(images, taken.values())
    return taken, [*_damaged(patient), *problems]


def _damaged(patient: Patient) -> list[Problem]:
    """Say which files of a patient are damaged."""
    return [Problem(error.path or patient.place, error.reason, str(error), patient.id) for error in patient.broken]


def _only_one(found: Sequence[Series], role: str, patient: Patient, selection: Selection) -> Series | Problem:
    """Return the only series that may be a modality, or say why none is taken; acquired images go before made ones."""
    found = _acquired_first(found)
    if len(found) == 1:
        return _unfit(found[0], role, patient, selection) or found[0]
    listed = "; ".join(series.described() for series in found[:8])
    message = (
        f"case {patient.id} has several series that may be {role}: {listed}; "
        f"choose with chiasm train --series {role}=NUMBER, or words that fit one of them only"
    )
    return Problem(patient.place, "several-series", message, patient.id, role)


def _acquired_first(found: Sequence[Series]) -> Sequence[Series]:
    """Leave out series that were made, unless there are no others."""
    return [series for series in found if not series.synthetic] or found


def _drawn_on(images: Sequence[Series], taken: Iterable[Series]) -> dict[str, Series]:
    """Return the only label map of a patient, if it lies in the frame of reference of all series that are taken."""
    drawn = only([series for series in images if series.is_drawn])
    frames = {series.frame_uid for series in taken}
    return {} if drawn is None or frames != {drawn.frame_uid} else {"labels": drawn}


def _candidates(images: Sequence[Series], selection: Selection) -> dict[str, list[Series]]:
    """Return the possible series of each modality: by rules, or by header and description if there is no rule."""
    scans = _scans_among(images)
    fits = {role: _ruled(role, words, images, scans) for role, words in selection.series.items()}
    fits = fits or _lone_scan(scans, selection.alone)
    return fits | _guessed(scans, fits)


def _lone_scan(scans: Sequence[Series], modality: str | None) -> dict[str, list[Series]]:
    """Return a patient's only scan under the modality that `alone` names; never phase or a map."""
    scans = _acquired_first(scans)
    if modality is None or len({series.uid for series in scans}) != 1:
        return {}
    return {modality: [series for series in scans if not series.shows_no_contrast]}


def _scans_among(images: Sequence[Series]) -> list[Series]:
    """Return the scans; where there are none, the localizers, so that they are reported."""
    scans = [series for series in images if series.is_scan]
    return scans or [series for series in images if series.localizer]


def _guessed(scans: Sequence[Series], fits: Mapping[str, Sequence[Series]]) -> dict[str, list[Series]]:
    """Return the scans that fit no rule, by their own modality, for modalities without a rule."""
    ruled = set(chain.from_iterable(fits.values()))
    free = [series for series in scans if series not in ruled]
    guessed = grouped(free, lambda series: guess_modality(series, scans))
    return {role: found for role, found in guessed.items() if role and role not in fits}


def _ruled(role: str, words: str, images: Sequence[Series], scans: Sequence[Series]) -> list[Series]:
    """Return the series that fit a rule; words for kinds choose only among series that may be the modality.

    A segmentation is often named after its scan, so it is taken for a modality only where no image fits.
    """
    _, description = parse_kind(words)
    own = [] if description else [series for series in scans if modality_of(series, scans) == role]
    found = fitting(own or images, words)
    return found if role in MAPS else [series for series in found if not series.is_drawn] or found


def _unfit(series: Series, role: str, patient: Patient, selection: Selection) -> Problem | None:
    """Say why a series cannot be used."""
    fault = series.fault
    if fault is not None and not (selection.reading.resample_tilt and fault.reason in MENDABLE):
        return Problem(patient.place, fault.reason, f"case {patient.id}, {role}: {fault}", patient.id, role)
    if role == selection.alone and role not in selection.series and (other := other_modality(series, role)):
        message = (
            f"case {patient.id}: series {series.choice} is {other} by its header, not {role}; "
            f"if it is {role}, choose it with --series {role}={series.choice}"
        )
        return Problem(patient.place, "other-modality", message, patient.id, role)
    mark = forbidden_mark(marks_of(series), selection.allow)
    if mark is None:
        return None
    message = f'case {patient.id}, {role}: {WARNINGS[mark]}; allow it with {{"allow": ["{mark}"]}} in cohort.json'
    return Problem(patient.place, mark, message, patient.id, role)


WARNINGS = {
    "burned-in": "the DICOM series says that identifying text is drawn into its images",
    "synthetic": "its header says that the image is synthetic",
}


def forbidden_mark(marks: Iterable[str], allow: Collection[str]) -> str | None:
    """Return the first mark that keeps an image from training, or None where all are allowed."""
    return next((mark for mark in marks if mark not in allow), None)


def marks_of(series: Series) -> tuple[str, ...]:
    """Return the marks of `manifests.MARKS` in the header of a series."""
    said = {"burned-in": series.burned_in, "synthetic": series.synthetic}
    return tuple(mark for mark in MARKS if said[mark])


def marks_at(path: Path) -> tuple[str, ...]:
    """Return the marks of `manifests.MARKS` on the images at a path; of NIfTI, by its name and sidecar.

    Raises:
        VolumeError: If it is DICOM and cannot be read.
    """
    if _is_volume(path):
        return ("synthetic",) if is_synthetic(path) else ()
    return marks_of(pick_series(path)) if holds_dicom(path) else ()


def modality_at(path: Path, modality: str) -> str:
    """Return the modality in the header of the images at a path, if it excludes another one; "" where it does not.

    Raises:
        VolumeError: If it is DICOM and cannot be read.
    """
    is_dicom_series = not _is_volume(path) and holds_dicom(path)
    return other_modality(pick_series(path), modality) if is_dicom_series else ""


def _is_volume(path: Path) -> bool:
    """Return whether a path is a file of another format than DICOM, by its name."""
    return volume_stem(path.name) is not None and path.is_file()


def marks_on(case: Case, modality: str) -> tuple[str, ...]:
    """Return the marks of `manifests.MARKS` that exclude an image from training: its own, and those of a manifest.

    Raises:
        VolumeError: If it is DICOM and cannot be read.
    """
    synthetic = ("synthetic",) if modality in case.synthetic else ()
    return tuple(dict.fromkeys((*marks_at(case.images[modality]), *synthetic)))


def path_of(series: Series, patient: Patient) -> Path | None:
    """Return the path by which `read_volume` reads a series of a patient; None where its files are scattered.

    It is the folder or archive, if that holds no other scan.  Otherwise it is one file, which stands for its whole
    series in the folder.  For some images of a multi-frame file, it is a path inside the file.
    """
    parts, others = series.parts, _parts_of_others(series, patient)
    if series.apart and not set(parts).isdisjoint(others):
        return _path_into_file(series)
    if len(parts) == 1 and series.images > 1:
        return parts[0].place
    return _path_of_files(series, others)


def _path_into_file(series: Series) -> Path | None:
    """Return the path inside a multi-frame file for some of its images; None for other files."""
    is_multi_frame = len(series.parts) == 1 or series.concatenated
    return series.parts[0].place / series.apart if is_multi_frame else None


def _path_of_files(series: Series, others: Sequence[DicomFile]) -> Path | None:
    """Return the folder or archive that holds only this series, else one of its files if all lie in one folder."""
    folders = {part.place.parent for part in series.parts}
    shared = Path(os.path.commonpath(folders))
    return _holder_alone(series, shared, others) or (series.parts[0].place if folders == {shared} else None)


def _parts_of_others(series: Series, patient: Patient) -> list[DicomFile]:
    """Return the files of the other scans of a patient."""
    others = [other for other in patient.series if other.is_scan and other is not series]
    return list(chain.from_iterable(other.parts for other in others))


def _holder_alone(series: Series, shared: Path, others: Sequence[DicomFile]) -> Path | None:
    """Return the archive, or the folder that all files share, if it holds no other scan."""
    first = series.parts[0]
    if first.member is not None:
        return _archive_alone(series, others)
    is_alone = not any(part.place.is_relative_to(shared) for part in others)
    return shared if is_alone and series.is_scan else None


def _archive_alone(series: Series, others: Sequence[DicomFile]) -> Path | None:
    """Return the archive of a series if it holds no other scan; one of its members for objects other than scans."""
    first = series.parts[0]
    if any(part.path == first.path for part in others):
        return None
    return first.path if series.is_scan else first.place


def _listed(patient: Patient, taken: Mapping[str, Series]) -> list[str]:
    """Return the lines that list the series of a patient, if there are any."""
    if not patient.series:
        return []
    roles = {series.choice: role for role, series in taken.items()}
    lines = [_line_of(series, roles.get(series.choice)) for series in patient.readable]
    without = len(patient.series) - len(lines)
    others = [f"  and {without} without images, such as reports"] if without else []
    return [_heading_of(patient), *lines, *others]


def _heading_of(patient: Patient) -> str:
    """Return the line above the series of a patient."""
    person = "" if patient.subject == patient.id else f" (the same person as {patient.subject})"
    return f"{patient.id}{person}:"


def _line_of(series: Series, role: str | None) -> str:
    """Return the line of a series: its description, and its role in the case."""
    name = series.description or series.protocol
    structures = f": {', '.join(series.structures)}" if series.structures else ""
    return f"  {series.described()}" + (f", {name!r}" if name else "") + structures + (f" -> {role}" if role else "")
