"""What else could say how wrong an image may be: the usual baselines of the expected-error map, at their cost.

Each asks a generator several times and takes the standard deviation of its
answers as the raw score of every voxel.  Like the map's own, a score orders
voxels and means nothing until it is calibrated (`chiasm.prediction.calibration`).

All go through `synthesise_prepared`, as prediction does: same tiles, same
engine.  Nothing here has a target argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.prediction.calibration import Calibration, apply_calibration
from chiasm.prediction.engines import Engine
from chiasm.prediction.ensemble import Moments
from chiasm.prediction.model import Model
from chiasm.prediction.passes import Maps, networks_of, synthesise_prepared
from chiasm.prediction.synthesis import errors_on_grid
from chiasm.preparation.arrays import PreparedSource
from chiasm.preparation.plan import Plan
from chiasm.volumes import Geometry

GAINS = 4  # changes of the source's gain and offset, the first of them none; each is seen twice, once flipped
DRAWS = 8  # passes of dropout
INJECTED = 0.1  # share of the channels left out of a network that was trained without dropout

#: What the scores are called.
MAP, AUGMENTATION, ENSEMBLE = "map", "augmentation", "ensemble"
MC_DROPOUT, INJECTED_DROPOUT = "mc-dropout", "dropout injected at inference"

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Score(NamedTuple):
    """A raw score: the larger, the less a voxel is to be trusted.

    Attributes:
        name: What made it.
        score: Normalised units, shape (I, J, K), zero outside the mask.
        passes: Networks run over the volume to get it, a network that is run twice counted twice.
    """

    name: str
    score: Array
    passes: int


class Augmentation(NamedTuple):
    """How a source is changed before the generator sees it.

    Attributes:
        flip: Whether left and right change places.
        gain: Factor on each channel, shape (C,).
        offset: Summand on each channel inside the mask, normalised units, shape (C,).
    """

    flip: bool
    gain: Array
    offset: Array


def learned_score(model: Model, source: Array, mask: Mask, *, engine: Engine) -> Score:
    """Ask the local discriminator: the map that ships with the model, not calibrated yet.

    Args:
        model: Has a local discriminator; networks in evaluation mode on the engine's device.
        source: Normalised, zero outside the mask, shape (C, I, J, K).
        mask: Valid voxels, shape (I, J, K).
        engine: Device and precision.

    Raises:
        ValueError: If the model has no local discriminator.
    """
    magnitude = _asked(model, source, mask, engine, discriminator=True).raw_error
    if magnitude is None:
        raise ValueError("the model has no local discriminator, so it has no map of its own")
    made = _passes(model)
    is_flipped = model.recipe.generator.average == "flip"  # then the mean of two images is assessed once
    return Score(MAP, magnitude, 2 * made + 1 if is_flipped else made + (model.refiner is None))


def augmentation_spread(model: Model, source: Array, mask: Mask, *, engine: Engine, seed: int = 0) -> Score:
    """Take the standard deviation over eight augmented copies of the source, flipped back.

    Left and right as they are and changed, times four gains and offsets, drawn
    as training draws them.  The first copy is the source itself, so that the
    image comes with the score.

    Args:
        model: Networks in evaluation mode on the engine's device.
        source: Normalised, zero outside the mask, shape (C, I, J, K); ranks stay as they are.
        mask: Valid voxels, shape (I, J, K).
        engine: Device and precision.
        seed: Of the gains and offsets.
    """
    drawn = draw_augmentations(model.plan, model.recipe.training.intensity_jitter, seed)

    def answers() -> Iterator[Array]:
        for flip, gain, offset in drawn:
            changed = source * gain[:, None, None, None] + mask.astype(np.float32) * offset[:, None, None, None]
            turn = slice(None, None, -1 if flip else None)
            yield _asked(model, changed[:, turn], mask[turn], engine).prediction[turn]

    return Score(AUGMENTATION, spread(answers()), len(drawn) * _passes(model))


def draw_augmentations(plan: Plan, jitter: float, seed: int) -> list[Augmentation]:
    """Draw the changes of `augmentation_spread`; the first is none.

    Args:
        plan: Says how many channels hold intensities, and how many ranks, which no gain would move.
        jitter: SD of a source's log gain and of its offset, as in training.
        seed: Same seed, same changes.
    """
    drawn = np.random.default_rng(seed).normal(size=(2, GAINS, len(plan.sources))) * jitter
    drawn *= plan.varied
    drawn[:, 0] = 0
    drawn = np.pad(drawn, [(0, 0), (0, 0), (0, plan.images - len(plan.sources))])
    gains, offsets = np.exp(drawn[0]).astype(np.float32), drawn[1].astype(np.float32)
    return [Augmentation(flip, *change) for change in zip(gains, offsets, strict=True) for flip in (False, True)]


def dropout_spread(
    model: Model, source: Array, mask: Mask, *, engine: Engine, draws: int = DRAWS, seed: int = 0
) -> Score:
    """Take the standard deviation over passes that leave out channels at random (Monte Carlo dropout).

    A draw leaves out channels of each of the generator's levels, the same for
    the whole volume: it is one thinned network, and its tiles fit.  Batch
    normalisation stays as it was trained.  None of the passes is the whole
    network, so the image costs one more.

    Args:
        model: Its generator has `levels`; networks in evaluation mode on the engine's device.
        source: Normalised, zero outside the mask, shape (C, I, J, K).
        mask: Valid voxels, shape (I, J, K).
        engine: Device and precision.
        draws: How many passes, at least 2.
        seed: Of what is left out.

    Returns:
        Called "mc-dropout" where the model was trained with dropout, with its
        share; else "dropout injected at inference", with `INJECTED`.

    Raises:
        TypeError: If the generator names no levels.

    Reference:
        Gal and Ghahramani, Dropout as a Bayesian approximation, ICML 2016.
    """
    trained = model.recipe.generator.dropout
    rng = torch.Generator().manual_seed(seed)

    def answers() -> Iterator[Array]:
        for _ in range(draws):
            with thinned(model.generator, trained or INJECTED, rng):
                yield _asked(model, source, mask, engine).prediction

    return Score(MC_DROPOUT if trained else INJECTED_DROPOUT, spread(answers()), draws * _passes(model))


@contextmanager
def thinned(generator: nn.Module, share: float, rng: torch.Generator) -> Iterator[None]:
    """Leave out a share of each level's channels for as long as the context lasts, and scale the others up.

    Args:
        generator: Has `levels`, the modules that make each level's features.
        share: Of the channels, below 1.
        rng: Source of all randomness.

    Raises:
        TypeError: If the generator names no levels.
    """
    levels = getattr(generator, "levels", None)
    if not levels:
        raise TypeError(f"a {type(generator).__name__} does not say what its levels are")
    chosen: dict[nn.Module, Tensor] = {}

    def thin(level: nn.Module, _: object, features: Tensor) -> Tensor:
        if level not in chosen:  # drawn once, as wide as the level turns out to be
            kept = torch.rand(features.shape[1], generator=rng) >= share
            chosen[level] = kept / (1 - share)
        return features * chosen[level].to(features).view(1, -1, *[1] * (features.ndim - 2))

    hooks = [level.register_forward_hook(thin) for level in levels]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ensemble_spread(models: Sequence[Model], source: Array, mask: Mask, *, engine: Engine) -> Score:
    """Take the standard deviation over models of other seeds.  Each of them had to be trained.

    Args:
        models: At least 2, of one plan; networks in evaluation mode on the engine's device.
        source: Normalised, zero outside the mask, shape (C, I, J, K).
        mask: Valid voxels, shape (I, J, K).
        engine: Device and precision.

    Reference:
        Lakshminarayanan et al., Simple and scalable predictive uncertainty
        estimation using deep ensembles, NeurIPS 2017.
    """
    answers = (_asked(model, source, mask, engine).prediction for model in models)
    return Score(ENSEMBLE, spread(answers), sum(map(_passes, models)))


def spread(images: Iterable[Array]) -> Array:
    """Return the standard deviation of images at each voxel (n - 1), holding one at a time; equal ones give exactly 0.

    Raises:
        ValueError: If there are fewer than two.
    """
    moments = Moments()
    for image in images:
        moments.add(image)
    return moments.spread()


def expected_error(
    score: Array, calibration: Calibration, prepared: PreparedSource, plan: Plan, grid: Geometry
) -> Array:
    """Turn a raw score into the expected absolute error on the source's grid, as prediction does with the map.

    Args:
        score: Normalised units, on the prepared grid.
        calibration: Fitted on validation cases for this kind of score.
        prepared: The case that the score is of.
        plan: Says how large a normalised unit is.
        grid: Where the source lies.

    Returns:
        Target units, undefined outside the prepared mask.
    """
    return errors_on_grid(apply_calibration(calibration, score), prepared, plan, grid)


def _asked(model: Model, source: Array, mask: Mask, engine: Engine, *, discriminator: bool = False) -> Maps:
    """Run the networks that an image needs, once; the local discriminator only if a refiner needs it, or if asked for.

    With it the map comes as the model ships it, which may be of an average over the mirror image.
    """
    networks = networks_of(model)
    if not discriminator:
        networks = networks._replace(average="none")
    if not discriminator and model.refiner is None:
        networks = networks._replace(local_discriminator=None)
    return synthesise_prepared(
        networks,
        np.ascontiguousarray(source),
        np.ascontiguousarray(mask),
        plan=model.plan,
        conditional=model.recipe.discriminators.conditional,
        error_scale=model.error_scale,
        engine=engine,
    )


def _passes(model: Model) -> int:
    """Count the networks of one image: the generators, and with a refiner that and the assess before and after it."""
    return len(model.earlier) + (1 if model.refiner is None else 4)
