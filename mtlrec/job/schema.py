"""Section `schema`: scenario, user, item, features, tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mtlrec.job.section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
"""Tables, features and tasks name files and tensors, so their names are plain identifiers."""

SCENARIO = "scenario"
"""Name of the feature and of the table that stand for the scenario."""

ScenarioValue = str | int
"""YAML reads a bare no, yes, on, off as a boolean, which is refused here: quote them."""


class ScenarioSection(Section):
    """Where each row comes from: a country, a tab, a domain."""

    column: str
    """Parquet column, string or integer."""
    values: list[ScenarioValue] = Field(min_length=1)
    """Every value that may occur, in the order of the scenario index. Another value is an error."""
    as_feature: bool = True
    """Also feed the scenario to the trunk, as an embedding of its own table `scenario`."""

    @field_validator("values")
    @classmethod
    def _distinct(cls, values: list[ScenarioValue]) -> list[ScenarioValue]:
        if len({str(value) for value in values}) < len(values):
            raise ValueError("the values must be distinct")
        if "all" in {str(value) for value in values}:
            raise ValueError("'all' names the total over scenarios in every report and cannot be a scenario")
        return values


Ids = Literal["hash", "identity", "vocabulary"]


class TableFields(Section):
    """What an embedding table is."""

    rows: int | None = Field(default=None, ge=1, le=2**40)
    """Rows. Of a vocabulary the most there may be, its most frequent ids; null: as many as the data has."""
    ids: Ids | None = None
    """hash (the default): stable 64-bit hash modulo rows. identity: the id is the row, 0 <= id < rows.
    vocabulary: each id of the training data has a row of its own."""
    id_space: str | None = None
    """What the raw ids mean (ASINs, our users): only tables of one space match. Null: the table's name."""
    dim: int | None = Field(default=None, ge=4, le=4096, multiple_of=4)
    """Columns of the table; null: model.dim."""
    min_count: int | None = Field(default=None, ge=1)
    """vocabulary: ids that the training data has less often are unknown (default 1)."""
    reserved: int | None = Field(default=None, ge=1, le=2**20)
    """vocabulary: so many rows, the first ones, are for unknown ids, chosen by their hash (default 1)."""


class TableSection(TableFields):
    """A table of its own name, for id features that look up several (`tables: [...]`)."""


class IdFeature(TableFields):
    """One id a row. A null id looks nothing up: its embedding is zero."""

    kind: Literal["id"]
    column: str | None = None
    """Parquet column; null: the feature's name."""
    table: Name | None = None
    """The feature whose table this one shares; null: a table of its own, described here."""
    tables: list[Name] | None = Field(default=None, min_length=1)
    """Tables of `schema.tables` that the id looks up, each giving an embedding, in place of its own."""


class IdListFeature(TableFields):
    """A list of ids a row, pooled into one embedding. A null list is empty; null elements are dropped."""

    kind: Literal["id_list"]
    column: str | None = None
    table: Name | None = None
    """The feature, or the table of `schema.tables`, whose rows the list looks up."""
    pooling: Literal["sum", "mean"] = "mean"
    """How the embeddings of one list become one."""
    max_length: int | None = Field(default=None, ge=1)
    """Keep the last so many ids of a list; null: all."""


