"""Negatives against plain loops: the index, the draws and their distribution, the batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec.batch import Batch
from mtlrec.control import Silent
from mtlrec.data import negatives as module
from mtlrec.data.negatives import Index, Sampler, scaled, weights
from mtlrec.data.order import Position
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.distributed import World
from mtlrec.interactions import build_index
from mtlrec.job.errors import InputError
from tests.data.interactions import ITEM_SIDE, SCENARIOS, SCHEMA, Plain, hash_of, make_table, negatives, write

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ROWS, LANES, STEP, SEED = 500, 6, 17, 5
BOTH = pytest.mark.parametrize("distribution", ["uniform", "popularity"])


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return make_table(ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> Dataset:
    """500 rows in 3 shards and 15 row groups."""
    return write(tmp_path_factory.mktemp("data") / "train", table)


def index_of(data: Dataset, **changes: Any) -> Index:
    return build_index(data, SCHEMA, negatives(**changes), {}, ALONE, Silent())


def sampler_of(data: Dataset, **changes: Any) -> Sampler:
    return Sampler(index_of(data, **changes), SCHEMA, negatives(**changes), SEED)


def read(data: Dataset, sampler: Sampler | None = None, **options: Any) -> list[Batch]:
    defaults: dict[str, Any] = {
        "batch_size": 48, "lanes": LANES, "window": 20, "shuffle": True, "seed": 3, "epochs": 2,
        "position": Position.start(LANES), "first_step": STEP,
    }  # fmt: skip
    with Reader(data, SCHEMA, negatives=sampler, **{**defaults, **options}) as reader:
        return list(reader)


@pytest.mark.parametrize("settle", [1, 2**20])
@pytest.mark.parametrize("task", ["click", "like"])
def test_the_index_is_what_plain_loops_find(data, table, task, settle, monkeypatch):
    monkeypatch.setattr("mtlrec.interactions._SETTLE", settle)
    index, plain = index_of(data, task=task), Plain.of(table, task)
    assert index.users.tolist() == sorted(plain.met)
    items = index.items.tolist()
    assert items == sorted({item for scenario in plain.first for item in scenario})
    pairs = [(int(index.users[pair >> 32]), items[pair & 2**32 - 1]) for pair in index.pairs.tolist()]
    assert pairs == sorted((user, item) for user, met in plain.met.items() for item in met)
    entries = [(entry >> 32, items[entry & 2**32 - 1]) for entry in index.entries.tolist()]
    assert entries == [(s, item) for s in range(3) for item in sorted(plain.first[s])]
    assert index.positives.tolist() == [plain.positives[s][item] for s, item in entries]
    assert index.catalogue.rows.tolist() == [plain.first[s][item] for s, item in entries]
    assert index.catalogue.scenario.tolist() == [s for s, _ in entries]
    rows = table.take(index.catalogue.rows).to_pylist()
    kind, level, item = index.catalogue.ids
    assert kind.tolist() == [-1 if row["kind"] is None else row["kind"] for row in rows]
    price = [row["price"] for row in rows]
    assert level.tolist() == [0 if p is None else 1 + (p >= 3) + (p >= 9) for p in price]
    assert item.tolist() == [hash_of(row["item"]) % 2**20 for row in rows]
    dense = [[np.log1p(row["price"] or 0), *row["look"]] for row in rows]
    np.testing.assert_allclose(index.catalogue.dense, dense, rtol=1e-6)
    (tags,) = index.catalogue.lists
    lists = [tags.values[a:b].tolist() for a, b in zip(tags.offsets, tags.offsets[1:], strict=False)]
    assert lists == [row["tags"] for row in rows]


def test_without_a_positive_nothing_can_be_drawn(tmp_path):
    table = make_table(50)
    none = table.set_column(table.column_names.index("click"), "click", pa.array([False] * 50))
    with pytest.raises(
        InputError, match="no row has the label 1 for task 'click' and both a user and an item"
    ):
        index_of(write(tmp_path / "none", none))


@pytest.mark.parametrize("lacking", ["click", "item"])
@BOTH
def test_data_that_may_be_without_a_positive_draw_nothing(tmp_path, lacking, distribution):
    table = make_table(60)
    place, kind = table.column_names.index(lacking), table.schema.field(lacking).type
    nothing = pa.array([False] * 60) if lacking == "click" else pa.nulls(60, kind)
    data = write(tmp_path / "none", table.set_column(place, lacking, nothing))
    section = negatives(distribution=distribution)
    index = build_index(data, SCHEMA, section, {}, ALONE, Silent(), may_be_empty=True)
    batches = read(data, Sampler(index, SCHEMA, section, SEED), epochs=1)
    assert sum(batch.num_rows for batch in batches) == 60
    assert all(batch.negatives is not None and not batch.negatives.any() for batch in batches)


def test_a_bad_label_is_named_while_the_index_is_built(tmp_path):
    table = make_table(50)
    click = pa.array([0] * 30 + [7] + [1] * 19)
    bad = table.set_column(table.column_names.index("click"), "click", click)
    with pytest.raises(
        InputError, match=r"part-0\.parquet, row group 0, row 30, column click: 7\.0 is not a label"
    ):
        index_of(write(tmp_path / "bad", bad, files=1))


@BOTH
@pytest.mark.parametrize("task", ["click", "like"])
@pytest.mark.parametrize("together", [2, 2**20])
def test_draws_are_those_of_plain_loops(data, table, distribution, task, together, monkeypatch):
    monkeypatch.setattr(module, "_EXACT_PAIRS", together)
    section = negatives(task=task, distribution=distribution)
    sampler, plain = sampler_of(data, task=task, distribution=distribution), Plain.of(table, task)
    users = sorted(plain.met)
    entries = [(s, item) for s in range(3) for item in sorted(plain.first[s])]
    rows, numbers, scenarios = [], [], []
    for number, row in enumerate(table.to_pylist()):
        known = plain.is_positive(row, task)
        rows.append(number)
        numbers.append(users.index(hash_of(row["user"])) if known else -1)
        scenarios.append(SCENARIOS.index(row["country"]))
    arguments = np.array(rows), np.array(numbers, np.int32), np.array(scenarios, np.int32)
    found = sampler.draw(*arguments, STEP)
    absent = 0
    for row, user, scenario, drawn in zip(rows, numbers, scenarios, found.tolist(), strict=True):
        items = [None if entry < 0 else entries[entry] for entry in drawn]
        if user < 0:
            assert items == [None] * 3
            continue
        expected = plain.draw(section, SEED, STEP, row, users[user], scenario)
        assert items == [None if item is None else (scenario, item) for item in expected]
        assert not {item for item in expected if item} & plain.met[users[user]]
        absent += expected == [None] * 3
    # Of what is liked no user has met everything.
    assert absent > 5 or task == "like"
    # Neither the other rows nor their order have a say.
    order = np.random.default_rng(0).permutation(len(rows))[:77]
    row_numbers, users_of, scenarios_of = arguments
    shuffled = sampler.draw(row_numbers[order], users_of[order], scenarios_of[order], STEP)
    assert (shuffled == found[order]).all()
    assert (sampler.draw(*arguments, STEP + 1) != found).any()


def made(positives: list[list[int]], met: list[set[int]], **changes: Any) -> Sampler:
    """positives: of each item, by scenario; met: the items of each user."""
    some = negatives(per_positive=4, features=[], **changes)
    count = len(positives[0])
    index = Index(
        np.arange(len(met), dtype=np.uint64),
        np.arange(count, dtype=np.uint64),
        np.array([user << 32 | item for user, items in enumerate(met) for item in sorted(items)], np.int64),
        np.array([s << 32 | item for s in range(len(positives)) for item in range(count)], np.int64),
        np.array(positives, np.int64).reshape(-1),
        SimpleNamespace(),  # type: ignore[arg-type]  # no feature is asked for
    )
    return Sampler(index, SCHEMA, some, SEED)


@BOTH
@pytest.mark.parametrize("tries", [0, 1, 8])
@pytest.mark.parametrize("met", [{3}, {0, 1, 2, 5, 6, 7, 8, 11}])
def test_draws_are_distributed_as_defined(distribution, tries, met, monkeypatch):
    monkeypatch.setattr(module, "TRIES", tries)
    popular = [5, 0, 1, 7, 30, 2, 2, 0, 1, 9, 0, 4]
    sampler = made([[3] * 12, popular, [1] * 12], [met, {4}], distribution=distribution, exponent=0.75)
    n = 20_000
    found = sampler.draw(np.arange(n), np.zeros(n, np.int32), np.full(n, 1, np.int32), 0) - 12
    weight = np.array([1.0] * 12 if distribution == "uniform" else np.array(popular) ** 0.75)
    weight[sorted(met)] = 0
    expected = weight / weight.sum() * 4 * n
    counts = np.bincount(found.reshape(-1), minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi < freedom + 4 * np.sqrt(2 * freedom)
    # The four of a row know nothing of each other.
    same = (found[:, 0] == found[:, 1]).mean()
    chance = ((expected / expected.sum()) ** 2).sum()
    assert abs(same - chance) < 4 * np.sqrt(chance / n)


def test_who_has_met_everything_gets_nothing_and_who_has_met_all_but_one_that_one():
    every = set(range(300))
    sampler = made([[1] * 300] * 3, [every, every - {123}])
    rows, users = np.arange(1000), np.arange(1000, dtype=np.int32) % 2
    found = sampler.draw(rows, users, np.full(1000, 2, np.int32), 0)
    assert (found[users == 0] == -1).all()
    assert (found[users == 1] == 600 + 123).all()


def test_exponent_0_is_uniform_over_every_item():
    positives, starts = np.array([5, 0, 1, 0, 0]), np.array([0, 3, 5])
    assert len(set(weights(positives, starts, 0.0)[:3].tolist())) == 1
    assert weights(positives, starts, 1.0).tolist()[3:] == [0, 0]
    assert weights(np.array([10**9, 1]), np.array([0, 2]), 3.0)[1] == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**62 - 1)), min_size=1))
def test_scaling_is_exact(pairs):
    chance, size = np.array([c for c, _ in pairs], np.uint64), np.array([s for _, s in pairs], np.int64)
    assert scaled(chance, size).tolist() == [c * s >> 64 for c, s in pairs]


def jagged(batch: Batch) -> list[dict[str, list[int]]]:
    """The ids of each of a batch's M rows."""
    found: list[dict[str, list[int]]] = [{} for _ in range(batch.ids.stride())]
    for name, each in batch.ids.to_dict().items():
        values = iter(each.values().tolist())
        for row, length in zip(found, each.lengths().tolist(), strict=True):
            row[name] = [next(values) for _ in range(length)]
    return found


