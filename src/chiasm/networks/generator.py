"""The generator: a U-Net of residual double convolutions, in two or three dimensions.

After Nie et al., arXiv:1907.03297 ("a fully convolutional network, U-Net like"),
whose layer counts are not public; blocks, widths and skips are this project's.

    source -> block ------------------------------------ join block -> last -> + skip(source)
                \\ down                               up /
                 block ------------------ join block
                    \\ down            up /
                     block (widest, deepest)

Nothing here depends on how large the input is (batch normalisation or none,
never instance normalisation), so tiles with a halo equal the whole volume.

Folding (pixel unshuffle, Shi et al. 2016, arXiv:1609.05158) turns each block of
`fold` voxels an axis into channels before the first convolution and back after
the last, so that the widest grid, where most time goes, has a quarter of the
voxels (an eighth in 3D) and every kernel sees twice as far.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

Dims = Literal[2, 3]
Norm = Literal["batch", "none"]
Fold = Literal[1, 2]
Layer = Literal["convolution", "down", "up", "fold", "unfold"]

#: Points of the look-up table behind the "lookup" skip.
KNOTS = 64

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DROPOUT: dict[int, type[nn.Dropout2d] | type[nn.Dropout3d]] = {2: nn.Dropout2d, 3: nn.Dropout3d}


def upsample(features: Tensor) -> Tensor:
    """Double every spatial axis by linear interpolation (no dots, which transposed convolution leaves).

    Args:
        features: Shape (N, C, I, J) or (N, C, I, J, K).
    """
    mode = "bilinear" if features.ndim == 4 else "trilinear"
    return functional.interpolate(features, scale_factor=2.0, mode=mode, align_corners=False)


def join_channels(first: Tensor, second: Tensor) -> Tensor:
    """Lay two tensors side by side along their channels, as `torch.cat` does, with gradients that are dense.

    `torch.cat` hands back slices of one gradient.  Layers before it take up to 20 times as long on slices
    (batch normalisation, channels last, torch 2.13 on a CPU), so each is copied once: values do not change.

    Args:
        first: Shape (N, C, *S).
        second: Shape (N, D, *S).

    Returns:
        Shape (N, C + D, *S).
    """
    if not torch.is_grad_enabled() or not (first.requires_grad or second.requires_grad):
        return torch.cat([first, second], dim=1)
    joined: Tensor = _Joined.apply(first, second)  # type: ignore[no-untyped-call]
    return joined


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.channels = first.shape[1], second.shape[1]
        return torch.cat([first, second], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        last = torch.channels_last if gradient.ndim == 4 else torch.channels_last_3d
        memory = torch.contiguous_format if gradient.is_contiguous() else last
        return tuple(part.contiguous(memory_format=memory) for part in torch.split(gradient, ctx.channels, dim=1))


def reach(path: Sequence[Layer], multiple: int, fold: Fold = 1) -> int:
    """Return how far from an output voxel the farthest input voxel lies that it depends on.

    Walks back from the output, keeping the first and the last voxel needed: a
    convolution of 3 needs one more on each side, a "down" (3, stride 2) turns
    o into 2o-1 .. 2o+1, an "up" (linear, factor 2) turns 2c into c-1 .. c and
    2c+1 into c .. c+1; a "fold" makes voxel o of 2o .. 2o+1, an "unfold" voxel
    o of o // 2 (for a fold of 2).  The distance depends on where the voxel lies on the
    coarse grid, so the largest over all such places is returned.

    Args:
        path: The layers of the deepest way through the network, input first.
        multiple: Voxels of the input to one of the coarsest grid.
        fold: Of 2, the path is between a "fold" and an "unfold".

    Returns:
        Voxels on either side.

    >>> reach(["convolution", "convolution"], 1)
    2
    """
    farthest, layers = 0, path if fold == 1 else ("fold", *path, "unfold")
    for place in range(multiple):
        first = last = place
        for layer in reversed(layers):
            if layer == "convolution":
                first, last = first - 1, last + 1
            else:
                first, last = _needed(layer, first, last)
        farthest = max(farthest, place - first, last - place)
    return farthest


def _needed(layer: Layer, first: int, last: int) -> tuple[int, int]:
    """Return which voxels of a layer that changes the grid by 2 are needed for its voxels `first` to `last`."""
    return {
        "down": (2 * first - 1, 2 * last + 1),
        "up": ((first - 1) // 2, (last + 1) // 2),
        "fold": (2 * first, 2 * last + 1),
        "unfold": (first // 2, last // 2),
    }[layer]


def fold_voxels(image: Tensor, by: int) -> Tensor:
    """Turn blocks of `by` voxels an axis into channels: (N, C, *S) to (N, C * by ** dims, *S / by).

    Args:
        image: Spatial sizes are multiples of `by`.
        by: 1 changes nothing.

    >>> fold_voxels(torch.arange(4.0).reshape(1, 1, 2, 2), 2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    if by == 1:
        return image
    if has_torch_function_unary(image):
        return handle_torch_function(fold_voxels, (image,), image, by)
    n, channels, *spatial = image.shape
    dims = len(spatial)
    split = image.reshape(n, channels, *(size for axis in spatial for size in (axis // by, by)))
    inner, outer = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
    folded = split.permute(0, 1, *inner, *outer)
    return folded.reshape(n, channels * by**dims, *(axis // by for axis in spatial))


def unfold_voxels(features: Tensor, by: int) -> Tensor:
    """Turn channels back into blocks of `by` voxels an axis, the inverse of `fold_voxels`.

    Args:
        features: Shape (N, C * by ** dims, *S).
        by: 1 changes nothing.

    Returns:
        Shape (N, C, *S * by).
    """
    if by == 1:
        return features
    if has_torch_function_unary(features):
        return handle_torch_function(unfold_voxels, (features,), features, by)
    n, channels, *spatial = features.shape
    dims = len(spatial)
    split = features.reshape(n, channels // by**dims, *[by] * dims, *spatial)
    axes = (axis for place in range(2, 2 + dims) for axis in (place + dims, place))
    return split.permute(0, 1, *axes).reshape(n, -1, *(axis * by for axis in spatial))


def check_sizes(spatial: Sequence[int], dims: int, multiple: int) -> None:
    """Refuse sizes that a network cannot take.

    Args:
        spatial: Voxels along each spatial axis.
        dims: Spatial axes of the network.
        multiple: Each size must be a multiple of it.

    Raises:
        ValueError: If there is another number of axes, or a size is 0 or not a multiple.
    """
    if len(spatial) != dims:
        raise ValueError(f"the network has {dims} spatial axes, the input {len(spatial)}: {tuple(spatial)}")
    if any(size % multiple or not size for size in spatial):
        raise ValueError(f"spatial sizes must be multiples of {multiple}, not {tuple(spatial)}")


class DoubleConvolution(nn.Module):
    """Convolve by 3, rectify, convolve by 3; each normalised, the second left for its caller to rectify."""

    def __init__(self, inputs: int, outputs: int, *, dims: Dims, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        convolution, plain = CONVOLUTION[dims], norm == "none"
        self.first = convolution(inputs, outputs, 3, stride, padding=1, bias=plain)
        self.first_norm = nn.Identity() if plain else _NORM[dims](outputs)
        self.second = convolution(outputs, outputs, 3, padding=1, bias=plain)
        self.second_norm = nn.Identity() if plain else _NORM[dims](outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, *S) to (N, outputs, *S / stride)."""
        inner = functional.relu(self.first_norm(self.first(features)), inplace=True)
        outer: Tensor = self.second_norm(self.second(inner))
        return outer


class ResidualBlock(nn.Module):
    """A double convolution that corrects a 1-convolution of its input; stride 2 halves the grid."""

    def __init__(self, inputs: int, outputs: int, *, dims: Dims, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.body = DoubleConvolution(inputs, outputs, dims=dims, norm=norm, stride=stride)
        self.shortcut = CONVOLUTION[dims](inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, *S) to (N, outputs, *S / stride)."""
        # A strided 1-convolution takes these voxels too, but torch 2.13 crashes in its backward pass on
        # channels-last float32 (AVX-512 CPUs); so they are taken first.
        whole, step = slice(None), slice(None, None, self.stride)
        kept = features[(whole, whole, *[step] * (features.ndim - 2))]
        return functional.relu(self.body(features) + self.shortcut(kept), inplace=True)


class Join(nn.Module):
    """Upsample coarse features to the finer grid, and correct them with a double convolution that sees both.

    The 1-convolution stands before the interpolation: the two commute exactly,
    and on the coarse grid it costs a quarter (an eighth in 3D).
    """

    def __init__(self, coarse: int, fine: int, *, dims: Dims, norm: Norm) -> None:
        super().__init__()
        self.narrow = CONVOLUTION[dims](coarse, fine, 1)
        self.body = DoubleConvolution(2 * fine, fine, dims=dims, norm=norm)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Map (N, coarse, *S / 2) and (N, fine, *S) to (N, fine, *S)."""
        raised = upsample(self.narrow(coarse))
        return functional.relu(self.body(join_channels(raised, fine)) + raised, inplace=True)


def _check_numbers(in_channels: int, widths: Sequence[int], skip_channel: int, dropout: float) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: If one is.
    """
    if not widths or min(in_channels, *widths) < 1 or not 0 <= skip_channel < in_channels:
        raise ValueError(f"in_channels {in_channels}, widths {tuple(widths)}, skip_channel {skip_channel}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is at least 0 and below 1, not {dropout}")


class Skip(NamedTuple):
    """The image to which a network's output is added.

    Attributes:
        kind: Nothing, the source channel itself ("source", where both share a contrast family), or that channel sent
            through a look-up table ("lookup", see `ResidualGenerator.set_lookup`).
        channel: The source channel that skips: the middle slice in 2.5D.
    """

    kind: Literal["none", "source", "lookup"] = "none"
    channel: int = 0


NO_SKIP = Skip()


class ResidualGenerator(nn.Module):
    """Make the target image from the source.

    Args:
        in_channels: Source channels: modalities, times slices in 2.5D.
        widths: Channels at each level, finest first; one level per halving plus one.
        dims: Spatial axes of a convolution: 2 (also for 2.5D) or 3.
        norm: "batch" (fixed at inference) or "none".
        skip: What the network's output is added to.
        dropout: Share of each level's channels that training leaves out at random, in [0, 1).
        fold: Voxels of an axis that become channels before the first convolution: 1 or 2.

    Attributes:
        size_multiple: Spatial sizes must be multiples of this, and tiles must
            start at multiples of it to equal the whole.
        receptive_field: Voxels on each side of a tile that must be thrown away.

    Raises:
        ValueError: If a number is out of range.
    """

    lookup_edges: Tensor
    lookup_values: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        widths: Sequence[int],
        dims: Dims,
        norm: Norm = "batch",
        skip: Skip = NO_SKIP,
        dropout: float = 0.0,
        fold: Fold = 1,
    ) -> None:
        super().__init__()
        if dims not in (2, 3) or norm not in ("batch", "none") or skip.kind not in ("none", "source", "lookup"):
            raise ValueError(f"dims is 2 or 3, norm batch or none, skip none, source or lookup: {dims}, {norm}, {skip}")
        if fold not in (1, 2):
            raise ValueError(f"fold is 1 or 2, not {fold}")
        _check_numbers(in_channels, widths, skip.channel, dropout)
        self.in_channels, self.dims, self.skip = in_channels, dims, skip
        self.fold = fold
        self.size_multiple = fold * 2 ** (len(widths) - 1)

        self.stem = ResidualBlock(in_channels * fold**dims, widths[0], dims=dims, norm=norm)
        self.downs = nn.ModuleList(ResidualBlock(a, b, dims=dims, norm=norm, stride=2) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(Join(b, a, dims=dims, norm=norm) for a, b in reversed(list(pairwise(widths))))
        self.dropout = _DROPOUT[dims](dropout)
        self.last = CONVOLUTION[dims](widths[0], fold**dims, 1)
        if skip.kind != "none":  # training starts from the skip alone
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]  # None only without a bias
        if skip.kind == "lookup":
            self.register_buffer("lookup_edges", torch.linspace(0.0, 1.0, KNOTS))
            self.register_buffer("lookup_values", torch.zeros(KNOTS))

    @property
    def levels(self) -> tuple[nn.Module, ...]:
        """The modules that make each level's features, in the order of the pass; dropout acts on their output."""
        return (self.stem, *self.downs, *self.ups)

    @property
    def receptive_field(self) -> int:
        """Voxels an output voxel sees to either side, exactly: the halo that makes tiles equal the whole."""
        block: list[Layer] = ["convolution", "convolution"]
        down: list[Layer] = ["down", "convolution"]
        up: list[Layer] = ["up", *block]
        depth = len(self.downs)
        return reach([*block, *down * depth, *up * depth], self.size_multiple, self.fold)

    def set_lookup(self, x: Tensor, y: Tensor) -> None:
        """Set the table of the "lookup" skip: linear between knots, constant beyond the first and last.

        Until it is set, the table is zero everywhere.

        Args:
            x: Source intensities in normalised units, strictly rising, shape (64,).
            y: The target intensity expected at each, shape (64,).

        Raises:
            ValueError: If the network has no such skip, or the knots are not 64
                finite pairs with strictly rising `x`.
        """
        if self.skip.kind != "lookup":
            raise ValueError(f"the network's skip is {self.skip.kind!r}, not 'lookup'")
        if x.shape != (KNOTS,) or y.shape != (KNOTS,):
            raise ValueError(f"the look-up has {KNOTS} knots, not {tuple(x.shape)} and {tuple(y.shape)}")
        edges, values = x.to(self.lookup_edges), y.to(self.lookup_values)
        if not (torch.isfinite(edges).all() and torch.isfinite(values).all() and (edges.diff() > 0).all()):
            raise ValueError("the look-up's knots must be finite and strictly rising in x")
        self.lookup_edges.copy_(edges)
        self.lookup_values.copy_(values)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *S), in its dtype and normalised units.

        Raises:
            ValueError: If the sizes are not multiples of `size_multiple`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        features = self.dropout(self.stem(fold_voxels(source, self.fold)))
        fine = []
        for down in self.downs:
            fine.append(features)
            features = self.dropout(down(features))
        for up in self.ups:
            features = self.dropout(up(features, fine.pop()))
        prediction = unfold_voxels(self.last(features), self.fold).to(source.dtype)
        if self.skip.kind == "none":
            return prediction
        through = source[:, self.skip.channel : self.skip.channel + 1]
        return prediction + (through if self.skip.kind == "source" else self._look_up(through))

    def _look_up(self, intensity: Tensor) -> Tensor:
        edges, values = self.lookup_edges, self.lookup_values
        right = torch.bucketize(intensity.detach().contiguous(), edges).clamp(1, KNOTS - 1)
        left_edge, left_value = edges.take(right - 1), values.take(right - 1)
        share = ((intensity - left_edge) / (edges.take(right) - left_edge)).clamp(0, 1)
        return torch.lerp(left_value, values.take(right), share)
