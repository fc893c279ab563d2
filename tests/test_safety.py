"""A row that breaks its batch, on the real loop: the run stops and keeps what it had, or passes over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtlrec.checkpoint import folder
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.control import Silent
from mtlrec.distributed import World
from mtlrec.job.errors import FinalFailure
from mtlrec.preflight import Run
from mtlrec.safety import Evidence, Skipped, _examine
from mtlrec.train import train
from tests.distributed.test_training import call_of, checkpoint_bytes, recorded_rows
from tests.model.example import cut, example_job, example_schema, global_rows, single_world
from tests.small_data import small_job, write_small_data

world = pytest.fixture(scope="module")(single_world)

ROWS, BATCH, STEPS = 480, 48, 10
BAD = (201, 333, 334)
"""Rows of the data whose label has no finite square. Four lanes of 120 rows give 12 each to a step."""
BAD_STEPS = (7, 8)
"""Of every epoch."""


class Listener(Silent):
    """Keeps what the user would read, and the losses of every step that was applied."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.losses: dict[int, list[float]] = {}

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "log":
            self.lines.append(event["text"])
        elif event["kind"] == "progress" and event["what"] == "train":
            self.losses[event["done"]] = [*event["losses"].values()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_small_data(tmp_path / "train", rows=ROWS, shards=2, group_rows=100)
    return tmp_path / "train"


def spoil(data: Path, rows: Sequence[int], **values: float) -> None:
    """Put `values` into columns of some rows, by their numbers in the whole data."""
    first = 0
    for file in sorted(data.glob("*.parquet")):
        table = pq.read_table(file)
        for name, value in values.items():
            column = table[name].to_numpy().astype(np.float64)
            column[[row - first for row in rows if first <= row < first + table.num_rows]] = value
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(column, from_pandas=True))
        pq.write_table(table, file, row_group_size=100)
        first += table.num_rows


def job_on(data: Path, name: str, **run: Any) -> dict[str, Any]:
    job = small_job(data, data.parent / "runs", name)
    del job["schema"]["features"]["price_bucket"]
    job["schema"]["features"]["price"] = {"kind": "number"}
    job["schema"]["tasks"]["rating"] |= {"mean": 0.0, "std": 1.0}
    job["data"]["shuffle"] = False
    job["run"] |= {"epochs": 1, "record_rows": True, **run}
    return job


def go(job: dict[str, Any], world: World, attempt: int = 1) -> tuple[dict[str, Any], Listener]:
    listener = Listener()
    return train(Run(**call_of(job, attempt)), world, listener), listener


def test_the_run_stops_at_the_batch_and_its_last_checkpoint_stands(data: Path, world: World) -> None:
    spoil(data, BAD, rating=1e30, price=3e30)
    job = job_on(data, "stops", checkpoint={"every_steps": 1})
    with pytest.raises(FinalFailure) as raised:
        go(job, world)
    text = str(raised.value)
    assert "\n" not in text
    assert "step 7 (epoch 0, after 288 of its rows) is not finite: loss of rating; in 1 row(s): 201 " in text
    assert "(part-0.parquet, row group 2, row 1); their largest input is price with 3e+30" in text
    assert "the last checkpoint stands" in text and "run.non_finite: skip" in text
    url = str(data.parent / "runs" / "stops")
    newest = folder.latest(url)
    assert newest is not None and newest.step == 6
    read_manifest(newest.url)
    # The same again is the same; and passing over it goes on from there.
    with pytest.raises(FinalFailure, match="step 7 "):
        go(job, world, 2)
    assert folder.latest(url) == newest
    result, listener = go(job_on(data, "stops", non_finite="skip"), world, 3)
    assert (result["steps"], result["skipped_steps"]) == (STEPS, len(BAD_STEPS))
    assert any("start 3 of this run" in line for line in listener.lines)


