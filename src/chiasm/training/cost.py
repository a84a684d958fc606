"""The expected time and memory of a training on this machine.

The convolutions are counted while the networks process one empty patch.  One convolution of each width and grid is
timed forward and backward; a factor accounts for all other operations.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from chiasm.errors import RecipeError
from chiasm.networks.foreign import is_own_class
from chiasm.networks.shapes import without_memory
from chiasm.networks.sparse_coding import SparseCoder
from chiasm.prediction.engines import AUTOCAST, Precision, has_precision, pick_precision
from chiasm.prediction.model import source_channels
from chiasm.preparation.plan import Estimate, Plan
from chiasm.preparation.planning import has_gpu
from chiasm.recipe import Recipe, Schedule, Training, validate_recipe
from chiasm.training.coding import PAIRS_TO_OTHERS
from chiasm.training.joint_coding import Examples, JointCoding
from chiasm.training.players import Players, make_players, only_expects_error

BESIDE_CONVOLUTIONS = 1.35  # normalisation, activations, interpolation, losses, Adam: measured on a CPU
MOST_OF_MEMORY = 3.0  # a forecast above so many times of the memory is certain not to fit
PART_OF_TIME = 0.75  # of the time that is given, for steps: the rest is for validations, and what a forecast misses
FEWEST_STEPS = 20  # in fewer, nothing is learnt
BASE_MB = 450.0  # torch and its libraries

_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS: Mapping[int, tuple[type[nn.Conv2d | nn.Conv3d], torch.memory_format, int]] = {
    2: (nn.Conv2d, torch.channels_last, 4),
    3: (nn.Conv3d, torch.channels_last_3d, 1),
}  # by dimensions: what is timed, how its images lie in memory, and how many at once
_COUNTED = (nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class Layer(NamedTuple):
    """A convolution for one sample.

    Attributes:
        inputs: Channels that each output channel is made of.
        outputs: Channels.
        kernel: Voxels.
        size: Grid of its outputs; of its inputs, for a transposed one.
    """

    inputs: int
    outputs: int
    kernel: int
    size: tuple[int, ...]


class Passes(NamedTuple):
    """The convolutions of a step, of one patch.

    Attributes:
        generator: Of the generator.
        whole: Of the discriminators of whole patches.
        critics: Of all discriminators.
        refiner: Of the second stage.
    """

    generator: list[Layer]
    whole: list[Layer]
    critics: list[Layer]
    refiner: list[Layer]


def list_layers(network: nn.Module, image: Tensor) -> list[Layer]:
    """List the convolutions of `network` for an image (1, C, *S), in the order of their execution."""
    found: list[Layer] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        kernel = math.prod(weight.shape[2:])
        if isinstance(layer, _TRANSPOSED):
            found.append(Layer(weight.shape[1], weight.shape[0], kernel, tuple(given[0].shape[2:])))
        else:
            found.append(Layer(weight.shape[1], weight.shape[0], kernel, tuple(made.shape[2:])))

    hooks = [part.register_forward_hook(note) for part in network.modules() if isinstance(part, _COUNTED)]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(image)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def estimate_cost(recipe: Recipe, plan: Plan) -> Estimate:
    """Forecast time and memory of a training on this machine, on the threads that torch has now.

    Takes a second or two, more where the networks are large: each sees one patch.

    Args:
        recipe: Networks, batch and schedule.
        plan: Says patch and dimensions.

    Raises:
        RecipeError: As `make_players`, or if the training needs far more memory than there is.
    """
    check_memory(recipe, plan)
    players = make_players(recipe, plan, 0)
    if isinstance(players.generator, SparseCoder) and recipe.optimiser.kind == "admm":
        return _estimate_coding(players.generator, recipe, plan)
    return estimate_players(players, recipe, plan)


def fit_time(recipe: Recipe, plan: Plan, minutes: float) -> tuple[Recipe, Plan]:
    """Reduce the steps of a training until it fits into a time; a training that fits is not changed.

    The phases of the schedule are shares of all steps, so they keep their form.

    Args:
        recipe: With the full number of steps.
        plan: With its forecast, which is corrected.
        minutes: For all steps and validations.

    Returns:
        Recipe and plan with the steps that fit.

    Raises:
        RecipeError: If hardly a step fits.
    """
    expected = plan.expected or estimate_cost(recipe, plan)
    steps = min(recipe.schedule.steps, int(minutes * 60 * PART_OF_TIME / max(expected.seconds_per_step, 1e-9)))
    if steps < min(FEWEST_STEPS, recipe.schedule.steps):
        raise RecipeError(
            f"{minutes:g} minutes are too short for a training",
            reason="minutes",
            found=f"about {expected.seconds_per_step:.2g} s for each step",
            expected=f"time for {FEWEST_STEPS} steps",
            hint="Give chiasm run more --minutes, or a smaller --size.",
        )
    schedule = {**recipe.schedule.model_dump(), "steps": steps}
    fitted = validate_recipe({**recipe.model_dump(), "schedule": schedule}, None)
    cost = replace(expected, minutes=expected.seconds_per_step * steps / 60)
    return fitted, replace(plan, expected=cost)


def check_memory(recipe: Recipe, plan: Plan) -> None:
    """Refuse a training that cannot fit in memory, before anything takes memory.

    Raises:
        RecipeError: If it needs more than three times what there is, or its networks cannot be built.
    """
    discriminators = recipe.discriminators.model_copy(update={"spectral_norm": False, "global_spectral_norm": False})
    if is_own_class(recipe.generator.network) or recipe.optimiser.kind == "admm":
        return  # a class of others may need numbers to be built
    with without_memory():
        players = make_players(recipe.model_copy(update={"discriminators": discriminators}), plan, 0)
        needed = _memory_mb(_list_passes(players, recipe, plan), recipe.training.batch)
    there = machine_mb(recipe.training.accelerator)
    if needed > MOST_OF_MEMORY * there:
        raise RecipeError(
            "the training cannot fit in the memory of this machine",
            reason="memory",
            found=f"about {needed / 1024:.0f} GB needed",
            expected=f"at most {there / 1024:.0f} GB",
            hint="Lower data.patch, training.batch, or the widths and the scale of the networks.",
        )


def machine_mb(accelerator: str) -> float:
    """Return the memory of the GPU or of the machine, in MB."""
    if has_gpu(accelerator):
        return float(torch.cuda.get_device_properties(0).total_memory) / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def _estimate_coding(coder: SparseCoder, recipe: Recipe, plan: Plan) -> Estimate:
    """Time one round on one pair of noise; a real one goes over all patches, the unpaired ones of either kind too."""
    noise = torch.Generator().manual_seed(0)
    channels, count = source_channels(plan), recipe.training.batch
    source, target = (torch.randn(1, c, *plan.patch, generator=noise) for c in (channels, 1))
    coding = JointCoding(coder.requires_grad_(False), Examples(source, target, source[:0], target[:0]))
    start = time.perf_counter()
    coding.round(coder)
    unpaired = 1 if recipe.training.pairs else 0
    patches = (PAIRS_TO_OTHERS + unpaired) * count
    step = (time.perf_counter() - start) * patches
    memory = BASE_MB + 4 * patches * (8 * coding.source_codes.numel()) / 2**20  # codes, multipliers, spectra; of both
    return Estimate(step, step * recipe.schedule.steps / 60, memory)


def estimate_players(players: Players, recipe: Recipe, plan: Plan) -> Estimate:
    """Forecast time and memory as `estimate_cost` does, for networks that exist already."""
    schedule, passes = recipe.schedule, _list_passes(players, recipe, plan)
    costs = _phase_costs(passes, recipe, plan)
    alone = schedule.generator_alone if passes.critics else 1.0
    discriminators_alone = schedule.discriminators_alone if passes.critics else 0.0
    together = 1 - alone - discriminators_alone
    step = alone * costs.alone + discriminators_alone * costs.discriminators + together * costs.together
    return Estimate(step, step * schedule.steps / 60, _memory_mb(passes, recipe.training.batch))


class PhaseCosts(NamedTuple):
    """Seconds of a step in each phase: the generator alone, the discriminators alone, all together."""

    alone: float
    discriminators: float
    together: float

    def work(self, schedule: Schedule, done: int) -> float:
        """Return the seconds of a number of first steps.

        >>> from chiasm.recipe import Schedule
        >>> costs, terms = PhaseCosts(1.0, 2.0, 3.0), {"generator_alone": 0.5, "discriminators_alone": 0.2}
        >>> [costs.work(Schedule(steps=10, ramp=0.1, **terms), done) for done in (5, 7, 10)]
        [5.0, 9.0, 18.0]
        """
        first, second = schedule.ends.values()
        parts = (min(done, first), max(0, min(done, second) - first), max(0, done - second))
        return sum(steps * seconds for steps, seconds in zip(parts, self, strict=True))


def phase_costs(recipe: Recipe, plan: Plan) -> PhaseCosts | None:
    """Forecast the time of a step in each phase; None if all steps are alike.

    Args:
        recipe: Networks, batch and schedule.
        plan: Says patch and dimensions.
    """
    if recipe.optimiser.kind == "admm":
        return None
    passes = _list_passes(make_players(recipe, plan, 0), recipe, plan)
    return _phase_costs(passes, recipe, plan) if passes.critics else None


def _phase_costs(passes: Passes, recipe: Recipe, plan: Plan) -> PhaseCosts:
    batch, settings = recipe.training.batch, recipe.training

    def seconds(layers: Sequence[Layer]) -> float:
        one = sum(_seconds(layer, plan.dims, settings) for layer in layers)
        return one * batch * BESIDE_CONVOLUTIONS

    # A forward and a backward pass are three passes: forward, towards the input, towards the weights.
    forward, critic, whole = (seconds(layers) / 3 for layers in (passes.generator, passes.critics, passes.whole))
    images, guiding = (1, 0) if only_expects_error(recipe) else (2, 2)  # real and synthetic ones; see below
    discriminators = forward + critic * 3 * images  # forward and back
    # the generator's turn: forward, towards the input; further turns of the critic, each with images of its own
    turns = (recipe.loss.discriminator_steps - 1) * (forward + whole * 6) if passes.whole else 0.0
    together = forward * 3 + critic * (3 * images + guiding) + turns + seconds(passes.refiner)
    return PhaseCosts(forward * 3, discriminators, together)


def _list_passes(players: Players, recipe: Recipe, plan: Plan) -> Passes:
    """List the convolutions of each network for one patch."""
    channels = source_channels(plan)
    generator = list_layers(players.generator, torch.zeros(1, channels, *plan.patch))
    margin = int(getattr(players.generator, "margin", 0))
    size = tuple(side - 2 * margin for side in plan.patch)
    seen = torch.zeros(1, channels + 1, *size)
    whole: list[Layer] = []
    for discriminator in (players.global_discriminator, players.second_discriminator):
        whole += [] if discriminator is None else list_layers(discriminator, seen)
    critics = [*whole]
    if players.local_discriminator is not None:
        critics += list_layers(players.local_discriminator, seen if recipe.discriminators.conditional else seen[:, :1])
    refiner = [] if players.refiner is None else list_layers(players.refiner, torch.zeros(1, channels + 2, *size))
    return Passes(generator, whole, critics, refiner)


def _memory_mb(passes: Passes, batch: int) -> float:
    """Forecast the memory of a step: a backward pass needs each convolution's input and what follows it."""
    generator, _, critics, refiner = passes
    layers = [*generator, *critics * 2, *refiner]  # the critics see two images
    held = batch * sum((2 * layer.outputs + layer.inputs) * math.prod(layer.size) for layer in layers)
    weights = sum(layer.inputs * layer.outputs * layer.kernel for layer in [*generator, *critics, *refiner])
    return BASE_MB + 4 * (held + 6 * weights) / 2**20  # weights, average, gradients, two moments, a copy


