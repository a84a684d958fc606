"""Intensity maps are monotone, invertible, blind to gain, and chosen by what makes cases agree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.preparation.intensity import (
    KINDS,
    IntensityMap,
    MapKind,
    Pair,
    agreement,
    choose_intensity,
    fit_intensity,
    fit_lookup,
    lookups_of_others,
    reference_map,
)

DATA = Path(os.environ.get("CHIASM_DATA", Path(__file__).parents[2] / "shared" / "data"))
RNG = np.random.default_rng(1)
GAUSSIAN = RNG.normal(500, 80, size=(40, 50, 30)).astype(np.float32)
SKEWED = RNG.gamma(3, 40, size=(40, 50, 30)).astype(np.float32)
EVERYWHERE = np.ones(GAUSSIAN.shape, bool)


@pytest.mark.parametrize("kind", [*KINDS, "hu"])
def test_a_map_and_its_inverse_give_back_what_went_in(kind: MapKind) -> None:
    fitted = fit_intensity(SKEWED, EVERYWHERE, kind, (-1024, 3071))
    wide = np.concatenate([SKEWED.ravel(), [-1000, 0, 5000]]).astype(np.float32)
    assert np.abs(fitted.invert(fitted.apply(wide)) - wide).max() < 1e-6 * np.ptp(wide)
    normalised = np.linspace(-4, 4, 999)
    assert np.abs(fitted.apply(fitted.invert(normalised)) - normalised).max() < 1e-4
    assert np.all(np.diff(fitted.apply(np.arange(-1000, 5000))) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gaussian_comes_out_standard_normal_under_every_kind(kind: MapKind) -> None:
    made = fit_intensity(GAUSSIAN, EVERYWHERE, kind).apply(GAUSSIAN)
    assert made.dtype == np.float32
    # a histogram's mode is known less well than a median
    assert abs(made.mean()) < (0.25 if kind == "mode" else 0.02)
    assert made.std() == pytest.approx(1, abs=0.12 if kind == "mode" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_gain_and_offset_of_a_scan_do_not_matter(kind: MapKind) -> None:
    scan = (SKEWED * 37 + 211).astype(np.float32)
    here, there = (fit_intensity(array, EVERYWHERE, kind).apply(array) for array in (SKEWED, scan))
    assert np.abs(here - there).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_voxels_outside_the_mask_change_nothing(kind: MapKind) -> None:
    mask = RNG.random(SKEWED.shape) < 0.5
    other = np.where(mask, SKEWED, 1e6).astype(np.float32)
    assert fit_intensity(SKEWED, mask, kind) == fit_intensity(other, mask, kind)


def test_maps_equal_those_of_scikit_learn() -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    column = SKEWED.reshape(-1, 1).astype(np.float64)
    robust = preprocessing.RobustScaler(unit_variance=True).fit_transform(column).ravel()
    standard = preprocessing.StandardScaler().fit_transform(column).ravel()
    quantiles = preprocessing.QuantileTransformer(output_distribution="normal", n_quantiles=1000, subsample=None)
    ranked = quantiles.fit_transform(column)
    flat = SKEWED.ravel()
    assert np.abs(fit_intensity(flat, None, "median_iqr").apply(flat) - robust).max() < 1e-4
    assert np.abs(fit_intensity(flat, None, "zscore").apply(flat) - standard).max() < 1e-4
    middle = (flat > np.percentile(flat, 2)) & (flat < np.percentile(flat, 98))
    apart = np.abs(fit_intensity(flat, None, "rank").apply(flat) - ranked.ravel())
    assert apart[middle].max() < 0.02  # 64 knots against 1000


def test_the_hounsfield_window_maps_exactly_to_minus_one_and_one() -> None:
    fitted = fit_intensity(SKEWED, None, "hu", (-1000, 1000))
    assert fitted.apply([-1000, -500, 0, 1000, 2000]).tolist() == [-1, -0.5, 0, 1, 2]


def test_a_percentile_map_has_its_ends_where_a_gaussian_has_them() -> None:
    fitted = fit_intensity(np.arange(1001, dtype=np.float32), None, "percentile")
    assert fitted.values == (5.0, 995.0)
    assert fitted.normalised == pytest.approx((-2.5758, 2.5758), abs=1e-4)


def test_ranks_survive_many_equal_intensities() -> None:
    values = np.concatenate([np.zeros(500), np.full(300, 7), np.arange(200)]).astype(np.float32)
    fitted = fit_intensity(values, None, "rank")
    assert len(fitted.values) < 64
    assert np.abs(fitted.invert(fitted.apply(values)) - values).max() < 1e-3


def test_the_cohorts_map_is_the_median_scan() -> None:
    maps = [fit_intensity(SKEWED * gain, None, "median_iqr") for gain in (1, 2, 40)]
    assert reference_map(maps).values == pytest.approx(maps[1].values)
    ranked = [fit_intensity(SKEWED * gain, None, "rank") for gain in (1, 2, 40)]
    assert reference_map(ranked).values == pytest.approx(ranked[1].values)


def test_a_map_survives_its_dictionary() -> None:
    fitted = fit_intensity(SKEWED, None, "rank")
    assert IntensityMap.from_dict(fitted.to_dict()) == fitted


def test_the_lookup_is_the_mean_of_each_bin() -> None:
    x, y = fit_lookup([1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60], bins=3)
    assert x.tolist() == [1.5, 3.5, 5.5]
    assert y.tolist() == [15, 35, 55]


def test_the_lookup_equals_scipys_binned_means() -> None:
    from scipy.stats import binned_statistic

    source = RNG.normal(size=6400)
    target = np.sin(source) + RNG.normal(size=6400)
    x, y = fit_lookup(source, target)
    edges = np.sort(source)[np.arange(0, 6400, 100)]
    wanted = binned_statistic(source, [source, target], bins=[*edges, source.max() + 1]).statistic
    assert np.allclose(x, wanted[0])
    assert np.allclose(y, wanted[1])


def test_equal_intensities_fall_into_one_bin() -> None:
    x, y = fit_lookup([0] * 90 + [1] * 10, [5] * 90 + [8] * 10, bins=64)
    assert x.tolist() == [0, 1]
    assert y.tolist() == [5, 8]
    assert np.all(np.diff(fit_lookup(RNG.integers(0, 9, 5000), RNG.random(5000))[0]) > 0)


def related(seed: int, gain: float = 1.0, tail: float = 0.0) -> Pair:
    """A pair whose target follows from its source; a share `tail` of the voxels is very bright in both."""
    rng = np.random.default_rng(seed)
    source = rng.normal(10, 2, 4000)
    target = 30 - 2 * source + rng.normal(0, 0.5, 4000)
    bright = rng.random(4000) < tail
    source[bright] += 60 * rng.random()
    return Pair((source * gain).astype(np.float32), (target * gain).astype(np.float32))


def test_agreement_is_what_a_lookup_explains_of_an_unseen_case() -> None:
    # 4^2 / (4^2 + 0.5^2) of the target's variance follows from the source
    pairs = [related(seed, gain) for seed, gain in enumerate((1, 5, 40))]
    assert agreement(pairs, "median_iqr", "median_iqr") == pytest.approx(16 / 16.25, abs=0.01)


@pytest.mark.parametrize("levels", [0, 40, 3, 2])
def test_a_lookup_of_all_others_is_the_one_that_is_fitted_to_them(levels: int) -> None:
    rng = np.random.default_rng(levels)
    sources = [rng.normal(size=300 + 40 * case).astype(np.float32) for case in range(7)]
    if levels:  # many ties
        sources = [np.round(np.abs(values) * levels / 3).clip(0, levels - 1) for values in sources]
    targets = [2 * values + rng.normal(size=len(values)) for values in sources]
    for case, found in enumerate(lookups_of_others(sources, targets)):
        x, y = (np.concatenate([*each[:case], *each[case + 1 :]]) for each in (sources, targets))
        for one, other in zip(found, fit_lookup(x, y), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_a_lookup_of_others_with_one_value_is_refused() -> None:
    with pytest.raises(ValueError, match="two different source intensities"):
        list(lookups_of_others([np.arange(9.0), np.ones(9)], [np.arange(9.0), np.arange(9.0)]))


def test_comparing_cases_sorts_their_values_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_values: list[int] = []
    plain = np.argsort

    def counted(values: NDArray[Any], **terms: Any) -> NDArray[np.intp]:
        sorted_values.append(len(values))
        return plain(values, **terms)

    monkeypatch.setattr(np, "argsort", counted)
    for cases in (4, 16):
        sorted_values.clear()
        agreement([related(seed) for seed in range(cases)], "zscore", "zscore")
        assert sum(sorted_values) <= 2 * sum(len(related(seed).source) for seed in range(cases))


def test_agreement_is_poor_between_cases_that_disagree() -> None:
    first, second = related(1), related(2)
    assert agreement([first, Pair(second.source, -second.target)], "zscore", "zscore") < -1


def test_the_kind_that_makes_cases_agree_is_chosen() -> None:
    pairs = [related(seed, gain, tail) for seed, (gain, tail) in enumerate([(1, 0.0), (9, 0.02), (4, 0.0), (30, 0.04)])]
    kind, table = choose_intensity(pairs)
    assert kind == "median_iqr"
    assert table[kind] > table["percentile"] + 0.05
    assert set(table) == set(KINDS)


def test_two_cases_are_too_few_to_choose() -> None:
    assert choose_intensity([related(1), related(2)]) == ("median_iqr", {})


def test_ct_keeps_its_window_while_the_other_is_chosen() -> None:
    pairs = [Pair(one.source, one.target * 50) for one in (related(seed) for seed in range(3))]
    kind, table = choose_intensity(pairs, target_kind="hu")
    assert kind in KINDS
    assert table[kind] > 0.9
    with pytest.raises(ValueError, match="both kinds are given"):
        choose_intensity(pairs, source_kind="hu", target_kind="hu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_image_is_refused(kind: MapKind) -> None:
    with pytest.raises(VolumeError, match="the same") as caught:
        fit_intensity(np.full((5, 5, 5), 3.0), None, kind)
    assert caught.value.reason == "constant"


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(VolumeError, match="no voxel"):
        fit_intensity(SKEWED, np.zeros(SKEWED.shape, bool), "zscore")


def test_mistakes_of_a_programmer_are_value_errors() -> None:
    with pytest.raises(ValueError, match="no kind"):
        fit_intensity(SKEWED, None, "minmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window"):
        fit_intensity(SKEWED, None, "hu")
    with pytest.raises(ValueError, match="rising"):
        IntensityMap("zscore", (2.0, 1.0), (0.0, 1.0))
    with pytest.raises(ValueError, match="two knots"):
        IntensityMap("zscore", (1.0,), (0.0,))
    with pytest.raises(ValueError, match="one kind"):
        reference_map([fit_intensity(SKEWED, None, kind) for kind in KINDS])
    with pytest.raises(ValueError, match="two different"):
        fit_lookup([1, 1, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="pair up"):
        fit_lookup([1, 2, 3], [1, 2])


@pytest.mark.slow
@pytest.mark.realdata
def test_on_real_tumours_percentiles_make_cases_agree_least() -> None:
    folders = sorted((DATA / "tumour_tcga").glob("Brats18_*"))
    if not folders:
        pytest.skip(f"no tumour scans in {DATA}")

    def read(folder: Path, name: str) -> NDArray[np.float32]:
        return np.asarray(nib.load(folder / f"{folder.name}_{name}.nii.gz").dataobj, np.float32)[::2, ::2, ::2]

    pairs = []
    for folder in folders:
        source, target = read(folder, "t1"), read(folder, "t2")
        pairs.append(Pair(source[source != 0], target[source != 0]))
    kind, table = choose_intensity(pairs)
    assert kind in ("median_iqr", "zscore")
    assert min(table, key=lambda name: table[name]) == "percentile"
