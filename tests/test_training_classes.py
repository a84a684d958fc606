"""Soft classes of tissue: found alike from one seed, shifted in the source alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.preparation.arrays import PreparedCase
from chiasm.training.batches import Place, Sampling, Variation, draw_places, take_batch
from chiasm.training.classes import BINS, CLASSES, find_classes
from chiasm.volumes import Geometry

SHAPE = (24, 20, 10)
CENTRES = np.array([(-2.0, 2.0), (0.0, 1.0), (0.0, -1.5), (2.0, -1.0)])  # source and target of four tissues


def case(seed: int, sources: int = 1) -> PreparedCase:
    """Four tissues in blocks along the second axis; two of them are alike in the source and differ in the target."""
    rng = np.random.default_rng(seed)
    tissue = np.broadcast_to((np.arange(SHAPE[1]) // 5)[None, :, None], SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask[2:-2] = True
    noise = rng.normal(size=(sources + 1, *SHAPE)) * 0.1
    images = np.stack([*[CENTRES[tissue, 0]] * sources, CENTRES[tissue, 1]]) + noise
    images = np.where(mask, images, 0).astype(np.float32)
    labels = (tissue == 0).astype(np.uint8)
    return PreparedCase(f"c{seed}", f"s{seed}", None, images[:-1], images[-1], mask, labels, Geometry(SHAPE, np.eye(4)))


CASES = [case(0), case(1)]
FOUND = find_classes(CASES, 0)


def place(**changes: object) -> Place:
    given = {"case": 0, "centre": (12, 10, 5), "flip": False, "gain": (1.0,), "offset": (0.0,)}
    return Place(**(given | changes))  # type: ignore[arg-type]


def shift_of(tissue: int, amount: float) -> tuple[tuple[float, ...], ...]:
    """Shift the classes that a tissue's centre belongs to."""
    point = np.ones((1, 1), np.float32)
    shares = [
        FOUND.shift([np.eye(CLASSES)[k].tolist()], point[None] * CENTRES[tissue, 0], point * CENTRES[tissue, 1])
        for k in range(CLASSES)
    ]
    return (tuple(amount * float(share.item() > 0.01) for share in shares),)


def test_one_seed_finds_the_same_classes_whose_shares_sum_to_1() -> None:
    again, other = find_classes(CASES, 0), find_classes(CASES, 1)
    np.testing.assert_array_equal(FOUND.shares, again.shares)
    assert not np.array_equal(FOUND.shares, other.shares)
    assert FOUND.shares.shape == (1, BINS, BINS, CLASSES)
    np.testing.assert_allclose(FOUND.shares.sum(axis=-1), 1, atol=1e-5)


def test_a_shift_of_all_classes_is_an_offset() -> None:
    rng = np.random.default_rng(2)
    source, target = rng.normal(size=(1, 9, 9)).astype(np.float32), rng.normal(size=(9, 9)).astype(np.float32)
    np.testing.assert_allclose(FOUND.shift([[0.7] * CLASSES], source, target), 0.7, atol=1e-5)


@pytest.mark.parametrize("tissue", range(4))
def test_a_tissue_moves_by_its_shift_and_others_stay_even_those_alike_in_the_source(tissue: int) -> None:
    one, shifts = CASES[0], shift_of(tissue, 0.5)
    added = FOUND.shift(shifts, one.source, one.target)[0]
    for other in range(4):
        moved = added[3:-3, 5 * other : 5 * other + 5].mean()
        assert moved == pytest.approx(0.5 if other == tissue else 0.0, abs=0.05)


@pytest.mark.parametrize(("patch", "slices"), [((16, 16), 1), ((16, 16), 3), ((16, 16, 8), 1)])
@pytest.mark.parametrize("sources", [1, 2])
def test_only_the_source_inside_the_mask_changes(patch: tuple[int, ...], slices: int, sources: int) -> None:
    cases = [case(3, sources)]
    classes = find_classes(cases, 0)
    shifts = tuple(tuple(row) for row in np.random.default_rng(0).normal(size=(sources, CLASSES)).tolist())
    still = place(gain=(1.0,) * sources, offset=(0.0,) * sources)
    before, after = (
        take_batch(cases, [one], patch=patch, slices=slices, variation=Variation(classes))
        for one in (still, replace(still, shifts=shifts))
    )
    for name in ("target", "mask", "lesion"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    moved = (after.source - before.source).numpy()
    inside = np.broadcast_to(before.mask.numpy(), moved.shape)
    assert (moved[~inside] == 0).all() and (np.abs(moved[inside]) > 1e-3).mean() > 0.9
    assert len({round(float(np.abs(channel).mean()), 4) for channel in moved[0]}) > 1 or moved.shape[1] == 1


def test_each_slice_of_2_5d_is_shifted_by_its_own_target() -> None:
    shifts = (tuple(np.random.default_rng(4).normal(size=CLASSES).tolist()),)
    three = take_batch(CASES, [place(shifts=shifts)], patch=(16, 16), slices=3, variation=Variation(FOUND))
    for channel, k in enumerate((4, 5, 6)):
        one = take_batch(
            CASES, [place(shifts=shifts, centre=(12, 10, k))], patch=(16, 16), slices=1, variation=Variation(FOUND)
        )
        np.testing.assert_array_equal(three.source[:, channel], one.source[:, 0])


def test_shifts_are_drawn_in_their_share_and_leave_the_places_alone() -> None:
    def draw(share: float) -> list[Place]:
        sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, class_share=share)
        lesions: list[NDArray[np.int32]] = [np.empty((0, 3), np.int32)] * 2
        return draw_places(CASES, lesions, sampling, count=400, rng=np.random.default_rng(5))

    without, half = draw(0.0), draw(0.5)
    assert half == draw(0.5) != without
    assert [replace(one, shifts=None) for one in half] == without
    assert np.mean([one.shifts is not None for one in half]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("other", [{"data.histogram": True}, {"data.task": "super-resolution", "data.target": "t1"}])
def test_shifts_of_classes_are_refused_where_a_network_would_see_through_them(other: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"training\.class_share"):
        make_recipe("l2", "tiny", {**other, "training.class_share": 0.5})
