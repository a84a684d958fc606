"""Networks as a user might bring them."""

from __future__ import annotations

from torch import Tensor, nn


class Plain(nn.Module):
    """One convolution that keeps the contract."""

    size_multiple, smallest, receptive_field = 1, 1, 1

    def __init__(self, *, in_channels: int, dims: int, width: int = 4) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.body = nn.Sequential(kind(in_channels, width, 3, padding=1), nn.ReLU(), kind(width, 1, 1))

    def forward(self, source: Tensor) -> Tensor:
        """Map (N, C, *S) to (N, 1, *S)."""
        made: Tensor = self.body(source)
        return made


class TwoChannels(Plain):
    """One that does not: two channels out."""

    def forward(self, source: Tensor) -> Tensor:
        """Map (N, C, *S) to (N, 2, *S)."""
        return super().forward(source).repeat(1, 2, *[1] * (source.ndim - 2))


def not_a_network(*, in_channels: int, dims: int) -> str:
    """Return what is none."""
    return f"{in_channels} {dims}"
