from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.methods import make_recipe
from chiasm.preparation import planning
from chiasm.preparation.arrays import prepare_case, prepare_source
from chiasm.preparation.fingerprint import Fingerprint, fingerprint
from chiasm.preparation.out_of_distribution import out_of_distribution_warning
from chiasm.preparation.patches import EMPTY, PatchNeeds
from chiasm.preparation.plan import Estimate, Plan, read_plan, write_plan
from chiasm.preparation.planning import continue_plan, make_plan
from chiasm.recipe import Recipe
from chiasm.storage import read_toml
from chiasm.volumes import Geometry, Volume, read_volume
from conftest import REAL
from synthetic_cohort import SHAPE, SPACING, affine, body, pair, save, write_case, write_cohort

#: Fields that are chosen, not measured: each must say why.
CHOICES = {"spacing_mm", "dims", "slices", "patch", "mask_rule", "source_kinds", "target_kind", "target_range"}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "has_gpu", lambda _: False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return write_cohort(tmp_path_factory.mktemp("cohort"), 4)


def ask(size: str = "small", **data: object) -> Recipe:
    return make_recipe("A7", size, {f"data.{name}": value for name, value in data.items()})


def planned(
    cohort: Cohort, recipe: Recipe | None = None, ids: Sequence[str] | None = None, needs: PatchNeeds | None = None
) -> Plan:
    return make_plan(recipe or ask(), cohort, ids or [case.id for case in cohort.cases], needs=needs)


def written(
    folder: Path, images: Sequence[dict[str, NDArray[np.generic]]], spacing: tuple[float, float, float] = SPACING
) -> Cohort:
    cases = []
    for number, arrays in enumerate(images):
        name = f"case{number:02d}"
        paths = {kind: save(folder / name / f"{kind}.nii", array, affine(spacing)) for kind, array in arrays.items()}
        mask = paths.pop("mask", None)
        cases.append(Case(name, name, paths, mask=mask))
    return Cohort(folder, "synthetic", tuple(cases))


def test_every_choice_has_its_reason(cohort: Cohort) -> None:
    plan = planned(cohort)
    assert set(plan.reasons) >= CHOICES | {"trained_on", "lookup"}
    assert set(plan.reasons) <= {field.name for field in dataclasses.fields(Plan)}
    assert all(len(reason) > 10 for reason in plan.reasons.values())


def test_a_plan_comes_back_from_its_file_bit_for_bit(cohort: Cohort, tmp_path: Path) -> None:
    plan = planned(cohort)
    write_plan(tmp_path / "plan.toml", plan)
    again = read_plan(tmp_path / "plan.toml")
    for field in dataclasses.fields(Plan):  # equality of plans leaves out cost and reasons
        assert getattr(again, field.name) == getattr(plan, field.name), field.name
    assert again == plan
    write_plan(tmp_path / "again.toml", again)
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "plan.toml").read_bytes()
    assert list(read_toml(tmp_path / "plan.toml"))[-1] == "fitted"  # long tables stand last


def test_plans_of_one_cohort_are_the_same_whatever_they_will_cost(cohort: Cohort) -> None:
    first = planned(cohort)
    assert dataclasses.replace(planned(cohort), expected=Estimate(9.0, 9.0, 9.0)) == first


@pytest.mark.parametrize(("needs", "found"), [((64, 64), 64), ((1, 70), 72), ((1, 1), 64), ((256, 256), 256)])
def test_a_patch_is_what_a_network_of_the_literature_needs(cohort: Cohort, needs: tuple[int, int], found: int) -> None:
    recipe = make_recipe("A1", "tiny", {"generator.network": "unet", "generator.widths": (4,) * 8})
    plan = make_plan(recipe, cohort, [case.id for case in cohort.cases], needs=PatchNeeds(*needs))
    assert max(plan.patch) <= found and all(side % needs[0] == 0 and side >= needs[1] for side in plan.patch)
    asked = make_recipe("A1", "tiny", {"data.patch": 32, "generator.network": "unet"})
    if needs[1] > 32:
        with pytest.raises(RecipeError, match="does not fit the networks"):
            make_plan(asked, cohort, [case.id for case in cohort.cases], needs=PatchNeeds(*needs))


