"""What the ranks of test_watchdog.py do."""

from __future__ import annotations

import time
from typing import Any

from mtlrec import watchdog
from mtlrec.distributed import World, all_ok

LIMIT_S = 3.0


def stands_still() -> None:
    while True:
        time.sleep(1000)


def hang(world: World, folder: str) -> dict[str, Any]:
    """Exchange a few words; then rank 1 never comes again, and the others wait for it."""
    watchdog.label("0001")
    with watchdog.Watchdog(LIMIT_S, world.rank, folder).watching(print):
        for _ in range(3):
            all_ok(None, world)
        if world.rank == 1:
            stands_still()
        all_ok(None, world)
    return {}
