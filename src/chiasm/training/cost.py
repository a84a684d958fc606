"""What a training will cost here: the multiplications of the networks, at the measured speed of convolutions.

The layers are counted while the players look at one patch without content; one
convolution of each width and grid is timed forward and back, and everything
that is not a convolution is a factor on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from chiasm.cohorts.planning import Estimate, Plan, has_gpu
from chiasm.prediction.model import source_channels
from chiasm.recipe import Recipe
from chiasm.training.methods import Players, make_players

BESIDE_CONVOLUTIONS = 1.35  # normalisation, activations, interpolation, losses, Adam: measured on a CPU
BASE_MB = 450.0  # torch and its libraries

_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_COUNTED = (nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class Layer(NamedTuple):
    """A convolution as one sample meets it.

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


def list_layers(network: nn.Module, image: Tensor) -> list[Layer]:
    """List the convolutions that `network` does on an image (1, C, *S), in the order in which it does them."""
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
    """Forecast time and memory of a training on this machine.

    Takes a second or two, more where the networks are large: each sees one patch.

    Args:
        recipe: Networks, batch and schedule.
        plan: Says patch and dimensions.

    Raises:
        RecipeError: As `make_players`.
    """
    return estimate_players(make_players(recipe, plan, 0), recipe, plan)


def estimate_players(players: Players, recipe: Recipe, plan: Plan) -> Estimate:
    """Forecast what `estimate_cost` does, of players that are there already."""
    schedule, batch, settings = recipe.schedule, recipe.training.batch, recipe.training
    channels = source_channels(plan)
    generator = list_layers(players.generator, torch.zeros(1, channels, *plan.patch))
    size = generator[-1].size
    seen = torch.zeros(1, channels + 1, *size)
    critics: list[Layer] = []
    for judge in (players.global_judge, players.second_judge):
        critics += [] if judge is None else list_layers(judge, seen)
    if players.local_judge is not None:
        critics += list_layers(players.local_judge, seen if recipe.discriminators.conditional else seen[:, :1])
    refiner = [] if players.refiner is None else list_layers(players.refiner, torch.zeros(1, channels + 2, *size))

    def seconds(layers: Sequence[Layer]) -> float:
        return sum(_seconds(layer, plan.dims, settings.accelerator, settings.precision) for layer in layers) * batch

    # A forward and a backward pass are three passes: forward, towards the input, towards the weights.
    forward = seconds(generator) / 3
    alone = schedule.generator_alone if critics else 1.0
    critics_alone = schedule.critics_alone if critics else 0.0
    together = 1 - alone - critics_alone
    step = forward * (3 * (1 - critics_alone) + critics_alone)
    step += seconds(critics) / 3 * (1 - alone) * 6  # real and synthetic images, forward and back
    step += seconds(critics) / 3 * together * 2  # the generator's turn: forward, towards the input
    step += seconds(refiner) * together
    step *= BESIDE_CONVOLUTIONS

    # A backward pass needs each convolution's input and what follows it; the critics see two images.
    layers = [*generator, *critics * 2, *refiner]
    held = batch * sum((2 * layer.outputs + layer.inputs) * math.prod(layer.size) for layer in layers)
    weights = sum(layer.inputs * layer.outputs * layer.kernel for layer in [*generator, *critics, *refiner])
    memory = BASE_MB + 4 * (held + 6 * weights) / 2**20  # weights, average, gradients, two moments, a copy
    return Estimate(step, step * schedule.steps / 60, memory)


def _seconds(layer: Layer, dims: Literal[2, 3], accelerator: str, precision: str) -> float:
    """Time one sample's forward and backward passes of a layer: its multiplications at the speed of its neighbours.

    Layers of one output width and grid share one timing of a 3-convolution.
    """
    work = layer.inputs * layer.kernel
    neighbour: float = _timed(dims, layer.outputs, layer.size or (1,) * dims, accelerator, precision)
    return float(neighbour * work / (layer.outputs * 3**dims))


@lru_cache(maxsize=256)
def _timed(dims: Literal[2, 3], width: int, size: tuple[int, ...], accelerator: str, precision: str) -> float:
    on_gpu = has_gpu(accelerator)
    device = torch.device("cuda" if on_gpu else "cpu")
    memory = torch.channels_last if dims == 2 else torch.channels_last_3d
    samples = 4 if dims == 2 else 1
    with torch.random.fork_rng(devices=[]):
        convolution = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(width, width, 3, padding=1)
        image = torch.randn(samples, width, *size)
    convolution = convolution.to(device, memory_format=memory)  # type: ignore[call-overload]
    image = image.to(device, memory_format=memory).requires_grad_()
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = on_gpu or bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    reduced = precision != "32-true" and (precision != "auto" or fast)
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=half, enabled=reduced):
            output = convolution(image)
        output.backward(torch.ones_like(output))
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return float(best / samples)
