"""Called on every rank: trains the example job under several plans and returns all that can be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mtlrec.batch import Batch
from mtlrec.distributed import World, all_reduce_sum
from mtlrec.job.job import Job
from mtlrec.model.model import build_model
from mtlrec.objective.objective import Objective
from mtlrec.optimizers import DenseOptimizer
from mtlrec.schema import Schema
from mtlrec.sharding import ShardedModel, initialise_tables, local_blocks, shard
from tests.model.example import Rows, counts, example_job, example_schema, global_rows, local

# Rows that each lane still has, of its 6 a step: full batches, a short one, and lanes that are done.
PRESENT = [6, 6, 6, 4, 6, 6, 1, 6]


def batches(schema: Schema, steps: int) -> list[Rows]:
    return [global_rows(schema, 96, seed, PRESENT[seed % len(PRESENT)]) for seed in range(steps)]


def train(world: World, cases: dict[str, dict[str, Any]], steps: dict[str, int]) -> dict[str, Any]:
    """`cases`: name -> changes to the example job; `steps` of each. Results are named "<case>/<what>"."""
    results: dict[str, Any] = {}
    schema = example_schema(example_job())
    data = [(local(rows, schema, world), counts(rows)) for rows in batches(schema, max(steps.values()))]
    probe = local(global_rows(schema, 96, 10**6, 5), schema, world)
    for name, changes in cases.items():
        for key, value in _train(world, example_job(**changes), data[: steps[name]], probe).items():
            results[f"{name}/{key}"] = value
    return results


def start(job: Job, world: World) -> tuple[ShardedModel, DenseOptimizer, Objective]:
    """A model at its starting weights, with all that trains it."""
    schema = example_schema(job)
    model = shard(build_model(job, schema, world.device), job, world)
    initialise_tables(model, job.seed, job.model.table_init)
    return model, DenseOptimizer(job, model, world), Objective(schema)


def _train(world: World, job: Job, data: list[tuple[Batch, torch.Tensor]], probe: Batch) -> dict[str, Any]:
    model, optimizer, objective = start(job, world)
    results: dict[str, Any] = {"kinds": {row["table"]: row["kind"] for row in model.plan_table()}}
    results.update({f"start/{key}": value for key, value in _weights(model).items()})
    results.update(_predict(model, probe, "first"))
    losses = []
    for step, (batch, count) in enumerate(data):
        loss, sums = objective.loss(model(replace(batch, step=step)), batch, count, world.world_size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.average()
        optimizer.step(step)
        losses.append((all_reduce_sum(sums.detach(), world) / count[:-2].clamp(min=1)).numpy())
    results["losses"] = np.stack(losses)
    results.update({f"end/{key}": value for key, value in _weights(model).items()})
    results.update(_predict(model, probe, "last"))
    return results


def _weights(model: ShardedModel) -> dict[str, np.ndarray]:
    found = {
        f"table/{each.table}/{each.row}/{each.column}/{int(each.replicated)}": each.weights.numpy().copy()
        for each in local_blocks(model)
    }
    found.update({f"dense/{k}": v.detach().numpy().copy() for k, v in model.dense_parameters().items()})
    return found


def _predict(model: ShardedModel, batch: Batch, name: str) -> dict[str, Any]:
    model.eval()
    with torch.no_grad():
        outputs = model(batch)
    model.train()
    return {
        f"{name}/outputs": outputs[: batch.num_rows].numpy(),
        f"{name}/rows": batch.rows[: batch.num_rows].numpy(),
    }
