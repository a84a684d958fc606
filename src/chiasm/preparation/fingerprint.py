"""Facts on training cases: grids, sizes, and a sample of their intensities.

All that a plan knows about the data comes from here, and only from training cases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.cohorts.cases import Case, Problem
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.errors import ChiasmError, CohortError, VolumeError
from chiasm.preparation.bias_field import UNSHADED, without_shading
from chiasm.preparation.degradation import Degradation, arranged, known, simulated, thick_mask
from chiasm.progress import Progress, counted
from chiasm.recipe import BiasCorrection, Data
from chiasm.volumes import Volume, check_pair
from chiasm.volumes.masks import Rule, Window, find_mask

MOST_CASES = 64  # that are read, evenly spread; more would not move a median
VOXELS = 20_000  # sampled inside each mask


@dataclass(frozen=True, eq=False)
class CaseFacts:
    """The facts on one training case, axes in RAS order.

    Attributes:
        id: The case.
        spacing_mm: Of its grid, mm.
        body_mm: Size of the box around its mask, mm.
        samples: Raw intensities of each source and then the target, at the
            same voxels inside the mask, shape (sources + 1, n).
        mask_rule: How the mask was found.
        voxels: Number of voxels inside the mask.
    """

    id: str
    spacing_mm: tuple[float, float, float]
    body_mm: tuple[float, float, float]
    samples: NDArray[np.float32]
    mask_rule: Rule
    voxels: int


@dataclass(frozen=True)
class ExaminationSettings:
    """The settings by which images are examined, whatever is fitted to them later.

    Attributes:
        degradation: For super-resolution, as in `read_images`.
        correction: Of the bias field of MR images.
        forced: How masks are found, whatever files and images say; None leaves it to those.
        window_hu: Hounsfield units that are kept, where the first source is CT.
    """

    degradation: Degradation | None = None
    correction: BiasCorrection = "none"
    forced: Rule | None = None
    window_hu: Window | None = None


@dataclass(frozen=True)
class Fingerprint:
    """The facts on the training cases.

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
    """Return the part of a mask in which the target is known: scanned (`Case.known`) and not cut out (`known`).

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


def degradation_of(data: Data) -> Degradation | None:
    """Return the thick slices that a recipe asks for; None for synthesis."""
    if data.task == "synthesis":
        return None
    return Degradation(data.factor, data.axis, data.slice_profile, data.noise)


def terms_of(data: Data) -> ExaminationSettings:
    """Return how a recipe looks at images."""
    return ExaminationSettings(
        degradation_of(data),
        data.bias_correction,
        None if data.mask == "auto" else data.mask,
        data.window_hu if data.sources[0] == "ct" else None,
    )


def fingerprint(
    cases: Sequence[Case],
    sources: Sequence[str],
    target: str,
    progress: Progress | None = None,
    *,
    terms: ExaminationSettings = ExaminationSettings(),
    examined: Mapping[str, CaseFacts] | None = None,
) -> Fingerprint:
    """Collect the facts on training cases.

    Args:
        cases: Training cases; of many, `MOST_CASES` evenly spread ones are looked at.
        sources: Modalities that go in; the mask comes from the first.
        target: The modality that comes out.
        progress: Called with cases done, all cases, the next case's id.
        terms: How images are looked at.
        examined: Case id to the facts of its images as they were scanned, which need not be read again where
            nothing is done to images first.

    Raises:
        CohortError: If none can be read.
    """
    names = [*sources, target]
    chosen = _evenly_spread(cases)
    known = examined if examined and _as_scanned(names, terms) else {}
    facts: list[CaseFacts] = []
    problems: list[Problem] = []
    for case in counted(chosen, attrgetter("id"), progress):
        try:
            facts.append(known[case.id] if case.id in known else _read_facts(case, names, terms))
        except ChiasmError as error:
            path = error.path or case.images[sources[0]]
            problems.append(Problem(path, error.reason, f"case {case.id}: {error}", case.id))
    if not facts:
        detail = f"; the first: {problems[0].message}" if problems else ""
        raise CohortError(f"no training case can be read{detail}", reason="no-usable-case")
    return Fingerprint(tuple(facts), _common_rule({one.mask_rule for one in facts}), tuple(problems))


def _evenly_spread(cases: Sequence[Case]) -> list[Case]:
    """Choose at most `MOST_CASES` cases."""
    places = np.linspace(0, len(cases) - 1, min(MOST_CASES, len(cases))).round().astype(int)
    return [cases[place] for place in np.unique(places)]


def _common_rule(rules: set[Rule]) -> Rule:
    """Return the rule that all cases share, files apart, which come first whatever the rule is; else the body's."""
    agreed = rules if len(rules) == 1 else rules - {"given"}
    return agreed.pop() if len(agreed) == 1 else "body"


def _as_scanned(names: Sequence[str], terms: ExaminationSettings) -> bool:
    """Return whether nothing is done to images before they are looked at."""
    return terms.degradation is None and (terms.correction == "none" or set(names) <= set(UNSHADED))


def _read_facts(case: Case, names: Sequence[str], terms: ExaminationSettings) -> CaseFacts:
    volumes = read_images(case, names, terms.degradation)
    given = None if terms.forced else read_mask(case, volumes[0], terms.degradation)
    return facts_of(case, volumes, terms, given, names)


def facts_of(
    case: Case,
    volumes: Sequence[Volume],
    terms: ExaminationSettings,
    given: Volume | None,
    corrected: Sequence[str] = (),
) -> CaseFacts:
    """Collect the facts on one case.

    Args:
        case: Names the files.
        volumes: Sources, and last the target, in RAS order on one grid.
        terms: How they are looked at.
        given: The mask of a file on that grid, or None.
        corrected: Modality of each volume, where shading is to be taken out of them.

    Raises:
        VolumeError: If the mask is empty.
    """
    mask, rule = _mask_of(volumes[0], terms, given)
    mask = known_of(case, mask, volumes[-1], terms.degradation)
    if not mask.any():
        raise VolumeError("the mask is empty", path=case.mask, reason="empty-mask")
    if corrected:
        volumes = [without_shading(one, mask, name, terms.correction) for one, name in zip(volumes, corrected)]
    return _sampled(case.id, volumes, mask, rule)


def _mask_of(first: Volume, terms: ExaminationSettings, given: Volume | None) -> tuple[NDArray[np.bool_], Rule]:
    """Return a case's mask and how it was found: as forced, else of a file, else by the rule that fits the image."""
    if given is not None:
        return given.array > 0, terms.forced or "given"
    if terms.forced:
        return find_mask(first, terms.forced, strictly=True, window_hu=terms.window_hu)[0], terms.forced
    return find_mask(first, "given", window_hu=terms.window_hu)


def _sampled(case_id: str, volumes: Sequence[Volume], mask: NDArray[np.bool_], rule: Rule) -> CaseFacts:
    spacing = volumes[0].geometry.spacing_mm
    i, j, k = ((part.stop - part.start) * step for part, step in zip(box_of(mask), spacing))
    inside = np.flatnonzero(mask)
    voxels = inside
    if len(inside) > VOXELS:
        seed = int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8])
        voxels = np.sort(np.random.default_rng(seed).choice(inside, VOXELS, replace=False))
    places = np.unravel_index(voxels, mask.shape)
    samples = np.stack([volume.array[places] for volume in volumes]).astype(np.float32)
    return CaseFacts(case_id, spacing, (i, j, k), samples, rule, len(inside))
