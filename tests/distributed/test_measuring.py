"""While `data.eval` is measured a checkpoint gets on, a notice saves at once, and a stop ends the run.

Two workers. Whatever happened, what is learnt and judged in the end is that of an undisturbed run.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mtlrec.checkpoint.folder import checkpoint_url, latest
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.control import Silent
from mtlrec.job.job import job_from_dict
from mtlrec.preflight import open_run
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_training import call_of, checkpoint_bytes, recorded_rows
from tests.small_data import small_job, write_small_data

HERE = "tests.distributed.test_measuring"
EVERY, STEPS = 10, 30
NOTICE, STOP, CRASH, JOIN = "notice", "stop", "crash", "join"
Acts = list[tuple[int, int, str]]
"""What happens: in which measurement of a start (from 1), before which of its batches (from 1)."""
CASES: dict[str, list[Acts]] = {
    "straight": [[]],
    "noticed": [[(2, 5, NOTICE)]],
    # The first batch is not scored before it is heard, the last exchange comes behind the last batch.
    "early-and-late": [[(1, 1, NOTICE), (3, 11, NOTICE)]],
    "gone": [[(2, 5, NOTICE), (3, 5, CRASH)], []],
    "stopped": [[(2, 5, STOP)], []],
    "stopped-at-the-end": [[(3, 5, STOP)], [(1, 5, STOP)], []],
    "not-judged": [[(1, 5, STOP)], []],
    "beside": [[(1, 3, JOIN), (1, 6, JOIN)]],
    "follows": [[], [(1, 2, STOP)], []],
}
"""Each start of each run. Two epochs are 64 steps, a measurement 10 batches."""


class Crash(Exception):
    """Raised on every rank at the same place."""


class Doer(Silent):
    """Does what is to be done in a measurement; and what it has seen, in order."""

    def __init__(self, rank: int, acts: Acts) -> None:
        self.seen: list[str] = []
        self.measuring = threading.Event()
        self._rank, self._acts = rank, acts
        self._measurement, self._batch, self._stops, self._saves = 0, 0, False, False

    def begin(self) -> None:
        self.seen.append("measure")
        self._measurement, self._batch = self._measurement + 1, 0
        self.measuring.set()

    def end(self, well: bool) -> None:
        self.seen.append("measured" if well else "broken off")
        self.measuring.clear()

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "saved":
            self.seen.append(f"saved {event['step']}")

    def should_stop(self) -> bool:
        if self.measuring.is_set():
            self._batch += 1
            for measurement, batch, what in self._acts:
                if (measurement, batch) == (self._measurement, self._batch):
                    self._do(what)
        return self._stops

    def should_save(self) -> bool:
        saves, self._saves = self._saves, False
        return saves

    def _do(self, what: str) -> None:
        if what == CRASH:
            raise Crash
        if what == JOIN:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
        # One rank alone is told.
        elif self._rank == 1:
            self._stops, self._saves = what == STOP, what == NOTICE


def work(world: Any, calls: list[dict[str, Any]]) -> Results:
    """In a worker: each start in turn; its result, or None where it crashed, and what was seen."""
    from mtlrec import train as module
    from mtlrec.checkpoint.save import Saving
    from mtlrec.preflight import Run

    found: Results = {"results": [], "seen": [], "states": []}
    measure, write = module.evaluate, Saving._write
    for call in calls:
        doer = Doer(world.rank, [tuple(act) for act in call["acts"]])
        if call["publish"] and world.rank == 0:
            shutil.copy(*call["publish"])

        def measured(*given: Any, doer: Doer = doer, **options: Any) -> Any:
            doer.begin()
            well = False
            try:
                result = measure(*given, **options)
                well = True
                return result
            finally:
                doer.end(well)

        def written(saving: Saving, doer: Doer = doer) -> None:
            # As on a slow storage: training gets to the measurement first.
            assert not saving.url.endswith("9.a0001") or doer.measuring.wait(60)
            write(saving)

        with mock.patch.object(module, "evaluate", measured), mock.patch.object(Saving, "_write", written):
            try:
                result = module.train(Run(**call["run"]), world, doer)
            except Crash:
                result = None
        found["results"].append(result)
        found["seen"].append(doer.seen)
        newest = latest(call["run"]["url"])
        meta = read_manifest(newest.url).meta if newest else {}
        found["states"].append({key: meta.get(key) for key in ("step", "metrics", "judge")})
    return found


class Runs:
    """The starts of each case: `results`, what rank 0 has `seen`, `states` of the last checkpoint behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_small_data(folder / "data")
        write_small_data(folder / "valid", rows=480, shards=2, seed=1)
        write_small_data(folder / "later", rows=300, shards=1, seed=1)
        (folder / "later" / "part-0.parquet").rename(folder / "later" / "part-9.parquet")
        calls, names = [], []
        for name, starts in CASES.items():
            run = self._follows(name) if name == "follows" else call_of(self._job(name))
            for number, acts in enumerate(starts):
                publish = None
                if (name, number) == ("follows", 1):
                    publish = [str(folder / "later" / "part-9.parquet"), str(folder / "growing")]
                calls.append({"run": run, "acts": acts, "publish": publish})
                names.append(name)
        found = run_processes(f"{HERE}:work", 2, folder / "group", {"calls": calls}, timeout=400)[0]
        self.results: dict[str, list[Any]] = {}
        self.seen: dict[str, list[Any]] = {}
        self.states: dict[str, list[Any]] = {}
        for key in ("results", "seen", "states"):
            for name, each in zip(names, found[key], strict=True):
                getattr(self, key).setdefault(name, []).append(each)

    def _job(self, name: str) -> dict[str, Any]:
        valid = str(self.folder / "valid")
        job = small_job(self.folder / "data", self.folder / "runs", name, data__eval=valid)
        job["run"] |= {"max_steps": STEPS, "record_rows": True, "checkpoint": {"keep_last": 99}}
        if name != "not-judged":
            job["run"]["evaluate"] = {"every_steps": EVERY, "metric": ["click/auc"]}
        if name == "beside":
            job["run"]["checkpoint"]["every_steps"] = EVERY - 1
        return job

    def _follows(self, name: str) -> dict[str, Any]:
        write_small_data(self.folder / "growing", rows=300, shards=1)
        job = small_job(self.folder / "growing", self.folder / "runs", name, data__eval=None)
        job["data"]["follow"] = {"poll_s": 0.05, "idle_s": 0.1}
        job["run"]["epochs"] = 1
        opened = open_run(job_from_dict(job, "test"), {}, lambda event: None)
        assert isinstance(opened, tuple)
        opened[1].release()
        return asdict(opened[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("measuring"))


def judged(runs: Runs, name: str) -> dict[str, Any]:
    state = dict(runs.states[name][-1]["judge"])
    assert not state["owes"]
    return state


@pytest.mark.parametrize(
    "name", ["noticed", "early-and-late", "gone", "stopped", "stopped-at-the-end", "beside"]
)
def test_what_is_learnt_and_judged_is_that_of_an_undisturbed_run(runs: Runs, name: str) -> None:
    straight, last = runs.results["straight"][0], runs.results[name][-1]
    assert (last["steps"], last["stopped"]) == (STEPS, False)
    assert checkpoint_bytes(last) == checkpoint_bytes(straight)
    assert recorded_rows(last["run_dir"]) == recorded_rows(straight["run_dir"])
    assert last["metrics"] == straight["metrics"]
    assert judged(runs, name) == judged(runs, "straight")
    assert last["best"]["step"] == straight["best"]["step"]
    assert runs.states[name][-1]["metrics"] == runs.states["straight"][-1]["metrics"]


def test_a_notice_saves_at_once_and_the_measurement_is_made_after_it(runs: Runs) -> None:
    seen = [each for each in runs.seen["noticed"][0] if each != "saved 10"]
    assert seen[:7] == ["measure", "measured", "measure", "broken off", "saved 20", "measure", "measured"]
    saved = read_manifest(checkpoint_url(runs.results["noticed"][0]["run_dir"], 20, 1)).meta
    assert saved["metrics"] and not saved["judge"]["owes"], "it has what was measured after it was saved"
    seen = runs.seen["early-and-late"][0]
    assert seen[:5] == ["measure", "broken off", "saved 10", "measure", "measured"]
    assert "saved 21" in seen, "heard behind the last batch: at the next step"


def test_a_worker_that_goes_behind_the_notice_costs_no_step_and_no_measurement(runs: Runs) -> None:
    first, second = runs.seen["gone"]
    assert runs.results["gone"][0] is None and first[-2:] == ["measure", "broken off"]
    state = runs.states["gone"][0]
    assert (state["step"], state["metrics"], state["judge"]["owes"]) == (20, None, True)
    assert second[:2] == ["measure", "measured"], "before anything is trained"
    assert runs.results["gone"][1]["rows"] == 10 * 48


def test_a_stop_is_heard_in_the_middle_and_the_measurement_is_made_when_the_run_goes_on(runs: Runs) -> None:
    first, second = runs.results["stopped"]
    assert (first["stopped"], first["steps"], first["metrics"]) == (True, 20, None)
    assert runs.seen["stopped"][0][-2:] == ["broken off", "saved 20"]
    assert runs.seen["stopped"][1][:2] == ["measure", "measured"] and second["rows"] == 10 * 48
    for result in runs.results["stopped-at-the-end"][:2]:
        assert (result["stopped"], result["steps"], result["metrics"]) == (True, STEPS, None)
    assert runs.seen["stopped-at-the-end"][1] == ["measure", "broken off"], "saved already"
    assert runs.results["stopped-at-the-end"][2]["rows"] == 0


def test_a_stop_is_heard_in_the_last_measurement_of_a_run_that_nobody_judges(runs: Runs) -> None:
    first, second = runs.results["not-judged"]
    assert (first["stopped"], first["steps"], first["metrics"]) == (True, STEPS, None)
    assert not second["stopped"] and second["metrics"] == runs.results["straight"][0]["metrics"]


def test_a_checkpoint_is_completed_while_a_measurement_runs(runs: Runs) -> None:
    assert runs.seen["beside"][0][:3] == ["measure", "saved 9", "measured"]


def test_a_stop_is_heard_while_a_new_generation_is_measured(runs: Runs) -> None:
    _, stopped, last = runs.results["follows"]
    assert stopped["stopped"] and stopped["steps"] == 7, "nothing of the new generation"
    assert [each["generation"] for each in last["generations"]] == [1]
    assert last["steps"] == 14 and last["generations"][0]["metrics"]
    told = Path(last["run_dir"]) / "generations" / "1.metrics.json"
    assert json.loads(told.read_text())["metrics"] == last["generations"][0]["metrics"]
