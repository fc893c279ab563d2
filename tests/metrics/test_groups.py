from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlrec.metrics.groups import NO_GROUP, Groups
from mtlrec.metrics.metrics import Metrics
from mtlrec.metrics.ranking import rank_groups

TASKS = (("click", "binary"), ("rating", "regression"), ("choice", "pairwise"))
SCENARIOS = ("feed", "search", "empty")
RANKING = ("gauc", "ndcg@10", "recall@10", "hit@10", "mrr")


class Rows:
    """Random rows of two scenarios (the third stays empty), labels partly missing, some without a user."""

    def __init__(self, seed: int, rows: int, users: int = 12) -> None:
        random = np.random.default_rng(seed)
        self.outputs = np.round(random.normal(size=(rows, 3)), 1).astype(np.float32)
        self.labels = (random.random((rows, 3)) < [0.3, 0.5, 0.2]).astype(np.float32)
        self.valid = random.random((rows, 3)) < [0.9, 0.5, 0.8]
        self.scenario = random.integers(0, 2, rows)
        hashes = np.append(random.integers(1, 2**64, users, dtype=np.uint64), NO_GROUP)
        self.users = hashes[random.integers(0, users + 1, rows)]
        self.ties = random.permutation(rows).astype(np.uint64)

    def feed(self, metrics: Metrics, part: Any = slice(None)) -> Metrics:
        metrics.update(
            self.outputs[part],
            self.labels[part],
            self.valid[part],
            self.scenario[part],
            users=self.users[part],
            ties=self.ties[part],
        )
        return metrics


def grouped(**options: Any) -> Metrics:
    return Metrics(SCENARIOS, TASKS, grouped=True, **options)


def test_ranking_metrics_per_scenario_and_task() -> None:
    rows = Rows(seed=0, rows=4000, users=300)
    result = rows.feed(grouped()).result()
    for s, name in enumerate(SCENARIOS[:2]):
        for t, task in ((0, "click"), (2, "choice")):
            here = (rows.scenario == s) & rows.valid[:, t] & (rows.users != NO_GROUP)
            expected = rank_groups(
                rows.users[here], rows.outputs[here, t], rows.labels[here, t] > 0, rows.ties[here]
            ).summary(10)
            found = result[name][task]
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
            assert "sampled" not in found and "reasons" not in found
    # In "all" a user is one group in each scenario.
    here = rows.valid[:, 0] & (rows.users != NO_GROUP)
    apart = rows.users + rows.scenario.astype(np.uint64)
    ranked = rank_groups(apart[here], rows.outputs[here, 0], rows.labels[here, 0] > 0, rows.ties[here])
    found = result["all"]["click"]
    assert {key: found[key] for key in (*RANKING, "groups")} == pytest.approx(ranked.summary(10), rel=1e-12)
    assert found["groups"] == sum(result[name]["click"]["groups"] for name in SCENARIOS)


def test_kinds_have_their_own_metrics() -> None:
    result = Rows(seed=1, rows=500).feed(grouped(k=5)).result()
    ranking = {"gauc", "ndcg@5", "recall@5", "hit@5", "mrr", "groups"}
    assert set(result["feed"]["click"]) == ranking | {"auc", "logloss", "calibration", "rows", "positives"}
    assert set(result["feed"]["choice"]) == ranking | {"auc", "rows", "positives"}
    assert set(result["feed"]["rating"]) == {"rmse", "mae", "rows", "positives"}
    plain = Metrics(SCENARIOS, TASKS)
    Rows(seed=1, rows=500).feed(plain)
    for name, numbers in plain.result().items():
        for task, values in numbers.items():
            assert {key: result[name][task][key] for key in values if key != "reasons"} == {
                key: value for key, value in values.items() if key != "reasons"
            }
    assert set(plain.result()["feed"]["choice"]) == {"auc", "rows", "positives"}


def test_undefined_ranking_metrics_are_null_with_a_reason() -> None:
    metrics = grouped()
    outputs, valid = np.zeros((4, 3), np.float32), np.ones((4, 3), bool)
    outputs[2, 2] = np.nan
    labels = np.array([[0, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]], np.float32)
    users = np.array([5, 5, 5, NO_GROUP], np.uint64)
    metrics.update(
        outputs, labels, valid, np.array([0, 0, 1, 1]), users=users, ties=np.arange(4, dtype=np.uint64)
    )
    result = metrics.result()
    click = result["feed"]["click"]
    assert [click[name] for name in RANKING] == [None] * 5 and click["groups"] == 0
    assert click["reasons"]["gauc"] == "no user has both labels"
    assert click["reasons"]["mrr"] == "no user has a positive row"
    click = result["search"]["click"]
    assert (click["gauc"], click["mrr"], click["groups"]) == (None, 1.0, 1)
    assert set(click["reasons"]) == {"auc", "gauc"}
    assert set(result["search"]["choice"]["reasons"].values()) == {"1 of 2 predictions are not finite"}
    assert result["search"]["choice"]["ndcg@10"] is None
    assert result["empty"]["choice"]["reasons"]["mrr"] == "no row has a label"
    json.dumps(result, allow_nan=False)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    cap=st.sampled_from([2, 40, 200, 2**24]),
    data=st.data(),
)
def test_order_split_and_merges_change_nothing(seed: int, rows: int, cap: int, data: st.DataObject) -> None:
    drawn = Rows(seed, rows)
    whole = drawn.feed(grouped(group_cap=cap))
    order = np.random.default_rng(seed + 1).permutation(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=4)))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, rows], strict=True):
        part = drawn.feed(grouped(group_cap=cap), order[begin:end])
        parts.append(Metrics.from_bytes(part.to_bytes()) if begin % 2 else part)
    total = grouped(group_cap=cap)
    for part in data.draw(st.permutations(parts)):
        total.merge(part)
    for scenario, tasks in whole.result().items():
        for task, values in tasks.items():
            found = total.result()[scenario][task]
            for name in (*RANKING, "auc", "rows", "groups", "sampled", "reasons"):
                assert found.get(name) == values.get(name), (scenario, task, name)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 300), cap=st.sampled_from([50, 2**24]))
