"""Places of a case that are worth a look: the largest difference, the largest expected error, each lesion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.metrics.lesions import Lesion, lesion_components
from chiasm.reports.drawing import show_number, with_unit
from chiasm.volumes import Volume

IN_MASK, IN_LESION = 1, 2  # bits of the volume of regions
MOST_LESIONS = 30  # to jump to
LARGEST_EXPECTED = 0.99  # quantile above which a voxel's expected error is large

Pair = tuple[NDArray[Any], NDArray[Any]]  # the synthetic image and the real one


class Jump(NamedTuple):
    """A place to look at: its name, a score, and its voxel of the canonical grid."""

    label: str
    detail: str
    voxel: tuple[int, ...]


def list_jumps(in_ras: Mapping[str, Volume], unit: str) -> Iterator[Jump]:
    """Name the places worth a look.

    Args:
        in_ras: Volumes by name, on one grid in RAS order, among them "synthetic" and "regions" (bits `IN_MASK` and
            `IN_LESION`), and "real" and "expected_error" where there are such.
        unit: Of the images.
    """
    regions = in_ras["regions"]
    mask = (regions.array & IN_MASK) > 0
    pair = (in_ras["synthetic"].array, in_ras["real"].array) if "real" in in_ras else None
    if pair is not None and mask.any():
        yield _largest_difference(pair, mask, unit)
    if "expected_error" in in_ras and mask.any():
        yield _largest_expected(in_ras["expected_error"], mask, unit)
    mask &= (regions.array & IN_LESION) > 0
    lesions = lesion_components(mask, regions.geometry.spacing_mm)  # numbered as in the evaluation
    for number, one in enumerate(lesions[:MOST_LESIONS], 1):
        yield Jump(f"Lesion {number}", _describe_lesion(one, pair, unit), _middle(one))


def _describe_lesion(lesion: Lesion, pair: Pair | None, unit: str) -> str:
    """Say how large a lesion is, and the mean error in it where there is a real image."""
    volume = f"{show_number(lesion.volume_ml)} mL"
    if pair is None:
        return volume
    synthetic, real = (image[lesion.box][lesion.inside] for image in pair)
    return f"{volume}, MAE {with_unit(show_number(float(np.abs(synthetic - real).mean())), unit)}"


def _largest_difference(pair: Pair, mask: NDArray[np.bool_], unit: str) -> Jump:
    difference = pair[0][mask]
    difference -= pair[1][mask]
    place = np.abs(difference).argmax()
    sign = "+" if difference[place] > 0 else ""
    detail = with_unit(f"{sign}{show_number(float(difference[place]))}", unit)
    return Jump("Largest difference", detail, _voxel_of(int(place), mask))


def _largest_expected(expected_error: Volume, mask: NDArray[np.bool_], unit: str) -> Jump:
    """Find the cluster of the highest expected errors that exceed the rest most, and its highest voxel."""
    from scipy.ndimage import label

    limit = np.quantile(expected_error.array[mask], LARGEST_EXPECTED, overwrite_input=True)
    is_large = expected_error.array >= limit
    is_large &= mask
    places = np.nonzero(is_large)  # one voxel in a hundred
    narrow = len(places[0]) <= np.iinfo(np.uint16).max  # clusters are no more than voxels
    clusters, _ = label(is_large, np.ones((3, 3, 3)), output=np.uint16 if narrow else np.int32)
    numbers, values = clusters[places], expected_error.array[places]
    highest = np.bincount(numbers, values - limit).argmax() if values.max() > limit else numbers[0]
    own = np.flatnonzero(numbers == highest)
    first = own[values[own].argmax()]
    voxel = tuple(int(along[first]) for along in places)
    size = show_number(len(own) * math.prod(expected_error.geometry.spacing_mm) / 1000)
    error = with_unit(show_number(float(values[first])), unit)
    return Jump("Largest expected error", f"{error} expected, {size} mL", voxel)


def _middle(lesion: Lesion) -> tuple[int, ...]:
    """Find the lesion's voxel nearest to its centre."""
    places = np.argwhere(lesion.inside)
    nearest = places[np.linalg.norm(places - places.mean(axis=0), axis=1).argmin()]
    return tuple(int(at) + side.start for at, side in zip(nearest, lesion.box))


def _voxel_of(place: int, mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the voxel of a mask that stands at a place among all of its voxels."""
    ends = np.cumsum(np.count_nonzero(mask, axis=(1, 2)))
    plane = int(np.searchsorted(ends, place, side="right"))
    within = np.flatnonzero(mask[plane])[place - (ends[plane - 1] if plane else 0)]
    j, k = np.unravel_index(within, mask.shape[1:])
    return plane, int(j), int(k)
