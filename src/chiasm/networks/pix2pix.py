"""Generator and discriminator of pix2pix: the U-Net of eight halvings and the PatchGAN of 70 voxels.

Isola, Zhu, Zhou and Efros, "Image-to-Image Translation with Conditional
Adversarial Networks", CVPR 2017, 5967-5976, doi:10.1109/CVPR.2017.632,
arXiv:1611.07004, appendix on network architectures ("U-Net", "70 x 70").

    generator      source -> 64 -> 128 -> 256 -> 512 -> 512 -> 512 -> 512 -> 512
                   then   => 512d => 512d => 512d => 512 => 256 => 128 => 64 => 1, joined by the way down's features
    discriminator  images -> 64 -> 128 -> 256 > 512 > 1

"->" is a convolution of 4 with stride 2, "=>" a transposed one, ">" one with stride 1,
all padded by 1; d is dropout of one half.  Leaky (0.2) on the way down and in the
discriminator, rectified on the way up.  Batch normalisation follows all but the first and
last of either, and the generator's innermost, from which the authors' errata and
later code take it: one voxel is left there, which a batch of one would set to zero.
Weights start from a normal distribution of 0.02.  The layers are held against the
authors' code (github.com/phillipi/pix2pix, models.lua), not the appendix itself.

Departures:
    - the output is linear, not a hyperbolic tangent; the discriminator ends in a logit;
    - at inference dropout is off and normalisation fixed (the paper runs both as in
      training), so that the prediction is one and tiles equal the whole;
    - the discriminator sees what the trainer shows it (source and image side by side), standardised;
    - convolutions under a batch normalisation have no bias, which it would cancel;
    - `depth` below 8 leaves out levels of 512 channels, then the coarsest of those left;
      dropout stays at the innermost three of the way up, but never at the output (our choice);
    - any number of source channels, and a 3D form (our choice: kernels become cubes).

Under a gradient penalty the discriminator's normalisation must be off (`norm="none"`):
the penalty is on each sample's gradient, and batch normalisation mixes samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from chiasm.networks.discriminators import SLOPE, Standardise
from chiasm.networks.generator import CONVOLUTION, Dims, Norm, check_sizes
from chiasm.networks.layers import (
    NORM,
    TRANSPOSED,
    Step,
    check_discriminator,
    check_numbers,
    draw,
    farthest,
    scaled,
    seen,
)

#: Channels after each halving.
WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)
#: Levels of the way up, innermost first, with dropout.
DROPPED = 3
#: Channels and strides of the discriminator's convolutions.
DISCRIMINATOR_LAYERS = ((64, 2), (128, 2), (256, 2), (512, 1), (1, 1))
#: Standard deviation of the first weights.
SD = 0.02


class Pix2PixGenerator(nn.Module):
    """Halve down to few voxels, double up again, joined level by level.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        depth: Halvings, 2 to 8: 8 as published, for patches that are multiples of
            256; 5 for multiples of 32.
        dropout: Share of three levels' features that training leaves out, in [0, 1).

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels seen on each side of an output voxel.
        margin: 0, the output has the input's size.
        smallest: Least spatial size.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0, depth: int = 8, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if not 2 <= depth <= len(WIDTHS) or not 0 <= dropout < 1:
            raise ValueError(f"depth is 2 to {len(WIDTHS)}, dropout at least 0 and below 1, not {depth}, {dropout}")
        self.dims, self.depth, self.margin = dims, depth, 0
        self.size_multiple = self.smallest = 2**depth

        widths = scaled(WIDTHS[:depth], scale)
        inner = [*pairwise(widths)]
        convolution, transposed = CONVOLUTION[dims], TRANSPOSED[dims]
        self.downs = nn.ModuleList([convolution(in_channels, widths[0], 4, 2, 1)])
        for level, (a, b) in enumerate(inner, start=2):
            plain = level == depth  # innermost
            norm = nn.Identity() if plain else NORM[dims](b)
            self.downs.append(nn.Sequential(nn.LeakyReLU(SLOPE), convolution(a, b, 4, 2, 1, bias=plain), norm))
        self.ups = nn.ModuleList()
        for level, (a, b) in enumerate(reversed(inner)):
            inputs = b if level == 0 else 2 * b
            thinned = nn.Dropout(dropout if level < DROPPED else 0.0)
            self.ups.append(
                nn.Sequential(nn.ReLU(), transposed(inputs, a, 4, 2, 1, bias=False), NORM[dims](a), thinned)
            )
        self.last = nn.Sequential(nn.ReLU(), transposed(2 * widths[0], 1, 4, 2, 1))
        draw(self, SD)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        return farthest([*[Step(4, 2, 1)] * self.depth, *[Step(4, 2, 1, up=True)] * self.depth], self.size_multiple)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *S), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        _check_depth(source.shape[2:], self.dims, self.depth)
        features, fine = source, []
        for down in self.downs:
            features = down(features)
            fine.append(features)
        fine.pop()  # the innermost has nothing to be joined to
        for up in self.ups:
            features = torch.cat([up(features), fine.pop()], dim=1)
        prediction: Tensor = self.last(features).to(source.dtype)
        return prediction