def test_bytes_make_the_round_trip(seed: int, rows: int, cap: int) -> None:
    metrics = Rows(seed, rows).feed(grouped(k=3, group_cap=cap))
    data = metrics.to_bytes()
    back = Metrics.from_bytes(data)
    assert back.to_bytes() == data
    more = Rows(seed + 1, 10)
    assert more.feed(back).result() == more.feed(metrics).result()
    for broken in (data[:-1], data + b"0"):
        with pytest.raises(ValueError, match="metrics"):
            Metrics.from_bytes(broken)


def test_many_rows_are_ranked_block_by_block() -> None:
    rows = Rows(seed=5, rows=150_000, users=9000)
    # One user has as many rows as several blocks.
    rows.users[:60_000] = rows.users[0]
    parts = [rows.feed(grouped(), slice(begin, begin + 40_000)) for begin in range(0, 150_000, 40_000)]
    for part in parts[1:]:
        parts[0].merge(Metrics.from_bytes(part.to_bytes()))
    result, whole = parts[0].result(), rows.feed(grouped()).result()
    for s, name in enumerate(SCENARIOS[:2]):
        assert [result[name]["click"][key] for key in RANKING] == [
            whole[name]["click"][key] for key in RANKING
        ]
        here = (rows.scenario == s) & rows.valid[:, 2] & (rows.users != NO_GROUP)
        expected = rank_groups(
            rows.users[here], rows.outputs[here, 2], rows.labels[here, 2] > 0, rows.ties[here]
        ).summary(10)
        found = result[name]["choice"]
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_beyond_the_cap_whole_groups_are_sampled() -> None:
    rows = Rows(seed=2, rows=60_000, users=6000)
    exact = rows.feed(grouped()).result()["all"]["click"]
    sampled = rows.feed(grouped(group_cap=30_000)).result()["all"]["click"]
    assert sampled["sampled"] and "sampled" not in exact
    # Nearly 120,000 outputs of two tasks: two halvings keep to the cap.
    assert sampled["groups"] / exact["groups"] == pytest.approx(1 / 4, abs=0.05)
    for name in RANKING:
        assert sampled[name] == pytest.approx(exact[name], abs=0.05)
    # What is left of the rows changes no metric that is not one of groups.
    assert [sampled[name] for name in ("auc", "logloss", "rows")] == [
        exact[name] for name in ("auc", "logloss", "rows")
    ]


def test_the_cap_keeps_every_row_of_the_groups_it_keeps() -> None:
    random = np.random.default_rng(3)
    users = random.integers(1, 2**64, 50, dtype=np.uint64)[random.integers(0, 50, 1000)]
    held = Groups(1, cap=300)
    for begin in range(0, 1000, 10):
        part = slice(begin, begin + 10)
        zeros = np.zeros(10, np.int32)
        held.update(
            users[part], zeros, np.zeros((1, 10), np.float32), np.ones((1, 10), np.uint8), users[part]
        )
    kept = held.arrays()[0]
    bound = np.uint64(2**64 - 1) >> np.uint64(held.shift)
    assert sorted(kept) == sorted(users[users <= bound])
    assert len(kept) <= 300 < np.count_nonzero(users <= (bound << np.uint64(1)) + np.uint64(1))


def test_grouped_metrics_merge_only_with_their_like() -> None:
    for other in (Metrics(SCENARIOS, TASKS), grouped(k=5), grouped(group_cap=100)):
        with pytest.raises(ValueError, match="cannot be merged"):
            grouped().merge(other)
    with pytest.raises(ValueError, match="cannot be merged"):
        Groups(1).merge(Groups(2))


def test_arrays_that_are_no_state_are_refused() -> None:
    groups = np.array([2**63], np.uint64)
    scenario, scores = np.zeros(1, np.int32), np.zeros((1, 1), np.float32)
    for shift, label, cap in ((1, 1, 9), (0, 3, 9), (65, 1, 9)):
        labels = np.array([[label]], np.uint8)
        with pytest.raises(ValueError, match="not the state"):
            Groups.from_arrays(cap, shift, (groups, scenario, groups, scores, labels))


def test_regressions_alone_hold_no_groups() -> None:
    metrics = Metrics(["all"], [("rating", "regression")], grouped=True)
    zeros = np.zeros((2, 1), np.float32)
    metrics.update(zeros + 1, zeros, np.ones((2, 1), bool), np.zeros(2, np.int64))
    assert metrics.result()["all"]["rating"] == {"rmse": 1.0, "mae": 1.0, "rows": 2, "positives": None}
