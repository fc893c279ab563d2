"""Listing, row groups and fingerprint of a data set; refusals name file and column; reading a row group."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtlrec import storage
from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from mtlrec.schema import Column

pytest_plugins = ["tests.s3_server"]

USER = Column("user", "id", "schema.features.user")
HISTORY = Column("history", "id_list", "schema.features.history")
CLICK = Column("click", "label", "schema.tasks.click")
COLUMNS = (USER, HISTORY, CLICK)


def table(rows: int, first: int = 0, **replaced: pa.Array) -> pa.Table:
    numbers = range(first, first + rows)
    lists = [[f"item {number}", "item"] if number % 3 else None for number in numbers]
    columns = {
        "user": pa.array([f"user {number % 7}" for number in numbers], pa.string()),
        "history": pa.array(lists, pa.list_(pa.string())),
        "vector": pa.array([[number, 0.5] for number in numbers], pa.list_(pa.float32(), 2)),
        "click": pa.array([number % 2 for number in numbers], pa.int8()),
        "row": pa.array(numbers, pa.int64()),
    }
    return pa.table({**columns, **replaced})


def write(folder: str | Path, shards: Sequence[Sequence[int]]) -> str:
    """Write a shard for each sequence of row group sizes, rows numbered through; the folder's path."""
    first = 0
    for number, groups in enumerate(shards):
        url = storage.join(str(folder), f"part-{number:03d}.parquet")
        with storage.write_stream(url) as file, pq.ParquetWriter(file, table(0).schema) as writer:
            for rows in groups:
                writer.write_table(table(rows, first), row_group_size=max(rows, 1))
                first += rows
    return str(folder)


def test_mean_lengths_of_lists_are_those_of_the_first_shard_with_rows(tmp_path: Path) -> None:
    """Two ids in each list, but for every third, which is missing and counts one."""
    found = Dataset.open(write(tmp_path, [[0], [9, 6], [2]]), COLUMNS)
    assert found.list_lengths == {"history": (10 * 2 + 5 * 1) / 15}
    assert Dataset.open(str(tmp_path), [USER, CLICK]).list_lengths == {}


def refusal(url: str, columns: Sequence[Column] = COLUMNS) -> str:
    with pytest.raises(InputError) as raised:
        Dataset.open(url, columns)
    message = str(raised.value)
    assert "\n" not in message
    return message


# What is there


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=4).filter(
        lambda shards: any(any(groups) for groups in shards)
    )
)
def test_every_row_has_its_number(tmp_path: Path, shards: list[list[int]]) -> None:
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    dataset = Dataset.open(write(tmp_path / "data", shards), COLUMNS)
    assert [list(shard.groups) for shard in dataset.shards] == shards
    held = [(number, rows) for number, groups in enumerate(shards) for rows in groups if rows]
    assert dataset.group_shard.tolist() == [number for number, _ in held]
    assert dataset.group_rows.tolist() == [rows for _, rows in held]
    assert dataset.rows == sum(rows for _, rows in held)
    for array in (dataset.group_shard, dataset.group_index, dataset.group_rows, dataset.group_start):
        assert array.dtype == np.int64
    found = [dataset.read_group(group, ["row"])["row"].to_pylist() for group in range(len(held))]
    assert [rows[0] for rows in found] == dataset.group_start.tolist()
    assert list(chain.from_iterable(found)) == list(range(dataset.rows))


def test_what_counts_as_a_shard(tmp_path: Path) -> None:
    write(tmp_path, [[3]])
    for path in (
        "b/one",
        "day=2/two.parquet",
        "_SUCCESS",
        ".part.crc",
        "_ideal.json",
        "_tmp/x",
        "b/.hidden/y",
    ):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path[0] in "bd" and "hidden" not in path:
            pq.write_table(table(2), target)
        else:
            target.write_bytes(b"not Parquet")
    dataset = Dataset.open(str(tmp_path), COLUMNS)
    assert [shard.path for shard in dataset.shards] == ["b/one", "day=2/two.parquet", "part-000.parquet"]
    single = Dataset.open(str(tmp_path / "b" / "one"), COLUMNS)
    assert [(shard.path, shard.rows) for shard in single.shards] == [("one", 2)]


def test_relative_urls_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", [[3]])
    monkeypatch.chdir(tmp_path)
    assert Dataset.open("data", COLUMNS).url == str(tmp_path / "data")
    assert str(tmp_path / "none") in refusal("none")


