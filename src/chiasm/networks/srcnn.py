"""SRCNN: three convolutions from a blurred image to a sharp one.

Dong, Loy, He and Tang, "Learning a Deep Convolutional Network for Image
Super-Resolution", ECCV 2014, and "Image Super-Resolution Using Deep Convolutional
Networks", IEEE TPAMI 38(2), 295-307, 2016, doi:10.1109/TPAMI.2015.2439281,
arXiv:1501.00092, figure 2 and section 3.

    source -> 9, 64 -> 1 (or 5), 32 -> 5, 1        all valid: six (or eight) voxels are lost on each side

Rectified but the last.  One channel in 2D makes 8,032 (9-1-5) or 57,184 (9-5-5)
weights, as the paper counts them, and 97 biases beside.  The convolutions are
valid, as in the paper's training, so no output voxel has seen a border.  The
paper's text was not at hand; its counts of weights agree with these layers.

Departures:
    - weights start from He et al. 2015, not from a normal distribution of 0.001, which
      Adam hardly leaves: after 200 steps on one patch, 61 to 82 % of the 9-5-5's
      first loss were left, against less than 1 % (our measurement, three seeds);
    - one learning rate for all layers (the paper gives the last a tenth); the trainer's;
    - several source channels, a 3D form (our choice: kernels become cubes), and at
      inference no other padding than in training.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import check_numbers, draw_he, scaled

Variant = Literal["9-1-5", "9-5-5"]

#: Channels after each convolution but the last.
WIDTHS = (64, 32)
KERNELS: dict[Variant, tuple[int, int, int]] = {"9-1-5": (9, 1, 5), "9-5-5": (9, 5, 5)}


class Srcnn(nn.Module):
    """Extract patches, map them, rebuild the image: one convolution each.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        variant: Sizes of the three kernels.

    Attributes:
        size_multiple: 1, any size.
        margin: Voxels lost on each side.
        receptive_field: Voxels seen on each side of an output voxel: the margin.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range or the variant unknown.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0, variant: Variant = "9-1-5") -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if variant not in KERNELS:
            raise ValueError(f"variant is one of {', '.join(KERNELS)}, not {variant!r}")
        kernels = KERNELS[variant]
        self.dims, self.size_multiple = dims, 1
        self.margin = self.receptive_field = sum(size // 2 for size in kernels)
        self.smallest = 2 * self.margin + 1

        widths = [in_channels, *scaled(WIDTHS, scale), 1]
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, size) for (a, b), size in zip(pairwise(widths), kernels)
        )
        draw_he(self)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *(S - 2 margin)), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        if min(source.shape[2:]) < self.smallest:
            raise ValueError(f"spatial sizes must be at least {self.smallest}, not {tuple(source.shape[2:])}")
        features = source
        for convolution in self.convolutions[:-1]:
            features = functional.relu(convolution(features), inplace=True)
        prediction: Tensor = self.convolutions[-1](features).to(source.dtype)
        return prediction
