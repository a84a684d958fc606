"""Alignment of two volumes of one patient: rigid or affine by mutual information, then Demons.

The *fixed* volume stays; the *moving* one is resampled on its grid, interpolated
once.  A point x of the fixed volume (world mm) lies at M (x + d(x)) in the
moving one: d the field of the Demons, M the rigid or affine matrix.
Everything is estimated on grids of 2 mm, which is finer than what is corrected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.errors import VolumeError, unknown
from chiasm.progress import Progress
from chiasm.volumes.geometry import Geometry, Volume, canonical, crop, grid_with_spacing, resample
from chiasm.volumes.masks import find_mask, suggest_rule

AlignmentKind = Literal["rigid", "affine", "demons"]

GRID_MM = 2.0  # of everything that is estimated
MARGIN_MM = 12.0  # around the fixed mask, so that what moves finds its counterpart
BINS = 32  # of the joint histogram (Mattes)
CLIPPED = (0.005, 0.995)  # quantiles inside the mask: bright vessels and implants decide nothing
SHRINKS = (4, 2)  # at which mutual information is maximised
STEP_MM = 2.0  # the first of the optimiser
PASSES: tuple[tuple[Literal[6, 12], int], ...] = ((6, 2), (6, 1), (12, 1))  # freedoms and shrink
LEAST_COVER = 0.25
EDGE_VOXELS = 2
BLOCK = 16  # planes that are interpolated at a time


@dataclass(frozen=True, eq=False)
class Alignment:
    """The places of a fixed volume's points in a moving volume.

    Attributes:
        kind: How it was found.
        matrix: Rigid or affine part, fixed world mm to moving world mm, (4, 4).
        field_mm: What the Demons found, world mm, shape (3, I, J, K); None unless `kind` is "demons".
        grid: Where `field_mm` lies; beyond it the border's displacement holds.
        information: Mutual information (nats) before, after the matrix and, with Demons, after the field.
        least_jacobian: Of x + d(x); above 0 nothing is folded. 1 without Demons.
        most_jacobian: Likewise the largest.
        mean_mm: How far points of the fixed mask moved, on average.
        seconds: What it took.
    """

    kind: AlignmentKind
    matrix: NDArray[np.float64]
    field_mm: NDArray[np.float32] | None
    grid: Geometry
    information: tuple[float, ...]
    least_jacobian: float
    most_jacobian: float
    mean_mm: float
    seconds: float

    def places(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return where points of the fixed volume lie in the moving one, both (n, 3) in world mm."""
        if self.field_mm is not None:
            from scipy.ndimage import map_coordinates

            inverse = np.linalg.inv(self.grid.affine)
            at = inverse[:3, :3] @ points.T + inverse[:3, 3:]
            points = points + np.stack(
                [map_coordinates(part, at, order=1, mode="nearest") for part in self.field_mm], 1
            )
        moved: NDArray[np.float64] = points @ self.matrix[:3, :3].T + self.matrix[:3, 3]
        return moved

    def resample_moving(self, moving: Volume, grid: Geometry, order: Literal[0, 1] = 1) -> Volume:
        """Resample the moving volume, or another on its grid, on the fixed one's grid, interpolated once.

        Args:
            moving: An image, or labels with `order` 0.
            grid: Of the result.
            order: 0 takes the nearest voxel, 1 interpolates linearly.

        Returns:
            A volume on `grid`, 0 where the moving one has nothing; labels keep their type, images are float32.
        """
        from scipy.ndimage import map_coordinates

        array = moving.array if order == 0 else moving.array.astype(np.float32, copy=False)
        made = np.zeros(grid.shape, array.dtype)
        inverse = np.linalg.inv(moving.geometry.affine)
        sides = np.array(array.shape)[:, None]
        for start in range(0, grid.shape[0], BLOCK):
            part = slice(start, min(start + BLOCK, grid.shape[0]))
            index = np.mgrid[part, : grid.shape[1], : grid.shape[2]].reshape(3, -1)
            points = self.places((grid.affine[:3, :3] @ index + grid.affine[:3, 3:]).T)
            at = inverse[:3, :3] @ points.T + inverse[:3, 3:]
            values = map_coordinates(array, at, order=order, mode="nearest", prefilter=False)
            values[((at < -0.5 - 1e-6) | (at > sides - 0.5 + 1e-6)).any(axis=0)] = 0
            made[part] = values.reshape(-1, *grid.shape[1:])
        return Volume(made, grid)

    def displacement(self, grid: Geometry) -> NDArray[np.float32]:
        """Return the whole displacement (field and matrix) at each voxel of a grid, world mm, shape (I, J, K, 3)."""
        index = np.indices(grid.shape).reshape(3, -1)
        points = (grid.affine[:3, :3] @ index + grid.affine[:3, 3:]).T
        moved: NDArray[np.float32] = (self.places(points) - points).astype(np.float32).reshape(*grid.shape, 3)
        return moved


class _Working(NamedTuple):
    """A volume as registration uses it: in RAS order, at 2 mm, with its mask and whether it was cut out there."""

    image: Volume
    mask: NDArray[np.bool_]
    cut_out: bool


def kind_named(name: str) -> AlignmentKind:
    """Return the kind of registration of this name.

    Raises:
        RecipeError: If there is none of this name.
    """
    if name not in get_args(AlignmentKind):
        raise unknown("kind of registration", name, get_args(AlignmentKind))
    return cast("AlignmentKind", name)


def align(
    fixed: Volume, moving: Volume, kind: AlignmentKind = "demons", *, seed: int = 0, progress: Progress | None = None
) -> Alignment:
    """Find the position of one volume in another of the same patient, for any contrasts.

    Args:
        fixed: Stays where it is.
        moving: Is to be aligned with it.
        kind: "rigid" (6 parameters), "affine" (12), or "demons" (rigid, then a diffeomorphic field).
        seed: Of the voxels that mutual information is estimated from.
        progress: Called with steps done, all steps, and what is done.

    Raises:
        RecipeError: If `kind` is unknown.
        VolumeError: If a volume has nothing but background, the two do not
            come to lie over one another, or they have nothing in common.
    """
    kind = kind_named(kind)
    begun = time.perf_counter()
    one, other = _working(fixed), _working(moving)
    say = progress or _silent
    say(0, 100, "rigid")
    grid, inside = one.image.geometry, tuple(np.argwhere(one.mask).T)

    def information(made: Alignment) -> float:
        return mutual_information(one.image.array[inside], made.resample_moving(other.image, grid).array[inside])

    unmoved = Alignment(kind, np.eye(4), None, _around(one), (), 1.0, 1.0, 0.0, 0.0)
    maximised = replace(unmoved, matrix=_maximise_information(one, other, seed))
    say(10, 100, "rigid")
    before = information(unmoved)
    made = _settled(one, other, max((unmoved, maximised), key=information))
    made = replace(made, information=(before, information(made)))
    if kind == "demons":
        made = _deformed(one, other, made, lambda done, of, what: say(15 + 85 * done // of, 100, what))
        made = replace(made, information=(*made.information, information(made)))
    points = np.argwhere(one.mask)[::7] @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    mean_mm = float(np.linalg.norm(made.places(points) - points, axis=1).mean())
    say(100, 100, "done")
    return replace(made, mean_mm=mean_mm, seconds=time.perf_counter() - begun)


def _silent(_done: int, _of: int, _what: str) -> None:
    """Report nothing."""


def mutual_information(a: NDArray[Any], b: NDArray[Any], bins: int = BINS) -> float:
    """Return the mutual information of two samples in nats; extremes beyond 1 and 99 % join the outer bins."""
    ranges = [np.quantile(values, (0.01, 0.99)).tolist() for values in (a, b)]
    if any(low == high for low, high in ranges):
        return 0.0
    one, other = (np.clip(values, low, high) for values, (low, high) in zip((a, b), ranges))
    counts, _, _ = np.histogram2d(one, other, bins=bins, range=ranges)
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / apart[seen])).sum())


def _working(volume: Volume) -> _Working:
    """Reorder a volume to RAS and 2 mm, smoothed first where it is finer, and find its mask."""
    from scipy.ndimage import gaussian_filter

    in_ras = canonical(volume)
    if in_ras.array.min() == in_ras.array.max():
        raise VolumeError("is constant: there is nothing to register", reason="constant")
    mask, rule = find_mask(in_ras, suggest_rule(in_ras))
    array = in_ras.array.astype(np.float32)
    low, high = np.quantile(array[mask], CLIPPED)
    array = np.clip(array, min(low, float(array.min())), high)
    spacing = in_ras.geometry.spacing_mm
    sigma = [GRID_MM / step / 2 if step < 0.75 * GRID_MM else 0.0 for step in spacing]
    grid = grid_with_spacing(in_ras.geometry, (GRID_MM,) * 3)
    image = resample(Volume(gaussian_filter(array, sigma, truncate=2.0), in_ras.geometry), grid)
    there = resample(Volume(mask.astype(np.uint8), in_ras.geometry), grid, order=0).array > 0
    return _Working(image, there, rule == "nonzero")


def _around(working: _Working) -> Geometry:
    """Return the grid of the box around a mask, with a margin."""
    margin = round(MARGIN_MM / GRID_MM)
    box = [
        slice(max(0, part.start - margin), min(side, part.stop + margin))
        for part, side in zip(box_of(working.mask), working.mask.shape)
    ]
    return crop(working.image, box).geometry


