"""Soft classes of tissue in the joint histogram of source and target, each of which can be shifted in the source.

Hospitals differ in how bright one tissue is beside another, not only in gain and offset.  Few training cases show few
such contrasts; a shift of each class by a random amount shows a network more of them.  Source and target together show
tissues apart that look alike in either; nothing else of the target is used, and it stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from chiasm.preparation.arrays import PreparedCase

CLASSES = 8
BINS = 128  # of each axis of the histogram, so that a shift steps by less than noise
VOXELS = 20_000  # that classes are found from, of all cases together
ENDS = (0.001, 0.999)  # quantiles that the histogram reaches to; what lies beyond is of the class at its border


@dataclass(frozen=True, eq=False)
class TissueClasses:
    """The share of each class in a voxel, by its intensities in one source and in the target.

    Attributes:
        low: Lower end of each source's histogram, then of the target's, shape (S + 1,).
        width: Of a bin, likewise.
        shares: In [0, 1], of sum 1 over the classes, shape (S, BINS, BINS, CLASSES).
    """

    low: NDArray[np.float32]
    width: NDArray[np.float32]
    shares: NDArray[np.float32]

    def shift(
        self, shifts: Sequence[Sequence[float]], source: NDArray[np.float32], target: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the summand that shifts each class in a source.

        Args:
            shifts: Of each source's classes, normalised units, shape (S, CLASSES).
            source: Normalised, shape (S, *spatial).
            target: Normalised, shape (*spatial).

        Returns:
            Normalised units, as the source.
        """
        column = self._bin(target, -1)
        added = [
            (self.shares[place] @ np.asarray(shift, np.float32)).take(self._bin(image, place) * BINS + column)
            for place, (shift, image) in enumerate(zip(shifts, source, strict=True))
        ]
        return np.stack(added)

    def _bin(self, image: NDArray[np.float32], place: int) -> NDArray[np.intp]:
        bins: NDArray[np.intp] = ((image - self.low[place]) / self.width[place]).clip(0, BINS - 1).astype(np.intp)
        return bins


def find_classes(cases: Sequence[PreparedCase], seed: int) -> TissueClasses:
    """Find soft classes in the joint histogram of each source and the target, the same for one seed.

    Centres are those of k-means on intensities in SD; a voxel belongs to each class as a Gaussian around its centre
    says, as wide as classes are on average.

    Args:
        cases: Training cases, all with a target.
        seed: Of the voxels and of the first centres.
    """
    rng = np.random.default_rng(seed)
    most = max(1, VOXELS // len(cases))
    voxels = np.concatenate([_draw_voxels(case, most, rng) for case in cases])  # (n, S + 1)
    low, high = (np.quantile(voxels, end, axis=0) for end in ENDS)
    width = np.maximum(high - low, 1e-6) / BINS
    middle = low[:, None] + width[:, None] * (np.arange(BINS) + 0.5)  # (S + 1, BINS)
    sd = np.maximum(voxels.std(axis=0), 1e-6)
    points, bins = voxels / sd, middle / sd[:, None]
    shares = [_soft_shares(points[:, [place, -1]], bins[place], bins[-1], rng) for place in range(voxels.shape[1] - 1)]
    return TissueClasses(*(part.astype(np.float32) for part in (low, width, np.stack(shares))))


def _draw_voxels(case: PreparedCase, most: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw voxels of a case's mask: their source intensities, then the target's, shape (n, S + 1)."""
    inside = np.flatnonzero(np.asarray(case.mask))
    chosen = np.sort(rng.choice(inside, min(most, len(inside)), replace=False))
    images = [*np.asarray(case.source[: case.intensities]), np.asarray(case.target)]
    return np.stack([image.reshape(-1)[chosen] for image in images], axis=1).astype(np.float64)


def _soft_shares(
    points: NDArray[np.float64], rows: NDArray[np.float64], columns: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the share of each class in each bin, shape (BINS, BINS, CLASSES), from points (n, 2) in SD."""
    centres, own = kmeans2(points, CLASSES, minit="++", rng=rng, missing="warn")
    variance = max(float(np.mean((points - centres[own]) ** 2)), 1e-6)
    distance = (rows[:, None, None] - centres[:, 0]) ** 2 + (columns[None, :, None] - centres[:, 1]) ** 2
    weight = np.exp(-(distance - distance.min(axis=-1, keepdims=True)) / (2 * variance))
    shares: NDArray[np.float64] = weight / weight.sum(axis=-1, keepdims=True)
    return shares
