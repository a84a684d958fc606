"""What tests of the literature's networks share: weights, impulses, one patch to learn, tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def weights(make: Callable[..., nn.Module], **numbers: float) -> int:
    """Count the trainable numbers of a network without drawing them."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in make(**numbers).parameters())


def kernels(network: nn.Module) -> list[tuple[int, int, int]]:
    """Inputs, outputs and kernel of every convolution, in the order of construction."""
    found = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    return [(part.in_channels, part.out_channels, part.kernel_size[0]) for part in found]


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics in double precision: nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            for value in (part.weight, part.bias, part.running_mean, part.running_var):
                value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif isinstance(part, nn.Conv2d | nn.Conv3d | nn.Linear):
            spread = part.weight[0].numel() ** -0.5
            part.weight.data.copy_(2 * spread * torch.randn(part.weight.shape, generator=generator))
            if part.bias is not None:
                part.bias.data.copy_(0.2 * torch.randn(part.bias.shape, generator=generator))
    return network.double().eval()


def farthest_seen(network: nn.Module, channels: int, dims: int, multiple: int = 1) -> int:
    """Measure how far along the first axis an input voxel acts on output voxels.

    All weights are made positive and all offsets zero, so that an impulse on a
    black image is nowhere rectified or cancelled: an output voxel is positive
    where it depends on the impulse's voxel, and zero elsewhere.
    """
    lively(network)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.abs_() if name.endswith("weight") else value.zero_()
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.zero_()
        field, margin = int(network.receptive_field), int(network.margin)  # type: ignore[arg-type]
        size = -(-(2 * field + 2 * margin + 4 * multiple + 9) // multiple) * multiple
        other = -(-(2 * margin + 1) // multiple) * multiple
        place = size // 2 // multiple * multiple
        images = torch.zeros(multiple, channels, size, *[other] * (dims - 1), dtype=torch.float64)
        for shift, image in enumerate(images):
            image[:, place + shift] = 1.0
        touched = network(images).flatten(3).sum(dim=(1, 3)) > 0  # (multiple, size - 2 margin)
    places = [(row.nonzero().flatten() + margin) for row in touched]
    distances = [(seen - place - shift).abs().max() for shift, seen in enumerate(places)]
    assert all(seen[0] - margin > 0 and seen[-1] < size - margin - 1 for seen in places), "the image is too short"
    return int(max(distances))


def loss_left(network: nn.Module, size: int, dims: int, steps: int, rate: float) -> float:
    """Fit one patch with Adam and return the share of the first loss that is left."""
    torch.manual_seed(0)
    source = torch.randn(2, 1, *[size] * dims)
    margin = int(network.margin)  # type: ignore[arg-type]
    blurred = sum(source.roll(shift, dims=2) for shift in (-1, 0, 1))
    wanted: Tensor = blurred.tanh()
    wanted = wanted[(..., *[slice(margin, size - margin)] * dims)]
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = (network.train()(source) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return min(losses[-5:]) / losses[0]


def tile_error(network: nn.Module, halo: int, tile: int, dims: int, other: int) -> float:
    """Largest difference between the whole image and a tile made with `halo` more voxels on each side."""
    lively(network)
    margin = int(network.margin)  # type: ignore[arg-type]
    start, size = 2 * halo, 4 * halo + tile
    torch.manual_seed(0)
    source = torch.randn(1, 1, size, *[other] * (dims - 1), dtype=torch.float64)
    with torch.no_grad():
        whole = network(source)[:, :, start - margin : start + tile - margin]
        part = network(source[:, :, start - halo : start + tile + halo])[:, :, halo - margin : halo + tile - margin]
    assert whole.shape == part.shape and whole.std() > 1e-3
    return float((whole - part).abs().max() / whole.std())
