"""The hash of ids is a contract (golden values), and ids become rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, integer_dtypes, unsigned_integer_dtypes

from mtlrec.data.ids import IdError, hash_ids, hash_into, rows_of, to_rows

integer_arrays = arrays(
    st.one_of(integer_dtypes(endianness="="), unsigned_integer_dtypes(endianness="=")), st.integers(0, 50)
)
words = st.lists(st.text(max_size=30), max_size=30)


def splitmix64(value: int) -> int:
    """Straight from the paper, on Python's integers."""
    mask = 2**64 - 1
    word = (value + 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def test_golden_integers() -> None:
    # The first is the generator's published first output for seed 0.
    assert hash_ids(np.array([0, 1, -1, 42, 2**63 - 1, -(2**63)])).tolist() == [
        0xE220A8397B1DCDAF,
        0x910A2DEC89025CC1,
        0xE4D971771B652C20,
        0xBDD732262FEB6E95,
        0x2A67D7552E039EA7,
        0x481EC0A212A9F3DB,
    ]


def test_golden_strings() -> None:
    # The first is the XXH3-64 of nothing, as published with the algorithm.
    assert hash_ids(pa.array(["", "a", "user_1", "Straße", "B00005N5PF"])).tolist() == [
        0x2D06800538D394C2,
        0xE6C632B61E964E1F,
        0x20F909AB6F54D5A1,
        0x3CA977A6B5EE5D71,
        0x98C2A63875A8572B,
    ]


@given(integer_arrays)
def test_integers_of_any_width(values: np.ndarray) -> None:
    expected = [splitmix64(int(value)) for value in values]
    assert hash_ids(values).tolist() == expected
    assert hash_ids(pa.array(values)).tolist() == expected
    assert (
        hash_ids(pa.chunked_array([pa.array(values), pa.array(values)[:3]])).tolist()
        == expected + expected[:3]
    )


def test_blocks_join() -> None:
    values = np.arange(-40_000, 60_001, dtype=np.int32)
    hashes = hash_ids(values)
    picked = [0, 16_383, 16_384, 32_767, 32_768, 100_000]
    assert hashes[picked].tolist() == [splitmix64(int(value)) for value in values[picked]]
    assert len(np.unique(hashes)) == len(values)
    assert hash_ids(values[::2]).tolist() == hashes[::2].tolist(), "a strided array"


@given(words, st.integers(0, 5), st.integers(0, 30))
def test_strings_of_any_type(texts: list[str], begin: int, length: int) -> None:
    expected = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts][begin : begin + length]
    plain = pa.array(texts, pa.string())
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        array = pc.cast(plain, kind)
        assert hash_ids(array.slice(begin, length)).tolist() == expected
    assert hash_ids(plain.dictionary_encode().slice(begin, length)).tolist() == expected


def test_fixed_size_binary_hashes_its_bytes() -> None:
    assert hash_ids(pa.array([b"abcd"], pa.binary(4))).tolist() == hash_ids(pa.array(["abcd"])).tolist()


def test_integers_in_a_dictionary() -> None:
    values = pa.array([7, 7, -1, 3])
    assert hash_ids(values.dictionary_encode()).tolist() == hash_ids(values).tolist()
    assert rows_of(pa.array([7, 7, 0]).dictionary_encode(), 8, "identity").tolist() == [7, 7, 0]


@given(
    arrays(np.uint64, st.integers(0, 50)),
    st.one_of(st.integers(1, 2**40), st.integers(0, 40).map(lambda n: 2**n)),
)
def test_rows_are_remainders(hashes: np.ndarray, rows: int) -> None:
    before = hashes.copy()
    found = to_rows(hashes, rows)
    assert found.dtype == np.int64
    assert found.tolist() == [int(value) % rows for value in before]
    assert (hashes == before).all()


@given(integer_arrays, st.one_of(st.integers(1, 2**40), st.integers(0, 40).map(lambda n: 2**n)))
def test_rows_are_written_where_they_are_wanted(values: np.ndarray, rows: int) -> None:
    for target in (np.empty(len(values), np.int64), np.empty((len(values), 2), np.int64)[:, 0]):
        hash_into(values, rows, target)
        assert target.tolist() == rows_of(values, rows, "hash").tolist()


@pytest.mark.parametrize("rows", [3, 1000, 1024, 2**31, 2**31 + 1])
def test_small_ids_have_the_rows_of_all(rows: int) -> None:
    # All from 0 on and below 2^17; or not, and where they begin and end does not tell.
    small = np.random.default_rng(0).integers(0, 2**17, 40_000)
    for middle in (0, 2**17 - 1, 2**17, -1):
        values = small.copy()
        values[20_000] = middle
        target = np.empty(len(values), np.int32 if rows <= 2**31 else np.int64)
        hash_into(values, rows, target)
        assert (target == rows_of(values, rows, "hash")).all()


@given(st.integers(0, 2**64 - 1), st.integers(1, 10**6), st.integers(1, 1000))
def test_a_grown_table_keeps_its_rows(word: int, rows: int, times: int) -> None:
    hashes = np.array([word], np.uint64)
    assert to_rows(to_rows(hashes, rows * times).view(np.uint64), rows) == to_rows(hashes, rows)


def test_hashed_rows_are_even() -> None:
    """Consecutive and strided ids spread over a table like balls thrown at random (chi-square, 5 sigma)."""
    for step in (1, 2, 1024, 2**32):
        counts = np.bincount(rows_of(np.arange(200_000) * step, 1000, "hash"), minlength=1000)
        assert abs(((counts - 200) ** 2 / 200).sum() - 999) < 5 * np.sqrt(2 * 999)


@given(integer_arrays, st.integers(1, 2**40))
def test_identity(values: np.ndarray, rows: int) -> None:
    outside = [index for index, value in enumerate(values) if not 0 <= int(value) < rows]
    for ids in (values, pa.array(values), pa.chunked_array([pa.array(values)])):
        if outside:
            with pytest.raises(IdError) as raised:
                rows_of(ids, rows, "identity")
            assert raised.value.position == outside[0]
            assert str(values[outside[0]]) in str(raised.value)
            assert str(rows) in str(raised.value)
        else:
            found = rows_of(ids, rows, "identity")
            assert found.dtype == np.int64
            assert found.tolist() == values.tolist()


@pytest.mark.parametrize("ids", [pa.array(["1"]), pa.array([b"1"]), pa.array(["1"]).dictionary_encode()])
def test_strings_are_no_identity(ids: pa.Array) -> None:
    with pytest.raises(IdError, match="identity needs integers"):
        rows_of(ids, 10, "identity")


def test_nothing() -> None:
    for ids in (pa.array([], pa.int64()), pa.array([], pa.string()), pa.chunked_array([], pa.int64())):
        assert hash_ids(ids).tolist() == []
        assert rows_of(ids, 7, "hash").tolist() == []
    assert rows_of(pa.array([], pa.int8()), 7, "identity").tolist() == []
