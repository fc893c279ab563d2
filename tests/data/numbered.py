"""Parquet data in which every column of a row follows from the row's number, and readers of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtlrec.batch import Batch
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import SchemaSection
from mtlrec.schema import build_schema

Change = Callable[[pa.Table], pa.Table]

LANES = 16
SECTION = {
    "scenario": {"column": "country", "values": ["de", "fr", "uk"]},
    "features": {
        "row_id": {"kind": "id", "rows": 100_000, "ids": "identity"},
        "seen": {"kind": "id_list", "table": "row_id"},
        "maybe": {"kind": "id", "rows": 100_000, "ids": "identity"},
        "age": {"kind": "number"},
        "pair": {"kind": "vector", "size": 2},
    },
    "tasks": {"click": {"kind": "binary"}, "stars": {"kind": "regression"}},
}
SCHEMA = build_schema(SchemaSection.model_validate(SECTION), ModelSection())


def make_table(rows: Sequence[int]) -> pa.Table:
    """A row number stands in, or can be told from, every column but `name`."""
    return pa.table(
        {
            "country": [["de", "fr", "uk"][row % 3] for row in rows],
            "row_id": pa.array(rows, pa.int64()),
            "seen": pa.array([[row + i for i in range(row % 4)] for row in rows], pa.list_(pa.int64())),
            "maybe": pa.array([None if row % 5 == 0 else row for row in rows], pa.int32()),
            "age": np.array(rows, np.float32),
            "pair": [[row / 2, -row] for row in rows],
            "click": pa.array([None if row % 7 == 0 else row % 2 for row in rows], pa.int8()),
            "stars": pa.array([None if row % 3 == 0 else row / 4 for row in rows], pa.float64()),
            "name": [None if row % 11 == 0 else f"n{row % 13}" for row in rows],
        }
    )


def write(folder: Path, num_rows: int, group: int = 50, files: int = 3, change: Change | None = None) -> str:
    """Rows 0 ... num_rows - 1 in `files` shards with row groups of `group` rows."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        rows = list(range(number * num_rows // files, (number + 1) * num_rows // files))
        each = make_table(rows)
        pq.write_table(
            change(each) if change else each, folder / f"part-{number}.parquet", row_group_size=group
        )
    return str(folder)


def open_data(url: str, labels: bool = True) -> Dataset:
    return Dataset.open(url, SCHEMA.columns(labels))


def reader(data: Dataset, **options: Any) -> Reader:
    defaults: dict[str, Any] = {
        "batch_size": 64, "lanes": LANES, "window": 24, "shuffle": True, "seed": 5, "epochs": 1,
        "position": Position.start(options.get("lanes", LANES)),
    }  # fmt: skip
    return Reader(data, SCHEMA, **{**defaults, **options})


def read(data: Dataset, **options: Any) -> list[Batch]:
    with reader(data, **options) as found:
        return list(found)


def rows_of(batches: Iterable[Batch]) -> list[list[int]]:
    """The rows of each batch, without padding."""
    return [batch.rows[: batch.num_rows].tolist() for batch in batches]


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mtlrec-")]


def count_reads(monkeypatch: Any) -> list[int]:
    """The row groups that are read from now on, in a list that grows."""
    reads: list[int] = []
    read_group = Dataset.read_group

    def counted(self: Dataset, group: int, columns: Sequence[str]) -> pa.Table:
        reads.append(group)
        return read_group(self, group, columns)

    monkeypatch.setattr(Dataset, "read_group", counted)
    return reads


def broken(at: int, column: str, value: Any) -> Change:
    """Puts `value` into row number `at` of whichever shard has it."""

    def change(each: pa.Table) -> pa.Table:
        rows = each["row_id"].to_pylist()
        if at not in rows:
            return each
        values = each[column].to_pylist()
        values[rows.index(at)] = value
        place = each.schema.get_field_index(column)
        return each.set_column(place, column, pa.array(values, each.schema.field(column).type))

    return change
