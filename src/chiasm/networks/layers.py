"""Tools of the literature's networks: layers by number of axes, and the receptive field of a chain of them.

`generator.reach` knows our own networks' three layers; here a layer is any size,
stride and padding, so that poolings and strided convolutions of 4 and 5 count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, Callable[[Tensor, int], Tensor]] = {2: functional.max_pool2d, 3: functional.max_pool3d}


class Step(NamedTuple):
    """One layer along one axis.

    Attributes:
        size: Voxels of its kernel or window.
        stride: Voxels between two windows.
        padding: Zeros put before the first voxel; taken away from the output where `up`.
        up: Whether the layer is a transposed convolution (or a linear
            interpolation, which is one of size 2s, stride s, padding s / 2).
    """

    size: int
    stride: int = 1
    padding: int = 0
    up: bool = False


def seen(steps: Sequence[Step], first: int, last: int) -> tuple[int, int]:
    """Return which input voxels, first and last, the output voxels `first` to `last` depend on.

    Walks back from the output: a window of size k, stride s and padding p turns
    o into so-p .. so-p+k-1; transposed, voxel i writes to si-p .. si-p+k-1, so o
    becomes the i between (o+p-k+1) / s and (o+p) / s.

    Args:
        steps: The chain, input first.
        first: Output voxel.
        last: Output voxel, at least `first`.

    >>> seen([Step(2, 2), Step(3, 1, 1)], 0, 0)  # a pooling, then a convolution: 0 <- -1..1 <- -2..3
    (-2, 3)
    """
    for size, stride, padding, up in reversed(steps):
        if up:
            first, last = -(-(first + padding - size + 1) // stride), (last + padding) // stride
        else:
            first, last = stride * first - padding, stride * last - padding + size - 1
    return first, last


def farthest(steps: Sequence[Step], multiple: int) -> int:
    """Return how far from an output voxel the farthest input voxel lies that it depends on.

    The distance depends on where the voxel lies on the coarsest grid, so the
    largest over all such places is returned.

    Args:
        steps: The deepest way through a network whose output has its input's size.
        multiple: Voxels of the input to one of the coarsest grid.
    """
    spans = [(place, *seen(steps, place, place)) for place in range(multiple)]
    return max(max(place - first, last - place) for place, first, last in spans)


def check_numbers(in_channels: int, dims: int, scale: float) -> None:
    """Refuse numbers that no network can be built with.

    Raises:
        ValueError: If `dims` is neither 2 nor 3, or another number is not positive.
    """
    if dims not in (2, 3) or in_channels < 1 or scale <= 0:
        raise ValueError(f"dims is 2 or 3, in_channels and scale positive, not {dims}, {in_channels}, {scale}")


def scaled(widths: Iterable[int], scale: float) -> list[int]:
    """Return a share of published channels, at least one each.

    >>> scaled((64, 128, 3), 0.125)
    [8, 16, 1]
    """
    return [max(1, round(width * scale)) for width in widths]


def check_discriminator(images: Tensor, dims: int, smallest: int) -> None:
    """Refuse images that are too small for a discriminator.

    Args:
        images: Shape (N, C, *spatial).
        dims: Spatial axes of the discriminator.
        smallest: Fewest voxels along each spatial axis.

    Raises:
        ValueError: If there is another number of axes, or one is shorter.
    """
    if images.ndim != dims + 2 or min(images.shape[2:]) < smallest:
        raise ValueError(f"expected {dims} axes of at least {smallest}, not {tuple(images.shape[2:])}")


def draw(network: nn.Module, sd: float) -> None:
    """Draw all weights anew from a normal distribution about 0 (gains of a normalisation about 1); biases are 0."""
    for module in network.modules():
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        if weight is not None:
            nn.init.normal_(weight, 1.0 if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) else 0.0, sd)
        if bias is not None:
            nn.init.zeros_(bias)


def draw_he(network: nn.Module) -> None:
    """Draw all convolutions' weights anew with variance 2 / n, n the inputs of one output voxel; biases are 0.

    A transposed convolution of size k and stride s has (k / s) ** dims times its
    channels as inputs, which torch's own fan-in is not.

    Reference:
        He et al., arXiv:1502.01852, equation 10.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            inputs = module.weight[0].numel()
        elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs = module.weight[:, 0].numel()
            for stride in module.stride:
                inputs //= stride
        else:
            continue
        nn.init.normal_(module.weight, 0.0, (2 / inputs) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
