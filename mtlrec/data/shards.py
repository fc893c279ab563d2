"""The Parquet shards of a data set: what is there, whether it fits the schema, and reading one row group.

G row groups that hold rows, in the order of their shard's relative path and their place in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtlrec import storage
from mtlrec.data import column_types
from mtlrec.job.errors import InputError
from mtlrec.schema import Column

_TAIL_BYTES = 64 * 2**10
"""First read of a shard: holds most footers whole."""
_THREADS = 16
_GAP_BYTES = 2**20
"""Column chunks of one row group that lie closer than this are fetched in one request."""
_OPEN_FOOTERS = 64
"""Footers kept parsed: more shards than that are seldom read side by side."""


class Unreadable(InputError):
    """The bytes of a file's footer, or of a row group, are not what a writer of Parquet has left there.

    Raised for what will be the same whoever reads it and however often, never for a fault of the storage.
    """

    def __init__(self, url: str, problem: str, digest: str = "") -> None:
        super().__init__(f"{url}: {problem}")
        self.problem = " ".join(problem.split())
        """Without the file."""
        self.digest = digest
        """Of the bytes where the footer should be."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    """Relative to the data set's folder."""
    url: str
    size: int
    """Bytes."""
    groups: tuple[int, ...]
    """Rows of each row group."""
    digest: str
    """Of the footer: it has the schema and, of every column chunk, the place, size and statistics."""
    problem: str = ""
    """Why its footer cannot be read, and the file was left out; "" where it can."""
    version: str = ""
    """As `storage.File.version`; not part of what the data set is."""

    @property
    def rows(self) -> int:
        return sum(self.groups)


@dataclass(frozen=True)
class _Wanted:
    """Some columns of one file."""

    leaves: list[int]
    """Numbers of their leaf columns."""
    text: list[str]
    """Paths of the leaves that are read as dictionaries."""
    dictionaries: list[str]
    """The columns that have those."""


@dataclass
class _Footer:
    """Of one file, parsed, and what was asked of it: most reads are of the same columns as the one before."""

    metadata: pq.FileMetaData
    wanted: dict[tuple[str, ...], _Wanted] = field(default_factory=dict)


