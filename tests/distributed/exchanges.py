"""Called on every rank: each exchange once, and what it gave."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mtlrec.distributed import (
    World,
    all_gather_bytes,
    all_ok,
    all_reduce_sum,
    broadcast_bytes,
    combine_bytes,
    gather_bytes,
)
from mtlrec.job.errors import InputError
from mtlrec.lockstep import in_step


def exchange(world: World) -> dict[str, Any]:
    mine = torch.tensor([world.rank, 10 * world.rank], dtype=torch.float64)
    words = bytes(range(7 * world.rank)) + b"\0"
    gathered = gather_bytes(words, world)
    held = [words]
    whole = combine_bytes(lambda: b"".join(held), held.append, world)
    errors = {
        "none": all_ok(None, world),
        "one": all_ok("größer als erlaubt" if world.rank == 1 else None, world),
        "empty": all_ok("" if world.rank == 2 else None, world),
    }
    return {
        "world": [world.rank, world.world_size, world.local_rank, world.local_world_size],
        "sum": all_reduce_sum(mine, world).numpy(),
        "untouched": mine.numpy(),
        "count": all_reduce_sum(torch.tensor([2**53 + 1]), world).numpy(),
        "gathered": None if gathered is None else [list(part) for part in gathered],
        "combined": list(b"".join(held)) if whole else None,
        "combined nothing": combine_bytes(bytes, lambda other: None, world),
        "everywhere": [list(part) for part in all_gather_bytes(words, world)],
        "nothing": [list(part) for part in all_gather_bytes(b"", world)],
        "broadcast": list(broadcast_bytes(b"from 0" if world.rank == 0 else None, world)),
        "broadcast nothing": list(broadcast_bytes(b"", world)),
        "errors": errors,
        "array": np.arange(3),
        "steps": {"to the end": in_step_of(3, None, world), "until one fails": in_step_of(4, 1, world)},
    }


def in_step_of(count: int, failing: int | None, world: World) -> dict[str, Any]:
    """What steps of `count` batches gave, the n-th with 10 n + rank rows: rows of each, of all ranks, and of
    the next batch, where it was given. failing: the rank whose third batch is an error.
    """

    def read() -> Iterator[Any]:
        for number in range(1, count + 1):
            if number == 3 and world.rank == failing:
                raise InputError("the third is wrong")
            yield SimpleNamespace(num_rows=10 * number + world.rank)

    steps, error = [], None
    try:
        for batch, totals, upcoming in in_step(read(), world):
            steps.append([batch.num_rows, totals.rows, upcoming and upcoming.num_rows])
    except InputError as caught:
        error = str(caught)
    return {"steps": steps, "error": error}


def fail_on_one(world: World) -> dict[str, Any]:
    if world.rank == 1:
        raise RuntimeError("this rank is broken")
    all_ok(None, world)
    return {}


def hang(world: World) -> dict[str, Any]:
    import time

    time.sleep(600)
    return {}
