"""DICOM structure sets (RTSTRUCT) as label maps, drawn on the scan whose slices the contours follow.

A voxel belongs to a structure if its centre lies inside a contour or on one.
Readers that fill polygons with their rims and combine nested ones by exclusive
or take the rim of a hole away from the ring around it; here a hole is what
lies strictly inside.

Reference: DICOM PS3.3, A.19.3, C.8.8.5 (structures) and C.8.8.6 (contours).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile, read_dataset, taming, text, visit
from chiasm.volumes.dicom_labels import only_part
from chiasm.volumes.dicom_scan import scan_folder_alone, scan_series
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry, Volume
from chiasm.volumes.voxels import checked_size

if TYPE_CHECKING:
    from pydicom import Dataset

EXCLUSIVE = "CLOSEDPLANAR_XOR"
AREAS = ("CLOSED_PLANAR", EXCLUSIVE, "INTERPOLATED_PLANAR")
TUMOUR = "GTV*"  # gross tumour volume, as AAPM TG-263 names it
SAME_PLACE = 1e-3  # of a voxel: a point so near to another lies on it
OFF_SLICE = 0.1  # of a slice, by which a contour may miss it
MOST_POINTS = 3_000_000
TAGS = ("StructureSetROISequence", "ROIContourSequence", "ReferencedFrameOfReferenceSequence")

Slice = NDArray[np.bool_]
Points = NDArray[np.float64]


class Structure(NamedTuple):
    """One structure of a set.

    Attributes:
        name: What it is called.
        contours: Closed polygons, each (N, 3), LPS and mm.
        is_exclusive: Whether what two of them share is outside.
    """

    name: str
    contours: tuple[Points, ...]
    is_exclusive: bool


def read_structure_set(series: Series, *, max_bytes: int = 2 * 2**30) -> Volume:
    """Draw the structures of a set as a label map on the scan that it refers to, uint8.

    The scan is looked for in the folder or archive of the set, and in the folder above.

    Args:
        series: A structure set, from `find_series`; `apart` names structures as `labels_in` takes them.
        max_bytes: Most bytes of the map.

    Returns:
        Label 1 for the first group of structures and so on, 0 elsewhere; where groups overlap, the first counts.

    Raises:
        VolumeError: If it is damaged or several, lacks a structure or its scan, or draws where the scan has no slice.
    """
    part = only_part(series)
    (dataset,) = visit([part], partial(read_dataset, tags=TAGS, max_bytes=max_bytes))
    with taming(part):
        structures = list(_structures(dataset, part))
        scans = set(_scans_referred_to(dataset))
    grid = _grid_of(scans, part)
    checked_size(grid.shape, np.dtype(np.uint8), part.place, max_bytes)
    labels = np.zeros(grid.shape, np.uint8)
    groups = labels_in(series.apart, [one.name for one in structures], part)
    for label in range(len(groups), 0, -1):
        for structure in structures:
            if structure.name in groups[label - 1]:
                _draw(structure, grid, labels, label, part)
    return Volume(labels, grid)


def labels_in(words: str, names: Sequence[str], part: DicomFile) -> list[list[str]]:
    """Say which structures make each label.

    Args:
        words: Names with `*` and `?`, upper or lower case, with commas between the structures of one label and "|"
            between labels, such as ``GTV*|Parotid_L,Parotid_R``; "" for tumours (`TUMOUR`), or for the only structure.
        names: Of the structures that there are.
        part: What the set is called.

    Raises:
        VolumeError: If no structure of any label is there, or it is not clear which is meant.
    """
    asked = words or TUMOUR
    groups = [_called(names, group.split(",")) for group in asked.split("|")]
    if any(groups):
        return groups
    if not words and len(names) == 1:
        return [list(names)]
    raise VolumeError(
        f"has no structure {asked}",
        path=part.place,
        reason="no-structure",
        found=f"{len(names)} structures of other names",
        hint='chiasm inspect lists them; say in cohort.json which are meant: {"structures": {"lesion": ["GTV*"]}}.',
    )


def has_usual_labels(names: Sequence[str]) -> bool:
    """Say whether a set has a tumour or only one structure, so that its labels need not be named."""
    return len(names) == 1 or any(_is_called(name, [TUMOUR]) for name in names)


def _called(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that fit a pattern."""
    return [name for name in names if _is_called(name, patterns)]


