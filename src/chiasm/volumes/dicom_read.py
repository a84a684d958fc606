"""A DICOM series as one volume: chosen, its grid checked, its values read and rescaled.

Reference: DICOM PS3.3, C.7.6.3 (pixels) and C.11.1 (modality LUT).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_files import DicomFile, read_dataset, visit
from chiasm.volumes.dicom_frames import Frame
from chiasm.volumes.dicom_labels import read_segmentation
from chiasm.volumes.dicom_pixels import PIXEL_TAGS, Format, decode, decode_native, pixel_format
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.dicom_silence import silenced
from chiasm.volumes.dicom_stacks import Stack, image_axes
from chiasm.volumes.dicom_structures import read_structure_set
from chiasm.volumes.geometry import LPS_TO_RAS, Geometry, Volume, resample
from chiasm.volumes.voxels import checked_size

MOST_UNEVEN = 8  # times as many slices as there were, when uneven ones are resampled


def read_dicom(
    path: Path | str,
    *,
    series: str | int | None = None,
    resample_tilt: bool = False,
    max_bytes: int = 2 * 2**30,
) -> Volume:
    """Read one series of a folder, a zip archive or around a file.

    Args:
        path: A folder and what is below it, an archive, or a file, which stands
            for its whole series in its folder and, if it is multi-frame, for itself.
        series: Which one, where there are several: number in the listing of
            `find_series`, SeriesInstanceUID, modality, or words of its folder or description.
        resample_tilt: Whether to resample slices of a tilted gantry, or of uneven
            distances, to a straight and even grid; they are refused otherwise.
        max_bytes: Most bytes of voxels.

    Returns:
        A volume of shape (I, J, K): rescaled values, integers if slope and intercept are whole numbers; or the
        labels of a segmentation or structure set.

    Raises:
        VolumeError: If the series breaks a rule; `reason` says which.
    """
    return read_series(pick_series(path, series), Path(path), resample_tilt=resample_tilt, max_bytes=max_bytes)


def read_series(series: Series, path: Path, *, resample_tilt: bool = False, max_bytes: int = 2 * 2**30) -> Volume:
    """Read the values of a series that was found; as `read_dicom`, whose errors name `path`.

    Raises:
        VolumeError: If the series breaks a rule; `reason` says which.
    """
    if series.is_label_map:
        if series.fault is not None:
            raise series.fault
        return read_segmentation(series, max_bytes=max_bytes)
    if series.is_structure_set:
        return read_structure_set(series, max_bytes=max_bytes)
    stack = _usable_stack(series, path, resample_tilt)
    array = _values(stack, series, path, max_bytes)
    return Volume(array, stack.geometry) if stack.tilted is None else _straightened(array, stack, path)


def _usable_stack(series: Series, path: Path, resample_tilt: bool) -> Stack:
    """Return the stack of a series, or refuse the series."""
    stack = series.stack
    if series.fault is not None and not (resample_tilt and stack is not None):
        raise series.fault
    if stack is None:
        raise VolumeError("holds no images that make a volume", path=path, reason="no-pixels", found=series.modality)
    return stack


def _values(stack: Stack, series: Series, path: Path, max_bytes: int) -> NDArray[Any]:
    """Read, rescale and stack the images, shape (I, J, K)."""
    rows, columns = stack.frames[0].size
    count = len(stack.frames)
    dtype = np.dtype(np.int32 if all(map(_keeps_whole_numbers, stack.frames)) else np.float32)
    checked_size((columns, rows, count), dtype, path, max_bytes)
    array: NDArray[Any] = np.empty((count, rows, columns), dtype)  # no page of it yet
    slices: dict[DicomFile, list[tuple[NDArray[Any], Frame]]] = defaultdict(list)
    for empty, frame in zip(array, stack.frames, strict=True):
        slices[frame.part].append((empty, frame))

    def fill(part: DicomFile, file: BinaryIO) -> None:
        form, frames = _frames_in(part, file, [frame for _, frame in slices[part]], max_bytes)
        # in CT the values are Hounsfield units, which the way of showing them does not change
        inverted = form.darkest_last and series.modality not in ("CT", "PT")
        for (empty, frame), stored in zip(slices[part], frames, strict=True):
            values = _rescaled(sum(form.limits) - stored if inverted else stored, frame)
            _check_range(values, dtype, part)
            empty[...] = values

    with silenced():
        for _ in visit(slices, fill):
            pass
    # (K, J, I) -> (I, J, K)
    return array.transpose(2, 1, 0)


def _frames_in(
    part: DicomFile, file: BinaryIO, frames: Sequence[Frame], max_bytes: int
) -> tuple[Format, Iterator[NDArray[Any]]]:
    """Return how a file stores its pixels, and its frames; it is parsed where its header did not show where."""
    indices, known = [frame.place for frame in frames], frames[0].pixels
    content = None if known is None else known.read(file)
    if known is not None and content is not None:
        return known.form, decode_native(content, part, known.form, indices)
    file.seek(0)
    dataset = read_dataset(part, file, tags=PIXEL_TAGS, pixels=True, max_bytes=max_bytes)
    form = pixel_format(dataset, part)
    return form, decode(dataset, part, form, indices)


def _keeps_whole_numbers(frame: Frame) -> bool:
    """Return whether pixels, slope and intercept make whole numbers."""
    return not frame.floating and frame.slope == int(frame.slope) and frame.intercept == int(frame.intercept)


def _rescaled(stored: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """Return the real values of an image."""
    if frame.slope == 1 and frame.intercept == 0:
        return stored
    return stored * frame.slope + frame.intercept


def _check_range(values: NDArray[Any], dtype: np.dtype[Any], part: DicomFile) -> None:
    """Refuse whole numbers that their type cannot hold."""
    if dtype.kind == "i" and np.abs(values).max() >= 2**31:
        raise VolumeError("holds values beyond 31 bits", path=part.place, reason="datatype")


def _straightened(array: NDArray[Any], stack: Stack, path: Path) -> Volume:
    """Resample slices that are tilted or uneven: evenly along their slant first, then to axes square to one another."""
    positions = np.array([frame.position for frame in stack.frames])
    x, y, normal = image_axes(stack.frames, path)
    heights = (positions - positions[0]) @ normal
    usual = float(np.median(np.diff(heights)))
    count = round(heights[-1] / usual) + 1
    if 4 * array[..., 0].size * count > MOST_UNEVEN * array.nbytes:
        raise VolumeError(
            "has slices at distances that are too uneven to be resampled",
            path=path,
            reason="uneven",
            found=f"{usual:.3g} mm and more",
        )
    places = np.interp(np.linspace(0, heights[-1], count), heights, np.arange(len(heights)))
    below = np.minimum(places.astype(int), len(heights) - 2)
    share = (places - below).astype(np.float32)
    even = array[..., below] * (1 - share) + array[..., below + 1] * share
    rows, spacing = stack.frames[0].size, stack.frames[0].spacing
    sheared = np.eye(4)
    sheared[:3, :2] = np.stack([x * spacing[1], y * spacing[0]], axis=1)
    sheared[:3, 2], sheared[:3, 3] = (positions[-1] - positions[0]) / (count - 1), positions[0]
    straight = sheared.copy()
    straight[:3, 2] = normal * heights[-1] / (count - 1)
    shape = [rows[1], rows[0], count]
    for axis, direction in ((0, x), (1, y)):
        # the box that holds the first slice and the last
        shift = float((positions[-1] - positions[0]) @ direction) / spacing[1 - axis]
        shape[axis] += int(np.ceil(abs(shift) - 1e-6))
        straight[:3, 3] += min(0.0, shift) * straight[:3, axis]
    i, j, k = shape
    source = Volume(even, Geometry((rows[1], rows[0], count), LPS_TO_RAS @ sheared))
    grid = Geometry((i, j, k), LPS_TO_RAS @ straight, container="dicom")
    return resample(source, grid, order=1, fill=float(array.min()))
