"""All that can be known, and refused, before a worker starts. Needs no torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from mtlrec import fork, generations, storage
from mtlrec.checkpoint.folder import Checkpoint, find, latest
from mtlrec.checkpoint.lease import Lease
from mtlrec.checkpoint.manifest import Manifest, read_manifest
from mtlrec.data import label_statistics, statistics
from mtlrec.data.overview import overview
from mtlrec.data.quarantine import Earlier, good_rows, open_dataset, unreadable_files
from mtlrec.data.shards import Dataset
from mtlrec.job.changes import changes
from mtlrec.job.errors import InputError
from mtlrec.job.job import CPU_TABLE_OPTIMIZERS, Job, job_from_dict, parse_job
from mtlrec.schema import Schema, build_schema, key_columns

RESULT = "result.json"
"""In the run's folder once it has finished."""
Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """One attempt at a run, in plain data that travels to every worker."""

    job: dict[str, Any]
    url: str
    """The run's folder."""
    attempt: int
    fingerprint: str
    """Of the training data that the driver saw."""
    forked_from: dict[str, Any] | None = None
    """Of a fork: `run` and `checkpoint` that it started from, `step`, and `order`: "kept", or "anew" where
    data or seed are others, so that it began at the first row of epoch 0."""


def read_job(url: str, overrides: list[str]) -> Job:
    """The job file at `url`, its paths made absolute. `overrides` count from the current folder.

    From here on this process reaches object storage as the job says; the file itself as the environment says.
    """
    url = storage.make_absolute(url, ".")
    try:
        text = storage.read(url).decode()
    except FileNotFoundError:
        raise InputError(f"{url}: there is no such job file") from None
    except UnicodeDecodeError:
        raise InputError(f"{url}: not a job file (YAML text)") from None
    job = parse_job(text, url, overrides)
    set_here = {override.partition("=")[0].strip() for override in overrides}
    raw = job.to_dict()
    for section, field in (("data", "train"), ("data", "eval"), ("run", "storage")):
        value = raw[section][field]
        if value is not None:
            base = "." if f"{section}.{field}" in set_here else storage.parent(url)
            raw[section][field] = storage.make_absolute(value, base)
    if (bundle := raw["storage_options"]["ca_bundle"]) is not None:
        base = "." if "storage_options.ca_bundle" in set_here else storage.parent(url)
        raw["storage_options"]["ca_bundle"] = storage.make_absolute(bundle, base)
    job = job_from_dict(raw, url)
    storage.configure(job.storage_options)
    return job


def open_run(
    job: Job, holder: dict[str, Any], show: Show, fork_name: str | None = None
) -> tuple[Run, Lease] | dict[str, Any]:
    """Take the run's lease, settle what is resumed, and open the data.

    fork_name: of the run that is to go on, with this job, from the latest checkpoint of the run that the job
    names; where it has checkpoints of its own it goes on from those.
    Returns the run and its lease; or, where the run has finished before, its result.
    Raises InputError where the run is held by another driver, the job or the data differ from the run's, or
    the data does not fit the schema.
    """
    source = storage.join(job.run.storage, job.name) if fork_name is not None else None
    if fork_name is not None:
        job = fork.renamed(job, fork_name)
    url = storage.join(job.run.storage, job.name)
    newest = latest(url)
    before = read_manifest(newest.url) if newest else None
    refuse_nested(url, job, "run.storage: the run's folder")
    origin_url, origin, forked_from = None, None, None
    if before is not None:
        if source is not None:
            fork.refuse_other(url, source, before)
        forked_from = before.meta.get("forked_from")
    elif (source := source or fork.source_of(url)) is not None:
        origin_url, origin = fork.origin_of(source)
    job = _measured(job, before or origin, show)
    if before is not None:
        _refuse_changed_job(url, job, before)
    if origin is not None:
        fork.refuse_unfit(url, job, origin)
    schema = build_schema(job.schema_, job.model)
    _refuse_unknown_tables(job, schema)
    tolerance = job.data.tolerance
    data = _settle_data(url, job, schema, before, source, origin)
    measured = schema.for_measuring().columns()
    held_out = open_dataset(job.data.eval, measured, tolerance) if job.data.eval else None
    if origin is not None:
        order = "anew" if data.anew else "kept"
        forked_from = {"run": source, "checkpoint": origin_url, "step": origin.meta["step"], "order": order}
    # Nothing has been written so far: a job that is refused leaves no trace.
    storage.check_writable(job.run.storage)
    lease = Lease.acquire(url, holder, lambda text: show({"kind": "log", "text": text}))
    try:
        newest, seen = latest(url), newest
        if newest != seen:
            raise InputError(f"{url}: another driver has trained this run meanwhile; start the command again")
        result = finished_result(url, job, newest)
        if result is not None:
            lease.release()
            return result
        if data.train is not None:
            known = before or (origin if not data.anew else None)
            earlier = Earlier.of(known.meta.get("bad_rows") if known is not None else None)
            about = overview(good_rows(data.train, schema, tolerance, earlier), schema)
            show({"kind": "data", "role": "train", **about})
        for lost in (unreadable_files(each) for each in (data.train, held_out) if each is not None):
            if lost:
                show({"kind": "log", "text": lost})
        if held_out is not None:
            show({"kind": "log", "text": f"eval: {held_out.rows:,} rows in {len(held_out.shards):,} shards"})
        if newest is not None:
            show({"kind": "log", "text": f"resuming {job.name} at step {newest.step:,} from {newest.url}"})
        elif forked_from is not None:
            why = f"starts anew: {'; '.join(data.anew)}" if data.anew else "goes on"
            order = f"its order of rows {why}"
            text = f"forking {job.name} from {origin_url}, step {forked_from['step']:,}; {order}"
            show({"kind": "log", "text": text})
            storage.write(storage.join(url, fork.FORK), json.dumps(forked_from, indent=1).encode())
        for record in data.records:
            generations.replace_record(url, record)
        if data.records:
            # Of a run whose checkpoints were removed: what it learnt of them is gone.
            generations.remove_later(url, data.records[-1]["generation"])
        # From here on the run is not finished, whatever an earlier end has said.
        storage.remove(storage.join(url, RESULT))
        text = yaml.safe_dump(job.to_dict(), sort_keys=False)
        storage.write(storage.join(url, "job.yaml"), text.encode())
    except BaseException:
        lease.release()
        raise
    fingerprint = data.train.fingerprint if data.train is not None else ""
    return Run(job.to_dict(), url, lease.attempt, fingerprint, forked_from), lease


