"""What workers can be asked to do, each with plain data in and plain data out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtlrec.assembly import restore
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.control import Control
from mtlrec.distributed import World
from mtlrec.evaluate import evaluate
from mtlrec.job.job import job_from_dict
from mtlrec.lockstep import together
from mtlrec.predict import predict
from mtlrec.preflight import Run
from mtlrec.schema import Schema, build_schema
from mtlrec.sharding import ShardedModel
from mtlrec.train import train

Action = Callable[[dict[str, Any], World, Control], dict[str, Any]]


def perform(action: str, payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """Run one of ACTIONS; every worker calls it with the same payload."""
    return ACTIONS[action](payload, world, control)


def _train(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    return train(Run(**payload), world, control)


def _evaluate(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """payload: `job`, `checkpoint`, `data`, `batch_size`."""
    model, schema = _restore(payload, world)
    metrics, ideal = evaluate(model, schema, payload["data"], payload["batch_size"], world, control)
    return {"checkpoint": payload["checkpoint"], "data": payload["data"], "metrics": metrics, "ideal": ideal}


def _predict(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """payload: `job`, `checkpoint`, `data`, `batch_size`, `out`, `keys`."""
    model, schema = _restore(payload, world)
    source = {"checkpoint": payload["checkpoint"], "data": payload["data"]}
    out, keys = payload["out"], payload["keys"]
    return predict(model, schema, payload["data"], out, keys, payload["batch_size"], world, control, source)


def _restore(payload: dict[str, Any], world: World) -> tuple[ShardedModel, Schema]:
    job = job_from_dict(payload["job"], payload["checkpoint"])
    schema = build_schema(job.schema_, job.model)
    manifest = together(world, lambda: read_manifest(payload["checkpoint"]))
    return restore(job, schema, world, payload["checkpoint"], manifest), schema


ACTIONS: dict[str, Action] = {"train": _train, "evaluate": _evaluate, "predict": _predict}
