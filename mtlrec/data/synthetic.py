"""`mtlrec synth`: Parquet shards of an invented population, the best possible score, and a job to train.

B rows of a row group.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtlrec import storage
from mtlrec.data.population import (
    CAMPAIGNS,
    CATEGORIES,
    CITIES,
    DEVICES,
    HOURS,
    LONGEST_HISTORY,
    SIGNALS,
    Block,
    Population,
)
from mtlrec.job.errors import InputError
from mtlrec.job.job import parse_job
from mtlrec.metrics.metrics import Metrics

Progress = Callable[[dict[str, Any]], None]

SPLITS = ("train", "valid", "test")
TASKS = (("click", "binary"), ("buy", "binary"), ("rating", "regression"))
_OWN = {*SPLITS, "job.yaml"}
_GROUP_ROWS = 32_768
"""At most, of a row group: what is held in memory while it is made."""
_GROUPS = 4
"""At least, of a shard."""
_LIMITS = {
    "rows": (1, 10**12),
    "users": (1, 2**31),
    "items": (1, 2**31),
    "scenarios": (1, 1_000),
    "files": (1, 100_000),
    "seed": (0, 2**63 - 1),
}

_LARGE: dict[str, Any] = {
    "batch_size": 4096,
    "dim": 4,
    "category_dim": 8,
    "table_init": 0.01,
    "backbone": "kind: ple, shared_experts: 2, task_experts: 1, hidden: [128, 64], scenario_gates: true",
    "embedding_l2": 0.001,
    "rating_weight": 0.05,
    "lr": 0.004,
    "schedule": ", schedule: {{decay: linear, decay_steps: {steps}, floor: 0.05}}",
}
"""What the ready job says from a million rows on."""
_SMALL: dict[str, Any] = {
    "batch_size": 1024,
    "dim": 16,
    "category_dim": 16,
    "table_init": 0.05,
    "backbone": "kind: mmoe, experts: 4, hidden: [128, 64]",
    "embedding_l2": 0.0,
    "rating_weight": 0.01,
    "lr": 0.002,
    "schedule": "",
}
"""Below, where it closes more of the distance to the ideal (docs/synthetic.md)."""

_MARK = "mtlrec synth"
"""Stands in the first line of a job that a synth wrote."""
_JOB = """\
# Data with a known answer, made by: mtlrec synth OUT {options}
#   mtlrec train job.yaml                                (from this folder)
#   mtlrec evaluate runs/synthetic --data test
# About {minutes} on 2 cores. Expected click AUC on valid: {expected}; of the true probabilities: {ideal}.
# docs/synthetic.md says what the columns mean. Relative paths start at this file's folder.
name: synthetic
seed: 0
schema:
  scenario: {{column: scenario, values: [{scenarios}]}}
  user: user_id
  item: item_id
  features:
    # Whom and what takes several factors; a context only adds to the logit.
    user_id: {{kind: id, ids: identity, rows: {users}, dim: 16}}
    item_id: {{kind: id, ids: identity, rows: {items}, dim: 16}}
    category: {{kind: id, ids: identity, rows: {categories}, dim: {category_dim}}}
    hour: {{kind: id, ids: identity, rows: {hours}}}
    device: {{kind: id, rows: 256}}
    city: {{kind: id, rows: {city_rows}}}
    campaign: {{kind: id, rows: {campaign_rows}}}
    # Looks up the items' own table, so that what is learnt of an item counts in every history.
    history: {{kind: id_list, table: item_id, pooling: mean, max_length: {longest}}}
    price: {{kind: number, transform: log1p}}
    recency: {{kind: number, transform: standardise}}
    age: {{kind: number, transform: bucketise, boundaries: [22, 26, 30, 35, 40, 45, 50, 55, 60, 65, 70]}}
    signals: {{kind: vector, size: {signals}}}
  tasks:
    # A loss is the mean over the task's own labels, and few rows have a buy or a rating: a weight of 1 would
    # let each of them pull the tables many times as hard as a click does.
    click: {{kind: binary}}
    buy: {{kind: binary, weight: 0.1}}
    rating: {{kind: regression, weight: {rating_weight}}}
data:
  train: train
  eval: valid
  batch_size: {batch_size}
model:
  dim: {dim}
  table_init: {table_init}
  backbone: {{{backbone}}}
  tower: {{hidden: [32]}}
objective:
  embedding_l2: {embedding_l2}
optimizer:
  tables: {{kind: rowwise_adagrad, lr: 0.2}}
  dense: {{kind: adam, lr: {lr}{schedule}}}
run:
  storage: runs
  workers: 2
  epochs: {epochs}
