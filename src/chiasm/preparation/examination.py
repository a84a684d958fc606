"""The examination of a case's files, which are read once before splits and fits: can they be used, and their facts.

What is found here decides who takes part at all: a case that preparation could
not use must not be given a role first, since its place in the split would
change the weights of everybody else's model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chiasm.checksums import state_of
from chiasm.cohorts.cases import Case, Cohort, Problem, Regions
from chiasm.cohorts.duplicates import Thumbnail, thumbnail, voxel_hash
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.cohorts.labels import region_volumes, usable_labels
from chiasm.errors import CohortError, VolumeError
from chiasm.names import name_first
from chiasm.on_demand import Scratch
from chiasm.preparation.degradation import arranged, check_slices
from chiasm.preparation.displacement import displacement_mm
from chiasm.preparation.fingerprint import CaseFacts, ExaminationSettings, facts_of, terms_of
from chiasm.preparation.intensity import MapKind, fit_intensity
from chiasm.preparation.side_by_side import in_threads
from chiasm.progress import Progress, counted
from chiasm.recipe import Data
from chiasm.volumes import Geometry, Volume, check_pair, refuse_twice
from chiasm.volumes.screening import files_at

MOST_NAMED = 5  # images in a message
FEWEST_VOXELS = 64  # inside a mask: fewer show nothing of an image


@dataclass(frozen=True, eq=False)
class ExaminedImage:
    """The facts on one image.

    Attributes:
        geometry: Its grid, as stored.
        voxels: The `voxel_hash` of its values.
        thumbnail: A coarse view for finding copies, or None of an image that was made.
        apart_mm: About how far it lies from where the first image of its case has it; 0 where it lies there.
    """

    geometry: Geometry
    voxels: str
    thumbnail: Thumbnail | None
    apart_mm: float


@dataclass(frozen=True, eq=False)
class ExaminedCase:
    """The facts and the problems of one case's files.

    Attributes:
        case: As it can be used: without labels where those cannot be.
        images: Modality to image, of those that could be read and lie on the grid of the first.
        regions_ml: Volume of each labelled region; empty where there are no readable labels.
        facts: Grid, mask and a sample of intensities; None where they were not asked for or cannot be had.
        problems: Everything that is wrong, with file and reason.
        is_usable: Whether all images asked for can be used.
    """

    case: Case
    images: Mapping[str, ExaminedImage]
    regions_ml: Mapping[str, float]
    facts: CaseFacts | None
    problems: tuple[Problem, ...]
    is_usable: bool


@dataclass(frozen=True, eq=False)
class ExaminedCohort:
    """The usable cases of a cohort with their facts, and the problems of the others.

    Attributes:
        cohort: The usable cases; problems that were known before come first among its own.
        cases: Case id to what was found, of usable cases alone; each look-up reads it from the disk.
        problems: What examination found.
    """

    cohort: Cohort
    cases: Mapping[str, ExaminedCase]
    problems: tuple[Problem, ...]


def examine_case(case: Case, names: Sequence[str], regions: Regions, data: Data | None = None) -> ExaminedCase:
    """Read a case's images, mask and labels once, and note what they are like and what is wrong.

    Args:
        case: The case.
        names: Which of its images to read, the first source first and the target last.
        regions: Region name to label values; labels with other values are a problem.
        data: What a training asks of it; None only reads the files.
    """
    problems: list[Problem] = []
    volumes = _read_images(case, names, problems)
    facts = None if data is None else _checked_facts(case, volumes, data, problems)
    if data is None:
        _read_mask(case, volumes, problems)
    is_usable = not problems
    labels = first = None
    if volumes:
        name, first = next(iter(volumes.items()))
        labels, spoiled = usable_labels(case, regions, first, name)
        if spoiled is not None:
            problems.append(spoiled)
            case = replace(case, labels=None)
    images = {name: _examined(volume, first, name in case.synthetic) for name, volume in volumes.items()}
    regions_ml = {} if labels is None else region_volumes(labels, regions)
    return ExaminedCase(case, images, regions_ml, facts, tuple(problems), is_usable)


def examine_cases(
    cases: Sequence[Case],
    names: Sequence[str] | None,
    regions: Regions,
    data: Data | None = None,
    progress: Progress | None = None,
) -> Generator[ExaminedCase, None, None]:
    """Examine cases side by side, and yield what was found of each in their order.

    Args:
        cases: All have these images.
        names: As for `examine_case`; None reads all of a case's images.
        regions: As for `examine_case`.
        data: Likewise.
        progress: Called with cases done, all cases, the next case's id.
    """

    def examine(case: Case) -> ExaminedCase:
        return examine_case(case, list(case.images) if names is None else names, regions, data)

    with closing(in_threads(cases, examine)) as found:
        for _ in counted(cases, attrgetter("id"), progress):
            yield next(found)


def _checked_facts(case: Case, volumes: Mapping[str, Volume], data: Data, problems: list[Problem]) -> CaseFacts | None:
    """Note what a case is like, and check that its images can be normalised; None where something is wrong."""
    terms = terms_of(data)
    mask = _read_mask(case, volumes, problems) if terms.forced is None else None
    if problems:
        return None
    facts = None
    with _noting(problems, case, "mask and intensities"):
        facts = _facts(case, volumes, mask, terms)
        check_contrast(case, dict(zip(volumes, facts.samples)), data)
    return facts


def examine_cohort(cohort: Cohort, data: Data, folder: Path, progress: Progress | None = None) -> ExaminedCohort:
    """Examine every case; a bad case is reported, and the others are used.

    Nothing is examined again that this process examined last: the same cases, by the same settings, in the same files.

    Args:
        cohort: Cases with all modalities of `data`.
        data: What a training asks of them.
        folder: On whose disk what is found is kept until it is asked for; it must exist.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        CohortError: If none is usable.
        ChiasmError: If the folder cannot be written.
    """
    what = _what_is_examined(cohort, data)
    if what is not None and _LATEST and _LATEST[0][0] == what:
        usable, cases, problems = _LATEST[0][1]
    else:
        usable, cases, problems = _examine_all(cohort, data, folder, progress)
        _LATEST[:] = [] if what is None else [(what, (usable, cases, problems))]
    if not usable:
        raise CohortError(
            f"none of its {len(cohort.cases)} cases can be used; the first: {problems[0].message}",
            path=cohort.root,
            reason="no-usable-case",
        )
    return ExaminedCohort(replace(cohort, cases=cases), usable, problems)


_Findings = tuple[Mapping[str, ExaminedCase], tuple[Case, ...], tuple[Problem, ...]]
_LATEST: list[tuple[object, _Findings]] = []  # what was examined last, if its files were settled: at most one entry


def _examine_all(cohort: Cohort, data: Data, folder: Path, progress: Progress | None) -> _Findings:
    """Return what was found of usable cases, those cases, and all problems."""
    usable = Scratch[ExaminedCase](folder)
    cases: list[Case] = []
    problems: list[Problem] = []
    with closing(examine_cases(cohort.cases, data.modalities, cohort.regions, data, progress)) as found:
        for examined in found:
            problems += examined.problems
            if examined.is_usable:
                usable.keep(examined.case.id, examined)
                cases.append(examined.case)
    return usable, tuple(cases), tuple(problems)


def _what_is_examined(cohort: Cohort, data: Data) -> object | None:
    """Return what an examination depends on: cases, settings and states of files; None while a file may change."""
    paths = {path for case in cohort.cases for path in (*case.files.values(), case.known) if path is not None}
    try:
        states = {file: state_of(file) for path in paths for file in files_at(path)}
    except (OSError, VolumeError):
        return None
    if not all(states.values()):
        return None
    settings = (data.modalities, terms_of(data), data.intensity, data.window_hu)
    return cohort.cases, dict(cohort.regions), settings, states


def check_contrast(case: Case, samples: Mapping[str, NDArray[np.float32]], data: Data) -> None:
    """Refuse a case in which an image is nearly constant inside the mask, so that no intensity map fits it.

    Args:
        case: Names the files.
        samples: Modality to raw intensities inside the mask, shape (n,) each.
        data: Says which maps may be fitted, and the window of CT.

    Raises:
        VolumeError: If one is.
    """
    strictest: MapKind = "median_iqr" if data.intensity == "auto" else data.intensity
    for name, values in samples.items():
        kept = np.clip(values, *data.window_hu) if name == "ct" else values
        try:
            fit_intensity(kept, None, "zscore" if name == "ct" else strictest)
        except VolumeError as error:
            raise VolumeError(
                error.what, path=case.images[name], reason=error.reason, found=error.found, hint=error.hint
            ) from error


def _read_images(case: Case, names: Sequence[str], problems: list[Problem]) -> dict[str, Volume]:
    """Read images, all on the grid of the first that can be read."""
    volumes: dict[str, Volume] = {}
    for name in names:
        with _noting(problems, case, name):
            volume = read_case_image(case, name)
            if volumes:
                first_name, first = next(iter(volumes.items()))
                volume = check_pair(first, volume, a_name=_with_file(case, first_name), b_name=name)
            for earlier, image in volumes.items():
                refuse_twice({earlier: image, name: volume})
            volumes[name] = volume
    return volumes


def _with_file(case: Case, name: str) -> str:
    """Name an image with its file: an error of a pair carries the path of the other."""
    return f"{name} ({case.images[name].name})"


def _read_mask(case: Case, volumes: Mapping[str, Volume], problems: list[Problem]) -> Volume | None:
    if case.mask is None or not volumes:
        return None
    with _noting(problems, case, "mask"):
        first_name, first = next(iter(volumes.items()))
        mask, a_name = read_case_labels(case, case.mask), _with_file(case, first_name)
        return check_pair(first, mask, a_name=a_name, b_name="mask", labels=True)
    return None


def _facts(case: Case, volumes: Mapping[str, Volume], mask: Volume | None, terms: ExaminationSettings) -> CaseFacts:
    """Return the facts on a case's images as they were scanned."""
    if terms.degradation is not None:
        check_slices(next(iter(volumes.values())).geometry, terms.degradation)
    in_ras = [arranged(volume, None) for volume in volumes.values()]
    given = None if mask is None else arranged(mask, None)
    facts = facts_of(case, in_ras, replace(terms, degradation=None), given)
    if facts.voxels < FEWEST_VOXELS:
        raise VolumeError(
            "the mask is too small", reason="small-mask", found=facts.voxels, expected=f"{FEWEST_VOXELS} voxels or more"
        )
    return facts


