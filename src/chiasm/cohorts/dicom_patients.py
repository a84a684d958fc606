"""A folder of patients with DICOM series: which series belong together, and which modality each is.

Each folder or zip archive below the root is a patient, whatever lies below it.
Two things make folders one patient's: names that end in a modality
(`P07_T1c`, `P07_T2`) within one study, and one study in all folders of the root,
one scan at most in each.  DICOM files in the root itself make all of it one
patient's.  Patients whose series still have several PatientIDs are taken apart.

A modality is assigned by rules (`t2=SPACE`, from `--series` or `cohort.json`);
one without a rule, by the end of a folder's name, the DICOM modality or the
words of a description where they leave no choice.  Names of patients are never read, and
their ids only as a hash: they tell that two folders are one person's.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import ALIASES, MODALITIES, Case, Problem, role_of, volume_stem
from chiasm.cohorts.completed import is_synthetic
from chiasm.cohorts.folder_roles import FolderRole, role_of_folder, roles_of_folders, roles_of_siblings
from chiasm.cohorts.manifests import MARKS
from chiasm.errors import RecipeError, VolumeError
from chiasm.names import is_safe_id
from chiasm.volumes.dicom_choice import fitting, pick_series
from chiasm.volumes.dicom_files import looks_like_zip
from chiasm.volumes.dicom_kinds import is_kind_word, parse_kind
from chiasm.volumes.dicom_series import LABEL_MAP, SEGMENTATION, Scan, Series, is_dicom, scan_folder_alone, scan_series
from chiasm.volumes.screening import STRICT, Reading

#: What slices lack that `--resample-tilt` mends.
MENDABLE = ("tilt", "uneven")
WITH_AGENT = {"ce", "gd", "gad", "gado", "post", "postcontrast", "contrast", "km", "c"}
NO_PLAIN_CONTRAST = {
    "star",
    "swi",
    "dwi",
    "adc",
    "trace",
    "map",
    "dti",
    "perf",
    "perfusion",
    "bold",
    "mra",
    "tof",
    "pc",
}


@dataclass(frozen=True)
class Selection:
    """Which DICOM series or files are taken, and as what.

    Attributes:
        series: Modality, "mask" or "labels", to number, folder or words of a series.
        alone: The modality that a patient's only scan stands for.
        allow: Of `manifests.MARKS`, those that keep no series out.
        reading: What to assume of files whose header leaves a question open, such as tilted slices.
        select: Words of the names of files that are preferred where a case has several for one image.
        remembered: As `select`, from a training: they hold where that is empty, and need not occur.
        subject_pattern: Takes a case's subject from its id, as `relatives.with_subjects`.
        lenient: Whether that pattern may match no case.
    """

    series: Mapping[str, str] = field(default_factory=dict)
    alone: str | None = None
    allow: Sequence[str] = ()
    reading: Reading = STRICT
    select: Sequence[str] = ()
    remembered: Sequence[str] = ()
    subject_pattern: str = ""
    lenient: bool = False


class Patient(NamedTuple):
    """The series of one patient.

    Attributes:
        id: Of the case.
        subject: The person: equal for two patients whose PatientID is.
        series: In the order of the listing, choices counted from 1.
        broken: DICOM files that are damaged.
        place: The folder or archive.
    """

    id: str
    subject: str
    series: tuple[Series, ...]
    broken: tuple[VolumeError, ...]
    place: Path


class DicomFolder(NamedTuple):
    """What a folder of DICOM series holds.

    Attributes:
        cases: With the path of each modality's series, which `read_volume` reads.
        problems: Series that cannot be used, and files that are damaged.
        listing: Lines that name every series, for choosing; they may hold descriptions.
        notes: Patients of whom no series is known to be a modality.
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
        RecipeError: If a rule names no modality where that is not clear, or a modality comes twice.
    """
    rules: dict[str, str] = {}
    for text in texts:
        name, equals, words = text.partition("=")
        if is_kind_word(name) or not equals:
            name, words = (sources[0], text) if len(sources) == 1 else ("", text)
        role = role_of(name.strip())
        if not words.strip() or not role or role in rules:
            raise RecipeError(
                "a rule for series must name a modality, once, and what its series is called",
                reason="series",
                found=repr(text),
                expected="MODALITY=WORDS, such as t2=SPACE",
            )
        rules[role] = words.strip()
    return rules


def holds_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM or a zip archive, or a folder has one below it; contents count, not names."""
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
        root: What holds the series.
        selection: Which are taken.

    Raises:
        VolumeError: If the place cannot be read.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    listing: list[str] = []
    notes: list[Problem] = []
    for patient in find_patients(root):
        taken, found = assign(patient, selection)
        problems += found
        listing += _listed(patient, taken) if patient.series else ()
        paths: dict[str, Path] = {}
        for role, series in taken.items():
            if (path := path_of(series, patient)) is None:
                message = f"case {patient.id}, {role}: the files of series {series.choice} lie among those of others"
                problems.append(Problem(series.parts[0].place, "scattered", message, patient.id, role))
            else:
                paths[role] = path
        images = {role: path for role, path in sorted(paths.items()) if role not in ("mask", "labels")}
        if images:
            split = _role_of(patient, root)
            cases.append(Case(patient.id, patient.subject, images, paths.get("mask"), paths.get("labels"), split=split))
        elif not found:
            notes.append(_nothing_known(patient, selection.alone or "t1"))
    return DicomFolder(tuple(sorted(cases, key=lambda case: case.id)), tuple(problems), tuple(listing), tuple(notes))


