"""Builds the vocabularies of a run from its training data, all workers together. docs/vocabulary.md

W workers, P partitions of the hashes. Each worker counts its share of the row groups, and writes what grows
too large to storage as a run: entries in the order of their hashes, cut into P sections. Then each merges the
sections of its own partitions, over all runs; rank 0 puts these together, as they are in order. Addition
knows no order, so the file is the same whoever counted what.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mtlrec import storage, watchdog
from mtlrec.control import Control
from mtlrec.data import vocabulary
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Counts, Kind, Vocabulary, common_kind, count, join, merge
from mtlrec.distributed import World, all_gather_bytes, broadcast_bytes
from mtlrec.job.errors import InputError
from mtlrec.lockstep import together
from mtlrec.share import share_of
from mtlrec.storage import StorageError

FOLDER = "vocabularies"
"""In the run's folder."""
RUN_BYTES = 128 * 2**20
"""Distinct ids and their counts that a worker holds before it writes some out: over all tables."""
PARTITION_BITS = 6
"""P = 2^6. A worker holds one partition's distinct ids of one table while it merges."""
THREADS = 4
"""Row groups, or sections, that are read side by side."""
SHOW_EVERY_S = 0.5
_SCRATCH = "scratch"
_VERSION = 1
"""Of how a vocabulary is built: a file of another version is built anew."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Wanted:
    """A table whose ids are a vocabulary."""

    table: str
    columns: tuple[str, ...]
    """Columns of ids, or of lists of ids, that look the table up; they are counted together."""
    min_count: int
    """An id that the data has less often is unknown."""
    rows: int | None
    """The most that the table may have, reserved ones included: its most frequent ids; null: any number."""
    reserved: int
    """Rows for unknown ids."""

    def about(self, dataset: Dataset) -> dict[str, Any]:
        """All that the file depends on."""
        return {
            "version": _VERSION,
            "data": dataset.contents,
            "columns": sorted(set(self.columns)),
            "min_count": self.min_count,
            "rows": self.rows,
            "reserved": self.reserved,
        }

    def where(self, dataset: Dataset) -> str:
        """For messages."""
        return f"{dataset.url}: table {self.table!r} (ids of {', '.join(sorted(set(self.columns)))})"


def build(
    dataset: Dataset, wanted: Sequence[Wanted], run_url: str, world: World, control: Control
) -> dict[str, Vocabulary]:
    """The vocabulary of each table, kept in `vocabularies/<table>.parquet` of the run. A collective.

    A file that is there already for the same data and wishes is used as it is. Raises InputError, on every
    rank alike, where a table may have no row for an id, where the data has no id for it, and where its
    columns hold integers here and other ids there; and what reading the data raises.
    """
    for each in wanted:
        if each.rows is not None and each.rows <= each.reserved:
            raise InputError(
                f"table {each.table!r}: rows is {each.rows} and reserved is {each.reserved}, which leaves no "
                f"row for an id; give rows: {each.reserved + 1} or more"
            )
    urls = {each.table: storage.join(run_url, FOLDER, f"{each.table}.parquet") for each in wanted}
    missing = _agree(world, lambda: [e.table for e in wanted if _read(urls[e.table], e, dataset) is None])
    if missing:
        left = [each for each in wanted if each.table in missing]
        _Builder(dataset, left, run_url, world, control).build(urls)

    def read_all() -> dict[str, Vocabulary]:
        found = {each.table: _read(urls[each.table], each, dataset) for each in wanted}
        for table, held in found.items():
            if held is None:
                raise InputError(
                    f"{urls[table]}: this worker does not see the vocabulary that was just written there; "
                    "every machine must read the same storage"
                )
        return {table: held for table, held in found.items() if held is not None}

    return together(world, read_all)


def _read(url: str, wanted: Wanted, dataset: Dataset) -> Vocabulary | None:
    """The vocabulary in the file, if it is there, whole, and what is wanted."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found, about = vocabulary.read(url)
        if about == wanted.about(dataset):
            return found
    return None


class _Sections(NamedTuple):
    """A file of counts in P sections, one for each range of hashes."""

    url: str
    bounds: list[int]
    """[P + 1] Where each begins; an empty one has no bytes."""


class _Counted(NamedTuple):
    """What one worker counted of a table."""

    runs: list[_Sections]
    kinds: list[Kind]
    """Of all the ids, also of those that will be too rare for a row."""


class _Merged(NamedTuple):
    """What one worker's partitions of a table came to."""

    file: _Sections
    distinct: int
    """Ids, also those that are too rare."""
    most: int
    """The greatest count of an id."""


