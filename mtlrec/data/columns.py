"""Arrow columns of one row group -> numpy arrays that windows and batches are cut from. No torch.

R rows, P id features that have one id a row, N dense numbers, T tasks. docs/data.md has the rules for nulls
and for values that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.ids import IdError, rows_of
from mtlrec.job.errors import InputError
from mtlrec.schema import DenseFeature, IdFeature, Schema, Table

Array = npt.NDArray[Any]

_BLOCK = 16384
"""Ids turned into rows at a time, so that what lies between stays in the cache."""
_SHOWN_SCENARIOS = 20


@dataclass(frozen=True)
class Lists:
    """One list feature: row r has values[offsets[r]:offsets[r + 1]]."""

    offsets: npt.NDArray[np.int64]
    """[R + 1]; a slice keeps those of the whole, so the first need not be 0."""
    values: Array
    """Rows of the feature's table."""

    def take(self, order: npt.NDArray[np.int64]) -> Lists:
        """The lists in another order: row r is this one's order[r]."""
        lengths = np.diff(self.offsets)[order]
        return Lists(*_gather(self.values, self.offsets[:-1][order], lengths))


@dataclass(frozen=True)
class Columns:
    """What the schema needs of R rows."""

    rows: npt.NDArray[np.int64]
    """[R]: numbers of the rows in the whole data set."""
    ids: Array
    """int32 or int64 [P, R]: rows of tables, -1 for none; features as in `single_features`."""
    lists: tuple[Lists, ...]
    """Features as in `list_features`."""
    dense: npt.NDArray[np.float32]
    """[R, N], transformed."""
    labels: npt.NDArray[np.float32]
    """[R, T]; 0 where there is none."""
    valid: npt.NDArray[np.bool_]
    """[R, T]: the row has a label."""
    scenario: npt.NDArray[np.int32]
    """[R], index into `schema.scenarios`."""
    keys: pa.Table | None = None
    """Columns that are passed through as they are, R long."""

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, begin: int, end: int) -> Columns:
        """Rows [begin, end), as views."""
        return Columns(
            self.rows[begin:end],
            self.ids[:, begin:end],
            tuple(Lists(lists.offsets[begin : end + 1], lists.values) for lists in self.lists),
            self.dense[begin:end],
            self.labels[begin:end],
            self.valid[begin:end],
            self.scenario[begin:end],
            None if self.keys is None else self.keys.slice(begin, end - begin),
        )

    def take(self, order: npt.NDArray[np.int64]) -> Columns:
        """A copy in another order: row r is this one's order[r]."""
        ids = np.empty((len(self.ids), len(order)), self.ids.dtype)
        for source, target in zip(self.ids, ids, strict=True):
            # Without mode, take with an output goes through a buffer: several times as slow.
            np.take(source, order, out=target, mode="clip")
        return Columns(
            self.rows[order],
            ids,
            tuple(lists.take(order) for lists in self.lists),
            self.dense.take(order, axis=0),
            self.labels.take(order, axis=0),
            self.valid.take(order, axis=0),
            self.scenario[order],
            None if self.keys is None else self.keys.take(pa.array(order)),
        )


def single_features(schema: Schema) -> tuple[IdFeature, ...]:
    """The id features that have at most one id a row, in the order of the schema."""
    return tuple(feature for feature in schema.id_features if feature.source != "id_list")


def list_features(schema: Schema) -> tuple[IdFeature, ...]:
    return tuple(feature for feature in schema.id_features if feature.source == "id_list")


def column_names(schema: Schema, labels: bool, keys: Sequence[str]) -> list[str]:
    """The Parquet columns that `build_columns` wants, each once."""
    return list(dict.fromkeys([*(column.name for column in schema.columns(labels)), *keys]))


def join(parts: Sequence[Columns]) -> Columns:
    """Several parts, one after the other; at least one."""
    if len(parts) == 1:
        return parts[0]
    lists = []
    for same in zip(*(part.lists for part in parts), strict=True):
        lengths = np.concatenate([np.diff(each.offsets) for each in same])
        values = np.concatenate([each.values[each.offsets[0] : each.offsets[-1]] for each in same])
        lists.append(Lists(_offsets(lengths), values))
    return Columns(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.ids for part in parts], axis=1),
        tuple(lists),
        np.concatenate([part.dense for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.valid for part in parts]),
        np.concatenate([part.scenario for part in parts]),
        None if parts[0].keys is None else pa.concat_tables([part.keys for part in parts]),
    )


