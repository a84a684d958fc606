from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from chiasm.simulation.anatomy import BONE_CORT, CSF, GM, TISSUES, WM
from chiasm.simulation.deformation import Array
from chiasm.simulation.lesions import (
    CORE,
    FLUID,
    OEDEMA,
    PLAQUE,
    RIM,
    WHOLE,
    Disease,
    draw_lesion,
    grow_step,
    lesion_labels,
    mass_effect,
)


def ball_of_brain(size: int = 56) -> Array:
    """White matter, cortex, fluid and skull as balls in balls; 2 mm voxels."""
    radius = np.linalg.norm(np.indices((size,) * 3) - (size - 1) / 2, axis=0)
    fractions = np.zeros((size,) * 3 + (len(TISSUES),), np.float32)
    fractions[..., WM] = radius < 19
    fractions[..., GM] = (radius >= 19) & (radius < 22)
    fractions[..., CSF] = (radius >= 22) & (radius < 24)
    fractions[..., BONE_CORT] = radius >= 24
    return fractions


BRAIN = ball_of_brain()


@pytest.mark.parametrize("kind", get_args(Disease))
def test_shares_lie_between_0_and_1_are_drawn_again_alike_and_stay_out_of_bone(kind) -> None:
    one, two = (draw_lesion(kind, BRAIN, 2.0, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one.shares, two.shares)
    assert one.shares.min() >= 0
    total = one.shares.sum(axis=-1)
    assert total.max() <= 1 + 1e-5
    assert total[BRAIN[..., BONE_CORT] > 0].max() < 0.5
    assert (total.max() > 0.8) == (kind != "none")


def test_growth_without_a_rate_conserves_cells_and_spreads_them_as_diffusion_does() -> None:
    density = np.zeros((31, 31, 31), np.float32)
    density[15, 15, 15] = 1
    diffusion, still = np.full_like(density, 0.1), np.zeros_like(density)
    for _ in range(40):
        density += grow_step(density, diffusion, still)
    assert density.sum() == pytest.approx(1, abs=1e-4)
    spread = (density * (np.arange(31) - 15)[:, None, None] ** 2).sum()
    assert spread == pytest.approx(2 * 0.1 * 40, rel=0.01)  # variance 2 D t along each axis


def test_growth_without_diffusion_is_logistic() -> None:
    density = np.full((3, 3, 3), 0.1, np.float32)
    for _ in range(1000):
        density += grow_step(density, np.zeros_like(density), np.full_like(density, 0.004))
    assert density[1, 1, 1] == pytest.approx(1 / (1 + 9 * np.exp(-4)), abs=0.002)


def test_a_high_grade_tumour_is_fluid_in_a_rim_in_oedema_and_a_low_grade_one_is_solid() -> None:
    high = draw_lesion("high", BRAIN, 2.0, np.random.default_rng(1))
    low = draw_lesion("low", BRAIN, 2.0, np.random.default_rng(1))
    mean_density = [high.density[high.shares[..., part] > 0.6].mean() for part in (OEDEMA, RIM, FLUID)]
    assert mean_density == sorted(mean_density)
    assert (high.density > WHOLE).sum() * 0.008 >= 30
    assert low.shares[..., CORE].max() > 0.9
    assert low.shares[..., [RIM, FLUID, PLAQUE]].max() == 0


def test_labels_are_those_of_brats_and_stay_in_the_brain() -> None:
    inside = BRAIN[..., BONE_CORT] == 0
    drawn = {kind: draw_lesion(kind, BRAIN, 2.0, np.random.default_rng(1)) for kind in get_args(Disease)}
    values = {
        kind: set(np.unique(lesion_labels(lesion.shares, lesion.density, inside)).tolist())
        for kind, lesion in drawn.items()
    }
    assert values == {"none": {0}, "high": {0, 1, 2, 4}, "low": {0, 1, 2}, "ms": {0, 2}, "cyst": {0, 1}}
    assert not lesion_labels(drawn["high"].shares, drawn["high"].density, np.zeros_like(inside)).any()


def test_a_mass_pushes_tissue_outwards_by_the_peak_asked_for() -> None:
    mass = (np.linalg.norm(np.indices((41, 41, 41)) - 20, axis=0) < 6).astype(np.float32)
    push = mass_effect(mass, 2.0, peak_mm=5.0)
    assert np.linalg.norm(push, axis=-1).max() * 2 == pytest.approx(5, rel=1e-4)
    # On the coarse grid, centre 10: where a point right of the mass comes from lies nearer to it.
    assert push[14, 10, 10, 0] < -0.3
    assert push[6, 10, 10, 0] > 0.3
