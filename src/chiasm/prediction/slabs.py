"""A 3D network over a volume slab by slab: nothing is computed twice, and results equal one pass over the whole.

Tiles must read a halo as wide as the receptive field and discard it: 72 to 124 voxels on each side of a tile for
the networks of this package, which see far because they halve their grid three times.  A single convolution sees one
voxel.  So here each layer keeps the last planes of its input until the next slab comes, and passes on complete planes.

`Planes` stands for a tensor of which one slab after the other exists.  Layers and functions of torch take it in place
of a tensor (`__torch_function__`), so that a network's own `forward` lays out the work; `slabs_of` then does it.
A network that does what has no counterpart here is refused with `NoSlabs` before any work is done.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from chiasm.networks.generator import fold_voxels, unfold_voxels
from chiasm.prediction.tiling import first_that_fits, halvings, padded_to, round_up
from chiasm.prediction.watching import report_pass

SLAB_VOXELS = 2**21  # of a slab: eight planes of 512 x 512

Shape = tuple[int, ...]
Work = Callable[[Tensor], Tensor]
Given = tuple[Any, ...]


class NoSlabs(TypeError):
    """A network computes something that cannot be done slab by slab."""


class Window(NamedTuple):
    """The planes of its input that a layer needs for a plane of its output.

    Attributes:
        size: Number of planes.
        stride: From one plane of the output to the next; at most `size`.
        padding: Planes that are added before the first and after the last.
        fill: Their value; None repeats the planes at the ends.
    """

    size: int = 1
    stride: int = 1
    padding: int = 0
    fill: float | None = 0.0


class Planes:
    """A tensor (1, C, *S) that exists slab by slab along one axis, in the order of its planes.

    Args:
        begin: Starts what makes the slabs, which are tensors of this shape but for `axis`.
        shape: Of the whole.
        axis: Along which slabs follow one another, counted from the batch's.
        dtype: Of the source.
    """

    def __init__(self, begin: Callable[[], Iterator[Tensor]], shape: Shape, axis: int, dtype: torch.dtype) -> None:
        self.begin, self.shape, self.axis, self.dtype = begin, shape, axis, dtype
        self.made: _Made | None = None

    @property
    def ndim(self) -> int:
        """Axes, with batch and channels."""
        return len(self.shape)

    def dim(self) -> int:
        """Count the axes, with batch and channels."""
        return self.ndim

    def __getattr__(self, name: str) -> Any:
        """Refuse an attribute that a tensor has and planes do not have.

        Raises:
            NoSlabs: Always.
        """
        raise NoSlabs(f"{name} has no counterpart for slabs")

    def read(self) -> Iterator[Tensor]:
        """Return the slabs; several readers get the same slabs, each at its own speed."""
        if self.made is None:
            self.made = _Made(self.begin())
        return self.made.read()

    def derived(self, begin: Callable[[], Iterator[Tensor]], shape: Shape) -> Planes:
        """Return planes of another shape that are made from these."""
        return Planes(begin, shape, self.axis, self.dtype)

    def windowed(self, window: Window, work: Work, shape: Shape) -> Planes:
        """Return the output of a layer for these planes.

        Args:
            window: What it needs for a plane.
            work: Computes all planes for which a slab is enough, without padding along the axis.
            shape: Of the whole result.

        Raises:
            NoSlabs: If the layer leaves planes out.
        """
        if window.size < window.stride + window.padding or self.shape[self.axis] + 2 * window.padding < window.size:
            raise NoSlabs(f"{window} over {self.shape[self.axis]} planes")
        return self.derived(lambda: _Windows(self.read(), window, work, self.axis), shape)

    def __getitem__(self, key: Any) -> Planes:
        """Select channels, or every n-th voxel of all axes."""
        key = key if isinstance(key, tuple) else (key,)
        key += (slice(None),) * (self.ndim - len(key))
        length, along = self.shape[self.axis], key[self.axis]
        if not all(isinstance(part, slice) for part in key) or (along.start, along.stop) != (None, None):
            raise NoSlabs(f"a part {key}")
        step = along.step or 1
        if length % step:
            raise NoSlabs(f"every {step}th of {length} planes")
        shape = tuple(len(range(size)[part]) for size, part in zip(self.shape, key))
        return self.windowed(Window(step, step), operator.itemgetter(key), shape)

    def to(self, *given: Any, **named: Any) -> Planes:
        """Move each slab, or change its type."""
        return self.windowed(Window(), lambda slab: slab.to(*given, **named), self.shape)

    def float(self) -> Planes:
        """Change each slab to float32."""
        return self.to(torch.float32)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Planes:
        """Lay out each slab in memory."""
        return self.windowed(Window(), lambda slab: slab.contiguous(memory_format=memory_format), self.shape)

    def detach(self) -> Planes:
        """Return itself, because planes have no gradients."""
        return self

    def split(self, size: int, dim: int) -> tuple[Planes, ...]:
        """Split the channels.

        Raises:
            NoSlabs: If another axis is to be split.
        """
        if dim != 1:
            raise NoSlabs(f"a split along axis {dim}")
        return tuple(self[:, start : start + size] for start in range(0, self.shape[1], size))

    def clamp(self, *limits: Any) -> Planes:
        """Cut values to limits."""
        return self.windowed(Window(), lambda slab: slab.clamp(*limits), self.shape)

    def __add__(self, other: Any) -> Planes:
        """Add voxel by voxel."""
        return _voxelwise(torch.add, (self, other), {})

    def __sub__(self, other: Any) -> Planes:
        """Subtract voxel by voxel."""
        return _voxelwise(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Planes:
        """Subtract from a number."""
        return _voxelwise(torch.rsub, (self, other), {})

    def __mul__(self, other: Any) -> Planes:
        """Multiply voxel by voxel."""
        return _voxelwise(torch.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Planes:
        """Divide voxel by voxel."""
        return _voxelwise(torch.div, (self, other), {})

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, given: Given = (), named: Mapping[str, Any] | None = None
    ) -> Planes:
        """Apply a function of torch to planes."""
        del types
        if (lay_out := _FUNCTIONS.get(function)) is None:
            raise NoSlabs(f"{getattr(function, '__name__', function)} has no counterpart for slabs")
        return lay_out(function, given, dict(named or {}))


class _Made:
    """Slabs that are made on demand; each is kept until its last reader has taken it."""

    def __init__(self, slabs: Iterator[Tensor]) -> None:
        self.slabs = slabs
        self.waiting: list[deque[Tensor]] = []

    def read(self) -> Iterator[Tensor]:
        """Return a reader with its own speed."""
        self.waiting.append(deque())
        return _Taken(self, self.waiting[-1])

    def make(self) -> None:
        """Make one more slab and give it to all readers.

        Raises:
            StopIteration: If there is none.
        """
        slab = next(self.slabs)
        for reader in self.waiting:
            reader.append(slab)


class _Taken(Iterator[Tensor]):
    """The slabs of one reader; it does not hold a slab that it passed on, as a generator would."""

    def __init__(self, made: _Made, own: deque[Tensor]) -> None:
        self.made, self.own = made, own

    def __next__(self) -> Tensor:
        if not self.own:
            self.made.make()
        return self.own.popleft()


class _Windows(Iterator[Tensor]):
    """Passes all complete planes to the work, and keeps the planes that it needs again."""

    def __init__(self, slabs: Iterator[Tensor], window: Window, work: Work, axis: int) -> None:
        self.slabs, self.window, self.work, self.axis = slabs, window, work, axis
        self.kept: Tensor | None = None
        self.has_begun = self.is_over = False

    def __next__(self) -> Tensor:
        size, stride = self.window.size, self.window.stride
        while True:
            there = self._with_next()
            length = there.shape[self.axis]
            used = max(0, (length - size) // stride + 1) * stride
            # a copy, since a view would hold the whole slab
            self.kept = there.narrow(self.axis, used, length - used).clone() if used < length else None
            if used:
                return self.work(there.narrow(self.axis, 0, used - stride + size))

    def _with_next(self) -> Tensor:
        """Return the kept planes and the next slab, padded before the first and after the last plane."""
        kept = [] if self.kept is None else [self.kept]
        slab = next(self.slabs, None)
        if slab is not None:
            before = [self._border(slab.narrow(self.axis, 0, 1))] if self.window.padding and not self.has_begun else []
            self.has_begun = True
            return torch.cat([*before, *kept, slab], self.axis) if before or kept else slab
        if self.is_over or not (self.window.padding and kept):
            raise StopIteration
        self.is_over = True
        last = kept[0].narrow(self.axis, kept[0].shape[self.axis] - 1, 1)
        return torch.cat([*kept, self._border(last)], self.axis)

    def _border(self, plane: Tensor) -> Tensor:
        repeated = torch.cat([plane] * self.window.padding, self.axis)
        return repeated if self.window.fill is None else torch.full_like(repeated, self.window.fill)


class _Reader:
    """A reader of slabs with any thickness."""

    def __init__(self, slabs: Iterator[Tensor], axis: int) -> None:
        self.slabs, self.axis, self.rest = slabs, axis, deque[Tensor]()

    def take(self, planes: int) -> Tensor:
        while sum(slab.shape[self.axis] for slab in self.rest) < planes:
            self.rest.append(next(self.slabs))
        parts, missing = [], planes
        while missing:
            slab = self.rest.popleft()
            length = slab.shape[self.axis]
            if length > missing:
                self.rest.appendleft(slab.narrow(self.axis, missing, length - missing))
            parts.append(slab.narrow(self.axis, 0, min(length, missing)))
            missing -= min(length, missing)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


class _Together(Iterator[Tensor]):
    """The result of a function of several planes on one grid, in slabs as thick as those of the first."""

    def __init__(self, many: Sequence[Planes], work: Callable[[list[Tensor]], Tensor]) -> None:
        self.axis, self.work = many[0].axis, work
        self.first, self.others = many[0].read(), [_Reader(one.read(), self.axis) for one in many[1:]]

    def __next__(self) -> Tensor:
        slab = next(self.first)
        return self.work([slab, *(other.take(slab.shape[self.axis]) for other in self.others)])


def _voxelwise(function: Any, given: Given, named: Mapping[str, Any]) -> Planes:
    """Lay out a function that treats each voxel for itself."""
    many = [one for one in given if isinstance(one, Planes)]
    if len({one.shape[2:] for one in many}) != 1 or any(isinstance(one, Planes) for one in named.values()):
        raise NoSlabs(f"planes of different grids: {[one.shape for one in many]}")
    options = {name: value for name, value in named.items() if name != "inplace"}

    def work(slabs: list[Tensor]) -> Tensor:
        rest = iter(slabs)
        made: Tensor = function(*(next(rest) if isinstance(one, Planes) else one for one in given), **options)
        return made

    shape = max((one.shape for one in many), key=operator.itemgetter(1))
    return many[0].derived(lambda: _Together(many, work), shape)


def _joined(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Lay out a concatenation of channels."""
    del function
    many: list[Planes] = list(given[0])
    axis = given[1] if len(given) > 1 else named.get("dim", 0)
    if axis != 1 or not all(isinstance(one, Planes) and one.shape[2:] == many[0].shape[2:] for one in many):
        raise NoSlabs(f"a concatenation along axis {axis}")
    channels = sum(one.shape[1] for one in many)
    shape = (1, channels, *many[0].shape[2:])
    return many[0].derived(lambda: _Together(many, lambda slabs: torch.cat(slabs, 1)), shape)


