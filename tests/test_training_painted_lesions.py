"""Lesions painted into patches of real cases: where physics says, in source and target alike, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiasm.boxes import box_of
from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import read_plan
from chiasm.training import painted_lesions
from chiasm.training.batches import Place, Sampling, Variation, draw_places, take_batch
from chiasm.training.painted_lesions import COMPARTMENTS, Block, LesionPainter, make_painter, paint
from chiasm.training.players import check_players, varied_shares
from chiasm.volumes import Geometry
from chiasm.volumes.masks import Rule

SHAPE = (64, 60, 24)
FLUID, WHITE = {"t1": -2.0, "t2": 3.0}, {"t1": 1.0, "t2": -0.5}
EVEN = LesionPainter(("t1", "t2"), np.array([[[-2.0, 1.0], [3.0, -0.5]]], np.float32), (2.0, 2.0, 2.0))


def block(value: float = 1.0, shape: tuple[int, ...] = SHAPE) -> Block:
    """White matter, or some way from fluid to it, inside a box."""
    mask = np.zeros(shape, bool)
    mask[4:-4, 4:-4, 4:-4] = True
    images = (FLUID[name] + value * (WHITE[name] - FLUID[name]) for name in ("t1", "t2"))
    source, target = (np.where(mask, level, 0).astype(np.float32) for level in images)
    return Block(source[None], target, mask, np.zeros(shape, bool))


def levels(image: np.ndarray, name: str) -> np.ndarray:
    return (image - FLUID[name]) / (WHITE[name] - FLUID[name])


@pytest.fixture
def unvaried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lesions as bright as physics says, with nothing of the tissue left, always with a core."""
    for name in ("VARIETY", "TEXTURE", "KEPT"):
        monkeypatch.setattr(painted_lesions, name, 0.0)
    monkeypatch.setattr(painted_lesions, "SOLID", (0.6, 0.7))


@pytest.mark.usefixtures("unvaried")
def test_compartments_are_as_bright_as_a_protocol_shows_them_in_both_images_at_once() -> None:
    """T1 of oedema lies 0.70 to 0.88 of the way from fluid to white matter, of fluid 0.15 to 0.33; T2 0.43 to 0.46."""
    expected = [[painted_lesions.levels_of(name, site) for name in ("t1", "t2")] for site in range(4)]
    bounds = {"oedema": ((0.69, 0.89), (0.42, 0.47)), "fluid": ((0.14, 0.34), (0.13, 0.20))}
    for name, ranges in bounds.items():
        for image, (low, high) in enumerate(ranges):
            assert all(low < site[image][COMPARTMENTS.index(name)] < high for site in expected)
    for seed in range(12):
        made = paint(EVEN, 0, block(), (2.0, 2.0, 2.0), seed)
        pairs = np.stack([levels(made.source[0], "t1"), levels(made.target, "t2")], axis=-1)[made.lesion]
        distance = np.abs(pairs[:, None, None] - np.swapaxes(expected, 1, 2)).max(axis=-1).min(axis=2)  # (n, sites)
        assert np.median(distance, axis=0).min() < 0.01  # most voxels are one compartment of one protocol


def test_nothing_outside_the_mask_and_far_from_the_lesion_changes() -> None:
    before = block()
    for seed in range(6):
        after = paint(EVEN, 0, before, (2.0, 2.0, 2.0), seed)
        changed = (after.source[0] != before.source[0]) | (after.target != before.target)
        assert changed.any() and not changed[~before.mask].any()
        assert (after.lesion <= before.mask).all() and (changed >= after.lesion).all()
        assert (before.mask & ~changed).any()
        np.testing.assert_array_equal(after.mask, before.mask)
    assert (before.source == block().source).all() and not before.lesion.any()  # what was given stays as it was


def test_a_lesion_that_is_painted_in_its_box_equals_one_painted_in_the_whole_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_box = paint(EVEN, 0, block(), (2.0, 2.0, 2.0), 3)
    boxes = []

    def whole(inside: np.ndarray) -> tuple[slice, ...]:
        boxes.append(box_of(inside))
        return tuple(slice(0, size) for size in inside.shape)

    monkeypatch.setattr(painted_lesions, "box_of", whole)
    everywhere = paint(EVEN, 0, block(), (2.0, 2.0, 2.0), 3)
    assert len(boxes) == 2 and all(in_box.mask[box].size < in_box.mask.size / 2 for box in boxes)
    for one, other in zip(in_box, everywhere):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_one_seed_paints_the_same_lesion_and_another_an_other() -> None:
    one, same, other = (paint(EVEN, 0, block(), (2.0, 2.0, 2.0), seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.source, same.source)
    np.testing.assert_array_equal(one.target, same.target)
    assert not np.array_equal(one.target, other.target)


@pytest.mark.usefixtures("unvaried")
def test_oedema_stays_out_of_fluid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        painted_lesions, "draw_shape", lambda shape, *_: np.stack([np.ones(shape), *np.zeros((3, *shape))])
    )
    csf, white = (paint(EVEN, 0, block(value), (2.0, 2.0, 2.0), 0) for value in (0.0, 1.0))
    assert not csf.lesion.any() and white.lesion.all(where=white.mask)
    np.testing.assert_allclose(csf.source, block(0.0).source, atol=1e-6)


