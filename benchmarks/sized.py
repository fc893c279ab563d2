"""Job and data of the end-to-end benchmarks: 11 tables of 16 columns, 1.7M rows in all, MMoE, two tasks.

Users, items and the eight other ids are drawn by a power law, so that a batch looks some rows up often, as
logs do. Every row has all columns and both labels, which follow from the small tables and a number: they can
be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCENARIOS = ("ca", "de", "in", "us")
OTHERS = (100, 300, 1_000, 3_000, 10_000, 30_000, 60_000, 100_000)
"""Rows of the tables beside users, items and scenarios."""
USERS, ITEMS = 1_000_000, 500_000
DIM = 16
EXPERTS, HIDDEN, TOWER = 4, (128, 64), (32,)
LEARNING_RATES = {"tables": 0.05, "dense": 1e-3}
EPS = 1e-8
"""Of the tables' optimizer."""
_NUMBERS, _TASKS = 3, ("click", "buy")
_HISTORY = 19
"""Longest list; lengths are drawn from 1 on, so that the mean is 10."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    rows: int = 819_200
    files: int = 8
    group_rows: int = 16_384
    users: int = USERS
    items: int = ITEMS
    others: tuple[int, ...] = OTHERS
    batch: int = 4096
    """Rows of a worker's step."""
    skew: float = 2.32
    """Ids are this power of a uniform number: with 2.32 the low fifth makes up half of what is drawn, as in
    logs; with 1 all are equally frequent."""

    @property
    def table_rows(self) -> int:
        return self.users + self.items + len(SCENARIOS) + sum(self.others)


QUICK = Size(
    rows=16_384,
    files=2,
    group_rows=1024,
    users=2000,
    items=1000,
    others=tuple(range(100, 900, 100)),
    batch=256,
)


def job(
    folder: Path, size: Size, workers: int, every_steps: int | None, device: str = "cpu"
) -> dict[str, Any]:
    """The job over `folder`/data, whose runs go to `folder`/runs. every_steps: between two checkpoints; None:
    there is one at the end.
    """
    others = {f"id{n}": {"kind": "id", "rows": rows} for n, rows in enumerate(size.others)}
    numbers = ("log1p", "standardise", "none")
    return {
        "name": f"workers-{workers}-of-{size.batch}",
        "seed": 1,
        "schema": {
            "scenario": {"column": "country", "values": list(SCENARIOS)},
            "user": "user_id",
            "item": "item_id",
            "features": {
                "user_id": {"kind": "id", "rows": size.users},
                "item_id": {"kind": "id", "rows": size.items},
                **others,
                "history": {"kind": "id_list", "table": "item_id", "pooling": "mean"},
                **{
                    f"number{n}": {"kind": "number", "transform": kind}
                    | ({"mean": 0.0, "std": 1.0} if kind == "standardise" else {})
                    for n, kind in enumerate(numbers)
                },
            },
            "tasks": {task: {"kind": "binary"} for task in _TASKS},
        },
        "data": {"train": str(folder / "data"), "batch_size": size.batch * workers},
        "model": {
            "dim": DIM,
            "backbone": {"kind": "mmoe", "experts": EXPERTS, "hidden": list(HIDDEN)},
            "tower": {"hidden": list(TOWER)},
        },
        "optimizer": {
            "tables": {"kind": "rowwise_adagrad", "lr": LEARNING_RATES["tables"], "eps": EPS},
            "dense": {"kind": "adam", "lr": LEARNING_RATES["dense"]},
        },
        "run": {
            "storage": str(folder / "runs"),
            "workers": 0,
            "device": device,
            "epochs": 1_000_000,
            "checkpoint": {"every_steps": every_steps},
        },
    }


def write_data(folder: Path, size: Size) -> None:
    """Parquet shards under `folder`/data, the same for the same size."""
    (folder / "data").mkdir(parents=True)
    effects = np.random.default_rng(0).normal(size=(2, size.others[0] + len(SCENARIOS)))
    for number in range(size.files):
        count = size.rows * (number + 1) // size.files - size.rows * number // size.files
        table = _table(np.random.default_rng([1, number]), count, size, effects)
        pq.write_table(
            table,
            folder / "data" / f"part-{number}.parquet",
            row_group_size=size.group_rows,
            use_dictionary=["country"],
        )


def _table(random: np.random.Generator, rows: int, size: Size, effects: np.ndarray) -> pa.Table:
    lengths = random.integers(1, _HISTORY + 1, rows)
    scenario = random.choice(len(SCENARIOS), rows, p=(0.4, 0.3, 0.2, 0.1))
    columns: dict[str, Any] = {
        "user_id": _ids(random, rows, size.users, size.skew),
        "item_id": _ids(random, rows, size.items, size.skew),
        **{f"id{n}": _ids(random, rows, most, size.skew) for n, most in enumerate(size.others)},
        "country": pa.array(np.array(SCENARIOS)[scenario]),
        "history": pa.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            _ids(random, int(lengths.sum()), size.items, size.skew),
        ),
        "number0": random.lognormal(1, 1, rows).astype(np.float32),
        "number1": random.normal(size=rows).astype(np.float32),
        "number2": random.random(rows, dtype=np.float32),
    }
    for task, effect in zip(_TASKS, effects, strict=True):
        logit = effect[columns["id0"]] + effect[size.others[0] + scenario] + columns["number1"] - 1.0
        columns[task] = (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return pa.table(columns)


def _ids(random: np.random.Generator, count: int, most: int, skew: float) -> np.ndarray:
    """0 to `most` - 1, the low ones more often."""
    return (most * random.random(count) ** skew).astype(np.int64)
