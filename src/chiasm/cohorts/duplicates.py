"""The same scan under two names, also if it was stored again: in other units, cropped, rotated or on another grid.

A thumbnail shows an image in two ways.  The whole view is coarse, in world order, centred and scaled by its own
content; it finds copies that were moved or stored on another grid.  The texture finds copies with changed intensities
or edges. Thumbnails of two patients differ in what a copy keeps: the course of folds and ventricles, lesions, and in
the whole view shading.  If a cohort shares one atlas or one simulated head, the part that all of its images have in
common is removed first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, grouped
from chiasm.cohorts.textures import Texture, above_background, correlations, texture
from chiasm.volumes import Volume, canonical

SIDE = 24  # bins of a thumbnail along each axis
REACH = 2.4  # half of its width, in standard deviations of where the content lies
SMOOTH = 1.5  # bins; slower changes do not count
ALIKE = 0.95  # correlation of two thumbnails from which a pair is looked at more closely
COPIES = 0.999  # two images this much alike are not used to find what a cohort has in common
COMMON = 4  # components that a cohort's images have in common, at most
AT_ONCE = 256  # images that are compared with as many others at once
MANY = 32  # images, from which the closer look is kept for pairs that are also
ALIKE_APART = 0.7  # this much alike without what is common
SAME = 0.96  # correlation, without what the cohort has in common, from which two are one scan
SAME_ALONE = 0.998  # where there is no third image to show what is common
SAME_BESIDE_ONE = 0.985  # of textures, where there is one
SAME_TEXTURE = 0.93  # correlation of two textures, without what is common, from which two are one scan

View = NDArray[np.float32]
Places = Sequence[int]  # of images in their order


def voxel_hash(array: NDArray[Any]) -> str:
    """Return the sha256 of a volume's values and shape, the same for every storage type that holds these values.

    Values are compared as little-endian float32, so the same scan stored as
    int16 and as float64 is found; stored in another axis order it is not.

    Args:
        array: Real values of any shape.
    """
    values = np.ascontiguousarray(array, dtype="<f4") + np.float32(0)  # -0.0 becomes 0.0
    digest = hashlib.sha256(repr(tuple(array.shape)).encode())
    digest.update(values.data)
    return digest.hexdigest()


def find_duplicates(hashes: Mapping[str, str], cases: Iterable[Case]) -> list[tuple[str, str]]:
    """Return pairs of case ids that have the same voxels and different subjects.

    Args:
        hashes: Case id to `voxel_hash`; cases without one are passed over.
        cases: Cases with unique ids.
    """
    hashed = sorted((case for case in cases if case.id in hashes), key=lambda case: case.id)
    alike = grouped(hashed, lambda case: hashes[case.id])
    pairs = chain.from_iterable(combinations(same, 2) for same in alike.values())
    return sorted((a.id, b.id) for a, b in pairs if a.subject != b.subject)


class Thumbnail(NamedTuple):
    """A coarse view of an image.

    Attributes:
        whole: The whole view, of mean 0 and length 1, shape (SIDE, SIDE, SIDE); all 0 if the image is constant.
        texture: The texture inside its content.
    """

    whole: View
    texture: Texture


class Likeness(NamedTuple):
    """Two images that show the same, and their correlation."""

    a: str
    b: str
    correlation: float


def thumbnail(volume: Volume) -> Thumbnail:
    """Return a coarse view of an image that depends neither on its units nor on its grid.

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
    """Return the values between which most of an image lies; all of it if many voxels have one value."""
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


def find_near_duplicates(thumbnails: Mapping[str, Thumbnail | None]) -> list[Likeness]:
    """Find the images that show the same scan.

    Images are compared in blocks, so that memory does not grow with them where the mapping reads them from the disk.

    Args:
        thumbnails: Name to `thumbnail`, of one modality; those without one are left out.

    Returns:
        Every two that do, in the order of their names.
    """
    names = sorted(name for name, view in thumbnails.items() if view is not None and view.whole.any())
    if len(names) < 2:
        return []

    def load(places: Places) -> list[Thumbnail]:
        views = (thumbnails[names[place]] for place in places)
        return [view for view in views if view is not None]

    found = dict(chain(_same_textures(load, len(names)), _same_wholes(load, len(names))))
    return [Likeness(names[i], names[j], correlation) for (i, j), correlation in sorted(found.items())]


Load = Callable[[Places], Sequence[Thumbnail]]


