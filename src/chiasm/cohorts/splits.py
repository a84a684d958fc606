"""Who trains, validates and tests: whole persons, spread over sites; one seed always gives one split.

Orders come from the sha256 of seed and name, not from a random generator.  So a split does not depend on the order of
the cases or on a library's version.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from chiasm.checksums import check_checksum, with_checksum
from chiasm.cohorts.cases import Case, grouped, repeated, subjects_of
from chiasm.errors import CohortError, RunError
from chiasm.storage import read_json, write_json

FOLDS, FEW = 5, 10  # that "auto" makes, of as many subjects or more
MODELS = 3  # that "auto" makes of fewer
Folds = int | Literal["auto"]
ROLES = ("train", "validation", "test", "locked")
REMEDY = (
    "In a run folder, delete it if the data are as they were: the same command writes it anew. "
    "In a model folder, copy the model again."
)


@dataclass(frozen=True)
class Split:
    """Case ids by role, each in order; the locked ones belong to no fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    locked: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitRecord:
    """The content of `splits.json`: the split, and by case id the person, the site and the hash of the voxels."""

    split: Split
    subjects: Mapping[str, str]
    sites: Mapping[str, str | None]
    hashes: Mapping[str, str]


def count_subjects(record: SplitRecord) -> str:
    """Count the subjects of each role in words; roles without any are left out, but for the first three."""
    names = {"train": "training", "validation": "validation", "test": "test", "locked": "locked"}
    people = {role: {record.subjects.get(case, case) for case in getattr(record.split, role)} for role in ROLES}
    counted = [f"{len(people[role])} {word}" for role, word in names.items() if people[role] or role != "locked"]
    return f"{', '.join(counted)} subjects"


class _Fact(BaseModel):
    """The entry of a case in `splits.json`."""

    model_config = ConfigDict(strict=True)

    subject: str
    site: str | None
    voxels: str | None


class _SplitFile(BaseModel):
    """The content of `splits.json`."""

    model_config = ConfigDict(strict=True)

    train: list[str]
    validation: list[str]
    test: list[str]
    locked: Annotated[list[str], Field(validation_alias=AliasChoices("locked", "sealed"))] = []
    cases: dict[str, _Fact]


def choose_folds(asked: Folds, subjects: int) -> int:
    """Return the number of folds: the given number, or for "auto" a number that suits the subjects.

    Fewer than `FEW` subjects are tested one by one: then one subject validates, and all others train.

    >>> choose_folds("auto", 6), choose_folds("auto", 30), choose_folds(3, 6)
    (6, 5, 3)
    """
    if asked != "auto":
        return asked
    return FOLDS if subjects >= FEW else max(2, subjects)


def make_split(
    cases: Iterable[Case], *, folds: Folds, fold: int, validation: float, seed: int, locked: float = 0.0
) -> Split:
    """Split cases by subject, with each site spread evenly over the roles.

    Over all values of `fold`, every free subject is tested once.  Roles that a manifest or a folder fixes stay: fixed
    subjects keep their role in every fold.  If any subject is fixed to test, no other is tested; if any is fixed to
    validation, no other validates.

    Args:
        cases: Cases with unique ids, in any order.
        folds: Number of folds; 1 leaves the test set empty; "auto" as `choose_folds` says of the free subjects.
        fold: Which fold is the test set, in [0, folds).
        validation: Share in [0, 1] of the subjects that are not tested; 0 for none, else at least one trains, and at
            least one validates if two remain.
        seed: Of the order in which subjects are assigned.
        locked: Share in [0, 1) of the free subjects that no fold uses, the same for every fold; at least one subject if
            it is above 0.

    Raises:
        CohortError: If there are too few subjects, none is left to train on,
            or a manifest gives one subject two roles.
        ValueError: If `fold` is not among `folds`, or `validation` is no share.
    """
    is_fold = fold >= 0 and (folds == "auto" or fold < folds)
    if not (is_fold and 0 <= validation <= 1 and 0 <= locked < 1):
        raise ValueError(f"fold {fold} of {folds}, validation {validation} or locked {locked} is out of range")
    cases = list(cases)
    fixed = _fixed_roles(cases)
    site_of = _site_of_subjects(cases)
    free = _without(_order_subjects(site_of, seed), fixed)
    kept = _locked(free, locked)
    free = _without(free, kept)
    tested = _tested(free, fixed, fold, choose_folds(folds, len(free)))
    roles = {**dict.fromkeys(tested, "test"), **dict.fromkeys(kept, "locked"), **fixed}
    return _with_validation(cases, roles, _without(free, tested), validation)


