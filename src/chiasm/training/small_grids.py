"""Convolutions with a kernel that is wider than their grid, which on a CPU learn in float32.

In bfloat16, on processors with AVX-512, torch 2.13.0 leaves parts of the gradient of their weights unwritten: what was
in memory before is taken for a gradient.  The lowest levels of networks have such grids; float32 costs little there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


def keep_small_grids_exact(network: nn.Module) -> None:
    """Let a network's convolutions compute in float32 where their kernel is wider than their grid.

    Args:
        network: Changed in place; on a GPU, or without autocast, it computes as before.
    """
    for part in network.modules():
        if isinstance(part, Convolution):
            part.forward = partial(_convolve, part, part.forward)  # type: ignore[method-assign]


def _convolve(part: Convolution, plain: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Convolve (N, C, *S) as torch does, in float32 if autocast would give a small grid less."""
    is_lowered = features.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (is_lowered and _is_small(part, features)):
        return plain(features)
    with torch.autocast("cpu", enabled=False):
        made = plain(features.float())
    return made.to(torch.get_autocast_dtype("cpu"))


def _is_small(part: Convolution, features: Tensor) -> bool:
    """Whether the kernel is wider, in an axis, than the grid that it slides over: of a transposed one, the output."""
    is_transposed = isinstance(part, nn.ConvTranspose2d | nn.ConvTranspose3d)
    return any(
        size * (stride if is_transposed else 1) < dilation * (kernel - 1) + 1
        for size, kernel, stride, dilation in zip(features.shape[2:], part.kernel_size, part.stride, part.dilation)
    )
