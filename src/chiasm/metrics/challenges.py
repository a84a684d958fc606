"""SSIM of tumour and healthy tissue as two challenges of BraTS compute it.

Both stretch images by percentiles, set everything outside a region to 0, and average the map of SSIM over the region.
These scores depend on the scale of the images that are compared, so they stand beside those of a challenge only.

Reference: H. B. Li et al., "The Brain Tumor Segmentation (BraTS) Challenge 2023: Brain MR Image Synthesis for
Tumor Segmentation (BraSyn)", arXiv:2305.09011; F. Kofler et al., "The Brain Tumor Segmentation (BraTS) Challenge
2023: Local Synthesis of Healthy Brain Tissue via Inpainting", arXiv:2305.08992.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import Image, Mask, same_shape
from chiasm.metrics.ssim import ssim_map
from chiasm.metrics.voxelwise import mean_or_nan

Challenge = Literal["brasyn", "inpainting"]
PERCENTILES = (0.5, 99.5)  # of all voxels of a volume, the background with them


def challenge_ssim(prediction: Image, target: Image, region: Mask, challenge: Challenge) -> float:
    """Return the mean SSIM of a region as a challenge computes it.

    "brasyn": each image is stretched by its own percentiles, and the window is a Gaussian in 3D.
    "inpainting": both are stretched by the target's percentiles, and the window is a Gaussian in 2D that extends
    along the last two axes, as the package `inpainting` 0.0.12 does.

    Args:
        prediction: Shape (I, J, K), any unit.
        target: Likewise.
        region: Voxels that count; all others are set to 0.
        challenge: Which.

    Returns:
        NaN where the region is empty, or an image has no range.

    Raises:
        ValueError: If the shapes differ.
    """
    same_shape(prediction, target, region)
    limits = [np.percentile(image, PERCENTILES) for image in (prediction, target)]
    if challenge == "inpainting":
        limits[0] = limits[1]
    x, y = (_stretched(image, *ends) for image, ends in zip((prediction, target), limits, strict=True))
    if x is None or y is None or not region.any():
        return float("nan")
    x, y = (np.where(region, image, np.float32(0)) for image in (x, y))
    span = max(float(np.ptp(x)), float(np.ptp(y)))
    if span == 0:
        return float("nan")
    axes = (0, 1, 2) if challenge == "brasyn" else (1, 2)
    return mean_or_nan(ssim_map(x, y, region, span, axes=axes)[region])


def _stretched(image: Image, low: float, high: float) -> NDArray[np.float32] | None:
    """Stretch an image from the low percentile, at least 0, to the high one; None where there is no range."""
    low = max(float(low), 0.0)
    if not high > low:
        return None
    stretched: NDArray[np.float32] = ((np.clip(image.astype(np.float64), low, high) - low) / (high - low)).astype(
        np.float32
    )
    return stretched