def test_a_lesion_is_as_large_in_millimetres_on_any_grid() -> None:
    """A mean radius of 20 mm is about 34 ml; a coarser grid holds an eighth of the voxels."""
    fine = [paint(EVEN, 0, block(shape=(96, 96, 96)), (2.0,) * 3, seed).lesion.sum() * 8e-3 for seed in range(24)]
    coarse = [paint(EVEN, 0, block(shape=(48, 48, 48)), (4.0,) * 3, seed).lesion.sum() * 64e-3 for seed in range(24)]
    assert np.mean(coarse) == pytest.approx(np.mean(fine), rel=0.4)
    assert 15 < np.mean(fine) < 90


def case(seed: int = 0, channels: int = 1) -> PreparedCase:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, bool)
    mask[4:-4, 4:-4, 2:-2] = True
    images = np.where(mask, rng.normal(size=(channels + 1, *SHAPE)), 0).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, :30] = 1
    images[:, :, :30] += 50  # a lesion that would move any percentile
    images = images * mask
    return PreparedCase(f"c{seed}", "s", None, images[:-1], images[-1], mask, labels, Geometry(SHAPE, np.eye(4)))


def test_fluid_and_white_matter_are_looked_for_outside_labelled_lesions() -> None:
    """The 3rd and 80th percentile of normal numbers are -1.88 and 0.84, the 97th and 25th 1.88 and -0.67."""
    painter = make_painter([case(0), case(1)], ("T1", "t2"), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(painter.ends, [[[-1.88, 0.84], [1.88, -0.67]]] * 2, atol=0.05)


@pytest.mark.parametrize(("patch", "slices"), [((32, 32), 1), ((32, 32), 3), ((32, 32, 16), 1)])
def test_patches_are_painted_as_their_places_say(patch: tuple[int, ...], slices: int) -> None:
    cases = [case(0, 2)]
    variation = Variation(painter=make_painter(cases, ("t1", "flair", "t2"), (1.0, 1.0, 1.0)))
    still = Place(0, (40, 45, 12), False, (1.0, 1.0), (0.0, 0.0))
    before, after = (
        take_batch(cases, [one], patch=patch, slices=slices, variation=variation)
        for one in (still, replace(still, painted=5))
    )
    lesion = after.lesion & ~before.lesion
    assert lesion.any() and (after.mask == before.mask).all()
    for name in ("source", "target"):
        changed = (getattr(after, name) != getattr(before, name)).any(dim=1, keepdim=True)
        assert changed[lesion].all()


def test_painted_patches_come_in_their_share_and_leave_the_places_alone() -> None:
    def draw(share: float) -> list[Place]:
        sampling = Sampling(0.5, 0.25, augment=True, intensity_jitter=0.1, painted_share=share)
        return draw_places([case()], [np.empty((0, 3), np.int32)], sampling, count=400, rng=np.random.default_rng(5))

    without, half = draw(0.0), draw(0.5)
    assert half == draw(0.5)
    assert [replace(one, painted=None) for one in half] == without
    assert np.mean([one.painted is not None for one in half]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("changes", [{"data.sources": ("ct",)}, {"data.target": "pet"}])
def test_modalities_whose_lesions_are_not_known_are_refused(changes: dict[str, object]) -> None:
    asked = make_recipe("l2", "tiny", {**changes, "training.painted_share": 0.5})
    with pytest.raises(RecipeError, match="t1, t1ce, t2, flair"):
        check_players(asked)
    check_players(make_recipe("l2", "tiny", changes))
    with pytest.raises(ValueError, match="t1, t1ce, t2, flair, not"):
        make_painter([case()], (*asked.data.sources, asked.data.target), (1.0, 1.0, 1.0))


def test_ranks_which_would_not_change_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"training\.painted_share.*histogram"):
        make_recipe("l2", "tiny", {"data.histogram": True, "training.painted_share": 0.5})


ALL_AUTO = {f"training.{name}_share": "auto" for name in ("class", "painted", "simulated", "shaded")}


@pytest.mark.parametrize(
    ("changes", "mask_rule", "why"),
    [
        ({}, "nonzero", "all among t1, t1ce, t2, flair"),
        ({}, "body", "cut out"),
        ({"data.target": "pet"}, "nonzero", "t1, t1ce, t2, flair alone"),
        ({"data.histogram": True}, "nonzero", "ranks"),
        ({"data.task": "super-resolution", "data.target": "t1"}, "nonzero", "one contrast"),
        ({"generator.network": "unet", **ALL_AUTO}, "nonzero", "papers"),
    ],
)
def test_size_small_varies_half_of_the_patches_where_that_was_measured(
    changes: dict[str, object], mask_rule: Rule, why: str, finished_run: Path
) -> None:
    recipe = make_recipe("l2", "small", changes)
    target = "pet" if recipe.data.target == "pet" else "t2"
    plan = replace(read_plan(finished_run / "plan.toml"), target=target, mask_rule=mask_rule)
    shares = varied_shares(recipe, plan)
    expected = 0.5 if why.startswith("all") else 0.0
    assert shares[:4] == (expected, expected, expected / 2, expected) and why in shares.reason
    plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"class_share": 0.25})})
    assert varied_shares(plain, plan).classes == 0.25
    tiny = make_recipe("l2", "tiny", {name: value for name, value in changes.items() if name not in ALL_AUTO})
    assert varied_shares(tiny, plan) == (0.0, 0.0, 0.0, 0.0, "")
