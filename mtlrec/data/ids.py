"""Raw ids -> rows of a table. The hash is a contract: every checkpoint of a hashed table depends on it.

Integers: splitmix64 of the value as 64 bits in two's complement. Strings and binary: XXH3-64 (seed 0) of the
bytes, strings as UTF-8. A hashed id's row is hash % rows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

_BLOCK = 16384
"""Ids hashed at a time: the block and its scratch stay in the cache."""
_SMALL = 2**17
"""The rows of ids from 0 to here are looked up: a third of the time, and 512 KiB for each size of a table."""
_SMALL_TABLES = 64


def _constant(value: int) -> npt.NDArray[np.uint64]:
    """numpy takes an array as an operand in half the time of a scalar of its own."""
    return np.array(value, np.uint64)


_GAMMA = _constant(0x9E3779B97F4A7C15)
_MIX = ((_constant(30), _constant(0xBF58476D1CE4E5B9)), (_constant(27), _constant(0x94D049BB133111EB)))
_LAST_SHIFT = _constant(31)


class IdError(ValueError):
    """An id that cannot be a row of an identity table. The reader adds file, column and row."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position
        """Index of the first offending id in the array that was handed in."""


def rows_of(
    ids: pa.Array | pa.ChunkedArray | npt.NDArray[np.integer], rows: int, how: Literal["hash", "identity"]
) -> npt.NDArray[np.int64]:
    """Ids without nulls -> rows of a table of `rows` rows, int64 [len(ids)].

    Raises IdError for an identity id outside 0 <= id < rows, and for strings under identity.
    """
    if how == "hash":
        return to_rows(hash_ids(ids), rows)
    values = ids if isinstance(ids, np.ndarray) else _integers(ids)
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= rows):
        position = int(np.argmax((values < 0) | (values >= rows)))
        raise IdError(
            f"id {values[position]} is outside the table: identity ids are 0 <= id < {rows}", position
        )
    return values.astype(np.int64)


def hash_ids(ids: pa.Array | pa.ChunkedArray | npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """64-bit hashes of ids without nulls, uint64 [len(ids)]: the same on every machine and for ever."""
    if isinstance(ids, np.ndarray):
        return _hash_integers(ids)
    if isinstance(ids, pa.ChunkedArray):
        parts = [hash_ids(chunk) for chunk in ids.chunks]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)
    assert ids.null_count == 0, "nulls are dropped before ids are hashed"
    if pa.types.is_dictionary(ids.type):
        return hash_ids(ids.dictionary.fill_null(0 if _is_integer(ids.dictionary.type) else b""))[
            ids.indices.to_numpy(zero_copy_only=False)
        ]
    if _is_integer(ids.type):
        return _hash_integers(ids.to_numpy(zero_copy_only=False))
    return _hash_bytes(ids)


def to_rows(hashes: npt.NDArray[np.uint64], rows: int) -> npt.NDArray[np.int64]:
    """hash % rows, int64 of the hashes' shape."""
    found = np.empty_like(hashes)
    _remainder(hashes, rows, found)
    return found.view(np.int64)


def hash_into(values: npt.NDArray[np.integer], rows: int, target: npt.NDArray[Any]) -> None:
    """What `rows_of(values, rows, "hash")` gives, into `target`: int32 or, where rows need it, int64."""
    if _are_small(values):
        known = _rows_of_small(rows)
        if known.dtype == target.dtype:
            # Without mode, take with an output goes through a buffer: several times as slow.
            np.take(known, values, out=target, mode="clip")
        else:
            target[:] = known.take(values, mode="clip")
        return
    hashes, scratch = np.empty((2, min(_BLOCK, len(values))), np.uint64)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        _mix(block, hashes[: len(block)], scratch[: len(block)])
        _remainder(hashes[: len(block)], rows, scratch[: len(block)])
        target[start : start + _BLOCK] = scratch[: len(block)]


def _are_small(values: npt.NDArray[np.integer]) -> bool:
    # The first and the last tell of most columns that they are not.
    return (
        len(values) > 0
        and 0 <= values[0] < _SMALL
        and 0 <= values[-1] < _SMALL
        and values.max() < _SMALL
        and values.min() >= 0
    )


@lru_cache(_SMALL_TABLES)
def _rows_of_small(rows: int) -> npt.NDArray[Any]:
    """Rows of the ids 0 to `_SMALL` - 1."""
    found = to_rows(_hash_integers(np.arange(_SMALL)), rows)
    return found.astype(np.int32) if rows <= 2**31 else found


def _remainder(hashes: npt.NDArray[np.uint64], rows: int, target: npt.NDArray[np.uint64]) -> None:
    """hash % rows into another array."""
    if rows & (rows - 1) == 0:
        np.bitwise_and(hashes, _constant(rows - 1), target)
        return
    # numpy divides by one number with vector instructions, but takes remainders one by one.
    divisor = _constant(rows)
    np.floor_divide(hashes, divisor, target)
    np.multiply(target, divisor, target)
    np.subtract(hashes, target, target)


def _hash_integers(values: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    hashes = np.empty(len(values), np.uint64)
    scratch = np.empty(min(_BLOCK, len(values)), np.uint64)
    for start in range(0, len(values), _BLOCK):
        block = hashes[start : start + _BLOCK]
        _mix(values[start : start + _BLOCK], block, scratch[: len(block)])
    return hashes


def _mix(
    values: npt.NDArray[np.integer], hashes: npt.NDArray[np.uint64], scratch: npt.NDArray[np.uint64]
) -> None:
    """splitmix64 (Steele, Lea, Flood 2014): add the golden gamma, then mix; a bijection of 64-bit words.

    All [n]; scratch: overwritten.
    """
    if values.dtype.itemsize < 8:
        # Sign-extends signed ids.
        np.copyto(hashes.view(np.int64), values, casting="unsafe")
        values = hashes
    # The unsigned ones of 2^63 and more are the same words as the negative ones.
    np.add(values.view(np.uint64), _GAMMA, hashes)
    for shift, factor in _MIX:
        np.right_shift(hashes, shift, scratch)
        np.bitwise_xor(hashes, scratch, hashes)
        np.multiply(hashes, factor, hashes)
    np.right_shift(hashes, _LAST_SHIFT, scratch)
    np.bitwise_xor(hashes, scratch, hashes)


def _hash_bytes(values: pa.Array) -> npt.NDArray[np.uint64]:
    """XXH3-64 of each value's bytes."""
    values = pc.cast(values, pa.large_binary())
    offsets_buffer, bytes_buffer = values.buffers()[1:]
    offsets = np.frombuffer(offsets_buffer, np.int64)[
        values.offset : values.offset + len(values) + 1
    ].tolist()
    data = memoryview(bytes_buffer) if bytes_buffer is not None else memoryview(b"")
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter(
        (digest(data[begin:end]) for begin, end in pairwise(offsets)),
        np.uint64,
        len(values),
    )


def _integers(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.integer]:
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if not _is_integer(ids.type):
        raise IdError(f"ids of type {ids.type} cannot be rows: ids: identity needs integers", 0)
    assert ids.null_count == 0, "nulls are dropped before ids become rows"
    values: npt.NDArray[np.integer] = ids.to_numpy(zero_copy_only=False)
    return values


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))