def with_fewer_training(split: Split, cases: Iterable[Case], count: int, seed: int) -> Split:
    """Let only some of the training subjects train; a larger number adds subjects to those of a smaller one.

    Args:
        split: Whose validation and test cases stay as they are.
        cases: Those that were split.
        count: How many subjects train; 0 lets all of them train.
        seed: Of the order in which they are added.

    Raises:
        CohortError: If fewer subjects could train.
    """
    subjects = subjects_of(cases)
    able = {subjects[case] for case in split.train}
    if count > len(able):
        fewer = f"In this fold, at most {len(able)} can train."
        raise _too_few(f"split.training_subjects={count} asks for more subjects than there are", [*able], fewer)
    kept = sorted(able, key=lambda subject: _hash_of(subject, seed))[: count or None]
    return replace(split, train=tuple(case for case in split.train if subjects[case] in kept))


def choose_models(asked: Folds, cases: Iterable[Case]) -> int:
    """Return the number of models: the given number, or for "auto" a number that suits the subjects.

    Of fewer than `FEW` subjects none should be lost to a test: then three models share them, each of which learns from
    two thirds.  Where roles are fixed, or there are fewer than three subjects, there is one.

    Args:
        asked: The number, or "auto".
        cases: Cases with unique ids.
    """
    cases = list(cases)
    if asked != "auto":
        return asked
    subjects = {case.subject for case in cases}
    is_free = not any(case.split for case in cases)
    return MODELS if is_free and MODELS <= len(subjects) < FEW else 1


def make_part(cases: Iterable[Case], *, models: int, part: int, seed: int, locked: float = 0.0) -> Split:
    """Split cases for one of several models: one part of the subjects validates, all others train, none is tested.

    Args:
        cases: Cases with unique ids, in any order.
        models: Number of parts, at least 2.
        part: Which one validates, in [0, models).
        seed: As for `make_split`.
        locked: Likewise.

    Raises:
        CohortError: If there are fewer subjects than models, or a manifest or a folder fixes roles.
        ValueError: If `part` is not among `models`.
    """
    cases = list(cases)
    _refuse_fixed_roles(cases, "several models that share the subjects")
    free = {case.subject for case in cases}
    if len(free) < models:
        raise _too_few(f"{models} models need at least {models} subjects", [*free], "Use chiasm train --models 1.")
    split = make_split(cases, folds=models, fold=part, validation=0, seed=seed, locked=locked)
    return Split(split.train, split.test, (), split.locked)


def _tested(free: Sequence[str], fixed: Mapping[str, str], fold: int, folds: int) -> set[str]:
    """Return the free subjects that a fold tests; none if test subjects are fixed, or all other roles are."""
    is_fixed = "test" in fixed.values() or (bool(fixed) and not free)
    return set() if is_fixed or folds == 1 else set(_fold_of(free, fold, folds))


def _without(subjects: Sequence[str], others: Collection[str]) -> list[str]:
    return [subject for subject in subjects if subject not in others]


def _fold_of(free: Sequence[str], fold: int, folds: int) -> Sequence[str]:
    """Return the subjects of one fold, where there are enough for all."""
    if len(free) < folds:
        fewer = f"Use chiasm train or chiasm run --folds {len(free)}; in a study, folds = {len(free)}."
        none = "Use chiasm train --folds 1, which leaves the test set empty."
        raise _too_few(f"{folds} folds need at least {folds} subjects", free, fewer if len(free) > 1 else none)
    if fold >= folds:  # of "auto" alone: a number that was asked for is checked with the fold
        raise CohortError(
            f"fold {fold} does not exist among {folds} folds", reason="fold", expected=f"0 to {folds - 1}"
        )
    return free[fold::folds]


def _too_few(what: str, subjects: Sequence[str], hint: str) -> CohortError:
    found = f"{len(subjects)}: {', '.join(sorted(subjects)) or 'none'}"
    return CohortError(what, reason="too-few-subjects", found=found, hint=hint)


def leave_one_site_out(
    cases: Iterable[Case], site: str, *, validation: float = 0.2, seed: int = 0, locked: float = 0.0
) -> Split:
    """Test on every subject of one site, and train and validate on the others.

    Args:
        cases: Cases with unique ids.
        site: The site that is left out.
        validation: Share of the other subjects that validate.
        seed: Of the order in which subjects are assigned.
        locked: Share in [0, 1) of all subjects that no fold touches.

    Raises:
        CohortError: If no case is of this site, or all are, or a manifest or a folder fixes roles.
    """
    cases = list(cases)
    _refuse_fixed_roles(cases, "folds by site")
    ordered = _order_subjects(_site_of_subjects(cases), seed)
    kept = _locked(ordered, locked)
    tested = {case.subject for case in cases if case.site == site} - kept
    if not tested:
        raise _unknown_site(site, cases)
    others = _without(ordered, tested | kept)
    roles = {**dict.fromkeys(tested, "test"), **dict.fromkeys(kept, "locked")}
    return _with_validation(cases, roles, others, validation)


