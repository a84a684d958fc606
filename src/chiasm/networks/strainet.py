"""STRAINet: residual units that are left out at random, and kernels that vary over space.

Nie, Wang, Gao, Lian and Shen, "STRAINet: Spatially Varying sTochastic Residual
AdversarIal Networks for MRI Pelvic Organ Segmentation", IEEE TNNLS 30(5),
1552-1564, 2019 (online 2018), doi:10.1109/TNNLS.2018.2870182.

    source -> 3, 64 -> unit 64 -------------------------------- (+) unit 64 -> varying 64 -> 1, 1
                pool -> unit 128 ---------------------- (+) unit 128 <- up
                          pool -> unit 256 ---- (+) unit 256 <- up
                                    pool -> unit 512, dilated by 2 <- up

The paper's, by its abstract: stochastic residual units in place of plain layers,
long-range stochastic residual connections from shallow to deep layers, dilation
at the smallest resolution, a spatially varying convolution, an adversary, and
auto-context (the trainer's: give the prediction as one more source channel).
From its first author's 2D code (github.com/ginobilinie/Strainet): channels 64 to
512, pooling of 3 by 2, bottleneck units of half the width (1, 3, 1), where the
varying layer stands, and the eight convolutions of the discriminator.

Our choice, for we had only the abstract at hand:
    - a unit's branch, or a long-range connection, is left out whole, sample by
      sample, with probability `drop` in training, and is weighted by 1 - drop
      otherwise (stochastic depth, Huang et al. 2016); 0.1 everywhere;
    - "up" is a 1-convolution, batch normalised (else the finest unit's rectifier dies
      at a rate of 0.01), and linear interpolation, which leaves no dots.

Departures:
    - the varying convolution of the code has a kernel of its own at each place of
      a fixed image size.  Ours mixes a few basis kernels at each voxel, with
      weights predicted from the features there: any size, and tiles equal the whole;
    - regression: one linear output channel, no softmax;
    - the discriminator's linear layers (1024, 1) act at each place of its coarsest grid
      rather than on a flattened image: one logit for every 16 voxels, no sigmoid;
      it sees what the trainer shows it, standardised with fixed statistics;
    - a 3D form.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.discriminators import Standardise
from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes, upsample
from chiasm.networks.layers import NORM, Step, check_discriminator, check_numbers, farthest, scaled

WIDTHS = (64, 128, 256, 512)
#: Kernels that the spatially varying convolution mixes.
BASIS = 4
#: Channels and stride of the discriminator's convolutions, and units of its hidden layer.
DISCRIMINATOR_LAYERS = ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (128, 1), (128, 2))
DISCRIMINATOR_UNITS = 1024

POOL: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class StochasticBranch(nn.Module):
    """Leave a branch out at random in training; else weigh it by how often it was there.

    Args:
        drop: Probability that a sample goes without the branch, in [0, 1).
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.keep = 1.0 - drop

    def forward(self, branch: Tensor) -> Tensor:
        """Map (N, C, *S) to the same shape."""
        if not self.training:
            return self.keep * branch
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) < self.keep
        return branch * kept


class StochasticUnit(nn.Module):
    """Correct the features, or a 1-convolution of them, by a bottleneck of 1, 3 and 1."""

    def __init__(self, inputs: int, outputs: int, *, dims: Dims, drop: float, dilation: int = 1) -> None:
        super().__init__()
        middle = max(1, outputs // 2)
        self.shortcut = nn.Identity() if inputs == outputs else _normalised(inputs, outputs, 1, dims)
        self.first = _normalised(inputs, middle, 1, dims)
        self.second = _normalised(middle, middle, 3, dims, dilation)
        self.third = _normalised(middle, outputs, 1, dims)
        self.stochastic = StochasticBranch(drop)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, *S) to (N, outputs, *S)."""
        inner = functional.relu(self.first(features), inplace=True)
        inner = functional.relu(self.second(inner), inplace=True)
        return functional.relu(self.shortcut(features) + self.stochastic(self.third(inner)))


class VaryingConvolution(nn.Module):
    """Convolve by 3 with a kernel of each voxel's own: a mixture of `basis` kernels.

    The weights of the mixture are a softmax of a 1-convolution of the features
    there.  Filtering by each kernel and mixing the results is the same, as
    convolution is linear in its kernel.
    """

    def __init__(self, channels: int, *, dims: Dims, basis: int) -> None:
        super().__init__()
        self.basis = basis
        self.kernels = CONVOLUTION[dims](channels, basis * channels, 3, padding=1)
        self.mixture = CONVOLUTION[dims](channels, basis, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, channels, *S) to the same shape."""
        weights = self.mixture(features).softmax(dim=1).unsqueeze(2)  # (N, basis, 1, *S)
        filtered = self.kernels(features).unflatten(1, (self.basis, -1))  # (N, basis, channels, *S)
        mixed: Tensor = (weights * filtered).sum(dim=1)
        return mixed


