"""The files of a case, read as its cohort says: the one place where a case's images and label maps are opened."""

from __future__ import annotations

from pathlib import Path

from chiasm.cohorts.cases import Case
from chiasm.volumes import Volume, read_volume


def read_case_image(case: Case, modality: str) -> Volume:
    """Read an image of a case.

    Args:
        case: Has it; its `reading` says what is assumed of the file.
        modality: Which.

    Raises:
        VolumeError: If the file cannot be read, or is no image as it should be.
    """
    return read_volume(case.images[modality], reading=case.reading)


def read_case_labels(case: Case, path: Path) -> Volume:
    """Read a label map or mask of a case.

    Args:
        case: Its `reading` says what is assumed of the file.
        path: Its mask, labels or known voxels, or a map that lies on the grid of its images.

    Raises:
        VolumeError: If the file cannot be read, or is no label map.
    """
    return read_volume(path, labels=True, reading=case.reading)