def _refuse_fixed_roles(cases: Sequence[Case], what: str) -> None:
    if fixed := Counter(case.split for case in cases if case.split):
        raise CohortError(
            f"{what} contradict roles that are fixed",
            reason="split",
            found=", ".join(f"{count} cases fixed to {role}" for role, count in sorted(fixed.items())),
            hint="Split by subject, with one model, or take the roles away: the column split of a manifest, or folders "
            "such as test.",
        )


def _unknown_site(site: str, cases: Sequence[Case]) -> CohortError:
    known = Counter(case.site for case in cases if case.site)
    return CohortError(
        f"no case is of site {site!r}",
        reason="unknown-site",
        found=", ".join(f"{name} ({count})" for name, count in sorted(known.items())) or "no site at all",
    )


def assign_folds(site_of: Mapping[str, str | None], folds: int, seed: int) -> list[tuple[str, ...]]:
    """Assign subjects to folds of nearly equal size, with each site spread evenly over them.

    Args:
        site_of: Site of each subject, or None.
        folds: How many, at least 2.
        seed: Of the order in which they are assigned.

    Raises:
        CohortError: If there are fewer subjects than folds.
    """
    ordered = _order_subjects({subject: site or "" for subject, site in site_of.items()}, seed)
    if len(ordered) < folds:
        raise _too_few(
            f"{folds} inner folds need at least {folds} training subjects",
            ordered,
            "Out-of-fold contexts need cases that a model has not seen: add subjects, or set generator.stages=1.",
        )
    return [tuple(ordered[fold::folds]) for fold in range(folds)]


def sites_of(cases: Iterable[Case]) -> list[str]:
    """Return the names of all sites, in order; one fold each where folds go by site.

    Raises:
        CohortError: If a case has no site, or all have the same.
    """
    cases = list(cases)
    _refuse_without_site(cases)
    sites = sorted({str(case.site) for case in cases})
    if len(sites) < 2:
        raise CohortError("there must be two sites to leave one out", reason="one-site", found=", ".join(sites))
    return sites


def _refuse_without_site(cases: Sequence[Case]) -> None:
    """Refuse cases without a site."""
    if homeless := [case.id for case in cases if not case.site]:
        raise CohortError(
            f"{len(homeless)} cases have no site, the first is {homeless[0]}",
            reason="no-site",
            hint="Name a site for each case in a manifest, or split by subject.",
        )


def _locked(ordered: Sequence[str], share: float) -> set[str]:
    """Choose subjects evenly along the order of assignment, so that each site gives some."""
    if not share:
        return set()
    if not ordered:
        raise CohortError(
            "no subject is left for the locked test set, because all subjects have fixed roles",
            reason="locked",
            hint="Set split.locked=0, or state the roles of fewer subjects.",
        )
    return set(_spread(ordered, max(1, round(share * len(ordered)))))


