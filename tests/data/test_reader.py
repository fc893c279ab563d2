"""The reader on Parquet files: the order, the batches, resuming, errors, stopping."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtlrec.batch import Batch
from mtlrec.data import assemble
from mtlrec.data.ids import rows_of as table_rows
from mtlrec.data.order import Position, lane_rows, worker_lanes
from mtlrec.data.reader import Reader
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.job.model import ModelSection
from mtlrec.job.schema import SchemaSection
from mtlrec.priority import BATCHES
from mtlrec.schema import build_schema
from tests.data.numbered import (
    LANES,
    SECTION,
    broken,
    flat,
    make_table,
    open_data,
    our_threads,
    read,
    reader,
    rows_of,
    write,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    """1,003 rows in 3 shards and 21 row groups."""
    return open_data(write(tmp_path_factory.mktemp("data") / "train", 1003))


def check_batch(batch, stride):
    """Every column of a batch belongs to the rows that it says it has, and padding is empty."""
    n, rows = batch.num_rows, batch.rows
    real = rows[:n]
    assert rows.shape == (stride,) and (real >= 0).all() and (rows[n:] == -1).all()
    assert batch.ids.keys() == ["scenario", "row_id", "seen", "maybe"]
    assert batch.ids.stride() == stride
    assert batch.ids.values().dtype == torch.int64
    jagged = batch.ids.to_dict()
    for name, each in jagged.items():
        lengths = each.lengths()
        assert lengths.shape == (stride,) and (lengths[n:] == 0).all(), name
    assert jagged["scenario"].values().tolist() == (real % 3).tolist()
    assert jagged["row_id"].values().tolist() == real.tolist()
    assert jagged["row_id"].lengths()[:n].tolist() == [1] * n
    assert jagged["seen"].lengths()[:n].tolist() == (real % 4).tolist()
    assert jagged["seen"].values().tolist() == [r + i for r in real.tolist() for i in range(r % 4)]
    assert jagged["maybe"].lengths()[:n].tolist() == (real % 5 != 0).int().tolist()
    assert jagged["maybe"].values().tolist() == real[real % 5 != 0].tolist()
    assert batch.dense.shape == (stride, 3) and batch.dense.dtype == torch.float32
    assert torch.equal(batch.dense[:n], torch.stack([real, real / 2, -real], 1).float())
    assert batch.labels.shape == batch.valid.shape == (stride, 2)
    assert torch.equal(batch.valid[:n], torch.stack([real % 7 != 0, real % 3 != 0], 1))
    expected = torch.stack([(real % 2).float(), real / 4], 1) * batch.valid[:n]
    assert torch.equal(batch.labels[:n], expected)
    assert batch.scenario.dtype == torch.int64
    assert batch.scenario[:n].tolist() == (real % 3).tolist()
    for padded in (batch.dense[n:], batch.labels[n:], batch.valid[n:], batch.scenario[n:]):
        assert not padded.any()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_holds_what_its_rows_hold(data, world_size, shuffle):
    stride = -(-LANES // world_size) * 4
    for rank in range(world_size):
        batches = read(data, rank=rank, world_size=world_size, shuffle=shuffle)
        assert len(batches) == 16
        for batch in batches:
            check_batch(batch, stride)
        assert batches[-1].num_rows < batches[0].num_rows


@pytest.mark.parametrize("world_size", [2, 3, 5, 7, 16, 17])
def test_any_number_of_workers_reads_the_same_steps(data, world_size):
    alone = read(data, epochs=2)
    ranks = [read(data, epochs=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(each) for each in ranks} == {len(alone)}
    assert [flat(step) for step in zip(*(rows_of(each) for each in ranks), strict=True)] == rows_of(alone)
    for step in zip(alone, *ranks, strict=True):
        assert {batch.position for batch in step} == {step[0].position}
        assert {len(batch.rows) for batch in step[1:]} == {-(-LANES // world_size) * 4}


@pytest.mark.parametrize("window", [1, 3, 24, 10_000])
def test_every_row_comes_once_an_epoch_in_another_order(data, window):
    batches = read(data, epochs=3, window=window)
    epochs: list[list[int]] = [[], [], []]
    for batch, rows in zip(batches, rows_of(batches), strict=True):
        # The position is behind the batch: the last batch of an epoch has the next one's number.
        epochs[batch.position.epoch - (not any(batch.position.done))].extend(rows)
    assert [sorted(each) for each in epochs] == [list(range(1003))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches[-1].position == Position(0, 3, (0,) * LANES)


def test_neither_threads_nor_what_is_read_ahead_change_anything(data):
    expected = rows_of(read(data, epochs=2, threads=1, ahead=1))
    for threads in (0, 2, 5):
        assert rows_of(read(data, epochs=2, threads=threads, ahead=9)) == expected


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_built_together_are_those_built_one_by_one(data, monkeypatch, world_size):
    def contents(together: int) -> list[list[object]]:
        monkeypatch.setattr(assemble, "_ROWS_TOGETHER", together)
        batches = read(data, epochs=2, window=40, rank=world_size - 1, world_size=world_size)
        found = []
        for each in batches:
            ids = [each.ids.values(), each.ids.lengths()]
            tensors = [*ids, each.dense, each.labels, each.valid, each.scenario, each.rows]
            assert all(tensor.is_contiguous() for tensor in tensors)
            found.append([each.position, each.step, each.num_rows, *(tensor.tolist() for tensor in tensors)])
        return found

    alone = contents(1)
    assert contents(100) == alone
    assert contents(10_000) == alone


def test_seed_and_window_change_the_order(data):
    orders = [flat(rows_of(read(data, **o))) for o in ({}, {"seed": 6}, {"window": 25}, {"shuffle": False})]
    assert len({tuple(order) for order in orders}) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(1003))}


@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("world_size", [1, 3])
def test_fewer_rows_than_lanes(tmp_path, num_rows, world_size):
    data = open_data(write(tmp_path / "tiny", num_rows, files=1))
    ranks = [read(data, epochs=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = list(zip(*(rows_of(each) for each in ranks), strict=True))
    assert len(steps) == 2
    assert [sorted(flat(step)) for step in steps] == [list(range(num_rows))] * 2
    for batch in flat(ranks):
        check_batch(batch, -(-LANES // world_size) * 4)


@pytest.mark.parametrize(("window", "rank", "world_size"), [(3, 0, 1), (24, 0, 1), (1000, 0, 1), (3, 1, 3)])
def test_going_on_after_any_step_gives_the_identical_tail(tmp_path, window, rank, world_size):
    data = open_data(write(tmp_path / "data", 503))
    options = {"window": window, "rank": rank, "world_size": world_size, "epochs": 2}
    whole = read(data, **options)
    for at, batch in enumerate(whole[:-1]):
        tail = read(data, position=batch.position, **options)
        assert rows_of(tail) == rows_of(whole[at + 1 :])
        assert [each.position for each in tail] == [each.position for each in whole[at + 1 :]]
    assert len(whole) == 16 and read(data, position=whole[-1].position, **options) == []


def test_a_run_goes_on_with_another_number_of_workers(data):
    whole = rows_of(read(data))
    position = read(data)[4].position
    ranks = [rows_of(read(data, position=position, rank=rank, world_size=3)) for rank in range(3)]
    assert [flat(step) for step in zip(*ranks, strict=True)] == whole[5:]


@pytest.mark.parametrize("batch_size", [16, 48, 160, 4096])
def test_a_run_goes_on_with_another_batch_size(data, batch_size):
    before = read(data)[:7]
    after = read(data, position=before[-1].position, batch_size=batch_size, epochs=2)
    trained = flat(rows_of(before)) + flat(rows_of(after))
    assert Counter(trained) == Counter(list(range(1003)) * 2)
    # Each lane goes on in its own order. 7 steps of 4 rows are done.
    b = batch_size // LANES
    lanes = lane_rows(1003, LANES)
    whole = read(data, batch_size=LANES)
    expected = [flat(batch.rows.tolist()[lane : lane + 1] for batch in whole[28 : min(28 + b, 62)])
                for lane in range(LANES)]  # fmt: skip
    assert min(lanes) == 62
    first = after[0].rows.tolist()
    at = 0
    for lane in range(LANES):
        taken = min(b, lanes[lane] - 28)
        assert first[at : at + taken][: 62 - 28] == expected[lane]
        at += taken


def test_steps_are_counted(data):
    with reader(data, epochs=3) as found:
        assert found.steps_per_epoch == 16
        assert found.steps_left(Position.start(LANES)) == 48
        for done, batch in enumerate(found, start=1):
            assert found.steps_left(batch.position) == 48 - done
    assert done == 48
    with reader(data, epochs=1, position=Position(0, 1, (0,) * LANES)) as found:
        assert found.steps_left(Position(0, 1, (0,) * LANES)) == 0
        assert list(found) == []


def test_a_position_at_an_epochs_very_end_means_the_next_epochs_start(data):
    at_end = Position(0, 0, lane_rows(1003, LANES))
    second_epoch = rows_of(read(data, epochs=2))[16:]
    assert rows_of(read(data, epochs=2, position=at_end)) == second_epoch
    with reader(data, epochs=2, position=at_end) as found:
        assert found.steps_left(at_end) == 16


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_unshuffled_the_ranks_read_one_after_the_other_in_the_order_of_the_files(data, world_size):
    ranks = [
        flat(rows_of(read(data, shuffle=False, lanes=world_size, batch_size=40 * world_size, window=64,
                          rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]  # fmt: skip
    assert flat(ranks) == list(range(1003))
    assert [worker_lanes(world_size, rank, world_size) for rank in range(world_size)] == [
        range(rank, rank + 1) for rank in range(world_size)
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_keys_pass_through(data, shuffle):
    expected = make_table(range(1003)).select(["name", "row_id"]).to_pylist()
    for rank in range(3):
        for batch in read(data, shuffle=shuffle, keys=["name", "row_id"], rank=rank, world_size=3):
            assert batch.keys is not None
            assert batch.keys.schema.types == [pa.string(), pa.int64()]
            assert batch.keys.to_pylist() == [expected[row] for row in batch.rows[: batch.num_rows]]
    # A worker whose lanes have no row left, or never had one.
    (batch,) = read(data, keys=["name"], lanes=1, batch_size=2000, rank=0, world_size=2)
    assert batch.num_rows == 0 and batch.keys is not None
    assert batch.keys.num_rows == 0 and batch.keys.column_names == ["name"]
    assert read(data)[0].keys is None


def test_labels_need_not_exist_for_prediction(tmp_path):
    url = write(tmp_path / "new", 100, change=lambda each: each.drop_columns(["click", "stars"]))
    batches = read(open_data(url, labels=False), labels=False)
    assert sorted(flat(rows_of(batches))) == list(range(100))
    assert not any(batch.valid.any() or batch.labels.any() for batch in batches)
    assert {batch.labels.shape for batch in batches} == {(64, 2)}


def test_only_the_columns_that_are_needed_are_read(data, monkeypatch):
    wanted = []
    read_group = Dataset.read_group

    def watched(self, group, columns):
        wanted.append(columns)
        return read_group(self, group, columns)

    monkeypatch.setattr(Dataset, "read_group", watched)
    read(data, keys=["row_id", "name"])
    read(data, labels=False)
    features = ["row_id", "seen", "maybe", "age", "pair", "country"]
    assert wanted[0] == [*features, "click", "stars", "name"]
    assert wanted[-1] == features


def test_closing_stops_every_thread(data):
    for consumed in (0, 1, 5):
        found = reader(data, epochs=1000, threads=3)
        assert len(our_threads()) == 4 and all(thread.daemon for thread in our_threads())
        for _ in range(consumed):
            next(found)
        began = time.monotonic()
        found.close()
        assert our_threads() == [] and time.monotonic() - began < 5
        assert list(found) == []
        found.close()


def test_threads_that_read_ahead_let_training_go_first(data):
    """As far as the system's scale of niceness goes."""

    def niceness(thread):
        return os.getpriority(os.PRIO_PROCESS, thread.native_id)

    here = niceness(threading.current_thread())
    for threads in (0, 2):
        with reader(data, epochs=1000, threads=threads):
            assert len(our_threads()) == threads + 1
            deadline = time.monotonic() + 10
            # Each sees to it itself, once it runs.
            while {niceness(each) for each in our_threads()} != {min(here + BATCHES, 19)}:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert niceness(threading.current_thread()) == here


