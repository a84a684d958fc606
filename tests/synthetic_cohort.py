"""Small paired cohorts on disk for tests: an ellipsoid of three tissues on air, MR-like gains, NIfTI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.plan import Estimate, Plan

SHAPE = (36, 40, 12)
SPACING = (1.0, 1.0, 3.0)


#: A plan for one T1 and one T2 of this cohort, without having looked at it.
PLAN = Plan(
    sources=("t1",),
    target="t2",
    spacing_mm=SPACING,
    dims=2,
    slices=3,
    patch=(32, 32),
    mask_rule="nonzero",
    source_kinds=("median_iqr",),
    target_kind="median_iqr",
    target_reference=IntensityMap("median_iqr", (0.0, 1.0), (0.0, 1.0)),
    target_unit="a.u.",
    target_range=(0.0, 1.0),
    target_background=0.0,
    target_sd=1.0,
    window_hu=(-1024.0, 3071.0),
    lookup=((0.0, 1.0), (0.0, 1.0)),
    input_mean=(0.0, 0.0),
    input_sd=(1.0, 1.0),
    source_ranges=((-3.0, 3.0),),
    source_histograms=((1 / 32,) * 32,),
    source_limits=(1.0,),
    grid_mm=(SPACING, SPACING),
    body_mm=((20.0, 20.0, 20.0), (40.0, 40.0, 40.0)),
    trained_on=("case00",),
    expected=Estimate(0.0, 0.0, 0.0),
    reasons={},
)


def plan_of(**changes: object) -> Plan:
    """The plan, with some fields changed."""
    return replace(PLAN, **changes)  # type: ignore[arg-type]


def body(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.bool_]:
    axes = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    return np.asarray(sum(axis**2 for axis in axes) < 1)


def pair(
    seed: int, gain: float = 1.0, shape: tuple[int, int, int] = SHAPE
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Source, target and labels: the target is dark where the source is bright; air is exactly zero."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    tissue = np.digitize(texture, np.quantile(texture, (0.3, 0.7)))
    inside = body(shape)
    source = np.array([60.0, 100.0, 140.0])[tissue] + rng.normal(size=shape) * 4
    target = np.array([300.0, 200.0, 120.0])[tissue] + rng.normal(size=shape) * 8
    labels = ((tissue == 2) & inside).astype(np.uint8) * 4
    return (
        np.where(inside, source * gain, 0).astype(np.float32),
        np.where(inside, target / gain, 0).astype(np.float32),
        labels,
    )


def affine(spacing: tuple[float, float, float] = SPACING) -> NDArray[np.float64]:
    return np.array([[spacing[0], 0, 0, -20.0], [0, spacing[1], 0, -25.0], [0, 0, spacing[2], 5.0], [0, 0, 0, 1]])


def save(path: Path, array: NDArray[np.generic], matrix: NDArray[np.float64]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, matrix)
    image.set_sform(matrix, 1)
    image.set_qform(matrix, 1)
    nib.save(image, path)
    return path


def write_case(
    folder: Path, seed: int, *, gain: float = 1.0, spacing: tuple[float, float, float] = SPACING, masked: bool = False
) -> Case:
    name = f"case{seed:02d}"
    source, target, labels = pair(seed, gain)
    matrix, place = affine(spacing), folder / name
    return Case(
        name,
        name,
        {"t1": save(place / "t1.nii", source, matrix), "t2": save(place / "t2.nii", target, matrix)},
        mask=save(place / "mask.nii", body().astype(np.uint8), matrix) if masked else None,
        labels=save(place / "seg.nii", labels, matrix),
    )


def write_cohort(folder: Path, count: int = 4, *, masked: bool = False) -> Cohort:
    gains = (1.0, 3.0, 0.5, 20.0, 2.0, 8.0)
    cases = tuple(write_case(folder, seed, gain=gains[seed % 6], masked=masked) for seed in range(count))
    return Cohort(folder, "synthetic", cases, {"lesion": (4,)})


def write_brats(
    folder: Path,
    count: int = 6,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
) -> Path:
    """Write a cohort as BraTS lays it out: CASE/CASE_{t1,t2,seg}.nii.gz."""
    for number in range(1, count + 1):
        name = f"Toy_{number:04d}"
        source, target, labels = pair(number, (1.0, 3.0, 0.5)[number % 3], shape)
        for kind, array in {"t1": source, "t2": target, "seg": labels}.items():
            save(folder / name / f"{name}_{kind}.nii.gz", array, affine(spacing))
    return folder


def stored_as(axes: str, image: Path, out: Path) -> Path:
    """Store an image with other axes, such as "PIL": to the back, down, to the left."""
    ways = nib.orientations
    read = nib.load(image)
    nib.save(read.as_reoriented(ways.ornt_transform(ways.io_orientation(read.affine), ways.axcodes2ornt(axes))), out)
    return out


def forget_digests(predictions: Path) -> None:
    """Make the manifest of a prediction one of an earlier version, which did not say what its files were like."""
    path = predictions / "predictions.json"
    content = json.loads(path.read_text())
    for entry in content["cases"]:
        del entry["sha256"], entry["inputs"], entry["mask_rule"]
    path.write_text(json.dumps(content))


HEAD_SIDE = 36
HEAD_SHIFT_MM = (3.0, -2.0, 1.5)


def head(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A smooth pattern in a ball, 2 mm voxels: enough for registration; and its affine."""
    from scipy.ndimage import gaussian_filter

    i, j, k = np.indices((HEAD_SIDE,) * 3) - (HEAD_SIDE - 1) / 2
    ball = (i / 13) ** 2 + (j / 15) ** 2 + (k / 12) ** 2 < 1
    pattern = gaussian_filter(np.random.default_rng(seed).normal(size=(HEAD_SIDE,) * 3), 2.0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -30, -40, 20
    return (ball * (1.5 + pattern / pattern.std() * 0.35).clip(0.3) * 100).astype(np.float32), affine


def unlike(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same head in another contrast."""
    return np.where(image > 0, 260 - image + 0.006 * (image - 150) ** 2, 0).astype(np.float32)


def write_moved_heads(
    folder: Path, count: int, *, shift_mm: tuple[float, float, float] = HEAD_SHIFT_MM, short: int = 0
) -> Path:
    """Write heads whose T2 was scanned after the head moved by `shift_mm`, and without its `short` lowest slices.

    In `truth` the T2 lies on the T1, as if the head had not moved.
    """
    from scipy.ndimage import shift

    for number in range(1, count + 1):
        name = f"Toy_{number:04d}"
        image, matrix = head(number)
        moved = unlike(shift(image, np.array(shift_mm) / 2, order=1))
        lower = matrix.copy()
        lower[2, 3] += 2.0 * short
        labels = (image > 170).astype(np.uint8) * 4
        for place, target, there in (
            (folder / "scanned", moved[:, :, short:], lower),
            (folder / "truth", unlike(image), matrix),
        ):
            save(place / name / f"{name}_t1.nii.gz", image, matrix)
            save(place / name / f"{name}_t2.nii.gz", target, there)
            save(place / name / f"{name}_seg.nii.gz", labels, matrix)
    return folder / "scanned"
