"""Census-Income (KDD), as UCI publishes it -> Parquet and jobs that train on it; docs/census.md tells how.

N lines of a file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtlrec import storage
from mtlrec.data.ids import hash_ids
from mtlrec.data.prepare.census_job import JOBS, NUMBERS, YEARS, job_text
from mtlrec.data.prepare.folder import OutFolder, Progress, Watch, silent
from mtlrec.data.prepare.lines import Chunk, Lines
from mtlrec.job.errors import InputError

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
_SHARDS = {"train": 4, "valid": 2, "test": 2}


def prepare_census(
    source: str, out: str, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Read both files in the folder `source`; write the splits, categories.json and the jobs to `out`.

    Returns {"out": URL, "rows": {split: rows}}. Nothing is written before both files have been read. `out`
    must be empty, or left by a prepare that did not finish; with `force` what an earlier one wrote is
    replaced, and nothing else is touched. Raises InputError that names file and line where a file is not the
    published one: not gzip, cut short, another number of columns or rows, a label or number that is none.
    """
    show = progress or silent
    source, out = storage.make_absolute(source, "."), storage.make_absolute(out, ".")
    folder = OutFolder(out, tuple(_SHARDS), ("categories.json", *JOBS), force=force)
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
    folder.clear()
    watch = Watch("write", sum(table.num_rows for table in splits.values()), show)
    for split, table in splits.items():
        folder.write_parts(split, table, _SHARDS[split], watch)
    folder.write_file("categories.json", json.dumps(categories, indent=1, ensure_ascii=False))
    folder.write_jobs({file: job_text(file, sizes, numbers) for file in JOBS})
    return {"out": out, "rows": {split: table.num_rows for split, table in splits.items()}}


def _read(source: str, name: str, show: Progress) -> pa.Table:
    """One of the published files -> [N] float64 numbers, text dictionaries, int32 year and line number."""
    lines = _open(source, name)
    url, expected = lines.url, EXPECTED_ROWS[name]
    watch = Watch(f"read {storage.name(url)}", expected, show)
    chunks: list[pa.Table] = []
    count, rest = 0, iter(lines)
    while chunk := list(islice(rest, _CHUNK)):
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


def _open(source: str, name: str) -> Lines:
    """The file `name` in `source`, compressed or not."""
    for file in (f"{name}.gz", name):
        try:
            return Lines(storage.join(source, file))
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise InputError(f"{source}: no {name}.gz here, nor {name}; SRC is the folder with both published files")


def _parse(lines: Sequence[bytes], first: int, url: str) -> pa.Table:
    """Lines, numbered from `first` -> a table of the columns that are used."""
    chunk = Chunk(lines, first, url, COLUMNS, ",")
    for name, allowed in (*LABEL_VALUES.items(), ("year", tuple(map(str, YEARS)))):
        chunk.refuse(name, ~np.isin(chunk.texts(name), allowed), "one of " + ", ".join(allowed))
    numbers = {
        name: chunk.numbers(name, 0, np.inf, "a number from 0 on")
        for name in (*NUMBERS, "instance_weight", "year")
    }
    for name in CATEGORIES:
        chunk.refuse(name, np.array([not text for text in chunk.texts(name)]), "a value")
    return pa.table(
        {
            "line": pa.array(np.arange(first, first + len(lines), dtype=np.int32)),
            "year": pa.array(numbers["year"].astype(np.int32)),
            **{name: pa.array(numbers[name]) for name in NUMBERS},
            **{name: chunk.columns[name] for name in (*CATEGORIES, *LABEL_VALUES)},
        }
    )


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
