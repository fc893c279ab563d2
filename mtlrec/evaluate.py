"""Measures a model on a data set, per task and scenario; and one model against another.

B rows of a batch with its padding, T tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mtlrec import storage
from mtlrec.batch import Batch
from mtlrec.control import Control
from mtlrec.data.ids import hash_ids
from mtlrec.data.order import Position, rows_between
from mtlrec.data.quarantine import NOTHING, Counts, Earlier, Quarantine, open_dataset, told
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.data.source import Source
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_gather_bytes, combine_bytes, gather_bytes
from mtlrec.lockstep import Listener, in_step, together
from mtlrec.metrics.differences import Scored, Subject
from mtlrec.metrics.groups import NO_GROUP
from mtlrec.metrics.metrics import Metrics
from mtlrec.schema import Schema
from mtlrec.sharding import ShardedModel


class Measured(NamedTuple):
    """What a data set says of a model."""

    metrics: dict[str, Any]
    """By scenario and task, on rank 0; empty elsewhere."""
    ideal: dict[str, Any] | None
    """The best that any model could reach, in the same shape, on rank 0 and where the data carries it."""
    bad_rows: Counts
    """What was left out of the data."""


SHOW_EVERY_S = 2.0
IDEAL = "_ideal.json"


def evaluate(
    model: ShardedModel,
    schema: Schema,
    url: str,
    batch_size: int,
    world: World,
    control: Control,
    *,
    vocabularies: Mapping[str, Vocabulary] = MappingProxyType({}),
    keep: Scores | None = None,
    tolerance: float | None = None,
    dataset: Dataset | None = None,
    earlier: Earlier = NOTHING,
    listener: Listener | None = None,
) -> Measured:
    """Score every row of the data set at `url` (of `dataset`, if given) once, all workers together.

    Where the schema names the user, ranking is measured within each user's rows too. `keep` is given every
    row. tolerance: the share of rows that may be bad and are left out, which rank 0 shows; None: a bad row is
    an error. earlier: rows to count with the data set's for that share. listener: of what the ranks have to
    tell each other meanwhile. A collective. Raises InputError, and what the listener raises, on every rank
    alike.
    """
    schema = schema.for_measuring()
    # What the folder says of the best that can be reached is of all its shards.
    ideal_url = url if dataset is None else None
    if dataset is None:
        dataset = together(world, lambda: open_dataset(url, schema.columns(), tolerance))
    quarantine = None if tolerance is None else Quarantine(dataset, tolerance, earlier=earlier)
    user = _user_column(schema)
    tasks = [(task.name, task.kind) for task in schema.tasks]
    metrics = Metrics(schema.scenarios, tasks, grouped=user is not None)
    keys = () if user is None else (user,)
    scored = score(
        model,
        schema,
        dataset,
        batch_size,
        world,
        control,
        what="evaluate",
        keys=keys,
        vocabularies=vocabularies,
        quarantine=quarantine,
        listener=listener,
    )
    for batch, outputs in scored:
        rows = slice(batch.num_rows)
        ties = hash_ids(batch.rows[rows].numpy())
        users = np.full(len(ties), NO_GROUP) if user is None else _user_hashes(batch, user)
        found = (
            outputs[rows].numpy(),
            batch.labels[rows].numpy(),
            batch.valid[rows].numpy(),
            batch.scenario[rows].numpy(),
        )
        metrics.update(*found, users=users, ties=ties)
        if keep is not None:
            keep.add(*found, users, ties)
    bad_rows = left_out(quarantine, world)
    if world.rank == 0 and any(bad_rows.values()):
        control.show({"kind": "log", "text": f"left out of {url}: {told(bad_rows)}"})
    ideal = together(world, lambda: ideal_of(ideal_url) if ideal_url and world.rank == 0 else None)
    if not combine_bytes(metrics.to_bytes, lambda other: metrics.merge(Metrics.from_bytes(other)), world):
        return Measured({}, None, bad_rows)
    return Measured(metrics.result(), ideal, bad_rows)


def left_out(quarantine: Quarantine | None, world: World) -> Counts:
    """What all ranks together have met of bad rows. A collective; raises InputError where it is too much."""
    if quarantine is None:
        return {"rows": 0, "row_groups": 0, "files": 0}
    # Of a row group that two ranks share, each has counted all.
    groups: dict[int, int] = {}
    for mine in all_gather_bytes(json.dumps(list(quarantine.groups.items())).encode(), world):
        groups.update(json.loads(mine))
    return quarantine.check(groups)


class Scores:
    """Every row that this rank has scored, to be brought together on rank 0 (21 + 9 T bytes a row)."""

    def __init__(self, schema: Schema) -> None:
        self._subject = subject_of(schema)
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(
        self,
        outputs: NDArray[np.float32],
        labels: NDArray[np.float32],
        valid: NDArray[np.bool_],
        scenario: NDArray[np.int64],
        users: NDArray[np.uint64],
        ties: NDArray[np.uint64],
    ) -> None:
        """The next rows, in their order; fields as of `Scored`."""
        # Copied: batches lend their memory.
        self._parts.append(
            (ties, users, scenario.astype(np.int32), labels.copy(), valid.copy(), outputs.copy())
        )

    def gather(self, world: World) -> Scored | None:
        """All ranks' rows in the order of the files, on rank 0; None elsewhere. A collective."""
        # One column at a time: rank 0 holds the ranks' padded bytes beside what they become.
        width, kinds = len(self._subject.tasks), ("<u8", "<u8", "<i4", "<f4", "?", "<f4")
        columns = []
        for place, kind in enumerate(kinds):
            mine = [np.asarray(part[place], kind).tobytes() for part in self._parts]
            parts = gather_bytes(b"".join(mine), world)
            if parts is not None:
                column = np.frombuffer(b"".join(parts), kind)
                columns.append(column.reshape(-1, width) if place >= 3 else column)
        return Scored(self._subject, *columns) if columns else None


