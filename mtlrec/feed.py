"""What a run trains on: shards, their vocabularies and negatives, and the schema that these complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from mtlrec import storage
from mtlrec.checkpoint.manifest import Manifest
from mtlrec.checkpoint.vocabularies import load_vocabularies
from mtlrec.control import Control
from mtlrec.data.negatives import Sampler
from mtlrec.data.order import Position
from mtlrec.data.quarantine import FOLDER as QUARANTINE
from mtlrec.data.quarantine import (
    NOTHING,
    Counts,
    Earlier,
    Quarantine,
    Tally,
    good_rows,
    open_dataset,
    recorded,
)
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World
from mtlrec.generations import Record, open_recorded, read_record, record_url
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
    opened: Dataset | None
    """The shards; None where the run has trained on all of them, and they need not be there any more."""
    record: Record | None
    """Of the generation, where the run follows its data."""
    vocabularies: Mapping[str, Vocabulary]
    """By table."""
    sampler: Sampler | None
    """Of negatives; None where the job draws none."""
    quarantine_url: str
    """Folder where bad rows are written down, if the job leaves them out."""
    tally: Tally | None
    """Counts the bad rows of all generations, step by step; None where one is an error."""

    @property
    def is_open(self) -> bool:
        """There is something to read."""
        return self.opened is not None

    @property
    def dataset(self) -> Dataset:
        assert self.opened is not None, "the shards of this generation were not opened"
        return self.opened

    @property
    def earlier(self) -> Earlier:
        """Of the generations before."""
        return self.tally.earlier if self.tally is not None else NOTHING

    def about_data(self) -> dict[str, Any]:
        """What a checkpoint keeps of the shards."""
        if self.opened is not None:
            return {"fingerprint": self.opened.fingerprint, "index": self.opened.index()}
        assert self.record is not None
        index = {key: self.record[key] for key in ("url", "fingerprint", "rows", "shards")}
        return {"fingerprint": self.record["fingerprint"], "index": index}

    def next(self, dataset: Dataset, world: World, control: Control) -> Feed:
        """Of the next generation. A collective. Raises InputError where a row does not fit."""
        if self.tally is not None:
            self.tally.end_generation(self.about_data()["index"]["rows"])
        job, schema, known = self.job, self.schema, self.vocabularies
        sampler = _sampler(job, schema, dataset, known, world, control, self.earlier, later=True)
        return replace(self, opened=dataset, record=None, sampler=sampler)

    def reader(self, position: Position, step: int, world: World) -> Reader:
        """This worker's batches from `position`, behind `step` steps, to the end of the last epoch."""
        data, quarantine = self.job.data, None
        if data.tolerance is not None:
            quarantine = Quarantine(self.dataset, data.tolerance, self.quarantine_url, earlier=self.earlier)
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

    def left_out(self) -> Counts:
        """What was written down of bad rows, by all workers and starts of the run."""
        if self.job.data.tolerance is None:
            return {"rows": 0, "row_groups": 0, "files": 0}
        return recorded(self.quarantine_url)


def open_feed(
    run: Run,
    world: World,
    control: Control,
    position: Position,
    checkpoint: str | None,
    start: Manifest | None,
    bad_rows: Mapping[str, int] | None = None,
) -> Feed:
    """Open the shards that are trained from `position` on; and load what `checkpoint` (which says `start` of
    itself) keeps of them, or build it.

    bad_rows: what was left out up to `position`, as the checkpoint has it. A collective. Raises InputError,
    on every rank alike.
    """
    job = job_from_dict(run.job, run.url)
    schema = build_schema(job.schema_, job.model)
    dataset, record = together(world, lambda: _open(job, schema, run, position))
    if checkpoint is not None and start is not None:
        vocabularies = together(world, lambda: load_vocabularies(checkpoint, start))
    else:
        assert dataset is not None, "a run without a checkpoint begins with its first row"
        groups = _groups(schema)
        good = good_rows(dataset, schema, job.data.tolerance)
        built = build(good, _wanted(job, schema, groups), run.url, world, control)
        vocabularies = {table: built[group[0]] for group in groups for table in group}
    if vocabularies:
        job = with_rows(job, vocabularies)
        schema = build_schema(job.schema_, job.model)
        if world.rank == 0:
            text = yaml.safe_dump(job.to_dict(), sort_keys=False)
            storage.write(storage.join(run.url, "job.yaml"), text.encode())
    folder, tolerance = storage.join(run.url, QUARANTINE), job.data.tolerance
    tally = Tally(tolerance, folder, bad_rows) if tolerance is not None else None
    feed = Feed(job, schema, dataset, record, vocabularies, None, folder, tally)
    if dataset is None:
        return feed
    later = position.generation > 0
    sampler = _sampler(job, schema, dataset, vocabularies, world, control, feed.earlier, later)
    return replace(feed, sampler=sampler)


def _sampler(
    job: Job,
    schema: Schema,
    dataset: Dataset,
    vocabularies: Mapping[str, Vocabulary],
    world: World,
    control: Control,
    earlier: Earlier,
    later: bool,
) -> Sampler | None:
    """What draws negatives by the positives of `dataset`, where the job wants any. A collective.

    later: it is no first generation. A quiet hour may be without a positive, and then draws nothing.
    """
    if job.data.negatives is None:
        return None
    good = good_rows(dataset, schema, job.data.tolerance, earlier)
    index = build_index(good, schema, job.data.negatives, vocabularies, world, control, later)
    return Sampler(index, schema, job.data.negatives, job.seed)


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


def _open(job: Job, schema: Schema, run: Run, position: Position) -> tuple[Dataset | None, Record | None]:
    """The shards, if anything of them is left to train, and their record where the run follows its data."""
    if job.data.follow is not None:
        record = read_record(run.url, position.generation)
        if record is None:
            raise InputError(f"{record_url(run.url, position.generation)}: missing; restore the file")
        if position.epoch >= job.run.epochs:
            return None, record
        return open_recorded(job.data.train, schema.columns(), record, job.data.tolerance), record
    dataset = open_dataset(job.data.train, schema.columns(), job.data.tolerance)
    if dataset.fingerprint != run.fingerprint:
        raise InputError(
            f"{job.data.train}: this worker sees other shards than the machine that started the run; "
            "every machine must read the same storage"
        )
    return dataset, None
