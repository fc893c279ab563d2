from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from mtlrec.metrics.metrics import Metrics

TASKS = (("click", "binary"), ("rating", "regression"))
SCENARIOS = ("feed", "search", "empty")


class Rows:
    """Random rows of two scenarios (the third stays empty), both tasks partly without labels."""

    def __init__(self, seed: int, rows: int) -> None:
        random = np.random.default_rng(seed)
        self.outputs = random.normal(size=(rows, 2)).astype(np.float32)
        chance = 1 / (1 + np.exp(-self.outputs[:, 0]))
        click = random.random(rows) < chance
        rating = self.outputs[:, 1] + random.normal(size=rows)
        self.labels = np.stack([click, rating], axis=1).astype(np.float32)
        self.valid = random.random((rows, 2)) < [0.9, 0.5]
        self.scenario = random.integers(0, 2, rows)

    def feed(self, metrics: Metrics, part: slice) -> None:
        metrics.update(self.outputs[part], self.labels[part], self.valid[part], self.scenario[part])


def _whole(rows: Rows) -> Metrics:
    metrics = Metrics(SCENARIOS, TASKS)
    rows.feed(metrics, slice(None))
    return metrics


def test_agrees_with_scikit_learn_per_scenario_and_task() -> None:
    rows = Rows(seed=0, rows=150_000)
    metrics = Metrics(SCENARIOS, TASKS)
    for begin in range(0, 150_000, 4_096):
        rows.feed(metrics, slice(begin, begin + 4_096))
    result = metrics.result()
    assert list(result) == ["all", *SCENARIOS]
    for name, chosen in (
        ("all", rows.scenario >= 0),
        ("feed", rows.scenario == 0),
        ("search", rows.scenario == 1),
    ):
        click = chosen & rows.valid[:, 0]
        logits, labels = rows.outputs[click, 0], rows.labels[click, 0]
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        found = result[name]["click"]
        assert found["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
        assert found["logloss"] == pytest.approx(log_loss(labels, probability), rel=1e-7)
        assert found["calibration"] == pytest.approx(probability.sum() / labels.sum())
        assert (found["rows"], found["positives"]) == (click.sum(), labels.sum())
        rating = chosen & rows.valid[:, 1]
        values, labels = rows.outputs[rating, 1].astype(np.float64), rows.labels[rating, 1].astype(np.float64)
        found = result[name]["rating"]
        assert found["rmse"] == pytest.approx(mean_squared_error(labels, values) ** 0.5)
        assert found["mae"] == pytest.approx(mean_absolute_error(labels, values))
        assert (found["rows"], found["positives"]) == (rating.sum(), None)
        assert "reasons" not in found


def test_undefined_metrics_are_null_with_a_reason() -> None:
    metrics = Metrics(("a", "b", "c"), (*TASKS, ("buy", "binary")))
    outputs = np.array([[0.0, 1.0, 1.0], [np.nan, 1.0, -1.0]], np.float32)
    labels = np.array([[0, 0, 1], [1, 0, 1]], np.float32)
    valid = np.array([[True, False, True], [True, False, True]])
    metrics.update(outputs, labels, valid, np.array([0, 1]))
    result = metrics.result()
    assert result["a"]["click"]["auc"] is None
    assert result["a"]["click"]["reasons"] == {"auc": "every label is 0", "calibration": "every label is 0"}
    assert result["a"]["click"]["logloss"] == pytest.approx(np.log(2))
    assert result["a"]["buy"]["reasons"] == {"auc": "every label is 1"}
    assert result["a"]["rating"]["reasons"] == dict.fromkeys(("rmse", "mae"), "no row has a label")
    assert result["b"]["click"]["logloss"] is None
    assert result["b"]["click"]["reasons"]["auc"] == "1 of 1 predictions are not finite"
    assert result["all"]["click"]["reasons"]["logloss"] == "1 of 2 predictions are not finite"
    assert result["c"]["click"]["rows"] == 0
    assert set(result["c"]["click"]["reasons"]) == {"auc", "logloss", "calibration"}
    json.dumps(result, allow_nan=False)


def test_padding_is_left_out() -> None:
    rows = Rows(seed=1, rows=100)
    padded = Metrics(SCENARIOS, TASKS)
    padded.update(rows.outputs, rows.labels, rows.valid, rows.scenario, num_rows=60)
    plain = Metrics(SCENARIOS, TASKS)
    rows.feed(plain, slice(0, 60))
    assert padded.result() == plain.result()


def test_without_scenarios_there_is_the_total_alone() -> None:
    rows = Rows(seed=2, rows=50)
    metrics = Metrics(["all"], TASKS)
    metrics.update(rows.outputs, rows.labels, rows.valid, np.zeros(50, np.int64))
    assert list(metrics.result()) == ["all"]
    assert metrics.result()["all"]["click"]["rows"] == rows.valid[:, 0].sum()


def test_extreme_logits_keep_a_finite_loss() -> None:
    metrics = Metrics(["all"], [("click", "binary")])
    outputs = np.array([[1e30], [-1e30], [90.0]], np.float32)
    valid = np.ones((3, 1), bool)
    metrics.update(outputs, np.array([[1], [0], [0]], np.float32), valid, np.zeros(3, np.int64))
    assert metrics.result()["all"]["click"]["logloss"] == pytest.approx(30.0)


def _exact(result: dict) -> list:
    """What must not depend on the order of merges to the last bit."""
    return [
        [task.get("auc"), task["rows"], task["positives"], task.get("reasons")]
        for tasks in result.values()
        for task in tasks.values()
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 400), data=st.data())
def test_merging_in_any_order_gives_the_same(seed: int, rows: int, data: st.DataObject) -> None:
    drawn = Rows(seed, rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=4)))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, rows], strict=True):
        part = Metrics(SCENARIOS, TASKS, cap=32)
        drawn.feed(part, slice(begin, end))
        # Some parts travel as bytes, as they do between workers.
        parts.append(Metrics.from_bytes(part.to_bytes()) if begin % 2 else part)
    total = Metrics(SCENARIOS, TASKS, cap=32)
    for part in data.draw(st.permutations(parts)):
        total.merge(part)
    whole = Metrics(SCENARIOS, TASKS, cap=32)
    drawn.feed(whole, slice(None))
    assert _exact(total.result()) == _exact(whole.result())
    for name in SCENARIOS[:2]:
        for task, metric in (
            ("click", "logloss"),
            ("click", "calibration"),
            ("rating", "rmse"),
            ("rating", "mae"),
        ):
            expected = whole.result()[name][task][metric]
            found = total.result()[name][task][metric]
            assert found is expected is None or found == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 300))
