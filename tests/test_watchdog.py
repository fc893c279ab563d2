"""The watchdog: what it takes for life, what it writes, and how it ends a process."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mtlrec import watchdog
from mtlrec.watchdog import Watchdog

ROOT = Path(__file__).parents[1]

STUCK = """
import signal, sys, time
from mtlrec import watchdog
from mtlrec.stopping import StopRequest

def waits_for_ever():
    while True:
        time.sleep(1000)

stop = StopRequest()
dog = watchdog.Watchdog(0.5, 0, sys.argv[1])
watchdog.label("0007")

def hung(text):
    stop.fail(text)
    dog.ended.wait(60 if sys.argv[2] == "hears" else 0.5)

with stop.listening(print), dog.watching(hung):
    if sys.argv[2] == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    watchdog.alive("step 12")
    waits_for_ever()
"""


def stuck(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUCK, str(folder), how]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_fails_with_one_line_that_names_its_stacks(tmp_path: Path) -> None:
    done = stuck(tmp_path, "hears")
    file = tmp_path / "0007-r00000.txt"
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("RuntimeError: worker 0 has made no progress for 0.5 s"), done.stderr
    assert "last: step 12" in line and str(file) in line
    text = file.read_text()
    assert "waits_for_ever" in text and "watchdog" in text, "the stack of every thread"


def test_a_process_that_cannot_be_interrupted_is_ended(tmp_path: Path) -> None:
    done = stuck(tmp_path, "deaf")
    assert done.returncode == watchdog.EXIT and "Traceback" not in done.stderr
    assert "waits_for_ever" in (tmp_path / "0007-r00000.txt").read_text()


def test_without_a_folder_the_stacks_are_what_is_said() -> None:
    assert "test_without_a_folder" in Watchdog(1.0, 3, None).dump()


def test_a_storage_that_fails_does_not_lose_the_stacks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "test_a_storage_that_fails" in Watchdog(1.0, 3, str(tmp_path / "file" / "stacks")).dump()


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    # Between any two looks an hour passes: the process was stopped, and goes on.
    monkeypatch.setattr(watchdog, "LOOK_S", 0.01)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(looks) * 3600.0)
    hung: list[str] = []
    real = time.perf_counter
    with Watchdog(600.0, 0, None).watching(hung.append):
        deadline = real() + 30
        while next(looks) < 40 and real() < deadline:
            threading.Event().wait(0.05)
    assert not hung
