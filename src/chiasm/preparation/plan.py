"""The plan, a record of the choices that follow from recipe and data: grid, intensity maps, patches, with reasons.

A plan is fitted on training cases alone and names them.  It is all that prediction needs to know of the cohort, so it
travels with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from chiasm.checksums import check_checksum, with_checksum
from chiasm.errors import RunError
from chiasm.names import is_safe_id
from chiasm.preparation.degradation import Degradation
from chiasm.preparation.intensity import (
    IntensityMap,
    MapKind,
)
from chiasm.recipe import LEAST_SPACING, MOST_SPACING, BiasCorrection, Plane, Registration
from chiasm.storage import read_toml, write_toml
from chiasm.volumes.masks import Rule
from chiasm.volumes.screening import STRICT, Reading

Triple = tuple[float, float, float]

#: Of I, J and K those of a slice, then the one across slices.
AXES: Mapping[Plane, tuple[int, int, int]] = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}

MOST_PATCH = 2**24  # voxels: 256 along each of three axes
HISTOGRAM_BINS = 32

#: Fields of a plan that are long tables of numbers.
FITTED = (
    *("target_reference", "lookup", "input_mean", "input_sd"),
    *("source_ranges", "source_histograms", "source_limits", "source_stored"),
)

REMEDY = (
    "In a run folder, delete it: the same command makes it anew from the same cases. "
    "In a model folder, copy the model again."
)


@dataclass(frozen=True)
class Estimate:
    """What a run will cost on this machine: a forecast, on an idle CPU to within a factor of about 1.3.

    Attributes:
        seconds_per_step: Mean over the schedule.
        minutes: All steps; without preparing and validating.
        memory_mb: Most resident memory of the training process, in float32: less in bfloat16 (on a GPU: of its memory).
    """

    seconds_per_step: float
    minutes: float
    memory_mb: float


@dataclass(frozen=True)
class Plan:
    """How this cohort is prepared, trained on and predicted.

    Axes are in RAS order, for super-resolution as `degradation.arranged` says.
    "Normalised" intensities are those after a volume's
    own map; raw target units are those of `target_reference`.  Where the target is
    one of the sources, both share the source's map.

    Attributes:
        sources: Modalities that go in.
        target: The modality that comes out.
        spacing_mm: Of the prepared grid.
        dims: 2 (slices; also 2.5D) or 3.
        slices: Neighbouring slices of a 2.5D source; 1 in 2D and 3D.
        patch: Size in voxels, (I, J) or (I, J, K).
        mask_rule: How a mask is found where no file gives one.
        source_kinds: Kind of intensity map of each source.
        target_kind: That of the target.
        target_reference: The cohort's map of the target: normalised to raw units.
        target_unit: "HU", or "a.u." where the modality has no unit.
        target_range: Lowest and highest raw intensity that matter: 0.5 and
            99.5 % inside the masks, or the window for HU.
        target_background: Raw intensity of air.
        target_sd: SD inside the masks, normalised.
        window_hu: Hounsfield units that are kept.
        lookup: Knots (x, y) of the target expected at each intensity of the
            first source, normalised.
        input_mean: Of each source and the target inside the masks, normalised.
        input_sd: Likewise.
        source_ranges: 0.5 and 99.5 % of each source, normalised.
        source_histograms: Mean share of 32 bins over each source's range.
        source_limits: Largest distance of a histogram from those that is still usual.
        grid_mm: Smallest and largest spacing of the training cases on each axis.
        body_mm: Smallest and largest size of the box around their masks.
        trained_on: Ids of the training cases, which alone were looked at.
        expected: Cost on the machine where the plan was made; no part of what makes plans equal, and None in a model.
        reasons: One sentence for each choice, by field.
        histogram: Whether each source is shown a second time, as its rank in the case's own histogram.
        context: Whether the generator sees, after all these, the target as an earlier stage predicted it.
        degradation: For super-resolution: the thick slices that sources have; None for synthesis.
        registration: How other images of a case are aligned with its first source.
        bias_correction: Of MR images inside the mask, the target's too.
        mask_files: Whether a case's own mask is used where it has one; else `mask_rule` is a must.
        reading: What is assumed of files whose headers leave a question open, in training and prediction alike.
        unpaired: Ids of further cases of which one side of a pair is seen, and no number above is fitted on.
        source_stored: Lowest and highest intensity of each source as stored, inside the masks of all training cases.
        plane: Of the slices that networks see in 2D; all else is in RAS order whatever it is.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    sources: tuple[str, ...]
    target: str
    spacing_mm: Triple
    dims: Literal[2, 3]
    slices: int
    patch: tuple[int, ...]
    mask_rule: Rule
    source_kinds: tuple[MapKind, ...]
    target_kind: MapKind
    target_reference: IntensityMap
    target_unit: Literal["HU", "a.u."]
    target_range: tuple[float, float]
    target_background: float
    target_sd: float
    window_hu: tuple[float, float]
    lookup: tuple[tuple[float, ...], tuple[float, ...]]
    input_mean: tuple[float, ...]
    input_sd: tuple[float, ...]
    source_ranges: tuple[tuple[float, float], ...]
    source_histograms: tuple[tuple[float, ...], ...]
    source_limits: tuple[float, ...]
    grid_mm: tuple[Triple, Triple]
    body_mm: tuple[Triple, Triple]
    trained_on: tuple[str, ...]
    expected: Estimate | None = field(compare=False)
    reasons: Mapping[str, str] = field(compare=False)
    histogram: bool = False  # plans of before hold none
    context: bool = False  # likewise
    degradation: Degradation | None = None
    registration: Registration = "none"
    bias_correction: BiasCorrection = "none"
    mask_files: bool = True
    unpaired: tuple[str, ...] = ()
    reading: Reading = STRICT
    source_stored: tuple[tuple[float, float], ...] = ()  # plans of before hold none
    plane: Plane = "axial"  # likewise

    @property
    def axes(self) -> tuple[int, int, int]:
        """The axes I, J and K in the order in which networks see them: two of a slice, and the one across slices."""
        return AXES[self.plane]

    @property
    def back(self) -> tuple[int, int, int]:
        """Where I, J and K are among the axes as networks see them: the order that undoes `axes`."""
        return self.axes.index(0), self.axes.index(1), self.axes.index(2)

    @property
    def seen_mm(self) -> Triple:
        """The spacing along the axes as networks see them."""
        i, j, k = (self.spacing_mm[axis] for axis in self.axes)
        return i, j, k

    @property
    def images(self) -> int:
        """Images that come from files: the sources, and after them their ranks; no context."""
        return len(self.sources) * (2 if self.histogram else 1)

    @property
    def own(self) -> int | None:
        """The source with the target's own modality, for super-resolution; None for synthesis."""
        return self.sources.index(self.target) if self.target in self.sources else None

    @property
    def varied(self) -> tuple[float, ...]:
        """1 for each source whose scale may be varied in training, 0 for one in Hounsfield units."""
        return tuple(float(kind != "hu") for kind in self.source_kinds)

    def __post_init__(self) -> None:
        rules = {**self._rules_of_images(), **self._rules_of_grid(), **self._rules_of_tables()}
        if broken := [sentence for sentence, holds in rules.items() if not holds]:
            raise ValueError("; ".join(broken))

    def _rules_of_images(self) -> dict[str, bool]:
        """Return the rules of sources and target, and whether they are met."""
        count = len(self.sources)
        per_source = (self.source_kinds, self.source_ranges, self.source_histograms, self.source_limits)
        per_image = (self.input_mean, self.input_sd)
        lengths = [*map(len, per_source), *(len(entries) - 1 for entries in per_image)]
        return {
            "there must be a source, and one entry for each": count > 0 and set(lengths) == {count},
            "numbers must be finite and below 1e9": bool((np.abs(self._numbers()) < 1e9).all()),
            "a modality must have the name of a file": all(map(is_safe_id, (*self.sources, self.target))),
            "only super-resolution allows a target that is a source": self.own is None or self.degradation is not None,
        }

    def _rules_of_grid(self) -> dict[str, bool]:
        """Return the rules of voxels, patches and slices, and whether they are met."""
        sizes = (*self.spacing_mm, *self.patch, *self.input_sd, *self.source_limits, self.target_sd)
        least, most = min(self.spacing_mm), max(self.spacing_mm)
        stacks = (1,) if self.dims == 3 else range(1, 16, 2)
        return {
            "sizes must be positive": min(sizes) > 0,
            f"voxels must be of {LEAST_SPACING:g} to {MOST_SPACING:g} mm": LEAST_SPACING
            <= least
            <= most
            <= MOST_SPACING,
            f"a patch has at most {MOST_PATCH:,} voxels": math.prod(self.patch) <= MOST_PATCH,
            "the patch must have as many axes as dims": len(self.patch) == self.dims,
            "slices must be odd, at most 15, and 1 in 3D": self.slices in stacks,
            "only synthesis in 2D has slices of another plane": self.plane == "axial"
            or (self.dims == 2 and self.degradation is None),
        }

    @property
    def target_hu(self) -> float | None:
        """Hounsfield units of a normalised one, if the target has this unit."""
        values, normalised = (
            np.ptp(table) for table in (self.target_reference.values, self.target_reference.normalised)
        )
        return float(values / normalised) if self.target_unit == "HU" else None

    def _rules_of_tables(self) -> dict[str, bool]:
        """Return the rules of ranges, look-up and histograms, and whether they are met."""
        x, y = self.lookup
        is_table = len(x) == len(y) >= 2
        return {
            "ranges must rise": all(low < high for low, high in (self.target_range, *self.source_ranges)),
            "the look-up must rise in x": is_table and bool(np.all(np.diff(x) > 0)),
            "histograms have 32 bins": all(len(shares) == HISTOGRAM_BINS for shares in self.source_histograms),
        }

    def _numbers(self) -> NDArray[np.float64]:
        tables = (self.spacing_mm, self.target_range, self.window_hu, *self.lookup, self.input_mean, self.input_sd)
        pairs = (*self.source_ranges, *self.source_histograms, *self.grid_mm, *self.body_mm, self.source_limits)
        maps = self.target_reference.values, self.target_reference.normalised
        return np.array([*chain(*tables, *pairs, *maps), self.target_background, self.target_sd], np.float64)


