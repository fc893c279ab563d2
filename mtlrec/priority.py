"""Which threads of a worker go first where they want the same core.

Linux gives each thread a priority of its own, and a new thread that of its maker.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

BATCHES, CHECKPOINTS = 10, 15
"""Steps of niceness behind the thread that trains, for those that read ahead and those that write beside it.
They take the time in which workers wait for one another. At the same priority they take the core from one
worker now and from another then, and each time all wait."""
LAST = 19
"""There is no niceness beyond it."""


def step_back(steps: int) -> None:
    """Put the calling thread, and the threads that it starts, so many steps of niceness further back."""
    if sys.platform != "linux":
        return  # elsewhere it would be the priority of a process
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # where a sandbox forbids it, it is only slower
        behind = min(os.getpriority(os.PRIO_PROCESS, thread) + steps, LAST)
        os.setpriority(os.PRIO_PROCESS, thread, behind)
