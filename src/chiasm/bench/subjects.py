"""A brain-like pair of volumes of any size, made in a moment: an ellipsoid that fills 18 % of the field of view."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.volumes import Geometry

BRAIN_SHARE = 0.18  # of the voxels, as in a skull-stripped MR volume of 240 x 240 x 155
SMOOTH_VOXELS = 2.0
LEVEL, CONTRAST = 400.0, 100.0  # stored values inside


class Pictures(NamedTuple):
    """A source, its target, and the mask of tissue.

    Attributes:
        source: Stored values, 0 outside the mask, int16, shape (I, J, K).
        target: Likewise, another contrast.
        mask: The ellipsoid, bool.
        geometry: 1 mm voxels.
    """

    source: NDArray[np.int16]
    target: NDArray[np.int16]
    mask: NDArray[np.bool_]
    geometry: Geometry


def draw_pictures(shape: tuple[int, int, int], seed: int = 0) -> Pictures:
    """Draw smooth noise in an ellipsoid as source; its target has another contrast and some noise of its own.

    Args:
        shape: Voxels along I, J and K.
        seed: Of the noise.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    radius = (6 * BRAIN_SHARE / np.pi) ** (1 / 3)  # of the half sides: an ellipsoid of all is pi / 6 of its box
    axes = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
    mask = sum(axis**2 for axis in axes) < radius**2
    one, other = (gaussian_filter(rng.normal(size=shape).astype(np.float32), SMOOTH_VOXELS) for _ in range(2))
    one, other = one / one.std(), other / other.std()

    def stored(values: NDArray[np.float32]) -> NDArray[np.int16]:
        return np.where(mask, np.clip(LEVEL + CONTRAST * values, 1, None), 0).astype(np.int16)

    return Pictures(
        stored(one),
        stored(0.3 * other - np.tanh(one)),
        np.asarray(mask),
        Geometry(shape, np.diag([1.0, 1.0, 1.0, 1.0])),
    )
