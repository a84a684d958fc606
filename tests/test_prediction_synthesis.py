"""Whole volumes: units, background, warnings and position, with networks whose answer is known."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import RecipeError, VolumeError
from chiasm.methods import make_recipe
from chiasm.networks.catalogue import make_network
from chiasm.networks.discriminators import LocalDiscriminator, LocalLogits
from chiasm.networks.generator import ResidualGenerator
from chiasm.prediction import passes, synthesis, tiling
from chiasm.prediction.calibration import Calibration
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model, load_model, make_generator, make_local_discriminator, make_refiner
from chiasm.prediction.passes import Networks, synthesise_prepared
from chiasm.prediction.seams import seam_of
from chiasm.prediction.synthesis import Synthesis, synthesise
from chiasm.prediction.tiling import Tile
from chiasm.prediction.windows import window_weights
from chiasm.preparation.arrays import prepare_source
from chiasm.preparation.degradation import Axis, Degradation, degrade, interpolated, simulated, thin_grid
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.plan import Plan
from chiasm.recipe import Average
from chiasm.volumes import Geometry, Volume, resample, same_grid
from conftest import QUICK
from synthetic_cohort import affine, body, pair

ENGINE = Engine(torch.device("cpu"), "32-true")


class Given(nn.Module):
    """A generator that answers with a function of the first source channel."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, source: Tensor) -> Tensor:
        return self.answer(source[:, :1])


class Doubtful(nn.Module):
    """A local discriminator with the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, images: Tensor) -> LocalLogits:
        flat = torch.full_like(images[:, :1], self.logit)
        return LocalLogits(flat, flat, flat)


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Model:
    """The networks are replaced by known ones; "identity" of raw values, apart from the scale."""
    trained = load_model(finished_run)
    plan = replace(trained.plan, target_reference=IntensityMap("zscore", (100.0, 150.0), (0.0, 1.0)), slices=1)
    plan = replace(plan, target_range=(0.0, 400.0), target_unit="a.u.", target_background=0.0)
    return replace(
        trained, plan=plan, generator=Given(lambda x: 0 * x + 2), local_discriminator=Doubtful(0.0), error_scale=0.5,
        calibration=None,
    )  # fmt: skip


def volume(array: NDArray[np.float32] | None = None, matrix: NDArray[np.float64] | None = None) -> Volume:
    array = pair(1)[0] if array is None else array
    i, j, k = array.shape
    return Volume(array, Geometry((i, j, k), affine() if matrix is None else matrix))


def made(model: Model, source: Volume | None = None, mask: Volume | None = None) -> Synthesis:
    return synthesise(model, [volume() if source is None else source], mask=mask, engine=ENGINE)


def hounsfield(model: Model) -> Model:
    window = (-1000.0, 2000.0)
    plan = replace(
        model.plan,
        target="ct",
        target_kind="hu",
        target_unit="HU",
        target_range=window,
        target_reference=IntensityMap("hu", window, (-1.0, 1.0)),
        target_background=-1000.0,
    )
    return replace(model, plan=plan)


def test_predictions_come_out_in_target_units_and_background_outside_the_mask(model: Model) -> None:
    found = made(model)
    inside = found.mask.array
    assert 0.2 < inside.mean() < 0.8
    np.testing.assert_allclose(found.image.array[inside], 100 + 2 * 50, rtol=1e-6)
    assert (found.image.array[~inside] == 0).all()


def test_hounsfield_units_are_clipped_to_the_window_and_air_lies_outside_the_mask(model: Model) -> None:
    for answer, value in ((-9.0, -1000.0), (9.0, 2000.0), (0.5, 1250.0)):
        found = made(replace(hounsfield(model), generator=Given(lambda x, answer=answer: 0 * x + answer)))  # type: ignore[misc]
        np.testing.assert_allclose(found.image.array[found.mask.array], value, rtol=1e-6)
        assert (found.image.array[~found.mask.array] == -1000).all()


def test_the_expected_error_is_the_score_times_the_slope_of_the_targets_units(model: Model) -> None:
    """-s log sigmoid(0) = 0.5 ln 2; one normalised unit is 50 raw ones, or 1500 HU where 3000 HU become 2."""
    for one, slope in ((model, 50.0), (hounsfield(model), 1500.0)):
        found = made(one)
        assert found.expected_error is not None
        np.testing.assert_allclose(found.expected_error.array[found.mask.array], 0.5 * np.log(2) * slope, rtol=1e-5)
        assert (found.expected_error.array[~found.mask.array] == 0).all()


def test_a_calibrated_map_is_the_expected_error_in_target_units(model: Model) -> None:
    score = 0.5 * np.log(2)
    calibration = Calibration((0.0, 2 * score), (0.0, 0.8), ("a",), 5000, 0.4)
    found = made(replace(model, calibration=calibration))
    assert found.expected_error is not None
    np.testing.assert_allclose(found.expected_error.array[found.mask.array], 0.4 * 50, rtol=1e-5)


def test_warnings_say_what_a_reader_must_know(model: Model) -> None:
    good = Calibration((0.0, 1.0), (0.0, 1.0), ("a",), 5000, 0.4)
    assert made(replace(model, calibration=good)).warnings == ()
    for changed, told in (
        (model, "not calibrated"),
        (replace(model, calibration=replace(good, spearman=-0.2)), "do not use it"),
        (replace(model, calibration=replace(good, spearman=0.0)), "do not use it"),
        (replace(model, local_discriminator=None), "no local discriminator"),
    ):
        found = made(changed)
        assert len(found.warnings) == 1 and told in found.warnings[0]
        assert (found.expected_error is None) == (changed.local_discriminator is None)
    odd = made(replace(model, calibration=good), volume(matrix=affine((4.0, 4.0, 9.0))))
    assert "out of distribution" in odd.warnings[0]


def test_nothing_outside_the_mask_dims_the_rim_of_a_coarser_prediction(model: Model) -> None:
    """Invariant: a network that says one number everywhere says it everywhere on the source's grid."""
    coarse = replace(model, plan=replace(model.plan, spacing_mm=(2.3, 2.1, 4.0)))
    found = made(coarse)
    inside = found.mask.array
    np.testing.assert_allclose(found.image.array[inside], 200, rtol=1e-4)
    assert found.expected_error is not None
    np.testing.assert_allclose(found.expected_error.array[inside], 25 * np.log(2), rtol=1e-4)
    overlap = 2 * (inside & body()).sum() / (inside.sum() + body().sum())
    assert overlap > 0.9


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 3.0), (2.0, 2.0, 3.0), (1.7, 2.3, 4.1)])
def test_a_blob_stays_where_it_is_at_a_coarser_spacing(spacing: tuple[float, float, float], model: Model) -> None:
    shape = (36, 40, 12)
    steps = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    centre = np.array([14.0, 23.0, 5.5])
    distance = sum(((step - c) * mm) ** 2 for step, c, mm in zip(steps, centre, (1, 1, 3)))
    blob = np.exp(-distance / (2 * 5.0**2)).astype(np.float32)
    array = (100 + 900 * blob).astype(np.float32) + np.random.default_rng(0).normal(size=shape).astype(np.float32) * 5
    mask = volume(np.ones(shape, np.uint8))  # type: ignore[arg-type]
    one = replace(model, plan=replace(model.plan, spacing_mm=spacing), generator=Given(lambda x: x))
    image = made(one, volume(array), mask).image.array
    strength = np.clip(image - np.quantile(image, 0.85), 0, None)
    expected = np.clip(array - np.quantile(array, 0.85), 0, None)
    places = [(a * np.stack(steps)).sum((1, 2, 3)) / a.sum() for a in (strength, expected)]
    np.testing.assert_allclose(*places, atol=0.25)  # of a voxel of the source


