"""Vocabularies: every id of a table with a row of its own; and counting ids, to build one. docs/vocabulary.md

N ids, U reserved rows: rows [0, U) are for unknown ids, rows [U, U + N) for the ids in the order of their
64-bit hashes. The order is that of chance, so that frequent ids lie spread over a table that is cut by rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtlrec import storage
from mtlrec.data.ids import hash_ids, to_rows

Kind = Literal["int64", "uint64", "string", "binary"]
"""What raw ids are. uint64 where an id is 2^63 or more, binary where one is no text."""
Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

TYPES: Mapping[Kind, pa.DataType] = {
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "string": pa.large_string(),
    "binary": pa.large_binary(),
}
_INTEGERS = ("int64", "uint64")
_KINDS = (_INTEGERS, ("string", "binary"))
"""Kinds that may be counted together; the later one is what they become."""
_BLOCK = 16384
"""Ids looked up at a time: what lies between stays in the cache."""
_MOST_STEPS = 16
"""Hashes are spread evenly, so that a bucket holds two or so; those that are not are searched by halves."""
_ABOUT = b"mtlrec.vocabulary"
_GROUP_ROWS = 2**20
_GREATEST = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids that have rows of their own.

    A hash stands for its id: two ids of one hash share a row, and the smaller one is what is kept of them.
    """

    hashes: Hashes
    """[N], increasing; `mtlrec.data.ids.hash_ids` of the ids."""
    ids: pa.Array
    """[N] raw ids in the same order, of one of `TYPES`."""
    counts: Numbers
    """[N]: how often the data has each."""
    reserved: int
    """U, at least 1."""

    def __post_init__(self) -> None:
        assert self.reserved >= 1 and len(self.hashes) == len(self.ids) == len(self.counts)

    def __len__(self) -> int:
        """N."""
        return len(self.hashes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (
            self.reserved == other.reserved
            and np.array_equal(self.hashes, other.hashes)
            and np.array_equal(self.counts, other.counts)
            and self.ids.type == other.ids.type
            and bool(self.ids.equals(other.ids))
        )

    @property
    def rows(self) -> int:
        """Rows of the table: U + N."""
        return self.reserved + len(self)

    @property
    def kind(self) -> Kind:
        return next(kind for kind, held in TYPES.items() if held == self.ids.type)

    @cached_property
    def _buckets(self) -> tuple[np.uint64, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
        """Where the hashes begin whose first bits are 0, 1, 2, ...; and how many bits are not the first."""
        bits = max(len(self).bit_length() - 1, 1)
        shift = np.uint64(64 - bits)
        held = np.bincount((self.hashes >> shift).view(np.int64), minlength=2**bits)
        starts = np.zeros(2**bits, np.int32 if len(self) < 2**31 else np.int64)
        np.cumsum(held[:-1], out=starts[1:])
        return shift, starts

    def look_up(self, hashes: Hashes) -> Numbers:
        """Hashes of ids -> rows, int64 [n] for [n]: U + the id's place, or hash % U where it is unknown."""
        rows = to_rows(hashes, self.reserved)
        if not len(self):
            return rows
        shift, starts = self._buckets
        last = len(self) - 1
        for begin in range(0, len(hashes), _BLOCK):
            wanted = hashes[begin : begin + _BLOCK]
            # From the start of its bucket on, each goes up until nothing smaller is left.
            place = np.minimum(starts[(wanted >> shift).view(np.int64)], last).astype(np.int64)
            held = self.hashes[place]
            behind = np.flatnonzero(held < wanted)
            for _ in range(_MOST_STEPS):
                behind = behind[place[behind] < last]
                if not len(behind):
                    break
                place[behind] += 1
                held[behind] = self.hashes[place[behind]]
                behind = behind[held[behind] < wanted[behind]]
            else:
                place[behind] = np.minimum(np.searchsorted(self.hashes, wanted[behind]), last)
                held[behind] = self.hashes[place[behind]]
            np.add(place, self.reserved, out=rows[begin : begin + _BLOCK], where=held == wanted)
        return rows

    def raw_ids(self) -> pa.Array:
        """The raw id of each row of the table, [U + N]; null for the reserved rows."""
        return pa.concat_arrays([pa.nulls(self.reserved, self.ids.type), self.ids])

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As plain arrays: `hashes` and `counts`, int64 [N], and `ids`: integers as int64 [N], other ids as
        the uint8 of all, one after the other, with `offsets`, int64 [N + 1]. Bit patterns where unsigned.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"hashes": self.hashes.view(np.int64), "counts": self.counts}
        if self.kind in _INTEGERS:
            return {**arrays, "ids": self.ids.view(pa.int64()).to_numpy()}
        _, offsets, data = self.ids.buffers()
        bounds = np.frombuffer(offsets, np.int64)[self.ids.offset : self.ids.offset + len(self) + 1]
        raw = np.frombuffer(data if data is not None else b"", np.uint8)[bounds[0] : bounds[-1]]
        return {**arrays, "ids": raw, "offsets": bounds - bounds[0]}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], kind: Kind, reserved: int) -> Vocabulary:
        """The opposite of `to_arrays`, over the same memory. ValueError where the arrays contradict this."""
        hashes, counts, ids = arrays["hashes"].view(np.uint64), arrays["counts"], arrays["ids"]
        if len(hashes) > 1 and not (hashes[1:] > hashes[:-1]).all():
            raise ValueError("its hashes do not increase")
        if len(counts) and counts.min() < 1:
            raise ValueError("it counts an id less than once")
        if kind in _INTEGERS:
            return Vocabulary(hashes, pa.array(ids).view(TYPES[kind]), counts, reserved)
        offsets = arrays["offsets"]
        if offsets[0] != 0 or offsets[-1] != len(ids) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError("its offsets do not cut its ids")
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(ids)]
        array = pa.Array.from_buffers(TYPES[kind], len(hashes), buffers)
        try:
            array.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"its ids are no {kind}: {error}") from None
        return Vocabulary(hashes, array, counts, reserved)


