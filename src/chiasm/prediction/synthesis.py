"""From a source volume to its synthetic target and expected-error map, on the source's grid.

Training validates with `synthesise_prepared`, and users predict with `synthesise`,
which runs the same networks in the same way.  Neither has a target argument.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import RecipeError, RunError, VolumeError
from chiasm.methods import title_of
from chiasm.prediction.calibration import apply_calibration
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.prediction.passes import Inside, is_blended, laid_out, networks_of, synthesise_inside, taken
from chiasm.prediction.seams import seam_of
from chiasm.prediction.windows import window_origins
from chiasm.preparation.arrays import PreparedSource, prepare_source
from chiasm.preparation.degradation import Degradation, interpolated, simulated, thick_mask
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.out_of_distribution import out_of_distribution_warning
from chiasm.preparation.plan import Plan, across
from chiasm.preparation.planes import with_axes
from chiasm.recipe import Average
from chiasm.registration.cohort import align_sources
from chiasm.volumes import Geometry, Volume, check_pair, resample
from chiasm.volumes.geometry import find_overlap, storage_axis
from chiasm.volumes.masks import Rule


@dataclass(frozen=True)
class Synthesis:
    """A synthetic volume with its expected error, on the source's grid, or on a thinner one (super-resolution).

    Attributes:
        image: In the training cohort's target units (HU for CT); where the
            target is a source (super-resolution), in that scan's own.
        expected_error: Expected absolute error in the same units, NaN-free, zero
            outside the mask; None if the model has no local discriminator.
        mask: Voxels that were predicted, bool.
        warnings: Warnings for readers of the image, one sentence each.
        mask_rule: How the mask was found: "given", "nonzero" or "body".
        engine: Name, version and precision of the engine.
        spread: Of several models: standard deviation of their images, same units, zero outside the mask; None of one.
    """

    image: Volume
    expected_error: Volume | None
    mask: Volume
    warnings: tuple[str, ...]
    mask_rule: Rule | Literal[""] = ""
    engine: str = ""
    spread: Volume | None = None

    @property
    def reliability(self) -> Volume | None:
        """The expected error, by its name in version 0.1."""
        return self.expected_error


@dataclass(frozen=True)
class CompactSynthesis:
    """A synthesis that holds only the voxels of its mask, and lays a volume out when it is used.

    So a large volume takes memory only while it is written.  Attributes and properties have the names and meanings of
    `Synthesis`.

    Attributes:
        prepared: The case, without its array.
        grid: Of the volumes.
        values: Of the image, in the order of `laid_out`.
        errors: Of the expected-error map, or None.
        background: Of the image outside the mask.
        warnings: As of `Synthesis`.
        engine: Likewise.
    """

    prepared: PreparedSource
    grid: Geometry
    values: NDArray[np.float32]
    errors: NDArray[np.floating] | None
    background: float
    warnings: tuple[str, ...]
    engine: str

    @property
    def image(self) -> Volume:
        """The synthetic volume."""
        return Volume(_on_source_grid(self.values, self.prepared, self.grid, self, self.background), self.grid)

    @property
    def expected_error(self) -> Volume | None:
        """Its expected-error map."""
        if self.errors is None:
            return None
        return Volume(_on_source_grid(self.errors, self.prepared, self.grid, self), self.grid)

    @property
    def spread(self) -> None:
        """None: it is of one model."""

    @property
    def mask(self) -> Volume:
        """The voxels that were predicted."""
        coincide = find_overlap(self.prepared.grid, self.grid) is not None
        return Volume(_resampled_mask(self.prepared, self.grid) if coincide else self.mask_between, self.grid)

    @cached_property
    def mask_between(self) -> NDArray[np.bool_]:
        """The mask on a grid that does not coincide with its own; image and map need it too, so it is kept."""
        return _resampled_mask(self.prepared, self.grid)

    @property
    def mask_rule(self) -> Rule:
        """How the mask was found."""
        return self.prepared.mask_rule

    def whole(self) -> Synthesis:
        """Lay all volumes out."""
        return Synthesis(
            self.image, self.expected_error, self.mask, self.warnings, self.prepared.mask_rule, self.engine
        )


def synthesise(
    model: Model,
    volumes: Sequence[Volume],
    *,
    mask: Volume | None = None,
    engine: Engine,
    degrade: bool = False,
    average: Average | None = None,
) -> Synthesis:
    """Predict a whole volume.

    Args:
        model: From `load_model`, frozen for inference by the caller or not.
        volumes: One volume for each of the plan's sources, on one grid, unless the plan registers them.
        mask: Valid voxels on the first one's grid; by default found as the plan says.
        engine: Device and precision.
        degrade: For super-resolution: whether slices are thin and must be made
            thick first, as in training; the result then lies on their grid.
        average: "flip" for the mean image of a volume and its mirror image, and the map of that; as the recipe says by
            default.

    Raises:
        VolumeError: If the number of volumes or a grid is wrong, nothing is
            inside the mask, or slices are not thick and should be.
        RecipeError: If `degrade` is asked of a model that is not for super-resolution.
    """
    compact = synthesise_compactly(model, volumes, mask=mask, engine=engine, degrade=degrade, average=average)
    return compact.whole()


def synthesise_compactly(
    model: Model,
    volumes: Iterable[Volume],
    *,
    mask: Volume | None = None,
    engine: Engine,
    degrade: bool = False,
    average: Average | None = None,
) -> CompactSynthesis:
    """Predict a volume as `synthesise` does, but hold no volume while networks run, not even the given ones.

    Args:
        model: As for `synthesise`.
        volumes: Likewise; an iterator that keeps none of them lets them go.
        mask: Likewise.
        engine: Likewise.
        degrade: Likewise.
        average: Likewise.

    Raises:
        VolumeError: As `synthesise`.
        RecipeError: Likewise.
    """
    plan = model.plan
    prepared, grid, warnings = _prepared(volumes, mask, plan, degrade=degrade)
    warnings += [sentence] if (sentence := out_of_distribution_warning(plan, prepared)) else []
    engine = engine.for_image(prepared.mask.size, plan.dims)
    networks = networks_of(model)._replace(difficulties=False)
    made = synthesise_inside(
        networks if average is None else networks._replace(average=average),
        prepared.array,
        prepared.mask,
        plan=plan,
        conditional=model.recipe.discriminators.conditional,
        error_scale=model.error_scale,
        engine=engine,
    )
    prepared = replace(prepared, array=np.empty((0, 0, 0, 0), np.float32))
    if is_blended(model.generator, plan):
        shown = with_axes(laid_out(made.prediction, prepared.mask), plan.axes)
        warnings += _blending(shown, with_axes(prepared.mask, plan.axes), plan)
    values, errors = _in_units(made, model, prepared)
    del made
    warnings += [*_describe_calibration(model), *engine.notes]
    _check_finite(values, errors)
    return CompactSynthesis(prepared, grid, values, errors, plan.target_background, tuple(warnings), engine.used)


def _in_units(
    made: Inside, model: Model, prepared: PreparedSource
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Convert an image and its map from normalised to target units; the map is calibrated first."""
    plan, score = model.plan, made.raw_error
    values = target_map(prepared, plan).invert(made.prediction)
    if plan.target_unit == "HU":
        values = np.clip(values, *plan.target_range)
    if score is None:
        return values, None
    expected = score if model.calibration is None else apply_calibration(model.calibration, score)
    return values, _in_target_units(expected, prepared, plan, out=expected)


