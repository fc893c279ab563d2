"""Epinions' ratings with helpfulness -> Parquet by time, with each row's past, and jobs; docs/epinions.md.

N ratings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mtlrec import storage
from mtlrec.data import column_types
from mtlrec.data.prepare.epinions_job import CATEGORIES, HISTORIES, JOBS, MEANS, job_text
from mtlrec.data.prepare.folder import OutFolder, Progress, Watch, silent
from mtlrec.job.errors import InputError

FILE = "epinions_ratings.parquet"
EXPECTED_ROWS = 922_267
RANGES = {
    "user_id": (1, 22_166),
    "item_id": (1, 296_277),
    "category_id": (CATEGORIES[0], CATEGORIES[-1]),
    "rating": (1, 5),
    "helpfulness": (1, 5),
    "time": (1, 11),
}
"""Column -> its lowest and highest value, integers."""
TRAIN_TIME, VALID_TIME, TEST_TIME = 3, 9, 10
"""The first step of train, of valid, which is the step before the test, and of the test.

Rows before train are no examples, only others' past: those of step 1 have none themselves, and a model
that learns from them is worse on valid (docs/epinions.md).
"""
LIKE, HELPFUL = 4, 3
"""The lowest rating and helpfulness that count as such."""
SMOOTHING = 5
"""Ratings at the general mean that every mean of a history starts with."""

_SHARDS = {"earlier": 4, "train": 4, "valid": 2, "test": 2}

Columns = dict[str, npt.NDArray[Any]]


def prepare_epinions(
    source: str, out: str, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Read epinions_ratings.parquet in the folder `source`; write the splits and the jobs to `out`.

    Returns {"out": URL, "rows": {split: rows}}. Nothing is written before the file has been read and checked.
    `out` must be empty, or left by a prepare that did not finish; with `force` what an earlier one wrote is
    replaced, and nothing else is touched. Raises InputError that names file, row (from 1) and column where
    the file is missing or not the published one: not Parquet, cut short, a column that is missing or of
    another type, another number of rows, a value that is null or out of its range.
    """
    show = progress or silent
    source, out = storage.make_absolute(source, "."), storage.make_absolute(out, ".")
    folder = OutFolder(out, tuple(_SHARDS), tuple(JOBS), force=force)
    published = _read(storage.join(source, FILE), show)
    time = published["time"]
    columns: dict[str, Any] = {name: pa.array(values) for name, values in published.items()}
    labels = {
        "like": (published["rating"] >= LIKE).astype(np.int8),
        "helpful": (published["helpfulness"] >= HELPFUL).astype(np.int8),
    }
    columns |= {name: pa.array(values) for name, values in labels.items()}
    meant = {name: {**published, **labels}[name] for name in MEANS}
    for name, keys in HISTORIES.items():
        past = history([published[key] for key in keys], time, meant, TEST_TIME)
        columns |= {f"{name}_{column}": values for column, values in past.items()}
    table = pa.table(columns)
    splits = {
        "earlier": table.filter(pa.array(time < TRAIN_TIME)),
        "train": table.filter(pa.array((time >= TRAIN_TIME) & (time < VALID_TIME))),
        "valid": table.filter(pa.array(time == VALID_TIME)),
        "test": table.filter(pa.array(time >= TEST_TIME)),
    }
    folder.clear()
    watch = Watch("write", table.num_rows, show)
    for split, rows in splits.items():
        folder.write_parts(split, rows, _SHARDS[split], watch)
    folder.write_jobs({file: job_text(file) for file in JOBS})
    return {"out": out, "rows": {split: rows.num_rows for split, rows in splits.items()}}


def history(
    keys: list[npt.NDArray[Any]],
    time: npt.NDArray[Any],
    values: Mapping[str, npt.NDArray[Any]],
    test_time: int,
) -> dict[str, pa.Array]:
    """What is known, before each row's time, of the rows with the same `keys`: columns `count`, `V_mean`.

    `keys`, `time` and `values` (by name) are integer arrays [N]. A row at time t sees the n rows with its
    keys of times below min(t, test_time), so that no row sees its own step, and none sees the test. count
    (int32) is n; V_mean (float32) is (sum of V over them + SMOOTHING * m) / (n + SMOOTHING), m the mean of V
    over all rows of those times; null where n is 0.
    """
    groups = np.zeros(len(time), np.int64)
    for key in keys:
        groups = np.unique(groups * (int(key.max()) + 1) + key, return_inverse=True)[1]
    count = np.zeros(groups.max() + 1, np.int64)
    sums = {name: np.zeros(len(count)) for name in values}
    seen = np.zeros(len(time), np.int32)
    means = {name: np.zeros(len(time), np.float32) for name in values}
    for step in np.unique(time):
        now = np.flatnonzero(time == step)
        group = groups[now]
        n, everyone = count[group], max(int(count.sum()), 1)
        seen[now] = n
        for name, total in sums.items():
            general = total.sum() / everyone
            means[name][now] = (total[group] + SMOOTHING * general) / (n + SMOOTHING)
        if step < test_time:
            count += np.bincount(group, minlength=len(count))
            for name, total in sums.items():
                # Whole numbers: the sums are exact in any order.
                total += np.bincount(group, values[name][now], minlength=len(count))
    return {
        "count": pa.array(seen),
        **{f"{name}_mean": pa.array(mean, mask=seen == 0) for name, mean in means.items()},
    }


def _read(url: str, show: Progress) -> Columns:
    """The published columns, int32 [N] each."""
    watch = Watch(f"read {FILE}", EXPECTED_ROWS, show)
    try:
        with (
            storage.open_parquet_input(url) as stream,
            pq.ParquetFile(stream, page_checksum_verification=True) as file,
        ):
            for name in RANGES:
                kind = column_types.find(file.schema_arrow, url, name, "of the published file").type
                if not pa.types.is_integer(kind):
                    raise InputError(f"{url}: column {name!r} has type {kind}; it holds integers")
            if file.metadata.num_rows != EXPECTED_ROWS:
                raise InputError(
                    f"{url}: ends after row {file.metadata.num_rows:,}; the published file has "
                    f"{EXPECTED_ROWS:,} rows: fetch it again"
                )
            table = file.read(columns=list(RANGES), use_threads=False)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{url}: no such file; SRC is the folder with {FILE}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: not Parquet, or corrupt or cut short ({error}); fetch it again") from None
    columns = {}
    for name, (low, high) in RANGES.items():
        column = table[name].combine_chunks()
        values = column.fill_null(low - 1).to_numpy(zero_copy_only=False)
        wrong = (values < low) | (values > high)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{url}: row {row + 1:,}, column {name}: {column[row].as_py()!r} is not a whole number "
                f"from {low} to {high:,}"
            )
        columns[name] = values.astype(np.int32)
    watch.add(table.num_rows)
    return columns
