"""The places of voxels: grids, affines, and moving an array from one grid to another.

Words used everywhere: an array's axes are (I, J, K) in storage order; its
*affine* maps voxel indices to world millimetres, RAS+ (x to the right, y to
the front, z up); two grids are *the same* when shape and affine agree at the
eight corners within a hundredth of a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError

TOLERANCE_VOXELS = 0.01
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # and back
AXIS_NAMES = ("left-right", "front-back", "head-feet")  # of RAS order
SNAPPED_VOXELS = 1e-4  # headers keep places as float32, so voxels that lie so near to others are the same
MOST_VOXELS = 2**31  # 8 GiB in float32


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume, and the header it came with.

    Attributes:
        shape: Voxels along the three storage axes (I, J, K).
        affine: Voxel index to world mm, RAS+, shape (4, 4), float64.
        header: The raw header as it was read, so that a file written on this
            grid carries the source's geometry bit for bit; None when made here.
        container: The format of `header`.

    Raises:
        TypeError: If the shape is no tuple, or the affine no array.
        ValueError: If the shape has not three sides, or the affine not four rows and columns.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    header: bytes | None = field(default=None, repr=False)
    container: Literal["nifti", "metaimage", "mgh", "dicom"] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no grid of three axes."""
        if not isinstance(self.shape, tuple) or not isinstance(self.affine, np.ndarray):
            found = f"{type(self.shape).__name__} and {type(self.affine).__name__}"
            raise TypeError(f"a grid is a tuple of three sides and an affine as an array of numpy, not {found}")
        if len(self.shape) != 3 or np.shape(self.affine) != (4, 4):
            raise ValueError(
                f"a grid has three sides and an affine of 4 x 4, not {self.shape} and {np.shape(self.affine)}"
            )
        object.__setattr__(self, "affine", np.asarray(self.affine, np.float64))  # np.diag([1, 1, 2, 1]) has integers

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along I, J and K, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def header_as(self, container: str) -> bytes | None:
        """Return the raw header if it is of a format, else None."""
        return self.header if self.container == container else None

    @property
    def corners(self) -> NDArray[np.float64]:
        """World positions of the centres of the eight corner voxels, shape (8, 3), mm."""
        ends = np.array(list(product(*((0, side - 1) for side in self.shape))), np.float64)
        positions: NDArray[np.float64] = ends @ self.affine[:3, :3].T + self.affine[:3, 3]
        return positions


@dataclass(frozen=True, eq=False)
class Volume:
    """An array and the grid on which it lies.

    Attributes:
        array: Voxel values after any slope and intercept, shape (I, J, K);
            float32 for images, an integer type for labels.
        geometry: The grid.

    Raises:
        TypeError: If it is no array of numpy on a `Geometry`, or a masked one.
        ValueError: If the array has another shape than the grid.
    """

    array: NDArray[Any]
    geometry: Geometry

    def __post_init__(self) -> None:
        """Refuse an array that does not lie on the grid, such as one whose axes are in another order."""
        check_kinds(self.array, self.geometry)
        if self.array.shape != self.geometry.shape:
            raise ValueError(
                f"an array of {self.array.shape} does not lie on a grid of {self.geometry.shape}: both are (I, J, K), "
                "and SimpleITK's arrays are (K, J, I)"
            )


