"""Tables by name, vocabularies, given, pairwise, negatives, factorization, evaluation: what fits together."""

from __future__ import annotations

import json

import pytest

from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict, parse_job
from mtlrec.job.model import PLE, Factorization
from mtlrec.schema import build_schema

TEXT = """
name: pairs
schema:
  scenario: {column: market, values: [de, mx]}
  user: user_id
  item: item_id
  tables:
    user: {ids: vocabulary, dim: 32}
    item: {ids: vocabulary, dim: 32, min_count: 2, reserved: 4, id_space: asin}
    item_bias: {ids: vocabulary, dim: 4, min_count: 2, reserved: 4}
  features:
    user_id: {kind: id, tables: [user]}
    item_id: {kind: id, tables: [item, item_bias]}
    price: {kind: number}
  tasks:
    rank: {kind: pairwise}
    click: {kind: binary, label_smoothing: 0.1}
    buy: {kind: binary, given: click, normalise: batch}
    stars: {kind: regression, given: buy, mean: 3.0, std: 1.5}
data:
  train: x
  eval: y
  batch_size: 64
  negatives: {per_positive: 4, task: rank, features: [price]}
model:
  backbone: {kind: factorization, factors: [user, item], biases: [item_bias], hidden: [8]}
run:
  evaluate: {metric: [rank/ndcg@10, mx/rank/auc], patience: 3}
"""

PLAIN = "\n".join(
    [
        "schema.features={user_id: {kind: id, tables: [user]}, item_id: {kind: id, tables: [item, item_bias]}}",  # noqa: E501
        "data.negatives.features=[]",
        "schema.scenario.as_feature=false",
        "model.backbone.hidden=[]",
    ]
)
"""Leaves nothing but user and item."""

REFUSED = [
    (
        "schema.tables.item.min_count=3",
        "features.item_id.tables: item_bias and item differ in min_count",
        "row",
    ),
    ("schema.tables.item.ids=hash", "schema.tables.item.rows:", "required"),
    ("schema.tables.spare={rows: 4}", "schema.tables.spare: no feature looks it up", "tables"),
    ("schema.tables.price={rows: 4}", "schema.tables.price: this name is taken", "rename"),
    ("schema.tables.item.rows=4", "schema.tables.item.rows: 4 leaves no row", "reserved"),
    ("schema.features.user_id.tables=[users]", "schema.features.user_id.tables: 'users'", "schema.tables"),
    ("schema.features.user_id.tables=[user, user]", "schema.features.user_id.tables", "twice"),
    ("schema.features.user_id.table=item_id", "schema.features.user_id: give table or tables", "not both"),
    ("schema.features.user_id.rows=7", "schema.features.user_id: rows, ids", "at user"),
    ("schema.features.x={kind: id, rows: 4, min_count: 2}", "schema.features.x: min_count", "vocabulary"),
    ("schema.features.x={kind: id, rows: 4, dim: 6}", "schema.features.x.dim:", "multiple of 4"),
    ("schema.tasks.buy.given=stars", "schema.tasks.buy.given: 'stars'", "binary"),
    ("schema.tasks.click.given=buy", "schema.tasks.click.given:", "circle"),
    ("schema.tasks.stars={kind: regression, mean: 3.0}", "schema.tasks.stars", "both mean and std"),
    ("schema.tasks.click.label_smoothing=1", "schema.tasks.click.label_smoothing:", "less than 1"),
    ("data.negatives=null", "data.negatives: task 'rank' is pairwise", "per_positive"),
    ("data.negatives.task=stars", "data.negatives.task: 'stars'", "binary or pairwise"),
    ("data.negatives.task=click", "data.negatives.task: 'rank' is pairwise", "that one"),
    ("data.negatives.features=[cost]", "data.negatives.features: 'cost'", "item"),
    ("schema.item=null", "data.negatives: schema.user and schema.item", "both"),
    ("model.backbone.factors=[user]", "model.backbone.factors:", "at least 2"),
    ("model.backbone.factors=[user, things]", "model.backbone.factors: 'things'", "user, item, item_bias"),
    ("model.backbone.biases=[item]", "model.backbone: a table stands twice", "biases"),
    ("schema.tables.user.dim=16", "model.backbone.factors: the tables have 16 and 32 columns", "one dim"),
    ("model.tower={hidden: [4]}", "model.tower:", "score itself"),
    ("model.backbone.hidden=[]", "model.backbone.hidden: without an MLP nothing reads feature price", ""),
    ("schema.features.x={kind: id, rows: 4}\nmodel.backbone.hidden=[]", "nothing reads table x", ""),
    ("model.backbone=deep", "model.backbone.kind: 'deep'", "factorization"),
    (f"{PLAIN}\nmodel.backbone.hidden=[8]", "model.backbone.hidden: nothing is left", "biases"),
    (f"{PLAIN}\nschema.scenario.as_feature=true", "nothing reads the scenario", "as_feature: false"),
    (f"{PLAIN}\nmodel.dropout=0.1", "model.dropout:", "hidden layer"),
    ("model.dropout=1", "model.dropout:", "less than 1"),
    ("objective.balance=equal", "objective.balance:", "uncertainty"),
    ("data.eval=null", "run.evaluate: data.eval", "measure on"),
    ("run.evaluate.metric=[rank/logloss]", "run.evaluate.metric: 'rank/logloss'", "ndcg@10"),
    ("run.evaluate.metric=[sale/auc]", "run.evaluate.metric: 'sale/auc'", "rank, click, buy, stars"),
    ("run.evaluate.metric=[uk/rank/auc]", "run.evaluate.metric: 'uk/rank/auc'", "de, mx"),
    ("run.evaluate.metric=[click/auc, stars/rmse]", "run.evaluate.metric:", "one sort"),
    ("run.evaluate.every_steps=0", "run.evaluate.every_steps:", "greater than"),
    ("run.evaluate={metric: [rank/auc], every_steps: 3, every_epochs: 1}", "run.evaluate", "not both"),
    ("run.seeds=[]", "run.seeds:", "at least 1"),
    ("run.workers=-1", "run.workers:", "greater than or equal to 0"),
    ("run.workers={min: 0, max: 2}", "run.workers.min:", "greater than or equal to 1"),
    ("run.workers={max: 2}", "run.workers.min:", "required"),
    ("run.workers={min: 3, max: 2}", "run.workers: min 3", "max 2"),
    ("run.workers={min: 1, max: 99}", "run.workers: 99 is more than data.lanes", "fewer workers"),
]


