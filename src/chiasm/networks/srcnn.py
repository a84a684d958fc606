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

from typing import Literal

from chiasm.networks.chain import ChainLayer, ConvolutionChain
from chiasm.networks.generator import Dims

Variant = Literal["9-1-5", "9-5-5"]

#: The convolutions of each variant, without padding.
LAYERS: dict[Variant, tuple[ChainLayer, ...]] = {
    "9-1-5": (ChainLayer(64, 9), ChainLayer(32, 1), ChainLayer(1, 5)),
    "9-5-5": (ChainLayer(64, 9), ChainLayer(32, 5), ChainLayer(1, 5)),
}


def srcnn(*, in_channels: int, dims: Dims = 2, scale: float = 1.0, variant: Variant = "9-1-5") -> ConvolutionChain:
    """Make three convolutions, which extract patches, map them, and rebuild the image.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        variant: Sizes of the three kernels.

    Raises:
        ValueError: If a number is out of range or the variant unknown.
    """
    if variant not in LAYERS:
        raise ValueError(f"variant is one of {', '.join(LAYERS)}, not {variant!r}")
    return ConvolutionChain(LAYERS[variant], in_channels=in_channels, dims=dims, scale=scale)