class Tables(TypedDict):
    """Fields of a plan that a network starts from."""

    lookup: tuple[tuple[float, ...], tuple[float, ...]]
    input_mean: tuple[float, ...]
    input_sd: tuple[float, ...]
    target_sd: float


def across(degradation: Degradation) -> int:
    """Return which of the arranged axes runs across the thick slices."""
    return 0 if degradation.axis == "I" else 1


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as TOML for people to read: choices, `[expected]` cost, `[reasons]`, and last what is `[fitted]`.

    It carries its checksum.
    """
    content = TypeAdapter(Plan).dump_python(plan, mode="json", exclude_none=True)  # TOML has no null
    fitted = {name: content.pop(name) for name in FITTED}
    write_toml(path, with_checksum({**content, "fitted": fitted}))


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        RunError: If the file is missing, no TOML, its values are no plan, or it was changed after `write_plan`.
    """
    content = read_toml(path, REMEDY)
    fitted = content.get("fitted")
    flat = {"expected": None, **content} | (fitted if isinstance(fitted, dict) else {})
    try:
        plan = TypeAdapter(Plan).validate_python(flat)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise RunError(
            f"is no plan of this chiasm: {name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}",
            path=path,
            reason="damaged",
            hint=REMEDY,
        ) from error
    check_checksum(content, path, REMEDY)
    return plan
