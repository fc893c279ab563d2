"""The numpy arrays that windows and batches are cut from. No torch.

R rows, P id features that have one id a row, N dense numbers, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mtlrec.data.source import Array
from mtlrec.schema import IdFeature, Schema


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
    bad: npt.NDArray[np.bool_] | None = None
    """[R]: the row does not fit the schema: what stands here of it can be computed with, and means nothing.
    None: all rows fit."""

    def __len__(self) -> int:
        return len(self.rows)

    def good(self) -> Columns:
        """Without the rows that do not fit."""
        if self.bad is None or not self.bad.any():
            return self
        return replace(self.take(np.flatnonzero(~self.bad)), bad=None)

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
            None if self.bad is None else self.bad[begin:end],
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
            None if self.bad is None else self.bad[order],
        )


def single_features(schema: Schema) -> tuple[IdFeature, ...]:
    """The id features that have at most one id a row, in the order of the schema."""
    return tuple(feature for feature in schema.id_features if feature.source != "id_list")


def list_features(schema: Schema) -> tuple[IdFeature, ...]:
    return tuple(feature for feature in schema.id_features if feature.source == "id_list")


def column_names(schema: Schema, labels: bool, keys: Sequence[str]) -> list[str]:
    """The Parquet columns that `decode.build_columns` wants, each once."""
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
        None if parts[0].keys is None else join_keys([part.keys for part in parts]),
        join_bad(parts),
    )


def join_keys(tables: Sequence[pa.Table | None]) -> pa.Table:
    """Tables of keys, one after the other; at least one, none None."""
    # Where a row group could not be read, nulls stand in a column that is elsewhere of the file's type.
    return pa.concat_tables(tables, promote_options="permissive")


def _join(parts: Sequence[Array | None]) -> Array | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def join_bad(parts: Sequence[Columns]) -> npt.NDArray[np.bool_] | None:
    """Which rows of the parts, one after the other, do not fit; None where all do."""
    if all(part.bad is None for part in parts):
        return None
    return np.concatenate([np.zeros(len(part), np.bool_) if part.bad is None else part.bad for part in parts])


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
