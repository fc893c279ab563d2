"""One driver a run: a lease on the run's folder, by conditional create alone, on disk and on object storage.

`attempts/<n>.json` belongs to attempt n. Whoever creates the file holds the run, and only the holder writes
it again: every RENEW_S seconds with a new time, and at the end as released. A higher attempt ends a lower
one, so no file is ever contended for. A holder that could not renew for TTL_S seconds considers itself out.

Who finds the newest attempt unreleased takes it over only if its process is known to be gone (on this
machine), or if it looks expired and its file does not change for WATCH_S seconds: watching needs no common
clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mtlrec import storage
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError

RENEW_S = 10.0
TTL_S = 60.0
WATCH_S = 25.0
"""More than two renewals: a holder that lives, by whatever clock, is seen to renew."""
RELEASE_S = 5.0
"""How long an end waits for a renewal that hangs."""
_TRIES = 5


class LeaseLost(RuntimeError):
    """Another driver has taken the run over, or its storage could not be reached for too long."""


class Lease:
    """The right to write to a run, renewed in the background from `acquire` to `release`."""

    def __init__(self, run_url: str, record: dict[str, Any]) -> None:
        self.attempt: int = record["attempt"]
        """1 for the run's first driver; later ones are higher."""
        self._run_url, self._record = run_url, record
        self._renewed = _steady_clock()
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, run_url: str, holder: dict[str, Any], say: Callable[[str], None] | None = None) -> Lease:
        """Take the run, or raise InputError that names who holds it and until when.

        `holder` is told to those who come later (command, job, ...), beside host, process and user. `say` is
        given a line where an expired lease on another machine makes this take WATCH_S seconds.
        """
        nonce = secrets.token_hex(16)
        for _ in range(_TRIES):
            newest, body = _newest(run_url)
            if newest:
                _refuse_if_held(run_url, newest, body, say)
            now = time.time()
            record = {
                **holder,
                **_myself(),
                "attempt": newest + 1,
                "nonce": nonce,
                "acquired_at": now,
                "renewed_at": now,
                "released_at": None,
            }
            url = _attempt_url(run_url, newest + 1)
            # A create that answers no may have answered its own first try, whose answer was lost.
            if storage.create(url, _dump(record)) or _parse(storage.read(url)).get("nonce") == nonce:
                return cls(run_url, record)
        raise InputError(f"{run_url}: several drivers try to take this run at once; start one of them again")

    @property
    def name(self) -> str:
        """Of the file that is renewed."""
        return storage.name(_attempt_url(self._run_url, self.attempt))

    def check(self) -> None:
        """Raise LeaseLost if the run is no longer ours. Cheap: for every step."""
        if self._lost is None and _steady_clock() - self._renewed > TTL_S:
            # We were suspended, or the storage is away. If nobody has taken over, one renewal mends it.
            try:
                self._renew()
            except (InputError, StorageError) as error:
                self._lost = f"its lease could not be renewed for {TTL_S:.0f} s: {error}"
        if self._lost is not None:
            raise LeaseLost(f"{self._run_url}: attempt {self.attempt} has to stop: {self._lost}")

    def release(self) -> None:
        """Let go, so that the next driver need not wait. Where that cannot be written, the lease expires."""
        self._ended.set()
        self._thread.join(RELEASE_S)
        if self._lost is None and self._record["released_at"] is None and not self._thread.is_alive():
            self._record["released_at"] = time.time()
            with contextlib.suppress(InputError, StorageError):
                self._renew()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _keep(self) -> None:
        while self._lost is None and not self._ended.wait(RENEW_S):
            # Tried again in RENEW_S seconds; check() ends the run where this goes on for TTL_S.
            with contextlib.suppress(InputError, StorageError):
                self._renew()

    def _renew(self) -> None:
        # Whoever waits for this must not wait much longer than the lease lasts.
        with self._renewing, storage.limited(RENEW_S):
            if storage.exists(_attempt_url(self._run_url, self.attempt + 1)):
                self._lost = "another driver has taken the run over"
            elif not storage.exists(_attempt_url(self._run_url, self.attempt)):
                # Written again, it would bring back a folder that somebody has removed.
                self._lost = "its run folder was removed"
            else:
                before = _steady_clock()
                self._record["renewed_at"] = time.time()
                storage.write(_attempt_url(self._run_url, self.attempt), _dump(self._record))
                self._renewed = before


