"""A network over a whole volume: in slices, in exact tiles, or in blended windows.

Where a network's output depends only on what lies within its receptive field
(fixed normalisation: the generator of this package), a tile read with a halo
of that width and cut back to its core *equals* the whole volume's result, so
nothing is blended.  `apply_to_slices` and `apply_to_volume` do that.  Networks
that look at the whole of their input (instance normalisation, attention) have
no such tiles; `blend_windows` averages overlapping windows for them.  Which
kind a network is, `tiles_are_exact` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise, product
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.networks.catalogue import SameSize

Choice = TypeVar("Choice")
Kind = TypeVar("Kind", bound=np.generic)
NetworkFn = Callable[[Tensor], Tensor]
Weighting = Literal["gaussian", "constant", "smooth"]

#: Most that a tile may differ from the whole, as a share of the output's SD, for its network to count as local.
LARGEST_SEAM = 0.01
#: How much stronger that is tested than it will be seen: by so much what a tile does not see exceeds the rest.
LOUDER = 10.0
LEAST_SIDE = 8  # voxels of that test
_EXACT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what was measured
_ONE_SIZE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
#: Most pixels of one pass over slices: eight of a brain's box, one of 512 x 512; keeps memory flat.
PIXELS_AT_ONCE = 8 * 192 * 192


@dataclass(frozen=True)
class Tile:
    """Where to read, with a halo, and where to write; turns into slices.

    Attributes:
        read: First voxel and the one past the last, for each axis; may pass the
            volume's end by less than the network's multiple, to be filled with zeros.
        write: Likewise, inside the volume: the core, which no other tile writes.
    """

    read: tuple[tuple[int, int], ...]
    write: tuple[tuple[int, int], ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels to give to the network along each axis."""
        return tuple(stop - start for start, stop in self.read)

    @property
    def source(self) -> tuple[slice, ...]:
        """What to cut from the volume (numpy stops at its end by itself)."""
        return tuple(slice(start, stop) for start, stop in self.read)

    @property
    def target(self) -> tuple[slice, ...]:
        """Where the core lies in the volume."""
        return tuple(slice(start, stop) for start, stop in self.write)

    @property
    def core(self) -> tuple[slice, ...]:
        """Where the core lies in what was read."""
        return tuple(slice(start - left, stop - left) for (left, _), (start, stop) in zip(self.read, self.write))


def plan_tiles(shape: Sequence[int], *, tile: int, halo: int, multiple: int) -> list[Tile]:
    """Cut a volume into tiles whose results equal the whole's.

    Cores partition the volume.  Reads begin and end at multiples of `multiple`,
    so that the network halves its grid at the same voxels as in the whole, and
    reach `halo` beyond the core except at the volume's border.  An axis that
    fits into one tile with its halos is not cut: that would cost more.

    Args:
        shape: Voxels of the volume along each axis.
        tile: Most voxels of a core along each axis, rounded up to `multiple`.
        halo: Voxels an output voxel sees to either side.
        multiple: What the network's input sizes must be multiples of.

    Raises:
        ValueError: If a number is out of range.
    """
    if min(*shape, tile, multiple) < 1 or halo < 0:
        raise ValueError(f"shape {tuple(shape)}, tile {tile}, halo {halo}, multiple {multiple}")
    axes = [list(_cut(length, tile, halo, multiple)) for length in shape]
    return [Tile(*map(tuple, zip(*pieces, strict=True))) for pieces in product(*axes)]