DAMAGES = {
    "cut in half": (r"(?s)(.{700}).*", r"\1"),
    "no toml": (r"^", "%%% "),
    "no spacing": (r"(?s)spacing_mm = \[.*?\]", ""),
    "another kind": (r'target_kind = ".*?"', 'target_kind = "histogram"'),
    "even slices": (r"slices = 3", "slices = 2"),
    "negative spacing": (r"(?s)spacing_mm = \[\s*1", "spacing_mm = [-1"),
    "spacing that is no number": (r"(?s)spacing_mm = \[\s*1.0", "spacing_mm = [nan"),
    "infinite sd": (r"target_sd = \S+", "target_sd = inf"),
    "a patch of three sides": (r"(?s)patch = \[", "patch = [32, "),
    "a missing source": (r'"t1",\s*\]', "]"),
    "a text for a number": (r"target_sd = \S+", 'target_sd = "wide"'),
    "a map that falls": (r"(?s)(target_reference\]\nkind = .*?values = \[)\s*\S+,", r"\g<1> 1e9,"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_refused_with_its_file(cohort: Cohort, tmp_path: Path, damage: str) -> None:
    path, (pattern, becomes) = tmp_path / "plan.toml", DAMAGES[damage]
    write_plan(path, planned(cohort))
    text = path.read_text(encoding="utf-8")
    harmed = re.sub(pattern, becomes, text, count=1)
    assert harmed != text
    path.write_text(harmed, encoding="utf-8")
    with pytest.raises(RunError) as refusal:
        read_plan(path)
    assert refusal.value.path == path and refusal.value.reason == "damaged"


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_plan(tmp_path / "plan.toml")


def test_only_training_cases_are_looked_at(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, 6)
    ids = [case.id for case in cohort.cases[:4]]
    before = planned(cohort, ids=ids)
    for case in cohort.cases[4:]:
        for path in case.images.values():
            path.write_bytes(b"garbage")
    after = planned(cohort, ids=ids)
    assert after == before and after.reasons == before.reasons
    assert after.trained_on == tuple(ids)
    assert planned(cohort, ids=ids[:3]).lookup != after.lookup


def test_an_unknown_id_is_the_programmer_s_mistake_and_no_case_the_user_s(cohort: Cohort) -> None:
    with pytest.raises(ValueError, match="no case nobody"):
        make_plan(ask(), cohort, ["case00", "nobody"])
    with pytest.raises(CohortError, match="no training case"):
        make_plan(ask(), cohort, [])


def test_a_case_that_cannot_be_scaled_is_left_out_by_name(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, 4, masked=True)
    flat = np.where(body(), np.float32(5), np.float32(0))
    flat[10, 10, 5] = 9
    save(cohort.cases[1].images["t2"], flat, affine())
    plan = planned(cohort)
    assert "case01" in plan.reasons["trained_on"] and "same" in plan.reasons["trained_on"]
    rest = Cohort(cohort.root, cohort.layout, tuple(case for case in cohort.cases if case.id != "case01"))
    alone = planned(rest)
    assert (plan.lookup, plan.target_range, plan.target_kind) == (alone.lookup, alone.target_range, alone.target_kind)
    with pytest.raises(CohortError, match=r"case01.*t2.nii"):
        planned(cohort, ids=["case01"])


def test_a_case_that_cannot_be_read_is_named_in_the_plan(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path, 4)
    cohort.cases[2].images["t1"].unlink()
    assert "case02" in planned(cohort).reasons["trained_on"]


def with_lesions(seed: int, share: float, gain: float) -> dict[str, NDArray[np.generic]]:
    """Tissue of constant make-up, and a very bright lesion that is large in some cases and absent in others."""
    source, target, _ = pair(seed)
    inside = body()
    far = np.where(inside, np.linalg.norm(np.indices(SHAPE) - np.reshape(SHAPE, (3, 1, 1, 1)) / 2, axis=0), np.inf)
    lesion = inside & (far < np.quantile(far[inside], share))
    source = np.where(lesion, 500 + 5 * source / 100, source)
    target = np.where(lesion, 1500, target)
    return {"t1": (source * gain).astype(np.float32), "t2": (target / gain).astype(np.float32)}


def with_other_tissue_shares(seed: int, share: float, gain: float) -> dict[str, NDArray[np.generic]]:
    """One continuous scale from 20 to 200 in every case, but mostly dark in some and mostly bright in others."""
    rng, inside = np.random.default_rng(seed), body()
    level = rng.beta(6 * share, 6 * (2 - share), SHAPE)
    level[rng.random(SHAPE) < 0.02] = 0.0
    level[rng.random(SHAPE) < 0.02] = 1.0
    source = np.where(inside, (20 + 180 * level) * gain, 0)
    target = np.where(inside, (400 - 300 * level**2 + 4 * rng.normal(size=SHAPE)) / gain, 0)
    return {"t1": source.astype(np.float32), "t2": target.astype(np.float32)}


GAINS = (1.0, 3.0, 0.5, 20.0, 2.0)


def test_lesions_of_many_sizes_make_the_median_and_quartiles_win(tmp_path: Path) -> None:
    shares = (0.0, 0.02, 0.0, 0.1, 0.05)
    cohort = written(tmp_path, [with_lesions(seed, *both) for seed, both in enumerate(zip(shares, GAINS))])
    plan = planned(cohort)
    assert plan.source_kinds == ("median_iqr",) and plan.target_kind == "median_iqr"
    table = dict(re.findall(r"(\w+) (-?\d+\.\d\d)", plan.reasons["target_kind"]))
    assert float(table["median_iqr"]) > float(table["percentile"]) + 0.1, table


def test_tissue_in_other_shares_makes_the_percentiles_win(tmp_path: Path) -> None:
    shares = (0.4, 1.6, 1.0, 0.6, 1.4)
    cohort = written(tmp_path, [with_other_tissue_shares(seed, *both) for seed, both in enumerate(zip(shares, GAINS))])
    plan = planned(cohort)
    assert plan.source_kinds == ("percentile",) and plan.target_kind == "percentile"
    assert "percentile makes the training cases agree best" in plan.reasons["target_kind"]


def test_a_kind_that_is_asked_for_is_taken_and_two_cases_measure_nothing(cohort: Cohort) -> None:
    asked = planned(cohort, ask(intensity="zscore"))
    assert asked.source_kinds == ("zscore",) and asked.target_kind == "zscore"
    assert "set in the recipe" in asked.reasons["target_kind"]
    few = planned(cohort, ids=["case00", "case01"])
    assert few.target_kind == "median_iqr" and "too few" in few.reasons["target_kind"]


def ct_case(seed: int) -> dict[str, NDArray[np.generic]]:
    source, target, _ = pair(seed)
    hounsfield = np.where(body(), target - 170, -1000)
    hounsfield[18:21, 20:23, 6] = 9000  # a filling
    return {"t1": source, "ct": hounsfield.astype(np.float32)}


def test_ct_keeps_hounsfield_units_and_the_window_of_the_recipe(tmp_path: Path) -> None:
    cohort = written(tmp_path, [ct_case(seed) for seed in range(3)])
    plan = planned(cohort, ask(target="ct", window_hu=(-1000.0, 2000.0)))
    assert (plan.target_kind, plan.target_unit) == ("hu", "HU")
    assert plan.target_range == plan.window_hu == (-1000.0, 2000.0)
    assert plan.target_background == -1000
    assert plan.source_kinds[0] != "hu"
    assert plan.target_reference.apply([-1000, 500, 2000]).tolist() == [-1, 0, 1]
    assert planned(cohort, ask(target="ct")).target_background == -1000  # air, not the window's end
    other = planned(cohort, ask(sources=("ct",), target="t1"))
    assert other.source_kinds == ("hu",) and other.target_kind != "hu" and other.target_unit == "a.u."


def test_each_of_several_sources_has_its_own_entries(tmp_path: Path) -> None:
    cases = [{**with_lesions(seed, 0.02, 1.0), "ct": ct_case(seed)["ct"]} for seed in range(3)]
    plan = planned(written(tmp_path, cases), ask(sources=("t1", "ct")))
    assert plan.source_kinds[1] == "hu"
    assert len(plan.input_mean) == len(plan.input_sd) == 3
    assert len(plan.source_histograms) == len(plan.source_limits) == len(plan.source_ranges) == 2
    assert np.sum(plan.source_histograms, axis=1) == pytest.approx([1, 1])
    assert "t1:" in plan.reasons["source_kinds"] and "ct:" in plan.reasons["source_kinds"]


def test_the_grid_is_the_median_of_the_training_cases(tmp_path: Path) -> None:
    spacings = [(1.0, 1.0, 3.0), (1.2, 0.9, 4.0), (0.8, 1.1, 5.0)]
    cases = tuple(write_case(tmp_path, seed, spacing=spacing) for seed, spacing in enumerate(spacings))
    cohort = Cohort(tmp_path, "synthetic", cases)
    plan = planned(cohort)
    assert plan.spacing_mm == (1.0, 1.0, 4.0)
    assert "thick slices are kept" in plan.reasons["spacing_mm"]
    assert plan.grid_mm == (
        (pytest.approx(0.8), pytest.approx(0.9), 3.0),
        (pytest.approx(1.2), pytest.approx(1.1), 5.0),
    )
    asked = planned(cohort, ask(spacing_mm=2.0))
    assert asked.spacing_mm == (2.0, 2.0, 2.0) and "set in the recipe" in asked.reasons["spacing_mm"]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Two bodies of 75 x 75 x 75 voxels, 1 mm each way."""
    shape = (90, 90, 90)
    images = [dict(zip(("t1", "t2"), pair(seed, shape=shape)[:2])) for seed in range(2)]
    return written(tmp_path_factory.mktemp("even"), images, (1.0, 1.0, 1.0))


@pytest.fixture
def read_once(even: Cohort, seen: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> Cohort:
    monkeypatch.setattr(planning, "fingerprint", lambda *_, **__: seen)
    return even


@pytest.fixture(scope="module")
def seen(even: Cohort) -> Fingerprint:
    return fingerprint(even.cases, ["t1"], "t2")


@pytest.mark.parametrize(
    ("size", "gpu", "asked", "dims", "slices", "why"),
    [
        ("small", True, "auto", 2, 3, "too slow for the size small"),
        ("tiny", False, "auto", 2, 3, "too slow for the size tiny"),
        ("large", False, "auto", 2, 5, "no GPU"),
        ("large", True, "auto", 3, 1, "there is a GPU"),
        ("paper", True, "auto", 3, 1, "there is a GPU"),
        ("large", True, "2d", 2, 1, "set in the recipe"),
        ("small", False, "3d", 3, 1, "set in the recipe"),
        ("small", True, "2.5d", 2, 3, "set in the recipe"),
    ],
)
def test_dimensions_follow_size_and_machine(
    read_once: Cohort,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    gpu: bool,
    asked: str,
    dims: int,
    slices: int,
    why: str,
) -> None:
    monkeypatch.setattr(planning, "has_gpu", lambda _: gpu)
    plan = planned(read_once, ask(size, dims=asked))
    assert (plan.dims, plan.slices, len(plan.patch)) == (dims, slices, dims)
    assert why in plan.reasons["dims"]


def test_slices_of_a_plane_that_is_asked_for_are_no_volumes(read_once: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "has_gpu", lambda _: True)
    plan = planned(read_once, ask("large", plane="sagittal"))
    assert (plan.dims, plan.plane) == (2, "sagittal") and "of a plane were asked for" in plan.reasons["dims"]


def test_thick_slices_and_thin_volumes_are_trained_in_2_5d(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "has_gpu", lambda _: True)
    thick = planned(cohort, ask("large"))
    assert thick.dims == 2 and "slices are thick" in thick.reasons["dims"]
    images = [dict(zip(("t1", "t2"), pair(seed)[:2])) for seed in range(2)]
    thin = planned(written(tmp_path, images, (1.0, 1.0, 1.0)), ask("large"))
    assert thin.dims == 2 and "too thin" in thin.reasons["dims"]


@pytest.mark.parametrize("size", ["tiny", "small", "large", "paper"])
@pytest.mark.parametrize("dims", ["2d", "3d"])
@pytest.mark.parametrize("levels", [3, 5, 6, 7])
def test_patches_are_what_the_networks_can_halve(read_once: Cohort, size: str, dims: str, levels: int) -> None:
    widths = (4,) * levels
    names = ("generator.widths", "discriminators.global_widths", "discriminators.local_widths")
    recipe = make_recipe("A7", size, {"data.dims": dims, **dict.fromkeys(names, widths)})
    plan = planned(read_once, recipe)
    multiple = 2**levels  # the global discriminator halves once for each of its widths
    assert all(side % multiple == 0 and side >= multiple for side in plan.patch), plan.patch
    assert max(plan.patch) < 75 + multiple  # a body of 75 voxels
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"patch": 2 * multiple})})
    assert planned(read_once, asked).patch == (2 * multiple,) * plan.dims


def test_a_patch_that_the_networks_cannot_halve_is_refused_with_one_that_fits(cohort: Cohort) -> None:
    with pytest.raises(RecipeError, match="such as 48 or 64") as refusal:
        planned(cohort, ask(patch=50))
    assert (refusal.value.reason, refusal.value.found) == ("patch", 50)


def test_a_network_far_larger_than_the_body_is_told_of(cohort: Cohort) -> None:
    needs = PatchNeeds(multiple=256, smallest=256)
    recipe = make_recipe("pix2pix", "tiny", {"data.dims": "2d"})
    plan = planned(cohort, recipe, needs=needs)
    assert plan.patch == (256, 256)
    assert re.search(
        r"need 256 voxels.*has only \d+ x \d+.*empty.*pix2pix-32 takes multiples of 32", plan.reasons["patch"]
    )
    with pytest.raises(RecipeError, match=r"multiple of 256, such as 256 or 512.*pix2pix-32"):
        planned(cohort, make_recipe("pix2pix", "tiny", {"data.dims": "2d", "data.patch": 96}), needs=needs)
    assert "pix2pix" not in planned(cohort, ask(patch="auto")).reasons["patch"]
    large, fitting = (planned(cohort, ask(patch=side)).reasons["patch"] for side in (512, 32))
    assert re.fullmatch(r"set in the recipe, but the median .* has only \d+ x \d+: the rest .* is empty.*", large)
    assert fitting == "set in the recipe"


@pytest.mark.parametrize(("settings", "warns"), [({}, False), ({"training.parent": "0" * 64}, True)])
def test_an_empty_patch_is_reported_of_a_parents_but_not_again_of_a_further_model(
    settings: dict[str, str], warns: bool, cohort: Cohort
) -> None:
    parent, recipe = planned(cohort, ask(patch=512)), make_recipe("A7", "small", {"data.patch": 512, **settings})
    child = continue_plan(parent, recipe, cohort, [case.id for case in cohort.cases])
    assert child.patch == parent.patch and EMPTY in parent.reasons["patch"]
    assert (EMPTY in child.reasons["patch"]) == warns


def test_the_mask_rule_is_that_of_the_cohort(cohort: Cohort, tmp_path: Path) -> None:
    assert planned(cohort).mask_rule == "nonzero"
    assert planned(write_cohort(tmp_path, 2, masked=True)).mask_rule == "given"


def test_raw_and_normalised_target_units_are_exact_inverses(cohort: Cohort) -> None:
    for kind in ("median_iqr", "percentile", "rank", "mode", "zscore"):
        plan = planned(cohort, ask(intensity=kind))
        low, high = plan.target_range
        raw = np.linspace(low - (high - low), high + (high - low), 501)
        back = plan.target_reference.invert(plan.target_reference.apply(raw))
        np.testing.assert_allclose(back, raw, atol=1e-5 * (high - low))
        assert low < plan.target_reference.invert(0.0) < high


def test_the_target_s_range_and_statistics_are_those_of_the_pooled_normalised_cases(tmp_path: Path) -> None:
    """Gains that differ by 40 leave one scale, whose ends hold 99 % of every target."""
    cohort = write_cohort(tmp_path, 4, masked=True)
    plan = planned(cohort, ask(intensity="median_iqr"))
    inside = body()
    shown = [prepare_case(case, plan, tmp_path / "cache") for case in cohort.cases]
    pooled = np.concatenate([np.asarray(case.target[case.mask]) for case in shown])
    assert len(pooled) == 4 * inside.sum()
    ends = plan.target_reference.apply(np.array(plan.target_range))
    np.testing.assert_allclose(ends, np.percentile(pooled, (0.5, 99.5)), atol=1e-4)
    assert plan.target_sd == pytest.approx(pooled.std(), rel=1e-4)
    sources = np.concatenate([np.asarray(case.source[0][case.mask]) for case in shown])
    assert plan.input_mean == pytest.approx((sources.mean(), pooled.mean()), abs=1e-4)
    assert plan.input_sd == pytest.approx((sources.std(), pooled.std()), rel=1e-4)
    gains = np.array([1.0, 3.0, 0.5, 20.0])
    medians = [np.median(pair(seed)[1][inside]) / gain for seed, gain in enumerate(gains)]
    assert plan.target_reference.invert(0.0) == pytest.approx(np.median(medians), rel=1e-4)
    for x, y in zip(*plan.lookup):
        near = np.abs(sources - x) < 0.1
        if near.sum() > 200:
            assert y == pytest.approx(pooled[near].mean(), abs=0.35)


def test_training_cases_are_like_the_training_cases(tmp_path: Path) -> None:
    for count, masked, spacing_mm in ((6, False, "auto"), (3, True, "auto"), (2, False, "auto"), (4, False, 2.0)):
        cohort = write_cohort(tmp_path / f"{count}", count, masked=masked)
        plan = planned(cohort, ask(spacing_mm=spacing_mm))
        for case in cohort.cases:
            mask = None if case.mask is None else read_volume(case.mask, labels=True)
            assert (
                out_of_distribution_warning(plan, prepare_source([read_volume(case.images["t1"])], plan, mask)) is None
            )


def sentence(plan: Plan, array: NDArray[np.generic], spacing: tuple[float, float, float] = SPACING) -> str | None:
    i, j, k = array.shape
    volume = Volume(array.astype(np.float32), Geometry((i, j, k), affine(spacing)))
    return out_of_distribution_warning(plan, prepare_source([volume], plan))


def test_a_new_case_of_the_same_kind_is_not_called_unlike_whatever_its_gain(cohort: Cohort) -> None:
    plan = planned(cohort)
    for seed in range(50, 54):
        assert sentence(plan, pair(seed)[0] * (seed - 40)) is None


def test_another_spacing_is_told_and_nothing_else(cohort: Cohort) -> None:
    source = np.repeat(pair(50)[0], 2, axis=2)[:, :, ::4]  # the same body in slices of 6 mm
    told = sentence(planned(cohort), source, (1.0, 1.0, 6.0))
    assert told is not None and "voxels of 1 x 1 x 6 mm (1 x 1 x 3 mm in training)" in told
    assert "histogram" not in told


def test_another_contrast_is_told_and_nothing_else(cohort: Cohort) -> None:
    inside = body()
    other = np.where(inside, np.random.default_rng(0).exponential(50, SHAPE) ** 1.5 + 1, 0)
    told = sentence(planned(cohort), other)
    assert told is not None and "a histogram of t1 that is" in told
    assert "voxels" not in told and "brain or body" not in told


def test_a_body_that_is_too_large_or_too_small_is_told(cohort: Cohort) -> None:
    plan = planned(cohort)
    for factor, shape in ((1.6, (58, 64, 19)), (0.5, (18, 20, 6))):
        told = sentence(plan, pair(50, shape=shape)[0])
        assert told is not None and "a brain or body of" in told, factor


def unstripped(seed: int, pad: int) -> NDArray[np.float64]:
    """A head: the brain of `pair`, a bright scalp around it, noisy air, and zeros beyond where it is padded."""
    source = pair(seed)[0].astype(np.float64)
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in SHAPE), indexing="ij")
    radius = np.asarray(sum(axis**2 for axis in axes))
    head = np.where(radius < 1, source, np.where(radius < 1.25, 220, np.abs(3 * rng.normal(size=SHAPE)) + 0.1))
    return np.pad(head, pad)


def test_a_head_that_is_not_stripped_is_told(cohort: Cohort) -> None:
    told = sentence(planned(cohort), unstripped(50, 0))
    assert told is not None and "not cut out on a constant background" in told


def test_a_padded_head_that_is_not_stripped_is_told_too(cohort: Cohort) -> None:
    told = sentence(planned(cohort), unstripped(50, 6))
    assert told is not None and "not cut out on a constant background" in told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ()}, "one entry for each"),
        ({"source_limits": (1.0, 2.0)}, "one entry for each"),
        ({"patch": (32, 32, 32)}, "as many axes as dims"),
        ({"slices": 4}, "slices must be odd"),
        ({"target_range": (2.0, 1.0)}, "ranges must rise"),
        ({"lookup": ((0.0, 0.0), (1.0, 1.0))}, "must rise in x"),
        ({"source_histograms": ((1.0,),)}, "32 bins"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "must be positive"),
        ({"input_mean": (0.0, float("nan"))}, "must be finite"),
    ],
)
def test_parts_that_do_not_fit_make_no_plan(cohort: Cohort, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(planned(cohort), **wrong)  # type: ignore[arg-type]


@pytest.mark.realdata
@pytest.mark.slow
def test_real_tumours_are_like_one_another_and_another_contrast_is_told() -> None:
    folders = sorted((REAL / "tumour_tcga").iterdir())[:4]
    cases = tuple(
        Case(one.name, one.name, {kind: one / f"{one.name}_{kind}.nii.gz" for kind in ("t1", "t2")}) for one in folders
    )
    plan = planned(Cohort(REAL, "brats", cases))
    assert plan.mask_rule == "nonzero" and plan.spacing_mm == (1.0, 1.0, 1.0)
    for case in cases:
        assert out_of_distribution_warning(plan, prepare_source([read_volume(case.images["t1"])], plan)) is None
    swapped = prepare_source([read_volume(cases[0].images["t2"])], plan)
    assert "histogram" in (out_of_distribution_warning(plan, swapped) or "")


def test_a_plan_with_ranks_differs_in_nothing_else_and_says_so(cohort: Cohort, tmp_path: Path) -> None:
    plain, ranked = planned(cohort), planned(cohort, ask(histogram=True))
    assert dataclasses.replace(ranked, histogram=False) == plain != ranked
    assert "rank" in ranked.reasons["histogram"] and "histogram" not in plain.reasons
    assert (plain.images, ranked.images) == (1, 2)
    write_plan(tmp_path / "plan.toml", ranked)
    assert read_plan(tmp_path / "plan.toml") == ranked


def test_a_plan_from_before_ranks_is_one_without_them(cohort: Cohort, tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.toml", planned(cohort)
    write_plan(path, plan)
    text = path.read_text(encoding="utf-8")
    assert text.count("histogram = false\n") == 1
    text = re.sub(r"checksum = .*\n", "", text)  # plans of that time had none
    path.write_text(text.replace("histogram = false\n", ""), encoding="utf-8")
    assert read_plan(path) == plan and not read_plan(path).histogram


def test_an_input_is_compared_by_its_intensities_and_not_by_its_ranks(cohort: Cohort) -> None:
    plain, ranked = planned(cohort), planned(cohort, ask(histogram=True))
    usual = read_volume(cohort.cases[0].images["t1"])
    odd = Volume(np.where(usual.array > 110, 2000, usual.array).astype(np.float32), usual.geometry)
    for image, is_odd in ((usual, False), (odd, True)):
        told = [out_of_distribution_warning(plan, prepare_source([image], plan)) for plan in (plain, ranked)]
        assert told[0] == told[1] and (told[0] is not None) == is_odd


def test_a_patch_fits_the_refiner_too(cohort: Cohort) -> None:
    deep = make_recipe("A15", "small", {"generator.refiner": (2,) * 7, "data.patch": 32})
    with pytest.raises(RecipeError, match="multiple of 64"):
        planned(cohort, deep)


def test_super_resolution_says_what_is_thick_what_becomes_of_it_and_what_the_network_sees(
    cohort: Cohort, tmp_path: Path
) -> None:
    plan = planned(cohort, ask(sources=("t1",), target="t1", task="super-resolution", factor=4, axis="K"))
    assert str(plan.degradation) == "4 along K, gaussian" and plan.own == 0
    assert plan.spacing_mm == (1.0, 3.0, 1.0)  # arranged: I, K, J of slices 3 mm apart
    for words in ("axial slices of 12 mm", "become slices of 3 mm", "cubic spline", "sees coronal slices"):
        assert words in plan.reasons["degradation"]
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    plain = planned(cohort)
    write_plan(tmp_path / "plain.toml", plain)
    assert "degradation" not in read_toml(tmp_path / "plain.toml") and plain.own is None


def test_statistics_of_super_resolution_are_those_of_training_cases_as_the_network_sees_them(cohort: Cohort) -> None:
    recipe = ask(sources=("t1",), target="t1", task="super-resolution", factor=3, axis="J")
    plan = planned(cohort, recipe, ["case00", "case01"])
    with_less = dataclasses.replace(cohort, cases=cohort.cases[:2])
    assert planned(with_less, recipe, ["case00", "case01"]) == plan
    # median_iqr of what is shown is 1.349 by definition; the sharper target's is larger on the same scale
    assert plan.input_sd[1] > 1.05 * plan.input_sd[0]
    assert plan.target_sd == plan.input_sd[1]


def test_a_target_among_the_sources_is_for_super_resolution_alone(cohort: Cohort) -> None:
    with pytest.raises(RecipeError, match="'t1' is also a source"):
        ask(sources=("t1",), target="t1")
    plan = planned(cohort, ask(sources=("t1",), target="t2", task="super-resolution", factor=2, axis="I"))
    assert plan.own is None and plan.degradation is not None  # another modality, thin, at once
    with pytest.raises(ValueError, match="only super-resolution allows"):
        dataclasses.replace(plan, target="t1", degradation=None)