def oblique() -> NDArray[np.float64]:
    turn = np.eye(3)
    for angle, (a, b) in zip((0.15, -0.2, 0.1), ((0, 1), (1, 2), (0, 2))):
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ step
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([1.0, 1.0, 3.0])
    matrix[:3, 3] = 11, -7, 3
    return matrix


def test_the_output_lies_on_the_sources_grid_however_it_is_stored(model: Model) -> None:
    """Stored slices first and mirrored, on a tilted grid, each voxel gets what it gets in plain storage."""
    one = replace(model, generator=Given(lambda x: x))
    plain = volume(matrix=oblique())
    matrix = oblique()[:, [2, 0, 1, 3]]
    matrix[:3, 3] += matrix[:3, 1] * 35  # I runs backwards, second in storage
    matrix[:3, 1] *= -1
    turned = volume(np.ascontiguousarray(np.moveaxis(plain.array, 2, 0)[:, ::-1]), matrix)
    a, b = made(one, plain), made(one, turned)
    for part in (b.image, b.mask, b.expected_error):
        assert part is not None and part.array.shape == turned.array.shape
        assert same_grid(part.geometry, turned.geometry)
    np.testing.assert_array_equal(np.moveaxis(b.mask.array[:, ::-1], 0, 2), a.mask.array)
    np.testing.assert_allclose(np.moveaxis(b.image.array[:, ::-1], 0, 2), a.image.array, atol=1e-3)
    correlation = np.corrcoef(a.image.array[a.mask.array], plain.array[a.mask.array])[0, 1]
    assert correlation > 0.9999  # the identity comes back as itself, up to its scale


