"""DICOM segmentations as label maps: each segment is a label, numbered as in the file.

Where segments are given as probabilities or occupied shares, a voxel belongs to
the largest one that is at least a half.

A segmentation holds the slices that have something marked and leaves out the
others; its grid here reaches from the first to the last of them.
`geometry.laid_on` resamples it on the grid of the scan that it was drawn on.

Reference: DICOM PS3.3, A.51 and C.8.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_files import DicomFile, number, read_dataset, taming, text, visit
from chiasm.volumes.dicom_frames import PLACE_TAGS, Frame, frames_of
from chiasm.volumes.dicom_pixels import PIXEL_TAGS, decode, pixel_format
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.dicom_stacks import check_alike, image_axes
from chiasm.volumes.geometry import LPS_TO_RAS, TOLERANCE_VOXELS, Geometry, Volume
from chiasm.volumes.voxels import checked_size

if TYPE_CHECKING:
    from pydicom import Dataset

HALF = 0.5  # share of a voxel from which on it belongs to a segment
MOST_STORED = 255  # of a share, in 8 bits
OFF_LATTICE = 0.05  # of a step, by which slices may miss an even lattice
MOST_PARTS = 10  # of the least gap between slices that are tried as their step


def read_segmentation(series: Series, *, max_bytes: int = 2 * 2**30) -> Volume:
    """Read a segmentation of one file as a label map, uint16, 0 where nothing is marked.

    Args:
        series: A segmentation, from `find_series`.
        max_bytes: Most bytes of voxels.

    Raises:
        VolumeError: If it is damaged, or two segments mark one voxel.
    """
    part = only_part(series)
    tags = (*PLACE_TAGS, *PIXEL_TAGS, "SegmentationType", "MaximumFractionalValue")
    (dataset,) = visit([part], partial(read_dataset, tags=tags, pixels=True, max_bytes=max_bytes))
    kind = _kind(dataset, part)
    with taming(part):
        frames = frames_of(dataset, part)
    geometry, places = _lattice(frames, dataset, part)
    labels = _unmarked(geometry.shape, part, max_bytes)
    if kind == "LABELMAP":
        is_twice = _mark_labels(labels, places, _slices(dataset, part, len(frames)))
    else:
        segments = [_segment(dataset, at, part) for at in range(len(frames))]
        whole = _whole(dataset, part) if kind == "FRACTIONAL" else 1
        is_twice = _mark_segments(labels, places, segments, _slices(dataset, part, len(frames)), HALF * whole)
    if is_twice:
        raise VolumeError("marks a voxel twice", path=part.place, reason="labels", hint="Export segments apart.")
    return Volume(labels.transpose(2, 1, 0), geometry)


def only_part(series: Series) -> DicomFile:
    """Return the file of a segmentation or structure set.

    Raises:
        VolumeError: If there are several under one SeriesInstanceUID, of which none is meant more than the others.
    """
    if len(series.parts) > 1:
        raise VolumeError(
            "holds several structure sets" if series.is_structure_set else "holds several segmentations",
            path=series.parts[0].place.parent,
            reason="several-series",
            found=f"{len(series.parts)} files",
            hint="Name the file of one.",
        )
    return series.parts[0]


def _unmarked(shape: tuple[int, int, int], part: DicomFile, max_bytes: int) -> NDArray[np.uint16]:
    """Return a label map in which nothing is marked, shape (K, rows, columns); refuse one that is too large."""
    columns, rows, count = shape
    checked_size(shape, np.dtype(np.uint16), part.place, max_bytes)
    return np.zeros((count, rows, columns), np.uint16)


def _slices(dataset: Dataset, part: DicomFile, count: int) -> Iterator[NDArray[Any]]:
    """Yield the frames of a segmentation as they are stored."""
    return decode(dataset, part, pixel_format(dataset, part), range(count))


def _kind(dataset: Dataset, part: DicomFile) -> str:
    """Return how a segmentation marks voxels."""
    kind = text(dataset, "SegmentationType").upper()
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise VolumeError(
            "does not say how it marks",
            path=part.place,
            reason="labels",
            found=f"SegmentationType {kind or 'none'}",
            expected="BINARY, FRACTIONAL or LABELMAP",
        )
    return kind


def _mark_labels(labels: NDArray[np.uint16], places: Sequence[int], slices: Iterable[NDArray[Any]]) -> bool:
    """Add the labels of each frame to its slice; stop and say so where one marks what was marked before."""
    return any(_mark(labels[place], stored) for place, stored in zip(places, slices, strict=True))


def _mark_segments(
    labels: NDArray[np.uint16],
    places: Sequence[int],
    segments: Sequence[int],
    slices: Iterable[NDArray[Any]],
    half: float,
) -> bool:
    """Give each voxel to the segment that has most of it; stop and say so where two have as much."""
    shares: NDArray[np.uint16] = np.zeros(labels.shape, np.uint16)  # as stored, of the label
    return any(
        _mark_share(labels[place], shares[place], stored, segment, half)
        for place, segment, stored in zip(places, segments, slices, strict=True)
    )


def _mark(labels: NDArray[np.uint16], marked: NDArray[Any]) -> bool:
    """Add what a frame marks to a slice; say whether any of it was marked before."""
    is_twice = bool(((labels != 0) & (marked != 0)).any())
    labels += marked.astype(np.uint16)
    return is_twice


def _mark_share(
    labels: NDArray[np.uint16], shares: NDArray[np.uint16], share: NDArray[Any], segment: int, half: float
) -> bool:
    """Give a segment the voxels of which it has half and more than others; say whether another has as much."""
    is_twice = bool(((share > half) & (share == shares)).any())
    larger = (share >= half) & (share > shares)
    labels[larger], shares[larger] = segment, share[larger]
    return is_twice


def _whole(dataset: Dataset, part: DicomFile) -> float:
    """Return the stored value that stands for a share of 1."""
    with taming(part):
        whole = number(dataset, "MaximumFractionalValue", part)
    if whole is None or not 1 <= whole <= MOST_STORED:
        raise VolumeError("does not say which value is a whole", path=part.place, reason="labels", found=whole)
    return whole


def _lattice(frames: list[Frame], dataset: Dataset, part: DicomFile) -> tuple[Geometry, list[int]]:
    """Return the grid from the first slice to the last, and the place of each frame along K."""
    x, y, normal = image_axes(frames, part.place)
    check_alike(frames, part.place)
    positions = np.array([frame.position for frame in frames])
    heights = positions @ normal
    lowest = int(heights.argmin())
    heights = heights - heights[lowest]
    step = _stated_step(dataset, part) or _likely_step(heights, frames[0].thickness)
    places = np.rint(heights / step)
    lattice = positions[lowest] + places[:, None] * step * normal
    if np.abs(positions - lattice).max() > OFF_LATTICE * step:
        raise VolumeError(
            "has slices that lie on no even stack",
            path=part.place,
            reason="uneven",
            found=f"{np.abs(positions - lattice).max():.3g} mm off",
            expected=f"steps of {step:.4g} mm",
        )
    rows, columns = frames[0].size
    row_mm, column_mm = frames[0].spacing
    affine = np.eye(4)
    affine[:3] = np.stack([x * column_mm, y * row_mm, normal * step, positions[lowest]], axis=1)
    shape = (columns, rows, int(places.max()) + 1)
    return Geometry(shape, LPS_TO_RAS @ affine, container="dicom"), places.astype(int).tolist()


def _likely_step(heights: NDArray[np.float64], thickness: float | None) -> float:
    """Return the step on whose lattice slices lie: their thickness, or the least gap between them or a part of it."""
    gaps = np.diff(np.unique(heights.round(3)))
    likely = [thickness] if thickness else []
    likely += [float(gaps.min()) / parts for parts in range(1, MOST_PARTS + 1)] if gaps.size else [1.0]
    return next((step for step in likely if _apart(heights, step) < TOLERANCE_VOXELS), likely[0])


def _apart(heights: NDArray[np.float64], step: float) -> float:
    """Return by how much of a step slices miss its lattice; the most."""
    return float(np.abs(heights / step - np.rint(heights / step)).max())


def _stated_step(dataset: Dataset, part: DicomFile) -> float | None:
    with taming(part):
        shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
        measures: Any = shared[0].get("PixelMeasuresSequence") or [None]
        step = None if measures[0] is None else number(measures[0], "SpacingBetweenSlices", part)
    return step if step is not None and step > 0 else None


def _segment(dataset: Dataset, at: int, part: DicomFile) -> int:
    """Return the number of the segment that a frame marks."""
    with taming(part):
        group = dataset.PerFrameFunctionalGroupsSequence[at]
        if not group.get("SegmentIdentificationSequence"):
            group = dataset.SharedFunctionalGroupsSequence[0]
        found = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    if not 1 <= found < 2**16:
        raise VolumeError("has an impossible segment number", path=part.place, reason="labels", found=found)
    return found
