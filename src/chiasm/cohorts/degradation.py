"""What thick slices make of a fine volume, and the plain way back: pairs for super-resolution.

    thick = take every r-th of (slice profile * fine)

is the usual model of an acquisition with thick slices, here along one axis and
without noise: Greenspan, Oz, Kiryati and Peled, "MRI Inter-Slice Reconstruction
Using Super-Resolution", Magnetic Resonance Imaging 20(5), 437-446, 2002,
doi:10.1016/S0730-725X(02)00511-8; Hefnawy, "An efficient super-resolution approach
for obtaining isotropic 3-D imaging using 2-D multi-slice MRI", Egyptian Informatics
Journal, 2013.  Only their abstracts were at hand.  Our choices: slices lie next to
each other, without gaps and without overlap of their nominal widths; the profile is
a Gaussian whose full width at half maximum is the slice's thickness, or a box.

Slices are centred on voxels of the fine grid where the factor is whole, so no
second interpolation blurs them; the affine says where each lies.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.volumes import Geometry, Volume

SliceProfile = Literal["gaussian", "box"]

FEWEST_SLICES = 2  # of a thick volume: with one there is nothing to interpolate between
FWHM_PER_SIGMA = math.sqrt(8 * math.log(2))


def degrade(volume: Volume, axis: int, factor: float, *, slice_profile: SliceProfile = "gaussian") -> Volume:
    """Blur along one axis by a slice's profile and take one sample for each slice.

    As many slices as fit whole are taken, centred in the volume as nearly as
    voxels allow.  ``12 slices, factor 3 -> voxels 1, 4, 7, 10``.

    Args:
        volume: Fine; beyond its faces it goes on as what is at them.
        axis: 0, 1 or 2, of storage.
        factor: Slice thickness and distance in voxels, above 1; where it is not
            whole, samples between voxels are taken by cubic splines.
        slice_profile: "gaussian", whose full width at half maximum is `factor`
            voxels, or "box", as wide.

    Returns:
        Fewer, thicker slices, float32, and where they lie in the world.

    Raises:
        ValueError: If axis, factor or profile are none of those.
        VolumeError: If fewer than two slices fit.
    """
    if axis not in (0, 1, 2):
        raise ValueError(f"axis is 0, 1 or 2, not {axis}")
    if not 1 < factor < math.inf:
        raise ValueError(f"factor is a finite number above 1, not {factor}")
    if slice_profile not in get_args(SliceProfile):
        raise ValueError(f"slice profile is one of {', '.join(get_args(SliceProfile))}, not {slice_profile!r}")
    side = volume.array.shape[axis]
    count = int(side / factor + 1e-9)
    if count < FEWEST_SLICES:
        raise VolumeError(
            f"the volume has too few slices along axis {'IJK'[axis]} for a factor of {factor:g}",
            reason="too-few-slices",
            found=side,
            expected=f"at least {math.ceil(FEWEST_SLICES * factor)}",
        )
    first = int((side - 1 - (count - 1) * factor) / 2)
    blurred = _blurred(volume.array.astype(np.float32, copy=False), axis, factor, slice_profile)
    affine = volume.geometry.affine.copy()
    affine[:3, 3] += first * affine[:3, axis]
    affine[:3, axis] *= factor
    thick = _every(blurred, axis, first, factor, count)
    i, j, k = thick.shape
    return Volume(thick, Geometry((i, j, k), affine))


def bicubic(volume: Volume, grid: Geometry) -> Volume:
    """Bring a volume to a finer grid by cubic splines: what super-resolution must beat.

    The spline goes through every sample and may overshoot beside an edge;
    nothing is clipped.  Beyond the outermost samples their values go on.

    Args:
        volume: For instance what `degrade` returns.
        grid: To fill, for instance that of the volume before it was degraded.

    Returns:
        A volume on `grid`, float32.
    """
    from scipy.ndimage import affine_transform

    # target voxel -> world -> source voxel, in one matrix
    source_from_target = np.linalg.inv(volume.geometry.affine) @ grid.affine
    array: NDArray[Any] = affine_transform(
        volume.array.astype(np.float32, copy=False),
        source_from_target[:3, :3],
        source_from_target[:3, 3],
        output_shape=grid.shape,
        order=3,
        mode="nearest",
    )
    return Volume(array, grid)


def _blurred(array: NDArray[np.float32], axis: int, factor: float, profile: SliceProfile) -> NDArray[np.float32]:
    from scipy.ndimage import correlate1d, gaussian_filter1d

    blurred: NDArray[np.float32]
    if profile == "gaussian":
        blurred = gaussian_filter1d(array, factor / FWHM_PER_SIGMA, axis, mode="nearest")
    else:
        blurred = correlate1d(array, _box(factor), axis, mode="nearest")
    return blurred


def _box(width: float) -> NDArray[np.float64]:
    """Share of each voxel in a box `width` voxels wide around the middle one.

    >>> _box(2.0).tolist()
    [0.25, 0.5, 0.25]
    """
    reach = math.ceil((width - 1) / 2)
    distance = np.abs(np.arange(-reach, reach + 1))
    weights: NDArray[np.float64] = np.clip(width / 2 + 0.5 - distance, 0, 1) / width
    return weights


def _every(array: NDArray[np.float32], axis: int, first: int, step: float, count: int) -> NDArray[np.float32]:
    """Take `count` samples along an axis, `step` voxels apart, from voxel `first`."""
    from scipy.ndimage import affine_transform

    if step == int(step):
        last = first + (count - 1) * int(step)
        part = (slice(None),) * axis + (slice(first, last + 1, int(step)),)
        return np.ascontiguousarray(array[part])
    scale, offset, shape = np.ones(3), np.zeros(3), list(array.shape)
    scale[axis], offset[axis], shape[axis] = step, first, count
    sampled: NDArray[np.float32] = affine_transform(array, scale, offset, tuple(shape), order=3, mode="nearest")
    return sampled
