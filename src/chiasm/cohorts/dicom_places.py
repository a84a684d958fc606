"""The patients of a folder of DICOM: which places below it, and which series, belong to one patient.

Each folder or zip archive below the root is a patient, with everything below it.  Several folders belong to one patient
in two cases: if their names end in a modality (`P07_T1c`, `P07_T2`) and they are of one study, or if all folders of the
root are of one study and each has one scan at most.  If DICOM files lie in the root itself, the whole root is one
patient.  A patient whose series have several PatientIDs is divided by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import MAPS, MODALITIES, grouped, only, repeated, role_of
from chiasm.cohorts.dicom_modalities import last_word
from chiasm.cohorts.folder_roles import FolderRole, role_of_folder, roles_of_folders, roles_of_siblings
from chiasm.errors import VolumeError
from chiasm.names import is_safe_id
from chiasm.volumes.archives import looks_like_zip
from chiasm.volumes.dicom_scan import Scan, in_order, scan_folder_alone, scan_series
from chiasm.volumes.dicom_series import Series


class Patient(NamedTuple):
    """The series of one patient.

    Attributes:
        id: Of the case.
        subject: The person: equal for two patients with the same PatientID.
        series: In the order of the listing, choices counted from 1.
        broken: DICOM files that are damaged.
        place: The folder or archive.
    """

    id: str
    subject: str
    series: tuple[Series, ...]
    broken: tuple[VolumeError, ...]
    place: Path

    @property
    def readable(self) -> list[Series]:
        """Its series that may be read as a volume, without reports and similar objects."""
        return [one for one in self.series if one.is_readable]


def find_patients(root: Path) -> Iterator[Patient]:
    """Yield the patients of a folder, an archive or around a file, one after another.

    Raises:
        VolumeError: If the place cannot be read.
    """
    subjects: dict[str, str] = {}
    for group in _groups(root):
        yield from _patients_of(group, subjects)


def role_of_patient(patient: Patient, root: Path) -> str | None:
    """Return the role that the folder above a patient's fixes, or the folder that several patients share."""
    folder = _folder_of(patient)
    found = _roles_below(root).get(folder) or role_of_folder(folder.name)
    return found.role if found and folder != root and folder.is_relative_to(root) else None


def _folder_of(patient: Patient) -> Path:
    """Return the folder whose name may fix a patient's role: the one above, or the one that several patients share."""
    is_shared = patient.id != _name(patient.place)
    return patient.place if is_shared else patient.place.parent


def _roles_below(root: Path) -> dict[Path, FolderRole]:
    """Return the folders of a root that fix a role; numbered folders such as train_001 are patients and fix none."""
    names = _folders_in(root)
    found = roles_of_siblings(names)
    if _are_numbered_patients(found):
        found = roles_of_folders(names)
    return {root / name: role for name, role in found.items()}


def _folders_in(root: Path) -> list[str]:
    """Return the names of the folders in a root; none where it is a file."""
    return [child.name for child in _children(root) if child.is_dir()] if root.is_dir() else []


def _are_numbered_patients(found: Mapping[str, FolderRole]) -> bool:
    """Return whether folders with the role "train" differ only in a number at their end."""
    trained = [re.sub(r"\d+$", "", name) for name, role in found.items() if role.role == "train"]
    return bool(repeated(trained))


class _PatientGroup(NamedTuple):
    """What belongs to one patient by its place."""

    name: str
    place: Path
    scan: Scan


class _PatientPlace(NamedTuple):
    """A folder or archive below a root, and its series."""

    path: Path
    scan: Scan

    @property
    def is_lone(self) -> bool:
        """Whether it holds one study, and one scan at most."""
        series = self.scan.series
        return sum(one.is_scan for one in series) <= 1 and len({one.study_uid for one in series}) == 1

    @property
    def study(self) -> str:
        """The study of its first series."""
        return self.scan.series[0].study_uid


def _patients_of(group: _PatientGroup, subjects: dict[str, str]) -> Iterator[Patient]:
    """Yield one patient for each PatientID of a group; `subjects` remembers the persons of all groups."""
    people = _people_of(group.scan)
    for person in people or [""]:
        series = _series_of(person, people, group.scan)
        if group.scan.broken or _hold_images(series):
            case = _case_name(group.name, person, people)
            subject = subjects.setdefault(person, case) if person else case
            yield Patient(case, subject, series, group.scan.broken, group.place)