class _EachWithEach(NamedTuple):
    """Images that are compared each with each.

    Attributes:
        load: Return some of them.
        number: How many there are.
        views: Return what images show, as rows, shape (n, bins).
        alike: Correlate images with others, shape (n, m).
    """

    load: Load
    number: int
    views: Callable[[Sequence[Thumbnail]], View]
    alike: Callable[[Sequence[Thumbnail], Sequence[Thumbnail]], View]


class _Candidates(NamedTuple):
    """Pairs that are worth a closer look, and for each image those that are copies of it, itself among them."""

    pairs: list[tuple[int, int]]
    copies: list[set[int]]

    def without_copies(self, i: int, j: int) -> list[int]:
        """Return the places of all images that are copies of neither of two."""
        either = self.copies[i] | self.copies[j]
        return [place for place in range(len(self.copies)) if place not in either]


def _same_wholes(load: Load, number: int) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield the places of two images whose whole views are alike, and their correlation."""

    def views(some: Sequence[Thumbnail]) -> View:
        return _rows([one.whole for one in some])

    found = _candidates(_EachWithEach(load, number, views, lambda one, other: views(one) @ views(other).T), ALIKE)
    for i, j in found.pairs:
        common = _common(views(load(_thinned(found.without_copies(i, j)))))
        a, b = views(load((i, j)))
        correlation = _correlation(a, b, common)
        if correlation >= (SAME if len(common) else SAME_ALONE):
            yield (i, j), correlation


def _same_textures(load: Load, number: int) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield the places of two images whose textures are alike, and their correlation."""

    def views(some: Sequence[Thumbnail]) -> View:
        return _rows([_unit(one.texture.values.astype(np.float32)) for one in some])

    def alike(some: Sequence[Thumbnail], others: Sequence[Thumbnail]) -> View:
        return correlations(*([one.texture for one in each] for each in (some, others)))

    found = _candidates(_EachWithEach(load, number, views, alike), SAME_TEXTURE)
    for i, j in found.pairs:
        two = load((i, j))
        shared = (two[0].texture.inside & two[1].texture.inside).ravel()
        places = found.without_copies(i, j)
        others = views(load(_thinned(places)))[:, shared]
        common = _common(others / np.maximum(np.linalg.norm(others, axis=1, keepdims=True), np.float32(1e-6)))
        a, b = views(two)[:, shared]
        correlation = _correlation_without(common, a, b)
        if correlation >= (SAME_ALONE, SAME_BESIDE_ONE, SAME_TEXTURE)[min(len(places), 2)]:
            yield (i, j), correlation


def _candidates(images: _EachWithEach, least: float) -> _Candidates:
    """Find the pairs that are worth a closer look: alike, and of many images also beyond what all have in common."""
    everyone = range(images.number)
    common = _common(images.views(images.load(_thinned(everyone)))) if images.number >= MANY else None
    found = _Candidates([], [set() for _ in everyone])
    blocks = [everyone[start : start + AT_ONCE] for start in range(0, images.number, AT_ONCE)]
    for place, one in enumerate(blocks):
        some = images.load(one)
        for other in blocks[place:]:
            others = some if other is one else images.load(other)
            alike = images.alike(some, others)
            for i, j in _places(alike >= COPIES, one, other):
                found.copies[i].add(j)
                found.copies[j].add(i)
            near = np.triu(alike >= least, 1) if other is one else alike >= least
            if common is not None and near.any():
                own, own_of_others = (_own(images.views(block), common) for block in (some, others))
                near &= (own @ own_of_others.T >= ALIKE_APART) | (alike >= COPIES)
            found.pairs.extend(_places(near, one, other))
    return found._replace(pairs=sorted(found.pairs))


def _places(where: NDArray[np.bool_], one: Places, other: Places) -> list[tuple[int, int]]:
    """Return the places of the two images of each element that is set."""
    return [(one[row], other[column]) for row, column in np.argwhere(where).tolist()]


def _own(views: View, common: View) -> View:
    """Return views without what is common, of length 1."""
    own = views - views @ common.T @ common
    own /= np.linalg.norm(own, axis=1, keepdims=True) + 1e-12
    return np.asarray(own, np.float32)


def _rows(views: Sequence[View]) -> View:
    """Return views as rows, shape (n, bins)."""
    return np.stack([view.ravel() for view in views]) if views else np.empty((0, SIDE**3), np.float32)


def _thinned(places: Places) -> Places:
    """Return at most MANY of them, evenly spread."""
    return places[:: max(1, len(places) // MANY)][:MANY]


def _common(some: View) -> View:
    """Return what images have in common: one component for every two images, orthonormal, at most COMMON."""
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