def _examined(volume: Volume, first: Volume | None, is_made: bool) -> ExaminedImage:
    apart_mm = 0.0 if first is None or volume is first else displacement_mm(first, volume)
    return ExaminedImage(volume.geometry, voxel_hash(volume.array), None if is_made else thumbnail(volume), apart_mm)


def describe_displaced(cases: Iterable[ExaminedCase]) -> str | None:
    """Name the cases whose images do not lie on one another, and what can be done; None where all do."""
    found = [
        f"{one.case.id} ({name} about {image.apart_mm:.0f} mm from {next(iter(one.images))})"
        for one in cases
        for name, image in one.images.items()
        if image.apart_mm
    ]
    if not found:
        return None
    return (
        "images seem not to lie on one another, which blurs what is learnt and spoils what is scored: "
        f"{name_first(found, MOST_NAMED)}; "
        "chiasm run --register rigid aligns them, and chiasm view shows them"
    )


@contextmanager
def _noting(problems: list[Problem], case: Case, what: str) -> Iterator[None]:
    """Turn the error of a file into a problem of its case."""
    try:
        yield
    except VolumeError as error:
        known = {**case.images, **({} if case.mask is None else {"mask": case.mask})}
        path = error.path or known.get(what) or next(iter(case.images.values()))
        problems.append(Problem(path, error.reason, f"case {case.id}, {what}: {error}", case.id))
