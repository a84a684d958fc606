"""Scores of a synthetic CT for radiotherapy: tissues, relative electron density, path lengths through the patient.

Reference: S. J. Thomas, "Relative electron density calibration of CT scanners for
radiotherapy treatment planning", British Journal of Radiology 72, 781-786, 1999,
for the two lines of `THOMAS`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.boxes import Image, Mask, Spacing
from chiasm.errors import RecipeError
from chiasm.metrics.voxelwise import mean_or_nan

MOST_ANGLES = 72  # gantry angles of one evaluation
RAYS_AT_ONCE = 32  # planes of rays that are sampled together, which bounds the memory

#: Tissues by the target's Hounsfield units, from the first up to the second; what lies between is partial volume.
#: "low density" is lung in a thorax, and partial volume at the edge of air in a head.
TISSUES_HU: Mapping[str, tuple[float, float]] = {
    "air": (-np.inf, -900.0),
    "low density": (-900.0, -500.0),
    "fat": (-150.0, -20.0),
    "soft tissue": (-20.0, 150.0),
    "bone": (150.0, np.inf),
}
#: Hounsfield units and electron density relative to water: linear in between, and beyond the last as before it.
THOMAS = ((-1000.0, 0.0), (0.0, 1.0), (1950.0, 2.0))
MOST_POINTS = 1000  # of a calibration curve

Curve = tuple[tuple[float, float], ...]


def electron_density(hu: ArrayLike, curve: Sequence[tuple[float, float]] = THOMAS) -> NDArray[np.float32]:
    """Turn Hounsfield units into electron density relative to water, never below 0.

    Args:
        hu: Hounsfield units, any shape.
        curve: At least two points of HU and density, HU rising.

    Raises:
        ValueError: If the curve has fewer points, or its HU do not rise.

    >>> electron_density([-1200, -1000, 0, 975, 3900]).tolist()
    [0.0, 0.0, 1.0, 1.5, 3.0]
    """
    knots, densities = np.array(curve, np.float64).reshape(-1, 2).T
    if len(knots) < 2 or (np.diff(knots) <= 0).any():
        raise ValueError("a calibration curve has at least two points, and its Hounsfield units rise")
    values = np.asarray(hu, np.float64)
    slope = (densities[-1] - densities[-2]) / (knots[-1] - knots[-2])
    beyond = slope * np.maximum(values - knots[-1], 0)
    density: NDArray[np.float64] = np.maximum(np.interp(values, knots, densities) + beyond, 0)
    return density.astype(np.float32)


def read_curve(path: Path) -> Curve:
    """Read the calibration curve of a scanner: lines of Hounsfield units and electron density relative to water.

    Numbers stand apart by commas, semicolons, tabs or spaces; a first line without numbers names the columns.

    Args:
        path: A file of text.

    Raises:
        RecipeError: If it cannot be read, or is no curve: Hounsfield units rise, densities never fall from 0 on.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _no_curve(path, error) from error
    lines = [line.replace(";", ",").replace("\t", ",") for line in text.splitlines() if line.strip()][: MOST_POINTS + 2]
    rows = [[word for cell in row for word in cell.split()] for row in csv.reader(lines)]
    points = [point for row in rows if (point := _numbers_of(row)) is not None]
    if len(points) < len(rows) - 1 or not 2 <= len(points) <= MOST_POINTS or not _rises(points):
        raise _no_curve(path, f"{len(rows)} lines, {len(points)} of them with two numbers")
    return tuple(points)


def _numbers_of(words: Sequence[str]) -> tuple[float, float] | None:
    """Return the two finite numbers of a line; None where it holds something else."""
    try:
        hu, density = map(float, words)
    except ValueError:
        return None
    return (hu, density) if math.isfinite(hu) and math.isfinite(density) else None


def _rises(points: Sequence[tuple[float, float]]) -> bool:
    """Return whether Hounsfield units rise and densities never fall from 0 on."""
    hu, density = np.array(points).T
    return bool((np.diff(hu) > 0).all() and (np.diff(density) >= 0).all() and density[0] >= 0)


def _no_curve(path: Path, found: object) -> RecipeError:
    return RecipeError(
        f"{path} is no calibration curve",
        reason="density-curve",
        found=str(found)[:120],
        expected="at least two lines such as -1000,0 and 0,1: rising Hounsfield units, electron density",
    )


def tissues(target: Image, mask: Mask) -> dict[str, NDArray[np.bool_]]:
    """Return the voxels of the mask that are each tissue in the target, HU."""
    return {name: (target >= low) & (target < high) & mask for name, (low, high) in TISSUES_HU.items()}


