"""Patches of simulated patients: the anatomy of a training case, a tumour that was grown in it, a scanner of its own.

Each patch draws its contrast anew: how bright each compartment of the tumour is in source and target, and how the
source is shaded and noisy.  The target outside the tumour stays the patient's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chiasm.simulation.deformation import smooth_noise
from chiasm.training.painted_lesions import Appearance, Block, LesionPainter, draw_levels, fill

SPREAD, SHARED_SPREAD = 0.2, 0.15  # SD of a compartment's brightness, of its own and of the lesion's
TEXTURE, TEXTURE_MM = (0.05, 0.25), (1.5, 6.0)  # SD and width of the texture inside
KEPT = (0.0, 0.7)  # of the tissue's own structure
SHADING, SHADING_MM = (0.0, 0.06), 40.0  # SD of the source's shading, as a share of fluid to white matter
NOISE = (0.0, 0.03)  # likewise


def simulate(
    painter: LesionPainter,
    case: int,
    block: Block,
    shares: NDArray[np.float32],
    axes_mm: Sequence[float],
    seed: int,
) -> Block:
    """Show a tumour in a patch of real anatomy, as some hospital would.

    Args:
        painter: Of the training cases.
        case: Index of the one that the patch is of.
        block: The patch, classes of tissue shifted already.
        shares: Of each voxel taken by each of `COMPARTMENTS`; changed in place.
        axes_mm: Spacing along each axis of the block.
        seed: Of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    appearance = Appearance(
        draw_levels(painter.contrasts, rng, SPREAD, SHARED_SPREAD),
        rng.uniform(*TEXTURE),
        rng.uniform(*TEXTURE_MM) / min(axes_mm),
        rng.uniform(*KEPT),
    )
    made = fill(block, painter.ends[case], shares, appearance, rng)
    for image, (fluid, white) in zip(made.source, painter.ends[case][:-1]):
        _spoil(image, made.mask, abs(white - fluid), axes_mm, rng)
    return made


def _spoil(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    scale: float,
    axes_mm: Sequence[float],
    rng: np.random.Generator,
) -> None:
    """Shade one source and add noise to it, in place, as another scanner would."""
    made = image + np.float32(scale * rng.uniform(*SHADING)) * smooth_noise(rng, mask.shape, SHADING_MM / min(axes_mm))
    made = made + np.float32(scale * rng.uniform(*NOISE)) * rng.standard_normal(mask.shape, dtype=np.float32)
    image[:] = np.where(mask, made, 0)