@BOTH
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_batch_holds_each_row_and_its_negatives(data, table, distribution, world_size):
    section, plain = negatives(distribution=distribution), Plain.of(table)
    sampler = sampler_of(data, distribution=distribution)
    rows = table.to_pylist()
    # Features of every row, from a reader that draws nothing.
    ids: dict[int, dict[str, list[int]]] = {}
    dense: dict[int, list[float]] = {}
    for batch in read(data, epochs=1, shuffle=False):
        for at, ids_of in enumerate(jagged(batch)[: batch.num_rows]):
            ids[int(batch.rows[at])] = ids_of
            dense[int(batch.rows[at])] = batch.dense[at].tolist()
    stride = -(-LANES // world_size) * 8
    drawn = 0
    for rank in range(world_size):
        for step, batch in enumerate(read(data, sampler, rank=rank, world_size=world_size), STEP):
            assert batch.step == step and batch.per_positive == 3
            assert len(batch.labels) == len(batch.valid) == len(batch.rows) == stride
            assert batch.negatives is not None and batch.negatives.shape == (stride, 3)
            assert batch.negatives.dtype == torch.bool
            assert len(batch.dense) == len(batch.scenario) == batch.ids.stride() == 4 * stride
            found = jagged(batch)
            for at, number in enumerate(batch.rows.tolist()):
                entries: list[int | None] = [None] * 3
                if number >= 0:
                    row, scenario = rows[number], SCENARIOS.index(rows[number]["country"])
                    assert found[at] == ids[number] and batch.dense[at].tolist() == dense[number]
                    assert batch.scenario[at] == scenario
                    if plain.is_positive(row, "click"):
                        entries = plain.draw(section, SEED, step, number, hash_of(row["user"]), scenario)
                assert batch.negatives[at].tolist() == [entry is not None for entry in entries]
                for j, entry in enumerate(entries):
                    place = stride + 3 * at + j
                    if entry is None:
                        assert not any(found[place].values())
                        assert not batch.dense[place].any() and not batch.scenario[place]
                        continue
                    drawn += 1
                    origin = plain.first[scenario][entry]
                    assert found[place] == {
                        name: ids[origin if name in ("item", *ITEM_SIDE) else number][name]
                        for name in ids[number]
                    }
                    age, *others = range(4)
                    assert batch.dense[place, age] == dense[number][age]
                    assert batch.dense[place, others].tolist() == dense[origin][1:]
                    assert batch.scenario[place] == scenario
    assert drawn > 500


def test_a_run_that_goes_on_draws_the_same(data):
    sampler = sampler_of(data, features=[])
    whole = read(data, sampler)
    for at in (3, len(whole) - 2):
        tail = read(data, sampler, position=whole[at].position, first_step=STEP + at + 1)
        for one, other in zip(tail, whole[at + 1 :], strict=True):
            assert one.step == other.step
            assert one.negatives is not None and other.negatives is not None
            assert torch.equal(one.negatives, other.negatives)
            assert torch.equal(one.ids.values(), other.ids.values())
            assert torch.equal(one.ids.lengths(), other.ids.lengths())
    # Another epoch draws others.
    epoch = len(whole) // 2
    draws: list[dict[int, list[Any]]] = [{}, {}]
    for at, batch in enumerate(whole):
        stride = len(batch.rows)
        items = [row["item"] for row in jagged(batch)]
        for place, number in enumerate(batch.rows.tolist()):
            draws[at // epoch][number] = items[stride + 3 * place : stride + 3 * place + 3]
    assert draws[0].keys() == draws[1].keys() and draws[0] != draws[1]


def test_a_worker_without_rows_has_batches_of_the_same_shape(tmp_path):
    data = write(tmp_path / "tiny", make_table(3, seed=4), files=1)
    sampler = sampler_of(data)
    batches = [read(data, sampler, epochs=1, rank=rank, world_size=LANES) for rank in range(LANES)]
    assert sorted(batch.num_rows for (batch,) in batches) == [0, 0, 0, 1, 1, 1]
    assert {(len(b.rows), b.ids.stride(), len(b.dense), b.per_positive) for (b,) in batches} == {
        (8, 32, 32, 3)
    }


def test_without_a_sampler_nothing_is_drawn(data):
    batch = read(data)[0]
    assert batch.negatives is None and batch.per_positive == 0
    assert len(batch.dense) == len(batch.rows) == batch.ids.stride()
