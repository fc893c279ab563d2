from __future__ import annotations

import numpy as np

from mtlrec.model.starting import BLOCK_ROWS, dense_parameter, table_rows


def test_values_are_pinned() -> None:
    """A change here changes every run's start: streams, block size and arithmetic are a contract."""
    first = table_rows(seed=0, table="item", row=0, rows=2, dim=4, scale=0.05)
    later = table_rows(seed=0, table="item", row=10_000_000, rows=1, dim=4, scale=0.05)
    dense = dense_parameter(seed=0, name="towers.last.bias", shape=(3,), bound=0.5)
    assert BLOCK_ROWS == 4096
    assert first.dtype == later.dtype == dense.dtype == np.float32
    assert [[float(value).hex() for value in row] for row in first] == [
        ["0x1.1d5a660000000p-10", "-0x1.52be100000000p-5", "-0x1.0f9ef40000000p-5", "0x1.3fc6da0000000p-5"],
        ["-0x1.72fcfe0000000p-5", "-0x1.4147700000000p-5", "-0x1.6e10000000000p-7", "-0x1.abbfe60000000p-7"],
    ]
    assert [float(value).hex() for value in later[0]] == [
        "-0x1.1aed800000000p-5",
        "-0x1.4e1fb40000000p-6",
        "-0x1.32bc5e0000000p-5",
        "-0x1.2e26ce0000000p-7",
    ]
    assert [float(value).hex() for value in dense] == [
        "0x1.f109e00000000p-4",
        "-0x1.2374340000000p-2",
        "0x1.9614380000000p-3",
    ]


def test_a_row_depends_on_nothing_but_seed_table_and_its_number() -> None:
    whole = table_rows(7, "user", 4096, 4096, 8, 0.1)
    for begin, rows in ((0, 1), (5, 10), (4000, 96)):
        part = table_rows(7, "user", 4096 + begin, rows, 8, 0.1)
        np.testing.assert_array_equal(part, whole[begin : begin + rows])


def test_seeds_tables_blocks_and_names_differ() -> None:
    streams = [
        table_rows(7, "user", 0, 64, 8, 1.0),
        table_rows(8, "user", 0, 64, 8, 1.0),
        table_rows(7, "item", 0, 64, 8, 1.0),
        table_rows(7, "user", 4096, 64, 8, 1.0),
        dense_parameter(7, "user", (64, 8), 1.0),
        dense_parameter(7, "a.b", (64, 8), 1.0),
    ]
    for index, one in enumerate(streams):
        for other in streams[index + 1 :]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2


def test_uniform_in_the_half_open_range() -> None:
    drawn = table_rows(1, "item", 0, 4096, 64, 0.05).astype(np.float64)
    assert drawn.min() >= -0.05 and drawn.max() < 0.05
    assert abs(drawn.mean()) < 2e-4
    assert abs(drawn.std() - 0.05 / np.sqrt(3)) < 2e-4
    counts, _ = np.histogram(drawn, bins=20, range=(-0.05, 0.05))
    assert counts.min() > 0.95 * drawn.size / 20


def test_odd_counts_and_scalars() -> None:
    assert dense_parameter(0, "x", (3, 5), 1.0).shape == (3, 5)
    np.testing.assert_array_equal(dense_parameter(0, "x", (3,), 1.0), dense_parameter(0, "x", (4,), 1.0)[:3])
