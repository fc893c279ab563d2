"""Parquet to batches, beside a plain scan of the same columns of the same files.

    python -m benchmarks reader [--rows 8000000] [--repeats 5] [--folder FOLDER] [--quick]

18 columns: a user and an item (sparse 64-bit numbers; tables of 1M and 500k rows), eight other ids (numbers
from 0 on; tables of 100 to 100k), a scenario of four texts, a history of items (0 to 20, 10 on average),
three numbers, two labels, a sample weight. 320 row groups in 8 files, as `pyarrow.parquet.write_table` writes
them by default (snappy, dictionaries), no nulls. The files are in the page cache for both.

- Ours: `Dataset.open` and `Reader` as training uses them: shuffled, 16 lanes on one worker, batches of 4,096,
  until the last batch of one epoch is taken. Two threads fill windows and one builds batches; on one core one
  does both, as the reader decides by itself. Ids become rows of tables, numbers and labels float32. The first
  fill of all lanes is in the time, and so are the row groups that two lanes share, which are read twice.
- Theirs: each file opened, and `ParquetFile.iter_batches` over these columns, in batches of 4,096 rows that
  are counted and dropped. The scenario is left as a dictionary, which is faster than making texts.

`cpu` is what must be reached: rows per second of processor time, user and system, all threads of each side,
both bound to one and the same core. What the reader takes of the cores, a worker's step does not have; with
one core for each, none of our threads gains or loses by another of ours on a core that shares its units.
`clock` is by the clock, where each may use all cores: theirs decodes columns side by side (`use_threads`).
`free` is processor time again, of those runs.

Takes three minutes, 1.2 GB of disk and 1 GB of memory; `--quick` a few seconds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from mtlrec import heap
from mtlrec.data.columns import column_names
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import SchemaSection
from mtlrec.schema import Schema, build_schema

BATCH, LANES, WINDOW = 4096, 16, 16_384
GROUPS, FILES = 320, 8
USERS, ITEMS = 1_000_000, 500_000
OTHERS = (100, 200, 500, 1_000, 5_000, 20_000, 50_000, 100_000)
SCENARIOS = ["de", "fr", "uk", "us"]
NUMBERS, LABELS = 3, 2
LONGEST = 20
"""Ids of a history; from none to so many, all as likely."""

MUST, AIM = 0.45, 0.7

Seconds = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__)
    parser.add_argument("--rows", type=int, default=8_000_000)
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.rows, asked.repeats = 50_000, 2
    # As training does.
    heap.keep_freed_memory()
    schema = make_schema()
    cpu: Seconds = defaultdict(list)
    first_batch: list[float] = []
    with tempfile.TemporaryDirectory(prefix="mtlrec-benchmark-", dir=asked.folder) as folder:
        bytes_ = write(Path(folder), asked.rows)

        def side(name: str, cores: set[int], pass_: Callable[[], int]) -> float:
            # Threads that it starts inherit it.
            os.sched_setaffinity(0, cores)
            began, cpu_began = time.perf_counter(), time.process_time()
            rows = pass_()
            cpu[name].append(time.process_time() - cpu_began)
            assert rows == asked.rows, f"{name} has {rows} rows of {asked.rows}"
            return time.perf_counter() - began

        # The first pass brings the files into the page cache. Nothing has been read, and freed, before it.
        measure.forget_peak()
        before = measure.memory("VmRSS")
        read(folder, schema, [])
        peak = measure.memory("VmHWM") - before
        # Arrow's threads, which stay, are made here: they may use all cores.
        scan(folder, schema, use_threads=True)
        every = os.sched_getaffinity(0)
        one = {max(every)}
        ours = partial(read, folder, schema, first_batch)
        clock = measure.in_turn(
            {
                "ours": partial(side, "ours", one, ours),
                "theirs": partial(side, "theirs", one, partial(scan, folder, schema, use_threads=False)),
                "ours_all_cores": partial(side, "ours_all_cores", every, ours),
                "theirs_all_cores": partial(
                    side, "theirs_all_cores", every, partial(scan, folder, schema, use_threads=True)
                ),
            },
            asked.repeats,
        )
        os.sched_setaffinity(0, every)
    return measure.report(
        "reader",
        {
            "cpu": measure.ratio(measure.of_each(cpu["theirs"], cpu["ours"]), MUST, AIM),
            "clock": measure.ratio(
                measure.of_each(clock["theirs_all_cores"], clock["ours_all_cores"]), MUST, AIM
            ),
        },
        free=measure.spread(measure.of_each(cpu["theirs_all_cores"], cpu["ours_all_cores"])),
        rows=asked.rows,
        row_groups=GROUPS,
        columns=len(column_names(schema, labels=True, keys=())),
        file_bytes=bytes_,
        batch=BATCH,
        lanes=LANES,
        rows_per_cpu_s={name: measure.spread([asked.rows / each for each in cpu[name]]) for name in cpu},
        rows_per_s={name: measure.spread([asked.rows / each for each in clock[name]]) for name in clock},
        first_batch_s=measure.spread(first_batch),
        peak_bytes=peak,
    )


def make_schema() -> Schema:
    section = {
        "scenario": {"column": "country", "values": SCENARIOS, "as_feature": True},
        "features": {
            "user": {"kind": "id", "rows": USERS},
            "item": {"kind": "id", "rows": ITEMS},
            **{f"id{number}": {"kind": "id", "rows": rows} for number, rows in enumerate(OTHERS)},
            "history": {"kind": "id_list", "table": "item"},
            **{f"number{number}": {"kind": "number"} for number in range(NUMBERS)},
        },
        "tasks": {f"label{number}": {"kind": "binary"} for number in range(LABELS)},
        "weight": "weight",
    }
    return build_schema(SchemaSection.model_validate(section), ModelSection())


def write(folder: Path, rows: int) -> int:
    """`rows` rows in `GROUPS` row groups; how many bytes the files have."""
    ends = [number * rows // GROUPS for number in range(GROUPS + 1)]
    for file in range(FILES):
        of_file = range(file * GROUPS // FILES, (file + 1) * GROUPS // FILES)
        schema = _table(0, 1).schema
        with pq.ParquetWriter(folder / f"part-{file}.parquet", schema) as writer:
            for group in of_file:
                writer.write_table(_table(group, ends[group + 1] - ends[group]))
    return sum(each.stat().st_size for each in folder.iterdir())


def _table(group: int, rows: int) -> pa.Table:
    """One row group. A few users and items are met often, most seldom."""
    draw = np.random.default_rng(group)

    def ids(most: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return (most * draw.random(size) ** 2).astype(np.int64)

    lengths = draw.integers(0, LONGEST, rows, endpoint=True)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    spread = 0x5851F42D4C957
    """Odd: makes sparse ids of the numbers from 0 on."""
    columns: dict[str, Any] = {
        "country": pa.array(SCENARIOS).take(pa.array(draw.integers(0, len(SCENARIOS), rows))),
        "user": ids(USERS, rows) * spread,
        "item": ids(ITEMS, rows) * spread,
        **{f"id{number}": ids(most, rows) for number, most in enumerate(OTHERS)},
        "history": pa.ListArray.from_arrays(ends, ids(ITEMS, int(ends[-1])) * spread),
        **{f"number{number}": draw.standard_normal(rows, np.float32) for number in range(NUMBERS)},
        **{f"label{number}": draw.integers(0, 1, rows, np.int8, endpoint=True) for number in range(LABELS)},
        "weight": draw.random(rows, np.float32),
    }
    return pa.table(columns)


def read(folder: str, schema: Schema, first_batch: list[float]) -> int:
    """An epoch as training reads it; its rows. Adds the seconds to the first batch."""
    began = time.perf_counter()
    rows = 0
    with Reader(
        Dataset.open(folder, schema.columns()),
        schema,
        batch_size=BATCH,
        lanes=LANES,
        window=WINDOW,
        shuffle=True,
        seed=1,
        position=Position.start(LANES),
        epochs=1,
    ) as reader:
        for batch in reader:
            if not rows:
                first_batch.append(time.perf_counter() - began)
            rows += batch.num_rows
    return rows


def scan(folder: str, schema: Schema, use_threads: bool) -> int:
    """The same columns of the same files, batch after batch; their rows."""
    names = column_names(schema, labels=True, keys=())
    rows = 0
    for path in sorted(Path(folder).iterdir()):
        with pq.ParquetFile(path, read_dictionary=[schema.scenario_column]) as file:
            for batch in file.iter_batches(BATCH, columns=names, use_threads=use_threads):
                rows += batch.num_rows
    return rows


if __name__ == "__main__":
    main()
