"""Any number of workers builds the same file of a vocabulary, from whatever order the data comes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec import storage, vocabularies, watchdog
from mtlrec.control import Silent
from mtlrec.data.ids import hash_ids
from mtlrec.data.shards import Dataset
from mtlrec.data.vocabulary import Vocabulary
from mtlrec.distributed import World, all_ok
from mtlrec.job.errors import InputError
from mtlrec.schema import Column
from mtlrec.vocabularies import Wanted, build
from tests.data.numbered import count_reads
from tests.distributed.processes import Results, run_processes

pytest_plugins = ["tests.s3_server"]
pytestmark = pytest.mark.distributed

HERE = "tests.distributed.test_vocabularies"
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ITEM = Wanted("item", ("item_id", "history"), 2, None, 3)
USER = Wanted("user", ("user_id",), 1, 40, 1)
COLUMNS = [Column("item_id", "id", "here"), Column("history", "id_list", "here"), Column("user_id", "id", "")]


def write_data(folder: Path, rows: int = 3000, shards: int = 4, group: int = 110, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    users = (generator.zipf(1.3, rows) % 500).astype(np.int64) - 100
    items = [f"i{value % 900}" for value in generator.zipf(1.2, rows)]
    lists = [
        None if length == 0 else [f"i{value}" for value in generator.integers(0, 1200, length - 1)]
        for length in generator.integers(0, 6, rows)
    ]
    table = pa.table(
        {
            "user_id": pa.array(users, mask=generator.random(rows) < 0.1),
            "item_id": items,
            "history": pa.array(lists, pa.list_(pa.string())),
            "click": np.zeros(rows, np.int8),
        }
    )
    write_shards(folder, table, shards, group)
    return table


def write_shards(folder: Path, table: pa.Table, shards: int = 1, group: int = 100) -> None:
    folder.mkdir(parents=True)
    size = -(-table.num_rows // shards)
    for number in range(shards):
        pq.write_table(table.slice(number * size, size), folder / f"{number}.parquet", row_group_size=group)


def open_data(folder: Path | str, columns: Sequence[Column] = COLUMNS) -> Dataset:
    return Dataset.open(str(folder), columns)


def expected(table: pa.Table, wanted: Wanted) -> dict[Any, int]:
    """The ids that have rows, with their counts, by plain Python."""
    found: Counter[Any] = Counter()
    for column in wanted.columns:
        for value in table[column].to_pylist():
            found.update(value if isinstance(value, list) else [value])
    del found[None]
    hashes = {value: int(hash_ids(pa.array([value]))[0]) for value in found}
    order = sorted(found, key=lambda value: (-found[value], hashes[value]))
    order = [value for value in order if found[value] >= wanted.min_count]
    kept = order if wanted.rows is None else order[: wanted.rows - wanted.reserved]
    return {value: found[value] for value in sorted(kept, key=hashes.__getitem__)}


def check(found: Vocabulary, ids: dict[Any, int], reserved: int) -> None:
    assert found.ids.to_pylist() == list(ids)
    assert found.counts.tolist() == list(ids.values())
    assert found.reserved == reserved and found.rows == reserved + len(ids)
    np.testing.assert_array_equal(found.hashes, hash_ids(found.ids))


def build_here(world: World, data: str, run: str, limits: list[int]) -> Results:
    """Build under each limit, and say what this rank holds."""
    results: Results = {}
    for limit in limits:
        vocabularies.RUN_BYTES = limit
        found = build(open_data(data), [ITEM, USER], f"{run}/{limit}", world, Silent())
        for table, each in found.items():
            results[f"{limit}/{table}"] = each.look_up(each.hashes)
            results[f"{limit}/{table}/ids"] = each.ids.to_pylist()
    return results


def refuse_here(world: World, data: str, run: str) -> list[str]:
    """What is wrong in one worker's share is told by all."""
    columns = [Column("user_id", "id", "here")]
    last = Path(open_data(data).shards[-1].url)
    messages = []
    for column, least in (("user_id", 10**6), ("gone", 1), ("user_id", 1)):
        dataset = open_data(data, columns)
        all_ok(None, world)
        if least == 1 and column == "user_id" and world.rank == 0:
            last.write_bytes(last.read_bytes()[:-1])
        try:
            build(dataset, [Wanted("user", (column,), least, None, 1)], run, world, Silent())
        except InputError as error:
            messages.append(str(error))
    return messages


