"""How the C library treats memory that tensors free on a CPU."""

from __future__ import annotations

import ctypes
import os

_KEPT_BYTES = 128 * 2**20
_LARGEST_KEPT = 32 * 2**20  # glibc takes no more: larger blocks always go back to the system
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep up to 128 MiB of freed memory per arena for its next tensors; False where it cannot.

    By default glibc hands the top of its heap back at once, and a forward of many rows faults the same pages in at
    every layer. A setting of the whole process; one that the user made in the environment stays.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:  # not glibc
        return False
    # both: setting one ends glibc's own adjusting of the other
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT))
