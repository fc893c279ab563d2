"""Labels, what a task is given, sample weights, and what the overview says of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtlrec.data.columns import column_names
from mtlrec.data.decode import build_columns
from mtlrec.data.overview import overview
from mtlrec.data.shards import Dataset
from tests.data.built import build, refused, schema_of

NAN, INF = float("nan"), float("inf")
ID = {"u": {"kind": "id", "rows": 1000}}


def labelled(kind):
    return schema_of(tasks={"t": {"kind": kind, "label": "y"}})


@pytest.mark.parametrize(
    "array", [pa.array([1, 0, None], pa.int8()), pa.array([1.0, 0.0, NAN]), pa.array([True, False, None])]
)
@pytest.mark.parametrize("kind", ["binary", "regression", "pairwise"])
def test_a_label_may_be_missing(array, kind):
    columns = build(labelled(kind), labels=True, y=array)
    assert columns.labels.tolist() == [[1], [0], [0]]
    assert columns.valid.tolist() == [[True], [True], [False]]


@pytest.mark.parametrize("kind", ["binary", "pairwise"])
@pytest.mark.parametrize("bad", [2, -1, 0.5])
def test_a_binary_label_is_0_or_1(bad, kind):
    message = refused(labelled(kind), labels=True, y=[0.0, None, 1.0, bad])
    assert message == (
        f"row 3, column y: {float(bad)} is not a label of a {kind} task; 0, 1 (or false, true) and null are"
    )
    assert build(labelled("regression"), labels=True, y=[bad]).labels.tolist() == [[bad]]


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_an_infinite_label_is_refused(kind):
    assert refused(labelled(kind), labels=True, y=[0.0, INF]).startswith("row 1, column y: inf is not")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_a_task_counts_where_what_it_is_given_counts_and_is_1(order):
    """click -> buy -> (stars, back): each chain in every order of the tasks."""
    tasks = {
        "click": {"kind": "binary"},
        "buy": {"kind": "binary", "given": "click"},
        "stars": {"kind": "regression", "given": "buy"},
        "back": {"kind": "binary", "given": "buy"},
    }
    names = [list(tasks)[at] for at in order]
    schema = schema_of(tasks={name: tasks[name] for name in names})
    values = [None, 0, 1]
    rows = [(a, b, c, d) for a in values for b in values for c in values for d in values]
    given = dict(zip(tasks, (pa.array(each, pa.int64()) for each in zip(*rows, strict=True)), strict=True))
    columns = build(schema, labels=True, **given)
    for row, labels, valid in zip(rows, columns.labels, columns.valid, strict=True):
        click, buy = row[:2]
        allowed = {"click": True, "buy": click == 1, "stars": click == buy == 1, "back": click == buy == 1}
        for name, label, counts in zip(names, labels, valid, strict=True):
            value = dict(zip(tasks, row, strict=True))[name]
            assert counts == (allowed[name] and value is not None)
            assert label == (value if counts else 0)


WEIGHTED = schema_of(ID, weight="w")


@pytest.mark.parametrize(
    "array", [pa.array([2.5, 0, 1], pa.float32()), pa.array([2.5, 0, 1]), pa.array([2, 0, 1], pa.uint8())]
)
def test_sample_weights(array):
    columns = build(WEIGHTED, labels=True, w=array, click=[1, 0, None])
    assert columns.weight.dtype == np.float32
    assert columns.weight.tolist() == array.to_pylist()
    assert build(WEIGHTED, labels=True, w=[True, False], click=[1, 0]).weight.tolist() == [1, 0]
    assert build(schema_of(ID), labels=True, click=[1]).weight is None
    # Prediction wants none, and the column need not be there.
    assert column_names(WEIGHTED, False, ()) == ["u"] and column_names(WEIGHTED, True, ()) == [
        "u",
        "w",
        "click",
    ]
    assert build_columns(pa.table({"u": [1]}), WEIGHTED, where="", first_row=0, labels=False).weight is None


@pytest.mark.parametrize(
    ("bad", "shown"), [(None, "null"), (NAN, "nan"), (-1.0, "-1.0"), (INF, "inf"), (-INF, "-inf")]
)
def test_a_sample_weight_is_a_finite_number_from_0_on(bad, shown):
    message = refused(WEIGHTED, labels=True, w=[1.0, 0.0, bad, None], click=[1, 0, 1, 1])
    assert message == f"row 2, column w: {shown} is no sample weight; a finite number from 0 on is"
    assert "row 1, column w: 1e+39 is too large" in refused(WEIGHTED, labels=True, w=[1, 1e39], click=[1, 0])


def test_without_labels_their_columns_need_not_exist():
    schema = labelled("binary")
    assert column_names(schema, False, ()) == ["other"]
    columns = build_columns(pa.table({"other": [1, 2]}), schema, where="", first_row=0, labels=False)
    assert columns.valid.tolist() == [[False], [False]]
    assert columns.labels.tolist() == [[0], [0]]


def test_the_overview_counts_what_given_allows(tmp_path):
    """pairwise labels and chains of `given`, by scenario."""
    tasks = {
        "stars": {"kind": "regression", "given": "buy"},
        "buy": {"kind": "binary", "given": "click"},
        "click": {"kind": "binary"},
        "pick": {"kind": "pairwise", "label": "click"},
    }
    schema = schema_of(tasks=tasks, scenario={"column": "s", "values": ["a", "b"]})
    table = pa.table(
        {
            "s": ["a", "a", "a", "a", "b"],
            "click": [1, 1, 0, None, 0],
            "buy": [1, 0, 1, 1, 1],
            "stars": [4.0, 5.0, 1.0, 1.0, 2.0],
            "other": [1, 2, 3, 4, 5],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = overview(Dataset.open(str(tmp_path), schema.columns()), schema)["scenarios"]
    assert found["a"] == {
        "rows": 4,
        "tasks": {
            "stars": {"labelled": 0.25, "mean": 4.0},
            "buy": {"labelled": 0.5, "mean": 0.5},
            "click": {"labelled": 0.75, "mean": pytest.approx(2 / 3)},
            "pick": {"labelled": 0.75, "mean": pytest.approx(2 / 3)},
        },
    }
    assert found["b"]["tasks"]["stars"] == {"labelled": 0.0, "mean": None}
    assert found["b"]["tasks"]["click"] == {"labelled": 1.0, "mean": 0.0}