def _prepared(
    volumes: Iterable[Volume], mask: Volume | None, plan: Plan, *, degrade: bool
) -> tuple[PreparedSource, Geometry, list[str]]:
    """Prepare the sources; also return the grid of the result, and warnings on aligned sources."""
    aligned, moved = align_sources([*volumes], plan.sources, plan.registration)
    shown, mask = on_thin_slices(aligned, mask, plan, degrade=degrade)
    prepared = prepare_source(shown, plan, mask)
    return prepared, shown[0].geometry, moved


def _describe_calibration(model: Model) -> list[str]:
    """Warn if a model has no expected-error map, or one that cannot be trusted."""
    if model.local_discriminator is None:
        return [f"method {title_of(model.recipe.method)} has no local discriminator, so there is no expected-error map"]
    if model.calibration is None:
        return ["the expected-error map is not calibrated: the run had no validation cases"]
    if not model.calibration.informative:
        return ["the expected-error map did not follow the true error on validation cases: do not use it"]
    return []


def _check_finite(*made: NDArray[np.floating] | None) -> None:
    """Refuse NaN and infinite values, which a network makes if its training diverged.

    Raises:
        RunError: If there are such values.
    """
    for values in made:
        if values is not None and not np.isfinite(values).all():
            raise RunError(
                "the networks made NaN or infinite values",
                reason="not-finite",
                found=f"{int((~np.isfinite(values)).sum()):,} voxels",
                hint="The model is damaged or its training diverged: look at its report, or train it again.",
            )


def _blending(image: NDArray[np.float32], mask: NDArray[np.bool_], plan: Plan) -> list[str]:
    """Describe how an image was blended, and its visible borders; empty if it fits into one window."""
    count = math.prod(map(len, window_origins(image.shape[: plan.dims], plan.patch)))
    seam = seam_of(image, mask, plan.patch)
    if count == 1 or seam is None:
        return []
    size, where = "x".join(map(str, plan.patch)), " in each slice" if plan.dims == 2 else ""
    return [
        f"the network's result depends on the size of its input, so the image was blended from {count} overlapping "
        f"windows of {size} voxels{where}: jumps across their borders are {seam:.2f} times those elsewhere"
    ]