def _people_of(scan: Scan) -> list[str]:
    """Return the persons who are named by series with images."""
    return sorted({series.patient for series in scan.series if series.images} - {""})


def _hold_images(series: Iterable[Series]) -> bool:
    """Return whether a series holds images and is not a report or similar object."""
    return any(one.images for one in series)


def _case_name(place: str, person: str, people: Sequence[str]) -> str:
    """Name a case by its place; add the person if the place does not separate patients or is not a safe name."""
    name = place if is_safe_id(place) else "patient"
    return name if name == place and len(people) < 2 else f"{name}-{person[:8]}"


def _series_of(person: str, people: Sequence[str], scan: Scan) -> tuple[Series, ...]:
    """Return the series of one person, counted from 1; series without a PatientID go to the first person."""
    is_first = person in people[:1]
    return in_order(one for one in scan.series if one.patient == person or (is_first and one.patient not in people))


def _groups(root: Path) -> Iterator[_PatientGroup]:
    """Yield what belongs to one patient by its place."""
    if not root.is_dir() or _hold_images(scan_folder_alone(root).series):
        return iter([_PatientGroup(_name(root), root, scan_series(root))])
    return _groups_below(root)


def _groups_below(root: Path) -> Iterator[_PatientGroup]:
    """Yield a patient for each place below a root; one patient for all places of one study, or with one name."""
    lone: list[_PatientPlace] = []
    studies: set[str] = set()
    for place in _places_below(root):
        if place.is_lone:
            lone.append(place)
            studies.add(place.study)
        else:
            studies.add("")  # more than one study: not all of the root is one patient's
            yield _PatientGroup(_name(place.path), *place)
    shared_study = only(studies)
    if len(lone) > 1 and shared_study:
        yield _PatientGroup(_name(root), root, _together(lone))
    else:
        yield from _groups_by_name(lone, root)


def _places_below(root: Path) -> Iterator[_PatientPlace]:
    """Scan the places that may hold a patient, one after another, and yield those with DICOM."""
    for child in filter(_may_hold_dicom, _patients_below(root)):
        scan = _scan_of(child)
        if scan.series or scan.broken:
            yield _PatientPlace(child, scan)


def _may_hold_dicom(path: Path) -> bool:
    """Return whether a place is a folder or a zip archive."""
    return path.is_dir() or (path.is_file() and _is_zip(path))


def _groups_by_name(places: Sequence[_PatientPlace], root: Path) -> Iterator[_PatientGroup]:
    """Join the places of one study whose names are equal except for a modality at their end."""
    for (stem, _), members in grouped(places, _name_and_study).items():
        if len(members) > 1:
            yield _PatientGroup(stem, root, _together(members))
        else:
            yield _PatientGroup(_name(members[0].path), *members[0])


def _name_and_study(place: _PatientPlace) -> tuple[str, str]:
    """Return a place's name without the modality, and its study; without a modality, its whole path alone."""
    name = place.path.name
    stem = _stem(name) if role_of(last_word(name)) in (*MODALITIES, *MAPS) else ""
    return (stem, place.study) if stem else (str(place.path), "")


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith((".", "__MACOSX")))


def _patients_below(root: Path) -> list[Path]:
    """List folders and archives that may hold a patient; if two folders or more fix roles, list their contents."""
    children, roles = _children(root), _roles_below(root)
    if len({found.role for found in roles.values()}) < 2:  # one folder called test may be a patient's
        return children
    return [inside for child in children for inside in (_children(child) if child in roles else [child])]


def _scan_of(child: Path) -> Scan:
    """Find the series of one patient; a place that cannot be listed is a problem of that patient only."""
    try:
        return scan_series(child)
    except VolumeError as error:
        return Scan((), (error,))


def _together(places: Sequence[_PatientPlace]) -> Scan:
    return Scan(
        in_order(series for place in places for series in place.scan.series),
        tuple(error for place in places for error in place.scan.broken),
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


def _stem(name: str) -> str:
    return name[: -len(last_word(name))].rstrip("_-. ")
