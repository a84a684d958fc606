"""The same scan under two names, also where it was stored again: in other units, cropped, rotated or on another grid.

A thumbnail shows an image twice.  The whole view is coarse, in world order,
centred and scaled by its own content, and finds copies that were moved or stored
on another grid; the texture finds those whose intensities or edges were changed.
Thumbnails of two patients differ in what a copy keeps: the course of folds and
ventricles, lesions, and in the whole view shading.  Where a cohort shares one atlas
or one simulated head, what all of its images have in common is taken out first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.textures import Texture, above_background, correlations, texture
from chiasm.volumes import Volume, canonical

SIDE = 24  # bins of a thumbnail along each axis
REACH = 2.4  # half of its width, in standard deviations of where the content lies
SMOOTH = 1.5  # bins; slower changes do not count
ALIKE = 0.95  # correlation of two thumbnails from which a pair is looked at more closely
COPIES = 0.999  # two images this much alike are not used to find what a cohort has in common
COMMON = 4  # components that a cohort's images have in common, at most
MANY = 32  # images, from which the closer look is kept for pairs that are also
ALIKE_APART = 0.7  # this much alike without what is common
SAME = 0.96  # correlation, without what the cohort has in common, from which two are one scan
SAME_ALONE = 0.998  # where there is no third image to show what is common
SAME_BESIDE_ONE = 0.985  # of textures, where there is one
SAME_TEXTURE = 0.93  # correlation of two textures, without what is common, from which two are one scan

View = NDArray[np.float32]


class Thumbnail(NamedTuple):
    """A coarse view of an image.

    Attributes:
        whole: Of mean 0 and length 1, shape (SIDE, SIDE, SIDE); all 0 where the image is constant.
        texture: What it shows inside its content.
    """

    whole: View
    texture: Texture


class Likeness(NamedTuple):
    """Two images that show the same, and their correlation."""

    a: str
    b: str
    correlation: float


def thumbnail(volume: Volume) -> Thumbnail:
    """Return a coarse view of an image that depends neither on its units nor on how it is stored.

    Args:
        volume: Any image; more than a corner of it must be brighter than its background.
    """
    return Thumbnail(_whole(volume), texture(volume))


def _whole(volume: Volume) -> View:
    """Return means over cubes of one size in RAS order, high-pass filtered."""
    in_ras = canonical(volume)
    image = np.asarray(in_ras.array, dtype=np.float32)
    some = image[tuple(slice(None, None, max(1, side // 48)) for side in image.shape)]
    low, high = _ends(some, image)
    if high <= low:
        return np.zeros((SIDE,) * 3, np.float32)
    dark = above_background(some, low, high)
    view = np.clip(image - np.float32(dark), 0, np.float32(high - dark))
    return _binned(view, in_ras.geometry.spacing_mm)


def _ends(some: View, image: View) -> tuple[float, float]:
    """Return the values between which most of an image lies; all of it where some voxels are of one value."""
    low, high = np.percentile(some, (1, 99))
    return (low, high) if low < high else (float(image.min()), float(image.max()))


def _binned(view: View, spacing_mm: Sequence[float]) -> View:
    """Return means over cubes around the content, high-pass filtered."""
    places = [_place(view, axis, spacing) for axis, spacing in enumerate(spacing_mm)]
    width = 2 * REACH * float(np.sqrt(np.mean([variance for _, variance in places]))) / SIDE
    if width <= 0:  # one voxel
        return np.zeros((SIDE,) * 3, np.float32)
    for (centre, _), spacing in zip(places, spacing_mm, strict=True):
        shares = _overlaps(view.shape[0], spacing, centre, width)
        view = np.tensordot(view, shares, axes=(0, 1))  # the axis that was first becomes the last
    from scipy.ndimage import gaussian_filter  # 0.25 s that predicting does not need

    return _unit(view - gaussian_filter(view, SMOOTH, mode="nearest"))


def find_near_duplicates(thumbnails: Mapping[str, Thumbnail]) -> list[Likeness]:
    """Find the images that show the same scan.

    Args:
        thumbnails: Name to `thumbnail`, of one modality.

    Returns:
        Every two that do, in the order of their names.
    """
    names = sorted(name for name, view in thumbnails.items() if view.whole.any())
    if len(names) < 2:
        return []
    several = [thumbnails[name] for name in names]
    found = dict(chain(_same_textures(several), _same_wholes(several)))
    return [Likeness(names[i], names[j], correlation) for (i, j), correlation in sorted(found.items())]


def _same_wholes(thumbnails: Sequence[Thumbnail]) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield the places of two images whose whole views are alike, and their correlation."""
    views = np.stack([one.whole.ravel() for one in thumbnails])
    alike = views @ views.T
    for i, j in _candidates(views, alike, ALIKE):
        others = (alike[i] < COPIES) & (alike[j] < COPIES)
        common = _common(views[others])
        correlation = _correlation(views[i], views[j], common)
        if correlation >= (SAME if len(common) else SAME_ALONE):
            yield (i, j), correlation


