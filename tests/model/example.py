"""A small job with every kind of feature and task, and global batches that fit it, cut up among workers.

B rows of a worker, F id features, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtlrec.batch import Batch
from mtlrec.data.order import Position
from mtlrec.distributed import World, init_single_process, shut_down
from mtlrec.job.job import Job, job_from_dict
from mtlrec.schema import Schema, build_schema

LANES = 16


def example_job(**changes: Any) -> Job:
    """`changes` replace whole sections: `model={...}`, `optimizer={...}`, `run={...}`, `seed=...`."""
    raw: dict[str, Any] = {
        "name": "example",
        "seed": 3,
        "schema": {
            "scenario": {"column": "scenario", "values": ["shop", "feed", "search"]},
            "tables": {"brand_wide": {"rows": 30, "dim": 12}, "brand_narrow": {"rows": 30, "dim": 4}},
            "features": {
                "user": {"kind": "id", "rows": 5000},
                "item": {"kind": "id", "rows": 41},
                "history": {"kind": "id_list", "table": "item", "pooling": "mean"},
                "tags": {"kind": "id_list", "rows": 7, "pooling": "sum"},
                "flag": {"kind": "id", "rows": 2},
                "only": {"kind": "id", "rows": 1},
                "brand": {"kind": "id", "tables": ["brand_narrow", "brand_wide"]},
                "price": {"kind": "number", "transform": "bucketise", "boundaries": [1.0, 5.0]},
                "age": {"kind": "number"},
                "image": {"kind": "vector", "size": 3},
            },
            "tasks": {
                "click": {"kind": "binary"},
                "buy": {"kind": "binary", "weight": 0.5},
                "rating": {"kind": "regression", "weight": 0.2},
            },
        },
        "data": {"train": "nowhere", "batch_size": 96, "lanes": LANES},
        "model": {
            "dim": 8,
            "backbone": {"kind": "mmoe", "experts": 3, "hidden": [12, 10], "scenario_gates": True},
            "tower": {"hidden": [6]},
        },
        **changes,
    }
    return job_from_dict(raw, "example")


def example_schema(job: Job) -> Schema:
    return build_schema(job.schema_, job.model)


def single_world() -> Iterator[World]:
    """A fixture: this process as a world of its own, with one arithmetic thread, as all processes here."""
    torch.set_num_threads(1)
    yield init_single_process(30.0)
    shut_down()


@dataclass
class Rows:
    """Rows of a global batch, lane by lane, as plain arrays."""

    lengths: dict[str, np.ndarray]
    """Feature -> ids of each row."""
    values: dict[str, np.ndarray]
    dense: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    scenario: np.ndarray
    present: np.ndarray
    """False for padding."""

    def __len__(self) -> int:
        return len(self.scenario)


def global_rows(schema: Schema, rows: int, seed: int, present: int | None = None) -> Rows:
    """`rows` random rows; all but the first `present` of each lane are padding. Labels can be learnt."""
    random = np.random.Generator(np.random.Philox(key=seed))
    per_lane = rows // LANES
    here = np.tile(np.arange(per_lane) < (per_lane if present is None else present), LANES)
    scenario = random.integers(0, len(schema.scenarios), rows) * here
    lengths, values = {}, {}
    for feature in schema.id_features:
        table = schema.table_of[feature.table]
        if feature.source == "id_list":
            count = random.integers(0, 5, rows)
        elif feature.source == "scenario":
            count = np.ones(rows, dtype=np.int64)
        else:
            count = (random.random(rows) < 0.9).astype(np.int64)
        count = count * here
        lengths[feature.name] = count
        # Squared, so that some ids are far more frequent than others.
        ids = (random.random(int(count.sum())) ** 2 * table.rows).astype(np.int64)
        values[feature.name] = scenario[here] if feature.source == "scenario" else ids
    dense = random.standard_normal((rows, schema.dense_width), dtype=np.float32) * here[:, None]
    score = dense.sum(axis=1) + scenario
    labels = np.empty((rows, len(schema.tasks)), dtype=np.float32)
    for task, each in enumerate(schema.tasks):
        noisy = score * (task + 1) / 3 + random.standard_normal(rows)
        labels[:, task] = noisy > 0.5 if each.kind == "binary" else noisy
    valid = random.random((rows, len(schema.tasks))) < np.linspace(1.0, 0.3, len(schema.tasks))
    valid &= here[:, None]
    return Rows(lengths, values, dense, labels * valid, valid, scenario, here)


def cut(rows: Rows, schema: Schema, rank: int, world_size: int) -> Batch:
    """The part of `rows` whose lanes `rank` serves, padded at the end to the stride that all ranks share."""
    per_lane = len(rows) // LANES
    begin, end = rank * LANES // world_size * per_lane, (rank + 1) * LANES // world_size * per_lane
    # The rows that are there come first, as in every batch.
    mine = np.arange(begin, end)[np.argsort(~rows.present[begin:end], kind="stable")]
    padding = -(-LANES // world_size) * per_lane - len(mine)
    lengths, values = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for feature in schema.id_features:
        starts = np.concatenate([[0], np.cumsum(rows.lengths[feature.name])])
        taken = [rows.values[feature.name][starts[row] : starts[row + 1]] for row in mine]
        values.append(np.concatenate(taken).astype(np.int64))
        lengths.append(np.pad(rows.lengths[feature.name][mine], (0, padding)))

    def padded(array: np.ndarray) -> torch.Tensor:
        wide = np.pad(array[mine], [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return torch.from_numpy(np.ascontiguousarray(wide))

    ids = KeyedJaggedTensor(
        keys=[feature.name for feature in schema.id_features],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=len(mine) + padding,
    )
    return Batch(
        ids,
        padded(rows.dense),
        padded(rows.labels),
        padded(rows.valid),
        padded(rows.scenario),
        torch.from_numpy(
            np.pad(np.where(rows.present, np.arange(len(rows)), -1)[mine], (0, padding), constant_values=-1)
        ),
        int(rows.present[mine].sum()),
        Position.start(LANES),
    )


def counts(rows: Rows) -> torch.Tensor:
    """`Objective.amounts` of the global batch, float32 [T + 2]: valid labels of each task, rows, rows."""
    present = rows.present.sum()
    return torch.from_numpy(np.array([*rows.valid.sum(axis=0), present, present], dtype=np.float32))


def local(rows: Rows, schema: Schema, world: World) -> Batch:
    return cut(rows, schema, world.rank, world.world_size)