def _seconds(layer: Layer, dims: Literal[2, 3], settings: Training) -> float:
    """Time one sample's forward and backward passes of a layer: its multiplications at the speed of its neighbours.

    Layers of one output width and grid share one timing of a 3-convolution.
    """
    work = layer.inputs * layer.kernel
    size, asked = layer.size or (1,) * dims, (settings.precision, settings.accelerator)
    precision = pick_precision(*asked) if has_precision(*asked) else "32-true"  # planned for another machine
    device = Device(settings.accelerator, precision, torch.get_num_threads())
    neighbour: float = time_convolution(dims, layer.outputs, size, device)
    return float(neighbour * work / (layer.outputs * 3**dims))


class Device(NamedTuple):
    """What computes convolutions: an accelerator by name, the precision that it takes, and the threads of torch."""

    accelerator: str
    precision: Precision
    threads: int


@lru_cache(maxsize=256)
def time_convolution(dims: Literal[2, 3], width: int, size: tuple[int, ...], on: Device) -> float:
    """Time a 3-convolution of `width` channels on one sample, forward and back: the best of three, in seconds."""
    on_gpu = has_gpu(on.accelerator)
    device = torch.device("cuda" if on_gpu else "cpu")
    kind, memory, samples = _CONVOLUTIONS[dims]
    with torch.random.fork_rng(devices=[]):
        convolution = kind(width, width, 3, padding=1)
        image = torch.randn(samples, width, *size)
    convolution = convolution.to(device, memory_format=memory)  # type: ignore[call-overload]
    image = image.to(device, memory_format=memory).requires_grad_()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, AUTOCAST.get(on.precision), enabled=on.precision in AUTOCAST):
            output = convolution(image)
        output.backward(torch.ones_like(output))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / samples