def test_fingerprint(tmp_path: Path) -> None:
    first = Dataset.open(write(tmp_path / "a", [[5, 3], [4]]), COLUMNS)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b" / "part-000.parquet", (0, 0))
    assert Dataset.open(str(tmp_path / "b"), (CLICK,)).fingerprint == first.fingerprint
    seen = {first.fingerprint}
    for number, shards in enumerate([[[5, 3]], [[8], [4]], [[3, 5], [4]], [[5, 3], [4], [0]], [[4], [5, 3]]]):
        seen.add(Dataset.open(write(tmp_path / str(number), shards), COLUMNS).fingerprint)
    (tmp_path / "b" / "part-001.parquet").rename(tmp_path / "b" / "renamed.parquet")
    seen.add(Dataset.open(str(tmp_path / "b"), COLUMNS).fingerprint)
    assert len(seen) == 7


def test_fingerprint_sees_other_values(tmp_path: Path) -> None:
    """Same layout and sizes, other numbers: the statistics in the footer tell."""
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        pq.write_table(table(3, row=pa.array([value] * 3)), tmp_path / name / "part", compression="none")
    one, two = (Dataset.open(str(tmp_path / name), COLUMNS) for name in "ab")
    assert one.shards[0].size == two.shards[0].size
    assert one.fingerprint != two.fingerprint
    assert two.describe_change(one.index()).startswith("1 changed: part")


def test_changes_are_named(tmp_path: Path) -> None:
    url = write(tmp_path, [[5], [4], [3], [2], [1], [7]])
    before = Dataset.open(url, COLUMNS)
    index = json.loads(json.dumps(before.index()))
    assert before.describe_change(index) == ""
    for number in range(4):
        (tmp_path / f"part-{number:03d}.parquet").unlink()
    pq.write_table(table(9), tmp_path / "part-004.parquet")
    pq.write_table(table(1), tmp_path / "new.parquet")
    now = Dataset.open(url, COLUMNS)
    assert now.fingerprint != before.fingerprint
    assert now.describe_change(index) == (
        "1 added: new.parquet; 4 removed: part-000.parquet, part-001.parquet, part-002.parquet and 1 more; "
        "1 changed: part-004.parquet (22 rows before, 17 now)"
    )


# What is refused


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none")).startswith(f"{tmp_path}/none: no such folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_SUCCESS").touch()
    assert refusal(str(tmp_path / "empty")).startswith(f"{tmp_path}/empty: no Parquet files")
    assert "no rows (2 files)" in refusal(write(tmp_path / "no rows", [[], [0]]))