def in_worker(world: World, folder: str, limits: list[int]) -> Results:
    """Both in turn, as importing TorchRec takes longer than either."""
    found = build_here(world, f"{folder}/data", f"{folder}/run", limits)
    return {**found, "messages": refuse_here(world, f"{folder}/data", f"{folder}/refused")}


def test_one_and_three_workers_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_data(tmp_path / "data")
    limits = [2**27, 2**14]  # all in memory, and dozens of runs
    monkeypatch.setattr(vocabularies, "RUN_BYTES", limits[0])  # put back what build_here sets
    alone = build_here(ALONE, str(tmp_path / "data"), str(tmp_path / "alone"), limits)
    arguments = {"folder": str(tmp_path), "limits": limits}
    ranks = run_processes(f"{HERE}:in_worker", 3, tmp_path / "group", arguments)
    files: list[dict[str, bytes]] = []
    for limit in limits:
        for wanted in (ITEM, USER):
            ids = list(expected(table, wanted))
            for found in (alone, *ranks):
                assert found[f"{limit}/{wanted.table}/ids"] == ids
                rows = found[f"{limit}/{wanted.table}"]
                assert rows.tolist() == [wanted.reserved + place for place in range(len(ids))]
        for run in ("alone", "run"):
            folder = tmp_path / run / str(limit) / "vocabularies"
            assert sorted(path.name for path in folder.iterdir()) == ["item.parquet", "user.parquet"]
            files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert all(each == files[0] for each in files)
    messages = [rank["messages"] for rank in ranks]
    assert messages == [messages[0]] * 3
    rare, gone, corrupt = messages[0]
    assert rare.startswith(f"{tmp_path}/data: table 'user' (ids of user_id): no id is seen 1000000 times")
    assert "column 'gone'" in gone and "is missing" in gone
    assert corrupt.startswith(f"{tmp_path}/data/3.parquet: this shard was changed")
    assert not storage.list_files(str(tmp_path / "refused"))


@settings(max_examples=15)
@given(data=st.data())
def test_what_comes_out_depends_on_the_ids_alone(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.one_of(st.none(), st.integers(-6, 6)), min_size=1, max_size=60))
    wanted = Wanted(
        "user",
        ("user_id",),
        data.draw(st.integers(1, 3)),
        data.draw(st.one_of(st.none(), st.integers(3, 8))),
        2,
    )
    table = pa.table({"user_id": pa.array(values, pa.int32())})
    ids = expected(table, wanted)
    columns = [Column("user_id", "id", "here")]
    for turn in range(2):
        folder = tmp_path_factory.mktemp("any")
        order = data.draw(st.permutations(range(len(values))))
        shards, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
        write_shards(folder / "data", table.take(order), shards, group)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocabularies, "RUN_BYTES", [2**20, 1][turn])
            dataset = open_data(folder / "data", columns)
            if not ids:
                with pytest.raises(InputError, match="no id"):
                    build(dataset, [wanted], str(folder / "run"), ALONE, Silent())
            else:
                found = build(dataset, [wanted], str(folder / "run"), ALONE, Silent())
                check(found["user"], ids, 2)


def test_the_kind_of_ids_does_not_hang_on_those_that_stay(tmp_path: Path) -> None:
    """An id of 2^63 that is too rare for a row, in a share of its own."""
    kinds = []
    for name, limit in (("large", 2**20), ("small", 1)):
        table = pa.table({"id": pa.array([1] * 50 + [2**63] + [1] * 50, pa.uint64())})
        write_shards(tmp_path / name / "data", table, 1, 10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocabularies, "RUN_BYTES", limit)
            data = open_data(tmp_path / name / "data", [Column("id", "id", "here")])
            found = build(data, [Wanted("id", ("id",), 2, None, 1)], str(tmp_path / name), ALONE, Silent())
        check(found["id"], {1: 100}, 1)
        kinds.append(found["id"].kind)
    assert kinds == ["uint64", "uint64"]


class Screen(Silent):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def show(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "SHOW_EVERY_S", 0.0)
    table = write_data(tmp_path / "data")
    screen = Screen()
    build(open_data(tmp_path / "data"), [ITEM, USER], str(tmp_path / "run"), ALONE, screen)
    *steps, end = [event for event in screen.events if event["kind"] == "progress"]
    assert [event["done"] for event in steps] == sorted(event["done"] for event in steps)
    assert all(event["what"] == "vocabulary" and event["done"] < event["total"] == 3000 for event in steps)
    assert end["done"] == end["total"] == 3000 and end["seconds_left"] == 0 and end["rows_per_s"] > 0
    texts = [event["text"] for event in screen.events if event["kind"] == "log"]
    kept, distinct = len(expected(table, ITEM)), len(expected(table, Wanted("", ITEM.columns, 1, None, 1)))
    assert texts[0] == f"vocabulary of item: {kept:,} of {distinct:,} ids have a row of their own"