@dataclass(frozen=True)
class _Data:
    """What a run goes on with."""

    train: Dataset | None
    """None where all that is known of has been trained, and the run waits for more."""
    anew: list[str]
    """Why the order of a fork is not its source's."""
    records: list[generations.Record]
    """Generations to be written down once the run is ours: no checkpoint of this run knows of them yet."""


def _settle_data(
    url: str, job: Job, schema: Schema, before: Manifest | None, source: str | None, origin: Manifest | None
) -> _Data:
    """Open the training data. InputError where they are not what the run, or its source, was trained on."""
    columns, tolerance = schema.columns(), job.data.tolerance
    if job.data.follow is None:
        whole = open_dataset(job.data.train, columns, tolerance)
        if before is not None:
            _refuse_changed_data(job, whole, before)
        anew = fork.order_changes(job, whole, origin) if origin is not None else []
        if origin is not None and not anew:
            fork.refuse_finished(url, job, origin)
        return _Data(whole, anew, [])
    anew = fork.order_changes(job, None, origin) if origin is not None else []
    known = before or origin
    if known is None or anew:
        first = generations.open_first(job.data.train, columns, tolerance)
        return _Data(first, anew, [generations.record_of(0, first.index(), first.id_kinds)])
    last, epoch = known.meta["position"]["generation"], known.meta["position"]["epoch"]
    if before is not None:
        records = generations.read_records(url, last)
    elif source is not None and known.meta["job"]["data"].get("follow") is not None:
        records = generations.read_records(source, last)
    else:
        records = [generations.record_of(0, known.meta["data"]["index"], {})]
    train = None
    if epoch < job.run.epochs:
        train = generations.open_recorded(job.data.train, columns, records[-1], tolerance)
    return _Data(train, anew, records if before is None else [])


def open_checkpoint(
    source: str, data: str | None, device: str, batch_size: int | None, payload: dict[str, Any]
) -> tuple[Job, dict[str, Any]]:
    """What evaluation and prediction need of the checkpoint, or the run's latest, at `source`.

    Returns its job, made to run on `device`, and `payload` completed with `job`, `checkpoint`, `data` and
    `batch_size`. Raises InputError where the checkpoint or the data is missing or does not fit.
    """
    checkpoint = find(source)
    raw = read_manifest(checkpoint).meta["job"]
    raw["run"]["device"] = device
    if device == "cpu":
        # Nothing is trained here, so what a CPU cannot train with must not keep it from reading.
        raw["model"]["precision"] = "float32"
        if raw["optimizer"]["tables"]["kind"] not in CPU_TABLE_OPTIMIZERS:
            raw["optimizer"]["tables"]["kind"] = "sgd"
    if storage.local_path(checkpoint) is None:
        # What has reached the checkpoint reaches it again.
        raw["storage_options"] = storage.configured().model_dump(mode="json")
    job = job_from_dict(raw, checkpoint)
    storage.configure(job.storage_options)
    url = storage.make_absolute(data, ".") if data is not None else job.data.eval
    if url is None:
        raise InputError("--data: the job has no data.eval, so name the Parquet to read")
    schema = build_schema(job.schema_, job.model)
    task = {**payload, "job": job.to_dict(), "checkpoint": checkpoint, "data": url}
    task["batch_size"] = batch_size or job.data.batch_size
    if "keys" in payload:
        if payload["keys"] is None:
            task["keys"] = schema.default_keys()
        unfit = sorted({task.name for task in schema.tasks} & set(task["keys"]))
        if unfit:
            raise InputError(f"--keys: {', '.join(unfit)} would be overwritten by the task of that name")
        Dataset.open(url, (*schema.columns(labels=False), *key_columns(task["keys"])))
    else:
        open_dataset(url, schema.for_measuring().columns(), job.data.tolerance)
    return job, task


