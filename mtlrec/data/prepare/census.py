"""Census-Income (KDD), as UCI publishes it -> Parquet and jobs that train on it; docs/census.md tells how.

N lines of a file.
"""

from __future__ import annotations

import gzip
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from mtlrec import storage
from mtlrec.data.ids import hash_ids
from mtlrec.data.prepare.census_job import JOBS, NUMBERS, YEARS, job_text
from mtlrec.job.errors import InputError
from mtlrec.job.job import parse_job

Progress = Callable[[dict[str, Any]], None]

COLUMNS = (
    "age",
    "class_worker",
    "det_ind_code",
    "det_occ_code",
    "education",
    "wage_per_hour",
    "hs_college",
    "marital_stat",
    "major_ind_code",
    "major_occ_code",
    "race",
    "hisp_origin",
    "sex",
    "union_member",
    "unemp_reason",
    "full_or_part_emp",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "tax_filer_stat",
    "region_prev_res",
    "state_prev_res",
    "det_hh_fam_stat",
    "det_hh_summ",
    "instance_weight",
    "mig_chg_msa",
    "mig_chg_reg",
    "mig_move_reg",
    "mig_same",
    "mig_prev_sunbelt",
    "num_emp",
    "fam_under_18",
    "country_father",
    "country_mother",
    "country_self",
    "citizenship",
    "own_or_self",
    "vet_question",
    "vet_benefits",
    "weeks_worked",
    "year",
    "income_50k",
)
"""Of a line, in this order."""
LABEL_VALUES = {
    "income_50k": ("- 50000.", "50000+."),
    "marital_stat": (
        "Never married",
        "Married-civilian spouse present",
        "Married-spouse absent",
        "Married-A F spouse present",
        "Separated",
        "Divorced",
        "Widowed",
    ),
}
"""The two columns that labels are made of, and all that may stand there."""
CATEGORIES = tuple(
    name for name in COLUMNS if name not in {*NUMBERS, *LABEL_VALUES, "instance_weight", "year"}
)
LEARN, TEST = "census-income.data", "census-income.test"
EXPECTED_ROWS = {LEARN: 199_523, TEST: 99_762}
VALID_OF = 10
"""One line of the learn file in so many is held out of training, by the hash of its number."""

_CHUNK = 16384
"""Lines that are parsed at a time."""
_LONGEST_LINE = 4096
"""Bytes; the published files stay below 1,000. A file of one endless line must not fill the memory."""
_SHARDS = {"train": 4, "valid": 2, "test": 2}
_GROUP_ROWS = 8192