def _cut(length: int, tile: int, halo: int, multiple: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield what each piece of an axis reads and writes; pieces are about equally long."""
    count = 1 if length <= tile + 2 * halo else math.ceil(length / tile)
    core = _round_up(math.ceil(length / count), multiple)
    for start, stop in pairwise([*range(0, length, core), length]):
        left = max(0, start - halo) // multiple * multiple
        right = min(_round_up(stop + halo, multiple), _round_up(length, multiple))
        yield (left, right), (start, stop)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def slice_stacks(array: NDArray[Kind], places: Sequence[int], slices: int) -> NDArray[Kind]:
    """Cut axial slices with their neighbours, as the channels of a 2.5D network.

    Beyond the first and the last slice, that slice is repeated.

    Args:
        array: Shape (C, I, J, K), an array or a memory-map; reads only the slices it needs.
        places: Indices along K.
        slices: Slices around and including each place, odd.

    Returns:
        Shape (len(places), C * slices, I, J); the slices of one channel lie together.

    Raises:
        ValueError: If `slices` is even or a place lies outside.
    """
    depth = array.shape[-1]
    if slices < 1 or slices % 2 == 0 or not all(0 <= place < depth for place in places):
        raise ValueError(f"{slices} slices (an odd number is needed) at {list(places)} of {depth}")
    around = np.add.outer(places, np.arange(slices) - slices // 2).clip(0, depth - 1)  # (N, slices)
    first = int(around.min())
    block = np.ascontiguousarray(np.moveaxis(array[..., first : int(around.max()) + 1], -1, 0))
    near: NDArray[Kind] = block[around - first].swapaxes(1, 2)  # (N, C, slices, I, J)
    return near.reshape(len(places), -1, *array.shape[1:3])


def slice_stack(array: NDArray[Kind], place: int, slices: int) -> NDArray[Kind]:
    """Cut one axial slice with its neighbours, shape (C * slices, I, J); see `slice_stacks`."""
    stack: NDArray[Kind] = slice_stacks(array, [place], slices)[0]
    return stack


def apply_to_slices(
    network_fn: NetworkFn, source: NDArray[np.float32], *, slices: int, batch: int, multiple: int
) -> NDArray[np.float32]:
    """Run a 2D or 2.5D network over every axial slice of a volume.

    Each slice goes through whole, filled up with zeros at its far ends to the
    network's multiple, so that there are no tiles to join.  Memory beside the
    result does not grow with the volume.

    Args:
        network_fn: Maps (N, C * slices, I, J) to (N, C_out, I, J), without gradients.
        source: Shape (C, I, J, K), an array or a memory-map.
        slices: Neighbouring slices that make the channels, odd; 1 for 2D.
        batch: Most slices in one pass; fewer where slices are large or memory is short.
        multiple: What the network's input sizes must be multiples of.

    Returns:
        Shape (C_out, I, J, K).

    Raises:
        ValueError: If a number is out of range or the network's output has another shape.
        ChiasmError: If one slice does not fit into memory.
    """
    if source.ndim != 4 or 0 in source.shape or batch < 1 or multiple < 1:
        raise ValueError(f"source {source.shape}, batch {batch}, multiple {multiple}")
    _, height, width, depth = source.shape
    padded = [_round_up(height, multiple), _round_up(width, multiple)]

    def run(count: int) -> NDArray[np.float32]:
        outputs = None
        for first in range(0, depth, count):
            places = range(first, min(first + count, depth))
            made = _passed(network_fn, _filled(slice_stacks(source, places, slices), padded))
            if outputs is None:
                outputs = np.empty((made.shape[1], height, width, depth), np.float32)
            outputs[..., first : places.stop] = np.moveaxis(made[..., :height, :width], 0, -1)
        assert outputs is not None
        return outputs

    most = max(1, min(batch, depth, PIXELS_AT_ONCE // math.prod(padded)))
    return _first_that_fits(run, _halvings(most, 1), f"one slice of {height}x{width}")


def apply_to_volume(
    network_fn: NetworkFn, source: NDArray[np.float32], *, tile: int, halo: int, multiple: int
) -> NDArray[np.float32]:
    """Run a 3D network over a volume, in one pass where that is no larger than a tile, else in exact tiles.

    Args:
        network_fn: Maps (1, C, *S) to (1, C_out, *S), without gradients; its
            output at a voxel must depend on `halo` voxels to either side at most.
        source: Shape (C, I, J, K), an array or a memory-map.
        tile: Most voxels of a tile's core along each axis; fewer where memory is short.
        halo: Receptive field to either side; of a chain of networks, their sum.
        multiple: What the network's input sizes must be multiples of.

    Returns:
        Shape (C_out, I, J, K), the same for every `tile`.

    Raises:
        ValueError: If a number is out of range or the network's output has another shape.
        ChiasmError: If the smallest tile does not fit into memory.
    """
    if source.ndim != 4:
        raise ValueError(f"expected a source (C, I, J, K), not {source.shape}")

    def run(tiles: list[Tile]) -> NDArray[np.float32]:
        outputs = None
        for place in tiles:
            made = _passed(network_fn, _filled(source[(slice(None), *place.source)][None], place.size))[0]
            if outputs is None:
                outputs = np.empty((len(made), *source.shape[1:]), np.float32)
            outputs[(slice(None), *place.target)] = made[(slice(None), *place.core)]
        assert outputs is not None
        return outputs

    plans: list[list[Tile]] = []
    for most in _halvings(tile, multiple):
        tiles = plan_tiles(source.shape[1:], tile=most, halo=halo, multiple=multiple)
        plans += [tiles] if tiles not in plans else []
    return _first_that_fits(run, plans, "x".join(map(str, plans[-1][0].size)) + " voxels")


def window_positions(length: int, tile: int, step: float) -> list[int]:
    """Spread windows evenly over an axis, no farther apart than a share of the window.

    Args:
        length: Voxels of the axis, at least `tile`.
        tile: Voxels of a window.
        step: Largest distance of neighbours as a share of the window, in (0, 1].

    Returns:
        First voxels, from 0 to ``length - tile``.

    Raises:
        ValueError: If a number is out of range.

    >>> window_positions(110, 64, 0.5)  # 46 voxels to cross in steps of at most 32: two of 23
    [0, 23, 46]
    """
    if not 1 <= tile <= length or not 0 < step <= 1:
        raise ValueError(f"length {length}, window {tile}, step {step}")
    gaps = math.ceil((length - tile) / (tile * step))
    return [round((length - tile) * index / gaps) for index in range(gaps + 1)] if gaps else [0]


def window_weights(window: Sequence[int], weighting: Weighting) -> NDArray[np.float32]:
    """Weigh the voxels of a window: all alike, or the middle most.

    Args:
        window: Voxels along each axis.
        weighting: "constant", or "gaussian" with an SD of an eighth of the window
            and no weight below 0.001, as MONAI does it; "smooth" is the same
            without that floor.  The floor makes jumps within half a window of the
            volume's faces, where no window has its middle.

    Returns:
        Positive weights of shape `window`.

    Raises:
        ValueError: If `weighting` is unknown.
    """
    if weighting == "constant":
        return np.ones(window, np.float32)
    if weighting not in ("gaussian", "smooth"):
        raise ValueError(f"there is no weighting {weighting!r}; it is gaussian, constant or smooth")
    axes = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (0.125 * n)) ** 2) for n in window)
    bell: NDArray[np.float64] = reduce(np.multiply.outer, axes)
    return bell.clip(min=1e-3 if weighting == "gaussian" else 0).astype(np.float32)


def blend_windows(
    network_fn: NetworkFn,
    source: NDArray[np.float32],
    *,
    window: Sequence[int],
    step: float = 0.5,
    weighting: Weighting = "gaussian",
    batch: int = 1,
) -> NDArray[np.float32]:
    """Run a network over overlapping windows of one size and average them, weighted.

    For networks whose result depends on how large their input is.  Sums are
    kept in float32 (float16 ends at 65,504, which 22 windows of 3,000 HU
    exceed) and divided by the sum of the weights at each voxel, so that a
    volume of ones comes back as ones.

    Args:
        network_fn: Maps (N, C, *window) to (N, C_out, *window), without gradients.
        source: Shape (C, *S); an axis shorter than the window is filled up with zeros.
        window: Voxels of a window along each axis.
        step: Largest distance of neighbouring windows as a share of the window.
        weighting: "gaussian", "constant" or "smooth"; see `window_weights`.
        batch: Most windows in one pass; fewer where memory is short.

    Returns:
        Shape (C_out, *S).

    Raises:
        ValueError: If a number is out of range or the network's output has another shape.
        ChiasmError: If one window does not fit into memory.
    """
    shape = source.shape[1:]
    if len(window) != len(shape) or batch < 1:
        raise ValueError(f"window {tuple(window)} over {shape}, batch {batch}")
    padded = tuple(map(max, shape, window))
    volume = _filled(source[None], padded)[0]
    origins = product(*window_origins(shape, window, step))
    boxes = [tuple(slice(o, o + w) for o, w in zip(origin, window)) for origin in origins]
    weights = window_weights(window, weighting)

    def run(count: int) -> NDArray[np.float32]:
        total, seen = None, np.zeros(padded, np.float32)
        for first in range(0, len(boxes), count):
            group = boxes[first : first + count]
            made = _passed(network_fn, np.stack([volume[(slice(None), *box)] for box in group]))
            if total is None:
                total = np.zeros((made.shape[1], *padded), np.float32)
            for box, one in zip(group, made):
                total[(slice(None), *box)] += one * weights
                seen[box] += weights
        assert total is not None
        np.divide(total, seen, out=total)
        return total[(slice(None), *map(slice, shape))]

    return _first_that_fits(run, _halvings(batch, 1), f"one window of {'x'.join(map(str, window))} voxels")


def blend_slices(
    network_fn: NetworkFn, source: NDArray[np.float32], *, slices: int, window: Sequence[int]
) -> NDArray[np.float32]:
    """Run a 2D or 2.5D network that takes one size only over every axial slice, in windows that are blended.

    Args:
        network_fn: Maps (N, C * slices, *window) to (N, C_out, *window), without gradients.
        source: Shape (C, I, J, K).
        slices: Neighbouring slices that make the channels, odd; 1 for 2D.
        window: Pixels of a window along I and J.

    Returns:
        Shape (C_out, I, J, K).

    Raises:
        ValueError: If a number is out of range or the network's output has another shape.
        ChiasmError: If one window does not fit into memory.
    """
    stacks = (slice_stack(source, place, slices) for place in range(source.shape[-1]))
    return np.stack([blend_windows(network_fn, one, window=window, weighting="smooth") for one in stacks], axis=-1)


def window_origins(shape: Sequence[int], window: Sequence[int], step: float = 0.5) -> list[list[int]]:
    """Return where the windows of `blend_windows` begin, along each axis of a volume.

    >>> window_origins([110, 20], [64, 64])
    [[0, 23, 46], [0]]
    """
    return [window_positions(max(length, size), size, step) for length, size in zip(shape, window, strict=True)]


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
    """Tell, by a measurement at the first call, whether a 3D network gives in tiles what it gives in one pass.

    Along each axis in turn, a bar of noise is cut where a tile may be cut, and
    the network must not notice: what lies beyond the cut is ten times as
    strong, so that a mean or an attention over the whole input would show it.
    The networks of this package are local by design, which their tests show.

    Args:
        network: In evaluation mode; states its needs and its receptive field, as `make_network` sees to.
        channels: Of its input.
    """
    if type(network).__module__.partition(".")[0] == __package__.partition(".")[0]:
        return True
    if network not in _EXACT:
        _EXACT[network] = _no_cut_shows(network, channels)
    return _EXACT[network]


def takes_one_size(network: nn.Module, channels: int, patch: Sequence[int]) -> bool:
    """Tell, by a pass over an empty image at the first call, whether a network takes no size but that of its patches.

    Transformers that learn an embedding of each place do.

    Args:
        network: As for `tiles_are_exact`, in two or three dimensions.
        channels: Of its input.
        patch: A size that it takes.
    """
    if type(network).__module__.partition(".")[0] == __package__.partition(".")[0] or not hasattr(network, "margin"):
        return False
    if network not in _ONE_SIZE:
        _ONE_SIZE[network] = _fails_on_longer(SameSize(network), channels, patch)
    return _ONE_SIZE[network]


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
    """Return how far a bar's output changes where a cut of its end must not be seen, as a share of the output's SD."""
    multiple, smallest, margin = network.needs
    side = _round_up(max(smallest, 2 * margin + 1, LEAST_SIDE), multiple)
    cut_off = _round_up(LEAST_SIDE, multiple)
    halo = _round_up(network.receptive_field, multiple)
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


def _halvings(size: int, least: int) -> list[int]:
    """Return `size` and its halves, down to `least` where `size` is larger."""
    sizes = [size]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    return sizes


def _filled(images: NDArray[np.generic], spatial: Sequence[int]) -> NDArray[np.float32]:
    """Copy (N, C, *S) to float32 and fill it up with zeros at the far ends to (N, C, *spatial)."""
    filled = np.zeros((*images.shape[:2], *spatial), np.float32)
    filled[tuple(map(slice, images.shape))] = images
    return filled


def _passed(network_fn: NetworkFn, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Send images through the network and back to numpy, float32."""
    made = network_fn(torch.from_numpy(images))
    if made.ndim != images.ndim or made.shape[0] != len(images) or made.shape[2:] != images.shape[2:]:
        raise ValueError(f"the network turned {images.shape} into {tuple(made.shape)}: only channels may change")
    array: NDArray[np.float32] = made.detach().to("cpu", torch.float32).numpy()
    return array


def _first_that_fits(
    run: Callable[[Choice], NDArray[np.float32]], choices: Sequence[Choice], smallest: str
) -> NDArray[np.float32]:
    """Run with the first of ever smaller choices that does not run out of memory."""
    for choice in choices:
        try:
            return run(choice)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if choice is choices[-1]:
                raise ChiasmError(
                    f"memory ran out even for {smallest}",
                    reason="out-of-memory",
                    hint="Close other programs, use more memory, or train a smaller network: chiasm train --size.",
                ) from error
    raise ValueError("there is nothing to choose from")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch or numpy ran out of memory; torch on a CPU says so only in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)
