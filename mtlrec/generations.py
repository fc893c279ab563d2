"""The sets of shards that a run which follows its data trains one after the other. Needs no torch.

RUN/generations/3.json            its shards, written before it is trained
RUN/generations/3.metrics.json    what the model scored on it before it was trained on it
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlrec import storage, watchdog
from mtlrec.data.quarantine import open_dataset
from mtlrec.data.shards import Dataset, Unreadable, list_shards, rows_of
from mtlrec.job.errors import InputError
from mtlrec.job.follow import FollowSection
from mtlrec.schema import Column

FOLDER = "generations"
_THREADS = 16
"""Records, or footers of new shards, that are read side by side."""
Record = dict[str, Any]
"""`generation` and what `Dataset.index` gives, with `id_kinds` and `found_at` (UTC)."""


def record_url(run_url: str, number: int) -> str:
    return storage.join(run_url, FOLDER, f"{number}.json")


def record_of(number: int, index: dict[str, Any], id_kinds: dict[str, str]) -> Record:
    """A generation as it is written down. index: of its data set."""
    found_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"generation": number, "found_at": found_at, **index, "id_kinds": id_kinds}


def read_record(run_url: str, number: int) -> Record | None:
    """The generation's record; None where there is none."""
    url = record_url(run_url, number)
    try:
        record = json.loads(storage.read(url))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("generation") != number or "shards" not in record:
        raise InputError(f"{url}: not the record of a generation; restore the file")
    return record


def read_records(run_url: str, last: int) -> list[Record]:
    """Those of generations 0 to `last`, which must all be there."""
    records = []
    for number, record in enumerate(_read_all(run_url, range(last + 1))):
        if record is None:
            raise InputError(f"{record_url(run_url, number)}: missing; restore the file")
        records.append(record)
    return records