def prepare_census(
    source: str, out: str, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Read both files in the folder `source`; write the splits, categories.json and the jobs to `out`.

    Returns {"out": URL, "rows": {split: rows}}. Nothing is written before both files have been read. `out`
    must be empty, or left by a prepare that did not finish; with `force` what an earlier one wrote is
    replaced, and nothing else is touched. Raises InputError that names file and line where a file is not the
    published one: not gzip, cut short, another number of columns or rows, a label or number that is none.
    """
    show = progress or _silent
    source, out = storage.make_absolute(source, "."), storage.make_absolute(out, ".")
    old = _own_files(out, force)
    learn = _read(source, LEARN, show)
    test = _read(source, TEST, show)
    categories = {name: _distinct(learn[name]) for name in CATEGORIES}
    held_out = hash_ids(np.arange(1, learn.num_rows + 1)) % np.uint64(VALID_OF) == 0
    coded = _encode(learn, categories)
    splits = {
        "train": coded.filter(pa.array(~held_out)),
        "valid": coded.filter(pa.array(held_out)),
        "test": _encode(test, categories),
    }
    numbers = {name: learn[name].to_numpy() for name in NUMBERS}
    sizes = {name: len(values) + 1 for name, values in categories.items()}
    # The job is removed first and written last: where it is, the data is whole.
    for url in sorted(old, key=lambda url: storage.name(url) != "job.yaml"):
        storage.remove(url)
    watch = _Watch("write", sum(table.num_rows for table in splits.values()), show)
    for split, table in splits.items():
        _write(table, storage.join(out, split), _SHARDS[split], watch)
    text = json.dumps(categories, indent=1, ensure_ascii=False)
    storage.write(storage.join(out, "categories.json"), text.encode())
    for file in sorted(JOBS, key=lambda file: file == "job.yaml"):
        url = storage.join(out, file)
        text = job_text(file, sizes, numbers)
        parse_job(text, url)
        storage.write(url, text.encode())
    return {"out": out, "rows": {split: table.num_rows for split, table in splits.items()}}


def _silent(event: dict[str, Any]) -> None:
    """The progress of a caller who does not look."""


def _own_files(out: str, force: bool) -> list[str]:
    """URLs of what an earlier prepare left in `out`. Refuses to write into anything else."""
    files = storage.list_files(out)
    if not files:
        return []
    if files[0].url == out:
        raise InputError(f"{out}: this is a file; name a new folder")
    finished = any(file.path == "job.yaml" for file in files)
    names = {"categories.json", *JOBS}
    own, foreign = [], []
    for file in files:
        split, _, rest = file.path.partition("/")
        if file.path in names or (split in _SHARDS and rest.startswith("part-") and "/" not in rest):
            own.append(file.url)
        elif split in _SHARDS or not force:
            foreign.append(file.path)
    if finished and not force:
        raise InputError(f"{out}: the folder is not empty; name a new one, or give --force to replace it")
    if foreign:
        raise InputError(f"{out}: {foreign[0]} is not of a prepare; move it away, or name a new folder")
    return own


class _Watch:
    """Counts rows of one piece of work and reports them."""

    def __init__(self, what: str, total: int, show: Progress) -> None:
        self._what, self._total, self._show = what, total, show
        self._done, self._start = 0, time.monotonic()

    def add(self, rows: int) -> None:
        self._done += rows
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / seconds
        self._show(
            {
                "kind": "progress",
                "what": self._what,
                "done": self._done,
                "total": self._total,
                "rows_per_s": rate,
                "seconds_left": (self._total - self._done) / rate,
            }
        )


def _read(source: str, name: str, show: Progress) -> pa.Table:
    """One of the published files -> [N] float64 numbers, text dictionaries, int32 year and line number."""
    url, lines = _open(source, name)
    expected = EXPECTED_ROWS[name]
    watch = _Watch(f"read {storage.name(url)}", expected, show)
    chunks: list[pa.Table] = []
    count = 0
    while chunk := list(islice(lines, _CHUNK)):
        if count + len(chunk) > expected:
            raise InputError(
                f"{url}: line {expected + 1:,}: too many; the published {name} has {expected:,} lines"
            )
        chunks.append(_parse(chunk, count + 1, url))
        count += len(chunk)
        watch.add(len(chunk))
    if count < expected:
        raise InputError(
            f"{url}: ends after line {count:,}; the published {name} has {expected:,} lines: fetch it again"
        )
    return pa.concat_tables(chunks).unify_dictionaries().combine_chunks()


def _open(source: str, name: str) -> tuple[str, Iterator[bytes]]:
    """(URL, lines) of the file `name` in `source`, compressed or not."""
    for file in (f"{name}.gz", name):
        url = storage.join(source, file)
        try:
            data = storage.read(url)
        except (FileNotFoundError, NotADirectoryError):
            continue
        stream = io.BytesIO(data)
        if not file.endswith(".gz"):
            return url, _lines(stream, url)
        if data[:2] != b"\x1f\x8b":
            raise InputError(f"{url}: line 1: not gzip (it begins with {data[:8]!r}); fetch the file again")
        return url, _lines(gzip.GzipFile(fileobj=stream), url)
    raise InputError(f"{source}: no {name}.gz here, nor {name}; SRC is the folder with both published files")


def _lines(stream: Any, url: str) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(_LONGEST_LINE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{url}: line {number:,}: corrupt or cut short ({error}); fetch it again"
            ) from None
        if not line:
            return
        if len(line) == _LONGEST_LINE:
            raise InputError(
                f"{url}: line {number:,}: longer than {_LONGEST_LINE} bytes; not the published file"
            )
        if not line.isascii() or b"\r" in line.rstrip(b"\r\n"):
            raise InputError(f"{url}: line {number:,}: not plain text; is this the published file?")
        yield line


def _parse(lines: Sequence[bytes], first: int, url: str) -> pa.Table:
    """Lines, numbered from `first` -> a table of the columns that are used."""
    for number, line in enumerate(lines, first):
        if line.count(b",") != len(COLUMNS) - 1:
            raise InputError(
                f"{url}: line {number:,}: {line.count(b',') + 1} columns; every line has {len(COLUMNS)}"
            )
    parsed = csv.read_csv(
        pa.BufferReader(b"".join(lines)),
        csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=_CHUNK * _LONGEST_LINE),
        csv.ParseOptions(quote_char=False),
        csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.dictionary(pa.int32(), pa.string()))),
    )
    columns = {name: _trim(parsed[name].combine_chunks()) for name in COLUMNS}

    def refuse(name: str, wrong: npt.NDArray[np.bool_], allowed: str) -> None:
        """Refuse the first line whose value of column `name` is one of the dictionary's `wrong` ones."""
        at = wrong[columns[name].indices.to_numpy()]
        if at.any():
            row = int(np.argmax(at))
            value = columns[name][row].as_py()
            raise InputError(f"{url}: line {first + row:,}, column {name}: {value!r} is not {allowed}")

    for name, allowed in (*LABEL_VALUES.items(), ("year", tuple(map(str, YEARS)))):
        known = pc.is_in(columns[name].dictionary, pa.array(allowed)).to_numpy(zero_copy_only=False)
        refuse(name, ~known, "one of " + ", ".join(allowed))
    numbers = {}
    for name in (*NUMBERS, "instance_weight", "year"):
        distinct = np.array([_number(text) for text in columns[name].dictionary.to_pylist()])
        refuse(name, ~(distinct >= 0), "a number from 0 on")
        numbers[name] = distinct[columns[name].indices.to_numpy()]
    for name in CATEGORIES:
        refuse(name, np.array([not text for text in columns[name].dictionary.to_pylist()]), "a value")
    return pa.table(
        {
            "line": pa.array(np.arange(first, first + len(lines), dtype=np.int32)),
            "year": pa.array(numbers["year"].astype(np.int32)),
            **{name: pa.array(numbers[name]) for name in NUMBERS},
            **{name: columns[name] for name in (*CATEGORIES, *LABEL_VALUES)},
        }
    )


def _trim(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Without the blanks around each text, and still without repeats."""
    texts = pc.utf8_trim_whitespace(column.dictionary).dictionary_encode()
    return pa.DictionaryArray.from_arrays(texts.indices.take(column.indices), texts.dictionary)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if value < float("inf") else float("nan")


def _distinct(column: pa.ChunkedArray) -> list[str]:
    return sorted(column.unique().to_pylist())


def _encode(table: pa.Table, categories: dict[str, list[str]]) -> pa.Table:
    """Values -> int32 codes: 1 + the place in `categories`, 0 for a value not there. Labels -> 0 and 1."""
    columns = {name: table[name] for name in ("line", "year", *NUMBERS)}
    for name, values in categories.items():
        codes = pc.index_in(table[name].cast(pa.string()), pa.array(values))
        columns[name] = pc.add(pc.fill_null(codes, -1), 1).cast(pa.int32())
    for task, name, positive in (
        ("income", "income_50k", "50000+."),
        ("never_married", "marital_stat", "Never married"),
    ):
        columns[task] = pc.equal(table[name].cast(pa.string()), positive).cast(pa.int8())
    return pa.table(columns)


def _write(table: pa.Table, folder: str, shards: int, watch: _Watch) -> None:
    bounds = [table.num_rows * shard // shards for shard in range(shards + 1)]
    for shard in range(shards):
        part = table.slice(bounds[shard], bounds[shard + 1] - bounds[shard])
        with storage.write_stream(storage.join(folder, f"part-{shard}.parquet")) as stream:
            pq.write_table(
                part, stream, row_group_size=_GROUP_ROWS, compression="zstd", write_page_checksum=True
            )
        watch.add(part.num_rows)