"""


def synthesise(
    out: str,
    *,
    rows: int,
    users: int,
    items: int,
    scenarios: int,
    files: int,
    seed: int,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write train/, valid/, test/ and job.yaml below the folder or URL `out`; a pure function of the numbers.

    `rows`: of train, in `files` shards; valid and test have a tenth of both (`split_sizes`). Beside each
    split's shards lies `_ideal.json`: the metrics of the true probabilities on its rows, as `Metrics.result`.
    Returns {"out": URL, "rows": {split: rows}, "files": {split: shards}, "ideal": {split: metrics}}. Memory
    does not grow with the rows. InputError for a number out of range, or where `out` holds anything but what
    a synth left unfinished; with `force` a finished one is replaced too, and other files beside it stay.
    """
    numbers = {
        "rows": rows,
        "users": users,
        "items": items,
        "scenarios": scenarios,
        "files": files,
        "seed": seed,
    }
    for name, (least, most) in _LIMITS.items():
        if not least <= numbers[name] <= most:
            raise InputError(f"--{name}: {numbers[name]} is out of range; use {least} to {most}")
    if files > rows:
        raise InputError(f"--files: {files} is more than --rows ({rows}); every shard needs a row")
    out = storage.make_absolute(out, ".")
    _clear(out, force)
    population = Population(users, items, scenarios, seed)
    sizes = split_sizes(rows, files)
    watch = _Watch(sum(size for size, _ in sizes.values()), progress)
    ideals = {}
    for split, (split_rows, shards) in sizes.items():
        ideal = Metrics([f"s{scenario}" for scenario in range(scenarios)], TASKS)
        for shard in range(shards):
            groups = _group_sizes(split_rows * (shard + 1) // shards - split_rows * shard // shards)
            url = storage.join(out, split, f"part-{shard:05d}.parquet")
            _write_shard(url, population, split, shard, groups, ideal, watch)
        ideals[split] = ideal.result()
        text = json.dumps(ideals[split], indent=1)
        storage.write(storage.join(out, split, "_ideal.json"), text.encode())
    url = storage.join(out, "job.yaml")
    text = _job_text(**numbers, ideal=ideals["valid"])
    parse_job(text, url)
    # Last: where the job is, the data are complete.
    storage.write(url, text.encode())
    return {
        "out": out,
        "rows": {split: size for split, (size, _) in sizes.items()},
        "files": {split: shards for split, (_, shards) in sizes.items()},
        "ideal": ideals,
    }


def split_sizes(rows: int, files: int) -> dict[str, tuple[int, int]]:
    """Split -> (rows, shards). Valid and test: a tenth, but at least 1,000 rows, or `rows` where fewer."""
    held_out = max(rows // 10, min(rows, 1_000))
    shards = min(held_out, -(-files // 10))
    return {"train": (rows, files), "valid": (held_out, shards), "test": (held_out, shards)}


def _group_sizes(rows: int) -> list[int]:
    """Rows of each row group of a shard."""
    groups = max(-(-rows // _GROUP_ROWS), min(_GROUPS, rows))
    return [rows * (group + 1) // groups - rows * group // groups for group in range(groups)]


def _clear(out: str, force: bool) -> None:
    """Leave nothing of an earlier synth in `out`; InputError where there is anything that may not go."""
    job = storage.join(out, "job.yaml")
    there = _entries(out)
    if "job.yaml" in there:
        if not force:
            raise InputError(
                f"{out}: already holds a job.yaml; name a new folder, or replace it with --force"
            )
        if _MARK not in storage.read_text(job).partition("\n")[0]:
            raise InputError(f"{job}: not written by mtlrec synth, so --force leaves it; name a new folder")
    foreign = sorted(there - _OWN) if not force else []
    foreign += [
        f"{split}/{file.path}"
        for split in SPLITS
        if split in there
        for file in storage.list_files(storage.join(out, split))
        if not (file.path.startswith("part-") and file.path.endswith(".parquet"))
        and file.path != "_ideal.json"
    ]
    if foreign:
        raise InputError(f"{out}: {foreign[0]} is not of mtlrec synth; move it away, or name a new folder")
    # The job goes first: without it nobody takes the rest for whole.
    storage.remove(job)
    for split in SPLITS:
        storage.remove_tree(storage.join(out, split))


def _entries(out: str) -> set[str]:
    """Names directly below `out`."""
    path = storage.local_path(out)
    if path is None:
        return {file.path.partition("/")[0] for file in storage.list_files(out)}
    try:
        return set(os.listdir(path))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"{out}: cannot be used as a folder: {error.strerror}; name a new one") from None


def _write_shard(
    url: str,
    population: Population,
    split: str,
    shard: int,
    groups: list[int],
    ideal: Metrics,
    watch: _Watch,
) -> None:
    """One Parquet file of the given row groups, whole or not at all."""
    schema = _arrow_schema()
    # Ids that hardly repeat and floats gain nothing from dictionaries, which are slow to build.
    repeating = ["category", "hour", "device", "city", "age", "scenario", "click", "buy", "rating"]
    with (
        storage.write_stream(url) as stream,
        pq.ParquetWriter(stream, schema, compression="snappy", use_dictionary=repeating) as writer,
    ):
        for group, rows in enumerate(groups):
            block = population.block(split, shard, group, rows=rows)
            ideal.update(block.truth, block.labels, block.valid, block.scenario)
            writer.write_table(_table(block, population.scenarios, schema), row_group_size=rows)
            watch.add(rows)


def _arrow_schema() -> pa.Schema:
    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("user_id", pa.int64()),
            ("item_id", pa.int64()),
            ("category", pa.int32()),
            ("hour", pa.int32()),
            ("device", text),
            ("city", text),
            ("campaign", pa.int64()),
            ("history", pa.list_(pa.int64())),
            ("price", pa.float32()),
            ("recency", pa.float32()),
            ("age", pa.int32()),
            ("signals", pa.list_(pa.float32(), SIGNALS)),
            ("scenario", text),
            ("click", pa.int8()),
            ("buy", pa.int8()),
            ("rating", pa.float32()),
        ]
    )


def _table(block: Block, scenarios: int, schema: pa.Schema) -> pa.Table:
    """B rows as they are stored, nulls where the block says that there is nothing."""
    offsets = np.concatenate(([0], block.history_ends)).astype(np.int32)
    starts = pa.array(offsets, mask=np.append(~block.has_history, False))
    columns = [
        block.user,
        block.item,
        block.category,
        block.hour,
        _texts(block.device, list(DEVICES)),
        _texts(block.city, [f"city-{city:03d}" for city in range(CITIES)]),
        block.campaign,
        pa.ListArray.from_arrays(starts, pa.array(block.history)),
        pa.array(block.price, mask=~block.has_price),
        block.recency,
        pa.array(block.age, mask=~block.has_age),
        pa.FixedSizeListArray.from_arrays(pa.array(block.signals.reshape(-1)), SIGNALS),
        _texts(block.scenario, [f"s{scenario}" for scenario in range(scenarios)]),
    ]
    for task, kind in enumerate((np.int8, np.int8, np.float32)):
        columns.append(pa.array(block.labels[:, task].astype(kind), mask=~block.valid[:, task]))
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema)


def _texts(index: NDArray[np.integer[Any]], names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(index.astype(np.int32), pa.array(names))


class _Watch:
    """Counts the rows that are written, and says so."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._start = 0, time.monotonic()

    def add(self, rows: int) -> None:
        self._done += rows
        if self._progress is None:
            return
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        event = {
            "kind": "progress",
            "what": "write",
            "unit": "rows",
            "done": self._done,
            "total": self._total,
        }
        left = (self._total - self._done) / rate
        self._progress({**event, "rows_per_s": rate, "seconds_left": left})


def _job_text(
    *,
    rows: int,
    users: int,
    items: int,
    scenarios: int,
    files: int,
    seed: int,
    ideal: dict[str, Any],
) -> str:
    """YAML of the ready job: sizes of the tables, and steps that suit the number of rows.

    `ideal`: the metrics of the true probabilities on valid, as `Metrics.result`.
    """
    options = {
        "rows": rows,
        "users": users,
        "items": items,
        "scenarios": scenarios,
        "files": files,
        "seed": seed,
    }
    # With few rows a user, a second look at the same rows is learnt by heart.
    epochs = 1 if rows >= 10_000_000 or 200_000 <= rows < 50 * users else 2
    recipe = _LARGE if rows >= 1_000_000 else _SMALL
    steps = epochs * -(-rows // recipe["batch_size"])
    recipe = {**recipe, "schedule": recipe["schedule"].format(steps=steps)}
    best = ideal["all"]["click"]["auc"]
    return _JOB.format(
        options=" ".join(f"--{name} {value}" for name, value in options.items()),
        minutes=_minutes(rows * epochs),
        ideal="undefined" if best is None else f"{best:.4f}",
        expected=_expected(rows, users, best),
        scenarios=", ".join(f"s{scenario}" for scenario in range(scenarios)),
        users=users,
        items=items,
        categories=CATEGORIES,
        hours=HOURS,
        # Eight rows an id: nine in ten ids have a row to themselves.
        city_rows=CITIES * 8,
        campaign_rows=CAMPAIGNS * 8,
        longest=LONGEST_HISTORY,
        signals=SIGNALS,
        epochs=epochs,
        **recipe,
    )


def _minutes(samples: int) -> str:
    """Start of Ray and the workers, and then what a worker on a core trains."""
    minutes = 1 + samples / 30_000 / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def _expected(rows: int, users: int, ideal: float | None) -> str:
    """Where runs of 20, 80 and 100 rows a user came on the way from 0.5 to the ideal (docs/synthetic.md)."""
    if ideal is None or rows < 200_000:
        return "more than 0.5"
    if rows >= 80 * users:
        share = 0.85 if rows >= 2_000_000 and rows >= 100 * users else 0.75
    else:
        share = 0.55 if rows >= 20 * users else 0.4
    return f"{0.5 + share * (ideal - 0.5):.2f}"
