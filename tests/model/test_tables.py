from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mtlrec.model.tables import build_tables, output_names, pool
from mtlrec.schema import Schema
from tests.model.example import cut, example_job, example_schema, global_rows


class Shuffled(nn.Module):
    """Returns the embeddings in another order, as a sharded collection may."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        found = self.tables(ids).to_dict()
        keys = sorted(found, reverse=True)
        return KeyedTensor(
            keys, [found[key].shape[1] for key in keys], torch.cat([found[key] for key in keys], dim=1)
        )


def real_tables(schema: Schema) -> nn.Module:
    tables = build_tables(schema, torch.device("cpu"))
    assert tables is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in tables.parameters():
            weights.copy_(torch.randn(weights.shape, generator=generator))
    return tables


def test_pooled_as_one_row_at_a_time_would_be() -> None:
    schema = example_schema(example_job())
    tables = real_tables(schema)
    rows = global_rows(schema, 48, seed=1, present=2)
    batch = cut(rows, schema, 0, 1)
    weights = {name.split(".")[1]: value for name, value in tables.named_parameters()}
    parts = pool(tables, batch.ids, schema.lookups)
    pooled = torch.cat(parts, dim=1).split([lookup.width for lookup in schema.lookups], dim=1)
    for lookup, found in zip(schema.lookups, pooled, strict=True):
        table = schema.table_of[lookup.table]
        assert found.shape == (48, lookup.width)
        jagged = batch.ids[lookup.feature].to_dense()
        for row, ids in enumerate(jagged):
            expected = torch.zeros(table.dim)
            for each in ids.tolist():
                expected = expected + weights[table.name][each]
            if table.pooling == "mean" and len(ids):
                expected = expected / len(ids)
            torch.testing.assert_close(found[row], expected)
    empty = [len(ids) == 0 for ids in batch.ids["history"].to_dense()]
    assert any(empty) and not all(empty)


def test_picked_by_key_whatever_the_order() -> None:
    schema = example_schema(example_job())
    tables = real_tables(schema)
    batch = cut(global_rows(schema, 48, seed=1), schema, 0, 1)
    names = output_names(schema.lookups)
    assert list(Shuffled(tables)(batch.ids).keys()) != names
    expected = pool(tables, batch.ids, schema.lookups)
    found = pool(Shuffled(tables), batch.ids, schema.lookups)
    assert torch.equal(torch.cat(expected, dim=1), torch.cat(found, dim=1))


def test_what_lies_in_order_is_not_cut() -> None:
    schema = example_schema(example_job())
    tables = real_tables(schema)
    batch = cut(global_rows(schema, 48, seed=1), schema, 0, 1)
    of = dict(zip(output_names(schema.lookups), schema.lookups, strict=True))
    assert any(lookup.mean for lookup in of.values())
    sums = [replace(of[key], mean=False) for key in tables(batch.ids).keys()]  # noqa: SIM118
    (whole,) = pool(tables, batch.ids, sums)
    last, first = pool(tables, batch.ids, [*sums[2:], *sums[:2]])
    assert first.shape[1] == sums[0].width + sums[1].width
    assert torch.equal(torch.cat([first, last], dim=1), whole)


def test_names_are_those_of_the_collection() -> None:
    schema = example_schema(example_job())
    names = output_names(schema.lookups)
    assert names.index("brand@brand_wide") == names.index("brand@brand_narrow") + 1
    assert "item" in names and "history" in names
    batch = cut(global_rows(schema, 48, seed=1), schema, 0, 1)
    assert sorted(names) == sorted(real_tables(schema)(batch.ids).keys())


def test_tables_are_the_schemas() -> None:
    schema = example_schema(example_job())
    tables = build_tables(schema, torch.device("meta"))
    assert tables is not None
    configs = {config.name: config for config in tables.embedding_bag_configs()}
    assert list(configs) == [table.name for table in schema.tables]
    assert (configs["item"].num_embeddings, configs["item"].embedding_dim) == (41, 8)
    assert (configs["brand_wide"].embedding_dim, configs["brand_narrow"].embedding_dim) == (12, 4)
    assert configs["brand_wide"].feature_names == configs["brand_narrow"].feature_names == ["brand"]
    # One table for an id and a list of ids of the same kind.
    assert configs["item"].feature_names == ["item", "history"]
    assert all(parameter.device.type == "meta" for parameter in tables.parameters())
