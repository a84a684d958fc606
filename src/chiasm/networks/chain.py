"""What the early networks share: convolutions one after another at full resolution, some of which shrink the image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import check_numbers, draw_he, scaled


class ChainLayer(NamedTuple):
    """A convolution as published: its output channels, the side of its kernel, and the padding on each side."""

    channels: int
    size: int
    padding: int = 0


def margin_of(layers: Sequence[ChainLayer]) -> int:
    """Count the voxels that convolutions without padding lose on each side."""
    return sum(layer.size // 2 - layer.padding for layer in layers)


def reach_of(layers: Sequence[ChainLayer]) -> int:
    """Count the voxels that are seen on each side of an output voxel."""
    return sum(layer.size // 2 for layer in layers)


def widths_of(layers: Sequence[ChainLayer], in_channels: int, scale: float) -> list[int]:
    """Return the channels before each layer and after the last, whose own are not scaled."""
    return [in_channels, *scaled((layer.channels for layer in layers[:-1]), scale), layers[-1].channels]


def check_source(source: Tensor, dims: Dims, smallest: int) -> None:
    """Refuse a source (N, in_channels, *S) of which no output voxel would be left.

    Raises:
        ValueError: If a size is below `smallest`, or axes are missing.
    """
    check_sizes(source.shape[2:], dims, 1)
    if min(source.shape[2:]) < smallest:
        raise ValueError(f"spatial sizes must be at least {smallest}, not {tuple(source.shape[2:])}")


class ConvolutionChain(nn.Module):
    """Convolutions that are rectified but for the last; weights start from He et al. 2015.

    Args:
        layers: Every convolution; the last one's channels are the image's.
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 or 3.
        scale: Share of the published channels.

    Attributes:
        size_multiple: 1, any size.
        margin: Voxels that convolutions without padding lose on each side.
        receptive_field: Voxels seen on each side of an output voxel.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, layers: Sequence[ChainLayer], *, in_channels: int, dims: Dims, scale: float) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims, self.size_multiple = dims, 1
        self.margin, self.receptive_field = margin_of(layers), reach_of(layers)
        self.smallest = 2 * self.margin + 1
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, layer.size, padding=layer.padding)
            for (a, b), layer in zip(pairwise(widths_of(layers, in_channels, scale)), layers)
        )
        draw_he(self)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *(S - 2 margin)), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_source(source, self.dims, self.smallest)
        features = source
        for convolution in self.convolutions[:-1]:
            features = functional.relu(convolution(features), inplace=True)
        prediction: Tensor = self.convolutions[-1](features).to(source.dtype)
        return prediction
