"""Several processes that train as one: which samples each has, and sums over all of them.

A batch is drawn as a whole, and process ``r`` of ``W`` takes the samples ``r, r + W, ...``, so no sample is dropped and
shares differ by one at most.  With one process each function returns what it is given, and nothing is communicated.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed

from chiasm.errors import ChiasmError

PATIENCE = timedelta(days=2)  # of processes for another one, which prepares a cohort or calibrates
GRACE = 20.0  # seconds that a process has to end by itself once the first one is gone
FIRST = "CHIASM_FIRST_PROCESS"  # number of the process that starts the others

Item = TypeVar("Item")


def launch(fabric: Fabric) -> None:
    """Start the processes of a training, which end their communication before the interpreter ends.

    Threads of Gloo that still wait for the interpreter when it ends abort the process (SIGABRT).

    Args:
        fabric: Devices, not launched yet.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else they print stacks at a lost partner
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ[FIRST] = str(os.getpid())
    elif FIRST in os.environ:
        threading.Thread(target=follow, args=(int(os.environ[FIRST]),), daemon=True).start()
    fabric.launch()
    if _is_shared():
        atexit.register(_part)


def follow(first: int, *, poll: float = 5.0, grace: float = GRACE) -> None:
    """End this process some time after the first one, which started it, is gone; while it connects, nothing else does.

    Args:
        first: Number of the first process.
        poll: Seconds between two looks.
        grace: Seconds to end by itself.
    """
    while os.getppid() == first:
        time.sleep(poll)
    time.sleep(grace)
    os._exit(1)


class ProcessEnded(ChiasmError):
    """Another process of the training ended, so this one cannot go on; the first process reports it."""

    @property
    def exit_code(self) -> int | None:
        """Zero, and so no report, of a process beside the first one."""
        return 0 if int(os.environ.get("LOCAL_RANK", 0)) else None


@contextmanager
def ending_together() -> Iterator[None]:
    """Say in one sentence that another process of a training ended, where communication with it fails.

    Raises:
        ProcessEnded: If it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ProcessEnded(
            "another process of this training ended",
            reason="process-ended",
            hint="The same command goes on from here.",
        ) from error


def _part() -> None:
    """End communication and its threads, once for all trainings of a script."""
    _hosts.cache_clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # in torch 2.14, threads of Gloo end with their group, which objects in circles still hold


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return distributed.get_rank() if _is_shared() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _is_shared() else 1


def share(whole: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of what belongs to the whole batch."""
    return whole[rank() :: count()]


class _Sum(torch.autograd.Function):
    """Sum over processes; gradients of the sum flow back to all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004  # torch asks for it
        summed = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return total(gradients[0])


def total(values: Tensor) -> Tensor:
    """Sum a tensor over processes, differentiably; all of them must call it, in the same order."""
    if not _is_shared():
        return values
    summed: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return summed


def total_in_place(tensors: Sequence[Tensor]) -> None:
    """Sum each of many tensors over processes, in one exchange."""
    if not _is_shared() or not tensors:
        return
    joined = torch.cat([one.flatten() for one in tensors])
    distributed.all_reduce(joined)
    for one, summed in zip(tensors, torch.split(joined, [one.numel() for one in tensors])):
        one.copy_(summed.view_as(one))


def mean(values: Tensor, samples: int) -> Tensor:
    """Average what is a mean over the samples of each process, differentiably.

    Args:
        values: Any shape, the same on each process.
        samples: How many samples this process has.
    """
    if not _is_shared():
        return values
    weighed = torch.cat([values.flatten() * samples, values.new_full((1,), samples)])
    summed = total(weighed)
    return (summed[:-1] / summed[-1]).view_as(values)


def largest(values: Tensor) -> Tensor:
    """Return the largest over processes of each element, without gradient."""
    if not _is_shared():
        return values
    found = values.detach().clone()
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return found


def gather(values: Tensor, whole: int) -> Tensor:
    """Put together what each process knows of its samples, in the order of the whole batch, without gradient.

    Args:
        values: Shape (samples of this process, ...).
        whole: Samples of all processes.
    """
    if not _is_shared():
        return values
    most = -(-whole // count())
    filled = values.new_zeros((most, *values.shape[1:]))
    filled[: len(values)] = values.detach()
    parts = [torch.empty_like(filled) for _ in range(count())]
    distributed.all_gather(parts, filled)
    return torch.stack(parts, 1).flatten(0, 1)[:whole]


def gather_rows(rows: Sequence[Item], whole: int) -> list[Item]:
    """Put together any objects that each process has made of its share, in the order of the whole."""
    if not _is_shared():
        return list(rows)
    parts: list[Any] = [None] * count()
    distributed.all_gather_object(parts, list(rows), group=_hosts())
    return [parts[index % count()][index // count()] for index in range(whole)]


def from_first(make: Callable[[], Item]) -> Item:
    """Return what the first process makes, while the others wait; all of them must call it.

    Args:
        make: Called by the first process; what it returns is pickled for the others.

    Raises:
        ProcessEnded: In the others, if the first process refused; it raises its own error.
    """
    if not _is_shared():
        return make()
    sent: list[bytes | None] = [None]
    refusal: Exception | None = None
    if rank() == 0:
        try:
            sent = [pickle.dumps(make())]
        except Exception as error:  # noqa: BLE001  raised below, after the others have heard of it
            refusal = error
    distributed.broadcast_object_list(sent, group=_hosts())
    if refusal is not None:
        raise refusal
    if sent[0] is None:
        raise ProcessEnded("the first process of this training refused it", reason="process-ended")
    made: Item = pickle.loads(sent[0])  # by the first process of the same training
    return made


def agree(is_late: bool, signals: Sequence[int]) -> tuple[bool, int]:
    """Share decisions between processes, without waiting for their devices.

    Args:
        is_late: Whether the first process wants a checkpoint.
        signals: Numbers of the signals that came to this process.

    Returns:
        Whether the first process wants a checkpoint, and the number of a signal that came to any; 0 if none did.
    """
    stopped_by = signals[0] if signals else 0
    if not _is_shared():
        return is_late, stopped_by
    known = torch.tensor([is_late and rank() == 0, stopped_by])
    distributed.all_reduce(known, op=distributed.ReduceOp.MAX, group=_hosts())
    return bool(known[0]), int(known[1])


@cache
def _hosts() -> distributed.ProcessGroup:
    """Make the group in which processes communicate between hosts."""
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return group


def _is_shared() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
