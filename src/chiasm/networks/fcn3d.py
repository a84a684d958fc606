"""The 3D fully convolutional network that estimates CT from MR without pooling.

Nie, Cao, Gao, Wang and Shen, "Estimating CT Image from MRI Data Using 3D Fully
Convolutional Networks", LABELS workshop at MICCAI 2016, LNCS 10008, 170-178,
doi:10.1007/978-3-319-46976-8_18, the network figure.

    source -> 5, 32 -> (3, 32) x 4 -> 5, 64 -> 3, 64 -> (3, 32) x 3 -> 1, 1
              valid                   valid

Two convolutions of 5 without padding take two voxels each from every side, which
is why a patch of 32 gives one of 24; the others are filled up with zeros.

What we are sure of: volumes in and out, patches of 32 and 24, rectifiers, no
pooling, squared error.  The layer table is that of the configuration its first
author published with the paper (github.com/ginobilinie/mr2ct); its note says that
the deep supervision and auto-context stages in it are not the paper's.  We had
only the paper's abstract at hand and have not held the table against its figure.

Departures:
    - no deep supervision: one score layer at the end, not three that are fused;
    - weights start from He et al. 2015 rather than Caffe's "xavier", which halves
      the variance at each of ten rectifiers;
    - any size above the margin, and a 2D form;
    - several source channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import check_numbers, draw_he, scaled

#: Channels, kernel and padding of every convolution; the last is the score layer.
LAYERS = (
    (32, 5, 0),
    *[(32, 3, 1)] * 4,
    (64, 5, 0),
    (64, 3, 1),
    *[(32, 3, 1)] * 3,
    (1, 1, 0),
)


class Fcn3d(nn.Module):
    """Eleven convolutions at full resolution, two of which shrink the image.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels.

    Attributes:
        size_multiple: 1, any size.
        margin: Voxels that the two unpadded convolutions lose on each side.
        receptive_field: Voxels seen on each side of an output voxel.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 3, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims, self.size_multiple = dims, 1
        self.margin = sum(size // 2 - padding for _, size, padding in LAYERS)
        self.receptive_field = sum(size // 2 for _, size, _ in LAYERS)
        self.smallest = 2 * self.margin + 1

        outputs = [*scaled((channels for channels, _, _ in LAYERS[:-1]), scale), 1]
        inputs = [in_channels, *outputs]
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, size, padding=padding) for a, b, (_, size, padding) in zip(inputs, outputs, LAYERS)
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
