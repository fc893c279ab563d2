from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mtlrec.job.job import job_from_dict, job_json_schema
from mtlrec.model.backbones.registry import BACKBONES
from mtlrec.model.dropout import Dropout
from mtlrec.model.model import Recommender, build_model
from mtlrec.model.starting import dense_parameter
from mtlrec.model.towers import Towers
from mtlrec.schema import build_schema
from tests.model.example import cut, example_job, example_schema, global_rows
from tests.model.reference import PlainModel

CPU = torch.device("cpu")
NEUMF: dict[str, Any] = {
    "kind": "factorization",
    "factors": ["flag", "user"],
    "biases": ["brand_narrow", "only"],
    "hidden": [12, 7],
}


def with_tables(model: Recommender) -> Recommender:
    """The model with its tables in memory, as they are before sharding."""
    assert model.tables is not None
    model.tables.to_empty(device=CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.tables.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "section",
    [
        {"backbone": {"kind": "shared_bottom", "hidden": [12, 10]}, "tower": {"hidden": [6, 5]}},
        {"backbone": {"kind": "shared_bottom", "hidden": [12]}, "tower": {"hidden": []}},
        {"backbone": {"kind": "mmoe", "experts": 3, "hidden": [12, 10, 7]}, "tower": {"hidden": [6]}},
        {"backbone": {"kind": "mmoe", "experts": 1, "hidden": [12]}, "tower": {"hidden": [6]}},
        {"backbone": {"kind": "mmoe", "experts": 2, "hidden": [9, 9], "scenario_gates": True}},
        {"backbone": {"kind": "ple", "hidden": [12, 10, 7], "scenario_gates": True}},
        {"backbone": {"kind": "ple", "levels": 2, "hidden": [9], "task_experts": 1, "shared_experts": 3}},
        {"backbone": {"kind": "ple", "levels": 3, "hidden": [12, 9], "task_experts": 3, "shared_experts": 1}},
        {"backbone": {"kind": "ple", "levels": 2, "hidden": [8, 8], "scenario_gates": True}},
        {"backbone": NEUMF},
        {"backbone": {**NEUMF, "biases": []}},
    ],
)
def test_whole_model_is_the_plain_one(section: dict[str, Any]) -> None:
    job = example_job(model={"dim": 8, **section})
    schema = example_schema(job)
    model = with_tables(build_model(job, schema, CPU))
    # From anywhere but the start, so that biases of scenarios count.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(
            {**dict(model.backbone.named_parameters()), **dict(model.towers.named_parameters())}.items()
        ):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert model.tables is not None
    named = {name: value for name, value in model.named_parameters() if not name.startswith("tables.")}
    tables = {name.split(".")[1]: value for name, value in model.tables.named_parameters()}
    plain = PlainModel(job, schema, tables, named)
    rows = global_rows(schema, 96, seed=5, present=4)
    outputs, expected = model(cut(rows, schema, 0, 1)), plain.forward(rows)
    here = torch.from_numpy(rows.present)
    torch.testing.assert_close(outputs[: int(here.sum())], expected[here], rtol=1e-4, atol=1e-5)
    slope = torch.randn(outputs.shape, generator=generator)
    (outputs[: int(here.sum())] * slope[: int(here.sum())]).sum().backward()
    (expected[here] * slope[: int(here.sum())]).sum().backward()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.grad, plain.dense[name].grad, rtol=1e-3, atol=1e-4, msg=name)
    for name, weights in tables.items():
        torch.testing.assert_close(weights.grad, plain.tables[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_outputs_are_one_float_per_row_and_task() -> None:
    job = example_job()
    schema = example_schema(job)
    outputs = with_tables(build_model(job, schema, CPU))(cut(global_rows(schema, 96, 1), schema, 1, 3))
    # Ranks 0 and 1 of 3 serve 5 lanes, rank 2 serves 6: all are padded to 6 lanes of 6 rows.
    assert outputs.shape == (36, 3)
    assert outputs.dtype == torch.float32
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_negatives_are_rows_of_their_own(dropout: float) -> None:
    job = example_job(model={"dim": 8, "dropout": dropout})
    schema = example_schema(job)
    model = with_tables(build_model(job, schema, CPU))
    whole = cut(global_rows(schema, 96, 1), schema, 0, 1)
    drawn = replace(
        whole,
        labels=whole.labels[:32],
        valid=whole.valid[:32],
        rows=whole.rows[:32],
        negatives=torch.ones(32, 2, dtype=torch.bool),
    )
    outputs, x = model(drawn), model.trunk_input(drawn)
    assert outputs.shape == (96, 3) and model.embeddings(x).shape == (96, schema.embedding_width)
    assert torch.equal(outputs, model(whole)) == (dropout == 0.0)
    model.eval()
    assert torch.equal(model(drawn), model(whole))


def test_names_in_checkpoints_are_pinned() -> None:
    job = example_job()
    names = [name for name, _ in build_model(job, example_schema(job), CPU).named_parameters()]
    assert [name for name in names if not name.startswith("tables.")] == [
        "backbone.scenario_bias",
        "backbone.first.weight",
        "backbone.first.bias",
        "backbone.rest.0.weight",
        "backbone.rest.0.bias",
        "backbone.gates.weight",
        "towers.layers.0.weight",
        "towers.layers.0.bias",
        "towers.last.weight",
        "towers.last.bias",
    ]
    job = example_job(
        model={"backbone": {"kind": "shared_bottom", "hidden": [4, 4]}, "tower": {"hidden": []}}
    )
    names = [name for name, _ in build_model(job, example_schema(job), CPU).named_parameters()]
    assert [name for name in names if not name.startswith("tables.")] == [
        "backbone.trunk.layers.0.weight",
        "backbone.trunk.layers.0.bias",
        "backbone.trunk.layers.1.weight",
        "backbone.trunk.layers.1.bias",
        "towers.last.weight",
        "towers.last.bias",
    ]
    section = {"kind": "ple", "levels": 2, "hidden": [4, 4], "scenario_gates": True}
    job = example_job(model={"backbone": section, "tower": {"hidden": []}})
    names = [name for name, _ in build_model(job, example_schema(job), CPU).named_parameters()]
    assert [name for name in names if not name.startswith("tables.")] == [
        "backbone.scenario_bias",
        "backbone.levels.0.first.weight",
        "backbone.levels.0.first.bias",
        "backbone.levels.0.gates.weight",
        "backbone.levels.0.rest.0.weight",
        "backbone.levels.0.rest.0.bias",
        "backbone.levels.1.first.tasks.weight",
        "backbone.levels.1.first.tasks.bias",
        "backbone.levels.1.first.shared.weight",
        "backbone.levels.1.first.shared.bias",
        "backbone.levels.1.gates.tasks.weight",
        "backbone.levels.1.rest.0.weight",
        "backbone.levels.1.rest.0.bias",
        "towers.last.weight",
        "towers.last.bias",
    ]
    job = example_job(model={"dim": 8, "backbone": NEUMF})
    names = [name for name, _ in build_model(job, example_schema(job), CPU).named_parameters()]
    assert [name for name in names if not name.startswith("tables.")] == [
        "backbone.product",
        "backbone.mlp.layers.0.weight",
        "backbone.mlp.layers.0.bias",
        "backbone.mlp.layers.1.weight",
        "backbone.mlp.layers.1.bias",
        "backbone.last.weight",
        "towers.output_bias",
    ]


def test_dense_start_follows_from_seed_and_name() -> None:
    job = example_job()
    schema = example_schema(job)
    torch.manual_seed(1)
    one = dict(build_model(job, schema, CPU).named_parameters())
    torch.manual_seed(2)
    same = dict(build_model(job, schema, CPU).named_parameters())
    other = dict(build_model(example_job(seed=4), schema, CPU).named_parameters())
    for name, value in one.items():
        if name.startswith("tables."):
            continue
        assert torch.equal(value, same[name]), name
        if name in ("backbone.scenario_bias", "towers.last.bias"):
            assert not value.any()
        else:
            assert not torch.equal(value, other[name]), name
    expected = dense_parameter(job.seed, "towers.last.weight", (3, 6, 1), 6**-0.5)
    assert torch.equal(one["towers.last.weight"], torch.from_numpy(expected))
    width = schema.embedding_width + schema.dense_width
    assert one["backbone.first.weight"].abs().max() <= width**-0.5


@pytest.mark.parametrize(("section", "bias", "width"), [("mmoe", "last.bias", 64), (NEUMF, "output_bias", 1)])
def test_outputs_start_at_the_logit_of_their_prior(section: Any, bias: str, width: int) -> None:
    raw = example_job().to_dict()
    raw["model"] = {"dim": 8, "backbone": section}
    if section == "mmoe":
        raw["model"]["tower"] = {"hidden": []}
    raw["schema"]["tasks"]["click"]["prior"] = 0.2
    raw["schema"]["tasks"]["rating"] |= {"mean": 3.0, "std": 2.0}
    job = job_from_dict(raw, "example")
    model = build_model(job, example_schema(job), CPU)
    found = dict(model.towers.named_parameters())[bias].detach().flatten()
    torch.testing.assert_close(torch.sigmoid(found), torch.tensor([0.2, 0.5, 0.5]))
    assert found[1:].tolist() == [0.0, 0.0]
    with torch.no_grad():
        outputs = model.towers(torch.zeros(3, 4, width))
    torch.testing.assert_close(outputs, found[:, None].expand(3, 4))


def test_every_backbone_of_the_job_is_there_and_takes_its_fields() -> None:
    section = job_json_schema()["$defs"]["ModelSection"]["properties"]["backbone"]
    assert set(section["discriminator"]["mapping"]) == set(BACKBONES)
    for kind in BACKBONES:
        job = example_job(model={"backbone": NEUMF if kind == "factorization" else {"kind": kind}})
        schema = example_schema(job)
        backbone = build_model(job, schema, CPU).backbone
        width = schema.embedding_width + schema.dense_width
        shared = backbone(torch.randn(5, width), torch.tensor([0, 1, 2, 0, 1]))
        assert shared.shape == (3, 5, backbone.outputs)
        assert not backbone.scores or backbone.outputs == 1


class Recording(nn.Module):
    """A backbone that keeps what it is handed."""

    def forward(self, x: torch.Tensor, scenario: torch.Tensor) -> torch.Tensor:
        self.seen = (x, scenario)
        return x.expand(3, *x.shape)


def test_backbone_is_handed_embeddings_dense_numbers_and_scenario() -> None:
    job = example_job()
    schema = example_schema(job)
    tables = with_tables(build_model(job, schema, CPU)).tables
    width = sum(schema.table_of[lookup.table].dim for lookup in schema.lookups) + schema.dense_width
    backbone = Recording()
    batch = cut(global_rows(schema, 96, 1), schema, 0, 1)
    towers = Towers(inputs=width // 8 * 8 + 8, num_tasks=3, hidden=[], dropout=Dropout())
    model = Recommender(tables, schema.lookups, backbone, towers)
    outputs = model(batch)
    x, scenario = backbone.seen
    embeddings = model.embeddings(x)
    assert outputs.shape == (96, 3)
    assert torch.equal(scenario, batch.scenario)
    assert torch.equal(x[:, embeddings.shape[1] : width], batch.dense)
    # Behind them the padding, of which a layer makes its bias.
    assert x.shape[1] % 8 == 0 and (x[:, width] == 1).all() and not x[:, width + 1 :].any()
    assert embeddings.shape[1] == width - schema.dense_width
    embeddings.square().sum().backward()
    assert tables is not None
    assert all(weights.grad is not None and weights.grad.any() for weights in tables.parameters())


@pytest.mark.parametrize(
    "features",
    [
        {"age": {"kind": "number"}, "image": {"kind": "vector", "size": 2}},
        {"user": {"kind": "id", "rows": 5}},
    ],
    ids=["no tables", "no dense numbers"],
)
def test_a_schema_may_lack_tables_or_dense_numbers(features: dict[str, Any]) -> None:
    raw = example_job().to_dict()
    raw["schema"] = {"features": features, "tasks": {"click": {"kind": "binary"}}}
    job = job_from_dict(raw, "example")
    schema = build_schema(job.schema_, job.model)
    model = build_model(job, schema, CPU)
    assert (model.tables is None) == ("user" not in features)
    if model.tables is not None:
        with_tables(model)
    outputs = model(cut(global_rows(schema, 32, 1), schema, 0, 1))
    assert outputs.shape == (32, 1)


def test_mixed_precision_keeps_weights_and_outputs_float32() -> None:
    job = example_job()
    schema = example_schema(job)
    model = with_tables(build_model(job, schema, CPU))
    batch = cut(global_rows(schema, 96, 1), schema, 0, 1)
    exact = model(batch)
    model.mixed = True
    mixed = model(batch)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, atol=0.03, rtol=0.03)
    mixed.sum().backward()
    assert all(
        parameter.grad.dtype == torch.float32
        for parameter in model.parameters()
        if parameter.grad is not None
    )


def test_towers_do_not_see_each_other() -> None:
    towers = Towers(inputs=4, num_tasks=2, hidden=[3], dropout=Dropout())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 5, 4, generator=generator, requires_grad=True)
    towers(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad[0].any() and not x.grad[1].any()
    assert towers.last.weight.grad is not None
    assert towers.last.weight.grad[0].any() and not towers.last.weight.grad[1].any()


def test_the_bias_of_a_pairwise_output_is_not_learnt() -> None:
    """It cancels in every difference of scores, so that all that could move it is rounding."""
    job = example_job()
    raw = job.to_dict()
    raw["schema"] |= {"user": "user", "item": "item"}
    raw["schema"]["tasks"]["buy"] = {"kind": "pairwise"}
    raw["data"]["negatives"] = {"task": "buy"}
    job = job_from_dict(raw, "test")
    model = build_model(job, example_schema(job), torch.device("cpu"))
    towers = model.towers
    assert isinstance(towers, Towers)
    first = towers.layers[0].weight
    assert isinstance(first, torch.Tensor)
    towers(torch.randn(3, 5, first.shape[1])).sum().backward()
    gradient = towers.output_bias.grad
    assert gradient is not None and gradient.flatten().tolist() == [5.0, 0.0, 5.0]
