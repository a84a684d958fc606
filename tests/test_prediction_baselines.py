"""The naive baselines do what their names say, from training cases alone, and are stored without pickles."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from skimage.exposure import match_histograms

from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.prediction import baselines
from chiasm.prediction.baselines import NAMES, Baselines, fit_baselines, load_baselines, save_baselines
from chiasm.preparation.arrays import PreparedCase
from chiasm.volumes import Geometry

PLAIN = tuple(name for name in NAMES if name != "bicubic")  # of synthesis


def grid(shape: tuple[int, int, int], origin: tuple[float, float, float], spacing: float = 2.0) -> Geometry:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin
    return Geometry(shape, affine)


def case(number: int, shape: tuple[int, int, int] = (20, 22, 16), origin=(0.0, 0.0, 0.0), curve=np.abs) -> PreparedCase:
    """A source of noise and a target that is a curve of it, inside a box."""
    rng = np.random.default_rng(number)
    mask = np.zeros(shape, bool)
    mask[2:-2, 2:-2, 2:-2] = True
    source = np.where(mask, rng.standard_normal(shape), 0).astype(np.float32)
    target = np.where(mask, curve(source), 0).astype(np.float32)
    name = f"case-{number}"
    return PreparedCase(name, name, None, source[None], target, mask, None, grid(shape, origin))


def predicted(baselines: Baselines, name: str, one: PreparedCase) -> np.ndarray:
    return baselines.predict(name, one.source, one.mask, one.grid)


@pytest.fixture(scope="module")
def fitted() -> Baselines:
    return fit_baselines([case(number) for number in range(4)])


def test_of_each_case_a_sample_alone_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SAMPLE", 1000)
    cases, peaks = [case(number, (64, 64, 40)) for number in range(12)], list[int]()
    for some in (cases[:2], cases[:2], cases):  # once to import
        tracemalloc.start()
        fit_baselines(some)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 0.1 * sum(8 * np.count_nonzero(one.mask) for one in cases[2:])


@pytest.mark.parametrize("name", PLAIN)
def test_a_guess_has_the_masks_shape_and_is_zero_outside(name: str, fitted: Baselines) -> None:
    unseen = case(9)
    guess = predicted(fitted, name, unseen)
    assert guess.shape == unseen.mask.shape and guess.dtype == np.float32
    assert np.isfinite(guess).all() and not guess[~unseen.mask].any()
    assert not predicted(fitted, name, replace(unseen, mask=np.zeros_like(unseen.mask))).any()


def test_all_guesses_at_once_are_those_of_each_alone(fitted: Baselines) -> None:
    unseen = case(9)
    found = fitted.predict_inside(PLAIN, unseen.source, unseen.mask, unseen.grid)
    assert list(found) == list(PLAIN)
    for name, inside in found.items():
        np.testing.assert_array_equal(inside.astype(np.float32), predicted(fitted, name, unseen)[unseen.mask])
    with pytest.raises(RecipeError, match="bicubic"):
        fitted.predict_inside(["mean", "bicubic"], unseen.source, unseen.mask, unseen.grid)


def test_identity_is_the_first_source(fitted: Baselines) -> None:
    unseen = case(9)
    assert np.array_equal(predicted(fitted, "identity", unseen), unseen.source[0])


def test_further_sources_change_nothing(fitted: Baselines) -> None:
    def doubled(one: PreparedCase) -> PreparedCase:
        return replace(one, source=np.concatenate([one.source, 7 - one.source]))

    unseen = case(9)
    again = fit_baselines([doubled(case(number)) for number in range(4)])
    for name in PLAIN:
        assert np.array_equal(predicted(again, name, doubled(unseen)), predicted(fitted, name, unseen))


def test_the_lookup_learns_a_curve_that_is_no_line(fitted: Baselines) -> None:
    unseen = case(9)
    error = (predicted(fitted, "lookup", unseen) - unseen.target)[unseen.mask]
    assert np.abs(error).mean() < 0.03
    assert len(fitted.lookup_source) == 64 and (np.diff(fitted.lookup_source) > 0).all()


def test_histogram_matching_equals_scikit_image(fitted: Baselines) -> None:
    unseen, other = case(9), case(10)
    alone = fit_baselines([other])
    inside = unseen.mask
    wanted = match_histograms(unseen.source[0][inside], other.target[inside])
    found = predicted(alone, "histogram", unseen)[inside]
    assert np.abs(np.sort(found) - np.sort(wanted)).mean() < 0.01
    assert (np.argsort(found, kind="stable") == np.argsort(unseen.source[0][inside], kind="stable")).mean() > 0.95


def test_histogram_matching_survives_a_source_of_few_intensities(fitted: Baselines) -> None:
    unseen = case(9)
    coarse = replace(unseen, source=np.round(unseen.source))
    guess = predicted(fitted, "histogram", coarse)[unseen.mask]
    assert len(np.unique(guess)) == len(np.unique(coarse.source[0][unseen.mask]))
    flat = replace(unseen, source=np.ones_like(unseen.source))
    assert len(np.unique(predicted(fitted, "histogram", flat)[unseen.mask])) == 1


def test_the_mean_image_is_the_mean_over_training_cases_voxel_by_voxel() -> None:
    training = [case(number) for number in range(3)]
    found = predicted(fit_baselines(training), "mean", training[0])
    wanted = np.mean([one.target for one in training], axis=0)
    assert np.abs(found - wanted)[training[0].mask].max() < 1e-5


def test_the_mean_image_is_found_again_in_world_space_on_another_grid() -> None:
    def ramp(shape, origin, spacing):
        """A target that is the world's x in metres, whatever the grid."""
        here = grid(shape, origin, spacing)
        x = (origin[0] + spacing * np.arange(shape[0]))[:, None, None] / 1000
        target = np.broadcast_to(x, shape).astype(np.float32).copy()
        return PreparedCase("x", "x", None, np.zeros((1, *shape), np.float32), target, np.ones(shape, bool), None, here)

    training = [ramp((40, 20, 20), (-40, 0, 0), 2.0), ramp((40, 22, 18), (-30, -4, 2), 2.0)]
    for one in training:
        one.source[0, ::2] = 1  # a look-up needs two intensities
    baselines = fit_baselines(training)
    unseen = ramp((50, 18, 12), (-20, 4, 6), 1.0)
    assert np.abs(predicted(baselines, "mean", unseen) - unseen.target).max() < 1e-4
    far = ramp((10, 10, 10), (5000, 0, 0), 1.0)
    assert np.unique(predicted(baselines, "mean", far)) == pytest.approx(baselines.mean_target)


