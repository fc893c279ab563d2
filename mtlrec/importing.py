"""Imports of large libraries, with Python's collector of garbage out of their way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage within, nor ever look again through what is there at the end.

    torch and torchrec make a million objects that stay, and the collector goes through all of them again and
    again: a quarter of the time that their import takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
