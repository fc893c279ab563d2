"""Parquet data of users and items, its job's sections, and negatives drawn from it by plain loops."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtlrec.data.ids import hash_ids
from mtlrec.data.shards import Dataset
from mtlrec.job.job import NegativesSection
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import SchemaSection
from mtlrec.schema import Schema, build_schema

SCENARIOS = ["de", "fr", "uk"]
ITEM_SIDE = ["kind", "tags", "price", "level", "look"]
SECTION: dict[str, Any] = {
    "scenario": {"column": "country", "values": SCENARIOS},
    "user": "user",
    "item": "item",
    "features": {
        "history": {"kind": "id_list", "table": "item"},
        "kind": {"kind": "id", "rows": 50, "ids": "identity"},
        "age": {"kind": "number"},
        "tags": {"kind": "id_list", "rows": 1000, "ids": "identity"},
        "user": {"kind": "id", "rows": 100},
        "price": {"kind": "number", "transform": "log1p"},
        "level": {"kind": "number", "column": "price", "transform": "bucketise", "boundaries": [3.0, 9.0]},
        "item": {"kind": "id", "rows": 2**20},
        "look": {"kind": "vector", "size": 2},
    },
    "tasks": {
        "like": {"kind": "binary", "given": "click"},
        "click": {"kind": "binary"},
    },
}
SCHEMA: Schema = build_schema(SchemaSection.model_validate(SECTION), ModelSection())


def negatives(**changes: Any) -> NegativesSection:
    return NegativesSection.model_validate(
        {"per_positive": 3, "task": "click", "features": ITEM_SIDE, **changes}
    )


def make_table(num_rows: int, users: int = 12, items: int = 9, seed: int = 0) -> pa.Table:
    """Users who have met much of the little there is; an item's features differ from row to row."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, users, num_rows), random.integers(0, items, num_rows)
    user[random.random(num_rows) < 0.2] = 0  # one user has met everything
    lengths = random.integers(0, 3, num_rows)
    price = random.integers(0, 12, num_rows).astype(np.float64)
    return pa.table(
        {
            "country": random.choice(SCENARIOS, num_rows, p=[0.6, 0.3, 0.1]),
            "user": pa.array(user * 1000, mask=random.random(num_rows) < 0.05),
            "item": pa.array([f"i{n}" for n in item], mask=random.random(num_rows) < 0.05),
            "history": [[f"i{i}" for i in random.integers(0, items, n)] for n in lengths],
            "kind": pa.array(random.integers(0, 50, num_rows), mask=random.random(num_rows) < 0.1),
            "tags": [random.integers(0, 1000, n).tolist() for n in random.integers(0, 4, num_rows)],
            "price": pa.array(price, mask=random.random(num_rows) < 0.1),
            "age": random.integers(1, 90, num_rows),
            "look": random.normal(size=(num_rows, 2)).tolist(),
            "click": pa.array(random.random(num_rows) < 0.4, mask=random.random(num_rows) < 0.1),
            "like": pa.array(random.random(num_rows) < 0.5, mask=random.random(num_rows) < 0.1),
        }
    )  # fmt: skip


def write(folder: Path, table: pa.Table, group: int = 40, files: int = 3) -> Dataset:
    folder.mkdir(parents=True)
    for number in range(files):
        begin, end = (n * table.num_rows // files for n in (number, number + 1))
        pq.write_table(
            table.slice(begin, end - begin), folder / f"part-{number}.parquet", row_group_size=group
        )
    return Dataset.open(str(folder), SCHEMA.columns())


@cache
def hash_of(raw: int | str) -> int:
    return int(hash_ids(np.array([raw]) if isinstance(raw, int) else pa.array([raw]))[0])


def splitmix(value: int) -> int:
    """Steele, Lea, Flood 2014, in whole numbers."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@dataclass(eq=False)
class Plain:
    """What there is to draw from, in dicts and sets; an item is known by its hash."""

    met: dict[int, set[int]]
    """User -> items."""
    positives: list[Counter[int]]
    """By scenario: item -> rows."""
    first: list[dict[int, int]]
    """By scenario: item -> number of the first row."""

    @classmethod
    def of(cls, table: pa.Table, task: str = "click") -> Plain:
        plain = cls({}, [Counter() for _ in SCENARIOS], [{} for _ in SCENARIOS])
        for number, row in enumerate(table.to_pylist()):
            if row["item"] is None:
                continue
            scenario, item = SCENARIOS.index(row["country"]), hash_of(row["item"])
            plain.first[scenario].setdefault(item, number)
            if plain.is_positive(row, task):
                plain.met.setdefault(hash_of(row["user"]), set()).add(item)
                plain.positives[scenario][item] += 1
        return plain

    @staticmethod
    def is_positive(row: dict[str, Any], task: str) -> bool:
        labels = [row[task]] + ([row["click"]] if task == "like" else [])
        return all(label == 1 for label in labels) and None not in (row["user"], row["item"])

    @cache  # noqa: B019  # lives as long as its test
    def weights(self, scenario: int, distribution: str, exponent: float) -> dict[int, int]:
        """Item -> weight, in the order of the hashes."""
        items = sorted(self.first[scenario])
        if distribution == "uniform":
            return dict.fromkeys(items, 1)
        count = self.positives[scenario]
        bits = min(40, 62 - sum(map(len, self.first)).bit_length())
        most = max(count.values())
        return {i: round((count[i] / most) ** exponent * 2**bits) for i in items}

    def draw(
        self, section: NegativesSection, seed: int, step: int, row: int, user: int, scenario: int
    ) -> list[int | None]:
        """K items, or None."""
        text = f"negatives|{seed}|{step}".encode()
        key = splitmix(row ^ int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
        weights, met = self.weights(scenario, section.distribution, section.exponent), self.met[user]
        allowed = {item: weight for item, weight in weights.items() if item not in met}
        found: list[int | None] = []
        for j in range(section.per_positive):
            tries = [pick(weights, splitmix(key ^ (attempt << 32 | j))) for attempt in range(8)]
            tries = [item for item in tries if item not in met]
            found.append(tries[0] if tries else pick(allowed, splitmix(key ^ (8 << 32 | j))))
        return found


def pick(weights: dict[int, int], chance: int) -> int | None:
    place = chance * sum(weights.values()) >> 64
    for item, weight in weights.items():
        if place < weight:
            return item
        place -= weight
    return None
