"""The board between the workers and their driver. Its process imports this file and no more."""

from __future__ import annotations

import asyncio
import time
from typing import Any

ASK_AGAIN_S = 300.0
"""A worker's question whether another one has hung is answered by then, and asked again."""
QUIET_S = 30.0
"""After a worker's line that it has hung, those of others are not shown for so long."""
Ending = tuple[str, str]
"""Why all workers have to end, as INPUT or FINAL, and the line that says so."""
INPUT, FINAL = "input", "final"


class Board:
    """An actor between the workers and the driver: events one way, requests the other.

    Its methods are coroutines, so that a worker may wait for `hung` while others are served.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._ending: Ending | None = None
        self._stop = False
        self._hung, self._hung_at = asyncio.Event(), -QUIET_S

    async def show(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    async def end(self, kind: str, message: str) -> None:
        self._ending = self._ending or (kind, message)

    async def drain(self, stop: bool) -> tuple[list[dict[str, Any]], Ending | None]:
        """The events since the last call, and why all has to end, if it has."""
        self._stop = self._stop or stop
        events, self._events = self._events, []
        return events, self._ending

    async def stop_asked(self) -> bool:
        return self._stop

    async def say_hung(self, text: str) -> None:
        """A worker has hung: its line for the user, and a call to the others to write their stacks."""
        if time.monotonic() - self._hung_at > QUIET_S:  # the others wait for it, and say so too
            self._events.append({"kind": "log", "text": text})
        self._hung_at = time.monotonic()
        self._hung.set()
        self._hung = asyncio.Event()

    async def hung(self) -> bool:
        """True when a worker of this start has said that it has hung; False after ASK_AGAIN_S seconds.

        So that what dead workers have asked does not add up, over many starts, to all that the board serves.
        """
        try:
            await asyncio.wait_for(self._hung.wait(), ASK_AGAIN_S)
        except TimeoutError:
            return False
        return True
