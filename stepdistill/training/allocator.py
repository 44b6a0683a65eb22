"""The memory of a training on the CPU: what one step has freed, the next takes again.

A step allocates and frees all its activations. The C library of Linux gives large pieces back to the system, which maps
and clears every page again in the next step: a tenth of the time of a step that runs several networks beside a graph.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's parameters (``man mallopt``)."""

LARGEST_PIECE = 32 * 2**20
"""Bytes; the most that glibc accepts. Larger pieces are still given back at once."""

KEPT = 2**31 - 1
"""Bytes at the end of the heap that are kept."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocations; return whether its C library can.

    It holds to the process's end, and whatever ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` say.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_PIECE) and mallopt(TRIM_THRESHOLD, KEPT))
