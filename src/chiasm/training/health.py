"""How well the local discriminator predicts the error, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from chiasm.metrics.ranking import auroc, spearman
from chiasm.prediction.passes import Maps

SAMPLE = 50_000  # voxels that a rank statistic is taken over
FLAT_RATIO = 0.05  # a lesion:healthy weight ratio within 1 +- this is no attention


def gauge(
    maps: Maps,
    target: NDArray[np.float32],
    mask: NDArray[np.bool_],
    lesion: NDArray[np.bool_] | None,
    *,
    head: str,
    beta: float,
    sigma_voxels: tuple[float, float, float],
) -> dict[str, float]:
    """Compare one case's confidence with its true error.

    Args:
        maps: From `synthesise_prepared`.
        target: The real image, normalised units, shape (I, J, K).
        mask: Valid voxels.
        lesion: Labelled voxels, or None.
        head: Whose difficulty is gauged: "realness", "magnitude" or "structured".
        beta: The attention's exponent, for the weights' numbers.
        sigma_voxels: Of the smoothed error.

    Returns:
        Spearman's rho of the difficulty 1 - M with |e| ("spearman") and with the
        smoothed error ("spearman_smoothed"), "auroc_worst" (the worst tenth of
        the voxels), and of the weights F "effective_share" (effective sample
        size over voxels), "confidence_sd"; with a lesion "auroc_lesion" and
        "weight_ratio" (lesion : healthy).  NaN where undefined.
    """
    difficulty_map = {"realness": maps.realness, "structured": maps.structured, "magnitude": maps.magnitude}[head]
    if difficulty_map is None:
        return {}
    signed = np.where(mask, maps.prediction - target, 0)
    cover = np.maximum(gaussian_filter(mask.astype(np.float32), sigma_voxels), 1e-6)
    structured_error = np.abs(gaussian_filter(signed, sigma_voxels)) / cover
    places = np.flatnonzero(mask)
    places = places[:: max(1, len(places) // SAMPLE)]
    difficulty, error = difficulty_map.ravel()[places], np.abs(signed).ravel()[places]
    weight = difficulty.astype(np.float64) ** beta
    values = {
        "spearman": spearman(difficulty, error),
        "spearman_smoothed": spearman(difficulty, structured_error.ravel()[places]),
        "auroc_worst": auroc(difficulty, error >= np.quantile(error, 0.9)),
        "effective_share": float(weight.sum() ** 2 / max(len(weight) * (weight**2).sum(), 1e-12)),
        "confidence_sd": float(difficulty.std()),
    }
    if lesion is not None and (inside := lesion.ravel()[places]).any() and not inside.all():
        values["auroc_lesion"] = auroc(difficulty, inside)
        values["weight_ratio"] = float(weight[inside].mean() / max(weight[~inside].mean(), 1e-12))
    return values


def in_words(values: Mapping[str, float], target: str) -> str | None:
    """Describe an attention that has no effect or the wrong effect; None if it works."""
    rho, ratio = values.get("spearman_smoothed", float("nan")), values.get("weight_ratio", float("nan"))
    if np.isnan(rho):
        return f"the {target} attention is inactive: its difficulty is constant"
    if rho <= 0:
        return f"the {target} attention is inverted: its difficulty does not rise with the error (rho {rho:.2f})"
    if abs(ratio - 1) <= FLAT_RATIO:
        return f"the {target} attention is inactive on lesions: they weigh as much as healthy tissue ({ratio:.2f})"
    return None
