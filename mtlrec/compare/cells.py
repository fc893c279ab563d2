"""Performs the runs of a grid: each is `mtlrec train` (and `evaluate`) in a process group of its own.

OUT/jobs/NAME.json    the resolved job (JSON is YAML), so that the run can be started by hand too
OUT/logs/NAME.log     what the run shows on stderr; in a temporary folder where OUT is object storage
OUT/cells/NAME.json   what is kept between two starts: training time, and what was measured on which data,
                      both of one result of the run
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from mtlrec import storage
from mtlrec.checkpoint.folder import latest
from mtlrec.compare.grid import Cell

COMMAND = (sys.executable, "-m", "mtlrec.cli")
POLL_S = 0.25
GRACE_S = 20.0
"""Seconds that a run has to end after it was told to end at once."""
EXIT_STOPPED = 3
"""Of `mtlrec train`, where it was stopped on request."""


@dataclass(frozen=True)
class Setting:
    """Where and how every run is performed."""

    out: str
    """Folder of the comparison."""
    data: str | None = None
    """What each run's checkpoint is measured on; None: its own job's data.eval, as training ends with."""
    fingerprint: str | None = None
    """Of that data."""
    workers: int | None = None
    """Of that measurement; None: one plain process."""
    address: str | None = None
    parallel: int = 1


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    status: Literal["done", "failed", "stopped"]
    exit: int
    """Of the command that ended last; negative: the signal that ended it."""
    error: str | None = None
    result: dict[str, Any] | None = None
    """Of `train --json`."""
    checkpoint: str | None = None
    """That `metrics` belong to: the run's best where it knows one, else its last."""
    metrics: dict[str, Any] | None = None
    seconds: float = 0.0
    """Of training, over all starts."""


def run_cells(
    cells: Sequence[Cell],
    setting: Setting,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
    changed: Callable[[dict[str, Outcome]], object],
) -> dict[str, Outcome]:
    """Perform every cell, `setting.parallel` side by side; returns outcomes by name, of those that started.

    `say` is given a line when a run starts and ends; `changed` all outcomes so far after each. Once
    `should_stop` is true, runs save and stop, and no other starts. Where an exception (a second Ctrl-C) ends
    the wait, the runs are ended at once.
    """
    runner = _Runner(cells, setting, say)
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(setting.parallel) as pool:
        try:
            waiting: dict[Future[Outcome | None], Cell] = {pool.submit(runner.perform, c): c for c in cells}
            while waiting:
                for future in wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED).done:
                    cell, outcome = waiting.pop(future), future.result()
                    if outcome is not None:
                        outcomes[cell.name] = outcome
                        changed(outcomes)
                if should_stop():
                    runner.stop()
        except BaseException:
            runner.end()
            raise
    return outcomes


