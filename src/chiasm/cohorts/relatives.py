"""Cases of one person, told by their names: visits are grouped, and a bare number at the end is asked about.

`pat04_visit0` and `pat04_visit1` are one person's.  `P01-0` and `P01-1` may be, and
so may `case_1` and `case_2`, which mostly are two people's: no name tells.  A
pattern that the user gives decides, for every case that it matches.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.errors import CohortError, RecipeError

MOST_VISITS = 20  # cases of one name; more are taken for a numbered series of people
FEW = 3  # cases that may be all of a cohort and yet of one person
LONGEST_PATTERN = 200

_COUNTED = "visit|vis|session|sess|ses|timepoint|tp|follow[_-]?up|fu"
_ALONE = "baseline|follow[_-]?up|pre[_-]?op|post[_-]?op|pre|post|fu|bl"
_DATE = r"(?:19|20)\d\d(?P<dash>[_-]?)(?:0[1-9]|1[0-2])(?P=dash)(?:0[1-9]|[12]\d|3[01])"
_VISIT = re.compile(
    rf"(?P<stem>.*[a-z0-9])(?:[_.\- ]+|(?<=\d))(?:(?:{_COUNTED})[_.\- ]?\d+|(?:{_ALONE}))", re.IGNORECASE
)
#: Words that mean a visit only behind a name with a number: `P01_scan2`, not `siteA_scan2`.
_LATER = re.compile(
    rf"(?P<stem>.*\d.*?)(?:[_.\- ]+|(?<=\d))(?:(?:scan|time|day|week|month|year)[_.\- ]?\d+"
    rf"|(?<=[_.\- ])(?:[vt]\d{{1,2}}|{_DATE}))",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?P<stem>.*[a-z0-9])[_.\- ](?:scan|time|[vt])?\d{1,3}", re.IGNORECASE)


def group_relatives(cases: Sequence[Case]) -> tuple[list[Case], list[Problem]]:
    """Give cases of one person one subject where their names leave no doubt, and a note where they do.

    Args:
        cases: Their subjects are what the layout took for a person's name.

    Returns:
        The cases, and notes of what was grouped and what may belong together.
    """
    people = sorted({case.subject for case in cases})
    visits = _families(people, _VISIT, _LATER)
    renamed = {name: stem for stem, names in visits.items() for name in names}
    notes = []
    if visits:
        stem, names = next(iter(visits.items()))
        count, of = len(renamed), len(visits)
        message = (
            f"{count} names are of {of} {'person' if of == 1 else 'people'} by their words for visits, such as "
            f"{' and '.join(names[:2])} ({stem}); --subject-pattern decides otherwise"
        )
        notes.append(Problem(_folder(cases, names[0]), "visits", message))
    numbered = _families([name for name in people if name not in renamed], _NUMBER)
    if len(numbered) > 1 or any(stem[-1].isdigit() for stem in numbered):
        names = next(iter(numbered.values()))
        message = (
            f"{' and '.join(names[:2])} differ in a number at the end and count as {len(names)} people; if "
            "such cases are one person's, name the part that is the person's: --subject-pattern '(.+)[-_.]'"
        )
        notes.append(Problem(_folder(cases, names[0]), "relatives", message))
    return [replace(case, subject=renamed.get(case.subject, case.subject)) for case in cases], notes


def _families(people: Sequence[str], *patterns: re.Pattern[str]) -> dict[str, list[str]]:
    """Return the names that share a stem, by stem; a stem that all share, or very many, is no person's."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in people:
        if match := next(filter(None, (pattern.fullmatch(name) for pattern in patterns)), None):
            families[match["stem"]].append(name)
    for stem in families:
        if stem in people and stem not in families[stem]:
            families[stem].insert(0, stem)  # P01 beside P01_followup

    def is_person(stem: str, names: Sequence[str]) -> bool:
        all_share = len(names) == len(people) and len(names) > FEW and not any(letter.isdigit() for letter in stem)
        return 1 < len(names) <= MOST_VISITS and not all_share

    return {stem: names for stem, names in families.items() if is_person(stem, names)}


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
    if not pattern:
        return cohort
    compiled = compile_pattern(pattern)
    matches = {case.id: match[1] for case in cohort.cases if (match := compiled.search(case.id)) and match[1]}
    if not matches and lenient:
        return cohort
    if not matches:
        some = ", ".join(case.id for case in cohort.cases[:3])
        raise CohortError(
            f"the subject pattern {pattern!r} matches no case",
            path=cohort.root,
            reason="subject-pattern",
            found=f"cases such as {some}",
            hint="It is searched in each case's id; its group captures the subject.",
        )
    cases = tuple(replace(case, subject=matches.get(case.id, case.subject)) for case in cohort.cases)
    notes = tuple(note for note in cohort.notes if note.reason not in ("visits", "relatives"))
    return replace(cohort, cases=cases, notes=(*notes, _by_pattern(cohort, pattern, matches)))


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
