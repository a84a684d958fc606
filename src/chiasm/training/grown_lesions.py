"""Tumours that are grown in the anatomy of real training cases, and shown in source and target of their patches.

A lesion that is painted as a ball looks like a ball.  One that grows by reaction and diffusion
(`simulation.lesions`) follows white matter and stops at fluid, as gliomas do.  It is grown once for each case,
on a coarse grid, in what the case's own images show of fluid, grey and white matter; its brightness is drawn anew
for each patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.planes import with_axes
from chiasm.simulation.anatomy import AIR, CSF, GM, TISSUES, WM
from chiasm.simulation.lesions import GROWTH_MM, Disease, draw_lesion
from chiasm.training.painted_lesions import COMPARTMENTS, LesionPainter, tissue_levels

LESIONS = 6  # of each case
MOST_CASES = 24  # in which any are grown: a second or two for each, at every start
KINDS: tuple[Disease, ...] = ("high", "high", "low")
BLUR = 0.2  # SD of a tissue's intensities, as a share of the way from fluid to white matter
VOXELS = 4000  # of a lesion, that patches are centred on

Axes = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True, eq=False)
class GrownLesion:
    """A lesion in one case.

    Attributes:
        shares: Of each voxel of the coarse grid taken by each of `COMPARTMENTS`, shape (4, i, j, k), sum at most 1.
        steps: Voxels of the coarse grid to one of the case's, along I, J, K.
        centres: Voxels of the case that lie in it, shape (n, 3).
    """

    shares: NDArray[np.float32]
    steps: tuple[float, float, float]
    centres: NDArray[np.int32]

    def at(self, axes: Axes, order: Sequence[int] = (0, 1, 2)) -> NDArray[np.float32]:
        """Interpolate the shares linearly at voxels of the case, rising along I, J, K: shape (4, *axes in `order`)."""
        weights, kept = [], []
        for voxels, step, size in zip(axes, self.steps, self.shares.shape[1:]):
            place = np.minimum(voxels * step, size - 1)
            near = np.arange(int(place[0]), min(int(place[-1]) + 2, size))
            weights.append(np.maximum(1 - np.abs(place[:, None] - near), 0).astype(np.float32))
            kept.append(slice(near[0], near[-1] + 1))
        found = self.shares[:, *kept].transpose(0, *(1 + axis for axis in order))
        for axis in order:  # each product replaces the first of three axes by its voxels, and moves it to the end
            found = np.tensordot(found, weights[axis], axes=(1, 1))
        return found

    def reordered(self, axes: tuple[int, int, int]) -> GrownLesion:
        """Return it as it lies in a case whose axes have another order."""
        i, j, k = (self.steps[axis] for axis in axes)
        return GrownLesion(with_axes(self.shares, axes), (i, j, k), self.centres[:, axes])


def grow_lesions(cases: Sequence[PreparedCase], painter: LesionPainter, seed: int) -> list[list[GrownLesion]]:
    """Grow lesions in each training case, or in some evenly spread ones of many, the same for one seed."""
    chosen = set(np.linspace(0, len(cases) - 1, min(len(cases), MOST_CASES)).round().astype(int).tolist())
    return [
        _grow_in(case, painter, index, np.random.default_rng((seed, index, 16))) if index in chosen else []
        for index, case in enumerate(cases)
    ]


def _grow_in(case: PreparedCase, painter: LesionPainter, index: int, rng: np.random.Generator) -> list[GrownLesion]:
    spacing = painter.spacing_mm
    steps = (spacing[0] / GROWTH_MM, spacing[1] / GROWTH_MM, spacing[2] / GROWTH_MM)
    fractions = tissue_fractions(case, painter, index, steps)
    return [_grow(fractions, KINDS[n % len(KINDS)], steps, case.mask, rng) for n in range(LESIONS)]


def _grow(
    fractions: NDArray[np.float32],
    kind: Disease,
    steps: tuple[float, float, float],
    mask: NDArray[np.bool_],
    rng: np.random.Generator,
) -> GrownLesion:
    drawn = draw_lesion(kind, fractions, GROWTH_MM, rng)
    shares = np.moveaxis(drawn.shares[..., : len(COMPARTMENTS)], -1, 0).copy()
    inside = np.argwhere(shares.sum(axis=0) > 0.5)
    inside = inside[rng.permutation(len(inside))[:VOXELS]]
    centres = np.minimum(np.rint(inside / steps), np.array(mask.shape) - 1).astype(np.int32)
    return GrownLesion(shares, steps, centres)


def tissue_fractions(
    case: PreparedCase, painter: LesionPainter, index: int, steps: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Estimate how much of each coarse voxel is fluid, grey or white matter, shape (i, j, k, TISSUES).

    Labelled voxels, and voxels outside the mask, count as air, in which nothing grows.
    """
    shape = tuple(int(np.ceil((n - 1) * step)) + 1 for n, step in zip(case.mask.shape, steps, strict=True))

    def coarse(image: NDArray[Any]) -> NDArray[np.float32]:
        made: NDArray[np.float32] = affine_transform(
            np.asarray(image, np.float32), [1 / step for step in steps], output_shape=shape, order=1, mode="nearest"
        )
        return made

    healthy = np.asarray(case.mask)
    if case.labels is not None:
        healthy = healthy & ~(np.asarray(case.labels) > 0)
    brain = coarse(healthy)
    images = [coarse(image) for image in (*case.source[: case.intensities], case.target)]
    squares = np.zeros((3, *shape), np.float32)
    for image, name, (fluid, white) in zip(images, painter.contrasts, painter.ends[index], strict=True):
        level = (image - fluid) / (white - fluid)
        expected = np.array(tissue_levels(name), np.float32)  # of fluid, grey and white matter
        squares += np.minimum(((level - expected[:, None, None, None]) / BLUR) ** 2, 30)
    weight = np.exp(-0.5 * (squares - squares.min(axis=0)))
    weight *= brain / weight.sum(axis=0)
    fractions = np.zeros((*shape, len(TISSUES)), np.float32)
    fractions[..., [CSF, GM, WM]] = np.moveaxis(weight, 0, -1)
    fractions[..., AIR] = 1 - brain
    return fractions
