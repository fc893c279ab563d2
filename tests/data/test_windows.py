"""What the threads that fill windows read, how far ahead, and how they fail."""

from __future__ import annotations

import time

import pytest

from mtlrec.data.shards import Dataset
from mtlrec.job.errors import InputError
from tests.data.numbered import (
    LANES,
    broken,
    count_reads,
    flat,
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


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_reads_each_row_group_once_but_for_lanes_less_one(data, monkeypatch, threads, world_size):
    reads = count_reads(monkeypatch)
    for rank in range(world_size):
        read(data, threads=threads, rank=rank, world_size=world_size)
    assert set(reads) == set(range(21))
    assert len(reads) <= 21 + LANES - 1


def test_lanes_that_stand_in_one_row_group_share_it(tmp_path, monkeypatch):
    data = open_data(write(tmp_path / "one", 600, group=1000, files=1))
    reads = count_reads(monkeypatch)
    assert sorted(flat(rows_of(read(data)))) == list(range(600))
    assert reads == [0]


def test_reading_ahead_is_bounded(tmp_path, monkeypatch):
    data = open_data(write(tmp_path / "many", 3000, group=10))
    reads = count_reads(monkeypatch)
    with reader(data, window=20, ahead=2) as found:
        before = -1
        while len(reads) > before:
            before = len(reads)
            time.sleep(0.3)
        # 16 lanes' first windows (half as large on average), two batches more, and a quarter ahead.
        assert before < 100
        assert sorted(flat(rows_of(found))) == list(range(3000))


def test_of_two_bad_rows_the_same_is_named_for_any_number_of_threads(tmp_path):
    def change(each):
        return broken(700, "click", 3)(broken(31, "click", 2)(each))

    data = open_data(write(tmp_path / "bad", 1003, change=change))
    messages = set()
    for threads in (0, 1, 1, 3, 6):
        with reader(data, threads=threads, window=4) as found, pytest.raises(InputError) as caught:
            list(found)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_what_comes_before_a_bad_row_group_is_still_read(tmp_path):
    data = open_data(write(tmp_path / "bad", 300, group=20, files=1, change=broken(299, "click", 2)))
    seen = []
    with (
        reader(data, shuffle=False, lanes=1, batch_size=10, window=20) as found,
        pytest.raises(InputError, match="row group 14, row 19, column click"),
    ):
        for batch in found:
            seen += batch.rows.tolist()
    assert seen == list(range(280))


def test_a_corrupt_row_group_is_named(tmp_path):
    url = write(tmp_path / "bad", 300, files=1)
    data = open_data(url)
    path = tmp_path / "bad" / "part-0.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with reader(data) as found, pytest.raises(InputError, match=r"part-0\.parquet: row group \d+ is corrupt"):
        list(found)


def test_a_fault_of_the_machine_is_not_taken_for_the_users(data, monkeypatch):
    def fail(self, group, columns):
        raise MemoryError("no memory")

    monkeypatch.setattr(Dataset, "read_group", fail)
    with reader(data) as found, pytest.raises(MemoryError, match="no memory"):
        next(found)
    assert our_threads() == []


def test_a_fault_while_lanes_are_cut_does_not_hang(data, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no memory")

    monkeypatch.setattr("mtlrec.data.windows.build_lanes", fail)
    with reader(data) as found, pytest.raises(MemoryError, match="no memory"):
        next(found)