class Strainet(nn.Module):
    """A residual encoder and decoder whose branches and skips are stochastic.

    Args:
        in_channels: Source channels, the previous stage's prediction among them.
        dims: Spatial axes of a convolution, 2 or 3.
        scale: Share of the published channels.
        drop: Share of branches and skips that training leaves out, in [0, 1).
        basis: Kernels that the spatially varying convolution mixes; 1 is a plain one.

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
        self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0, drop: float = 0.1, basis: int = BASIS
    ) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        if not 0 <= drop < 1 or basis < 1:
            raise ValueError(f"drop is at least 0 and below 1, basis at least 1, not {drop} and {basis}")
        self.dims, self.margin = dims, 0
        self.size_multiple = self.smallest = 2 ** (len(WIDTHS) - 1)
        widths = scaled(WIDTHS, scale)
        levels, dilations = list(pairwise(widths)), [1] * (len(widths) - 2) + [2]

        self.stem = _normalised(in_channels, widths[0], 3, dims)
        self.first = StochasticUnit(widths[0], widths[0], dims=dims, drop=drop)
        self.pool = POOL[dims](3, stride=2, padding=1)
        self.downs = nn.ModuleList(
            StochasticUnit(a, b, dims=dims, drop=drop, dilation=dilation) for (a, b), dilation in zip(levels, dilations)
        )
        self.narrows = nn.ModuleList(_normalised(b, a, 1, dims) for a, b in reversed(levels))
        self.skip = StochasticBranch(drop)
        self.ups = nn.ModuleList(StochasticUnit(a, a, dims=dims, drop=drop) for a, _ in reversed(levels))
        self.varying = VaryingConvolution(widths[0], dims=dims, basis=basis)
        self.last = CONVOLUTION[dims](widths[0], 1, 1)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly."""
        depth = len(self.downs)
        unit, pool, up = Step(3, padding=1), Step(3, 2, 1), Step(4, 2, 1, up=True)
        dilated = Step(5, padding=2)
        downs = [pool, unit] * (depth - 1) + [pool, dilated]
        return farthest([unit, unit, *downs, *[up, unit] * depth, unit], self.size_multiple)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *S), normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        features = self.first(functional.relu(self.stem(source), inplace=True))
        fine = []
        for down in self.downs:
            fine.append(features)
            features = down(self.pool(features))
        for narrow, up in zip(self.narrows, self.ups):
            # narrowing and interpolation commute; the coarse grid is the cheaper place
            features = up(upsample(narrow(features)) + self.skip(fine.pop()))
        # not rectified in between, as in the code: the mixture is nonlinear already
        prediction: Tensor = self.last(self.varying(features)).to(source.dtype)
        return prediction


class StrainetDiscriminator(nn.Module):
    """Assess the image place by place: eight convolutions of 3, four with stride 2.

    Args:
        in_channels: Channels of source and image together.
        dims: Spatial axes of a convolution, 2 or 3.
        scale: Share of the published channels and units.

    Attributes:
        standardise: See `Standardise.set_input_statistics`.
        smallest: Least spatial size, which gives one logit.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims = dims
        self.smallest = 2 ** sum(stride == 2 for _, stride in DISCRIMINATOR_LAYERS)
        widths = [in_channels, *scaled((width for width, _ in DISCRIMINATOR_LAYERS), scale)]
        units = max(1, round(DISCRIMINATOR_UNITS * scale))
        self.standardise = Standardise(in_channels)
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, 3, stride, padding=1)
            for (a, b), (_, stride) in zip(pairwise(widths), DISCRIMINATOR_LAYERS)
        )
        self.hidden = CONVOLUTION[dims](widths[-1], units, 1)
        self.last = CONVOLUTION[dims](units, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map source and image, (N, in_channels, *S), to logits (N, 1, *S / 16), rounded up.

        Raises:
            ValueError: If an axis is shorter than `smallest`.
        """
        check_discriminator(images, self.dims, self.smallest)
        features = self.standardise(images)
        for convolution in [*self.convolutions, self.hidden]:
            features = functional.elu(convolution(features))
        logits: Tensor = self.last(features).to(images.dtype)
        return logits


def _normalised(inputs: int, outputs: int, size: int, dims: Dims, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (size // 2)
    convolution = CONVOLUTION[dims](inputs, outputs, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, NORM[dims](outputs))
