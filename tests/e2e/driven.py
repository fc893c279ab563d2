"""`mtlrec ...` in processes of their own, to be watched, asked and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.test_training import recorded_rows


class Command:
    """`mtlrec ...` in a process of its own, with a Ray of its own."""

    def __init__(self, home: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.err = home / f"{time.monotonic_ns()}.err"
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mtlrec.cli", *arguments, "--json"],
                cwd=home,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                # Ray's sockets have a limit on the length of their path, which pytest's folders exceed.
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )

    def result(self, code: int = 0, timeout: float = 240) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout)
        assert self.process.returncode == code, self.err.read_text()[-4000:]
        assert "Traceback" not in self.err.read_text()
        return json.loads(out)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.err.read_text()[-4000:]
            assert time.monotonic() < deadline, self.err.read_text()[-4000:]
            time.sleep(0.1)


def wait_until_gone(processes: list[psutil.Process], timeout: float = 120) -> None:
    _, alive = psutil.wait_procs(processes, timeout)
    assert not alive, [process.cmdline() for process in alive]


def checkpoints(home: Path, name: str) -> list[str]:
    return sorted(
        str(path.parent.name) for path in (home / "runs" / name).glob("checkpoints/*/manifest.json")
    )


def final_metrics_agree(result: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    for task, numbers in undisturbed["metrics"]["all"].items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert result["metrics"]["all"][task][name] == pytest.approx(value, rel=1e-3), name


def trained_rows(home: Path, name: str) -> list[list[int]]:
    """Rows of every step; where a step was trained again after a crash, as the last attempt did it."""
    return recorded_rows(str(home / "runs" / name))