class _Pile:
    """Counts on their way to be one; holds no more than twice what is distinct, or than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[Counts] = []
        self._bytes = 0
        self.settled = 0
        """Bytes that were left when all was last merged."""

    def add(self, counts: Counts) -> None:
        self._parts.append(counts)
        self._bytes += counts.num_bytes
        if self._bytes > max(self._limit, 2 * self.settled):
            self._settle()

    def take(self) -> Counts | None:
        """All in one, and begin anew; None where nothing was added."""
        if not self._parts:
            return None
        self._settle()
        (merged,) = self._parts
        self._parts, self._bytes, self.settled = [], 0, 0
        return merged

    def _settle(self) -> None:
        self._parts = [merge(self._parts)]
        self._bytes = self.settled = self._parts[0].num_bytes


class _Builder:
    """One build, from rank `world.rank`. Every method but those of the collectives may fail on one rank."""

    def __init__(
        self, dataset: Dataset, wanted: Sequence[Wanted], run_url: str, world: World, control: Control
    ) -> None:
        self._dataset, self._wanted, self._world, self._control = dataset, wanted, world, control
        self._scratch = storage.join(run_url, FOLDER, _SCRATCH)
        # Several tables share what may be held.
        self._limit = max(RUN_BYTES // len(wanted), 1)

    def build(self, urls: Mapping[str, str]) -> None:
        """A collective: count, merge, and write each table's file."""
        # A folder of this build's own: a worker of a killed one may still be writing to another.
        scratch = _agree(self._world, self._clear)
        try:
            counted = _everyone(self._world, lambda: self._count_share(scratch))
            counted = [{table: _Counted(*found) for table, found in rank.items()} for rank in counted]
            parts = _everyone(self._world, lambda: self._merge_share(counted, scratch))
            parts = [{table: _Merged(*found) for table, found in rank.items()} for rank in parts]
            together(
                self._world, lambda: self._finish(counted, parts, urls) if self._world.rank == 0 else None
            )
        finally:
            if self._world.rank == 0:
                with contextlib.suppress(InputError, StorageError):
                    storage.remove_tree(self._scratch)

    def _clear(self) -> str:
        storage.remove_tree(self._scratch)  # what an interrupted build has left
        return storage.join(self._scratch, secrets.token_hex(8))

    def _count_share(self, scratch: str) -> dict[str, _Counted]:
        """Count this worker's row groups, for each table."""
        piles = [_Pile(self._limit) for _ in self._wanted]
        runs: list[list[_Sections]] = [[] for _ in self._wanted]
        kinds: list[set[Kind]] = [set() for _ in self._wanted]

        def spill(number: int) -> None:
            counts = piles[number].take()
            if counts is not None and len(counts):
                name = f"{self._wanted[number].table}.run-{self._world.rank:05d}-{len(runs[number]):05d}"
                runs[number].append(_write(storage.join(scratch, name), _cut(counts)))

        progress = _Progress(self._dataset, self._world, self._control)
        groups = share_of(self._dataset, self._world)
        for group, found in zip(groups, _ahead(self._count_group, groups), strict=True):
            for number, counts in enumerate(found):
                kinds[number].add(counts.kind)
                piles[number].add(counts)
                if piles[number].settled > self._limit // 2:
                    spill(number)
            progress.add(int(self._dataset.group_rows[group]))
        for number in range(len(piles)):
            spill(number)
        progress.end()
        return {
            each.table: _Counted(runs[number], sorted(kinds[number]))
            for number, each in enumerate(self._wanted)
        }

    def _count_group(self, group: int) -> list[Counts]:
        """The counts of one row group, table by table."""
        columns = dict.fromkeys(column for each in self._wanted for column in each.columns)
        table = self._dataset.read_group(group, list(columns))
        found = []
        for each in self._wanted:
            try:
                found.append(count(table[column] for column in sorted(set(each.columns))))
            except ValueError as error:
                raise InputError(
                    f"{each.where(self._dataset)}: {error}; a vocabulary holds ids of one kind, so give the "
                    "columns tables of their own"
                ) from None
        return found

    def _merge_share(self, counted: Sequence[Mapping[str, _Counted]], scratch: str) -> dict[str, _Merged]:
        """Merge this worker's partitions over all runs, and leave out what is too rare."""
        merged = {}
        for each in self._wanted:
            runs = [_Sections(*run) for rank in counted for run in rank[each.table].runs]
            seen: list[tuple[int, int]] = []
            sections = (
                self._merge_partition(each, runs, partition, seen)
                if partition % self._world.world_size == self._world.rank
                else None
                for partition in range(2**PARTITION_BITS)
            )
            file = _write(storage.join(scratch, f"{each.table}.part-{self._world.rank:05d}"), sections)
            merged[each.table] = _Merged(
                file, sum(distinct for distinct, _ in seen), max((most for _, most in seen), default=0)
            )
        return merged

    def _merge_partition(
        self, wanted: Wanted, runs: Sequence[_Sections], partition: int, seen: list[tuple[int, int]]
    ) -> Counts | None:
        """One partition of a table; how many ids it has, and the greatest count, go to `seen`."""
        pile = _Pile(self._limit)
        for counts in _ahead(lambda run: _read_section(run, partition), runs):
            if counts is not None:
                pile.add(counts)
        whole = pile.take()
        if whole is None:
            return None
        seen.append((len(whole), int(whole.counts.max())))
        common = whole.take(whole.counts >= wanted.min_count)
        # What is not among the most frequent of a part is not among those of the whole.
        return common if wanted.rows is None else common.most_frequent(wanted.rows - wanted.reserved)

    def _finish(
        self,
        counted: Sequence[Mapping[str, _Counted]],
        parts: Sequence[Mapping[str, _Merged]],
        urls: Mapping[str, str],
    ) -> None:
        """Put each table's partitions together, in their order, and write its file. One rank calls."""
        for each in self._wanted:
            merged = [part[each.table] for part in parts]
            distinct, most = sum(part.distinct for part in merged), max(part.most for part in merged)
            files = [_Sections(*part.file) for part in merged]
            sections = [(files[partition % len(files)], partition) for partition in range(2**PARTITION_BITS)]
            held: list[Counts] = []
            cap = None if each.rows is None else each.rows - each.reserved
            for counts in _ahead(lambda section: _read_section(*section), sections):
                if counts is not None:
                    held.append(counts)
                    if cap is not None and sum(map(len, held)) > 2 * cap:
                        held = [join(held).most_frequent(cap)]
            if not sum(map(len, held)):
                problem = (
                    f"no id is seen {each.min_count} times (min_count; the most frequent one {most})"
                    if distinct
                    else "the data holds no id"
                )
                raise InputError(f"{each.where(self._dataset)}: {problem}, so there is no vocabulary")
            kind = common_kind({kind for rank in counted for kind in rank[each.table].kinds})
            whole = replace(join(held), kind=kind)
            whole = whole if cap is None else whole.most_frequent(cap)
            vocabulary.write(urls[each.table], whole.to_vocabulary(each.reserved), each.about(self._dataset))
            text = f"vocabulary of {each.table}: {len(whole):,} of {distinct:,} ids have a row of their own"
            self._control.show({"kind": "log", "text": text})


