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


class Shrinking(nn.Module):
    """The geometry of a network without pooling, whose output is the source's grid less a margin.

    Args:
        layers: Every convolution; the last one's channels are the image's.
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 or 3.
        scale: Share of the published channels.

    Attributes:
        widths: Channels before each layer, and after the last.
        size_multiple: 1, any size.
        margin: Voxels that convolutions without padding lose on each side.
        receptive_field: Voxels seen on each side of an output voxel.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, layers: Sequence[ChainLayer], in_channels: int, dims: Dims, scale: float) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.widths = (in_channels, *scaled((layer.channels for layer in layers[:-1]), scale), layers[-1].channels)
        self.dims, self.size_multiple = dims, 1
        self.margin = sum(layer.size // 2 - layer.padding for layer in layers)
        self.receptive_field = sum(layer.size // 2 for layer in layers)
        self.smallest = 2 * self.margin + 1

    def check(self, source: Tensor) -> None:
        """Refuse a source (N, in_channels, *S) of which no output voxel would be left.

        Raises:
            ValueError: If a size is below `smallest`, or axes are missing.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        if min(source.shape[2:]) < self.smallest:
            raise ValueError(f"spatial sizes must be at least {self.smallest}, not {tuple(source.shape[2:])}")


class ConvolutionChain(Shrinking):
    """Convolutions that are rectified but for the last; weights start from He et al. 2015. Arguments as `Shrinking`."""

    def __init__(self, layers: Sequence[ChainLayer], in_channels: int, dims: Dims, scale: float) -> None:
        super().__init__(layers, in_channels, dims, scale)
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, layer.size, padding=layer.padding)
            for (a, b), layer in zip(pairwise(self.widths), layers)
        )
        draw_he(self)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *(S - 2 margin)), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        self.check(source)
        features = source
        for convolution in self.convolutions[:-1]:
            features = functional.relu(convolution(features), inplace=True)
        prediction: Tensor = self.convolutions[-1](features).to(source.dtype)
        return prediction
