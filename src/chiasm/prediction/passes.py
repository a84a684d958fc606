"""Networks over a prepared volume: image and difficulties in normalised units, on the training grid.

Training validates with `synthesise_prepared` and `synthesise` predicts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.networks.catalogue import SameSize
from chiasm.networks.discriminators import LocalLogits
from chiasm.prediction.compiled import Compiled
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model, source_channels
from chiasm.prediction.seams import is_of_this_package, takes_one_size, tiles_are_exact
from chiasm.prediction.slabs import NoSlabs, apply_in_slabs
from chiasm.prediction.tiling import Scalar, apply_inside, apply_to_volume
from chiasm.prediction.windows import blend_slices, blend_windows
from chiasm.preparation.plan import Plan
from chiasm.preparation.planes import with_axes
from chiasm.recipe import Average

TILE = 96  # side of a 3D tile, where slabs are not possible
SLICES_AT_ONCE = 8


class Maps(NamedTuple):
    """The outputs of the networks for a prepared volume, normalised units.

    Attributes:
        prediction: The synthetic image, shape (I, J, K), zero outside the mask.
        raw_error: -s log M of the magnitude head: the expected error before calibration, or None.
        magnitude: Difficulty 1 - M of the magnitude head, or None.
        structured: Difficulty of the structured head, or None.
        realness: Difficulty of the realness head, or None.
    """

    prediction: NDArray[np.float32]
    raw_error: NDArray[np.float32] | None
    magnitude: NDArray[np.float32] | None
    structured: NDArray[np.float32] | None
    realness: NDArray[np.float32] | None


def refine(refiner: nn.Module, source: Tensor, prediction: Tensor, structured: Tensor, mask: Tensor) -> Tensor:
    """Correct a prediction where its structure is difficult: ``y2 = y^ + (1 - M) R(x, y^, M)``, 0 outside the mask.

    Training and prediction both use this function.  Nothing is detached: a caller that trains only the refiner passes
    tensors without gradient.

    Args:
        refiner: ``R``, the second stage.
        source: ``x``, shape (N, C, *S).
        prediction: ``y^``, zero outside the mask, shape (N, 1, *S).
        structured: Logits of ``M``, of the local discriminator's structured head at ``y^``, same shape.
        mask: Valid voxels, same shape.
    """
    confidence = torch.sigmoid(structured.float()) * mask
    correction: Tensor = refiner(torch.cat([source, prediction, confidence], dim=1)).float()
    return prediction + (1 - confidence) * correction * mask


class Networks(NamedTuple):
    """Networks that are run over a volume, in evaluation mode on the engine's device.

    Attributes:
        generator: Source to target.
        local_discriminator: The local discriminator, or None.
        refiner: The second stage, or None; it needs a local discriminator.
        earlier: Generators of the stages before: each sees what the one before it made, and `generator` what the last
            of them made.  None where there are none, or where the source holds the context already.
        average: "flip" for the mean image of a volume and its mirror image; the local discriminator assesses the mean.
        model: sha256 of the model whose networks these are, unchanged; empty for others, which torch computes.
        difficulties: Whether all heads of the local discriminator are asked for, beside the magnitude's.
    """

    generator: nn.Module
    local_discriminator: nn.Module | None = None
    refiner: nn.Module | None = None
    earlier: Sequence[nn.Module] = ()
    average: Average = "none"
    model: str = ""
    difficulties: bool = True

    @property
    def of_any_size(self) -> Networks:
        """The same networks, with a generator that accepts images of any size."""
        return self._replace(generator=SameSize(self.generator)) if hasattr(self.generator, "margin") else self

    @property
    def multiple(self) -> int:
        """The sides of an input must be multiples of this power of 2."""
        return max(int(getattr(network, "size_multiple", 1)) for network in self.of_any_size.in_one_pass)

    @property
    def in_one_pass(self) -> tuple[nn.Module | None, ...]:
        """Generator, local discriminator and refiner, chained; the second assesses before and after the third."""
        again = None if self.refiner is None else self.local_discriminator
        return (self.generator, self.local_discriminator, self.refiner, again)


def networks_of(model: Model) -> Networks:
    """Return the networks of a model."""
    average = model.recipe.generator.average
    return Networks(
        model.generator, model.local_discriminator, model.refiner, model.earlier, average=average, model=model.sha256
    )


class Chain(nn.Module):
    """Generator and local discriminator as one network: one pass for image and map.

    A refiner corrects the image in between, and the map is of the corrected one.

    Args:
        networks: Without the earlier stages.
        channels: Source channels of the generator.
        conditional: Whether the local discriminator sees the source.
    """

    def __init__(self, networks: Networks, *, channels: int, conditional: bool) -> None:
        super().__init__()
        self.generator, self.refiner = networks.generator, networks.refiner
        self.local_discriminator = networks.local_discriminator
        self.channels, self.conditional, self.difficulties = channels, conditional, networks.difficulties

    def forward(self, stack: Tensor) -> Tensor:
        """Map source and mask's slices, (N, channels + slices, *S), to an image (N, 1, *S).

        With a local discriminator, to (N, 4, *S): the image, then the logits of magnitude, structured and realness,
        or to (N, 2, *S) without the last two.
        """
        source, masks = stack[:, : self.channels], stack[:, self.channels :]
        prediction: Tensor = self.generator(source)
        if self.local_discriminator is None:
            return prediction
        middle = masks.shape[1] // 2
        valid = masks[:, middle : middle + 1]
        masked = prediction * valid
        logits = _logits_of(self.local_discriminator, source, masked, self.conditional)
        if self.refiner is not None:
            prediction = refine(self.refiner, source, masked, logits.structured, valid)
            logits = _logits_of(self.local_discriminator, source, prediction, self.conditional)
        return torch.cat([prediction, _listed(logits, self.difficulties)], dim=1)


class Assessment(nn.Module):
    """The local discriminator alone, for an image that was made before.

    Args:
        networks: As for `Chain`, with a local discriminator.
        channels: Likewise.
        conditional: Likewise.
    """

    def __init__(self, networks: Networks, *, channels: int, conditional: bool) -> None:
        super().__init__()
        assert networks.local_discriminator is not None
        self.local_discriminator = networks.local_discriminator
        self.channels, self.conditional, self.difficulties = channels, conditional, networks.difficulties

    def forward(self, stack: Tensor) -> Tensor:
        """Map source and image, zero outside the mask, (N, channels + slices, *S), to the logits of `Chain`."""
        source, images = stack[:, : self.channels], stack[:, self.channels :]
        middle = images.shape[1] // 2
        shown = images[:, middle : middle + 1]
        return _listed(_logits_of(self.local_discriminator, source, shown, self.conditional), self.difficulties)


def _logits_of(local_discriminator: nn.Module, source: Tensor, image: Tensor, conditional: bool) -> LocalLogits:
    logits: LocalLogits = local_discriminator(torch.cat([source, image], dim=1) if conditional else image)
    return logits


def _listed(logits: LocalLogits, difficulties: bool) -> Tensor:
    heads = [logits.magnitude, logits.structured, logits.realness]
    return torch.cat(heads, dim=1) if difficulties else logits.magnitude


def _runner(
    networks: Networks, engine: Engine, channels: int, conditional: bool, kind: Callable[..., nn.Module] = Chain
) -> Callable[[Tensor], Tensor]:
    """Let an engine run networks in one pass; a compiled one only those of a loaded model, which do not change."""
    if engine.name != "torch" and networks.model:
        return _compiled(networks, engine, channels, conditional, kind)
    return engine.wrap(kind(networks.of_any_size, channels=channels, conditional=conditional))


@lru_cache(maxsize=16)
def _compiled(
    networks: Networks, engine: Engine, channels: int, conditional: bool, kind: Callable[..., nn.Module]
) -> Compiled:
    """Compile networks once for all volumes."""
    chain = kind(networks.of_any_size, channels=channels, conditional=conditional)
    heads = " of all heads" if networks.difficulties else ""
    return Compiled(engine, chain, f"{networks.model} {kind.__name__}{heads}")


def synthesise_prepared(
    networks: Networks,
    source: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    plan: Plan,
    conditional: bool,
    error_scale: float,
    engine: Engine,
) -> Maps:
    """Run the networks over a prepared volume.

    Args:
        networks: In evaluation mode on the engine's device.
        source: Normalised source, and its ranks where the plan says so, zero
            outside the mask, shape (C, I, J, K).
        mask: Valid voxels, shape (I, J, K).
        plan: Says 2D, 2.5D or 3D.
        conditional: Whether the local discriminator sees the source.
        error_scale: s of the soft targets, normalised units.
        engine: Device and precision.
    """
    image, logits = _inside(networks, source, mask, _Setting(plan, conditional, engine, networks.multiple))
    prediction = laid_out(image, mask)
    if logits is None:
        return Maps(prediction, None, None, None, None)
    raw_error = laid_out(_raw_error(logits[0], error_scale), mask)
    if not networks.difficulties:
        return Maps(prediction, raw_error, None, None, None)
    difficulties = (laid_out(1 / (1 + np.exp(np.clip(head, -60, 60))), mask) for head in logits)
    return Maps(prediction, raw_error, *difficulties)


class Inside(NamedTuple):
    """The outputs of the networks at the voxels of a mask, normalised units, in the order of slices (see `laid_out`).

    Attributes:
        prediction: The synthetic image, shape (n,).
        raw_error: The expected error before calibration, or None.
    """

    prediction: NDArray[np.float32]
    raw_error: NDArray[np.float32] | None


def synthesise_inside(
    networks: Networks,
    source: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    plan: Plan,
    conditional: bool,
    error_scale: float,
    engine: Engine,
) -> Inside:
    """Run the networks as `synthesise_prepared` does, but keep only the voxels of the mask: volumes may be large."""
    image, logits = _inside(networks, source, mask, _Setting(plan, conditional, engine, networks.multiple))
    return Inside(image, None if logits is None else _raw_error(logits[0], error_scale, logits[0]))


def _raw_error(
    logits: NDArray[np.float32], error_scale: float, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the expected error before calibration; `out` may be the logits themselves."""
    made = np.negative(logits, out=out)
    with np.errstate(invalid="ignore"):  # `synthesise` refuses what is no number
        np.logaddexp(np.float32(0), made, out=made)  # -log sigmoid(logit)
        made *= np.float32(error_scale)
    return made