def path_errors(difference: Image, mask: Mask, spacing_mm: Spacing, axis: int) -> dict[str, float]:
    """Compare water-equivalent path lengths of parallel rays along an axis.

    Args:
        difference: Electron density of the prediction minus that of the target, shape (I, J, K).
        mask: Voxels that count; rays that meet none of them are left out.
        spacing_mm: Between voxels.
        axis: 0, 1 or 2.

    Returns:
        "path_error", mean absolute difference over the rays in mm, and "path_error_95", its 95th percentile; NaN
        without rays.
    """
    lengths = np.where(mask, difference, 0).sum(axis=axis, dtype=np.float64) * spacing_mm[axis]
    return _summary(lengths[mask.any(axis=axis)])


def _summary(lengths_mm: NDArray[np.float64]) -> dict[str, float]:
    errors = np.abs(lengths_mm)
    worst = float(np.quantile(errors, 0.95)) if errors.size else np.nan
    return {"path_error": mean_or_nan(errors), "path_error_95": worst}


def read_angles(text: str) -> tuple[float, ...]:
    """Read gantry angles such as "0,72,144", degrees.

    Raises:
        RecipeError: If it is no such text, an angle is not from 0 up to 360, stands twice, or there are too many.

    >>> read_angles("30, 75.5")
    (30.0, 75.5)
    """
    try:
        angles = tuple(float(part) for part in text.split(","))
    except ValueError:
        angles = (math.nan,)
    if not all(0 <= angle < 360 for angle in angles) or len(set(angles)) != len(angles) or len(angles) > MOST_ANGLES:
        raise RecipeError(
            "gantry angles cannot be read",
            reason="angles",
            found=text,
            expected=f"at most {MOST_ANGLES} different degrees, each from 0 up to 360, such as 0,72,144",
        )
    return angles


def beam_errors(difference: Image, mask: Mask, matrix: NDArray[np.float64], gantry_degrees: float) -> dict[str, float]:
    """Compare water-equivalent path lengths of parallel rays in axial planes, at a gantry angle.

    Angles are those of IEC 61217 for a patient who lies on the back, head first: at 0 rays come from the front, at 90
    from the patient's left, at 180 from the back.  Rays lie as far apart as voxels; the difference is interpolated
    linearly along them.

    Args:
        difference: Electron density of the prediction minus that of the target, shape (I, J, K).
        mask: Voxels that count; rays that meet none of them are left out.
        matrix: Steps from voxel to voxel along each axis, RAS and mm, in its columns, shape (3, 3).
        gantry_degrees: Gantry angle.

    Returns:
        As `path_errors`.
    """
    from scipy.ndimage import affine_transform

    radians = math.radians(gantry_degrees)
    across, along = [math.cos(radians), math.sin(radians), 0.0], [math.sin(radians), -math.cos(radians), 0.0]
    directions = np.array([across, along, [0.0, 0.0, 1.0]]).T  # in its columns
    spacing_mm = np.linalg.norm(matrix, axis=0)
    vertical = int(np.abs(matrix[2] / spacing_mm).argmax())
    steps_mm = np.array([spacing_mm.min(), spacing_mm.min() / 2, spacing_mm[vertical]])
    corners = np.array(np.meshgrid(*[(-1, side) for side in mask.shape], indexing="ij")).reshape(3, -1)
    reach = directions.T @ matrix @ corners  # of the volume and a voxel around it, mm
    counts = np.ceil(np.ptp(reach, axis=1) / steps_mm - 1e-6).astype(int) + 1
    back = np.linalg.inv(matrix) @ directions  # from rays to voxels
    inside = np.where(mask, difference, 0).astype(np.float32), mask.astype(np.float32)
    lengths = []
    for first in range(0, counts[0], RAYS_AT_ONCE):
        start = reach.min(axis=1) + np.array([first * steps_mm[0], 0.0, 0.0])
        shape = (min(RAYS_AT_ONCE, counts[0] - first), *counts[1:])
        sampled, met = (
            affine_transform(image, back * steps_mm, back @ start, shape, order=1, mode="grid-constant")
            for image in inside
        )
        is_met = met.max(axis=1) > 0.5 - 1e-3  # as far as the border of the mask's voxels, neither more nor less
        lengths.append(sampled.sum(axis=1, dtype=np.float64)[is_met] * steps_mm[1])
    return _summary(np.concatenate(lengths))
