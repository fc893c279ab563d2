"""Arrow columns of one row group -> numpy arrays that windows and batches are cut from. No torch.

R rows, P id features that have one id a row, N dense numbers, T tasks. docs/data.md has the rules for nulls
and for values that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec.data.ids import IdError, hash_ids, rows_of
from mtlrec.data.labels import read_labels, read_weight
from mtlrec.data.source import Array, Source, is_valid, without_nulls
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.schema import DenseFeature, IdFeature, Schema, Table

_Rows = Callable[[pa.Array | Array], npt.NDArray[np.int64]]
"""Ids without nulls -> rows of their table. Raises IdError."""
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
    """[R, T]: the row has a label that counts (`given`)."""
    scenario: npt.NDArray[np.int32]
    """[R], index into `schema.scenarios`."""
    weight: npt.NDArray[np.float32] | None = None
    """[R], sample weights; None: all rows count 1."""
    user: npt.NDArray[np.int32] | None = None
    """[R], where negatives are drawn: the number that the sampler knows the row's user by, -1 for none."""
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
            None if self.weight is None else self.weight[begin:end],
            None if self.user is None else self.user[begin:end],
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
            None if self.weight is None else self.weight[order],
            None if self.user is None else self.user[order],
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
        lists.append(Lists(offsets_of(lengths), values))
    return Columns(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.ids for part in parts], axis=1),
        tuple(lists),
        np.concatenate([part.dense for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.valid for part in parts]),
        np.concatenate([part.scenario for part in parts]),
        _join([part.weight for part in parts]),
        _join([part.user for part in parts]),
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
    vocabularies: Mapping[str, Vocabulary] = MappingProxyType({}),
) -> Columns:
    """Arrow columns of one row group -> Columns.

    where: file and row group, for messages; first_row: number of its first row in the whole data set. Without
    `labels` neither they nor sample weights are looked at, and no row has one. vocabularies: by name of the
    table. Raises InputError that names `where`, the row in the row group, the column, the value and what is
    allowed.
    """
    num_rows = table.num_rows
    source = Source(table, where)
    scenario = _scenario(source, schema)

    def rows_in(feature: IdFeature) -> _Rows:
        return _rows_in(schema.table_of[feature.table], vocabularies)

    singles = single_features(schema)
    ids = np.empty((len(singles), num_rows), _index_type([schema.table_of[each.table] for each in singles]))
    for target, feature in zip(ids, singles, strict=True):
        if feature.source == "scenario":
            target[:] = scenario
        elif feature.source == "bucket":
            _bucket(source, feature, target)
        else:
            _id(source, feature, rows_in(feature), target)
    dense = np.zeros((num_rows, schema.dense_width), np.float32)
    for number in schema.dense_features:
        (_number if number.source == "number" else _vector)(source, number, dense)
    if labels:
        label, valid = read_labels(source, schema.tasks)
    else:
        label = np.zeros((num_rows, len(schema.tasks)), np.float32)
        valid = np.zeros(label.shape, np.bool_)
    weighted = schema.weight_column if labels else None
    return Columns(
        np.arange(first_row, first_row + num_rows, dtype=np.int64),
        ids,
        tuple(
            _lists(source, each, rows_in(each), _index_type([schema.table_of[each.table]]))
            for each in list_features(schema)
        ),
        dense,
        label,
        valid,
        scenario,
        weight=None if weighted is None else read_weight(source, weighted),
        keys=_plain(table.select(list(keys))) if keys else None,
    )


def _scenario(source: Source, schema: Schema) -> npt.NDArray[np.int32]:
    if schema.scenario_column is None:
        return np.zeros(len(source), np.int32)
    array = source[schema.scenario_column]
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    indices = without_nulls(array.indices, -1)
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


def _rows_in(table: Table, vocabularies: Mapping[str, Vocabulary]) -> _Rows:
    if table.ids == "vocabulary":
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


def _id(source: Source, feature: IdFeature, rows: _Rows, target: Array) -> None:
    """One id a row -> its row of a table, -1 for null."""
    array = source[feature.column]
    try:
        _look_up(array, rows, target)
    except IdError as error:
        raise source.refuse(feature.column, error.position, str(error)) from None
    if array.null_count:
        target[~is_valid(array)] = -1


def _lists(source: Source, feature: IdFeature, rows: _Rows, index_type: type[np.signedinteger[Any]]) -> Lists:
    array = source[feature.column]
    offsets = offsets_of(without_nulls(pc.list_value_length(array), 0))
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
    values = np.empty(len(ids), index_type)
    try:
        _look_up(ids, rows, values)
    except IdError as error:
        row = int(np.searchsorted(offsets, error.position, side="right")) - 1
        raise source.refuse(feature.column, row, str(error)) from None
    return Lists(offsets, values)


def _look_up(array: pa.Array, rows: _Rows, target: Array) -> None:
    """Ids -> their rows in `target`; anything where there is a null. Raises IdError."""
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


def _join(parts: Sequence[Array | None]) -> Array | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def offsets_of(lengths: Array) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def span_index(starts: Array, lengths: Array) -> npt.NDArray[np.int64]:
    """Indices of all elements of the spans [starts[i], starts[i] + lengths[i]), one span after the other."""
    offsets = offsets_of(lengths)
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(len(index))
    return index


def _gather(values: Array, starts: Array, lengths: Array) -> tuple[npt.NDArray[np.int64], Array]:
    return offsets_of(lengths), values.take(span_index(starts, lengths), mode="clip")
