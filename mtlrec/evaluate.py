"""Measures a model on a data set, per task and scenario."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from mtlrec import storage
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World, gather_bytes
from mtlrec.lockstep import in_step, together
from mtlrec.metrics.metrics import Metrics
from mtlrec.schema import Schema
from mtlrec.sharding import ShardedModel

SHOW_EVERY_S = 2.0
IDEAL = "_ideal.json"


def evaluate(
    model: ShardedModel, schema: Schema, url: str, batch_size: int, world: World, control: Control
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Score every row of the data set at `url` once, all workers together.

    Returns, on rank 0, the metrics by scenario and task and, where the data carries it, the best that any
    model could reach, in the same shape; on other ranks an empty dict and None.
    """
    dataset = together(world, lambda: Dataset.open(url, schema.columns()))
    metrics = Metrics(schema.scenarios, [(task.name, task.kind) for task in schema.tasks])
    for batch, outputs in score(model, schema, dataset, batch_size, world, control, what="evaluate"):
        metrics.update(
            outputs.numpy(),
            batch.labels.numpy(),
            batch.valid.numpy(),
            batch.scenario.numpy(),
            batch.num_rows,
        )
    parts = gather_bytes(metrics.to_bytes(), world)
    if parts is None:
        return {}, None
    for part in parts[1:]:
        metrics.merge(Metrics.from_bytes(part))
    return metrics.result(), ideal_of(url)


def score(model, schema, dataset, batch_size, world, control, *, what, labels=True, keys=()):  # type: ignore[no-untyped-def]
    """Yield (batch, outputs [B, T] float32 on the CPU) over the whole data set, in the order of the files.

    Rank r reads the r-th of world_size equal ranges of rows, so its rows follow those of rank r - 1.
    """
    world_size = world.world_size
    reader = Reader(
        dataset,
        schema,
        batch_size=max(batch_size // world_size, 1) * world_size,
        lanes=world_size,
        window=65536,
        shuffle=False,
        seed=0,
        position=Position.start(world_size),
        epochs=1,
        rank=world.rank,
        world_size=world_size,
        labels=labels,
        keys=keys,
    )
    model.eval()
    done, began, shown = 0, time.monotonic(), time.monotonic()
    try:
        with reader, torch.no_grad():
            for batch, totals in in_step(reader, world):
                yield batch, model(batch.to(world.device)).float().cpu()
                done += totals.rows
                now = time.monotonic()
                if world.rank == 0 and (now - shown > SHOW_EVERY_S or done == dataset.rows):
                    shown, rate = now, done / (now - began)
                    control.show(
                        {
                            "kind": "progress",
                            "what": what,
                            "done": done,
                            "total": dataset.rows,
                            "rows_per_s": rate,
                            "seconds_left": (dataset.rows - done) / rate,
                        }
                    )
    finally:
        model.train()


def ideal_of(url: str) -> dict[str, Any] | None:
    """What the true probabilities would score, where the data was made with its ideal beside it."""
    beside = storage.join(url, IDEAL)
    if url.endswith(".parquet") or not storage.exists(beside):
        return None
    found: dict[str, Any] = json.loads(storage.read(beside))
    return found