def _read_all(run_url: str, numbers: Iterable[int]) -> Iterator[Record | None]:
    """The records of these generations, in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for record in pool.map(lambda number: read_record(run_url, number), numbers):
            watchdog.alive("records of generations")
            yield record


def create_record(run_url: str, record: Record) -> None:
    """Write a generation down. StorageError where another start has given that number to other shards."""
    number = record["generation"]
    if storage.create(record_url(run_url, number), _dump(record)):
        return
    # A create that was repeated after a lost answer finds its own first try.
    if (read_record(run_url, number) or {}).get("fingerprint") != record["fingerprint"]:
        # A start that was given up and lives on for a moment: the next one reads what it has written.
        raise storage.StorageError(
            f"{record_url(run_url, number)}: another start of this run has written it meanwhile"
        )


def replace_record(run_url: str, record: Record) -> None:
    """Write down a generation that no checkpoint knows of yet."""
    storage.write(record_url(run_url, record["generation"]), _dump(record))


def remove_later(run_url: str, last: int) -> None:
    """Forget the generations after `last`, which no checkpoint knows of: their rows are trained anew."""
    for file in storage.list_files(storage.join(run_url, FOLDER), ".json"):
        number = file.path.split(".", 1)[0]
        if number.isdecimal() and int(number) > last:
            storage.remove(file.url)


def write_metrics(run_url: str, number: int, step: int, metrics: dict[str, Any]) -> None:
    """Keep what the model scored at `step`, before it was trained on the generation."""
    url = storage.join(run_url, FOLDER, f"{number}.metrics.json")
    storage.write(url, _dump({"generation": number, "step": step, "metrics": metrics}))


def open_first(url: str, columns: Sequence[Column], tolerance: float | None) -> Dataset:
    """The shards that are there: generation 0.

    One whose footer cannot be read may still be in the writing: with a `tolerance` it is left to a later
    generation. Raises InputError as `open_dataset` does.
    """
    dataset = open_dataset(url, columns, tolerance)
    if not any(shard.problem for shard in dataset.shards):
        return dataset
    return open_dataset(url, columns, None, [shard.path for shard in dataset.shards if not shard.problem])


def open_recorded(url: str, columns: Sequence[Column], record: Record, tolerance: float | None) -> Dataset:
    """The shards of a generation, which must be as they were when it was written down."""
    number = record["generation"]
    paths = [shard["path"] for shard in record["shards"]]
    cure = (
        f"generation {number} has still to be trained on; put them back as they were, or, where nothing of "
        f"it has been trained yet, remove generations/{number}.json of the run to have it written down anew"
    )
    there = {file.path for file in list_shards(url)}
    if gone := [path for path in paths if path not in there]:
        raise InputError(f"{url}: {_some(gone)} of {len(paths)} shards gone, which {cure}")
    dataset = open_dataset(url, columns, tolerance, paths)
    if dataset.fingerprint != record["fingerprint"]:
        raise InputError(f"{url}: shards have changed ({dataset.describe_change(record)}), which {cure}")
    return dataset


@dataclass
class _Fresh:
    """A file that no generation has."""

    size: int
    since: float
    """When it was first seen in this size."""
    problem: str = ""
    """Why its footer could not be read."""


class Watch:
    """Looks for shards that no generation of the run has yet. One process has one, and calls it by itself.

    url, columns, tolerance: as for `open_dataset`. say: is given a line about what is passed over.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[Column],
        section: FollowSection,
        run_url: str,
        tolerance: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._url, self._columns, self._section, self._say = url, columns, section, say
        self._tolerance = tolerance
        self._fresh: dict[str, _Fresh] = {}
        self._passed: dict[str, int] = {}
        """Files that are left out, and their sizes then."""
        self._sizes: dict[str, int] = {}
        """Of the files of all generations."""
        self._id_kinds: dict[str, str] = {}
        names = [Path(file.path).stem for file in storage.list_files(storage.join(run_url, FOLDER), ".json")]
        for record in _read_all(run_url, sorted(int(name) for name in names if name.isdecimal())):
            self._remember(record or {"shards": []})

    @property
    def is_quiet(self) -> bool:
        """The last look saw no file that may be taken at the next."""
        return all(fresh.problem for fresh in self._fresh.values())

    @property
    def unfinished(self) -> list[str]:
        """Files that were seen and whose footer cannot be read."""
        return [path for path, fresh in self._fresh.items() if fresh.problem]

    def look(self, number: int) -> Record | None:
        """The record of generation `number`, not written yet, where shards are there that it can be made of.

        To be called every `poll_s` seconds. Raises InputError for a shard that does not fit the schema, or
        ids of another kind than before, and for one that stays unreadable where bad rows are an error.
        """
        ready = self._ready()
        if not ready:
            return None
        dataset = open_dataset(self._url, self._columns, None, ready)
        for column, kind in dataset.id_kinds.items():
            if (before := self._id_kinds.get(column, kind)) != kind:
                raise InputError(
                    f"{dataset.shards[0].url}: column {column!r} holds {kind}, but {before} in the shards "
                    "before; the ids of a column must be of one kind in every file"
                )
        record = record_of(number, dataset.index(), dataset.id_kinds)
        self._remember(record)
        return record

    def _ready(self) -> list[str]:
        """New files that are whole, by name."""
        now = time.monotonic()
        ready, seen, files = [], {}, list_shards(self._url)
        whole = [file for file in files if file.path not in self._sizes and self._is_as_before(file)]
        rows = self._rows_of(whole)
        for file in files:
            path, size = file.path, file.size
            if path in self._sizes:
                if self._sizes[path] != size:
                    self._say(f"{file.url}: changed after it was taken for a generation; it is passed over")
                    self._sizes[path] = size
                continue
            if self._passed.get(path) == size:
                continue
            if not self._is_as_before(file):
                seen[path] = _Fresh(size, now)
                continue
            fresh, found = self._fresh[path], rows[path]
            if isinstance(found, Unreadable):
                if now - fresh.since < self._section.unreadable_s:
                    seen[path] = _Fresh(size, fresh.since, found.problem)
                    continue
                text = f"{found}; it has not changed for {now - fresh.since:.0f} s (data.follow.unreadable_s)"
                if self._tolerance is None:
                    raise InputError(text)
                self._say(f"left out: {text}")
                self._passed[path] = size
            elif isinstance(found, InputError):
                if storage.exists(file.url):
                    raise found
                # Removed since it was listed.
            elif found:
                ready.append(path)
                seen[path] = fresh
            else:
                self._passed[path] = size
        self._fresh = seen
        return ready

    def _is_as_before(self, file: storage.File) -> bool:
        """The look before has seen it in this size."""
        fresh = self._fresh.get(file.path)
        return fresh is not None and fresh.size == file.size

    def _rows_of(self, files: Sequence[storage.File]) -> dict[str, int | InputError]:
        """How many rows each has, by its footer, or why that cannot be told. There may be very many."""

        def read(file: storage.File) -> int | InputError:
            try:
                return rows_of(file)
            except InputError as error:
                return error

        found: dict[str, int | InputError] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for file, rows in zip(files, pool.map(read, files), strict=True):
                watchdog.alive("footers of new shards")
                found[file.path] = rows
        return found

    def _remember(self, record: Record) -> None:
        for shard in record["shards"]:
            self._sizes[shard["path"]] = shard["size"]
            self._fresh.pop(shard["path"], None)
        self._id_kinds = {**record.get("id_kinds", {}), **self._id_kinds}


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