def test_a_reader_that_is_dropped_stops_by_itself(data):
    found = reader(data, epochs=1000)
    next(found)
    del found
    gc.collect()
    deadline = time.monotonic() + 10
    while our_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert our_threads() == []


def test_closing_wakes_a_consumer_that_waits(data, monkeypatch):
    hold = threading.Event()
    monkeypatch.setattr(Dataset, "read_group", lambda self, group, columns: hold.wait())
    found = reader(data)
    got: list[Batch] = []
    consumer = threading.Thread(target=lambda: got.extend(found))
    consumer.start()
    found._stop()
    consumer.join(5)
    assert not consumer.is_alive() and got == []
    hold.set()
    found.close()
    assert our_threads() == []


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("click", 2, "2.0 is not a label of a binary task; 0, 1 (or false, true) and null are"),
        ("country", "xx", "'xx' is not a scenario; schema.scenario.values allows de, fr, uk"),
        ("country", None, "null is not a scenario; schema.scenario.values allows de, fr, uk"),
        ("maybe", -3, "id -3 is outside the table: identity ids are 0 <= id < 100000"),
        ("seen", [1, 100_000], "id 100000 is outside the table: identity ids are 0 <= id < 100000"),
        ("age", float("inf"), "inf is not a finite number; null or NaN stand for none"),
        ("stars", float("-inf"), "-inf is not a finite number; null or NaN stand for none"),
        ("pair", [1.0], "1 numbers; schema.features.pair.size is 2"),
    ],
)
def test_a_row_that_does_not_fit_is_named_once(tmp_path, column, value, problem):
    # Shard 1 of 3 begins at row 100, so row 163 is the 13th of its second row group.
    url = write(tmp_path / "bad", 300, change=broken(163, column, value))
    with reader(open_data(url)) as found:
        with pytest.raises(InputError) as caught:
            list(found)
        assert str(caught.value) == f"{url}/part-1.parquet, row group 1, row 13, column {column}: {problem}"
        assert list(found) == []
    assert our_threads() == []


