"""What of a data set is bad and left out: files and row groups that cannot be read, rows that do not fit.

Only where the job says so (`data.bad_rows: skip`); docs/data.md has the rules. Which rows are bad is a
function of the data and the schema alone, so every worker, every pass and every restart leaves out the same.
No torch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from mtlrec import storage
from mtlrec.data.columns import column_names
from mtlrec.data.decode import build_columns
from mtlrec.data.order import Position, rows_between
from mtlrec.data.shards import Dataset, Shard, Unreadable
from mtlrec.data.source import BadRows
from mtlrec.job.errors import InputError
from mtlrec.schema import Column, Schema

FOLDER = "quarantine"
"""In the run's folder: a file for each row group, or whole file, of which something was left out."""
EXAMPLES = 100
"""Bad rows of a row group that its record explains; of the others it has the number."""
_THREADS = 16

Counts = dict[str, int]
"""What was left out: `rows`, in so many `row_groups`, in so many `files`, unreadable ones included."""


class Earlier(NamedTuple):
    """What a run that follows its data has read in the generations before: it counts for what may be bad."""

    rows: int = 0
    bad: int = 0

    @classmethod
    def of(cls, state: Mapping[str, int] | None) -> Earlier:
        """From what a checkpoint keeps of a `Tally`."""
        return cls(state["earlier_rows"], state["earlier_bad"]) if state else cls()


NOTHING = Earlier()


class Quarantine:
    """Takes note of what is bad of a data set, each row group once, whoever meets it. Threads may share it.

    tolerance: the share of the data set's rows that may be bad. folder: where each row group's record is
    written, or None. A record's name and bytes depend on the data alone: it may be written again. groups:
    whether a row group that cannot be read is no error either. earlier: rows to count with the data set's.
    """

    def __init__(
        self,
        dataset: Dataset,
        tolerance: float,
        folder: str | None = None,
        groups: bool = True,
        earlier: Earlier = NOTHING,
    ) -> None:
        self._dataset, self._tolerance, self._folder = dataset, tolerance, folder
        self._takes_groups, self._earlier = groups, earlier
        self._lock = threading.Lock()
        self._groups: dict[int, int] = {}
        self._rows = 0

    @property
    def groups(self) -> dict[int, int]:
        """Row group -> how many of its rows are bad, of those met so far that have one."""
        with self._lock:
            return dict(self._groups)

    def add_rows(self, group: int, bad: BadRows) -> None:
        """Rows of a row group do not fit the schema. Raises InputError where that makes too many."""
        if not bad.misfits:
            return
        shown = heapq.merge(
            *(
                [(int(n), each.column, problem) for n, problem in zip(each.rows, each.problems, strict=False)]
                for each in bad.misfits
            )
        )
        columns: dict[str, int] = {}
        for misfit in bad.misfits:
            columns[misfit.column] = columns.get(misfit.column, 0) + len(misfit.rows)
        examples = [
            {"row": row, "column": column, "problem": problem}
            for (row, column, problem), _ in zip(shown, range(EXAMPLES), strict=False)
        ]
        self._add(group, int(bad.mask.sum()), {"columns": columns, "examples": examples})

    def add_group(self, group: int, error: Unreadable) -> None:
        """A row group cannot be read. Raises InputError where that makes too many, or is an error itself."""
        if not self._takes_groups:
            raise error
        self._add(group, int(self._dataset.group_rows[group]), {"problem": error.problem})

    def record_files(self) -> None:
        """Write down the files that cannot be read at all."""
        for shard in self._dataset.shards:
            if shard.problem:
                self._write(shard, None, {"file": shard.path, "problem": shard.problem})

    def check(self, groups: Mapping[int, int]) -> Counts:
        """What `groups`, as from all workers, come to. Raises InputError where it is more than may be."""
        refuse_too_many(self._dataset, sum(groups.values()), self._tolerance, self._folder, self._earlier)
        return counted(self._dataset, groups)

    def _add(self, group: int, rows: int, what: dict[str, Any]) -> None:
        with self._lock:
            if group in self._groups:
                return
            self._groups[group] = rows
            self._rows += rows
            total = self._rows
        dataset = self._dataset
        shard, index = dataset.shards[dataset.group_shard[group]], int(dataset.group_index[group])
        about = {"file": shard.path, "row_group": index, "rows": shard.groups[index], "bad_rows": rows}
        self._write(shard, index, {**about, **what})
        refuse_too_many(dataset, total, self._tolerance, self._folder, self._earlier)

    def _write(self, shard: Shard, group: int | None, record: dict[str, Any]) -> None:
        if self._folder is None:
            return
        # Names of files hold anything; the hash keeps apart what is alike without it.
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", shard.path).lstrip(".")[-80:]
        mark = hashlib.blake2b(shard.path.encode(), digest_size=4).hexdigest()
        part = "" if group is None else f"-{group:06d}"
        text = json.dumps(record, indent=1, ensure_ascii=False)
        storage.write(storage.join(self._folder, f"{plain}-{mark}{part}.json"), text.encode())


class GoodRows(Dataset):
    """A data set as passes before training see it: `read_group` gives the rows that are not bad.

    It reads every column of the schema, whatever is asked for: only then is it known which rows these are.
    """

    def __init__(self, dataset: Dataset, schema: Schema, tolerance: float, earlier: Earlier) -> None:
        super().__init__(**vars(dataset))
        self._whole, self._schema = dataset, schema
        self._needed = column_names(schema, True, ())
        self._quarantine = Quarantine(dataset, tolerance, earlier=earlier)

    @property
    def contents(self) -> str:
        schema = json.dumps(self._schema.to_dict(), sort_keys=True)
        good_by = hashlib.blake2b(schema.encode(), digest_size=16).hexdigest()
        return f"{self.fingerprint}, rows that are good by {good_by}"

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        names = list(dict.fromkeys([*columns, *self._needed]))
        try:
            table = self._whole.read_group(group, names)
        except Unreadable as error:
            self._quarantine.add_group(group, error)
            return self._whole.empty_group(group, columns)
        bad = BadRows(table.num_rows)
        where = self._whole.where(group)
        build_columns(table, self._schema, where=where, first_row=0, vocabularies=None, bad=bad)
        self._quarantine.add_rows(group, bad)
        asked = table.select(list(columns))
        return asked.filter(pa.array(~bad.mask)) if bad.misfits else asked