def test_voxels_are_copied_back_as_interpolating_would_have_them_bit_for_bit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = replace(model, generator=Given(torch.sin), local_discriminator=Doubtful(-0.3))
    stored = volume()
    for source in (stored, Volume(stored.array[::-1, :, ::-1].transpose(1, 0, 2), turned(stored))):
        copied = made(learnt, source)
        with monkeypatch.context() as patch:
            patch.setattr(synthesis, "find_overlap", lambda *_: None)
            interpolated = made(learnt, source)
        for one, other in zip(
            (copied.image, copied.expected_error, copied.mask),
            (interpolated.image, interpolated.expected_error, interpolated.mask),
            strict=True,
        ):
            assert one is not None and other is not None
            assert one.array.dtype == other.array.dtype
            np.testing.assert_array_equal(one.array, other.array)
        assert len(np.unique(copied.image.array)) > 100


def turned(stored: Volume) -> Geometry:
    """The grid of a volume whose first axis became its second and runs, as the third does, the other way."""
    i, j, k = stored.array.shape
    place = np.eye(4)[:, [1, 0, 2, 3]]
    ends = np.diag([-1.0, 1.0, -1.0, 1.0])
    ends[:3, 3] = i - 1, 0, k - 1
    return Geometry((j, i, k), stored.geometry.affine @ ends @ place)


def test_without_difficulties_image_and_expected_error_are_the_same(model: Model) -> None:
    networks = Networks(Given(torch.sin), Doubtful(0.4))
    prepared = prepare_source([volume()], model.plan)

    def maps(difficulties: bool) -> passes.Maps:
        return synthesise_prepared(
            networks._replace(difficulties=difficulties), prepared.array, prepared.mask, plan=model.plan,
            conditional=True, error_scale=0.5, engine=ENGINE,
        )  # fmt: skip

    few, all_heads = maps(False), maps(True)
    assert few.magnitude is few.structured is few.realness is None
    np.testing.assert_array_equal(few.prediction, all_heads.prediction)
    np.testing.assert_array_equal(few.raw_error, all_heads.raw_error)
    assert all(heads is not None for heads in all_heads)


def test_a_given_mask_is_where_the_networks_are_asked(model: Model) -> None:
    chosen = np.zeros((36, 40, 12), np.uint8)
    chosen[10:25, 12:30, 3:9] = 1
    found = made(model, None, volume(chosen))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.mask.array, chosen > 0)


def networks(plan: Plan, kind: str) -> tuple[ResidualGenerator, LocalDiscriminator, Plan]:
    """Random networks that depend on everything around a voxel."""
    dims = {"data.dims": kind, "generator.skip": "none", "generator.widths": (4, 6, 8)}
    recipe = make_recipe("A7", "tiny", {**QUICK, **dims})
    changed = replace(
        plan,
        dims=3 if kind == "3d" else 2,
        slices=3 if kind == "2.5d" else 1,
        patch=(32, 32, 32) if kind == "3d" else (32, 32),
    )
    torch.manual_seed(0)
    generator, discriminator = make_generator(recipe, changed), make_local_discriminator(recipe, changed)
    return generator.eval(), discriminator.eval(), changed  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["2d", "2.5d", "3d"])
