"""How long a failing storage is tried again. Bounded in number and in time; docs/storage.md tells users."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

FIRST_WAIT_S = 0.2
"""Before the second try; twice as long before each one after it."""
LONGEST_WAIT_S = 10.0

FULL = frozenset({"InsufficientStorage", "XMinioStorageFull", "QuotaExceeded", "507"})
"""Error codes of a store that has no room: trying again makes none."""


@dataclass(frozen=True)
class Patience:
    retries: int
    """Tries after the first."""
    seconds: float
    """No try begins later than so many seconds after the first began."""

    def wait(self, retries: int, seconds: float) -> float | None:
        """Seconds to wait before another try, after `retries` of them and `seconds`; None: give up.

        Exponential, less up to half of it by chance, so that many who failed at once do not come at once.
        """
        if retries >= self.retries:
            return None
        most = min(FIRST_WAIT_S * 2 ** min(retries, 30), LONGEST_WAIT_S)
        wait = most * random.uniform(0.5, 1.0)
        return wait if seconds + wait <= self.seconds else None


LIMIT: ContextVar[Patience | None] = ContextVar("limit", default=None)
"""Travels with what a thread asks of s3fs to s3fs's own thread."""


@contextlib.contextmanager
def limited(seconds: float, retries: int = 100) -> Iterator[None]:
    """What this thread asks of the storage meanwhile is tried again for so long, and so often, at most."""
    token = LIMIT.set(Patience(retries, seconds))
    try:
        yield
    finally:
        LIMIT.reset(token)


class GaveUp(RuntimeError):
    """The storage failed, and went on failing. `__cause__` is the last failure."""

    def __init__(self, tries: int, seconds: float, before: bool = False) -> None:
        """before: it had been given up already, so that this was tried once and no more."""
        times = "try" if tries == 1 else "tries"
        text = f"given up after {tries} {times} in {seconds:.0f} s"
        super().__init__("not tried again, as the storage had been given up before" if before else text)


class Tally:
    """Counts what was tried again, by why. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, why: str) -> None:
        with self._lock:
            self._counts[why] += 1

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


TALLY = Tally()
"""Of this process."""
