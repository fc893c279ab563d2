"""The numpy arrays that windows and batches are cut from. No torch.

R rows, P id features that have one id a row, K lists, N dense numbers, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
        # As if they were texts: Arrow copies each whole, where numpy would need the place of every id.
        size, values = self.values.itemsize, np.ascontiguousarray(self.values)
        spans = pa.Array.from_buffers(
            pa.large_binary(),
            len(self.offsets) - 1,
            [None, pa.py_buffer(self.offsets * size), pa.py_buffer(values)],
        )
        _, offsets, taken = pc.take(spans, pa.array(order), boundscheck=False).buffers()
        ends = np.frombuffer(offsets, np.int64, len(order) + 1) // size
        return Lists(ends, np.frombuffer(taken, values.dtype, ends[-1]) if ends[-1] else values[:0])


@dataclass(frozen=True)
class Columns:
    """What the schema needs of R rows, in few arrays: to cut, shuffle and join them costs by the array."""

    rows: npt.NDArray[np.int64]
    """[R]: numbers of the rows in the whole data set."""
    ids: Array
    """int32 or int64 [P, R]: rows of tables, -1 for none; features as in `single_features`."""
    words: npt.NDArray[np.int32]
    """[1 + K + N + T, R], or one more with sample weights: the scenario; the lengths of lists; and the bits
    of float32 for dense numbers, labels (NaN where there is none that counts) and weights."""
    lists: tuple[Lists, ...]
    """[K]: features as in `list_features`."""
    num_tasks: int
    weighted: bool
    complete: bool
    """No id of a row is -1."""
    user: npt.NDArray[np.int32] | None = None
    """[R], where negatives are drawn: the number that the sampler knows the row's user by, -1 for none."""
    keys: pa.Table | None = None
    """Columns that are passed through as they are, R long."""
    bad: npt.NDArray[np.bool_] | None = None
    """[R]: the row does not fit the schema: what stands here of it can be computed with, and means nothing.
    None: all rows fit."""

    @classmethod
    def of(
        cls,
        rows: npt.NDArray[np.int64],
        ids: Array,
        lists: Sequence[Lists],
        dense: npt.NDArray[np.float32],
        labels: npt.NDArray[np.float32],
        valid: npt.NDArray[np.bool_],
        scenario: npt.NDArray[np.int32],
        weight: npt.NDArray[np.float32] | None = None,
    ) -> Columns:
        """Of separate arrays: as the fields and properties of their names."""
        num_rows, num_tasks, weighted = len(rows), labels.shape[1], weight is not None
        num_words = 1 + len(lists) + dense.shape[1] + num_tasks + weighted
        words = np.empty((num_words, num_rows), np.int32)
        complete = bool(ids.min(initial=0) >= 0)
        found = cls(rows, ids, words, tuple(lists), num_tasks, weighted, complete)
        words[0] = scenario
        for each, target in zip(lists, words[1:], strict=False):
            np.subtract(each.offsets[1:], each.offsets[:-1], out=target, casting="unsafe")
        numbers = words[1 + len(lists) :].view(np.float32)
        labels_at = dense.shape[1]
        numbers[:labels_at] = dense.T
        numbers[labels_at : labels_at + num_tasks] = labels.T
        np.copyto(numbers[labels_at : labels_at + num_tasks], np.float32(np.nan), where=~valid.T)
        if weight is not None:
            numbers[-1] = weight
        return found

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scenario(self) -> npt.NDArray[np.int32]:
        """[R], index into `schema.scenarios`."""
        return self.words[0]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[K, R], of the lists."""
        return self.words[1 : 1 + len(self.lists)]

    @property
    def numbers(self) -> npt.NDArray[np.float32]:
        """[N + T, R], or one more: dense numbers, labels, weights."""
        return self.words[1 + len(self.lists) :].view(np.float32)

    @property
    def num_dense(self) -> int:
        return len(self.words) - 1 - len(self.lists) - self.num_tasks - self.weighted

    @property
    def dense(self) -> npt.NDArray[np.float32]:
        """[R, N], transformed."""
        return self.numbers[: self.num_dense].T

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[R, T]: the row has a label that counts (`given`)."""
        return ~np.isnan(self.targets).T

    @property
    def labels(self) -> npt.NDArray[np.float32]:
        """[R, T]; 0 where there is none."""
        found = self.targets.T.copy()
        found[np.isnan(found)] = 0
        return found

    @property
    def targets(self) -> npt.NDArray[np.float32]:
        """[T, R]: labels, NaN where there is none that counts."""
        return self.numbers[self.num_dense : self.num_dense + self.num_tasks]

    @property
    def weight(self) -> npt.NDArray[np.float32] | None:
        """[R], sample weights; None: all rows count 1."""
        return self.numbers[-1] if self.weighted else None

    def good(self) -> Columns:
        """Without the rows that do not fit."""
        if self.bad is None or not self.bad.any():
            return self
        return replace(self.take(np.flatnonzero(~self.bad)), bad=None)

    def without_labels(self) -> Columns:
        """Of no task."""
        after = len(self.words) - self.weighted
        words = np.delete(self.words, range(after - self.num_tasks, after), axis=0)
        return replace(self, words=words, num_tasks=0)

    def slice(self, begin: int, end: int) -> Columns:
        """Rows [begin, end), as views."""
        return replace(
            self,
            rows=self.rows[begin:end],
            ids=self.ids[:, begin:end],
            words=self.words[:, begin:end],
            lists=tuple(Lists(lists.offsets[begin : end + 1], lists.values) for lists in self.lists),
            user=None if self.user is None else self.user[begin:end],
            keys=None if self.keys is None else self.keys.slice(begin, end - begin),
            bad=None if self.bad is None else self.bad[begin:end],
        )

    def take(self, order: npt.NDArray[np.int64]) -> Columns:
        """A copy in another order: row r is this one's order[r]."""
        return replace(
            self,
            rows=self.rows.take(order, mode="clip"),
            ids=self.ids.take(order, axis=1, mode="clip"),
            words=self.words.take(order, axis=1, mode="clip"),
            lists=tuple(lists.take(order) for lists in self.lists),
            user=None if self.user is None else self.user[order],
            keys=None if self.keys is None else self.keys.take(pa.array(order)),
            bad=None if self.bad is None else self.bad[order],
        )


