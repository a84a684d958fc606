"""Simulated lesions that are painted into patches of real training cases, in source and target.

Few training cases hold few lesions, of few contrasts.  A painted lesion has oedema, a solid core, an enhancing rim and
fluid, whose brightness between fluid and white matter follows from relaxation times and a hospital's protocol drawn
anew for each (`simulation.signals`), and varies beyond that.  Anatomy and all else of the patch stay the patient's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.preparation.arrays import PreparedCase
from chiasm.simulation.deformation import smooth_noise
from chiasm.simulation.signals import MATERIALS, SITES, Voxels, signal

#: Contrasts of a brain that lesions can be painted in, and the percentiles of its intensities where fluid and white
#: matter lie.
CONTRASTS: Mapping[str, tuple[float, float]] = {"t1": (3, 80), "t1ce": (3, 75), "t2": (97, 25), "flair": (3, 40)}
COMPARTMENTS = ("oedema", "core", "rim", "fluid")

RADIUS_MM = (8.0, 32.0)  # of the whole lesion
SOLID = (0.3, 0.7)  # radius of the core, as a share of the whole; half of the lesions have one
NECROTIC = (0.3, 0.8)  # radius of the fluid, as a share of the core's
STRETCH = 0.25  # SD of the logarithm of an axis's length
RAGGED = 0.25  # SD of the outline, as a share of the radius
VARIETY = 0.12  # SD of a compartment's brightness beyond that of protocols, as a share of fluid to white matter
TEXTURE, TEXTURE_MM = 0.08, 4.0  # SD of a smooth texture inside, likewise, and its width
KEPT = 0.25  # of the tissue's own structure that goes on in a lesion
EDGE = 0.08  # width of an edge, as a share of the radius


@dataclass(frozen=True, eq=False)
class LesionPainter:
    """The facts that painting needs.

    Attributes:
        contrasts: Of the sources, then of the target, names of `CONTRASTS`.
        ends: Intensity of fluid and of white matter in each case's images, normalised, shape (cases, images, 2).
        spacing_mm: Of the prepared grid.
    """

    contrasts: tuple[str, ...]
    ends: NDArray[np.float32]
    spacing_mm: tuple[float, float, float]


class Block(NamedTuple):
    """Images of one patch: all slices of 2.5D, or a 3D patch.

    Attributes:
        source: Normalised, shape (C, *block), zero outside the mask.
        target: Normalised, shape (*block), likewise.
        mask: Valid voxels, shape (*block).
        lesion: Labelled voxels, shape (*block).
    """

    source: NDArray[np.float32]
    target: NDArray[np.float32]
    mask: NDArray[np.bool_]
    lesion: NDArray[np.bool_]


def is_paintable(contrasts: Sequence[str]) -> bool:
    """Return whether lesions can be painted in these modalities."""
    return all(name.lower() in CONTRASTS for name in contrasts)


def make_painter(
    cases: Sequence[PreparedCase], contrasts: Sequence[str], spacing_mm: tuple[float, float, float]
) -> LesionPainter:
    """Find the intensities of fluid and white matter in each training case.

    Args:
        cases: Training cases.
        contrasts: Of the sources, then of the target.
        spacing_mm: Of their grid.

    Raises:
        ValueError: If lesions cannot be painted in one of the contrasts.
    """
    if not is_paintable(contrasts):
        raise ValueError(f"lesions are painted in {', '.join(CONTRASTS)}, not {', '.join(contrasts)}")
    names = tuple(name.lower() for name in contrasts)
    ends = [
        [np.percentile(values, CONTRASTS[name]) for name, values in zip(names, _healthy(case), strict=True)]
        for case in cases
    ]
    return LesionPainter(names, np.asarray(ends, np.float32), spacing_mm)


def _healthy(case: PreparedCase) -> list[NDArray[np.float32]]:
    """Return intensities of a case outside its labelled lesions: of each source, then of the target, shape (n,)."""
    inside = np.asarray(case.mask)
    if case.labels is not None and (healthy := inside & ~(np.asarray(case.labels) > 0)).any():
        inside = healthy
    return [np.asarray(image)[inside] for image in (*case.source[: case.intensities], case.target)]


def paint(painter: LesionPainter, case: int, block: Block, axes_mm: Sequence[float], seed: int) -> Block:
    """Paint one lesion into a patch.

    Args:
        painter: Of the training cases.
        case: Index of the one that the patch is of.
        block: The patch; channels of the source beyond the contrasts stay.
        axes_mm: Spacing along each axis of the block.
        seed: The lesion's.

    Returns:
        A new block; the same where the patch holds nothing of the body.
    """
    rng = np.random.default_rng(seed)
    inside = np.flatnonzero(block.mask)
    if not len(inside):
        return block
    centre = np.array(np.unravel_index(inside[rng.integers(len(inside))], block.mask.shape))
    shares = draw_shape(block.mask.shape, centre, axes_mm, rng)
    appearance = Appearance(draw_levels(painter.contrasts, rng, VARIETY), TEXTURE, TEXTURE_MM / min(axes_mm), KEPT)
    return fill(block, painter.ends[case], shares, appearance, rng)


class Appearance(NamedTuple):
    """The appearance of a lesion.

    Attributes:
        levels: Of each image and compartment, from fluid (0) to white matter (1), shape (images, COMPARTMENTS).
        texture: SD of a smooth texture inside, on the same scale.
        texture_voxels: Its width.
        kept: Share of the tissue's own structure that goes on in it.
    """

    levels: NDArray[np.float32]
    texture: float
    texture_voxels: float
    kept: float


def fill(
    block: Block,
    ends: NDArray[np.float32],
    shares: NDArray[np.float32],
    appearance: Appearance,
    rng: np.random.Generator,
) -> Block:
    """Fill the compartments' shares of a block with their brightness; the block's other arrays are not changed.

    Args:
        block: The patch; channels of the source beyond the contrasts stay.
        ends: Intensity of fluid and of white matter in each of the case's images, shape (images, 2).
        shares: Of each voxel, shape (COMPARTMENTS, *block); changed in place.
        appearance: Of the lesion.
        rng: Where its texture comes from.
    """
    shape, sigma = block.mask.shape, appearance.texture_voxels
    inside = np.asarray(shares.any(axis=0))
    box = box_of(inside) if inside.any() else (slice(0),) * 3  # nothing changes around it
    shared = smooth_noise(rng, shape, sigma, box)
    source, target, lesion = block.source.copy(), block.target.copy(), block.lesion.copy()
    images = [image[box] for image in (*source[: len(ends) - 1], target)]
    shares, mask = shares[:, *box], block.mask[box]
    shares[0] *= 1 - _like_fluid(images, ends)  # oedema stays out of ventricles and sulci
    whole = shares.sum(axis=0) * mask
    for image, level, (fluid, white) in zip(images, appearance.levels, ends, strict=True):
        texture = np.float32(appearance.texture / np.sqrt(2)) * (shared + smooth_noise(rng, shape, sigma, box))
        inner = np.tensordot(level, shares, axes=1) + texture * whole  # of the way from fluid to white matter
        painted = whole * fluid + inner * (white - fluid) + appearance.kept * whole * (image - white)
        image[...] = np.where(mask, (1 - whole) * image + painted, image)
    lesion[box] |= whole > 0.5
    return Block(source, target, block.mask, lesion)


def _like_fluid(images: Sequence[NDArray[np.float32]], ends: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how far every image shows fluid, in [0, 1], shape (*block)."""
    steps = [
        np.clip((0.5 - (image - fluid) / (white - fluid)) / 0.3, 0, 1) for image, (fluid, white) in zip(images, ends)
    ]
    likeness: NDArray[np.float32] = np.min(steps, axis=0)
    return likeness


