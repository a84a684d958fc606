"""One subject's files, and a folder's worth of them: paths only, nothing is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from chiasm.errors import CohortError, shortened
from chiasm.names import SAFE_NAME, is_plain, is_safe_id
from chiasm.recipe import Data
from chiasm.volumes.screening import STRICT, VOLUME_SUFFIXES, Reading

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

#: Other spellings of the modality names used here, all in lower case.
ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("t1w", "t1n"), "t1"),
    **dict.fromkeys(("t1c", "t1gd", "t1-ce", "t1_ce", "ce-t1"), "t1ce"),
    **dict.fromkeys(("t2w",), "t2"),
    **dict.fromkeys(("t2f", "t2flair", "t2-flair", "t2_flair", "t2w_flair"), "flair"),
    **dict.fromkeys(("pdw",), "pd"),
    **dict.fromkeys(("mri",), "mr"),
}

#: The modalities that have a name of their own here; a layout may add others.
MODALITIES = ("t1", "t1ce", "t2", "flair", "pd", "ct", "mr", "cbct")

#: What a file or folder of valid voxels, or of labels, is called in lower case.
MASK_NAMES = ("mask", "masks", "brainmask", "brain_mask", "bodymask", "body_mask")
LABEL_NAMES = ("seg", "labels", "label", "lesion", "lesions", "lesion_mask", "regions")

#: Roles of a case's files that are no images.
MAPS = ("mask", "labels")

#: The two sides of a pair.
Side = Literal["source", "target"]

#: Region name to the label values that make it.
Regions = Mapping[str, tuple[int, ...]]

#: Where a layout has labels and no table: whatever is marked.
LESION: Regions = {"lesion": (1, 2, 3, 4)}


@dataclass(frozen=True)
class Case:
    """The files of one examination of one subject.

    Attributes:
        id: Unique in its cohort and safe as a file name.
        subject: The person: the unit of every split and of every statistic.
        images: Modality ("t1", "t2", "ct", ...) to file.
        mask: Valid voxels (brain or body); None if they are found from the source.
        labels: Label map whose regions the cohort names, or None.
        site: Hospital or scanner, where the layout states it.
        split: "train", "validation" or "test" where a manifest or a folder fixes it.
        synthetic: Modalities whose image was made, not acquired.
        known: Voxels that all images cover, after registration; None for all voxels.
        reading: What to assume of its files if their headers leave a question open.
        label_threshold: The value from which a voxel of soft labels counts; None if labels are whole numbers.
    """

    id: str
    subject: str
    images: Mapping[str, Path]
    mask: Path | None = None
    labels: Path | None = None
    site: str | None = None
    split: str | None = None
    synthetic: tuple[str, ...] = ()
    known: Path | None = None
    reading: Reading = STRICT
    label_threshold: float | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Its files by role: the images, then mask and labels where it has them."""
        maps = {"mask": self.mask, "labels": self.labels}
        return {**self.images, **{role: path for role, path in maps.items() if path is not None}}


@dataclass(frozen=True)
class Problem:
    """Why a file or a case is not used.

    Attributes:
        path: The file or folder.
        reason: A short code, such as "no-pair" or "truncated".
        message: One sentence for people.
        case: The case's id, where it is known.
        modality: Which image of the case it is, where only that one is affected.
    """

    path: Path
    reason: str
    message: str
    case: str | None = None
    modality: str | None = None

    @property
    def line(self) -> str:
        """One line that says what is left out and why."""
        where = "" if str(self.path) in self.message else f"{self.path}: "
        return f"left out: {where}{self.message}"


@dataclass(frozen=True)
class Cohort:
    """What was found in a folder.

    Attributes:
        root: The folder.
        layout: Name of the layout that was recognised, such as "brats-2018".
        cases: Cases in the order of their ids.
        regions: Region name to the label values that make it, such as
            "WT" to (1, 2, 4); empty where there are no label maps.
        problems: Files and cases that are not used, with reasons.
        notes: Remarks on the cohort when nothing is lost, such as a second scan of one modality.
        unused: Images below the root that no case uses, for any reason.
        listing: Lines that name every DICOM series, for choosing; they may
            identify people, and belong in no file.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    regions: Regions = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    listing: tuple[str, ...] = ()
    notes: tuple[Problem, ...] = ()
    unused: tuple[Path, ...] = ()


def with_reading(cohort: Cohort, reading: Reading) -> Cohort:
    """Return a cohort whose files are read in another way; what `reading` leaves open stays as it was."""
    return replace(cohort, cases=tuple(replace(case, reading=reading | case.reading) for case in cohort.cases))


def reading_of(data: Data) -> Reading:
    """Return what a recipe assumes of files if their headers leave a question open."""
    form = None if data.form == "none" else data.form
    return Reading(form, data.assume_ras, data.resample, data.resample_tilt, data.ct_offset)


def side_alone(case: Case, sources: Sequence[str], target: str) -> Side | None:
    """Return the side of a pair that a case has without the other side; None if it has both or neither.

    It is also None for super-resolution, where one image is both sides.

    >>> only = Case("a", "a", {"t1": Path("a.nii.gz")})
    >>> side_alone(only, ["t1"], "t2"), side_alone(only, ["pd", "t2"], "t1"), side_alone(only, ["t1", "pd"], "t2")
    ('source', 'target', None)
    """
    has_sources, has_target = all(name in case.images for name in sources), target in case.images
    if has_sources == has_target or target in sources:
        return None
    return "source" if has_sources else "target"


def role_of(name: str) -> str:
    """Say what a word in a file name stands for: "mask", "labels" or a modality.

    >>> [role_of(name) for name in ("T1w", "t1c", "MASK", "lesions", "Adc")]
    ['t1', 't1ce', 'mask', 'labels', 'adc']
    """
    lower = name.lower()
    if lower in MASK_NAMES:
        return "mask"
    if lower in LABEL_NAMES:
        return "labels"
    return ALIASES.get(lower, lower)


def images_among(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return a case's files, by role, without mask and label map.

    >>> images_among({"t1": Path("t1.nii"), "mask": Path("mask.nii")})
    {'t1': PosixPath('t1.nii')}
    """
    return {role: file for role, file in files.items() if role not in MAPS}


