"""Rows about scores: SSIM and a whole case, beside MONAI and scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair
from chiasm.bench.subjects import LEVEL, draw_pictures

RANGE = 2 * LEVEL  # that scores are relative to


class _Images:
    """A prediction and its target, float32, and where both are scored."""

    def __init__(self, setting: BenchSetting) -> None:
        pictures = draw_pictures(setting.shape)
        self.mask, self.geometry = pictures.mask, pictures.geometry
        self.prediction, self.target = (image.astype(np.float32) for image in (pictures.source, pictures.target))

    def ssim(self) -> float:
        """Score with chiasm."""
        from chiasm.metrics.ssim import ssim

        return ssim(self.prediction, self.target, self.mask, RANGE)

    def scikit_map(self) -> NDArray[Any]:
        """Return scikit-image's map at the settings of Wang et al. 2004."""
        from skimage.metrics import structural_similarity

        _, found = structural_similarity(
            self.prediction,
            self.target,
            data_range=RANGE,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        return np.asarray(found)


def _difference(a: float, b: float) -> float:
    return abs(a - b)


def ssim_beside_scikit(setting: BenchSetting) -> TimedPair:
    """Average SSIM inside the mask, as scikit-image's full map has it."""
    images = _Images(setting)
    return TimedPair(images.ssim, lambda: float(images.scikit_map()[images.mask].mean()), _difference, 1e-5)


def ssim_beside_monai(setting: BenchSetting) -> TimedPair:
    """Average SSIM inside the mask, as MONAI's full map has it; both leave the border out, where their edges differ."""
    import torch
    from monai.metrics.regression import compute_ssim_and_cs

    images = _Images(setting)

    def peer() -> float:
        tensors = [torch.from_numpy(image)[None, None] for image in (images.prediction, images.target)]
        found, _ = compute_ssim_and_cs(
            *tensors, spatial_dims=3, kernel_size=(11,) * 3, kernel_sigma=(1.5,) * 3, data_range=RANGE
        )
        inner = images.mask[(slice(5, -5),) * 3]
        return float(found[0, 0].numpy()[inner].mean())

    return TimedPair(images.ssim, peer, _difference, 1e-5)


ROWS = (
    BenchRow(
        "ssim-scikit",
        "SSIM in 3D inside the mask (Gaussian window)",
        "scikit-image structural_similarity",
        10.0,
        5.0,
        ssim_beside_scikit,
        needs=("skimage",),
        equal="mean SSIM",
    ),
    BenchRow(
        "ssim-monai",
        "SSIM in 3D inside the mask (Gaussian window)",
        "MONAI compute_ssim_and_cs",
        50.0,
        20.0,
        ssim_beside_monai,
        needs=("monai",),
        equal="mean SSIM",
    ),
)
