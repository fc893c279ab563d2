from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import mtlrec.plan
from mtlrec.distributed import World
from mtlrec.job.errors import InputError
from mtlrec.job.job import Job
from mtlrec.model.model import Recommender, build_model
from mtlrec.plan import Plan, Shard, _ask_planner, allowed_kinds
from mtlrec.sharding import ShardedModel, _fused_params, _Sharder, shard
from tests.model.example import example_job, example_schema, single_world

world = pytest.fixture(scope="module")(single_world)


def model_of(job: Job) -> Recommender:
    return build_model(job, example_schema(job), torch.device("cpu"))


def sharded(world: World, plan: dict[str, Any] | None = None, **changes: Any) -> ShardedModel:
    job = example_job(**changes)
    return shard(model_of(job), job, world, plan)


def test_plan_survives_json(world: World) -> None:
    plan = sharded(world, run={"sharding": {"user": "row_wise", "item": "data_parallel"}}).plan
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    by_name = {table.name: table for table in plan.tables}
    assert by_name["user"].shards == (Shard(0, 0, 5000, 8, 0),)
    assert by_name["item"].shards == ()


def test_planning_twice_gives_one_plan(world: World) -> None:
    assert sharded(world).plan == sharded(world).plan


def test_a_saved_plan_is_used_where_it_fits(world: World) -> None:
    fresh = sharded(world).plan.to_dict()
    other = json.loads(json.dumps(fresh))
    for table in other["tables"]:
        table["kind"] = "row_wise" if table["kind"] == "table_wise" else "table_wise"
    assert sharded(world, other).plan.to_dict() == other != fresh


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 2},
        {"device": "cuda"},
        {"optimizer": "sgd"},
        {"requested": "row_wise"},
        {"tables": []},
        {"tables": [{"name": "user"}]},
        {"tables": "nonsense"},
    ],
)
def test_a_saved_plan_for_something_else_is_left_aside(world: World, change: dict[str, Any]) -> None:
    fresh = sharded(world).plan.to_dict()
    assert sharded(world, {**fresh, **change}).plan.to_dict() == fresh


def test_a_saved_plan_with_a_hole_is_left_aside(world: World) -> None:
    fresh = sharded(world).plan.to_dict()
    holed = json.loads(json.dumps(fresh))
    holed["tables"][1]["shards"][0]["rows"] -= 1
    with pytest.raises(ValueError, match="do not make up the table"):
        Plan.from_dict(holed)
    assert sharded(world, holed).plan.to_dict() == fresh
    astray = json.loads(json.dumps(fresh))
    astray["tables"][1]["shards"][0]["rank"] = 1
    with pytest.raises(ValueError, match="lie on workers that there are not"):
        Plan.from_dict(astray)


def test_unknown_tables_are_refused(world: World) -> None:
    with pytest.raises(
        InputError, match=r"^run\.sharding\.users: there is no such table; tables: scenario, user, "
    ):
        sharded(world, run={"sharding": {"users": "row_wise"}})


def test_column_wise_is_refused_with_a_row_wise_state(world: World) -> None:
    # The job refuses it first; here it is set past the job's own check.
    job = example_job()
    run = job.run.model_copy(update={"sharding": {"user": "column_wise"}})
    with pytest.raises(InputError, match=r"^run\.sharding: column_wise is not for rowwise_adagrad"):
        shard(model_of(job), job.model_copy(update={"run": run}), world)


def test_data_parallel_is_refused_with_adam(world: World) -> None:
    wishes = {"run": {"device": "cuda", "sharding": "data_parallel"}}
    with pytest.raises(InputError, match=r"run\.sharding: data_parallel tables have the optimizers"):
        example_job(**wishes, optimizer={"tables": {"kind": "adam"}})
    # As a wish for one table, set past the job's own check.
    job = example_job(run={"device": "cuda"}, optimizer={"tables": {"kind": "adam"}})
    run = job.run.model_copy(update={"sharding": "data_parallel"})
    with pytest.raises(InputError, match=r"^run\.sharding: data_parallel is not for adam"):
        shard(model_of(job), job.model_copy(update={"run": run}), world)


