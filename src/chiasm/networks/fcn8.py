"""FCN-8s: VGG16 made fully convolutional, its scores fused from three depths.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic
Segmentation", CVPR 2015, 3431-3440, doi:10.1109/CVPR.2015.7298965,
arXiv:1411.4038, figure 3 (bottom row) and section 4.2.

    source -> 64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512 P -> 7, 4096 -> 1, 4096 -> score
                                            |             |                                        up 2
                                          score         score ----------------------------------> (+)
                                            |                                                      up 2
                                            +----------------------------------------------------> (+) -> up 8

Numbers are convolutions of 3 with their channels (7 and 1 where it says so),
rectified; P is a pooling of 2, maximum; dropout of one half follows either 4096;
a score is a convolution of 1 to the output's channels.  Both ups by 2 are
transposed convolutions of 4 that start as linear interpolation and are learned;
the last is linear interpolation by 8 and is not learned; scores start at zero.
The prediction is therefore linear between points eight voxels apart: no finer
detail can come out of this network.

The layers are held against the authors' code (github.com/shelhamer/
fcn.berkeleyvision.org, voc-fcn8s), which does not learn the ups by 2.  That the
paper does, and that scores start at zero, is as we remember it: its text was not at hand.

Departures:
    - weights start from He et al. 2015: no VGG16 weights of ImageNet, on which the
      paper's training rests, and no FCN-32s and FCN-16s trained before;
    - a score has one channel, a linear prediction, where the paper has 21 classes;
    - "same" padding everywhere, where the first convolution is padded by 100, the
      one of 7 by none, and what is too much is cut off;
    - the last up repeats the outermost points beyond the border;
    - any number of source channels, where VGG16 has three.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import Dims, check_sizes
from chiasm.networks.layers import Step, check_numbers, draw, draw_he, farthest, scaled

#: Channels of the convolutions between two poolings.
TRUNK = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: Channels and kernels of the two layers that are linear in VGG16.
HIDDEN = ((4096, 7), (4096, 1))
#: Kernel of an interpolation by two, along one axis.
LINEAR = (0.25, 0.75, 0.75, 0.25)


class Fcn8(nn.Module):
    """Classify every 32 voxels, and refine with the scores of every 16 and every 8.

    Args:
        in_channels: Source channels.
        dims: 2: the published network works on images.
        scale: Share of the published channels.
        dropout: Share of the 4096 channels' features that training leaves out, in [0, 1).

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels seen on each side of an output voxel.
        margin: 0, the output has the input's size.
        smallest: Least spatial size.

    Raises:
        ValueError: If a number is out of range, or `dims` is 3.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if dims != 2:
            raise ValueError(f"FCN-8s works on images: dims is 2, not {dims}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1, not {dropout}")
        self.dims, self.margin = dims, 0
        self.size_multiple = self.smallest = 2 ** len(TRUNK)

        trunk = [scaled(level, scale) for level in TRUNK]
        entering = [in_channels, *(level[-1] for level in trunk)]
        self.levels = nn.ModuleList(_level([a, *level]) for a, level in zip(entering, trunk))
        self.hidden, width = _hidden(trunk[-1][-1], scale, dropout)
        draw_he(self)
        # deepest first: every 32 voxels, 16 and 8
        scores = [nn.Conv2d(channels, 1, 1) for channels in (width, trunk[3][-1], trunk[2][-1])]
        doubles = [nn.ConvTranspose2d(1, 1, 4, 2, 1, bias=False) for _ in range(2)]
        for score in scores:
            draw(score, 0.0)
        for double in doubles:
            double.weight.data.copy_(torch.outer(torch.tensor(LINEAR), torch.tensor(LINEAR)))
        self.scores, self.doubles = nn.ModuleList(scores), nn.ModuleList(doubles)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        levels = [step for level in TRUNK for step in (*[Step(3, 1, 1)] * len(level), Step(2, 2))]
        hidden = [Step(size, 1, size // 2) for _, size in HIDDEN]
        ups = [*[Step(4, 2, 1, up=True)] * 2, Step(16, 8, 4, up=True)]
        return farthest([*levels, *hidden, *ups], self.size_multiple)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, I, J) to the prediction (N, 1, I, J), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        pooled = [source]
        for level in self.levels:
            pooled.append(functional.max_pool2d(level(pooled[-1]), 2))
        deepest, *finer = self.scores
        scores = deepest(self.hidden(pooled[5]))  # (N, 1, I / 32, J / 32)
        for double, score, features in zip(self.doubles, finer, (pooled[4], pooled[3])):
            scores = double(scores) + score(features)
        prediction: Tensor = functional.interpolate(scores, scale_factor=8.0, mode="bilinear", align_corners=False)
        return prediction.to(source.dtype)


def _level(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _hidden(entering: int, scale: float, dropout: float) -> tuple[nn.Sequential, int]:
    """Make the convolutions that were VGG16's full layers; returns their channels too."""
    widths = [entering, *scaled((channels for channels, _ in HIDDEN), scale)]
    layers = nn.Sequential()
    for (a, b), (_, size) in zip(pairwise(widths), HIDDEN):
        layers.extend([nn.Conv2d(a, b, size, padding=size // 2), nn.ReLU(inplace=True), nn.Dropout(dropout)])
    return layers, widths[-1]
