"""Bringing two volumes of one patient together: rigid or affine by mutual information, then Demons.

The *fixed* volume stays; the *moving* one is brought to its grid, interpolated
once.  A point x of the fixed volume (world mm) lies at M (x + d(x)) in the
moving one: d the field of the Demons, M the rigid or affine matrix.
Everything is estimated on grids of 2 mm, which is finer than what is corrected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.masks import box_of, find_mask, suggest_rule
from chiasm.errors import VolumeError, unknown
from chiasm.volumes.geometry import Geometry, Volume, canonical, crop, grid_with_spacing, resample

Kind = Literal["rigid", "affine", "demons"]
Progress = Callable[[int, int, str], None]

GRID_MM = 2.0  # of everything that is estimated
MARGIN_MM = 12.0  # around the fixed mask, so that what moves finds its counterpart
BINS = 32  # of the joint histogram (Mattes)
CLIPPED = (0.005, 0.995)  # quantiles inside the mask: bright vessels and implants decide nothing
SAMPLED = 0.25  # share of the mask's voxels that mutual information is estimated from
LEAST_COVER = 0.25
STRAY_MM = 15.0  # between where the edges and where the inside of a cut-out brain lie: more is a stray
EDGE_VOXELS = 2
BLOCK = 16  # planes that are interpolated at a time


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the points of a fixed volume lie in a moving one.

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

    kind: Kind
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

    def bring(self, moving: Volume, grid: Geometry, order: Literal[0, 1] = 1) -> Volume:
        """Bring the moving volume, or another on its grid, to the fixed one's grid, interpolated once.

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
    """A volume as registration sees it: RAS order, 2 mm, its mask.

    The edge of a brain that was cut out tells roughly where it lies, and
    exactly where it was cut: `image` has it, and in `inner` each voxel beyond
    it shows the nearest one inside.
    """

    image: Volume
    inner: Volume
    mask: NDArray[np.bool_]


