"""Bad rows, a lost row group, a lost file, with everything on: all numbers of workers and a resume agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtlrec import distributed
from mtlrec.job.job import job_from_dict
from mtlrec.preflight import open_run
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_everything import TASKS, Recorder, everything
from tests.distributed.test_training import recorded_rows
from tests.small_data import small_job
from tests.test_bad_rows import good_numbers, write_spoiled

pytestmark = pytest.mark.distributed

EPOCH = 32
"""Steps of an epoch: 1,500 rows, bad ones counted, in batches of 48 from four lanes."""


def work(world: Any, calls: list[dict[str, Any]]) -> Results:
    """In a worker: train each in turn; its result, or its error, and the losses of every step."""
    from mtlrec.job.errors import InputError
    from mtlrec.preflight import Run
    from mtlrec.train import train

    found: Results = {"results": []}
    for index, call in enumerate(calls):
        recorder = Recorder()
        try:
            found["results"].append(train(Run(**call), world, recorder))
        except InputError as error:
            found["results"].append({"error": str(error)})
        found[f"losses{index}"] = np.array(recorder.losses)
    return found


class Runs:
    """`one` and `two` straight; `moved`, whose first steps one worker takes and two go on with; `strict`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        write_spoiled(self.data)
        whole = (self.data / "part-1.parquet").read_bytes()
        (self.data / "part-9.parquet").write_bytes(whole[:-64])
        world = distributed.init_single_process(60)
        try:
            alone = work(world, [self._open("one", EPOCH), self._open("moved", 11)])
        finally:
            distributed.shut_down()
        self.one, self.begun = self._take([alone])
        calls = [self._open("two", EPOCH), self._open("moved", EPOCH), self._open("strict", EPOCH)]
        ranks = run_processes(
            "tests.distributed.test_bad_rows:work", 2, folder / "group", {"calls": calls}, timeout=300
        )
        self.two, self.moved, self.strict = self._take(ranks)

    def _open(self, name: str, steps: int) -> dict[str, Any]:
        raw = everything(self.data, self.folder / "runs", name, "ple", steps)
        if name == "strict":
            # Nothing reads the data before training, and no file is lost.
            write_spoiled(self.folder / "rows")
            raw = small_job(self.folder / "rows", self.folder / "runs", name, data__eval=None)
        raw["data"] |= {"bad_rows": "skip", "max_bad_share": 0.5}
        opened = open_run(job_from_dict(raw, "test"), {"command": "test"}, lambda event: None)
        assert isinstance(opened, tuple)
        run, lease = opened
        lease.release()
        if name == "strict":
            # Lowered behind the driver's back, which would refuse it.
            run.job["data"]["max_bad_share"] = 0.05
        return asdict(run)

    def _take(self, ranks: list[Results]) -> Iterator[dict[str, Any]]:
        for index, result in enumerate(ranks[0]["results"]):
            yield {
                **result,
                "losses": ranks[0][f"losses{index}"],
                "errors": [rank["results"][index].get("error") for rank in ranks],
            }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("bad"))


def test_two_workers_and_a_resume_train_as_one_does(runs: Runs) -> None:
    assert runs.one["losses"].shape == (EPOCH, len(TASKS))
    np.testing.assert_allclose(runs.two["losses"], runs.one["losses"], rtol=1e-4)
    moved = np.concatenate([runs.begun["losses"], runs.moved["losses"]])
    np.testing.assert_allclose(moved, runs.one["losses"], rtol=1e-4)
    rows = recorded_rows(runs.one["run_dir"])
    assert recorded_rows(runs.two["run_dir"]) == recorded_rows(runs.moved["run_dir"]) == rows
    assert Counter(row for step in rows for row in step) == Counter(good_numbers(runs.data))


def test_all_say_the_same_of_what_was_left_out(runs: Runs) -> None:
    rows = 1500 - len(good_numbers(runs.data))
    assert runs.one["bad_rows"] == {"rows": rows, "row_groups": 5, "files": 5}
    assert runs.two["bad_rows"] == runs.moved["bad_rows"] == runs.one["bad_rows"]
    kept = [
        {file.name: file.read_bytes() for file in (Path(run["run_dir"]) / "quarantine").iterdir()}
        for run in (runs.one, runs.two, runs.moved)
    ]
    assert len(kept[0]) == 6 and kept[0] == kept[1] == kept[2]
    for run in (runs.two, runs.moved):
        for task, numbers in runs.one["metrics"]["all"].items():
            assert run["metrics"]["all"][task]["rows"] == numbers["rows"]


def test_too_many_bad_rows_end_all_workers_with_one_line(runs: Runs) -> None:
    first, second = runs.strict["errors"]
    assert first == second
    assert "rows are bad, more than data.max_bad_share allows (0.05)" in first
