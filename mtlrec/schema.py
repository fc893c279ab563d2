"""What the model and the reader know of the data: features, tables, tasks, scenarios, resolved from a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from mtlrec.job.model import ModelSection
from mtlrec.job.schema import (
    SCENARIO,
    BinaryTask,
    IdListFeature,
    Ids,
    NumberFeature,
    RegressionTask,
    SchemaSection,
    TaskFields,
    VectorFeature,
)
from mtlrec.job.schema import IdFeature as IdSection


@dataclass(frozen=True)
class IdFeature:
    """An id a row, a pooled list of ids, a bucketised number, or the scenario, looked up in its tables."""

    name: str
    column: str
    source: Literal["id", "id_list", "bucket", "scenario"]
    tables: tuple[str, ...]
    """At least one. All have the same rows for the same ids."""
    max_length: int | None = None
    boundaries: tuple[float, ...] = ()

    @property
    def table(self) -> str:
        """The first of its tables, for what all of them share: rows, ids."""
        return self.tables[0]


@dataclass(frozen=True)
class Lookup:
    """One embedding a row: columns [start, start + width) of the trunk's input."""

    feature: str
    table: str
    start: int
    width: int
    mean: bool = False
    """Of a list: the mean of its rows; else their sum."""


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
    """Of a vocabulary that has not been built yet, its reserved rows alone."""
    dim: int
    ids: Ids
    pooling: Literal["sum", "mean"]
    id_space: str
    features: tuple[str, ...]
    min_count: int = 1
    reserved: int = 0
    """Rows for ids that a vocabulary does not know; 0 for other tables."""


@dataclass(frozen=True)
class Task:
    name: str
    kind: Literal["binary", "regression", "pairwise"]
    label: str
    weight: float
    given: str | None = None
    normalise: Literal["valid", "batch"] = "valid"
    label_smoothing: float = 0.0
    prior: float | None = None
    """binary: what the output's bias starts from."""
    mean: float = 0.0
    std: float = 1.0
    """regression: the model's output times std, plus mean, is the prediction."""


@dataclass(frozen=True)
class Column:
    """A Parquet column that is read, and what it must hold."""

    name: str
    holds: Literal["id", "id_list", "number", "vector", "label", "weight", "scenario", "anything"]
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
    weight_column: str | None = None

    @cached_property
    def lookups(self) -> tuple[Lookup, ...]:
        """Every embedding that a row looks up, in the order of the trunk's input."""
        found: list[Lookup] = []
        start = 0
        for feature in self.id_features:
            for name in feature.tables:
                table = self.table_of[name]
                mean = feature.source == "id_list" and table.pooling == "mean"
                found.append(Lookup(feature.name, name, start, table.dim, mean))
                start += found[-1].width
        return tuple(found)

    @property
    def embedding_width(self) -> int:
        """Columns of the trunk's input that are embeddings; they come first."""
        return sum(lookup.width for lookup in self.lookups)

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
        if labels and self.weight_column is not None:
            found.append(Column(self.weight_column, "weight", "schema.weight"))
        if labels:
            found += [Column(task.label, "label", f"schema.tasks.{task.name}") for task in self.tasks]
        return tuple(found)

    def for_measuring(self) -> Schema:
        """As evaluation sees it: sample weights are for training, and measured data need not have them."""
        return replace(self, weight_column=None)

    def default_keys(self) -> list[str]:
        """The columns that say whom and what a prediction is about: user, item, scenario."""
        by_name = {feature.name: feature.column for feature in self.id_features}
        names = [by_name[name] for name in (self.user, self.item) if name is not None]
        return list(dict.fromkeys([*names, *([self.scenario_column] if self.scenario_column else [])]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """Hash of all that shapes the model's inputs and outputs; what only weighs losses is left out."""
        body = self.to_dict()
        del body["weight_column"]
        for task in body["tasks"]:
            for field in ("weight", "normalise", "label_smoothing", "prior"):
                del task[field]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def key_columns(names: Iterable[str]) -> list[Column]:
    """Columns that are carried along as they stand."""
    return [Column(name, "anything", "--keys") for name in names]


def build_schema(section: SchemaSection, model: ModelSection) -> Schema:
    """Resolve a job's schema section. Measured transforms must have been filled in before."""
    id_features: list[IdFeature] = []
    dense_features: list[DenseFeature] = []
    # Tables that are not described in the job, by name: their rows.
    implied: dict[str, int] = {}
    poolings: dict[str, Literal["sum", "mean"]] = {}
    width = 0
    if section.scenario is not None and section.scenario.as_feature:
        id_features.append(IdFeature(SCENARIO, section.scenario.column, "scenario", (SCENARIO,)))
        implied[SCENARIO] = len(section.scenario.values)
    for name, feature in section.features.items():
        column = feature.column or name
        if isinstance(feature, IdSection | IdListFeature):
            tables = tuple(section.tables_of(name))
            if isinstance(feature, IdListFeature):
                poolings[tables[0]] = feature.pooling
                id_features.append(IdFeature(name, column, "id_list", tables, max_length=feature.max_length))
            else:
                id_features.append(IdFeature(name, column, "id", tables))
        elif isinstance(feature, NumberFeature) and feature.transform == "bucketise":
            assert feature.boundaries is not None, "boundaries are measured before the schema is built"
            # Bucket 0 is for nulls, so there are two more buckets than boundaries.
            id_features.append(
                IdFeature(name, column, "bucket", (name,), boundaries=tuple(feature.boundaries))
            )
            implied[name] = len(feature.boundaries) + 2
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
    lookers: dict[str, list[str]] = {}
    for each in id_features:
        for table in each.tables:
            lookers.setdefault(table, []).append(each.name)
    # In the order in which features, shared ones in which their owners, stand in the job.
    order = [name for name in (SCENARIO, *section.features, *section.tables) if name in lookers]
    tables_ = tuple(
        Table(name, implied[name], model.dim, "identity", "sum", name, tuple(lookers[name]))
        if name in implied
        else _table(section, name, model, poolings.get(name, "sum"), lookers[name])
        for name in order
    )
    scenario = section.scenario
    return Schema(
        tuple(id_features),
        tuple(dense_features),
        tables_,
        tuple(_task(name, task) for name, task in section.tasks.items()),
        tuple(str(value) for value in scenario.values) if scenario else ("all",),
        scenario.column if scenario else None,
        section.user,
        section.item,
        section.weight,
    )


def _table(
    section: SchemaSection,
    name: str,
    model: ModelSection,
    pooling: Literal["sum", "mean"],
    features: list[str],
) -> Table:
    owner = section.table(name)
    reserved = (owner.reserved or 1) if owner.ids == "vocabulary" else 0
    return Table(
        name,
        owner.rows or reserved,
        owner.dim or model.dim,
        owner.ids or "hash",
        pooling,
        owner.id_space or name,
        tuple(features),
        owner.min_count or 1,
        reserved,
    )


def _task(name: str, section: TaskFields) -> Task:
    kind = section.kind  # type: ignore[attr-defined]  # every kind of task has one
    task = Task(name, kind, section.label or name, section.weight, section.given, section.normalise)
    if isinstance(section, BinaryTask):
        return replace(task, label_smoothing=section.label_smoothing, prior=section.prior)
    if isinstance(section, RegressionTask) and section.mean is not None and section.std is not None:
        return replace(task, mean=section.mean, std=section.std)
    return task
