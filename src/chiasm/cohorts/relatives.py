"""Cases of one person, recognised by their names: clear visits are grouped, and a note asks about unclear names.

`pat04_visit0` and `pat04_visit1` are of one person.  `P01-0` and `P01-1` may be of one person.  So may `case_1` and
`case_2`, which usually are two people: the names do not show it.  `site1_visit1` is unclear too, because its first part
is not a person.  A pattern that the user gives decides for every case that it matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import Case, Cohort, Problem, grouped
from chiasm.errors import CohortError, RecipeError

MOST_VISITS = 20  # cases of one name; more are taken for a numbered series of people
FEW = 3  # cases that may be all of a cohort, or most of it, and yet of one person
LONGEST_PATTERN = 200

_COUNTED = "visit|vis|session|sess|ses|timepoint|tp|follow[_-]?up|fu"
_ALONE = "baseline|follow[_-]?up|pre[_-]?op|post[_-]?op|pre|post|fu|bl|re[_-]?scan|re[_-]?test"
_LONGER = "scan|time|day|week|month|year"
_DATE = r"(?:19|20)\d\d(?P<dash>[_-]?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])"
#: A number with its unit, as in `FU001d`, `ses-M12` and `week-000-1`.
_COUNT = r"[_.\- ]?[dwmy]?\d+[dwmy]?(?:[_.\-]\d{1,2})?"
_WORD = rf"(?:{_COUNTED}){_COUNT}|(?:(?:session|ses)[_.\- ])?(?:{_ALONE})"
_GAP = r"[_.\- ]+"
_VISIT = re.compile(rf"(?P<stem>.*?[a-z0-9])(?:{_GAP}|(?<=\d))(?:{_WORD})", re.IGNORECASE)
_VISIT_FIRST = re.compile(rf"(?:{_WORD}){_GAP}(?P<stem>[a-z0-9].*)", re.IGNORECASE)
#: Words that mean a visit only after a name with a number: `P01_scan2`, not `siteA_scan2`.
_LATER = re.compile(
    rf"(?P<stem>.*\d.*?)(?:(?:{_GAP}|(?<=\d))(?:(?:{_LONGER}){_COUNT}|v\d{{1,2}})"
    rf"|{_GAP}(?:t\d{{1,2}}|(?:MR|CT|PET)\d{{1,2}}|(?:MR[_-])?d\d{{1,4}}|m\d{{2,3}}|(?:19|20)\d\d|{_DATE}))",
    re.IGNORECASE,
)
_TEST = re.compile(rf"(?P<stem>.*[a-z0-9]){_GAP}(?:re[_-]?)?test", re.IGNORECASE)
_NUMBER = re.compile(r"(?P<stem>.*[a-z0-9])[_.\- ](?:scan|time|run[_.\- ]?|[vt])?\d{1,3}", re.IGNORECASE)
_LETTER = re.compile(r"(?P<stem>.*\d)[_.\- ]?[a-z]", re.IGNORECASE)
#: A name of a visit without the person's name, which is the name of the folder above.
_NOTHING_ELSE = re.compile(rf"(?:{_WORD}|(?:{_LONGER}){_COUNT}|v\d{{1,2}}|(?:19|20)\d\d|{_DATE})", re.IGNORECASE)
#: Numbers of a place, a study or a group, not of a person.
_NO_PERSON = re.compile(
    rf"(?:.*{_GAP})?(?:site|center|centre|cent|cohort|study|group|grp|hospital|hosp|h|clinic|scanner|vendor|data|dataset"
    r"|batch|arm|fold|split|part|team|abide|adhd|adni|hcp|ixi|oasis|ukb|controls?|healthy|hc|nc|cn|pd|ad|mci|patients"
    rf"|subjects)(?:{_GAP})?(?:\d*|[a-z])",
    re.IGNORECASE,
)
#: Patterns that a note may propose, the stricter first: the first one that makes exactly the groups of the note.
_PROPOSALS = (
    r"^(.+\d)[-_. ]\d+$",
    r"^(.+?)[-_. ][A-Za-z]+[-_. ]?\d+$",
    r"^(.+)[-_. ]\d+$",
    r"^(.+\d)[-_. ]?[A-Za-z]$",
    r"^(.+)[-_. ][^-_. ]+$",
    r"^(.+?)[-_. ].+$",
)


class _NameFamilies(NamedTuple):
    """Families of names, each perhaps of one person, and how the names of a family differ."""

    families: Mapping[str, Sequence[str]]
    differ: str


def names_visit_alone(name: str) -> bool:
    """Return whether a name contains only a visit and no person.

    >>> [names_visit_alone(name) for name in ("2019-03-04", "visit1", "baseline", "P01_visit1", "visitor")]
    [True, True, True, False, False]
    """
    return _NOTHING_ELSE.fullmatch(name) is not None


def group_relatives(cases: Sequence[Case]) -> tuple[list[Case], list[Problem]]:
    """Give cases of one person one subject if their names are clear, and a note if they are not.

    Args:
        cases: With the subjects that the layout found in their names.

    Returns:
        The cases, and notes on grouped cases and on cases that may belong together.
    """
    people = sorted({case.subject for case in cases})
    visits, unclear = _visits(people)
    renamed = _stem_by_name(visits)
    by_person = [replace(case, subject=renamed.get(case.subject, case.subject)) for case in cases]
    left = [name for name in people if name not in renamed]
    kinds = (
        _NameFamilies(unclear, "differ in a word for visits"),
        _NameFamilies(_numbered(left, unclear), "differ in a number at the end"),
        _NameFamilies(_families(left, _LETTER), "differ in a letter at the end"),
    )
    questions = [_question(cases, by_person, kind) for kind in kinds if kind.families]
    return by_person, [*_grouped_notes(cases, visits), *questions]


def _stem_by_name(families: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the stem of each name of some families."""
    return {name: stem for stem, names in families.items() for name in names}