def _spread(subjects: Sequence[str], count: int) -> list[str]:
    """Take subjects at even distances: of 7, 2 at positions 1 and 5, the middles of two equal parts."""
    return [subjects[(2 * place + 1) * len(subjects) // (2 * count)] for place in range(count)]


def _fixed_roles(cases: Sequence[Case]) -> dict[str, str]:
    fixed: dict[str, str] = {}
    for case in cases:
        if case.split is not None and fixed.setdefault(case.subject, case.split) != case.split:
            raise CohortError(
                f"subject {case.subject} has two roles: {fixed[case.subject]} and {case.split}",
                reason="split",
                hint="Move all cases of a subject into folders of one role, or give them the same split in a manifest; "
                "if they are two people, give them two subjects in the manifest.",
            )
    return fixed


def _site_of_subjects(cases: Sequence[Case]) -> dict[str, str]:
    sites: dict[str, str] = {}
    for case in sorted(cases, key=lambda case: case.id):
        sites[case.subject] = sites.get(case.subject) or case.site or ""
    return sites


def _order_subjects(site_of: Mapping[str, str], seed: int) -> list[str]:
    """Order subjects site by site, and within a site by a hash.

    Every n-th subject of this list comes from the sites in proportion, to within one subject.
    """

    def place(subject: str) -> tuple[str, str]:
        return site_of[subject], _hash_of(subject, seed)

    return sorted(site_of, key=place)


def _hash_of(subject: str, seed: int) -> str:
    """Return what subjects are ordered by where no order is better than another."""
    return hashlib.sha256(f"{seed}/{subject}".encode()).hexdigest()


def _with_validation(cases: Sequence[Case], roles: dict[str, str], free: list[str], share: float) -> Split:
    """Choose validation subjects evenly along `free`; everyone without a role trains."""
    split = _by_role(cases, {**roles, **dict.fromkeys(_validating(roles, free, share), "validation")})
    if not split.train:
        raise CohortError("no subject is left to train on", reason="too-few-subjects", found=f"{len(cases)} cases")
    check_disjoint(split, subjects_of(cases))
    return split


def _validating(roles: Mapping[str, str], free: Sequence[str], share: float) -> list[str]:
    """Choose the free subjects that validate; none if none are wanted, roles are fixed, or one subject is left."""
    trained = list(roles.values()).count("train")
    remaining = len(free) + trained
    if "validation" in roles.values() or remaining < 2 or share == 0:
        return []
    most = len(free) if trained else len(free) - 1
    return _spread(free, min(max(round(share * remaining), 1), most))


def _by_role(cases: Sequence[Case], roles: Mapping[str, str]) -> Split:
    by_role = grouped(cases, lambda case: roles.get(case.subject, "train"))
    return Split(*(tuple(sorted(case.id for case in by_role.get(role, ()))) for role in ROLES))


def check_disjoint(split: Split, subjects: Mapping[str, str], hashes: Mapping[str, str] | None = None) -> None:
    """Refuse a split in which a case, a person or a set of voxels has two roles.

    Args:
        split: Case ids by role.
        subjects: Case id to person.
        hashes: Case id to `voxel_hash`, where known.

    Raises:
        CohortError: If something has two roles; the message names it and the roles.
    """
    places = [(name, role) for role in ROLES for name in getattr(split, role)]
    if twice := repeated(name for name, _ in places):
        raise CohortError(f"case {twice[0]} stands twice in the split", reason="not-disjoint")
    _refuse_two_roles(places, subjects, "is of the same subject")
    _refuse_two_roles(places, hashes or {}, "has the same voxels")


def _refuse_two_roles(places: Sequence[tuple[str, str]], key_of: Mapping[str, str], what: str) -> None:
    """Refuse two cases of one key whose roles differ."""
    first: dict[str, tuple[str, str]] = {}
    for name, role in places:
        if name in key_of:
            other, before = first.setdefault(key_of[name], (name, role))
            if role != before:
                raise CohortError(f"{role} case {name} {what} as {before} case {other}", reason="not-disjoint")


def _listed(cases: Iterable[Case], ids: Collection[str]) -> list[Case]:
    """Return the cases with these ids, in their order."""
    return sorted((case for case in cases if case.id in ids), key=lambda case: case.id)


def write_splits(path: Path, split: Split, hashes: Mapping[str, str], cases: Iterable[Case]) -> None:
    """Write `splits.json`: case ids by role, and subject, site and voxel hash of each case.

    Raises:
        CohortError: If the split is not disjoint by subject and by voxels.
        ChiasmError: If the file cannot be written.
    """
    roles = asdict(split)
    listed = _listed(cases, set(chain.from_iterable(roles.values())))
    check_disjoint(split, subjects_of(listed), hashes)
    facts = {c.id: {"subject": c.subject, "site": c.site, "voxels": hashes.get(c.id)} for c in listed}
    write_json(path, with_checksum({**roles, "cases": facts}))


def read_splits(path: Path) -> SplitRecord:
    """Read what `write_splits` wrote.

    Raises:
        RunError: If the file is missing, damaged, or was changed since it was written.
        CohortError: If the split in it is not disjoint.
    """
    content = read_json(path, REMEDY)
    try:
        written = _SplitFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RunError(
            f"is no splits.json of chiasm: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            path=path,
            reason="damaged",
            hint=REMEDY,
        ) from error
    record = _record_of(written)
    check_disjoint(record.split, record.subjects, record.hashes)
    check_checksum(content, path, REMEDY)
    return record


def check_same_split(path: Path, split: Split) -> None:
    """Refuse a folder whose split was made for other cases, and name the cases that differ.

    Args:
        path: A `splits.json`; nothing is refused where it does not exist.
        split: Of the cases that are there now.

    Raises:
        RunError: If both differ, or the file is damaged.
    """
    if not path.exists() or (before := read_splits(path).split) == split:
        return
    then, now = ({name for role in ROLES for name in getattr(one, role)} for one in (before, split))
    gone, new = (", ".join(sorted(names)) for names in (then - now, now - then))
    found = [f"without {gone}"] * bool(gone) + [f"with {new} in addition"] * bool(new)
    raise RunError(
        "was written for other cases than the data folder now holds",
        path=path,
        reason="other-cases",
        found=", ".join(found) or "the same cases in other roles",
        hint="Start a new run with another -o, or restore the data as it was.",
    )


def _record_of(written: _SplitFile) -> SplitRecord:
    """Return the split and the facts on each case, as one table for each fact."""
    facts = written.cases.items()
    return SplitRecord(
        Split(*(tuple(getattr(written, role)) for role in ROLES)),
        {name: fact.subject for name, fact in facts},
        {name: fact.site for name, fact in facts},
        {name: fact.voxels for name, fact in facts if fact.voxels is not None},
    )
