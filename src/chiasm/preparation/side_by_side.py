"""Cases that are worked on side by side, in threads of this process.

What takes time with a case (unpacking, numpy, scipy, checksums) lets other threads run meanwhile, so threads do as well
as processes would, and need no copy of the program, no import of the user's script, and no end of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from chiasm.preparation.memory import available_bytes, peak_bytes
from chiasm.runners import cores_allowed

MOST = 16  # threads: examining holds the interpreter's lock for a twentieth of its time
SPARED = 0.5  # share of the memory that is left alone: other cases may be larger than the first one

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def in_threads(items: Sequence[Item], work: Callable[[Item], Outcome]) -> Generator[Outcome, None, None]:
    """Yield what `work` returns for each item, in the order of the items; later ones are worked on meanwhile.

    There are as many threads as `spare_threads` allows and as fit into memory, by what the first item shows, which is
    done alone.  Each of numpy's products has one thread, so that any number of threads gives the same bits.  An error
    of `work` is raised in its item's turn; then, and when the iterator is closed, what was begun is finished, and
    nothing else is begun.

    Args:
        items: Cases.
        work: What is done with one; it is called in other threads, several at once.
    """
    from threadpoolctl import threadpool_limits

    threads = spare_threads()
    with threadpool_limits(1, user_api="blas"):
        for item in items[:1]:
            yield work(item)
        threads = min(threads, _threads_that_fit())
        yield from map(work, items[1:]) if threads == 1 else _in_pool(items[1:], work, threads)


def _in_pool(items: Sequence[Item], work: Callable[[Item], Outcome], threads: int) -> Generator[Outcome, None, None]:
    begun: deque[Future[Outcome]] = deque()
    pool = ThreadPoolExecutor(threads, "chiasm-case")
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) >= 2 * threads:  # so many outcomes are kept at most
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def spare_threads() -> int:
    """Count the threads that may work here side by side: as many as numpy's products have.

    These are the cores of this process, or fewer where OMP_NUM_THREADS, Ray or the job of a study says so.
    """
    from threadpoolctl import threadpool_info

    of_products: Iterator[int] = (
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    )
    return max(1, min(MOST, cores_allowed(), *of_products))


def _threads_that_fit() -> int:
    """Count the threads that fit into memory, if each takes as much as this process has ever taken."""
    room = (1 - SPARED) * available_bytes() / max(peak_bytes(), 1.0)
    return 1 + int(min(room, MOST))