def _is_called(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.casefold(), pattern.strip().casefold()) for pattern in patterns)


def _structures(dataset: Dataset, part: DicomFile) -> Iterator[Structure]:
    """Read the structures that have areas."""
    names = _names_by_number(dataset)
    points = 0
    for drawn in dataset.get("ROIContourSequence") or ():
        contours = _contours(drawn, part)
        points += sum(map(len, contours))
        if points > MOST_POINTS:
            raise VolumeError("has too many points", path=part.place, reason="too-large", expected=f"{MOST_POINTS}")
        if contours:
            name = names.get(str(drawn.get("ReferencedROINumber")), "")
            yield Structure(name, tuple(contours), any(map(_is_exclusive, drawn.ContourSequence)))


def _names_by_number(dataset: Dataset) -> dict[str, str]:
    """Return what structures are called, by their numbers."""
    return {str(one.get("ROINumber")): text(one, "ROIName") for one in dataset.get("StructureSetROISequence") or ()}


def _contours(drawn: Dataset, part: DicomFile) -> list[Points]:
    """Read the closed polygons of a structure."""
    return [_points(one, part) for one in drawn.get("ContourSequence") or () if _is_area(one)]


def _is_area(contour: Dataset) -> bool:
    return text(contour, "ContourGeometricType").upper() in AREAS


def _is_exclusive(contour: Dataset) -> bool:
    return text(contour, "ContourGeometricType").upper() == EXCLUSIVE


def _points(contour: Dataset, part: DicomFile) -> Points:
    """Read the corners of a polygon, (N, 3)."""
    raw = contour.get_item("ContourData")
    value: Any = () if raw is None else raw.value
    words = value.split(b"\\") if isinstance(value, bytes) else value  # as it stands in the file: far faster
    numbers = np.array(list(words), float)
    if numbers.size < 3 or numbers.size % 3 or not np.isfinite(numbers).all():
        raise VolumeError(
            "has a contour without points in space", path=part.place, reason="header", found=f"{numbers.size} numbers"
        )
    return numbers.reshape(-1, 3)


def _scans_referred_to(dataset: Dataset) -> Iterator[str]:
    """List the SeriesInstanceUIDs on whose slices structures are drawn."""
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                yield text(series, "SeriesInstanceUID")


def _grid_of(scans: set[str], part: DicomFile) -> Geometry:
    """Find the scan that a set refers to, near it."""
    for found in _series_near(part):
        fitting = [one for one in found if one.uid in scans and one.is_scan]
        if fitting:
            return _only_grid(fitting, part)
    raise VolumeError(
        "is drawn on a scan that is not there",
        path=part.place,
        reason="no-series",
        hint="Put the scan that it was drawn on into the same folder, or into one beside that.",
    )


def _only_grid(scan: Sequence[Series], part: DicomFile) -> Geometry:
    """Return the grid of a scan, whose images must be of one kind and make a stack."""
    first = scan[0]
    if len(scan) == 1 and first.stack is not None and first.fault is None:
        return first.stack.geometry
    raise first.fault or VolumeError(
        "is drawn on a scan that holds several kinds of image", path=part.place, reason="several-series"
    )


def _series_near(part: DicomFile) -> Iterator[tuple[Series, ...]]:
    """Find the series beside a file, then below its folder or in its archive, then below the folder above."""
    if part.member is not None:
        yield scan_series(part.path).series
        return
    yield scan_folder_alone(part.path.parent).series
    for folder in part.path.parents[:2]:
        yield scan_series(folder).series