def _nothing_known(patient: Patient, role: str) -> Problem:
    message = f"not used: {patient.id}, of whom no series is known to be a modality; a rule may name one"
    asked = next((f", such as --series {role}={s.choice} ({s.told_kind})" for s in patient.series if s.told_kind), "")
    return Problem(patient.place, "no-series", message + asked, patient.id)


def _role_of(patient: Patient, root: Path) -> str | None:
    """Return the role that the folder above a patient's fixes, or the folder that several patients share."""
    shared = patient.id != _name(patient.place)
    folder = patient.place if shared else patient.place.parent
    found = _roles_below(root).get(folder) or role_of_folder(folder.name)
    return found.role if found and folder != root and folder.is_relative_to(root) else None


def _roles_below(root: Path) -> dict[Path, FolderRole]:
    """Return the folders of a root that fix a role; of numbered folders such as train_001, each is a patient's."""
    names = [child.name for child in _children(root) if child.is_dir()] if root.is_dir() else []
    found = roles_of_siblings(names)
    trained = Counter(re.sub(r"\d+$", "", name) for name, role in found.items() if role.role == "train")
    if max(trained.values(), default=0) > 1:
        found = roles_of_folders(names)
    return {root / name: role for name, role in found.items()}


# --- patients ----------------------------------------------------------------------------------------------------


def find_patients(root: Path) -> Iterator[Patient]:
    """Yield the patients of a folder, an archive or around a file, one after another.

    Raises:
        VolumeError: If the place cannot be read.
    """
    subjects: dict[str, str] = {}
    for name, place, scan in _groups(root):
        people = sorted({series.patient for series in scan.series if series.images and series.patient})
        for person in people or [""]:
            # what names nobody goes to the first
            mine = [s for s in scan.series if s.patient == person or (person in people[:1] and s.patient not in people)]
            named = name if is_safe_id(name) else "patient"
            case = named if len(people) < 2 and named == name else f"{named}-{person[:8]}"
            series = tuple(one.numbered(place) for place, one in enumerate(mine, start=1))
            if any(one.images for one in series) or scan.broken:
                subject = subjects.setdefault(person, case) if person else case
                yield Patient(case, subject, series, scan.broken, place)


def _groups(root: Path) -> Iterator[tuple[str, Path, Scan]]:
    """Yield what belongs to one patient by its place: a name, the place, and its series."""
    whole = not root.is_dir()
    children: list[Path] = []
    if not whole:
        whole = any(series.images for series in scan_folder_alone(root).series)
        children = _patients_below(root)
        children = [child for child in children if child.is_dir() or (child.is_file() and _is_zip(child))]
    if whole:
        yield _name(root), root, scan_series(root)
        return
    halves: dict[str, list[tuple[Path, Scan]]] = defaultdict(list)
    studies: set[str] = set()
    single: list[tuple[Path, Scan]] = []
    scans = ((child, scan) for child in children if (scan := _scan_of(child)).series or scan.broken)
    for child, scan in scans:
        lone = sum(series.is_scan for series in scan.series) <= 1 and len({s.study_uid for s in scan.series}) == 1
        if not lone:
            yield _name(child), child, scan
            studies.add(str(child))  # more than one study: not all of the root is one patient's
            continue
        studies.add(scan.series[0].study_uid)
        single.append((child, scan))
    if len(single) > 1 and len(studies) == 1 and "" not in studies:
        yield _name(root), root, _together(single)
        return
    for child, scan in single:
        stem = _stem(child.name) if role_of(_last_word(child.name)) in (*MODALITIES, "mask", "labels") else None
        halves[f"{stem}\n{scan.series[0].study_uid}" if stem else str(child)].append((child, scan))
    for key, members in halves.items():
        child, scan = members[0]
        if len(members) > 1:
            yield key.partition("\n")[0], root, _together(members)
        else:
            yield _name(child), child, scan


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith((".", "__MACOSX")))


