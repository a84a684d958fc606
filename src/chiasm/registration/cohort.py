"""Scans of one patient, aligned on the grid of the first source.

The first source is never interpolated, so a network sees it unchanged with any other images.  Every other image is
interpolated once.  A cohort's images are kept as files, made anew when what they were made of changed; after this step
a cohort looks as if it had been scanned so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.checksums import content_hash, has_checksum, has_valid_checksum, sha256_of, with_checksum
from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.cohorts.images import read_case_image, read_case_labels, stored
from chiasm.cohorts.labels import read_label_map
from chiasm.errors import ChiasmError, CohortError, RunError, VolumeError
from chiasm.locks import LOCK
from chiasm.outputs import refuse_foreign, refuse_links, remove_files
from chiasm.progress import Progress
from chiasm.recipe import Registration
from chiasm.registration.alignment import GRID_MM, Alignment, AlignmentKind, align
from chiasm.storage import (
    UNWRITABLE,
    make_folder,
    open_in_place,
    read_facts,
    read_json,
    whole_file,
    whole_folder,
    write_json,
    writing,
)
from chiasm.volumes import Geometry, Volume, canonical, grid_with_spacing, write_volume
from chiasm.volumes.dicom_scan import place_inside
from chiasm.volumes.geometry import laid_on, reordered_like, same_grid
from chiasm.volumes.screening import volume_files

#: Raised by one whenever the same files would be aligned otherwise.
VERSION = 1
RECORD = "registration.json"
SEED = 0  # of what mutual information is estimated from: training and prediction find the same


class AlignedImage(NamedTuple):
    """An image on another's grid.

    Attributes:
        image: The image; voxels that were not scanned have its darkest value.
        covered: Voxels that were scanned, shape (I, J, K).
        alignment: The alignment that was used.
    """

    image: Volume
    covered: NDArray[np.bool_]
    alignment: Alignment


class AlignedCohort(NamedTuple):
    """A cohort with aligned images.

    Attributes:
        cohort: The aligned cases; their paths point to the new files.
        moved_mm: Case id to the mean movement inside the mask of the image that was moved farthest.
        problems: Cases that could not be aligned.
    """

    cohort: Cohort
    moved_mm: Mapping[str, float]
    problems: tuple[Problem, ...]


def align_image(fixed: Volume, moving: Volume, kind: AlignmentKind) -> AlignedImage:
    """Align an image with another of the same patient, on its grid.

    Raises:
        VolumeError: If the two do not come together, or the field folds.
    """
    alignment = align(fixed, moving, kind, seed=SEED)
    if alignment.least_jacobian <= 0:
        raise VolumeError("the field folds", reason="folded", found=f"a Jacobian of {alignment.least_jacobian:.2f}")
    return lay_on(fixed.geometry, moving, alignment)


def lay_on(grid: Geometry, moving: Volume, alignment: Alignment) -> AlignedImage:
    """Resample an image on the grid of the one that it was aligned with.

    Args:
        grid: Of the fixed image.
        moving: The image.
        alignment: Where points of the grid lie in it.
    """
    there = np.ones(moving.geometry.shape, np.uint8)
    covered = alignment.resample_moving(Volume(there, moving.geometry), grid, order=0).array > 0
    image = alignment.resample_moving(moving, grid).array
    return AlignedImage(Volume(np.where(covered, image, np.float32(moving.array.min())), grid), covered, alignment)


def align_sources(
    volumes: Sequence[Volume], names: Sequence[str], kind: Registration
) -> tuple[list[Volume], list[str]]:
    """Align all sources of a case on the grid of the first, as `align_cohort` does for training.

    Returns:
        The volumes, and a sentence for each that was moved.

    Raises:
        VolumeError: If two do not come together.
    """
    if kind == "none":
        return list(volumes), []
    made = [align_image(volumes[0], other, kind) for other in volumes[1:]]
    notes = [
        f"{name} was aligned to {names[0]} ({kind}), by {one.alignment.mean_mm:.1f} mm"
        for name, one in zip(names[1:], made)
    ]
    return [*volumes[:1], *(one.image for one in made)], notes


def align_cohort(
    cohort: Cohort, names: Sequence[str], kind: Registration, folder: Path, progress: Progress | None = None
) -> AlignedCohort:
    """Align the images of every case on the grid of its first source.

    A case's `folder/<case>/` holds `<modality>.nii.gz` for each that was
    aligned, `registration.json`, with Demons `<modality>-field.nii.gz`, the
    labels and mask where they lie on such an image's grid (nearest neighbour;
    those that lie on the source's stay where they are), and `known.nii.gz`
    where some image does not reach.  It is made once: another call finds it by
    the contents of the files that it was made of.

    Args:
        cohort: Cases that lack one of `names` stay as they are.
        names: Modalities, the first source first; the target may be among the sources.
        kind: "none" changes nothing.
        folder: Where the files go.
        progress: Called with cases done, all cases, and the id of the next that must be made.

    Returns:
        The cohort, how far each case was moved, and a problem for each case that is missing.

    Raises:
        CohortError: If no case can be aligned.
        ChiasmError: If the folder cannot be written.
    """
    names = tuple(dict.fromkeys(names))
    if kind == "none" or len(names) < 2:
        return AlignedCohort(cohort, {}, ())
    cases: list[Case] = []
    moved: dict[str, float] = {}
    problems: list[Problem] = []
    with _alone(folder):
        for index, case in enumerate(cohort.cases):
            if not set(names) <= set(case.images):
                cases.append(case)
                continue
            place = folder / case.id
            try:
                report = partial(progress or _silent, index, len(cohort.cases), case.id)
                record = _find_or_make(case, names, kind, place, report)
            except ChiasmError as error:
                if error.reason == UNWRITABLE:
                    raise
                path = error.path or case.images[names[1]]
                problems.append(Problem(path, error.reason, f"case {case.id}: {error}", case.id))
                continue
            cases.append(_as_made(case, place, record))
            moved[case.id] = farthest_mm(record)
    if problems and not moved:
        raise CohortError(
            f"none of its {len(problems)} cases can be registered; the first: {problems[0].message}",
            path=cohort.root,
            reason="no-usable-case",
        )
    return AlignedCohort(replace(cohort, cases=tuple(cases)), moved, tuple(problems))


def _silent(done: int, cases: int, case: str) -> None:
    """Report no progress."""


def _find_or_make(
    case: Case, names: Sequence[str], kind: AlignmentKind, place: Path, report: Callable[[], None]
) -> dict[str, Any]:
    """Return the record of a case that was aligned before, or align it now and call `report` first."""
    asked = _depends(case, names, kind)
    record = _read_made(place, asked)
    if record is None:
        report()
        record = _make(case, names, kind, place, asked)
    return record


def aligned_images(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a record on each aligned image, by modality; version 0.1 called them brought."""
    images: dict[str, dict[str, Any]] = record.get("aligned") or record.get("brought") or {}
    return images


