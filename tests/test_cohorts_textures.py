"""Textures: what an image shows, whatever was done to its values and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter

from chiasm.cohorts.textures import LEAST, SIDE, correlations, texture
from chiasm.volumes import Volume, crop
from chiasm.volumes.geometry import Geometry, reordered

SHAPE = (56, 64, 52)


def head(seed: int) -> Volume:
    """A brain of its own folds on a background of 0, voxels of 3 mm."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1.15, 1.15, side) for side in SHAPE), indexing="ij")
    folds = gaussian_filter(rng.normal(size=SHAPE), 2)
    image = np.where(sum(axis**2 for axis in axes) < 1, 500 + 150 * folds / folds.std(), 0).clip(0)
    matrix = np.diag([3.0, 3.0, 3.0, 1.0])
    matrix[:3, 3] = -80, -95, -70
    return Volume(image.astype(np.float32), Geometry(SHAPE, matrix))


def with_values(volume: Volume, values: np.ndarray) -> Volume:
    return Volume(np.where(volume.array != 0, values, 0).astype(np.float32), volume.geometry)


def standardised(volume: Volume) -> Volume:
    inside = volume.array[volume.array != 0]
    return with_values(volume, (volume.array - inside.mean()) / inside.std())


def without_shading(volume: Volume) -> Volume:
    along = np.linspace(-1, 1, SHAPE[0])[:, None, None]
    across = np.linspace(-1, 1, SHAPE[1])[None, :, None]
    return with_values(volume, volume.array * np.exp(0.2 * (0.5 * along + across - 0.3 * across**2)))


def stripped_anew(volume: Volume) -> Volume:
    return Volume(np.where(binary_erosion(volume.array != 0), volume.array, 0).astype(np.float32), volume.geometry)


#: What may be done to a copy, and the least correlation that is left.
DONE = {
    "standardised, zeros outside": (standardised, 0.999),
    "gamma 1.6": (lambda volume: with_values(volume, (volume.array / 1000) ** 1.6), 0.999),
    "bias field removed, 20 %": (without_shading, 0.98),
    "15 mm cropped": (lambda volume: crop(volume, [slice(None), slice(None), slice(None, -5)]), 0.99),
    "stripped by 3 mm more": (stripped_anew, 0.97),
    "flipped": (lambda volume: reordered(volume, (2, 0, 1), (True, False, True)), 0.999),
}


@pytest.mark.parametrize("what", list(DONE))
def test_a_copy_keeps_its_texture(what: str) -> None:
    change, least = DONE[what]
    textures = [texture(head(1)), texture(change(head(1))), texture(head(2))]
    found = correlations(textures)
    assert found[0, 1] >= least
    assert abs(found[:2, 2]).max() < 0.5


def test_a_texture_is_0_outside_and_of_local_deviation_1_inside() -> None:
    values, inside = texture(head(1))
    assert values.shape == inside.shape == (SIDE,) * 3
    assert inside.sum() > LEAST and not values[~inside].any()
    assert float(values[inside].astype(float).std()) == pytest.approx(1, abs=0.1)


def test_images_without_content_or_with_little_of_it_are_like_no_other() -> None:
    flat = Volume(np.full((5, 5, 5), 3, np.float32), Geometry((5, 5, 5), np.eye(4)))
    small = Volume(head(1).array[20:30, 20:30, 20:30], Geometry((10, 10, 10), np.eye(4)))
    assert not texture(flat).inside.any()
    assert not correlations([texture(flat), texture(flat), texture(small), texture(small)]).any()
