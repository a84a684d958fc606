"""Reading the files of a case: the only place where a case's images and label maps are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case
from chiasm.errors import VolumeError
from chiasm.hounsfield import check_hu, with_offset
from chiasm.volumes import Reading, Volume, read_volume


def read_case_image(case: Case, modality: str, *, narrow: bool = False) -> Volume:
    """Read an image of a case; CT in Hounsfield units.

    Args:
        case: Has it; its `reading` says what is assumed of the file.
        modality: Which.
        narrow: As for `read_image`.

    Raises:
        VolumeError: If the file cannot be read, is no image as it should be, or CT is not in Hounsfield units.
    """
    return read_image(case.images[modality], modality, case.reading, made=modality in case.synthetic, narrow=narrow)


def read_image(path: Path, modality: str, reading: Reading, *, made: bool = False, narrow: bool = False) -> Volume:
    """Read an image of a modality; CT in Hounsfield units.

    Args:
        path: The file.
        modality: What it shows.
        reading: What is assumed of the file; its offset is added only where that makes Hounsfield units.
        made: Whether a model made it: then it has no offset.
        narrow: Whether it may stay as small integers where it is stored so; CT becomes float32 all the same.

    Raises:
        VolumeError: If the file cannot be read, is no image as it should be, or CT is not in Hounsfield units.
    """
    volume = read_volume(path, reading=reading, narrow=narrow and modality != "ct")
    if modality != "ct":
        return volume
    try:
        if reading.ct_offset and not made:
            return Volume(with_offset(volume.array, reading.ct_offset), volume.geometry)
        check_hu(volume.array)
    except VolumeError as error:
        error.path = path
        raise
    return volume


def stored(array: NDArray[Any], case: Case, modality: str) -> NDArray[Any]:
    """Return an image of a case in stored values, so that `read_case_image` reads the same image from the file."""
    offset = case.reading.ct_offset if modality == "ct" and modality not in case.synthetic else 0.0
    return array - np.float32(offset) if offset else array


def read_case_labels(case: Case, path: Path) -> Volume:
    """Read a label map or mask of a case.

    Args:
        case: Its `reading` says what is assumed of the file.
        path: Its mask, labels or known voxels, or a map that lies on the grid of its images.

    Raises:
        VolumeError: If the file cannot be read, or is no label map.
    """
    return read_volume(path, labels=True, reading=case.reading)
