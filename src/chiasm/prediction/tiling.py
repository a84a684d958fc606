"""A network over a whole volume: in slices, in exact tiles, or in blended windows.

Where a network's output depends only on what lies within its receptive field
(fixed normalisation: the generator of this package), a tile read with a halo
of that width and cut back to its core *equals* the whole volume's result, so
nothing is blended.  `apply_inside` and `apply_to_volume` do that.  Networks
that look at the whole of their input (instance normalisation, attention) have
no such tiles; `blend_windows` averages overlapping windows for them.  Which
kind a network is, `tiles_are_exact` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chiasm.errors import ChiasmError
from chiasm.prediction.watching import passes

Choice = TypeVar("Choice")
Scalar = TypeVar("Scalar", bound=np.generic)
NetworkFn = Callable[[Tensor], Tensor]
Piece = tuple[tuple[int, int], tuple[int, int]]  # of an axis: what a tile reads, and what it writes

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
    reach `halo` beyond the core except at the volume's border.  Of all ways to
    cut, the one that reads least is taken: long tiles, cut along few axes; of equals, the one nearest to cubes.

    Args:
        shape: Voxels of the volume along each axis.
        tile: Side of a cube; no tile reads more voxels than that cube would with its halos.
        halo: Voxels an output voxel sees to either side.
        multiple: What the network's input sizes must be multiples of.

    Raises:
        ValueError: If a number is out of range.
    """
    if min(*shape, tile, multiple) < 1 or halo < 0:
        raise ValueError(f"shape {tuple(shape)}, tile {tile}, halo {halo}, multiple {multiple}")
    side = round_up(tile, multiple)
    with_halos = side + 2 * round_up(halo, multiple)
    most = math.prod(min(round_up(length, multiple), with_halos) for length in shape)
    ways = [_ways_to_cut(length, 2 * math.ceil(length / side), halo, multiple) for length in shape]
    fitting = (cuts for cuts in product(*ways) if math.prod(cut.longest for cut in cuts) <= most)
    least = min(fitting, key=lambda cuts: (math.prod(cut.total for cut in cuts), max(cut.longest for cut in cuts)))
    return [Tile(*map(tuple, zip(*pieces, strict=True))) for pieces in product(*(cut.pieces for cut in least))]


class _AxisCut(NamedTuple):
    """A way to cut an axis: its pieces, and how many voxels the longest piece and all pieces read."""

    pieces: list[Piece]
    longest: int
    total: int


def _ways_to_cut(length: int, most: int, halo: int, multiple: int) -> list[_AxisCut]:
    """Cut an axis into one piece, into two and so on up to `most`."""
    ways = [list(_cut(length, count, halo, multiple)) for count in range(1, most + 1)]
    reads = [[stop - start for (start, stop), _ in pieces] for pieces in ways]
    return [_AxisCut(pieces, max(read), sum(read)) for pieces, read in zip(ways, reads)]


def _cut(length: int, count: int, halo: int, multiple: int) -> Iterator[Piece]:
    """Yield what each piece of an axis reads and writes; pieces are about equally long."""
    core = round_up(math.ceil(length / count), multiple)
    for start, stop in pairwise([*range(0, length, core), length]):
        left = max(0, start - halo) // multiple * multiple
        right = min(round_up(stop + halo, multiple), round_up(length, multiple))
        yield (left, right), (start, stop)


def round_up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `length`."""
    return -(-length // multiple) * multiple


def slice_stacks(array: NDArray[Scalar], places: Sequence[int], slices: int) -> NDArray[Scalar]:
    """Cut slices along K with their neighbours, as the channels of a 2.5D network.

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
    near: NDArray[Scalar] = block[around - first].swapaxes(1, 2)  # (N, C, slices, I, J)
    return near.reshape(len(places), -1, *array.shape[1:3])


def slice_stack(array: NDArray[Scalar], place: int, slices: int) -> NDArray[Scalar]:
    """Cut one slice with its neighbours, shape (C * slices, I, J); see `slice_stacks`."""
    stack: NDArray[Scalar] = slice_stacks(array, [place], slices)[0]
    return stack


def apply_inside(
    network_fn: NetworkFn,
    sources: Sequence[NDArray[Any]],
    inside: NDArray[np.bool_],
    *,
    slices: int,
    batch: int,
    multiple: int,
) -> NDArray[np.float32]:
    """Run a 2D or 2.5D network over the slices along K that hold voxels of a mask, and keep only those voxels.

    Each slice goes through whole, filled up with zeros at its far ends to the
    network's multiple, so that there are no tiles to join.  Memory beside the
    result does not grow with the volume.

    Args:
        network_fn: Maps (N, C * slices, I, J) to (N, C_out, I, J), without gradients.
        sources: What the network sees, one after the other: arrays or memory-maps of shape (C, I, J, K).
        inside: Shape (I, J, K), not empty.
        slices: Neighbouring slices that make the channels, odd; 1 for 2D.
        batch: Most slices in one pass; fewer if slices are large or memory is short.
        multiple: What the network's input sizes must be multiples of.

    Returns:
        Shape (C_out, n), voxels in the order of slices: of `np.moveaxis(inside, -1, 0)`.

    Raises:
        ValueError: If a number is out of range or the network's output has another shape.
        ChiasmError: If one slice does not fit into memory.
    """
    counts = np.count_nonzero(inside, axis=(0, 1))
    ends = np.cumsum(counts)

    def collect(made: Iterator[tuple[Sequence[int], NDArray[np.float32]]]) -> NDArray[np.float32]:
        values = None
        for group, output in made:
            if values is None:
                values = np.empty((output.shape[1], int(ends[-1])), np.float32)
            for place, plane in zip(group, output):
                values[:, ends[place] - counts[place] : ends[place]] = plane[:, inside[..., place]]
        assert values is not None
        return values

    return _over_slices(network_fn, sources, np.flatnonzero(counts).tolist(), collect, (slices, batch, multiple))


