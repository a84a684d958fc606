"""From CT to what PET needs: linear attenuation coefficients at 511 keV, at PET's resolution and spacing.

    mu = 9.6e-5 (HU + 1000)          1/cm, air and soft tissue: a mixture of air and water
    mu = a (HU + 1000) + b           above a break point: a mixture of water and bone
    mu >= 0

In relation to water, bone absorbs the X-rays of a CT more strongly than photons of 511 keV.  So the second line is
flatter, and it depends on the tube's voltage.  The idea of two lines is Kinahan, Townsend, Beyer and Sashin,
"Attenuation correction for a combined 3D PET/CT scanner", Medical Physics 25(10), 2046-2053, 1998,
doi:10.1118/1.598392; slopes and intercepts are those of Carney, Townsend, Rappoport and Bendriem, "Method for
transforming CT images for attenuation correction in PET/CT imaging", Medical Physics 33(4), 976-983, 2006,
doi:10.1118/1.2174132.

The paper was not at hand.  The numbers were held against three public programs
that quote it: one has all eighteen as they stand here, one differs in 6.261 for
6.26 at 80 kVp alone, which we take for a slip, one has three voltages.  They also agree with
themselves: at each voltage the two lines cross, after rounding, at the break
point that the paper's table gives (HU + 1000 = 1050, 1052, 1043, 1047, 1037 and
1030).

Departure: we bend where the two lines cross, not at the rounded break point.
There the published curve steps by up to 2.2e-5 1/cm, downwards at some voltages.

A CT that is not in Hounsfield units gives a map that is wrong and looks right:
`check_hu` refuses it, and `check_air` one without air around the body.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.errors import RecipeError, VolumeError, unknown
from chiasm.hounsfield import FEWEST, check_hu
from chiasm.locks import prepare_file
from chiasm.outputs import refuse_inputs
from chiasm.volumes import Geometry, Reading, Volume, grid_with_spacing, read_volume, resample, write_volume
from chiasm.volumes.screening import STRICT, files_at

FWHM_PER_SIGMA = math.sqrt(8 * math.log(2))

#: Rise of the line from air to water, 1/cm for each unit of HU: water is 0.096 1/cm.
WATER = 9.6e-5

USUAL_KVP = 120
FWHM_MM = 5.0  # of whole-body PET scanners in clinical use: our choice, `--fwhm` says otherwise
MOST_AIR_HU = -200.0  # air, and what noise and partial volume make of it
CT_HU = (-1024.0, 3071.0)  # what 12 bits hold: below lies padding, above metal


class BoneLine(NamedTuple):
    """The coefficient above the break point: ``slope * (HU + 1000) + intercept``, in 1/cm."""

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


@dataclass(frozen=True, eq=False)
class MuMap:
    """A map of linear attenuation coefficients, with warnings about the CT.

    Attributes:
        volume: 1/cm at 511 keV, float32.
        kvp: Voltage that was assumed.
        fwhm_mm: Of the Gaussian that it was smoothed with.
        below: Voxels of the CT below -1024 HU, which count as air.
        above: Voxels above 3071 HU, whose coefficients are too high.
        beyond: Share of the grid's voxels that the CT does not reach, which are 0.
        warnings: One sentence for each that is not 0, and for a grid too coarse for the smoothing.
    """

    volume: Volume
    kvp: int
    fwhm_mm: float
    below: int
    above: int
    beyond: float
    warnings: tuple[str, ...] = ()


def _check_grid(like: Path | str | None, spacing_mm: float | None, fwhm_mm: float) -> None:
    """Refuse two grids, and sizes that no grid has.

    Raises:
        RecipeError: If both grids are given, or a size in mm is impossible.
    """
    if like is not None and spacing_mm is not None:
        raise RecipeError(
            "both a PET volume and a spacing are given for one grid", reason="grid", hint="Leave one out."
        )
    if not (0 <= fwhm_mm < math.inf and (spacing_mm is None or 0 < spacing_mm < math.inf)):
        found = f"spacing {spacing_mm} mm, resolution {fwhm_mm} mm"
        raise RecipeError("a size in mm is impossible", reason="size", found=found)


def _read_ct(ct: Path | str, reading: Reading, series: str | int | None) -> Volume:
    """Read a CT in Hounsfield units.

    Raises:
        VolumeError: If it cannot be read, or is not in Hounsfield units; names the file.
    """
    scan = read_volume(ct, reading=reading, series=series)
    try:
        check_hu(scan.array)
        check_air(scan.array)
    except VolumeError as error:
        raise VolumeError(
            error.what, path=ct, reason=error.reason, found=error.found, expected=error.expected, hint=error.hint
        ) from None
    return scan


def mumap(
    ct: Path | str,
    out: Path | str | None = None,
    *,
    kvp: int = USUAL_KVP,
    like: Path | str | None = None,
    spacing_mm: float | None = None,
    fwhm_mm: float = FWHM_MM,
    reading: Reading = STRICT,
    series: str | int | None = None,
) -> MuMap:
    """Make a map of attenuation at 511 keV of a CT file, real or synthetic.

    Args:
        ct: NIfTI, MetaImage or DICOM in Hounsfield units.
        out: File to write, 1/cm; nothing is written where None.
        kvp: Voltage of the CT's tube; of a synthetic CT, that of its training scans.
        like: A PET volume whose grid the map takes.
        spacing_mm: Of a grid over the CT's box instead; without both, the map has the CT's own grid.
        fwhm_mm: PET's resolution, 0 for no smoothing.
        reading: What to assume of files whose headers leave a question open.
        series: Which DICOM series the CT is, where `ct` holds several: as for `read_volume`.

    Raises:
        RecipeError: If there are no numbers for this voltage, both grids are
            given, or a size in mm is impossible.
        ChiasmError: If `out` cannot be written, or is a file that is read.
        VolumeError: If a file cannot be read, the CT is not in
            Hounsfield units, or does not overlap the PET volume.
    """
    _check_grid(like, spacing_mm, fwhm_mm)
    if out is not None:
        inputs = [file for path in (ct, like) if path is not None for file in files_at(Path(path))]
        refuse_inputs([Path(out)], inputs, what="the map")
        prepare_file(Path(out))
    scan = _read_ct(ct, reading, series)
    grid = _grid_of(scan.geometry, like, spacing_mm, reading)
    mu = to_pet_grid(Volume(attenuation(scan.array, kvp), scan.geometry), grid, fwhm_mm)
    reached = resample(Volume(np.ones(scan.array.shape, np.uint8), scan.geometry), grid, order=0).array
    beyond = 1 - np.count_nonzero(reached) / reached.size
    if beyond == 1:
        raise VolumeError("does not overlap the PET volume in space", path=ct, reason="no-overlap", found=like)
    below, above = (int(np.count_nonzero(odd)) for odd in (scan.array < CT_HU[0], scan.array > CT_HU[1]))
    aliased = fwhm_mm < max(grid.spacing_mm) and max(grid.spacing_mm) > 1.01 * max(scan.geometry.spacing_mm)
    made = MuMap(mu, kvp, fwhm_mm, below, above, beyond)
    made = replace(made, warnings=_warnings(made, scan.array.size, aliased=aliased))
    if out is not None:
        write_volume(out, mu.array, mu.geometry)
    return made


def _grid_of(own: Geometry, like: Path | str | None, spacing_mm: float | None, reading: Reading) -> Geometry:
    """Return the grid of the PET volume, one of another spacing over the CT's box, or the CT's own."""
    if like is not None:
        return read_volume(like, allow_constant=True, reading=reading).geometry
    return own if spacing_mm is None else grid_with_spacing(own, (spacing_mm,) * 3)


def _warnings(made: MuMap, total: int, *, aliased: bool) -> tuple[str, ...]:
    """Warn of values that no tissue has, of a grid beyond the CT, and of lost detail."""
    coarsest, fwhm = max(made.volume.geometry.spacing_mm), made.fwhm_mm
    odd = {
        f"{made.below} of {total} voxels lie below {CT_HU[0]:g} HU and count as air": made.below > 0,
        f"{made.above} of {total} voxels lie above {CT_HU[1]:g} HU (metal?) and get coefficients that are too high": (
            made.above > 0
        ),
        f"{100 * made.beyond:.3g} % of the grid lies beyond the CT and counts as air": made.beyond > 0,
        f"a resolution of {fwhm:g} mm is finer than the grid of {coarsest:.3g} mm: detail between is lost": aliased,
    }
    return tuple(sentence for sentence, holds in odd.items() if holds)


def check_air(array: NDArray[np.floating]) -> None:
    """Refuse a CT whose surroundings would not count as air: cut out on zeros, which are water.

    Args:
        array: Hounsfield units of a body, any shape.

    Raises:
        VolumeError: If less than one voxel in a thousand is air, or padding below it.
    """
    if np.count_nonzero(array <= MOST_AIR_HU) < FEWEST * array.size:
        raise VolumeError(
            "is not in Hounsfield units of a body in air: it holds no air",
            reason="not-hu",
            found=f"intensities from {float(array.min()):.4g} to {float(array.max()):.4g}",
            expected=f"at least {100 * FEWEST:g} % of the voxels at {MOST_AIR_HU:g} HU or below",
            hint="Give the CT as it was reconstructed, with its air around the body.",
        )


def attenuation(hu: ArrayLike, kvp: int = USUAL_KVP) -> NDArray[np.float32]:
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


def to_pet_grid(volume: Volume, grid: Geometry, fwhm_mm: float = FWHM_MM) -> Volume:
    """Smooth a map of attenuation to PET's resolution and sample it on PET's grid.

    Smooth coefficients, not Hounsfield units: PET averages the former, and the
    two differ where bone meets soft tissue.

    Args:
        volume: Coefficients; while it is smoothed, what lies beyond its faces is taken as what is at them.
        grid: Where to sample it, linearly; what the volume does not reach is 0, air.
        fwhm_mm: Full width at half maximum of the Gaussian, 0 for none.

    Returns:
        The smoothed map on `grid`, float32.

    Raises:
        ValueError: If the width is negative.
    """
    from scipy.ndimage import gaussian_filter

    if not 0 <= fwhm_mm < math.inf:
        raise ValueError(f"the resolution is a width in mm, 0 or more, not {fwhm_mm}")
    sigma_voxels = [fwhm_mm / FWHM_PER_SIGMA / step for step in volume.geometry.spacing_mm]
    smoothed = gaussian_filter(volume.array.astype(np.float32, copy=False), sigma_voxels, mode="nearest")
    return resample(Volume(smoothed, volume.geometry), grid, order=1)