def draw_shape(
    shape: tuple[int, ...], centre: NDArray[np.intp], axes_mm: Sequence[float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the share of each compartment in each voxel, shape (COMPARTMENTS, *block), of sum at most 1."""
    radius = rng.uniform(*RADIUS_MM)
    solid = rng.uniform(*SOLID) if rng.random() < 0.5 else 0.0
    necrotic = solid * rng.uniform(*NECROTIC)
    lengths = radius * np.exp(STRETCH * rng.normal(size=len(shape)))
    grids = np.ogrid[tuple(slice(0, size) for size in shape)]
    squares = [
        (((grid - c) * mm / length) ** 2).astype(np.float32)
        for grid, c, mm, length in zip(grids, centre, axes_mm, lengths)
    ]
    ragged = np.float32(RAGGED) * smooth_noise(rng, shape, radius / 3 / min(axes_mm))
    distance = np.sqrt(sum(squares[1:], squares[0])) + ragged  # 1 at the outline
    shares, near = np.zeros((len(COMPARTMENTS), *shape), np.float32), distance < 1 + EDGE / 2
    box = box_of(near) if near.any() else (slice(0),) * 3
    within = [_soft_step(edge - distance[box]) for edge in (1.0, solid, solid * 0.8, necrotic)]
    whole, core, inner, fluid = within if solid else (within[0], *(0 * within[0] for _ in range(3)))
    parts = (whole * (1 - core), core * inner * (1 - fluid), core * (1 - inner), core * inner * fluid)
    shares[:, *box] = parts
    return shares


def _soft_step(depth: NDArray[np.floating]) -> NDArray[np.floating]:
    step: NDArray[np.floating] = np.clip(0.5 + depth / EDGE, 0, 1)
    return step


def draw_levels(
    contrasts: Sequence[str], rng: np.random.Generator, spread: float, shared_spread: float = 0.0
) -> NDArray[np.float32]:
    """Draw the brightness of each compartment, between fluid (0) and white matter (1).

    Args:
        contrasts: Of the images, names of `CONTRASTS`.
        rng: Draws the hospital's protocol, and the differences from it.
        spread: SD of each compartment's difference.
        shared_spread: SD of a difference that all compartments of an image share.

    Returns:
        Shape (images, COMPARTMENTS).
    """
    site = int(rng.integers(len(SITES)))
    levels = np.array([levels_of(name, site) for name in contrasts])
    levels = levels + spread * rng.normal(size=levels.shape)
    if shared_spread:
        levels = levels + shared_spread * rng.normal(size=(len(levels), 1))
    return levels.astype(np.float32)


@lru_cache(maxsize=64)
def tissue_levels(contrast: str) -> tuple[float, float, float]:
    """Return the mean brightness of fluid (0), grey matter and white matter (1) over protocols."""
    return 0.0, float(np.mean([_levels(contrast, site, ("gm",)) for site in range(len(SITES))])), 1.0


@lru_cache(maxsize=64)
def levels_of(contrast: str, site: int) -> tuple[float, ...]:
    """Return the brightness of each compartment in a protocol: 0 as cerebrospinal fluid, 1 as white matter."""
    return _levels(contrast, site, COMPARTMENTS)


def _levels(contrast: str, site: int, materials: Sequence[str]) -> tuple[float, ...]:
    one, zero = np.ones(1, np.float32), np.zeros(1, np.intp)
    fluid, white, *others = (
        signal(contrast, SITES[site], [Voxels(MATERIALS[name], zero, one, one, one)], (1,)).item()
        for name in ("csf", "wm", *materials)
    )
    return tuple((brightness - fluid) / (white - fluid) for brightness in others)