def on_thin_slices(
    volumes: Sequence[Volume], mask: Volume | None, plan: Plan, *, degrade: bool
) -> tuple[Sequence[Volume], Volume | None]:
    """Interpolate thick slices to thin ones as training did; for synthesis change nothing.

    Args:
        volumes: On one grid.
        mask: On that grid, or None.
        plan: States how thick slices are.
        degrade: Whether slices are thin, and are made thick first.

    Raises:
        VolumeError: If grids differ, or slices are not thick and should be.
        RecipeError: If `degrade` is asked of a plan for synthesis.
    """
    how = plan.degradation
    if how is None:
        if degrade:
            raise RecipeError("only a model for super-resolution can degrade its input", reason="task")
        return volumes, mask
    first = volumes[0]
    volumes = [first, *(check_pair(first, other, b_name="second source") for other in volumes[1:])]
    if degrade and mask is not None:
        mask = thick_mask(check_pair(first, mask, b_name="mask", labels=True), how)
    if degrade:
        return simulated(volumes, how), mask
    _check_thick(first, plan, how)
    shown = interpolated(volumes, how)
    if mask is not None:
        fitting = check_pair(first, mask, b_name="mask", labels=True)
        mask = resample(fitting, shown[0].geometry, order=0)
    return shown, mask


def _check_thick(volume: Volume, plan: Plan, how: Degradation) -> None:
    """Refuse slices that are thin already."""
    axis, _ = storage_axis(volume.geometry, how.axis)
    thickness, thin = volume.geometry.spacing_mm[axis], plan.grid_mm[1][across(how)]
    if thickness < thin * how.factor**0.5:  # nearer to what comes out than to what goes in
        raise VolumeError(
            f"has no thick slices along {how.axis}, which the model makes thin",
            reason="thin-slices",
            found=f"{thickness:.3g} mm",
            expected=f"about {thin * how.factor:.3g} mm",
            hint="To test a model on thin slices, make them thick first: chiasm predict --degrade.",
        )


def target_map(prepared: PreparedSource, plan: Plan) -> IntensityMap:
    """Return the map whose inverse gives a case's prediction its units: the cohort's, or its own source's."""
    return plan.target_reference if plan.own is None else prepared.maps[plan.own]


def errors_on_grid(
    errors: NDArray[np.floating], prepared: PreparedSource, plan: Plan, grid: Geometry
) -> NDArray[np.float32]:
    """Convert a map of errors from normalised to target units, and to the source's grid.

    Args:
        errors: Normalised units, on the prepared grid.
        prepared: The case that they are of.
        plan: Says how large a normalised unit is.
        grid: Where the source lies.

    Returns:
        Target units, undefined outside the prepared mask.
    """
    return _on_source_grid(_in_target_units(taken(errors, prepared.mask), prepared, plan), prepared, grid)


def values_on_grid(values: NDArray[np.floating], prepared: PreparedSource, grid: Geometry) -> NDArray[np.float32]:
    """Lay a map of a prepared case out on the source's grid.

    Args:
        values: On the prepared grid, shape (I, J, K).
        prepared: The case that they are of.
        grid: Where the source lies.

    Returns:
        Undefined outside the prepared mask.
    """
    return _on_source_grid(taken(values, prepared.mask), prepared, grid)


def _in_target_units(
    errors: NDArray[np.floating], prepared: PreparedSource, plan: Plan, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Turn errors from normalised into target units; `out` may be the errors themselves."""
    ends = plan.target_reference.apply(np.array(plan.target_range))
    raw = plan.target_range if plan.own is None else target_map(prepared, plan).invert(ends)
    made = np.empty(errors.shape, np.float32) if out is None else out
    np.multiply(errors, np.ptp(raw) / np.ptp(ends), out=made, casting="same_kind")  # in double precision
    return made


def _sparse_zeros(shape: Sequence[int]) -> NDArray[np.float32]:
    """Return zeros, the first axis fastest, whose pages take memory only when they are written."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # of Linux
        return np.zeros(shape, np.float32, order="F")
    room = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        room.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(room, np.float32).reshape(shape, order="F")


def _resampled_mask(prepared: PreparedSource, grid: Geometry) -> NDArray[np.bool_]:
    asked = Volume(prepared.mask.view(np.uint8), prepared.grid)
    return resample(asked, grid, order=0).array.view(np.bool_)


def _on_source_grid(
    values: NDArray[np.floating],
    prepared: PreparedSource,
    grid: Geometry,
    kept: CompactSynthesis | None = None,
    outside: float = 0.0,
) -> NDArray[np.float32]:
    """Lay the values of the prepared mask's voxels out on another grid.

    If the voxels of both grids coincide, they are copied.  Otherwise values are interpolated only between voxels inside
    the mask, so that the outside does not darken its rim.

    Args:
        values: In the order of `laid_out`.
        prepared: The case that they are of.
        grid: Where they are wanted.
        kept: Whose mask's voxels are kept, None for all; where grids coincide, those of the prepared mask.
        outside: Value of all others.
    """
    overlap = find_overlap(prepared.grid, grid)
    if overlap is not None:
        made = _sparse_zeros(grid.shape)
        if outside:
            made[...] = outside
        overlap.scatter(values, prepared.mask, made)
        return made
    ones = np.ones(values.shape, np.float32)
    total, weight = (
        resample(Volume(laid_out(each, prepared.mask), prepared.grid), grid, order=1).array for each in (values, ones)
    )
    interpolated = total / np.maximum(weight, 1e-3)
    inside = None if kept is None else kept.mask_between
    return np.asarray(interpolated if inside is None else np.where(inside, interpolated, outside), np.float32)