def test_neither_batch_nor_tile_changes_the_result(kind: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, discriminator, plan = networks(model.plan, kind)
    rng = np.random.default_rng(0)
    shape = (50, 43, 70) if kind == "3d" else (37, 41, 9)
    mask = rng.random(shape) < 0.9
    source = np.where(mask, rng.normal(size=(1, *shape)), 0).astype(np.float32)

    def maps() -> passes.Maps:
        return synthesise_prepared(
            Networks(generator, discriminator),
            source,
            mask,
            plan=plan,
            conditional=True,
            error_scale=0.5,
            engine=ENGINE,
        )

    whole = maps()
    monkeypatch.setattr(passes, "TILE", 8)
    monkeypatch.setattr(passes, "SLICES_AT_ONCE", 2)
    cut = maps()
    for a, b in zip(whole, cut, strict=True):
        assert a is not None and b is not None and a.shape == shape and float(a.std()) > 0
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["2d", "2.5d", "3d"])
def test_maps_are_what_the_networks_say_when_asked_by_hand(kind: str, model: Model) -> None:
    generator, discriminator, plan = networks(model.plan, kind)
    rng = np.random.default_rng(1)
    shape = (16, 16, 16) if kind == "3d" else (16, 16, 5)
    mask = rng.random(shape) < 0.9
    source = np.where(mask, rng.normal(size=(1, *shape)), 0).astype(np.float32)
    found = synthesise_prepared(
        Networks(generator, discriminator), source, mask, plan=plan, conditional=True, error_scale=0.5, engine=ENGINE
    )
    at: tuple[object, ...] = (Ellipsis,) if kind == "3d" else (Ellipsis, 2)
    places = {"3d": [], "2d": [2], "2.5d": [1, 2, 3]}[kind]
    stack = source[None] if kind == "3d" else np.stack([source[0, ..., k] for k in places])[None]
    with torch.no_grad():
        image = generator(torch.from_numpy(stack)) * torch.from_numpy(mask[at])
        logits = discriminator(torch.cat([torch.from_numpy(stack), image], dim=1))
    score = np.where(mask[at], -0.5 * torch.nn.functional.logsigmoid(logits.magnitude)[0, 0].numpy(), 0)
    assert found.raw_error is not None and found.structured is not None and found.realness is not None
    np.testing.assert_allclose(found.prediction[at], image[0, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.raw_error[at], score, atol=1e-5)
    for doubt, logit in zip(
        (found.magnitude, found.structured, found.realness), (logits.magnitude, logits.structured, logits.realness)
    ):
        assert doubt is not None
        expected = np.where(mask[at], 1 - torch.sigmoid(logit)[0, 0].numpy(), 0)
        np.testing.assert_allclose(doubt[at], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["2d", "2.5d", "3d"])
def test_flip_averages_the_image_over_a_volume_and_its_mirror_image_and_assesses_the_mean(
    kind: str, model: Model
) -> None:
    generator, discriminator, plan = networks(model.plan, kind)
    rng = np.random.default_rng(2)
    shape = (16, 24, 16) if kind == "3d" else (16, 24, 5)
    mask = rng.random(shape) < 0.9
    source = np.where(mask, rng.normal(size=(1, *shape)), 0).astype(np.float32)

    def maps(average: Average, x: NDArray[np.float32], m: NDArray[np.bool_]) -> passes.Maps:
        nets = Networks(generator, discriminator, average=average)
        return synthesise_prepared(nets, x, m, plan=plan, conditional=True, error_scale=0.5, engine=ENGINE)

    once, mirrored = maps("none", source, mask), maps("none", source[:, ::-1].copy(), mask[::-1].copy())
    flipped = maps("flip", source, mask)
    of_mirrored = maps("flip", source[:, ::-1].copy(), mask[::-1].copy())
    assert np.abs(once.prediction - mirrored.prediction[::-1]).max() > 1e-4  # the networks know left from right
    np.testing.assert_allclose(flipped.prediction, (once.prediction + mirrored.prediction[::-1]) / 2, atol=1e-6)
    np.testing.assert_array_equal(of_mirrored.prediction, flipped.prediction[::-1])
    shown = np.moveaxis(flipped.prediction, -1, 0)[:, None] if kind != "3d" else flipped.prediction[None, None]
    stacks = np.moveaxis(source, -1, 0) if kind != "3d" else source[None]
    if kind == "2.5d":
        stacks = np.concatenate([stacks[[0, *range(4)]], stacks, stacks[[*range(1, 5), 4]]], axis=1)
    with torch.no_grad():
        logits = discriminator(torch.from_numpy(np.concatenate([stacks, shown], axis=1)))
    for found, logit in zip(flipped[2:], (logits.magnitude, logits.structured, logits.realness)):
        wanted = (1 - torch.sigmoid(logit)).numpy()[:, 0]
        assert found is not None
        np.testing.assert_allclose(
            found[mask], (wanted[0] if kind == "3d" else np.moveaxis(wanted, 0, -1))[mask], atol=1e-5
        )
    nets = Networks(generator, discriminator, average="flip")
    inside = passes.synthesise_inside(
        nets, source, mask, plan=plan, conditional=True, error_scale=0.5, engine=ENGINE
    )  # without a volume of either pass
    for values, volume in zip(inside, (flipped.prediction, flipped.raw_error), strict=True):
        assert values is not None and volume is not None
        np.testing.assert_array_equal(values, passes.taken(volume, mask))


def test_a_recipe_says_whether_predictions_are_averaged_and_the_caller_may_differ(model: Model) -> None:
    """A generator that adds a ramp from left to right; its mean over both sides is flat."""

    def ramp(x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, x.shape[2])[:, None].expand_as(x)

    once = replace(model, generator=Given(ramp))
    shown = once.recipe.generator.model_copy(update={"average": "flip"})
    flipping = replace(once, recipe=once.recipe.model_copy(update={"generator": shown}))
    plain, mean = made(once), made(flipping)
    inside = plain.mask.array
    assert np.ptp(plain.image.array[inside]) > 10
    np.testing.assert_allclose(mean.image.array[inside], 100.0, atol=1e-3)
    for one, average, wanted in ((once, "flip", mean), (flipping, "none", plain)):
        found = synthesise(one, [volume()], engine=ENGINE, average=average)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.image.array, wanted.image.array)


def test_extreme_logits_give_finite_maps(model: Model) -> None:
    for logit, least, most in ((-200.0, 99.0, 101.0), (200.0, 0.0, 1e-6)):
        prepared = prepare_source([volume()], model.plan)
        found = synthesise_prepared(
            Networks(model.generator, Doubtful(logit)), prepared.array, prepared.mask,
            plan=model.plan, conditional=True, error_scale=0.5, engine=ENGINE,
        )  # fmt: skip
        assert all(part is not None and np.isfinite(part).all() for part in found)
        assert found.raw_error is not None
        assert least <= found.raw_error[prepared.mask].min() and found.raw_error.max() <= most


