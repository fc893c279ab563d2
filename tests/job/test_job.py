"""The job file: what is refused, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtlrec.job.errors import InputError
from mtlrec.job.job import Job, job_from_dict, job_json_schema, parse_job
from mtlrec.preflight import read_job
from mtlrec.schema import build_schema

TEXT = """
name: demo
schema:
  scenario: {column: country, values: [ca, mx]}
  user: user_id
  item: item_id
  features:
    user_id: {kind: id, rows: 1000}
    item_id: {kind: id, rows: 100, id_space: asin}
    history: {kind: id_list, table: item_id, max_length: 20}
    age: {kind: number, transform: standardise, mean: 1.0, std: 2}
    hours: {kind: number, transform: bucketise, boundaries: [1, 2, 5]}
    picture: {kind: vector, size: 3}
  tasks:
    click: {kind: binary}
    rating: {kind: regression, weight: 2, label: stars}
data: {train: x, batch_size: 64}
"""

REFUSED = [
    (
        "model.backbone={kind: mmoe, expert: 3}",
        "model.backbone.expert: unknown field (value 3)",
        "scenario_gates",
    ),
    ("model.backbone={kind: mmoe, experts: x}", "model.backbone.experts:", "(value 'x')"),
    ("model.backbone={kind: foo}", "model.backbone.kind: 'foo'", "shared_bottom, mmoe"),
    ("schema.features.age.kind=zz", "schema.features.age.kind: 'zz'", "id, id_list, number, vector"),
    ("schema.features.user_id.row=3", "schema.features.user_id.row: unknown field", "id_space"),
    ("schema.features.user_id={kind: id}", "schema.features.user_id.rows:", "required"),
    ("schema.features.user_id.rows='5'", "schema.features.user_id.rows:", "integer"),
    ("schema.features.history.rows=3", "schema.features.history:", "at item_id"),
    (
        "schema.features.history.table=age",
        "schema.features.history.table: 'age'",
        "not a feature with a table",
    ),
    ("schema.features.age.boundaries=[1]", "schema.features.age", "transform: bucketise"),
    ("schema.features.hours.boundaries=[2, 1]", "schema.features.hours.boundaries", "increase"),
    (
        "schema.features.more={kind: id_list, table: item_id, pooling: sum}",
        "schema.features.more.pooling",
        "alike",
    ),
    ("schema.user=age", "schema.user: 'age'", "kind id"),
    ("schema.scenario.values=[no, ca]", "schema.scenario.values.0:", "False"),
    ("schema.scenario.values=[all]", "schema.scenario.values:", "'all'"),
    ("schema.tasks={}", "schema.tasks:", "at least 1"),
    ("schema.tasks.click.kind=rank", "schema.tasks.click.kind: 'rank'", "binary, regression"),
    ("optimizer.tables.kind=adam", "optimizer.tables.kind: 'adam'", "rowwise_adagrad, adagrad, sgd"),
    ("model.precision=bfloat16", "model.precision: bfloat16", "CUDA only"),
    ("optimizer.tables.lr=.nan", "optimizer.tables.lr:", "finite"),
    ("optimizer.tables.lr=0", "optimizer.tables.lr:", "greater than 0"),
    ("optimizer.dense.schedule.decay=cosine", "optimizer.dense.schedule.decay_steps:", "required by decay"),
    ("data.batch_size=63", "data.batch_size: 63", "multiple of lanes (16)"),
    ("data.train=null", "data.train:", "None"),
    ("run.sharding=foo", "run.sharding:", "row_wise"),
    ("run.sharding=column_wise", "run.sharding: column_wise", "adagrad"),
    ("run.workers=20", "run.workers: 20", "data.lanes (16)"),
    ("run.workers=true", "run.workers:", "True"),
    ("name=a/b", "name:", "a/b"),
    ("speed=3", "speed: unknown field (value 3)", "name, objective"),
    ("model=3", "model:", "(value 3)"),
]


@pytest.mark.parametrize(("override", "where", "what"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    override: str, where: str, what: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_job(TEXT, "job.yaml", [override])
    message = str(caught.value)
    assert message.startswith(f"job.yaml: {where}")
    assert what in message
    assert "\n" not in message


@pytest.mark.parametrize("override", ["a", "=3", "a..b=1", "name.x=1", "name={"])
def test_a_malformed_override_is_named(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_job(TEXT, "job.yaml", [override])


@pytest.mark.parametrize(
    "text", ["", "- 1", "a: [", "name: a\nname: b", "{[1]: 2}", "!!python/object:os.system {}"]
)
def test_what_is_not_a_job_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^job\.yaml: "):
        parse_job(text, "job.yaml")


def test_overrides_set_nested_fields_and_create_sections() -> None:
    job = parse_job(TEXT, "job.yaml", ["optimizer.dense.lr=1e-2", "model.backbone={kind: shared_bottom}"])
    assert job.optimizer.dense.lr == 0.01
    assert job.model.backbone.kind == "shared_bottom"


def test_identity_is_everything_but_run() -> None:
    identity = parse_job(TEXT, "job.yaml").identity()
    assert parse_job(TEXT, "job.yaml", ["run.workers=1", "run.epochs=7"]).identity() == identity
    assert parse_job(TEXT, "job.yaml", ["seed=1"]).identity() != identity
    assert parse_job(TEXT, "job.yaml", ["optimizer.tables.lr=0.1"]).identity() != identity


def test_how_long_a_run_waits_is_not_what_it_is() -> None:
    job = parse_job(TEXT, "test", ["data.follow={state_decay: 0.5}"])
    waiting = parse_job(
        TEXT, "test", ["data.follow={state_decay: 0.5, poll_s: 1, idle_s: 0, unreadable_s: 5}"]
    )
    assert job.identity() == waiting.identity()
    assert job.identity() != parse_job(TEXT, "test", ["data.follow=true"]).identity()


@given(
    lr=st.floats(1e-6, 10),
    dim=st.integers(1, 64).map(lambda n: 4 * n),
    hidden=st.lists(st.integers(1, 512), min_size=1, max_size=3),
    lanes=st.integers(2, 64),
    every=st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_a_resolved_job_reads_back_as_itself(
    lr: float, dim: int, hidden: list[int], lanes: int, every: int | None
) -> None:
    raw = yaml.safe_load(TEXT)
    raw["optimizer"] = {"dense": {"lr": lr}}
    raw["model"] = {"dim": dim, "backbone": {"kind": "mmoe", "hidden": hidden}}
    raw["data"].update(lanes=lanes, batch_size=lanes * 8)
    raw["run"] = {"checkpoint": {"every_steps": every}}
    job = job_from_dict(raw, "job.yaml")
    # Through JSON as checkpoints keep it, and through YAML as the run's folder does.
    assert job_from_dict(json.loads(json.dumps(job.to_dict())), "again") == job
    assert parse_job(yaml.safe_dump(job.to_dict()), "again") == job


def test_schema_resolves_tables_and_dense_columns() -> None:
    job = parse_job(TEXT, "job.yaml")
    schema = build_schema(job.schema_, job.model)
    assert [(t.name, t.rows, t.features) for t in schema.tables] == [
        ("scenario", 2, ("scenario",)),
        ("user_id", 1000, ("user_id",)),
        ("item_id", 100, ("item_id", "history")),
        ("hours", 5, ("hours",)),
    ]
    assert schema.table_of["item_id"].id_space == "asin"
    assert [(f.name, f.start, f.width) for f in schema.dense_features] == [("age", 0, 1), ("picture", 1, 3)]
    assert schema.dense_width == 4
    assert {(c.name, c.holds) for c in schema.columns()} >= {("country", "scenario"), ("stars", "label")}
    assert not [c for c in schema.columns(labels=False) if c.holds == "label"]


def test_fingerprint_follows_inputs_and_outputs_not_loss_weights() -> None:
    def fingerprint(*overrides: str) -> str:
        job = parse_job(TEXT, "job.yaml", list(overrides))
        return build_schema(job.schema_, job.model).fingerprint()

    assert fingerprint("schema.tasks.click.weight=3") == fingerprint()
    assert fingerprint("schema.features.user_id.rows=1001") != fingerprint()
    assert fingerprint("model.dim=32") != fingerprint()


def test_paths_start_at_the_job_file_and_overridden_ones_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    job = read_job("jobs/job.yaml", ["run.storage=here", "data.eval=s3://bucket/valid"])
    assert job.data.train == str(tmp_path / "jobs" / "x")
    assert job.run.storage == str(tmp_path / "here")
    assert job.data.eval == "s3://bucket/valid"


def test_a_missing_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: there is no such job file"):
        read_job(str(tmp_path / "none.yaml"), [])
    with pytest.raises(InputError, match="Is a directory"):
        read_job(str(tmp_path), [])


def test_the_json_schema_names_every_section() -> None:
    properties = job_json_schema()["properties"]
    assert set(properties) == set(Job.model_json_schema(by_alias=True)["properties"])
    assert "schema" in properties and "schema_" not in properties
