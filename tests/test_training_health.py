"""The health gauge, against scipy and scikit-learn, and what it says in words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from chiasm.prediction.passes import Maps
from chiasm.training.health import gauge, in_words

RNG = np.random.default_rng(0)
SHAPE = (16, 16, 8)
MASK = RNG.random(SHAPE) < 0.8
TARGET = np.where(MASK, RNG.normal(size=SHAPE), 0).astype(np.float32)
ERROR = np.where(MASK, np.abs(RNG.normal(size=SHAPE)), 0).astype(np.float32)
LESION = np.zeros(SHAPE, bool)
LESION[2:8, 2:8, 2:6] = True


def figures(difficulty: np.ndarray, lesion: np.ndarray | None = LESION, beta: float = 1.0) -> dict[str, float]:
    maps = Maps((TARGET + ERROR).astype(np.float32), None, None, difficulty.astype(np.float32), None)
    return gauge(maps, TARGET, MASK, lesion, head="structured", beta=beta, sigma_voxels=(2.0, 2.0, 2.0))


def test_ranks_equal_scipys_and_areas_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    difficulty = np.clip(ERROR / 4 + RNG.random(SHAPE) / 2, 0, 1)
    found = figures(difficulty)
    d, e = difficulty[MASK].astype(np.float32), ERROR[MASK]
    assert found["spearman"] == pytest.approx(spearmanr(d, e).statistic, abs=1e-4)
    signed = np.where(MASK, (TARGET + ERROR).astype(np.float32) - TARGET, 0)
    smooth = np.abs(gaussian_filter(signed, 2)) / gaussian_filter(MASK.astype(np.float32), 2)
    assert found["spearman_smoothed"] == pytest.approx(spearmanr(d, smooth[MASK]).statistic, abs=1e-4)
    assert found["auroc_worst"] == pytest.approx(metrics.roc_auc_score(e >= np.quantile(e, 0.9), d), abs=1e-3)
    assert found["auroc_lesion"] == pytest.approx(metrics.roc_auc_score(LESION[MASK], d), abs=1e-6)
    assert found["weight_ratio"] == pytest.approx(d[LESION[MASK]].mean() / d[~LESION[MASK]].mean(), rel=1e-5)
    assert found["effective_share"] == pytest.approx(d.sum() ** 2 / (len(d) * (d**2).sum()), rel=1e-4)


def test_a_flat_map_weighs_all_voxels_alike() -> None:
    found = figures(np.full(SHAPE, 0.3))
    assert found["effective_share"] == pytest.approx(1) and found["confidence_sd"] == pytest.approx(0, abs=1e-6)


def test_without_labels_nothing_is_said_of_lesions_and_without_the_head_nothing_at_all() -> None:
    assert "auroc_lesion" not in figures(RNG.random(SHAPE), None)
    nothing = Maps(TARGET, None, None, None, None)
    assert gauge(nothing, TARGET, MASK, None, head="structured", beta=1, sigma_voxels=(1, 1, 1)) == {}


@pytest.mark.parametrize("head", ["magnitude", "structured", "realness"])
def test_lesions_weigh_as_much_as_their_difficulty_says_whichever_head_it_is_of(head: str) -> None:
    difficulty = np.where(LESION, 0.9, 0.3).astype(np.float32)
    nothing = Maps((TARGET + ERROR).astype(np.float32), None, None, None, None)
    maps = nothing._replace(**{head: difficulty, "raw_error": -np.log1p(-difficulty)})
    found = gauge(maps, TARGET, MASK, LESION, head=head, beta=2.0, sigma_voxels=(2.0, 2.0, 2.0))
    assert found["weight_ratio"] == pytest.approx(9.0, rel=1e-5)  # (0.9 / 0.3) ** 2


def test_a_doubt_that_follows_the_error_is_well_and_its_opposite_is_called_inverted() -> None:
    structured = gaussian_filter(ERROR, 2)
    difficulty = structured / structured.max()
    well, wrong = figures(difficulty), figures(1 - difficulty)
    assert well["spearman_smoothed"] > 0.8 and wrong["spearman_smoothed"] == pytest.approx(-well["spearman_smoothed"])
    assert in_words({**well, "weight_ratio": 1.3}, "structured") is None
    assert "inverted" in str(in_words(wrong, "structured"))


def test_a_flat_map_is_not_called_well() -> None:
    found = figures(np.full(SHAPE, 0.3), None)
    assert np.isnan(found["spearman_smoothed"])
    assert "inactive" in str(in_words(found, "structured"))
    assert "inactive" in str(in_words({}, "structured"))  # as a mean over validation cases leaves it out


def test_an_inverted_and_an_inactive_attention_are_called_so() -> None:
    assert "inverted" in str(in_words({"spearman_smoothed": -0.2, "weight_ratio": 1.4}, "structured"))
    assert "inactive" in str(in_words({"spearman_smoothed": 0.2, "weight_ratio": 1.02}, "structured"))
    assert in_words({"spearman_smoothed": 0.2, "weight_ratio": 1.4}, "structured") is None
    assert in_words({"spearman_smoothed": 0.2}, "structured") is None