def second_stage(plan: Plan, kind: str) -> ResidualGenerator:
    """A random refiner that does correct."""
    changes = {**QUICK, "data.dims": kind, "generator.refiner": (3, 4, 5)}
    torch.manual_seed(1)
    refiner = make_refiner(make_recipe("A15", "tiny", changes), plan)
    for parameter in refiner.last.parameters():
        nn.init.normal_(parameter)
    return refiner.eval()


@pytest.mark.parametrize("kind", ["2d", "2.5d", "3d"])
def test_neither_batch_nor_tile_changes_a_refined_result(
    kind: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, discriminator, plan = networks(model.plan, kind)
    refiner = second_stage(plan, kind)
    rng = np.random.default_rng(0)
    shape = (20, 17, 120) if kind == "3d" else (37, 41, 9)
    mask = rng.random(shape) < 0.9
    source = np.where(mask, rng.normal(size=(1, *shape)), 0).astype(np.float32)

    def maps(second: nn.Module | None = refiner) -> passes.Maps:
        return synthesise_prepared(
            Networks(generator, discriminator, second),
            source,
            mask,
            plan=plan,
            conditional=True,
            error_scale=0.5,
            engine=ENGINE,
        )

    whole = maps()
    monkeypatch.setattr(passes, "TILE", 8)
    monkeypatch.setattr(passes, "SLICES_AT_ONCE", 2)
    cut, unrefined = maps(), maps(None)
    for a, b, other in zip(whole, cut, unrefined, strict=True):
        assert a is not None and b is not None and float(a.std()) > 0
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert (a[~mask] == 0).all() and not np.allclose(a, other, atol=1e-3)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_refined_image_and_its_map_are_what_the_networks_say_when_asked_by_hand(
    conditional: bool, model: Model
) -> None:
    """The map is of the image that is shipped, not of the one before it was corrected."""
    generator, discriminator, plan = networks(model.plan, "2d")
    refiner = second_stage(plan, "2d")
    if not conditional:
        discriminator = make_local_discriminator(make_recipe("A11", "tiny", QUICK), plan).eval()
    rng = np.random.default_rng(1)
    mask = rng.random((16, 16, 5)) < 0.9
    source = np.where(mask, rng.normal(size=(1, 16, 16, 5)), 0).astype(np.float32)
    found = synthesise_prepared(
        Networks(generator, discriminator, refiner), source, mask, plan=plan, conditional=conditional, error_scale=0.5,
        engine=ENGINE,
    )  # fmt: skip
    x, valid = torch.from_numpy(source[None, ..., 2]), torch.from_numpy(mask[..., 2])
    with torch.no_grad():
        first = generator(x) * valid
        seen = torch.cat([x, first], dim=1) if conditional else first
        confidence = torch.sigmoid(discriminator(seen).structured) * valid
        second = first + (1 - confidence) * refiner(torch.cat([x, first, confidence], dim=1)) * valid
        again = discriminator(torch.cat([x, second], dim=1) if conditional else second)
    assert not torch.allclose(first, second, atol=1e-2)
    score = np.where(mask[..., 2], -0.5 * nn.functional.logsigmoid(again.magnitude)[0, 0].numpy(), 0)
    assert found.raw_error is not None
    np.testing.assert_allclose(found.prediction[..., 2], second[0, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.raw_error[..., 2], score, atol=1e-5)


def test_refined_images_are_averaged_over_mirror_images_and_the_mean_is_assessed(model: Model) -> None:
    generator, discriminator, plan = networks(model.plan, "2d")
    rng = np.random.default_rng(3)
    mask = rng.random((16, 24, 3)) < 0.9
    source = np.where(mask, rng.normal(size=(1, 16, 24, 3)), 0).astype(np.float32)

    def maps(average: Average, x: NDArray[np.float32], m: NDArray[np.bool_]) -> passes.Maps:
        nets = Networks(generator, discriminator, second_stage(plan, "2d"), average=average)
        return synthesise_prepared(nets, x, m, plan=plan, conditional=True, error_scale=0.5, engine=ENGINE)

    once, mirrored = maps("none", source, mask), maps("none", source[:, ::-1].copy(), mask[::-1].copy())
    mean = maps("flip", source, mask)
    np.testing.assert_allclose(mean.prediction, (once.prediction + mirrored.prediction[::-1]) / 2, atol=1e-6)
    seen = np.moveaxis(np.stack([source[0], mean.prediction]), -1, 0)
    with torch.no_grad():
        logit = discriminator(torch.from_numpy(np.ascontiguousarray(seen))).magnitude[:, 0].numpy()
    assert mean.magnitude is not None
    np.testing.assert_allclose(mean.magnitude[mask], 1 - 1 / (1 + np.exp(-np.moveaxis(logit, 0, -1)[mask])), atol=1e-5)


def test_a_tile_sees_as_far_as_all_networks_in_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The correction hangs on the prediction around it and on the doubt there; the map is assessed on top of both."""
    generator, discriminator, plan = networks(model.plan, "3d")
    refiner, halos = second_stage(plan, "3d"), []

    def noted(run: Callable[[Tensor], Tensor], source: NDArray[np.float32], **settings: int) -> NDArray[np.float32]:
        halos.append(settings["halo"])
        return np.zeros((4, *source.shape[1:]), np.float32)

    monkeypatch.setattr(passes, "apply_to_volume", noted)
    monkeypatch.setattr(passes, "is_of_this_package", lambda _: False)  # whose networks go through in slabs
    mask = np.ones((8, 8, 8), bool)
    for second in (None, refiner):
        synthesise_prepared(
            Networks(generator, discriminator, second), np.zeros((1, 8, 8, 8), np.float32), mask, plan=plan,
            conditional=True, error_scale=0.5, engine=ENGINE,
        )  # fmt: skip
    before = generator.receptive_field + discriminator.receptive_field
    assert halos == [before, before + refiner.receptive_field + discriminator.receptive_field]


# Networks that see the whole of their input


class Normalised(nn.Module):
    """A user's 3D network with instance normalisation."""

    size_multiple, smallest, margin, receptive_field = 1, 1, 0, 2

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 1, 3, padding=1))

    def forward(self, source: Tensor) -> Tensor:
        found: Tensor = self.body(source)
        return found


