"""What training cases are like: grids, sizes, and a sample of their intensities.

Everything a plan knows of the data comes from here, and from training cases alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.bias import without_shading
from chiasm.cohorts.cases import Case, Problem
from chiasm.cohorts.degradation import Degradation, arranged, known, simulated, thick_mask
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.masks import Rule, Window, box_of, find_mask, suggest_rule
from chiasm.errors import ChiasmError, CohortError, VolumeError
from chiasm.recipe import BiasCorrection
from chiasm.volumes import Volume, check_pair

MOST_CASES = 64  # that are read, evenly spread; more would not move a median
VOXELS = 20_000  # sampled inside each mask

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """What one training case is like, axes in RAS order.

    Attributes:
        id: The case.
        spacing_mm: Of its grid.
        body_mm: Size of the box around its mask.
        samples: Raw intensities of each source and then the target, at the
            same voxels inside the mask, shape (sources + 1, n).
    """

    id: str
    spacing_mm: tuple[float, float, float]
    body_mm: tuple[float, float, float]
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class Fingerprint:
    """What the training cases are like.

    Attributes:
        cases: Those that were read.
        mask_rule: How the masks of this cohort are found.
        problems: Cases that could not be read.
    """

    cases: tuple[CaseFacts, ...]
    mask_rule: Rule
    problems: tuple[Problem, ...]


def read_images(case: Case, names: Sequence[str], degradation: Degradation | None = None) -> list[Volume]:
    """Read modalities of a case in RAS order, all on the grid of the first.

    Args:
        case: Has them.
        names: Sources, and last the target.
        degradation: For super-resolution: how sources are made to look, and
            how axes are `arranged`; the target stays as it is.

    Raises:
        VolumeError: If a file cannot be read, grids differ, or slices are too few to be degraded.
    """
    first = read_case_image(case, names[0])
    others = [check_pair(first, read_case_image(case, name), a_name=names[0], b_name=name) for name in names[1:]]
    volumes = [first, *others]
    if degradation is not None:
        volumes = [*simulated(volumes[:-1], degradation), volumes[-1]]
    return [arranged(volume, degradation) for volume in volumes]


def read_mask(case: Case, grid: Volume, degradation: Degradation | None = None) -> Volume | None:
    """Read a case's mask file, if it has one, on the grid of `grid` (in RAS order).

    Args:
        case: Says where it is.
        grid: An image of the case.
        degradation: For super-resolution: whose steps the mask is given.

    Raises:
        VolumeError: If it cannot be read, or lies on another grid.
    """
    if case.mask is None:
        return None
    mask = check_pair(grid, read_case_labels(case, case.mask), b_name="mask", labels=True)
    return mask if degradation is None else thick_mask(mask, degradation)


def known_of(
    case: Case, mask: NDArray[np.bool_], target: Volume, degradation: Degradation | None = None
) -> NDArray[np.bool_]:
    """Leave out of a mask where nothing is known of the target: not scanned (`Case.known`), or cut out (`known`).

    Args:
        case: Says where all its images were scanned.
        mask: Valid voxels on the target's grid.
        target: The target.
        degradation: For super-resolution.

    Raises:
        VolumeError: If `Case.known` cannot be read, or lies on another grid.
    """
    inside = known(mask, target, degradation)
    if case.known is None:
        return inside
    scanned = check_pair(target, read_case_labels(case, case.known), b_name="known voxels", labels=True)
    return inside & (scanned.array > 0)


def fingerprint(
    cases: Sequence[Case],
    sources: Sequence[str],
    target: str,
    progress: Progress | None = None,
    *,
    degradation: Degradation | None = None,
    correction: BiasCorrection = "none",
    forced: Rule | None = None,
    window_hu: Window | None = None,
) -> Fingerprint:
    """Read training cases once and note what they are like.

    Args:
        cases: Training cases; of many, `MOST_CASES` evenly spread ones are read.
        sources: Modalities that go in; the mask comes from the first.
        target: The modality that comes out.
        progress: Called with cases done, all cases, the next case's id.
        degradation: For super-resolution, as in `read_images`.
        correction: Of the bias field of MR images.
        forced: How masks are found, whatever files and images say.
        window_hu: Hounsfield units that are kept, where the first source is CT.

    Raises:
        CohortError: If none can be read.
    """
    places = np.linspace(0, len(cases) - 1, min(MOST_CASES, len(cases))).round().astype(int)
    chosen = [cases[place] for place in np.unique(places)]
    facts: list[CaseFacts] = []
    problems: list[Problem] = []
    rules: set[Rule] = set()
    for index, case in enumerate(chosen):
        if progress is not None:
            progress(index, len(chosen), case.id)
        try:
            volumes = read_images(case, [*sources, target], degradation)
            rule: Rule = forced or (suggest_rule(volumes[0], window_hu) if case.mask is None else "given")
            mask = _mask(case, volumes, rule, degradation, strictly=forced is not None, window_hu=window_hu)
            volumes = [
                without_shading(volume, mask, name, correction) for volume, name in zip(volumes, (*sources, target))
            ]
            facts.append(_facts(case, volumes, mask))
            rules.add(rule)
        except ChiasmError as error:
            path = error.path or case.images[sources[0]]
            problems.append(Problem(path, error.reason, f"case {case.id}: {error}", case.id))
    if progress is not None:
        progress(len(chosen), len(chosen), "")
    if not facts:
        detail = f"; the first: {problems[0].message}" if problems else ""
        raise CohortError(f"no training case can be read{detail}", reason="no-usable-case")
    agreed = rules if len(rules) == 1 else rules - {"given"}  # files come first, whatever the rule is
    return Fingerprint(tuple(facts), agreed.pop() if len(agreed) == 1 else "body", tuple(problems))


def _mask(
    case: Case,
    volumes: Sequence[Volume],
    rule: Rule,
    degradation: Degradation | None,
    *,
    strictly: bool,
    window_hu: Window | None,
) -> NDArray[np.bool_]:
    given = None if strictly else read_mask(case, volumes[0], degradation)
    mask = find_mask(volumes[0], rule, strictly=strictly, window_hu=window_hu)[0] if given is None else given.array > 0
    mask = known_of(case, mask, volumes[-1], degradation)
    if not mask.any():
        raise VolumeError("the mask is empty", path=case.mask, reason="empty-mask")
    return mask


def _facts(case: Case, volumes: Sequence[Volume], mask: NDArray[np.bool_]) -> CaseFacts:
    spacing = volumes[0].geometry.spacing_mm
    box = box_of(mask)
    body = tuple((part.stop - part.start) * step for part, step in zip(box, spacing))
    voxels = np.flatnonzero(mask)
    if len(voxels) > VOXELS:
        seed = int.from_bytes(hashlib.sha256(case.id.encode()).digest()[:8])
        voxels = np.sort(np.random.default_rng(seed).choice(voxels, VOXELS, replace=False))
    samples = np.stack([volume.array.ravel()[voxels] for volume in volumes]).astype(np.float32)
    return CaseFacts(case.id, spacing, (body[0], body[1], body[2]), samples)
