"""Predictions of two methods for the toy cohort: a real one, and a copy of it that is blurred and called A1."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from chiasm.prediction.folders import predict
from chiasm.storage import read_json, write_json
from chiasm.volumes import read_volume
from synthetic_cohort import forget_digests, save


def predict_twice(run: Path, cohort: Path, folder: Path) -> list[Path]:
    """Predict all cases, and make a second method's predictions of the first."""
    one = predict(run, [cohort], folder / "one").folder
    return [one, renamed(one, folder / "two", "A1", blur=1.5)]


def renamed(predictions: Path, folder: Path, method: str, *, blur: float = 0.0) -> Path:
    """Copy predictions and say that another method made them."""
    shutil.copytree(predictions, folder)
    content = read_json(folder / "predictions.json")
    content["method"] = method
    write_json(folder / "predictions.json", content)
    forget_digests(folder)
    if blur:
        for path in folder.glob("*_t2.nii.gz"):
            volume = read_volume(path)
            save(path, gaussian_filter(np.asarray(volume.array, np.float32), blur), volume.geometry.affine)
    return folder