def _maximise_information(fixed: _Working, moving: _Working, seed: int) -> NDArray[np.float64]:
    """Maximise mutual information over rigid movements, at 8 and 4 mm."""
    import SimpleITK as sitk
    from scipy.ndimage import binary_dilation

    turn = sitk.Euler3DTransform(_start(fixed, moving, seed))
    method = _method(seed, 1.0)
    seen = binary_dilation(fixed.mask, iterations=2)  # the outline too
    method.SetMetricFixedMask(_itk(Volume(seen.astype(np.uint8), fixed.image.geometry)))
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(SHRINKS)
    method.SetSmoothingSigmasPerLevel([float(shrink) for shrink in SHRINKS])
    method.SetOptimizerAsRegularStepGradientDescent(STEP_MM, 1e-2, 200)
    method.SetInitialTransform(turn, inPlace=True)
    try:
        method.Execute(_itk(fixed.image), _itk(moving.image))
    except RuntimeError as error:
        raise _apart("the overlap was lost during the search") from error
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(turn.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = turn.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def _settled(fixed: _Working, moving: _Working, made: Alignment) -> Alignment:
    """Refine an alignment with descriptors: rigidly, and then with twelve parameters if it is affine."""
    import torch

    from chiasm.registration.demons import linear

    still = _tensor(resample(fixed.image, made.grid).array)
    for freedoms, shrink in PASSES if made.kind == "affine" else PASSES[:-1]:
        with torch.inference_mode():
            step = linear(
                still,
                _tensor(made.resample_moving(moving.image, made.grid).array),
                freedoms=freedoms,
                shrink=shrink,
                weight=_tensor(_belief(fixed, moving, made)),
            ).numpy()
        to_world = made.grid.affine
        made = replace(made, matrix=made.matrix @ to_world @ step @ np.linalg.inv(to_world))
    return made


def _belief(fixed: _Working, moving: _Working, made: Alignment) -> NDArray[np.float32]:
    """Return the voxels in which descriptors are used: inside, but not near the edge of a skull-stripped brain."""
    from scipy.ndimage import binary_erosion

    shapes = [
        resample(Volume(fixed.mask.astype(np.uint8), fixed.image.geometry), made.grid, order=0).array > 0,
        made.resample_moving(Volume(moving.mask.astype(np.uint8), moving.image.geometry), made.grid, order=0).array > 0,
    ]
    both = np.logical_and(*shapes)
    if both.sum() < LEAST_COVER * shapes[0].sum():
        raise _apart(f"{100 * both.sum() / shapes[0].sum():.0f} % of the fixed mask covered")
    if fixed.cut_out or moving.cut_out:
        both = binary_erosion(both, iterations=EDGE_VOXELS)
    return both.astype(np.float32)


def _deformed(fixed: _Working, moving: _Working, made: Alignment, progress: Progress) -> Alignment:
    """Run the Demons, starting from a matrix."""
    import torch

    from chiasm.registration.demons import demons, jacobian

    cut_out = fixed.cut_out and moving.cut_out
    pair = resample(fixed.image, made.grid).array, made.resample_moving(moving.image, made.grid).array
    with torch.inference_mode():
        weight = _tensor(_belief(fixed, moving, made)) if cut_out else None
        field = demons(*map(_tensor, pair), weight=weight, progress=progress)
        determinant = jacobian(field)
    world = np.einsum("ab,bijk->aijk", made.grid.affine[:3, :3], field[0].numpy().astype(np.float64))
    return replace(
        made,
        field_mm=world.astype(np.float32),
        least_jacobian=float(determinant.min()),
        most_jacobian=float(determinant.max()),
    )


def _tensor(array: NDArray[np.float32]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None]


def _start(fixed: _Working, moving: _Working, seed: int) -> Any:
    """Start as scanned, or with the centres of the masks in one place: the one with more mutual information."""
    import SimpleITK as sitk

    one, other = _itk(fixed.image), _itk(moving.image)
    middle = _centre(fixed)
    starts = []
    for shift in (np.zeros(3), _centre(moving) - middle):
        start = sitk.Euler3DTransform(middle.tolist(), 0, 0, 0, shift.tolist())
        method = _method(seed, 0.1)
        method.SetInitialTransform(start)
        try:
            starts.append((method.MetricEvaluate(one, other), start))
        except RuntimeError:  # nothing of the two lies together there
            continue
    if not starts:
        raise _apart("nothing in common")
    return min(starts, key=lambda pair: pair[0])[1]


def _method(seed: int, share: float) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(share, seed + 1)  # 0 would take the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(1)  # the same result on every machine, but for rounding
    return method


def _apart(found: str) -> VolumeError:
    return VolumeError(
        "no alignment makes the two volumes overlap",
        reason="no-overlap",
        found=found,
        expected=f"{100 * LEAST_COVER:.0f} % of the fixed mask covered",
        hint="Are they of one patient, and of one part of the body?",
    )


def _itk(volume: Volume) -> Any:
    """Pass a volume to SimpleITK in our own world axes; both images have them, so nothing must be reordered."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.transpose()))
    spacing = volume.geometry.spacing_mm
    image.SetSpacing(spacing)
    image.SetOrigin(volume.geometry.affine[:3, 3].tolist())
    image.SetDirection((volume.geometry.affine[:3, :3] / spacing).ravel().tolist())
    return image


def _centre(working: _Working) -> NDArray[np.float64]:
    middle = np.argwhere(working.mask).mean(axis=0)
    centre: NDArray[np.float64] = working.image.geometry.affine[:3, :3] @ middle + working.image.geometry.affine[:3, 3]
    return centre
