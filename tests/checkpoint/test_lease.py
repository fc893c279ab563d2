"""One driver a run: who takes it, who is refused, who has to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtlrec import storage
from mtlrec.checkpoint import lease as module
from mtlrec.checkpoint.lease import Lease, LeaseLost
from mtlrec.job.errors import InputError
from mtlrec.storage import StorageError

pytest_plugins = ["tests.s3_server"]

HOLDER = {"command": "mtlrec train job.yaml"}


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    base = str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
    return storage.join(base, "runs", "demo")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times as fast."""
    for name in ("RENEW_S", "TTL_S", "WATCH_S"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)


def record(run: str, attempt: int) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(storage.read(storage.join(run, "attempts", f"{attempt}.json")))
    return body


def elsewhere(run: str, attempt: int, **changes: Any) -> None:
    """Rewrite an attempt as if a process of another machine had made it."""
    body = {**record(run, attempt), "host": "elsewhere", "boot_id": "another", **changes}
    storage.write(storage.join(run, "attempts", f"{attempt}.json"), json.dumps(body).encode())


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


def test_attempts_count_up(run: str) -> None:
    for attempt in (1, 2, 3):
        with Lease.acquire(run, HOLDER) as lease:
            assert lease.attempt == attempt
            lease.check()
        assert record(run, attempt)["released_at"] is not None


def test_ten_come_after_nine(run: str) -> None:
    for attempt in (9, 10):
        storage.create(storage.join(run, "attempts", f"{attempt}.json"), b'{"released_at": 1.0}')
    with Lease.acquire(run, HOLDER) as lease:
        assert lease.attempt == 11


def test_second_driver_is_told_who_holds_it(run: str) -> None:
    with Lease.acquire(run, HOLDER) as lease:
        with pytest.raises(InputError) as raised:
            Lease.acquire(run, {"command": "another"})
        message = str(raised.value)
        for word in (run, "attempt 1", f"process {os.getpid()}", "mtlrec train job.yaml", "another name"):
            assert word in message
        assert "\n" not in message
        lease.check()
    Lease.acquire(run, HOLDER).release()


def test_one_of_many_wins(run: str) -> None:
    """On disk at once; moto's own check is not atomic, so one after the other there."""
    barrier = threading.Barrier(6)

    def attempt(_: int) -> Lease | None:
        if not run.startswith("s3:"):
            barrier.wait()
        try:
            return Lease.acquire(run, HOLDER)
        except InputError:
            return None

    with ThreadPoolExecutor(1 if run.startswith("s3:") else 6) as pool:
        leases = [lease for lease in pool.map(attempt, range(6)) if lease is not None]
    assert [lease.attempt for lease in leases] == [1]
    leases[0].release()


def test_it_is_renewed(run: str, quick: None) -> None:
    with Lease.acquire(run, HOLDER) as lease:
        first = record(run, 1)["renewed_at"]
        wait_until(lambda: record(run, 1)["renewed_at"] > first)
        lease.check()
        assert record(run, 1)["acquired_at"] == first


def test_live_holder_elsewhere_is_refused_at_once(run: str) -> None:
    Lease.acquire(run, HOLDER).release()
    elsewhere(run, 1, released_at=None, renewed_at=time.time() - 20)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"on elsewhere, .*, for another (40|3[0-9]) s if it is dead"):
        Lease.acquire(run, HOLDER)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("age", [3600.0, -3600.0], ids=["expired", "from the future"])
def test_dead_holder_elsewhere_is_watched_then_followed(run: str, quick: None, age: float) -> None:
    Lease.acquire(run, HOLDER).release()
    elsewhere(run, 1, released_at=None, renewed_at=time.time() - age)
    said: list[str] = []
    started = time.monotonic()
    with Lease.acquire(run, HOLDER, said.append) as lease:
        assert lease.attempt == 2
    assert time.monotonic() - started >= module.WATCH_S
    assert len(said) == 1
    assert "elsewhere" in said[0]


def test_living_holder_with_a_wrong_clock_is_left_alone(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.1)
    Lease.acquire(run, HOLDER).release()
    elsewhere(run, 1, released_at=None, renewed_at=time.time() - 3600)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(module.RENEW_S):
            elsewhere(run, 1, renewed_at=record(run, 1)["renewed_at"] + module.RENEW_S)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(InputError, match="held by another driver, attempt 1"):
            Lease.acquire(run, HOLDER)
    finally:
        ended.set()
        thread.join()


def test_holder_that_lets_go_while_watched(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.1)
    Lease.acquire(run, HOLDER).release()
    elsewhere(run, 1, released_at=None, renewed_at=time.time() - 3600)
    timer = threading.Timer(0.3, lambda: elsewhere(run, 1, released_at=time.time()))
    timer.start()
    started = time.monotonic()
    with Lease.acquire(run, HOLDER) as lease:
        assert lease.attempt == 2
    assert time.monotonic() - started < module.WATCH_S / 2
    timer.join()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"renewed_at": "now", "pid": "x"}'])