class Tally:
    """How many rows a run has left out, over all workers: the same on every rank, and kept in checkpoints.

    Each generation counts once, as its last epoch had it.
    """

    def __init__(self, tolerance: float, folder: str, state: Mapping[str, int] | None = None) -> None:
        """state: what `to_json` gave; None: nothing has been read."""
        self._tolerance, self._folder = tolerance, folder
        self.earlier = Earlier.of(state)
        self._epoch, self.rows = (state["epoch"], state["epoch_bad"]) if state else (-1, 0)

    def to_json(self) -> dict[str, int]:
        """`epoch_bad`: rows left out so far of the epoch `epoch` of this generation."""
        rows, bad = self.earlier
        return {"earlier_rows": rows, "earlier_bad": bad, "epoch": self._epoch, "epoch_bad": self.rows}

    def add(self, dataset: Dataset, before: Position, after: Position, good: int) -> int:
        """A step leads from one position to another by `good` rows of all workers; how many were left out.

        Raises InputError once the run, with what it has seen of this epoch, has more than may be.
        """
        if before.epoch != self._epoch:
            self._epoch, self.rows = before.epoch, 0
        bad = rows_between(before, after, dataset.rows) - good
        self.rows += bad
        refuse_too_many(dataset, self.rows, self._tolerance, self._folder, self.earlier)
        return bad

    def end_generation(self, rows: int) -> None:
        """The generation, of so many rows, has been trained; another one comes."""
        self.earlier = Earlier(self.earlier.rows + rows, self.earlier.bad + self.rows)
        self._epoch, self.rows = -1, 0


def open_dataset(
    url: str, columns: Sequence[Column], tolerance: float | None, only: Collection[str] | None = None
) -> Dataset:
    """`Dataset.open` (of the shards `only`); with a `tolerance`, files that cannot be read are left out.

    Raises InputError as that does, and where such files hold more than that share of all bytes.
    """
    dataset = Dataset.open(url, columns, skip_unreadable=tolerance is not None, only=only)
    lost = [shard for shard in dataset.shards if shard.problem]
    share = sum(shard.size for shard in lost) / max(sum(shard.size for shard in dataset.shards), 1)
    if tolerance is not None and share > tolerance:
        raise InputError(
            f"{lost[0].url}: {lost[0].problem}; with {len(lost)} of {len(dataset.shards)} files unreadable "
            f"{share:.2%} of the bytes are lost, more than data.max_bad_share allows ({tolerance:g})"
        )
    return dataset


def good_rows(
    dataset: Dataset, schema: Schema, tolerance: float | None, earlier: Earlier = NOTHING
) -> Dataset:
    """The data set without its bad rows, for passes that need no positions; without a tolerance, itself."""
    return dataset if tolerance is None else GoodRows(dataset, schema, tolerance, earlier)


def refuse_too_many(
    dataset: Dataset, bad: int, tolerance: float, folder: str | None = None, earlier: Earlier = NOTHING
) -> None:
    """InputError where `bad` rows, and the earlier ones, are more than the share `tolerance` of all."""
    if earlier.bad + bad > tolerance * (earlier.rows + dataset.rows):
        before = f" (and {earlier.bad:,} of {earlier.rows:,} in the generations before)" * (earlier.rows > 0)
        look = f"; {folder} says which, and why" if folder is not None else ""
        raise InputError(
            f"{dataset.url}: {bad:,} or more of {dataset.rows:,} rows are bad{before}, more than "
            f"data.max_bad_share allows ({tolerance:g}){look}; set data.bad_rows: error to be shown the first"
        )


def counted(dataset: Dataset, groups: Mapping[int, int]) -> Counts:
    """groups: row group -> its bad rows."""
    files = {int(dataset.group_shard[group]) for group in groups}
    files |= {number for number, shard in enumerate(dataset.shards) if shard.problem}
    return {"rows": sum(groups.values()), "row_groups": len(groups), "files": len(files)}


def recorded(folder: str) -> Counts:
    """What the records in a run's quarantine come to, of all its workers and starts."""
    urls = [file.url for file in storage.list_files(folder, ".json")]
    with ThreadPoolExecutor(_THREADS) as pool:
        records = [json.loads(data) for data in pool.map(storage.read, urls)]
    groups = [record for record in records if "row_group" in record]
    return {
        "rows": sum(record["bad_rows"] for record in groups),
        "row_groups": len(groups),
        "files": len({record["file"] for record in records}),
    }


def told(counts: Counts) -> str:
    """The counts in words."""
    words = (("rows", "bad row"), ("row_groups", "row group"), ("files", "file"))
    rows, groups, files = (f"{counts[key]:,} {word}{'s'[: counts[key] != 1]}" for key, word in words)
    return f"{rows} in {groups}, {files}"


def unreadable_files(dataset: Dataset) -> str:
    """The files that were left out, in words; "" where there are none."""
    lost = [shard for shard in dataset.shards if shard.problem]
    if not lost:
        return ""
    first = f"{lost[0].path}: {lost[0].problem}"
    return f"{dataset.url}: {len(lost):,} of {len(dataset.shards):,} files cannot be read: {first}"
