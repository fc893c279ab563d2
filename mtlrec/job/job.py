"""The job file: YAML in, one strict typed object out, or one line that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mtlrec.job.describe import describe
from mtlrec.job.errors import InputError
from mtlrec.job.follow import WAITING, FollowSection, allow_switch, switch
from mtlrec.job.metric import check_metrics
from mtlrec.job.model import Factorization, ModelSection, Tower
from mtlrec.job.optimizer import OptimizerSection
from mtlrec.job.run import RunSection
from mtlrec.job.schema import BinaryTask, IdFeature, IdListFeature, PairwiseTask, SchemaSection
from mtlrec.job.section import Section
from mtlrec.job.storage import StorageSection

CPU_TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
"""The fused optimizers that fbgemm has for CPU."""


class NegativesSection(Section):
    """Items that are drawn for each positive row while training (docs/negatives.md)."""

    per_positive: int = Field(default=4, ge=1, le=1024)
    """Items of the row's scenario that its user has no positive with; drawn with replacement."""
    task: str
    """A task with labels 0 and 1: a row whose label is 1 is a positive."""
    distribution: Literal["uniform", "popularity"] = "uniform"
    """Over the items of the scenario: alike, or in proportion to (positives of the item)^exponent."""
    exponent: float = Field(default=0.75, ge=0)
    features: list[str] = Field(default=[])
    """Features that belong to the item, beside schema.item: they change with it, the others stay."""


class DataSection(Section):
    """What is read, and in which order."""

    train: str
    """Folder (or file, or URL) of Parquet shards. Relative paths start at the job file's folder."""
    eval: str | None = None
    """Folder that the finished model is measured on; null: none."""
    batch_size: int = Field(default=4096, ge=1)
    """Rows of one step over all workers: a multiple of `lanes`."""
    shuffle: bool = True
    window: int = Field(default=16384, ge=1)
    """Rows of a lane that are shuffled among themselves (and held in memory)."""
    lanes: int = Field(default=16, ge=1, le=4096)
    """Parts that the data is read in side by side; workers are at most as many."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row that does not fit the schema, a row group or file that cannot be read: it ends
    the run, or is left out, counted, and written down in the run's folder (docs/data.md)."""
    max_bad_share: float = Field(default=0.1, ge=0, le=1)
    """skip: the share of the rows, of all generations so far (of unreadable files, in bytes), that may be
    bad; more is an error, for then it is the schema that is wrong."""
    negatives: NegativesSection | None = None
    """Null: rows are trained as they are."""
    follow: Annotated[FollowSection | None, BeforeValidator(switch)] = Field(
        default=None, json_schema_extra=allow_switch
    )
    """Null or false: the shards that are there when the run starts are all. Else those that appear later are
    trained as they come."""

    @property
    def tolerance(self) -> float | None:
        """The share of rows that may be bad and are left out; None: a bad row is an error."""
        return self.max_bad_share if self.bad_rows == "skip" else None

    @model_validator(mode="after")
    def _lanes_divide(self) -> DataSection:
        if self.batch_size % self.lanes:
            raise ValueError(f"batch_size: {self.batch_size} is not a multiple of lanes ({self.lanes})")
        return self


class ObjectiveSection(Section):
    """How the tasks' losses become one."""

    balance: Literal["weights", "uncertainty"] = "weights"
    """weights: the sum of each task's loss times its `weight`. uncertainty: each divided by a variance that
    is learnt (Kendall et al. 2018)."""
    embedding_l2: float = Field(default=0.0, ge=0)
    """Factor of the mean over rows of the squared norm of the embeddings that a row has looked up."""


OUTSIDE_IDENTITY = ("run", "storage_options")
"""Sections that say how and where, and nothing of what is learnt: they may change on resume."""