def subject_of(schema: Schema) -> Subject:
    """What of a schema decides whether two models can be compared."""
    return Subject(tuple((task.name, task.kind, task.label) for task in schema.tasks), schema.scenarios)


def score(
    model: ShardedModel,
    schema: Schema,
    dataset: Dataset,
    batch_size: int,
    world: World,
    control: Control,
    *,
    what: str,
    labels: bool = True,
    keys: Sequence[str] = (),
    vocabularies: Mapping[str, Vocabulary] = MappingProxyType({}),
    quarantine: Quarantine | None = None,
    keep_bad: bool = False,
    listener: Listener | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield (batch, outputs [B, T] float32 on the CPU) over the whole data set, in the order of the files.

    Outputs: the logit of a binary task, the score of a pairwise one, the value of a regression in the unit
    of its label. Rank r reads the r-th of world_size equal ranges of rows, so its rows follow those of rank
    r - 1.
    """
    world_size = world.world_size
    mean = torch.tensor([task.mean for task in schema.tasks], dtype=torch.float32)
    std = torch.tensor([task.std for task in schema.tasks], dtype=torch.float32)
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
        vocabularies=vocabularies,
        quarantine=quarantine,
        keep_bad=keep_bad,
    )
    model.eval()
    began = shown = time.monotonic()
    try:
        with reader, torch.no_grad():
            for batch, totals, _ in in_step(reader, world, listener.signals if listener else tuple):
                if listener is not None:
                    listener.hear(totals.signals)
                # Other tasks than regressions have mean 0 and deviation 1.
                yield batch, model(batch.to(world.device)).float().cpu() * std + mean
                # Bad rows are done too.
                done = rows_between(Position.start(world_size), batch.position, dataset.rows)
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


def _user_column(schema: Schema) -> str | None:
    columns = {feature.name: feature.column for feature in schema.id_features}
    return None if schema.user is None else columns[schema.user]


def _user_hashes(batch: Batch, column: str) -> NDArray[np.uint64]:
    """The hash of each row's raw user id, [num_rows]: of the id, not of its row, which users may share."""
    if batch.num_rows == 0:
        return np.zeros(0, np.uint64)
    assert batch.keys is not None
    hashes, present = Source(batch.keys, "").hashes(column)
    # One id in 2**64 has the hash that stands for no user.
    users = np.maximum(hashes, NO_GROUP + np.uint64(1))
    if not present.all():
        users[~present] = NO_GROUP
    return users


def ideal_of(url: str) -> dict[str, Any] | None:
    """What the true probabilities would score, where the data was made with its ideal beside it."""
    beside = storage.join(url, IDEAL)
    if url.endswith(".parquet") or not storage.exists(beside):
        return None
    found: dict[str, Any] = json.loads(storage.read(beside))
    return found