def test_what_cannot_be_read_on_is_refused(data):
    with pytest.raises(InputError, match=r"data\.batch_size: 65 is not a multiple of data\.lanes \(16\)"):
        reader(data, batch_size=65)
    with pytest.raises(InputError, match="counts 3 lanes and the job has 16"):
        reader(data, position=Position.start(3))
    with pytest.raises(InputError, match="position belongs to other data"):
        reader(data, position=Position(0, 0, (64,) * LANES))
    assert our_threads() == []


@pytest.mark.parametrize("world_size", [1, 3])
def test_sample_weights_come_with_their_rows_and_padding_has_none(tmp_path, world_size):
    section = {**SECTION, "weight": "age"}
    schema = build_schema(SchemaSection.model_validate(section), ModelSection())
    data = Dataset.open(write(tmp_path / "data", 203), schema.columns())
    options = {"batch_size": 64, "lanes": LANES, "window": 24, "shuffle": True, "seed": 5, "epochs": 1,
               "position": Position.start(LANES), "world_size": world_size}  # fmt: skip
    for rank in range(world_size):
        with Reader(data, schema, rank=rank, **options) as found:
            for batch in found:
                assert batch.weight is not None and batch.weight.dtype == torch.float32
                assert torch.equal(batch.weight, batch.rows.clamp(min=0).float())
        with Reader(data, schema, rank=rank, labels=False, **options) as found:
            assert next(found).weight is None


