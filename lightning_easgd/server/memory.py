"""Memory of a process that serves: what frames took stays with it.

The C library gives large blocks back to the system at once, and gets new pages for the next frames.
That took a tenth of the server's processor time. It is glibc's alone, so elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of the two in malloc.h."""

_KEPT = 2**28
"""Bytes at the end of a heap that stay."""

_LARGEST = 2**25
"""Bytes of a block that comes from a heap; the most that glibc takes."""


def keep_memory() -> None:
    """Keep the memory of frames. For a process of its own only: it holds for all of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
