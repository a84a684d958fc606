"""The real image of a case, with the mask and the regions in which predictions are scored against it.

What depends on the real image alone is found once, however many predictions are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.attenuation import attenuation
from chiasm.boxes import Box, same_shape
from chiasm.heap import give_back
from chiasm.metrics import conventions, edges, lesions, radiotherapy
from chiasm.metrics.conventions import Places
from chiasm.metrics.ssim import window_box
from chiasm.preparation.intensity import IntensityMap

EDGE_BAND_MM = 4.0
EDGE_SHARE = 0.1  # of the mask's voxels: the target's steepest


class ScoredBox(NamedTuple):
    """The part of a volume that holds every difference.

    Attributes:
        box: Of the part.
        shape: Of the volume.
        background: Of target and predictions beyond the mask.
    """

    box: Box
    shape: tuple[int, ...]
    background: float


class Beams(NamedTuple):
    """Gantry angles, with how the volume lies under the beam.

    Attributes:
        degrees: Gantry angles, IEC 61217.
        matrix: Steps from voxel to voxel, RAS and mm, in its columns, shape (3, 3).
    """

    degrees: tuple[float, ...]
    matrix: NDArray[np.float64]


class OwnUnits(NamedTuple):
    """The way from the cohort's target units to the intensities of one real image.

    Attributes:
        cohort: The map of the training cohort.
        scan: The map of the real image.
    """

    cohort: IntensityMap
    scan: IntensityMap

    def convert(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Convert values in target units, of any shape."""
        return self.scan.invert(self.cohort.apply(values))