class PatchDiscriminator(nn.Module):
    """Assess every patch of 70 voxels a side: one logit each, eight voxels apart.

    Args:
        in_channels: Channels of source and image together.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        norm: "batch" as published; "none" under a gradient penalty, which must not mix samples.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
        smallest: Least spatial size, which gives one logit (of a patch that zeros fill up).
        patch: Voxels a side that one logit has seen: 70.

    Raises:
        ValueError: If a number is out of range or the norm unknown.
    """

    def __init__(self, *, in_channels: int, dims: Dims, scale: float = 1.0, norm: Norm = "batch") -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if norm not in ("batch", "none"):
            raise ValueError(f"norm is batch or none, not {norm!r}")
        first, last = seen([Step(4, stride, 1) for _, stride in DISCRIMINATOR_LAYERS], 0, 0)
        # 24 -> 12 -> 6 -> 3 -> 2 -> 1
        self.dims, self.smallest, self.patch = dims, 24, last - first + 1

        *hidden, (_, last_stride) = DISCRIMINATOR_LAYERS
        widths = [in_channels, *scaled((width for width, _ in hidden), scale)]
        layers: list[nn.Module] = []
        for level, ((a, b), (_, stride)) in enumerate(zip(pairwise(widths), hidden)):
            normalised = norm == "batch" and level > 0
            layers.append(CONVOLUTION[dims](a, b, 4, stride, 1, bias=not normalised))
            layers += [NORM[dims](b)] if normalised else []
            layers.append(nn.LeakyReLU(SLOPE))
        self.standardise = Standardise(in_channels)
        self.layers = nn.Sequential(*layers)
        self.last = CONVOLUTION[dims](widths[-1], 1, 4, last_stride, 1)
        draw(self, SD)

    def forward(self, images: Tensor) -> Tensor:
        """Map source and image, (N, in_channels, *S), to logits (N, 1, *(S / 8 - 2)), rounded down.

        Raises:
            ValueError: If an axis is shorter than `smallest`.
        """
        check_discriminator(images, self.dims, self.smallest)
        logits: Tensor = self.last(self.layers(self.standardise(images))).to(images.dtype)
        return logits


def _check_depth(spatial: Sequence[int], dims: int, depth: int) -> None:
    """Raise ValueError unless the sizes can be halved `depth` times, saying which depth would do."""
    multiple = 2**depth
    if len(spatial) != dims or not min(spatial):
        check_sizes(spatial, dims, multiple)
    if any(size % multiple for size in spatial):
        fits = max(d for d in range(depth) if all(size % 2**d == 0 for size in spatial))
        way_out = f", or take depth {fits} at most" if fits >= 2 else ""
        raise ValueError(
            f"spatial sizes must be multiples of {multiple} at depth {depth}, not {tuple(spatial)}: "
            f"give {multiple} or {2 * multiple} a side{way_out}"
        )
