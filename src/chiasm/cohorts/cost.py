"""What a training will cost here: the multiplications of the networks, at the measured speed of convolutions.

The layers are counted from the recipe's widths (`networks` holds the layers
themselves); one convolution of each width and grid is timed forward and back,
and everything that is not a convolution is a factor on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from chiasm.recipe import Recipe

BESIDE_CONVOLUTIONS = 1.35  # normalisation, activations, interpolation, losses, Adam: measured on a CPU
BASE_MB = 450.0  # torch and its libraries


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


class Layer(NamedTuple):
    """A convolution: channels in and out, kernel size, and how often its output grid was halved."""

    inputs: int
    outputs: int
    kernel: int
    level: int


def generator_layers(channels: int, widths: Sequence[int]) -> list[Layer]:
    """List the convolutions of `networks.generator.Generator`."""

    def double(inputs: int, outputs: int, level: int) -> list[Layer]:
        return [Layer(inputs, outputs, 3, level), Layer(outputs, outputs, 3, level)]

    layers = [*double(channels, widths[0], 0), Layer(channels, widths[0], 1, 0)]
    for level, (fine, coarse) in enumerate(pairwise(widths)):
        layers += [*double(fine, coarse, level + 1), Layer(fine, coarse, 1, level + 1)]
        layers += [Layer(coarse, fine, 1, level + 1), *double(2 * fine, fine, level)]
    return [*layers, Layer(widths[0], 1, 1, 0)]


def local_layers(channels: int, widths: Sequence[int]) -> list[Layer]:
    """List the convolutions of `networks.discriminators.LocalDiscriminator`."""
    deepest = len(widths) - 1
    layers = [Layer(channels, widths[0], 3, 0), *[Layer(widths[-1], widths[-1], 3, deepest)] * 2]
    for level, (fine, coarse) in enumerate(pairwise(widths)):
        layers += [
            Layer(fine, coarse, 3, level + 1),
            Layer(coarse, fine, 1, level + 1),
            Layer(2 * fine, fine, 3, level),
        ]
    return [*layers, Layer(widths[0], 3, 1, 0)]


def global_layers(channels: int, widths: Sequence[int]) -> list[Layer]:
    """List the convolutions of `networks.discriminators.GlobalDiscriminator`."""
    return [Layer(a, b, 4, level + 1) for level, (a, b) in enumerate(pairwise([channels, *widths]))]


def estimate_cost(recipe: Recipe, *, dims: Literal[2, 3], patch: tuple[int, ...], channels: int) -> Estimate:
    """Forecast time and memory of a training.

    Takes a second or two and loads torch.

    Args:
        recipe: Widths, batch, schedule and which players there are.
        dims: Spatial axes of a convolution.
        patch: Size in voxels.
        channels: Of the generator's input: sources times slices.
    """
    loss, schedule, batch = recipe.loss, recipe.schedule, recipe.training.batch
    judges = recipe.discriminators
    seen = channels + 1 if judges.conditional else 1
    has_local = (loss.local_weight > 0 and not judges.second_global) or recipe.attention.target != "none"
    globals_ = (loss.global_weight > 0) + (judges.second_global and loss.local_weight > 0)
    generator = generator_layers(channels, recipe.generator.widths)
    critics = local_layers(seen, judges.local_widths) * has_local
    critics += global_layers(channels + 1, judges.global_widths) * globals_

    settings = recipe.training

    def seconds(layers: Sequence[Layer]) -> float:
        return sum(_seconds(layer, dims, patch, settings.accelerator, settings.precision) for layer in layers) * batch

    def voxels(level: int) -> float:
        return batch * math.prod(patch) * 0.5 ** (dims * level)

    # A forward and a backward pass are three passes: forward, towards the input, towards the weights.
    forward = seconds(generator) / 3
    alone = schedule.generator_alone if critics else 1.0
    critics_alone = schedule.critics_alone if critics else 0.0
    step = forward * (3 * (1 - critics_alone) + critics_alone)
    step += seconds(critics) / 3 * (1 - alone) * 6  # real and synthetic images, forward and back
    step += seconds(critics) / 3 * (1 - alone - critics_alone) * 2  # the generator's turn: forward, towards the input
    step *= BESIDE_CONVOLUTIONS

    # A backward pass needs each convolution's input and what follows it; the critics see two images.
    held = sum((2 * layer.outputs + layer.inputs) * voxels(layer.level) for layer in [*generator, *critics * 2])
    weights = sum(layer.inputs * layer.outputs * layer.kernel**dims for layer in [*generator, *critics])
    memory = BASE_MB + 4 * (held + 6 * weights) / 2**20  # weights, average, gradients, two moments, a copy
    return Estimate(step, step * schedule.steps / 60, memory)


def has_gpu(accelerator: str) -> bool:
    """Tell whether training will run on a CUDA device; loads torch unless the CPU is asked for."""
    if accelerator not in ("auto", "gpu", "cuda"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _seconds(layer: Layer, dims: Literal[2, 3], patch: tuple[int, ...], accelerator: str, precision: str) -> float:
    """Time one sample's forward and backward passes of a layer: its multiplications at the speed of its neighbours.

    Layers of one output width and grid share one timing of a 3-convolution.
    """
    work = layer.inputs * layer.kernel**dims
    size = tuple(max(1, side >> layer.level) for side in patch)
    neighbour: float = _timed(dims, layer.outputs, size, accelerator, precision)
    return float(neighbour * work / (layer.outputs * 3**dims))


@lru_cache(maxsize=256)
def _timed(dims: Literal[2, 3], width: int, size: tuple[int, ...], accelerator: str, precision: str) -> float:
    import torch

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
