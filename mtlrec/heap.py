"""The process's memory between steps: what a step has freed stays with the process for the next one."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The C library's numbers for these (malloc.h)."""
_LARGEST = 32 * 2**20
"""Bytes: what is larger is still asked of the system each time, and given back at once."""
_KEPT = 256 * 2**20
"""Bytes at the end of a heap that are kept though nobody holds them."""


def keep_freed_memory() -> bool:
    """Keep what is freed up to `_LARGEST` bytes each; False where the C library has no such setting.

    Left to itself glibc gives activations of a few megabytes back to the system when they are freed, and
    every step takes them again, a page fault each 4 KiB: about a seventh of a step's time on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