class _Runner:
    def __init__(self, cells: Sequence[Cell], setting: Setting, say: Callable[[str], None]) -> None:
        self._cells, self._setting, self._say = cells, setting, say
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._over = 0
        """Runs that have ended."""
        self._times: list[float] = []
        """Seconds of each that was not finished before."""
        folder = storage.local_path(storage.join(setting.out, "logs"))
        self._logs = folder if folder is not None else Path(tempfile.mkdtemp(prefix="mtlrec-compare-"))
        self._logs.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Ask every run, once, to stop at its next step with a checkpoint; none starts from here on."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._interrupt()

    def end(self) -> None:
        """End every run at once: those asked to stop before take a second SIGINT as that."""
        with self._lock:
            self._stopping = True
            self._interrupt()
            children = list(self._children)
        until = time.monotonic() + GRACE_S
        for child in children:
            try:
                child.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def _interrupt(self) -> None:
        for child in self._children:
            child.send_signal(signal.SIGINT)

    def perform(self, cell: Cell) -> Outcome | None:
        """One run from where it stands to its end; None: it was not started, as all are to stop."""
        log = self._logs / f"{cell.name}.log"
        if self._stopping:
            return None
        number = self._cells.index(cell) + 1
        self._say(f"[{number}/{len(self._cells)}] {cell.name}: started, log {log}")
        began = time.monotonic()
        outcome = self._train(cell, log)
        if outcome.status == "done" and self._setting.data is not None:
            outcome = self._measure(cell, outcome, log)
        took = time.monotonic() - began
        new = not (outcome.result or {}).get("already_finished", False)
        with self._lock:
            self._over += 1
            if new and outcome.status == "done":
                self._times.append(took)
        words = {"done": "finished" if new else "had finished before", "failed": "failed"}
        ended = f"{words.get(outcome.status, 'stopped')} after {_duration(took)}"
        why = f": {outcome.error}" if outcome.status == "failed" else ""
        self._say(f"[{number}/{len(self._cells)}] {cell.name}: {ended}{why}{self._left()}")
        return outcome

    def _train(self, cell: Cell, log: Path) -> Outcome:
        job = storage.join(self._setting.out, "jobs", f"{cell.name}.json")
        storage.write(job, json.dumps(cell.job.to_dict(), indent=1, ensure_ascii=False).encode())
        # A run that was removed since begins anew: nothing kept is its own, though its URLs are the same.
        there = latest(storage.join(cell.job.run.storage, cell.name)) is not None
        kept = self._kept(cell) if there else {}
        before = kept.get("seconds", 0.0)
        code, said = self._command("train", [job, *self._at_address()], log)
        if code != 0:
            seconds = before + said.get("seconds", 0.0)
            # One that has not begun to train is what it was.
            self._keep(cell, {**({} if "seconds" in said else kept), "seconds": seconds})
            stopped = code == EXIT_STOPPED or self._stopping
            return Outcome("stopped" if stopped else "failed", code, said.get("error"), seconds=seconds)
        digest = _digest(said)
        if not said.get("already_finished"):
            kept = {"seconds": before + said["seconds"], "result": digest}
        elif kept.get("result") != digest:
            # It came to this end without us. Where we know of another end, our time is of that one.
            before = before if "result" not in kept else 0.0
            kept = {"seconds": before + said["seconds"], "result": digest}
        self._keep(cell, kept)
        best = said.get("best")
        of = best if best is not None else said
        return Outcome("done", 0, None, said, of["checkpoint"], of["metrics"], kept["seconds"])

    def _measure(self, cell: Cell, trained: Outcome, log: Path) -> Outcome:
        """`trained` with what its checkpoint is worth on the data of the comparison."""
        setting = self._setting
        asked = {
            "checkpoint": trained.checkpoint,
            "data": setting.data,
            "fingerprint": setting.fingerprint,
        }
        kept = self._kept(cell)
        measured = kept.get("measured") or {}
        if any(measured.get(key) != value for key, value in asked.items()):
            assert trained.checkpoint is not None and setting.data is not None
            workers = setting.workers
            if workers is None and setting.address is not None:
                workers = cell.job.run.fewest_workers
            words = [trained.checkpoint, "--data", setting.data, "--device", cell.job.run.device]
            words += ["--workers", str(workers)] if workers is not None else []
            code, said = self._command("evaluate", [*words, *(self._at_address() if workers else [])], log)
            if code != 0:
                status: Literal["stopped", "failed"] = "stopped" if self._stopping else "failed"
                error = f"evaluate: {said.get('error')}"
                return Outcome(status, code, error, trained.result, trained.checkpoint, None, trained.seconds)
            measured = {**asked, "metrics": said["metrics"]}
            self._keep(cell, {**kept, "measured": measured})
        return Outcome(
            "done", 0, None, trained.result, trained.checkpoint, measured["metrics"], trained.seconds
        )

    def _command(self, command: str, words: list[str], log: Path) -> tuple[int, dict[str, Any]]:
        """Exit code of `mtlrec command words --json` and its object, which has `error` where it failed.

        Stdout goes to a file: what the command has left running may hold a pipe open for long.
        """
        argv = [*COMMAND, command, *words, "--json"]
        with tempfile.TemporaryFile() as out, open(log, "ab") as err:
            with self._lock:
                if self._stopping:
                    return EXIT_STOPPED, {"error": "stopped before it started"}
                # A session of its own: Ctrl-C on the terminal reaches it through us alone.
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    # `evaluate` has only a URL to find the run by.
                    env={**os.environ, **storage.environment()},
                )
                self._children.add(child)
            try:
                code = child.wait()
            finally:
                with self._lock:
                    self._children.discard(child)
            out.seek(0)
            text = out.read()
        try:
            said = json.loads(text)
            assert isinstance(said, dict)
        except (ValueError, AssertionError):
            said = {}
        if code != 0 and "error" not in said:
            said["error"] = _last_line(log, code)
        elif code == 0 and not said:
            return 1, {"error": _last_line(log, code)}
        return code, said

    def _at_address(self) -> list[str]:
        return ["--address", self._setting.address] if self._setting.address is not None else []

    def _kept(self, cell: Cell) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(storage.read(self._keep_at(cell)))
            if isinstance(found, dict):
                return found
        return {}

    def _keep(self, cell: Cell, what: dict[str, Any]) -> None:
        storage.write(self._keep_at(cell), json.dumps(what, indent=1).encode())

    def _keep_at(self, cell: Cell) -> str:
        return storage.join(self._setting.out, "cells", f"{cell.name}.json")

    def _left(self) -> str:
        """About how long the runs that have not ended will take, from those that have."""
        with self._lock:
            left, times = len(self._cells) - self._over, self._times
            if self._stopping or not left or not times:
                return ""
            seconds = left * sum(times) / len(times) / self._setting.parallel
        return f"; {left} to go, about {_duration(seconds)}"


def _digest(result: dict[str, Any]) -> str:
    """Of what `train --json` says of an end, however often: two ends differ in their seconds at least."""
    lasting = {key: value for key, value in result.items() if key != "already_finished"}
    return hashlib.blake2b(json.dumps(lasting, sort_keys=True).encode(), digest_size=16).hexdigest()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _last_line(log: Path, code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}; see {log}"
    with open(log, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {code}; see {log}"