def brightening(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """A smooth source that is brighter at one end: a window's mean is not the next one's."""
    axes = np.meshgrid(*(np.linspace(0, 3, length) for length in shape), indexing="ij")
    return (axes[0] ** 2 + np.sin(2 * axes[1]) + np.cos(axes[2])).astype(np.float32)


@pytest.mark.parametrize("name", ["own", "monai"])
def test_a_3d_network_that_sees_all_of_its_input_is_blended_as_monai_blends(name: str, model: Model) -> None:
    sliding = pytest.importorskip("monai.inferers", reason="MONAI is not installed").sliding_window_inference
    torch.manual_seed(5)
    options = {"channels": [4, 8], "strides": [2], "num_res_units": 1}
    network = Normalised() if name == "own" else make_network("monai:UNet", in_channels=1, dims=3, options=options)
    network.eval().requires_grad_(False)
    plan = replace(model.plan, dims=3, slices=1, patch=(32, 32, 32))
    source, mask = brightening((64, 48, 32)), np.ones((64, 48, 32), bool)
    ours = synthesise_prepared(
        Networks(network), source[None], mask, plan=plan, conditional=False, error_scale=1.0, engine=ENGINE
    )
    weights = torch.from_numpy(window_weights(plan.patch, "smooth"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sliding(torch.from_numpy(source[None, None]), plan.patch, 1, network, 0.5, roi_weight_map=weights)
    np.testing.assert_allclose(ours.prediction, theirs[0, 0].numpy(), atol=1e-5)


def test_no_seam_shows_where_hard_tiles_would_jump_also_near_the_faces_of_the_volume(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    network = Normalised().eval().requires_grad_(False)
    plan = replace(model.plan, dims=3, slices=1, patch=(32, 32, 32))
    source, mask = brightening((64, 48, 32)), np.ones((64, 48, 32), bool)

    def jumps() -> tuple[float, float]:
        """The largest jump across a border, in SD of the image, and what is reported of them."""
        image = synthesise_prepared(
            Networks(network), source[None], mask, plan=plan, conditional=False, error_scale=1.0, engine=ENGINE
        ).prediction
        steps = np.diff(image, axis=0)
        jump = np.abs(steps[1:-1] - (steps[:-2] + steps[2:]) / 2)[14::16]  # before voxels 16, 32 and 48
        return float(jump.max() / image.std()), seam_of(image, mask, plan.patch) or 0.0

    largest, told = jumps()

    def hard_tiles(shape: tuple[int, ...], *, tile: int, halo: int, multiple: int) -> list[Tile]:
        rest = [(0, length) for length in shape[1:]]
        ends = [(start, start + 16) for start in range(0, shape[0], 16)]
        return [Tile(((max(0, a - halo), min(shape[0], b + halo)), *rest), ((a, b), *rest)) for a, b in ends]

    monkeypatch.setattr(passes, "tiles_are_exact", lambda *_: True)
    monkeypatch.setattr(tiling, "plan_tiles", hard_tiles)
    before, told_before = jumps()  # as all networks were cut once
    assert largest < 0.02 and told < 1.1 and before > 2 and told_before > 5, (largest, told, before, told_before)


def test_a_blended_image_comes_with_a_warning_and_one_window_does_not(model: Model) -> None:
    plan = replace(model.plan, dims=3, slices=1, patch=(32, 32, 32))
    torch.manual_seed(6)
    one = replace(model, plan=plan, generator=Normalised().eval().requires_grad_(False), local_discriminator=None)
    told = [text for text in made(one).warnings if "blended" in text]
    assert len(told) == 1 and "2 overlapping windows of 32x32x32 voxels" in told[0] and "times those" in told[0]
    wide = replace(one, plan=replace(plan, patch=(48, 48, 32)))
    assert not [text for text in made(wide).warnings if "blended" in text]
    own = replace(one, generator=networks(model.plan, "3d")[0])
    assert not [text for text in made(own).warnings if "blended" in text]


class Placed(nn.Module):
    """A user's 2.5D network with an embedding of each place, as transformers have: it takes patches of 32 alone."""

    size_multiple, smallest, margin, receptive_field = 16, 32, 0, 32

    def forward(self, source: Tensor) -> Tensor:
        return source[:, 1:2] + torch.zeros(32, 32)


def test_a_2d_network_that_takes_patches_alone_predicts_slices_in_windows(model: Model) -> None:
    plan = replace(model.plan, dims=2, slices=3, patch=(32, 32))
    rng = np.random.default_rng(2)
    source, mask = rng.normal(size=(1, 45, 33, 6)).astype(np.float32), np.ones((45, 33, 6), bool)
    found = synthesise_prepared(
        Networks(Placed()), source, mask, plan=plan, conditional=False, error_scale=1.0, engine=ENGINE
    )
    np.testing.assert_allclose(found.prediction, source[0], atol=1e-6)
    told = [text for text in made(replace(model, plan=plan, generator=Placed())).warnings if "blended" in text]
    assert len(told) == 1 and "2 overlapping windows of 32x32 voxels in each slice" in told[0]
    coronal = replace(model, plan=replace(plan, plane="coronal"), generator=Placed())  # low enough for one window
    assert not [text for text in made(coronal).warnings if "blended" in text]


# Super-resolution


def thin(model: Model, axis: Axis = "K", factor: int = 3) -> Model:
    """A model for super-resolution whose network changes nothing; `grid_mm` is that of the toy cohort, arranged."""
    spacing = (1.0, 3.0, 1.0) if axis == "K" else (1.0, 1.0, 3.0)
    plan = replace(model.plan, target="t1", degradation=Degradation(factor, axis), grid_mm=(spacing, spacing))
    plan = replace(plan, spacing_mm=spacing, source_kinds=("median_iqr",))
    return replace(model, plan=plan, generator=Given(lambda x: x))


@pytest.mark.parametrize("axis", ["I", "J", "K"])
def test_thick_slices_come_back_thin_with_their_outer_faces_where_they_were(model: Model, axis: Axis) -> None:
    fine = volume()
    how = Degradation(3, axis)
    thick = degrade([fine], how)[0]
    made = synthesise(thin(model, axis), [thick], engine=ENGINE)
    assert made.expected_error is not None
    for result in (made.image, made.expected_error, made.mask):
        grid = result.geometry
        assert grid.spacing_mm == pytest.approx(fine.geometry.spacing_mm)
        if fine.geometry.shape["IJK".index(axis)] % 3 == 0:
            assert grid.shape == fine.geometry.shape
            np.testing.assert_allclose(grid.corners, fine.geometry.corners, atol=1e-9)
        assert same_grid(grid, thin_grid(thick.geometry, how), 1e-9)


@pytest.mark.parametrize("gain", [1.0, 250.0])
def test_a_network_that_changes_nothing_returns_the_cubic_spline_in_the_scans_own_units(
    model: Model, gain: float
) -> None:
    thick = degrade([volume(pair(1)[0] * np.float32(gain))], Degradation(3))[0]
    made = synthesise(thin(model), [thick], engine=ENGINE)
    spline = interpolated([thick], Degradation(3))[0].array
    inside = made.mask.array
    np.testing.assert_allclose(made.image.array[inside], spline[inside], rtol=1e-4)
    assert set(np.unique(made.image.array[~inside])) == {0.0}
    assert inside.mean() == pytest.approx(body().mean(), rel=0.1)
    # 0.5 -log M of 0.3466 normalised units at a logit of 0; one unit is the scan's own IQR / 1.349
    q1, q3 = np.quantile(spline[inside], (0.25, 0.75))
    assert made.expected_error is not None
    assert np.median(made.expected_error.array[inside]) == pytest.approx(0.3466 * (q3 - q1) / 1.349, rel=0.02)


def test_thin_slices_are_made_thick_first_where_it_is_asked_and_keep_their_grid(model: Model) -> None:
    fine = volume()
    made = synthesise(thin(model), [fine], engine=ENGINE, degrade=True)
    inside = made.mask.array
    assert made.image.geometry is fine.geometry
    np.testing.assert_allclose(made.image.array[inside], simulated([fine], Degradation(3))[0].array[inside], rtol=1e-4)


def test_a_mask_on_thick_slices_reaches_the_thin_ones(model: Model) -> None:
    thick = degrade([volume()], Degradation(3))[0]
    half = np.zeros(thick.array.shape, np.uint8)
    half[8:28, 8:32, 1:3] = 1
    made = synthesise(thin(model), [thick], mask=Volume(half, thick.geometry), engine=ENGINE)
    np.testing.assert_array_equal(made.mask.array, np.repeat(half, 3, axis=2) > 0)


def test_slices_that_are_not_thick_are_refused_and_so_is_degrading_for_synthesis(model: Model) -> None:
    with pytest.raises(VolumeError, match=r"no thick slices along K.*found 3 mm, expected about 9 mm.*--degrade"):
        synthesise(thin(model), [volume()], engine=ENGINE)
    with pytest.raises(RecipeError, match="super-resolution"):
        synthesise(model, [volume()], engine=ENGINE, degrade=True)


# ---------------------------------------------------------------- large volumes


def integers(seed: int = 1) -> NDArray[np.int16]:
    """Whole numbers that int16 and float32 hold alike."""
    return np.asfortranarray(pair(seed)[0].round().astype(np.int16))


@pytest.mark.parametrize("average", ["none", "flip"])
def test_a_source_that_stays_as_it_is_stored_gives_the_same_bits(finished_run: Path, average: Average) -> None:
    trained = load_model(finished_run)
    for histogram in (False, True) if not trained.plan.histogram else (True,):
        model = trained if histogram == trained.plan.histogram else with_ranks(trained)
        narrow, wide = (
            synthesise(model, [volume(array)], engine=ENGINE, average=average)  # type: ignore[arg-type]
            for array in (integers(), integers().astype(np.float32))
        )
        assert narrow.image.array.std() > 0 and narrow.warnings == wide.warnings
        for one, other in zip(volumes_of(narrow), volumes_of(wide)):
            np.testing.assert_array_equal(one, other)


def with_ranks(model: Model) -> Model:
    """Give a model's generator the ranks of its source, too."""
    plan = replace(model.plan, histogram=True)
    recipe = model.recipe
    return replace(
        model,
        plan=plan,
        generator=make_generator(recipe, plan).eval(),
        local_discriminator=make_local_discriminator(recipe, plan).eval(),
    )


def volumes_of(found: Synthesis) -> list[NDArray[np.generic]]:
    assert found.expected_error is not None
    return [found.image.array, found.mask.array, found.expected_error.array]


def test_no_volume_is_held_while_networks_run(model: Model) -> None:
    held: list[weakref.ref[NDArray[np.generic]]] = []
    alive: list[bool] = []

    def read() -> Iterator[Volume]:
        def once() -> Volume:
            found = volume(integers())  # type: ignore[arg-type]
            held.append(weakref.ref(found.array))
            return found

        yield once()

    def answer(source: Tensor) -> Tensor:
        alive.append(held[0]() is not None)
        return source * 2

    compact = synthesis.synthesise_compactly(replace(model, generator=Given(answer)), read(), engine=ENGINE)
    assert alive and not any(alive)
    whole = made(replace(model, generator=Given(lambda x: x * 2)), volume(integers().astype(np.float32)))
    for one, other in zip(volumes_of(compact.whole()), volumes_of(whole)):
        np.testing.assert_array_equal(one, other)
    assert compact.values.size == np.count_nonzero(compact.mask.array) < whole.image.array.size


def test_a_mask_off_the_grid_of_the_plan_is_laid_out_as_its_volumes_are(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = replace(model, plan=replace(model.plan, spacing_mm=tuple(1.5 * step for step in model.plan.spacing_mm)))  # type: ignore[arg-type]
    found = synthesis.synthesise_compactly(coarse, iter([volume()]), engine=ENGINE)
    resampled: list[int] = []

    def counted(moved: Volume, grid: Geometry, order: Literal[0, 1] = 1) -> Volume:
        resampled.append(order)
        return resample(moved, grid, order)

    monkeypatch.setattr(synthesis, "resample", counted)
    whole = found.whole()
    assert resampled.count(0) == 1, "the mask is resampled once, for image, map and mask"
    inside = found.mask.array
    asked = Volume(found.prepared.mask.view(np.uint8), found.prepared.grid)
    np.testing.assert_array_equal(inside, resample(asked, found.grid, 0).array.astype(bool))
    for one, other in zip(volumes_of(whole), [found.image, found.mask, found.expected_error]):
        assert other is not None
        np.testing.assert_array_equal(one, other.array)
    assert inside.dtype == bool and inside.shape == volume().array.shape and 0.2 < inside.mean() < 0.8
    np.testing.assert_allclose(found.image.array[inside], 200, rtol=1e-5)
    assert (found.image.array[~inside] == 0).all()
