"""Runs a function in several plain gloo processes on this machine and brings its results back as files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
) -> list[Results]:
    """Call `target` on `world_size` ranks at once and return what each returned, in rank order.

    `target` is "package.module:function". It is called as `function(world, **arguments)` in an initialised
    process group, and returns a dict whose values are numpy arrays or JSON data; `arguments` is JSON data.
    `folder` (made if need be, a new one for every call) holds the group's store, the results and the logs.
    Every process has one arithmetic thread; `env` is added to its environment. Importing torchrec costs each
    process several seconds, so let one call try many things.

    Raises ProcessFailure with the tail of each log where a rank fails or `timeout` seconds pass; the other
    ranks are then stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert not (folder / "call.json").exists(), f"{folder} was used by another call"
    call: dict[str, Any] = {"target": target, "world_size": world_size, "timeout": timeout}
    call["arguments"] = dict(arguments or {})
    (folder / "call.json").write_text(json.dumps(call))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        **(env or {}),
    }
    processes = []
    for rank in range(world_size):
        command = [sys.executable, "-m", "tests.distributed.processes", str(folder), str(rank)]
        with (folder / f"{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        _wait(processes, folder, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [_read(folder, rank) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
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
    from mtlrec.distributed import shut_down, this_world

    call = json.loads((folder / "call.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), call["world_size"]),
        rank=rank,
        world_size=call["world_size"],
        timeout=datetime.timedelta(seconds=call["timeout"]),
    )
    module, _, name = call["target"].partition(":")
    results = getattr(importlib.import_module(module), name)(this_world("cpu"), **call["arguments"])
    arrays = {key: value for key, value in results.items() if isinstance(value, np.ndarray)}
    others = {key: value for key, value in results.items() if key not in arrays}
    np.savez(folder / f"{rank}.npz", allow_pickle=False, **arrays)
    (folder / f"{rank}.json").write_text(json.dumps(others))
    shut_down()
    leave(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
