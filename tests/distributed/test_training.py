"""The promises of the spine, on the real loop: workers, plans and restarts change nothing that is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mtlrec.checkpoint.folder import checkpoint_url, latest
from mtlrec.data.shards import Dataset
from mtlrec.job.job import job_from_dict
from mtlrec.schema import build_schema
from tests.distributed.processes import Results, run_processes
from tests.small_data import small_job, write_small_data

HERE = "tests.distributed.test_training"


def work(world: Any, calls: list[dict[str, Any]], predictions: dict[str, Any] | None) -> Results:
    """In a worker: train each job in turn, then predict. The losses of every step, and the results."""
    from mtlrec import actions
    from mtlrec.control import Silent
    from mtlrec.preflight import Run
    from mtlrec.train import train

    class Recorder(Silent):
        def __init__(self) -> None:
            self.losses: list[list[float]] = []

        def show(self, event: dict[str, Any]) -> None:
            if event["kind"] == "progress" and event["what"] == "train":
                self.losses.append([event["losses"].get(task, 0.0) for task in ("click", "rating")])

    found: Results = {"results": []}
    for index, call in enumerate(calls):
        recorder = Recorder()
        found["results"].append(train(Run(**call), world, recorder))
        found[f"losses{index}"] = np.array(recorder.losses)
    if predictions is not None:
        actions.perform("predict", predictions, world, Silent())
    return found


def call_of(job: dict[str, Any], attempt: int = 1) -> dict[str, Any]:
    """What the driver would hand to every worker."""
    parsed = job_from_dict(job, "test")
    schema = build_schema(parsed.schema_, parsed.model)
    fingerprint = Dataset.open(parsed.data.train, schema.columns()).fingerprint
    url = f"{parsed.run.storage}/{parsed.name}"
    return {"job": parsed.to_dict(), "url": url, "attempt": attempt, "fingerprint": fingerprint}


def recorded_rows(run_dir: str) -> list[list[int]]:
    """The numbers of the rows of every step, in the order of the global batch.

    Where a step was trained again after a crash, as the last attempt did it.
    """
    by_step: dict[int, dict[str, dict[int, list[int]]]] = {}
    for file in Path(run_dir, "rows").iterdir():
        attempt, first, rank = file.stem.split("-")
        for offset, rows in enumerate(np.load(file)):
            ranks = by_step.setdefault(int(first) + offset, {}).setdefault(attempt, {})
            ranks[int(rank[1:])] = rows[rows >= 0].tolist()
    last = [attempts[max(attempts)] for _, attempts in sorted(by_step.items())]
    return [[row for rank in sorted(ranks) for row in ranks[rank]] for ranks in last]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_small_data(folder)
    return folder


PLANS = ("row_wise", "table_wise", "data_parallel", "auto")


class Session:
    """All runs of this file: few groups of processes, as each process imports for seconds.

    Two workers train every plan, and 40 steps straight beside three runs that stop after 20. Then one, three
    and again two workers go on with those and train every plan; all predict from one checkpoint.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.trained: dict[tuple[int, str], dict[str, Any]] = {}
        """(workers, plan or run) -> the result, with its `losses`."""
        straight = [self._part("straight", 40), *(self._part(f"to{workers}", 20) for workers in (1, 2, 3))]
        self._run("two", 2, [*self._plans(2), *straight], "row_wise")
        self._run("one", 1, [*self._plans(1), self._part("to1", 40)], None)
        self._run("three", 3, [*self._plans(3), self._part("to3", 40)], None)
        self._run("two again", 2, [self._part("to2", 40)], None)

    def _plans(self, workers: int) -> list[tuple[str, dict[str, Any]]]:
        kinds = [
            *((plan, "rowwise_adagrad", plan) for plan in PLANS),
            ("column_wise", "adagrad", "column_wise"),
        ]
        if workers == 1:
            kinds.append(("adagrad", "adagrad", "table_wise"))
        return [self._call(f"w{workers}-{name}", name, 50, plan, kind) for name, kind, plan in kinds]

    def _part(self, name: str, steps: int) -> tuple[str, dict[str, Any]]:
        return self._call(name, name if steps == 20 else f"{name}-40", steps, "row_wise", "rowwise_adagrad")

    def _call(
        self, name: str, label: str, steps: int, plan: str, optimizer: str
    ) -> tuple[str, dict[str, Any]]:
        job = small_job(self.data, self.folder / "runs", name, run__sharding=plan)
        job["run"] |= {"max_steps": steps, "record_rows": True}
        # Adagrad's first steps have the size of lr whatever that of the gradient: of one that is nearly zero
        # the order of float sums decides the sign. A larger eps leaves such weights where they are.
        job["optimizer"]["tables"] = {"kind": optimizer, "eps": 1e-4 if optimizer == "adagrad" else 1e-8}
        return label, call_of(job)

    def _run(
        self, tag: str, workers: int, calls: list[tuple[str, dict[str, Any]]], predict_after: str | None
    ) -> None:
        if predict_after is None:
            checkpoint = self.trained[2, "row_wise"]["checkpoint"]
        else:
            parsed = dict(calls)[predict_after]
            checkpoint = checkpoint_url(parsed["url"], 50, 1)
        payload = {
            "job": calls[0][1]["job"],
            "checkpoint": checkpoint,
            "data": str(self.data),
            "out": str(self.folder / f"predictions {tag}"),
            "keys": ["item_id", "country"],
            "batch_size": 48,
        }
        arguments = {"calls": [call for _, call in calls], "predictions": payload}
        results = run_processes(f"{HERE}:work", workers, self.folder / tag, arguments, timeout=400)[0]
        for index, (label, _) in enumerate(calls):
            self.trained[workers, label] = {**results["results"][index], "losses": results[f"losses{index}"]}


