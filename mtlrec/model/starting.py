"""Starting weights: numbers that depend on a seed and a name, and on nothing else.

Every number comes from numpy's Philox counter generator through its raw 64-bit draws, which numpy keeps
stable across versions and machines. Each draw gives two numbers, its low half first.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 4096
"""Rows of a table that share one stream. Part of the format: another value gives other weights."""


def table_rows(seed: int, table: str, row: int, rows: int, dim: int, scale: float) -> npt.NDArray[np.float32]:
    """Rows `row` to `row + rows` of `table`, within one block: [rows, dim], uniform in [-scale, scale)."""
    block, first = divmod(row, BLOCK_ROWS)
    assert first + rows <= BLOCK_ROWS
    drawn = _uniform(f"table|{seed}|{table}|{block}", (first + rows) * dim, scale)
    return drawn[first * dim :].reshape(rows, dim)


def dense_parameter(seed: int, name: str, shape: tuple[int, ...], bound: float) -> npt.NDArray[np.float32]:
    """The parameter called `name`: `shape`, uniform in [-bound, bound)."""
    return _uniform(f"dense|{seed}|{name}", int(np.prod(shape)), bound).reshape(shape)


def _uniform(stream: str, count: int, bound: float) -> npt.NDArray[np.float32]:
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[:count]
    # The upper 24 bits, centred: exact in float32, so that the one product below is the only rounding.
    words >>= np.uint32(8)
    steps = words.view("<i4")
    steps -= np.int32(2**23)
    return np.multiply(steps, np.float32(bound * 2.0**-23), dtype=np.float32)
