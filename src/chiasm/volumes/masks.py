"""The valid voxels of a volume: the brain or body, found only from the source.

Three rules: "given" (a file beside the images), "nonzero" (the volume was cut
out on a constant background, as in skull-stripped data) and "body" (what
differs from the air around it).

The background need not be the darkest value: a z-scored image is cut out on a
zero among values of both signs, and CT is padded with -3024 HU beside air of
-1000 HU.  So distances from the background are compared, not values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Volume

Rule = Literal["given", "nonzero", "body"]
Window = tuple[float, float]

SMOOTHING_MM = 2.0  # Gaussian before the body's threshold
OTSU_BINS = 256

COARSE_VOXELS = 64  # along each axis of the grid on which surroundings are looked at
FEWEST_ON_SURFACE = 50  # coarse voxels that show what lies at a surface
PADDED = 0.5  # share of the face voxels that have the value of a constant background
PARTLY_PADDED = 0.05  # likewise, where some of the faces are padded
UNIFORM = (
    0.12  # largest interquartile range of air, as a share of the contents' range; at brains' rims it is 0.15 to 0.6
)
NEAR_AIR = 0.15  # padding that differs from air by less, as such a share, is as good as air
ONE_SIDE = 0.1  # where a larger share of a body is darker than its background, dark tissue counts as bright tissue does
AIR_AROUND = 1.5  # contents are a field of view, and not a cut-out body, if they are so many times as large as the body
AIR_AROUND_ROUND = 2.4  # likewise where the contents are round, as a cut-out head is, whose dark skin looks like air
ROUND = 0.7  # of its box a head fills less, a field of view more
AIR_AROUND_CT = 1.15  # likewise in CT, where skull and lungs are not taken for air
MOST_AROUND = 12.0  # what is smaller beside its surroundings is a part of a body
AIR_HU = -850.0  # nothing above is air; a cut-out body may end in uniform fat

SHEET_MM = 4.0  # a table's shell is thinner than twice this, a body's wall is not
LEAST_SHEET = 0.01  # of a body: ears are smaller
COARSE_MM = 2.0
#: In which a body's holes are filled, one after another: a sinus that is open in one plane is closed in another.
PLANES = ((0, 1), (0, 2), (1, 2), (0, 1))


class Surroundings(NamedTuple):
    """The surroundings of a brain or body.

    Attributes:
        padding: What fills voxels that were not scanned or were cut out; None where nothing is padded.
        air: Intensity of the air that was scanned; None where there is none at the contents' surface.
        darker: Share of the body that is darker than what surrounds it.
        times_larger: How many times as large as the body the contents are: all that is not padding.
        span: Range of the contents' intensities, 5 to 95 %.
        fills: Share of their box that the contents fill.
    """

    padding: float | None
    air: float | None
    darker: float
    times_larger: float
    span: float
    fills: float = 1.0


def constant_background(array: NDArray[Any]) -> float | None:
    """Return the value that at least half of the voxels on the six faces share, or None."""
    return face_value(array, PADDED)


def look_around(array: NDArray[Any], *, is_ct: bool = False) -> Surroundings:
    """Find the surroundings of a brain or body on a coarse grid.

    Air is uniform: if the surface of the contents is uniform, it is air, and the body ends farther inside.  The surface
    of a skull-stripped brain is not uniform.

    Args:
        array: Shape (I, J, K); CT clipped to its window.
        is_ct: Whether intensities are Hounsfield units.
    """
    background = constant_background(array)
    padding = face_value(array, PARTLY_PADDED) if background is None else background
    coarse = array[tuple(slice(None, None, -(-size // COARSE_VOXELS)) for size in array.shape)].astype(np.float32)
    contents = np.ones(coarse.shape, bool) if padding is None else _filled(coarse != np.float32(padding))
    if not contents.any():
        return Surroundings(padding, None, 0.0, 1.0, 0.0)
    smooth = _smooth_within(contents, coarse)
    low, high = np.percentile(smooth[contents], (5, 95)).tolist()
    surfaces = _surfaces(contents, with_faces=background is None)
    air = _air_at([smooth[surface] for surface in surfaces], high - low, is_ct)
    body = _body_within(contents, coarse, smooth, air, padding)
    darker = _share_below(padding, smooth[contents]) if air is None else _share_below(air, smooth[body])
    times_larger = int(contents.sum()) / max(1, int(body.sum()))
    fills = float(contents[box_of(contents)].mean())
    return Surroundings(padding, air, darker, times_larger, high - low, fills)


def _air_at(surfaces: list[NDArray[np.float32]], span: float, is_ct: bool) -> float | None:
    """Return the intensity of the air at the most uniform surface, or None where there is none."""
    level = _uniform_level(surfaces, UNIFORM * span)
    return None if is_ct and level is not None and level > AIR_HU else level


def _share_below(level: float | None, values: NDArray[np.float32]) -> float:
    """Return the share of values that are darker than a level; 0 where there is none."""
    return 0.0 if level is None else float(np.mean(values < level))


def _body_within(
    contents: NDArray[np.bool_],
    coarse: NDArray[np.float32],
    smooth: NDArray[np.float32],
    air: float | None,
    padding: float | None,
) -> NDArray[np.bool_]:
    """Find what differs from the air around it, or from padding where there is no air; all contents without either."""
    if air is not None:
        return _filled(contents & _far(np.abs(smooth - air), contents))
    if padding is not None:
        return _filled(_far(_smooth(np.abs(coarse - padding)), np.ones(coarse.shape, bool)))
    return contents


def suggest_rule(volume: Volume, window_hu: Window | None = None) -> Rule:
    """Return the better rule for the mask of this volume: "nonzero" or "body".

    A constant background alone does not make a cut-out brain: scans are also
    padded, and then air lies between the padding and the body.

    Args:
        volume: In RAS order.
        window_hu: Of CT: Hounsfield units that are kept.
    """
    array = _in_window(volume.array, window_hu)
    return _suggested(array, look_around(array, is_ct=window_hu is not None), window_hu)


def find_mask(
    volume: Volume, rule: Rule, *, strictly: bool = False, window_hu: Window | None = None
) -> tuple[NDArray[np.bool_], Rule]:
    """Find the valid voxels of a source volume.

    Args:
        volume: In RAS order (axial slices along K).
        rule: "nonzero": the largest connected part that differs from the
            background, holes filled.  "body": the largest connected part whose
            smoothed distance from the background lies above Otsu's threshold,
            holes filled in each axial, coronal and sagittal slice.
            "given": whichever of the two `suggest_rule` says.
        strictly: Whether to follow the rule whatever `suggest_rule` says.
        window_hu: Of CT: Hounsfield units that are kept.

    Returns:
        The mask, shape (I, J, K), and the rule that was used: "body" also
        where "nonzero" was asked for and `suggest_rule` finds nothing cut out,
        as in a padded scan of a whole head.

    Raises:
        VolumeError: If nothing is left, or "nonzero" is a must and the background is not constant.
    """
    array = _in_window(volume.array, window_hu)
    around = look_around(array, is_ct=window_hu is not None)
    followed = rule == "body" or (strictly and rule == "nonzero")
    used: Rule = rule if followed else _suggested(array, around, window_hu)
    if used == "nonzero":
        mask = _nonzero(array, _required_background(array))
    else:
        mask = _body(array, volume.geometry.spacing_mm, around, table=window_hu is not None)
    if not mask.any():
        raise VolumeError(
            "has no brain or body that could be separated from the background",
            reason="empty-mask",
            hint="Give a mask beside the image.",
        )
    return mask, used


def _required_background(array: NDArray[Any]) -> float:
    """Return the value of the background, which must be constant."""
    background = constant_background(array)
    if background is None:
        raise VolumeError(
            "is not cut out on a constant background, as the mask rule nonzero needs",
            reason="mask-rule",
            hint="Choose data.mask=body, or leave the choice to the plan (data.mask=auto).",
        )
    return background


def otsu_threshold(values: NDArray[Any]) -> float:
    """Return the threshold that separates two classes best (Otsu 1979), of 256 bins between minimum and maximum.

    Where all values are the same, it is that value.
    """
    if values.min() == values.max():
        return float(values.min())
    counts, edges = np.histogram(values, bins=OTSU_BINS)
    centres = (edges[1:] + edges[:-1]) / 2
    below, weighted = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    return float(centres[np.nanargmax(between[:-1])])


def _in_window(array: NDArray[Any], window_hu: Window | None) -> NDArray[Any]:
    return array if window_hu is None else np.clip(array, *window_hu)


def face_value(array: NDArray[Any], least_share: float) -> float | None:
    """Return the most frequent value on the six faces, or None where fewer than so many of their voxels have it."""
    faces = np.concatenate([np.moveaxis(array, axis, 0)[end].ravel() for axis in range(3) for end in (0, -1)])
    values, counts = np.unique(faces, return_counts=True)
    return float(values[counts.argmax()]) if counts.max() >= least_share * faces.size else None


def _suggested(array: NDArray[Any], around: Surroundings, window_hu: Window | None) -> Rule:
    """Find which rule fits an image and what lies around its contents."""
    background = constant_background(array)
    if background is None:
        return "body"
    is_ct = window_hu is not None
    if around.air is None and _lies_among_tissue(background, around, is_ct):
        return "nonzero"  # it is not air
    return "body" if _least_around(around, is_ct) < around.times_larger < MOST_AROUND else "nonzero"


def _lies_among_tissue(background: float, around: Surroundings, is_ct: bool) -> bool:
    """Return whether a background has the intensity of tissue: much of the body is darker, and much brighter."""
    return ONE_SIDE < around.darker < 1 - ONE_SIDE or (is_ct and background > AIR_HU)


def _least_around(around: Surroundings, is_ct: bool) -> float:
    """Return how many times as large as the body a field of view is at least."""
    if is_ct:
        return AIR_AROUND_CT
    return AIR_AROUND if around.fills >= ROUND else AIR_AROUND_ROUND


def _smooth(array: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy import ndimage

    smooth: NDArray[np.float32] = ndimage.gaussian_filter(array, 1.0, truncate=2.0)
    return smooth


def _smooth_within(contents: NDArray[np.bool_], array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Smooth the contents, without values from outside them."""
    weight = _smooth(contents.astype(np.float32))
    return np.asarray(_smooth(np.where(contents, array, 0)) / np.maximum(weight, 1e-3), np.float32)


