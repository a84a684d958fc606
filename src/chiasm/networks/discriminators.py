"""The two discriminators: one logit for the whole image, and one for every voxel.

Both see source and image side by side (or the image alone), masked alike, and
standardise each channel with statistics of the training set: spectral
normalisation keeps every layer's gain at or below one, so inputs of small
spread would leave the logits near zero for hundreds of steps.

After Nie et al., arXiv:1907.03297: a global and a fully convolutional local
discriminator, the latter with spectral normalisation; layer counts and the two
further heads of the local one are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm as spectrally_normalised

from chiasm.networks.generator import (
    CONVOLUTION,
    Dims,
    Fold,
    Layer,
    check_sizes,
    fold_voxels,
    join_channels,
    reach,
    unfold_voxels,
    upsample,
)

SLOPE = 0.2


class LocalLogits(NamedTuple):
    """The outputs of the local discriminator for every voxel, as logits of shape (N, 1, *S).

    Attributes:
        realness: The voxel is real.
        magnitude: The absolute error around it is small (for the expected error).
        structured: The signed error around it averages to zero (for the attention).
    """

    realness: Tensor
    magnitude: Tensor
    structured: Tensor


class Standardise(nn.Module):
    """Subtract a fixed mean and divide by a fixed standard deviation, channel by channel."""

    input_mean: Tensor
    input_sd: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("input_mean", torch.zeros(channels))
        self.register_buffer("input_sd", torch.ones(channels))

    def set_input_statistics(self, mean: Tensor, sd: Tensor) -> None:
        """Set mean and standard deviation of each channel inside the mask, over the training set.

        Args:
            mean: In normalised image units, shape (channels,).
            sd: Likewise, positive.

        Raises:
            ValueError: If a shape is wrong, a number is not finite or an `sd` is not positive.
        """
        shape = self.input_mean.shape
        if mean.shape != shape or sd.shape != shape:
            raise ValueError(f"expected statistics of shape {tuple(shape)}, not {tuple(mean.shape)}, {tuple(sd.shape)}")
        if not (torch.isfinite(mean).all() and torch.isfinite(sd).all() and (sd > 0).all()):
            raise ValueError(f"mean and sd must be finite and sd positive: {mean.tolist()}, {sd.tolist()}")
        self.input_mean.copy_(mean)
        self.input_sd.copy_(sd)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, channels, *S) to the same shape."""
        broadcast = (-1, *[1] * (images.ndim - 2))
        return (images - self.input_mean.view(broadcast)) / self.input_sd.view(broadcast)


class GlobalDiscriminator(nn.Module):
    """Assess the whole image: convolutions of 4 with stride 2, a mean over space, one linear unit.

    Args:
        in_channels: Channels of source and image together.
        widths: Channels after each halving.
        dims: Spatial axes of a convolution, 2 or 3.
        spectral_norm: Whether the convolutions are spectrally normalised.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
    """

    def __init__(self, *, in_channels: int, widths: Sequence[int], dims: Dims, spectral_norm: bool = False) -> None:
        super().__init__()
        self.dims, self.smallest = dims, 2 ** len(widths)
        self.standardise = Standardise(in_channels)
        self.convolutions = nn.ModuleList(
            _convolution(a, b, 4, dims=dims, stride=2, spectral_norm=spectral_norm)
            for a, b in pairwise([in_channels, *widths])
        )
        self.last = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map source and image, (N, in_channels, *S), to one logit a sample, (N,).

        Raises:
            ValueError: If an axis is shorter than 2 ** len(widths).
        """
        if images.ndim != self.dims + 2 or min(images.shape[2:]) < self.smallest:
            raise ValueError(f"expected {self.dims} axes of at least {self.smallest}, not {tuple(images.shape[2:])}")
        features = self.standardise(images)
        for convolution in self.convolutions:
            features = functional.leaky_relu(convolution(features), SLOPE)
        logits: Tensor = self.last(features.flatten(2).mean(2)).squeeze(1).to(images.dtype)
        return logits


class LocalDiscriminator(nn.Module):
    """Assess every voxel with what surrounds it: a U-shaped trunk and three heads of one channel.

    Spectral normalisation holds every convolution but the heads; there are no
    normalisation layers, so samples do not influence one another.

    Args:
        in_channels: Channels of source and image together.
        widths: Channels at each level, finest first; at least three, so that a
            voxel is assessed by 40 or more along each axis.
        dims: Spatial axes of a convolution, 2 or 3.
        spectral_norm: Whether the trunk is spectrally normalised.
        fold: Voxels of an axis that become channels before the first convolution, as in the generator: 1 or 2.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
        size_multiple: Spatial sizes must be multiples of this.
        receptive_field: Voxels seen on each side of the one that is assessed.

    Raises:
        ValueError: If there are fewer than three widths, or `fold` is neither 1 nor 2.
    """

    def __init__(
        self, *, in_channels: int, widths: Sequence[int], dims: Dims, spectral_norm: bool = True, fold: Fold = 1
    ) -> None:
        super().__init__()
        if len(widths) < 3 or fold not in (1, 2):
            raise ValueError(f"it needs at least three widths and a fold of 1 or 2, not {tuple(widths)} and {fold}")
        self.dims, self.fold, self.size_multiple = dims, fold, fold * 2 ** (len(widths) - 1)
        levels = list(pairwise(widths))

        def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
            return _convolution(inputs, outputs, size, dims=dims, stride=stride, spectral_norm=spectral_norm)

        self.standardise = Standardise(in_channels)
        self.stem = convolution(in_channels * fold**dims, widths[0])
        self.downs = nn.ModuleList(convolution(a, b, stride=2) for a, b in levels)
        self.deep = nn.ModuleList(convolution(widths[-1], widths[-1]) for _ in range(2))
        self.narrows = nn.ModuleList(convolution(b, a, 1) for a, b in reversed(levels))
        self.joins = nn.ModuleList(convolution(2 * a, a) for a, _ in reversed(levels))
        self.heads = CONVOLUTION[dims](widths[0], len(LocalLogits._fields) * fold**dims, 1)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        down: list[Layer] = ["down"]
        up: list[Layer] = ["up", "convolution"]
        deep: list[Layer] = ["convolution"]
        depth = len(self.downs)
        path: list[Layer] = ["convolution", *down * depth, *deep * len(self.deep), *up * depth]
        return reach(path, self.size_multiple, self.fold)

    def forward(self, images: Tensor) -> LocalLogits:
        """Map source and image, (N, in_channels, *S), to logits for every voxel, each (N, 1, *S).

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(images.shape[2:], self.dims, self.size_multiple)
        features = _activated(self.stem, fold_voxels(self.standardise(images), self.fold))
        fine = []
        for down in self.downs:
            fine.append(features)
            features = _activated(down, features)
        for convolution in self.deep:
            features = _activated(convolution, features)
        for narrow, join in zip(self.narrows, self.joins):
            features = _activated(join, join_channels(upsample(narrow(features)), fine.pop()))
        logits: Tensor = unfold_voxels(self.heads(features), self.fold).to(images.dtype)
        return LocalLogits(*logits.split(1, dim=1))  # type: ignore[no-untyped-call]


def _convolution(inputs: int, outputs: int, size: int, *, dims: Dims, stride: int, spectral_norm: bool) -> nn.Module:
    convolution = CONVOLUTION[dims](inputs, outputs, size, stride, padding=(size - 1) // 2)
    return spectrally_normalised(convolution) if spectral_norm else convolution


def _activated(convolution: nn.Module, features: Tensor) -> Tensor:
    return functional.leaky_relu(convolution(features), SLOPE)
