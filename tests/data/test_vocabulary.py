"""Counting ids, looking them up, and files of vocabularies, against a plain dict."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mtlrec.data import vocabulary
from mtlrec.data.ids import hash_ids
from mtlrec.data.vocabulary import TYPES, Counts, Kind, Vocabulary, count, join, merge, read, write

INTEGERS = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))
WIDE = st.one_of(st.integers(0, 3), st.integers(2**63 - 2, 2**64 - 1))
TEXTS = st.one_of(st.sampled_from(["", "a", "b", "ä"]), st.text(max_size=4))
RAW = st.one_of(st.sampled_from([b"", b"a"]), st.binary(max_size=4))


def column(values: Sequence[Any], kind: pa.DataType, chunks: int = 1) -> pa.ChunkedArray:
    size = max(-(-len(values) // chunks), 1)
    parts = [values[begin : begin + size] for begin in range(0, len(values), size)]
    return pa.chunked_array([pa.array(part, kind) for part in parts], kind)


def as_dict(counts: Counts, kind: pa.DataType) -> dict[Any, int]:
    ids = counts.ids.view(kind).to_pylist()
    assert len(set(ids)) == len(ids) and (counts.hashes[1:] > counts.hashes[:-1]).all()
    np.testing.assert_array_equal(counts.hashes, hash_ids(counts.ids.view(kind)))
    return dict(zip(ids, counts.counts.tolist(), strict=True))


def in_vocabulary(ids: dict[Any, int], kind: pa.DataType, reserved: int = 1) -> Vocabulary:
    """The vocabulary of ids with their counts, made the slow way."""
    order = sorted(ids, key=lambda value: int(hash_ids(pa.array([value], kind))[0]))
    array = pa.array(order, kind)
    return Vocabulary(hash_ids(array), array, np.array([ids[value] for value in order]), reserved)


@pytest.mark.parametrize(
    ("values", "kind", "held"),
    [
        (INTEGERS, pa.int64(), pa.int64()),
        (st.integers(-128, 127), pa.int8(), pa.int64()),
        (st.integers(0, 2**32 - 1), pa.uint32(), pa.int64()),
        (st.integers(0, 2**63 - 1), pa.uint64(), pa.int64()),
        (TEXTS, pa.string(), pa.large_string()),
        (TEXTS, pa.large_string(), pa.large_string()),
        (TEXTS, pa.string_view(), pa.large_string()),
        (TEXTS, pa.dictionary(pa.int32(), pa.string()), pa.large_string()),
        (st.integers(-9, 9), pa.dictionary(pa.int8(), pa.int64()), pa.int64()),
        (RAW, pa.binary(), pa.large_binary()),
        (st.binary(min_size=2, max_size=2), pa.binary(2), pa.large_binary()),
    ],
    ids=str,
)
@given(data=st.data())
def test_counts_are_those_of_a_dict(
    values: st.SearchStrategy[Any], kind: pa.DataType, held: pa.DataType, data: st.DataObject
) -> None:
    found = data.draw(st.lists(st.one_of(st.none(), values), max_size=40))
    chunks = data.draw(st.integers(1, 3))
    counts = count([column(found, kind, chunks)])
    assert TYPES[counts.kind] == held
    assert as_dict(counts, held) == Counter(value for value in found if value is not None)


@given(st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), TEXTS), max_size=5)), max_size=20))
def test_every_element_of_a_list_counts(lists: list[list[str | None] | None]) -> None:
    expected = Counter(text for texts in lists for text in texts or () if text is not None)
    text = pa.dictionary(pa.int32(), pa.string())
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(text)):
        assert as_dict(count([column(lists, kind)]), pa.large_string()) == expected
    sliced = pa.chunked_array([pa.array([["lost"], *lists], pa.list_(pa.string())).slice(1)])
    assert as_dict(count([sliced]), pa.large_string()) == expected


@given(st.lists(WIDE, min_size=1, max_size=30))
def test_unsigned_ids_survive(values: list[int]) -> None:
    counts = count([column(values, pa.uint64())])
    wide = max(values) >= 2**63
    assert counts.kind == ("uint64" if wide else "int64")
    found = counts.to_vocabulary(2)
    assert sorted(found.ids.to_pylist()) == sorted(set(values))
    again = Vocabulary.from_arrays(found.to_arrays(), found.kind, 2)
    assert again == found and again.ids.type == (pa.uint64() if wide else pa.int64())


def test_columns_count_together() -> None:
    texts = column(["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()))
    lists = column([["b", "c"], None], pa.list_(pa.string()))
    counts = count([texts, lists])
    assert counts.kind == "string" and as_dict(counts, pa.large_string()) == {"a": 2, "b": 2, "c": 1}
    raw = count([texts, column([b"c", b"\xff"], pa.binary())])
    assert raw.kind == "binary"
    assert as_dict(raw, pa.large_binary()) == {b"a": 2, b"b": 1, b"c": 1, b"\xff": 1}
    numbers = count([column([-1, 5], pa.int8()), column([5, 2**64 - 1], pa.uint64())])
    # -1 and 2^64 - 1 have the same 64 bits, so the same hash, and are one id.
    assert numbers.kind == "uint64" and as_dict(numbers, pa.uint64()) == {2**64 - 1: 2, 5: 2}
    with pytest.raises(ValueError, match="some ids are integers and others are not"):
        count([texts, column([1], pa.int64())])


def test_no_ids() -> None:
    for kind in (pa.int64(), pa.string(), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string())):
        for values in ([], [None]):
            assert len(count([column(values, kind)])) == 0
    assert len(merge([count([column([], pa.string())])] * 2)) == 0


def test_text_that_is_none_is_kept_as_binary() -> None:
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    found = count([pa.chunked_array([broken])]).to_vocabulary(1)
    assert found.kind == "binary" and sorted(found.ids.to_pylist()) == [b"a", b"\xff"]


@given(st.lists(st.lists(st.integers(-20, 20), max_size=30), min_size=1, max_size=6), st.randoms())
def test_merging_knows_no_order(parts: list[list[int]], shuffle: random.Random) -> None:
    counted = [count([column(part, pa.int16())]) for part in parts]
    expected = Counter(value for part in parts for value in part)
    shuffle.shuffle(counted)
    cut = shuffle.randint(0, len(counted) - 1)
    nested = merge([merge(counted[: cut + 1]), *counted[cut + 1 :]])
    assert as_dict(nested, pa.int64()) == as_dict(merge(counted), pa.int64()) == expected
    middle = shuffle.randint(0, len(nested))
    joined = join([nested.slice(0, middle), nested.slice(middle, len(nested))])
    assert as_dict(joined, pa.int64()) == expected
    stored = Counts.from_bytes(nested.slice(0, middle).to_bytes())
    assert as_dict(stored, pa.int64()) == as_dict(nested.slice(0, middle), pa.int64())


@given(st.lists(st.lists(st.text("abc", max_size=3), max_size=20), min_size=1, max_size=5))
def test_of_ids_with_one_hash_the_smallest_is_kept(parts: list[list[str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "hash_ids", lambda ids: np.array([len(i.as_py()) for i in ids], np.uint64))
        counted = [count([column(part, pa.string())]) for part in parts]
    for merged in (merge(counted), merge([merge(counted[::-1]), count([column([], pa.string())])])):
        texts = [text for part in parts for text in part]
        lengths = sorted({len(text) for text in texts})
        assert merged.hashes.tolist() == lengths
        assert merged.counts.tolist() == [sum(len(text) == length for text in texts) for length in lengths]
        kept = [min(text for text in texts if len(text) == length) for length in lengths]
        assert merged.ids.view(pa.large_string()).to_pylist() == kept


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 40))
def test_the_most_frequent(numbers: list[int], most: int) -> None:
    array = pa.array(range(len(numbers)))
    order = np.argsort(hash_ids(array))
    counts = Counts("int64", hash_ids(array)[order], array.take(order), np.array(numbers)[order])
    expected = sorted(zip((-counts.counts).tolist(), counts.hashes.tolist(), strict=True))[:most]
    found = counts.most_frequent(most)
    assert found.hashes.tolist() == sorted(hashed for _, hashed in expected)
    assert as_dict(found, pa.int64()).items() <= as_dict(counts, pa.int64()).items()


@given(
    st.dictionaries(st.one_of(st.none().map(lambda _: 7), INTEGERS), st.integers(1, 9), min_size=1),
    st.lists(INTEGERS, max_size=30),
    st.integers(1, 5),
)
def test_look_up(ids: dict[int, int], others: list[int], reserved: int) -> None:
    found = in_vocabulary(ids, pa.int64(), reserved)
    assert found.rows == reserved + len(ids) and len(found) == len(ids)
    raw = found.raw_ids().to_pylist()
    assert raw[:reserved] == [None] * reserved and sorted(raw[reserved:]) == sorted(ids)
    place = {value: row for row, value in enumerate(raw) if value is not None}
    asked = np.array([*others, *ids, *others], np.int64)
    hashes = hash_ids(asked)
    expected = [
        place.get(value, int(hashed) % reserved)
        for value, hashed in zip(asked.tolist(), hashes.tolist(), strict=True)
    ]
    rows = found.look_up(hashes)
    assert rows.dtype == np.int64 and rows.tolist() == expected


@given(st.sets(st.integers(0, 2**64 - 1), max_size=60), st.integers(0, 2**64 - 1), st.integers(1, 300))
def test_look_up_of_any_hashes(some: set[int], start: int, length: int) -> None:
    """Those of a stranger's checkpoint need not be spread evenly."""
    run = range(start, min(start + length, 2**64))
    hashes = np.array(sorted({*some, *run}), np.uint64)
    found = Vocabulary(hashes, pa.nulls(len(hashes), pa.int64()), np.ones(len(hashes), np.int64), 2)
    near = np.concatenate([hashes, hashes + np.uint64(1), hashes - np.uint64(1)])
    known = {int(value): row + 2 for row, value in enumerate(hashes)}
    assert found.look_up(near).tolist() == [known.get(int(value), int(value) % 2) for value in near]


