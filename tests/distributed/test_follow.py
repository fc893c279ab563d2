"""A run that follows its data: shards appear while it trains; neither workers nor crashes change a thing."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mtlrec.checkpoint.folder import checkpoint_url
from mtlrec.control import Silent
from mtlrec.job.job import job_from_dict
from mtlrec.preflight import open_run
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_training import checkpoint_bytes, recorded_rows
from tests.small_data import small_job, write_small_data

HERE = "tests.distributed.test_follow"
ROWS = (402, 310, 188)
"""Of each generation; epochs are EPOCHS for each."""
EPOCHS = 2
STEPS = [EPOCHS * -(-rows // 48) for rows in ROWS]
DECAY = 0.25


class Crash(Exception):
    """Raised on every rank at the same place."""


class Recorder(Silent):
    """Losses of every step; and, once so many steps were taken or a wait has begun, an end."""

    def __init__(self, crash_at: int | None, stop_waiting_for: int | None) -> None:
        self.losses: list[list[float]] = []
        self.said: list[str] = []
        self._crash_at, self._stop_for, self._steps = crash_at, stop_waiting_for, 0

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["what"] == "train":
            self.losses.append([event["losses"].get(task, 0.0) for task in ("click", "rating")])
        if event["kind"] == "log":
            self.said.append(event["text"])

    def should_save(self) -> bool:
        self._steps += 1
        if self._steps == self._crash_at:
            raise Crash
        return False

    def should_stop(self) -> bool:
        return any(f"generation {self._stop_for} is done; waiting" in text for text in self.said)


def work(world: Any, calls: list[dict[str, Any]], measure: list[dict[str, Any]]) -> Results:
    """In a worker: train each in turn, some until they crash; losses, results, and states at each decay.

    Then the metrics of some checkpoints, each on one file, with the job that their run has resolved.
    """
    from mtlrec import actions
    from mtlrec import train as module
    from mtlrec.preflight import Run
    from mtlrec.sharding import local_blocks

    real, found = module.decay_state, Results(results=[], decayed=[], said=[], measured=[])
    for index, call in enumerate(calls):
        decays = 0

        def decay(model: Any, factor: float, call: dict[str, Any] = call) -> None:
            nonlocal decays
            before = {block.table: block.state["sum"].clone() for block in local_blocks(model)}
            real(model, factor)
            for block in local_blocks(model):
                kind = "replicated" if block.replicated else "sharded"
                right = bool((block.state["sum"] == before[block.table] * factor).all())
                found["decayed"].append([kind, right, bool(before[block.table].any())])
            decays += 1
            if decays == call["crash_at_decay"]:
                raise Crash

        module.decay_state = decay
        recorder = Recorder(call["crash_at"], call["stop_waiting_for"])
        try:
            found["results"].append(module.train(Run(**call["run"]), world, recorder))
        except Crash:
            found["results"].append(None)
        found[f"losses{index}"] = np.array(recorder.losses)
        found["said"].append(recorder.said)
    module.decay_state = real
    for payload in measure:
        job = yaml.safe_load(Path(payload["job"]).read_text())
        measured = actions.perform("evaluate", {**payload, "job": job}, world, Silent())
        found["measured"].append(measured["metrics"])
    return found


class Publisher:
    """Puts the next shard of a run beside those that are there once a generation's record appears: first half
    of its bytes, then all."""

    def __init__(self, staged: Path, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self._bytes = [file.read_bytes() for file in sorted(staged.iterdir())]
        self._names = [file.name for file in sorted(staged.iterdir())]
        folder.mkdir(parents=True)
        self._write(0, self._bytes[0])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._publish, daemon=True)
        self._thread.start()

    def _write(self, number: int, data: bytes) -> None:
        (self.folder / self._names[number]).write_bytes(data)

    def _publish(self) -> None:
        for number in range(1, len(self._names)):
            while not (self.run / "generations" / f"{number - 1}.json").exists():
                if self._over.wait(0.01):
                    return
            data = self._bytes[number]
            self._write(number, data[: len(data) // 2])
            time.sleep(0.1)
            self._write(number, data)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


class Session:
    """One worker and two train the same generations; two crash twice and go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, dict[str, Any]] = {}
        self.found: list[Results] = []
        staged = folder / "staged"
        staged.mkdir()
        for number, rows in enumerate(ROWS):
            write_small_data(folder / f"g{number}", rows=rows, shards=1, seed=number)
            (folder / f"g{number}" / "part-0.parquet").rename(staged / f"day-{number}.parquet")
        run = folder / "runs" / "one"
        measure = [
            {
                "job": str(run / "job.yaml"),
                "checkpoint": checkpoint_url(str(run), sum(STEPS[:number]), 1),
                "data": str(folder / "data-one" / f"day-{number}.parquet"),
                "batch_size": 48,
            }
            for number in (1, 2)
        ]
        self._train("one", 1, [("one", {}), ("stopped", {"stop_waiting_for": 2})], measure)
        calls = [
            ("two", {}),
            # Generation 2 was written down, measured and its state decayed, and nothing of it was saved.
            ("boundary", {"crash_at_decay": 2}),
            ("boundary", {}),
            # Steps 16 to 18 of generation 0, in its second epoch; 27 and 28 of all, in generation 1.
            ("inside", {"crash_at": 29}),
            ("inside", {}),
        ]
        self._train("two", 2, calls, [])

    def _train(
        self,
        tag: str,
        workers: int,
        runs: list[tuple[str, dict[str, Any]]],
        measure: list[dict[str, Any]],
    ) -> None:
        publishers, calls = {}, []
        for name, how in runs:
            job = self.job(name)
            if name not in publishers:
                data, run = Path(job["data"]["train"]), self.folder / "runs" / name
                publishers[name] = Publisher(self.folder / "staged", data, run)
                opened = open_run(job_from_dict(job, "test"), {}, lambda event: None)
                assert isinstance(opened, tuple)
                opened[1].release()
                given = asdict(opened[0])
            defaults = {"crash_at": None, "crash_at_decay": None, "stop_waiting_for": None}
            calls.append({"run": given, **defaults, **how})
        try:
            arguments = {"calls": calls, "measure": measure}
            found = run_processes(f"{HERE}:work", workers, self.folder / tag, arguments, timeout=300)
        finally:
            for publisher in publishers.values():
                publisher.end()
        self.found += found
        for index, (name, _) in enumerate(runs):
            result = found[0]["results"][index]
            if result is not None:
                self.results[name] = {**result, "losses": found[0][f"losses{index}"]}

    def job(self, name: str) -> dict[str, Any]:
        job = small_job(self.folder / f"data-{name}", self.folder / "runs", name, data__eval=None)
        job["data"]["follow"] = {"poll_s": 0.3, "state_decay": DECAY}
        # One table that every worker holds whole, the others by rows.
        job["run"]["sharding"] = {"hour": "data_parallel", "user_id": "row_wise", "item_id": "row_wise"}
        job["run"] |= {"epochs": EPOCHS, "record_rows": True}
        if name != "stopped":
            # No wait behind the last generation, and none that a busy machine could outlast before.
            job["run"]["max_steps"] = sum(STEPS)
        job["run"]["checkpoint"] = {"every_steps": 9, "keep_last": 100}
        return job


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("session"))


