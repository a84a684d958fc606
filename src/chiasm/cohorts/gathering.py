"""From the files that a layout understands to cases, with notes on every file that is not used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import (
    MAPS,
    Case,
    Cohort,
    Problem,
    grouped,
    repeated,
    volume_stem,
    with_files,
    with_unique_ids,
    without_problems,
)
from chiasm.cohorts.folder_roles import (
    FolderRole,
    describe_folder_roles,
    find_folder_roles,
    role_above,
    without_roles,
)
from chiasm.cohorts.known_layouts import LAYOUTS, File, Find, Finds
from chiasm.cohorts.relatives import names_visit_alone
from chiasm.errors import ChiasmError
from chiasm.volumes.dicom_files import visible_files
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.screening import read_grid

SHOWN = 3  # names in a line; inspect lists all
#: Images in formats that are not read, by the ends of their names; of a pair of files, the header's.
OTHER_FORMATS = (".nrrd", ".nhdr", ".mgz", ".mgh", ".mnc", ".gipl", ".gipl.gz", ".hdr", ".par")
#: Images with an unknown compression, such as `t1.nii.zst`, or partly copied ones; no sidecars.
PACKED = re.compile(r".+\.(?:nii|nii\.gz|mha|mhd|nrrd|mgz)\.(?!(?:json|txt|csv|md5|sha\d+|html|png|svg)$)[a-z0-9]+")
DICOM_FILES = (".dcm", ".ima")
#: Notes on files that may be lost cases.
LOST = ("not-of-layout", "other-format", "no-series")
#: Folders of BIDS with derived data, source data or code.
BESIDE_SCANS = ("derivatives", "sourcedata", "code", "stimuli")


class Gathered(NamedTuple):
    """Cases, problems of others, and notes when nothing is lost."""

    cases: list[Case]
    problems: list[Problem]
    notes: list[Problem]


class _CaseFiles(NamedTuple):
    """The files of one case: its place and name, and its role in the split."""

    place: str
    split: str | None
    members: Sequence[Find]

    @property
    def first(self) -> Find:
        """The file that gives the case and its person their names."""
        return self.members[0]

    @property
    def site(self) -> str | None:
        """The first site that a file's name states."""
        return next((find.site for find in self.members if find.site), None)


def gather(root: Path, finds: Finds, words: Sequence[str] = ()) -> Gathered:
    """Make cases of the files that belong together; of several files for one image, one is chosen.

    Args:
        root: The folder.
        finds: The files, as a layout understands them.
        words: Words in the names of preferred files; without them the finer grid is preferred.

    Raises:
        CohortError: If two cases have one id.
    """
    folders = {find.path.parent.relative_to(root).as_posix() for find in finds.files}
    own = _own_folders(finds.files, root)
    roles = find_folder_roles(folders, own)
    groups, problems = _groups([_placed(find, root, roles) for find in finds.files])
    notes = [Problem(root, reason, message) for reason, message in describe_folder_roles(folders, own, roles)]
    made: list[Case | Problem] = []
    for group, (name, subject) in zip(groups, _names_of(groups, roles), strict=True):
        files, seconds = _chosen(name, group.members, words)
        notes += seconds
        made.append(_case_of(group, name, subject, files))
    cases, without_image = without_problems(made)
    return Gathered(with_unique_ids(root, cases), [*finds.problems, *problems, *without_image], notes)


def _case_of(group: _CaseFiles, name: str, subject: str, files: Mapping[str, Path]) -> Case | Problem:
    """Make a case of its files by role, or a problem if none is an image."""
    case = Case(name, subject, {}, site=group.site, split=group.split)
    case = with_files(case, dict(sorted(files.items())))
    if case.images:
        return case
    return Problem(group.first.path, "no-image", f"case {name} has no image, only a mask or labels", name)


def _own_folders(finds: Iterable[Find], root: Path) -> set[str]:
    """Return the folders that are named like the case whose files lie below them."""
    above = ((find.case, folder) for find in finds for folder in find.path.relative_to(root).parents)
    return {folder.as_posix() for case, folder in above if folder.name == case}


def _placed(find: Find, root: Path, roles: Mapping[str, FolderRole]) -> Find:
    folder = find.path.parent.relative_to(root).as_posix()
    return find if find.split else find._replace(split=role_above(folder, roles, find.case))