class NumberFeature(Section):
    """One number a row. A null or NaN is 0 after the transform, and has a bucket of its own if bucketised."""

    kind: Literal["number"]
    column: str | None = None
    transform: Literal["none", "log1p", "standardise", "bucketise"] = "none"
    """log1p: sign(x) log(1 + |x|). standardise: (x - mean) / std. bucketise: an embedding for each bucket."""
    mean: float | None = None
    """standardise: null is measured on the training data when the run starts, and kept with the run."""
    std: float | None = Field(default=None, gt=0)
    boundaries: list[float] | None = Field(default=None, min_length=1)
    """bucketise: increasing; bucket i holds boundaries[i-1] <= x < boundaries[i]. Null: measured."""
    buckets: int | None = Field(default=None, ge=2, le=65536)
    """bucketise without boundaries: how many quantile buckets (fewer where values repeat). Kept beside the
    boundaries once they are measured."""

    @model_validator(mode="after")
    def _parameters_fit(self) -> NumberFeature:
        if self.transform != "standardise" and (self.mean is not None or self.std is not None):
            raise ValueError("mean and std belong to transform: standardise")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        bucketised = self.transform == "bucketise"
        if not bucketised and (self.boundaries is not None or self.buckets is not None):
            raise ValueError("boundaries and buckets belong to transform: bucketise")
        if bucketised and self.boundaries is None and self.buckets is None:
            raise ValueError("bucketise needs boundaries, or buckets to measure them")
        if self.boundaries is not None and any(
            high <= low for low, high in zip(self.boundaries, self.boundaries[1:], strict=False)
        ):
            raise ValueError("boundaries: they must increase")
        return self


class VectorFeature(Section):
    """A fixed number of numbers a row (list or fixed-size list column). A null vector or element is zero."""

    kind: Literal["vector"]
    column: str | None = None
    size: int = Field(ge=1, le=65536)
    """Numbers in each vector; a row with another count is an error."""


FeatureSection = Annotated[
    IdFeature | IdListFeature | NumberFeature | VectorFeature, Field(discriminator="kind")
]


class TaskFields(Section):
    """What every task has."""

    label: str | None = None
    """Parquet column; null: the task's name."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of this task's loss."""
    given: Name | None = None
    """A binary task: only rows whose label of it is 1 train and measure this one. Null: every row."""
    normalise: Literal["valid", "batch"] = "valid"
    """Divide the summed loss by the sample weight of the rows that have the label, or of all rows."""