@dataclass
class Dataset:
    """Shards with their row groups numbered through. Reading is safe from several threads."""

    url: str
    shards: tuple[Shard, ...]
    group_shard: npt.NDArray[np.int64]
    """[G] Number of its shard."""
    group_index: npt.NDArray[np.int64]
    """[G] Its number in that shard."""
    group_rows: npt.NDArray[np.int64]
    """[G] Its rows, at least one."""
    group_start: npt.NDArray[np.int64]
    """[G] Number of its first row in the whole data set."""
    rows: int
    fingerprint: str
    """Of names below the folder, sizes and footers: a copy elsewhere has the same."""
    types: dict[str, str]
    """Arrow type of each column that was asked for, as the first shard has it."""
    id_kinds: dict[str, str]
    """Of each column of ids that was asked for: "integers", or "strings or binary"."""
    list_lengths: dict[str, float]
    """Of each column of lists of ids that was asked for: their mean length, by the first shard that
    has rows. A list that is empty or missing counts one."""
    _footers: OrderedDict[int, _Footer] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(
        cls,
        url: str,
        columns: Sequence[Column],
        skip_unreadable: bool = False,
        only: Collection[str] | None = None,
    ) -> Dataset:
        """List the shards in a folder (or take one file), read their footers, check the columns' types.

        Every file counts but those under a name that begins with _ or a dot. Raises InputError, in one line,
        for a missing or empty folder, no rows, a file that is not Parquet (with `skip_unreadable` it becomes
        a shard without rows that says its `problem`), and, naming file and column, a column that is missing
        or of a type that it may not have. only: relative paths of the shards that count; null: all.
        """
        url = storage.make_absolute(url, ".")
        files = list_shards(url)
        if only is not None:
            chosen = frozenset(only)
            files = [file for file in files if file.path in chosen]
        if not files:
            found = storage.exists(url)
            raise InputError(
                f"{url}: "
                + ("no Parquet files here" if found else "no such folder or file")
                + "; data is a folder of Parquet shards (names that begin with _ or . are passed over)"
            )
        with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
            footers = list(pool.map(_try_footer if skip_unreadable else _read_footer, files))
        read = [
            (file, found[0])
            for file, found in zip(files, footers, strict=True)
            if not isinstance(found, Unreadable)
        ]
        if not read:
            raise next(found for found in footers if isinstance(found, Unreadable))
        (begin, first), *others = read
        schema = column_types.arrow_schema(first, begin.url)
        column_types.check(schema, begin.url, columns)
        for file, footer in others:
            if not footer.schema.equals(first.schema):
                other = column_types.arrow_schema(footer, file.url)
                column_types.check(other, file.url, columns)
                column_types.check_alike(schema, begin.url, other, file.url, columns)
        shards = tuple(_shard(file, found) for file, found in zip(files, footers, strict=True))
        places = [
            (number, group, rows)
            for number, shard in enumerate(shards)
            for group, rows in enumerate(shard.groups)
            if rows
        ]
        if not places:
            raise InputError(f"{url}: the shards hold no rows ({len(shards)} files)")
        group_shard, group_index, group_rows = np.array(places, dtype=np.int64).T.copy()
        ends = np.cumsum(group_rows)
        return cls(
            url,
            shards,
            group_shard,
            group_index,
            group_rows,
            ends - group_rows,
            int(ends[-1]),
            _fingerprint(shards),
            {column.name: str(schema.field(column.name).type) for column in columns},
            column_types.id_kinds(schema, columns),
            column_types.list_lengths([footer for _, footer in read], schema, columns),
        )

    def where(self, group: int) -> str:
        """File and row group, for messages."""
        return f"{self.shards[self.group_shard[group]].url}, row group {self.group_index[group]}"

    @property
    def contents(self) -> str:
        """Tells apart what `read_group` gives of the same shards, for what is built from it and kept."""
        return self.fingerprint

    def index(self) -> dict[str, Any]:
        """Plain JSON data, kept with a run, that `describe_change` explains a later difference by."""
        return {
            "url": self.url,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "shards": [
                {"path": shard.path, "size": shard.size, "rows": shard.rows, "digest": shard.digest}
                for shard in self.shards
            ],
        }

    def describe_change(self, index: dict[str, Any]) -> str:
        """What is different now from an earlier `index()`, in one line; "" where nothing is."""
        before = {shard["path"]: shard for shard in index["shards"]}
        now = {shard.path: shard for shard in self.shards}
        both = [path for path in now if path in before]
        changed = [
            path
            for path in both
            if (now[path].size, now[path].digest) != (before[path]["size"], before[path]["digest"])
        ]
        parts = [
            _names("added", [path for path in now if path not in before]),
            _names("removed", [path for path in before if path not in now]),
            _names("changed", changed),
        ]
        if not any(parts):
            return ""
        rows = f"{index['rows']:,} rows before, {self.rows:,} now"
        return f"{'; '.join(part for part in parts if part)} ({rows})"

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Row group `group` (0 <= group < G) with just these columns, strings as dictionaries.

        Opens, reads and closes the file, on the calling thread. Raises Unreadable naming file and row group
        where it is corrupt, InputError where the file has changed or is gone, and naming the column where it
        has none of that name.
        """
        try:
            return self._read_group(group, columns)
        except Unreadable:
            # What a bad line or bad memory has spoilt is whole the second time.
            return self._read_group(group, columns)

    def _read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        number, index = int(self.group_shard[group]), int(self.group_index[group])
        shard = self.shards[number]
        try:
            footer, wanted = self._wanted(number, columns)
            ranges = [] if storage.local_path(shard.url) else _ranges(footer.row_group(index), wanted.leaves)
            with (
                storage.open_parquet_input(shard.url, ranges, shard.size, shard.version) as source,
                pq.ParquetFile(
                    source,
                    metadata=footer,
                    read_dictionary=wanted.text,
                    page_checksum_verification=True,
                ) as file,
            ):
                if source.size() != shard.size:
                    raise InputError(f"{shard.url}: {_CHANGED}")
                table = file.read_row_group(index, columns=list(columns), use_threads=False)
        except FileNotFoundError:
            raise InputError(f"{shard.url}: {_CHANGED}") from None
        except (pa.ArrowException, OSError) as error:
            if _is_of_the_machine(error):
                raise InputError(f"{shard.url}: row group {index} cannot be read: {error}") from error
            raise Unreadable(shard.url, f"row group {index} is corrupt: {error}; replace the file") from error
        problem = f"{table.num_rows} rows" if table.num_rows != shard.groups[index] else ""
        if problem := problem or _wild_index(table, wanted.dictionaries):
            raise Unreadable(shard.url, f"row group {index} is corrupt: {problem}; replace the file")
        return table

    def empty_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """What `read_group` gives, of no row: for a row group that cannot be read."""
        number = int(self.group_shard[group])
        url = self.shards[number].url
        schema = column_types.arrow_schema(self._footer(number).metadata, url)
        return pa.schema([column_types.find(schema, url, column) for column in columns]).empty_table()

    def _wanted(self, number: int, columns: Sequence[str]) -> tuple[pq.FileMetaData, _Wanted]:
        footer, names = self._footer(number), tuple(columns)
        wanted = footer.wanted.get(names)
        if wanted is None:
            url = self.shards[number].url
            schema = column_types.arrow_schema(footer.metadata, url)
            for column in names:
                column_types.find(schema, url, column)
            leaves, text = column_types.leaves_of(footer.metadata, schema, set(names))
            dictionaries = [
                name for name in names if any(path == name or path.startswith(f"{name}.") for path in text)
            ]
            wanted = footer.wanted[names] = _Wanted(leaves, text, dictionaries)
        return footer.metadata, wanted

    def _footer(self, number: int) -> _Footer:
        with self._lock:
            if number in self._footers:
                self._footers.move_to_end(number)
                return self._footers[number]
        shard = self.shards[number]
        # With a version, whatever is read from now on is of that, or is refused.
        if not shard.version and storage.size(shard.url) != shard.size:
            raise InputError(f"{shard.url}: {_CHANGED}")
        metadata, digest = _read_footer(storage.File(shard.path, shard.url, shard.size, shard.version))
        if digest != shard.digest:
            raise InputError(f"{shard.url}: {_CHANGED}")
        with self._lock:
            footer = self._footers[number] = _Footer(metadata)
            while len(self._footers) > _OPEN_FOOTERS:
                self._footers.popitem(last=False)
        return footer


_CHANGED = "this shard was changed or removed while it was in use; start again on data that stays as it is"


class _Tails:
    """Footers of files on object storage, as bytes: a run opens its data more than once. Threads share it.

    A file with its version never changes, so what is held of it stays true.
    """

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int, str], bytes] = OrderedDict()

    def get(self, file: storage.File) -> bytes | None:
        with self._lock:
            key = (file.url, file.size, file.version)
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, file: storage.File, tail: bytes) -> None:
        with self._lock:
            key = (file.url, file.size, file.version)
            if not file.version or key in self._held:
                return
            self._held[key] = tail
            self._bytes += len(tail)
            while self._bytes > self._most:
                self._bytes -= len(self._held.popitem(last=False)[1])


_TAILS = _Tails(64 * 2**20)


def list_shards(url: str) -> list[storage.File]:
    """The files of the data set at `url`, by relative path: all but those under a name that begins with _ or
    a dot."""
    return [file for file in storage.list_files(url) if not _is_hidden(file.path)]


def rows_of(file: storage.File) -> int:
    """Rows that a shard holds, by its footer. Raises Unreadable where it has none, as while it is written."""
    return int(_read_footer(file)[0].num_rows)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _read_footer(file: storage.File) -> tuple[pq.FileMetaData, str]:
    """The parsed footer and its digest, in one ranged read, or two where the footer is long."""
    with contextlib.suppress(FileNotFoundError):
        if (kept := _TAILS.get(file)) is not None:
            return pq.read_metadata(pa.BufferReader(kept)), _digest(kept)
        tail = storage.read(file.url, max(file.size - _TAIL_BYTES, 0), file.size)
        if tail[-4:] == b"PARE":
            raise InputError(f"{file.url}: encrypted Parquet is not supported; write it without encryption")
        if len(tail) < 12 or tail[-4:] != b"PAR1":
            raise Unreadable(
                file.url,
                f"not a Parquet file, or cut short ({file.size} bytes); replace it, or move it "
                "out (names that begin with _ or . are passed over)",
                _digest(tail),
            )
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= file.size:
            tail = storage.read(file.url, file.size - length, file.size)
        try:
            footer = pq.read_metadata(pa.BufferReader(tail[-length:]))
        except (pa.ArrowException, OSError) as error:
            raise Unreadable(
                file.url, f"the Parquet footer is corrupt: {error}; replace the file", _digest(tail)
            ) from error
        _TAILS.put(file, tail[-length:])
        return footer, _digest(tail[-length:])
    raise InputError(f"{file.url}: {_CHANGED}")


def _try_footer(file: storage.File) -> tuple[pq.FileMetaData, str] | Unreadable:
    # Twice, as with row groups.
    with contextlib.suppress(Unreadable):
        return _read_footer(file)
    try:
        return _read_footer(file)
    except Unreadable as error:
        return error


def _shard(file: storage.File, found: tuple[pq.FileMetaData, str] | Unreadable) -> Shard:
    if isinstance(found, Unreadable):
        return Shard(file.path, file.url, file.size, (), f"unreadable {found.digest}", found.problem)
    footer, digest = found
    groups = tuple(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return Shard(file.path, file.url, file.size, groups, digest, version=file.version)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _is_of_the_machine(error: Exception) -> bool:
    """A disk that fails or memory that is full, and not the file: Arrow gives corruption no error number."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def _wild_index(table: pa.Table, columns: Sequence[str]) -> str:
    """What is wrong with dictionaries, where an index leads out of one; Parquet's reader does not look."""
    for name in columns:
        for chunk in table[name].chunks:
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                chunk = chunk.flatten()
            if pa.types.is_dictionary(chunk.type):
                bounds = pc.min_max(chunk.indices).as_py()
                low, high = bounds["min"], bounds["max"]
                if low is not None and not 0 <= low <= high < len(chunk.dictionary):
                    return f"column {name} has a value that is not in its dictionary"
    return ""


def _fingerprint(shards: Sequence[Shard]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{shard.path}\0{shard.size}\0{shard.groups}\0{shard.digest}\n".encode())
    return digest.hexdigest()


def _ranges(group: pq.RowGroupMetaData, leaves: Sequence[int]) -> list[tuple[int, int]]:
    """Byte ranges [start, end) of some column chunks of a row group, neighbours joined."""
    chunks = []
    for leaf in leaves:
        chunk = group.column(leaf)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        chunks.append((start, start + chunk.total_compressed_size))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(chunks):
        if joined and start - joined[-1][1] <= _GAP_BYTES:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _names(what: str, paths: Sequence[str], most: int = 3) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"{len(paths)} {what}: {', '.join(paths[:most])}{more}"