def test_a_skipped_batch_is_counted_and_leaves_no_trace(data: Path, world: World) -> None:
    spoil(data, BAD, rating=1e30)
    straight, heard = go(job_on(data, "straight", epochs=2, non_finite="skip"), world)
    steps = recorded_rows(straight["run_dir"])
    assert len(steps) == 2 * STEPS, "a skipped step counts"
    skipped = [step for step, rows in enumerate(steps, 1) if not rows]
    assert skipped == [*BAD_STEPS, *(STEPS + step for step in BAD_STEPS)]
    assert all(len(rows) == BATCH for step, rows in enumerate(steps, 1) if step not in skipped)
    assert (straight["skipped_steps"], straight["skipped_rows"]) == (4, 4 * BATCH)
    assert straight["rows"] == 2 * ROWS - 4 * BATCH
    assert set(heard.losses) == set(range(1, 2 * STEPS + 1)) - set(skipped)
    assert np.isfinite([*heard.losses.values()]).all()
    told = [line for line in heard.lines if line.startswith("step ")]
    assert [line.split()[1] for line in told] == ["7", "8", "18"], "the 1st, 2nd and 4th"
    assert "skipped (1 so far" in told[0] and "2 row(s): 333 (part-1" in told[1]

    # Stopped between the skipped steps and begun again, it counts on, and ends at the same bits.
    parts = job_on(data, "parts", epochs=2, non_finite="skip", max_steps=8)
    first, _ = go(parts, world)
    expected = {"steps": 2, "rows": 2 * BATCH, "in_a_row": 2}
    assert read_manifest(first["checkpoint"]).meta["skipped"] == expected
    del parts["run"]["max_steps"]
    second, _ = go(parts, world, 2)
    assert second["skipped_steps"] == straight["skipped_steps"]
    assert recorded_rows(second["run_dir"]) == steps
    assert checkpoint_bytes(second) == checkpoint_bytes(straight)


def test_a_run_that_can_only_skip_stops_at_the_bound(data: Path, world: World) -> None:
    spoil(data, range(ROWS), rating=1e30)
    job = job_on(data, "broken", non_finite="skip", max_skipped=3, checkpoint={"every_steps": 2})
    with pytest.raises(FinalFailure, match=r"step 4 .*the 3 steps before were skipped.*run\.max_skipped"):
        go(job, world)
    # It goes on counting from its checkpoint of step 2, of which both were skipped.
    with pytest.raises(FinalFailure, match="step 4 "):
        go(job, world, 2)
    result, _ = go({**job, "run": {**job["run"], "max_skipped": 50}}, world, 3)
    assert (result["skipped_steps"], result["rows"]) == (STEPS, 0)


def test_findings_name_the_row_of_a_negative_and_the_table() -> None:
    """Four rows with two negatives each: the second of row 2 looks up a broken row of a table."""
    job = example_job()
    schema = example_schema(job)
    whole = cut(global_rows(schema, 96, 1), schema, 0, 1)
    batch = replace(whole, rows=torch.tensor([7, 5, 9, -1]), negatives=torch.ones(4, 2, dtype=torch.bool))
    x, place = torch.ones(12, schema.embedding_width + schema.dense_width), 0
    for lookup in schema.lookups:
        if lookup.table == "brand_wide":
            x[4 + 2 * 2 + 1, place] = math.nan
        place += lookup.width
    x[4 + 2 * 2, -1] = -50.0  # of the first negative of that row
    x[0, -1] = 1e9  # of a row that is well
    outputs, losses = torch.zeros(12, 3), torch.zeros(4, 3)
    outputs[9, 1] = math.inf
    evidence = Evidence(batch, outputs, losses, x, None, [])
    assert _examine(schema, evidence) == {
        "rows": [9],
        "num_rows": 1,
        "tasks": ["buy"],
        "inputs": ["brand in table brand_wide"],
        "gradients": [],
        "largest": (50.0, "image"),
        "parameters": [],
    }


def test_a_checkpoint_older_than_the_count_has_skipped_nothing() -> None:
    assert Skipped.from_json(None) == Skipped(0, 0, 0)
    assert Skipped.from_json(Skipped(3, 144, 2).to_json()) == Skipped(3, 144, 2)
