"""Runs a function in several plain gloo processes on this machine and brings its results back as files."""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from mtlrec.importing import uncollected

ROOT = Path(__file__).resolve().parents[2]

Results = dict[str, Any]


class ProcessFailure(AssertionError):
    """A process failed or did not end in time. `returncodes` by rank; None: it was stopped by us."""

    def __init__(self, message: str, returncodes: list[int | None]) -> None:
        super().__init__(message)
        self.returncodes = returncodes


def run_processes(
    target: str,
    world_size: int,
    folder: Path,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout: float = 150.0,
    env: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> list[Results]:
    """Call `target` on `world_size` ranks at once and return what each returned, in rank order.

    `target` is "package.module:function". It is called as `function(world, **arguments)` in an initialised
    process group, and returns a dict whose values are numpy arrays or JSON data; `arguments` is JSON data.
    `device`: "cpu" or "cuda", where each rank computes.
    `folder` (made if need be, a new one for every call) holds the group's store, the results and the logs.
    Every process has one arithmetic thread; `env` is added to its environment. Inside `forking` it comes from
    one that has imported all there is to import; else that costs each process several seconds.

    Raises ProcessFailure with the tail of each log where a rank fails or `timeout` seconds pass; the other
    ranks are then stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not (folder / "call.json").exists(), f"{folder} was used by another call"
    call: dict[str, Any] = {"target": target, "world_size": world_size, "timeout": timeout, "device": device}
    call["arguments"] = dict(arguments or {})
    (folder / "call.json").write_text(json.dumps(call))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        **(env or {}),
    }
    start = _afresh if _servers is None or world_size > SERVERS else _servers.start
    processes = [start(folder, rank, environment) for rank in range(world_size)]
    if _servers is not None:
        _servers.turn += 1
    try:
        _wait(processes, folder, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [_read(folder, rank) for rank in range(world_size)]


class _Process(Protocol):
    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def _afresh(folder: Path, rank: int, environment: Mapping[str, str]) -> _Process:
    command = [sys.executable, "-m", "tests.distributed.processes", str(folder), str(rank)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


SERVERS = 3


@contextmanager
def forking() -> Iterator[None]:
    """Within it, the ranks of up to SERVERS processes are forked from some that have imported everything.

    Each rank of a call from another one, and in the next call from the one after it: Python hashes texts
    differently in each, and what depends on the order of a set must not stay hidden.
    """
    global _servers
    _servers = _Servers()
    try:
        yield
    finally:
        _servers.close()
        _servers = None


class _Servers:
    def __init__(self) -> None:
        self.turn = 0
        self._all: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path, rank: int, environment: Mapping[str, str]) -> _Process:
        number = (self.turn + rank) % SERVERS
        if number not in self._all:
            command = [sys.executable, "-m", "tests.distributed.processes"]
            pipe = subprocess.PIPE
            self._all[number] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, bufsize=0
            )
        return _Forked(self._all[number], folder, rank, environment)

    def close(self) -> None:
        for server in self._all.values():
            server.communicate()


class _Forked:
    """A child of a server, which has one at a time."""

    def __init__(
        self, server: subprocess.Popen[bytes], folder: Path, rank: int, environment: Mapping[str, str]
    ) -> None:
        assert server.stdin is not None and server.stdout is not None
        self._says = server.stdout
        (folder / f"{rank}.log").touch()
        call = {"folder": str(folder), "rank": rank, "environment": dict(environment)}
        server.stdin.write(json.dumps(call).encode() + b"\n")
        self._pid: int | None = None
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and select.select([self._says], [], [], 0)[0]:
            self._listen()
        return self._code

    def kill(self) -> None:
        while self._pid is None:
            self._listen()
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        while self._code is None:
            self._listen()
        return self._code

    def _listen(self) -> None:
        """The server says two numbers, each a line: the child's id, and later its exit code."""
        line = self._says.readline()
        assert line, "the process that ranks are forked from has ended"
        number = int(line)
        if self._pid is None:
            self._pid = number
        else:
            self._code = number


_servers: _Servers | None = None


def _serve() -> None:
    """Fork a rank for every line on stdin."""
    with uncollected():  # what the children share is not written to for the sake of looking through it
        importlib.import_module("mtlrec.actions")
    while line := sys.stdin.buffer.readline():
        pid = os.fork()
        if pid == 0:
            _be_rank(**json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _be_rank(folder: str, rank: int, environment: dict[str, str]) -> NoReturn:
    """In a forked process: what `_afresh` would have started."""
    for number, mode, path in (
        (0, os.O_RDONLY, os.devnull),
        (1, os.O_WRONLY | os.O_CREAT, f"{folder}/{rank}.log"),
    ):
        os.dup2(os.open(path, mode), number)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        _main(Path(folder), rank)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _wait(processes: list[_Process], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    failed_at = None
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        # Ranks that wait for the failed one get a moment to say so themselves.
        over = failed_at is not None and time.monotonic() > failed_at + 5.0
        if over or None not in codes or time.monotonic() > deadline:
            logs = "\n".join(
                f"--- rank {rank}, exit code {code}\n{(folder / f'{rank}.log').read_text()[-3000:]}"
                for rank, code in enumerate(codes)
            )
            raise ProcessFailure(f"{folder}: exit codes {codes} (None: still running)\n{logs}", codes)
        time.sleep(0.05)


def _read(folder: Path, rank: int) -> Results:
    results: Results = json.loads((folder / f"{rank}.json").read_text())
    with np.load(folder / f"{rank}.npz", allow_pickle=False) as arrays:
        return {**results, **arrays}


def _main(folder: Path, rank: int) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    from mtlrec.commands.console import leave
    from mtlrec.distributed import backends, shut_down, this_world

    call = json.loads((folder / "call.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group(
        backends(call["device"]),
        store=dist.FileStore(str(folder / "store"), call["world_size"]),
        rank=rank,
        world_size=call["world_size"],
        timeout=datetime.timedelta(seconds=call["timeout"]),
    )
    module, _, name = call["target"].partition(":")
    results = getattr(importlib.import_module(module), name)(this_world(call["device"]), **call["arguments"])
    arrays = {key: value for key, value in results.items() if isinstance(value, np.ndarray)}
    others = {key: value for key, value in results.items() if key not in arrays}
    np.savez(folder / f"{rank}.npz", allow_pickle=False, **arrays)
    (folder / f"{rank}.json").write_text(json.dumps(others))
    shut_down()
    leave(0)


if __name__ == "__main__":
    if sys.argv[1:]:
        _main(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        _serve()
