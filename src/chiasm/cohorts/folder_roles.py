"""Roles in the split that names of folders fix: `train`, `val`, `test` and similar names of published data sets.

A folder fixes a role by itself if the role is its whole name (`test`, `Training`), its name beside a modality or one
letter (`trainA`, `T1_val`), or a name of nnU-Net (`imagesTs`).  Other names contain such a word among others
(`1_train`, `external_test`, `ds-test-v2`), or contain a less clear word (`dev`, `eval`, `Ts`).  They fix a role only if
the folders on their level name two roles or more.  A patient's own folder never fixes a role.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import PurePosixPath
from typing import NamedTuple

from chiasm.cohorts.cases import ALIASES, MODALITIES, Case, Cohort, Problem, grouped, only
from chiasm.cohorts.folder_notes import SPLITS
from chiasm.names import name_first

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validierung"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout", "heldout"), "test"),
}
#: Words that name a role only beside folders of another role, alone or within a name.
_LESS_CLEAR = {"dev": "validation", "tuning": "validation", "eval": "test", "evaluation": "test"}
_WITHIN = {
    **_WORDS,
    **_LESS_CLEAR,
    **{word + end: role for word, role in _WORDS.items() for end in ("set", "data")},
}
#: Names that fix a role only as a whole name, and only beside folders of another role.
_SHORT = {"tr": "train", "va": "validation", "ts": "test"}
#: Beside one of these words, "test" is not a role, but a scan with a repetition.
_REPEATED = {"retest", "rescan"}
_HELD_OUT = re.compile(r"(hold|held)[^A-Za-z0-9]+out", re.IGNORECASE)
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ROLE = "|".join(sorted(_WORDS, key=len, reverse=True))
_IMAGE = "|".join(map(re.escape, sorted({*MODALITIES, *ALIASES}, key=len, reverse=True)))
_BESIDE = (
    re.compile(rf"(?P<role>(?i:{_ROLE}))(?P<image>[AB])"),
    re.compile(rf"(?P<role>(?i:{_ROLE}))[_.-]?(?P<image>(?i:{_IMAGE})|[aAbB])"),
    re.compile(rf"(?P<image>(?i:{_IMAGE})|[aAbB])[_.-](?P<role>(?i:{_ROLE}))"),
)
_IMAGE_WORD = re.compile(rf"(?i:{_IMAGE})|[AB]")
_NNUNET = {"Tr": "train", "Val": "validation", "Va": "validation", "Ts": "test"}
_NNUNET_NAME = re.compile(rf"(images|labels|(?i:{_IMAGE}))(Tr|Ts|Val|Va)")
SHOWN = 3  # folders that a note names


class FolderRole(NamedTuple):
    """The role that a folder fixes, and the rest of its name, such as "A" or ""."""

    role: str
    beside: str


def role_of_folder(name: str) -> FolderRole | None:
    """Return the role that the name of a folder fixes by itself.

    >>> role_of_folder("Testing"), role_of_folder("trainB"), role_of_folder("imagesTs")
    (FolderRole(role='test', beside=''), FolderRole(role='train', beside='B'), FolderRole(role='test', beside='images'))
    >>> [role_of_folder(name) for name in ("test01", "retest", "trainee", "testS")]
    [None, None, None, None]
    """
    whole = _in_one_word(name).lower()
    if whole in _WORDS:
        return FolderRole(_WORDS[whole], "")
    if match := _NNUNET_NAME.fullmatch(name):
        return FolderRole(_NNUNET[match[2]], match[1])
    for pattern in _BESIDE:
        if match := pattern.fullmatch(name):
            return FolderRole(_WORDS[match["role"].lower()], match["image"])
    return None


def role_within_name(name: str) -> FolderRole | None:
    """Return the role that a name contains, for a folder beside others; None if it contains several or none.

    >>> [found and found.role for found in map(role_within_name, ("1_train", "external_test", "ds-val-v2", "Ts"))]
    ['train', 'test', 'validation', 'test']
    >>> [role_within_name(name) for name in ("test_retest_01", "trainor", "evan", "train_val")]
    [None, None, None, None]
    """
    if found := role_of_folder(name):
        return found
    if name.lower() in _SHORT:
        return FolderRole(_SHORT[name.lower()], "")
    role = _role_among({word.lower() for word in _PART.findall(_in_one_word(name))})
    return FolderRole(role, _image_within(name)) if role else None


def _in_one_word(name: str) -> str:
    """Return a name with "held out" and the like as one word."""
    return _HELD_OUT.sub(r"\1out", name)


def _role_among(words: Collection[str]) -> str | None:
    """Return the one role that words name; None for a scan with a repetition."""
    if not _REPEATED.isdisjoint(words):
        return None
    return only({_WITHIN[word] for word in words if word in _WITHIN})


def _image_within(name: str) -> str:
    return next(filter(_IMAGE_WORD.fullmatch, re.split(r"[_.\- ]+", name)), "")


def roles_of_folders(names: Iterable[str]) -> dict[str, FolderRole]:
    """Return the folders that fix a role by themselves."""
    return {name: found for name in names if (found := role_of_folder(name))}


def roles_of_siblings(names: Iterable[str]) -> dict[str, FolderRole]:
    """Return the folders of one level that fix a role, by themselves or because the level names two roles or more.

    >>> {name: found.role for name, found in roles_of_siblings(["1_train", "2_test", "atlas"]).items()}
    {'1_train': 'train', '2_test': 'test'}
    >>> roles_of_siblings(["external_test", "siteA"])
    {}
    """
    within = {name: found for name in names if (found := role_within_name(name))}
    if len({found.role for found in within.values()}) > 1:
        return within
    return roles_of_folders(within)


def find_folder_roles(folders: Collection[str], own: Collection[str] = ()) -> dict[str, FolderRole]:
    """Return which of these folders fix a role; none does if no folder holds a validation or test set.

    Args:
        folders: Paths below the root, with "/".
        own: Paths of folders that are each one case's own, which fix nothing for others.
    """
    shared = [path for path in _every(folders) if str(path) not in own or role_of_folder(path.name)]
    roles: dict[str, FolderRole] = {}
    for level in grouped(shared, lambda path: len(path.parts)).values():
        roles |= _roles_on_level(level)
    return _with_some_held_out(roles)


def _roles_on_level(paths: Sequence[PurePosixPath]) -> dict[str, FolderRole]:
    """Return the folders of one level that fix a role, by their paths."""
    found = roles_of_siblings(path.name for path in paths)
    return {str(path): found[path.name] for path in paths if path.name in found}


def _with_some_held_out(roles: dict[str, FolderRole]) -> dict[str, FolderRole]:
    return roles if {found.role for found in roles.values()} - {"train"} else {}


def describe_folder_roles(
    folders: Collection[str], own: Collection[str], roles: Mapping[str, FolderRole]
) -> list[tuple[str, str]]:
    """Describe how ambiguous names of folders were read.

    Args:
        folders: As for `find_folder_roles`.
        own: As for `find_folder_roles`.
        roles: What it found.

    Returns:
        Pairs of a reason, as of `Problem`, and a message.
    """
    return [*_read_as_roles(roles), *_not_read_as_roles(folders, {*own, *roles}, roles)]


def _read_as_roles(roles: Mapping[str, FolderRole]) -> list[tuple[str, str]]:
    """Describe the folders that fix a role only beside others."""
    longer = sorted(set(roles) - set(_by_themselves(roles)))
    if not longer:
        return []
    some = ", ".join(f"{path} as {roles[path].role}" for path in longer[: 2 * SHOWN])
    return [("role-read", f"names of folders are read as roles in the split: {some}")]


def _not_read_as_roles(
    folders: Collection[str], settled: Collection[str], roles: Collection[str]
) -> list[tuple[str, str]]:
    """Describe folders with a word for a role that fix none, because folders beside them have no such word."""
    words = {str(path) for path in _every(folders) if role_within_name(path.name)}
    unread = sorted(words - set(settled))
    silent = _outside(folders, {*unread, *roles})
    if not (unread and silent):
        return []
    message = (
        f"{name_first(unread, SHOWN)} may name a role in the split, but folders beside it name none "
        f"({name_first(silent, SHOWN)}), "
        "so the split is not fixed; to fix it, call the folders train, val and test, or write a "
        "manifest with a column split"
    )
    return [("role-word", message)]


def _by_themselves(paths: Iterable[str]) -> list[str]:
    """Return the paths of folders that fix a role by themselves."""
    return [path for path in paths if role_of_folder(PurePosixPath(path).name)]


def _outside(folders: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the first part of the paths of folders that are neither among others nor below them."""
    below = (folder for folder in folders if not {folder, *map(str, PurePosixPath(folder).parents)} & set(others))
    return sorted({"the root" if folder == "." else PurePosixPath(folder).parts[0] for folder in below})


