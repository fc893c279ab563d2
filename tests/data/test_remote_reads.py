"""What reading data from object storage asks for: by the log of a proxy before the server."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtlrec import storage
from mtlrec.data.shards import Dataset
from mtlrec.job.storage import StorageSection
from mtlrec.schema import Column
from tests.faulty_proxy import FaultyProxy, faulty_proxy

pytest_plugins = ["tests.s3_server"]

ROWS, GROUPS, SHARDS = 6000, 2, 2
"""Rows of a row group, row groups of a shard, shards."""
WANTED = ["first", "last"]
FOOTER_READ = 64 * 2**10


@pytest.fixture
def proxy(s3_environment: str, bucket: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_environment) as proxy:
        storage.configure(StorageSection(endpoint_url=proxy.endpoint))
        yield proxy
        storage.configure(StorageSection())


def test_only_the_columns_and_row_groups_that_are_wanted_and_footers_once(
    proxy: FaultyProxy, bucket: str
) -> None:
    random = np.random.default_rng(0)
    folder = storage.join(bucket, "data")
    for shard in range(SHARDS):
        # Columns of 1.7 MB lie between those that are wanted, and behind them.
        wide = {
            name: pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(288), ROWS * GROUPS, [None, pa.py_buffer(random.bytes(288 * ROWS * GROUPS))]
            )
            for name in ("between", "behind")
        }
        values = {name: random.integers(0, 2**60, ROWS * GROUPS) for name in WANTED}
        table = pa.table({"first": values["first"], "between": wide["between"], "last": values["last"]})
        table = table.append_column("behind", wide["behind"])
        with storage.write_stream(storage.join(folder, f"part-{shard}.parquet")) as stream:
            pq.write_table(table, stream, row_group_size=ROWS, use_dictionary=False)
    sizes = {file.path: file.size for file in storage.list_files(folder)}
    key = f"/{folder.removeprefix('s3://')}/"
    before = len(proxy.requests("GET", key))

    columns = [Column(name, "id", "test") for name in WANTED]
    for _ in range(2):  # as a run does: before its workers start, and in a worker
        dataset = Dataset.open(folder, columns)
    tables = [dataset.read_group(group, WANTED) for group in (0, 2, 3)]

    assert [table.num_rows for table in tables] == [ROWS] * 3
    asked = proxy.requests("GET", key)[before:]
    footers = [each for each in asked if each.sent == FOOTER_READ]
    assert sorted((each.path, each.range) for each in footers) == [
        (f"{key}{path}", f"bytes={size - FOOTER_READ}-{size - 1}") for path, size in sorted(sizes.items())
    ]
    chunks = [each for each in asked if each not in footers]
    # One request a column of a row group, of its bytes alone.
    assert len(chunks) == 3 * len(WANTED)
    for each in chunks:
        assert ROWS * 8 <= each.sent < ROWS * 8 + 1000
    wanted, there = sum(each.sent for each in asked), sum(sizes.values())
    assert wanted < 0.08 * there, f"{wanted:,} of {there:,} bytes"
    assert proxy.requests("HEAD", key) == []