def test_batches_count_the_runs_steps(data):
    assert [batch.step for batch in read(data, epochs=2)] == list(range(32))
    whole = read(data, epochs=2, first_step=100)
    assert [batch.step for batch in whole] == list(range(100, 132))
    tail = read(data, epochs=2, position=whole[19].position, first_step=120)
    assert [batch.step for batch in tail] == list(range(120, 132))
    assert whole[0].negatives is None and whole[0].weight is None


def test_a_schema_of_numbers_alone(data):
    section = {"features": {"age": {"kind": "number"}}, "tasks": {"click": {"kind": "binary"}}}
    schema = build_schema(SchemaSection.model_validate(section), ModelSection())
    with Reader(data, schema, batch_size=64, lanes=LANES, window=24, shuffle=True, seed=5,
                position=Position.start(LANES), epochs=1) as found:  # fmt: skip
        batches = list(found)
    assert sorted(flat(rows_of(batches))) == list(range(1003))
    assert batches[0].ids.keys() == [] and len(batches[0].ids.values()) == 0


def test_text_ids_and_lists_of_text(tmp_path):
    texts = [f"item {row}" if row % 3 else None for row in range(200)]
    lists = [[f"item {row + i}" for i in range(row % 3)] + [None] for row in range(200)]
    folder = tmp_path / "texts"
    folder.mkdir()
    columns = {"item": texts, "seen": lists, "click": [row % 2 for row in range(200)]}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=30)
    section = {
        "features": {"seen": {"kind": "id_list", "table": "item"}, "item": {"kind": "id", "rows": 10**6}},
        "tasks": {"click": {"kind": "binary"}},
    }
    schema = build_schema(SchemaSection.model_validate(section), ModelSection())
    data = Dataset.open(str(folder), schema.columns())
    row_of = table_rows(pa.array([f"item {row}" for row in range(203)]), 10**6, "hash").tolist()
    with Reader(data, schema, batch_size=64, lanes=16, window=20, shuffle=True, seed=1,
                position=Position.start(16), epochs=1) as found:  # fmt: skip
        for batch in found:
            rows = batch.rows[: batch.num_rows].tolist()
            jagged = batch.ids.to_dict()
            assert list(jagged) == ["seen", "item"]
            assert jagged["seen"].values().tolist() == [row_of[r + i] for r in rows for i in range(r % 3)]
            assert jagged["item"].values().tolist() == [row_of[r] for r in rows if r % 3]
            assert jagged["item"].lengths()[: len(rows)].tolist() == [int(r % 3 > 0) for r in rows]
