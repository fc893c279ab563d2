"""The promises of the spine, on the real loop: workers, plans and restarts change nothing that is learnt."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mtlrec import storage
from mtlrec.checkpoint.folder import checkpoint_url, discard, latest, list_checkpoints
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.data.shards import Dataset
from mtlrec.job.job import job_from_dict
from mtlrec.schema import build_schema
from tests.distributed.processes import Results, run_processes
from tests.small_data import small_job, write_small_data

pytest_plugins = ["tests.s3_server"]

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
    for file in storage.list_files(storage.join(run_dir, "rows")):
        attempt, first, rank = file.path.removesuffix(".npy").split("-")
        for offset, rows in enumerate(np.load(io.BytesIO(storage.read(file.url)), allow_pickle=False)):
            ranks = by_step.setdefault(int(first) + offset, {}).setdefault(attempt, {})
            ranks[int(rank[1:])] = rows[rows >= 0].tolist()
    last = [attempts[max(attempts)] for _, attempts in sorted(by_step.items())]
    return [[row for rank in sorted(ranks) for row in ranks[rank]] for ranks in last]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    write_small_data(folder)
    # What three dozen runs measure at their end.
    write_small_data(folder.with_name("valid"), rows=400, shards=2, seed=1)
    return folder


PLANS = ("row_wise", "table_wise", "data_parallel", "auto")


CHAINS: dict[str, tuple[str, list[tuple[int, Any]]]] = {
    "chain": (
        "rowwise_adagrad",
        [
            (2, "row_wise"),
            (1, "data_parallel"),
            (3, "table_wise"),
            (2, {"user_id": "row_wise", "item_id": "table_wise", "hour": "data_parallel"}),
        ],
    ),
    "adagrad-chain": (
        "adagrad",
        [
            (2, "column_wise"),
            (1, "data_parallel"),
            (3, "column_wise"),
            (2, {"user_id": "column_wise", "item_id": "row_wise", "hour": "data_parallel"}),
        ],
    ),
}
"""Runs that go on every ten steps with other workers under another plan: optimizer, (workers, plan) each."""
ROWWISE, ADAGRAD = "rowwise_adagrad", "adagrad"
SAVED = {
    (mode, place, optimizer): f"{mode}-{place}-{optimizer}"
    for mode, place, optimizer in (
        *((mode, place, ROWWISE) for mode in ("async", "sync") for place in ("disk", "s3")),
        ("async", "disk", ADAGRAD),
    )
}
"""Runs that are cut off at step 30, and go on from the checkpoint that they saved on the way, at 20."""


class Session:
    """All runs of this file: few groups of processes, as each process imports for seconds.

    Two workers train every plan, and 40 steps straight beside runs that end before. Then one, three and again
    two workers go on with those and train every plan; all predict from one checkpoint.
    """

    def __init__(self, data: Path, folder: Path, bucket: str) -> None:
        self.data, self.folder, self.bucket = data, folder, bucket
        self.trained: dict[tuple[int, str], dict[str, Any]] = {}
        """(workers, plan or run and its last step) -> the result, with its `losses`."""
        first = [self._saved(*each, 30) for each in SAVED]
        straight = [
            self._call(f"straight-{kind}", f"straight-{kind}-40", 40, "row_wise", kind)
            for kind in (ROWWISE, ADAGRAD)
        ]
        self._run("two", 2, [*self._plans(2), *straight, *first, *self._links(0)], "row_wise")
        for name in SAVED.values():
            # As if killed behind step 20: its checkpoint was written while the next steps were trained.
            discard(self.trained[2, f"{name}-30"]["checkpoint"])
        self._run("one", 1, [*self._plans(1), *self._links(1)], None)
        self._run("three", 3, [*self._plans(3), *self._links(2)], None)
        self._run("two again", 2, [*(self._saved(*each, 40) for each in SAVED), *self._links(3)], None)

    def _plans(self, workers: int) -> list[tuple[str, dict[str, Any]]]:
        kinds = [
            *((plan, "rowwise_adagrad", plan) for plan in PLANS),
            ("column_wise", "adagrad", "column_wise"),
        ]
        if workers == 1:
            kinds.append(("adagrad", "adagrad", "table_wise"))
        return [self._call(f"w{workers}-{name}", name, 50, plan, kind) for name, kind, plan in kinds]

    def _saved(self, mode: str, place: str, optimizer: str, steps: int) -> tuple[str, dict[str, Any]]:
        name = SAVED[mode, place, optimizer]
        checkpoint = {"every_steps": 20, "mode": mode, "keep_last": 9}
        runs = f"{self.bucket}/runs" if place == "s3" else None
        return self._call(name, f"{name}-{steps}", steps, "row_wise", optimizer, runs, checkpoint=checkpoint)

    def _links(self, number: int) -> list[tuple[str, dict[str, Any]]]:
        steps = 10 * (number + 1)
        return [
            self._call(name, f"{name}-{steps}", steps, links[number][1], optimizer)
            for name, (optimizer, links) in CHAINS.items()
        ]

    def _call(
        self,
        name: str,
        label: str,
        steps: int,
        plan: Any,
        optimizer: str,
        runs: str | None = None,
        **changes: Any,
    ) -> tuple[str, dict[str, Any]]:
        valid = str(self.data.with_name("valid"))
        job = small_job(self.data, Path("."), name, run__sharding=plan, data__eval=valid)
        job["run"] |= {"storage": runs or str(self.folder / "runs"), "max_steps": steps}
        job["run"] |= {"record_rows": True, **changes}
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
def session(data: Path, tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Session]:
    import boto3  # not where a GPU is lent: tests/on_device.py runs what this file gives to workers

    from tests.s3_server import AWS

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {**AWS, "AWS_ENDPOINT_URL": s3_endpoint}.items():
            patch.setenv(variable, value)
        boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="test-training")
        yield Session(data, tmp_path_factory.mktemp("session"), "s3://test-training")


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


def assert_metrics_agree(
    metrics: dict[str, Any], reference: dict[str, Any], rel: float, absolute: float | None = None
) -> None:
    """Of each scenario and task; `rel`, `absolute`: of all that is no count, as pytest.approx has it."""
    for scenario, by_task in reference.items():
        for task, numbers in by_task.items():
            for name, value in numbers.items():
                expected = pytest.approx(value, rel=rel, abs=absolute) if isinstance(value, float) else value
                assert metrics[scenario][task][name] == expected, (scenario, task, name)


def test_metrics_do_not_depend_on_workers(session: Session) -> None:
    reference = session.trained[1, "row_wise"]["metrics"]
    for workers in (2, 3):
        assert_metrics_agree(session.trained[workers, "row_wise"]["metrics"], reference, rel=2e-3)


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


@pytest.mark.parametrize(("mode", "place", "optimizer"), SAVED)
def test_20_steps_and_20_more_are_40_to_the_bit(
    session: Session, mode: str, place: str, optimizer: str
) -> None:
    """From a checkpoint that was saved while training went on, in both modes, on disk and on S3."""
    straight, name = session.trained[2, f"straight-{optimizer}-40"], SAVED[mode, place, optimizer]
    cut_off, rest = session.trained[2, f"{name}-30"], session.trained[2, f"{name}-40"]
    assert straight["losses"].shape == (40, 2) and rest["losses"].shape == (20, 2), "resumed at step 20"
    np.testing.assert_array_equal(cut_off["losses"], straight["losses"][:30])
    np.testing.assert_array_equal(rest["losses"], straight["losses"][20:])
    assert checkpoint_bytes(rest) == checkpoint_bytes(straight)
    assert recorded_rows(rest["run_dir"]) == recorded_rows(straight["run_dir"])


def test_what_is_saved_beside_training_is_of_its_step(session: Session) -> None:
    """In async mode the tables go on changing while their copy is written."""
    for place in ("disk", "s3"):
        saved = {
            mode: [
                each.url
                for each in list_checkpoints(
                    session.trained[2, f"{SAVED[mode, place, ROWWISE]}-40"]["run_dir"]
                )
            ]
            for mode in ("async", "sync")
        }
        assert [storage.name(url)[:17] for url in saved["async"]] == [
            "step-000000000020",
            "step-000000000040",
        ]
        for one, other in zip(saved["async"], saved["sync"], strict=True):
            assert tensor_files(one) == tensor_files(other)
            metas = [read_manifest(url).meta for url in (one, other)]
            assert metas[0]["position"] == metas[1]["position"] and metas[0]["step"] == metas[1]["step"]


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_with_any_workers_under_any_plan(session: Session, name: str) -> None:
    """2 -> 1 -> 3 -> 2 workers, each under another plan, is the run that was never interrupted."""
    optimizer, links = CHAINS[name]
    reference = session.trained[1, "row_wise" if optimizer == "rowwise_adagrad" else "adagrad"]
    parts = [session.trained[workers, f"{name}-{10 * n}"] for n, (workers, _) in enumerate(links, 1)]
    assert [len(part["losses"]) for part in parts] == [10] * 4
    losses = np.concatenate([part["losses"] for part in parts])
    np.testing.assert_allclose(losses, reference["losses"][:40], rtol=1e-4)
    rows = recorded_rows(parts[-1]["run_dir"])
    assert rows == recorded_rows(reference["run_dir"])[:40]
    epoch = [row for step in rows[: -(-1500 // 48)] for row in step]
    assert sorted(epoch) == list(range(1500)), "every row once"
    plans = {file.path for file in storage.list_files(storage.join(parts[-1]["run_dir"], "plans"))}
    assert plans == {"1.json", "2.json", "3.json"}, "for when there are as many workers again"


def checkpoint_bytes(result: dict[str, Any]) -> dict[str, bytes]:
    """Every tensor file of the run's last checkpoint."""
    newest = latest(result["run_dir"])
    assert newest is not None and newest.url == result["checkpoint"]
    return tensor_files(newest.url)


def tensor_files(url: str) -> dict[str, bytes]:
    """Every tensor file of a checkpoint, by name."""
    return {file.path: storage.read(file.url) for file in storage.list_files(url, ".safetensors")}
