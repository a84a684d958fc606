"""Patches of simulated patients: tumours that follow a case's own anatomy, and a contrast that each draws anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.preparation.arrays import PreparedCase
from chiasm.simulation.anatomy import AIR, CSF, GM, WM
from chiasm.training import grown_lesions, simulated_patches
from chiasm.training.batches import Batch, Place, Sampling, Variation, draw_places, take_batch
from chiasm.training.grown_lesions import LESIONS, GrownLesion, grow_lesions, tissue_fractions
from chiasm.training.painted_lesions import LesionPainter, levels_of, make_painter
from chiasm.training.players import check_players
from chiasm.volumes import Geometry

SHAPE = (60, 56, 40)
SPACING = (2.0, 2.0, 2.0)
HALF = (1.0, 1.0, 1.0)  # coarse voxels to one of a case at 2 mm
PAINTER = LesionPainter(("t1", "t2"), np.array([[[-2.0, 1.0], [3.0, -0.5]]], np.float32), SPACING)


def case() -> PreparedCase:
    """Fluid for I below 16, grey matter from I = 40 on, white matter between; a labelled lesion in a corner."""
    mask = np.zeros(SHAPE, bool)
    mask[4:-4, 4:-4, 4:-4] = True
    level = np.ones(SHAPE)
    level[:16], level[40:] = 0.0, 0.77
    images = [np.where(mask, fluid + level * (white - fluid), 0) for fluid, white in PAINTER.ends[0]]
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:10, 4:10, 4:10] = 1
    t1, t2 = np.asarray(images, np.float32)
    return PreparedCase("c", "s", None, t1[None], t2, mask, labels, Geometry(SHAPE, np.eye(4)))


@pytest.fixture(scope="module")
def grown() -> list[list[GrownLesion]]:
    return grow_lesions([case()], PAINTER, 3)


def test_fractions_are_the_tissues_that_all_images_show() -> None:
    made = tissue_fractions(case(), PAINTER, 0, HALF)
    assert made.shape[:3] == SHAPE
    np.testing.assert_allclose(made.sum(axis=-1), 1, atol=1e-5)
    for tissue, planes in ((CSF, slice(11, 15)), (WM, slice(18, 38)), (GM, slice(42, 54))):
        assert (made[planes, 12:40, 12:28, tissue] > 0.75).all()
    assert (made[:3, ..., AIR] == 1).all() and (made[5:9, 5:9, 5:9, AIR] == 1).all()  # outside, and what is labelled


def test_tumours_grow_in_white_matter_and_stop_at_fluid(grown: list[list[GrownLesion]]) -> None:
    assert [len(lesions) for lesions in grown] == [LESIONS]
    whole = np.mean([lesion.shares.sum(axis=0) for lesion in grown[0]], axis=0)
    assert whole[18:38, 8:-8, 8:-8].mean() > 20 * whole[:14].mean()
    for lesion in grown[0]:
        assert (lesion.shares >= 0).all() and lesion.shares.sum(axis=0).max() < 1 + 1e-5
        i, j, k = lesion.centres.T
        assert len(i) > 100 and (lesion.shares.sum(axis=0)[i, j, k] > 0.5).all()


def test_of_many_cases_some_are_simulated_patients_and_stand_in_for_the_others(
    grown: list[list[GrownLesion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grown_lesions, "MOST_CASES", 1)
    assert [len(some) for some in grow_lesions([case()] * 2, replace(PAINTER, ends=PAINTER.ends.repeat(2, 0)), 3)] == [
        LESIONS,
        0,
    ]
    sampling = Sampling(1.0, 0.0, augment=True, intensity_jitter=0.1, simulated_share=1.0)
    rng = np.random.default_rng(5)
    none: np.ndarray = np.empty((0, 3), np.int32)
    places = draw_places([case()] * 2, [none] * 2, sampling, count=40, rng=rng, grown=[grown[0], []])
    assert {one.case for one in places} == {0} and all(one.simulated is not None for one in places)


def test_one_seed_grows_the_same_tumours_and_another_others(grown: list[list[GrownLesion]]) -> None:
    same, other = grow_lesions([case()], PAINTER, 3), grow_lesions([case()], PAINTER, 4)
    np.testing.assert_array_equal(same[0][0].shares, grown[0][0].shares)
    np.testing.assert_array_equal(same[0][0].centres, grown[0][0].centres)
    assert not np.array_equal(other[0][0].shares, grown[0][0].shares)


def test_shares_are_interpolated_as_scipy_does() -> None:
    shares = np.random.default_rng(0).random((4, 9, 8, 7)).astype(np.float32) / 4
    lesion = GrownLesion(shares, (0.5, 0.5, 1.25), np.zeros((1, 3), np.int32))
    axes = (np.arange(3, 12), np.arange(0, 15), np.array([0, 0, 1, 2, 3]))
    places = np.meshgrid(*(voxels * step for voxels, step in zip(axes, lesion.steps)), indexing="ij")
    expected = [map_coordinates(one, places, order=1) for one in shares]
    np.testing.assert_allclose(lesion.at(axes), expected, atol=1e-6)
    np.testing.assert_allclose(lesion.at(axes, (2, 0, 1)), np.moveaxis(expected, -1, 1), atol=1e-6)  # slices first


def patches(places: list[Place], grown: list[list[GrownLesion]], patch: tuple[int, ...], slices: int) -> Batch:
    return take_batch([case()], places, patch=patch, slices=slices, variation=Variation(None, PAINTER, grown))


@pytest.mark.parametrize(("patch", "slices"), [((32, 32), 1), ((32, 32), 3), ((32, 32, 16), 1), ((80, 80), 3)])
def test_the_target_stays_the_patients_own_beyond_the_tumour(
    patch: tuple[int, ...], slices: int, grown: list[list[GrownLesion]]
) -> None:
    i, j, k = np.median(grown[0][0].centres, axis=0).astype(int).tolist()
    still = Place(0, (i, j, k), False, (1.0,), (0.0,))
    before, after = (patches([one], grown, patch, slices) for one in (still, replace(still, simulated=(0, 5))))
    tumour = after.lesion & ~before.lesion
    changed = after.target != before.target
    assert tumour.any() and changed[tumour].all() and not changed[~before.mask].any()
    assert (before.mask & ~changed).any() and (after.mask == before.mask).all()
    moved = (after.source != before.source).any(dim=1, keepdim=True)
    assert moved[before.mask].float().mean() > 0.9  # the scanner's own shading and noise
    assert not after.source[:, slices // 2 if len(patch) == 2 else 0][~after.mask[:, 0]].any()


def test_each_patch_draws_a_contrast_of_its_own(grown: list[list[GrownLesion]]) -> None:
    """Over many patches the tumour is as bright as physics says on average, and differs by the spread between them."""
    lesion = grown[0][2]  # of one solid compartment
    i, j, k = np.median(lesion.centres, axis=0).astype(int).tolist()
    places = [Place(0, (i, j, k), False, (1.0,), (0.0,), simulated=(2, seed)) for seed in range(60)]
    made = patches(places, grown, (16, 16), 1)
    levels = [((one[there] - 3.0) / -3.5).mean().item() for one, there in zip(made.target, made.lesion) if there.any()]
    assert len(levels) == 60
    assert 0.2 < np.mean(levels) < 0.8
    assert 0.1 < np.std(levels) < 0.4
    again = patches(places, grown, (16, 16), 1)
    assert (again.source == made.source).all() and (again.target == made.target).all()


def test_without_spread_a_tumour_is_as_bright_as_a_protocol_shows_it(
    grown: list[list[GrownLesion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SPREAD": 0.0, "SHARED_SPREAD": 0.0, "TEXTURE": (0.0, 0.0), "KEPT": (0.0, 0.0)}.items():
        monkeypatch.setattr(simulated_patches, name, value)
    lesion = grown[0][2]
    i, j, k = lesion.centres[lesion.shares[1, *lesion.centres.T].argmax()].tolist()
    made = patches([Place(0, (i, j, k), False, (1.0,), (0.0,), simulated=(2, 1))], grown, (16, 16), 1)
    level = (made.target[0, 0, 8, 8].item() - 3.0) / -3.5
    assert min(abs(level - levels_of("t2", site)[1]) for site in range(4)) < 0.01  # of the solid core


def test_simulated_patients_come_in_their_share_and_leave_other_places_alone(grown: list[list[GrownLesion]]) -> None:
    def draw(share: float) -> list[Place]:
        sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, painted_share=0.5, simulated_share=share)
        rng = np.random.default_rng(5)
        return draw_places([case()], [np.empty((0, 3), np.int32)], sampling, count=400, rng=rng, grown=grown)

    without, half = draw(0.0), draw(0.5)
    assert half == draw(0.5)
    assert [one for one in half if one.simulated is None] == [
        plain for plain, one in zip(without, half) if one.simulated is None
    ]
    patients = [one for one in half if one.simulated is not None]
    assert len(patients) / 400 == pytest.approx(0.5, abs=0.08)
    assert all(one.shifts is not None and one.painted is None and one.donor is None for one in patients)
    on_tumour = [(np.array(one.centre) == grown[0][one.simulated[0]].centres).all(axis=1).any() for one in patients]
    assert np.mean(on_tumour) > 0.6


@pytest.mark.parametrize("changes", [{"data.sources": ("ct",)}, {"data.target": "pet"}])
def test_patients_of_other_modalities_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"training\.simulated_share.*t1, t1ce, t2, flair"):
        check_players(make_recipe("l2", "tiny", {**changes, "training.simulated_share": 0.5}))


def test_ranks_which_would_not_change_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"training\.simulated_share.*histogram"):
        make_recipe("l2", "tiny", {"data.histogram": True, "training.simulated_share": 0.5})


def test_a_painter_of_real_cases_knows_their_fluid_and_white_matter() -> None:
    painter = make_painter([case()], ("t1", "t2"), SPACING)
    np.testing.assert_allclose(painter.ends, PAINTER.ends, atol=1e-3)
