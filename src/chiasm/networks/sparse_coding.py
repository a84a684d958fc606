"""Joint convolutional sparse coding: a few registered pairs, and unpaired images beside them.

Huang, Shao and Frangi, "Simultaneous Super-Resolution and Cross-Modality Synthesis
of 3D Medical Images using Weakly-Supervised Joint Convolutional Sparse Coding"
(WEENIE), CVPR 2017, 5787-5796, doi:10.1109/CVPR.2017.613, arXiv:1705.02596.

With x and y the images of source and target, F and G their dictionaries of
filters, u and v their codes, one map a filter, and W a mapping between codes:

    J = sum |x - F * u|^2 / 2 + sum |y - G * v|^2 / 2 + s (|u|_1 + |v|_1)       (1)
      + b / 2 sum over pairs |v - W u|^2 + c / 2 |W|^2                          (2)
      + m / 2 sum over unpaired n |W mean(u) - mean(v')|^2                      (3)
    with |F_k| <= 1 and |G_k| <= 1

(1) convolutional sparse coding, (2) the pairs' coupling, (3) the discrepancy of
means (MMD with a linear kernel) between an unpaired source, of n voxels, and the
unpaired target v' that looks most like it.  J falls in turns: codes by ADMM in the
Fourier domain (Bristow, Eriksson and Lucey 2013; Wohlberg 2014), filters by
projected gradients, W by ridge regression.  A new source is coded with F alone,
its codes go through W, and G makes the image.

The numbers (1) to (3) are ours: the paper's text was not at hand.  Its terms, their
order, ADMM and ridge regression are known from its abstract and a published
summary, the 800 filters from memory.  Departures, ours unless said otherwise:
    - 2D slices of 7 x 7 filters: a round on volumes would cost their third side more.
      A 3D form of 5 x 5 x 5 is there (`dims=3`).  The method's own row has 32
      filters, not 800;
    - a Gaussian mean, taken inside the mask, is off both images before coding; the
      target's is predicted from the source's by a straight line;
    - the paper learns how to match unpaired images from the pairs' high frequencies
      and adds what matches to the pairs.  Here patches are matched by how much
      gradient and Laplacian they hold where (`align_unpaired`), and only the means
      of matched patches are compared: voxels of different people do not correspond;
    - a linear kernel sees only codes whose mean is not zero;
    - W mixes all codes of one voxel (our reading);
    - when all is learnt, pairs are coded alone, as new sources will be, and W, then G,
      are fitted once more to that: codes that have seen their target are not what
      prediction has, and sparsity shrinks them;
    - a new source is coded by accelerated soft thresholding with convolutions (FISTA),
      not by ADMM: it is local, and differentiable, so that the same module can also be
      trained by Adam, as Gregor and LeCun (ICML 2010) unrolled it;
    - super-resolution by interpolating first: source and target lie on one grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import TRANSPOSED, check_numbers

FILTERS = 800  # of each modality at scale 1
SIZES: dict[int, int] = {2: 7, 3: 5}  # voxels of a filter along each axis, by number of axes
SMOOTH_VOXELS = 6.0  # SD of the Gaussian mean, which reaches three of them
SPARSITY = 0.3  # s, for images whose detail has an RMS of 1
STEPS_ALONE = 30  # of FISTA for a new source


class SparseCoder(nn.Module):
    """Code the source's detail sparsely, map the codes, and make the target's detail of them.

    Args:
        in_channels: Source channels; a filter has as many.
        dims: Spatial axes.
        scale: Share of the published number of filters.

    Attributes:
        size_multiple: 1, any size.
        smallest: Voxels of a filter.
        margin: 0.
        receptive_field: Voxels seen on each side of an output voxel, through all steps.
        analysis: Holds F: its weights, shape (K, C, *size).
        mapping: Holds W, shape (K, K, 1...).
        synthesis: Holds G, shape (K, 1, *size).
        line: Offset, then slope of each source channel, from smooth parts to the target's, shape (1 + C,).
        spread: RMS of the detail of each source channel and of the target, shape (C + 1,).

    Raises:
        ValueError: If a number is out of range.
    """

    line: Tensor
    spread: Tensor
    gaussian: Tensor

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        size, count = SIZES[dims], max(1, round(FILTERS * scale))
        radius = math.ceil(3 * SMOOTH_VOXELS)
        self.dims, self.size_multiple, self.smallest, self.margin = dims, 1, size, 0
        self.receptive_field = radius + (2 * STEPS_ALONE) * (size // 2)
        self.analysis = CONVOLUTION[dims](in_channels, count, size, padding=size // 2, bias=False)
        self.mapping = CONVOLUTION[dims](count, count, 1, bias=False)
        self.synthesis = TRANSPOSED[dims](count, 1, size, padding=size // 2, bias=False)
        self.line = nn.Parameter(torch.cat([torch.zeros(1), torch.ones(in_channels) / in_channels]))
        self.register_buffer("spread", torch.ones(in_channels + 1))
        offsets = torch.arange(-radius, radius + 1) / SMOOTH_VOXELS
        self.register_buffer("gaussian", torch.exp(-offsets.square() / 2), persistent=False)
        with torch.no_grad():
            for layer in (self.analysis, self.synthesis):
                layer.weight.copy_(unit_filters(torch.randn_like(layer.weight)))
            self.mapping.weight.copy_(torch.eye(count).view_as(self.mapping.weight))

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S), zero outside the mask, to (N, 1, *S), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        if min(source.shape[2:]) < self.smallest:
            raise ValueError(f"spatial sizes must be at least {self.smallest}, not {tuple(source.shape[2:])}")
        place = "cpu" if source.is_meta else source.device.type
        with torch.autocast(place, enabled=False):  # a search for codes needs all digits
            return self._map(source.float()).to(source.dtype)

    def _map(self, source: Tensor) -> Tensor:
        mask = (source != 0).any(1, keepdim=True)
        smooth, detail = split(source, mask, self.gaussian)
        codes = self.encode(detail / single_channel(self.spread[:-1], detail))
        made = self.spread[-1] * self.synthesis(self.mapping(codes))
        trend = self.line[0] + (single_channel(self.line[1:], smooth) * smooth).sum(1, keepdim=True)
        prediction: Tensor = (trend + made) * mask
        return prediction

    def encode(self, detail: Tensor, steps: int = STEPS_ALONE) -> Tensor:
        """Code detail (N, C, *S) of RMS 1 with F: shape (N, K, *S)."""
        return encode(detail, self.analysis, SPARSITY, steps)


def encode(detail: Tensor, analysis: nn.Module, sparsity: float, steps: int) -> Tensor:
    """Lower ``|x - F * u|^2 / 2 + s |u|_1`` in u, zeros beyond the image, by FISTA.

    Args:
        detail: x, shape (N, C, *S).
        analysis: A convolution whose weights are F; it correlates with them.
        sparsity: s.
        steps: Each lets a code see a filter farther.

    Returns:
        u, exact zeros where a filter is absent, shape (N, K, *S).

    Reference:
        Beck and Teboulle, SIAM Journal on Imaging Sciences 2(1), 2009, equations 4.1 to 4.3.
    """
    filters = analysis.weight
    assert isinstance(filters, Tensor)
    step = 1 / largest_curvature(filters)
    codes = ahead = soft_threshold(step * analysis(detail), step * sparsity)
    weight = 1.0
    for _ in range(steps - 1):
        moved = soft_threshold(ahead + step * analysis(detail - decode(ahead, filters)), step * sparsity)
        heavier = (1 + (1 + 4 * weight**2) ** 0.5) / 2
        ahead, codes, weight = moved + (weight - 1) / heavier * (moved - codes), moved, heavier
    return codes


def decode(codes: Tensor, filters: Tensor) -> Tensor:
    """Convolve each code with its filter and add them up: (N, K, *S) and (K, C, *size) to (N, C, *S)."""
    transposed = functional.conv_transpose2d if filters.ndim == 4 else functional.conv_transpose3d
    made: Tensor = transposed(codes, filters, padding=filters.shape[-1] // 2)
    return made


@torch.no_grad()
def largest_curvature(filters: Tensor) -> Tensor:
    """Bound the largest eigenvalue of F'F from above, whatever the image's size.

    It is at most the largest value of ``sum_k |F_k|^2`` over all frequencies, a
    trigonometric polynomial of degree n = size - 1; between N samples along an
    axis it exceeds the largest of them by 1 / cos(pi n / N) at most.

    Reference:
        Ehlich and Zeller, Mathematische Zeitschrift 86, 1964.
    """
    size, axes = filters.shape[-1], tuple(range(2, filters.ndim))
    samples = 6 * size
    power = torch.fft.rfftn(filters.float(), s=(samples,) * len(axes), dim=axes).abs().square().sum((0, 1))
    bound: Tensor = (power.max() / math.cos(math.pi * (size - 1) / samples) ** len(axes)).clamp(min=1e-12)
    return bound


def split(image: Tensor, mask: Tensor, gaussian: Tensor) -> tuple[Tensor, Tensor]:
    """Split an image into its Gaussian mean, taken inside the mask only, and the rest; both are zero outside.

    Args:
        image: Shape (N, C, *S).
        mask: Shape (N, 1, *S).
        gaussian: Samples, of odd number, of any scale.
    """
    inside = mask.to(image.dtype)
    cover = blurred(inside, gaussian).clamp(min=1e-6)
    smooth = blurred(image * inside, gaussian) / cover * inside
    return smooth, image * inside - smooth


def blurred(image: Tensor, gaussian: Tensor) -> Tensor:
    """Convolve along each axis, zeros beyond the image."""
    count, dims = image.shape[1], image.ndim - 2
    convolve = functional.conv2d if dims == 2 else functional.conv3d
    for axis in range(dims):
        shape = [1] * dims
        shape[axis] = len(gaussian)
        kernel = (gaussian / gaussian.sum()).view(1, 1, *shape).expand(count, 1, *shape)
        image = convolve(image, kernel, padding=[side // 2 for side in shape], groups=count)
    return image


def single_channel(numbers: Tensor, like: Tensor) -> Tensor:
    """Shape one number a channel so that it broadcasts over (N, C, *S)."""
    return numbers.view(1, -1, *[1] * (like.ndim - 2))


def filter_norms(filters: Tensor) -> Tensor:
    """Return the length of each filter, shaped so that it divides filters of shape (F, ...)."""
    lengths: Tensor = torch.linalg.vector_norm(filters.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (filters.ndim - 1))


def unit_filters(filters: Tensor) -> Tensor:
    """Scale each filter to length 1."""
    return filters / filter_norms(filters).clamp(min=1e-12)


def soft_threshold(values: Tensor, by: Tensor) -> Tensor:
    """Move values towards 0 by `by`, and no further: the proximal step of an L1 norm."""
    return values - values.clamp(-by, by)
