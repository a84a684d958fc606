"""Patches: drawn alike from one seed, cut right, augmented together, transplanted with their labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chiasm.preparation.arrays import PreparedCase
from chiasm.training.batches import Place, Sampling, draw_places, lesion_voxels, take_batch
from chiasm.volumes import Geometry

SHAPE = (40, 36, 12)


def case(seed: int, lesion: bool = True, channels: int = 1) -> PreparedCase:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, bool)
    mask[4:-4, 4:-4, 1:-1] = True
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:16, 20:25, 4:8] = 2
    source = np.where(mask, rng.normal(size=(channels, *SHAPE)), 0).astype(np.float32)
    target = np.where(mask, rng.normal(size=SHAPE) + 5 * (labels > 0), 0).astype(np.float32)
    return PreparedCase(
        f"c{seed}", f"s{seed}", None, source, target, mask, labels if lesion else None, Geometry(SHAPE, np.eye(4))
    )


CASES = [case(0), case(1), case(2, lesion=False)]
LESIONS = lesion_voxels(CASES)


RANKED = [replace(one, source=np.concatenate([one.source, one.source / 2]), histogram=True) for one in CASES]


def draw(count: int, seed: int = 0, **changes: object) -> list[Place]:
    settings = {"body_share": 0.5, "lesion_share": 0.25, "augment": True, "intensity_jitter": 0.1} | changes
    difficulty = settings.pop("difficulty", None)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    return draw_places(CASES, LESIONS, sampling, count=count, rng=rng, difficulty=difficulty)  # type: ignore[arg-type]


def plain(**changes: object) -> Place:
    return Place(**({"case": 0, "centre": (12, 22, 6), "flip": False, "gain": (1.0,), "offset": (0.0,)} | changes))  # type: ignore[arg-type]


def test_one_seed_draws_the_same_places_and_another_others() -> None:
    assert draw(20, 1) == draw(20, 1) != draw(20, 2)


def test_places_fall_where_their_shares_say() -> None:
    places = draw(4000)
    on_lesion = np.mean([CASES[p.case].labels is not None and CASES[p.case].labels[p.centre] > 0 for p in places])
    in_mask = np.mean([bool(CASES[p.case].mask[p.centre]) for p in places])
    assert on_lesion == pytest.approx(0.25 + 0.5 * 0.02, abs=0.03)
    assert in_mask == pytest.approx(0.75 + 0.25 * CASES[0].mask.mean(), abs=0.03)
    assert not any(CASES[p.case].labels is None for p in draw(50, body_share=0.0, lesion_share=1.0))
    assert np.mean([p.flip for p in places]) == pytest.approx(0.5, abs=0.05)
    assert not any(p.flip or p.gain != (1.0,) or p.offset != (0.0,) for p in draw(50, augment=False))


def test_a_source_with_a_unit_is_neither_jittered_nor_shaded() -> None:
    two = [case(seed, channels=2) for seed in range(3)]
    sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, shaded_share=1.0, varied=(0.0, 1.0))
    for place in draw_places(two, LESIONS, sampling, count=20, rng=np.random.default_rng(0)):
        assert (place.gain[0], place.offset[0]) == (1.0, 0.0) and place.gain[1] != 1.0 and place.offset[1] != 0.0
        assert place.shading is not None and place.shading[0][0] == 0.0 and place.shading[1][0] != 0.0


@pytest.mark.parametrize(("patch", "slices"), [((16, 16), 1), ((16, 16), 3), ((16, 16, 8), 1)])
def test_a_patch_is_what_lies_there(patch: tuple[int, ...], slices: int) -> None:
    batch = take_batch(CASES, [plain()], patch=patch, slices=slices)
    box = (slice(4, 20), slice(14, 30))
    flat = len(patch) == 2
    middle = CASES[0].source[0][(*box, 6)] if flat else CASES[0].source[0][(*box, slice(2, 10))]
    target = CASES[0].target[(*box, 6)] if flat else CASES[0].target[(*box, slice(2, 10))]
    np.testing.assert_array_equal(batch.source[0, slices // 2], middle)
    np.testing.assert_array_equal(batch.target[0, 0], target)
    assert batch.source.shape[1] == slices and batch.lesion.any()
    if slices == 3:
        np.testing.assert_array_equal(batch.source[0, 0], CASES[0].source[0][(*box, 5)])


def test_a_flip_turns_everything_together_and_jitter_leaves_the_outside_alone() -> None:
    straight = take_batch(CASES, [plain()], patch=(32, 32), slices=3)
    flipped = take_batch(CASES, [plain(flip=True, gain=(2.0,), offset=(0.5,))], patch=(32, 32), slices=3)
    for a, b in zip(straight[1:], flipped[1:]):
        assert (a.flip(2) == b).all()
    inside = flipped.mask[0, 0]
    np.testing.assert_allclose(flipped.source[0, 1][inside], straight.source[0, 1].flip(0)[inside] * 2 + 0.5, rtol=1e-6)
    assert (flipped.source[0, 1][~inside] == 0).all()


def test_a_patch_larger_than_its_case_is_filled_up_with_invalid_voxels() -> None:
    batch = take_batch(CASES, [plain()], patch=(64, 64), slices=1)
    assert (
        batch.source.shape == (1, 1, 64, 64) and not batch.mask[0, 0, 40:].any() and not batch.mask[0, 0, :, 36:].any()
    )
    np.testing.assert_array_equal(batch.target[0, 0, :40, :36], CASES[0].target[..., 6])


def test_each_modality_has_its_own_gain_and_neighbouring_slices_share_it() -> None:
    two = [case(5, channels=2)]
    place = plain(gain=(2.0, 0.5), offset=(1.0, -1.0))
    straight = take_batch(two, [plain(gain=(1.0, 1.0), offset=(0.0, 0.0))], patch=(16, 16), slices=3)
    jittered = take_batch(two, [place], patch=(16, 16), slices=3)
    for first, gain, offset in ((0, 2.0, 1.0), (3, 0.5, -1.0)):
        inside = (straight.source[0, first : first + 3] != 0).numpy()  # air is exactly zero, noise never is
        a, b = (batch.source[0, first : first + 3].numpy() for batch in (straight, jittered))
        np.testing.assert_allclose(b, np.where(inside, a * gain + offset, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(straight.source[0, 4], two[0].source[1][4:20, 14:30, 6])


@pytest.mark.parametrize("patch", [(16, 16), (16, 16, 8)])
def test_jitter_never_touches_a_voxel_outside_the_mask(patch: tuple[int, ...]) -> None:
    edge = plain(centre=(0, 0, 2), gain=(3.0,), offset=(7.0,))
    batch = take_batch(CASES, [edge], patch=patch, slices=1)
    assert batch.mask.any() and not batch.mask.all()
    assert (batch.source[~batch.mask] == 0).all() and (batch.target[~batch.mask] == 0).all()


def test_a_flip_turns_a_3d_patch_left_to_right_alone() -> None:
    straight, flipped = (
        take_batch(CASES, [plain(flip=flip, centre=(9, 22, 6))], patch=(16, 16, 8), slices=1) for flip in (False, True)
    )
    for a, b in zip(straight, flipped):
        assert (a.flip(2) == b).all() and not (a == b).all()


def test_a_3d_patch_larger_than_its_case_is_filled_up_with_invalid_voxels() -> None:
    batch = take_batch(CASES, [plain(offset=(4.0,))], patch=(48, 40, 16), slices=1)
    assert batch.source.shape == (1, 1, 48, 40, 16)
    assert not batch.mask[..., 12:].any() and (batch.source[~batch.mask] == 0).all()
    np.testing.assert_array_equal(batch.mask[0, 0, :40, :36, :12], CASES[0].mask)


def test_lesion_voxels_are_thinned_to_no_more_than_asked() -> None:
    count = len(LESIONS[0])
    assert count == 6 * 5 * 4 and len(LESIONS[2]) == 0
    for most in (count, count - 1, 50, 7):
        voxels = lesion_voxels(CASES, most)[0]
        assert most / 2 <= len(voxels) <= most
        assert all(CASES[0].labels[tuple(voxel)] > 0 for voxel in voxels)  # type: ignore[index]


def test_a_transplant_carries_both_contrasts_and_its_label_with_a_soft_rim() -> None:
    away = (30, 12, 6)
    own = take_batch(CASES, [plain(case=2, centre=away)], patch=(16, 16), slices=1)
    given = take_batch(CASES, [plain(case=2, centre=away, donor=(1, (12, 22, 6)))], patch=(16, 16), slices=1)
    donor = take_batch(CASES, [plain(case=1, centre=(12, 22, 6))], patch=(16, 16), slices=1)
    assert not own.lesion.any() and given.lesion.any()
    core = (donor.lesion & (given.lesion))[0, 0].numpy()
    core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    share = (given.target - own.target)[0, 0] / (donor.target - own.target)[0, 0]
    assert core.any() and share.numpy()[core].min() > 0.6
    np.testing.assert_allclose(given.target[0, 0, 0], own.target[0, 0, 0], atol=1e-3)  # nothing changes far away
    assert (given.mask == own.mask).all() and (given.source[~given.mask] == 0).all()


def test_transplants_come_from_other_cases_and_leave_the_draw_of_places_alone() -> None:
    without, with_them = draw(300), draw(300, transplant_share=0.5)
    assert [p.centre for p in without] == [p.centre for p in with_them]
    donors = [(p.case, p.donor[0]) for p in with_them if p.donor is not None]
    assert len(donors) == pytest.approx(150, abs=40) and all(a != b and b != 2 for a, b in donors)


def test_cases_with_ranks_are_met_at_the_same_places_with_the_same_jitter() -> None:
    for share in (0.0, 0.5):
        sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, transplant_share=share)
        plain, ranked = (
            draw_places(cases, LESIONS, sampling, count=50, rng=np.random.default_rng(3)) for cases in (CASES, RANKED)
        )
        assert plain == ranked


@pytest.mark.parametrize(("patch", "slices"), [((32, 32), 1), ((32, 32), 3), ((32, 32, 8), 1)])
def test_jitter_moves_intensities_and_leaves_ranks_alone(patch: tuple[int, ...], slices: int) -> None:
    count = slices if len(patch) == 2 else 1
    place = plain(gain=(2.0,), offset=(0.5,), donor=(1, (12, 22, 5)))
    still, moved = (
        take_batch(RANKED, [one], patch=patch, slices=slices)
        for one in (replace(place, gain=(1.0,), offset=(0.0,)), place)
    )
    without = take_batch(CASES, [place], patch=patch, slices=slices)
    assert moved.source.shape[1] == 2 * count
    np.testing.assert_array_equal(moved.source[:, :count], without.source)
    np.testing.assert_array_equal(moved.source[:, count:], still.source[:, count:])
    np.testing.assert_allclose(still.source[:, count:], still.source[:, :count] / 2, atol=1e-6)
    assert not (moved.source[:, :count] == still.source[:, :count]).all()


def test_donors_come_in_proportion_to_how_hard_their_lesions_are() -> None:
    four = [case(0), case(1), case(2), case(3, lesion=False)]
    lesions = lesion_voxels(four)

    def donors(difficulty: list[float] | None) -> list[float]:
        sampling = Sampling(1.0, 0.0, augment=False, intensity_jitter=0.0, transplant_share=1.0)
        places = draw_places(four, lesions, sampling, count=6000, rng=np.random.default_rng(0), difficulty=difficulty)
        assert all(place.donor is not None and place.donor[0] != place.case for place in places)
        found = [place.donor[0] for place in places if place.donor and place.case == 3]
        return [found.count(index) / len(found) for index in range(4)]

    assert donors(None) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.05)
    assert donors([0.2, 0.2, 0.2, 0.9]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.05)
    assert donors([0.1, 0.3, 0.6, 0.9]) == pytest.approx([0.1, 0.3, 0.6, 0], abs=0.05)


def test_difficult_transplants_meet_the_same_patches_as_random_ones() -> None:
    random, difficult = draw(40, transplant_share=0.5), draw(40, transplant_share=0.5, difficulty=[0.1, 0.9, 0.5])
    assert [replace(place, donor=None) for place in random] == [replace(place, donor=None) for place in difficult]
    assert random != difficult


@pytest.mark.parametrize("patch", [(16, 16), (16, 16, 8)])
def test_a_change_of_gain_reaches_a_target_that_shares_the_sources_scale(patch: tuple[int, ...]) -> None:
    same = replace(CASES[0], target=CASES[0].source[0], own=0)
    batch = take_batch([same], [plain(gain=(1.3,), offset=(0.2,), flip=True)], patch=patch, slices=1)
    np.testing.assert_allclose(batch.target[batch.mask], batch.source[batch.mask], atol=1e-6)
    assert not batch.target[~batch.mask].any()
    before = take_batch([same], [plain(flip=True)], patch=patch, slices=1)
    np.testing.assert_allclose(batch.target[batch.mask], 1.3 * before.target[batch.mask] + 0.2, rtol=1e-5)
    other = take_batch([replace(same, own=None)], [plain(gain=(1.3,), offset=(0.2,))], patch=patch, slices=1)
    unchanged = take_batch([replace(same, own=None)], [plain()], patch=patch, slices=1)
    np.testing.assert_array_equal(other.target, unchanged.target)  # of another modality: as it was