class Cut(NamedTuple):
    """Rows [begin, end) of some columns."""

    columns: Columns
    begin: int
    end: int

    def ids(self, features: slice) -> Array:
        """Of some of the features with one id a row, [features, end - begin]."""
        return self.columns.ids[features, self.begin : self.end]

    def values(self, number: int) -> Array:
        """All ids of a list feature."""
        lists = self.columns.lists[number]
        return lists.values[lists.offsets.item(self.begin) : lists.offsets.item(self.end)]

    def of_step(self, number: int, steps: int) -> Cut:
        """Of rows that are so many steps', one after the other, those of step `number`."""
        size = (self.end - self.begin) // steps
        return Cut(self.columns, self.begin + number * size, self.begin + (number + 1) * size)

    def values_of_steps(self, number: int, steps: int) -> list[Array]:
        """All ids of a list feature, by step."""
        if steps == 1:
            return [self.values(number)]
        lists, size = self.columns.lists[number], (self.end - self.begin) // steps
        ends = lists.offsets[self.begin : self.end + 1 : size].tolist()
        return [lists.values[begin:end] for begin, end in pairwise(ends)]


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
    return join_cuts([Cut(part, 0, len(part)) for part in parts])


def join_cuts(cuts: Sequence[Cut]) -> Columns:
    """Several parts, one after the other; at least one."""
    if len(cuts) == 1:
        return cuts[0].columns.slice(cuts[0].begin, cuts[0].end)
    rest = join_but_ids(cuts)
    return replace(
        rest,
        ids=np.concatenate([cut.ids(slice(None)) for cut in cuts], axis=1),
        lists=tuple(
            Lists(offsets_of(lengths), np.concatenate([cut.values(number) for cut in cuts]))
            for number, lengths in enumerate(rest.lengths)
        ),
    )


