"""A fork: a new run that starts from another one's latest checkpoint, with a changed job. Needs no torch.

    RUN/fork.json    where a run came from, written before it trains

It reads the other run's checkpoint until it has one of its own, which it writes before its first step, and
writes nothing into the other's folder.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

from mtlrec import storage
from mtlrec.checkpoint.folder import MANIFEST, latest
from mtlrec.checkpoint.manifest import Manifest, read_manifest
from mtlrec.data.shards import Dataset
from mtlrec.job.changes import changes
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict

FORK = "fork.json"

_FREE_IN_MODEL = ("table_init", "dropout", "precision")
_FREE_IN_SCHEMA = ("user", "item", "weight")
_FREE_IN_TASKS = ("weight", "normalise", "label_smoothing", "prior")
_ORDER = ("lanes", "window", "shuffle")
"""Fields of `data` that the order of the rows follows from, beside the data and the seed."""


def renamed(job: Job, name: str) -> Job:
    """The job under the name of its fork."""
    if name == job.name:
        raise InputError(f"--fork {name}: this is the run's own name; give the fork another")
    return job_from_dict({**job.to_dict(), "name": name}, f"--fork {name}")


def source_of(url: str) -> str | None:
    """The run's folder that the run in `url`, which has no checkpoint yet, was to start from; or None."""
    try:
        found = json.loads(storage.read(storage.join(url, FORK)))
    except (FileNotFoundError, ValueError):
        return None
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else None


def refuse_other(url: str, source: str, before: Manifest) -> None:
    """InputError where the run in `url`, whose checkpoint `before` is, is no fork of the run in `source`."""
    origin = before.meta.get("forked_from")
    run = origin.get("run") if isinstance(origin, dict) else None
    # By name, as the folder of all runs may have been moved since.
    if not isinstance(run, str) or storage.name(run) != storage.name(source):
        raise InputError(
            f"--fork {storage.name(url)}: {url} is there and is no fork of {storage.name(source)}; "
            "give the fork another name"
        )


def origin_of(source: str) -> tuple[str, Manifest]:
    """URL and manifest of the latest checkpoint of the run in `source`, or InputError where it has none."""
    newest = latest(source)
    if newest is None:
        raise InputError(f"{source}: this run has no complete checkpoint that a fork could start from")
    return newest.url, read_manifest(newest.url)


@contextlib.contextmanager
def reading(url: str, forked_from: dict[str, Any] | None) -> Iterator[None]:
    """While workers train the run in `url`: say so where the source has removed what they were to start from.

    It may, as long as the fork has no checkpoint. forked_from: as `preflight.Run` has it.
    """
    try:
        yield
    except InputError as error:
        try:
            origin = forked_from["checkpoint"] if forked_from is not None and latest(url) is None else None
            is_there = origin is None or storage.exists(storage.join(origin, MANIFEST))
        except (storage.StorageError, InputError):
            is_there = True  # for all that can be known: what was wrong at first is told
        if is_there:
            raise
        raise InputError(
            f"{origin}: its run has removed this checkpoint meanwhile, as newer ones are there "
            "(run.checkpoint.keep_last); start the command again to fork the newest"
        ) from error


def refuse_unfit(url: str, job: Job, origin: Manifest) -> None:
    """InputError where `job` would have other tables, dense parameters or vocabularies than the checkpoint.

    url: of the fork. `job` has the checkpoint's measured numbers where it leaves them open.
    """
    source = job_from_dict(origin.meta["job"], f"{url}: the job of the checkpoint that it starts from")
    differences = changes(_shape(source), _shape(job))
    if differences:
        raise InputError(
            f"{url}: a fork goes on with the tables, vocabularies and parameters of its source, and this "
            f"job's would be others: {'; '.join(differences)}. Data, batches, objective, learning rates, "
            "dropout and the tasks' weights may change"
        )


def _shape(job: Job) -> dict[str, Any]:
    """All of a job that decides which numbers are learnt, and which ids they belong to."""
    raw = copy.deepcopy(job.to_dict())
    schema, model, optimizer = raw["schema"], raw["model"], raw["optimizer"]
    for fields, section in (
        (_FREE_IN_MODEL, model),
        (_FREE_IN_SCHEMA, schema),
        *((_FREE_IN_TASKS, task) for task in schema["tasks"].values()),
    ):
        for field in fields:
            section.pop(field, None)
    kinds: dict[str, Any] = {name: {"kind": optimizer[name]["kind"]} for name in ("tables", "dense")}
    # Without momentum SGD keeps no state, so that there would be none to go on with.
    kinds["dense"]["has_momentum"] = optimizer["dense"]["momentum"] > 0
    return {"schema": schema, "model": model, "optimizer": kinds}


def order_changes(job: Job, train: Dataset | None, origin: Manifest) -> list[str]:
    """Why the order of the rows is not the source's, so that the fork starts it anew; [] where it goes on.

    train: the data; None where the fork follows its data, and goes on with the source's generations.
    """
    source = job_from_dict(origin.meta["job"], "the job of the checkpoint")
    found = changes({"seed": source.seed}, {"seed": job.seed})
    old, new = source.to_dict()["data"], job.to_dict()["data"]
    found += changes({field: old[field] for field in _ORDER}, {field: new[field] for field in _ORDER}, "data")
    if train is None:
        return found + changes({"train": old["train"]}, {"train": new["train"]}, "data")
    if train.fingerprint != origin.meta["data"]["fingerprint"]:
        what = train.describe_change(origin.meta["data"]["index"])
        found.append(f"data.train has other shards ({what})")
    return found


def refuse_finished(url: str, job: Job, origin: Manifest) -> None:
    """InputError where the source, whose order goes on, has already trained all that `job` asks for."""
    epoch, step = origin.meta["position"]["epoch"], origin.meta["step"]
    if epoch >= job.run.epochs:
        raise InputError(
            f"{url}: its source has trained {epoch} epoch(s) on these rows and run.epochs is "
            f"{job.run.epochs}, so that nothing is left to train; raise run.epochs"
        )
    if job.run.max_steps is not None and step >= job.run.max_steps:
        raise InputError(
            f"{url}: its source has taken {step:,} steps and run.max_steps is {job.run.max_steps:,}, so that "
            "nothing is left to train; raise run.max_steps"
        )