def test_cases_weigh_nothing_outside_their_masks() -> None:
    first, second = case(0), case(1)
    assert second.target is not None
    half = second.mask.copy()
    half[10:] = False
    spoiled = np.where(half, second.target, 1000).astype(np.float32)
    baselines = fit_baselines([first, replace(second, mask=half, target=spoiled)])
    found = predicted(baselines, "mean", first)
    assert np.abs(found - first.target)[11:][first.mask[11:]].max() < 1e-5, "the second case is not seen there"
    assert baselines.mean_target < 2 and baselines.target_quantiles.max() < 10 and baselines.lookup_target.max() < 10


def test_an_unseen_target_has_no_influence(fitted: Baselines) -> None:
    unseen = case(9)
    again = replace(unseen, target=np.full_like(unseen.target, np.nan))
    for name in PLAIN:
        assert predicted(fitted, name, again).tobytes() == predicted(fitted, name, unseen).tobytes()


def test_cases_that_lie_metres_apart_do_not_fill_the_memory(monkeypatch) -> None:
    from chiasm.prediction import baselines

    monkeypatch.setattr(baselines, "MOST_ATLAS_VOXELS", 50_000)
    fitted = fit_baselines([case(0), case(1, origin=(400.0, 300.0, -200.0))])
    assert fitted.mean_image.size <= 50_000


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, fitted: Baselines) -> None:
    save_baselines(tmp_path, fitted)
    again = load_baselines(tmp_path)
    unseen = case(9)
    for name in PLAIN:
        assert predicted(again, name, unseen).tobytes() == predicted(fitted, name, unseen).tobytes()
    assert again.fitted_on == ("case-0", "case-1", "case-2", "case-3")
    assert again.names == PLAIN
    assert isinstance(again.mean_image, np.memmap)  # it is as large as a volume, and needed for a moment of each case
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baselines.json", "baselines.safetensors"]


def test_a_flipped_bit_a_missing_file_and_a_foreign_card_are_refused(tmp_path: Path, fitted: Baselines) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        load_baselines(tmp_path)
    save_baselines(tmp_path, fitted)
    file, card = tmp_path / "baselines.safetensors", tmp_path / "baselines.json"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(RunError, match="changed"):
        load_baselines(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match="missing"):
        load_baselines(tmp_path)
    file.write_bytes(good)
    content = json.loads(card.read_text())
    for damage in ({"format": 99}, {"affine": [1, 2]}, {"mean_target": None}):
        card.write_text(json.dumps(content | damage))
        with pytest.raises(RunError):
            load_baselines(tmp_path)
    card.write_text("[]")
    with pytest.raises(RunError, match="format"):
        load_baselines(tmp_path)


def test_unknown_names_and_shapes_that_do_not_fit_are_refused(fitted: Baselines) -> None:
    unseen = case(9)
    with pytest.raises(RecipeError, match="lookup"):
        predicted(fitted, "oracle", unseen)
    with pytest.raises(ValueError, match="do not fit"):
        fitted.predict("mean", unseen.source, unseen.mask[1:], unseen.grid)
    with pytest.raises(ValueError, match="training cases"):
        fit_baselines([])
    assert issubclass(RecipeError, ChiasmError)


def test_baselines_never_load_torch() -> None:
    program = (
        "import sys\nfrom chiasm.prediction import baselines\n"
        "assert not {'torch', 'pandas', 'scipy.stats', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_super_resolution_has_bicubic_in_place_of_identity_and_keeps_it_on_disk(tmp_path: Path) -> None:
    training = [replace(case(number), own=0) for number in range(3)]
    fitted = fit_baselines(training)
    assert fitted.names == ("bicubic", "mean", "histogram", "lookup")
    np.testing.assert_array_equal(
        predicted(fitted, "bicubic", training[0]), np.where(training[0].mask, training[0].source[0], 0)
    )
    save_baselines(tmp_path, fitted)
    assert load_baselines(tmp_path).names == fitted.names
    with pytest.raises(RecipeError, match="bicubic"):
        predicted(fitted, "identity", training[0])
    plain = fit_baselines([replace(one, own=None) for one in training])
    assert plain.names == ("identity", "mean", "histogram", "lookup")
    save_baselines(tmp_path, plain)
    assert load_baselines(tmp_path).own is None
