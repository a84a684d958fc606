"""Dice and HD95: by hand, against MONAI, and refused where shapes differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.metrics.structures import dice, hausdorff_95
from chiasm.simulation.deformation import smooth_noise


def blob(seed: int, shape: tuple[int, int, int] = (22, 26, 14), level: float = 0.5) -> np.ndarray:
    return smooth_noise(np.random.default_rng(seed), shape, 3.0) > level


def test_two_slabs_that_are_moved_apart_have_known_scores() -> None:
    made, real = np.zeros((20, 10, 10), bool), np.zeros((20, 10, 10), bool)
    made[4:8], real[6:10] = True, True
    assert dice(made, real) == 0.5
    assert hausdorff_95(made, real, (2.0, 1.0, 1.0)) == 4.0  # two voxels of 2 mm


def test_an_empty_segmentation_has_no_distance_and_no_overlap() -> None:
    some, none = blob(0), np.zeros((22, 26, 14), bool)
    assert dice(none, some) == 0 and math.isnan(dice(none, none))
    assert math.isnan(hausdorff_95(none, some, (1, 1, 1))) and math.isnan(hausdorff_95(some, none, (1, 1, 1)))


def test_shapes_that_differ_are_refused() -> None:
    for score in (dice, lambda a, b: hausdorff_95(a, b, (1, 1, 1))):
        with pytest.raises(ValueError, match="share one shape"):
            score(np.ones((3, 3, 3), bool), np.ones((3, 3, 1), bool))


@pytest.mark.filterwarnings("ignore:monai.metrics.utils:FutureWarning")  # MONAI's own call of its own function
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.tuples(*[st.floats(0.4, 4)] * 3), st.floats(-0.3, 0.9))
def test_scores_are_those_of_monai(seed: int, spacing_mm: tuple[float, float, float], level: float) -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    made, real = blob(seed), blob(seed + 1, level=level)
    made[8:12, 8:12, 4:8] = real[9:13, 9:13, 4:8] = True  # so that neither is empty
    pair = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (made, real)]
    theirs = metrics.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing_mm)
    assert hausdorff_95(made, real, spacing_mm) == pytest.approx(theirs.item(), rel=1e-5)
    assert dice(made, real) == pytest.approx(metrics.compute_dice(*pair, include_background=True).item(), rel=1e-6)