@dataclass(frozen=True, eq=False)
class Reference:
    """What predictions of one case are scored against, all on one grid.

    Attributes:
        target: The real image, harmonised, shape (I, J, K).
        mask: Valid voxels; regions count inside it only.
        spacing_mm: Between voxels along I, J and K.
        labels: Label map, 0 is background, or None.
        regions: Region name to the labels that make it; without names all labels together are the region "lesion".
        is_ct: Whether the target is in Hounsfield units, so that tissues are regions.
        axes: What I, J and K run along; see `volumes.geometry.axis_names`.
        beams: Of a CT, beams whose path lengths are compared beside those along the axes; None for none.
        curve: Of a CT, Hounsfield units and electron density relative to water.
        frame: Where the arrays lie in volumes that are one constant beyond the mask; None for whole volumes.
        own: The way back to the intensities of the real image; None where those are the target's unit, as of CT.

    Raises:
        ValueError: If shapes differ.
    """

    target: NDArray[Any]
    mask: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]
    labels: NDArray[Any] | None = None
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    is_ct: bool = False
    axes: tuple[str, str, str] = ("i", "j", "k")
    beams: Beams | None = None
    curve: radiotherapy.Curve = radiotherapy.THOMAS
    frame: ScoredBox | None = None
    own: OwnUnits | None = None

    def __post_init__(self) -> None:
        same_shape(self.target, self.mask, *([] if self.labels is None else [self.labels]))

    @cached_property
    def box(self) -> Box:
        """The box around the mask and every window around its voxels."""
        return window_box(self.mask)

    def cut_out(self, prediction: NDArray[Any], background: float) -> Reference:
        """Return the part in the box where target and prediction are one constant outside the mask; else itself.

        Args:
            prediction: Shape (I, J, K).
            background: That constant, to which naive baselines are set.
        """
        if self.mask.all() or not all((self.mask | (image == background)).all() for image in (self.target, prediction)):
            return self
        return replace(self.part, frame=ScoredBox(self.box, self.mask.shape, background))

    @property
    def part(self) -> Reference:
        """The part that lies in the box; itself where it was cut to it already."""
        return self if self.frame is not None else self._cut  # itself is not kept: that were a circle

    @cached_property
    def _cut(self) -> Reference:
        target, mask = (np.ascontiguousarray(array[self.box]) for array in (self.target, self.mask))
        labels = None if self.labels is None else np.ascontiguousarray(self.labels[self.box])
        return replace(self, target=target, mask=mask, labels=labels)

    @cached_property
    def values(self) -> NDArray[Any]:
        """The target's values in the mask, shape (n,)."""
        return self.target[self.mask]

    def own_errors(self, values: NDArray[Any]) -> NDArray[np.float32] | None:
        """Return absolute errors in the real image's own intensities, of values in the mask; None where it has none."""
        if self.own is None:
            return None
        difference: NDArray[np.float32] = self.own.convert(values) - self._own_values
        return np.abs(difference, out=difference)

    @cached_property
    def _own_values(self) -> NDArray[np.float32]:
        assert self.own is not None
        return self.own.convert(self.values)

    @cached_property
    def attenuation(self) -> NDArray[np.float32]:
        """Linear attenuation at 511 keV of a CT's values in the mask, 1/cm, shape (n,)."""
        return attenuation(self.values)

    @cached_property
    def density(self) -> NDArray[np.float32]:
        """Electron density of a CT's values in the mask, relative to water, shape (n,)."""
        return radiotherapy.electron_density(self.values, self.curve)

    @cached_property
    def lesion(self) -> NDArray[np.bool_] | None:
        """Labelled voxels of the mask that a named region counts, all labels where none is named; None without any."""
        if self.labels is None:
            return None
        named = sorted(set(chain.from_iterable(self.regions.values())))
        counted: NDArray[np.bool_] = np.isin(self.labels, named) if named else self.labels != 0
        return counted & self.mask

    def list_regions(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield the voxels of each region to score, the mask first."""
        mask, labels, lesion = self.mask, self.labels, self.lesion
        yield "mask", mask
        if labels is not None and lesion is not None:
            named = self.regions or {"lesion": np.setdiff1d(labels, [0]).tolist()}
            yield from ((name, np.isin(labels, list(values)) & mask) for name, values in named.items())
            yield "healthy", mask & (labels == 0)
            yield "lesion-edge", edges.edge_band(lesion, EDGE_BAND_MM, self.spacing_mm) & mask
        yield "edges", edges.edge_voxels(self.target, mask, self.spacing_mm, EDGE_SHARE)
        if self.is_ct:
            yield from radiotherapy.tissues(self.target, mask).items()

    @cached_property
    def places(self) -> dict[str, Places]:
        """Places of each region's voxels among those of the mask, in their order; the mask comes first."""
        places: dict[str, Places] = {
            name: np.flatnonzero(region[self.mask]).astype(np.int32) for name, region in self.list_regions()
        }
        return places | {"mask": slice(None)}

    @cached_property
    def components(self) -> lesions.Components:
        """The lesions, the largest first; none without labels."""
        return (
            lesions.Components((), 0) if self.lesion is None else lesions.split_components(self.lesion, self.spacing_mm)
        )

    @cached_property
    def rings(self) -> tuple[lesions.Ring, ...]:
        """Each lesion with its surroundings."""
        labels = self.mask if self.lesion is None else self.lesion
        return tuple(lesions.ring_of(one, self.mask, labels, self.spacing_mm) for one in self.components.lesions)

    @cached_property
    def far(self) -> NDArray[np.bool_]:
        """Voxels of the mask away from any lesion."""
        return self.mask if self.lesion is None else lesions.far_from_labels(self.mask, self.lesion, self.spacing_mm)


class ComparedPrediction(NamedTuple):
    """What is compared of all predictions of a target together, of one prediction.

    Attributes:
        steps: Between neighbours.
        likeness: Of a reference with a frame; else None.
    """

    steps: edges.ComparedSteps
    likeness: conventions.PairLikeness | None


def compare_all(
    reference: Reference, predictions: Sequence[NDArray[Any]], convention: str, data_range: tuple[float, float]
) -> list[ComparedPrediction]:
    """Compare all predictions of a target together, so that what depends on the target alone is found once.

    Args:
        reference: The target.
        predictions: Values of the mask's voxels, shape (n,) each, target units.
        convention: A name of `conventions.CONVENTIONS`; of a reference with a frame, a masked one.
        data_range: The training cohort's range (low, high), target units.

    Returns:
        One for each prediction, as if it had been compared alone.

    Raises:
        RecipeError: If the convention is unknown.
        ValueError: If a range is not positive.
    """
    part, frame = reference.part, reference.frame
    steps = edges.compare_steps(predictions, part.values, part.mask, part.places, part.spacing_mm)
    if frame is None:
        return [ComparedPrediction(its, None) for its in steps]
    give_back()  # what listing neighbours took
    rules = conventions.find_convention(convention)
    pairing = conventions.CutOutPairing(part.values, part.mask, frame.background, rules, data_range)
    likenesses = pairing.compare(predictions, part.places, frame.box, frame.shape)
    return list(map(ComparedPrediction, steps, likenesses))