# Counting


@dataclass(frozen=True)
class Counts:
    """How often some data has each id."""

    kind: Kind
    hashes: Hashes
    """[n], increasing."""
    ids: pa.Array
    """[n]: int64 bit patterns of integers; large_binary of anything else."""
    counts: Numbers
    """[n]."""

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def num_bytes(self) -> int:
        return self.hashes.nbytes + self.counts.nbytes + int(self.ids.nbytes)

    def slice(self, begin: int, end: int) -> Counts:
        """Entries [begin, end), as views."""
        return Counts(
            self.kind, self.hashes[begin:end], self.ids.slice(begin, end - begin), self.counts[begin:end]
        )

    def take(self, chosen: npt.NDArray[Any]) -> Counts:
        """The entries that a mask [n] or increasing places name."""
        ids = self.ids.filter(pa.array(chosen)) if chosen.dtype == np.bool_ else self.ids.take(chosen)
        return Counts(self.kind, self.hashes[chosen], ids, self.counts[chosen])

    def most_frequent(self, most: int) -> Counts:
        """At most `most` entries: the greatest counts and, of equal ones, the smallest hashes."""
        if len(self) <= most:
            return self
        least = np.partition(self.counts, len(self) - most)[len(self) - most]
        chosen = self.counts > least
        chosen[np.flatnonzero(self.counts == least)[: most - int(chosen.sum())]] = True
        return self.take(chosen)

    def to_vocabulary(self, reserved: int) -> Vocabulary:
        """A row for every id here, behind `reserved` rows for the unknown."""
        ids = self.ids.view(TYPES[self.kind])
        try:
            ids.validate(full=True)  # what calls itself text in a file need not be
        except pa.ArrowInvalid:
            ids = self.ids
        return Vocabulary(self.hashes, ids, self.counts, reserved)

    def to_bytes(self) -> bytes:
        """For `from_bytes`: a compressed Arrow stream."""
        arrays = [pa.array(self.hashes), self.ids, pa.array(self.counts)]
        batch = pa.record_batch(arrays, names=["hash", "id", "count"]).replace_schema_metadata(
            {_ABOUT: self.kind.encode()}
        )
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    @staticmethod
    def from_bytes(data: bytes) -> Counts:
        with pa.ipc.open_stream(data) as reader:
            kind = reader.schema.metadata[_ABOUT].decode()
            batch = reader.read_next_batch()
        assert kind in get_args(Kind)
        return Counts(kind, batch["hash"].to_numpy(), batch["id"], batch["count"].to_numpy())


def count(columns: Iterable[pa.ChunkedArray]) -> Counts:
    """Count the ids of some columns of one row group, in lists too. Nulls are none.

    Raises ValueError where one column has integers and another has not.
    """
    return merge(
        [_count(chunk) for column in columns for chunk in (column.chunks or [pa.array([], column.type)])]
    )


