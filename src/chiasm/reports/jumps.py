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
    mask, lesion = (regions.array & IN_MASK) > 0, (regions.array & IN_LESION) > 0
    difference = in_ras["synthetic"].array - in_ras["real"].array if "real" in in_ras else None
    if difference is not None and mask.any():
        yield _largest_difference(difference, mask, unit)
    if "expected_error" in in_ras and mask.any():
        yield _largest_expected(in_ras["expected_error"], mask, unit)
    lesions = lesion_components(lesion & mask, regions.geometry.spacing_mm)  # numbered as in the evaluation
    for number, one in enumerate(lesions[:MOST_LESIONS], 1):
        yield Jump(f"Lesion {number}", _describe_lesion(one, difference, unit), _middle(one))


def _describe_lesion(lesion: Lesion, difference: NDArray[Any] | None, unit: str) -> str:
    """Say how large a lesion is, and the mean error in it where there is a real image."""
    volume = f"{show_number(lesion.volume_ml)} mL"
    if difference is None:
        return volume
    error = float(np.abs(difference[lesion.box][lesion.inside]).mean())
    return f"{volume}, MAE {with_unit(show_number(error), unit)}"


def _largest_difference(difference: NDArray[Any], mask: NDArray[np.bool_], unit: str) -> Jump:
    voxel = _where(np.where(mask, np.abs(difference), -1).argmax(), mask.shape)
    sign = "+" if difference[voxel] > 0 else ""
    return Jump("Largest difference", with_unit(f"{sign}{show_number(float(difference[voxel]))}", unit), voxel)


def _largest_expected(expected_error: Volume, mask: NDArray[np.bool_], unit: str) -> Jump:
    """Find the cluster of the highest expected errors that exceed the rest most, and its highest voxel."""
    from scipy.ndimage import label

    inside = np.where(mask, expected_error.array, -np.inf)
    limit = np.quantile(expected_error.array[mask], LARGEST_EXPECTED)
    places = np.nonzero(inside >= limit)  # one voxel in a hundred
    clusters, _ = label(inside >= limit, np.ones((3, 3, 3)))
    numbers, values = clusters[places], inside[places]
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


def _where(index: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(place) for place in np.unravel_index(int(index), shape))
