"""The stop file: whom it asks, and when it goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mtlrec import stopping
from mtlrec.stopping import STOP, StopRequest, ask_to_stop

ATTEMPT = 4


def watched(run: Path, attempt: int = ATTEMPT) -> bool:
    """Whether a driver that begins to look now hears a request; the file is gone when it has ended."""
    said: list[str] = []
    stop = StopRequest()
    with stop.watching(str(run), attempt, said.append):
        deadline = time.monotonic() + (30 if (run / STOP).exists() else 0)
        while not stop.asked and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(said) == stop.asked
    assert not (run / STOP).exists()
    return stop.asked


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOK_S", 0.01)


def test_a_request_that_came_before_the_driver_looks_is_heard(tmp_path: Path) -> None:
    ask_to_stop(str(tmp_path), ATTEMPT)
    assert watched(tmp_path)


def test_a_request_to_an_earlier_driver_is_not(tmp_path: Path) -> None:
    ask_to_stop(str(tmp_path), ATTEMPT - 1)
    assert not watched(tmp_path)
    (tmp_path / STOP).write_text("by hand, from before")
    assert not watched(tmp_path)
    (tmp_path / STOP).write_text(json.dumps([ATTEMPT]))
    assert not watched(tmp_path)


def test_who_has_no_name_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(stopping.getpass, "getuser", nobody)
    ask_to_stop(str(tmp_path), ATTEMPT)
    assert watched(tmp_path)