def join(parts: Sequence[Counts]) -> Counts:
    """One after the other, at least one: of ranges of hashes that follow each other."""
    return Counts(
        common_kind({part.kind for part in parts}),
        np.concatenate([part.hashes for part in parts]),
        pa.concat_arrays([part.ids for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )


def merge(parts: Sequence[Counts]) -> Counts:
    """Add up counts, at least one. Neither their order nor how they were cut matters to what comes out."""
    if len(parts) == 1:
        return parts[0]
    joined = join(parts)
    order = np.argsort(joined.hashes, kind="stable")  # which finds that the parts are sorted already
    hashes, ids = joined.hashes[order], joined.ids
    repeated = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    first = np.delete(np.arange(len(hashes)), repeated)
    chosen = order[first]
    if joined.kind not in _INTEGERS and len(repeated):  # the hash of integers is a bijection
        differ = pc.not_equal(ids.take(order[repeated]), ids.take(order[repeated - 1])).to_numpy(False)
        for group in np.unique(np.searchsorted(first, repeated[differ], side="right") - 1):
            end = first[group + 1] if group + 1 < len(first) else len(order)
            chosen[group] = min(order[first[group] : end], key=lambda place: ids[place].as_py())
    counts = joined.counts[order]
    return Counts(
        joined.kind,
        hashes[first],
        ids.take(chosen),
        np.add.reduceat(counts, first) if len(first) else counts,
    )


def common_kind(kinds: Collection[Kind]) -> Kind:
    """What ids of these kinds are together; ValueError where some are integers and others are not."""
    for family in _KINDS:
        if set(kinds) <= set(family):
            return max(kinds, key=family.index)
    raise ValueError("some ids are integers and others are not")


def _count(array: pa.Array) -> Counts:
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()  # leaves out what lies under null lists
    kind = _kind_of(array.type)
    if pa.types.is_dictionary(array.type):
        values, counts = _used(array.drop_null())
    elif kind in _INTEGERS:
        distinct, counts = np.unique(array.drop_null().to_numpy(), return_counts=True)
        values = pa.array(distinct)
    else:
        values, counts = _used(pc.cast(array, pa.large_binary()).drop_null().dictionary_encode())
    if kind in _INTEGERS:
        numbers = values.to_numpy()
        kind = "uint64" if len(numbers) and numbers.max() > _GREATEST else "int64"
        values = pa.array(numbers.astype(np.int64))  # 2^63 and more become negative, as in the hash
    else:
        values = pc.cast(values, pa.large_binary())
    hashes = hash_ids(values)
    order = np.argsort(hashes)
    found = Counts(kind, hashes[order], values.take(order), counts[order].astype(np.int64))
    if len(found) > 1 and (found.hashes[1:] == found.hashes[:-1]).any():
        # A dictionary may hold a value twice, and two texts may have one hash.
        return merge([found, found.slice(0, 0)])
    return found


def _used(array: pa.DictionaryArray) -> tuple[pa.Array, Numbers]:
    """The values that an array without nulls has, and how often it has each."""
    counts = np.bincount(array.indices.to_numpy(), minlength=len(array.dictionary))
    used = np.flatnonzero(counts)
    return array.dictionary.take(used), counts[used]


def _kind_of(held: pa.DataType) -> Kind:
    if pa.types.is_dictionary(held):
        return _kind_of(held.value_type)
    if pa.types.is_integer(held):
        return "int64"
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return "string" if any(is_text(held) for is_text in texts) else "binary"


# Files


def write(url: str, vocabulary: Vocabulary, about: Mapping[str, Any]) -> None:
    """Write a Parquet file with the columns hash, id, count; `about` (JSON data) is kept with it.

    The same vocabulary and `about` are the same bytes. Row r of the file is row `reserved` + r of the table.
    """
    metadata = {_ABOUT: json.dumps({**about, "reserved": vocabulary.reserved}, sort_keys=True)}
    fields = [("hash", pa.uint64()), ("id", vocabulary.ids.type), ("count", pa.int64())]
    schema = pa.schema([pa.field(*field, nullable=False) for field in fields], metadata)
    arrays = [pa.array(vocabulary.hashes), vocabulary.ids, pa.array(vocabulary.counts)]
    with storage.write_stream(url) as stream:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=schema),
            stream,
            row_group_size=_GROUP_ROWS,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def read(url: str) -> tuple[Vocabulary, dict[str, Any]]:
    """The vocabulary in a file, and what it is about; `reserved` is in it.

    FileNotFoundError where there is no file; ValueError where it is damaged, or no file of a vocabulary.
    """
    data = storage.read(url)
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        about = json.loads(table.schema.metadata[_ABOUT])
        hashes, ids, counts = (table[name].combine_chunks() for name in ("hash", "id", "count"))
        return Vocabulary(hashes.to_numpy(), ids, counts.to_numpy(), about["reserved"]), about
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{url}: not a whole vocabulary: {error}") from None