def test_broken_file_of_a_dead_holder(tmp_path: Path, quick: None, body: bytes) -> None:
    storage.write(str(tmp_path / "attempts" / "1.json"), body)
    with Lease.acquire(str(tmp_path), HOLDER) as lease:
        assert lease.attempt == 2


def test_superseded_holder_has_to_stop(run: str, quick: None) -> None:
    lease = Lease.acquire(run, HOLDER)
    storage.create(storage.join(run, "attempts", "2.json"), b"{}")

    def is_lost() -> bool:
        try:
            lease.check()
        except LeaseLost as lost:
            assert "attempt 1 has to stop: another driver has taken the run over" in str(lost)
            return True
        return False

    wait_until(is_lost)
    lease.release()
    assert record(run, 1)["released_at"] is None, "it has nothing to release"
    assert storage.read(storage.join(run, "attempts", "2.json")) == b"{}"


def test_removed_run_is_not_brought_back(run: str, quick: None) -> None:
    with Lease.acquire(run, HOLDER) as lease:
        with lease._renewing:  # a renewal that is under way would write once more
            storage.remove_tree(run)
        wait_until(lambda: not lease._thread.is_alive())
        with pytest.raises(LeaseLost, match="removed"):
            lease.check()
    assert storage.list_files(run) == []


def test_storage_that_is_away_too_long(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise StorageError("the storage is away")

    with Lease.acquire(run, HOLDER) as lease:
        with monkeypatch.context() as broken:
            broken.setattr(storage, "write", away)
            lease._renewed -= module.TTL_S / 2
            lease.check()
            lease._renewed -= module.TTL_S
            with pytest.raises(LeaseLost, match=r"could not be renewed .* the storage is away"):
                lease.check()
        with pytest.raises(LeaseLost):
            lease.check()


def test_late_renewal_is_made_up_for(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a suspension: the time has passed, and nobody has taken over."""
    with Lease.acquire(run, HOLDER) as lease:
        first = record(run, 1)["renewed_at"]
        lease._renewed -= 2 * module.TTL_S
        lease.check()
        assert record(run, 1)["renewed_at"] > first
        lease._renewed -= 2 * module.TTL_S
        storage.create(storage.join(run, "attempts", "2.json"), b"{}")
        with pytest.raises(LeaseLost, match="taken the run over"):
            lease.check()


def test_lost_answer_to_the_create(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = storage.create

    def create(url: str, data: bytes) -> bool:
        assert genuine(url, data)
        return False

    monkeypatch.setattr(storage, "create", create)
    with Lease.acquire(run, HOLDER) as lease:
        assert lease.attempt == 1


# Real processes


@pytest.fixture
def driver(run: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that holds the run."""
    code = f"""
        import time
        from mtlrec.checkpoint.lease import Lease
        lease = Lease.acquire({run!r}, {HOLDER!r})
        print(lease.attempt, flush=True)
        time.sleep(600)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_killed_driver_is_followed_at_once(run: str, driver: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError, match=f"process {driver.pid}.* while that process lives"):
        Lease.acquire(run, HOLDER)
    # Asleep, and long expired, yet it may wake: not followed.
    driver.send_signal(signal.SIGSTOP)
    body = {**record(run, 1), "renewed_at": time.time() - 3600}
    storage.write(storage.join(run, "attempts", "1.json"), json.dumps(body).encode())
    with pytest.raises(InputError, match=f"process {driver.pid}"):
        Lease.acquire(run, HOLDER)
    # Killed and not yet collected by its parent, so that its number is still taken.
    driver.kill()
    wait_until(lambda: module._process_start(driver.pid) is None)
    started = time.monotonic()
    with Lease.acquire(run, HOLDER) as lease:
        assert lease.attempt == 2
    assert time.monotonic() - started < 5


def test_number_of_a_dead_process_taken_by_another(run: str) -> None:
    Lease.acquire(run, HOLDER).release()
    body = {**record(run, 1), "released_at": None, "pid": 1, "pid_start": 123456789}
    storage.write(storage.join(run, "attempts", "1.json"), json.dumps(body).encode())
    with Lease.acquire(run, HOLDER) as lease:
        assert lease.attempt == 2


def test_other_container_of_this_machine_is_not_judged_by_process_numbers(run: str) -> None:
    Lease.acquire(run, HOLDER).release()
    body = {**record(run, 1), "released_at": None, "pid": 2**22 + 1, "pid_namespace": "pid:[1]"}
    storage.write(storage.join(run, "attempts", "1.json"), json.dumps(body).encode())
    with pytest.raises(InputError, match="held by another driver"):
        Lease.acquire(run, HOLDER)