def build_columns(
    table: pa.Table,
    schema: Schema,
    *,
    where: str,
    first_row: int,
    labels: bool = True,
    keys: Sequence[str] = (),
) -> Columns:
    """Arrow columns of one row group -> Columns.

    where: file and row group, for messages; first_row: number of its first row in the whole data set. Without
    `labels` their columns are not looked at and no row has one. Raises InputError that names `where`, the row
    in the row group, the column, the value and what is allowed.
    """
    num_rows = table.num_rows
    source = _Source(table, where)
    scenario = _scenario(source, schema)
    singles = single_features(schema)
    ids = np.empty((len(singles), num_rows), _index_type([schema.table_of[each.table] for each in singles]))
    for target, feature in zip(ids, singles, strict=True):
        if feature.source == "scenario":
            target[:] = scenario
        elif feature.source == "bucket":
            _bucket(source, feature, target)
        else:
            _id(source, feature, schema.table_of[feature.table], target)
    dense = np.zeros((num_rows, schema.dense_width), np.float32)
    for number in schema.dense_features:
        (_number if number.source == "number" else _vector)(source, number, dense)
    label = np.zeros((num_rows, len(schema.tasks)), np.float32)
    valid = np.zeros((num_rows, len(schema.tasks)), np.bool_)
    for index, task in enumerate(schema.tasks if labels else ()):
        _label(source, task.label, task.kind == "binary", label[:, index], valid[:, index])
    return Columns(
        np.arange(first_row, first_row + num_rows, dtype=np.int64),
        ids,
        tuple(_lists(source, each, schema.table_of[each.table]) for each in list_features(schema)),
        dense,
        label,
        valid,
        scenario,
        _plain(table.select(list(keys))) if keys else None,
    )


class _Source:
    """The columns of one row group, and how to refuse a value of them."""

    def __init__(self, table: pa.Table, where: str) -> None:
        self._table, self._where = table, where

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, column: str) -> pa.Array:
        chunks = self._table[column]
        if chunks.num_chunks == 1:
            return chunks.chunk(0)
        return chunks.unify_dictionaries().combine_chunks()

    def refuse(self, column: str, row: int, problem: str) -> InputError:
        return InputError(f"{self._where}, row {row}, column {column}: {problem}")

    def floats(self, column: str, array: pa.Array, row_of: npt.NDArray[np.int64] | None = None) -> Array:
        """float32 or float64 copy of `array`, NaN for null; infinite is refused. row_of: element -> row."""
        if array.type != pa.float32():
            array = pc.cast(array, pa.float64(), safe=False)
        if array.null_count:
            array = pc.fill_null(array, float("nan"))
        values: Array = array.to_numpy(zero_copy_only=False)
        if not _sum_is_finite(values) and (infinite := np.isinf(values)).any():
            at = int(np.argmax(infinite))
            row = at if row_of is None else int(row_of[at])
            raise self.refuse(column, row, f"{values[at]} is not a finite number; null or NaN stand for none")
        return values

    def store(self, column: str, values: Array, target: npt.NDArray[np.float32]) -> None:
        """Put numbers into `target`, [R] or [R, width], with 0 for NaN; refuse what float32 cannot hold."""
        with np.errstate(over="ignore"):
            target[:] = values
        if _sum_is_finite(target):
            return
        np.copyto(target, 0, where=np.isnan(target))
        if (infinite := np.isinf(target)).any():
            at = np.unravel_index(int(np.argmax(infinite)), target.shape)
            problem = f"{values[at]} is too large for float32; scale the column"
            raise self.refuse(column, int(at[0]), problem)


def _scenario(source: _Source, schema: Schema) -> npt.NDArray[np.int32]:
    if schema.scenario_column is None:
        return np.zeros(len(source), np.int32)
    array = source[schema.scenario_column]
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    indices = _without_nulls(array.indices, -1)
    names = {name: index for index, name in enumerate(schema.scenarios)}
    values = array.dictionary.to_pylist()
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
    # The last one is for nulls, whose index -1 finds it.
    known = np.array([*(names.get(text, -1) for text in texts), -1], np.int32)
    scenario: npt.NDArray[np.int32] = known[indices]
    if (wrong := scenario < 0).any():
        row = int(np.argmax(wrong))
        value = "null" if indices[row] < 0 else repr(values[indices[row]])
        allowed = ", ".join(schema.scenarios[:_SHOWN_SCENARIOS])
        if len(schema.scenarios) > _SHOWN_SCENARIOS:
            allowed += f", ... ({len(schema.scenarios)} in all)"
        problem = f"{value} is not a scenario; schema.scenario.values allows {allowed}"
        raise source.refuse(schema.scenario_column, row, problem)
    return scenario


def _id(source: _Source, feature: IdFeature, table: Table, target: Array) -> None:
    """One id a row -> its row of `table`, -1 for null."""
    array = source[feature.column]
    try:
        _look_up(array, table, target)
    except IdError as error:
        raise source.refuse(feature.column, error.position, str(error)) from None
    if array.null_count:
        target[~_is_valid(array)] = -1