def _visits(people: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the names of visits by person, and those whose common part may not be a person."""
    families = {**_retested(people), **_families(people, _VISIT, _VISIT_FIRST, _LATER)}
    most = max(map(len, families.values()), default=0)
    if most > FEW and 2 * most > len(people):
        return {}, families
    clear = _of_somebody(families)
    return clear, {stem: names for stem, names in families.items() if stem not in clear}


def _retested(people: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of tests and retests, by person; a test without a retest may be a role in the split."""
    families = _families(people, _TEST)
    return {stem: names for stem, names in families.items() if any(name.lower().endswith("retest") for name in names)}


def _numbered(people: Sequence[str], unclear: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return names that differ in a number; if their stem has only letters, they are a series of people."""
    families = _of_somebody(_families(people, _NUMBER))
    asked = {stem: names for stem, names in families.items() if stem not in unclear}
    with_digit = {stem: names for stem, names in asked.items() if stem[-1].isdigit()}
    return with_digit or (asked if len(asked) > 1 else {})


def _of_somebody(families: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the families whose stem may name a person, not a place or study."""
    return {stem: names for stem, names in families.items() if not _NO_PERSON.fullmatch(stem)}


def _families(people: Sequence[str], *patterns: re.Pattern[str]) -> dict[str, list[str]]:
    """Return the names that share a stem, by stem; a stem of all names, or of very many, is not a person."""
    families = grouped(people, lambda name: _stem(name, patterns).lower())
    families.pop("", None)
    stems = {low: _stem(names[0], patterns) for low, names in families.items()}
    for name in people:  # P01 beside P01_followup
        names = families.get(name.lower(), [name])
        if name not in names:
            names.insert(0, name)
    return {stems[low]: names for low, names in families.items() if _may_be_person(stems[low], names, people)}


def _stem(name: str, patterns: Iterable[re.Pattern[str]]) -> str:
    match = next(filter(None, (pattern.fullmatch(name) for pattern in patterns)), None)
    return match["stem"] if match else ""


def _may_be_person(stem: str, names: Sequence[str], people: Sequence[str]) -> bool:
    all_share = len(names) == len(people) and len(names) > FEW and not any(letter.isdigit() for letter in stem)
    return 1 < len(names) <= MOST_VISITS and not all_share


def _grouped_notes(cases: Sequence[Case], visits: Mapping[str, Sequence[str]]) -> list[Problem]:
    if not visits:
        return []
    stem, names = next(iter(visits.items()))
    of = len(visits)
    message = (
        f"{sum(map(len, visits.values()))} names contain words for visits and are grouped as {of} "
        f"{'person' if of == 1 else 'people'}, such as {' and '.join(names[:2])} ({stem}); --subject-pattern changes "
        "this: with '(.+)' each case is a person"
    )
    return [Problem(_folder(cases, names[0]), "visits", message)]


def _question(cases: Sequence[Case], by_person: Sequence[Case], kind: _NameFamilies) -> Problem:
    """Ask whether families are people, and name a pattern that would make them so."""
    names = next(iter(kind.families.values()))
    stem_of = _stem_by_name(kind.families)
    wanted = [stem_of.get(case.subject, case.subject) for case in by_person]
    pattern = next((one for one in _PROPOSALS if _same_groups(_by(one, by_person), wanted)), None)
    way = f"--subject-pattern '{pattern}'" if pattern else "a manifest with a column subject"
    message = (
        f"{' and '.join(names[:2])} {kind.differ} and count as {len(names)} people; if such cases are of one person, "
        f"group them: {way}"
    )
    return Problem(_folder(cases, names[0]), "relatives", message)


def _by(pattern: str, cases: Iterable[Case]) -> list[str]:
    """Return the subject of each case by a pattern."""
    matches = ((case, re.search(pattern, case.id)) for case in cases)
    return [match[1] if match else case.subject for case, match in matches]


def _same_groups(one: Sequence[str], other: Sequence[str]) -> bool:
    pairs = set(zip(one, other, strict=True))
    return len(pairs) == len(set(one)) == len(set(other))


def _folder(cases: Sequence[Case], subject: str) -> Path:
    case = next(case for case in cases if case.subject == subject)
    return next(iter(case.images.values())).parent


def with_subjects(cohort: Cohort, pattern: str, *, lenient: bool = False) -> Cohort:
    """Take each case's subject from its id, as a pattern says; cases that it does not match keep theirs.

    Args:
        cohort: Any.
        pattern: A regular expression with one group, such as ``(P\\d+)-``; "" changes nothing.
        lenient: Whether it may match no case.

    Raises:
        RecipeError: If it is no such expression.
        CohortError: If it matches no case and must.
    """
    matches = _matches(compile_pattern(pattern), cohort.cases) if pattern else {}
    if matches:
        return _with_subjects_by(pattern, cohort, matches)
    if pattern and not lenient:
        raise _no_match(cohort, pattern)
    return cohort


def _with_subjects_by(pattern: str, cohort: Cohort, matches: Mapping[str, str]) -> Cohort:
    """Give the cases that a pattern matches their subjects, and remove the notes on relatives."""
    cases = tuple(replace(case, subject=matches.get(case.id, case.subject)) for case in cohort.cases)
    notes = tuple(note for note in cohort.notes if note.reason not in ("visits", "relatives"))
    return replace(cohort, cases=cases, notes=(*notes, _by_pattern(cohort, pattern, matches)))


def _matches(pattern: re.Pattern[str], cases: Iterable[Case]) -> dict[str, str]:
    """Return the subjects of the cases that a pattern matches, by id."""
    found = {case.id: pattern.search(case.id) for case in cases}
    return {name: match[1] for name, match in found.items() if match and match[1]}


def _no_match(cohort: Cohort, pattern: str) -> CohortError:
    some = ", ".join(case.id for case in cohort.cases[:3])
    return CohortError(
        f"the subject pattern {pattern!r} matches no case",
        path=cohort.root,
        reason="subject-pattern",
        found=f"cases such as {some}",
        hint="It is searched in each case's id; its group captures the subject.",
    )


def _by_pattern(cohort: Cohort, pattern: str, matches: Mapping[str, str]) -> Problem:
    others = [case.id for case in cohort.cases if case.id not in matches]
    message = f"{len(matches)} cases are of {len(set(matches.values()))} subjects by the pattern {pattern!r}"
    message += f"; it does not match {len(others)}, such as {others[0]}" if others else ""
    return Problem(cohort.root, "subject-pattern", message)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern of subjects, ready to search.

    Raises:
        RecipeError: If it is no regular expression with one group.
    """
    expected = "a regular expression with one group, such as '(P\\d+)-'"
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(
            "the subject pattern cannot be read",
            reason="subject-pattern",
            found=f"{pattern!r}: {error}",
            expected=expected,
        ) from error
    if compiled.groups != 1 or len(pattern) > LONGEST_PATTERN:
        raise RecipeError(
            "the subject pattern is not of the expected form",
            reason="subject-pattern",
            found=f"{pattern[:40]!r} with {compiled.groups} groups",
            expected=expected,
        )
    return compiled
