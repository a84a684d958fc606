"""Images whose other side is missing: of use to a method that asks for few pairs, and of people whom nobody tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from chiasm.cohorts.cases import Case, Cohort, Problem, Regions, Side, side_alone
from chiasm.cohorts.duplicates import Thumbnail, find_near_duplicates, thumbnail
from chiasm.cohorts.images import read_case_image
from chiasm.cohorts.labels import usable_labels
from chiasm.cohorts.splits import find_duplicates, voxel_hash
from chiasm.errors import CohortError, VolumeError
from chiasm.volumes import Volume, check_pair


class Checked(NamedTuple):
    """What reading a case's images tells beside that they can be used.

    Attributes:
        voxels: The `voxel_hash` of the first.
        thumbnails: Modality to `thumbnail`; images that were made are not among them.
    """

    voxels: str
    thumbnails: Mapping[str, Thumbnail]


def find_unpaired(
    cohort: Cohort,
    sources: Sequence[str],
    target: str,
    *,
    held_out: Collection[str],
    elsewhere: Collection[str] | None = None,
) -> tuple[list[Case], list[Problem]]:
    """Find the cases that have one side of a pair alone and may be learnt from.

    Args:
        cohort: As found, before cases that lack a modality were left out.
        sources: Modalities that go in.
        target: The modality that comes out.
        held_out: Ids of the cases that validate or test; neither their subjects nor their voxels are learnt from.
        elsewhere: Sites that may be learnt from, where folds go by site; None: all, and cases without one.

    Returns:
        The cases whose images can be read, in the order of their ids, and a problem for each other.

    Raises:
        CohortError: If one holds the voxels of a case of `held_out`.
    """
    kept_away = {case.subject for case in cohort.cases if case.id in held_out}
    seen: dict[Side, dict[str, Checked]] = {"source": {}, "target": {}}
    alone: list[Case] = []
    problems: list[Problem] = []
    for case in sorted(cohort.cases, key=lambda case: case.id):
        side = side_alone(case, sources, target)
        if side is None or case.subject in kept_away or case.split not in (None, "train"):
            continue
        if elsewhere is not None and case.site not in elsewhere:
            continue
        try:
            names = sources if side == "source" else [target]
            seen[side][case.id], spoiled = check_case(case, names, cohort.regions)
        except VolumeError as error:
            path = error.path or next(iter(case.images.values()))
            problems.append(Problem(path, error.reason, f"case {case.id}: {error}", case.id))
            continue
        alone.append(case if spoiled is None else replace(case, labels=None))
        problems += [] if spoiled is None else [spoiled]
    people = [case for case in cohort.cases if case.id in held_out]
    sides: Mapping[Side, Sequence[str]] = {"source": sources, "target": [target]}
    for one, names in sides.items():
        if seen[one]:
            refuse_duplicates({**seen[one], **{case.id: check_images(case, names) for case in people}}, cohort)
    return alone, problems


def tell_unpaired(cases: Sequence[Case], sources: Sequence[str], target: str) -> str:
    """Say in one line which images serve without a partner.

    >>> from pathlib import Path
    >>> tell_unpaired([Case("a", "a", {"t1": Path("a.nii.gz")})], ["t1"], "t2")
    't1 of a'
    """
    ids = {side: [c.id for c in cases if side_alone(c, sources, target) == side] for side in ("source", "target")}
    named = {" and ".join(sources): ids["source"], target: ids["target"]}
    return "; ".join(f"{name} of {', '.join(of)}" for name, of in named.items() if of)


def refuse_duplicates(checked: Mapping[str, Checked], cohort: Cohort) -> None:
    """Refuse the same voxels, or the same scan that was stored again, under two subjects.

    Args:
        checked: Case id to what `check_images` returned.
        cohort: Its cases tell the subjects.

    Raises:
        CohortError: Naming every two such cases.
    """
    if twins := find_duplicates({name: one.voxels for name, one in checked.items()}, cohort.cases):
        pairs = ", ".join(f"{a} = {b}" for a, b in twins)
        raise CohortError(
            f"the same voxels stand under different subjects: {pairs}",
            path=cohort.root,
            reason="duplicate-voxels",
            hint="Remove one of each, or give both the same subject in a manifest.",
        )
    subjects = {case.id: case.subject for case in cohort.cases}
    roles = sorted({role for one in checked.values() for role in one.thumbnails})
    alike = [
        f"{role} of {a} and of {b} (correlation {correlation:.3f})"
        for role in roles
        for a, b, correlation in find_near_duplicates(
            {name: one.thumbnails[role] for name, one in checked.items() if role in one.thumbnails}
        )
        if subjects[a] != subjects[b]
    ]
    if alike:
        raise CohortError(
            f"one scan seems to stand under different subjects: {', '.join(alike)}",
            path=cohort.root,
            reason="near-duplicate",
            hint="Look at both. Remove one, or give both the same subject in a manifest, so that they stay together.",
        )


def check_images(case: Case, names: Sequence[str]) -> Checked:
    """Read images of a case, which must lie on one grid.

    Raises:
        VolumeError: If one cannot be read, or lies elsewhere.
    """
    return _checked(case, names)[0]


def check_case(case: Case, names: Sequence[str], regions: Regions) -> tuple[Checked, Problem | None]:
    """Do as `check_images`, and say what keeps the case's labels from being used.

    Args:
        case: With or without labels.
        names: Of the images.
        regions: Region name to label values.

    Raises:
        VolumeError: As `check_images`.
    """
    checked, first = _checked(case, names)
    return checked, usable_labels(case, regions, first, names[0])[1]


def _checked(case: Case, names: Sequence[str]) -> tuple[Checked, Volume]:
    """Read and check images; return the first of them too."""
    volumes = [read_case_image(case, name) for name in names]
    for other, name in zip(volumes[1:], names[1:]):
        check_pair(volumes[0], other, a_name=names[0], b_name=name)
    views = {name: thumbnail(one) for name, one in zip(names, volumes, strict=True) if name not in case.synthetic}
    return Checked(voxel_hash(volumes[0].array), views), volumes[0]
