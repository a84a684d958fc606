"""What is scored: the name, the unit and the better direction of every metric, in one table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

COVERAGES = (100, 90, 80, 50)  # per cent of the voxels that are kept for a risk, the most trusted first


class Metric(NamedTuple):
    """A metric's name on a page, its unit, and whether a lower or a higher score is better.

    Attributes:
        label: As pages show it.
        unit: "" is the unit of the images, "/mm" that unit per mm, "1" none.
        better: "neither" where no score is better than another, or the best one is 1.
    """

    label: str
    unit: str = ""
    better: Literal["lower", "higher", "neither"] = "neither"

    @property
    def more_is_better(self) -> bool:
        """Whether a higher score is better."""
        return self.better == "higher"

    @property
    def sign(self) -> float:
        """Factor after which lower is better."""
        return -1.0 if self.more_is_better else 1.0

    @property
    def arrow(self) -> str:
        """The arrow after the label: whether a lower or a higher score is better."""
        return {"lower": " ↓", "higher": " ↑", "neither": ""}[self.better]

    def best(self, scores: Collection[float]) -> float:
        """Return the best of some scores; NaN where there is none, or no better one."""
        if self.better == "neither" or not scores:
            return math.nan
        return max(scores) if self.more_is_better else min(scores)


METRICS: Mapping[str, Metric] = {
    "mae": Metric("MAE", "", "lower"),
    "mae_own": Metric("MAE of the scan", "own units", "lower"),
    "mae_mu": Metric("MAE of mu", "1/cm", "lower"),
    "mae_density": Metric("MAE of density", "1", "lower"),
    "path_error": Metric("Path error", "mm", "lower"),
    "path_error_95": Metric("Path error, 95th percentile", "mm", "lower"),
    "slice_steps": Metric("Steps between slices", "1"),
    "dice": Metric("Dice", "1", "higher"),
    "hd95": Metric("HD95", "mm", "lower"),
    "gamma_pass": Metric("Gamma pass rate", "%", "higher"),
    "dose_difference": Metric("Dose difference", "%", "lower"),
    "bias": Metric("Bias"),
    "rmse": Metric("RMSE", "", "lower"),
    "mse": Metric("MSE", "", "lower"),
    "nmse": Metric("NMSE", "1", "lower"),
    "nmae": Metric("NMAE", "1", "lower"),
    "psnr": Metric("PSNR", "dB", "higher"),
    "ssim": Metric("SSIM", "1", "higher"),
    "ms_ssim": Metric("MS-SSIM", "1", "higher"),
    "challenge_ssim": Metric("SSIM of the challenge", "1", "higher"),
    "ncc": Metric("NCC", "1", "higher"),
    "gradient_error": Metric("Gradient error", "/mm", "lower"),
    "sharpness": Metric("Sharpness", "1"),
    "volume_ml": Metric("Volume", "mL"),
    "contrast_target": Metric("Contrast, real"),
    "contrast_prediction": Metric("Contrast, predicted"),
    "contrast_kept": Metric("Contrast kept", "1", "higher"),
    "lesions": Metric("Lesions", "1"),
    "too_small": Metric("Labelled components too small to be a lesion", "1"),
    "recall": Metric("Visible lesions, share", "1", "higher"),
    "false_lesions": Metric("Made-up lesions", "1", "lower"),
    "expected_error": Metric("Expected error"),
    "observed_error": Metric("Observed error", "", "lower"),
    "calibration": Metric("Calibration", "1"),
    "calibration_gap": Metric("Calibration gap", "", "lower"),
    "spearman": Metric("Rank correlation", "1", "higher"),
    "spearman_smoothed": Metric("Rank correlation, smoothed", "1", "higher"),
    "spread_spearman": Metric("Rank correlation of spread and error", "1"),
    "auroc_worst": Metric("AUROC of the worst tenth", "1", "higher"),
    "auroc_lesion": Metric("AUROC of lesions", "1"),
    "ausc": Metric("AUSC", "1", "lower"),
    "ause": Metric("AUSE", "1", "lower"),
    **{f"risk_{coverage}": Metric(f"Error of the most trusted {coverage} %", "", "lower") for coverage in COVERAGES},
    "passes": Metric("Passes", "1"),
    "trainings": Metric("Trainings", "1"),
    "seconds": Metric("Seconds", "s"),
}


#: Metrics of which one score is better than another.
ORDERED = tuple(name for name, metric in METRICS.items() if metric.better != "neither")

#: Metrics of images whose unit or range is that of the training targets: models of other training cases have another.
OF_SCALE = frozenset(name for name, metric in METRICS.items() if metric.unit in ("", "/mm")) | {
    *("nmae", "psnr", "ssim", "ms_ssim", "challenge_ssim")
}


def find_metric(name: str) -> Metric:
    """Return a metric as pages show it; an unknown metric keeps its name."""
    return METRICS.get(name, Metric(name))
