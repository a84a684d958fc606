"""Overlapping windows, blended with weights that sum to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.prediction.tiling import NetworkFn, first_that_fits, halvings, padded_to, run_network, slice_stack
from chiasm.prediction.watching import passes

Weighting = Literal["gaussian", "constant", "smooth"]


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
    volume = padded_to(source[None], padded)[0]
    origins = product(*window_origins(shape, window, step))
    boxes = [tuple(slice(o, o + w) for o, w in zip(origin, window)) for origin in origins]
    weights = window_weights(window, weighting)

    def run(count: int) -> NDArray[np.float32]:
        total, seen = None, np.zeros(padded, np.float32)
        for first in passes(range(0, len(boxes), count)):
            group = boxes[first : first + count]
            made = run_network(network_fn, np.stack([volume[(slice(None), *box)] for box in group]))
            if total is None:
                total = np.zeros((made.shape[1], *padded), np.float32)
            for box, one in zip(group, made):
                total[(slice(None), *box)] += one * weights
                seen[box] += weights
        assert total is not None
        np.divide(total, seen, out=total)
        return total[(slice(None), *map(slice, shape))]

    return first_that_fits(run, halvings(batch, 1), f"one window of {'x'.join(map(str, window))} voxels")


def blend_slices(
    network_fn: NetworkFn, source: NDArray[np.float32], *, slices: int, window: Sequence[int]
) -> NDArray[np.float32]:
    """Run a 2D or 2.5D network that takes one size only over every slice along K, in windows that are blended.

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
    stacks = (slice_stack(source, place, slices) for place in passes(range(source.shape[-1])))
    return np.stack([blend_windows(network_fn, one, window=window, weighting="smooth") for one in stacks], axis=-1)


def window_origins(shape: Sequence[int], window: Sequence[int], step: float = 0.5) -> list[list[int]]:
    """Return where the windows of `blend_windows` begin, along each axis of a volume.

    >>> window_origins([110, 20], [64, 64])
    [[0, 23, 46], [0]]
    """
    return [window_positions(max(length, size), size, step) for length, size in zip(shape, window, strict=True)]