def _convolved(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Lay out a convolution."""
    planes: Planes
    planes, weight, bias, stride, padding, dilation, groups = given
    if named or isinstance(padding, str):
        raise NoSlabs("a convolution with padding that is no number")
    axis, spans = planes.axis - 2, [by * (size - 1) + 1 for by, size in zip(dilation, weight.shape[2:])]
    inner = tuple(0 if place == axis else pad for place, pad in enumerate(padding))
    sizes = [
        (size + 2 * pad - span) // step + 1 for size, pad, span, step in zip(planes.shape[2:], padding, spans, stride)
    ]
    return planes.windowed(
        Window(spans[axis], stride[axis], padding[axis]),
        lambda block: function(block, weight, bias, stride, inner, dilation, groups),
        (1, weight.shape[0], *sizes),
    )


def _doubled(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Lay out a linear interpolation by a factor of 2: the planes at both ends are repeated, as torch does."""
    planes: Planes = given[0]
    if named.get("mode") != "trilinear" or named.get("scale_factor") != 2.0 or named.get("align_corners"):
        raise NoSlabs("an interpolation that is not linear by a factor of 2")
    axis = planes.axis

    def work(block: Tensor) -> Tensor:
        made: Tensor = function(block, **named)
        return made.narrow(axis, 2, made.shape[axis] - 4)  # but for what the first and the last plane alone decide

    sizes = [2 * size for size in planes.shape[2:]]
    return planes.windowed(Window(3, 1, 1, None), work, (*planes.shape[:2], *sizes))


def _folded(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Lay out a fold of voxels into channels, or the reverse."""
    del named
    planes: Planes
    planes, by = given
    _, channels, *sizes = planes.shape
    if function is fold_voxels:
        shape = (1, channels * by ** len(sizes), *(size // by for size in sizes))
        return planes.windowed(Window(by, by), lambda block: fold_voxels(block, by), shape)
    shape = (1, channels // by ** len(sizes), *(size * by for size in sizes))
    return planes.windowed(Window(), lambda block: unfold_voxels(block, by), shape)


def _normalised(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Lay out batch normalisation by the statistics of training, which treats each voxel for itself."""
    if named.get("training", True):
        raise NoSlabs("a normalisation by the statistics of its input")
    return _voxelwise(function, given, named)


def _left_alone(function: Any, given: Given, named: dict[str, Any]) -> Planes:
    """Pass planes on, as dropout does when a network is not in training."""
    del function
    if named.get("training", given[2] if len(given) > 2 else True):
        raise NoSlabs("a network in training")
    planes: Planes = given[0]
    return planes


_VOXELWISE = (
    *(torch.add, torch.sub, torch.rsub, torch.mul, torch.div, torch.sigmoid, torch.tanh, torch.relu),
    *(functional.relu, functional.leaky_relu, functional.elu, torch.bucketize, torch.lerp, torch.take, Tensor.take),
)
_FUNCTIONS: Mapping[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Planes]] = {
    **dict.fromkeys(_VOXELWISE, _voxelwise),
    torch.cat: _joined,
    torch.conv3d: _convolved,
    functional.interpolate: _doubled,
    fold_voxels: _folded,
    unfold_voxels: _folded,
    functional.batch_norm: _normalised,
    functional.dropout3d: _left_alone,
}


def apply_in_slabs(
    network_fn: Callable[[Any], Any], source: NDArray[np.float32], *, multiple: int, most_voxels: int = SLAB_VOXELS
) -> NDArray[np.float32]:
    """Run a 3D network over a volume slab by slab, along its longest axis.

    The network runs while slabs are taken, so the caller sets gradients, precision and threads.  Beside source and
    result, memory grows only with the area of a plane.

    Args:
        network_fn: Maps (1, C, *S) to (1, C_out, *S).
        source: Shape (C, I, J, K), an array or a memory-map.
        multiple: What the network's input sizes must be multiples of.
        most_voxels: Of a slab; more where not even as many planes as `multiple` are so few.

    Returns:
        Shape (C_out, I, J, K).

    Raises:
        NoSlabs: If the network cannot be run so.
        ChiasmError: If memory runs out.
    """
    padded = [round_up(size, multiple) for size in source.shape[1:]]
    axis = padded.index(max(padded))
    across = math.prod(padded) // padded[axis]
    most = max(1, most_voxels // (across * multiple)) * multiple

    def run(thickness: int) -> NDArray[np.float32]:
        outputs, start = None, 0
        slabs = partial(_cut_slabs, source, padded, axis, thickness)
        for made in _slabs_of(network_fn, slabs, (1, len(source), *padded), axis + 2):
            if outputs is None:
                outputs = np.empty((made.shape[1], *source.shape[1:]), np.float32)
            place = [slice(0, size) for size in source.shape[1:]]
            place[axis] = slice(start, start + made.shape[axis + 2])
            there = outputs[(slice(None), *place)]
            there[...] = made[0].cpu().numpy()[tuple(map(slice, there.shape))]
            start += made.shape[axis + 2]
            report_pass(start, padded[axis])
        assert outputs is not None and start == padded[axis]
        return outputs

    return first_that_fits(run, halvings(most, multiple), f"a slab of {multiple} planes of {across:,} voxels")


def _cut_slabs(source: NDArray[np.float32], padded: Sequence[int], axis: int, thickness: int) -> Iterator[Tensor]:
    """Cut a volume (C, I, J, K) into slabs along an axis, filled up with zeros at the far ends."""
    for start in range(0, padded[axis], thickness):
        size = [*padded[:axis], min(thickness, padded[axis] - start), *padded[axis + 1 :]]
        place = [slice(None)] * 4
        place[axis + 1] = slice(start, start + thickness)
        yield torch.from_numpy(padded_to(source[tuple(place)][None], size))


def _slabs_of(
    network_fn: Callable[[Any], Any], slabs: Callable[[], Iterator[Tensor]], shape: Shape, axis: int
) -> Iterator[Tensor]:
    """Lay a network out for a tensor of a shape that comes in slabs along an axis, and return its output's slabs."""
    made = network_fn(Planes(slabs, shape, axis, torch.float32))
    if not isinstance(made, Planes) or made.shape[2:] != shape[2:]:
        raise NoSlabs(f"the network made {shape} into {getattr(made, 'shape', made)}")
    return made.read()
