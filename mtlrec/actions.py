"""What workers can be asked to do, each with plain data in and plain data out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mtlrec import fork, storage
from mtlrec.assembly import restore
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.checkpoint.vocabularies import load_vocabularies
from mtlrec.control import Control
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_gather_bytes, all_ok
from mtlrec.evaluate import Measured, Scores, evaluate, subject_of
from mtlrec.job.errors import InputError
from mtlrec.job.job import job_from_dict
from mtlrec.lockstep import together
from mtlrec.metrics.bootstrap import REPLICATES
from mtlrec.metrics.differences import common_tasks, differences, num_comparisons
from mtlrec.predict import predict
from mtlrec.preflight import Run
from mtlrec.schema import Schema, build_schema
from mtlrec.sharding import ShardedModel
from mtlrec.train import train

Action = Callable[[dict[str, Any], World, Control], dict[str, Any]]


def perform(action: str, payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """Run one of ACTIONS; every worker calls it with the same payload."""
    # The driver has read the job's data so.
    storage.configure(job_from_dict(payload["job"], action).storage_options, proven=True)
    result = ACTIONS[action](payload, world, control)
    _tell_retries(world, control)
    return result


def _tell_retries(world: World, control: Control) -> None:
    """Say once, where all went well in the end, how often the storage did not at first."""
    counts: Counter[str] = Counter()
    for found in all_gather_bytes(json.dumps(storage.take_retries()).encode(), world):
        counts.update(json.loads(found))
    if counts and world.rank == 0:
        kinds = ", ".join(f"{why} {count:,}" for why, count in counts.most_common())
        text = f"the storage failed {counts.total():,} time(s) and was tried again: {kinds}"
        control.show({"kind": "log", "text": text})


def _train(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    run = Run(**payload)
    with fork.reading(run.url, run.forked_from):
        return train(run, world, control)


def _evaluate(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """payload: `job`, `checkpoint`, `data`, `batch_size`."""
    found = _measure(payload, payload, world, control, None)
    return {"checkpoint": payload["checkpoint"], "data": payload["data"], **found._asdict()}


def _against(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """payload: as for `evaluate`, and `against`: {`job`, `checkpoint`}, `replicates`, `seed`.

    Adds to the result of `evaluate`: `against` (the other checkpoint), `against_metrics`, and `differences`
    by scenario and common task (`metrics.differences`): the first model's metric less the other's.
    """
    other = payload["against"]
    schemas = [_schema(side) for side in (payload, other)]
    if not common_tasks(*(subject_of(schema) for schema in schemas)):
        named = [", ".join(task.name for task in schema.tasks) for schema in schemas]
        raise InputError(
            f"{other['checkpoint']}: has no task in common with {payload['checkpoint']}, by name, label and "
            f"kind: {named[1]} against {named[0]}"
        )
    measured, gathered = [], []
    for side, schema in zip((payload, other), schemas, strict=True):
        scores = Scores(schema)
        measured.append(_measure(side, payload, world, control, scores))
        gathered.append(scores.gather(world))
    replicates, seed = payload.get("replicates", REPLICATES), payload.get("seed", 0)
    first, second = gathered

    def check() -> None:
        if first is not None and second is not None and not np.array_equal(first.ties, second.ties):
            raise InputError(
                f"{payload['data']}: rows are bad for one model and not for the other "
                f"({measured[0].bad_rows['rows']:,} and {measured[1].bad_rows['rows']:,}), so that the two "
                "cannot be compared row by row; mend them, or name data without them"
            )

    together(world, check)

    def show(event: dict[str, Any]) -> None:
        control.show(event)
        all_ok(None, world)  # those who wait for rank 0 learn that it is alive

    found = None
    if first is not None and second is not None:
        found = differences(first, second, replicates, seed, show=show)
    else:
        for _ in range(num_comparisons(*(subject_of(schema) for schema in schemas))):
            all_ok(None, world)
    return {
        "checkpoint": payload["checkpoint"],
        "against": other["checkpoint"],
        "data": payload["data"],
        "metrics": measured[0].metrics,
        "against_metrics": measured[1].metrics,
        "ideal": measured[0].ideal,
        "bad_rows": measured[0].bad_rows,
        "differences": found,
    }


def _predict(payload: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """payload: `job`, `checkpoint`, `data`, `batch_size`, `out`, `keys`."""
    model, schema, vocabularies = _restore(payload, world)
    source = {"checkpoint": payload["checkpoint"], "data": payload["data"]}
    out, keys = payload["out"], payload["keys"]
    data, batch_size, tolerance = payload["data"], payload["batch_size"], _tolerance(payload)
    return predict(
        model, schema, data, out, keys, batch_size, world, control, source, vocabularies, tolerance
    )


def _measure(
    side: dict[str, Any], payload: dict[str, Any], world: World, control: Control, keep: Scores | None
) -> Measured:
    """`evaluate` of the checkpoint in `side` on the data of `payload`. The model is gone afterwards."""
    model, schema, vocabularies = _restore(side, world)
    return evaluate(
        model,
        schema,
        payload["data"],
        payload["batch_size"],
        world,
        control,
        vocabularies=vocabularies,
        keep=keep,
        # Both of two models that are compared are measured on the same rows.
        tolerance=_tolerance(payload),
    )


def _tolerance(payload: dict[str, Any]) -> float | None:
    return job_from_dict(payload["job"], payload["checkpoint"]).data.tolerance


def _restore(payload: dict[str, Any], world: World) -> tuple[ShardedModel, Schema, Mapping[str, Vocabulary]]:
    job, url = job_from_dict(payload["job"], payload["checkpoint"]), payload["checkpoint"]
    schema = build_schema(job.schema_, job.model)
    manifest = together(world, lambda: read_manifest(url))
    vocabularies = together(world, lambda: load_vocabularies(url, manifest))
    return restore(job, schema, world, url, manifest), schema, vocabularies


def _schema(payload: dict[str, Any]) -> Schema:
    job = job_from_dict(payload["job"], payload["checkpoint"])
    return build_schema(job.schema_, job.model)


ACTIONS: dict[str, Action] = {
    "train": _train,
    "evaluate": _evaluate,
    "against": _against,
    "predict": _predict,
}
