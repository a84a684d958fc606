"""The U-Net.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, LNCS 9351, 234-241, doi:10.1007/978-3-319-24574-4_28,
arXiv:1505.04597, figure 1.

    source -> 64 64 -------------------------------------- [+] 64 64 -> 1, 1
                pool -> 128 128 ----------------- [+] 128 128 <- up
                          pool -> 256 256 --- [+] 256 256 <- up
                                    pool -> 512 512 - [+] 512 512 <- up
                                              pool -> 1024 1024 <- (up)

Each number is a convolution of 3 with its channels, rectified; pooling is of 2,
maximum; "up" is a transposed convolution of 2 with stride 2 that halves the
channels, not rectified; [+] sets the skipped features beside it; the head is a
convolution of 1.  No normalisation.  23 convolutions, 31.0 million weights in 2D.
Dropout stands at the end of the contracting path, as the text says; that it is of
one half and behind the 512 and the 1024 channels is the authors' released
network's (its other deviations from figure 1, rectified up-convolutions and 128
channels out of the last, are not followed).

Departures:
    - "same" padding in place of valid convolutions and crops, so that the output
      has the input's size; near the border zeros are seen;
    - one linear output channel in place of two classes and a softmax;
    - the 3D form has this same plan with cubes for squares (90.3 million weights), not that of
      Cicek et al. 2016, which has three poolings, other widths and batch normalisation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import MAX_POOL, TRANSPOSED, Step, check_numbers, draw_he, farthest, scaled

#: Channels at each level, finest first.
WIDTHS = (64, 128, 256, 512, 1024)
#: Levels, counted from the deepest, whose features dropout thins out.
DROPPED = 2


class UNet(nn.Module):
    """Contract by four poolings, expand by four up-convolutions, joined level by level.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        dropout: Share of the two deepest levels' features that training leaves out, in [0, 1).

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels seen on each side of an output voxel.
        margin: 0, the output has the input's size.
        smallest: Least spatial size.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1, not {dropout}")
        depth = len(WIDTHS) - 1
        self.dims, self.margin = dims, 0
        self.size_multiple = self.smallest = 2**depth

        widths = scaled(WIDTHS, scale)
        levels = list(pairwise(widths))
        self.downs = nn.ModuleList(_double(a, b, dims) for a, b in pairwise([in_channels, *widths]))
        self.dropouts = nn.ModuleList(nn.Dropout(dropout if depth - i < DROPPED else 0.0) for i in range(depth + 1))
        self.raises = nn.ModuleList(TRANSPOSED[dims](b, a, 2, 2) for a, b in reversed(levels))
        self.ups = nn.ModuleList(_double(2 * a, a, dims) for a, _ in reversed(levels))
        self.last = CONVOLUTION[dims](widths[0], 1, 1)
        draw_he(self)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        double, depth = [Step(3, 1, 1)] * 2, len(self.ups)
        path = [*double, *[Step(2, 2), *double] * depth, *[Step(2, 2, up=True), *double] * depth]
        return farthest(path, self.size_multiple)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *S), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        fine: list[Tensor] = []
        for down, dropout in zip(self.downs, self.dropouts):
            features = dropout(down(MAX_POOL[self.dims](fine[-1], 2) if fine else source))
            fine.append(features)
        features = fine.pop()
        for raised, up in zip(self.raises, self.ups):
            features = up(torch.cat([raised(features), fine.pop()], dim=1))
        prediction: Tensor = self.last(features).to(source.dtype)
        return prediction


def _double(inputs: int, outputs: int, dims: Dims) -> nn.Sequential:
    convolution = CONVOLUTION[dims]
    return nn.Sequential(
        convolution(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        convolution(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )
