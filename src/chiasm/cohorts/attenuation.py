"""From CT to what PET needs: linear attenuation coefficients at 511 keV, at PET's resolution and spacing.

    mu = 9.6e-5 (HU + 1000)          1/cm, air and soft tissue: a mixture of air and water
    mu = a (HU + 1000) + b           above a break point: a mixture of water and bone
    mu >= 0

X-rays of a CT are absorbed by bone more strongly than 511 keV photons are, in
relation to water; so the second line is flatter, and it depends on the tube's
voltage.  The idea of two lines is Kinahan, Townsend, Beyer and Sashin,
"Attenuation correction for a combined 3D PET/CT scanner", Medical Physics
25(10), 2046-2053, 1998, doi:10.1118/1.598392; slopes and intercepts are those of
Carney, Townsend, Rappoport and Bendriem, "Method for transforming CT images for
attenuation correction in PET/CT imaging", Medical Physics 33(4), 976-983, 2006,
doi:10.1118/1.2174132.

The paper was not at hand.  The numbers are from memory and were held against
two public programs (one has all six voltages, and 6.261 for 6.26 at 80 kVp, which
we take for a slip; the other has 80, 120 and 140 kVp).  They also agree with
themselves: at each voltage the two lines cross, after rounding, at the break
point that the paper's table gives (HU + 1000 = 1050, 1052, 1043, 1047, 1037 and
1030).

Departure: we bend where the two lines cross, not at the rounded break point.
There the published curve steps by up to 2.2e-5 1/cm, downwards at some voltages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import unknown
from chiasm.volumes import Volume, grid_with_spacing, resample

FWHM_PER_SIGMA = math.sqrt(8 * math.log(2))

#: Rise of the line from air to water, 1/cm for each unit of HU: water is 0.096 1/cm.
WATER = 9.6e-5


class BoneLine(NamedTuple):
    """What a coefficient is above the break point: ``slope * (HU + 1000) + intercept``, in 1/cm."""

    slope: float
    intercept: float


#: By the voltage of the CT's tube, kVp.
BONE: Mapping[int, BoneLine] = {
    80: BoneLine(3.64e-5, 6.26e-2),
    100: BoneLine(4.43e-5, 5.44e-2),
    110: BoneLine(4.92e-5, 4.88e-2),
    120: BoneLine(5.10e-5, 4.71e-2),
    130: BoneLine(5.51e-5, 4.24e-2),
    140: BoneLine(5.64e-5, 4.08e-2),
}


def attenuation(hu: ArrayLike, kvp: int = 120) -> NDArray[np.float32]:
    """Turn Hounsfield units into linear attenuation coefficients at 511 keV.

    The curve never falls and has no step.  It was fitted to tissue: metal and
    contrast agent get coefficients that are too high.

    Args:
        hu: Hounsfield units, any shape; below -1000 (air, padding) counts as -1000.
        kvp: Voltage of the CT's tube: a key of `BONE`.

    Returns:
        Coefficients in 1/cm, 0 or more, the same shape.

    Raises:
        RecipeError: If there are no numbers for this voltage.

    Reference:
        Carney et al. 2006, table of the bilinear transform; see above.

    >>> attenuation([-1000, 0, 1000]).round(4).tolist() == np.float32([0, 0.096, 0.1491]).tolist()
    True
    """
    if kvp not in BONE:
        raise unknown("tube voltage", kvp, BONE)
    above_air = np.maximum(np.asarray(hu, np.float64) + 1000, 0)
    # the second line is flatter and starts higher: the lower of the two is the one that holds
    lower = np.minimum(WATER * above_air, BONE[kvp].slope * above_air + BONE[kvp].intercept)
    return lower.astype(np.float32)


def to_pet_grid(volume: Volume, spacing_mm: float = 4.0, fwhm_mm: float = 5.0) -> Volume:
    """Blur a map of attenuation to PET's resolution and sample it on a PET grid over the same box.

    Blur coefficients, not Hounsfield units: PET averages the former, and the
    two differ where bone meets soft tissue.  Defaults are our choice, of the
    size that clinical scanners have.

    Args:
        volume: Coefficients; what lies beyond its faces is taken as what is at them.
        spacing_mm: Of the new grid, the same along each axis.
        fwhm_mm: Full width at half maximum of the Gaussian, 0 for none.  Well
            below `spacing_mm`, fine detail turns into false structure.

    Returns:
        The blurred map, float32, on a grid whose faces coincide with the
        volume's within half a new voxel.

    Raises:
        ValueError: If the spacing is not positive, or the width negative.
    """
    from scipy.ndimage import gaussian_filter

    if not fwhm_mm >= 0:
        raise ValueError(f"the resolution is a width in mm, 0 or more, not {fwhm_mm}")
    grid = grid_with_spacing(volume.geometry, (spacing_mm,) * 3)
    sigma_voxels = [fwhm_mm / FWHM_PER_SIGMA / step for step in volume.geometry.spacing_mm]
    blurred = gaussian_filter(volume.array.astype(np.float32, copy=False), sigma_voxels, mode="nearest")
    return resample(Volume(blurred, volume.geometry), grid, order=1)
