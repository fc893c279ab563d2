"""Scores a data set with a checkpoint: Parquet with the input's keys and one column per task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mtlrec import storage
from mtlrec.control import Control
from mtlrec.data.quarantine import Quarantine, told
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_reduce_sum
from mtlrec.evaluate import left_out, score
from mtlrec.lockstep import together
from mtlrec.schema import Schema, key_columns
from mtlrec.sharding import ShardedModel

ROWS_PER_GROUP = 131_072
ROWS_PER_FILE = 8 * 1024 * 1024
SUMMARY = "_predictions.json"
"""Written last: a folder without it is not a whole prediction."""


def predict(
    model: ShardedModel,
    schema: Schema,
    url: str,
    out: str,
    keys: list[str],
    batch_size: int,
    world: World,
    control: Control,
    source: dict[str, Any],
    vocabularies: Mapping[str, Vocabulary] = MappingProxyType({}),
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Write `out/part-<rank>-<number>.parquet`, rows in the order of the input.

    Columns: `keys` as they stand in the input (or, without keys, `row`, the row's number in it), then one
    float32 column per task: a probability for a binary task, a score for a pairwise one, a value in the unit
    of its label for regression. Labels are not needed.

    tolerance: the share of rows that may be bad, which have null for every task; None: one is an error. A row
    group that cannot be read is one in any case: nobody could tell whose predictions are missing.
    """
    columns = (*schema.columns(labels=False), *key_columns(keys))
    dataset = together(world, lambda: Dataset.open(url, columns))
    quarantine = None if tolerance is None else Quarantine(dataset, tolerance, groups=False)
    writer = _Parts(out, world.rank)
    binary = torch.tensor([task.kind == "binary" for task in schema.tasks])
    names = [task.name for task in schema.tasks]
    rows = 0
    scored = score(
        model,
        schema,
        dataset,
        batch_size,
        world,
        control,
        what="predict",
        labels=False,
        keys=keys,
        vocabularies=vocabularies,
        quarantine=quarantine,
        keep_bad=True,
    )
    with writer:
        for batch, outputs in scored:
            if batch.num_rows == 0:
                continue
            values = torch.where(binary, torch.sigmoid(outputs), outputs)[: batch.num_rows].numpy()
            if keys:
                assert batch.keys is not None
                made: dict[str, Any] = {name: batch.keys[name] for name in keys}
            else:
                made = {"row": pa.array(batch.rows[: batch.num_rows].numpy())}
            made |= {
                name: pa.array(np.ascontiguousarray(values[:, i]), mask=batch.bad)
                for i, name in enumerate(names)
            }
            writer.write(pa.table(made))
            rows += batch.num_rows
    # Every rank has closed its files once it joins this sum, so the summary does come last.
    total = int(all_reduce_sum(torch.tensor([float(rows)], dtype=torch.float64), world)[0])
    bad_rows = left_out(quarantine, world)
    if world.rank == 0 and any(bad_rows.values()):
        control.show({"kind": "log", "text": f"without a prediction: {told(bad_rows)}"})
    summary = {
        "out": out,
        "rows": total,
        "keys": keys or ["row"],
        "tasks": names,
        "bad_rows": bad_rows,
        **source,
    }
    if world.rank == 0:
        storage.write(storage.join(out, SUMMARY), json.dumps(summary, indent=1).encode())
    return summary


class _Parts:
    """One rank's files. Each appears whole, when it is closed, or not at all."""

    def __init__(self, out: str, rank: int) -> None:
        self._out, self._rank, self._number = out, rank, 0
        self._held: list[pa.Table] = []
        self._held_rows = self._file_rows = 0
        self._stream: Any = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        self._held.append(table)
        self._held_rows += table.num_rows
        if self._held_rows >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.concat_tables(self._held, promote_options="permissive").unify_dictionaries()
        self._held, self._held_rows = [], 0
        if self._writer is None:
            name = f"part-{self._rank:05d}-{self._number:05d}.parquet"
            self._stream = storage.write_stream(storage.join(self._out, name))
            self._writer = pq.ParquetWriter(self._stream.__enter__(), table.schema)
        self._writer.write_table(table)
        self._file_rows += table.num_rows
        if self._file_rows >= ROWS_PER_FILE:
            self._close_file(None)

    def _close_file(self, failure: BaseException | None) -> None:
        if self._writer is None:
            return
        stream, self._stream = self._stream, None
        try:
            self._writer.close()
        finally:
            self._writer, self._file_rows = None, 0
            self._number += 1
            stream.__exit__(type(failure) if failure else None, failure, None)

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: Any, failure: BaseException | None, trace: Any) -> None:
        if failure is None:
            self._flush()
        self._close_file(failure)
