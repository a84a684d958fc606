"""The texture of an image: ranks of its values inside its content, locally normalised, on a coarse grid in world space.

A copy keeps its texture if it was standardised, freed of its bias field, displayed with another gamma, cropped or
skull-stripped again.  Another patient has another texture, also in one atlas.  Places come from the header, so a moved
copy is not found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes import Volume, canonical

SIDE = 24  # bins along each axis
BIN_MM = 8.0  # width of one
SAMPLE_MM = 2.5  # voxels are passed over where they lie closer together
SMOOTH = 1.5  # bins; slower changes do not count
FILLED = 0.7  # share of a bin that must be content
FLAT = 0.02  # standard deviation of ranks, of -1 to 1, below which nothing is to be seen
MOST = 3.0  # standard deviations
LEAST = 200  # bins with content; an image of fewer shows too little
SHARED = 0.5  # of the bins of the smaller one that two images must have in common
BACKGROUND = 0.2  # share of the voxels on the faces that have one value, from which it is the background


class Texture(NamedTuple):
    """The texture of an image.

    Attributes:
        values: In local standard deviations, 0 outside, shape (SIDE, SIDE, SIDE).  Bins are numbered in world space,
            modulo SIDE, so that two images of one place have the same bins.
        inside: Which bins hold content, same shape.
    """

    values: NDArray[np.float16]
    inside: NDArray[np.bool_]


def texture(volume: Volume) -> Texture:
    """Return the texture of an image, which does not depend on its units, its shading and its crop.

    Args:
        volume: Any image, with background or without.
    """
    values, positions = _samples(volume)
    content = _content(values)
    if not content.any():
        return Texture(np.zeros((SIDE,) * 3, np.float16), np.zeros((SIDE,) * 3, bool))
    ranks, counts = _ranks(values, content), content.astype(np.float32)
    shares = [_bins(place, _centre(content, axis, place)) for axis, place in enumerate(positions)]
    for share in shares:
        ranks, counts = (np.tensordot(part, share, axes=(0, 1)) for part in (ranks, counts))  # the first axis goes last
    full = float(np.prod([share.sum(axis=1).max() for share in shares]))
    inside = counts > FILLED * full
    return Texture(_normalised(ranks / np.maximum(counts, np.float32(1)), inside), inside)


def correlations(textures: Sequence[Texture], others: Sequence[Texture] | None = None) -> NDArray[np.float32]:
    """Correlate textures inside the content of both; 0 where they share too little.

    Args:
        textures: n of them.
        others: m that each is correlated with; by default the same ones.

    Returns:
        Correlations, shape (n, m).
    """
    one = _stacked(textures)
    other = one if others is None else _stacked(others)
    shared = one.inside @ other.inside.T
    enough = shared >= np.maximum(SHARED * np.minimum(one.counts[:, None], other.counts), LEAST)
    if not enough.any():
        return np.zeros(shared.shape, np.float32)
    squares = ((one.values**2) @ other.inside.T) * (one.inside @ (other.values**2).T)
    lengths = np.sqrt(np.maximum(squares, np.float32(1e-6)))
    found: NDArray[np.float32] = np.where(enough, one.values @ other.values.T / lengths, np.float32(0))
    return found


class _Stacked(NamedTuple):
    """Textures in rows: values and content, shape (n, SIDE**3), and bins with content of each, shape (n,)."""

    values: NDArray[np.float32]
    inside: NDArray[np.float32]
    counts: NDArray[np.float32]


def _stacked(textures: Sequence[Texture]) -> _Stacked:
    values, inside = (np.stack([one[part].ravel() for one in textures]).astype(np.float32) for part in (0, 1))
    return _Stacked(values, inside, inside.sum(axis=1))


def above_background(values: NDArray[np.float32], low: float, high: float) -> float:
    """Return a value above the background: a quarter of the way from the mean of dark to that of bright voxels.

    Otsu's threshold separates the two.  Noise moves their means less than the threshold.

    Args:
        values: Of an image.
        low: The smallest that counts.
        high: The largest that counts, above `low`.
    """
    counts, edges = np.histogram(values, bins=64, range=(low, high))
    middles = (edges[1:] + edges[:-1]) / 2
    numbers, sums = np.cumsum(counts), np.cumsum(counts * middles)
    below, above = np.maximum(numbers[:-1], 1), np.maximum(numbers[-1] - numbers[:-1], 1)
    dark, bright = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
    best = int(np.argmax(below * above * (bright - dark) ** 2))
    return float(dark[best] + (bright[best] - dark[best]) / 4)


def _samples(volume: Volume) -> tuple[NDArray[np.float32], list[NDArray[np.float64]]]:
    """Return some voxels, the same for a cropped or flipped copy, and their places along each axis in mm."""
    in_ras = canonical(volume)
    spacing = np.array(in_ras.geometry.spacing_mm)
    affine = np.asarray(in_ras.geometry.affine)
    origin = np.linalg.solve(affine[:3, :3] / spacing, affine[:3, 3])
    steps = np.maximum(1, (SAMPLE_MM / spacing).astype(int))
    firsts = (-np.rint(origin / spacing).astype(int)) % steps
    slices = tuple(slice(first, None, step) for first, step in zip(firsts, steps, strict=True))
    positions = [
        start + width * np.arange(count)[part]
        for start, width, count, part in zip(origin, spacing, in_ras.array.shape, slices, strict=True)
    ]
    return np.array(in_ras.array[slices], dtype=np.float32, order="C"), positions


def _content(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the voxels that are not background: one frequent value on the faces, or else the dark voxels."""
    if not values.size:
        return np.zeros(values.shape, bool)
    sides = (values[[0, -1]], values[:, [0, -1]], values[..., [0, -1]])
    faces = np.concatenate([side.ravel() for side in sides])
    found, counts = np.unique(faces, return_counts=True)
    if counts.max() > BACKGROUND * faces.size:
        content: NDArray[np.bool_] = values != found[counts.argmax()]
        return content
    low, high = map(float, np.percentile(values, (1, 99)))
    bright: NDArray[np.bool_] = values > (above_background(values, low, high) if high > low else high)
    return bright


