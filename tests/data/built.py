"""Columns that are built from plain values, for tests of what each kind of column becomes."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mtlrec.data.columns import column_names
from mtlrec.data.decode import build_columns
from mtlrec.job.errors import InputError
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import SchemaSection
from mtlrec.schema import Schema, build_schema


def schema_of(features=None, tasks=None, **more) -> Schema:
    section = {
        "features": features or {"other": {"kind": "id", "rows": 10}},
        "tasks": tasks or {"click": {"kind": "binary"}},
        **more,
    }
    return build_schema(SchemaSection.model_validate(section), ModelSection())


def build(schema: Schema, labels: bool = False, keys=(), vocabularies=None, **columns):
    """Columns of a table that holds `columns`, and anything for the rest of the schema."""
    arrays = {name: each if isinstance(each, pa.Array | pa.ChunkedArray) else pa.array(each)
              for name, each in columns.items()}  # fmt: skip
    num_rows = len(next(iter(arrays.values())))
    for name in column_names(schema, labels, keys):
        arrays.setdefault(name, pa.array([0] * num_rows))
    return build_columns(
        pa.table(arrays),
        schema,
        where="x.parquet, row group 3",
        first_row=100,
        labels=labels,
        keys=keys,
        vocabularies=vocabularies or {},
    )


def refused(schema: Schema, labels: bool = False, **columns) -> str:
    with pytest.raises(InputError) as caught:
        build(schema, labels, **columns)
    message = str(caught.value)
    assert message.startswith("x.parquet, row group 3, row ") and "\n" not in message
    return message.removeprefix("x.parquet, row group 3, ")
