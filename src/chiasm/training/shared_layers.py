"""Layers that act on the samples of all processes as on one batch: batch normalisation and dropout.

torch's SyncBatchNorm refuses tensors on the CPU; this one takes any, and its sums can be differentiated twice.  Dropout
draws for the whole batch, and each process takes what belongs to its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chiasm.training import ranks


def share_layers(network: nn.Module, samples: int) -> None:
    """Let a network learn as if it saw the samples of all processes, where there are several.

    Args:
        network: Changed in place.
        samples: Of the whole batch.
    """
    if ranks.count() == 1:
        return
    for part in network.modules():
        for kind, shared in _SHARED.items():
            if type(part) is kind:
                part.__class__ = shared
        if isinstance(part, _SharedDropout):
            part.samples = samples


class _Shared2d(nn.BatchNorm2d):
    """Of images, by the samples of all processes."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        return _normalise(self, input) if self.training else super().forward(input)


class _Shared3d(nn.BatchNorm3d):
    """Of volumes, by the samples of all processes."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input) if self.training else super().forward(input)


def _normalise(norm: nn.BatchNorm2d | nn.BatchNorm3d, features: Tensor) -> Tensor:
    """Normalise (N, C, *S) channel by channel, and follow mean and variance as torch does."""
    values = features.float()
    axes = [axis for axis in range(values.ndim) if axis != 1]
    shape = (1, -1, *[1] * (values.ndim - 2))
    size = values.numel() // values.shape[1]
    voxels, sums = ranks.total(torch.stack([values.new_full((values.shape[1],), size), values.sum(axes)]))
    mean = sums / voxels
    centred = values - mean.view(shape)
    variance = ranks.total(centred.square().sum(axes)) / voxels
    _follow(norm, mean.detach(), (variance * voxels / (voxels - 1).clamp(min=1)).detach())
    normed = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.view(shape) + norm.bias.view(shape)
    made: Tensor = normed.to(features.dtype)
    return made


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d | nn.BatchNorm3d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of the batch."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:  # a plain mean of all batches
        norm.running_mean.add_((mean - norm.running_mean) / norm.num_batches_tracked)
        norm.running_var.add_((variance - norm.running_var) / norm.num_batches_tracked)
        return
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance, share)


class _SharedDropout(nn.Module):
    """Dropout that draws for the whole batch."""

    samples: int
    p: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        drawn = self._blank(input).bernoulli_(1 - self.p).div_(1 - self.p)
        return input * drawn[ranks.rank() :: ranks.count()]

    def _blank(self, features: Tensor) -> Tensor:
        """Return a tensor to draw into, laid as torch lays its own: a number for each channel of each sample."""
        return features.new_empty((self.samples, features.shape[1], *[1] * (features.ndim - 2)))


class _SharedDropoutOfVoxels(_SharedDropout):
    def _blank(self, features: Tensor) -> Tensor:
        whole = features.new_empty((1,)).expand(self.samples, *features.shape[1:])
        last = torch.channels_last if features.ndim == 4 else torch.channels_last_3d
        is_last = features.ndim > 3 and features.is_contiguous(memory_format=last) and not features.is_contiguous()
        return torch.empty_like(whole, memory_format=last if is_last else torch.contiguous_format)


_SHARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: _Shared2d,
    nn.BatchNorm3d: _Shared3d,
    nn.Dropout: _SharedDropoutOfVoxels,
    nn.Dropout2d: _SharedDropout,
    nn.Dropout3d: _SharedDropout,
}