def test_what_workers_look_up_is_evened_out() -> None:
    job = example_job()
    tables = model_of(job).tables
    assert isinstance(tables, EmbeddingBagCollection)
    world = World(0, 2, 0, 2, torch.device("cpu"))
    sharder = _Sharder(fused_params=_fused_params(job.optimizer.tables))
    kinds = {table.name: ["table_wise"] for table in tables.embedding_bag_configs()}
    features = {table.name: table.feature_names for table in tables.embedding_bag_configs()}
    lengths, most = {"history": 9.0, "tags": 5.0}, []
    for told in ({}, lengths):
        plan = _ask_planner(job, tables, sharder, world, kinds, told, host=2**30, device=0)
        held = [0.0, 0.0]
        for table in plan.tables:
            for feature in features[table.name]:
                held[table.shards[0].rank] += table.dim * lengths.get(feature, 1.0)
        most.append(max(held) / sum(held))
    # One table's 9 + 1 lookups of 24 are on the worker that has least of the others.
    assert most[1] < 0.55 < most[0]


def test_tables_beyond_the_memory_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtlrec.plan, "read_memory", lambda: (100_000, 50_000))
    for wish in ("auto", "row_wise", "table_wise"):
        with pytest.raises(InputError, match="find no place on 1 worker") as caught:
            sharded(world, run={"sharding": wish})
        assert "\n" not in str(caught.value)


def test_a_plan_leaves_room_for_the_copy_of_asynchronous_checkpoints(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = example_job()
    held = sum(table["bytes"] for table in shard(model_of(job), job, world, copied=True).plan_table())
    monkeypatch.setattr(mtlrec.plan, "read_memory", lambda: (2 * held, held))
    shard(model_of(job), job, world)
    with pytest.raises(InputError, match=r"with room for the copy .* run\.checkpoint\.mode sync"):
        shard(model_of(job), job, world, copied=True)


@pytest.mark.parametrize(
    ("run", "beside"),
    [
        ({}, False),
        ({"checkpoint": {"every_steps": 5}}, True),
        ({"checkpoint": {"every_minutes": 5}}, True),
        ({"checkpoint": {"every_steps": 5, "mode": "sync"}}, False),
    ],
)
def test_a_copy_is_taken_where_checkpoints_are_due_while_training_goes_on(
    run: dict[str, Any], beside: bool
) -> None:
    assert example_job(run=run).run.saves_beside == beside


def test_plan_table_counts_weights_and_state(world: World) -> None:
    rows = {row["table"]: row for row in sharded(world, run={"sharding": "row_wise"}).plan_table()}
    assert list(rows) == [
        *("scenario", "user", "item", "tags", "flag", "only", "price", "brand_wide", "brand_narrow")
    ]
    assert rows["brand_wide"]["bytes"] == 30 * 12 * 4 + 30 * 4
    assert rows["user"] == {
        "table": "user",
        "kind": "row_wise",
        "rows": 5000,
        "dim": 8,
        "ranks": [0],
        "bytes": 5000 * 8 * 4 + 5000 * 4,
    }
    adagrad = sharded(world, optimizer={"tables": {"kind": "adagrad"}}).plan_table()
    assert adagrad[1]["bytes"] == 2 * 5000 * 8 * 4
    assert sharded(world, optimizer={"tables": {"kind": "sgd"}}).plan_table()[1]["bytes"] == 5000 * 8 * 4


@pytest.mark.parametrize(
    ("world_size", "dim", "optimizer", "kinds"),
    [
        (1, 256, "adagrad", {"table_wise"}),
        (2, 8, "rowwise_adagrad", {"row_wise"}),
        (2, 8, "adagrad", {"row_wise"}),
        (2, 256, "adagrad", {"row_wise", "column_wise"}),
        (2, 256, "rowwise_adagrad", {"row_wise"}),
    ],
)
def test_what_the_planner_may_choose_from(
    world_size: int, dim: int, optimizer: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the example's tables were large.
    monkeypatch.setattr("mtlrec.plan._ALL_WHOLE", 0)
    job = example_job(model={"dim": dim}, optimizer={"tables": {"kind": optimizer}})
    tables = model_of(job).tables
    assert isinstance(tables, EmbeddingBagCollection)
    allowed = allowed_kinds(job, tables, world_size)
    assert set(allowed["user"]) == kinds
    # With a small part of all weights: the workers hold alike wherever it lies.
    assert "row_wise" not in allowed["brand_wide"]
    # One row cannot be cut among two ranks.
    assert "row_wise" not in allowed["only"]


def test_small_tables_lie_whole() -> None:
    job = example_job()
    tables = model_of(job).tables
    assert isinstance(tables, EmbeddingBagCollection)
    assert all(kinds == ["table_wise"] for kinds in allowed_kinds(job, tables, 2).values())
