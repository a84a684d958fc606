"""Find images without a partner, from which a method that needs few pairs learns; never those of test subjects."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

from chiasm.cohorts.cases import Case, Cohort, Problem, Side, side_alone, subjects_of
from chiasm.cohorts.duplicates import find_duplicates, find_near_duplicates
from chiasm.errors import CohortError
from chiasm.on_demand import PartOf
from chiasm.preparation.examination import ExaminedCase, examine_case
from chiasm.recipe import Data


def find_unpaired(
    cohort: Cohort,
    data: Data,
    *,
    held_out: Mapping[str, ExaminedCase],
    elsewhere: Collection[str] | None = None,
) -> tuple[list[Case], list[Problem]]:
    """Find the cases that have one side of a pair alone and may be learnt from.

    Args:
        cohort: As found, before cases that lack a modality were left out.
        data: Names sources and target, and says what a training asks of images.
        held_out: The cases that validate or test, by id; neither their subjects nor their voxels are learnt from.
        elsewhere: Sites that may be learnt from, where folds go by site; None: all, and cases without one.

    Returns:
        The cases whose images can be used, in the order of their ids, and a problem for each other.

    Raises:
        CohortError: If one holds the voxels of a case of `held_out`.
    """
    kept_away = {case.subject for case in cohort.cases if case.id in held_out}
    sides: Mapping[Side, Sequence[str]] = {"source": data.sources, "target": [data.target]}
    usable: dict[Side, dict[str, ExaminedCase]] = {"source": {}, "target": {}}
    problems: list[Problem] = []
    for case in sorted(cohort.cases, key=lambda case: case.id):
        side = side_alone(case, data.sources, data.target)
        if side is None or case.subject in kept_away or not _may_teach(case, elsewhere):
            continue
        examined = examine_case(case, sides[side], cohort.regions, data)
        problems += examined.problems
        if examined.is_usable:
            usable[side][case.id] = examined
    for side, names in sides.items():
        if usable[side]:
            refuse_duplicates({**usable[side], **held_out}, cohort, names)
    alone = {**usable["source"], **usable["target"]}
    return [alone[name].case for name in sorted(alone)], problems


def _may_teach(case: Case, sites: Collection[str] | None) -> bool:
    """Return whether a case is fixed to no other role, and comes from one of the sites, where these are given."""
    return case.split in (None, "train") and (sites is None or case.site in sites)


def describe_unpaired(cases: Sequence[Case], sources: Sequence[str], target: str) -> str:
    """Say in one line which images serve without a partner.

    >>> from pathlib import Path
    >>> describe_unpaired([Case("a", "a", {"t1": Path("a.nii.gz")})], ["t1"], "t2")
    't1 of a'
    """
    ids = {side: [c.id for c in cases if side_alone(c, sources, target) == side] for side in ("source", "target")}
    named = {" and ".join(sources): ids["source"], target: ids["target"]}
    return "; ".join(f"{name} of {', '.join(of)}" for name, of in named.items() if of)


def refuse_duplicates(examined: Mapping[str, ExaminedCase], cohort: Cohort, names: Sequence[str]) -> None:
    """Refuse the same voxels, or the same scan that was stored again, under two subjects.

    Args:
        examined: Case id to what was found of it.
        cohort: Its cases give the subjects.
        names: Modalities that all of these cases have; the voxels of the first are compared.

    Raises:
        CohortError: Naming every two such cases.
    """
    if twins := find_duplicates({name: one.images[names[0]].voxels for name, one in examined.items()}, cohort.cases):
        pairs = ", ".join(f"{a} = {b}" for a, b in twins)
        raise CohortError(
            f"the same voxels stand under different subjects: {pairs}",
            path=cohort.root,
            reason="duplicate-voxels",
            hint="Remove one of each, or give both the same subject in a manifest.",
        )
    alike = list(chain.from_iterable(_near_duplicates(examined, cohort, role) for role in names))
    if alike:
        raise CohortError(
            f"one scan seems to stand under different subjects: {', '.join(alike)}",
            path=cohort.root,
            reason="near-duplicate",
            hint="Look at both. Remove one, or give both the same subject in a manifest, so that they stay together.",
        )


def _near_duplicates(examined: Mapping[str, ExaminedCase], cohort: Cohort, role: str) -> Iterator[str]:
    """Name every two images of a modality that look like one scan and stand under different subjects."""
    subjects = subjects_of(cohort.cases)
    views = PartOf(examined, lambda one: one.images[role].thumbnail)
    for a, b, correlation in find_near_duplicates(views):
        if subjects[a] != subjects[b]:
            yield f"{role} of {a} and of {b} (correlation {correlation:.3f})"
