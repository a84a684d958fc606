"""Pairs of volumes: every pair enters by `check_pair`, on one grid and not mirrored, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from chiasm.errors import VolumeError
from chiasm.volumes.geometry import Geometry, Volume, laid_on, reordered_like, same_grid, voxels_apart
from chiasm.volumes.mirroring import find_mirrored

REGISTER = "chiasm register does it for one pair, chiasm train --register rigid for a cohort."


def check_pair(
    a: Volume,
    b: Volume,
    *,
    a_name: str = "source",
    b_name: str = "target",
    labels: bool = False,
    may_be_mirrored: bool = False,
) -> Volume:
    """Return `b` on the grid of `a`, or refuse the pair.

    The same space stored in another axis order is reordered, and a DICOM
    segmentation without its empty slices laid among the others; nothing is ever
    interpolated here.

    Args:
        a: Sets the grid.
        b: What should lie on it.
        a_name: What to call it in errors.
        b_name: Likewise.
        labels: Whether `b` is a label map or mask, whose content cannot be compared with an image.
        may_be_mirrored: Whether `b` is accepted although it fits `a` better when it is mirrored: of doses, whose
            content says nothing about sides.

    Raises:
        VolumeError: If grids differ, the volumes do not overlap in the world,
            or `b` is an image that fits `a` clearly better when it is mirrored.
    """
    fitting = reordered_like(b, a.geometry)
    if labels and b.geometry.container == "dicom":  # its empty slices are not stored
        fitting = laid_on(b, a.geometry) or fitting
    if not same_grid(a.geometry, fitting.geometry):
        raise _different_grids(a.geometry, b.geometry, a_name, b_name, labels or may_be_mirrored)
    fitting = Volume(fitting.array, a.geometry)
    if not (labels or may_be_mirrored):
        _refuse_mirrored(a, fitting, a_name, b_name)
    return fitting


def refuse_twice(images: Mapping[str, Volume]) -> None:
    """Refuse one image in the place of two modalities.

    Args:
        images: Modality to its image, all on one grid.

    Raises:
        VolumeError: If all voxels of two images are equal.
    """
    for (a_name, a), (b_name, b) in combinations(images.items(), 2):
        if np.array_equal(a.array, b.array):
            raise VolumeError(
                f"the {b_name} is the same image as the {a_name}",
                reason="same-image",
                found="equal values in every voxel",
                hint="One file seems to stand in two places: give each modality its own scan.",
            )


def _refuse_mirrored(a: Volume, b: Volume, a_name: str, b_name: str) -> None:
    """Refuse an image that fits another clearly better when it is mirrored."""
    better = find_mirrored(a.array, b.array)
    if better is not None:
        raise VolumeError(
            f"the {b_name} fits the {a_name} better when it is mirrored along axis {'IJK'[better.axis]}",
            reason="mirrored",
            found=f"shared information of {better.information:.2f} nats mirrored, {better.as_stored:.2f} as stored",
            expected="more as stored",
            hint="Two causes are possible: one of the two was flipped while its header was not, so convert both again "
            "from the scans; or the two are badly aligned, so register them.",
        )


def _are_apart(a: Geometry, b: Geometry) -> bool:
    """Return whether two grids share no place in the world, by their boxes."""
    low_a, high_a, low_b, high_b = a.corners.min(0), a.corners.max(0), b.corners.min(0), b.corners.max(0)
    return bool((low_a > high_b).any() or (low_b > high_a).any())


def _different_grids(a: Geometry, b: Geometry, a_name: str, b_name: str, labels: bool) -> VolumeError:
    if _are_apart(a, b):
        return VolumeError(
            f"the {b_name} and the {a_name} do not overlap in space",
            reason="no-overlap",
            hint="Do they belong to one scan session?" + ("" if labels else f" {REGISTER}"),
        )
    if a.shape != b.shape:
        found, expected = "x".join(map(str, b.shape)), "x".join(map(str, a.shape))
    else:
        found, expected = f"corners up to {voxels_apart(a, b):.3g} voxels apart", "at most 0.01"
    hint = f"Register or resample the {b_name} to the {a_name} first"
    return VolumeError(
        f"the {b_name}'s grid differs from that of the {a_name}",
        reason="grid",
        found=found,
        expected=expected,
        hint=f"{hint}." if labels else f"{hint}. {REGISTER}",
    )
