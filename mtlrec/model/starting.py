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


def table_rows(
    seed: int,
    table: str,
    row: int,
    rows: int,
    dim: int,
    scale: float,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Rows `row` to `row + rows` of `table`, within one block: [rows, dim], uniform in [-scale, scale).

    Written into `out` of that shape, where it is given; else into memory of its own.
    """
    block, first = divmod(row, BLOCK_ROWS)
    assert first + rows <= BLOCK_ROWS
    if out is None:
        out = np.empty((rows, dim), np.float32)
    steps = _steps(f"table|{seed}|{table}|{block}", first * dim, (first + rows) * dim)
    return np.multiply(steps.reshape(rows, dim), _step(scale), out=out, dtype=np.float32)


def dense_parameter(seed: int, name: str, shape: tuple[int, ...], bound: float) -> npt.NDArray[np.float32]:
    """The parameter called `name`: `shape`, uniform in [-bound, bound)."""
    steps = _steps(f"dense|{seed}|{name}", 0, int(np.prod(shape)))
    return np.multiply(steps, _step(bound), dtype=np.float32).reshape(shape)


def _steps(stream: str, begin: int, end: int) -> npt.NDArray[np.int32]:
    """Numbers [begin, end) of a stream, uniform among the integers in [-2^23, 2^23)."""
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw((end + 1) // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[begin:end]
    # The upper 24 bits, centred: exact in float32, so that the one product with a step is the only rounding.
    words >>= np.uint32(8)
    steps = words.view("<i4")
    steps -= np.int32(2**23)
    return steps


def _step(bound: float) -> np.float32:
    return np.float32(bound * 2.0**-23)