def _surfaces(contents: NDArray[np.bool_], *, with_faces: bool) -> list[NDArray[np.bool_]]:
    """Return where contents end: beside padding, and, each for itself, at the six faces of the volume."""
    from scipy import ndimage

    surfaces = [contents & ~ndimage.binary_erosion(contents, border_value=1)]
    for axis in range(3) if with_faces else ():
        for end in (0, -1):
            face = np.zeros_like(contents)
            np.moveaxis(face, axis, 0)[end] = np.moveaxis(contents, axis, 0)[end]
            surfaces.append(face)
    return surfaces


def _uniform_level(surfaces: list[NDArray[np.float32]], most: float) -> float | None:
    """Return the median of the most uniform surface, or None where none is as uniform as air."""
    quartiles = [
        np.percentile(values, (25, 50, 75)).tolist() for values in surfaces if values.size >= FEWEST_ON_SURFACE
    ]
    ranges = [(high - low, middle) for low, middle, high in quartiles if high - low < most]
    return min(ranges)[1] if ranges else None


def _far(distance: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which voxels lie beyond Otsu's threshold of a distance; the brightest decide nothing."""
    values = np.minimum(distance[among], np.percentile(distance[among], 99.5))
    far: NDArray[np.bool_] = distance > otsu_threshold(values)
    return far


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest part of a mask, holes filled."""
    return with_holes_filled(_largest(mask), (0, 1, 2))


def with_holes_filled(mask: NDArray[np.bool_], axes: Sequence[int]) -> NDArray[np.bool_]:
    """Fill what is not connected along `axes` with the border across them.

    Args:
        mask: Shape (I, J, K).
        axes: All three fill holes in space, two fill them plane by plane.
    """
    neighbours = np.zeros((3, 3, 3), bool)
    for axis in axes:
        np.moveaxis(neighbours, axis, 0)[:, 1, 1] = True
    parts, count = _labelled(~mask, neighbours)
    outside = np.zeros(count + 1, bool)
    for axis in axes:
        for end in (0, -1):
            outside[np.moveaxis(parts, axis, 0)[end]] = True
    outside[0] = False  # of the mask itself
    filled: NDArray[np.bool_] = ~outside[parts]
    return filled


def _nonzero(array: NDArray[Any], background: float) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = array != background
    if not mask.any():
        return mask
    box = box_of(mask)
    mask[box] = _filled(mask[box])
    return mask


def _distance(array: NDArray[Any], around: Surroundings) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Return how far each voxel is from the background, up to an offset, and which decide where a body begins.

    All do, unless padding differs from air: it is then as far away as air.  The rarest values decide nothing.
    """
    distance: NDArray[np.float32] = array.astype(np.float32)
    level = around.padding if around.air is None else around.air
    deciding = _deciding(array, around)
    if deciding is not None:
        distance[~deciding] = around.air
    if level is not None and around.darker > ONE_SIDE:
        np.abs(distance - np.float32(level), out=distance)
    _clip_rarest(distance, deciding)
    return distance, deciding


def _deciding(array: NDArray[Any], around: Surroundings) -> NDArray[np.bool_] | None:
    """Return which voxels decide where a body begins: all but padding that differs from air; None for all."""
    if around.padding is None or around.air is None:
        return None
    differs = abs(around.padding - around.air) > NEAR_AIR * around.span
    return array != around.padding if differs else None


def _clip_rarest(distance: NDArray[np.float32], deciding: NDArray[np.bool_] | None) -> None:
    """Clip vessels, implants and faults, in place."""
    thin = tuple(slice(None, None, max(1, size // 64)) for size in distance.shape)
    values = distance[thin] if deciding is None else distance[thin][deciding[thin]]
    low, high = np.percentile(values, (0.5, 99.5)).tolist()
    np.clip(distance, 2 * low - high, high, out=distance)


def _body(
    array: NDArray[Any], spacing_mm: tuple[float, float, float], around: Surroundings, *, table: bool
) -> NDArray[np.bool_]:
    from scipy import ndimage

    distance, deciding = _distance(array, around)
    if distance.min() == distance.max():
        return np.zeros(array.shape, bool)
    smooth = ndimage.gaussian_filter(distance, [SMOOTHING_MM / spacing for spacing in spacing_mm], truncate=2.0)
    mask: NDArray[np.bool_] = smooth > otsu_threshold(smooth if deciding is None else smooth[deciding])
    if not mask.any():
        return mask
    box = box_of(mask)
    mask[box] = _whole_body(_largest(mask[box]), spacing_mm, table=table)
    return mask


def _whole_body(inside: NDArray[np.bool_], spacing_mm: tuple[float, float, float], *, table: bool) -> NDArray[np.bool_]:
    """Fill the holes of a body plane by plane, and take away the table under it if it may lie on one."""
    if table:
        inside = _largest(inside & ~_sheets(inside, spacing_mm))
    for axes in PLANES:
        inside = with_holes_filled(inside, axes)
    return inside


def _sheets(inside: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Return large thin parts that hang on a body: a table, a head rest; found on a coarse grid."""
    from scipy import ndimage

    steps = [max(1, round(COARSE_MM / spacing)) for spacing in spacing_mm]
    thin = np.pad(inside[tuple(slice(None, None, step) for step in steps)], 1, mode="edge")  # nothing ends at a face
    sides = [step * spacing for step, spacing in zip(steps, spacing_mm)]
    core = _largest(ndimage.distance_transform_edt(thin, sides) > SHEET_MM)
    if not core.any():
        return np.zeros_like(inside)
    hanging = thin & (ndimage.distance_transform_edt(~core, sides) > SHEET_MM + max(sides))
    parts, count = ndimage.label(hanging)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    large = sizes >= LEAST_SHEET * np.count_nonzero(thin)
    large[0] = False
    found = large[parts][1:-1, 1:-1, 1:-1]
    for axis, step in enumerate(steps):
        found = np.repeat(found, step, axis)
    whole: NDArray[np.bool_] = found[tuple(slice(0, size) for size in inside.shape)]
    return whole


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, count = _labelled(mask)
    if count < 2:
        return mask
    sizes = np.zeros(count + 1, np.int64)
    for plane in parts:  # counting makes a copy in 64 bits
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest: NDArray[np.bool_] = parts == sizes.argmax()
    return largest


def _labelled(mask: NDArray[np.bool_], neighbours: NDArray[np.bool_] | None = None) -> tuple[NDArray[Any], int]:
    """Number the connected parts of a mask from 1, in 16 bits where that is enough: a volume may be large."""
    from scipy import ndimage

    parts = np.empty(mask.shape, np.uint16)
    try:
        return parts, int(ndimage.label(mask, neighbours, output=parts))
    except RuntimeError:  # more parts than that
        parts, count = ndimage.label(mask, neighbours)
        return parts, int(count)
