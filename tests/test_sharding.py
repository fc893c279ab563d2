from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import mtlrec.sharding
from mtlrec.checkpoint.tensors import TableBlock
from mtlrec.distributed import World
from mtlrec.job.job import job_from_dict
from mtlrec.model.model import build_model
from mtlrec.model.starting import table_rows
from mtlrec.schema import build_schema
from mtlrec.sharding import ShardedModel, initialise_tables, local_blocks, shard
from tests.distributed.training import batches, start
from tests.model.example import counts, cut, example_job, example_schema, global_rows, single_world

world = pytest.fixture(scope="module")(single_world)


SCHEMA = example_schema(example_job())
DATA = [(cut(rows, SCHEMA, 0, 1), counts(rows)) for rows in batches(SCHEMA, 12)]


def train(trainer: tuple[Any, Any, Any], steps: range) -> list[float]:
    model, optimizer, objective = trainer
    losses = []
    for step in steps:
        batch, count = DATA[step]
        loss, _ = objective.loss(model(batch), batch, count, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.average()
        optimizer.step(step)
        losses.append(loss.item())
    return losses


def whole_tables(model: ShardedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Table -> its weights and optimizer state, put together from the blocks, as a checkpoint has them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for table in model.plan.tables:
        found[table.name] = {"weights": torch.full((table.rows, table.dim), torch.nan)}
    for block in local_blocks(model):
        rows, columns = area(block)
        parts = found[block.table]
        parts["weights"][rows, columns] = block.weights
        for name, values in block.state.items():
            if values.dim() == 1:
                parts.setdefault(name, torch.full((len(parts["weights"]),), torch.nan))[rows] = values
            else:
                parts.setdefault(name, torch.full(parts["weights"].shape, torch.nan))[rows, columns] = values
    return found


def area(block: TableBlock) -> tuple[slice, slice]:
    return slice(block.row, block.row + block.rows), slice(block.column, block.column + block.columns)


def copy_state(source: tuple[Any, Any, Any], target: tuple[Any, Any, Any]) -> None:
    tables = whole_tables(source[0])
    for block in local_blocks(target[0]):
        rows, columns = area(block)
        block.weights.copy_(tables[block.table]["weights"][rows, columns])
        for name, values in block.state.items():
            saved = tables[block.table][name]
            values.copy_(saved[rows] if values.dim() == 1 else saved[rows, columns])
    with torch.no_grad():
        for name, parameter in target[0].dense_parameters().items():
            parameter.copy_(source[0].dense_parameters()[name])
    target[1].load(source[1].state_tensors())


PLANS: dict[str, dict[str, Any]] = {
    "row_wise": {"run": {"sharding": "row_wise"}},
    "data_parallel": {"run": {"sharding": "data_parallel"}},
    "row_wise adagrad": {"run": {"sharding": "row_wise"}, "optimizer": {"tables": {"kind": "adagrad"}}},
    "data_parallel adagrad": {
        "run": {"sharding": "data_parallel"},
        "optimizer": {"tables": {"kind": "adagrad"}},
    },
    "data_parallel sgd": {"run": {"sharding": "data_parallel"}, "optimizer": {"tables": {"kind": "sgd"}}},
    "table_wise sgd": {"run": {"sharding": "table_wise"}, "optimizer": {"tables": {"kind": "sgd"}}},
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *((name, name) for name in PLANS),
        ("row_wise", "data_parallel"),
        ("data_parallel", "row_wise"),
        ("row_wise adagrad", "data_parallel adagrad"),
        ("data_parallel sgd", "table_wise sgd"),
    ],
)
def test_twelve_steps_are_five_a_copy_and_seven(world: World, source: str, target: str) -> None:
    """What the blocks, the dense parameters and the dense optimizer's state hold is all that there is."""
    at_once = start(example_job(**PLANS[source]), world)
    losses = train(at_once, range(12))
    first, second = (
        start(example_job(**PLANS[source]), world),
        start(example_job(**PLANS[target], seed=9), world),
    )
    assert train(first, range(5)) == losses[:5]
    copy_state(first, second)
    found = train(second, range(5, 12))
    if source == target:
        assert found == losses[5:]
        for table, parts in whole_tables(at_once[0]).items():
            for name, values in parts.items():
                assert torch.equal(values, whole_tables(second[0])[table][name]), (table, name)
    else:
        assert found == pytest.approx(losses[5:], rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_blocks_are_views_of_what_the_model_reads(world: World, plan: str) -> None:
    trainer = start(example_job(**PLANS[plan]), world)
    model, batch = trainer[0], DATA[0][0]
    blocks = {block.table: block for block in local_blocks(model)}
    assert list(blocks) == [table.name for table in SCHEMA.tables]
    block = blocks["item"]
    assert (block.row, block.rows, block.column, block.columns) == (0, 41, 0, 8)
    assert block.weights.shape == (41, 8) and block.weights.dtype == torch.float32
    assert block.replicated == plan.startswith("data_parallel")
    kind = example_job(**PLANS[plan]).optimizer.tables.kind
    expected = {"rowwise_adagrad": {"sum": (41,)}, "adagrad": {"sum": (41, 8)}, "sgd": {}}[kind]
    assert {name: tuple(values.shape) for name, values in block.state.items()} == expected
    with torch.no_grad():
        before = model(batch)
        block.weights.add_(1.0)
        assert not torch.equal(before, model(batch))
    for name, values in block.state.items():
        assert not values.any()
        values.fill_(1e12)  # so that the steps to come are tiny
        frozen = block.weights.clone()
        train(trainer, range(2))
        torch.testing.assert_close(block.weights, frozen, atol=1e-5, rtol=0)
        assert values.min() >= 1e12, name


def test_starting_rows_are_those_of_their_stream(world: World) -> None:
    model = start(example_job(run={"sharding": "row_wise"}), world)[0]
    block = next(block for block in local_blocks(model) if block.table == "user")
    expected = np.concatenate(
        [table_rows(3, "user", 0, 4096, 8, 0.05), table_rows(3, "user", 4096, 904, 8, 0.05)]
    )
    np.testing.assert_array_equal(block.weights.numpy(), expected)
    initialise_tables(model, 4, 0.01)
    assert block.weights.abs().max() <= 0.01
    assert not np.array_equal(block.weights.numpy() * 5, expected)


def test_tables_are_not_filled_before_they_are_set(world: World) -> None:
    job = example_job(run={"sharding": {"user": "row_wise", "item": "table_wise"}})
    model = shard(build_model(job, SCHEMA, torch.device("cpu")), job, world)
    # fbgemm's memory is zero; random numbers would be time wasted.
    assert not any(block.weights.any() for block in local_blocks(model))


def test_dense_parameters_are_all_but_the_tables(world: World) -> None:
    job = example_job()
    built = build_model(job, SCHEMA, torch.device("cpu"))
    expected = [name for name, _ in built.named_parameters() if not name.startswith("tables.")]
    model = shard(built, job, world)
    assert list(model.dense_parameters()) == expected
    trained = {id(parameter) for parameter in model.dense_parameters().values()}
    assert trained == {id(p) for part in (built.backbone, built.towers) for p in part.parameters()}


def test_a_table_without_an_optimizer_is_noticed_when_built(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtlrec.sharding, "_replicated_tables", lambda tables: [])
    job = example_job(run={"sharding": {"item": "data_parallel"}})
    with pytest.raises(AssertionError, match="item"):
        shard(build_model(job, SCHEMA, torch.device("cpu")), job, world)


def test_a_model_without_tables(world: World) -> None:
    raw = example_job().to_dict()
    raw["schema"] = {"features": {"age": {"kind": "number"}}, "tasks": {"click": {"kind": "binary"}}}
    job = job_from_dict(raw, "example")
    schema = build_schema(job.schema_, job.model)
    model = shard(build_model(job, schema, torch.device("cpu")), job, world)
    initialise_tables(model, 0, 0.1)
    assert list(local_blocks(model)) == [] and model.plan_table() == [] and model.replicated is None
    assert model(cut(global_rows(schema, 32, 1), schema, 0, 1)).shape == (32, 1)


def test_no_host_sync_in_the_step() -> None:
    """Reading a number back, or picking rows by a mask, makes a GPU wait; neither belongs in the step."""
    import mtlrec.assembly
    import mtlrec.batch
    import mtlrec.model.backbones.factorization
    import mtlrec.model.backbones.mmoe
    import mtlrec.model.backbones.ple
    import mtlrec.model.dropout
    import mtlrec.model.layers
    import mtlrec.model.model
    import mtlrec.model.tables
    import mtlrec.model.towers
    import mtlrec.objective.losses
    import mtlrec.objective.objective
    import mtlrec.optimizers

    for module in (
        mtlrec.assembly,
        mtlrec.batch,
        mtlrec.model.backbones.factorization,
        mtlrec.model.backbones.mmoe,
        mtlrec.model.backbones.ple,
        mtlrec.model.dropout,
        mtlrec.model.layers,
        mtlrec.model.model,
        mtlrec.model.tables,
        mtlrec.model.towers,
        mtlrec.objective.losses,
        mtlrec.objective.objective,
        mtlrec.optimizers,
    ):
        assert module.__file__ is not None
        with open(module.__file__) as source:
            text = source.read()
        for word in (".item()", ".tolist()", "nonzero", "masked_select", ".cpu()"):
            assert word not in text, (module.__name__, word)


def test_nothing_is_said_that_a_user_cannot_act_upon() -> None:
    """A whole start and a step in a fresh process, with INFO logged as launchers do: silence."""
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from mtlrec.distributed import init_single_process, shut_down\n"
        "world = init_single_process(30.0)\n"
        "from tests.test_sharding import DATA, start, train, example_job\n"
        "plan = {'sharding': {'user': 'row_wise', 'item': 'data_parallel'}}\n"
        "train(start(example_job(run=plan), world), range(1))\n"
        "shut_down()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout + done.stderr == ""
