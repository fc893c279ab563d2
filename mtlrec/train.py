"""The one training loop. It knows no Ray: what is outside reaches it through a `Control`."""

from __future__ import annotations

import json
import time
from typing import Any

from mtlrec import storage
from mtlrec.assembly import Trainer, assemble
from mtlrec.checkpoint import folder
from mtlrec.checkpoint.manifest import read_manifest
from mtlrec.checkpoint.save import finish, save
from mtlrec.checkpoint.starts import claim_start
from mtlrec.control import Control
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World, all_ok, broadcast_bytes
from mtlrec.evaluate import evaluate
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict
from mtlrec.journal import Journal
from mtlrec.lockstep import in_step, together
from mtlrec.preflight import RESULT, Run
from mtlrec.schema import Schema, build_schema
from mtlrec.sharding import local_blocks


def train(run: Run, world: World, control: Control) -> dict[str, Any]:
    """Train `run` from its last complete checkpoint, or from its start, to its end or until it is stopped.

    Every worker calls it. Returns the run's result as plain data, in full on rank 0. Raises InputError, on
    every rank alike, for what the user can correct.
    """
    began = time.monotonic()
    job = job_from_dict(run.job, run.url)
    schema = build_schema(job.schema_, job.model)
    dataset = together(world, lambda: _open(job, schema, run))
    checkpoint, number = _agree_on_start(run, world)
    if number > 1 and world.rank == 0:
        control.show(
            {"kind": "log", "text": f"start {number} of this run, from {checkpoint or 'its beginning'}"}
        )
    start = together(world, lambda: read_manifest(checkpoint)) if checkpoint else None
    position = (
        Position.from_json(start.meta["position"], f"{checkpoint}: position")
        if start
        else Position.start(job.data.lanes)
    )
    with Reader(
        dataset,
        schema,
        batch_size=job.data.batch_size,
        lanes=job.data.lanes,
        window=job.data.window,
        shuffle=job.data.shuffle,
        seed=job.seed,
        position=position,
        epochs=job.run.epochs,
        rank=world.rank,
        world_size=world.world_size,
        pin_memory=world.device.type == "cuda",
    ) as reader:
        # The reader fills its first windows while the model is built.
        trainer = assemble(job, schema, world, run.url, checkpoint, start)
        total = trainer.step + reader.steps_left(position)
        total = min(total, job.run.max_steps) if job.run.max_steps else total
        if world.rank == 0:
            dense = sum(tensor.numel() for tensor in trainer.model.dense_parameters().values())
            tables = trainer.model.plan_table()
            control.show(
                {"kind": "plan", "workers": world.world_size, "tables": tables, "dense_parameters": dense}
            )
        journal = Journal(
            run.url,
            number,
            tuple(task.name for task in schema.tasks),
            world,
            control,
            step=trainer.step,
            total_steps=total,
            every_s=job.run.report_every_s,
            record_rows=job.run.record_rows,
        )
        saver = _Saver(run, job, schema, dataset, number, world, control, journal)
        saved = checkpoint
        stopped = False
        if trainer.step < total:
            for batch, totals in in_step(reader, world, lambda: (control.should_stop(), journal.due())):
                stop, report = totals.signals
                journal.start_step()
                losses = trainer.train_step(batch, totals)
                journal.end_step(batch, totals, losses)
                position, saved = batch.position, None
                stopped = stop and trainer.step < total
                if report or stopped or trainer.step == total:
                    journal.report()
                if stopped or trainer.step == total:
                    break
                if job.run.checkpoint.every_steps and trainer.step % job.run.checkpoint.every_steps == 0:
                    saved = saver.save(trainer, position)
    journal.pause()
    saved = saved or saver.save(trainer, position)
    result: dict[str, Any] = {
        "run_dir": run.url,
        "checkpoint": saved,
        "stopped": stopped,
        "steps": trainer.step,
        "rows": journal.rows,
        "samples_per_s": journal.rows / journal.seconds if journal.seconds else None,
        "seconds": time.monotonic() - began,
        "metrics": None,
        "ideal": None,
        "asked": {"epochs": job.run.epochs, "max_steps": job.run.max_steps},
    }
    if not stopped:
        if job.data.eval:
            result["metrics"], result["ideal"] = _measure(trainer, job, schema, world, control)
            saver.add_metrics(saved, result["metrics"])
            journal.scalars(_scalars(result["metrics"]))
        result["seconds"] = time.monotonic() - began
        if world.rank == 0:
            storage.write(storage.join(run.url, RESULT), json.dumps(result, indent=1).encode())
    journal.close()
    all_ok(None, world)
    return result


class _Saver:
    """Writes checkpoints of one attempt, and keeps as many as the job says."""

    def __init__(
        self,
        run: Run,
        job: Job,
        schema: Schema,
        dataset: Dataset,
        start: int,
        world: World,
        control: Control,
        journal: Journal,
    ) -> None:
        self._run, self._job, self._schema, self._dataset = run, job, schema, dataset
        self._start, self._world, self._control, self._journal = start, world, control, journal

    def save(self, trainer: Trainer, position: Position) -> str:
        """Write one checkpoint, all ranks together, and return its URL."""
        # What has diverged must not take the place of a good checkpoint.
        self._journal.report()
        self._journal.pause()
        self._journal.flush()
        url = folder.checkpoint_url(self._run.url, trainer.step, self._start)
        meta = {
            "job": self._job.to_dict(),
            "schema": self._schema.to_dict(),
            "schema_fingerprint": self._schema.fingerprint(),
            "data": {"fingerprint": self._dataset.fingerprint, "index": self._dataset.index()},
            "step": trainer.step,
            "position": position.to_json(),
            "attempt": self._start,
            "metrics": None,
        }
        save(url, local_blocks(trainer.model), trainer.dense_tensors(), meta, self._world)
        self._control.report({"step": float(trainer.step)}, url)
        if self._world.rank == 0:
            self._control.show({"kind": "saved", "step": trainer.step, "url": url})
            folder.sweep(self._run.url, self._start)
            folder.retain(self._run.url, self._job.run.checkpoint.keep_last)
        return url

    def add_metrics(self, url: str, metrics: dict[str, Any]) -> None:
        """Write what the finished model was measured at into its checkpoint's manifest."""
        if self._world.rank == 0:
            finish(url, metrics)


def _open(job: Job, schema: Schema, run: Run) -> Dataset:
    dataset = Dataset.open(job.data.train, schema.columns())
    if dataset.fingerprint != run.fingerprint:
        raise InputError(
            f"{job.data.train}: this worker sees other shards than the machine that started the run; "
            "every machine must read the same storage"
        )
    return dataset


def _agree_on_start(run: Run, world: World) -> tuple[str | None, int]:
    """The checkpoint to go on from and the number of this start, chosen by rank 0 for all."""

    def choose() -> bytes:
        if world.rank > 0:
            return b""
        newest = folder.latest(run.url)
        return json.dumps([newest.url if newest else None, claim_start(run.url, run.attempt)]).encode()

    url, number = json.loads(broadcast_bytes(together(world, choose), world))
    return url, number


def _measure(
    trainer: Trainer, job: Job, schema: Schema, world: World, control: Control
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    assert job.data.eval is not None
    return evaluate(trainer.model, schema, job.data.eval, job.data.batch_size, world, control)


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        f"eval/{scenario}/{task}/{name}": float(value)
        for scenario, by_task in metrics.items()
        for task, numbers in by_task.items()
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }
