"""Volumes on disk, which are read correctly or refused."""

from chiasm.volumes.geometry import (
    Geometry,
    Volume,
    canonical,
    crop,
    grid_with_spacing,
    resample,
    same_grid,
)
from chiasm.volumes.pairs import check_pair, refuse_twice
from chiasm.volumes.screening import Reading, read_volume, write_volume

__all__ = [
    "Geometry",
    "Reading",
    "Volume",
    "canonical",
    "check_pair",
    "crop",
    "grid_with_spacing",
    "read_volume",
    "refuse_twice",
    "resample",
    "same_grid",
    "write_volume",
]