@pytest.mark.parametrize("damage", ["text", "empty", "short", "truncated", "footer", "length", "encrypted"])
def test_unreadable_files_are_named(tmp_path: Path, damage: str) -> None:
    url = write(tmp_path, [[5], [50]])
    victim = tmp_path / "part-001.parquet"
    whole = victim.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    damaged = {
        "text": b"a,b,c\n1,2,3\n4,5,6\n",
        "empty": b"",
        "short": b"PAR1",
        "truncated": whole[: len(whole) // 2],
        "footer": whole[: -8 - footer] + b"\xff" * footer + whole[-8:],
        "length": whole[:-8] + b"\xff\xff\xff\x7f" + b"PAR1",
        "encrypted": whole[:-4] + b"PARE",
    }[damage]
    victim.write_bytes(damaged)
    assert refusal(url).startswith(f"{victim}: ")


def test_long_footers_are_read_whole(tmp_path: Path) -> None:
    wide = pa.table({f"a_column_with_quite_a_long_name_{number}": [1.5] for number in range(1500)})
    pq.write_table(pa.concat_tables([wide] * 3), tmp_path / "wide.parquet", row_group_size=1)
    length = int.from_bytes((tmp_path / "wide.parquet").read_bytes()[-8:-4], "little")
    assert length > 2**16
    column = Column("a_column_with_quite_a_long_name_1234", "number", "schema.features.x")
    assert Dataset.open(str(tmp_path), [column]).rows == 3


def test_missing_column(tmp_path: Path) -> None:
    url = write(tmp_path, [[5], [4]])
    message = refusal(url, [*COLUMNS, Column("age", "number", "schema.features.age")])
    assert message == (
        f"{tmp_path}/part-000.parquet: column 'age' (schema.features.age) is missing; "
        "columns here: user, history, vector, click, row"
    )
    pq.write_table(table(4).drop_columns("click"), tmp_path / "part-001.parquet")
    assert refusal(url).startswith(
        f"{tmp_path}/part-001.parquet: column 'click' (schema.tasks.click) is missing"
    )


def test_column_twice(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["user", "user"])
    pq.write_table(twice, tmp_path / "part.parquet")
    assert "2 times" in refusal(str(tmp_path), [USER])


TIMES = pa.array([0], pa.timestamp("s"))
STRUCT = pa.array([{"a": 1}])
DECIMAL = pa.array([Decimal("1.5")])
VALUES: dict[str, pa.Array] = {
    "int8": pa.array([1], pa.int8()),
    "uint64": pa.array([1], pa.uint64()),
    "float16": pa.array([1], pa.float16()),
    "double": pa.array([1.0]),
    "bool": pa.array([True]),
    "string": pa.array(["a"]),
    "large_string": pa.array(["a"], pa.large_string()),
    "dictionary": pa.array(["a"]).dictionary_encode(),
    "int_dictionary": pa.array([1]).dictionary_encode(),
    "binary": pa.array([b"a"]),
    "fixed_binary": pa.array([b"a"], pa.binary(1)),
    "decimal": DECIMAL,
    "timestamp": TIMES,
    "struct": STRUCT,
    "int_list": pa.array([[1]]),
    "large_int_list": pa.array([[1]], pa.large_list(pa.int32())),
    "string_list": pa.array([["a"]]),
    "large_string_list": pa.array([["a"]], pa.large_list(pa.large_string())),
    "double_list": pa.array([[1.0]]),
    "bool_list": pa.array([[True]]),
    "fixed_double_list": pa.array([[1.0]], pa.list_(pa.float64(), 1)),
    "fixed_string_list": pa.array([["a"]], pa.list_(pa.string(), 1)),
    "nested_list": pa.array([[[1]]]),
    "null": pa.array([None]),
}
INTEGERS = {"int8", "uint64", "int_dictionary"}
TEXTS = {"string", "large_string", "dictionary"}
ALLOWED = {
    "id": INTEGERS | TEXTS | {"binary", "fixed_binary"},
    "id_list": {"int_list", "large_int_list", "string_list", "large_string_list"},
    "number": INTEGERS | {"float16", "double", "bool"},
    "vector": {"int_list", "large_int_list", "double_list", "bool_list", "fixed_double_list"},
    "label": INTEGERS | {"float16", "double", "bool"},
    "scenario": INTEGERS | TEXTS,
    "anything": set(VALUES),
}


@pytest.mark.parametrize("holds", ALLOWED)
def test_types(tmp_path: Path, holds: str) -> None:
    for kind, values in VALUES.items():
        folder = tmp_path / kind
        folder.mkdir()
        pq.write_table(pa.table({"x": values}), folder / "part.parquet")
        column = Column("x", holds, "schema.here")  # type: ignore[arg-type]
        if kind in ALLOWED[holds]:
            dataset = Dataset.open(str(folder), [column])
            read = dataset.read_group(0, ["x"])["x"].combine_chunks()
            assert read.to_pylist() == values.to_pylist()
        else:
            message = refusal(str(folder), [column])
            assert message.startswith(f"{folder}/part.parquet: column 'x' (schema.here) has type ")
            assert f"for kind {holds} the column must hold " in message


@pytest.mark.parametrize("holds", ["id", "id_list"])
@pytest.mark.parametrize("text", [False, True])
def test_identity_needs_integers(tmp_path: Path, holds: str, text: bool) -> None:
    value = ("a" if text else 1) if holds == "id" else [["a"] if text else [1]][0]
    pq.write_table(pa.table({"x": [value]}), tmp_path / "part.parquet")
    column = Column("x", holds, "schema.features.x")  # type: ignore[arg-type]
    assert Dataset.open(str(tmp_path), [column]).rows == 1
    if text:
        message = refusal(str(tmp_path), [replace(column, identity=True)])
        assert message.startswith(f"{tmp_path}/part.parquet: column 'x' (schema.features.x) has type ")
        assert "identity" in message
    else:
        assert Dataset.open(str(tmp_path), [replace(column, identity=True)]).rows == 1


def test_shards_differ(tmp_path: Path) -> None:
    url = write(tmp_path, [[5], [4]])
    later = tmp_path / "part-001.parquet"
    pq.write_table(table(1, user=pa.array([3])), later)
    message = refusal(url)
    assert message.startswith(f"{later}: column 'user' (schema.features.user) holds integers, but strings")
    assert "part-000.parquet" in message
    pq.write_table(table(1, history=pa.array([[3]])), later)
    assert refusal(url).startswith(f"{later}: column 'history'")
    pq.write_table(table(1, user=pa.array([1.5])), later)
    assert refusal(url).startswith(f"{later}: column 'user' (schema.features.user) has type double")
    alike = table(1, user=pa.array(["a"], pa.large_string()), click=pa.array([0.0]), extra=pa.array([1]))
    pq.write_table(alike, later)
    assert Dataset.open(url, COLUMNS).rows == 6


# Reading


def test_strings_are_dictionaries(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path, [[5, 40]]), COLUMNS)
    read = dataset.read_group(1, ["click", "history", "user", "vector"])
    assert sorted(read.column_names) == ["click", "history", "user", "vector"]
    assert pa.types.is_dictionary(read["user"].type)
    assert pa.types.is_dictionary(read["history"].type.value_type)
    expected = table(40, 5)
    for name in read.column_names:
        assert read[name].to_pylist() == expected[name].to_pylist()
    with pytest.raises(InputError, match=r"part-000.parquet: column 'age' \(asked for\) is missing"):
        dataset.read_group(0, ["age"])