def with_files(case: Case, files: Mapping[str, Path]) -> Case:
    """Return a case with these files, by role: its images, its mask and its labels."""
    return replace(case, images=images_among(files), mask=files.get("mask"), labels=files.get("labels"))


def regions_of(cases: Iterable[Case], declared: Regions) -> Regions:
    """Return the declared regions of a cohort; none if no case has labels."""
    return declared if any(case.labels for case in cases) else {}


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key; groups, and items in each group, keep the order in which they occur.

    >>> grouped(["t1", "ct", "t2"], lambda name: name[0])
    {'t': ['t1', 't2'], 'c': ['ct']}
    """
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def without_problems(items: Sequence[T | Problem]) -> tuple[list[T], list[Problem]]:
    """Separate the items that could be read from the problems of the others."""
    problems = [one for one in items if isinstance(one, Problem)]
    return [one for one in items if not isinstance(one, Problem)], problems


def without_problems_by_role(found: Mapping[str, T | Problem]) -> tuple[dict[str, T], list[Problem]]:
    """Separate the items that were found, by role, from the problems of the other roles."""
    _, problems = without_problems(list(found.values()))
    return {role: one for role, one in found.items() if not isinstance(one, Problem)}, problems


def only(items: Collection[T]) -> T | None:
    """Return the only item; None if there are none or several.

    >>> only(["t1"]), only(["t1", "t2"])
    ('t1', None)
    """
    return next(iter(items)) if len(items) == 1 else None


def subjects_of(cases: Iterable[Case]) -> dict[str, str]:
    """Return the subject of each case by the case's id.

    >>> subjects_of([Case("a1", "a", {}), Case("a2", "a", {})])
    {'a1': 'a', 'a2': 'a'}
    """
    return {case.id: case.subject for case in cases}


def with_unique_ids(place: Path, cases: Iterable[Case]) -> list[Case]:
    """Put cases in the order of their ids.

    Args:
        place: The folder or file that gives the ids.
        cases: In any order.

    Raises:
        CohortError: If two have one id.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    if twice := repeated(case.id for case in ordered):
        raise CohortError(
            "two cases have the same id",
            path=place,
            reason="duplicate-id",
            found=", ".join(twice[:5]),
            hint="Give each case its own id; in a manifest, in a column called id.",
        )
    return ordered


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, each once, in the order in which they occur first.

    >>> repeated(["b", "a", "b", "c", "a", "b"])
    ['b', 'a']
    """
    return [name for name, count in Counter(names).items() if count > 1]


def volume_stem(name: str) -> str | None:
    """Return a volume's file name without its suffix, or None where it is no volume.

    >>> volume_stem("a.b.nii.gz"), volume_stem("notes.txt")
    ('a.b', None)
    """
    suffixes = (suffix for suffix in VOLUME_SUFFIXES if name.lower().endswith(suffix) and len(name) > len(suffix))
    suffix = next(suffixes, None)
    return None if suffix is None else name[: -len(suffix)]


def without_unsafe_names(cohort: Cohort) -> Cohort:
    """Leave out cases whose name, subject or site is not safe in a file, a table or a page.

    Raises:
        CohortError: If no case is left.
    """
    kept, problems = without_problems([unsafe_name(case) or case for case in cohort.cases])
    if problems and not kept:
        raise CohortError(f"has no usable case; {problems[-1].message}", path=cohort.root, reason="unsafe-id")
    return replace(cohort, cases=tuple(kept), problems=(*cohort.problems, *problems))


def unsafe_name(case: Case) -> Problem | None:
    """Say why a case's name, subject or site cannot be used; None if all can."""
    names = {"name": is_safe_id(case.id), "subject": is_plain(case.subject), "site": is_plain(case.site or "none")}
    wrong = next((what for what, safe in names.items() if not safe), None)
    if wrong is None:
        return None
    path = next(iter(case.images.values()))
    found = shortened(str({"name": case.id, "subject": case.subject, "site": case.site}[wrong]))
    message = f"case {shortened(case.id)}: its {wrong} {found} cannot be used; {path.name}: a name is {SAFE_NAME}"
    return Problem(path, "unsafe-id", message, case.id)