def _groups(finds: Iterable[Find]) -> tuple[list[_CaseFiles], list[Problem]]:
    """Group files by case, and by role if one name occurs in the folders of several roles."""
    groups: list[_CaseFiles] = []
    problems: list[Problem] = []
    for place, members in grouped(finds, lambda find: find.group).items():
        by_role = grouped(members, lambda find: find.split)
        in_no_role = by_role.pop(None, [])
        if len(by_role) < 2:
            groups.append(_CaseFiles(place, next(iter(by_role), None), members))
            continue
        groups += [_CaseFiles(place, split, of) for split, of in by_role.items()]
        listed = " and ".join(filter(None, by_role))
        for find in in_no_role:
            message = f"{find.case} stands in the folders of {listed}, but this file is in none of them"
            problems.append(Problem(find.path, "folder-role", message, find.case))
    return groups, problems


def _names_of(groups: Sequence[_CaseFiles], roles: Mapping[str, FolderRole]) -> list[tuple[str, str]]:
    """Name each case and its person; add the folder's name if names repeat or are those of visits."""
    are_repeated = bool(repeated(group.first.case for group in groups))
    return [
        _names_with_folder(group, roles)
        if are_repeated or names_visit_alone(group.first.case)
        else (group.first.case, group.first.subject)
        for group in groups
    ]


def _names_with_folder(group: _CaseFiles, roles: Mapping[str, FolderRole]) -> tuple[str, str]:
    """Name a case and its person by folder and name; a folder that fixes a role is not part of the person's name."""
    first = group.first
    folder = group.place[: -len(first.case)].strip("/")
    place = folder.replace("/", "_") or group.split or ""
    person = without_roles(folder, roles).replace("/", "_")
    return "_".join(filter(None, (place, first.case))), "_".join(filter(None, (person, first.subject)))


# --- several files for one image -------------------------------------------------------------------------------------


def _chosen(case: str, members: Sequence[Find], words: Sequence[str]) -> tuple[dict[str, Path], list[Problem]]:
    """Return one file for each image of a case, and a note for each other."""
    chosen: dict[str, Path] = {}
    notes: list[Problem] = []
    for role, finds in grouped(members, lambda find: find.role).items():
        paths = sorted(find.path for find in finds)
        best = chosen[role] = choose(paths, words, grids=role not in MAPS)
        message = f"case {case} has a second {role}; {best.name} is used"
        notes += [Problem(path, "several", message, case) for path in paths if path != best]
    return chosen, notes


def choose(paths: Sequence[Path], words: Sequence[str], *, grids: bool = True) -> Path:
    """Choose one of several files for one image: most of the words in its name, then the finer grid, then its name.

    Args:
        paths: At least one; headers are read if several fit the words equally well.
        words: As they stand in names, such as "acq-mprage".
        grids: Whether the finer grid is preferred; not for masks.
    """
    left = _first_ranked(paths, lambda path: -count_words(path, words))
    if len(left) > 1 and grids:
        left = _first_ranked(left, _voxel)
    return min(left, key=lambda path: (len(path.name), path.as_posix()))


def _first_ranked(paths: Sequence[Path], rank: Callable[[Path], float | tuple[float, float]]) -> list[Path]:
    """Return the paths of the lowest rank, all that share it."""
    ranks = [rank(path) for path in paths]
    return [path for path, its in zip(paths, ranks, strict=True) if its == min(ranks)]


def count_words(path: Path, words: Iterable[str]) -> int:
    """Count the words that occur in a file's name, between characters other than letters and digits.

    >>> count_words(Path("sub-01_acq-mprage_T1w.nii.gz"), ["acq-mprage", "MPRAGE", "acq-mp"])
    2
    """
    return sum(
        bool(re.search(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z0-9])", path.name.lower())) for word in words
    )


def _voxel(path: Path) -> tuple[float, float]:
    """Return the longest side of a voxel and its volume, rounded; infinite where the header cannot be read."""
    try:
        spacing = read_grid(path).spacing_mm
    except ChiasmError:
        return math.inf, math.inf
    return float(f"{max(spacing):.2g}"), float(f"{math.prod(spacing):.2g}")


# --- what is not used ------------------------------------------------------------------------------------------------


def list_images(root: Path, files: Sequence[File]) -> list[Path]:
    """List the images below a folder that no layout of volumes reads: other formats, and DICOM."""
    known = {file.path for file in files}
    return [path for path in visible_files(root) if path not in known and _is_other_image(path)]


