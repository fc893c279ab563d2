"""Vocabularies, negatives, dropout, balancing, sample weights, evaluation: all on, and the promises hold.

One, two and three workers and a resume train the same rows with the same draws to the same losses.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtlrec.control import Silent
from mtlrec.job.job import job_from_dict
from mtlrec.preflight import open_run
from tests.distributed.processes import Results, run_processes
from tests.distributed.test_training import recorded_rows
from tests.small_data import small_job, write_small_data

HERE = "tests.distributed.test_everything"
TASKS = ("click", "rating", "rank")
BACKBONES: dict[str, dict[str, Any]] = {
    "ple": {"kind": "ple", "levels": 2, "hidden": [16, 8], "scenario_gates": True},
    "neumf": {
        "kind": "factorization",
        "factors": ["user", "item"],
        "biases": ["item_bias"],
        "hidden": [16, 8],
    },
}


def everything(data: Path, storage: Path, name: str, backbone: str, steps: int) -> dict[str, Any]:
    job = small_job(data, storage, name)
    schema = job["schema"]
    schema["weight"] = "weight"
    schema["tables"] = {
        "user": {"ids": "vocabulary", "min_count": 5, "reserved": 3},
        "item": {"ids": "vocabulary"},
        "item_bias": {"ids": "vocabulary", "dim": 4},
    }
    schema["features"] |= {
        "user_id": {"kind": "id", "tables": ["user"]},
        "item_id": {"kind": "id", "tables": ["item", "item_bias"]},
        "history": {"kind": "id_list", "table": "item", "max_length": 3},
    }
    schema["features"]["place"] = {"kind": "id", "column": "hour", "rows": 50, "dim": 12}
    if backbone == "neumf":
        # Factors are looked up by one feature alone.
        schema["features"]["history"] = {"kind": "id_list", "ids": "vocabulary", "max_length": 3}
    schema["tasks"] = {
        "click": {"kind": "binary", "label_smoothing": 0.05},
        "rating": {"kind": "regression", "given": "click", "normalise": "batch"},
        "rank": {"kind": "pairwise", "label": "click"},
    }
    job["data"]["negatives"] = {
        "per_positive": 2,
        "task": "rank",
        "distribution": "popularity",
        "features": ["place"],
    }
    job["model"] = {"dim": 8, "dropout": 0.2, "backbone": BACKBONES[backbone]}
    if backbone == "ple":
        job["model"]["tower"] = {"hidden": [8]}
    job["objective"] = {"balance": "uncertainty", "embedding_l2": 0.001}
    job["run"] |= {
        "max_steps": steps,
        "record_rows": True,
        "evaluate": {"every_steps": 15, "metric": ["rank/ndcg@10"]},
    }
    return job


class Recorder(Silent):
    """Keeps the losses of every report: of every step, where a job reports that often."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["what"] == "train":
            self.losses.append([event["losses"].get(task, 0.0) for task in TASKS])


def work(world: Any, calls: list[dict[str, Any]]) -> Results:
    """In a worker: train each in turn. Losses of every step, results, and the bytes of every vocabulary."""
    from mtlrec.preflight import Run
    from mtlrec.train import train

    found: Results = {"results": []}
    for index, call in enumerate(calls):
        recorder = Recorder()
        found["results"].append(train(Run(**call), world, recorder))
        found[f"losses{index}"] = np.array(recorder.losses)
    return found


class Session:
    """Per backbone: 40 steps straight on 1, 2, 3 workers, and 20 on two that 2, 1 and 3 go on with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        write_small_data(self.data)
        # Measured four times a run: on all rows of the training that would take longer than training.
        write_small_data(folder / "valid", rows=400, shards=2, seed=1)
        self.trained: dict[str, dict[str, Any]] = {}
        labels = [f"to {to} {name}" for to in (1, 2, 3) for name in BACKBONES]
        two = [f"to 2 {name}" for name in BACKBONES]
        # Importing takes seconds, so each number of workers is one group of processes.
        self._run(
            2, [(name, 40) for name in self._straight(2)] + [(n, 20) for n in labels] + [(n, 40) for n in two]
        )
        for workers in (1, 3):
            resumed = [f"to {workers} {name}" for name in BACKBONES]
            self._run(workers, [(name, 40) for name in [*self._straight(workers), *resumed]])

    def _straight(self, workers: int) -> list[str]:
        return [f"{workers} straight {name}" for name in BACKBONES]

    def _run(self, workers: int, jobs: list[tuple[str, int]]) -> None:
        calls = []
        for attempt, (label, steps) in enumerate(jobs, 1):
            name, backbone = label.replace(" ", "-"), label.rsplit(" ", 1)[1]
            raw = everything(self.data, self.folder / "runs", name, backbone, steps)
            raw["data"]["eval"] = str(self.folder / "valid")
            opened = open_run(job_from_dict(raw, "test"), {"command": "test"}, lambda event: None)
            assert isinstance(opened, tuple)
            run, lease = opened
            lease.release()
            calls.append({**asdict(run), "attempt": attempt})
        results = run_processes(
            f"{HERE}:work", workers, self.folder / f"group{workers}", {"calls": calls}, timeout=400
        )[0]
        for index, (label, steps) in enumerate(jobs):
            self.trained[f"{label} {steps}"] = {
                **results["results"][index],
                "losses": results[f"losses{index}"],
            }


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("everything"))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("workers", [2, 3])
def test_losses_do_not_depend_on_the_number_of_workers(session: Session, backbone: str, workers: int) -> None:
    reference = session.trained[f"1 straight {backbone} 40"]["losses"]
    assert reference.shape == (40, 3) and (reference[:, 2] > 0).all()
    losses = session.trained[f"{workers} straight {backbone} 40"]["losses"]
    np.testing.assert_allclose(losses, reference, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_resume_on_any_number_of_workers_goes_on_alike(
    session: Session, backbone: str, workers: int
) -> None:
    reference = session.trained[f"2 straight {backbone} 40"]
    first = session.trained[f"to {workers} {backbone} 20"]["losses"]
    rest = session.trained[f"to {workers} {backbone} 40"]
    losses = np.concatenate([first, rest["losses"]])
    np.testing.assert_allclose(losses, reference["losses"], rtol=0 if workers == 2 else 1e-4)
    assert recorded_rows(rest["run_dir"]) == recorded_rows(reference["run_dir"])
    if workers == 2:
        assert rest["metrics"] == reference["metrics"], "to the bit"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_measurements_and_the_best_step_do_not_depend_on_workers(session: Session, backbone: str) -> None:
    runs = [run for label, run in session.trained.items() if label.endswith(f"{backbone} 40")]
    assert len(runs) == 6
    for run in runs:
        assert run["best"]["step"] == runs[0]["best"]["step"]
        assert run["best"]["score"] == pytest.approx(runs[0]["best"]["score"], abs=1e-3)
        for task, metric in (("click", "auc"), ("rating", "rmse"), ("rank", "ndcg@10")):
            value = run["metrics"]["all"][task][metric]
            assert value == pytest.approx(runs[0]["metrics"]["all"][task][metric], abs=1e-3)


def test_every_number_of_workers_builds_the_same_vocabulary(session: Session) -> None:
    files: dict[str, set[bytes]] = {}
    for file in (session.folder / "runs").glob("*/vocabularies/*.parquet"):
        files.setdefault(f"{'neumf' in str(file)} {file.name}", set()).add(file.read_bytes())
    assert files.keys() >= {"False user.parquet", "False item.parquet", "True history.parquet"}
    assert all(len(contents) == 1 for contents in files.values())
