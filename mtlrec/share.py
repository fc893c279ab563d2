"""One pass over the training data before training begins, which the workers share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mtlrec import watchdog
from mtlrec.control import Control
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World

THREADS = 2
"""Row groups that a worker reads side by side."""
SHOW_EVERY_S = 0.5

Result = TypeVar("Result")


def share_of(dataset: Dataset, world: World) -> list[int]:
    """This worker's row groups: neighbours in the order of the ranks, about as many rows each; maybe none."""
    owner = dataset.group_start * world.world_size // dataset.rows
    return [int(group) for group in np.flatnonzero(owner == world.rank)]


def over_share(
    read: Callable[[int], Result], dataset: Dataset, world: World, control: Control, what: str
) -> Iterator[Result]:
    """`read(group)` for each row group of this worker's share, in order; reading goes a little ahead.

    `what` names the pass on rank 0's screen, where it is as far along as if all were as fast as rank 0.
    """
    groups = share_of(dataset, world)
    began = shown = time.monotonic()
    done = 0

    def show(rows: int) -> None:
        rate = max(rows / max(time.monotonic() - began, 1e-9), 1e-9)
        event = {"kind": "progress", "what": what, "done": rows, "total": dataset.rows, "rows_per_s": rate}
        control.show({**event, "seconds_left": (dataset.rows - rows) / rate})

    with ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, len(groups), 2 * THREADS):
            some = groups[begin : begin + 2 * THREADS]
            for group, result in zip(some, pool.map(read, some), strict=True):
                watchdog.alive(what)
                yield result
                done += int(dataset.group_rows[group])
                if world.rank == 0 and time.monotonic() - shown >= SHOW_EVERY_S:
                    shown = time.monotonic()
                    show(min(done * world.world_size, dataset.rows - 1))
    if world.rank == 0:
        show(dataset.rows)
