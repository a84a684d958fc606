"""Find out whether a volume lies outside the distribution that a model was trained on.

Spacing, extent, scale and histogram are compared with those of the training cases.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chiasm.names import sizes_in_mm, three_digits
from chiasm.preparation.intensity import (
    IntensityMap,
)
from chiasm.preparation.plan import HISTOGRAM_BINS, Plan, Triple
from chiasm.volumes.masks import Rule

BEGINNING = "the input is out of distribution"  # of the warning

# An input is out of distribution beyond these factors of what was seen there.
SPACING_MARGIN = 1.5
FIELD_MARGIN = 1.3
HISTOGRAM_MARGIN = 1.5
LITTLE = 1.05  # times a limit: less is not worth a number
SMALLEST_LIMIT = 0.02  # of a histogram's distance, as a share of the source's range
UNKNOWN_LIMIT = 0.1  # likewise, where there are too few cases to show what is usual
STORED_BELOW_ZERO = 0.02  # of an image's range: scanners store magnitudes, which are not negative
STORED_MARGIN = 50.0  # between the gains of scanners; [0, 1] is farther from any


class NormalisedSource(Protocol):
    """What `out_of_distribution_warning` looks at: a prepared source."""

    @property
    def array(self) -> NDArray[np.float32]:
        """Normalised sources, shape (C, I, J, K); what follows them is not looked at."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Valid voxels, shape (I, J, K)."""

    @property
    def mask_rule(self) -> Rule:
        """How the mask was found."""

    @property
    def maps(self) -> tuple[IntensityMap, ...]:
        """The intensity map of each source, from stored to normalised intensities."""

    @property
    def grid_mm(self) -> Triple:
        """Spacing before resampling, mm, RAS order."""

    @property
    def body_mm(self) -> Triple:
        """Size of the box around the mask, mm, RAS order."""


def out_of_distribution_warning(plan: Plan, prepared: NormalisedSource) -> str | None:
    """Describe in one sentence how an input differs from all training cases; None if it does not.

    Looks at the spacing before resampling, the size of what the mask holds,
    how the mask had to be found, and each source's histogram.  Intensities of
    another scale come first: an image that somebody normalised often differs in the rest too.
    """
    findings = _other_scales(plan, prepared)
    for kind, seen, (smallest, largest), margin in (
        ("voxels", prepared.grid_mm, plan.grid_mm, SPACING_MARGIN),
        ("a brain or body", prepared.body_mm, plan.body_mm, FIELD_MARGIN),
    ):
        if any(s < a / margin or s > b * margin for s, a, b in zip(seen, smallest, largest)):
            findings.append(f"{kind} of {sizes_in_mm(seen, seen)} ({sizes_in_mm(smallest, largest)} in training)")
    if plan.mask_rule == "nonzero" and prepared.mask_rule == "body":
        findings.append("an image that is not cut out on a constant background as the training images were")
    for index, name in enumerate(plan.sources):
        histogram = histogram_of(prepared.array[index][prepared.mask], plan.source_ranges[index])
        distance = histogram_distance(histogram, plan.source_histograms[index], plan.source_ranges[index])
        if distance > plan.source_limits[index]:
            findings.append(f"a histogram of {name} that is {_farther(distance / plan.source_limits[index])}")
    return f"{BEGINNING}: it has {', and '.join(findings)}" if findings else None


def _farther(times: float) -> str:
    """Say how much farther than usual a histogram is; "1 times" would say that it is not.

    >>> _farther(1.002)
    "a little farther from the training images' than is usual"
    """
    if times < LITTLE:
        return "a little farther from the training images' than is usual"
    return f"{three_digits(times)} times as far from the training images' as is usual"


def _other_scales(plan: Plan, prepared: NormalisedSource) -> list[str]:
    """Name sources that were normalised before they were stored, if the training images were not, or the reverse."""
    findings = []
    for index, (name, trained) in enumerate(zip(plan.sources, plan.source_stored)):
        seen = prepared.maps[index].invert(np.percentile(prepared.array[index][prepared.mask], (0.5, 99.5)))
        stored = float(seen[0]), float(seen[1])
        if plan.source_kinds[index] != "hu" and (how := _rescaled(stored, trained)):
            findings.append(
                f"intensities of {name} from {three_digits(stored[0])} to {three_digits(stored[1])} "
                f"({three_digits(trained[0])} to {three_digits(trained[1])} "
                f"in training), so {how}"
            )
    return findings


def _rescaled(stored: tuple[float, float], trained: tuple[float, float]) -> str:
    """Describe how stored intensities differ from those of the training images; empty if they are of one kind.

    >>> _rescaled((-2.0, 3.0), (0.0, 900.0)), _rescaled((5.0, 3000.0), (0.0, 900.0))
    ('the image seems to be z-scored or otherwise normalised, and the training images were not', '')
    """
    (low, high), (lowest, highest) = stored, trained
    if _has_negatives(low, high) and not _has_negatives(lowest, highest):
        return "the image seems to be z-scored or otherwise normalised, and the training images were not"
    if _has_negatives(lowest, highest) and not _has_negatives(low, high):
        return "the image does not seem to be normalised as the training images were"
    if high * STORED_MARGIN < highest or highest * STORED_MARGIN < high:
        return "one of both seems to be scaled, the image or the training images"
    return ""


def _has_negatives(low: float, high: float) -> bool:
    return low < -STORED_BELOW_ZERO * (high - low)


def histogram_of(values: NDArray[np.float32], bounds: tuple[float, float]) -> NDArray[np.float64]:
    """Return the share of values in each of 32 bins over `bounds`; values beyond them count in the outer bins."""
    counts = np.histogram(np.clip(values, *bounds), bins=HISTOGRAM_BINS, range=bounds)[0]
    shares: NDArray[np.float64] = counts / max(1, counts.sum())
    return shares


def histogram_distance(a: ArrayLike, b: ArrayLike, bounds: tuple[float, float]) -> float:
    """Return the Wasserstein distance of two histograms over `bounds`, shape (32,) each, in normalised intensities."""
    width = (bounds[1] - bounds[0]) / HISTOGRAM_BINS
    return float(np.abs(np.cumsum(np.subtract(a, b))).sum() * width)
