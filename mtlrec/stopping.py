"""How a run is told to stop: by a signal to its driver, or by a file in its folder."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mtlrec import storage
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError

STOP = "stop"
"""Name of the file in a run's folder. Whoever may write there may stop the run."""
LOOK_S = 2.0
"""Seconds between two looks of the driver for the file."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ask_to_stop(run_url: str, attempt: int) -> None:
    """Leave the file for attempt `attempt`, which holds the run now."""
    who = {"user": _user(), "host": socket.gethostname(), "asked_at": time.time(), "attempt": attempt}
    storage.write(storage.join(run_url, STOP), json.dumps(who).encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _asks(url: str, attempt: int) -> bool:
    """Whether the stop file, if there is one, was left for this attempt."""
    try:
        who = json.loads(storage.read(url))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(who, dict) and who.get("attempt") == attempt


class StopRequest:
    """Set by SIGINT or SIGTERM, or by the stop file: the loop ends at its next step, with a checkpoint.

    A second signal ends at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._failure: str | None = None
        self._hear: Callable[[int, FrameType | None], None] | None = None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[StopRequest]:
        """Hear the signals while the block runs. For the main thread."""

        def hear(number: int, frame: FrameType | None) -> None:
            del frame
            if self._failure is not None:
                raise RuntimeError(self._failure)
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say(f"{signal.Signals(number).name}: stopping at the next step with a checkpoint; again: now")

        self._hear = hear
        before = {number: signal.signal(number, hear) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._hear = None

    def listen_again(self) -> None:
        """Take the signals back from a library that has put handlers of its own in place of ours."""
        if self._hear is not None:
            for number in _SIGNALS:
                signal.signal(number, self._hear)

    def fail(self, text: str) -> None:
        """From another thread: raise RuntimeError(text) in the main thread, once it runs Python again.

        Even out of a system call that waits, as a signal interrupts it.
        """
        self._failure = text
        if self._hear is not None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def watching(self, run_url: str, attempt: int, say: Callable[[str], None]) -> Iterator[None]:
        """Look for the stop file every LOOK_S seconds while the block runs. For the holder of the lease.

        A file from before that was not left for this attempt asked an earlier driver, and goes. Once the
        block has ended well the request is honoured, or the run is over anyway: the file goes too.
        """
        url = storage.join(run_url, STOP)
        # The lease is held before anything is looked for: a request may have come since.
        if not _asks(url, attempt):
            storage.remove(url)
        ended = threading.Event()

        def look() -> None:
            while not self.asked and not ended.wait(LOOK_S):
                # A storage that does not answer now is asked again; whether it is away is others' business.
                with contextlib.suppress(InputError, StorageError), storage.limited(LOOK_S):
                    if storage.exists(url):
                        self.asked = True
                        say(f"{url}: stopping at the next step with a checkpoint")

        thread = threading.Thread(target=look, name="stop-file", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
        with contextlib.suppress(InputError, StorageError):
            storage.remove(url)
