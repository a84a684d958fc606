"""Han's 27 convolutions: VGG16 without its linear layers, its mirror image, and skips.

Han, "MR-based synthetic CT generation using a deep convolutional neural network
method", Medical Physics 44(4), 1408-1419, 2017, doi:10.1002/mp.12155, figure of
the network (slices of the head).

    source -> 64 64 ------------------------------------------- [+] 64 64 -> 1, 1
                pool -> 128 128 ----------------------- [+] 128 64 <- unpool
                          pool -> 256 256 256 --- [+] 256 256 128 <- unpool
                                    pool -> 512 512 512 - [+] 512 512 256 <- unpool
                                              pool -> 512 512 512 - [+] 512 512 512 <- unpool
                                                          pool ----------------> unpool

All convolutions are of 3 but the last, of 1.  Pooling (2, maximum) remembers the
place of each maximum; unpooling puts the value back there and zeros around it,
and [+] sets the encoder's features of that level beside it.

What we are sure of: 13 + 13 + 1 convolutions, VGG16's encoder, pooling and
unpooling, 35 million weights (the paper's abstract), slices.  How the skips join
is inferred: with all five of them concatenated the network has 35.0 million
weights, without the deepest 32.6, with none 29.5 million.

Departures:
    - weights start at random: no VGG16 weights of ImageNet, which the paper transfers;
    - batch normalisation before every rectifier (our choice: 26 rectified layers
      that start at random hardly train without it), so those convolutions have
      no bias; at inference it is fixed, so tiles equal the whole;
    - any number of source channels, where VGG16 has three.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import Dims, check_sizes
from chiasm.networks.layers import NORM, Step, check_numbers, farthest, scaled

#: Channels after each convolution of the encoder, finest level first.
ENCODER = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: And of the decoder, by the same levels: each hands the next finer level its channels.
DECODER = ((64, 64), (128, 64), (256, 256, 128), (512, 512, 256), (512, 512, 512))


def pool(features: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the grid, (N, C, I, J), keeping each window's maximum and its place."""
    pooled, places = functional.max_pool2d(features, 2, return_indices=True)
    return pooled, places


def unpool(pooled: Tensor, places: Tensor) -> Tensor:
    """Double the grid, (N, C, I, J): each value at its remembered place, zero elsewhere."""
    return functional.max_unpool2d(pooled, places, [2, 2])


class Han(nn.Module):
    """Encode by five poolings, decode by five unpoolings, joined level by level.

    Args:
        in_channels: Source channels.
        dims: 2: the published network works on slices.
        scale: Share of the published channels.

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels seen on each side of an output voxel.
        margin: 0, the output has the input's size.
        smallest: Least spatial size.

    Raises:
        ValueError: If a number is out of range, or `dims` is 3.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if dims != 2:
            raise ValueError(f"Han's network works on slices: dims is 2, not {dims}")
        self.dims, self.margin = dims, 0
        self.size_multiple = self.smallest = 2 ** len(ENCODER)
        self.receptive_field = farthest(_steps(), self.size_multiple)

        encoder, decoder = ([scaled(level, scale) for level in side] for side in (ENCODER, DECODER))
        entering = [in_channels, *(level[-1] for level in encoder)]
        raised = [*(level[-1] for level in decoder[1:]), encoder[-1][-1]]
        self.downs = nn.ModuleList(_level([a, *level]) for a, level in zip(entering, encoder))
        self.ups = nn.ModuleList(_level([up + skip[-1], *level]) for up, skip, level in zip(raised, encoder, decoder))
        self.last = nn.Conv2d(decoder[0][-1], 1, 1)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, I, J) to the prediction (N, 1, I, J), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        features, skips = source, []
        for down in self.downs:
            fine = down(features)
            features, places = pool(fine)
            skips.append((fine, places))
        for up, (fine, places) in zip(reversed(self.ups), reversed(skips)):
            features = up(torch.cat([unpool(features, places), fine], dim=1))
        prediction: Tensor = self.last(features).to(source.dtype)
        return prediction


def _level(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), NORM[2](b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _steps() -> list[Step]:
    """List the layers in the order of the pass: five levels down, five up."""
    convolution, down, up = Step(3, padding=1), Step(2, 2), Step(2, 2, up=True)
    encode = [step for level in ENCODER for step in [*[convolution] * len(level), down]]
    decode = [step for level in reversed(DECODER) for step in [up, *[convolution] * len(level)]]
    return [*encode, *decode]
