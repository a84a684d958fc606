"""Memory that is free in this process but not yet in the system."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray


def give_back() -> bool:
    """Give memory that arrays have left back to the system, where the C library can: glibc keeps up to 64 MiB and gaps.

    Returns:
        Whether it could be asked for.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def give_back_mapped(array: NDArray[Any]) -> bool:
    """Let go of the pages of an array that is mapped from a file and only read; they are read again when needed.

    Returns:
        Whether it is such an array, on a system that knows the request.
    """
    file = getattr(array, "_mmap", None) if isinstance(array, np.memmap) else None
    if file is None or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    file.madvise(mmap.MADV_DONTNEED)
    return True