def _every(folders: Iterable[str]) -> set[PurePosixPath]:
    """Return paths and the folders above them, without the root."""
    paths = {path for one in folders for path in (PurePosixPath(one), *PurePosixPath(one).parents)}
    return paths - {PurePosixPath(".")}


def role_above(folder: str, roles: Mapping[str, FolderRole], case: str) -> str | None:
    """Return the role of the innermost folder above a file that fixes one; the folder named like its case does not."""
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
    paths = accumulate(parts, "{}/{}".format)
    kept = (roles[path].beside if path in roles else part for path, part in zip(paths, parts, strict=True))
    return "/".join(filter(None, kept))


def settle_roles(cohort: Cohort) -> Cohort:
    """Decide what the roles of folders mean for the split, and describe it in a note.

    If no case is fixed to validation, the validation set is drawn from the training cases.  If no case is fixed to
    validation or test, nothing is fixed.  A subject with cases in folders of two roles keeps both roles, and no split
    is possible.
    """
    given = {case.split for case in cohort.cases} - {None}
    if not given - {"train"}:
        cases = tuple(replace(case, split=None) for case in cohort.cases)
        return replace(cohort, cases=cases, notes=(*cohort.notes, *_roles_in_names(cohort)))
    torn = _subjects_of_two_roles(cohort.cases)
    cases = cohort.cases if "validation" in given else _free_to_validate(cohort.cases, torn)
    note = Problem(cohort.root, "folder-role", f"{_counted(cases)} by their folder{_free(cohort.cases)}")
    return replace(cohort, cases=cases, notes=(*cohort.notes, note, *_torn_note(cohort, torn)))