class Job(Section):
    """Everything that a run is. Identity is all of it but OUTSIDE_IDENTITY."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    """Names the run's folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Starting weights and order of the rows follow from it."""
    schema_: SchemaSection = Field(alias="schema")
    data: DataSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    init: None = None
    """The starting point; null: from scratch."""
    run: RunSection = RunSection()
    storage_options: StorageSection = StorageSection()

    @model_validator(mode="after")
    def _negatives_fit(self) -> Job:
        section, schema = self.data.negatives, self.schema_
        pairwise = [name for name, task in schema.tasks.items() if isinstance(task, PairwiseTask)]
        if section is None:
            if pairwise:
                raise ValueError(
                    f"data.negatives: task {pairwise[0]!r} is pairwise and needs them, such as "
                    f"{{per_positive: 4, task: {pairwise[0]}}}"
                )
            return self
        if schema.user is None or schema.item is None:
            raise ValueError("data.negatives: schema.user and schema.item say whose and which; name both")
        if not isinstance(schema.tasks.get(section.task), BinaryTask | PairwiseTask):
            raise ValueError(f"data.negatives.task: {section.task!r} is no binary or pairwise task")
        if other := [name for name in pairwise if name != section.task]:
            raise ValueError(f"data.negatives.task: {other[0]!r} is pairwise, so it must be that one")
        for name in section.features:
            if name not in schema.features or name in (schema.user, schema.item):
                raise ValueError(f"data.negatives.features: {name!r} is no feature that belongs to an item")
        return self

    @model_validator(mode="after")
    def _factors_fit(self) -> Job:
        backbone = self.model.backbone
        if not isinstance(backbone, Factorization):
            return self
        schema = self.schema_
        where = "model.backbone"
        ids = [name for name, each in schema.features.items() if isinstance(each, IdFeature | IdListFeature)]
        lookups = [table for name in ids for table in schema.tables_of(name)]
        for field, names in (("factors", backbone.factors), ("biases", backbone.biases)):
            for name in names:
                if lookups.count(name) != 1:
                    raise ValueError(
                        f"{where}.{field}: {name!r} must be a table that one id feature looks up; tables: "
                        + ", ".join(dict.fromkeys(lookups))
                    )
        if len({*backbone.factors, *backbone.biases}) < len(backbone.factors) + len(backbone.biases):
            raise ValueError(f"{where}: a table stands twice among factors and biases")
        dims = [schema.table(name).dim or self.model.dim for name in backbone.factors]
        if dims[0] != dims[1]:
            raise ValueError(f"{where}.factors: the tables have {dims[0]} and {dims[1]} columns; use one dim")
        scenarios = len(schema.scenario.values) if schema.scenario else 1
        for name in backbone.biases:
            if (schema.table(name).dim or self.model.dim) < scenarios:
                wanted = -(-scenarios // 4) * 4
                raise ValueError(f"{where}.biases: {name} needs a column a scenario: dim {wanted}")
        if self.model.tower != Tower():
            raise ValueError("model.tower: a factorization's output is the score itself; leave tower out")
        rest = [f"table {name}" for name in lookups if name not in (*backbone.factors, *backbone.biases)]
        rest += [f"feature {name}" for name in schema.features if name not in ids]
        if schema.scenario is not None and schema.scenario.as_feature:
            rest.append("the scenario (schema.scenario.as_feature: false leaves it to the biases)")
        if rest and not backbone.hidden:
            raise ValueError(f"{where}.hidden: without an MLP nothing reads {rest[0]}")
        if backbone.hidden and not rest:
            raise ValueError(f"{where}.hidden: nothing is left for the MLP beside factors and biases")
        if self.model.dropout and not backbone.hidden:
            raise ValueError("model.dropout: a factorization without an MLP has no hidden layer")
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> Job:
        if self.run.evaluate is not None:
            if self.data.eval is None:
                raise ValueError("run.evaluate: data.eval names no data to measure on")
            scenarios = (
                [str(value) for value in self.schema_.scenario.values] if self.schema_.scenario else []
            )
            kinds = {name: task.kind for name, task in self.schema_.tasks.items()}
            check_metrics(self.run.evaluate.metric, scenarios, kinds, self.schema_.user is not None)
        return self

    @model_validator(mode="after")
    def _follow_fits(self) -> Job:
        follow, kind = self.data.follow, self.optimizer.tables.kind
        if follow is not None and follow.idle_s is None and self.run.seeds is not None:
            raise ValueError("data.follow.idle_s: the first of run.seeds would wait for ever; say how long")
        if follow is not None and follow.state_decay < 1 and kind not in ("rowwise_adagrad", "adagrad"):
            raise ValueError(
                f"data.follow.state_decay: {kind} has no Adagrad state to decay; leave it at 1, or use "
                "optimizer.tables.kind rowwise_adagrad or adagrad"
            )
        return self

    @model_validator(mode="after")
    def _device_supports(self) -> Job:
        kind, device = self.optimizer.tables.kind, self.run.device
        if device == "cpu" and kind not in CPU_TABLE_OPTIMIZERS:
            raise ValueError(
                f"optimizer.tables.kind: {kind!r} runs on CUDA only; on run.device cpu use one of "
                + ", ".join(CPU_TABLE_OPTIMIZERS)
            )
        if device == "cpu" and self.model.precision != "float32":
            raise ValueError("model.precision: bfloat16 runs on CUDA only; on run.device cpu use float32")
        if self.run.most_workers > self.data.lanes:
            raise ValueError(
                f"run.workers: {self.run.most_workers} is more than data.lanes ({self.data.lanes}); "
                "use fewer workers, or more lanes from the run's start"
            )
        sharding = self.run.sharding
        kinds = set(sharding.values()) if isinstance(sharding, dict) else {sharding}
        if "data_parallel" in kinds and kind not in CPU_TABLE_OPTIMIZERS:
            raise ValueError(
                f"run.sharding: data_parallel tables have the optimizers {', '.join(CPU_TABLE_OPTIMIZERS)}, "
                f"not {kind}"
            )
        if "column_wise" in kinds and kind not in ("adagrad", "sgd", "adam"):
            raise ValueError(
                f"run.sharding: column_wise needs a table optimizer with element-wise state "
                f"(adagrad, sgd, adam), not {kind}: a row-wise state would differ between columns"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The resolved job as plain JSON data, every default written out."""
        return self.model_dump(mode="json", by_alias=True)

    def essence(self) -> dict[str, Any]:
        """`to_dict()` without what is outside a run's identity."""
        body = {key: value for key, value in self.to_dict().items() if key not in OUTSIDE_IDENTITY}
        if (follow := body["data"]["follow"]) is not None:
            body["data"]["follow"] = {key: value for key, value in follow.items() if key not in WAITING}
        return body

    def identity(self) -> str:
        """Hash of `essence`: two jobs with one identity may share a run's checkpoints."""
        text = json.dumps(self.essence(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def parse_job(text: str, where: str, overrides: list[str] | None = None) -> Job:
    """YAML `text` (from the file or URL `where`) with `--set` overrides -> Job, or InputError in one line."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a job is a mapping with the sections name, schema, data, ...")
    for override in overrides or []:
        _override(raw, override)
    return job_from_dict(raw, where)


def job_from_dict(raw: dict[str, Any], where: str) -> Job:
    """Plain data -> Job, or InputError that names the first wrong field, its value and what is allowed."""
    try:
        # JSON mode, so that a list may stand for a tuple while numbers and strings stay strict.
        return Job.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        details = error.errors(include_url=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise InputError(f"{where}: {describe(details[0], raw, Job)}{more}") from None


def job_json_schema() -> dict[str, Any]:
    """The JSON schema of a job file, for editors."""
    return Job.model_json_schema(by_alias=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads 1e-3 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _install_float_resolver() -> None:
    _Loader.yaml_implicit_resolvers = {
        first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # A word of digits alone stays an integer: ask for a point or an exponent.
    pattern = re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_install_float_resolver()


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` in place; the value is read as YAML."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: expected a.b=value, such as --set optimizer.dense.lr=0.001")
    node = raw
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            at = ".".join(keys[: depth + 1])
            raise InputError(f"--set {override}: {at} is {child!r}, not a section with fields")
        node = child
    try:
        node[keys[-1]] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
