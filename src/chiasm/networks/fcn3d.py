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

from chiasm.networks.chain import ChainLayer, ConvolutionChain
from chiasm.networks.generator import Dims

#: Every convolution; the last is the score layer.
LAYERS = (
    ChainLayer(32, 5),
    *[ChainLayer(32, 3, 1)] * 4,
    ChainLayer(64, 5),
    ChainLayer(64, 3, 1),
    *[ChainLayer(32, 3, 1)] * 3,
    ChainLayer(1, 1),
)


def fcn3d(*, in_channels: int, dims: Dims = 3, scale: float = 1.0) -> ConvolutionChain:
    """Make eleven convolutions at full resolution, two of which shrink the image: a margin of 4 voxels.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels.

    Raises:
        ValueError: If a number is out of range.
    """
    return ConvolutionChain(LAYERS, in_channels=in_channels, dims=dims, scale=scale)
