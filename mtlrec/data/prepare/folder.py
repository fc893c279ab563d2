"""What every prepare does with OUT: tell what an earlier one left there, report progress, write Parquet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mtlrec import storage
from mtlrec.job.errors import InputError
from mtlrec.job.job import parse_job

Progress = Callable[[dict[str, Any]], None]

JOB = "job.yaml"
"""Removed first and written last: where it is, the rest is whole."""
_GROUP_ROWS = 8192


def silent(event: dict[str, Any]) -> None:
    """The progress of a caller who does not look."""


class Watch:
    """Counts what is done of one piece of work and reports it."""

    def __init__(self, what: str, total: int, show: Progress, unit: str = "rows") -> None:
        self._what, self._total, self._show, self._unit = what, total, show, unit
        self._done, self._start = 0, time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = max(self._done, 1) / seconds
        self._show(
            {
                "kind": "progress",
                "what": self._what,
                "unit": self._unit,
                "done": self._done,
                "total": self._total,
                "rows_per_s": rate,
                "seconds_left": (self._total - self._done) / rate,
            }
        )


class OutFolder:
    """OUT: data `folders` that hold `part-N.parquet`, and `files` beside them, `job.yaml` the last of all.

    Opening it writes nothing. It raises InputError where OUT is a file; holds a finished prepare, without
    `force`; or holds anything that no prepare writes: in a data folder, where it would be read as data, also
    with `force`.
    """

    def __init__(self, url: str, folders: Sequence[str], files: Sequence[str], *, force: bool) -> None:
        self.url = url
        found = storage.list_files(url)
        if found and found[0].url == url:
            raise InputError(f"{url}: this is a file; name a new folder")
        finished = any(file.path == JOB for file in found)
        own, foreign = [], []
        for file in found:
            folder, _, name = file.path.rpartition("/")
            if file.path in files or (folder in folders and name.startswith("part-")):
                own.append(file.url)
            elif not force or any(file.path.startswith(f"{data}/") for data in folders):
                foreign.append(file.path)
        if finished and not force:
            raise InputError(f"{url}: the folder is not empty; name a new one, or give --force to replace it")
        if foreign:
            raise InputError(f"{url}: {foreign[0]} is not of a prepare; move it away, or name a new folder")
        last = {storage.join(url, name): place for place, name in enumerate(files)}
        self._old = sorted(own, key=lambda each: (storage.name(each) != JOB, last.get(each, -1)))

    def clear(self) -> None:
        """Remove what an earlier prepare wrote: job.yaml, then the data, then `files` in their order."""
        for url in self._old:
            storage.remove(url)

    def write_part(self, folder: str, number: int, table: pa.Table) -> None:
        """One Parquet file of a data folder, the same bytes for the same table."""
        with storage.write_stream(storage.join(self.url, folder, f"part-{number}.parquet")) as stream:
            pq.write_table(
                table, stream, row_group_size=_GROUP_ROWS, compression="zstd", write_page_checksum=True
            )

    def write_parts(self, folder: str, table: pa.Table, shards: int, watch: Watch) -> None:
        """A data folder's rows, cut into so many files of about one size."""
        bounds = [table.num_rows * shard // shards for shard in range(shards + 1)]
        for shard in range(shards):
            part = table.slice(bounds[shard], bounds[shard + 1] - bounds[shard])
            self.write_part(folder, shard, part)
            watch.add(part.num_rows)

    def write_file(self, name: str, text: str) -> None:
        storage.write(storage.join(self.url, name), text.encode())

    def write_jobs(self, texts: Mapping[str, str]) -> None:
        """File name -> YAML, each checked before it is written; job.yaml after all others."""
        for name in sorted(texts, key=lambda name: name == JOB):
            parse_job(texts[name], storage.join(self.url, name))
            self.write_file(name, texts[name])