class BinaryTask(TaskFields):
    """The label is 0 or 1 (or boolean); the model learns its probability. Null: the row has none."""

    kind: Literal["binary"]
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Train towards y (1 - e) + e / 2 instead of y (Szegedy et al. 2016)."""
    prior: float | None = Field(default=None, gt=0, lt=1)
    """Share of positives that the output starts from; null is measured on the training data."""


class RegressionTask(TaskFields):
    """The label is a finite number; the model learns its mean (squared error of standardised labels)."""

    kind: Literal["regression"]
    mean: float | None = None
    """The labels' mean and deviation over the training data, by which they are standardised and predictions
    undone; null is measured when the run starts, and kept with the run."""
    std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _both_or_neither(self) -> RegressionTask:
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        return self


class PairwiseTask(TaskFields):
    """The label is 0 or 1; a positive row shall score above the items that `data.negatives` draws for it.

    Rendle et al. 2009, BPR: logistic loss of the difference of scores. It learns an order, no probability.
    """

    kind: Literal["pairwise"]


TaskSection = Annotated[BinaryTask | RegressionTask | PairwiseTask, Field(discriminator="kind")]


class SchemaSection(Section):
    """What the columns of the data mean."""

    scenario: ScenarioSection | None = None
    """Null: one scenario."""
    user: Name | None = None
    """The feature that identifies the user: negatives avoid a user's positives, metrics are taken by user."""
    item: Name | None = None
    """The feature that identifies the item."""
    weight: str | None = None
    """Parquet column of each row's sample weight, a number from 0 on; null: every row counts alike."""
    tables: dict[Name, TableSection] = Field(default={})
    """Tables that are not some feature's own."""
    features: dict[Name, FeatureSection] = Field(min_length=1)
    tasks: dict[Name, TaskSection] = Field(min_length=1)

    @model_validator(mode="after")
    def _tables_fit(self) -> SchemaSection:
        for role, name in (("user", self.user), ("item", self.item)):
            if name is not None and not isinstance(self.features.get(name), IdFeature):
                raise ValueError(f"{role}: {name!r} must be one of the features of kind id")
        if self.scenario is not None and self.scenario.as_feature and SCENARIO in self.features:
            raise ValueError("features.scenario: this name is taken by the scenario; rename it")
        for name, table in self.tables.items():
            if name in self.features or name == SCENARIO:
                raise ValueError(f"tables.{name}: this name is taken by a feature; rename the table")
            _check_table(f"tables.{name}", table)
        poolings: dict[str, str] = {}
        used: set[str] = set()
        for name, feature in self.features.items():
            if not isinstance(feature, IdFeature | IdListFeature):
                continue
            where = f"features.{name}"
            looked_up = self.tables_of(name)
            used.update(looked_up)
            if looked_up == [name]:
                _check_table(where, feature)
            else:
                self._check_shared(where, feature, looked_up)
            if (
                isinstance(feature, IdListFeature)
                and poolings.setdefault(looked_up[0], feature.pooling) != feature.pooling
            ):
                raise ValueError(f"{where}.pooling: lists that share table {looked_up[0]!r} must pool alike")
        if unused := sorted(set(self.tables) - used):
            raise ValueError(f"tables.{unused[0]}: no feature looks it up; name it in a feature's tables")
        return self

    def tables_of(self, feature: str) -> list[str]:
        """Names of the tables that an id feature looks up."""
        section = self.features[feature]
        assert isinstance(section, IdFeature | IdListFeature)
        if isinstance(section, IdFeature) and section.tables is not None:
            return section.tables
        return [section.table or feature]

    def table(self, name: str) -> TableFields:
        """Where table `name` is described: in `tables`, or at the feature that owns it."""
        owner = self.tables.get(name) or self.features[name]
        assert isinstance(owner, TableFields)
        return owner

    def _check_shared(self, where: str, feature: IdFeature | IdListFeature, looked_up: list[str]) -> None:
        if isinstance(feature, IdFeature) and feature.tables is not None and feature.table is not None:
            raise ValueError(f"{where}: give table or tables, not both")
        if len(set(looked_up)) < len(looked_up):
            raise ValueError(f"{where}.tables: a table stands there twice")
        for table in looked_up:
            if table in self.tables:
                continue
            owner = self.features.get(table)
            if isinstance(feature, IdFeature) and feature.tables is not None:
                raise ValueError(f"{where}.tables: {table!r} is not one of schema.tables")
            if not isinstance(owner, IdFeature | IdListFeature) or self.tables_of(table) != [table]:
                raise ValueError(f"{where}.table: {table!r} is not a feature with a table of its own")
        if any(getattr(feature, field) is not None for field in TableFields.model_fields):
            fields = ", ".join(TableFields.model_fields)
            raise ValueError(f"{where}: {fields} are set where the table is, at {looked_up[0]}")
        first = self.table(looked_up[0])
        for other in looked_up[1:]:
            for field in ("rows", "ids", "min_count", "reserved"):
                if getattr(self.table(other), field) != getattr(first, field):
                    raise ValueError(
                        f"{where}.tables: {other} and {looked_up[0]} differ in {field}; an id has one row in "
                        "all tables that its feature looks up"
                    )

    @model_validator(mode="after")
    def _given_fits(self) -> SchemaSection:
        for name, task in self.tasks.items():
            seen, at = [name], task.given
            while at is not None:
                if not isinstance(self.tasks.get(at), BinaryTask):
                    raise ValueError(f"tasks.{seen[-1]}.given: {at!r} must be one of the binary tasks")
                if at in seen:
                    raise ValueError(f"tasks.{name}.given: {' -> '.join([*seen, at])} goes round in a circle")
                seen.append(at)
                at = self.tasks[at].given
        return self


def _check_table(where: str, table: TableFields) -> None:
    vocabulary = table.ids == "vocabulary"
    if table.rows is None and not vocabulary:
        raise ValueError(f"{where}.rows: the number of rows of its table is required")
    if not vocabulary and (table.min_count is not None or table.reserved is not None):
        raise ValueError(f"{where}: min_count and reserved belong to ids: vocabulary")
    if vocabulary and table.rows is not None and table.rows <= (table.reserved or 1):
        raise ValueError(f"{where}.rows: {table.rows} leaves no row beside the reserved ones")
