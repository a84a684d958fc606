"""Parametric maps of DICOM whose pixels are float32, such as the expected error that chiasm writes.

They are read to be shown; nothing takes them for a scan.

Reference: DICOM PS3.3, A.75 (Parametric Map IOD) and C.7.6.24 (Floating Point Image Pixel).
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_files import DicomFile, read_dataset, taming, truncated, visit
from chiasm.volumes.geometry import Volume
from chiasm.volumes.voxels import checked_size


def read_map(path: Path, *, max_bytes: int = 2 * 2**30) -> Volume:
    """Read a parametric map that is one file.

    Args:
        path: The file.
        max_bytes: Most bytes of voxels.

    Returns:
        Its stored values, float32, shape (I, J, K), on its grid.

    Raises:
        VolumeError: If it has no float32 pixels, its frames make no volume, pixels are missing or not finite, or
            there are too many.
    """
    series = pick_series(path)
    if series.fault is not None:
        raise series.fault
    stack = series.stack
    parts = [] if stack is None else list(dict.fromkeys(frame.part for frame in stack.frames))
    if stack is None or len(parts) != 1:
        raise VolumeError("holds no parametric map of one file", path=path, reason="datatype")
    rows, columns = stack.frames[0].size
    count = len(stack.frames)
    checked_size((columns, rows, count), np.dtype(np.float32), path, max_bytes)

    def read(part: DicomFile, file: BinaryIO) -> NDArray[np.float32]:
        dataset = read_dataset(part, file, tags=("FloatPixelData",), pixels=True, max_bytes=max_bytes)
        with taming(part):
            content = dataset.get("FloatPixelData")
        if content is None:
            raise VolumeError("holds no pixels of float32", path=path, reason="datatype")
        expected = 4 * rows * columns * count
        if len(content) != expected:
            raise truncated(part, f"{len(content)} bytes of pixels", f"{expected} bytes")
        return np.frombuffer(content, "<f4").reshape(count, rows, columns)

    (stored,) = visit(parts, read)
    if not np.isfinite(stored).all():
        raise VolumeError("holds values that are not finite", path=path, reason="not-finite")
    array = stored[[frame.place for frame in stack.frames]].astype(np.float32)
    return Volume(array.transpose(2, 1, 0), stack.geometry)  # (K, J, I) -> (I, J, K)