def _lists(source: _Source, feature: IdFeature, table: Table) -> Lists:
    array = source[feature.column]
    offsets = _offsets(_without_nulls(pc.list_value_length(array), 0))
    ids = array.flatten()  # leaves out what lies under null lists
    if ids.null_count:
        offsets = _offsets(_is_valid(ids))[offsets]
        ids = ids.drop_null()
    if feature.max_length is not None:
        lengths = np.diff(offsets)
        if len(lengths) and lengths.max() > feature.max_length:
            kept = np.minimum(lengths, feature.max_length)
            index = _span_index(offsets[1:] - kept, kept)
            ids, offsets = ids.take(pa.array(index)), _offsets(kept)
    values = np.empty(len(ids), _index_type([table]))
    try:
        _look_up(ids, table, values)
    except IdError as error:
        row = int(np.searchsorted(offsets, error.position, side="right")) - 1
        raise source.refuse(feature.column, row, str(error)) from None
    return Lists(offsets, values)


def _look_up(array: pa.Array, table: Table, target: Array) -> None:
    """Ids -> rows of `table` in `target`; anything where there is a null. Raises IdError."""
    if table.ids == "hash" and not pa.types.is_integer(array.type):
        # Each distinct text is hashed once.
        if not pa.types.is_dictionary(array.type):
            array = array.dictionary_encode()
        if len(array.dictionary):
            rows = rows_of(array.dictionary, table.rows, table.ids).astype(target.dtype)
            np.take(rows, _without_nulls(array.indices, 0), out=target, mode="clip")
        return
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not pa.types.is_integer(array.type):
        rows_of(array.drop_null().slice(0, 1), table.rows, table.ids)  # says why it cannot be
        return
    values = _without_nulls(array, 0)
    for start in range(0, len(values), _BLOCK):
        try:
            target[start : start + _BLOCK] = rows_of(values[start : start + _BLOCK], table.rows, table.ids)
        except IdError as error:
            raise IdError(str(error), start + error.position) from None


def _bucket(source: _Source, feature: IdFeature, target: Array) -> None:
    """Bucket 0 for null and NaN, 1 + the number of boundaries at or below x for a number x."""
    values = source.floats(feature.column, source[feature.column])
    target[:] = np.searchsorted(np.asarray(feature.boundaries), values, side="right")
    target += 1
    target[np.isnan(values)] = 0


def _number(source: _Source, feature: DenseFeature, dense: npt.NDArray[np.float32]) -> None:
    values = source.floats(feature.column, source[feature.column])
    if feature.transform != "none":
        values = values.astype(np.float64)
    if feature.transform == "log1p":
        values = np.copysign(np.log1p(np.abs(values)), values)
    elif feature.transform == "standardise":
        values = (values - feature.mean) / feature.std
    source.store(feature.column, values, dense[:, feature.start])


def _vector(source: _Source, feature: DenseFeature, dense: npt.NDArray[np.float32]) -> None:
    array = source[feature.column]
    present = np.flatnonzero(_is_valid(array))
    lengths = _without_nulls(pc.list_value_length(array), 0)[present]
    if (wrong := lengths != feature.width).any():
        at = int(np.argmax(wrong))
        problem = f"{lengths[at]} numbers; schema.features.{feature.name}.size is {feature.width}"
        raise source.refuse(feature.column, int(present[at]), problem)
    row_of = np.repeat(present, feature.width)
    values = source.floats(feature.column, array.flatten(), row_of).reshape(-1, feature.width)
    if len(present) < len(array):
        values, some = np.zeros((len(array), feature.width), values.dtype), values
        values[present] = some
    source.store(feature.column, values, dense[:, feature.start : feature.start + feature.width])


def _label(
    source: _Source,
    column: str,
    binary: bool,
    target: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
) -> None:
    values = source.floats(column, source[column])
    np.logical_not(np.isnan(values), out=valid)
    if binary and (wrong := valid & (values != 0) & (values != 1)).any():
        row = int(np.argmax(wrong))
        problem = f"{values[row]} is not a label of a binary task; 0, 1 (or false, true) and null are"
        raise source.refuse(column, row, problem)
    source.store(column, values, target)


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


def _sum_is_finite(values: Array) -> bool:
    """A cheap witness that no value is infinite or NaN: the sum is finite only if every value is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum(dtype=np.float64)))


def _without_nulls(array: pa.Array, value: int) -> Array:
    numbers: Array = (pc.fill_null(array, value) if array.null_count else array).to_numpy()
    return numbers


def _is_valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    valid: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _offsets(lengths: Array) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _span_index(starts: Array, lengths: Array) -> npt.NDArray[np.int64]:
    """Indices of all elements of the spans [starts[i], starts[i] + lengths[i]), one span after the other."""
    offsets = _offsets(lengths)
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(len(index))
    return index


def _gather(values: Array, starts: Array, lengths: Array) -> tuple[npt.NDArray[np.int64], Array]:
    return _offsets(lengths), values.take(_span_index(starts, lengths), mode="clip")
