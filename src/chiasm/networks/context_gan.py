"""Generator and discriminator of the context-aware adversarial network.

Nie, Trullo, Lian, Petitjean, Ruan, Wang and Shen, "Medical Image Synthesis with
Context-Aware Generative Adversarial Networks", MICCAI 2017, LNCS 10435, 417-425,
doi:10.1007/978-3-319-66179-7_48, arXiv:1612.05362, figure of the two networks.

    generator      source 32^3 -> 9, 32 valid -> (3, 32) x 3 -> 9, 64 valid -> (3, 64) x 2 -> 3, 32 -> 3, 1 -> 16^3
    discriminator  images -> (3, 32; pool) -> (3, 64; pool) -> (3, 128; pool) -> 3, 256 -> linear 512, 128, 1

Every convolution but the generator's last is batch normalised and rectified.
The generator's table is that of the authors' code (github.com/ginobilinie/
medSynthesis, 3dganversion), whose patches of 32 and 16 it explains: two valid
convolutions of 9 lose eight voxels on each side.  The discriminator's channels (32, 64,
128, 256; 512, 128, 1), its three poolings and its sigmoid stand as we remember
the paper, of which we had only the abstract at hand; the code's own discriminator is another
one.  Its kernel of 3 is our choice, for we are not sure of the paper's.

Auto-context: the previous stage's prediction is one more source channel; the
cascade is the trainer's (`generator.stages`, `training.cascade`).

Departures:
    - the discriminator takes the mean over space before its first linear layer, where the
      paper flattens a patch of fixed size; so that layer has 256 inputs;
    - the discriminator ends in a logit, not a sigmoid, and sees what the trainer shows it
      (source and image side by side), where the paper shows the image alone;
    - the discriminator's inputs are standardised with fixed statistics, as our own are;
    - convolutions under a batch normalisation have no bias, which it would cancel;
    - any size above the margin, a 2D form, and several source channels.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.chain import ChainLayer, check_source, margin_of, reach_of, widths_of
from chiasm.networks.discriminators import Standardise
from chiasm.networks.generator import CONVOLUTION, Dims, Norm
from chiasm.networks.layers import MAX_POOL, NORM, check_discriminator, check_numbers, scaled

#: The generator's convolutions.
LAYERS = (
    ChainLayer(32, 9),
    *[ChainLayer(32, 3, 1)] * 3,
    ChainLayer(64, 9),
    *[ChainLayer(64, 3, 1)] * 2,
    ChainLayer(32, 3, 1),
    ChainLayer(1, 3, 1),
)
#: Channels of the discriminator's convolutions, and units of its hidden linear layers.
DISCRIMINATOR_WIDTHS = (32, 64, 128, 256)
DISCRIMINATOR_UNITS = (512, 128)


class ContextFcn(nn.Module):
    """Nine convolutions at full resolution, two of 9 that shrink the image.

    Args:
        in_channels: Source channels, the previous stage's prediction among them.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels.

    Attributes:
        size_multiple: 1, any size.
        margin: Voxels that the two unpadded convolutions lose on each side: 8.
        receptive_field: Voxels seen on each side of an output voxel.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims, self.size_multiple = dims, 1
        self.margin, self.receptive_field = margin_of(LAYERS), reach_of(LAYERS)
        self.smallest = 2 * self.margin + 1

        widths = widths_of(LAYERS, in_channels, scale)
        *hidden, last = LAYERS
        self.blocks = nn.ModuleList(
            _block(a, b, layer.size, layer.padding, dims) for (a, b), layer in zip(pairwise(widths), hidden)
        )
        self.last = CONVOLUTION[dims](widths[-2], 1, last.size, padding=last.padding)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *(S - 16)), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_source(source, self.dims, self.smallest)
        features = source
        for block in self.blocks:
            features = block(features)
        prediction: Tensor = self.last(features).to(source.dtype)
        return prediction


class ContextDiscriminator(nn.Module):
    """Assess the whole image: three poolings, four convolutions, three linear layers.

    Args:
        in_channels: Channels of source and image together.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels and units.
        norm: "batch" as published; "none" under a gradient penalty, which must not mix samples.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
        smallest: Least spatial size, which three poolings reduce to one voxel.

    Raises:
        ValueError: If a number is out of range or the norm unknown.
    """

    def __init__(self, *, in_channels: int, dims: Dims, scale: float = 1.0, norm: Norm = "batch") -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if norm not in ("batch", "none"):
            raise ValueError(f"norm is batch or none, not {norm!r}")
        self.dims, self.smallest = dims, 2 ** (len(DISCRIMINATOR_WIDTHS) - 1)
        widths = [in_channels, *scaled(DISCRIMINATOR_WIDTHS, scale)]
        units = [widths[-1], *scaled(DISCRIMINATOR_UNITS, scale)]
        self.standardise = Standardise(in_channels)
        self.blocks = nn.ModuleList(_block(a, b, 3, 1, dims, norm) for a, b in pairwise(widths))
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(units))
        self.last = nn.Linear(units[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map source and image, (N, in_channels, *S), to one logit a sample, (N,).

        Raises:
            ValueError: If an axis is shorter than `smallest`.
        """
        check_discriminator(images, self.dims, self.smallest)
        features = self.standardise(images)
        for block in self.blocks[:-1]:
            features = MAX_POOL[self.dims](block(features), 2)
        features = self.blocks[-1](features).flatten(2).mean(2)  # (N, 256)
        for layer in self.hidden:
            features = functional.relu(layer(features), inplace=True)
        logits: Tensor = self.last(features).squeeze(1).to(images.dtype)
        return logits


def _block(inputs: int, outputs: int, size: int, padding: int, dims: Dims, norm: Norm = "batch") -> nn.Sequential:
    plain = norm == "none"
    convolution = CONVOLUTION[dims](inputs, outputs, size, padding=padding, bias=plain)
    return nn.Sequential(convolution, nn.Identity() if plain else NORM[dims](outputs), nn.ReLU(inplace=True))