def align(
    fixed: Volume, moving: Volume, kind: Kind = "demons", *, seed: int = 0, progress: Progress | None = None
) -> Alignment:
    """Find where one volume lies in another of the same patient, whatever their contrasts.

    Args:
        fixed: Stays where it is.
        moving: Is to be brought to it.
        kind: "rigid" (6 parameters), "affine" (12), or "demons" (rigid, then a diffeomorphic field).
        seed: Of the voxels that mutual information is estimated from.
        progress: Called with steps done, all steps, and what is done.

    Raises:
        RecipeError: If `kind` is unknown.
        VolumeError: If a volume has nothing but background, the two do not
            come to lie over one another, or they tell nothing of each other.
    """
    if kind not in get_args(Kind):
        raise unknown("kind of registration", kind, get_args(Kind))
    begun = time.perf_counter()
    one, other = _working(fixed), _working(moving)
    say = progress or _silent
    say(0, 100, "rigid")
    matrix, ends = _linear(one, other, kind, seed)
    information: tuple[float, ...] = ends
    say(15, 100, "rigid")
    box = _around(one)
    linear = Alignment(kind, matrix, None, box, information, 1.0, 1.0, 0.0, 0.0)
    field: NDArray[np.float32] | None = None
    jacobians, told = (1.0, 1.0), list(information)
    if kind == "demons":
        masks = [
            resample(Volume(one.mask.astype(np.uint8), one.image.geometry), box, order=0).array > 0,
            linear.bring(Volume(other.mask.astype(np.uint8), other.image.geometry), box, order=0).array > 0,
        ]
        pair = resample(one.image, box).array, linear.bring(other.image, box).array
        cut_out = one.inner is not one.image and other.inner is not other.image
        field, jacobians = _deform(
            *pair, box, masks if cut_out else (), lambda done, of, what: say(15 + 85 * done // of, 100, what)
        )
        after = Alignment(kind, matrix, field, box, information, *jacobians, 0.0, 0.0)
        told.append(mutual_information(pair[0][masks[0]], after.bring(other.image, box).array[masks[0]]))
    information = tuple(told)
    made = Alignment(kind, matrix, field, box, information, *jacobians, 0.0, 0.0)
    points = np.argwhere(one.mask)[::7] @ one.image.geometry.affine[:3, :3].T + one.image.geometry.affine[:3, 3]
    mean_mm = float(np.linalg.norm(made.places(points) - points, axis=1).mean())
    say(100, 100, "done")
    return Alignment(kind, matrix, field, box, information, *jacobians, mean_mm, time.perf_counter() - begun)


def _silent(_done: int, _of: int, _what: str) -> None:
    """Tell nobody."""


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
    """Bring a volume to RAS order and 2 mm, smoothed first where it is finer, and find its mask."""
    from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

    upright = canonical(volume)
    if upright.array.min() == upright.array.max():
        raise VolumeError("is the same everywhere: there is nothing to register", reason="constant")
    mask, rule = find_mask(upright, suggest_rule(upright))
    array = upright.array.astype(np.float32)
    low, high = np.quantile(array[mask], CLIPPED)
    array = np.clip(array, min(low, float(array.min())), high)
    inner = array
    if rule == "nonzero":
        inside = binary_erosion(mask)
        inside = inside if inside.any() else mask
        inner = array[tuple(distance_transform_edt(~inside, return_distances=False, return_indices=True))]
    spacing = upright.geometry.spacing_mm
    sigma = [GRID_MM / step / 2 if step < 0.75 * GRID_MM else 0.0 for step in spacing]
    grid = grid_with_spacing(upright.geometry, (GRID_MM,) * 3)

    def coarse(values: NDArray[np.float32]) -> Volume:
        return resample(Volume(gaussian_filter(values, sigma, truncate=2.0), upright.geometry), grid)

    image = coarse(array)
    filled = image if inner is array else coarse(inner)
    there = resample(Volume(mask.astype(np.uint8), upright.geometry), grid, order=0).array > 0
    return _Working(image, filled, there)


def _around(working: _Working) -> Geometry:
    """Return the grid of the box around a mask, with a margin."""
    margin = round(MARGIN_MM / GRID_MM)
    box = [
        slice(max(0, part.start - margin), min(side, part.stop + margin))
        for part, side in zip(box_of(working.mask), working.mask.shape)
    ]
    return crop(working.image, box).geometry


def _linear(
    fixed: _Working, moving: _Working, kind: Kind, seed: int
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Maximise mutual information over rigid and, where asked, affine movements; return it before and after."""
    import SimpleITK as sitk

    turn: Any = sitk.Euler3DTransform(_start(fixed, moving, seed))
    _climb(fixed.image, moving.image, fixed.mask, turn, seed, Schedule((4, 2, 1), 2.0), around=2)
    found = [turn]
    if fixed.inner is not fixed.image:  # now without the edges of what was cut out, from nearby
        found.append(sitk.Euler3DTransform(turn))
        _climb(fixed.inner, moving.inner, fixed.mask, found[-1], seed, Schedule((2, 1), 0.25))
    if kind == "affine":
        free = sitk.AffineTransform(3)
        free.SetMatrix(found[-1].GetMatrix())
        free.SetTranslation(found[-1].GetTranslation())
        free.SetCenter(found[-1].GetCenter())
        found.append(free)
        _climb(fixed.inner, moving.inner, fixed.mask, free, seed, Schedule((2, 1), 0.5))
    matrices = [np.eye(4), *map(_matrix, found)]
    grid, inside = fixed.image.geometry, tuple(np.argwhere(fixed.mask).T)
    cover = Volume(moving.mask.astype(np.uint8), moving.image.geometry)
    share = float((_moved(matrices[1], cover, grid, order=0)[inside] > 0).mean())
    if share < LEAST_COVER:
        raise _apart(f"{100 * share:.0f} % of the fixed mask covered")
    told = [
        mutual_information(fixed.inner.array[inside], _moved(matrix, moving.inner, grid)[inside]) for matrix in matrices
    ]
    near = [
        0,
        1,
        *(index for index in range(2, len(matrices)) if _apart_mm(matrices[1], matrices[index], grid) < STRAY_MM),
    ]
    best = max(near, key=lambda index: told[index])
    return matrices[best], (told[0], told[best])


def _start(fixed: _Working, moving: _Working, seed: int) -> Any:
    """Begin as scanned or with the middles of the masks together, wherever the two share more."""
    import SimpleITK as sitk

    one, other = _itk(fixed.image), _itk(moving.image)
    middle = _centre(fixed)
    starts = []
    for shift in (np.zeros(3), _centre(moving) - middle):
        start = sitk.Euler3DTransform(middle.tolist(), 0, 0, 0, shift.tolist())
        method = _method(seed)
        method.SetInitialTransform(start)
        try:
            starts.append((method.MetricEvaluate(one, other), start))
        except RuntimeError:  # nothing of the two lies together there
            continue
    if not starts:
        raise _apart("nothing in common")
    return min(starts, key=lambda pair: pair[0])[1]


class Schedule(NamedTuple):
    """Shrink factors of the passes, and the first step in mm."""

    shrinks: tuple[int, ...]
    step_mm: float


def _method(seed: int) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLED, seed + 1)  # 0 would take the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(1)  # the same result on every machine, but for rounding
    return method


def _climb(
    fixed: Volume,
    moving: Volume,
    mask: NDArray[np.bool_],
    transform: Any,
    seed: int,
    schedule: Schedule,
    around: int = 0,
) -> None:
    """Move `transform` uphill, in place."""
    from scipy.ndimage import binary_dilation

    seen = binary_dilation(mask, iterations=around) if around else mask
    method = _method(seed)
    method.SetMetricFixedMask(_itk(Volume(seen.astype(np.uint8), fixed.geometry)))
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(schedule.shrinks)
    method.SetSmoothingSigmasPerLevel([float(shrink) if shrink > 1 else 0.0 for shrink in schedule.shrinks])
    method.SetOptimizerAsRegularStepGradientDescent(schedule.step_mm, 1e-3, 200)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(_itk(fixed), _itk(moving))
    except RuntimeError as error:
        raise _apart("the overlap was lost on the way") from error


def _apart(found: str) -> VolumeError:
    return VolumeError(
        "the two volumes do not come to lie over one another",
        reason="no-overlap",
        found=found,
        expected=f"{100 * LEAST_COVER:.0f} % of the fixed mask covered",
        hint="Are they of one patient, and of one part of the body?",
    )


def _matrix(transform: Any) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def _moved(matrix: NDArray[np.float64], moving: Volume, grid: Geometry, order: Literal[0, 1] = 1) -> NDArray[Any]:
    return Alignment("affine", matrix, None, grid, (), 1, 1, 0, 0).bring(moving, grid, order).array


def _apart_mm(a: NDArray[np.float64], b: NDArray[np.float64], grid: Geometry) -> float:
    """Return how far two matrices put the corners of a grid apart, on average."""
    corners = np.c_[grid.corners, np.ones(8)]
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).mean())


def _deform(
    fixed: NDArray[np.float32],
    moved: NDArray[np.float32],
    grid: Geometry,
    masks: Sequence[NDArray[np.bool_]],
    progress: Progress,
) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """Run the Demons on two arrays of one grid; return the field in world mm and the range of its Jacobian.

    Near the edge of what was cut out descriptors see the cut, so they are not
    believed within `EDGE_VOXELS` of the edge of either mask.
    """
    import torch
    from scipy.ndimage import binary_erosion

    from chiasm.cohorts.demons import demons, jacobian

    weight = None
    if masks:
        inner = binary_erosion(np.logical_and(*masks), iterations=EDGE_VOXELS)
        weight = torch.from_numpy(inner.astype(np.float32))[None, None]
    with torch.inference_mode():
        images = [torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None] for array in (fixed, moved)]
        field = demons(images[0], images[1], weight=weight, progress=progress)
        determinant = jacobian(field)
    voxels = field[0].numpy().astype(np.float64)
    world = np.einsum("ab,bijk->aijk", grid.affine[:3, :3], voxels)
    return world.astype(np.float32), (float(determinant.min()), float(determinant.max()))


def _itk(volume: Volume) -> Any:
    """Hand a volume to SimpleITK in our own world axes: both images share them, so nothing need be turned."""
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