def parse(*overrides: str) -> Job:
    return parse_job(TEXT, "job.yaml", list(overrides))


@pytest.mark.parametrize(("override", "start", "end"), REFUSED, ids=[each[0] for each in REFUSED])
def test_what_does_not_fit_is_one_line(override: str, start: str, end: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*override.split("\n"))
    message = str(caught.value)
    assert start in message and end in message.split(start)[1], message
    assert "\n" not in message and message.startswith("job.yaml: ")


def test_workers_are_a_number_or_bounds() -> None:
    assert parse().run.fewest_workers == parse().run.most_workers == parse().run.workers
    elastic = parse("run.workers={min: 1, max: 3}").run
    assert (elastic.fewest_workers, elastic.most_workers) == (1, 3)


def test_metrics_by_user_need_a_user() -> None:
    with pytest.raises(InputError, match=r"'click/gauc'.*and schema.user for metrics by user"):
        parse(
            "run.evaluate.metric=[click/gauc]",
            "schema.user=null",
            "data.negatives=null",
            "schema.tasks.rank.kind=binary",
        )


def test_tables_and_lookups_are_resolved() -> None:
    job = parse()
    assert isinstance(job.model.backbone, Factorization)
    schema = build_schema(job.schema_, job.model)
    assert [(each.feature, each.table, each.start, each.width) for each in schema.lookups] == [
        ("scenario", "scenario", 0, 16),
        ("user_id", "user", 16, 32),
        ("item_id", "item", 48, 32),
        ("item_id", "item_bias", 80, 4),
    ]
    assert schema.embedding_width == 84 and schema.dense_width == 1
    item = schema.table_of["item"]
    assert (item.rows, item.dim, item.ids, item.min_count, item.reserved) == (4, 32, "vocabulary", 2, 4)
    assert (item.id_space, schema.table_of["item_bias"].id_space) == ("asin", "item_bias")


def test_a_resolved_job_reads_back_as_itself() -> None:
    job = parse("schema.tables.item.rows=100", "schema.tables.item_bias.rows=100")
    assert job_from_dict(json.loads(json.dumps(job.to_dict())), "again") == job


def test_tasks_are_resolved() -> None:
    job = parse()
    rank, click, buy, stars = build_schema(job.schema_, job.model).tasks
    assert (rank.kind, click.label_smoothing, click.prior) == ("pairwise", 0.1, None)
    assert (buy.given, buy.normalise, stars.given) == ("click", "batch", "buy")
    assert (stars.mean, stars.std) == (3.0, 1.5)


def test_a_bare_name_is_a_backbone_with_its_defaults() -> None:
    job = parse("model.backbone=ple", "data.negatives=null", "schema.tasks.rank.kind=binary")
    assert job.model.backbone == PLE(kind="ple")
    assert parse(*[f"model.backbone={name}" for name in ("mmoe",)]).model.backbone.kind == "mmoe"


def test_what_only_weighs_losses_is_not_in_the_fingerprint() -> None:
    def fingerprint(*overrides: str) -> str:
        job = parse(*overrides)
        return build_schema(job.schema_, job.model).fingerprint()

    base = fingerprint()
    for override in (
        "schema.tasks.click.weight=2",
        "schema.tasks.click.prior=0.2",
        "schema.tasks.click.label_smoothing=0",
        "schema.tasks.click.normalise=batch",
        "schema.weight=w",
    ):
        assert fingerprint(override) == base
    assert fingerprint("schema.tasks.stars.std=2") != base
    assert fingerprint("schema.tables.user.dim=16", "schema.tables.item.dim=16") != base
