"""Arrow columns -> arrays: the rule for each kind of feature, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mtlrec.data.columns import Cut, column_names, join, list_features, shuffle_cuts, single_features
from mtlrec.data.decode import build_columns
from mtlrec.data.ids import hash_ids, rows_of
from mtlrec.data.vocabulary import count
from mtlrec.job.errors import InputError
from tests.data.built import build, refused, schema_of

NAN, INF = float("nan"), float("inf")


def lists_of(columns, index=0):
    lists = columns.lists[index]
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets, lists.offsets[1:], strict=False)]


ID = {"u": {"kind": "id", "rows": 1000}}
IDENTITY = {"u": {"kind": "id", "rows": 1000, "ids": "identity"}}


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
)
def test_integer_ids_of_any_width_hash_alike_and_null_looks_nothing_up(kind):
    columns = build(schema_of(ID), u=pa.array([5, None, 7, 0], kind))
    five, seven, zero = rows_of(np.array([5, 7, 0]), 1000, "hash")
    assert columns.ids.tolist() == [[five, -1, seven, zero]]
    assert columns.ids.dtype == np.int32
    assert columns.rows.tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_text_ids_hash_alike_however_they_are_stored(kind, encode):
    array = pa.array(["b", None, "a", "b", "ü"], pa.string()).cast(kind)
    array = array.cast(pa.string()).dictionary_encode() if encode else array
    b, a, u = rows_of(pa.array(["b", "a", "ü"]), 1000, "hash")
    assert build(schema_of(ID), u=array).ids.tolist() == [[b, -1, a, b, u]]


def test_ids_that_are_all_null():
    for kind in (pa.int64(), pa.string()):
        assert build(schema_of(ID), u=pa.array([None, None], kind)).ids.tolist() == [[-1, -1]]
    dictionary = pa.array([None, None], pa.string()).dictionary_encode()
    assert build(schema_of(ID), u=dictionary).ids.tolist() == [[-1, -1]]


def test_more_ids_than_are_hashed_at_a_time():
    ids = np.arange(40_000) * 7
    assert (build(schema_of(ID), u=ids).ids[0] == rows_of(ids, 1000, "hash")).all()


def test_tables_beyond_32_bits_have_64_bit_rows():
    columns = build(schema_of({"u": {"kind": "id", "rows": 2**31 + 1}}), u=[1, 2])
    assert columns.ids.dtype == np.int64
    assert columns.ids[0].tolist() == rows_of(np.array([1, 2]), 2**31 + 1, "hash").tolist()


def test_chunks_and_slices_are_put_together():
    chunks = pa.chunked_array(
        [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", "a", "b"]).dictionary_encode().slice(1)]
    )
    a, b = rows_of(pa.array(["a", "b"]), 1000, "hash")
    assert build(schema_of(ID), u=chunks).ids.tolist() == [[a, b, a, b]]


def test_identity_ids_are_rows():
    assert build(schema_of(IDENTITY), u=[0, None, 999]).ids.tolist() == [[0, -1, 999]]


@pytest.mark.parametrize("bad", [1000, -1])
def test_an_identity_id_out_of_range_is_refused(bad):
    ids = [3] * 20_000 + [bad]
    message = refused(schema_of(IDENTITY), u=ids)
    assert message == f"row 20000, column u: id {bad} is outside the table: identity ids are 0 <= id < 1000"


def test_text_cannot_be_identity():
    for array in (pa.array([None, "7"]), pa.array([None, "7"]).dictionary_encode()):
        assert "column u: ids of type string cannot be rows" in refused(schema_of(IDENTITY), u=array)


LIST = {"h": {"kind": "id_list", "rows": 1000, "ids": "identity"}}
LAST_TWO = {"h": {"kind": "id_list", "rows": 1000, "ids": "identity", "max_length": 2}}
NESTED = [[1, 2, 3], None, [], [None, 4, None], [5, None, 6, 7]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int32())])
@pytest.mark.parametrize("begin", [0, 2])
def test_lists_drop_null_elements(kind, begin):
    columns = build(schema_of(LIST), h=pa.array(NESTED, kind).slice(begin))
    assert lists_of(columns) == [[1, 2, 3], [], [], [4], [5, 6, 7]][begin:]


def test_lists_keep_their_last_ids():
    assert lists_of(build(schema_of(LAST_TWO), h=NESTED)) == [[2, 3], [], [], [4], [6, 7]]


def test_nulls_are_dropped_before_the_last_ids_are_kept():
    assert lists_of(build(schema_of(LAST_TWO), h=[[1, 2, None], [3, None, None, 4, 5]])) == [[1, 2], [4, 5]]


def test_what_lies_under_a_null_list_is_not_read():
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 1, 3, 4]), pa.array([1, 2, 3, 4]), mask=pa.array([False, True, False])
    )
    assert lists_of(build(schema_of(LIST), h=hidden)) == [[1], [], [4]]


@pytest.mark.parametrize("encode", [False, True])
def test_lists_of_text(encode):
    values = pa.array(["a", None, "b", "a"])
    array = pa.ListArray.from_arrays(
        pa.array([0, 2, 2, 4], pa.int32()), values.dictionary_encode() if encode else values
    )
    a, b = rows_of(pa.array(["a", "b"]), 1000, "hash")
    features = {"h": {"kind": "id_list", "rows": 1000, "max_length": 2}}
    assert lists_of(build(schema_of(features), h=array)) == [[a], [], [b, a]]


def test_a_bad_element_of_a_list_names_its_row():
    message = refused(schema_of(LIST), h=[[1], None, [], [2, None, 5000]])
    assert message.startswith("row 3, column h: id 5000 is outside the table")
    # The cut comes first: what is not used is not looked at.
    assert lists_of(build(schema_of(LAST_TWO), h=[[5000, 1, 2]])) == [[1, 2]]
    assert refused(schema_of(LAST_TWO), h=[[1], [5000, 1]]).startswith("row 1, column h: id 5000")


def test_features_that_share_a_table_look_up_alike():
    features = {
        "i": {"kind": "id", "rows": 1000},
        "h": {"kind": "id_list", "table": "i"},
        "u": {"kind": "id", "rows": 50},
    }
    schema = schema_of(features)
    columns = build(schema, i=[7, 8], h=[[8, 7], [7]], u=[7, 8])
    assert [f.name for f in single_features(schema)] == ["i", "u"]
    assert [f.name for f in list_features(schema)] == ["h"]
    seven, eight = columns.ids[0]
    assert lists_of(columns) == [[eight, seven], [seven]]
    assert columns.ids[1].tolist() == rows_of(np.array([7, 8]), 50, "hash").tolist()


WORDS = {"ids": "vocabulary", "reserved": 2}


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (pa.array([5, -3, 8]), pa.array([8, 77, None, -3, 5, 8], pa.int16())),
        (pa.array(["b", "a", "ü"]), pa.array(["ü", "new", None, "a", "b", "ü"])),
        (pa.array(["b", "a", "ü"]), pa.array(["ü", "new", None, "a", "b", "ü"]).dictionary_encode()),
    ],
)
def test_a_vocabulary_says_which_row_an_id_has(known, asked):
    features = {"u": {"kind": "id", **WORDS}, "h": {"kind": "id_list", "table": "u"}}
    vocabulary = count([pa.chunked_array([known])]).to_vocabulary(2)
    lists = pa.ListArray.from_arrays(pa.array([0, 3, 3, 6, 6, 6, 6], pa.int32()), asked)
    columns = build(schema_of(features), vocabularies={"u": vocabulary}, u=asked, h=lists)
    third, unknown, first, second = vocabulary.look_up(
        hash_ids(
            pa.concat_arrays(
                [known.slice(2), pa.array([asked.to_pylist()[1]], known.type), known.slice(0, 2)]
            )
        )
    ).tolist()
    assert unknown < 2 <= min(first, second, third)
    assert columns.ids.tolist() == [[third, unknown, -1, second, first, third]]
    assert lists_of(columns) == [[third, unknown], [], [second, first, third], [], [], []]


def test_ids_of_another_kind_than_a_vocabulary_s_are_refused():
    vocabulary = count([pa.chunked_array([pa.array(["a", "b"])])]).to_vocabulary(2)
    with pytest.raises(InputError, match=r"column u: the vocabulary of table 'u' holds text, not integers"):
        build(schema_of({"u": {"kind": "id", **WORDS}}), vocabularies={"u": vocabulary}, u=[1, 2])


def test_more_ids_of_a_vocabulary_than_are_looked_up_at_a_time():
    ids = np.arange(40_000) * 7
    vocabulary = count([pa.chunked_array([pa.array(ids[::2])])]).to_vocabulary(2)
    columns = build(schema_of({"u": {"kind": "id", **WORDS}}), vocabularies={"u": vocabulary}, u=ids)
    assert (columns.ids[0] == vocabulary.look_up(hash_ids(ids))).all()


def test_a_feature_of_several_tables_is_looked_up_once():
    vocabulary = count([pa.chunked_array([pa.array([4, 5])])]).to_vocabulary(2)
    schema = schema_of(
        {"u": {"kind": "id", "tables": ["wide", "bias"]}}, tables={"wide": WORDS, "bias": WORDS}
    )
    assert [feature.tables for feature in schema.id_features] == [("wide", "bias")]
    columns = build(schema, vocabularies={"wide": vocabulary}, u=[5, 4, None])
    assert columns.ids.tolist() == [[*vocabulary.look_up(hash_ids(np.array([5, 4]))), -1]]


def bucketised(*boundaries):
    return schema_of({"x": {"kind": "number", "transform": "bucketise", "boundaries": list(boundaries)}})


def test_buckets_hold_their_lower_boundary_and_none_has_its_own():
    columns = build(bucketised(0.0, 1.5), x=[-1.0, 0.0, 1.0, 1.5, 9.0, None, NAN])
    assert columns.ids.tolist() == [[1, 2, 2, 3, 3, 0, 0]]
    assert build(bucketised(0.0, 1.5), x=[-1, 0, 1, 2, None]).ids.tolist() == [[1, 2, 2, 3, 0]]
    assert columns.dense.shape == (7, 0)


def test_a_bucket_for_an_infinite_number_is_refused():
    assert refused(bucketised(0.0), x=[1.0, -INF]).startswith("row 1, column x: -inf is not a finite number")


def number(transform, **more):
    return schema_of({"x": {"kind": "number", "transform": transform, **more}})


@pytest.mark.parametrize(
    "array",
    [
        pa.array([3, -2, None], pa.int16()),
        pa.array([3.0, -2.0, NAN], pa.float32()),
        pa.array([3.0, -2.0, None], pa.float64()),
        pa.array([3.0, -2.0, None], pa.float16()),
    ],
)
def test_numbers_of_any_type_are_transformed_and_none_is_0(array):
    def dense(schema):
        columns = build(schema, x=array)
        assert columns.dense.shape == (3, 1) and columns.dense.dtype == np.float32
        return columns.dense[:, 0]

    assert dense(number("none")).tolist() == [3, -2, 0]
    np.testing.assert_allclose(dense(number("log1p")), [np.log(4), -np.log(3), 0], rtol=1e-7)
    assert dense(number("standardise", mean=1.0, std=2.0)).tolist() == [1, -1.5, 0]


def test_booleans_are_numbers():
    assert build(number("none"), x=[True, False, None]).dense[:, 0].tolist() == [1, 0, 0]


def test_standardising_keeps_the_precision_of_large_values():
    x = np.array([1e9 + 1, 1e9 - 1])
    assert build(number("standardise", mean=1e9, std=1.0), x=x).dense[:, 0].tolist() == [1, -1]
    # Of a float32 column too: the difference is taken in float64.
    x = np.array([2**24], np.float32)
    assert build(number("standardise", mean=2**24 + 0.5, std=1.0), x=x).dense[0, 0] == -0.5


@pytest.mark.parametrize("transform", ["none", "log1p"])
@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_infinite_numbers_are_refused(transform, kind):
    message = refused(number(transform), x=pa.array([1.0, NAN, None, INF, -INF], kind))
    assert message == "row 3, column x: inf is not a finite number; null or NaN stand for none"


def test_a_number_too_large_for_float32_is_refused():
    message = refused(number("none"), x=[1.0, None, -1e39])
    assert message == "row 2, column x: -1e+39 is too large for float32; scale the column"
    assert build(number("log1p"), x=[1e39]).dense[0, 0] == pytest.approx(39 * np.log(10))


VECTOR = {"v": {"kind": "vector", "size": 2}, "x": {"kind": "number"}}
PAIRS = [[1.0, 2.0], None, [None, 3.0], [NAN, 4.0]]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)]
)
@pytest.mark.parametrize("begin", [0, 1])
def test_a_vector_has_zeros_where_there_is_nothing(kind, begin):
    array = pa.array(PAIRS, kind).slice(begin)
    columns = build(schema_of(VECTOR), v=array, x=[float(i) for i in range(begin, 4)])
    expected = [[1, 2, 0], [0, 0, 1], [0, 3, 2], [0, 4, 3]]
    assert columns.dense.tolist() == expected[begin:]


def test_vectors_of_integers():
    assert build(schema_of(VECTOR), v=[[1, 2], [3, None]], x=[0, 0]).dense[:, :2].tolist() == [[1, 2], [3, 0]]


def test_a_vector_of_another_size_is_refused():
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float64())):
        array = pa.array([[1.0, 2.0], None, [1.0, 2.0, 3.0], []], kind)
        message = refused(schema_of(VECTOR), v=array, x=[0.0] * 4)
        assert message == "row 2, column v: 3 numbers; schema.features.v.size is 2"
    fixed = pa.array([None, [1.0, 2.0, 3.0]], pa.list_(pa.float64(), 3))
    assert refused(schema_of(VECTOR), v=fixed, x=[0.0] * 2).startswith("row 1, column v: 3 numbers")


def test_an_infinite_element_of_a_vector_names_its_row():
    message = refused(schema_of(VECTOR), v=[None, [1.0, 2.0], [0.0, INF]], x=[0.0] * 3)
    assert message.startswith("row 2, column v: inf is not a finite number")
    message = refused(schema_of(VECTOR), v=[None, [1.0, 2.0], [0.0, 1e300]], x=[0.0] * 3)
    assert message.startswith("row 2, column v: 1e+300 is too large for float32")


def scenarios(*values, as_feature=True):
    return schema_of(scenario={"column": "s", "values": list(values), "as_feature": as_feature})


@pytest.mark.parametrize(
    ("values", "array"),
    [
        (("de", "fr", "uk"), pa.array(["uk", "de", "de"])),
        (("de", "fr", "uk"), pa.array(["uk", "de", "de"]).dictionary_encode()),
        (("de", "fr", "uk"), pa.array(["uk", "de", "de"], pa.string_view())),
        ((10, 20, 95), pa.array([95, 10, 10], pa.int8())),
        (("10", "20", "95"), pa.array([95, 10, 10])),
    ],
)
def test_the_scenario_is_its_place_among_the_values(values, array):
    columns = build(scenarios(*values), s=array)
    assert columns.scenario.tolist() == [2, 0, 0]
    # As a feature it comes first, and its table's row is the index.
    assert columns.ids[0].tolist() == [2, 0, 0]
    assert len(build(scenarios(*values, as_feature=False), s=array).ids) == 1


def test_a_job_without_scenarios_has_one():
    assert build(schema_of(), other=[1, 2]).scenario.tolist() == [0, 0]


def test_an_unknown_or_missing_scenario_is_refused():
    message = refused(scenarios("de", "fr"), s=["de", "xx", None])
    assert message == ("row 1, column s: 'xx' is not a scenario; schema.scenario.values allows de, fr")
    for array in (pa.array(["de", None]), pa.array(["de", None]).dictionary_encode()):
        assert refused(scenarios("de", "fr"), s=array).startswith("row 1, column s: null is not a scenario")
    assert "row 0, column s: 3 is not a scenario" in refused(scenarios(1, 2), s=[3])
    many = scenarios(*range(1000))
    assert refused(many, s=[1000]).endswith("18, 19, ... (1000 in all)")


def test_keys_pass_through_as_they_stand_in_the_file():
    schema = schema_of(ID)
    columns = build(
        schema,
        keys=("name", "u", "tags"),
        u=pa.array([5, None]),
        name=pa.array(["a", None]).dictionary_encode(),
        tags=pa.ListArray.from_arrays(
            pa.array([0, 1, 2], pa.int32()), pa.array(["x", "y"]).dictionary_encode()
        ),
    )
    assert columns.keys.to_pydict() == {"name": ["a", None], "u": [5, None], "tags": [["x"], ["y"]]}
    assert columns.keys.schema.types == [pa.string(), pa.int64(), pa.list_(pa.string())]
    assert column_names(schema, False, ("name", "u")) == ["u", "name"]


def everything(num_rows, first):
    features = {**ID, "h": {"kind": "id_list", "rows": 99}, **VECTOR}
    schema = schema_of(features, scenario={"column": "s", "values": [0, 1, 2]}, weight="w")
    number = np.arange(first, first + num_rows)
    table = pa.table(
        {
            "u": number,
            "h": [[int(n)] * int(n % 4) for n in number],
            "v": [[float(n), -float(n)] for n in number],
            "x": number * 0.5,
            "s": number % 3,
            "click": pa.array([None if n % 5 == 0 else bool(n % 2) for n in number]),
            "w": number * 0.25,
        }
    )
    columns = build_columns(table, schema, where="", first_row=first, keys=("u",))
    return replace(columns, user=number.astype(np.int32) - 1)


def rows_in(columns):
    """Everything about each row, as plain data."""
    return [
        (
            columns.rows[r],
            columns.ids[:, r].tolist(),
            lists_of(columns)[r],
            columns.dense[r].tolist(),
            columns.labels[r].tolist(),
            columns.valid[r].tolist(),
            columns.scenario[r],
            columns.weight[r],
            columns.user[r],
            columns.keys["u"][r].as_py(),
        )
        for r in range(len(columns))
    ]


def test_parts_are_cut_joined_and_shuffled_alike():
    whole = everything(30, 0)
    all_rows = rows_in(whole)
    assert rows_in(whole.slice(7, 19)) == all_rows[7:19]
    parts = [everything(4, 0), whole.slice(4, 11), whole.slice(11, 11), everything(19, 11)]
    assert rows_in(join(parts)) == all_rows
    order = np.random.default_rng(0).permutation(12)
    shuffled = whole.slice(7, 19).take(order)
    assert rows_in(shuffled) == [all_rows[7 + at] for at in order]
    assert rows_in(shuffled.slice(3, 9)) == rows_in(shuffled)[3:9]
    order = np.random.default_rng(1).permutation(15)
    cuts = [Cut(whole, 2, 9), Cut(parts[2], 0, 0), Cut(parts[3], 0, 8)]
    assert rows_in(shuffle_cuts(cuts, order)) == [(all_rows[2:9] + all_rows[11:19])[at] for at in order]