def _is_other_image(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith((*OTHER_FORMATS, *DICOM_FILES)) or PACKED.fullmatch(name):
        return volume_stem(name) is None
    return "." not in name and is_dicom(path)


def with_account(cohort: Cohort, finds: Finds, files: Sequence[File]) -> Cohort:
    """Add notes on every image of a folder that its cases do not use.

    If the file belongs to a found case, nothing is lost.  If it belongs to none, a case may be lost: its note is one of
    `LOST`.

    Args:
        cohort: The cases.
        finds: The files that the layout understands.
        files: All volumes of the folder.
    """
    understood = {find.path for find in finds.files} | {problem.path for problem in cohort.problems}
    unused = [file.path for file in files if file.path not in understood]
    others = list_images(cohort.root, files)
    names = {find.case for find in finds.files} | {find.subject for find in finds.files}
    beside, strange = _by_case(unused, cohort, names)
    others_beside, lost = _by_case(others, cohort, names)
    notes = (
        _not_used(cohort, "beside", [*beside, *others_beside], "images of cases that were found"),
        _not_of_layout(cohort, strange, files),
        _not_used(cohort, "other-format", lost, "images of another format"),
    )
    return replace(cohort, notes=(*cohort.notes, *filter(None, notes)), unused=(*unused, *others))


def _by_case(paths: Sequence[Path], cohort: Cohort, names: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Separate files into those of found cases and others."""
    parted = grouped(paths, lambda path: _belongs(path, cohort, names))
    return parted.get(True, []), parted.get(False, [])


def _not_used(cohort: Cohort, reason: str, paths: Sequence[Path], what: str, more: str = "") -> Problem | None:
    if not paths:
        return None
    message = f"not used: {len(paths)} {what}, such as {_some(paths, cohort.root)}{more}"
    return Problem(cohort.root, reason, message)


def _not_of_layout(cohort: Cohort, paths: Sequence[Path], files: Sequence[File]) -> Problem | None:
    if not cohort.layout:
        return _not_used(cohort, "not-of-layout", paths, "volumes in folders below")
    what, more = f"volumes whose names do not fit layout {cohort.layout}", _fitting(cohort, paths, files)
    return _not_used(cohort, "not-of-layout", paths, what, more)


def _belongs(path: Path, cohort: Cohort, names: Collection[str]) -> bool:
    """Return whether a file lies in the folder of a found case, or its name begins with that of the case."""
    relative = path.relative_to(cohort.root)
    if any(part in names for part in relative.parts[:-1]):
        return True
    if cohort.layout == "bids" and relative.parts[0] in BESIDE_SCANS:
        return True
    return _begins_with_name(path.name, names)


def _begins_with_name(text: str, names: Collection[str]) -> bool:
    """Return whether a file's name is one of these names, up to a separator of words."""
    return any(text[: mark.start()] in names for mark in re.finditer(r"[_\-. ]", text))


def _fitting(cohort: Cohort, lost: Sequence[Path], files: Sequence[File]) -> str:
    """Return the other layout that the names of most files fit, if any."""
    if not lost:
        return ""
    paths = set(lost)
    some = [file for file in files if file.path in paths]
    counts = {row.name: len(row.find(cohort.root, some).files) for row in LAYOUTS if row.name != cohort.layout}
    best = max(counts, key=lambda name: counts[name])
    return f"; {counts[best]} fit layout {best}" if counts[best] else ""


def _some(paths: Sequence[Path], root: Path) -> str:
    return ", ".join(path.relative_to(root).as_posix() for path in paths[:SHOWN])


def notes_in_lines(notes: Sequence[Problem], reasons: Collection[str] | None = None) -> list[str]:
    """Return notes in a line for each kind, with the first of many.

    Args:
        notes: Of a cohort.
        reasons: The kinds that matter; None for all.
    """
    kinds = grouped(notes, lambda note: note.reason)
    return [_in_a_line(of) for reason, of in kinds.items() if reasons is None or reason in reasons]


def _in_a_line(notes: Sequence[Problem]) -> str:
    more = f"; and {len(notes) - SHOWN} more" if len(notes) > SHOWN else ""
    return "; ".join(note.message for note in notes[:SHOWN]) + more
