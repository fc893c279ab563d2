"""Arrow columns of one row group -> `Columns`: which rows of tables, numbers, labels. No torch.

R rows, N dense numbers, T tasks. docs/data.md has the rules for nulls and for values that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.columns import Columns, Lists, list_features, offsets_of, single_features, span_index
from mtlrec.data.ids import IdError, hash_ids, hash_into, rows_of
from mtlrec.data.labels import read_labels, read_weight
from mtlrec.data.source import Array, BadRows, Source, is_valid, without_nulls
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.schema import DenseFeature, IdFeature, Schema, Table

_Rows = Callable[[pa.Array | Array], npt.NDArray[np.int64]]
"""Ids without nulls -> rows of their table. Raises IdError."""
_BLOCK = 16384
"""Ids turned into rows at a time, so that what lies between stays in the cache."""
_SHOWN_SCENARIOS = 20


def build_columns(
    table: pa.Table,
    schema: Schema,
    *,
    where: str,
    first_row: int,
    labels: bool = True,
    keys: Sequence[str] = (),
    vocabularies: Mapping[str, Vocabulary] | None = MappingProxyType({}),
    bad: BadRows | None = None,
) -> Columns:
    """Arrow columns of one row group -> Columns.

    where: file and row group, for messages; first_row: number of its first row in the whole data set. Without
    `labels` neither they nor sample weights are looked at, and no row has one. vocabularies: by name of the
    table; None: not built yet, so that no id has a row. bad: collects the rows that do not fit; None: the
    first raises InputError that names `where`, the row in the row group, the column, the value and what is
    allowed.
    """
    num_rows = table.num_rows
    source = Source(table, where, bad)
    scenario = _scenario(source, schema)

    singles = single_features(schema)
    ids = np.empty((len(singles), num_rows), _index_type([schema.table_of[each.table] for each in singles]))
    for target, feature in zip(ids, singles, strict=True):
        if feature.source == "scenario":
            target[:] = scenario
        elif feature.source == "bucket":
            _bucket(source, feature, target)
        else:
            _id(source, feature, schema.table_of[feature.table], vocabularies, target)
    dense = np.zeros((schema.dense_width, num_rows), np.float32).T
    for number in schema.dense_features:
        (_number if number.source == "number" else _vector)(source, number, dense)
    if labels:
        label, valid = read_labels(source, schema.tasks)
    else:
        label = np.zeros((num_rows, len(schema.tasks)), np.float32)
        valid = np.zeros(label.shape, np.bool_)
    weighted = schema.weight_column if labels else None
    columns = Columns.of(
        np.arange(first_row, first_row + num_rows, dtype=np.int64),
        ids,
        [_lists(source, each, schema.table_of[each.table], vocabularies) for each in list_features(schema)],
        dense,
        label,
        valid,
        scenario,
        None if weighted is None else read_weight(source, weighted),
    )
    return replace(
        columns,
        keys=_plain(table.select(list(keys))) if keys else None,
        bad=None if bad is None or not bad.misfits else bad.mask,
    )


def unreadable_columns(
    num_rows: int, schema: Schema, *, first_row: int, labels: bool = True, keys: Sequence[str] = ()
) -> Columns:
    """`build_columns` of a row group that cannot be read: every row is bad."""
    singles = [schema.table_of[each.table] for each in single_features(schema)]
    tasks = len(schema.tasks)
    columns = Columns.of(
        np.arange(first_row, first_row + num_rows, dtype=np.int64),
        np.full((len(singles), num_rows), -1, _index_type(singles)),
        [
            Lists(np.zeros(num_rows + 1, np.int64), np.zeros(0, _index_type([schema.table_of[each.table]])))
            for each in list_features(schema)
        ],
        np.zeros((num_rows, schema.dense_width), np.float32),
        np.zeros((num_rows, tasks), np.float32),
        np.zeros((num_rows, tasks), np.bool_),
        np.zeros(num_rows, np.int32),
        np.zeros(num_rows, np.float32) if labels and schema.weight_column is not None else None,
    )
    return replace(
        columns,
        keys=pa.table({name: pa.nulls(num_rows) for name in keys}) if keys else None,
        bad=np.ones(num_rows, np.bool_),
    )


def _scenario(source: Source, schema: Schema) -> npt.NDArray[np.int32]:
    if schema.scenario_column is None:
        return np.zeros(len(source), np.int32)
    array = source[schema.scenario_column]
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    indices = without_nulls(array.indices, -1)
    names = {name: index for index, name in enumerate(schema.scenarios)}
    # As bytes, or a text that is no UTF-8 could not be looked at.
    text = pa.types.is_string(array.type.value_type) or pa.types.is_large_string(array.type.value_type)
    values = (pc.cast(array.dictionary, pa.large_binary()) if text else array.dictionary).to_pylist()
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
    # The last one is for nulls, whose index -1 finds it.
    known = np.array([*(names.get(text, -1) for text in texts), -1], np.int32)
    scenario: npt.NDArray[np.int32] = known.take(indices, mode="wrap")
    if (array.null_count or known[:-1].min(initial=0) < 0) and (wrong := scenario < 0).any():
        rows = np.flatnonzero(wrong)
        allowed = ", ".join(schema.scenarios[:_SHOWN_SCENARIOS])
        if len(schema.scenarios) > _SHOWN_SCENARIOS:
            allowed += f", ... ({len(schema.scenarios)} in all)"

        def problem(at: int) -> str:
            index = indices[rows[at]]
            value = "null" if index < 0 else repr(texts[index] if text else values[index])
            return f"{value} is not a scenario; schema.scenario.values allows {allowed}"

        source.refuse(schema.scenario_column, rows, problem)
        scenario[wrong] = 0
    return scenario


def _rows_in(table: Table, vocabularies: Mapping[str, Vocabulary] | None) -> _Rows:
    if table.ids == "vocabulary":
        if vocabularies is None:
            return lambda ids: np.full(len(ids), -1, np.int64)
        vocabulary = vocabularies[table.name]
        of_integers = vocabulary.kind in ("int64", "uint64")

        def look_up(ids: pa.Array | Array) -> npt.NDArray[np.int64]:
            if len(ids) and isinstance(ids, np.ndarray) != of_integers:
                # Every one would be unknown, in silence.
                kinds = ("integers", "text") if of_integers else ("text", "integers")
                raise IdError(f"the vocabulary of table {table.name!r} holds {kinds[0]}, not {kinds[1]}", 0)
            return vocabulary.look_up(hash_ids(ids))

        return look_up
    how = table.ids
    return lambda ids: rows_of(ids, table.rows, how)


def _id(
    source: Source,
    feature: IdFeature,
    table: Table,
    vocabularies: Mapping[str, Vocabulary] | None,
    target: Array,
) -> None:
    """One id a row -> its row of a table, -1 for null."""
    array = _within(source, feature.column, source[feature.column], table, lambda at: at)
    try:
        _look_up(array, table, vocabularies, target)
    except IdError as error:
        raise source.error(feature.column, error.position, str(error)) from None
    if array.null_count:
        target[~is_valid(array)] = -1


def _within(
    source: Source, column: str, ids: pa.Array, table: Table, row_of: Callable[[Array], Array]
) -> pa.Array:
    """The ids, where those that are no row of an identity table have been refused. row_of: their rows."""
    if table.ids != "identity":
        return ids
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if not pa.types.is_integer(ids.type) or not len(ids):
        return ids
    values = without_nulls(ids, 0)
    if values.min() >= 0 and values.max() < table.rows:
        return ids
    outside = (values < 0) | (values >= table.rows)
    at = np.flatnonzero(outside)
    source.refuse(
        column,
        row_of(at),
        lambda n: f"id {values[at[n]]} is outside the table: identity ids are 0 <= id < {table.rows}",
    )
    return pc.if_else(pa.array(outside), pa.scalar(0, ids.type), ids)


def _lists(
    source: Source, feature: IdFeature, table: Table, vocabularies: Mapping[str, Vocabulary] | None
) -> Lists:
    array = source[feature.column]
    if array.null_count:
        offsets = offsets_of(without_nulls(pc.list_value_length(array), 0))
    else:
        offsets = array.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
    ids = array.flatten()  # leaves out what lies under null lists
    if ids.null_count:
        offsets = offsets_of(is_valid(ids))[offsets]
        ids = ids.drop_null()
    if feature.max_length is not None:
        lengths = np.diff(offsets)
        if len(lengths) and lengths.max() > feature.max_length:
            kept = np.minimum(lengths, feature.max_length)
            index = span_index(offsets[1:] - kept, kept)
            ids, offsets = ids.take(pa.array(index)), offsets_of(kept)

    def row_of(at: Any) -> Any:
        return np.searchsorted(offsets, at, side="right") - 1

    ids = _within(source, feature.column, ids, table, row_of)
    values = np.empty(len(ids), _index_type([table]))
    try:
        _look_up(ids, table, vocabularies, values)
    except IdError as error:
        raise source.error(feature.column, int(row_of(error.position)), str(error)) from None
    return Lists(offsets, values)


def _look_up(
    array: pa.Array, table: Table, vocabularies: Mapping[str, Vocabulary] | None, target: Array
) -> None:
    """Ids -> their rows of a table in `target`; anything where there is a null. Raises IdError."""
    rows = _rows_in(table, vocabularies)
    if pa.types.is_dictionary(array.type) and pa.types.is_integer(array.type.value_type):
        array = array.dictionary_decode()
    if not pa.types.is_integer(array.type):
        # Each distinct text is looked up once.
        if not pa.types.is_dictionary(array.type):
            array = array.dictionary_encode()
        if len(array.dictionary):
            found = rows(array.dictionary).astype(target.dtype)
            np.take(found, without_nulls(array.indices, 0), out=target, mode="clip")
        return
    values = without_nulls(array, 0)
    if table.ids == "hash":
        hash_into(values, table.rows, target)
        return
    for start in range(0, len(values), _BLOCK):
        try:
            target[start : start + _BLOCK] = rows(values[start : start + _BLOCK])
        except IdError as error:
            raise IdError(str(error), start + error.position) from None


def _bucket(source: Source, feature: IdFeature, target: Array) -> None:
    """Bucket 0 for null and NaN, 1 + the number of boundaries at or below x for a number x."""
    values = source.floats(feature.column, source[feature.column])
    target[:] = np.searchsorted(np.asarray(feature.boundaries), values, side="right")
    target += 1
    target[np.isnan(values)] = 0


def _number(source: Source, feature: DenseFeature, dense: npt.NDArray[np.float32]) -> None:
    values = source.floats(feature.column, source[feature.column])
    if feature.transform != "none":
        values = values.astype(np.float64)
    if feature.transform == "log1p":
        values = np.copysign(np.log1p(np.abs(values)), values)
    elif feature.transform == "standardise":
        values = (values - feature.mean) / feature.std
    source.store(feature.column, values, dense[:, feature.start])


def _vector(source: Source, feature: DenseFeature, dense: npt.NDArray[np.float32]) -> None:
    array = source[feature.column]
    present = np.flatnonzero(is_valid(array))
    lengths = without_nulls(pc.list_value_length(array), 0)[present]
    flat = array.flatten
    if (wrong := lengths != feature.width).any():
        at = np.flatnonzero(wrong)
        source.refuse(
            feature.column,
            present[at],
            lambda n: f"{lengths[at[n]]} numbers; schema.features.{feature.name}.size is {feature.width}",
        )
        present = present[~wrong]
        flat = array.take(pa.array(present)).flatten
    row_of = np.repeat(present, feature.width)
    values = source.floats(feature.column, flat(), row_of).reshape(-1, feature.width)
    if len(present) < len(array):
        values, some = np.zeros((len(array), feature.width), values.dtype), values
        values[present] = some
    source.store(feature.column, values, dense[:, feature.start : feature.start + feature.width])


def _plain(table: pa.Table) -> pa.Table:
    """The columns as they stand in the file: texts that were read as dictionaries become texts again."""

    def plain(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_dictionary(kind):
            return kind.value_type
        if pa.types.is_list(kind):
            return pa.list_(kind.value_field.with_type(plain(kind.value_type)))
        if pa.types.is_large_list(kind):
            return pa.large_list(kind.value_field.with_type(plain(kind.value_type)))
        return kind

    return table.cast(pa.schema([field.with_type(plain(field.type)) for field in table.schema]))


def _index_type(tables: Sequence[Table]) -> type[np.signedinteger[Any]]:
    """Half the memory and traffic where the rows of every table fit into 32 bits."""
    return np.int32 if all(table.rows <= 2**31 for table in tables) else np.int64