def farthest_mm(record: Mapping[str, Any]) -> float:
    """Return the mean displacement, mm, of the image of a case that was moved farthest."""
    return max(float(one["mean_displacement_mm"]) for one in aligned_images(record).values())


def describe_movement(moved_mm: Mapping[str, float]) -> str:
    """Describe how far pairs were moved.

    >>> describe_movement({"a": 1.0, "b": 4.04, "c": 2.0})
    'pairs were moved by 2.0 mm (median), 4.0 mm at most (b)'
    """
    farthest = max(moved_mm, key=lambda name: moved_mm[name])
    median = float(np.median(list(moved_mm.values())))
    return f"pairs were moved by {median:.1f} mm (median), {moved_mm[farthest]:.1f} mm at most ({farthest})"


def hashes_of(case: Case, names: Sequence[str]) -> dict[str, list[str]]:
    """Hash the files of a case by content: these images, and its mask, labels and known voxels where it has them.

    Where a file holds several images, its choice stands behind the hash.

    Raises:
        VolumeError: If one cannot be read.
    """
    files = {name: case.images[name] for name in names}
    others = (("mask", case.mask), ("labels", case.labels), ("known", case.known))
    files |= {name: path for name, path in others if path is not None}
    try:
        return {
            name: [*map(sha256_of, volume_files(path)), *filter(None, [place_inside(path)])]
            for name, path in files.items()
        }
    except OSError as error:
        raise VolumeError("cannot be read", path=error.filename, reason="unreadable", found=error.strerror) from error


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the record of `align_cohort` for each case, by case id.

    Raises:
        RunError: If a record is damaged.
    """
    return {path.parent.name: read_json(path) for path in sorted(folder.glob(f"*/{RECORD}"))}


def remove_registered(folder: Path) -> None:
    """Remove the files of `align_cohort` in a folder, and their pages; other files stay.

    Raises:
        ChiasmError: If a file cannot be removed.
    """
    for place in (record.parent for record in sorted(folder.glob(f"*/{RECORD}"))):
        own = _own_files(place)
        remove_files(place, sorted(own - {RECORD}))
        remove_files(folder, [f"{place.name}/{RECORD}"])  # last: it says whose the others are
    remove_files(folder, ["index.html"])


def _own_files(place: Path, names: Sequence[str] = ()) -> set[str]:
    """List the names of a registered case's files; for a damaged record, the names that they would have."""
    record = read_facts(place / RECORD)
    images = {*names, *aligned_images(record)}
    made = {f"{name}{end}" for name in images for end in (".nii.gz", "-field.nii.gz", ".html")}
    return {RECORD, "labels.nii.gz", "mask.nii.gz", "known.nii.gz"} | made if (place / RECORD).is_file() else set()


