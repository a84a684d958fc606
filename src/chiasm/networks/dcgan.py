"""Generator and discriminator by the rules of DCGAN.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", ICLR 2016, arXiv:1511.06434,
figure 1 and the list of guidelines in section 3.

    generator      source -> 128 -> 256 -> 512 -> 1024 => 512 => 256 => 128 => 1
    discriminator  images -> 128 -> 256 -> 512 -> 1024 -> mean over space -> linear, 1

"->" is a convolution of 5 with stride 2, "=>" a transposed one; no pooling, no
hidden linear layer, no skips.  Batch normalisation follows all but the
generator's last and the discriminator's first; rectified in the generator, leaky (0.2)
in the discriminator.  Weights start from a normal distribution of 0.02.  The discriminator's
channels are those of the authors' code (github.com/Newmu/dcgan_code, faces), for
we know of no table of them in the paper; the way up agrees with it too.

Departures:
    - the published generator makes an image out of 100 random numbers; ours out of a
      source image: the figure's way up is kept whole, and a way down (our choice)
      mirrors it, with the discriminator's rule of no normalisation at its first layer;
    - the output is linear, not a hyperbolic tangent;
    - the discriminator takes the mean over space before its linear unit, where the paper
      flattens 4 x 4 voxels, so that any size will do; it ends in a logit, not a sigmoid;
    - the discriminator sees what the trainer shows it (source and image side by side), standardised;
    - convolutions under a batch normalisation have no bias, which it would cancel, and
      at inference normalisation is fixed, so tiles equal the whole;
    - any number of source channels, and a 3D form (our choice: kernels become cubes).

Under a gradient penalty the discriminator's normalisation must be off (`norm="none"`):
the penalty is on each sample's gradient, and batch normalisation mixes samples.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from chiasm.networks.discriminators import SLOPE, Standardise
from chiasm.networks.generator import CONVOLUTION, Dims, Norm, check_sizes
from chiasm.networks.layers import NORM, TRANSPOSED, Step, check_discriminator, check_numbers, draw, farthest, scaled

#: Channels after each halving.
WIDTHS = (128, 256, 512, 1024)
#: Standard deviation of the first weights.
SD = 0.02


class DcganGenerator(nn.Module):
    """Four strided convolutions down, four transposed ones up, without skip connections.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels seen on each side of an output voxel.
        margin: 0, the output has the input's size.
        smallest: Least spatial size; to train on one sample at a time, twice it.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims, self.margin = dims, 0
        self.size_multiple = self.smallest = 2 ** len(WIDTHS)

        widths = scaled(WIDTHS, scale)
        convolution, transposed = CONVOLUTION[dims], TRANSPOSED[dims]
        self.first = nn.Sequential(convolution(in_channels, widths[0], 5, 2, 2), nn.ReLU(inplace=True))
        self.downs = nn.Sequential(
            *(_rectified(convolution(a, b, 5, 2, 2, bias=False), b, dims) for a, b in pairwise(widths))
        )
        self.ups = nn.Sequential(
            *(_rectified(transposed(a, b, 5, 2, 2, 1, bias=False), b, dims) for a, b in pairwise(widths[::-1]))
        )
        self.last = transposed(widths[0], 1, 5, 2, 2, 1)
        draw(self, SD)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        depth = len(WIDTHS)
        return farthest([*[Step(5, 2, 2)] * depth, *[Step(5, 2, 2, up=True)] * depth], self.size_multiple)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *S), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        prediction: Tensor = self.last(self.ups(self.downs(self.first(source)))).to(source.dtype)
        return prediction


class DcganDiscriminator(nn.Module):
    """Assess the whole image: four strided convolutions, a mean over space, one linear unit.

    Args:
        in_channels: Channels of source and image together.
        dims: Spatial axes of a convolution: 2 as published, or 3.
        scale: Share of the published channels.
        norm: "batch" as published; "none" under a gradient penalty, which must not mix samples.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
        smallest: Least spatial size; to train on one sample at a time with `norm` "batch", one more.

    Raises:
        ValueError: If a number is out of range or the norm unknown.
    """

    def __init__(self, *, in_channels: int, dims: Dims, scale: float = 1.0, norm: Norm = "batch") -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if norm not in ("batch", "none"):
            raise ValueError(f"norm is batch or none, not {norm!r}")
        self.dims, self.smallest = dims, 2 ** len(WIDTHS)

        widths = scaled(WIDTHS, scale)
        layers: list[nn.Module] = [CONVOLUTION[dims](in_channels, widths[0], 5, 2, 2), nn.LeakyReLU(SLOPE)]
        for a, b in pairwise(widths):
            layers.append(CONVOLUTION[dims](a, b, 5, 2, 2, bias=norm == "none"))
            layers += [NORM[dims](b)] if norm == "batch" else []
            layers.append(nn.LeakyReLU(SLOPE))
        self.standardise = Standardise(in_channels)
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], 1)
        draw(self, SD)

    def forward(self, images: Tensor) -> Tensor:
        """Map source and image, (N, in_channels, *S), to one logit a sample, (N,).

        Raises:
            ValueError: If an axis is shorter than `smallest`.
        """
        check_discriminator(images, self.dims, self.smallest)
        features = self.layers(self.standardise(images))  # (N, 1024, *S / 16), rounded up
        logits: Tensor = self.last(features.flatten(2).mean(2)).squeeze(1).to(images.dtype)
        return logits


def _rectified(convolution: nn.Module, channels: int, dims: Dims) -> nn.Sequential:
    return nn.Sequential(convolution, NORM[dims](channels), nn.ReLU(inplace=True))