def _free_to_validate(cases: Iterable[Case], torn: Collection[str]) -> tuple[Case, ...]:
    """Let training cases validate too, except those of subjects with two roles."""
    return tuple(
        replace(case, split=None) if case.split == "train" and case.subject not in torn else case for case in cases
    )


def _torn_note(cohort: Cohort, torn: Mapping[str, Collection[str]]) -> list[Problem]:
    """Note the first subject that has two roles, if any."""
    if not torn:
        return []
    first = min(torn)
    message = f"subject {first} has cases in the folders of {' and '.join(sorted(torn[first]))}"
    return [Problem(cohort.root, "two-roles", f"{message}; no split can be made of them")]


def _subjects_of_two_roles(cases: Sequence[Case]) -> dict[str, set[str]]:
    """Return the roles of subjects that have several."""
    roles: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        roles[case.subject] |= {case.split} if case.split else set()
    return {subject: its for subject, its in roles.items() if len(its) > 1}


def _roles_in_names(cohort: Cohort) -> list[Problem]:
    """Note that all names of cases contain words for different roles, which do not fix the split."""
    first: dict[str, str] = {}
    for case in cohort.cases:
        found = role_within_name(case.id)
        first.setdefault(found.role if found else "", case.id)
    if len(first) < 2 or "" in first:
        return []
    message = (
        f"names of cases contain words for roles in the split, such as {' and '.join(first.values())}, but do not fix "
        "the split; to fix it, put the cases into folders train, val and test, or write a manifest with a column split"
    )
    return [Problem(cohort.root, "role-word", message)]


def _free(cases: Iterable[Case]) -> str:
    count = sum(case.split is None for case in cases)
    return f"; {count} in folders that name no role are split as usual" if count else ""


def _counted(cases: Iterable[Case]) -> str:
    counts = Counter(case.split for case in cases)
    fixed = (_fixed_in_words(counts[role], role) for role in SPLITS if counts[role])
    return " and ".join(fixed)


def _fixed_in_words(count: int, role: str) -> str:
    """Say how many cases are fixed to a role."""
    return f"{count} {'case is' if count == 1 else 'cases are'} fixed to {role}"
