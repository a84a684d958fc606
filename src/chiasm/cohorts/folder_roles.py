"""Roles in the split that folders fix: `train`, `val`, `test` and the like, as data sets are handed out.

A folder fixes a role if that is its whole name (`test`, `Training`), its name
beside a modality or one letter (`trainA`, `T1_val`), nnU-Net's (`imagesTs`), or if
it has a twin that differs in the role alone (`BraTS_TrainingData` beside
`BraTS_ValidationData`).  A patient's own folder never does.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import NamedTuple

from chiasm.cohorts.cases import ALIASES, MODALITIES, Case, Cohort, Problem

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ROLE = "|".join(sorted(_WORDS, key=len, reverse=True))
_IMAGE = "|".join(map(re.escape, sorted({*MODALITIES, *ALIASES}, key=len, reverse=True)))
_BESIDE = (
    re.compile(rf"(?P<role>(?i:{_ROLE}))(?P<image>[AB])"),
    re.compile(rf"(?P<role>(?i:{_ROLE}))[_.-]?(?P<image>(?i:{_IMAGE})|[aAbB])"),
    re.compile(rf"(?P<image>(?i:{_IMAGE})|[aAbB])[_.-](?P<role>(?i:{_ROLE}))"),
)
_NNUNET = {"Tr": "train", "Val": "validation", "Va": "validation", "Ts": "test"}
#: A role inside a longer name: whole words, also of names written LikeThis.
_INSIDE = re.compile(rf"(?<![A-Za-z])(?i:{_ROLE})(?![a-z])|(?<=[a-z0-9])(?:{_ROLE.title()})(?![a-z])")


class FolderRole(NamedTuple):
    """The role that a folder fixes, and what its name says beside it, such as "A"; "" where nothing."""

    role: str
    beside: str


def role_of_folder(name: str) -> FolderRole | None:
    """Say which role the name of a folder fixes by itself.

    >>> role_of_folder("Testing"), role_of_folder("trainB"), role_of_folder("imagesTs")
    (FolderRole(role='test', beside=''), FolderRole(role='train', beside='B'), FolderRole(role='test', beside='images'))
    >>> [role_of_folder(name) for name in ("test01", "retest", "trainee", "testS")]
    [None, None, None, None]
    """
    if name.lower() in _WORDS:
        return FolderRole(_WORDS[name.lower()], "")
    if match := re.fullmatch(r"(images|labels)(Tr|Ts|Val|Va)", name):
        return FolderRole(_NNUNET[match[2]], match[1])
    for pattern in _BESIDE:
        if match := pattern.fullmatch(name):
            return FolderRole(_WORDS[match["role"].lower()], match["image"])
    return None


def find_folder_roles(folders: Collection[str]) -> dict[str, FolderRole]:
    """Say which of these folders fix a role; nothing does where no folder holds a validation or test set.

    Args:
        folders: Paths below the root, with "/".
    """
    every = {str(path) for one in folders for path in (PurePosixPath(one), *PurePosixPath(one).parents)} - {"."}
    roles = {path: found for path in every if (found := role_of_folder(PurePosixPath(path).name))}
    twins: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for path in every - set(roles):
        name = PurePosixPath(path).name
        if match := _INSIDE.search(name):
            template = f"{name[: match.start()]}*{name[match.end() :]}".lower()
            twins[str(PurePosixPath(path).parent), template][path] = _WORDS[match[0].lower()]
    for pair in twins.values():
        if len(set(pair.values())) > 1:
            roles |= {path: FolderRole(role, "") for path, role in pair.items()}
    return roles if {found.role for found in roles.values()} - {"train"} else {}


def role_above(folder: str, roles: Mapping[str, FolderRole], case: str) -> str | None:
    """Return the role of the innermost folder above a file that fixes one; the folder called as its case does not."""
    for path in (PurePosixPath(folder), *PurePosixPath(folder).parents):
        if (found := roles.get(str(path))) and path.name != case:
            return found.role
    return None


def without_roles(folder: str, roles: Mapping[str, FolderRole]) -> str:
    """Return a folder's path without the folders and parts of names that fix a role.

    >>> without_roles("test/HGG", {"test": FolderRole("test", "")})
    'HGG'
    >>> without_roles("trainA", {"trainA": FolderRole("train", "A")})
    'A'
    """
    parts = PurePosixPath(folder).parts
    paths = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    kept = (roles[path].beside if path in roles else part for path, part in zip(paths, parts, strict=True))
    return "/".join(part for part in kept if part)


def settle_roles(cohort: Cohort) -> Cohort:
    """Decide what the roles that folders gave mean for the split, and say it in a note.

    Where none validates, those who train stay free to: the validation set is
    drawn from them.  Where nobody validates or is tested, nothing is fixed.  A
    subject with cases in the folders of two roles keeps both, and no split can
    be made of it.
    """
    given = {case.split for case in cohort.cases} - {None}
    if not given - {"train"}:
        return replace(cohort, cases=tuple(replace(case, split=None) for case in cohort.cases))
    roles: dict[str, set[str]] = defaultdict(set)
    for case in cohort.cases:
        roles[case.subject] |= {case.split} if case.split else set()
    torn = sorted(subject for subject, its in roles.items() if len(its) > 1)

    def settled(case: Case) -> Case:
        free = case.split == "train" and "validation" not in given and case.subject not in torn
        return replace(case, split=None) if free else case

    cases = tuple(map(settled, cohort.cases))
    notes = [Problem(cohort.root, "folder-role", f"{_counted(cases)} by their folder")]
    if torn:
        message = f"subject {torn[0]} has cases in the folders of {' and '.join(sorted(roles[torn[0]]))}"
        notes.append(Problem(cohort.root, "two-roles", f"{message}; no split can be made of them"))
    return replace(cohort, cases=cases, notes=(*cohort.notes, *notes))


def _counted(cases: Iterable[Case]) -> str:
    counts = Counter(case.split for case in cases if case.split)
    return " and ".join(
        f"{counts[role]} {'case is' if counts[role] == 1 else 'cases are'} fixed to {role}"
        for role in ("train", "validation", "test")
        if counts[role]
    )
