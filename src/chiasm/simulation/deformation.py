"""Smooth deformations of a head: diffeomorphic, of a stated size, with the displacement of every voxel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]


CONTROL_MM = 4.0  # velocity fields live on a grid of this spacing
SQUARINGS = 6
LEAST_JACOBIAN = 0.2
PART = 32768  # points that are interpolated at once, so that the gathered corners stay in cache


def smooth_noise(
    rng: np.random.Generator, shape: Sequence[int], sigma: float, box: Sequence[slice] | None = None
) -> Array:
    """Draw a Gaussian random field: mean 0, standard deviation 1 in every voxel, correlated over `sigma`.

    White noise on a coarse lattice is spread by Gaussians along each axis;
    since every row of weights has unit norm, the variance is exactly 1
    everywhere, at the border too.

    Args:
        rng: Where the noise comes from.
        shape: Voxels along each axis.
        sigma: Width of the Gaussians, in voxels, above 0.
        box: The part of the field that is returned; all of it by default.
    """
    weights = [_spread(length, sigma) for length in shape]
    field = rng.standard_normal([rows.shape[1] for rows in weights], dtype=np.float32)
    for rows, kept in zip(weights, box or (slice(None),) * len(weights), strict=True):
        field = np.tensordot(field, rows[kept], axes=(0, 1))  # spreads the first axis and moves it to the end
    return np.ascontiguousarray(field)


@lru_cache(maxsize=32)
def _spread(length: int, sigma: float) -> Array:
    """Return the weight of each node of a lattice in each voxel of an axis, shape (length, nodes); not to change."""
    step = max(1.0, sigma)
    nodes = np.arange(-2 * sigma, length + 2 * sigma + step, step)
    rows = np.exp(-0.5 * ((np.arange(length)[:, None] - nodes) / sigma) ** 2)
    weights: Array = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return weights


def pull(stack: Array, points: Array) -> Array:
    """Interpolate linearly in a stack of channels; the border is repeated outside.

    Args:
        stack: Shape (I, J, K, C).
        points: Voxel coordinates, shape (N, 3).

    Returns:
        Values, shape (N, C), float32.  Fractions that sum to one still do.
    """
    size, channels = np.array(stack.shape[:3]), stack.shape[3]
    flat = stack.reshape(-1, channels)
    values = np.empty((len(points), channels), dtype=np.float32)
    strides = np.array((stack.shape[1] * stack.shape[2], stack.shape[2], 1))
    steps = strides * (size > 1)  # to the next corner along each axis
    neighbours = np.empty((min(len(points), PART), channels), dtype=np.float32)
    for start in range(0, len(points), PART):
        part = np.clip(points[start : start + PART], 0, (size - 1).astype(np.float32))
        corner = np.minimum(part.astype(np.int64), np.maximum(size - 2, 0))
        share = part - corner.astype(np.float32)
        first, total, there = corner @ strides, values[start : start + PART], neighbours[: len(part)]
        total[:] = 0
        for bits in np.ndindex(2, 2, 2):
            i, j, k = (share[:, axis] if bit else 1 - share[:, axis] for axis, bit in enumerate(bits))
            np.take(flat, first + steps @ bits, axis=0, out=there, mode="clip")  # "clip": without a copy
            there *= (i * j * k)[:, None]
            total += there
    return values


def grid_points(shape: Sequence[int]) -> Array:
    """List the voxel coordinates of a grid in C order, shape (N, 3)."""
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"), axis=-1).reshape(
        -1, 3
    )


class Deformation(NamedTuple):
    """The origin of each point: an affine after a diffeomorphism.

    Attributes:
        matrix: Of the affine, in voxels, shape (3, 3), about `centre`.
        shift: Of the affine, in voxels, shape (3,).
        centre: Fixed point of the matrix, in voxels, shape (3,).
        displacement: Of the diffeomorphism, in voxels, on a coarse grid (i, j, k, 3).
        stride: Voxels between the coarse grid's points.
    """

    matrix: NDArray[np.float64]
    shift: NDArray[np.float64]
    centre: NDArray[np.float64]
    displacement: Array
    stride: float

    def __call__(self, points: Array) -> Array:
        """Map points (N, 3) of the subject to their origins, in voxels."""
        moved = points + pull(self.displacement, points / np.float32(self.stride))
        return ((moved - self.centre) @ self.matrix.T + self.centre + self.shift).astype(np.float32)

    def least_jacobian(self) -> float:
        """Return the smallest determinant of the Jacobian: above 0, nothing folds."""
        gradient = [np.gradient(self.displacement[..., axis] / self.stride) for axis in range(3)]
        jacobian = np.moveaxis(np.array(gradient, dtype=np.float64), (0, 1), (-2, -1)) + np.eye(3)
        return float(np.linalg.det(jacobian).min() * abs(np.linalg.det(self.matrix)))


def control_grid(shape: Sequence[int], spacing_mm: float) -> tuple[tuple[int, int, int], float]:
    """Return shape and stride (in voxels) of the coarse grid on which velocities are given."""
    stride = CONTROL_MM / spacing_mm
    i, j, k = (int(np.ceil((n - 1) / stride)) + 1 for n in shape)
    return (i, j, k), stride


def exponential(velocity: Array, stride: float) -> Array:
    """Integrate a stationary velocity field by scaling and squaring.

    Args:
        velocity: In voxels of the fine grid, on a coarse grid, shape (i, j, k, 3).
        stride: Voxels between points of the coarse grid.

    Returns:
        Displacement, in the same units and shape.
    """
    nodes = grid_points(velocity.shape[:3])
    displacement = velocity / np.float32(2**SQUARINGS)
    for _ in range(SQUARINGS):
        moved = pull(displacement, nodes + displacement.reshape(-1, 3) / np.float32(stride))
        displacement = displacement + moved.reshape(velocity.shape)
    return displacement


def random_velocity(
    rng: np.random.Generator, shape: Sequence[int], spacing_mm: float, sigma_mm: float, peak_mm: float
) -> Array:
    """Draw a smooth velocity field whose longest vector is `peak_mm`; in voxels, on `control_grid`, (i, j, k, 3)."""
    coarse, _ = control_grid(shape, spacing_mm)
    field = np.stack([smooth_noise(rng, coarse, sigma_mm / CONTROL_MM) for _ in range(3)], axis=-1)
    return (field * np.float32(peak_mm / spacing_mm / np.linalg.norm(field, axis=-1).max())).astype(np.float32)


def deform(
    shape: Sequence[int],
    spacing_mm: float,
    velocity: Array,
    *,
    matrix: NDArray[np.float64] | None = None,
    shift: NDArray[np.float64] | None = None,
) -> Deformation:
    """Make a deformation of a velocity field and an affine about the grid's centre.

    A field that would fold is weakened until it does not fold.

    Args:
        shape: Of the head's grid.
        spacing_mm: Of the head's grid.
        velocity: In voxels, on `control_grid`.
        matrix: Of the affine; the identity by default.
        shift: Of the affine, in voxels; none by default.
    """
    _, stride = control_grid(shape, spacing_mm)
    matrix = np.eye(3) if matrix is None else matrix
    shift = np.zeros(3) if shift is None else shift
    centre = (np.array(shape) - 1) / 2
    while True:
        made = Deformation(matrix, shift, centre, exponential(velocity, stride), stride)
        if made.least_jacobian() > LEAST_JACOBIAN:
            return made
        velocity = velocity * np.float32(0.8)


def rotation(degrees: ArrayLike) -> NDArray[np.float64]:
    """Return the matrix of rotations about x, y and z, applied in this order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        one = np.eye(3)
        a, b = [other for other in range(3) if other != axis]
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        matrix = one @ matrix
    return matrix


def random_affine(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a head's pose and proportions: +-8 degrees, 0.93 to 1.07 along each axis, shear 0.03, perhaps mirrored."""
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.uniform(-0.03, 0.03, 3)
    matrix: NDArray[np.float64] = rotation(rng.uniform(-8, 8, 3)) @ np.diag(rng.uniform(0.93, 1.07, 3)) @ shear
    return matrix @ np.diag([rng.choice([-1.0, 1.0]), 1.0, 1.0])
