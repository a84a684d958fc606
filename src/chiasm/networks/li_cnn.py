"""The first patch network for missing modalities: two hidden layers of ten volumes.

Li, Zhang, Suk, Wang, Li, Shen and Ji, "Deep Learning Based Imaging Data Completion
for Improved Brain Disease Diagnosis", MICCAI 2014, LNCS 8675, 305-312,
doi:10.1007/978-3-319-10443-0_39, figure of the network (PET from MR).

    source 15^3 -> 7^3, 10 -> 9^3 -> 7^3, 10 -> 3^3 -> 1^3, 1 -> 3^3

All convolutions are valid.  The table has 343 * 10 + 10 + 343 * 100 + 10 + 10 + 1
= 37,761 weights, which is also the count that we remember from the paper; we had
only its abstract at hand.

Departures:
    - the hidden layers are rectified; we could not check the paper's nonlinearity
      (our choice);
    - weights start from He et al. 2015 (our choice);
    - any size above the margin in one pass, where the paper averages overlapping
      patches: for a valid network both are the same numbers;
    - a 2D form, and several source channels.
"""

from __future__ import annotations

from chiasm.networks.chain import ChainLayer, ConvolutionChain
from chiasm.networks.generator import Dims

#: Every convolution, without padding.
LAYERS = (ChainLayer(10, 7), ChainLayer(10, 7), ChainLayer(1, 1))


def li_cnn(*, in_channels: int, dims: Dims = 3, scale: float = 1.0) -> ConvolutionChain:
    """Make three convolutions, from a neighbourhood of 13 to its centre: a margin of 6 voxels.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels.

    Raises:
        ValueError: If a number is out of range.
    """
    return ConvolutionChain(LAYERS, in_channels=in_channels, dims=dims, scale=scale)
