"""Rows about files: NIfTI beside nibabel, DICOM beside SimpleITK and pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair
from chiasm.bench.subjects import draw_pictures


def _apart(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a.astype(np.float64) - b).max()) if a.shape == b.shape else np.inf


def read_nifti(setting: BenchSetting) -> TimedPair:
    """Read a packed NIfTI, checked, beside nibabel, which checks less."""
    import nibabel

    from chiasm.volumes import read_volume

    pictures = draw_pictures(setting.shape)
    path = setting.folder / "read.nii.gz"
    nibabel.save(nibabel.Nifti1Image(pictures.source, pictures.geometry.affine), path)

    def peer() -> NDArray[Any]:
        image: Any = nibabel.load(path)
        return np.asarray(image.get_fdata(dtype=np.float32))

    return TimedPair(lambda: read_volume(path).array, peer, _apart, 0.0)


def write_nifti(setting: BenchSetting) -> TimedPair:
    """Write a prediction as a packed NIfTI beside nibabel at its own settings."""
    import nibabel

    from chiasm.volumes import Volume, write_volume

    pictures = draw_pictures(setting.shape)
    volume = Volume(pictures.source.astype(np.float32) / 7, pictures.geometry)
    ours, theirs = setting.folder / "ours.nii.gz", setting.folder / "theirs.nii.gz"

    def own() -> Path:
        write_volume(ours, volume.array, volume.geometry)
        return ours

    def peer() -> Path:
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.geometry.affine), theirs)
        return theirs

    def difference(a: Path, b: Path) -> float:
        one, other = (np.asarray(nibabel.load(path).dataobj) for path in (a, b))
        return _apart(one, other)

    return TimedPair(own, peer, difference, 0.0)


ROWS = (
    BenchRow(
        "read-nifti",
        "read a .nii.gz of int16, with its checks",
        "nibabel get_fdata",
        1.5,
        1.2,
        read_nifti,
        equal="stored values",
    ),
    BenchRow(
        "write-nifti",
        "write a .nii.gz of float32",
        "nibabel save",
        3.0,
        3.0,
        write_nifti,
        equal="stored values",
    ),
)