def laid_out(values: NDArray[np.floating], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Lay the values of a mask's voxels out as a volume, slice by slice along K, 0 elsewhere."""
    volume = np.zeros(np.moveaxis(mask, -1, 0).shape, np.float32)
    volume[np.moveaxis(mask, -1, 0)] = values
    return np.moveaxis(volume, 0, -1)


def taken(volume: NDArray[Scalar], mask: NDArray[np.bool_]) -> NDArray[Scalar]:
    """Return the values of a mask's voxels in the order of `laid_out`."""
    values: NDArray[Scalar] = np.moveaxis(volume, -1, 0)[np.moveaxis(mask, -1, 0)]
    return values


def _mirrored_back(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the values of a mirrored mask in the order of the mask's own voxels, both as `laid_out` takes them."""
    ordered, start = np.empty_like(values), 0
    for plane in np.moveaxis(mask, -1, 0):
        stop = start + int(np.count_nonzero(plane))
        shown = np.empty(plane.shape, values.dtype)
        shown[plane[::-1]] = values[start:stop]
        ordered[start:stop] = shown[::-1][plane]
        start = stop
    return ordered


def scatter(values: NDArray[np.floating] | float, mask: NDArray[np.bool_], outside: float = 0.0) -> NDArray[np.float32]:
    """Lay the values of voxels inside a mask out as a volume, laid out in memory as the mask is.

    Args:
        values: In the order of `array[mask]`, or one for all.
        mask: Shape (I, J, K).
        outside: Value of all other voxels.
    """
    volume = np.full_like(mask, outside, dtype=np.float32)
    volume[mask] = values
    return volume


def is_blended(generator: nn.Module, plan: Plan) -> bool:
    """Return whether volumes go through a generator in overlapping windows that are averaged.

    In 3D they do if the generator's result depends on the size of its input.  In 2D slices go through whole, except if
    the generator accepts only the size of its patches.  The windows have the size of the training patches.
    """
    if plan.dims == 2:
        return takes_one_size(generator, source_channels(plan), plan.patch)
    return not tiles_are_exact(generator, source_channels(plan))


class _Setting(NamedTuple):
    """How all networks of a prediction are run.

    Attributes:
        plan: As for `synthesise_prepared`.
        conditional: Likewise.
        engine: Likewise.
        multiple: What sizes are filled up to a multiple of, for each network that is run alone too.
    """

    plan: Plan
    conditional: bool
    engine: Engine
    multiple: int


def _inside(
    networks: Networks, source: NDArray[np.float32], mask: NDArray[np.bool_], setting: _Setting
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Run networks and return their output at the voxels of the mask: image (n,) and logits, (C_out, n) or None."""
    alone = networks._replace(average="none")
    if networks.average == "flip" and networks.refiner is None:
        alone = alone._replace(local_discriminator=None)
    mirrored = None
    if networks.average == "flip":
        mirrored, _ = _inside(alone, source[:, ::-1], mask[::-1], setting)
    if networks.earlier:
        source = _with_context(networks, source, mask, setting.plan, setting.engine)
        networks, alone = networks._replace(earlier=()), alone._replace(earlier=())
    made = _pass(alone, source, mask, setting)
    if mirrored is None:
        return made[0], None if networks.local_discriminator is None else made[1:]
    image = made[0]
    image += _mirrored_back(mirrored, mask)  # in its own memory: volumes may be large
    image /= 2
    return image, None if networks.local_discriminator is None else _assess(networks, source, image, mask, setting)


def _pass(
    networks: Networks, source: NDArray[np.float32], mask: NDArray[np.bool_], setting: _Setting
) -> NDArray[np.float32]:
    """Run networks, chained, and return their output at the voxels of the mask: image and logits, (C_out, n)."""
    plan = setting.plan
    run = _runner(networks, setting.engine, source_channels(plan), setting.conditional)
    if plan.dims == 2 and not is_blended(networks.generator, plan):
        return _over_slices(run, [source, mask[None]], mask, setting)
    stack = np.concatenate([source, mask[None]], dtype=np.float32)
    return np.stack([taken(channel, mask) for channel in _over_volume(run, networks, stack, setting)])


def _assess(
    networks: Networks,
    source: NDArray[np.float32],
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    setting: _Setting,
) -> NDArray[np.float32]:
    """Let the local discriminator assess the values (n,) of an image, and return its logits there, (C_out, n)."""
    assert networks.local_discriminator is not None
    run = _runner(networks, setting.engine, source_channels(setting.plan), setting.conditional, Assessment)
    shown = laid_out(image, mask)[None]
    if setting.plan.dims == 2:
        return _over_slices(run, [source, shown], mask, setting)
    logits = _over_parts(run, Networks(networks.local_discriminator), np.concatenate([source, shown]), setting)
    return np.stack([taken(channel, mask) for channel in logits])


def _over_slices(
    run: Callable[[Tensor], Tensor],
    seen: Sequence[NDArray[np.generic]],
    mask: NDArray[np.bool_],
    setting: _Setting,
) -> NDArray[np.float32]:
    """Run networks over the slices of the plan's plane, and return what they make of the mask's voxels, (C_out, n)."""
    plan, shown = setting.plan, with_axes(mask, setting.plan.axes)
    seen = [with_axes(image, plan.axes) for image in seen]
    made = apply_inside(run, seen, shown, slices=plan.slices, batch=SLICES_AT_ONCE, multiple=setting.multiple)
    if plan.plane == "axial":
        return made
    return np.stack([taken(with_axes(laid_out(values, shown), plan.back), mask) for values in made])


def _over_volume(
    run: Callable[[Tensor], Tensor], networks: Networks, stack: NDArray[np.float32], setting: _Setting
) -> NDArray[np.float32]:
    """Run networks, chained, over all windows, slabs or tiles of a volume."""
    plan = setting.plan
    blended = is_blended(networks.generator, plan)
    if blended and plan.dims == 2:
        shown = with_axes(stack, plan.axes)
        return with_axes(blend_slices(run, shown, slices=plan.slices, window=plan.patch), plan.back)
    if blended:
        return blend_windows(run, stack, window=plan.patch, weighting="smooth")
    return _over_parts(run, networks, stack, setting)


def _over_parts(
    run: Callable[[Tensor], Tensor],
    networks: Networks,
    stack: NDArray[np.float32],
    setting: _Setting,
) -> NDArray[np.float32]:
    """Run networks, chained, that see no farther than they state over all slabs or tiles of a volume."""
    if not isinstance(run, Compiled) and is_of_this_package(networks.generator):
        with suppress(NoSlabs), setting.engine.inference():
            return apply_in_slabs(run, stack, multiple=setting.multiple)
    halo = sum(int(getattr(network, "receptive_field", 0)) for network in networks.of_any_size.in_one_pass)
    return apply_to_volume(run, stack, tile=TILE, halo=halo, multiple=setting.multiple)


def predict_stage(
    generator: nn.Module, source: NDArray[np.float32], mask: NDArray[np.bool_], *, plan: Plan, engine: Engine
) -> NDArray[np.float32]:
    """Predict with a generator alone, as the next stage will see it: normalised, zero outside the mask, (I, J, K)."""
    return _predict_alone(Networks(generator), source, mask, plan, engine)


def _predict_alone(
    networks: Networks, source: NDArray[np.float32], mask: NDArray[np.bool_], plan: Plan, engine: Engine
) -> NDArray[np.float32]:
    made = synthesise_prepared(networks, source, mask, plan=plan, conditional=False, error_scale=0.0, engine=engine)
    return made.prediction


def _with_context(
    networks: Networks, source: NDArray[np.float32], mask: NDArray[np.bool_], plan: Plan, engine: Engine
) -> NDArray[np.float32]:
    """Append the prediction of the last earlier stage to the source's channels."""
    seen = source
    for stage, generator in enumerate(networks.earlier):
        alone = Networks(generator, model=networks.model)
        made = _predict_alone(alone, seen, mask, replace(plan, context=stage > 0), engine)
        seen = np.concatenate([source, made[None]])
    return seen
