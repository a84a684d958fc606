"""Gaussian smoothing by products with small matrices: the filter of scipy, in a fraction of its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REACH = 3.0  # SDs at which a Gaussian ends unless its user says otherwise
BLOCK = 32  # voxels of a line that are made by one product


class Stretch(NamedTuple):
    """A part of a line, and how it is filtered.

    Attributes:
        here: The part.
        around: The voxels that it is made of.
        matrix: What makes it of them, shape (here, around).
    """

    here: slice
    around: slice
    matrix: NDArray[np.float32]


def smooth(image: NDArray[np.float32], sigma: Sequence[float], reach: float = REACH) -> NDArray[np.float32]:
    """Smooth an image in its place by a Gaussian; beyond the border 2 1 0 continues as 0 1 2.

    Equals `scipy.ndimage.gaussian_filter(image, sigma, truncate=reach)` up to the rounding of single precision.

    Args:
        image: Shape (I, J, K), its last axis the fastest; overwritten.
        sigma: SD along I, J and K, voxels.
        reach: SDs at which the Gaussian ends.

    Returns:
        `image`.

    Raises:
        ValueError: If the image lies otherwise.
    """
    if not image.size:
        return image
    if not image.flags.c_contiguous:
        raise ValueError("the image's last axis must be the fastest")
    along_i, along_j, along_k = (
        list(stretches(side, gaussian_weights(width, reach))) for side, width in zip(image.shape, sigma)
    )
    most = max(around.stop - around.start for _, around, _ in along_i)
    planes, plane = np.empty((most, *image.shape[1:]), np.float32), np.empty(image.shape[1:], np.float32)
    start = stop = 0  # of the planes of the image that `planes` holds
    for here, around, matrix_i in along_i:
        kept = stop - around.start
        planes[:kept] = planes[around.start - start : stop - start].copy()
        for number in range(stop, around.stop):  # plane by plane: all but the last product stays in the cache
            for there, among, matrix in along_j:
                np.matmul(matrix, image[number, among], out=plane[there])
            for there, among, matrix in along_k:
                np.matmul(plane[:, among], matrix.T, out=planes[number - around.start, :, there])
        start, stop = around.start, around.stop
        made = image[here].reshape(len(matrix_i), -1)
        np.matmul(matrix_i, planes[: stop - start].reshape(stop - start, -1), out=made)
    return image


def gaussian_weights(sigma: float, reach: float = REACH) -> NDArray[np.float64]:
    """Return the weights of a Gaussian of `sigma` voxels, their sum 1; one weight where it is narrower than a voxel.

    >>> gaussian_weights(0.0)
    array([1.])
    """
    radius = int(reach * sigma + 0.5)
    if not radius:
        return np.ones(1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def stretches(length: int, weights: NDArray[np.float64], size: int = BLOCK) -> Iterator[Stretch]:
    """Cut a line into stretches, each of which a product makes: the line filtered, and mirrored at its ends.

    Args:
        length: Of the line.
        weights: An odd number.
        size: Of a stretch, but for the last.
    """
    radius = len(weights) // 2
    mirrored = np.pad(np.arange(length), radius, mode="symmetric")  # the voxel that stands at each place
    for start in range(0, length, size):
        stop = min(start + size, length)
        among = mirrored[start : stop + 2 * radius]
        first, last = int(among.min()), int(among.max()) + 1
        matrix = np.zeros((stop - start, last - first))
        rows = np.arange(stop - start)[:, None]
        np.add.at(matrix, (rows, among[rows + np.arange(len(weights))] - first), weights)
        yield Stretch(slice(start, stop), slice(first, last), matrix.astype(np.float32))
