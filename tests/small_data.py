"""A small data set with every kind of feature and label, nulls included, and the job that trains on it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCENARIOS = ["ca", "de", "mx"]


def write_small_data(
    folder: Path, rows: int = 1500, shards: int = 4, group_rows: int = 97, seed: int = 0
) -> None:
    """Parquet shards of uneven sizes under `folder`; click follows item and user, so it can be learnt."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    user, item = random.integers(0, 80, rows), random.integers(0, 40, rows)
    scenario = random.choice(len(SCENARIOS), rows, p=[0.6, 0.3, 0.1])
    logit = np.sin(item * 1.7) * 1.5 + np.sin(user * 0.9) + 0.5 * scenario - 0.5
    click = (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    history = [
        None if n == 0 else [f"i{value}" for value in random.integers(0, 40, n - 1)]
        for n in random.integers(0, 6, rows)
    ]
    price = np.where(random.random(rows) < 0.1, np.nan, random.lognormal(1, 1, rows))
    table = pa.table(
        {
            "user_id": pa.array(user, mask=random.random(rows) < 0.02),
            "item_id": [f"i{value}" for value in item],
            "history": pa.array(history, pa.list_(pa.string())),
            "price": pa.array(price, from_pandas=True),
            "hour": random.integers(0, 24, rows).astype(np.int32),
            "picture": pa.array(
                list(random.normal(size=(rows, 3)).astype(np.float32)), pa.list_(pa.float32(), 3)
            ),
            "country": [SCENARIOS[value] for value in scenario],
            "click": click,
            "rating": pa.array(np.where(click == 1, 3 + logit, np.nan), from_pandas=True),
            "weight": random.lognormal(0, 0.5, rows).astype(np.float32),
        }
    )
    cuts = np.linspace(0, rows, shards + 1).astype(int) + np.array(
        [0, *([5, -7, 3] * shards)[: shards - 1], 0]
    )
    for index, (begin, end) in enumerate(pairwise(cuts)):
        pq.write_table(
            table.slice(begin, end - begin), folder / f"part-{index}.parquet", row_group_size=group_rows
        )


def small_job(data: Path, storage: Path, name: str = "small", **changes: Any) -> dict[str, Any]:
    """A job on that data, as plain data; `changes` are `section__field=value`."""
    job: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "schema": {
            "scenario": {"column": "country", "values": SCENARIOS},
            "user": "user_id",
            "item": "item_id",
            "features": {
                "user_id": {"kind": "id", "rows": 200},
                "item_id": {"kind": "id", "rows": 5000},
                "history": {"kind": "id_list", "table": "item_id", "max_length": 3},
                "price": {"kind": "number", "transform": "log1p"},
                "price_bucket": {
                    "kind": "number",
                    "column": "price",
                    "transform": "bucketise",
                    "boundaries": [1.0, 2.0, 4.0],
                },
                "hour": {"kind": "id", "ids": "identity", "rows": 24},
                "picture": {"kind": "vector", "size": 3},
            },
            "tasks": {
                "click": {"kind": "binary"},
                "rating": {"kind": "regression", "weight": 0.2},
            },
        },
        "data": {"train": str(data), "eval": str(data), "batch_size": 48, "lanes": 4, "window": 50},
        "model": {
            "dim": 8,
            "backbone": {"kind": "mmoe", "experts": 2, "hidden": [16, 8], "scenario_gates": True},
            "tower": {"hidden": [8]},
        },
        "optimizer": {"dense": {"lr": 0.003}},
        "run": {"storage": str(storage), "workers": 0, "epochs": 3, "report_every_s": 1e-9},
    }
    for path, value in changes.items():
        section, _, field = path.partition("__")
        job[section][field] = value
    return job