def _patients_below(root: Path) -> list[Path]:
    """List what may hold a patient: folders and archives, and where two folders or more fix roles, what these hold."""
    children, roles = _children(root), _roles_below(root)
    if len({found.role for found in roles.values()}) < 2:  # one folder called test may be a patient's
        return children
    return [inside for child in children for inside in (_children(child) if child in roles else [child])]


def _scan_of(child: Path) -> Scan:
    """Find the series of one patient; a place that cannot be listed is that patient's fault and nobody else's."""
    try:
        return scan_series(child)
    except VolumeError as error:
        return Scan((), (error,))


def _together(members: Sequence[tuple[Path, Scan]]) -> Scan:
    return Scan(
        tuple(series for _, scan in members for series in scan.series),
        tuple(error for _, scan in members for error in scan.broken),
    )


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as content:
            return looks_like_zip(content.read(4))
    except OSError:  # whoever opens it next says why
        return True


def _name(place: Path) -> str:
    name = place.absolute().name
    return place.stem if place.suffix.lower() in (".zip", ".dcm", ".ima") else name


def _last_word(name: str) -> str:
    return re.split(r"[_\-. ]", name)[-1]


def _stem(name: str) -> str:
    return name[: -len(_last_word(name))].rstrip("_-. ")


# --- modalities --------------------------------------------------------------------------------------------------


def assign(patient: Patient, selection: Selection) -> tuple[dict[str, Series], list[Problem]]:
    """Say which modality each series of a patient is, and which cannot be used, with reasons."""
    problems = [Problem(error.path or patient.place, error.reason, str(error), patient.id) for error in patient.broken]
    images = [series for series in patient.series if series.images]
    taken: dict[str, Series] = {}
    for role, found in _candidates(images, selection).items():
        if len(found) == 1 and (problem := _unfit(found[0], role, patient, selection)) is not None:
            problems.append(problem)
        elif len(found) == 1:
            taken[role] = found[0]
        elif found:
            listed = "; ".join(series.told() for series in found[:8])
            message = (
                f"case {patient.id} has several series that may be {role}: {listed}; "
                f"choose with chiasm train --series {role}=NUMBER, or words that fit one of them only"
            )
            problems.append(Problem(patient.place, "several-series", message, patient.id, role))
    drawn = [series for series in images if series.sop_class in (SEGMENTATION, LABEL_MAP)]
    frames = {series.frame_uid for series in taken.values()}
    if len(drawn) == 1 and frames == {drawn[0].frame_uid} and "labels" not in selection.series:
        taken["labels"] = drawn[0]
    return taken, problems


def _candidates(images: Sequence[Series], selection: Selection) -> dict[str, list[Series]]:
    """Return the series that may be each modality: by rules, and for modalities without a rule by what they say."""
    scans = [series for series in images if series.is_scan]
    scans = scans or [series for series in images if series.localizer]  # so that someone is told
    fits = {role: _ruled(role, words, images, scans) for role, words in selection.series.items()}
    if not fits and selection.alone is not None and len({series.uid for series in scans}) == 1:
        return {selection.alone: [series for series in scans if not series.shows_no_contrast]}
    ruled = {id(series) for found in fits.values() for series in found}
    for series in scans:
        role = guess_modality(series, scans)
        if role and role not in selection.series and id(series) not in ruled:
            fits.setdefault(role, []).append(series)
    return fits


def _ruled(role: str, words: str, images: Sequence[Series], scans: Sequence[Series]) -> list[Series]:
    """Return the series that fit a rule; words for kinds alone choose among those that may be the modality, if any."""
    _, description = parse_kind(words)
    own = [] if description else [series for series in scans if _modality_of(series, scans) == role]
    return fitting(own or images, words)


def _unfit(series: Series, role: str, patient: Patient, selection: Selection) -> Problem | None:
    """Say why a series cannot be used."""
    fault = series.fault
    if fault is not None and not (selection.reading.resample_tilt and fault.reason in MENDABLE):
        return Problem(patient.place, fault.reason, f"case {patient.id}, {role}: {fault}", patient.id, role)
    for mark in marks_of(series):
        if mark not in selection.allow:
            told = WARNINGS[mark]
            message = f'case {patient.id}, {role}: {told}; allow it with {{"allow": ["{mark}"]}} in cohort.json'
            return Problem(patient.place, mark, message, patient.id, role)
    return None