def test_names_with_dots(tmp_path: Path) -> None:
    columns = {"a": [[1]], "a.b": [["x"]], "a.list": [3], "a.b.c": ["y"]}
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    dataset = Dataset.open(str(tmp_path), [Column("a.b", "id_list", "schema.features.x")])
    for name, values in columns.items():
        assert dataset.read_group(0, [name]).to_pydict()[name] == values


def test_many_chunks_and_values(tmp_path: Path) -> None:
    """A dictionary that outgrows its page: the values come back all the same."""
    words = [f"a rather long word, number {number}" for number in range(60_000)]
    pq.write_table(pa.table({"x": words}), tmp_path / "part.parquet", dictionary_pagesize_limit=4096)
    dataset = Dataset.open(str(tmp_path), [Column("x", "id", "schema.features.x")])
    assert dataset.read_group(0, ["x"])["x"].to_pylist() == words


def test_corrupt_row_group_is_named(tmp_path: Path) -> None:
    url = write(tmp_path, [[5, 5, 3000]])
    path = tmp_path / "part-000.parquet"
    chunk = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    dataset = Dataset.open(url, COLUMNS)
    assert dataset.read_group(1, ["user"]).num_rows == 5
    with pytest.raises(InputError, match=r"part-000\.parquet: row group 2 is corrupt"):
        dataset.read_group(2, ["user"])


def test_flipped_bit_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    values = pa.table({"x": np.arange(3000)})
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pq.write_table(values, tmp_path / "part.parquet", **options)
    data = bytearray((tmp_path / "part.parquet").read_bytes())
    data[data.index((1234).to_bytes(8, "little"))] ^= 1
    (tmp_path / "part.parquet").write_bytes(data)
    dataset = Dataset.open(str(tmp_path), [Column("x", "id", "schema.features.x")])
    with pytest.raises(InputError, match="row group 0 is corrupt"):
        dataset.read_group(0, ["x"])


def test_shards_that_change_underway(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path, [[5], [4], [3]]), COLUMNS)
    dataset.read_group(0, ["user"])  # its footer is known from now on
    for number in (0, 1):
        pq.write_table(table(9), tmp_path / f"part-{number:03d}.parquet")
    (tmp_path / "part-002.parquet").unlink()
    for group in range(3):
        with pytest.raises(InputError, match=rf"part-00{group}.parquet: this shard was changed or removed"):
            dataset.read_group(group, ["user"])


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path, [[50, 20]] * 80), COLUMNS)
    groups = np.random.default_rng(0).permutation(160).repeat(2).tolist()
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda group: dataset.read_group(group, ["row"]), groups))
    for group, read in zip(groups, tables, strict=True):
        start = int(dataset.group_start[group])
        assert read["row"].to_pylist() == list(range(start, start + int(dataset.group_rows[group])))


def test_s3_equals_disk(tmp_path: Path, bucket: str) -> None:
    shards = [[50, 1, 30], [20], [0, 7]]
    disk = Dataset.open(write(tmp_path, shards), COLUMNS)
    remote = Dataset.open(write(bucket + "/data/train", shards), COLUMNS)
    assert remote.fingerprint == disk.fingerprint
    assert remote.index()["shards"] == disk.index()["shards"]
    assert remote.describe_change(disk.index()) == ""
    for group in range(len(disk.group_rows)):
        for names in (["user", "click"], ["vector"], ["history", "row"]):
            assert remote.read_group(group, names).equals(disk.read_group(group, names))
    storage.write(bucket + "/data/train/part-001.parquet", b"no longer Parquet")
    with pytest.raises(InputError, match=r"part-001\.parquet"):
        remote.read_group(3, ["user"])
    storage.remove(bucket + "/data/train/part-000.parquet")
    with pytest.raises(InputError, match=r"part-000\.parquet: this shard was changed or removed"):
        remote.read_group(0, ["user"])
    assert refusal(bucket + "/data/none").startswith(f"{bucket}/data/none: no such folder")
    assert "part-001.parquet: not a Parquet file" in refusal(bucket + "/data/train")


def test_hundreds_of_shards_open_quickly(tmp_path: Path) -> None:
    write(tmp_path, [[3, 3]])
    for number in range(600):
        shutil.copyfile(tmp_path / "part-000.parquet", tmp_path / f"copy-{number:04d}.parquet")
    started = time.monotonic()
    assert Dataset.open(str(tmp_path), COLUMNS).rows == 6 * 601
    assert time.monotonic() - started < 5
