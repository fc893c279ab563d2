"""Section `schema`: scenario, user, item, features, tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mtlrec.job.section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
"""Tables, features and tasks name files and tensors, so their names are plain identifiers."""

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


class IdFeature(Section):
    """One id a row. A null id looks nothing up: its embedding is zero."""

    kind: Literal["id"]
    column: str | None = None
    """Parquet column; null: the feature's name."""
    table: Name | None = None
    """The feature whose table this one shares; null: a table of its own."""
    rows: int | None = Field(default=None, ge=1, le=2**40)
    """Rows of its own table; required unless `table` names another feature."""
    ids: Literal["hash", "identity"] | None = None
    """hash (the default): stable 64-bit hash modulo rows. identity: the id is the row, 0 <= id < rows."""
    id_space: str | None = None
    """What the raw ids mean (ASINs, our users): only tables of one space match. Null: the table's name."""


class IdListFeature(Section):
    """A list of ids a row, pooled into one embedding. A null list is empty; null elements are dropped."""

    kind: Literal["id_list"]
    column: str | None = None
    table: Name | None = None
    rows: int | None = Field(default=None, ge=1, le=2**40)
    ids: Literal["hash", "identity"] | None = None
    id_space: str | None = None
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


class BinaryTask(Section):
    """The label is 0 or 1 (or boolean); the model learns its probability. Null: the row has none."""

    kind: Literal["binary"]
    label: str | None = None
    """Parquet column; null: the task's name."""
    weight: float = Field(default=1.0, gt=0)
    """Factor of this task's loss."""


class RegressionTask(Section):
    """The label is a finite number; the model learns its mean (squared error)."""

    kind: Literal["regression"]
    label: str | None = None
    weight: float = Field(default=1.0, gt=0)


TaskSection = Annotated[BinaryTask | RegressionTask, Field(discriminator="kind")]


class SchemaSection(Section):
    """What the columns of the data mean."""

    scenario: ScenarioSection | None = None
    """Null: one scenario."""
    user: Name | None = None
    """The feature that identifies the user (used where users are grouped)."""
    item: Name | None = None
    """The feature that identifies the item."""
    features: dict[Name, FeatureSection] = Field(min_length=1)
    tasks: dict[Name, TaskSection] = Field(min_length=1)

    @model_validator(mode="after")
    def _tables_fit(self) -> SchemaSection:
        for role, name in (("user", self.user), ("item", self.item)):
            if name is not None and not isinstance(self.features.get(name), IdFeature):
                raise ValueError(f"{role}: {name!r} must be one of the features of kind id")
        if self.scenario is not None and self.scenario.as_feature and "scenario" in self.features:
            raise ValueError("features.scenario: this name is taken by the scenario; rename it")
        poolings: dict[str, str] = {}
        for name, feature in self.features.items():
            if not isinstance(feature, IdFeature | IdListFeature):
                continue
            where, table = f"features.{name}", feature.table or name
            if table == name:
                if feature.rows is None:
                    raise ValueError(f"{where}.rows: the number of rows of its table is required")
            else:
                owner = self.features.get(table)
                if not isinstance(owner, IdFeature | IdListFeature) or owner.table not in (None, table):
                    raise ValueError(f"{where}.table: {table!r} is not a feature with a table of its own")
                if any(value is not None for value in (feature.rows, feature.ids, feature.id_space)):
                    raise ValueError(
                        f"{where}: rows, ids and id_space are set where the table is, at {table}"
                    )
            if (
                isinstance(feature, IdListFeature)
                and poolings.setdefault(table, feature.pooling) != feature.pooling
            ):
                raise ValueError(f"{where}.pooling: lists that share table {table!r} must pool alike")
        return self