def holder(run_url: str) -> dict[str, Any] | None:
    """What the newest attempt says of itself, with a `description`; None where it has let go or is gone.

    Raises InputError where there was no attempt at all: `run_url` is no run.
    """
    newest, body = _newest(run_url)
    if not newest:
        raise InputError(f"{run_url}: not a run's folder: nobody has trained there")
    record = _parse(body)
    if record.get("released_at") is not None or _is_alive_here(record) is False:
        return None
    return {**record, "attempt": newest, "description": _describe(record)}


def _refuse_if_held(run_url: str, attempt: int, body: bytes, say: Callable[[str], None] | None) -> None:
    """Return if attempt `attempt`, whose file holds `body`, has ended; else raise InputError."""
    record = _parse(body)
    if record.get("released_at") is not None:
        return
    here = _is_alive_here(record)
    if here is False:
        return
    renewed_at = record.get("renewed_at")
    age = time.time() - renewed_at if isinstance(renewed_at, float) else float("inf")
    # From the future: a clock is wrong, and says nothing of how long the lease has to go.
    looks_live = -RENEW_S <= age <= TTL_S
    if here or looks_live:
        until = (
            "while that process lives" if here else f"for another {TTL_S - max(age, 0):.0f} s if it is dead"
        )
        raise _held(run_url, attempt, record, until)
    if say is not None:
        say(
            f"{run_url}: attempt {attempt} ({_describe(record)}) has not renewed its lease; "
            f"watching it for {WATCH_S:.0f} s before taking over"
        )
    ends = _steady_clock() + WATCH_S
    while (left := ends - _steady_clock()) > 0:
        time.sleep(min(left, RENEW_S / 2))
        with contextlib.suppress(FileNotFoundError):
            now = storage.read(_attempt_url(run_url, attempt))
            if _parse(now).get("released_at") is not None:
                return
            if now != body:
                raise _held(run_url, attempt, _parse(now), f"for {TTL_S:.0f} s after its last renewal")


def _held(run_url: str, attempt: int, record: dict[str, Any], until: str) -> InputError:
    return InputError(
        f"{run_url}: this run is held by another driver, attempt {attempt} ({_describe(record)}), {until}; "
        "stop it or wait, or give this job another name"
    )


def _describe(record: dict[str, Any]) -> str:
    process = f"{record.get('user', '?')} on {record.get('host', '?')}, process {record.get('pid', '?')}"
    return f"{process}: {record['command']}" if record.get("command") else process


def _newest(run_url: str) -> tuple[int, bytes]:
    """Number and content of the newest attempt, or (0, b"")."""
    names = [Path(file.path).stem for file in storage.list_files(storage.join(run_url, "attempts"), ".json")]
    attempt = max((int(name) for name in names if name.isdecimal()), default=0)
    if not attempt:
        return 0, b""
    try:
        return attempt, storage.read(_attempt_url(run_url, attempt))
    except FileNotFoundError:  # the run was removed between the two
        return 0, b""


def _attempt_url(run_url: str, attempt: int) -> str:
    return storage.join(run_url, "attempts", f"{attempt}.json")


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def _parse(body: bytes) -> dict[str, Any]:
    """{} for a file that is broken, or written only in part: watching tells whether its holder lives."""
    try:
        record = json.loads(body)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


# Processes


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    start = _process_start(pid)
    return {
        "host": socket.gethostname(),
        "boot_id": _read_line("/proc/sys/kernel/random/boot_id"),
        # Two containers of one machine may agree on its name and boot, but count processes apart.
        "pid_namespace": _pid_namespace(),
        "pid": pid,
        "pid_start": start,
        "user": os.environ.get("USER") or str(os.getuid()),
    }


def _is_alive_here(record: dict[str, Any]) -> bool | None:
    """Whether the holder's process lives, if it is one of this machine's that we can see; else None."""
    me = _myself()
    place = ("host", "boot_id", "pid_namespace")
    pid, start = record.get("pid"), record.get("pid_start")
    if not all(me[key] and me[key] == record.get(key) for key in place):
        return None
    return _process_start(pid) == start if isinstance(pid, int) and isinstance(start, int) else None


def _process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells it from a later one of the same number.

    None where there is no such process, or only its remains (a zombie).
    """
    stat = _read_line(f"/proc/{pid}/stat")
    if stat is None:
        return None
    # The command's name stands in parentheses and may have any character itself.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZXx" else int(fields[19])


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _read_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _steady_clock() -> float:
    """Seconds that nobody sets, and that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
