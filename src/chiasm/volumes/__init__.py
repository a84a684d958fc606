"""What lies on disk."""

from chiasm.volumes.geometry import Geometry, Volume
from chiasm.volumes.thin import *
from chiasm.volumes.thin import (
    canonical,
    check_pair,
    crop,
    grid_with_spacing,
    read_volume,
    resample,
    same_grid,
    write_volume,
)