def _over_slices(
    network_fn: NetworkFn,
    sources: Sequence[NDArray[Any]],
    asked: Sequence[int],
    collect: Callable[[Iterator[tuple[Sequence[int], NDArray[np.float32]]]], NDArray[np.float32]],
    numbers: tuple[int, int, int],
) -> NDArray[np.float32]:
    """Run a network over slices in as large groups as fit, and collect what it makes of each."""
    slices, batch, multiple = numbers
    wrong = any(source.ndim != 4 or 0 in source.shape for source in sources)
    if wrong or not asked or batch < 1 or multiple < 1:
        shapes = [source.shape for source in sources]
        raise ValueError(f"source {shapes}, batch {batch}, multiple {multiple}, {len(asked)} slices")
    height, width = sources[0].shape[1:3]
    padded = [round_up(height, multiple), round_up(width, multiple)]

    def made(count: int) -> Iterator[tuple[Sequence[int], NDArray[np.float32]]]:
        for first in passes(range(0, len(asked), count)):
            group = asked[first : first + count]
            stacks = [slice_stacks(source, group, slices) for source in sources]
            stack = stacks[0] if len(stacks) == 1 else np.concatenate(stacks, axis=1)
            yield group, run_network(network_fn, padded_to(stack, padded))[..., :height, :width]

    most = max(1, min(batch, len(asked), PIXELS_AT_ONCE // math.prod(padded)))
    return first_that_fits(lambda count: collect(made(count)), halvings(most, 1), f"one slice of {height}x{width}")


def apply_to_volume(
    network_fn: NetworkFn, source: NDArray[np.float32], *, tile: int, halo: int, multiple: int
) -> NDArray[np.float32]:
    """Run a 3D network over a volume, in one pass where that is no larger than a tile, else in exact tiles.

    Args:
        network_fn: Maps (1, C, *S) to (1, C_out, *S), without gradients; its
            output at a voxel must depend on `halo` voxels to either side at most.
        source: Shape (C, I, J, K), an array or a memory-map.
        tile: As for `plan_tiles`; less where memory is short.
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
        for place in passes(tiles):
            made = run_network(network_fn, padded_to(source[(slice(None), *place.source)][None], place.size))[0]
            if outputs is None:
                outputs = np.empty((len(made), *source.shape[1:]), np.float32)
            outputs[(slice(None), *place.target)] = made[(slice(None), *place.core)]
        assert outputs is not None
        return outputs

    plans: list[list[Tile]] = []
    for most in halvings(tile, multiple):
        tiles = plan_tiles(source.shape[1:], tile=most, halo=halo, multiple=multiple)
        plans += [tiles] if tiles not in plans else []
    return first_that_fits(run, plans, "x".join(map(str, plans[-1][0].size)) + " voxels")


def halvings(size: int, least: int) -> list[int]:
    """Return `size` and its halves, down to `least` where `size` is larger."""
    sizes = [size]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    return sizes


def padded_to(images: NDArray[np.generic], spatial: Sequence[int]) -> NDArray[np.float32]:
    """Copy (N, C, *S) to float32 and fill it up with zeros at the far ends to (N, C, *spatial)."""
    filled = np.zeros((*images.shape[:2], *spatial), np.float32)
    filled[tuple(map(slice, images.shape))] = images
    return filled


def run_network(network_fn: NetworkFn, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Send images (N, C, *S) through the network, and return its output as float32 in numpy.

    Raises:
        ValueError: If the network changes another size than that of the channels.
    """
    made = network_fn(torch.from_numpy(images))
    if made.ndim != images.ndim or made.shape[0] != len(images) or made.shape[2:] != images.shape[2:]:
        raise ValueError(f"the network made {images.shape} into {tuple(made.shape)}: only channels may change")
    array: NDArray[np.float32] = made.detach().to("cpu", torch.float32).numpy()
    return array


def first_that_fits(
    run: Callable[[Choice], NDArray[np.float32]], choices: Sequence[Choice], smallest: str
) -> NDArray[np.float32]:
    """Run with the first of ever smaller choices that does not run out of memory.

    Args:
        run: Makes the result with one choice.
        choices: From large to small, at least one.
        smallest: The last choice in words, for the message.

    Raises:
        ChiasmError: If memory runs out with the smallest choice.
        ValueError: If there is no choice.
    """
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
    """Return whether torch or numpy ran out of memory; torch on a CPU says so only in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)
