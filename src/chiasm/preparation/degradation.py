"""Turn fine volumes into thick slices, and interpolate them back: pairs for super-resolution.

    thick = D fine          D: for each thick slice, its profile over the fine ones
    shown = S thick         S: the cubic spline through the thick slices, at the fine ones

is the usual model of an acquisition with thick slices: Greenspan, Oz, Kiryati and
Peled, "MRI Inter-Slice Reconstruction Using Super-Resolution", Magnetic Resonance
Imaging 20(5), 437-446, 2002, doi:10.1016/S0730-725X(02)00511-8; Hefnawy, "An
efficient super-resolution approach for obtaining isotropic 3-D imaging using 2-D
multi-slice MRI", Egyptian Informatics Journal 14(2), 2013.  Only their abstracts
were at hand.  Our choices: slices lie next to each other, without gaps; the profile
is a Gaussian whose full width at half maximum is the slice's thickness, or a box;
the factor is a whole number, so that the faces of thick slices are faces of fine
ones and D and S need no third interpolation.

Networks are shown S thick, never the thick slices themselves: in training
(`simulated`) and for a scan with thick slices (`interpolated`) alike.  In plane
nothing is interpolated, so S is what others call bicubic interpolation.

A brain that was cut out is a case of its own: no scanner sees the zeros around it.
Profiles average what lies inside, a thick slice's voxel counts where half of its
profile does, and the spline goes through the nearest inside values beyond the rim.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes import Geometry, Volume, canonical
from chiasm.volumes.geometry import reordered, storage_axis
from chiasm.volumes.masks import constant_background, find_mask, suggest_rule

SliceProfile = Literal["gaussian", "box"]
Axis = Literal["I", "J", "K"]

MOST_THIN = 32  # thin slices in a thick one
FEWEST_SLICES = 3  # of a thick volume: `read_volume` takes no fewer
FWHM_PER_SIGMA = math.sqrt(8 * math.log(2))
REACH = 4  # sigmas of a Gaussian profile


@dataclass(frozen=True)
class Degradation:
    """The settings by which thick slices are made from fine ones.

    Attributes:
        factor: Fine slices in a thick one, 2 to 32.
        axis: Across the slices, of RAS order: "I" left to right (sagittal
            slices), "J" back to front (coronal), "K" feet to head (axial).
        profile: Of a slice: "gaussian", whose full width at half maximum is
            `factor` fine slices, or "box", as wide.
        noise: SD of white noise on the thick slices, as a share of their range (0.5 to 99.5 %).

    Raises:
        ValueError: If a value is none of those.
    """

    factor: int
    axis: Axis = "K"
    profile: SliceProfile = "gaussian"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.factor != int(self.factor) or not 2 <= self.factor <= MOST_THIN:
            raise ValueError(f"factor is a whole number from 2 to {MOST_THIN}, not {self.factor}")
        if self.axis not in get_args(Axis):
            raise ValueError(f"axis is I, J or K, not {self.axis!r}")
        if self.profile not in get_args(SliceProfile):
            raise ValueError(f"slice profile is one of {', '.join(get_args(SliceProfile))}, not {self.profile!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise is 0 or more, not {self.noise}")

    def __str__(self) -> str:
        noise = f", noise {self.noise:g}" if self.noise else ""
        return f"{self.factor} along {self.axis}, {self.profile}{noise}"


def degrade(volumes: Sequence[Volume], how: Degradation) -> list[Volume]:
    """Average slices by a profile: as many thick slices as cover the volume, the outermost perhaps only in part.

    ``13 slices, factor 4 -> 4 thick ones over slices -1 to 14``, of which -1
    is as slice 0, and 13 and 14 are as slice 12.

    Args:
        volumes: Fine, on one grid; the first shows what was cut out.
        how: The thick slices.

    Returns:
        Thick volumes, float32, and where they lie in the world.  The same
        volume gets the same noise.

    Raises:
        VolumeError: If fewer than three thick slices cover the volume, or it is empty.
    """
    fine = volumes[0].geometry
    axis, _ = storage_axis(fine, how.axis)
    weights, before = _onto_thick(fine, how)
    affine = fine.affine.copy()
    affine[:3, 3] += affine[:3, axis] * ((how.factor - 1) / 2 - before)
    affine[:3, axis] *= how.factor
    i, j, k = (len(weights) if other == axis else length for other, length in enumerate(fine.shape))
    grid = Geometry((i, j, k), affine)
    inside = cut_out(volumes[0])
    return [Volume(_thick(volume.array, weights, axis, inside, how.noise), grid) for volume in volumes]


def thin_grid(thick: Geometry, how: Degradation) -> Geometry:
    """Cut each slice of a grid into `factor` thin ones: the same box, its outer faces where they were."""
    axis, _ = storage_axis(thick, how.axis)
    affine = thick.affine.copy()
    affine[:3, 3] -= affine[:3, axis] * (how.factor - 1) / (2 * how.factor)
    affine[:3, axis] /= how.factor
    i, j, k = (length * how.factor if other == axis else length for other, length in enumerate(thick.shape))
    return Geometry((i, j, k), affine)


def interpolated(volumes: Sequence[Volume], how: Degradation, grid: Geometry | None = None) -> list[Volume]:
    """Resample thick slices to thin ones by a cubic spline across them: what networks see, and what they must beat.

    The spline goes through every sample and may overshoot beside an edge;
    nothing is clipped.  Beyond the outermost slices' centres their values go on.

    Args:
        volumes: Thick, on one grid; the first shows what was cut out.
        how: The thick slices.
        grid: Of thin slices; `thin_grid` by default.

    Returns:
        Volumes on `grid`, float32.

    Raises:
        VolumeError: If a volume is empty.
    """
    thick = volumes[0].geometry
    grid = thin_grid(thick, how) if grid is None else grid
    axis, _ = storage_axis(thick, how.axis)
    # thin voxel -> world -> thick voxel; in plane the two grids are the same
    thick_from_thin = np.linalg.inv(thick.affine) @ grid.affine
    places = thick_from_thin[axis, axis] * np.arange(grid.shape[axis]) + thick_from_thin[axis, 3]
    weights = spline_weights(places, thick.shape[axis])
    inside = cut_out(volumes[0])
    if inside is None:
        return [Volume(_along(weights, volume.array, axis), grid) for volume in volumes]
    from scipy.ndimage import distance_transform_edt

    nearest = tuple(distance_transform_edt(~inside, thick.spacing_mm, return_distances=False, return_indices=True))
    own_slice = np.clip(np.rint(places).astype(int), 0, thick.shape[axis] - 1)
    thin_inside = np.take(inside, own_slice, axis)
    return [
        Volume(np.where(thin_inside, _along(weights, volume.array[nearest], axis), _background(volume.array)), grid)
        for volume in volumes
    ]


def simulated(volumes: Sequence[Volume], how: Degradation) -> list[Volume]:
    """Show fine volumes as if they had been scanned with thick slices: degraded, and back on their own grid.

    Raises:
        VolumeError: As `degrade`.
    """
    return interpolated(degrade(volumes, how), how, volumes[0].geometry)


def thick_mask(mask: Volume, how: Degradation) -> Volume:
    """Give a mask on thin slices the steps that a mask on thick ones has: whole thick slices, where half is inside.

    Args:
        mask: Valid voxels (above 0).
        how: The thick slices.

    Returns:
        uint8, on the same grid.
    """
    grid = mask.geometry
    axis, _ = storage_axis(grid, how.axis)
    weights, before = _onto_thick(grid, how)
    within = _along(weights, mask.array > 0, axis) >= 0.5
    own_slice = (np.arange(grid.shape[axis]) + before) // how.factor
    return Volume(np.take(within, own_slice, axis).astype(np.uint8), grid)


def arranged(volume: Volume, how: Degradation | None) -> Volume:
    """Store a volume in RAS order; for super-resolution so that the first two axes show thick slices edge-on.

    Networks in 2D see the first two axes: where axial slices are thick, coronal ones.
    """
    in_ras = canonical(volume)
    if how is None or how.axis != "K":
        return in_ras
    return reordered(in_ras, (0, 2, 1), (False, False, False))


def cut_out(volume: Volume) -> NDArray[np.bool_] | None:
    """Return the voxels of a brain or body that was cut out on a constant background, or None for a whole scan.

    Raises:
        VolumeError: If nothing is left.
    """
    return find_mask(volume, "nonzero")[0] if suggest_rule(volume) == "nonzero" else None


def known(mask: NDArray[np.bool_], target: Volume, how: Degradation | None) -> NDArray[np.bool_]:
    """Return the voxels of a mask whose target is known: in synthesis all, else those inside a target that was cut out.

    Rims of thick slices reach a little beyond those of thin ones.
    """
    inside = None if how is None else cut_out(target)
    return mask if inside is None else mask & inside


def profile_weights(side: int, factor: int, before: int, profile: SliceProfile) -> NDArray[np.float64]:
    """Weigh fine slices for each thick one: ``D``, whose rows sum to 1.

    Args:
        side: Fine slices.
        factor: Of them in a thick one.
        before: Fine slices that the first thick one reaches beyond the volume, which are as its outermost.
        profile: "gaussian" or "box".

    Returns:
        Shape (thick slices, side).

    >>> profile_weights(4, 2, 0, "box").tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    sigma = factor / FWHM_PER_SIGMA
    reach = factor if profile == "box" else math.ceil(REACH * sigma + factor)
    weights = np.zeros((math.ceil((side + before) / factor), side))
    for row, centre in zip(weights, np.arange(len(weights)) * factor + (factor - 1) / 2 - before):
        places = np.arange(math.floor(centre) - reach, math.ceil(centre) + reach + 1)
        away = places - centre
        share = np.exp(-0.5 * (away / sigma) ** 2) * (np.abs(away) <= REACH * sigma)
        if profile == "box":
            share = (np.abs(away) < factor / 2).astype(np.float64)
        np.add.at(row, np.clip(places, 0, side - 1), share / share.sum())
    return weights