def _ranks(values: NDArray[np.float32], content: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the ranks of values within the content, from -1 to 1, and 0 outside."""
    known = values[content]
    levels = np.linspace(-1, 1, 65)
    quantiles = np.quantile(known[:: max(1, known.size // 20_000)], (levels + 1) / 2)
    ranks = np.zeros(values.shape, np.float32)
    ranks[content] = np.interp(known, quantiles, levels)
    return ranks


def _centre(content: NDArray[np.bool_], axis: int, positions: NDArray[np.float64]) -> float:
    profile = content.sum(axis=tuple(other for other in range(3) if other != axis))
    return float((profile * positions).sum() / profile.sum())


def _bins(positions: NDArray[np.float64], centre: float) -> NDArray[np.float32]:
    """Return which voxels along an axis lie in each of the bins around a centre, shape (SIDE, count)."""
    numbers = np.floor(positions / BIN_MM).astype(int)
    first = round(centre / BIN_MM) - SIDE // 2
    near = (numbers >= first) & (numbers < first + SIDE)
    shares: NDArray[np.float32] = ((np.arange(SIDE)[:, None] == numbers % SIDE) & near).astype(np.float32)
    return shares


def _normalised(means: NDArray[np.floating], inside: NDArray[np.bool_]) -> NDArray[np.float16]:
    """Subtract the mean around each bin and divide by the standard deviation there; bins outside do not count."""
    from scipy.ndimage import gaussian_filter  # 0.25 s that predicting does not need

    weights = inside.astype(np.float32)
    around = np.maximum(gaussian_filter(weights, SMOOTH, mode="wrap"), 1e-6)
    details = np.where(inside, means - gaussian_filter(means * weights, SMOOTH, mode="wrap") / around, 0)
    deviations = np.sqrt(gaussian_filter(details**2, SMOOTH, mode="wrap") / around)
    normalised: NDArray[np.float16] = np.clip(details / np.maximum(deviations, FLAT), -MOST, MOST).astype(np.float16)
    return normalised