def _same_textures(thumbnails: Sequence[Thumbnail]) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield the places of two images whose textures are alike, and their correlation."""
    views = np.stack([_unit(one.texture.values.ravel().astype(np.float32)) for one in thumbnails])
    alike = correlations([one.texture for one in thumbnails])
    for i, j in _candidates(views, alike, SAME_TEXTURE):
        shared = (thumbnails[i].texture.inside & thumbnails[j].texture.inside).ravel()
        others = views[(alike[i] < COPIES) & (alike[j] < COPIES)][:, shared]
        common = _common(others / np.maximum(np.linalg.norm(others, axis=1, keepdims=True), np.float32(1e-6)))
        correlation = _correlation_without(common, *views[[i, j]][:, shared])
        if correlation >= (SAME_ALONE, SAME_BESIDE_ONE, SAME_TEXTURE)[min(len(others), 2)]:
            yield (i, j), correlation


def _candidates(views: View, alike: View, least: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs that are worth a closer look: alike, and of many images also beyond what all have in common."""
    near = np.triu(alike >= least, 1)
    if len(views) >= MANY:
        common = _common(views)
        own = views - views @ common.T @ common
        own /= np.linalg.norm(own, axis=1, keepdims=True) + 1e-12
        near &= (own @ own.T >= ALIKE_APART) | (alike >= COPIES)
    yield from zip(*(side.tolist() for side in np.nonzero(near)), strict=True)


def _common(views: View) -> View:
    """Return what images have in common: one component for every two images, orthonormal, at most COMMON."""
    some = views[:: max(1, len(views) // MANY)][:MANY]
    components = np.linalg.svd(some, full_matrices=False)[2] if len(some) else some
    common: View = components[: min(COMMON, (len(some) + 1) // 2)]
    return common


def _correlation(a: View, b: View, common: View) -> float:
    """Correlate two thumbnails without what is common, after a small shift, scaling and blur of one of them."""
    cube = a.reshape((SIDE,) * 3)
    slopes = np.gradient(cube)
    ramps = np.meshgrid(*(np.arange(SIDE) - (SIDE - 1) / 2,) * 3, indexing="ij")
    larger = sum(ramp * slope for ramp, slope in zip(ramps, slopes, strict=True))
    from scipy.ndimage import laplace

    changes = [*slopes, larger, laplace(cube, mode="nearest")]
    columns = np.stack([a, *(change.ravel() for change in changes)], axis=1)
    factors = np.linalg.lstsq(columns, b, rcond=None)[0]
    stored_again = b - columns[:, 1:] @ factors[1:]
    return _correlation_without(common, a, stored_again)


def _correlation_without(common: View, a: View, b: View) -> float:
    """Correlate two views without what is common."""
    one, other = (_unit(view - common.T @ (common @ view)) for view in (a, b))
    return float(one @ other)


def _place(view: View, axis: int, spacing: float) -> tuple[float, float]:
    """Return where the content lies along an axis: its centre in mm from the first voxel, and its variance."""
    others = tuple(other for other in range(3) if other != axis)
    profile = view.sum(axis=others, dtype=np.float64)
    position = np.arange(len(profile)) * spacing
    centre = float((profile * position).sum() / profile.sum())
    return centre, float((profile * (position - centre) ** 2).sum() / profile.sum())


def _overlaps(count: int, spacing: float, centre: float, width: float) -> View:
    """Return the share of each bin that each voxel along an axis fills, shape (SIDE, count)."""
    voxels = (np.arange(count + 1) - 0.5) * spacing - centre
    bins = (np.arange(SIDE + 1) - SIDE / 2) * width
    ends = np.minimum(voxels[None, 1:], bins[1:, None]) - np.maximum(voxels[None, :-1], bins[:-1, None])
    shares: View = (np.clip(ends, 0, None) / width).astype(np.float32)
    return shares


def _unit(view: View) -> View:
    centred: View = view - view.mean()
    length = np.float32(np.linalg.norm(centred))
    scaled: View = centred / (length if length > 0 else np.float32(1))
    return scaled
