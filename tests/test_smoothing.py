"""Gaussian smoothing by products with matrices equals the filter of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from chiasm.smoothing import gaussian_weights, smooth


@pytest.mark.parametrize("shape", [(80, 37, 33), (5, 4, 3), (1, 70, 64), (33, 1, 1)])
@pytest.mark.parametrize("sigma", [(2.0, 2.0, 2.0), (0.3, 0.1, 4.0), (15.0, 1.0, 0.0)])
@pytest.mark.parametrize("reach", [2.0, 3.0])
def test_smoothing_equals_scipy_whatever_the_sides_and_widths(
    shape: tuple[int, ...], sigma: tuple[float, ...], reach: float
) -> None:
    image = np.random.default_rng(0).normal(100, 30, shape).astype(np.float32)
    expected = gaussian_filter(image.astype(np.float64), sigma, truncate=reach)
    assert np.abs(smooth(image.copy(), sigma, reach) - expected).max() < 1e-6 * np.abs(image).max()


def test_smoothing_keeps_a_constant_and_overwrites_the_image() -> None:
    image = np.full((40, 20, 70), 3.0, np.float32)
    assert smooth(image, (1.5, 2.0, 2.5)) is image
    assert np.allclose(image, 3.0, rtol=1e-6)


def test_the_weights_of_a_gaussian_are_those_worked_out_by_hand() -> None:
    outer = np.exp(-0.5)
    assert np.allclose(gaussian_weights(1.0, 1.0), np.array([outer, 1, outer]) / (1 + 2 * outer))


def test_an_image_without_voxels_stays_one() -> None:
    assert smooth(np.empty((0, 3, 3), np.float32), (1.0, 1.0, 1.0)).shape == (0, 3, 3)


def test_an_image_whose_first_axis_is_the_fastest_is_refused() -> None:
    with pytest.raises(ValueError, match="last axis"):
        smooth(np.zeros((4, 5, 6), np.float32, order="F"), (1.0, 1.0, 1.0))
