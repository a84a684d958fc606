"""Memory that is free in this process but not yet in the system."""

from __future__ import annotations

import ctypes
import sys


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