def _draw(structure: Structure, grid: Geometry, labels: NDArray[np.uint8], label: int, part: DicomFile) -> None:
    """Give the voxels of a structure a label."""
    to_voxels = np.linalg.inv(LPS_TO_RAS @ grid.affine)  # from LPS, as LPS_TO_RAS is its own inverse
    polygons: dict[int, list[Points]] = defaultdict(list)
    for contour in structure.contours:
        corners = contour @ to_voxels[:3, :3].T + to_voxels[:3, 3]
        polygons[_slice_of(corners, grid.shape[2], part)].append(corners[:, :2])
    for k, corners_of_one in polygons.items():
        marked = fill_polygons(corners_of_one, grid.shape[:2], is_exclusive=structure.is_exclusive)
        labels[:, :, k][marked] = label


def _slice_of(corners: Points, slices: int, part: DicomFile) -> int:
    """Return the slice on which a contour lies."""
    heights = corners[:, 2]
    k = round(float(heights.mean()))
    if np.abs(heights - k).max() > OFF_SLICE or not 0 <= k < slices:
        raise VolumeError(
            "draws where its scan has no slice",
            path=part.place,
            reason="off-slice",
            found=f"a contour at {heights.min():.3g} to {heights.max():.3g} of slices 0 to {slices - 1}",
        )
    return k


def fill_polygons(polygons: Sequence[Points], shape: tuple[int, int], *, is_exclusive: bool = False) -> Slice:
    """Mark the voxels of a slice inside polygons or on them.

    One that lies inside what the larger ones mark is a hole; others are added.

    Args:
        polygons: Corners (N, 2) along I and J, in voxels; whole numbers are centres.
        shape: Of the slice.
        is_exclusive: Whether what a polygon shares with larger ones is a hole even where it only overlaps them.

    >>> square = np.array([[1.0, 1], [4, 1], [4, 4], [1, 4]])
    >>> fill_polygons([square, square * 0.5 + 1.0], (6, 6)).sum().item()
    15
    """
    marked, before = np.zeros(shape, bool), np.zeros(shape, bool)
    for polygon in sorted(polygons, key=_area, reverse=True):
        inside, rim = _fill(polygon, shape)
        if is_exclusive:
            marked = (marked & (~inside | rim)) | (inside & ~marked)
        elif marked[inside].all() and not np.array_equal(inside, before):  # and not the same one again
            marked &= ~inside | rim
        else:
            marked |= inside
        before = inside
    return marked


def _area(polygon: Points) -> float:
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _fill(polygon: Points, shape: tuple[int, int]) -> tuple[Slice, Slice]:
    """Mark the voxels inside a polygon or on it, and those on it."""
    inside, rim = np.zeros(shape, bool), np.zeros(shape, bool)
    nearest = np.rint(polygon)
    polygon = np.where(np.abs(polygon - nearest) < SAME_PLACE, nearest, polygon)
    first, last = np.clip([polygon[:, 1].min(), polygon[:, 1].max()], 0, shape[1] - 1).astype(int)
    for j in range(first, last + 1):
        _fill_row(polygon, j, inside[:, j], rim[:, j])
    return inside | rim, rim


def _fill_row(polygon: Points, j: int, inside: Slice, rim: Slice) -> None:
    """Mark the voxels of a row between the edges that cross it, and those on an edge or a corner."""
    start, stop = polygon, np.roll(polygon, -1, axis=0)
    crosses = (start[:, 1] <= j) != (stop[:, 1] <= j)
    a, b = start[crosses], stop[crosses]
    places = np.sort(a[:, 0] + (j - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0]))
    for low, high in zip(places[::2], places[1::2], strict=True):
        _mark_between(inside, low, high)
    corners = start[start[:, 1] == j, 0]
    for place in (*places, *corners):
        _mark_between(rim, place, place)
    along = (start[:, 1] == j) & (stop[:, 1] == j)
    for ends in zip(start[along, 0], stop[along, 0], strict=True):
        _mark_between(rim, min(ends), max(ends))


def _mark_between(row: Slice, low: float, high: float) -> None:
    """Mark the voxels of a row whose centres lie from one place to another; none where no centre does."""
    first, last = math.ceil(low - SAME_PLACE), math.floor(high + SAME_PLACE)
    row[max(first, 0) : max(last + 1, 0)] = True