def join_but_ids(cuts: Sequence[Cut], steps: int = 1) -> Columns:
    """`join_cuts` with nothing in `ids` and `lists`, for who puts those elsewhere.

    Of several steps: in the order of `interleave`, and without `user`, `keys` and `bad`.
    """
    first = cuts[0].columns
    return Columns(
        interleave([columns.rows[begin:end] for columns, begin, end in cuts], steps),
        first.ids[:, :0],
        interleave([columns.words[:, begin:end] for columns, begin, end in cuts], steps),
        tuple(Lists(each.offsets[:1], each.values[:0]) for each in first.lists),
        first.num_tasks,
        first.weighted,
        all(cut.columns.complete for cut in cuts),
        *((_join_user(cuts), _join_keys(cuts), _join_bad(cuts)) if steps == 1 else ()),
    )


def interleave(parts: Sequence[Array], steps: int) -> Array:
    """Parts [..., rows of so many steps, as many of each] -> the first step's rows of each part, the second's
    of each, and so on; [..., rows].
    """
    lead = parts[0].shape[:-1]
    by_step = [part.reshape(*lead, steps, part.shape[-1] // steps) for part in parts]
    return np.concatenate(by_step, axis=-1).reshape(*lead, -1)


def shuffle_cuts(cuts: Sequence[Cut], order: npt.NDArray[np.int64]) -> Columns:
    """`join_cuts(cuts).take(order)`: feature by feature, so that what is put in order is in the cache."""
    first = cuts[0].columns
    words = _shuffle([columns.words[:, begin:end] for columns, begin, end in cuts], order)
    lists = []
    for number in range(len(first.lists)):
        lengths = np.concatenate([columns.lengths[number, begin:end] for columns, begin, end in cuts])
        values = np.concatenate([cut.values(number) for cut in cuts])
        lists.append(Lists(offsets_of(lengths), values).take(order))
    user, keys, bad = _join_user(cuts), _join_keys(cuts), _join_bad(cuts)
    return Columns(
        np.concatenate([columns.rows[begin:end] for columns, begin, end in cuts]).take(order, mode="clip"),
        _shuffle([cut.ids(slice(None)) for cut in cuts], order),
        words,
        tuple(lists),
        first.num_tasks,
        first.weighted,
        all(cut.columns.complete for cut in cuts),
        None if user is None else user[order],
        None if keys is None else keys.take(pa.array(order)),
        None if bad is None else bad[order],
    )


def _shuffle(parts: Sequence[Array], order: npt.NDArray[np.int64]) -> Array:
    """The parts, [n, ...], side by side, [n, R], and every row of that in another order."""
    found = np.empty((len(parts[0]), len(order)), parts[0].dtype)
    scratch = np.empty(len(order), parts[0].dtype)
    for number, target in enumerate(found):
        np.concatenate([part[number] for part in parts], out=scratch)
        np.take(scratch, order, out=target, mode="clip")
    return found


def _join_user(cuts: Sequence[Cut]) -> npt.NDArray[np.int32] | None:
    parts = [columns.user[begin:end] for columns, begin, end in cuts if columns.user is not None]
    return np.concatenate(parts) if parts else None


def _join_keys(cuts: Sequence[Cut]) -> pa.Table | None:
    known = [(columns.keys, begin, end) for columns, begin, end in cuts if columns.keys is not None]
    tables = [keys.slice(begin, end - begin) for keys, begin, end in known]
    if not tables:
        return None
    # Where a row group could not be read, nulls stand in a column that is elsewhere of the file's type.
    return pa.concat_tables(tables, promote_options="permissive")


def _join_bad(cuts: Sequence[Cut]) -> npt.NDArray[np.bool_] | None:
    if all(columns.bad is None for columns, _, _ in cuts):
        return None
    return np.concatenate(
        [
            np.zeros(end - begin, np.bool_) if columns.bad is None else columns.bad[begin:end]
            for columns, begin, end in cuts
        ]
    )


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
