"""SSIM of tumour and healthy tissue: the figures of the organisers' own packages, by formula, and refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from chiasm.evaluation.reference import Reference
from chiasm.evaluation.scoring import ScoredImages, ScoreTerms, evaluate_case
from chiasm.metrics.challenges import Challenge, challenge_ssim

SHAPE = (30, 36, 28)


def made_brain() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """A synthetic and a real image of a head with a tumour, and the tumour, by formula alone; 0 around the head."""
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, side) for side in SHAPE], indexing="ij")
    inside = (i / 0.7) ** 2 + (j / 0.7) ** 2 + (k / 0.65) ** 2 < 1
    tumour = (i - 0.2) ** 2 + (j + 0.1) ** 2 + k**2 < 0.09
    real = 400 + 120 * np.sin(9 * i) * np.cos(7 * j + 3 * k) + 250 * tumour
    made = real + 60 * np.sin(15 * i + 2 * j) * np.cos(13 * k) - 80 * tumour * np.cos(11 * j)
    return np.where(inside, made, 0).astype(np.float32), np.where(inside, real, 0).astype(np.float32), tumour


@pytest.mark.parametrize(
    ("challenge", "figures"),
    [
        # torchmetrics 1.9.0 as ssim.py of hongweilibran/BraSyn (commit 4d9af6d) says: each image clipped and stretched
        # by its own percentiles, times the region, 5 axes, the full map's mean over the region.  The file itself ends
        # in a TypeError, for it indexes the pair that torchmetrics returns.
        ("brasyn", (0.99183148, 0.99546272)),
        # inpainting 0.0.12: generate_metrics(made, real, real, region)["ssim"], each with a first axis of 1
        ("inpainting", (0.98740067, 0.99101509)),
    ],
)
def test_scores_are_the_figures_of_the_challenges_own_packages(
    challenge: Challenge, figures: tuple[float, float]
) -> None:
    made, real, tumour = made_brain()
    found = [challenge_ssim(made, real, region, challenge) for region in (tumour, ~tumour)]
    np.testing.assert_allclose(found, figures, atol=1e-5)


def test_a_gaussian_window_in_3d_is_that_of_scikit_image() -> None:
    made, real, tumour = made_brain()
    x, y = (
        np.clip(image, 0, np.percentile(image, 99.5)) / np.percentile(image, 99.5) * tumour for image in (made, real)
    )
    _, whole = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=max(x.max(), y.max()), full=True
    )
    assert challenge_ssim(made, real, tumour, "brasyn") == pytest.approx(whole[tumour].mean(), abs=1e-5)


def test_a_gain_is_forgiven_by_own_percentiles_alone_and_what_is_outside_matters_not() -> None:
    _, real, tumour = made_brain()
    assert challenge_ssim(1.3 * real, real, tumour, "brasyn") == pytest.approx(1, abs=1e-5)
    assert challenge_ssim(1.3 * real, real, ~tumour, "inpainting") < 0.99


def test_a_region_of_nothing_and_an_image_of_nothing_have_no_score() -> None:
    made, real, tumour = made_brain()
    assert math.isnan(challenge_ssim(made, real, np.zeros(SHAPE, bool), "brasyn"))
    assert math.isnan(challenge_ssim(made, np.zeros(SHAPE, np.float32), tumour, "inpainting"))
    with pytest.raises(ValueError, match="share one shape"):
        challenge_ssim(made, real[:-1], tumour, "brasyn")


def test_a_challenge_is_a_convention_of_an_evaluation() -> None:
    made, real, tumour = made_brain()
    reference = Reference(real, real > 0, (1.0, 1.0, 1.0), tumour.astype(np.uint8) * 3)
    for convention, challenge in (("brasyn2023", "brasyn"), ("brats-inpainting", "inpainting"), ("brats-brain", None)):
        rows = evaluate_case(ScoredImages(made, reference), ScoreTerms("a", (0.0, 800.0), "SD", convention=convention))
        found = {row.region: row.value for row in rows if row.metric == "challenge_ssim"}
        if challenge is None:
            assert not found
        else:
            areas = {"lesion": tumour, "healthy": ~tumour}
            assert found == {name: challenge_ssim(made, real, area, challenge) for name, area in areas.items()}