@pytest.fixture(scope="module")
def session(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(data, tmp_path_factory.mktemp("session"))


@pytest.mark.parametrize("plan", [*PLANS, "column_wise"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_losses_do_not_depend_on_workers_or_plan(session: Session, workers: int, plan: str) -> None:
    reference = session.trained[1, "adagrad" if plan == "column_wise" else "row_wise"]["losses"]
    losses = session.trained[workers, plan]["losses"]
    assert losses.shape == (50, 2)
    np.testing.assert_allclose(losses, reference, rtol=1e-4)
    assert losses[-10:, 1].mean() < 0.8 * losses[:10, 1].mean(), "nothing was learnt"


def test_the_sequence_of_samples_is_the_same_and_every_row_comes_once_an_epoch(session: Session) -> None:
    reference = recorded_rows(session.trained[1, "row_wise"]["run_dir"])
    for key, result in session.trained.items():
        recorded = recorded_rows(result["run_dir"])
        assert recorded == reference[: len(recorded)], key
    steps_per_epoch = -(-1500 // 48)
    epoch = [row for step in reference[:steps_per_epoch] for row in step]
    assert sorted(epoch) == list(range(1500))
    second = [row for step in reference[steps_per_epoch:] for row in step]
    assert len(second) > 800 and second != epoch[: len(second)], "every epoch has an order of its own"


def test_metrics_do_not_depend_on_workers(session: Session) -> None:
    reference = session.trained[1, "row_wise"]["metrics"]
    for workers in (2, 3):
        metrics = session.trained[workers, "row_wise"]["metrics"]
        for scenario, by_task in reference.items():
            for task, numbers in by_task.items():
                for name, value in numbers.items():
                    if isinstance(value, float):
                        assert metrics[scenario][task][name] == pytest.approx(value, rel=2e-3), (
                            scenario,
                            name,
                        )
                    else:
                        assert metrics[scenario][task][name] == value


def test_predictions_of_one_checkpoint_do_not_depend_on_workers(session: Session) -> None:
    expected = pq.read_table(session.data)
    found = {
        tag: pq.read_table(sorted((session.folder / f"predictions {tag}").glob("*.parquet")))
        for tag in ("one", "two", "three")
    }
    for tag, table in found.items():
        assert table.column_names == ["item_id", "country", "click", "rating"]
        assert table["item_id"].to_pylist() == expected["item_id"].to_pylist(), tag
        for task in ("click", "rating"):
            np.testing.assert_allclose(table[task], found["one"][task], atol=1e-6, rtol=0)


def test_a_resume_goes_on_to_the_bit_on_the_same_workers_and_closely_on_others(session: Session) -> None:
    straight = session.trained[2, "straight-40"]
    assert straight["losses"].shape == (40, 2)
    for workers in (1, 2, 3):
        first, second = session.trained[2, f"to{workers}"], session.trained[workers, f"to{workers}-40"]
        losses = np.concatenate([first["losses"], second["losses"]])
        np.testing.assert_allclose(losses, straight["losses"], rtol=0 if workers == 2 else 1e-4)
        assert recorded_rows(second["run_dir"]) == recorded_rows(straight["run_dir"])
    assert checkpoint_bytes(session.trained[2, "to2-40"]) == checkpoint_bytes(straight)


def checkpoint_bytes(result: dict[str, Any]) -> dict[str, bytes]:
    """Every tensor file of the run's last checkpoint."""
    newest = latest(result["run_dir"])
    assert newest is not None and newest.url == result["checkpoint"]
    root = Path(newest.url)
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.safetensors"))}
