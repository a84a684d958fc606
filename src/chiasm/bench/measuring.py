"""Processor time of two ways to do the same work, taken in turns, and the peak that a machine reaches.

Processor time does not count what other programs do meanwhile, and turns let both ways meet the same caches, clock
and neighbours: ratios then hold on a machine that is busy, seconds do not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

LEAST_SECONDS = 0.02  # of a sample: shorter work is repeated within it
LEAST_ROUNDS = 3
PEAK_SIDE = 1024  # of the matrices whose product is the measure of a machine


class Timing(NamedTuple):
    """Processor seconds of one run of some work, over several runs."""

    least: float
    median: float
    most: float


class Turns(NamedTuple):
    """The times of two ways to do the same work.

    Attributes:
        ours: Processor seconds of chiasm.
        peer: Processor seconds of the peer.
        ratio: Median over the turns of the peer's seconds divided by ours: above 1, chiasm takes less.
    """

    ours: Timing
    peer: Timing
    ratio: float


def take_turns(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
) -> Turns:
    """Time two ways in turns, each once before that without timing.

    Args:
        ours: Chiasm's way.
        peer: The peer's.
        rounds: Turns, at least three.
        seconds: Begin no further turn after so much processor time, except to make three.
        clock: Seconds so far; the processor time of this process, all threads, by default.

    Raises:
        ValueError: If fewer than three rounds are asked for.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"{rounds} rounds; a median needs at least {LEAST_ROUNDS}")
    works = (ours, peer)
    repeats = [max(1, math.ceil(LEAST_SECONDS / max(_once(work, 1, clock), 1e-9))) for work in works]
    taken: tuple[list[float], list[float]] = ([], [])
    begun = clock()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock() - begun > seconds:
            break
        for work, count, times in zip(works, repeats, taken):
            times.append(_once(work, count, clock))
    ratio = statistics.median(other / own for own, other in zip(*taken))
    own, other = (Timing(min(times), statistics.median(times), max(times)) for times in taken)
    return Turns(own, other, ratio)


def _once(work: Callable[[], Any], count: int, clock: Callable[[], float]) -> float:
    begun = clock()
    for _ in range(count):
        work()
    return (clock() - begun) / count


def measure_peak(precision: str) -> float:
    """Return the multiplications and additions a second that one thread reaches in a product of matrices.

    Args:
        precision: "32-true" or "bf16-mixed".
    """
    import torch

    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a, b = (torch.rand(PEAK_SIDE, PEAK_SIDE).to(dtype) for _ in range(2))
    a @ b
    return 2 * PEAK_SIDE**3 / min(_once(lambda: a @ b, 3, time.process_time) for _ in range(5))


@contextmanager
def single_thread() -> Iterator[None]:
    """Let torch, BLAS and SimpleITK work on one thread: what more threads add is another question."""
    import SimpleITK as sitk
    import torch
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads[0])
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads[1])
