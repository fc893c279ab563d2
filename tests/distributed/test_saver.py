"""When a run saves, and what becomes of a save that is under way when something else happens. Two workers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mtlrec import storage
from mtlrec.checkpoint.folder import list_checkpoints
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.job.errors import InputError
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_training import call_of, checkpoint_bytes, recorded_rows
from tests.small_data import small_job, write_small_data

HERE = "tests.distributed.test_saver"
CASES: dict[str, dict[str, Any]] = {
    "straight": {},
    "full": {"every_steps": 5},
    "wanted": {},
    "minutes": {"every_minutes": 1e-9},
    "ended": {"every_steps": 5},
}


def work(world: Any, calls: dict[str, dict[str, Any]]) -> Results:
    """In a worker: every case in turn, in this process. How each ended, and the result of each."""
    from mtlrec.checkpoint.save import Saving
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    class Counter(Silent):
        """Calls `at` before each step, with the number of steps taken since this start."""

        def __init__(self, at: Callable[[int], bool]) -> None:
            self._at, self._steps = at, -1

        def should_save(self) -> bool:
            self._steps += 1
            return self._at(self._steps)

    found: dict[str, Any] = {}

    def run(case: str, at: Callable[[int], bool] = lambda step: False) -> None:
        try:
            found.setdefault(case, []).append(train(Run(**calls[case]), world, Counter(at)))
        except Exception as error:
            found.setdefault(case, []).append(f"{type(error).__name__}: {error}")

    run("straight")
    run("minutes")
    # Only one rank is told, and only once.
    run("wanted", lambda step: world.rank == 1 and step == 3)

    fsync, is_full = os.fsync, [False]

    def full(descriptor: int) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def fill(step: int) -> bool:
        is_full[0] = world.rank == 1 and step >= 10
        return False

    with mock.patch.object(os, "fsync", full):
        run("full", fill)
    run("full")

    def end(step: int) -> bool:
        if step == 7:
            raise InputError("enough")
        return False

    # As if the storage took longer than the two steps that are left.
    with mock.patch.object(Saving, "advance", lambda *signals: None):
        run("ended", end)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("saver")
    write_small_data(folder / "data")
    calls = {}
    for name, checkpoint in CASES.items():
        job = small_job(folder / "data", folder / "runs", name)
        job["run"] |= {"max_steps": 20, "record_rows": True, "checkpoint": {"keep_last": 99, **checkpoint}}
        calls[name] = call_of(job)
    return run_processes(f"{HERE}:work", 2, folder / "processes", {"calls": calls})


def steps(result: dict[str, Any]) -> list[int]:
    return [found.step for found in list_checkpoints(result["run_dir"])]


def test_a_full_disk_stops_all_and_the_checkpoint_before_it_stands(results: list[Results]) -> None:
    for result in results:
        kind, _, words = result["full"][0].partition(": ")
        assert kind == "StorageError" and "the disk is full" in words
    first, rest = results[0]["straight"][0], results[0]["full"][1]
    assert steps(rest) == [5, 10, 15, 20]
    names = [storage.name(found.url) for found in list_checkpoints(rest["run_dir"])]
    assert [name.split(".")[1] for name in names] == ["a0001", "a0002", "a0002", "a0002"]
    assert checkpoint_bytes(rest) == checkpoint_bytes(first), "resumed from step 5, to the bit"
    assert recorded_rows(rest["run_dir"]) == recorded_rows(first["run_dir"])
    left = storage.list_folders(storage.join(rest["run_dir"], "checkpoints"))
    assert left == names, "nothing of the save that failed"


def test_all_save_at_the_step_at_which_one_of_them_is_told_to(results: list[Results]) -> None:
    assert steps(results[0]["wanted"][0]) == [4, 20]


def test_a_save_by_the_clock_is_at_one_step_of_all(results: list[Results]) -> None:
    result = results[0]["minutes"][0]
    found = steps(result)
    assert found[0] == 1 and found[-1] == 20 and len(found) > 2, (
        "one after the other, as they become complete"
    )
    assert checkpoint_bytes(result) == checkpoint_bytes(results[0]["straight"][0])


def test_what_is_being_written_is_completed_where_all_end_together(
    results: list[Results], tmp_path: Path
) -> None:
    assert [result["ended"] for result in results] == [["InputError: enough"]] * 2
    run_dir = storage.join(storage.parent(results[0]["straight"][0]["run_dir"]), "ended")
    (only,) = list_checkpoints(run_dir)
    assert only.step == 5 and read_manifest(only.url).meta["step"] == 5