def test_every_row_group_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[str] = []
    monkeypatch.setattr(watchdog, "alive", signs.append)
    write_data(tmp_path / "data")
    dataset = open_data(tmp_path / "data")
    # No other rank's screen, nor any exchange, says anything of this one.
    build(dataset, [ITEM], str(tmp_path / "run"), ALONE, Silent())
    assert signs.count("vocabulary") > len(dataset.group_rows), "and so is every section that is merged"


def test_what_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_data(tmp_path / "data", 500)
    run = tmp_path / "run"
    data = open_data(tmp_path / "data")
    first = build(data, [ITEM, USER], str(run), ALONE, Silent())
    scratch = run / "vocabularies" / "scratch" / "dead"
    scratch.mkdir(parents=True)
    (scratch / "user.run-00000-00000").write_bytes(b"left by a build that was killed")
    with monkeypatch.context() as patch:
        reads = count_reads(patch)
        again = build(
            data, [Wanted("item", ("history", "item_id"), 2, None, 3), USER], str(run), ALONE, Silent()
        )
        assert again == first and not reads
    (run / "vocabularies" / "item.parquet").write_bytes(b"PAR1")
    rarer = Wanted("user", ("user_id",), 3, 40, 1)
    found = build(data, [ITEM, rarer], str(run), ALONE, Silent())
    assert found["item"] == first["item"]
    check(found["user"], expected(table, rarer), 1)
    assert not scratch.parent.exists()
    other = write_data(tmp_path / "other", 500, seed=1)
    found = build(open_data(tmp_path / "other"), [ITEM, rarer], str(run), ALONE, Silent())
    check(found["item"], expected(other, ITEM), 3)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            Wanted("t", ("user_id",), 1, 3, 3),
            "table 't': rows is 3 and reserved is 3, .* give rows: 4 or more",
        ),
        (Wanted("t", ("none",), 1, None, 1), r"data: table 't' \(ids of none\): the data holds no id, so"),
        (
            Wanted("t", ("item_id",), 10**5, None, 1),
            r"\(ids of item_id\): no id is seen 100000 times \(min_count; the most frequent one \d+\)",
        ),
        (
            Wanted("t", ("user_id", "item_id"), 1, None, 1),
            r"\(ids of item_id, user_id\): some ids are integers and others are not; .* tables of their own",
        ),
    ],
)
def test_refusals(tmp_path: Path, wanted: Wanted, message: str) -> None:
    table = write_data(tmp_path / "all", 300)
    write_shards(tmp_path / "data", table.append_column("none", pa.nulls(300, pa.int64())))
    data = open_data(tmp_path / "data", [*COLUMNS, Column("none", "id", "here")])
    with pytest.raises(InputError, match=message):
        build(data, [wanted], str(tmp_path / "run"), ALONE, Silent())
    assert not storage.list_files(str(tmp_path / "run"))


def test_object_storage(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "RUN_BYTES", 2**13)
    monkeypatch.setattr(vocabularies, "PARTITION_BITS", 2)
    table = write_data(tmp_path / "data", 400)
    for file in storage.list_files(str(tmp_path / "data")):
        storage.write(f"{bucket}/data/{file.path}", storage.read(file.url))
    storage.write(f"{bucket}/run/vocabularies/scratch/dead/x", b"left")
    found = build(open_data(f"{bucket}/data"), [ITEM, USER], f"{bucket}/run", ALONE, Silent())
    check(found["item"], expected(table, ITEM), 3)
    check(found["user"], expected(table, USER), 1)
    assert [file.path for file in storage.list_files(f"{bucket}/run")] == [
        "vocabularies/item.parquet",
        "vocabularies/user.parquet",
    ]
    build(open_data(tmp_path / "data"), [ITEM, USER], str(tmp_path / "run"), ALONE, Silent())
    for name in ("item", "user"):
        here = (tmp_path / "run" / "vocabularies" / f"{name}.parquet").read_bytes()
        assert storage.read(f"{bucket}/run/vocabularies/{name}.parquet") == here