def test_every_row_of_every_generation_is_trained_once_an_epoch(session: Session) -> None:
    for name, result in session.results.items():
        assert result["steps"] == sum(STEPS), name
        recorded = recorded_rows(result["run_dir"])
        begin = 0
        for rows, steps in zip(ROWS, STEPS, strict=True):
            for epoch in range(EPOCHS):
                first = begin + epoch * steps // EPOCHS
                trained = [row for step in recorded[first : first + steps // EPOCHS] for row in step]
                assert sorted(trained) == list(range(rows)), (name, begin, epoch)
            begin += steps
    generations = session.results["one"]["generations"]
    assert [each["generation"] for each in generations] == [0, 1, 2]
    assert [each["rows"] for each in generations] == list(ROWS)
    assert [each["step"] for each in generations] == [0, STEPS[0], STEPS[0] + STEPS[1]]


def test_workers_change_nothing(session: Session) -> None:
    one, two = session.results["one"], session.results["two"]
    assert recorded_rows(one["run_dir"]) == recorded_rows(two["run_dir"])
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)


@pytest.mark.parametrize("crash", ["boundary", "inside"])
def test_a_crash_between_generations_or_inside_one_changes_no_bit(session: Session, crash: str) -> None:
    straight, resumed = session.results["two"], session.results[crash]
    assert len(resumed["losses"]) < sum(STEPS), "it did not crash"
    assert checkpoint_bytes(resumed) == checkpoint_bytes(straight)
    assert recorded_rows(resumed["run_dir"]) == recorded_rows(straight["run_dir"])


def test_the_state_is_decayed_once_a_generation_in_every_kind_of_table(session: Session) -> None:
    """To the bit once: another decay of the crashed generation would differ from the straight run above."""
    for found in session.found:
        assert all(right for _, right, _ in found["decayed"])
        assert any(was for _, _, was in found["decayed"])
    assert {kind for found in session.found for kind, _, _ in found["decayed"]} == {"replicated", "sharded"}


def test_each_generation_is_measured_before_it_is_trained(session: Session) -> None:
    """By the model that the generation before has left: `evaluate` of that checkpoint says the same."""
    result = session.results["one"]
    folder = Path(result["run_dir"]) / "generations"
    assert not (folder / "0.metrics.json").exists()
    for number, measured in zip((1, 2), session.found[0]["measured"], strict=True):
        told = json.loads((folder / f"{number}.metrics.json").read_text())
        assert told["metrics"] == result["generations"][number]["metrics"] == measured
        assert told["step"] == sum(STEPS[:number])
        assert told["metrics"]["all"]["click"]["rows"] == ROWS[number]


def test_a_request_to_stop_is_heard_while_waiting(session: Session) -> None:
    stopped = session.results["stopped"]
    assert stopped["stopped"] and not (Path(stopped["run_dir"]) / "result.json").exists()
    assert stopped["steps"] == sum(STEPS), "what was there was trained"
    assert checkpoint_bytes(stopped) == checkpoint_bytes(session.results["one"])


def test_records_are_alike_and_shards_are_those_of_the_names(session: Session) -> None:
    for name in ("one", "two", "boundary", "inside"):
        for number in range(len(ROWS)):
            record = json.loads(
                (session.folder / "runs" / name / "generations" / f"{number}.json").read_text()
            )
            assert [shard["path"] for shard in record["shards"]] == [f"day-{number}.parquet"]
            assert (
                record["rows"]
                == pq.read_metadata(session.folder / f"data-{name}" / f"day-{number}.parquet").num_rows
            )