def asked_of(job: Job) -> dict[str, Any]:
    """What decides where a run ends: kept in its result."""
    run = job.to_dict()["run"]
    return {field: run[field] for field in ("epochs", "max_steps", "evaluate")}


def finished_result(url: str, job: Job, newest: Checkpoint | None) -> dict[str, Any] | None:
    """What the run in `url` ended with, if it has done what `job` asks for, and no more."""
    try:
        result = json.loads(storage.read(storage.join(url, RESULT)))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(result, dict):
        return None
    if job.data.follow is not None and result.get("steps", 0) < (job.run.max_steps or math.inf):
        return None  # there may be more by now
    # An older version did not write what it did not know.
    fits = {"evaluate": None, **result.get("asked", {})} == asked_of(job)
    return result if fits and newest is not None and result.get("checkpoint") == newest.url else None


_MEASURED = {
    "features": ("mean", "std", "boundaries", "rows"),
    "tables": ("rows",),
    "tasks": ("prior", "mean", "std"),
}
"""Fields of the schema that a run fills in where the job leaves them open."""
_DECIDES = ("kind", "transform", "ids")
"""What such a number was measured for: it is kept while these stay."""


def _measured(job: Job, before: Manifest | None, show: Show) -> Job:
    """Fill in what is measured: as the run has begun with it, else on the training data.

    The rows of a vocabulary stay open in a new run, until its workers have built it.
    """
    raw = job.to_dict()
    if before is not None:
        for part, fields in _MEASURED.items():
            kept = before.meta["job"]["schema"].get(part, {})
            for name, section in raw["schema"][part].items():
                old = kept.get(name, {})
                if all(section.get(field) == old.get(field) for field in _DECIDES):
                    for field in fields:
                        if field in section and section[field] is None:
                            section[field] = old.get(field)
        return job_from_dict(raw, f"{job.name} with the numbers of its checkpoint")
    if statistics.needs_measuring(job.schema_):
        show({"kind": "log", "text": f"measuring number features on {job.data.train}"})
        data = statistics.good_training_rows(job) or job.data.train
        section = statistics.measure(data, job.schema_, _progress(show))
        raw["schema"] = section.model_dump(mode="json", by_alias=True)
        job = job_from_dict(raw, f"{job.name} with measured features")
    if label_statistics.needs_measuring(job.schema_):
        show({"kind": "log", "text": f"measuring labels on {job.data.train}"})
        section = label_statistics.measure_labels(job, _progress(show))
        raw["schema"] = section.model_dump(mode="json", by_alias=True)
        job = job_from_dict(raw, f"{job.name} with measured labels")
    return job


def _progress(show: Show) -> Callable[[int, int], None]:
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - began, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        event = {"kind": "progress", "what": "measure", "done": done, "total": total}
        show({**event, "rows_per_s": rate, "seconds_left": left})

    return progress


def refuse_nested(url: str, job: Job, what: str) -> None:
    """InputError where `url`, to be written to, lies among the job's data. what: the user's word for it."""
    for field, data in (("data.train", job.data.train), ("data.eval", job.data.eval)):
        if data is not None and f"{url}/".startswith(f"{data.rstrip('/')}/"):
            raise InputError(
                f"{what} {url} lies in {field} ({data}), where every file is read as data; keep it elsewhere"
            )


def _refuse_unknown_tables(job: Job, schema: Schema) -> None:
    sharding = job.run.sharding
    unknown = sorted(set(sharding) - set(schema.table_of)) if isinstance(sharding, dict) else []
    if unknown:
        known = ", ".join(schema.table_of)
        raise InputError(f"run.sharding.{unknown[0]}: there is no such table; tables: {known}")


def _refuse_changed_job(url: str, job: Job, before: Manifest) -> None:
    # Read again, so that fields which an older version did not know stand at their defaults.
    started = job_from_dict(before.meta["job"], f"{url}: the job of its checkpoint")
    differences = changes(started.essence(), job.essence())
    if differences:
        raise InputError(
            f"{url}: this run was started with another job: {'; '.join(differences)}. "
            "Only the sections run and storage_options may change; `--fork NEW_NAME` goes on from its latest "
            "checkpoint as a run with this job, and another name starts from nothing"
        )


def _refuse_changed_data(job: Job, train: Dataset, before: Manifest) -> None:
    if train.fingerprint != before.meta["data"]["fingerprint"]:
        change = train.describe_change(before.meta["data"]["index"])
        raise InputError(
            f"{job.data.train}: the shards are not those that run {job.name} was trained on: {change}. "
            "Restore them, or go on with these from its latest checkpoint by `--fork NEW_NAME`, or train "
            "under another name"
        )