def test_bytes_make_the_round_trip(seed: int, rows: int) -> None:
    metrics = Metrics(SCENARIOS, TASKS)
    Rows(seed, rows).feed(metrics, slice(None))
    data = metrics.to_bytes()
    back = Metrics.from_bytes(data)
    assert back.to_bytes() == data
    assert back.result() == metrics.result()
    # What came back goes on counting.
    Rows(seed + 1, 10).feed(back, slice(None))
    Rows(seed + 1, 10).feed(metrics, slice(None))
    assert back.result() == metrics.result()


def test_bytes_that_are_not_metrics_are_refused() -> None:
    data = _whole(Rows(seed=3, rows=100)).to_bytes()
    for broken in (b"", b"x" + data[1:], data[:20], data[:-1], data + b"0"):
        with pytest.raises(ValueError, match="metrics"):
            Metrics.from_bytes(broken)


def test_metrics_of_different_shapes_do_not_merge() -> None:
    metrics = Metrics(SCENARIOS, TASKS)
    for other in (
        Metrics(SCENARIOS[:2], TASKS),
        Metrics(SCENARIOS, TASKS[:1]),
        Metrics(SCENARIOS, TASKS, cap=64),
    ):
        with pytest.raises(ValueError, match="cannot be merged"):
            metrics.merge(other)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="ordinal"):
        Metrics(SCENARIOS, [("click", "ordinal")])


def test_many_scenarios_share_the_memory() -> None:
    assert Metrics(["all"], TASKS).cap == 2**18
    assert Metrics([f"s{i}" for i in range(200)], TASKS).cap == 2**22 // 400
    assert Metrics([f"s{i}" for i in range(5_000)], TASKS).cap == 2**12
