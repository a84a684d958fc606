"""Networks over a prepared volume: image and difficulties in normalised units, on the training grid.

Training validates with `synthesise_prepared` and `synthesise` predicts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
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
        average: What of: "flip" for the mean over a volume and its mirror image.
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
        logits = self._assess(source, masked)
        if self.refiner is not None:
            prediction = refine(self.refiner, source, masked, logits.structured, valid)
            logits = self._assess(source, prediction)
        difficulties = [logits.structured, logits.realness] if self.difficulties else []
        return torch.cat([prediction, logits.magnitude, *difficulties], dim=1)

    def _assess(self, source: Tensor, image: Tensor) -> LocalLogits:
        assert self.local_discriminator is not None
        logits: LocalLogits = self.local_discriminator(torch.cat([source, image], dim=1) if self.conditional else image)
        return logits


def _runner(networks: Networks, engine: Engine, channels: int, conditional: bool) -> Callable[[Tensor], Tensor]:
    """Let an engine run networks in one pass; a compiled one only those of a loaded model, which do not change."""
    if engine.name != "torch" and networks.model:
        return _compiled(networks, engine, channels, conditional)
    return engine.wrap(Chain(networks.of_any_size, channels=channels, conditional=conditional))


@lru_cache(maxsize=8)
def _compiled(networks: Networks, engine: Engine, channels: int, conditional: bool) -> Compiled:
    """Compile networks once for all volumes."""
    chain = Chain(networks.of_any_size, channels=channels, conditional=conditional)
    return Compiled(engine, chain, networks.model)


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
    if networks.average == "flip":
        once = partial(
            synthesise_prepared,
            networks._replace(average="none"),
            plan=plan,
            conditional=conditional,
            error_scale=error_scale,
            engine=engine,
        )
        return _average_mirrored(once(source, mask), once(source[:, ::-1], mask[::-1]))
    inside = _inside(networks, source, mask, plan, conditional, engine)
    prediction = laid_out(inside[0], mask)
    if networks.local_discriminator is None:
        return Maps(prediction, None, None, None, None)
    raw_error = laid_out(_raw_error(inside[1], error_scale), mask)
    if not networks.difficulties:
        return Maps(prediction, raw_error, None, None, None)
    difficulties = (laid_out(1 / (1 + np.exp(np.clip(logits, -60, 60))), mask) for logits in inside[1:])
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
    if networks.average == "flip":
        once = partial(
            synthesise_inside,
            networks._replace(average="none"),
            plan=plan,
            conditional=conditional,
            error_scale=error_scale,
            engine=engine,
        )
        straight, mirrored = once(source, mask), once(source[:, ::-1], mask[::-1])
        for one, other in zip(straight, mirrored):
            if one is not None and other is not None:  # in its own memory: volumes may be large
                one += _mirrored_back(other, mask)
                one /= 2
        return straight
    made = _inside(networks, source, mask, plan, conditional, engine)
    return Inside(made[0], None if networks.local_discriminator is None else _raw_error(made[1], error_scale, made[1]))


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


def _average_mirrored(straight: Maps, mirrored: Maps) -> Maps:
    """Average the maps of a volume and those of its mirror image, mirrored back; the first axis is left to right."""
    means = [
        None if a is None or b is None else ((a + b[::-1]) / 2).astype(np.float32) for a, b in zip(straight, mirrored)
    ]
    prediction = means[0]
    assert prediction is not None
    return Maps(prediction, *means[1:])


def is_blended(generator: nn.Module, plan: Plan) -> bool:
    """Return whether volumes go through a generator in overlapping windows that are averaged.

    In 3D they do if the generator's result depends on the size of its input.  In 2D slices go through whole, except if
    the generator accepts only the size of its patches.  The windows have the size of the training patches.
    """
    if plan.dims == 2:
        return takes_one_size(generator, source_channels(plan), plan.patch)
    return not tiles_are_exact(generator, source_channels(plan))


def _inside(
    networks: Networks,
    source: NDArray[np.float32],
    mask: NDArray[np.bool_],
    plan: Plan,
    conditional: bool,
    engine: Engine,
) -> NDArray[np.float32]:
    """Run networks, chained, and return their output at the voxels of the mask: image and logits, (C_out, n)."""
    if networks.earlier:
        source = _with_context(networks, source, mask, plan, engine)
        networks = networks._replace(earlier=())
    run = _runner(networks, engine, source_channels(plan), conditional)
    if plan.dims == 2 and not is_blended(networks.generator, plan):
        multiple = networks.multiple
        return apply_inside(
            run, [source, mask[None]], mask, slices=plan.slices, batch=SLICES_AT_ONCE, multiple=multiple
        )
    stack = np.concatenate([source, mask[None]], dtype=np.float32)
    return np.stack([taken(channel, mask) for channel in _over_volume(run, networks, stack, plan, engine)])


def _over_volume(
    run: Callable[[Tensor], Tensor], networks: Networks, stack: NDArray[np.float32], plan: Plan, engine: Engine
) -> NDArray[np.float32]:
    """Run networks, chained, over all windows, slabs or tiles of a volume."""
    blended = is_blended(networks.generator, plan)
    if blended and plan.dims == 2:
        return blend_slices(run, stack, slices=plan.slices, window=plan.patch)
    if blended:
        return blend_windows(run, stack, window=plan.patch, weighting="smooth")
    multiple = networks.multiple
    if not isinstance(run, Compiled) and is_of_this_package(networks.generator):
        with suppress(NoSlabs), engine.inference():
            return apply_in_slabs(run, stack, multiple=multiple)
    halo = sum(int(getattr(network, "receptive_field", 0)) for network in networks.of_any_size.in_one_pass)
    return apply_to_volume(run, stack, tile=TILE, halo=halo, multiple=multiple)


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