def test_look_up_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_BLOCK", 1000)
    generator = np.random.default_rng(0)
    hashes = np.unique(generator.integers(0, 2**64, 100_000, dtype=np.uint64))
    found = Vocabulary(hashes, pa.nulls(len(hashes), pa.int64()), np.ones(len(hashes), np.int64), 3)
    asked = np.concatenate([hashes[::7], generator.integers(0, 2**64, 9_999, dtype=np.uint64)])
    place = np.searchsorted(hashes, asked).clip(max=len(hashes) - 1)
    expected = np.where(hashes[place] == asked, place + 3, (asked % np.uint64(3)).astype(np.int64))
    np.testing.assert_array_equal(found.look_up(asked), expected)


EXAMPLES: dict[Kind, dict[Any, int]] = {
    "int64": {-(2**63): 1, -1: 2, 0: 3, 2**63 - 1: 2**40},
    "uint64": {0: 1, 2**63: 2, 2**64 - 1: 3},
    "string": {"": 1, "ä": 2, "long" * 50: 3},
    "binary": {b"": 1, b"\xff\x00": 2},
}


@pytest.mark.parametrize("kind", list(EXAMPLES))
def test_arrays_and_files(tmp_path: Path, kind: Kind) -> None:
    found = in_vocabulary(EXAMPLES[kind], TYPES[kind], 2)
    assert found.kind == kind
    arrays = found.to_arrays()
    assert all(array.dtype == (np.uint8 if kind in ("string", "binary") and name == "ids" else np.int64)
               for name, array in arrays.items())  # fmt: skip
    assert Vocabulary.from_arrays(arrays, found.kind, 2) == found
    # A slice of a longer array keeps its place in the longer one's memory.
    part = Vocabulary(found.hashes[1:], found.ids.slice(1), found.counts[1:], 2)
    assert Vocabulary.from_arrays(part.to_arrays(), part.kind, 2) == part != found
    url = str(tmp_path / "some" / "item.parquet")
    write(url, found, {"columns": ["a"]})
    assert read(url) == (found, {"columns": ["a"], "reserved": 2})
    before = Path(url).read_bytes()
    write(url, found, {"columns": ["a"]})
    assert Path(url).read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "item.parquet"
    with pytest.raises(FileNotFoundError):
        read(str(path))
    write(str(path), in_vocabulary(dict.fromkeys(range(1000), 1), pa.int64()), {})
    whole = path.read_bytes()
    for data in (b"", whole[:-9], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"item\.parquet: not a whole vocabulary"):
            read(str(path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hashes": np.array([3, 2])}, "hashes do not increase"),
        ({"hashes": np.array([2, 2])}, "hashes do not increase"),
        ({"counts": np.array([1, 0])}, "counts an id less than once"),
        ({"offsets": np.array([0, 2, 3])}, "offsets do not cut its ids"),
        ({"offsets": np.array([0, 9, 2])}, "offsets do not cut its ids"),
        ({"offsets": np.array([1, 1, 2])}, "offsets do not cut its ids"),
        ({"ids": np.array([97, 255], np.uint8)}, "its ids are no string"),
    ],
)
def test_arrays_that_contradict_themselves(change: dict[str, Any], problem: str) -> None:
    arrays = {
        "hashes": np.array([2, 3]),
        "counts": np.array([1, 1]),
        "offsets": np.array([0, 1, 2]),
        "ids": np.array([97, 98], np.uint8),
    }
    assert Vocabulary.from_arrays(arrays, "string", 1).ids.to_pylist() == ["a", "b"]
    with pytest.raises(ValueError, match=problem):
        Vocabulary.from_arrays({**arrays, **change}, "string", 1)


def test_rows_are_a_contract() -> None:
    """Pinned: checkpoints depend on the order."""
    found = count([column(["x", "y", "z", "x"], pa.string())]).to_vocabulary(1)
    assert found.hashes.tolist() == sorted(xxhash.xxh3_64_intdigest(text) for text in (b"x", b"y", b"z"))
    assert found.raw_ids().to_pylist() == [None, "y", "z", "x"]
    assert found.counts.tolist() == [1, 1, 2]
