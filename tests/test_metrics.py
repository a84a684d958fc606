"""Figures of merit equal other libraries' where both are defined, and hand numbers where none is."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.stats import spearmanr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score

from chiasm.errors import RecipeError
from chiasm.metrics import conventions, edges, lesions, ranking, ssim, voxelwise
from chiasm.metrics.cut_out import cut_out_ssim

ONE = (1.0, 1.0, 1.0)
RANGE = (0.0, 1000.0)


def images(shape: tuple[int, int, int] = (61, 70, 53), seed: int = 0, noise: float = 30.0):
    """A smooth positive target, a noisy prediction, and an ellipsoid that fills the middle."""
    rng = np.random.default_rng(seed)
    target = gaussian_filter(rng.standard_normal(shape), 2)
    target = 400 + 150 * target / target.std()
    prediction = target + noise * rng.standard_normal(shape)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    mask = sum((axis / 0.8) ** 2 for axis in axes) < 1
    return prediction.astype(np.float32), target.astype(np.float32), mask


def line(*values: float) -> np.ndarray:
    """A volume of one row of voxels along I."""
    return np.array(values, dtype=np.float64).reshape(-1, 1, 1)


def mask_of(text: str) -> np.ndarray:
    return np.array([letter == "x" for letter in text]).reshape(-1, 1, 1)


# Error and likeness


def test_errors_of_a_row_of_four_are_those_worked_by_hand() -> None:
    prediction, target, mask = line(3, 0, 5, 99), line(0, 4, 5, 0), mask_of("xxx.")
    assert voxelwise.mae(prediction, target, mask) == pytest.approx(7 / 3)
    assert voxelwise.bias(prediction, target, mask) == pytest.approx(-1 / 3)
    assert voxelwise.rmse(prediction, target, mask) == pytest.approx(np.sqrt(25 / 3))
    assert voxelwise.nmae(prediction, target, mask, data_range=10) == pytest.approx(0.7 / 3)
    assert voxelwise.psnr(prediction, target, mask, data_range=10) == pytest.approx(10 * np.log10(300 / 25))


def test_integers_do_not_wrap() -> None:
    prediction, target = np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 200, np.uint8)
    assert voxelwise.bias(prediction, target, np.ones((1, 1, 1), bool)) == -200


def test_psnr_and_ncc_equal_scikit_image_and_numpy() -> None:
    prediction, target, mask = images()
    wanted = peak_signal_noise_ratio(target[mask], prediction[mask], data_range=1000)
    assert voxelwise.psnr(prediction, target, mask, 1000) == pytest.approx(wanted, abs=1e-4)
    assert voxelwise.ncc(prediction, target, mask) == pytest.approx(np.corrcoef(prediction[mask], target[mask])[0, 1])


@pytest.mark.parametrize("size", [1, 511, 512, 100_003])
def test_sums_and_correlations_of_single_precision_are_those_of_double_precision(size: int) -> None:
    rng = np.random.default_rng(size)
    a = rng.normal(1000, 300, size).astype(np.float32)
    b = (a + rng.normal(0, 200, size)).astype(np.float32)
    assert voxelwise.total(a) == pytest.approx(a.astype(np.float64).sum(), rel=1e-8)
    assert voxelwise.total(a[::-1]) == pytest.approx(a.astype(np.float64).sum(), rel=1e-8)
    assert voxelwise.mean_or_nan(a - b) == pytest.approx((a - b).astype(np.float64).mean(), abs=1e-6)
    if size > 1:
        wanted = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]
        assert voxelwise.pearson(a, b) == pytest.approx(wanted, abs=1e-7)
        assert np.isnan(voxelwise.pearson(a, np.full(size, np.float32(0.1))))


def test_equal_images_score_perfectly() -> None:
    _, target, mask = images()
    figures = conventions.score(target, target, mask, "chiasm", RANGE, ONE)
    assert figures["psnr"] == np.inf
    wanted = {"mae": 0, "bias": 0, "rmse": 0, "nmae": 0, "ssim": 1, "ncc": 1, "gradient_error": 0, "sharpness": 1}
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("convention", conventions.CONVENTIONS)
def test_an_empty_mask_gives_nan_and_never_zero(convention: str) -> None:
    prediction, target, mask = images((20, 21, 22))
    figures = conventions.score(prediction, target, np.zeros_like(mask), convention, RANGE, ONE)
    masked = conventions.CONVENTIONS[convention].masked
    assert all(np.isnan(value) for name, value in figures.items() if masked or name not in ("psnr", "ssim"))


def test_ranges_that_are_not_positive_are_refused() -> None:
    prediction, target, mask = images((20, 21, 22))
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="positive"):
            voxelwise.psnr(prediction, target, mask, bad)
        with pytest.raises(ValueError, match="positive"):
            ssim.ssim(prediction, target, mask, bad)


def test_shapes_that_numpy_would_broadcast_are_refused() -> None:
    prediction, target, mask = images((20, 21, 22))
    with pytest.raises(ValueError, match="share one shape"):
        conventions.score(prediction, target[:1], mask, "chiasm", RANGE, ONE)


# Structure


@pytest.mark.parametrize("block", [16, 48, 200])
def test_ssim_equals_scikit_image_everywhere_in_the_mask_for_any_block(block: int, monkeypatch) -> None:
    monkeypatch.setattr(ssim, "BLOCK", block)
    prediction, target, mask = images()
    mask[0, :5, :5] = True  # the border is mirrored alike
    _, full = structural_similarity(
        target.astype(np.float64),
        prediction.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1000,
        full=True,
    )
    found = ssim.ssim_map(prediction, target, mask, 1000)
    assert np.abs(found[mask] - full[mask]).max() < 1e-5
    assert np.isnan(found[~mask]).all()
    assert ssim.ssim(prediction, target, mask, 1000) == pytest.approx(full[mask].mean(), abs=1e-6)


def test_ssim_of_a_uniform_window_and_of_slices_equals_scikit_image() -> None:
    prediction, target, mask = (array.astype(np.float64) for array in images())
    mask = mask > 0
    _, full = structural_similarity(target, prediction, data_range=1000, full=True)
    assert np.abs(ssim.ssim_map(prediction, target, mask, 1000, window="uniform") - full)[mask].max() < 1e-5
    _, slice_ = structural_similarity(target[..., 20], prediction[..., 20], data_range=1000, full=True)
    flat = ssim.ssim_map(prediction, target, mask, 1000, window="uniform", axes=(0, 1))[..., 20]
    assert np.abs(flat - slice_)[mask[..., 20]].max() < 1e-5


def test_ssim_over_an_empty_background_equals_scikit_image_and_is_exactly_1_where_images_are_equal() -> None:
    prediction, target, mask = (np.pad(array, 40).astype(np.float64) for array in images())
    prediction = np.where(mask > 0, prediction, target)
    whole = np.ones(mask.shape, bool)
    _, full = structural_similarity(
        target, prediction, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1000, full=True
    )
    prediction, target = prediction.astype(np.float32), target.astype(np.float32)
    found = ssim.ssim_map(prediction, target, whole, 1000)
    assert np.abs(found - full).max() < 1e-4  # float32: up to 3.6e-5, by the processor's matrix product
    assert found.mean(dtype=np.float64) == pytest.approx(full.mean(), abs=1e-7)
    assert (found[:30] == 1).all()
    assert (ssim.ssim_map(target, target, whole, 1000) == 1).all()


@pytest.mark.parametrize("background", [0.0, -40.0])
@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_both_maps_of_a_cut_out_pair_equal_those_of_each_alone(background: float, window: str) -> None:
    prediction, target, mask = images()
    mask = np.pad(mask > 0, ((0, 40), (20, 20), (9, 0)))
    mask[0, :5, :5] = True  # up to the border
    prediction, target = (
        np.where(mask, np.pad(image, ((0, 40), (20, 20), (9, 0))), background).astype(np.float32)
        for image in (prediction, target)
    )
    found = cut_out_ssim(prediction, target, mask, background, 1000, window=window)
    masked = ssim.ssim_map(prediction * mask, target * mask, mask, 1000, window=window)
    whole = ssim.ssim_map(prediction, target, np.ones_like(mask), 1000, window=window)
    assert np.abs(found.masked - masked)[mask].max() < 3e-5 and np.isnan(found.masked[~mask]).all()
    assert np.abs(found.whole - whole).max() < 3e-5
    assert found.whole.mean(dtype=float) == pytest.approx(whole.mean(dtype=float), abs=4e-8)


def test_only_masked_conventions_with_a_fixed_peak_leave_out_the_background() -> None:
    _, target, mask = images((20, 20, 20))
    for name in ("nie-v1", "resvit", "syndiff", "ptnet3d"):
        with pytest.raises(ValueError, match="leaves out the background"):
            conventions.CutOutPairing(target[mask > 0], mask > 0, 0.0, conventions.find_convention(name), RANGE)


def test_ssim_is_exact_for_images_far_from_zero() -> None:
    prediction, target, mask = (array.astype(np.float64) for array in images())
    prediction, target, mask = prediction + 1e5, target + 1e5, mask > 0
    _, full = structural_similarity(
        target, prediction, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1000, full=True
    )
    assert np.abs(ssim.ssim_map(prediction, target, mask, 1000) - full)[mask].max() < 1e-5


def test_a_volume_thinner_than_the_window_is_mirrored_as_scipy_does() -> None:
    prediction, target, mask = images((30, 31, 3))
    wanted = [gaussian_filter(image.astype(np.float64), 1.5, truncate=3.5) for image in (prediction, target)]
    ux, uy = wanted
    xx, yy, xy = (
        gaussian_filter(product.astype(np.float64), 1.5, truncate=3.5)
        for product in (
            prediction.astype(np.float64) ** 2,
            target.astype(np.float64) ** 2,
            prediction.astype(np.float64) * target,
        )
    )
    c1, c2 = 10.0**2, 30.0**2
    full = (2 * ux * uy + c1) * (2 * (xy - ux * uy) + c2) / (ux**2 + uy**2 + c1) / (xx - ux**2 + yy - uy**2 + c2)
    mask = np.ones_like(mask)
    assert np.abs(ssim.ssim_map(prediction, target, mask, 1000) - full).max() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ssim_and_psnr_equal_monai() -> None:
    import torch
    from monai.metrics import MAEMetric, PSNRMetric, SSIMMetric

    prediction, target, _ = images()
    inner = np.zeros(target.shape, bool)
    inner[5:-5, 5:-5, 5:-5] = True  # MONAI takes no window that leaves the volume
    x, y = (torch.from_numpy(array)[None, None] for array in (prediction, target))
    wanted = float(SSIMMetric(spatial_dims=3, data_range=1000.0, win_size=11, kernel_sigma=1.5)(x, y))
    assert ssim.ssim(prediction, target, inner, 1000) == pytest.approx(wanted, abs=1e-5)
    everywhere = np.ones(target.shape, bool)
    assert voxelwise.psnr(prediction, target, everywhere, 1000) == pytest.approx(
        float(PSNRMetric(1000.0)(x, y)), abs=1e-4
    )
    assert voxelwise.mae(prediction, target, everywhere) == pytest.approx(float(MAEMetric()(x, y)), rel=1e-5)


def test_ms_ssim_equals_the_challenges_recipe_written_with_scipy() -> None:
    prediction, target, mask = images((101, 98, 99))
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    x, y, inside, product = prediction.astype(np.float64), target.astype(np.float64), mask, 1.0
    for weight in weights:
        ux, uy, xx, yy, xy = (uniform_filter(image, 7) for image in (x, y, x * x, y * y, x * y))
        sample = 343 / 342
        vx, vy, vxy = sample * (xx - ux**2), sample * (yy - uy**2), sample * (xy - ux * uy)
        sd = np.sqrt(vx.clip(0)) * np.sqrt(vy.clip(0))
        parts = (2 * ux * uy + 100) / (ux**2 + uy**2 + 100), (2 * sd + 900) / (vx + vy + 900), (vxy + 450) / (sd + 450)
        full = np.prod([part.clip(0) ** weight for part in parts], axis=0)
        product *= full[3:-3, 3:-3, 3:-3][inside[3:-3, 3:-3, 3:-3]].mean()
        x, y = (np.pad(image, ((1, 0),) * 3) for image in (x, y))
        x, y = (
            sum(
                image[i : i - 1 or None, j : j - 1 or None, k : k - 1 or None]
                for i in (0, 1)
                for j in (0, 1)
                for k in (0, 1)
            )
            / 8
            for image in (x, y)
        )
        x, y, inside = x[::2, ::2, ::2], y[::2, ::2, ::2], inside[::2, ::2, ::2]
    assert ssim.ms_ssim(prediction, target, mask, 1000) == pytest.approx(product, abs=1e-5)


# Edges


def test_gradients_of_a_row_are_those_worked_by_hand() -> None:
    target, prediction, mask = line(0, 4, 4, 9, 50), line(0, 2, 4, 4, -70), mask_of("xxxx.")
    found = edges.gradients(prediction, target, mask, (2.0, 1.0, 1.0))
    # |d target| = 4 0 5 and |d prediction| = 2 2 0, over 2 mm
    assert found == pytest.approx(((2 + 2 + 5) / 3 / 2, 4 / 9))


def test_blurring_lowers_the_sharpness_and_noise_raises_it() -> None:
    noisy, target, mask = images()
    blurred = gaussian_filter(target, 2)
    assert edges.sharpness(blurred, target, mask, ONE) < 0.8 < 1.2 < edges.sharpness(noisy, target, mask, ONE)


@pytest.mark.parametrize(
    ("region", "width_mm", "spacing", "band"),
    [
        ("....xxxx", 2.0, 1.0, "...xx..."),
        ("....xxxx", 4.0, 1.0, "..xxxx.."),
        ("....xxxx", 4.0, 2.0, "...xx..."),
        ("...xx...", 2.0, 1.0, "..xxxx.."),
        ("xxxxxxxx", 4.0, 1.0, "........"),
        ("........", 4.0, 1.0, "........"),
    ],
)
def test_an_edge_band_has_half_its_width_on_either_side(
    region: str, width_mm: float, spacing: float, band: str
) -> None:
    found = edges.edge_band(mask_of(region), width_mm, (spacing, 1.0, 1.0))
    assert "".join(".x"[int(voxel)] for voxel in found.ravel()) == band


def test_edge_voxels_lie_on_the_step_and_only_there() -> None:
    target = np.zeros((20, 20, 20), np.float32)
    target[10:] = 100
    found = edges.edge_voxels(target, np.ones(target.shape, bool), ONE, share=0.05)
    assert found[9].all() and found.sum() == 400


# Lesions


def lesion_case():
    """Two lesions of contrast 100 and 40 on tissue of 200, 1000 and 27 voxels of 1 mm."""
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    labels[8:12, 8:12, 8:12] = 2  # a core is no lesion of its own
    labels[28:31, 28:31, 28:31] = 1
    target = np.full(labels.shape, 200.0, np.float32)
    target[labels > 0] = 300
    target[28:31, 28:31, 28:31] = 240
    return target, np.ones(labels.shape, bool), labels


def test_components_have_the_volume_and_size_worked_by_hand() -> None:
    _, _, labels = lesion_case()
    labels[15, 15, 15] = 1  # touches by a corner only
    labels[0, 0, 39] = 1  # a single voxel is no lesion
    first, second = lesions.lesion_components(labels, (1.0, 1.0, 1.0))
    assert (first.volume_ml, first.size) == (pytest.approx(1.001), "medium")
    assert (second.volume_ml, second.size) == (pytest.approx(0.027), "small")
    assert lesions.lesion_components(labels, (2.0, 2.0, 3.0))[0].size == "large"
    assert second.mask(labels.shape)[28:31, 28:31, 28:31].all() and second.mask(labels.shape).sum() == 27


@pytest.mark.parametrize(
    ("side_mm", "voxels", "is_lesion"),
    [
        (1.0, 9, False),  # 9 mm3
        (1.0, 10, True),
        (2.0, 2, False),  # 16 mm3, but two voxels
        (2.0, 3, True),
        (4.0, 1, False),  # 64 mm3 in a single voxel
        (4.0, 3, True),
    ],
)
def test_a_lesion_has_three_voxels_and_ten_cubic_millimetres(side_mm: float, voxels: int, is_lesion: bool) -> None:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[3, 1, :voxels] = 1
    labels[8, 8, 8] = 2  # noise, on any grid
    found = lesions.split_components(labels, (side_mm,) * 3)
    assert (len(found.lesions), found.too_small) == ((1, 1) if is_lesion else (0, 2))
    assert lesions.split_components(labels, (side_mm,) * 3, least_ml=0, least_voxels=1).too_small == 0
    assert lesions.split_components(np.zeros_like(labels), (1.0, 1.0, 1.0)) == ((), 0)


def test_contrast_kept_is_that_of_the_blend() -> None:
    target, mask, labels = lesion_case()
    flat = np.full_like(target, 200)
    rng = np.random.default_rng(0)
    texture = rng.standard_normal(target.shape).astype(np.float32)
    found = [
        lesions.lesion_scores(0.3 * target + 0.7 * flat, target + texture, lesions.ring_of(lesion, mask, labels, ONE))
        for lesion in lesions.lesion_components(labels, ONE)
    ]
    assert [figures.contrast_target for figures in found] == pytest.approx([100, 40], abs=0.5)
    assert [figures.contrast_kept for figures in found] == pytest.approx([0.3, 0.3], abs=0.01)
    assert found[0].mae == pytest.approx(70, abs=1) and found[0].bias == pytest.approx(-70, abs=1)


def test_a_ring_holds_neither_other_lesions_nor_voxels_outside_the_mask() -> None:
    target, mask, labels = lesion_case()
    target += np.random.default_rng(0).standard_normal(target.shape).astype(np.float32)
    lesion = lesions.lesion_components(labels, ONE)[0]
    before = lesions.lesion_scores(target, target, lesions.ring_of(lesion, mask, labels, ONE))
    labels[16:18, 5:15, 5:15] = 3
    target[16:18, 5:15, 5:15] = 9999
    mask[:3], target[:3] = False, -9999
    after = lesions.lesion_scores(target, target, lesions.ring_of(lesion, mask, labels, ONE))
    assert after.contrast_target == pytest.approx(before.contrast_target, abs=0.3)


def test_a_lesion_that_the_target_does_not_show_has_no_contrast_to_keep() -> None:
    target, mask, labels = lesion_case()
    target = 200 + 100 * np.random.default_rng(0).standard_normal(target.shape)
    lesion = lesions.lesion_components(labels, ONE)[0]
    figures = lesions.lesion_scores(target, target, lesions.ring_of(lesion, mask, labels, ONE))
    assert np.isnan(figures.contrast_kept)
    assert np.isnan(lesions.recall([figures.contrast_kept]))


def test_false_lesions_are_counted_away_from_the_labels_only() -> None:
    target, mask, labels = lesion_case()
    made_up = target.copy()
    made_up[20:26, 5:11, 25:31] += 100  # 0.2 ml
    made_up[4:16, 4:16, 4:16] += 100  # a thicker lesion is no new one
    made_up[35, 5, 5] += 500  # too small
    far = lesions.far_from_labels(mask, labels, ONE)
    assert lesions.false_lesions(target, target, mask, far, 100.0, ONE) == 0
    assert lesions.false_lesions(made_up, target, mask, far, 100.0, ONE) == 1
    assert lesions.false_lesions(made_up, target, mask, far, -100.0, ONE) == 0, "dark lesions are another kind"
    mask[20:26] = False
    far = lesions.far_from_labels(mask, labels, ONE)
    assert lesions.false_lesions(made_up, target, mask, far, 100.0, ONE) == 0


# Expected error


def test_spearman_equals_scipy_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(5000)
    for b in (a + rng.standard_normal(5000), np.round(a), np.exp(-a)):
        assert ranking.spearman(np.round(a, 1), b) == pytest.approx(spearmanr(np.round(a, 1), b).statistic, abs=1e-12)
    assert np.isnan(ranking.spearman(a, np.zeros(5000))) and np.isnan(ranking.spearman(a[:1], a[:1]))


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    score, error = np.round(rng.random(4000), 1), rng.random(4000)
    worst = error >= np.quantile(error, 0.9)
    assert ranking.auroc_worst(score + worst, error) == pytest.approx(roc_auc_score(worst, score + worst), abs=1e-12)
    assert np.isnan(ranking.auroc(score, np.zeros(4000, bool)))


def test_risk_coverage_is_the_table_worked_by_hand() -> None:
    found = ranking.risk_coverage(np.array([3.0, 1.0, 2.0, 2.0]), np.array([8.0, 1.0, 2.0, 4.0]))
    assert found.coverage == pytest.approx([0.25, 0.5, 0.75, 1])
    assert found.risk == pytest.approx([1, 2, 7 / 3, 15 / 4])  # the tied 2 and 4 count as 3 each


def test_a_map_that_knows_everything_nothing_or_the_opposite_is_told_apart() -> None:
    error = np.random.default_rng(0).random(10_000)
    assert ranking.ause(error, error) == 0
    assert ranking.ausc(np.zeros(10_000), error) == pytest.approx(1)
    assert ranking.ausc(-error, error) > 1 > ranking.ausc(error, error)
    assert ranking.ausc(error, error) == pytest.approx(0.5, abs=0.01)  # mean of c / 2 over the mean 1 / 2


# Conventions


@pytest.mark.parametrize("convention", [name for name, rules in conventions.CONVENTIONS.items() if rules.masked])
def test_what_lies_outside_the_mask_changes_nothing(convention: str) -> None:
    prediction, target, mask = images()
    before = conventions.score(prediction, target, mask, convention, RANGE, ONE)
    prediction[~mask], target[~mask] = 777, -5000
    assert conventions.score(prediction, target, mask, convention, RANGE, ONE) == before


def test_exact_background_adds_what_the_masks_share_says() -> None:
    prediction, target, mask = images((80, 80, 80))
    mask[:] = False
    mask[15:65, 15:65, 15:48] = True  # 16 % of the volume, as a brain in BraTS
    prediction[~mask] = target[~mask] = 0
    inside = voxelwise.psnr(prediction, target, mask, 1000)
    whole = voxelwise.psnr(prediction, target, np.ones_like(mask), 1000)
    assert whole - inside == pytest.approx(10 * np.log10(mask.size / mask.sum()), abs=1e-3)
    assert 7.5 < whole - inside < 8.5


def test_one_prediction_scores_many_decibels_apart_by_the_range_alone() -> None:
    prediction, target, mask = images()
    scores = {
        name: conventions.score(prediction, target, mask, name, RANGE, ONE)["psnr"] for name in conventions.CONVENTIONS
    }
    assert max(scores.values()) - min(scores.values()) > 10
    plain = {conventions.score(prediction, target, mask, name, RANGE, ONE)["mae"] for name in conventions.CONVENTIONS}
    assert len(plain) == 1, "the error itself knows no convention"


def test_synthrad2023_equals_the_challenges_recipe() -> None:
    prediction, target, mask = images(noise=300)
    prediction, target = prediction * 8 - 1400, target * 8 - 1400  # some values are cut off at either end
    assert min(prediction.min(), target.min()) < -1024 and prediction.max() > 3000
    x, y = (np.clip(image.astype(np.float64), -1024, 3000) for image in (prediction, target))
    _, full = structural_similarity(
        np.where(mask, y, -1024) + 1024, np.where(mask, x, -1024) + 1024, data_range=4024, full=True
    )
    inner = (slice(3, -3),) * 3
    found = conventions.score(prediction, target, mask, "synthrad2023", RANGE, ONE)
    assert found["ssim"] == pytest.approx(full[inner][mask[inner]].mean(), abs=1e-5)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(y[mask], x[mask], data_range=4024), abs=1e-3)


def test_synthrad2025_clips_masks_and_takes_ms_ssim() -> None:
    prediction, target, mask = images(noise=100)
    prediction, target = prediction * 4, target * 4
    clipped = [np.where(mask, np.clip(image, -1024, 3071) + 1024, 0) for image in (prediction, target)]
    found = conventions.score(prediction, target, mask, "synthrad2025", RANGE, ONE)
    assert found["ms_ssim"] == pytest.approx(ssim.ms_ssim(*clipped, mask, 4095.0), abs=1e-6)
    assert 0 < found["ms_ssim"] < 1


def made_head(shape: tuple[int, int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """A synthetic and a real CT of a head with metal in it, and the mask, by formula alone."""
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    radius = np.sqrt((i / 0.8) ** 2 + (j / 0.9) ** 2 + (k / 0.85) ** 2)
    brain = 40 + 25 * np.sin(9 * i) * np.cos(7 * j + 3 * k)
    real = np.where(radius < 0.85, brain, np.where(radius < 1, 1100 + 400 * np.cos(11 * j), -1000))
    rim = (radius > 0.8) & (radius < 0.87)
    made = real + 60 * np.sin(5 * i + 2 * j) * np.cos(13 * k) + np.where(rim, 300 * np.sin(17 * i * j), 0)
    metal = np.abs(i - 0.3) + np.abs(j) + np.abs(k) < 0.12
    return made, real + 3500 * metal, radius < 1.02


@pytest.mark.parametrize(
    ("name", "shape", "figures"),
    [  # mae, psnr and ssim or ms_ssim that the challenge's own code gives: commits fe7e385 of SynthRAD2023/metrics and
        # 17cac47 of SynthRAD2025/evaluation, ImageMetrics().mae, .psnr and .ssim or .ms_ssim(real, made, mask)
        ("synthrad2023", (60, 70, 50), (48.15166254, 30.87292710, 0.95715996)),
        ("synthrad2023", (100, 104, 98), (47.97622985, 30.84931547, 0.96360194)),
        ("synthrad2025", (60, 70, 50), (48.15166254, 30.91356206, 0.97698028)),
        ("synthrad2025", (100, 104, 98), (47.97622985, 30.88957787, 0.96428151)),
    ],
)
def test_synthrad_conventions_give_the_figures_of_the_challenges_own_code(
    name: str, shape: tuple[int, int, int], figures: tuple[float, float, float]
) -> None:
    found = conventions.score(*made_head(shape), name, RANGE, ONE)
    likeness = found["ms_ssim" if name == "synthrad2025" else "ssim"]
    np.testing.assert_allclose((found["mae"], found["psnr"], likeness), figures, atol=1e-5)


def test_scale_leaking_conventions_are_those_of_the_literature() -> None:
    prediction, target, mask = images((40, 41, 12))
    prediction[..., 0] = target[..., 0] = 0  # an empty slice is no score
    x, y = prediction.astype(np.float64), target.astype(np.float64)
    find = {name: conventions.score(prediction, target, mask, name, RANGE, ONE) for name in conventions.CONVENTIONS}
    assert {name for name, rules in conventions.CONVENTIONS.items() if rules.scale_leaking} == {
        "nie-v1",
        "resvit",
        "syndiff",
        "ptnet3d",
    }
    rmse = np.sqrt(np.mean((x - y) ** 2))
    assert find["nie-v1"]["psnr"] == pytest.approx(20 * np.log10(max(x.max(), y.max()) / rmse), abs=1e-3)
    slices = [(x[..., k], y[..., k]) for k in range(1, 12)]
    resvit = [peak_signal_noise_ratio(b / b.max(), a / a.max(), data_range=1) for a, b in slices]
    assert find["resvit"]["psnr"] == pytest.approx(np.mean(resvit), abs=1e-3)
    similar = [structural_similarity(b / b.max(), a / a.max(), data_range=1) for a, b in slices]
    assert find["resvit"]["ssim"] == pytest.approx(np.mean(similar), abs=1e-5)
    syndiff = [20 * np.log10(a.max() / np.sqrt(np.mean((a - b) ** 2))) for a, b in slices]
    assert find["syndiff"]["psnr"] == pytest.approx(np.mean(syndiff), abs=1e-3)
    a, b = ((image - image.min()) / np.ptp(image) for image in (x, y))
    assert find["ptnet3d"]["psnr"] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-3)
    assert find["ptnet3d"]["ssim"] == pytest.approx(structural_similarity(b, a, data_range=2), abs=1e-5)


def test_a_gain_of_the_prediction_is_punished_by_honest_conventions_and_forgiven_by_leaking_ones() -> None:
    _, target, mask = images()
    doubled = 2 * target
    assert conventions.score(doubled, target, mask, "resvit", RANGE, ONE)["psnr"] > 100
    assert conventions.score(doubled, target, mask, "chiasm", RANGE, ONE)["psnr"] < 10


def test_an_unknown_convention_is_refused_with_the_known_ones() -> None:
    prediction, target, mask = images((20, 21, 22))
    with pytest.raises(RecipeError, match="synthrad2023"):
        conventions.score(prediction, target, mask, "synthrad2024", RANGE, ONE)


def test_importing_metrics_is_light() -> None:
    program = (
        "import sys, chiasm.metrics\n"
        "assert not {'torch', 'scipy.ndimage', 'scipy.stats', 'pandas', 'skimage'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