def _refuse_occupied(place: Path, names: Sequence[str]) -> None:
    """Refuse to replace a case's folder that holds other files, or that is a link.

    Raises:
        RunError: If it does.
    """
    refuse_links(place.parent, [place.name])
    own = _own_files(place, names)
    refuse_foreign(place, sorted({path.name for path in place.glob("*")} - own))


def _depends(case: Case, names: Sequence[str], kind: AlignmentKind) -> dict[str, Any]:
    """Return everything that the files of a case depend on, with contents as hashes."""
    soft = {} if case.label_threshold is None else {"label_threshold": case.label_threshold}
    return {"version": VERSION, "kind": kind, "seed": SEED, "fixed": names[0], "files": hashes_of(case, names), **soft}


def _read_made(place: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of an earlier alignment of the same files; None if there is none or a file was changed."""
    try:
        record = read_json(place / RECORD)
        if not isinstance(record, dict) or record.get("asked") != asked:
            return None
        if not has_checksum(record):  # of a time without checksums
            return record if all((place / name).is_file() for name in record["made"]) else None
        whole = has_valid_checksum(record) and all(
            content_hash(place / name) == expected for name, expected in record["sha256"].items()
        )
    except (RunError, OSError):
        return None
    return record if whole else None


def _make(
    case: Case, names: Sequence[str], kind: AlignmentKind, place: Path, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Align a case's images and write all of it, or nothing."""
    fixed = read_case_image(case, names[0])
    images = {name: read_case_image(case, name) for name in names[1:]}
    made = {name: _align_image(case, names[0], name, fixed, moving, kind) for name, moving in images.items()}
    labels = _align_labels(case, fixed, images, made)
    record = {
        "asked": asked,
        "paths": {name: str(case.images[name].absolute()) for name in names},
        "made": sorted(f"{name}.nii.gz" for name in (*made, *labels)),
        "aligned": {name: _describe_image(one) for name, one in made.items()},
    }
    _refuse_occupied(place, names)
    with whole_folder(place) as fresh:
        for name, one in made.items():
            write_volume(fresh / f"{name}.nii.gz", stored(one.image.array, case, name), fixed.geometry)
            if one.alignment.field_mm is not None:
                write_field(fresh / f"{name}-field.nii.gz", one.alignment, fixed.geometry)
        for name, array in labels.items():
            write_volume(fresh / f"{name}.nii.gz", array, fixed.geometry, labels=True)
        record["sha256"] = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
        write_json(fresh / RECORD, with_checksum(record))
    return record


def _align_image(
    case: Case, fixed_name: str, name: str, fixed: Volume, moving: Volume, kind: AlignmentKind
) -> AlignedImage:
    """Align an image with the first source.

    Raises:
        VolumeError: If the two do not come together; names the image.
    """
    try:
        return align_image(fixed, moving, kind)
    except VolumeError as error:
        raise VolumeError(
            f"{name} cannot be aligned with {fixed_name}: {error.what}",
            path=case.images[name],
            reason=error.reason,
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from error


def _align_labels(
    case: Case, fixed: Volume, images: Mapping[str, Volume], made: Mapping[str, AlignedImage]
) -> dict[str, NDArray[Any]]:
    """Resample labels and mask with the images; "known" are the voxels that all images cover, if some are not."""
    resampled: dict[str, NDArray[Any]] = {}
    for name, path in (("labels", case.labels), ("mask", case.mask)):
        volume = _label_volume(case, path, name)
        aligned = None if volume is None else _aligned_labels(volume, fixed, images, made)
        if aligned is not None:
            resampled[name] = aligned
    covered = np.logical_and.reduce([one.covered for one in made.values()])
    return resampled if covered.all() else {**resampled, "known": covered}


def _describe_image(one: AlignedImage) -> dict[str, Any]:
    """Describe the alignment of an image for the record."""
    covered, matrix = round(float(one.covered.mean()), 4), one.alignment.matrix.tolist()
    return {**describe_alignment(one.alignment), "covered": covered, "matrix": matrix}


def _label_volume(case: Case, path: Path | None, name: str) -> Volume | None:
    """Read labels or a mask; unusable labels keep their path, so that reading them later refuses them by name."""
    if path is None:
        return None
    if name == "mask":
        return read_case_labels(case, path)
    try:
        return read_label_map(case, {})
    except VolumeError:
        return None


def _aligned_labels(
    labels: Volume, fixed: Volume, images: Mapping[str, Volume], made: Mapping[str, AlignedImage]
) -> NDArray[Any] | None:
    """Resample labels with the image on whose grid they lie; None if that is the fixed image or no image."""
    if _on_grid(labels, fixed) is not None:
        return None
    for name, moving in images.items():
        if (there := _on_grid(labels, moving)) is not None:
            return made[name].alignment.resample_moving(there, fixed.geometry, order=0).array
    return None  # left as they are, they are refused by name


def _on_grid(labels: Volume, image: Volume) -> Volume | None:
    fitting = reordered_like(labels, image.geometry)
    if same_grid(image.geometry, fitting.geometry):
        return fitting
    return laid_on(labels, image.geometry) if labels.geometry.container == "dicom" else None  # as `check_pair` does


def _as_made(case: Case, place: Path, record: Mapping[str, Any]) -> Case:
    """Return the case with the paths of its aligned files."""
    made = {name.removesuffix(".nii.gz"): place / name for name in record["made"]}
    return replace(
        case,
        images={name: made.get(name, path) for name, path in case.images.items()},
        mask=made.get("mask", case.mask),
        labels=made.get("labels", case.labels),
        known=made.get("known"),
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder: jobs of a study share one, and each case is made once."""
    from filelock import lock_descriptor

    make_folder(folder)
    with writing(folder):
        lock = open_in_place(folder / LOCK, "a")
    with lock as file:
        lock_descriptor(file.fileno())
        yield


def describe_alignment(alignment: Alignment) -> dict[str, Any]:
    """Return the facts on a registration that need no truth, ready for JSON."""
    return {
        "kind": alignment.kind,
        "mutual_information": [round(value, 4) for value in alignment.information],
        "mean_displacement_mm": round(alignment.mean_mm, 3),
        "least_jacobian": round(alignment.least_jacobian, 4),
        "most_jacobian": round(alignment.most_jacobian, 4),
        "seconds": round(alignment.seconds, 1),
    }


def write_field(path: Path, alignment: Alignment, fixed: Geometry) -> None:
    """Write the whole displacement as a NIfTI vector image that ITK and ANTs apply: mm, LPS, on a grid of 2 mm."""
    import nibabel as nib

    in_ras = canonical(Volume(np.zeros(fixed.shape, np.uint8), fixed)).geometry
    grid = grid_with_spacing(in_ras, [max(GRID_MM, step) for step in in_ras.spacing_mm])
    vectors = alignment.displacement(grid) * np.array([-1, -1, 1], np.float32)
    image = nib.Nifti1Image(vectors[:, :, :, None, :], grid.affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with whole_file(path) as temporary:
        nib.save(image, temporary)
