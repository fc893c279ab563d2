"""What a run trains on: shards, their vocabularies and negatives, and the schema that these complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from mtlrec import storage
from mtlrec.checkpoint.manifest import Manifest
from mtlrec.checkpoint.vocabularies import load_vocabularies
from mtlrec.control import Control
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import Position
from mtlrec.data.quarantine import FOLDER as QUARANTINE
from mtlrec.data.quarantine import Counts, Quarantine, Tally, good_rows, open_dataset, recorded
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World
from mtlrec.interactions import build_index
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict
from mtlrec.lockstep import together
from mtlrec.preflight import Run
from mtlrec.schema import Schema, build_schema
from mtlrec.vocabularies import Wanted, build


@dataclass(frozen=True)
class Feed:
    """All that batches are made of."""

    job: Job
    """With the rows of every vocabulary."""
    schema: Schema
    dataset: Dataset
    vocabularies: Mapping[str, Vocabulary]
    """By table."""
    sampler: Sampler | None
    """Of negatives; None where the job draws none."""
    quarantine_url: str
    """Folder where bad rows are written down, if the job leaves them out."""

    def reader(self, position: Position, step: int, world: World) -> Reader:
        """This worker's batches from `position`, behind `step` steps, to the end of the last epoch."""
        data, quarantine = self.job.data, None
        if data.tolerance is not None:
            quarantine = Quarantine(self.dataset, data.tolerance, self.quarantine_url)
            if world.rank == 0:
                quarantine.record_files()
        return Reader(
            self.dataset,
            self.schema,
            batch_size=data.batch_size,
            lanes=data.lanes,
            window=data.window,
            shuffle=data.shuffle,
            seed=self.job.seed,
            position=position,
            epochs=self.job.run.epochs,
            rank=world.rank,
            world_size=world.world_size,
            pin_memory=world.device.type == "cuda",
            vocabularies=self.vocabularies,
            first_step=step,
            negatives=self.sampler,
            quarantine=quarantine,
        )

    def tally(self) -> Tally | None:
        """Counts the bad rows of this data, step by step; None where one is an error."""
        tolerance = self.job.data.tolerance
        return None if tolerance is None else Tally(self.dataset, tolerance, self.quarantine_url)

    def left_out(self) -> Counts:
        """What was written down of bad rows, by all workers and starts of the run."""
        if self.job.data.tolerance is None:
            return {"rows": 0, "row_groups": 0, "files": 0}
        return recorded(self.quarantine_url)


def open_feed(
    run: Run, world: World, control: Control, checkpoint: str | None, start: Manifest | None
) -> Feed:
    """Open the shards; load what `checkpoint` (which says `start` of itself) keeps of them, or build it.

    A collective. Raises InputError, on every rank alike.
    """
    job = job_from_dict(run.job, run.url)
    schema = build_schema(job.schema_, job.model)
    dataset = together(world, lambda: _open(job, schema, run))
    good = good_rows(dataset, schema, job.data.tolerance)
    if checkpoint is not None and start is not None:
        vocabularies = together(world, lambda: load_vocabularies(checkpoint, start))
    else:
        groups = _groups(schema)
        built = build(good, _wanted(job, schema, groups), run.url, world, control)
        vocabularies = {table: built[group[0]] for group in groups for table in group}
    if vocabularies:
        job = with_rows(job, vocabularies)
        schema = build_schema(job.schema_, job.model)
        if world.rank == 0:
            text = yaml.safe_dump(job.to_dict(), sort_keys=False)
            storage.write(storage.join(run.url, "job.yaml"), text.encode())
    sampler = None
    if job.data.negatives is not None:
        index = build_index(good, schema, job.data.negatives, vocabularies, world, control)
        sampler = Sampler(index, schema, job.data.negatives, job.seed)
    return Feed(job, schema, dataset, vocabularies, sampler, storage.join(run.url, QUARANTINE))


def with_rows(job: Job, vocabularies: Mapping[str, Vocabulary]) -> Job:
    """The job with the rows of its vocabularies' tables filled in where they are open."""
    raw = job.to_dict()
    for table, vocabulary in vocabularies.items():
        schema = raw["schema"]
        section = schema["tables"].get(table) or schema["features"][table]
        if section["rows"] is None:
            section["rows"] = vocabulary.rows
    return job_from_dict(raw, f"{job.name} with its vocabularies")


def _groups(schema: Schema) -> list[list[str]]:
    """Vocabulary tables that features look up together: an id has one row in all of a group."""
    groups: list[list[str]] = []
    for table in schema.tables:
        if table.ids == "vocabulary":
            near = {
                other
                for feature in schema.id_features
                for other in feature.tables
                if table.name in feature.tables
            }
            joined = [group for group in groups if near & set(group)]
            groups = [group for group in groups if group not in joined]
            groups.append([*(name for group in joined for name in group), table.name])
    return groups


def _wanted(job: Job, schema: Schema, groups: list[list[str]]) -> list[Wanted]:
    """One vocabulary a group, named by its first table: of all columns that look any of its tables up."""
    found = []
    for group in groups:
        table = schema.table_of[group[0]]
        columns = [each.column for each in schema.id_features if set(each.tables) & set(group)]
        rows = job.schema_.table(table.name).rows
        found.append(Wanted(table.name, tuple(columns), table.min_count, rows, table.reserved))
    return found


def _open(job: Job, schema: Schema, run: Run) -> Dataset:
    dataset = open_dataset(job.data.train, schema.columns(), job.data.tolerance)
    if dataset.fingerprint != run.fingerprint:
        raise InputError(
            f"{job.data.train}: this worker sees other shards than the machine that started the run; "
            "every machine must read the same storage"
        )
    return dataset
