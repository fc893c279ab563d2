"""What the model and the reader know of the data: features, tables, tasks, scenarios, resolved from a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from mtlrec.job.model import ModelSection
from mtlrec.job.schema import IdFeature as IdSection
from mtlrec.job.schema import IdListFeature, NumberFeature, SchemaSection, VectorFeature

SCENARIO = "scenario"
"""Name of the feature and of the table that stand for the scenario."""


@dataclass(frozen=True)
class IdFeature:
    """One lookup a row: an id, a pooled list of ids, a bucketised number, or the scenario."""

    name: str
    column: str
    source: Literal["id", "id_list", "bucket", "scenario"]
    table: str
    max_length: int | None = None
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class DenseFeature:
    """`width` numbers of the dense input, from `start` on."""

    name: str
    column: str
    source: Literal["number", "vector"]
    transform: Literal["none", "log1p", "standardise"]
    mean: float
    std: float
    start: int
    width: int


@dataclass(frozen=True)
class Table:
    """An embedding table, rows x dim, and the id features that look it up."""

    name: str
    rows: int
    dim: int
    ids: Literal["hash", "identity"]
    pooling: Literal["sum", "mean"]
    id_space: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    name: str
    kind: Literal["binary", "regression"]
    label: str
    weight: float


@dataclass(frozen=True)
class Column:
    """A Parquet column that is read, and what it must hold."""

    name: str
    holds: Literal["id", "id_list", "number", "vector", "label", "scenario", "anything"]
    where: str
    """The job's field that asks for it, for messages."""
    identity: bool = False
    """The ids are rows of a table, and so must be integers."""


@dataclass(frozen=True)
class Schema:
    """The job's schema section with every default filled in. Order of every tuple is the order of the job."""

    id_features: tuple[IdFeature, ...]
    dense_features: tuple[DenseFeature, ...]
    tables: tuple[Table, ...]
    tasks: tuple[Task, ...]
    scenarios: tuple[str, ...]
    """Names in the order of the scenario index; a job without scenarios has one, named "all"."""
    scenario_column: str | None
    user: str | None
    item: str | None

    @property
    def dense_width(self) -> int:
        return sum(feature.width for feature in self.dense_features)

    @property
    def has_scenarios(self) -> bool:
        return self.scenario_column is not None

    @cached_property
    def table_of(self) -> dict[str, Table]:
        return {table.name: table for table in self.tables}

    def columns(self, labels: bool = True) -> tuple[Column, ...]:
        """Every column that has to be read; `labels=False` for prediction, where labels need not exist."""
        found = [
            Column(
                f.column,
                "number" if f.source == "bucket" else f.source,
                f"schema.features.{f.name}",
                f.source != "bucket" and self.table_of[f.table].ids == "identity",
            )
            for f in self.id_features
            if f.source != "scenario"
        ]
        found += [Column(f.column, f.source, f"schema.features.{f.name}") for f in self.dense_features]
        if self.scenario_column is not None:
            found.append(Column(self.scenario_column, "scenario", "schema.scenario"))
        if labels:
            found += [Column(task.label, "label", f"schema.tasks.{task.name}") for task in self.tasks]
        return tuple(found)

    def default_keys(self) -> list[str]:
        """The columns that say whom and what a prediction is about: user, item, scenario."""
        by_name = {feature.name: feature.column for feature in self.id_features}
        names = [by_name[name] for name in (self.user, self.item) if name is not None]
        return list(dict.fromkeys([*names, *([self.scenario_column] if self.scenario_column else [])]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """Hash of all that shapes the model's inputs and outputs; weights of tasks' losses are left out."""
        body = self.to_dict()
        for task in body["tasks"]:
            del task["weight"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def key_columns(names: Iterable[str]) -> list[Column]:
    """Columns that are carried along as they stand."""
    return [Column(name, "anything", "--keys") for name in names]


def build_schema(section: SchemaSection, model: ModelSection) -> Schema:
    """Resolve a job's schema section. Measured transforms must have been filled in before."""
    id_features: list[IdFeature] = []
    dense_features: list[DenseFeature] = []
    owners: dict[str, tuple[int, Literal["hash", "identity"], str]] = {}
    poolings: dict[str, Literal["sum", "mean"]] = {}
    width = 0
    if section.scenario is not None and section.scenario.as_feature:
        id_features.append(IdFeature(SCENARIO, section.scenario.column, "scenario", SCENARIO))
        owners[SCENARIO] = (len(section.scenario.values), "identity", SCENARIO)
    for name, feature in section.features.items():
        column = feature.column or name
        if isinstance(feature, IdSection | IdListFeature):
            table = feature.table or name
            if table == name:
                assert feature.rows is not None
                owners[name] = (feature.rows, feature.ids or "hash", feature.id_space or name)
            if isinstance(feature, IdListFeature):
                poolings[table] = feature.pooling
                id_features.append(IdFeature(name, column, "id_list", table, max_length=feature.max_length))
            else:
                id_features.append(IdFeature(name, column, "id", table))
        elif isinstance(feature, NumberFeature) and feature.transform == "bucketise":
            assert feature.boundaries is not None, "boundaries are measured before the schema is built"
            # Bucket 0 is for nulls, so there are two more buckets than boundaries.
            id_features.append(IdFeature(name, column, "bucket", name, boundaries=tuple(feature.boundaries)))
            owners[name] = (len(feature.boundaries) + 2, "identity", name)
        elif isinstance(feature, NumberFeature):
            assert feature.transform != "bucketise"
            standardised = feature.transform == "standardise"
            assert not standardised or feature.mean is not None, "mean and std are measured before"
            mean, std = (feature.mean or 0.0, feature.std or 1.0) if standardised else (0.0, 1.0)
            dense_features.append(
                DenseFeature(name, column, "number", feature.transform, mean, std, width, 1)
            )
            width += 1
        else:
            assert isinstance(feature, VectorFeature)
            dense_features.append(DenseFeature(name, column, "vector", "none", 0.0, 1.0, width, feature.size))
            width += feature.size
    tables = tuple(
        Table(
            name,
            rows,
            model.dim,
            ids,
            poolings.get(name, "sum"),
            id_space,
            tuple(f.name for f in id_features if f.table == name),
        )
        for name, (rows, ids, id_space) in owners.items()
    )
    tasks = tuple(Task(n, task.kind, task.label or n, task.weight) for n, task in section.tasks.items())
    scenario = section.scenario
    return Schema(
        tuple(id_features),
        tuple(dense_features),
        tables,
        tasks,
        tuple(str(value) for value in scenario.values) if scenario else ("all",),
        scenario.column if scenario else None,
        section.user,
        section.item,
    )