WARNINGS = {
    "burned-in": "the DICOM series says that identifying text is drawn into its images",
    "synthetic": "the image says of itself that it was made, not acquired",
}


def marks_of(series: Series) -> tuple[str, ...]:
    """Return which of `manifests.MARKS` a series says of itself."""
    said = {"burned-in": series.burned_in, "synthetic": series.synthetic}
    return tuple(mark for mark in MARKS if said[mark])


def marks_at(path: Path) -> tuple[str, ...]:
    """Return which of `manifests.MARKS` the images at a path say of themselves; NIfTI by its name and sidecar.

    Raises:
        VolumeError: If it is DICOM and cannot be read.
    """
    if volume_stem(path.name) and path.is_file():
        return ("synthetic",) if is_synthetic(path) else ()
    return marks_of(pick_series(path)) if holds_dicom(path) else ()


def marks_on(case: Case, modality: str) -> tuple[str, ...]:
    """Return which of `manifests.MARKS` keep an image of a case from training: its own, and what a manifest says of it.

    Raises:
        VolumeError: If it is DICOM and cannot be read.
    """
    told = ("synthetic",) if modality in case.synthetic else ()
    return tuple(dict.fromkeys((*marks_at(case.images[modality]), *told)))


def guess_modality(series: Series, scans: Sequence[Series]) -> str | None:
    """Guess a modality where folder, header or description leave no choice; None where they do, and for phase and maps.

    Args:
        series: One of
        scans: all scans of its patient.
    """
    return None if series.shows_no_contrast else _modality_of(series, scans)


def _modality_of(series: Series, scans: Sequence[Series]) -> str | None:
    by_folder = role_of(_last_word(series.parts[0].place.parent.name))
    if by_folder in MODALITIES:
        return by_folder
    if series.modality == "CT":
        return "ct"
    if series.modality != "MR":
        return None
    text = series.description.lower() or series.protocol.lower()
    words = set(re.split(r"[^a-z0-9*]+", text))
    if not words & NO_PLAIN_CONTRAST and "*" not in text:
        known = {ALIASES.get(word, word) for word in words} & {"t1", "t1ce", "t2", "flair", "pd"}
        found = known - {"t2"} if "flair" in known else known
        if found == {"t1"} and (series.contrast or words & WITH_AGENT):
            return "t1ce"
        if len(found) == 1:
            return found.pop()
    others = [one for one in scans if one.modality == "MR" and not (one.apart and one.uid == series.uid)]
    return "mr" if len(others) == (0 if series.apart else 1) else None


def path_of(series: Series, patient: Patient) -> Path | None:
    """Return the path by which `read_volume` reads a series of a patient; None where its files are scattered.

    It is the folder or archive that holds no other scan, else one file, which
    stands for all of the series in its folder; for some of the images of a
    multi-frame file, a path that goes on into it.
    """
    parts = series.parts
    others = [part for other in patient.series if other.is_scan and other is not series for part in other.parts]
    if series.apart and set(parts) & set(others):
        return parts[0].place / series.apart if len(parts) == 1 or series.concatenated else None
    if len(parts) == 1 and series.images > 1:
        return parts[0].place
    shared = Path(os.path.commonpath([part.place.parent for part in parts]))
    if parts[0].member is not None and not any(part.path == parts[0].path for part in others):
        return parts[0].path if series.is_scan else parts[0].place
    alone = not any(part.place.is_relative_to(shared) for part in others)
    if alone and series.is_scan and parts[0].member is None:
        return shared
    return parts[0].place if all(part.place.parent == shared for part in parts) else None


def _listed(patient: Patient, taken: Mapping[str, Series]) -> Iterator[str]:
    person = "" if patient.subject == patient.id else f" (the same person as {patient.subject})"
    yield f"{patient.id}{person}:"
    roles = {series.choice: role for role, series in taken.items()}
    without = 0
    for series in patient.series:
        if not series.images:
            without += 1
            continue
        name = series.description or series.protocol
        told = f"  {series.told()}" + (f", {name!r}" if name else "")
        yield told + (f" -> {roles[series.choice]}" if series.choice in roles else "")
    if without:
        yield f"  and {without} without images, such as reports"