def check_kinds(array: object, geometry: object) -> None:
    """Refuse what is no array of numpy with a value for each voxel, or no grid, such as a whole volume.

    Raises:
        TypeError: If one is.
    """
    if not isinstance(array, np.ndarray) or not isinstance(geometry, Geometry):
        found = f"{type(array).__name__} and {type(geometry).__name__}"
        raise TypeError(
            f"voxels are an array of numpy and its Geometry, such as Geometry(array.shape, affine), not {found}; "
            "a Volume has them as .array and .geometry"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array has voxels without a value; array.filled(0) gives them one")


def voxels_apart(a: Geometry, b: Geometry) -> float:
    """Return how far the corners of two grids of one shape lie apart, in voxels of `a`; the largest."""
    to_voxel = np.linalg.inv(a.affine[:3, :3])
    return float(np.abs((b.corners - a.corners) @ to_voxel.T).max())


def same_grid(a: Geometry, b: Geometry, tolerance_voxels: float = TOLERANCE_VOXELS) -> bool:
    """Return whether two grids have one shape and their corners lie together, in voxels of `a`."""
    return a.shape == b.shape and voxels_apart(a, b) <= tolerance_voxels


def reordered(volume: Volume, axes: Sequence[int], flips: Sequence[bool]) -> Volume:
    """Store a volume in another axis order; its voxels stay where they are in the world.

    Args:
        volume: Any.
        axes: Which of its axes becomes I, J and K.
        flips: Which of the new axes then run the other way.
    """
    array = volume.array.transpose(axes)
    affine = volume.geometry.affine.copy()
    affine[:, :3] = affine[:, list(axes)]
    for axis, flip in enumerate(flips):
        if flip:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    i, j, k = array.shape
    return Volume(array, Geometry((i, j, k), affine))


def canonical(volume: Volume) -> Volume:
    """Store a volume so that its axes run most nearly to the right, the front and up; nothing is interpolated."""
    axes, flips = _nearest_axes(volume.geometry.affine[:3, :3])
    if axes == (0, 1, 2) and not any(flips):
        return volume
    return reordered(volume, axes, flips)


def storage_axis(geometry: Geometry, name: Literal["I", "J", "K"]) -> tuple[int, bool]:
    """Return the storage axis that runs along axis I (right), J (front) or K (up) of RAS order, and its direction."""
    axes, backwards = _nearest_axes(geometry.affine[:3, :3])
    place = "IJK".index(name)
    return axes[place], backwards[place]


def axis_names(geometry: Geometry) -> tuple[str, str, str]:
    """Name the body axis nearest to each storage axis, in either direction.

    >>> axis_names(Geometry((2, 2, 2), np.diag([1.0, 1, -1, 1])))
    ('left-right', 'front-back', 'head-feet')
    """
    columns, _ = _nearest_axes(geometry.affine[:3, :3])
    first, second, third = (AXIS_NAMES[columns.index(axis)] for axis in range(3))
    return first, second, third


def _nearest_axes(matrix: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Say which column of `matrix` runs most nearly along each row's axis, and whether backwards."""
    cosines = matrix / np.linalg.norm(matrix, axis=0)
    columns = [-1, -1, -1]
    for place in np.argsort(-np.abs(cosines), axis=None, kind="stable"):  # the clearest first
        row, column = divmod(int(place), 3)
        if columns[row] < 0 and column not in columns:
            columns[row] = column
    backwards = [bool(cosines[row, columns[row]] < 0) for row in range(3)]
    return (columns[0], columns[1], columns[2]), (backwards[0], backwards[1], backwards[2])


def reordered_like(volume: Volume, grid: Geometry) -> Volume:
    """Store a volume in the axis order of `grid` if both differ by quarter turns; otherwise return it unchanged."""
    turn = np.linalg.inv(grid.affine[:3, :3]) @ volume.geometry.affine[:3, :3]
    axes, flips = _nearest_axes(turn)
    if axes == (0, 1, 2) and not any(flips):
        return volume
    fitting = reordered(volume, axes, flips)
    return fitting if same_grid(grid, fitting.geometry) else volume


class Overlap(NamedTuple):
    """Voxels of one grid that coincide with voxels of another.

    Attributes:
        axes: Which axis of the first grid runs along each axis of the second.
        source: The voxels in an array of the first grid, once its axes are transposed; -1 steps where an axis runs
            the other way.
        target: The same voxels in an array of the second grid.
    """

    axes: tuple[int, int, int]
    source: tuple[slice, slice, slice]
    target: tuple[slice, slice, slice]

    def paste(self, array: NDArray[Any], onto: NDArray[Any]) -> None:
        """Copy the voxels of an array of the first grid into one of the second, in place."""
        onto[self.target] = array.transpose(self.axes)[self.source]

    def scatter(self, values: NDArray[Any], mask: NDArray[np.bool_], onto: NDArray[Any]) -> None:
        """Write the values of a mask's voxels into an array of the second grid, in place, and touch no other voxel.

        Args:
            values: In the order of slices along K: of `np.moveaxis(array, -1, 0)[np.moveaxis(mask, -1, 0)]`.
            mask: On the first grid, shape (I, J, K).
            onto: Of the second grid.
        """
        there = onto[self.target].transpose(np.argsort(self.axes))
        i, j, k = (self.source[self.axes.index(axis)] for axis in range(3))
        ends = np.cumsum(np.count_nonzero(mask, axis=(0, 1)))
        plane = np.zeros(mask.shape[:2], values.dtype)
        for place, index in enumerate(range(mask.shape[2])[k]):
            inside = mask[..., index]
            plane[inside] = values[ends[index] - np.count_nonzero(inside) : ends[index]]
            there[..., place][inside[i, j]] = plane[i, j][inside[i, j]]


def find_overlap(a: Geometry, b: Geometry, tolerance_voxels: float = SNAPPED_VOXELS) -> Overlap | None:
    """Find the voxels of grid `a` that coincide with voxels of grid `b`; None if both lattices do not coincide.

    Voxels coincide where one grid is the other with its axes in another order, reversed, and shifted by whole
    voxels: a crop, a padded or a transposed volume.  The grids need not share a voxel.

    Args:
        a: A grid.
        b: Another.
        tolerance_voxels: How far a corner of `a` may lie from the voxel of `b` that it is taken for.
    """
    to_b = np.linalg.inv(b.affine) @ a.affine
    turn, shift = np.rint(to_b[:3, :3]), np.rint(to_b[:3, 3])
    if (np.abs(turn).sum(0) != 1).any() or (np.abs(turn).sum(1) != 1).any():
        return None
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = turn, shift
    if voxels_apart(Geometry(a.shape, b.affine @ exact), a) > tolerance_voxels:
        return None
    i, j, k = (int(axis) for axis in np.abs(turn).argmax(1))
    axes = (i, j, k)
    parts = [
        _shared_part(a.shape[axis], b.shape[row], int(shift[row]), backwards=bool(turn[row, axis] < 0))
        for row, axis in enumerate(axes)
    ]
    source, target = zip(*parts, strict=True)
    return Overlap(axes, source, target)


def _shared_part(length: int, other: int, shift: int, *, backwards: bool) -> tuple[slice, slice]:
    """Return which voxels of an axis lie on another axis, and where there; voxel n lies at shift + n, or shift - n."""
    start = shift - length + 1 if backwards else shift
    low = min(max(start, 0), other)
    high = max(low, min(start + length, other))
    if not backwards:
        return slice(low - start, high - start), slice(low, high)
    first, stop = shift - low, shift - high  # of the voxels, in falling order
    return slice(first, stop if stop >= 0 else None, -1) if high > low else slice(0, 0), slice(low, high)


def laid_on(volume: Volume, grid: Geometry) -> Volume | None:
    """Copy a volume's voxels into `grid` where the voxels of both coincide, 0 elsewhere; None where they do not.

    For label maps that were stored without their empty slices; the axes may be
    in another order, and nothing is interpolated.
    """
    overlap = find_overlap(volume.geometry, grid, TOLERANCE_VOXELS)
    if overlap is None:
        return None
    placed = np.zeros_like(volume.array.transpose(overlap.axes), shape=grid.shape)
    overlap.paste(volume.array, placed)
    return Volume(placed, grid) if np.count_nonzero(placed) == np.count_nonzero(volume.array) else None


def crop(volume: Volume, box: Sequence[slice]) -> Volume:
    """Cut a box out of a volume; steps are 1, and its voxels stay where they are in the world."""
    array = volume.array[tuple(box)]
    starts = [part.indices(side)[0] for part, side in zip(box, volume.array.shape, strict=True)]
    affine = volume.geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ starts
    i, j, k = array.shape
    return Volume(array, Geometry((i, j, k), affine))


def grid_with_spacing(geometry: Geometry, spacing_mm: Sequence[float]) -> Geometry:
    """Return a grid of another spacing over the same box: its outer faces coincide, within half a voxel.

    >>> grid_with_spacing(Geometry((10, 10, 4), np.eye(4)), (2.0, 2.0, 1.0)).shape
    (5, 5, 4)

    Raises:
        ValueError: If a spacing is not positive.
    """
    if min(spacing_mm) <= 0:
        raise ValueError(f"spacing must be positive, not {tuple(spacing_mm)}")
    factor = np.array(spacing_mm) / geometry.spacing_mm
    i, j, k = (max(1, round(side / by)) for side, by in zip(geometry.shape, factor.tolist()))
    affine = geometry.affine.copy()
    affine[:3, :3] *= factor
    middle = (np.array(geometry.shape) - 1) / 2  # the centre of the box stays
    affine[:3, 3] += geometry.affine[:3, :3] @ middle - affine[:3, :3] @ ((np.array((i, j, k)) - 1) / 2)
    return Geometry((i, j, k), affine)


def straight_grid(geometry: Geometry) -> Geometry:
    """Return the grid with square axes nearest to a skewed one, of its spacing, over all of its voxels.

    The nearest rotation is the orthogonal factor of the polar decomposition of
    the axes' directions.
    """
    left, _, right = np.linalg.svd(geometry.affine[:3, :3] / geometry.spacing_mm)
    matrix = left @ right * geometry.spacing_mm
    places = geometry.corners @ np.linalg.inv(matrix).T  # in voxels of the new grid, but for its origin
    low, high = places.min(0), places.max(0)
    i, j, k = (int(side) for side in np.ceil(high - low - TOLERANCE_VOXELS) + 1)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = matrix @ ((low + high) / 2 - (np.array((i, j, k)) - 1) / 2)  # one centre
    return Geometry((i, j, k), affine)


def straightened(volume: Volume, labels: bool = False) -> Volume:
    """Resample a volume with skewed axes on the straight grid nearest to it; beyond its voxels lies its least value.

    Args:
        volume: Any.
        labels: Whether to take the nearest voxel in place of interpolating.
    """
    fill = 0.0 if labels else float(volume.array.min())
    return resample(volume, straight_grid(volume.geometry), order=0 if labels else 1, fill=fill)


def resample(volume: Volume, geometry: Geometry, order: Literal[0, 1] = 1, fill: float = 0.0) -> Volume:
    """Resample a volume on another grid; voxels are copied where both grids coincide (`find_overlap`).

    Within half a voxel beyond its outermost centres the volume is taken as
    constant; farther out lies `fill`.

    Args:
        volume: Any dtype for order 0; numbers for order 1.
        geometry: The grid to fill.
        order: 0 takes the nearest voxel (labels, masks), 1 interpolates linearly.
        fill: Value outside the volume.

    Returns:
        A volume on `geometry`; the dtype is kept by order 0 and float32 with order 1.

    Raises:
        ValueError: If `order` is neither.
        VolumeError: If the grid has more voxels than fit in memory.
    """
    if order not in (0, 1):
        raise ValueError(f"order is 0 or 1, not {order}")
    _check_voxels(geometry)
    if same_grid(geometry, volume.geometry, 1e-6):
        return Volume(volume.array, geometry)
    array = volume.array if order == 0 else volume.array.astype(np.float32, copy=False)
    overlap = find_overlap(volume.geometry, geometry)
    if overlap is not None:
        pasted = np.full_like(array.transpose(overlap.axes), fill, shape=geometry.shape)  # laid out as the source
        overlap.paste(array, pasted)
        return Volume(pasted, geometry)
    from scipy.ndimage import affine_transform

    # target voxel -> world -> source voxel, in one matrix
    source_from_target = np.linalg.inv(volume.geometry.affine) @ geometry.affine
    matrix, offset = source_from_target[:3, :3], source_from_target[:3, 3]
    moved: NDArray[Any] = affine_transform(
        array, matrix, offset, output_shape=geometry.shape, order=order, mode="nearest", prefilter=False
    )
    moved[~_inside(matrix, offset, geometry.shape, volume.array.shape)] = fill
    return Volume(moved, geometry)


def _check_voxels(geometry: Geometry) -> None:
    """Refuse a grid with more voxels than fit in memory."""
    voxels = math.prod(geometry.shape)
    if voxels > MOST_VOXELS:
        raise VolumeError(
            "would be resampled to a grid that is too fine",
            reason="too-large",
            found=f"{voxels:.2g} voxels of {' x '.join(f'{step:.3g}' for step in geometry.spacing_mm)} mm",
            expected=f"at most {MOST_VOXELS:.2g} voxels",
        )


def _inside(
    matrix: NDArray[np.float64], offset: NDArray[np.float64], shape: Sequence[int], source: Sequence[int]
) -> NDArray[np.bool_]:
    """Return which target voxels lie within half a voxel of the source's grid."""
    inside = np.ones(tuple(shape), bool)
    steps = np.ogrid[tuple(slice(0, side) for side in shape)]
    for axis, side in enumerate(source):
        place = sum(matrix[axis, other] * steps[other] for other in range(3)) + offset[axis]
        inside &= (place >= -0.5 - 1e-6) & (place <= side - 0.5 + 1e-6)
    return inside
