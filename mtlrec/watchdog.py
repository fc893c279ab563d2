"""Ends a worker that makes no progress, and first writes where each of its threads stands.

Progress is whatever calls `alive`: a step, an exchange with the other workers, a piece of a save or a load.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from mtlrec import storage

FOLDER = "stacks"
"""In a run's folder."""
EXIT = 1
LOOK_S = 1.0
"""Seconds between two looks; fewer where the limit is short."""
SAVE_S = 10.0
"""In which the stacks have to be written: the storage may be what hangs."""

_sign: tuple[int, str] = (0, "start")
"""How many signs of life there were, and what the last one was of."""


_label = "start"


def label(text: str) -> None:
    """Name this start of the workers: it becomes part of the name of the file of stacks."""
    global _label
    _label = text


def alive(what: str) -> None:
    """Say that the process gets on, and with what. Cheap: for every step and every piece of work."""
    global _sign
    _sign = (_sign[0] + 1, what)


class Watchdog:
    """Watches this process from a thread of its own, from `watching` on."""

    def __init__(self, limit_s: float, rank: int, folder: str | None) -> None:
        """`folder`: URL where stacks are written, as LABEL-rRANK.txt; None: they are part of what is said."""
        self._limit_s, self._rank, self._folder = limit_s, rank, folder
        self.ended = threading.Event()
        """The block that was watched has ended."""
        self._dumping = threading.Lock()
        self._dumped: str | None = None

    @contextmanager
    def watching(self, on_hang: Callable[[str], None]) -> Iterator[Watchdog]:
        """While the block runs: after `limit_s` seconds without a sign of life, write every thread's stack,
        call `on_hang` with a line that says so, and where the block has not ended by the time it returns,
        end the process with os._exit(EXIT).

        Time in which the whole process was suspended does not count.
        """
        alive("start")
        thread = threading.Thread(target=self._watch, args=(on_hang,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()

    def dump(self) -> str:
        """Write every thread's stack, once; returns where it is, or the stacks where there is no folder."""
        with self._dumping:
            if self._dumped is None:
                text = (
                    f"{_now()}, process {os.getpid()}, rank {self._rank}, last sign of life: {_sign[1]}\n\n"
                )
                text += stacks()
                if self._folder is None:
                    self._dumped = text
                else:
                    url = storage.join(self._folder, f"{_label}-r{self._rank:05d}.txt")
                    try:
                        with storage.limited(SAVE_S):
                            storage.write(url, text.encode())
                        self._dumped = url
                    except Exception as error:  # whatever the storage says: the stacks must not be lost
                        self._dumped = f"{error}\n{text}"
            return self._dumped

    def _watch(self, on_hang: Callable[[str], None]) -> None:
        tick = min(LOOK_S, self._limit_s / 10)
        seen, silent, before = _sign, 0.0, time.monotonic()
        while not self.ended.wait(tick):
            now = time.monotonic()
            # A process that was stopped and goes on has not hung: of a long pause only a moment counts.
            silent = silent + min(now - before, 3 * tick) if _sign is seen else 0.0
            seen, before = _sign, now
            if silent >= self._limit_s:
                text = (
                    f"worker {self._rank} has made no progress for {self._limit_s:g} s "
                    f"(run.step_timeout_s), last: {seen[1]}; every thread's stack: {self.dump()}"
                )
                with contextlib.suppress(Exception):  # telling is good, ending is what must be
                    on_hang(text)
                if not self.ended.is_set():
                    sys.stderr.flush()
                    os._exit(EXIT)


def stacks() -> str:
    """Every thread's Python stack, the most recent call first, as faulthandler writes them."""
    with tempfile.TemporaryFile() as file:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode(errors="replace")
    for ident, name in names.items():
        # It knows threads by their numbers alone.
        text = text.replace(f"hread 0x{ident or 0:016x} ", f"hread 0x{ident or 0:016x} {name} ")
    return text


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