def spline_weights(places: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Weigh thick slices for each thin one: ``S``, a cubic spline as scipy has it.

    Args:
        places: Of the thin slices, in thick ones.
        count: Thick slices.

    Returns:
        Shape (thin slices, count).
    """
    from scipy.ndimage import map_coordinates

    units = (map_coordinates(unit, places[None], order=3, mode="nearest") for unit in np.eye(count))
    return np.stack(list(units), axis=1)


def check_slices(fine: Geometry, how: Degradation) -> int:
    """Return how many thick slices a grid gives.

    Raises:
        VolumeError: If they are too few.
    """
    side = fine.shape[storage_axis(fine, how.axis)[0]]
    count = math.ceil(side / how.factor)
    if count < FEWEST_SLICES:
        raise VolumeError(
            f"the volume has too few slices along {how.axis} for a factor of {how.factor}",
            reason="too-few-slices",
            found=side,
            expected=f"at least {(FEWEST_SLICES - 1) * how.factor + 1}",
        )
    return count


def _onto_thick(fine: Geometry, how: Degradation) -> tuple[NDArray[np.float64], int]:
    """Return ``D`` for a grid, and how many fine slices its first thick one reaches beyond it."""
    axis, backwards = storage_axis(fine, how.axis)
    side, factor = fine.shape[axis], how.factor
    count = check_slices(fine, how)
    more = count * factor - side
    before = more - more // 2 if backwards else more // 2  # the same in the world, whichever way slices are stored
    return profile_weights(side, factor, before, how.profile), before


def _thick(
    array: NDArray[Any], weights: NDArray[np.float64], axis: int, inside: NDArray[np.bool_] | None, noise: float
) -> NDArray[np.float32]:
    within: NDArray[np.bool_] | None = None
    thick = _along(weights, array if inside is None else np.where(inside, array, 0), axis)
    if inside is not None:
        share = _along(weights, inside, axis)
        within = share >= 0.5
        thick /= np.maximum(share, np.float32(0.5))
    if noise:
        seed = int.from_bytes(hashlib.sha256(thick.tobytes()).digest()[:8])
        low, high = np.percentile(thick if within is None else thick[within], (0.5, 99.5))
        thick += np.random.default_rng(seed).standard_normal(thick.shape, np.float32) * np.float32(noise * (high - low))
    if within is not None:
        thick[~within] = _background(array)
    return thick


def _background(array: NDArray[Any]) -> np.float32:
    return np.float32(constant_background(array) or 0.0)


def _along(weights: NDArray[np.float64], array: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """Multiply by a matrix along one axis."""
    product = np.tensordot(weights.astype(np.float32), array.astype(np.float32, copy=False), (1, axis))
    return np.ascontiguousarray(np.moveaxis(product, 0, axis))


def describe_degradation(degradation: Degradation, thin_mm: float, dims: int) -> str:
    """Say which thick slices become how thin, and how the network sees them.

    Args:
        degradation: How thick slices are made.
        thin_mm: Thickness of a thin slice.
        dims: 2 or 3.
    """
    names: Mapping[Axis, str] = {"I": "sagittal", "J": "coronal", "K": "axial"}
    thick = f"{names[degradation.axis]} slices of {degradation.factor * thin_mm:.3g} mm"
    thick = (
        f"super-resolution was asked for: {thick}, made of the cases' own and interpolated by a cubic spline, "
        f"become slices of {thin_mm:.3g} mm"
    )
    shown = "coronal" if degradation.axis == "K" else "axial"
    return f"{thick}; the network sees {shown} slices, which show them edge-on" if dims == 2 else thick
