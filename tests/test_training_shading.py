"""Patches whose source is shaded, as by a coil: how they are drawn, and what a shading is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.preparation.arrays import PreparedCase
from chiasm.training.batches import SHADING, Place, Sampling, draw_places, take_batch
from chiasm.volumes import Geometry

SHAPE = (24, 28, 16)


def case() -> PreparedCase:
    rng = np.random.default_rng(3)
    mask = np.zeros(SHAPE, bool)
    mask[2:-2, 2:-2, 1:-1] = True
    source, target = (rng.normal(size=SHAPE).astype(np.float32) * mask for _ in range(2))
    return PreparedCase("P1", "P1", None, source[None], target, mask, None, Geometry(SHAPE, np.eye(4)))


def drawn(share: float, count: int = 400) -> list[Place]:
    sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, shaded_share=share)
    lesions: list[NDArray[np.int32]] = [np.empty((0, 3), np.int32)]
    return draw_places([case()], lesions, sampling, count=count, rng=np.random.default_rng(5))


def test_shaded_patches_come_in_their_share_and_leave_the_places_alone() -> None:
    without, half = drawn(0.0), drawn(0.5)
    assert half == drawn(0.5)
    assert [replace(one, shading=None) for one in half] == without
    assert np.mean([one.shading is not None for one in half]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("patch", "slices"), [((16, 20), 3), ((16, 20), 1), ((16, 20, 12), 1)])
def test_a_shading_is_a_smooth_field_in_the_source_inside_the_mask(patch: tuple[int, ...], slices: int) -> None:
    places = [one for one in drawn(1.0, 12) if not one.flip]
    plain = [replace(one, shading=None) for one in places]
    after, before = (take_batch([case()], some, patch=patch, slices=slices) for some in (places, plain))
    assert (after.target == before.target).all() and (after.mask == before.mask).all()
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in patch), indexing="ij")
    terms = [np.ones(patch), *axes, *(a * b for n, a in enumerate(axes) for b in axes[n:])]
    for number in range(len(places)):
        added = (after.source - before.source)[number].numpy()[slices // 2 if len(patch) == 2 else 0]
        inside = after.mask[number, 0].numpy()
        assert not added[~inside].any() and added[inside].any()
        basis = np.stack([term[inside] for term in terms], 1)
        fitted = basis @ np.linalg.lstsq(basis, added[inside], rcond=None)[0]
        np.testing.assert_allclose(added[inside], fitted, atol=1e-5)


def test_the_strength_of_a_shading_is_its_standard_deviation_over_the_patch() -> None:
    whole = replace(case(), mask=np.ones(SHAPE, bool))
    for place in drawn(1.0, 6):
        pair = [replace(place, centre=(12, 14, 8), flip=False, shading=one) for one in (place.shading, None)]
        batch = take_batch([whole], pair, patch=(24, 28), slices=1)
        assert place.shading is not None
        added = (batch.source[0] - batch.source[1]).numpy()
        assert added.std() == pytest.approx(abs(place.shading[0][0]), rel=1e-4) and abs(added.mean()) < 1e-5
    strengths = [abs(one.shading[0][0]) for one in drawn(1.0, 2000) if one.shading is not None]
    assert np.sqrt(np.mean(np.square(strengths))) == pytest.approx(SHADING, rel=0.05)