class _Progress:
    """Shows how far the counting is, on rank 0: as far as all, if they are as fast as this worker."""

    def __init__(self, dataset: Dataset, world: World, control: Control) -> None:
        self._control = control if world.rank == 0 else None
        self._rows, self._workers = dataset.rows, world.world_size
        self._began = self._shown = time.monotonic()
        self._done = 0

    def add(self, rows: int) -> None:
        """So many more rows of this worker's share are counted."""
        self._done += rows
        if time.monotonic() - self._shown >= SHOW_EVERY_S:
            self._show(min(self._done * self._workers, self._rows - 1))

    def end(self) -> None:
        self._show(self._rows)

    def _show(self, done: int) -> None:
        if self._control is not None:
            self._shown = time.monotonic()
            rate = done / max(self._shown - self._began, 1e-9)
            event = {"kind": "progress", "what": "vocabulary", "done": done, "total": self._rows}
            self._control.show(
                {**event, "rows_per_s": rate, "seconds_left": (self._rows - done) / max(rate, 1e-9)}
            )


def _cut(counts: Counts) -> Iterator[Counts]:
    """The entries of each of the P ranges of hashes."""
    starts = np.arange(2**PARTITION_BITS, dtype=np.uint64) << np.uint64(64 - PARTITION_BITS)
    bounds = [*np.searchsorted(counts.hashes, starts).tolist(), len(counts)]
    for begin, end in pairwise(bounds):
        yield counts.slice(begin, end)


def _write(url: str, sections: Iterable[Counts | None]) -> _Sections:
    bounds = [0]
    with storage.write_stream(url) as stream:
        for counts in sections:
            data = counts.to_bytes() if counts is not None and len(counts) else b""
            stream.write(data)
            bounds.append(bounds[-1] + len(data))
    return _Sections(url, bounds)


def _read_section(file: _Sections, partition: int) -> Counts | None:
    begin, end = file.bounds[partition : partition + 2]
    return Counts.from_bytes(storage.read(file.url, begin, end)) if begin < end else None


def _ahead(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in order, in threads; no more than a few results wait to be taken."""
    with ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, len(items), 2 * THREADS):
            for result in pool.map(function, items[begin : begin + 2 * THREADS]):
                # Between two exchanges of the workers may lie hours of this.
                watchdog.alive("vocabulary")
                yield result


def _agree(world: World, action: Callable[[], Result]) -> Result:
    """What `action` gives on rank 0, as JSON, on every rank."""
    text = together(world, lambda: json.dumps(action()) if world.rank == 0 else "")
    found: Result = json.loads(broadcast_bytes(text.encode(), world))
    return found


def _everyone(world: World, action: Callable[[], Any]) -> list[Any]:
    """What `action` gives on each rank, as JSON, in rank order, on every rank."""
    text = together(world, lambda: json.dumps(action()))
    return [json.loads(part) for part in all_gather_bytes(text.encode(), world)]
