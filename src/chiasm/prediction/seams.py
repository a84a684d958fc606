"""Whether a network gives the same result in tiles as in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from chiasm.networks.catalogue import SameSize
from chiasm.prediction.tiling import round_up
from chiasm.prediction.windows import window_origins

#: Most that a tile may differ from the whole, as a share of the output's SD, for its network to count as local.
LARGEST_SEAM = 0.01
#: How much stronger that is tested than it will be seen: by so much what a tile does not see exceeds the rest.
LOUDER = 10.0
LEAST_SIDE = 8  # voxels of that test
_EXACT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what was measured
_ONE_SIZE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def seam_of(image: NDArray[np.float32], mask: NDArray[np.bool_], window: Sequence[int]) -> float | None:
    """Compare the jumps across the borders of blended windows with those elsewhere.

    A jump is how far the step from a voxel to the next one differs from the
    mean of the steps before and after it.

    Args:
        image: What `blend_windows` made, with its usual step, shape (*S).
        mask: Voxels that count, same shape.
        window: Voxels of a window along each axis, or along the first ones.

    Returns:
        Mean jump across borders over that elsewhere, of the axis where it is
        largest: about 1 where no border shows; None where no border lies inside
        the mask.
    """
    ratios = []
    for axis, starts in enumerate(window_origins(image.shape[: len(window)], window)):
        steps = np.diff(np.moveaxis(image, axis, 0), axis=0)
        jumps = np.abs(steps[1:-1] - (steps[:-2] + steps[2:]) / 2)
        inside = np.moveaxis(mask, axis, 0)
        valid = inside[:-3] & inside[1:-2] & inside[2:-1] & inside[3:]
        ends = {*starts, *(start + window[axis] for start in starts)}
        at_border = np.isin(np.arange(2, len(jumps) + 2), sorted(ends))
        across, usual = (jumps[where][valid[where]] for where in (at_border, ~at_border))
        if across.size and usual.any():
            ratios.append(float(across.mean() / usual.mean()))
    return max(ratios, default=None)


def tiles_are_exact(network: nn.Module, channels: int) -> bool:
    """Find, by a measurement at the first call, whether a 3D network gives the same in tiles as in one pass.

    Along each axis in turn, a bar of noise is cut where a tile may be cut, and
    the network must not notice: what lies beyond the cut is ten times as
    strong, so that a mean or an attention over the whole input would show it.
    The networks of this package are local by design, which their tests show.

    Args:
        network: In evaluation mode; states its needs and its receptive field, as `make_network` sees to.
        channels: Of its input.
    """
    if is_of_this_package(network):
        return True
    if network not in _EXACT:
        _EXACT[network] = _no_cut_shows(network, channels)
    return _EXACT[network]


def takes_one_size(network: nn.Module, channels: int, patch: Sequence[int]) -> bool:
    """Find, by a pass over an empty image at the first call, whether a network accepts only the size of its patches.

    This is true for transformers that learn an embedding of each place.

    Args:
        network: As for `tiles_are_exact`, in two or three dimensions.
        channels: Of its input.
        patch: A size that it takes.
    """
    if is_of_this_package(network) or not hasattr(network, "margin"):
        return False
    if network not in _ONE_SIZE:
        _ONE_SIZE[network] = _fails_on_longer(SameSize(network), channels, patch)
    return _ONE_SIZE[network]


def is_of_this_package(network: nn.Module) -> bool:
    """Return whether a network is one of this package, whose needs and receptive field its tests show."""
    return type(network).__module__.partition(".")[0] == __package__.partition(".")[0]


def _fails_on_longer(network: SameSize, channels: int, patch: Sequence[int]) -> bool:
    longer = (patch[0] + network.size_multiple, *patch[1:])
    try:
        with torch.inference_mode():
            network(torch.zeros(1, channels, *longer, device=_device_of(network)))
    except (RuntimeError, TypeError, ValueError):
        return True
    return False


def _device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _no_cut_shows(network: nn.Module, channels: int) -> bool:
    if not hasattr(network, "margin"):
        return False  # it states nothing
    whole = SameSize(network)
    try:
        return all(_cut_shows(whole, channels, axis) < LARGEST_SEAM for axis in range(3))
    except (RuntimeError, TypeError, ValueError):  # it takes no other size than its patch
        return False


def _cut_shows(network: SameSize, channels: int, axis: int) -> float:
    """Return how much a bar's output changes beyond the reach of a cut at its end, as a share of the output's SD."""
    multiple, smallest, margin = network.needs
    side = round_up(max(smallest, 2 * margin + 1, LEAST_SIDE), multiple)
    cut_off = round_up(LEAST_SIDE, multiple)
    halo = round_up(network.receptive_field, multiple)
    shape = [side] * 3
    shape[axis] += cut_off + halo
    bar = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(0))
    bar.narrow(2 + axis, 0, cut_off).mul_(LOUDER).add_(LOUDER)
    bar = bar.to(_device_of(network))
    with torch.inference_mode():
        whole = network(bar)
        tile = network(bar.narrow(2 + axis, cut_off, halo + side).contiguous())
    wanted, found = whole.narrow(2 + axis, cut_off + halo, side), tile.narrow(2 + axis, halo, side)
    return float((found - wanted).abs().max() / wanted.std().clamp(min=1e-12))
