"""The watchdog: what it takes for life, what it writes, and how it ends a process."""

from __future__ import annotations

import itertools
import json
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


STUCK_ALONE = """
import argparse, signal, sys, threading, types

def waits_for_ever(*given):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Event().wait()

# As the command calls it, but for what is trained.
sys.modules["mtlrec.actions"] = types.SimpleNamespace(perform=waits_for_ever)
from mtlrec import launch
from mtlrec.commands.console import FAILED, fail
from mtlrec.stopping import StopRequest

launch.GRACE_S = 0.5
run = argparse.Namespace(workers=0, threads=1, device="cpu", step_timeout_s=0.5)
words = lambda text: fail(argparse.Namespace(json=True), text, FAILED)
how = {"name": "", "address": None, "show": print, "alive": print, "last_words": words}
launch.launch("train", {"url": sys.argv[1]}, run, stop=StopRequest(), **how)
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


def test_the_one_object_on_stdout_is_there_where_a_lone_process_has_to_be_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK_ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == watchdog.EXIT, done.stderr
    said = json.loads(done.stdout)
    assert said["exit"] == 1 and said["error"].startswith("worker 0 has made no progress for 0.5 s")
    assert done.stderr.strip().splitlines()[-1] == f"mtlrec: {said['error']}"
    assert "waits_for_ever" in (tmp_path / "stacks" / "start-r00000.txt").read_text()


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
